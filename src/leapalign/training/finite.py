"""Stop an update at NaN or infinity, before any weight changes, naming step, prompt and tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from leapalign.distributed.tensors import Named, whole
from leapalign.errors import NotFinite

SHOWN = 4  # prompts named in one message


def check_finite(tensors: Mapping[str, Tensor], prompts: Sequence[str], step: int) -> None:
    """Raise NotFinite for the first tensor that has NaN or infinity, naming it and the prompt of its first bad row.

    Row n of a tensor [N, ...] belongs to sample n % B; a tensor [] belongs to all prompts. The host waits for the
    device once, whatever the number of tensors.
    """
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    if bool(finite.all()):
        return
    name, tensor = next((name, t) for name, t in tensors.items() if not bool(torch.isfinite(t).all()))
    if tensor.ndim == 0:
        raise NotFinite(_message(step, name, float(tensor), prompts))
    bad = ~torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
    row = int(torch.nonzero(bad)[0])
    raise NotFinite(_message(step, name, _first_bad(tensor[row]), [prompts[row % len(prompts)]]))


def not_finite(norm: float, parameters: Named, prompts: Sequence[str], step: int) -> NotFinite:
    """Return the error for a gradient norm of NaN or infinity; it names the first weight with a non-finite gradient.

    Every rank must call it: gradients of sharded weights are gathered.
    """
    for name, p in parameters.items():
        grad = None if p.grad is None else whole(p.grad)
        if grad is not None and not bool(torch.isfinite(grad).all()):
            return NotFinite(_message(step, f"the gradient of {name}", _first_bad(grad), prompts))
    return NotFinite(_message(step, "the gradient norm", norm, prompts))  # finite entries whose squares overflow


def _first_bad(tensor: Tensor) -> float:
    return float(tensor[~torch.isfinite(tensor)].flatten()[0])


def _message(step: int, name: str, value: float, prompts: Sequence[str]) -> str:
    shown = ", ".join(repr(prompt) for prompt in prompts[:SHOWN])
    more = f" and {len(prompts) - SHOWN} more" if len(prompts) > SHOWN else ""
    return (
        f"step {step}: {name} is {value} for the prompt{'s' if len(prompts) > 1 else ''} {shown}{more}. "
        "The step was not taken. Lower learning_rate, or use dtype float32, and resume from the last checkpoint"
    )
