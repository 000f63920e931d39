"""summary.json: the result of a finished run, for scripts and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leapalign.checkpoint.state import Progress
from leapalign.run import Run
from leapalign.storage.atomic import write_text
from leapalign.training import watch
from leapalign.training.tracking import read_metrics


def summarize(run: Run, progress: Progress) -> dict[str, Any]:
    """Write and return the summary. `reward`: r(x_0) on the fixed evaluation set before and after; null if off.

    `exported` is the step whose averaged weights are exported, and why; `stopped` why `stop_when` ended the run, or "".
    """
    out, history, rule = Path(run.out), progress.evaluations, run.stop_when
    exported, why = progress.step, "the last step"
    if rule.evaluations and history:
        exported, why = progress.best_step, watch.why_best(history, progress.best_step, rule)
    evaluated = [m for m in read_metrics(out) if "evaluation_reward" in m and m["step"] <= exported]
    evaluations = [m["evaluation_reward"] for m in evaluated]
    summary = {
        "name": run.name,
        "out": str(out),
        run.tuning.output: str(out / run.tuning.output),  # "pipeline", or "lora" for an adapter
        "steps": progress.step,
        "exported": {"step": exported, "why": why},
        "stopped": watch.stopped(history, rule),
        "skipped": progress.skipped,
        "nonfinite_batches": progress.nonfinite_batches,
        "seconds": round(progress.seconds, 3),
        "reward": {"before": evaluations[0], "after": evaluations[-1]} if evaluations else None,
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary
