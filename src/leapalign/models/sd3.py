"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206) through diffusers' own classes: any StableDiffusion3Pipeline folder.

Departures from the pipeline's `__call__`: the two guidance branches are two forwards instead of one of twice the batch,
and latents and guidance stay in float32 under bfloat16. In float32 both differences are below rounding.

By construction the last block's `attn.add_q_proj` and `attn.norm_added_q` have exactly zero gradient: the text
queries of that block are computed and discarded (`context_pre_only`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
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

TEXT_COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
LAYERS = targets.LoraTargets(
    layers=(*targets.ATTENTION, *targets.TEXT_ATTENTION, *targets.FEED_FORWARD),
    optional=("attn2.to_*",),  # the second attention over image tokens of SD3.5-M; SD3-M and SD3.5-L have none
)
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
MEDIUM = {"pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
MEDIUM_FIGURES = known.Figures(
    where=f"Table 4: {known.HPDV2}, 512 x 512, 50 steps",
    scores={
        "hpsv2": 0.2967,
        "hpsv3": 12.2846,
        "pickscore logit": 22.5189,
        "unified alignment": 3.4436,
        "unified quality": 3.5565,
        "imagereward": 1.0614,
    },
)


def _published(*figures: known.Figures, **changes: Any) -> known.Published:
    """Return SD3-M (24 blocks of width 1536) with the given changes."""
    transformer = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "qk_norm": None,
    }
    return known.Published(
        kind="StableDiffusion3Pipeline",
        components={
            "transformer": ("diffusers.SD3Transformer2DModel", transformer | changes),
            "vae": known.vae(1.5305, 0.0609),
            "scheduler": known.scheduler(),
            "text_encoder": known.clip_l("CLIPTextModelWithProjection"),
            "text_encoder_2": known.clip_g(),
            "text_encoder_3": known.t5_xxl(),
            "tokenizer": ("transformers.CLIPTokenizer", {}),
            "tokenizer_2": ("transformers.CLIPTokenizer", {}),
            "tokenizer_3": ("transformers.T5TokenizerFast", {}),
        },
        gated=True,
        licence="Stability AI Community License",
        figures=figures,
    )


PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _published(),
    "stabilityai/stable-diffusion-3.5-medium": _published(MEDIUM_FIGURES, **MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _published(**LARGE),
}


@dataclass(frozen=True, kw_only=True)
class SD3:
    """A StableDiffusion3Pipeline folder or hub id; text_encoder_3 may be absent.

    `shift`: the pipeline's own grid is shifted twice, which makes its last step tiny (sigma_1 = 0.0089 at 25 steps and
    shift 3), so that DRaFT-LV and leaps from j = 1 hardly train. Shifted once, sigma_1 is 0.111.
    """

    name: ClassVar[str] = "sd3"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    lora_targets: ClassVar[targets.LoraTargets] = LAYERS
    published: ClassVar[Mapping[str, known.Published]] = PUBLISHED

    path: str  # a folder, or a hub id: org/name or org/name@revision
    transformer_file: str = ""  # the transformer's weights from this .safetensors file, everything else from `path`
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    shift: Literal["twice", "once"] = "twice"  # how often the scheduler's static shift acts on the grid; see above
    guidance_scale: float = 7.0  # at most 1: no guidance, one branch
    cfg_grad: Literal["both", "cond"] = "both"  # gradient through both branches or the prompt's alone; same value
    negative_prompt: str = ""
    max_sequence_length: int = 256  # T5 tokens; 0 only without T5: omits the zeros in place of its tokens
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def at(self, folder: str) -> SD3:
        """Copy the settings for another pipeline folder, with that folder's own transformer."""
        return replace(self, path=folder, transformer_file="")

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Return the sizes of CLIP's tokens followed by T5's (or by zeros), and of both CLIPs' pooled features."""
        from leapalign.storage.pipeline_folder import read_json

        clip = read_json(folder.path / "text_encoder" / "config.json")
        length = clip.get("max_position_embeddings", 77) + self.max_sequence_length
        return TextShape(tokens=(length, transformer.joint_attention_dim), pooled=transformer.pooled_projection_dim)

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """Return each text encoder's tokenizer and its token limit."""
        clip, clip_2, t5 = (load_component(folder, name) for name in TEXT_COMPONENTS if name.startswith("tokenizer"))
        limit = clip.model_max_length  # the pipeline uses the first tokenizer's limit for both
        readers = (
            TextReader(name="text_encoder", tokenizer=clip, limit=limit),
            TextReader(name="text_encoder_2", tokenizer=clip_2, limit=limit),
        )
        with_t5 = t5 is not None and "text_encoder_3" in folder.components
        third = (TextReader(name="text_encoder_3", tokenizer=t5, limit=self.max_sequence_length),) if with_t5 else ()
        return readers + third

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return the pipeline's call arguments for the same image."""
        arguments: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }
        return arguments if self.shift == "twice" else arguments | {"sigmas": even_sigmas(num_steps)}

    @property
    def same_forwards(self) -> bool:
        """True: guidance is on in every step or in none."""
        return True

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Load the folder. Raises UserError for a folder, image size or prompt length that cannot work."""
        from leapalign.models import pipeline as pipe

        precision = pipe.parse_dtype(dtype)
        needed = ("transformer", "vae", "scheduler", *TEXT_COMPONENTS[:4])
        folder = open_folder(self.path, self.pipeline, needed, self.transformer_file, loading)
        _check_sequence_length(self.max_sequence_length, "text_encoder_3" in folder.components)
        opened = pipe.open_components(folder, device, precision, tuning, self.lora_targets)
        policy = opened.policy
        decoder = pipe.load_decoder(folder, device, self.decode_chunk)
        shape = _latent_shape(self, policy.config, pipe.vae_factor(decoder.vae))
        return pipe.put_together(
            opened,
            decoder=decoder,
            latent_shape=shape,
            guidance=pipe.Guidance(self.guidance_scale, self.cfg_grad == "both", self.negative_prompt),
            readers=self.text_readers,
            encoder=lambda folder: _text_encoder(folder, policy, self.max_sequence_length, opened.dtype),
            text_components=TEXT_COMPONENTS,
            text_settings={
                "max_sequence_length": self.max_sequence_length,
                "joint_attention_dim": policy.config.joint_attention_dim,  # the width of the zeros in place of T5
            },
            predict=predict,
            grid=lambda num_steps: sigma_grid(self, opened.scheduler, num_steps, shape, policy.config.patch_size),
        )


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text) -> Tensor:
    """Run one branch: x [B, C, h, w], time in the scheduler's units (0 to 1000) -> v [B, C, h, w]."""
    return policy(
        hidden_states=x,
        timestep=time.expand(len(x)),
        encoder_hidden_states=text.tokens,
        pooled_projections=text.pooled,
        return_dict=False,
    )[0]


def sigma_grid(config: SD3, scheduler: Any, num_steps: int, latent_shape: tuple[int, int, int], patch: int) -> Tensor:
    """Return descending sigmas [T+1].

    Shifted twice, as in the pipeline: asked for by number of steps, the scheduler shifts a range that it has already
    shifted. Shifted once: from explicit even sigmas.
    """
    from leapalign.models.pipeline import shift_mu

    image_tokens = (latent_shape[1] // patch) * (latent_shape[2] // patch)
    asked = {"num_inference_steps": num_steps} if config.shift == "twice" else {"sigmas": even_sigmas(num_steps)}
    scheduler.set_timesteps(**asked, mu=shift_mu(scheduler, image_tokens, max_shift=1.16))  # mu: for a dynamic shift
    return scheduler.sigmas


def even_sigmas(num_steps: int) -> list[float]:
    """Return T sigmas from 1 to 1/T in even steps."""
    return [1 - step / num_steps for step in range(num_steps)]


def _latent_shape(config: SD3, policy: Any, factor: int) -> tuple[int, int, int]:
    from leapalign.models.pipeline import check_size

    check_size(config.height, config.width, factor * policy.patch_size)
    height, width = config.height // factor, config.width // factor
    most = policy.pos_embed_max_size
    if most and max(height, width) > most * policy.patch_size:
        pixels = most * policy.patch_size * factor
        raise UserError(
            f"{config.height} x {config.width} is beyond the position table: at most {pixels} pixels a side"
        )
    return policy.in_channels, height, width


def _check_sequence_length(length: int, with_t5: bool) -> None:
    least = 1 if with_t5 else 0
    if not least <= length <= 512:
        raise UserError(f"max_sequence_length {length}: expected {least} to 512 {'with' if with_t5 else 'without'} T5")


def _text_encoder(folder: PipelineFolder, policy: Any, length: int, dtype: Any) -> Any:
    """Load the text encoders; return prompts -> Text, through the pipeline's own `encode_prompt`."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    device = policy.device
    components = {name: load_component(folder, name, dtype) for name in TEXT_COMPONENTS}
    pipeline: Any = StableDiffusion3Pipeline(transformer=policy, vae=None, scheduler=None, **components)  # pyright: ignore
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if components[name] is not None:
            components[name].to(device)
    _warn_of_cropping(components, policy.config.joint_attention_dim)

    def encode(prompts: list[str]) -> Text:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return Text(tokens, pooled)

    return encode


def _warn_of_cropping(components: dict[str, Any], width: int) -> None:
    clip = components["text_encoder"].config.hidden_size + components["text_encoder_2"].config.hidden_size
    if clip > width:
        warnings.warn(f"CLIP gives {clip} features, joint_attention_dim is {width}: the rest is cropped", stacklevel=2)
