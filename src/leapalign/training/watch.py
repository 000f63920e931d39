"""The rule that ends a run before its last step, and that chooses the weights to export (`Run.stop_when`).

A history is the list of a run's evaluations, {"step": ..., metric: value}, with that of step 0 first. All functions are
pure: a resumed run, whose history is in its checkpoint, and every rank come to the same end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leapalign.monitors import Band, StopWhen
from leapalign.training.monitors import HELD_OUT

REWARD = "evaluation_reward"
Evaluation = Mapping[str, float]
History = Sequence[Evaluation]


def watched(metrics: Mapping[str, Any], rule: StopWhen) -> dict[str, float]:
    """Select the numbers of an evaluation that the rule reads: rewards, held-out rewards, monitors with a band."""
    bands = {band.monitor for band in rule.bands}
    names = [name for name in metrics if name in bands | {"step", REWARD} or name.startswith(HELD_OUT)]
    return {name: metrics[name] for name in names}


def stopped(history: History, rule: StopWhen) -> str:
    """Return why the run ends after the last evaluation, as a sentence; empty if it goes on."""
    n = rule.evaluations
    if not n or len(history) <= n:
        return ""
    before, now = history[-1 - n], history[-1]
    if not now[REWARD] > before[REWARD]:
        return ""
    for name, words in _faults(history, rule).items():
        if all(name in _faults(history[: len(history) - i], rule) for i in range(n)):
            rose = f"while the training reward rose from {before[REWARD]:.4g} to {now[REWARD]:.4g}"
            return f"stopped after step {now['step']}: {words}, for {n} evaluations in a row, {rose}"
    return ""


def _faults(history: History, rule: StopWhen) -> dict[str, str]:
    """Return monitor -> what is wrong with it at the last evaluation."""
    now = history[-1]
    found = {}
    for name in (name for name in now if name.startswith(HELD_OUT)):
        values = [evaluation[name] for evaluation in history if name in evaluation]
        best = max(values)
        if now[name] < best - rule.tolerance * (best - values[0]):
            found[name] = f"{name} has fallen from {best:.4g} to {now[name]:.4g}"
    for band in rule.bands:
        if _outside(history, now, band):
            low, high = _limits(history, band)
            limit = f"above {high:.4g}" if now[band.monitor] > high else f"below {low:.4g}"
            found[band.monitor] = f"{band.monitor} is {now[band.monitor]:.4g}, {limit}"
    return found


def _outside(history: History, evaluation: Evaluation, band: Band) -> bool:
    if band.monitor not in history[0] or band.monitor not in evaluation:  # a band that was added on resuming
        return False
    low, high = _limits(history, band)
    return not low <= evaluation[band.monitor] <= high  # also true for NaN


def _limits(history: History, band: Band) -> tuple[float, float]:
    """Return the band's ends; for a negative value at step 0, a multiple above 1 is the lower one."""
    ends = (band.least * history[0][band.monitor], band.most * history[0][band.monitor])
    return min(ends), max(ends)


def criterion(evaluation: Evaluation) -> str:
    """Return the metric by which the best evaluation is chosen: the first held-out reward, or the training reward."""
    return next((name for name in evaluation if name.startswith(HELD_OUT)), REWARD)


def is_best(history: History, best_step: int, rule: StopWhen) -> bool:
    """Return True if the last evaluation is better than that of `best_step`: higher, and all monitors in their bands.

    The first evaluation is the best so far. If it is the base's, of step 0, any later one in its bands is better.
    """
    now, name = history[-1], criterion(history[-1])
    best = next((evaluation for evaluation in history[:-1] if evaluation["step"] == best_step), None)
    if best is None:
        return True
    inside = not any(_outside(history, now, band) for band in rule.bands)
    return inside and (best["step"] == 0 or now[name] > best[name])


def why_best(history: History, best_step: int, rule: StopWhen) -> str:
    """Explain the choice of the exported weights."""
    best = next(evaluation for evaluation in history if evaluation["step"] == best_step)
    name = criterion(best)
    if best_step == 0:
        return "the base: no later evaluation had all monitors in their bands"
    bands = " with all monitors in their bands" if rule.bands else ""
    return f"the highest {name} ({best[name]:.4g}) of {len(history)} evaluations{bands}"
