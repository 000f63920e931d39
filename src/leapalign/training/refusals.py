"""Settings that do not go together: what a run's method cannot have, found before anything is loaded."""

from __future__ import annotations

from leapalign.errors import UserError
from leapalign.methods.base import NeedsAnchor, ReusesRollouts
from leapalign.methods.policy_gradient import PolicyGradient, SamplesFromAverage
from leapalign.rewards import adapt
from leapalign.rewards.value_model import ValueModel
from leapalign.run import Run, nearest_multiples


def check_method(run: Run) -> None:
    """Raise UserError if the run's method cannot train with its other settings."""
    check_value_model(run)
    if isinstance(run.method, PolicyGradient):
        check_policy_gradient(run)
    else:
        refuse_without_gradient(run)
        refuse_without_reuse(run)
        refuse_without_anchor(run)


def check_policy_gradient(run: Run) -> None:
    """Raise UserError for settings that a policy-gradient method cannot have."""
    name, uses, unit = run.method.name, run.updates_per_rollout, run.updates_per_rollout * run.micro_batch_size
    if run.samples_per_prompt < 2:
        raise UserError(
            f"{name} compares samples of one prompt, and samples_per_prompt is {run.samples_per_prompt}; use 2 or more"
        )
    if run.batch_size % unit:
        raise UserError(
            f"batch_size {run.batch_size} cannot be divided into {uses} updates of whole micro-batches of "
            f"{run.micro_batch_size}; use batch_size {nearest_multiples(run.batch_size, unit)}"
        )
    if run.anchored:
        raise UserError(f"anchor_weight is for direct-gradient methods; {name} has a kl_weight of its own, if any")
    if run.skip_satisfied:
        raise UserError(f"skip_satisfied: {name} has no threshold above which a sample is satisfied; leave it out")
    if any(term.unit_gradient for term in run.rewards):
        raise UserError(f"unit_gradient: {name} uses no gradient of the reward; leave it out")
    if isinstance(run.method, SamplesFromAverage) and (run.ema_decay or uses > 1):
        raise UserError(
            f"{name} averages the weights its own way and takes one update a rollout; use ema_decay 0 and "
            "updates_per_rollout 1"
        )


def check_value_model(run: Run) -> None:
    """Raise UserError for a value model that cannot learn, or that nothing could believe."""
    learnt = [(term, term.reward) for term in run.rewards if isinstance(term.reward, ValueModel)]
    if any(isinstance(term.reward, ValueModel) for term in run.monitors.held_out):
        raise UserError("value-model: a held-out reward learns nothing; hold out the reward itself that it would learn")
    if not learnt:
        return
    if len(learnt) > 1:
        raise UserError(f"value-model: the run has {len(learnt)}, expected one; let one learn a sum of the rewards")
    term, reward = learnt[0]
    if isinstance(run.method, PolicyGradient):
        raise UserError(
            f"value-model: {run.method.name} needs no gradient of the reward; give it the reward itself "
            f"({adapt.described(reward.of).name}), or use a direct-gradient method, for instance leapalign"
        )
    if run.updates_per_rollout > 1:
        raise UserError(
            f"updates_per_rollout {run.updates_per_rollout}: a value model changes after each update, and with it the "
            "gradient at the latent; use updates_per_rollout 1"
        )
    if term.device:
        raise UserError(f"value-model: it learns on the run's device, not on {term.device}; leave device empty")


def refuse_without_gradient(run: Run) -> None:
    """Raise UserError for a reward without gradient; user-defined rewards count as differentiable by default."""
    for name, term in zip(adapt.numbered_names([term.reward for term in run.rewards]), run.rewards):
        if not adapt.described(term.reward).differentiable:
            raise UserError(
                f"the reward {name} has no gradient, and {run.method.name} trains by the reward's gradient; use it in "
                f"evaluation (leapalign evaluate --reward {name}), and train with a differentiable one (leapalign list)"
            )


def refuse_without_reuse(run: Run) -> None:
    """Raise UserError if the run needs forwards in the backward pass, and its method runs them in its rollout."""
    if run.skip_satisfied and not isinstance(run.method, ReusesRollouts):
        raise UserError(
            f"skip_satisfied: {run.method.name} differentiates inside its rollout, before the reward is known; use "
            "skip_satisfied false, or the method leapalign, flowbp-sparse or rsm"
        )
    if run.updates_per_rollout > 1 and not isinstance(run.method, ReusesRollouts):
        raise UserError(
            f"updates_per_rollout {run.updates_per_rollout}: {run.method.name} differentiates inside its rollout, "
            "which serves one update; use updates_per_rollout 1, or the method leapalign, flowbp-sparse or rsm"
        )


def refuse_without_anchor(run: Run) -> None:
    """Raise UserError if the method needs an anchor to the base that the run does not have."""
    if isinstance(run.method, NeedsAnchor):
        run.method.check_anchor(run.anchor_weight)


def refuse_sharded_base(run: Run, sharded: bool) -> None:
    """Raise UserError if the base is to stay in CPU memory while FSDP2 keeps the trained weights in its own tensors."""
    if run.base_copy == "cpu" and sharded:
        raise UserError(
            "base_copy cpu with sharded weights: FSDP2 gathers each block from tensors of its own, which cannot be "
            "exchanged block by block; use base_copy device (each rank keeps its shard only), or sharding replicate"
        )
