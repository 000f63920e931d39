"""Parity: the probability that predictions rank two samples as their true rewards do.

    parity = P(q_i > q_j | y_i > y_j) + P(q_i = q_j | y_i > y_j) / 2

The concordance index. For rewards of 0 and 1 it is the area under the ROC curve. 1: the same order; 0.5: chance.
"""

from __future__ import annotations

from torch import Tensor


def parity(predicted: Tensor, true: Tensor, groups: Tensor | None = None) -> float | None:
    """Return the parity of predictions [N] and true rewards [N], in [0, 1]; None if no two true rewards differ.

    `groups` [N]: only pairs of the same group count.
    """
    pairs = true[:, None] > true[None, :]  # [i, j]
    if groups is not None:
        pairs = pairs & (groups[:, None] == groups[None, :])
    if not bool(pairs.any()):
        return None
    above, equal = predicted[:, None] > predicted[None, :], predicted[:, None] == predicted[None, :]
    return float((above.double() + 0.5 * equal.double())[pairs].mean())
