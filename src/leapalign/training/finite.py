"""NaN and infinity stop a run at once, with step, prompt and tensor named: nothing broken is ever stepped or saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leapalign.distributed.tensors import Named, whole
from leapalign.errors import NotFinite

SHOWN = 4  # prompts named in one message


def check_rows(tensor: Tensor, name: str, prompts: Sequence[str], step: int) -> None:
    """tensor [N, ...], row n of sample n % B: stop at the first row that is not finite."""
    finite = torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else torch.isfinite(tensor)
    if bool(finite.all()):
        return
    row = int(torch.nonzero(~finite)[0])
    raise NotFinite(_message(step, name, _first_bad(tensor[row]), [prompts[row % len(prompts)]]))


def check_gradients(norm: Tensor, parameters: Named, prompts: Sequence[str], step: int) -> None:
    """Stop where the gradient's norm is not finite, and name the first weight that shows it."""
    if bool(torch.isfinite(norm)):
        return
    for name, p in parameters.items():
        grad = None if p.grad is None else whole(p.grad)
        if grad is not None and not bool(torch.isfinite(grad).all()):
            raise NotFinite(_message(step, f"the gradient of {name}", _first_bad(grad), prompts))
    raise NotFinite(_message(step, "the gradient's norm", float(norm), prompts))  # finite entries, overflowing norm


def _first_bad(tensor: Tensor) -> float:
    return float(tensor[~torch.isfinite(tensor)].flatten()[0])


def _message(step: int, name: str, value: float, prompts: Sequence[str]) -> str:
    shown = ", ".join(repr(prompt) for prompt in prompts[:SHOWN])
    more = f" and {len(prompts) - SHOWN} more" if len(prompts) > SHOWN else ""
    return (
        f"step {step}: {name} is {value} for the prompt{'s' if len(prompts) > 1 else ''} {shown}{more}. "
        "The step was not taken. Lower learning_rate, or use dtype float32, and resume from the last checkpoint"
    )
