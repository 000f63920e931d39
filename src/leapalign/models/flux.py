"""FLUX.1 through diffusers' own classes: any FluxPipeline folder (dev, Krea-dev, schnell).

Latents are [B, C, h, w] outside of this file; packing into 2 x 2 patches happens around each forward. Guidance is an
input of the network (one forward) where it was distilled; true guidance with a negative prompt is a second switch.

Departures from the pipeline's `__call__`: sizes that do not fit are refused instead of rounded, and latents, times
and the Euler sum stay in float32 under bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.models.base import Text
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, open_folder
from leapalign.tuning.full import FULL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leapalign.models.pipeline import PipelineModel
    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.base import Tuning

TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PATCH = 2  # latents a token, along each side


@dataclass(frozen=True, kw_only=True)
class Flux:
    """FLUX.1: a FluxPipeline folder or hub id."""

    name: ClassVar[str] = "flux"
    pipeline: ClassVar[str] = "FluxPipeline"  # the diffusers class whose folders it opens

    path: str  # a folder, or a hub id: org/name or org/name@revision
    transformer_file: str = ""  # the transformer's weights from this .safetensors file, everything else from `path`
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    guidance_scale: float = 3.5  # embedded; unused where the network has no such input (schnell)
    true_cfg_scale: float = 1.0  # at most 1: no negative branch
    cfg_grad: Literal["both", "cond"] = "both"  # of true guidance: gradient through both branches or the prompt's alone
    negative_prompt: str = ""  # used with true guidance only
    max_sequence_length: int = 512  # T5 tokens
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Open the folder. Raises UserError on a folder, size or length that cannot work."""
        from leapalign.models import pipeline as pipe

        precision = pipe.parse_dtype(dtype)
        if not 1 <= self.max_sequence_length <= 512:
            raise UserError(f"max_sequence_length {self.max_sequence_length}: expected 1 to 512")
        needed = ("transformer", "vae", "scheduler", *TEXT_PARTS)
        folder = open_folder(self.path, self.pipeline, needed, self.transformer_file, loading)
        parts = pipe.open_parts(folder, device, precision, tuning)
        policy = parts.policy
        decoder = pipe.load_decoder(folder, device, self.decode_chunk)
        factor = pipe.vae_factor(decoder.vae)
        pipe.check_size(self.height, self.width, factor * PATCH)
        shape = (policy.config.in_channels // PATCH**2, self.height // factor, self.width // factor)
        return pipe.put_together(
            parts,
            decoder=decoder,
            latent_shape=shape,
            guidance=pipe.Guidance(self.true_cfg_scale, self.cfg_grad == "both", self.negative_prompt),
            encoder=lambda folder: _text_encoder(folder, policy, self.max_sequence_length, parts.dtype),
            text_parts=TEXT_PARTS,
            text_settings={"max_sequence_length": self.max_sequence_length},
            predict=partial(predict, guidance_scale=self.guidance_scale),
            grid=lambda num_steps: sigma_grid(parts.scheduler, num_steps, shape),
        )


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text, guidance_scale: float) -> Tensor:
    """One forward: x [B, C, h, w], time in the scheduler's units (0 to 1000) -> v [B, C, h, w]."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    batch, channels, height, width = x.shape
    image_ids = FluxPipeline._prepare_latent_image_ids(batch, height // PATCH, width // PATCH, x.device, x.dtype)
    v = policy(
        hidden_states=FluxPipeline._pack_latents(x.contiguous(), batch, channels, height, width),  # [B, hw/4, 4C]
        timestep=time.expand(batch) / 1000,
        guidance=x.new_full([batch], guidance_scale) if policy.config.guidance_embeds else None,  # pyright: ignore
        pooled_projections=text.pooled,
        encoder_hidden_states=text.tokens,
        txt_ids=x.new_zeros(text.tokens.shape[1], 3),
        img_ids=image_ids,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(v, height, width, vae_scale_factor=1)


def sigma_grid(scheduler: Any, num_steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
    """As the pipeline asks for it: explicit sigmas 1 ... 1/T, shifted by mu of the number of image tokens."""
    from leapalign.models.pipeline import shift_mu, spaced_grid

    image_tokens = (latent_shape[1] // PATCH) * (latent_shape[2] // PATCH)
    return spaced_grid(scheduler, num_steps, shift_mu(scheduler, image_tokens))


def _text_encoder(folder: PipelineFolder, policy: Any, length: int, dtype: Any) -> Any:
    """Loads the text encoders; returns prompts -> Text, by the pipeline's own `encode_prompt`."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    from leapalign.storage.pipeline_folder import load_part

    device = policy.device
    parts = {name: load_part(folder, name, dtype) for name in TEXT_PARTS}
    pipeline: Any = FluxPipeline(transformer=policy, vae=None, scheduler=None, **parts)  # pyright: ignore
    parts["text_encoder"].to(device)
    parts["text_encoder_2"].to(device)

    def encode(prompts: list[str]) -> Text:
        tokens, pooled, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=length)
        return Text(tokens, pooled)

    return encode
