"""FLUX.2 [klein] through diffusers' own classes: any Flux2KleinPipeline folder, step-distilled or not.

Latents are [B, 4C, H/16, W/16], as the pipeline draws them: 2 x 2 patches of the VAE's latents as channels, normalised
by the VAE's batch-norm statistics. Positions have four axes (time, row, column, text). Prompt embeds are the
hidden states of a Qwen3 after three of its layers, concatenated; padding is attended to, as in the pipeline, so every
prompt has `max_sequence_length` tokens.

Departures from the pipeline's `__call__`: image sizes that do not fit raise UserError instead of being rounded;
latents, times and the Euler sum stay in float32 under bfloat16; the negative prompt need not be "".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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

    from leapalign.models.decode import Decoder
    from leapalign.models.pipeline import PipelineModel
    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.base import Tuning

PATCH = 2  # VAE latents in one of ours, along each side

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
LAYERS = targets.LoraTargets(
    layers=(
        *(*targets.ATTENTION, *targets.TEXT_ATTENTION),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out"),
    )
)
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
}


def _published(*, large: bool, distilled: bool) -> known.Published:
    """Return 5 double and 20 single blocks of width 3072 (4B), or 8 and 24 of 4096 (9B); text: 3 layers of Qwen3."""
    width, feed_forward = (4096, 12288) if large else (2560, 9728)
    sizes = (8, 24, 32) if large else (5, 20, 24)
    transformer = dict(zip(("num_layers", "num_single_layers", "num_attention_heads"), sizes))
    transformer |= {"joint_attention_dim": 3 * width, "guidance_embeds": False}
    return known.Published(
        kind="Flux2KleinPipeline",
        components={
            "transformer": ("diffusers.Flux2Transformer2DModel", transformer),
            "vae": ("diffusers.AutoencoderKLFlux2", VAE),
            "scheduler": known.scheduler(use_dynamic_shifting=True),
            "text_encoder": known.qwen3(
                kind="Qwen3ForCausalLM", width=width, feed_forward=feed_forward, tied=not large
            ),
            "tokenizer": ("transformers.Qwen2TokenizerFast", {}),
        },
        gated=large,
        licence="FLUX Non-Commercial License" if large else "Apache-2.0",
        unchecked=True,
        index={"is_distilled": distilled},
    )


PUBLISHED = {
    "black-forest-labs/FLUX.2-klein-4B": _published(large=False, distilled=True),
    "black-forest-labs/FLUX.2-klein-9B": _published(large=True, distilled=True),
    "black-forest-labs/FLUX.2-klein-base-4B": _published(large=False, distilled=False),
    "black-forest-labs/FLUX.2-klein-base-9B": _published(large=True, distilled=False),
}


@dataclass(frozen=True, kw_only=True)
class Flux2Klein:
    """A Flux2KleinPipeline folder or hub id."""

    name: ClassVar[str] = "flux2-klein"
    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    lora_targets: ClassVar[targets.LoraTargets] = LAYERS
    published: ClassVar[Mapping[str, known.Published]] = PUBLISHED

    path: str
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    guidance_scale: float = 4.0  # at most 1: one branch; unused if the pipeline is distilled (`is_distilled`)
    cfg_grad: Literal["both", "cond"] = "both"  # gradient through both branches or the prompt's alone; same value
    negative_prompt: str = ""
    max_sequence_length: int = 512  # tokens of the prompt, always padded to this
    text_layers: tuple[int, ...] = (9, 18, 27)  # Qwen3 layers whose hidden states are used; 0 is the word embedding
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def at(self, folder: str) -> Flux2Klein:
        """Copy the settings for another pipeline folder."""
        return replace(self, path=folder)

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Return the size of the concatenated hidden states, always of the full length."""
        return TextShape(tokens=(self.max_sequence_length, transformer.joint_attention_dim))

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """Return each text encoder's tokenizer and its token limit."""
        from leapalign.models.pipeline import load_chat_tokenizer

        tokenizer = load_chat_tokenizer(folder)
        text = chat_format(tokenizer, thinking=False)
        return (TextReader(name="text_encoder", tokenizer=tokenizer, limit=self.max_sequence_length, text=text),)

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return the pipeline's call arguments for the same image."""
        return {
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
            "text_encoder_out_layers": self.text_layers,
        }

    @property
    def same_forwards(self) -> bool:
        """True: guidance is on in every step or in none."""
        return True

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Load the folder. Raises UserError for a folder, image size, prompt length or layer that cannot work."""
        from leapalign.models import pipeline as pipe

        precision = pipe.parse_dtype(dtype)
        if not 1 <= self.max_sequence_length <= 512:
            raise UserError(f"max_sequence_length {self.max_sequence_length}: expected 1 to 512")
        folder = open_folder(
            self.path, self.pipeline, ("transformer", "vae", "scheduler", *TEXT_COMPONENTS), loading=loading
        )
        opened = pipe.open_components(folder, device, precision, tuning, self.lora_targets)
        policy = opened.policy
        _check_layers(self.text_layers, folder, policy.config.joint_attention_dim)
        decoder = load_decoder(folder, device, self.decode_chunk)
        factor = pipe.vae_factor(decoder.vae) * PATCH
        pipe.check_size(self.height, self.width, factor)
        shape = (policy.config.in_channels, self.height // factor, self.width // factor)
        return pipe.put_together(
            opened,
            decoder=decoder,
            latent_shape=shape,
            guidance=pipe.Guidance(_scale(self, folder), self.cfg_grad == "both", self.negative_prompt),
            readers=self.text_readers,
            encoder=lambda folder: _text_encoder(self, folder, device, opened.dtype),
            text_components=TEXT_COMPONENTS,
            text_settings={"max_sequence_length": self.max_sequence_length, "text_layers": self.text_layers},
            predict=predict,
            grid=lambda num_steps: sigma_grid(opened.scheduler, num_steps, shape),
        )


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text) -> Tensor:
    """Run one branch: x [B, 4C, h, w], time in the scheduler's units (0 to 1000) -> v [B, 4C, h, w]."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline as Pipeline

    v = policy(
        hidden_states=Pipeline._pack_latents(x),  # [B, hw, 4C]
        timestep=time.expand(len(x)) / 1000,
        guidance=None,
        encoder_hidden_states=text.tokens,
        txt_ids=Pipeline._prepare_text_ids(text.tokens[:1]).to(x.device),  # pyright: ignore  # [1, L, 4]; same for all
        img_ids=Pipeline._prepare_latent_ids(x[:1]).to(x.device),  # pyright: ignore  # [1, hw, 4]
        return_dict=False,
    )[0]
    return v.transpose(1, 2).unflatten(2, x.shape[2:])


def sigma_grid(scheduler: Any, num_steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
    """Return descending sigmas [T+1] as in the pipeline: mu is empirical in the numbers of image tokens and steps."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    from leapalign.models.pipeline import spaced_grid

    return spaced_grid(scheduler, num_steps, compute_empirical_mu(latent_shape[1] * latent_shape[2], num_steps))


def load_decoder(folder: PipelineFolder, device: str, chunk: int) -> Decoder:
    """Load the decoder, which undoes the batch norm that the VAE applied to its latents in training."""
    import torch

    from leapalign.models import pipeline as pipe

    vae = pipe.load_vae(folder, device, "AutoencoderKLFlux2")
    std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return pipe.Decoder(vae, 1 / std.view(-1, 1, 1), vae.bn.running_mean.view(-1, 1, 1), chunk, _decode)


def _decode(vae: Any, z: Tensor) -> Tensor:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

    return vae.decode(Flux2KleinPipeline._unpatchify_latents(z), return_dict=False)[0]


def _scale(config: Flux2Klein, folder: PipelineFolder) -> float:
    """Return the guidance scale; a distilled network, with guidance built in, runs one branch."""
    from leapalign.storage.pipeline_folder import INDEX, read_json

    distilled = read_json(folder.path / INDEX).get("is_distilled", False)
    return 1.0 if distilled else config.guidance_scale


def _check_layers(layers: tuple[int, ...], folder: PipelineFolder, width: int) -> None:
    from leapalign.storage.pipeline_folder import read_json

    place = folder.path / "text_encoder" / "config.json"
    count, hidden = (read_json(place).get(key) for key in ("num_hidden_layers", "hidden_size"))
    if type(count) is not int or type(hidden) is not int or hidden < 1:
        raise UserError(f"{place}: {count} layers of {hidden} features; expected numbers: copy it again")
    if wrong := [layer for layer in layers if not 0 <= layer <= count]:
        raise UserError(f"text_layers {wrong}: the text encoder has {count} layers; give numbers from 0 to {count}")
    if len(layers) * hidden != width:
        raise UserError(
            f"text_layers: {len(layers)} layers of {hidden} features, the transformer takes {width}; "
            f"give {width // hidden} of them"
        )


def _text_encoder(config: Flux2Klein, folder: PipelineFolder, device: str, dtype: Any) -> Any:
    """Load the text encoder; return prompts -> Text, through the pipeline's own function."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

    from leapalign.models import pipeline as pipe

    tokenizer = pipe.load_chat_tokenizer(folder)
    encoder = load_component(folder, "text_encoder", dtype).to(device)

    def encode(prompt: str) -> Text:
        layers = list(config.text_layers)
        length = config.max_sequence_length
        return Text(
            Flux2KleinPipeline._get_qwen3_prompt_embeds(
                encoder, tokenizer, prompt, max_sequence_length=length, hidden_states_layers=layers
            )
        )

    return pipe.each_alone(encode)
