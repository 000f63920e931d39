"""Strength of a tuning: weights on the line through base and tuned model, at no training cost (arXiv 2109.01903).

w(s) = w_base + s (w_tuned - w_base), in float32: s = 0 is the base, 1 the tuned model, and s > 1 goes beyond it. Of an
adapter, w_base + s B A: B is scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leapalign.errors import UserError, opening

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST = 2.0


def check_strength(strength: float) -> None:
    """Raise UserError unless 0 <= strength <= 2."""
    if not 0 <= strength <= MOST:
        raise UserError(
            f"strength is {strength}; it must lie in [0, {MOST:g}]: 0 is the base, 1 the tuned model, and more goes "
            "beyond the tuned model"
        )


def scale_adapter(state: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Return an adapter's state (`tuning.files`) with every B, and so B A, multiplied by `strength`."""
    return {name: value * strength if name.endswith(".lora_B.weight") else value for name, value in state.items()}


def interpolate(base: nn.Module, tuned: Path, strength: float) -> None:
    """Move the base's weights in place to w(strength); `tuned`: the folder of the tuned transformer.

    Tensors of the folder are read one at a time, so memory holds one model. Exact at 0 and 1. Raises UserError if
    names or shapes differ, or if a file is damaged.
    """
    import torch

    own = base.state_dict()
    with _tensors(tuned) as files:
        names = {name for file in files for name in file.keys()}  # noqa: SIM118  (not a dict)
        if odd := sorted(names ^ own.keys()):
            raise UserError(f"{tuned}: its weights are not those of the base, for instance {odd[0]}; {_OTHER}")
        for file in files:
            for name in file.keys():  # noqa: SIM118
                value, w = file.get_tensor(name), own[name]
                if value.shape != w.shape:
                    shapes = f"{name} is {tuple(value.shape)}, the base's is {tuple(w.shape)}"
                    raise UserError(f"{tuned}: {shapes}; {_OTHER}")
                w.copy_(torch.lerp(w.float(), value.to(w.device, torch.float32), strength))


_OTHER = "use the base that the run was trained on, or a strength of 1"


@contextmanager
def _tensors(folder: Path) -> Iterator[list[Any]]:
    """Open the safetensors files of a saved transformer. Raises UserError if there is none, or a damaged one."""
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        with opening(f"{folder} cannot be opened", "copy the run's folder again, completely"):
            paths = sorted(folder.glob("*.safetensors"))
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        yield files
