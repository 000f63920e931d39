"""`Study`: what an arena compares and how, as one frozen value that study.json records.

Equal for all contenders, and checked: base, reward, training prompts, sampling steps, batch, updates, optimiser,
clipping, monitors. A contender's own are its method, its learning rate, its anchor, its average, how its batch is
divided into groups, draws and micro-batches, and what the study names in `varied`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from leapalign.codec import check_fields, encode
from leapalign.errors import UserError
from leapalign.monitors import HeldOut
from leapalign.run import Run, differences

if TYPE_CHECKING:
    from leapalign.prompts.base import Prompts
else:  # the type that the codec sees
    Prompts = Any

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
OWN = frozenset(  # fields of a run in which contenders may differ
    {"name", "out", "seed", "method", "learning_rate", "ema_decay", "samples_per_prompt", "samples_per_draw"}
    | {"micro_batch_size", "updates_per_rollout", "graph", "reward_chunk"}
    | {"anchor_weight", "anchor_mean_weight", "anchor_states", "skip_satisfied"}
)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values of one setting that a search tries."""

    setting: str  # a number of the run: learning_rate, or method.nested_scale
    values: tuple[float, ...]  # ascending
    least: float = 0.0  # no value below is tried
    most: float = 1e9  # none above

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.values or list(self.values) != sorted(set(self.values)):
            raise UserError(f"{self.setting}: values {list(self.values)}; expected ascending numbers")
        if self.values[0] < self.least or self.values[-1] > self.most:
            raise UserError(f"{self.setting}: values {list(self.values)} leave [{self.least:g}, {self.most:g}]")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A method with its settings. The study sets the run's name, out and seed."""

    name: str  # of its folder and its row: lower-case letters, digits, -, _ and .
    run: Run
    grid: tuple[Axis, ...] = ()  # what --search varies


@dataclass(frozen=True, kw_only=True)
class Judging:
    """An evaluation: prompts, noise and measures, the same for the base and every run."""

    prompts: Prompts
    held_out: HeldOut  # a reward that no contender trains on
    seed: int = 0  # of the noise
    diversity_prompts: int = 30  # of which several images each are compared
    images_per_prompt: int = 4
    batch_size: int = 60  # images at a time; changes no number


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a contender's grid is searched; by the held-out reward, on prompts and seeds of its own."""

    judging: Judging
    seeds: tuple[int, ...]
    widenings: int = 2  # times that a grid grows whose best value lies at its edge


@dataclass(frozen=True, kw_only=True)
class Study:
    """Contenders × seeds, an evaluation and a search."""

    name: str
    out: str
    reference: str  # the contender whose compute the others are given
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    judging: Judging
    search: Search
    varied: tuple[str, ...] = ()  # further fields of a run in which contenders differ, because the study compares them
    equal_compute: bool = True  # run every contender with the reference's compute too, and not only with its updates
    counted_updates: int = 8  # over which floating-point operations are averaged; draws differ in cost

    def __post_init__(self) -> None:
        check_fields(self)
        names = [contender.name for contender in self.contenders]
        if len(set(names)) < len(names) or not all(NAME.fullmatch(name) for name in names):
            raise UserError(f"contenders {names}: expected different names of lower-case letters, digits, -, _ and .")
        if self.reference not in names:
            raise UserError(f"reference {self.reference!r} is none of the contenders {', '.join(names)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds {list(self.seeds)}: expected different seeds of at least 0")
        if self.counted_updates < 1:
            raise UserError(f"counted_updates {self.counted_updates}: expected at least 1")
        self._check_equal()
        self._check_search()

    def contender(self, name: str) -> Contender:
        """Return the contender of this name."""
        return next(contender for contender in self.contenders if contender.name == name)

    @property
    def steps(self) -> int:
        """Updates of every run at equal updates."""
        return self.contenders[0].run.steps

    def _check_equal(self) -> None:
        """Raise UserError if contenders differ in what the comparison holds equal."""
        unknown = set(self.varied) - {f.name for f in fields(Run)}
        if unknown:
            raise UserError(f"varied: {', '.join(sorted(unknown))} is no field of a run")
        own = OWN | set(self.varied)
        first, *others = (_shared(contender.run, own) for contender in self.contenders)
        for contender, record in zip(self.contenders[1:], others):
            if changes := differences(first, record):
                raise UserError(
                    f"{contender.name} differs from {self.contenders[0].name} in {'; '.join(changes)}; contenders may "
                    f"differ in {', '.join(sorted(own - {'name', 'out', 'seed'}))} only"
                )

    def _check_search(self) -> None:
        """Raise UserError if the search would see seeds, prompts or noise of the table."""
        if shared := set(self.seeds) & set(self.search.seeds):
            raise UserError(f"search.seeds and seeds share {sorted(shared)}; give the search seeds of its own")
        if self.search.judging.prompts == self.judging.prompts or self.search.judging.seed == self.judging.seed:
            raise UserError("search.judging has the prompts or the seed of judging; give the search its own")
        for contender in self.contenders:
            for axis in contender.grid:
                with_setting(contender.run, axis.setting, axis.values[0])


def with_setting(run: Run, setting: str, value: float) -> Run:
    """Return the run with one number replaced: a field of it, or method.FIELD. Raises UserError for another word."""
    owner, field = _owner(run, setting)
    changed = replace(owner, **{field: type(getattr(owner, field))(value)})
    return replace(run, method=changed) if owner is run.method else changed


def setting_of(run: Run, setting: str) -> float:
    """Return a number of the run: a field of it, or method.FIELD. Raises UserError for another word."""
    owner, field = _owner(run, setting)
    return float(getattr(owner, field))


def _owner(run: Run, setting: str) -> tuple[Any, str]:
    owner: Any = run.method if setting.startswith("method.") else run
    field = setting.removeprefix("method.")
    numbers = [f.name for f in fields(owner) if type(getattr(owner, f.name)) in (int, float)]
    if field not in numbers:
        raise UserError(f"{setting} is no number of {type(owner).__name__}; it has {', '.join(numbers)}")
    return owner, field


def _shared(run: Run, own: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in encode(run).items() if key not in own}
