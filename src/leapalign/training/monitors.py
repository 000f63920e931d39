"""The monitors that a run's settings ask for: their names, and what they need to be loaded.

Their numbers are computed in numbers.py, on images drawn in fixed_set.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from leapalign.errors import UserError
from leapalign.evaluation.diversity import Features, find_features
from leapalign.evaluation.image_statistics import DEFINITIONS
from leapalign.prompts.base import ImageMonitor, MonitoredPrompts
from leapalign.rewards import adapt
from leapalign.rewards.base import Reward
from leapalign.run import Run

HELD_OUT, DIVERSITY, IMAGE, DRIFT = "held_out/", "diversity/", "image/", "drift"  # names of metrics, or their prefixes
ABOVE = "evaluation_fraction_above_threshold"


def held_out_names(run: Run) -> list[str]:
    """Return each held-out reward's name; repeated names get a number."""
    return adapt.numbered_names([term.reward for term in run.monitors.held_out])


def features_of(run: Run, rewards: Mapping[str, Reward], held_out: Mapping[str, Reward]) -> Features | None:
    """Return the feature space of diversity; None if it is not measured. Raises UserError if no reward has it.

    A held-out reward's comes before that of a trained one, which training distorts.
    """
    if not run.monitors.diversity_prompts:
        return None
    others = {HELD_OUT + name: reward for name, reward in held_out.items()}
    return find_features(run.monitors.features, {**rewards, **others})


def own_monitor(run: Run) -> ImageMonitor | None:
    """Return the prompts' own monitor if the run asks for it. Raises UserError if they have none."""
    if not run.monitors.prompt_monitors:
        return None
    if not isinstance(run.prompts, MonitoredPrompts):
        raise UserError(f"monitors.prompt_monitors: the prompts {run.prompts.name} have none; leave it out")
    return run.prompts.monitor()


def check_bands(run: Run) -> None:
    """Raise UserError if a band is of a monitor that the run does not measure."""
    monitors, own = run.monitors, own_monitor(run)
    known = [ABOVE, *(HELD_OUT + name for name in held_out_names(run))]
    known += [DIVERSITY + monitors.features] if monitors.diversity_prompts else []
    known += [IMAGE + name for name in DEFINITIONS] if monitors.image_statistics else []
    known += [*own.names] if own else []
    known += [DRIFT] if monitors.drift_samples else []
    for band in run.stop_when.bands:
        if band.monitor not in known:
            raise UserError(f"stop_when: the run has no monitor {band.monitor!r}; it has {', '.join(known)}")
