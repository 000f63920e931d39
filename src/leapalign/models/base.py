"""What the loop asks of a model: prompts -> conditioning, noise, grid, velocity, decode (docs/models.md).

Time runs from 1 (noise) to 0 (image); pixels are float in [0, 1], [B, 3, H, W]. Every family's own conventions end
inside its adapter. Importing this file costs nothing: torch comes with `load()`.
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
    """Encoded prompts, as the transformers of diffusers take them."""

    tokens: Tensor  # [B, L, D]
    pooled: Tensor | None = None  # [B, P]; families without pooled features have none
    mask: Tensor | None = None  # [B, L] bool, True on the left: tokens that count; None = all

    def map(self, function: Callable[[Tensor], Tensor]) -> Text:
        """`function` on every tensor that there is."""
        pooled, mask = self.pooled, self.mask
        return Text(
            function(self.tokens),
            function(pooled) if pooled is not None else None,
            function(mask) if mask is not None else None,
        )

    def to(self, device: torch.device | str) -> Text:
        return self.map(lambda tensor: tensor.to(device))

    def expand(self, rows: int) -> Text:
        """One row becomes `rows` rows (a view)."""
        return self.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def row(self, i: int) -> Text:
        """One prompt as a copy of its own (a view would keep its whole batch), without padding behind its mask."""
        row = self.map(lambda tensor: tensor[i : i + 1].clone())
        if row.mask is None:
            return row
        length = int(row.mask.sum())
        return Text(row.tokens[:, :length].clone(), row.pooled, row.mask[:, :length].clone())

    @staticmethod
    def stack(rows: Sequence[Text]) -> Text:
        """Rows to one batch; rows with masks are padded with zeros on the right to the longest of them."""
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
    """What `velocity` is bound to: B prompts, and the negative prompt where there is true guidance."""

    prompts: Text  # [B, ...]
    negative: Text | None = None  # [1, ...]


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The size of one prompt's embeds, without running the text encoders."""

    tokens: tuple[int, int]  # length, width; the longest length where prompts keep their own
    pooled: int = 0  # width; 0 = none
    masked: bool = False  # prompts keep their own lengths; the mask adds one byte a token

    def empty(self, rows: int, dtype: torch.dtype, mode: AbstractContextManager[Any]) -> Text:
        """Tokens and pooled features made in `mode` (fake tensors), and a real mask, which families read.

        With several rows the texts have different lengths.
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
        """Bytes of one prompt in this dtype."""
        length, width = self.tokens
        return (length * width + self.pooled) * dtype.itemsize + (length if self.masked else 0)


class ModelConfig(Protocol):
    """Settings of a model: a frozen, keyword-only dataclass that imports no torch before `load`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]  # as in flags and tables

    @property
    def path(self) -> str:
        """A pipeline folder, a hub id (org/name or org/name@revision), or embedded:generator."""
        ...

    def at(self, folder: str) -> ModelConfig:
        """The same settings on another pipeline folder, with that folder's own transformer."""
        ...

    @property
    def same_forwards(self) -> bool:
        """Whether every velocity is made of equally many forwards, whatever the step."""
        ...

    def load(self, device: str, dtype: str, tuning: Tuning = ..., loading: Loading = ...) -> Model:
        """Open the folder. Raises UserError on a folder or a setting that cannot work.

        `loading`: how its components are loaded; a model that is not a pipeline's folder may ignore it.
        """
        ...


@runtime_checkable
class Family(ModelConfig, Protocol):
    """A family of diffusers pipelines: its settings, and in the same file all facts that other folders need of it.

    A family outside this package (`--plugin FILE`) offers the same.
    """

    pipeline: ClassVar[str]  # class of diffusers whose folders it opens
    lora_targets: ClassVar[LoraTargets]  # default layers of an adapter
    published: ClassVar[Mapping[str, Published]]  # hub id -> the published pipeline without its weights

    def text_shape(self, folder: PipelineFolder, transformer: Any) -> TextShape:
        """The size of a prompt's embeds. `transformer`: the configuration of the folder's transformer."""
        ...

    def text_readers(self, folder: PipelineFolder) -> tuple[TextReader, ...]:
        """The folder's tokenizers, and how many tokens of a prompt each text encoder reads."""
        ...

    def call_arguments(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's own call, besides prompt, seed and `num_inference_steps`, for the same image."""
        ...


@runtime_checkable
class ImageSettings(Protocol):
    """Settings that the families of the package share."""

    @property
    def height(self) -> int: ...  # pixels

    @property
    def width(self) -> int: ...  # pixels

    @property
    def decode_chunk(self) -> int: ...  # images decoded at a time; 0 = all


class Model(Protocol):
    """A text-to-image flow model; `policy` is trained, everything else is frozen."""

    policy: nn.Module

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode all of them (and the negative prompt) into the cache, then free the text encoders."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """From the cache; prompts that are not in it load the text encoders again, until the next `prepare`."""
        ...

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal [B, *latent], float32: row i depends on generators[i] alone."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """Ascending [T+1], indexed by steps still to go: sigmas[0] = 0 is the image."""
        ...

    def velocity(self, conditioning: Conditioning) -> Velocity:
        """v(x, sigma) ~ dx/dsigma after guidance, float32, differentiable in x and in the policy's weights."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[N, *latent] -> images [N, 3, H, W] in [0, 1], differentiable."""
        ...

    def save(self, folder: str | Path) -> None:
        """A complete diffusers pipeline folder with the policy's present weights."""
        ...
