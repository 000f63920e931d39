"""Qwen-Image (arXiv:2508.02324) through diffusers' own classes: any QwenImagePipeline folder.

Guidance rescales the combined prediction to the norm of the conditional one, token by token. The norms belong to v and
are differentiated (`renormalised`). Latents are [B, C, h, w]; each forward packs them into 2 x 2 patches.

The VAE is a video VAE. A single frame needs neither its feature cache (changed by every `decode`, so recomputation in
the backward pass would have to reset it) nor its final clamp to [-1, 1] (zero gradient outside). The decoder is called
without both: the pixels are the same and depend on the latents alone.

Departures from the pipeline's `__call__`: image sizes that do not fit raise UserError instead of being rounded;
latents, times, guidance and the Euler sum stay in float32 under bfloat16; prompts are encoded without padding.

By construction the last block's text stream has no gradient after its keys and values (`add_q_proj`, `norm_added_q`,
`to_add_out`, `txt_mlp`): its output is discarded.
"""

from __future__ import annotations

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

    from leapalign.models.decode import Decoder
    from leapalign.models.pipeline import PipelineModel
    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.base import Tuning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
PATCH = 2  # latents a token, along each side
LAYERS = targets.LoraTargets(
    layers=(
        *(*targets.ATTENTION, *targets.TEXT_ATTENTION),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
)
QWEN2_5_VL = {  # 7B, with its vision tower: the folder holds the whole model
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
DYNAMIC = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
PUBLISHED = {
    "Qwen/Qwen-Image": known.Published(
        kind="QwenImagePipeline",
        components={
            "transformer": ("diffusers.QwenImageTransformer2DModel", {"num_layers": 60}),  # of width 3072
            "vae": ("diffusers.AutoencoderKLQwenImage", {"z_dim": 16}),
            "scheduler": known.scheduler(shift=1.0, use_dynamic_shifting=True, **DYNAMIC),
            "text_encoder": ("transformers.Qwen2_5_VLForConditionalGeneration", QWEN2_5_VL),
            "tokenizer": ("transformers.Qwen2Tokenizer", {}),
        },
        licence="Apache-2.0",
        unchecked=True,
    )
}


@dataclass(frozen=True, kw_only=True)
class QwenImage:
    """A QwenImagePipeline folder or hub id."""

    name: ClassVar[str] = "qwen-image"
    pipeline: ClassVar[str] = "QwenImagePipeline"
    lora_targets: ClassVar[targets.LoraTargets] = LAYERS
    published: ClassVar[Mapping[str, known.Published]] = PUBLISHED

    path: str
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    guidance_scale: float = 4.0  # the pipeline's true_cfg_scale; at most 1: no guidance, one branch
    cfg_grad: Literal["both", "cond"] = "both"  # gradient through both branches or the prompt's alone; same value
    negative_prompt: str = " "
    max_sequence_length: int = 512  # tokens of the prompt; long prompts are cut, short ones are not padded
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def at(self, folder: str) -> QwenImage:
        """Copy the settings for another pipeline folder."""
        return replace(self, path=folder)

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Return the size of the longest prompt's hidden states."""
        return TextShape(tokens=(self.max_sequence_length, transformer.joint_attention_dim), masked=True)

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """Return each text encoder's tokenizer and its token limit."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

        tokenizer = load_component(folder, "tokenizer")
        absent: dict[str, Any] = dict.fromkeys(("transformer", "vae", "scheduler", "text_encoder"))
        chat: Any = QwenImagePipeline(tokenizer=tokenizer, **absent)  # only for its chat format
        return (
            TextReader(
                name="text_encoder",
                tokenizer=tokenizer,
                limit=self.max_sequence_length,
                text=chat.prompt_template_encode.format,
                dropped=chat.prompt_template_encode_start_idx,
            ),
        )

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return the pipeline's call arguments for the same image."""
        return {
            "height": self.height,
            "width": self.width,
            "true_cfg_scale": self.guidance_scale,
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
        if not 1 <= self.max_sequence_length <= 1024:
            raise UserError(f"max_sequence_length {self.max_sequence_length}: expected 1 to 1024")
        folder = open_folder(
            self.path, self.pipeline, ("transformer", "vae", "scheduler", *TEXT_COMPONENTS), loading=loading
        )
        opened = pipe.open_components(folder, device, precision, tuning, self.lora_targets)
        policy = opened.policy
        decoder = load_decoder(folder, device, self.decode_chunk)
        factor = decoder.vae.spatial_compression_ratio
        pipe.check_size(self.height, self.width, factor * PATCH)
        shape = (policy.config.in_channels // PATCH**2, self.height // factor, self.width // factor)
        return pipe.put_together(
            opened,
            decoder=decoder,
            latent_shape=shape,
            guidance=pipe.Guidance(
                self.guidance_scale, self.cfg_grad == "both", self.negative_prompt, combine=renormalised
            ),
            readers=self.text_readers,
            encoder=lambda folder: _text_encoder(folder, device, self.max_sequence_length, opened.dtype),
            text_components=TEXT_COMPONENTS,
            text_settings={"max_sequence_length": self.max_sequence_length},
            predict=predict,
            grid=lambda num_steps: sigma_grid(opened.scheduler, num_steps, shape),
        )


def renormalised(v: Tensor, v_negative: Tensor, scale: float) -> Tensor:
    """Return w |v| / |w|, w = n + s (v - n), with norms over the C * 2 * 2 numbers of each patch; [B, C, h, w]."""
    from leapalign.models.guidance import linear

    combined = linear(v, v_negative, scale)
    return combined * (patch_norm(v) / patch_norm(combined))


def patch_norm(v: Tensor) -> Tensor:
    """Return the norm of each latent's 2 x 2 patch: [B, C, h, w] -> [B, 1, h, w]."""
    import torch

    patches = v.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h/2, 2, w/2, 2]
    norm = torch.linalg.vector_norm(patches, dim=(1, 3, 5), keepdim=True)
    return norm.expand(-1, -1, -1, PATCH, -1, PATCH).flatten(4, 5).flatten(2, 3)


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text) -> Tensor:
    """Run one branch: x [B, C, h, w], time in the scheduler's units (0 to 1000) -> v [B, C, h, w]."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline as Pipeline

    batch, channels, height, width = x.shape
    mask = text.mask
    v = policy(
        hidden_states=Pipeline._pack_latents(x.contiguous(), batch, channels, height, width),  # [B, hw/4, 4C]
        timestep=time.expand(batch) / 1000,
        guidance=None,
        encoder_hidden_states=text.tokens,
        encoder_hidden_states_mask=mask if mask is not None and not bool(mask.all()) else None,  # faster without
        img_shapes=[[(1, height // PATCH, width // PATCH)]] * batch,
        return_dict=False,
    )[0]
    return Pipeline._unpack_latents(v, height, width, vae_scale_factor=1)[:, :, 0]


def sigma_grid(scheduler: Any, num_steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
    """Return descending sigmas [T+1] as in the pipeline: 1 ... 1/T, shifted by mu(number of image tokens)."""
    from leapalign.models.pipeline import shift_mu, spaced_grid

    image_tokens = (latent_shape[1] // PATCH) * (latent_shape[2] // PATCH)
    return spaced_grid(scheduler, num_steps, shift_mu(scheduler, image_tokens))


def load_decoder(folder: PipelineFolder, device: str, chunk: int) -> Decoder:
    """Load the decoder, whose latents are normalised per channel."""
    import torch

    from leapalign.models import pipeline as pipe

    vae = pipe.load_vae(folder, device, "AutoencoderKLQwenImage")
    mean, std = (
        torch.tensor(numbers, device=device).view(-1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return pipe.Decoder(vae, 1 / std, mean, chunk, _decode)


def _decode(vae: Any, z: Tensor) -> Tensor:
    """Decode single frames without cache and clamp: [n, C, h, w] -> [n, 3, H, W]."""
    return vae.decoder(vae.post_quant_conv(z[:, :, None]))[:, :, 0]


def _text_encoder(folder: PipelineFolder, device: str, length: int, dtype: Any) -> Any:
    """Load the text encoder; return prompts -> Text, through the pipeline's own `encode_prompt`."""
    import torch
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

    from leapalign.models import pipeline as pipe

    components = {name: load_component(folder, name, dtype) for name in TEXT_COMPONENTS}
    components["text_encoder"].to(device)
    pipeline: Any = QwenImagePipeline(transformer=None, vae=None, scheduler=None, **components)  # pyright: ignore

    def encode(prompt: str) -> Text:
        tokens, _ = pipeline.encode_prompt(prompt, torch.device(device), max_sequence_length=length)
        return Text(tokens, mask=tokens.new_ones(tokens.shape[:2], dtype=torch.bool))

    return pipe.each_alone(encode)
