"""AuraFlow as a user would add it: a family in a file of its own, and a recipe. Used by test_outside_family.py.

The recipe expects the pipeline's folder `aura` and `prompts.txt` beside the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from leapalign.errors import UserError
from leapalign.methods.leapalign import LeapAlign
from leapalign.models import published as known
from leapalign.models.base import Text, TextShape
from leapalign.models.text_readers import TextReader
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.storage.components import load_component
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, PipelineFolder, open_folder
from leapalign.tuning import targets
from leapalign.tuning.full import FULL
from leapalign.tuning.lora import LoRA

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leapalign.models.pipeline import PipelineModel
    from leapalign.tuning.base import Tuning

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
FEED_FORWARD = ("linear_1", "linear_2", "out_projection")  # a gated one, under the names of this transformer
LAYERS = targets.LoraTargets(
    layers=(
        *targets.ATTENTION,
        *targets.TEXT_ATTENTION,
        *(f"{name}.{layer}" for name in ("ff", "ff_context") for layer in FEED_FORWARD),
    )
)
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 64,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.7,
}
TEXT_ENCODER = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
PUBLISHED = {
    "somebody/tiny-aura": known.Published(
        kind="AuraFlowPipeline",
        components={
            "transformer": ("diffusers.AuraFlowTransformer2DModel", TRANSFORMER),
            "vae": ("diffusers.AutoencoderKL", VAE),
            "scheduler": known.scheduler(shift=1.73),
            "text_encoder": ("transformers.UMT5EncoderModel", {"model_type": "umt5"} | TEXT_ENCODER),
            "tokenizer": ("transformers.T5Tokenizer", {}),
        },
        bytes_per_weight=4,
    )
}


@dataclass(frozen=True, kw_only=True)
class AuraFlow:
    """An AuraFlowPipeline folder or hub id."""

    name: ClassVar[str] = "aura-flow"
    pipeline: ClassVar[str] = "AuraFlowPipeline"
    lora_targets: ClassVar[targets.LoraTargets] = LAYERS
    published: ClassVar[Mapping[str, known.Published]] = PUBLISHED

    path: str  # a folder, or a hub id: org/name or org/name@revision
    height: int = 1024  # pixels
    width: int = 1024  # pixels
    guidance_scale: float = 3.5  # at most 1: no guidance, one branch
    negative_prompt: str = ""
    max_sequence_length: int = 256  # tokens of the text encoder
    decode_chunk: int = 1  # images decoded at a time; 0 = all

    def at(self, folder: str) -> AuraFlow:
        """The same settings on another pipeline folder."""
        return replace(self, path=folder)

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Every prompt is filled up with zeros to the same length."""
        return TextShape(tokens=(self.max_sequence_length, transformer.joint_attention_dim))

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """The tokenizer, and how many tokens the text encoder reads."""
        tokenizer = load_component(folder, "tokenizer")
        return (TextReader(name="text_encoder", tokenizer=tokenizer, limit=self.max_sequence_length),)

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's own call for the same image."""
        return {
            "height": self.height,
            "width": self.width,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }

    @property
    def same_forwards(self) -> bool:
        """The guidance is on in every step or in none."""
        return True

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Open the folder. Raises UserError on a folder or size that cannot work."""
        from leapalign.models import pipeline as pipe

        precision = pipe.parse_dtype(dtype)
        needed = ("transformer", "vae", "scheduler", *TEXT_COMPONENTS)
        folder = open_folder(self.path, self.pipeline, needed, loading=loading)
        opened = pipe.open_components(folder, device, precision, tuning, self.lora_targets)
        decoder = pipe.load_decoder(folder, device, self.decode_chunk)
        return pipe.put_together(
            opened,
            decoder=decoder,
            latent_shape=latent_shape(self, opened.policy.config, pipe.vae_factor(decoder.vae)),
            guidance=pipe.Guidance(self.guidance_scale, True, self.negative_prompt),
            readers=self.text_readers,
            encoder=lambda folder: text_encoder(folder, opened.policy, self.max_sequence_length, opened.dtype),
            text_components=TEXT_COMPONENTS,
            text_settings={"max_sequence_length": self.max_sequence_length},
            predict=predict,
            grid=lambda num_steps: sigma_grid(opened.scheduler, num_steps),
        )


def latent_shape(config: AuraFlow, policy: Any, factor: int) -> tuple[int, int, int]:
    """Channels, height, width. Raises UserError for a size that is no multiple of a patch or beyond the positions."""
    from leapalign.models.pipeline import check_size

    patch = factor * policy.patch_size  # pixels
    check_size(config.height, config.width, patch)
    most = int(policy.pos_embed_max_size**0.5) * patch
    if max(config.height, config.width) > most:
        raise UserError(f"{config.height} x {config.width} is beyond the position table: at most {most} pixels a side")
    return policy.in_channels, config.height // factor, config.width // factor


def predict(policy: nn.Module, x: Tensor, time: Tensor, text: Text) -> Tensor:
    """One branch: x [B, C, h, w], time in the scheduler's units (0 to 1000; the network's is 0 to 1) -> v."""
    timestep = (time / 1000).expand(len(x))
    return policy(hidden_states=x, timestep=timestep, encoder_hidden_states=text.tokens, return_dict=False)[0]


def sigma_grid(scheduler: Any, num_steps: int) -> Tensor:
    """Sigmas [T+1], descending, asked for by number of steps as the pipeline does."""
    scheduler.set_timesteps(num_inference_steps=num_steps)
    return scheduler.sigmas


def text_encoder(folder: PipelineFolder, policy: Any, length: int, dtype: Any) -> Any:
    """Loads the text encoder; returns prompts -> Text, by the pipeline's own `encode_prompt`."""
    from diffusers.pipelines.aura_flow.pipeline_aura_flow import AuraFlowPipeline

    components = {name: load_component(folder, name, dtype) for name in TEXT_COMPONENTS}
    components["text_encoder"].to(policy.device)
    pipeline: Any = AuraFlowPipeline(transformer=policy, vae=None, scheduler=None, **components)  # pyright: ignore

    def encode(prompts: list[str]) -> Text:
        tokens = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=policy.device, max_sequence_length=length
        )[0]
        return Text(tokens)

    return encode


def recipe() -> Run:
    """Two updates of LoRA on the folder beside this file."""
    beside = Path(__file__).parent
    return Run(
        name="aura",
        model=AuraFlow(path=str(beside / "aura"), height=16, width=16, max_sequence_length=8),
        method=LeapAlign(),
        rewards=(RewardTerm(reward=PickScore(path="embedded:reward"), threshold=1.0),),
        prompts=PromptFile(path=str(beside / "prompts.txt")),
        out=str(beside / "run"),
        tuning=LoRA(rank=2),
        steps=2,
        batch_size=2,
        micro_batch_size=2,
        num_sampling_steps=4,
        checkpoint_every=1,
        evaluate_every=1,
        evaluation_size=2,
        device="cpu",
    )
