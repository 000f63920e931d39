"""The protocols of models: prompts -> conditioning, noise, sigma grid, velocity, decode (docs/models.md).

Time runs from 1 (noise) to 0 (image); pixels are float in [0, 1], [B, 3, H, W]. Each family's adapter converts from its
own conventions. Importing this file imports no torch; `load()` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from leapalign.flow.rollout import Velocity
    from leapalign.models.published import Published
    from leapalign.models.text_readers import TextReader
    from leapalign.storage.pipeline_folder import Loading, PipelineFolder
    from leapalign.tuning.base import Tuning
    from leapalign.tuning.targets import LoraTargets


@dataclass(frozen=True)
class Text:
    """Prompt embeds of B prompts, as diffusers' transformers take them."""

    tokens: Tensor  # [B, L, D]
    pooled: Tensor | None = None  # [B, P]; None for families without pooled features
    mask: Tensor | None = None  # [B, L] bool, True on the left: tokens that are attended to; None = all

    def map(self, function: Callable[[Tensor], Tensor]) -> Text:
        """Apply `function` to tokens, pooled features and mask, skipping those that are None."""
        pooled, mask = self.pooled, self.mask
        return Text(
            function(self.tokens),
            function(pooled) if pooled is not None else None,
            function(mask) if mask is not None else None,
        )

    def to(self, device: torch.device | str) -> Text:
        return self.map(lambda tensor: tensor.to(device))

    def expand(self, rows: int) -> Text:
        """Repeat a single row `rows` times, as a view."""
        return self.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def row(self, i: int) -> Text:
        """Copy one prompt (a view would keep the whole batch in memory), without the padding behind its mask."""
        row = self.map(lambda tensor: tensor[i : i + 1].clone())
        if row.mask is None:
            return row
        length = int(row.mask.sum())
        return Text(row.tokens[:, :length].clone(), row.pooled, row.mask[:, :length].clone())

    @staticmethod
    def stack(rows: Sequence[Text]) -> Text:
        """Stack rows into one batch; rows with masks are zero-padded on the right to the longest."""
        import torch
        from torch.nn.functional import pad

        longest = max(row.tokens.shape[1] for row in rows)
        if rows[0].mask is not None:
            rows = [_padded(row, longest - row.tokens.shape[1], pad) for row in rows]
        names = [name for name in ("tokens", "pooled", "mask") if getattr(rows[0], name) is not None]
        return Text(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})


def _padded(row: Text, more: int, pad: Callable[..., Tensor]) -> Text:
    assert row.mask is not None
    return Text(pad(row.tokens, (0, 0, 0, more)), row.pooled, pad(row.mask, (0, more)))


@dataclass(frozen=True)
class Conditioning:
    """Inputs of `velocity`: B prompts and, with true guidance, the negative prompt."""

    prompts: Text  # [B, ...]
    negative: Text | None = None  # [1, ...]


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Sizes of one prompt's embeds, known without running the text encoders."""

    tokens: tuple[int, int]  # length, width; the maximum length if prompts are not padded
    pooled: int = 0  # width; 0 = none
    masked: bool = False  # prompts are not padded to one length; the mask adds one byte a token

    def empty(self, rows: int, dtype: torch.dtype, mode: AbstractContextManager[Any]) -> Text:
        """Create fake tokens and pooled features in `mode`, and a real mask, because families read its values.

        Several rows get different lengths.
        """
        import torch

        with mode:
            tokens = torch.zeros(rows, *self.tokens, dtype=dtype)
            pooled = torch.zeros(rows, self.pooled, dtype=dtype) if self.pooled else None
        if not self.masked:
            return Text(tokens, pooled)
        mask = torch.ones(rows, self.tokens[0], dtype=torch.bool)
        mask[1:, -1] = False
        return Text(tokens, pooled, mask)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one prompt's embeds in this dtype."""
        length, width = self.tokens
        return (length * width + self.pooled) * dtype.itemsize + (length if self.masked else 0)


class ModelConfig(Protocol):
    """Settings of a model: a frozen, keyword-only dataclass that imports no torch before `load`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]  # shown in flags and tables

    @property
    def path(self) -> str:
        """Pipeline folder, hub id (org/name or org/name@revision), or embedded:generator."""
        ...

    def at(self, folder: str) -> ModelConfig:
        """Copy the settings for another pipeline folder, with that folder's own transformer."""
        ...

    @property
    def same_forwards(self) -> bool:
        """True if every sampling step runs the same number of forwards."""
        ...

    def load(self, device: str, dtype: str, tuning: Tuning = ..., loading: Loading = ...) -> Model:
        """Load the model. Raises UserError for a folder or setting that cannot work.

        `loading`: how components are loaded; a model that is not a pipeline folder may ignore it.
        """
        ...


@runtime_checkable
class Family(ModelConfig, Protocol):
    """A family of diffusers pipelines: its settings and every fact about it that other packages need.

    A family outside leapalign (`--plugin FILE`) implements the same protocol.
    """

    pipeline: ClassVar[str]  # diffusers class of the folders that it opens
    lora_targets: ClassVar[LoraTargets]  # default layers of a LoRA
    published: ClassVar[Mapping[str, Published]]  # hub id -> the published pipeline without its weights

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """Return the sizes of a prompt's embeds. `transformer`: the config of the folder's transformer."""
        ...

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """Return each text encoder's tokenizer and its token limit."""
        ...

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Return the pipeline's call arguments, besides prompt, seed and `num_inference_steps`, for the same image."""
        ...


@runtime_checkable
class ImageSettings(Protocol):
    """Settings that all built-in families share."""

    @property
    def height(self) -> int: ...  # pixels

    @property
    def width(self) -> int: ...  # pixels

    @property
    def decode_chunk(self) -> int: ...  # images decoded at a time; 0 = all


class Model(Protocol):
    """A text-to-image flow model; `policy` is trained, all other components are frozen."""

    policy: nn.Module

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts, and the negative prompt, into the cache, then free the text encoders."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Return conditioning from the cache; new prompts reload the text encoders, which stay until `prepare`."""
        ...

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw standard normal noise [B, *latent], float32; row i depends on generators[i] alone."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """Return ascending sigmas [T+1], indexed by remaining steps: sigmas[0] = 0 is the image."""
        ...

    def velocity(self, conditioning: Conditioning) -> Velocity:
        """Return v(x, sigma) ~ dx/dsigma after guidance, float32, differentiable in x and the policy's weights.

        sigma: 0-dim, or [B] for a method that trains each sample at its own steps.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [N, *latent] to images [N, 3, H, W] in [0, 1], differentiable."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write a complete diffusers pipeline folder with the policy's current weights."""
        ...
