"""One update of the run's method: by the reward's gradient (direct.py), or by rewards alone (policy_gradient.py)."""

from __future__ import annotations

from leapalign.methods.policy_gradient import PolicyGradient
from leapalign.training import direct, policy_gradient
from leapalign.training.engine import Engine
from leapalign.training.tracking import Metrics


def update(engine: Engine, step: int) -> Metrics:
    """Take one optimiser step. `step`: updates before this one. Raises NotFinite before any weight changes."""
    by_reward = isinstance(engine.run.method, PolicyGradient)
    return policy_gradient.update(engine, step) if by_reward else direct.update(engine, step)
