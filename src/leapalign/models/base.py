"""What the loop asks of a model: prompts -> conditioning, noise, grid, velocity, decode (docs/models.md).

Time runs from 1 (noise) to 0 (image); pixels are float in [0, 1], [B, 3, H, W]. Every family's own conventions end
inside its adapter. Importing this file costs nothing: torch comes with `load()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from leapalign.flow.rollout import Velocity
    from leapalign.storage.pipeline_folder import Loading
    from leapalign.tuning.base import Tuning


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


def pointed_at(config: Any, folder: str) -> Any:
    """The same settings on another folder, with that folder's own weights: no single file stands for them there."""
    alone = {"transformer_file": ""} if hasattr(config, "transformer_file") else {}
    return replace(config, path=folder, **alone)


class ModelConfig(Protocol):
    """A family's settings: a frozen, keyword-only dataclass that imports no torch before `load`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # so that dataclasses.replace() takes one
    name: ClassVar[str]  # as in flags and tables

    @property
    def path(self) -> str:
        """A folder, a hub id (org/name or org/name@revision), or embedded:generator."""
        ...

    def load(self, device: str, dtype: str, tuning: Tuning = ..., loading: Loading = ...) -> Model:
        """Open the folder. Raises UserError on a folder or a setting that cannot work.

        `loading`: how its components are loaded; a model that is not a pipeline's folder may ignore it.
        """
        ...


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
