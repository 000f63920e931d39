"""Z-Image (arXiv:2511.22699) through diffusers' own classes: any ZImagePipeline folder, Turbo too.

The network's time is 1 - sigma and its prediction points from noise to image, so v is minus the prediction. Captions
are lists of tensors of different lengths. Guidance is p + s (p - n), so a scale of 0 means none; it may be switched off
near the image (`cfg_truncation`) and limited to a multiple of the conditional norm (`cfg_normalization`).

Departures from the pipeline's `__call__`: the two branches are two forwards instead of one of twice the batch, and
latents and guidance stay in float32 under bfloat16. In float32 both differences are below rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leapalign.errors import UserError
from leapalign.models import published as known
from leapalign.models.base import Text, TextShape
from leapalign.models.text_readers import TextReader, chat_format
from leapalign.storage.components import load_component
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, open_folder
from leapalign.tuning import targets
from leapalign.tuning.full import FULL

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leapalign.models.guidance import Guidance
    from leapalign.models.pipeline import PipelineModel
    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.base import Tuning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
PATCH = 2  # latents a token, along each side
CAPTION_MULTIPLE = 32  # the network pads captions to a multiple of this with a learnt token
LAYERS = targets.LoraTargets(
    layers=(
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
)


def _published(shift: float) -> known.Published:
    """Return 30 blocks of width 3840, two refiner blocks each for noise and text, and FLUX.1's VAE."""
    return known.Published(
        kind="ZImagePipeline",
        components={
            "transformer": ("diffusers.ZImageTransformer2DModel", {"n_layers": 30}),
            "vae": known.vae(0.3611, 0.1159),
            "scheduler": known.scheduler(shift=shift),
            "text_encoder": known.qwen3(kind="Qwen3Model", width=2560, feed_forward=9728, tied=True),
            "tokenizer": ("transformers.Qwen2Tokenizer", {}),
        },
        licence="Apache-2.0",
        unchecked=True,
    )


PUBLISHED = {"Tongyi-MAI/Z-Image": _published(shift=6.0), "Tongyi-MAI/Z-Image-Turbo": _published(shift=3.0)}


@dataclass(frozen=True, kw_only=True)
class ZImage:
    """A ZImagePipeline folder or hub id."""

    name: ClassVar[str] = "z-image"
    pipeline: ClassVar[str] = "ZImagePipeline"
    lora_targets: ClassVar[targets.LoraTargets] = LAYERS
    published: ClassVar[Mapping[str, known.Published]] = PUBLISHED

    path: str
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    guidance_scale: float = (
        5.0  # 0: no guidance, one branch (Turbo); this scale is one less than that of p, n + s (p - n)
    )
    cfg_truncation: float = 1.0  # no guidance at steps with 1 - sigma above this; 1: always guidance
    cfg_normalization: float = 0.0  # maximum norm of the guided v / norm of the prompt's own; 0: no limit
    cfg_grad: Literal["both", "cond"] = "both"  # gradient through both branches or the prompt's alone; same value
    negative_prompt: str = ""
    max_sequence_length: int = 512  # tokens of the prompt
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def at(self, folder: str) -> ZImage:
        """Copy the settings for another pipeline folder."""
        return replace(self, path=folder)

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Return the size of the longest prompt's hidden states."""
        return TextShape(tokens=(self.max_sequence_length, transformer.cap_feat_dim), masked=True)

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """Return each text encoder's tokenizer and its token limit."""
        from leapalign.models.pipeline import load_chat_tokenizer

        tokenizer = load_chat_tokenizer(folder)
        text = chat_format(tokenizer, thinking=True)
        return (TextReader(name="text_encoder", tokenizer=tokenizer, limit=self.max_sequence_length, text=text),)

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return the pipeline's call arguments for the same image."""
        return {
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
            "cfg_truncation": self.cfg_truncation,
            "cfg_normalization": self.cfg_normalization,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }

    @property
    def same_forwards(self) -> bool:
        """False if guidance is switched off at some step: one forward instead of two from there on."""
        return self.cfg_truncation >= 1

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Load the folder. Raises UserError for a folder, image size, prompt length or guidance that cannot work."""
        from leapalign.models import pipeline as pipe

        precision = pipe.parse_dtype(dtype)
        _check_guidance(self)
        folder = open_folder(
            self.path, self.pipeline, ("transformer", "vae", "scheduler", *TEXT_COMPONENTS), loading=loading
        )
        opened = pipe.open_components(folder, device, precision, tuning, self.lora_targets)
        policy = opened.policy
        decoder = pipe.load_decoder(folder, device, self.decode_chunk)
        factor = pipe.vae_factor(decoder.vae)
        pipe.check_size(self.height, self.width, factor * PATCH)
        shape = (policy.config.in_channels, self.height // factor, self.width // factor)
        _check_positions(self.max_sequence_length, shape, policy.config.axes_lens)
        return pipe.put_together(
            opened,
            decoder=decoder,
            latent_shape=shape,
            guidance=guidance(self, opened.train_steps),
            readers=self.text_readers,
            encoder=lambda folder: _text_encoder(folder, device, self.max_sequence_length, opened.dtype),
            text_components=TEXT_COMPONENTS,
            text_settings={"max_sequence_length": self.max_sequence_length},
            predict=predict,
            grid=lambda num_steps: sigma_grid(opened.scheduler, num_steps, shape),
        )


def guidance(config: ZImage, train_steps: int) -> Guidance:
    from leapalign.models.guidance import Guidance

    def applies(sigma: Tensor) -> bool:
        # the pipeline's own arithmetic, so that a step on the border falls on the same side
        return config.cfg_truncation >= 1 or float((1000 - sigma * train_steps) / 1000) <= config.cfg_truncation

    return Guidance(
        config.guidance_scale,
        config.cfg_grad == "both",
        config.negative_prompt,
        combine=partial(limited, most=config.cfg_normalization),
        neutral=0.0,
        applies=applies,
    )


def limited(v: Tensor, v_negative: Tensor, scale: float, *, most: float) -> Tensor:
    """Return w = v + s (v - n), scaled down to at most `most` norms of v (norms over a whole image); most = 0: w."""
    import torch

    combined = v + scale * (v - v_negative)
    if not most:
        return combined
    own, new = (torch.linalg.vector_norm(u, dim=(1, 2, 3), keepdim=True) for u in (v, combined))
    return combined * (most * own / new).clamp(max=1)


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text) -> Tensor:
    """Run one branch: x [B, C, h, w], time in the scheduler's units (0 to 1000) -> v [B, C, h, w]."""
    import torch

    assert text.mask is not None
    captions = [tokens[:length] for tokens, length in zip(text.tokens, text.mask.sum(1).tolist())]
    images = list(x.unsqueeze(2).unbind(0))  # each [C, 1, h, w]
    towards_image = policy(images, (1000 - time.expand(len(x))) / 1000, captions, return_dict=False)[0]
    return -torch.stack(towards_image).squeeze(2)


def sigma_grid(scheduler: Any, num_steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
    """Return descending sigmas [T+1] as in the pipeline: 1 ... 1/T, with mu if the scheduler's shift is dynamic."""
    from leapalign.models.pipeline import shift_mu, spaced_grid

    image_tokens = (latent_shape[1] // PATCH) * (latent_shape[2] // PATCH)
    return spaced_grid(scheduler, num_steps, shift_mu(scheduler, image_tokens))


def _check_guidance(config: ZImage) -> None:
    if not 0 <= config.cfg_truncation <= 1:
        raise UserError(f"cfg_truncation {config.cfg_truncation}: expected 0 to 1 (1 = guidance in every step)")
    if config.cfg_normalization < 0:
        raise UserError(f"cfg_normalization {config.cfg_normalization}: expected a positive number, or 0 for no limit")


def _check_positions(length: int, latent_shape: tuple[int, int, int], table: list[int]) -> None:
    """Raise UserError if positions exceed the rotary table's axes: (text then image, rows, columns)."""
    longest = (table[0] - 2) // CAPTION_MULTIPLE * CAPTION_MULTIPLE  # positions are 1 ... L, and L + 1 for the image
    if not 1 <= length <= longest:
        raise UserError(f"max_sequence_length {length}: expected 1 to {longest} (the model's position table)")
    for name, side, most in zip(("height", "width"), latent_shape[1:], table[1:]):
        if side // PATCH > most:
            raise UserError(f"{name}: {side // PATCH} tokens are beyond the model's position table of {most}")


def _text_encoder(folder: PipelineFolder, device: str, length: int, dtype: Any) -> Any:
    """Load the text encoder; return prompts -> Text, through the pipeline's own `encode_prompt`."""
    import torch
    from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

    from leapalign.models import pipeline as pipe

    components = {
        "tokenizer": pipe.load_chat_tokenizer(folder),
        "text_encoder": load_component(folder, "text_encoder", dtype),
    }
    components["text_encoder"].to(device)
    pipeline: Any = ZImagePipeline(transformer=None, vae=None, scheduler=None, **components)  # pyright: ignore

    def encode(prompt: str) -> Text:
        (tokens,), _ = pipeline.encode_prompt(
            prompt, torch.device(device), do_classifier_free_guidance=False, max_sequence_length=length
        )
        return Text(tokens[None], mask=tokens.new_ones((1, len(tokens)), dtype=torch.bool))

    return pipe.each_alone(encode)
