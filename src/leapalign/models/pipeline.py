"""A `Model` built from the components of a pipeline folder; families pass in what differs as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError, first_time, opening
from leapalign.models.base import Conditioning, Text
from leapalign.models.decode import Decoder
from leapalign.models.guidance import Guidance, GuidedVelocity, in_precision
from leapalign.models.prompt_embeds.cache import Encoder, PromptCache
from leapalign.models.prompt_embeds.store import PromptStore
from leapalign.models.text_readers import TextReader, tell_longer, told_already
from leapalign.storage.components import load_component
from leapalign.storage.pipeline_folder import FROM_FILES, Loading, PipelineFolder, save_with
from leapalign.tuning.adapter import merged, switched_off

if TYPE_CHECKING:
    from leapalign.flow.rollout import Velocity
    from leapalign.tuning.base import Tuning
    from leapalign.tuning.targets import LoraTargets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class PipelineModel:
    """Implements `leapalign.models.base.Model`."""

    policy: nn.Module
    folder: PipelineFolder  # source of all frozen components when saving
    prompts: PromptCache
    load_encoder: Callable[[Loading], Encoder]  # loads the text encoders
    readers: Callable[[PipelineFolder], tuple[TextReader, ...]]  # tokenizers and token limits
    decoder: Decoder
    latent_shape: tuple[int, int, int]  # channels, height, width
    guidance: Guidance
    predict: Callable[[nn.Module, Tensor, Tensor, Text], Tensor]  # the family's forward: policy, x, sigma, text -> v
    grid: Callable[[int], Tensor]  # the family's scheduler: T -> sigmas [T+1], descending as diffusers has them
    device: str
    dtype: torch.dtype
    told: set[str] = field(default_factory=set)  # prompts whose lengths were already reported

    def __post_init__(self) -> None:
        place, remedy = self.folder.path, "its configurations are not those of its weights: copy the folder again"
        self.predict = first_time(self.predict, f"{place}: the transformer does not run", remedy)
        self.grid = first_time(self.grid, f"{place}: the scheduler does not run", remedy)
        self._pixels = first_time(lambda latents: self.decoder(latents), f"{place}: the VAE does not run", remedy)

    def prepare(self, prompts: Sequence[str]) -> None:
        self.tell_longer(prompts)
        self.prompts.prepare(self.with_negative(prompts))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.tell_longer(prompts)
        self.prompts.fill(self.with_negative(prompts))
        return Conditioning(self.prompts(prompts), self.prompts(self._negative) if self._negative else None)

    def tell_longer(self, prompts: Sequence[str], *, show: bool = True) -> None:
        """Print one line on stderr for each text encoder that does not read the end of some of these prompts.

        Each prompt is reported once; `show=False` marks prompts as reported without printing (another rank prints).
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.told]
        self.told.update(new)
        if not new or not show:
            return
        remedy = "copy the folder again, completely"
        with opening(f"{self.folder.path}: its tokenizers do not count a prompt's tokens", remedy):
            tell_longer(self.readers(self.folder), new)

    def with_negative(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts, plus the negative prompt if guidance uses it."""
        return [*prompts, *self._negative]

    @property
    def _negative(self) -> list[str]:
        return [self.guidance.negative_prompt] if self.guidance.active else []

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        rows = [torch.randn(self.latent_shape, generator=g, device=g.device) for g in generators]
        return torch.stack([row.to(self.device) for row in rows])  # [B, C, h, w]

    def sigmas(self, num_steps: int) -> Tensor:
        if num_steps == 1:  # for any shift; a scheduler that stretches its last sigma would divide 0 by 0
            return torch.tensor([0.0, 1.0], device=self.device)
        sigmas = self.grid(num_steps).flip(0).to(self.device, torch.float32)
        if not bool(sigmas.isfinite().all()):  # a broken scheduler config
            raise UserError(
                f"{self.folder.path}: its scheduler makes {sigmas.tolist()[:5]} of {num_steps} sampling steps; "
                "expected numbers from 0 to 1: use the scheduler_config.json of this model"
            )
        return sigmas

    def velocity(self, conditioning: Conditioning) -> Velocity:
        predict = in_precision(lambda x, sigma, text: self.predict(self.policy, x, sigma, text), self.dtype)
        return GuidedVelocity(predict, conditioning, self.guidance)

    def decode(self, latents: Tensor) -> Tensor:
        return self._pixels(latents)

    def save(self, folder: str | Path) -> None:
        save_with(self.folder, merged(self.policy), folder)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Context in which velocities are the base model's. Raises UserError if its weights were trained in place."""
        with switched_off(self.policy):
            yield


def tell_longer_prompts(model: Any, prompts: Sequence[str], *, show: bool = True) -> None:
    """Print one line on stderr for each text encoder of a pipeline that does not read the end of some prompts."""
    if isinstance(model, PipelineModel):  # other models do their own encoding
        model.tell_longer(prompts, show=show)


@dataclass(frozen=True)
class Opened:
    """Components that every family loads first, before it checks sizes."""

    folder: PipelineFolder
    policy: Any
    scheduler: Any
    device: str
    dtype: torch.dtype

    @property
    def train_steps(self) -> int:
        """Number of the scheduler's time units in sigma = 1."""
        return self.scheduler.config.num_train_timesteps


def open_components(
    folder: PipelineFolder, device: str, dtype: torch.dtype, tuning: Tuning, targets: LoraTargets
) -> Opened:
    """Load policy and scheduler. Raises UserError if one cannot work. `targets`: the family's default LoRA layers."""
    return Opened(folder, tuning.load_policy(folder, device, dtype, targets), load_scheduler(folder), device, dtype)


def put_together(
    opened: Opened,
    *,
    decoder: Decoder,
    latent_shape: tuple[int, int, int],
    guidance: Guidance,
    readers: Callable[[PipelineFolder], tuple[TextReader, ...]],
    encoder: Callable[[PipelineFolder], Encoder],
    text_components: tuple[str, ...],
    text_settings: dict[str, Any],
    predict: Callable[..., Tensor],
    grid: Callable[[int], Tensor],
) -> PipelineModel:
    """Build the model. `predict(policy, x, time, text)` takes time in the scheduler's units.

    `readers` count a prompt's tokens, `encoder` loads the folder's text encoders; `text_components` and `text_settings`
    determine the prompt embeds completely (the key of the cache directory).
    """

    def load_encoder(loading: Loading) -> Encoder:
        remedy = "tokenizers and text encoders are not of one model: copy the folder again"
        loaded = encoder(replace(opened.folder, loading=loading))

        def encode(prompts: list[str]) -> Text:
            with told_already():
                return loaded(prompts)

        return first_time(encode, f"{opened.folder.path}: the text encoders do not run", remedy)

    return PipelineModel(
        policy=opened.policy,
        folder=opened.folder,
        prompts=_prompt_cache(lambda: load_encoder(FROM_FILES), opened, text_components, text_settings),
        load_encoder=load_encoder,
        readers=readers,
        decoder=decoder,
        latent_shape=latent_shape,
        guidance=guidance,
        predict=lambda policy, x, sigma, text: predict(policy, x, sigma * opened.train_steps, text),
        grid=grid,
        device=opened.device,
        dtype=opened.dtype,
    )


def _prompt_cache(
    load_encoder: Callable[[], Encoder], opened: Opened, text_components: tuple[str, ...], settings: dict[str, Any]
) -> PromptCache:
    """Create the prompt cache: in memory and, for large text encoders, on disk."""
    decisive = {
        "device": torch.device(opened.device).type,
        "dtype": str(opened.dtype).removeprefix("torch."),
        **settings,
    }
    return PromptCache(load_encoder, opened.device, PromptStore.of(opened.folder, text_components, decisive))


def load_decoder(folder: PipelineFolder, device: str, chunk: int) -> Decoder:
    """Load the decoder of a VAE whose latents are normalised by its config's scaling and shift factors."""
    vae = load_component(folder, "vae", torch.float32).to(device)
    with opening(f"{folder.path / 'vae'}: scaling_factor and shift_factor are not numbers", "copy the folder again"):
        scale, shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)
    return Decoder(vae, scale, shift, chunk)


def load_vae(folder: PipelineFolder, device: str, kind: str) -> Any:
    """Load a VAE whose normalisation the family reads itself. Raises UserError unless it is of class `kind`."""
    found = folder.components["vae"][1]
    if found != kind:
        raise UserError(f"{folder.path}: its VAE is a {found}, expected {kind}; take the VAE of the model's own folder")
    return load_component(folder, "vae", torch.float32).to(device)


def load_chat_tokenizer(folder: PipelineFolder) -> Any:
    """Load the tokenizer. Raises UserError if it has no chat template."""
    tokenizer = load_component(folder, "tokenizer")
    if not tokenizer.chat_template:
        raise UserError(f"{folder.path / 'tokenizer'} has no chat template (chat_template.jinja); copy it completely")
    return tokenizer


def each_alone(encode: Callable[[str], Text]) -> Encoder:
    """Encode one prompt at a time, for language models as text encoders.

    Embeds then do not depend on the padding of a batch, and hidden states of all layers (and logits, if the class
    computes them) take the memory of one prompt.
    """

    def encode_all(prompts: list[str]) -> Text:
        rows = {prompt: encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Text.stack([rows[prompt] for prompt in prompts])

    return encode_all


def load_scheduler(folder: PipelineFolder) -> Any:
    """Load the scheduler, of which only the sigma grid is used. Raises UserError if its step is not plain Euler."""
    scheduler = load_component(folder, "scheduler")
    if type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        raise UserError(
            f"{folder.path}: scheduler {type(scheduler).__name__}; expected FlowMatchEulerDiscreteScheduler"
        )
    for switch in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(switch):
            raise UserError(f"{folder.path}: the scheduler has {switch} on; leaps need the plain ODE, switch it off")
    return scheduler


def shift_mu(scheduler: Any, image_tokens: int, max_shift: float = 1.15) -> float:
    """Return mu of the dynamic shift: linear in the number of image tokens, with the pipelines' defaults."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return calculate_shift(image_tokens, *lengths, config.get("base_shift", 0.5), config.get("max_shift", max_shift))


def spaced_grid(scheduler: Any, num_steps: int, mu: float) -> Tensor:
    """Return descending sigmas [T+1]: 1 ... 1/T in even steps, shifted by the scheduler, as in most pipelines."""
    import numpy as np

    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler.sigmas  # [T+1], descending


def vae_factor(vae: Any) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def parse_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise UserError unless both are positive multiples of `multiple` (VAE factor times patch), in pixels."""
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise UserError(f"{name} {value} is not a positive multiple of {multiple} (VAE factor x patch); try {near}")
