"""FLUX.1 through diffusers' own classes: any FluxPipeline folder (dev, Krea-dev, schnell).

Latents are [B, C, h, w] outside this file; each forward packs them into 2 x 2 patches. Guidance-distilled models take
guidance as an input of the network (one forward); true guidance with a negative prompt is set separately.

Departures from the pipeline's `__call__`: image sizes that do not fit raise UserError instead of being rounded, and
latents, times and the Euler sum stay in float32 under bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.models import published as known
from leapalign.models.base import Text, TextShape
from leapalign.models.text_readers import TextReader
from leapalign.storage.components import load_component
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, open_folder
from leapalign.tuning import targets
from leapalign.tuning.full import FULL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leapalign.models.pipeline import PipelineModel
    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.base import Tuning

TEXT_COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
PATCH = 2  # latents a token, along each side

LAYERS = targets.LoraTargets(  # proj_mlp and proj_out are the single blocks' feed-forward
    layers=(
        *(*targets.ATTENTION, *targets.TEXT_ATTENTION, *targets.FEED_FORWARD),
        # the full path, because the model's final proj_out belongs to no block
        *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
    )
)
DEV_FIGURES = (
    known.Figures(
        where=f"Table 2: {known.HPDV2}, 720 x 720, 50 steps, guidance 3.5",
        scores={
            "hpsv2": 0.3078,
            "hpsv3": 13.5020,
            "pickscore logit": 22.7902,
            "unified alignment": 3.4514,
            "unified quality": 3.5708,
            "imagereward": 1.0455,
        },
    ),
    known.Figures(where="Table 3: MJHQ-30k, a random 500 prompts", scores={"hpsv3": 10.7624}),
    known.Figures(where="Table 2: GenEval, 553 prompts, 4 images each", scores={"geneval": 0.6535}),
)
DYNAMIC = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def _published(*, distilled_guidance: bool, licence: str, figures: tuple[known.Figures, ...] = ()) -> known.Published:
    """Return 19 double and 38 single blocks of width 3072, with guidance as an input (dev) or without (schnell)."""
    transformer = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": distilled_guidance,
    }
    dynamic = known.scheduler(use_dynamic_shifting=True, **DYNAMIC)
    return known.Published(
        kind="FluxPipeline",
        components={
            "transformer": ("diffusers.FluxTransformer2DModel", transformer),
            "vae": known.vae(0.3611, 0.1159),
            "scheduler": dynamic if distilled_guidance else known.scheduler(shift=1.0),
            "text_encoder": known.clip_l("CLIPTextModel"),
            "text_encoder_2": known.t5_xxl(),
            "tokenizer": ("transformers.CLIPTokenizer", {}),
            "tokenizer_2": ("transformers.T5TokenizerFast", {}),
        },
        gated=distilled_guidance,
        licence=licence,
        figures=figures,
    )


DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"
PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": _published(distilled_guidance=True, licence=DEV_LICENCE, figures=DEV_FIGURES),
    "black-forest-labs/FLUX.1-Krea-dev": _published(distilled_guidance=True, licence=DEV_LICENCE),
    "black-forest-labs/FLUX.1-schnell": _published(distilled_guidance=False, licence="Apache-2.0"),
}


@dataclass(frozen=True, kw_only=True)
class Flux:
    """FLUX.1: a FluxPipeline folder or hub id."""

    name: ClassVar[str] = "flux"
    pipeline: ClassVar[str] = "FluxPipeline"
    lora_targets: ClassVar[targets.LoraTargets] = LAYERS
    published: ClassVar[Mapping[str, known.Published]] = PUBLISHED

    path: str  # a folder, or a hub id: org/name or org/name@revision
    transformer_file: str = ""  # the transformer's weights from this .safetensors file, everything else from `path`
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    guidance_scale: float = 3.5  # embedded; unused if the network has no such input (schnell)
    true_cfg_scale: float = 1.0  # at most 1: no negative branch
    cfg_grad: Literal["both", "cond"] = "both"  # of true guidance: gradient through both branches or the prompt's alone
    negative_prompt: str = ""  # used with true guidance only
    max_sequence_length: int = 512  # T5 tokens
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def at(self, folder: str) -> Flux:
        """Copy the settings for another pipeline folder, with that folder's own transformer."""
        return replace(self, path=folder, transformer_file="")

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Return the sizes of T5's tokens and CLIP's pooled features."""
        return TextShape(
            tokens=(self.max_sequence_length, transformer.joint_attention_dim), pooled=transformer.pooled_projection_dim
        )

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """Return each text encoder's tokenizer and its token limit."""
        clip, t5 = (load_component(folder, name) for name in ("tokenizer", "tokenizer_2"))
        return (
            TextReader(name="text_encoder", tokenizer=clip, limit=clip.model_max_length),
            TextReader(name="text_encoder_2", tokenizer=t5, limit=self.max_sequence_length),
        )

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return the pipeline's call arguments for the same image."""
        return {
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
            "true_cfg_scale": self.true_cfg_scale,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }

    @property
    def same_forwards(self) -> bool:
        """True: guidance is on in every step or in none."""
        return True

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Load the folder. Raises UserError for a folder, image size or prompt length that cannot work."""
        from leapalign.models import pipeline as pipe

        precision = pipe.parse_dtype(dtype)
        if not 1 <= self.max_sequence_length <= 512:
            raise UserError(f"max_sequence_length {self.max_sequence_length}: expected 1 to 512")
        needed = ("transformer", "vae", "scheduler", *TEXT_COMPONENTS)
        folder = open_folder(self.path, self.pipeline, needed, self.transformer_file, loading)
        opened = pipe.open_components(folder, device, precision, tuning, self.lora_targets)
        policy = opened.policy
        decoder = pipe.load_decoder(folder, device, self.decode_chunk)
        factor = pipe.vae_factor(decoder.vae)
        pipe.check_size(self.height, self.width, factor * PATCH)
        shape = (policy.config.in_channels // PATCH**2, self.height // factor, self.width // factor)
        return pipe.put_together(
            opened,
            decoder=decoder,
            latent_shape=shape,
            guidance=pipe.Guidance(self.true_cfg_scale, self.cfg_grad == "both", self.negative_prompt),
            readers=self.text_readers,
            encoder=lambda folder: _text_encoder(folder, policy, self.max_sequence_length, opened.dtype),
            text_components=TEXT_COMPONENTS,
            text_settings={"max_sequence_length": self.max_sequence_length},
            predict=partial(predict, guidance_scale=self.guidance_scale),
            grid=lambda num_steps: sigma_grid(opened.scheduler, num_steps, shape),
        )


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text, guidance_scale: float) -> Tensor:
    """Run one forward: x [B, C, h, w], time in the scheduler's units (0 to 1000) -> v [B, C, h, w]."""
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
    """Return descending sigmas [T+1] as in the pipeline: 1 ... 1/T, shifted by mu(number of image tokens)."""
    from leapalign.models.pipeline import shift_mu, spaced_grid

    image_tokens = (latent_shape[1] // PATCH) * (latent_shape[2] // PATCH)
    return spaced_grid(scheduler, num_steps, shift_mu(scheduler, image_tokens))


def _text_encoder(folder: PipelineFolder, policy: Any, length: int, dtype: Any) -> Any:
    """Load the text encoders; return prompts -> Text, through the pipeline's own `encode_prompt`."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    device = policy.device
    components = {name: load_component(folder, name, dtype) for name in TEXT_COMPONENTS}
    pipeline: Any = FluxPipeline(transformer=policy, vae=None, scheduler=None, **components)  # pyright: ignore
    components["text_encoder"].to(device)
    components["text_encoder_2"].to(device)

    def encode(prompts: list[str]) -> Text:
        tokens, pooled, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=length)
        return Text(tokens, pooled)

    return encode
