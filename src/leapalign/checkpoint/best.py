"""The averaged weights of a run's best evaluation, kept beside its checkpoints until the run exports them.

    RUN/checkpoints/best-000040/  weights.safetensors (or files of each rank's shards)  state.json

A checkpoint's state.json names the best step at its time. Weights are removed once neither the run nor a checkpoint
needs them, so that a run resumed from any of its checkpoints exports what an uninterrupted one does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.checkpoint import checkpoints, formats, sharded
from leapalign.checkpoint.sharded import Writers, part_of
from leapalign.checkpoint.state import UNREADABLE
from leapalign.distributed.tensors import Named, local
from leapalign.distributed.world import World
from leapalign.errors import UserError
from leapalign.run import Run
from leapalign.storage.atomic import complete_folder, remove_folder, scratch_folder
from leapalign.storage.files import sha256

GROUP = "weights"


@dataclass
class BestWeights:
    """The kept weights of one process's run; every rank has one."""

    run: Run
    world: World
    writers: Writers | None  # None: every rank has whole weights
    in_checkpoint: int | None = None  # best step of the newest checkpoint, which may still be being written

    def keep(self, step: int, average: Named) -> None:
        """Write these averaged weights as the best, from rank 0, or from each rank with shards; remove others."""
        target, writers = self._folder(step), self.writers
        part = part_of({GROUP: average}, writers) if writers else None
        tensors: dict[str, Named] = {GROUP: {name: local(t) for name, t in average.items()}}
        with self.world.agreed():
            if part and writers and self.world.rank in writers.ranks[1:]:
                sharded.write(scratch_folder(target, writers.token), tensors, part)
            elif self.world.main:
                with complete_folder(target, writers.token if writers else "") as folder:
                    files = formats.write(folder, tensors, part)
                    state = {"step": step, "files": files, **formats.record(tensors, part)}
                    (folder / "state.json").write_text(json.dumps(state, indent=2))
                self._prune(step)

    def _prune(self, step: int) -> None:
        """Remove weights that neither this step nor a checkpoint needs."""
        needed = {step, self.in_checkpoint, *(_best_of(folder) for folder in checkpoints.complete(self.run))}
        for folder in Path(self.run.out, "checkpoints").glob("best-*"):
            if folder.name not in {self._folder(step).name for step in needed if step is not None}:
                remove_folder(folder)

    def restore(self, step: int, average: Named) -> None:
        """Load the weights of the best evaluation into `average`, and remove weights that nothing needs.

        Raises UserError if they are damaged or gone.
        """
        folder = self._folder(step)
        with self.world.agreed():
            try:
                state = _verified(folder)
            except UNREADABLE as error:
                raise UserError(
                    f"{folder}: the weights of the best evaluation are damaged or gone ({error}); `leapalign resume "
                    f"{self.run.out} --no-stop-when` exports the last ones"
                ) from None
        formats.read_weights(folder, state["layout"], average)
        if self.world.main:
            self._prune(step)

    def _folder(self, step: int) -> Path:
        return Path(self.run.out) / "checkpoints" / f"best-{step:06d}"


def _best_of(checkpoint: Path) -> int | None:
    """Return the best step that a checkpoint names; None if it names none or is damaged."""
    try:
        return json.loads((checkpoint / "state.json").read_text()).get("best_step")
    except UNREADABLE:
        return None


def _verified(folder: Path) -> dict[str, Any]:
    """Read state.json and compare the files' checksums. Raises one of `UNREADABLE`."""
    state = json.loads((folder / "state.json").read_text())
    for name, digest in state["files"].items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} has other bytes than were written")
    return state
