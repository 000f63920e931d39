"""Two experts by time: one copy of the transformer for noisy steps, one for the rest, as Wan 2.2 has them.

Weights that all steps share let a method that trains late steps alone change early ones too: ReFL has half of its gain
in steps that it never trains (LOG.md). With an expert each it cannot, and what a method does to early steps is its own
doing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from leapalign.models.sd3 import SD3
from leapalign.storage.pipeline_folder import FROM_FILES, Loading
from leapalign.studies.arena.named import arena
from leapalign.studies.arena.study import Contender, Study
from leapalign.tuning.full import FULL

if TYPE_CHECKING:
    from leapalign.models.pipeline import PipelineModel
    from leapalign.tuning.base import Tuning

LATE = "late"  # folder of the second expert, inside that of the first
TIMES = 1000.0  # the transformer's times of sigma = 1
DIRECT = ("leapalign", "refl", "draft-lv", "drtune", "flowbp-sparse")


@dataclass(frozen=True, kw_only=True)
class TwoExperts(SD3):
    """SD3 with a copy of its transformer for sigmas at most `boundary`; both begin as the folder's."""

    name: ClassVar[str] = "sd3-two-experts"

    boundary: float = 0.53  # between steps 5 and 4 of 8 of the embedded generator

    def load(self, device: str, dtype: str, tuning: Tuning = FULL, loading: Loading = FROM_FILES) -> PipelineModel:
        """Load the folder, and the second expert if it holds one."""
        model = super().load(device, dtype, tuning, loading)
        late: Any = copy.deepcopy(model.policy)
        folder = Path(model.folder.path) / "transformer" / LATE
        if folder.is_dir():
            late.load_state_dict(type(late).from_pretrained(folder).state_dict())
        model.policy = Experts(model.policy, late, self.boundary * TIMES)
        return model


class Experts(nn.Module):
    """Runs each row on the expert of its time."""

    def __init__(self, early: Any, late: Any, boundary: float) -> None:
        super().__init__()
        self.early, self.late = early, late
        self.boundary = boundary
        self.config = early.config

    def forward(self, *, timestep: Tensor, return_dict: bool, **inputs: Tensor) -> tuple[Tensor]:
        """Return ([B, C, h, w],). `timestep`: [B]; rows of one time, the usual case, run as one batch."""
        early = timestep > self.boundary
        if bool(early.all()) or not bool(early.any()):
            expert = self.early if bool(early[0]) else self.late
            return expert(timestep=timestep, return_dict=return_dict, **inputs)
        out = inputs["hidden_states"]
        for expert, rows in ((self.early, early.nonzero().flatten()), (self.late, (~early).nonzero().flatten())):
            own = {name: value[rows] for name, value in inputs.items()}
            out = out.index_copy(0, rows, expert(timestep=timestep[rows], return_dict=False, **own)[0])
        return (out,)

    def save_pretrained(self, folder: str | Path, **settings: Any) -> None:
        """Write both experts; the folder by itself is the early one's."""
        self.early.save_pretrained(folder, **settings)
        self.late.save_pretrained(Path(folder) / LATE, **settings)


def experts() -> Study:
    """The direct-gradient methods on two experts, three seeds, equal updates."""
    study = arena()
    return replace(
        study,
        name="experts",
        out="runs/experts",
        contenders=tuple(_divided(study.contender(name)) for name in DIRECT),
        seeds=study.seeds[:3],
        equal_compute=False,
    )


def _divided(contender: Contender) -> Contender:
    settings = {f.name: getattr(contender.run.model, f.name) for f in fields(SD3)}
    return replace(contender, run=replace(contender.run, model=TwoExperts(**settings)), grid=())
