"""Read what a run's folder or an evaluation's folder holds: a row of a comparison.

| from | what |
|---|---|
| run.json | method, learning rate, and every setting |
| metrics.jsonl | training reward: mean of the last updates; time; the evaluation of the exported step, or the last |
| evaluation/evaluation.json | GenEval's tasks and rewards (`leapalign evaluate RUN --out RUN/evaluation`, the demo) |

A folder that `leapalign evaluate --out` wrote has its evaluation.json at its top. Files are read as plain JSON, so that
a run with classes of the user's own needs none of their code. A last line that a killed process left half-written is
ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from leapalign.errors import UserError
from leapalign.evaluation.statistics import EVALUATION_FILE
from leapalign.report.comparison import Comparison, Number, Row, columns_of, mean_with_error

LAST_UPDATES = 20  # whose mean reward is the training reward at the end
EVALUATION = "evaluation"  # folder of a run with its evaluation
EVALUATED = (
    "evaluation_reward",
    "held_out/",
    "diversity/",
    "open_color_entropy",
    "geneval_correct",
    "drift",
)  # of an evaluation's numbers
CURVES = ("reward", *EVALUATED)
LARGEST = 1e308
NOTE = (
    f"Training reward: mean of the last {LAST_UPDATES} updates, ± its standard error over them. Evaluations during the "
    "run: of the exported step, without errors. GenEval and what is evaluated: ± one standard error over images."
)


def compare_folders(folders: Sequence[Path]) -> Comparison:
    """Return the table of these folders. Raises UserError for one that is neither a run's nor an evaluation's."""
    rows = [read_row(folder) for folder in folders]
    names = [row.name for row in rows]
    rows = [
        Row(name=str(folder), words=row.words, numbers=row.numbers, curves=row.curves, settings=row.settings)
        if names.count(row.name) > 1
        else row
        for folder, row in zip(folders, rows)
    ]
    return Comparison(title=f"{len(rows)} runs", rows=rows, columns=columns_of(rows), note=NOTE)


def read_row(folder: Path) -> Row:
    """Read one folder. Raises UserError."""
    if (folder / "run.json").is_file():
        return _run_row(folder)
    if (folder / EVALUATION_FILE).is_file():
        return Row(name=folder.name, words={"state": "evaluation"}, numbers=read_evaluation(folder / EVALUATION_FILE))
    if (folder / "images.json").is_file():
        raise UserError(
            f"{folder}: an evaluation without {EVALUATION_FILE}: it was not finished; run the same `leapalign evaluate "
            "... --out` again, which keeps the images that are there"
        )
    came = "no such folder" if not folder.exists() else "no run's folder" if folder.is_dir() else "a file"
    raise UserError(f"{folder}: {came}; expected the folder of a run (with run.json) or of `leapalign evaluate --out`")


def _run_row(folder: Path) -> Row:
    run, metrics = read_object(folder / "run.json"), read_lines(folder / "metrics.jsonl")
    summary = read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    updates = [line for line in metrics if "reward" in line]
    evaluations = [line for line in metrics if "evaluation_reward" in line]
    numbers = {"steps": Number(metrics[-1]["step"] if metrics else 0.0)}
    numbers |= _numbers({"learning_rate": run.get("learning_rate")})
    numbers |= _of_updates(updates) | _of_evaluation(evaluations, _exported(summary))
    if (found := folder / EVALUATION / EVALUATION_FILE).is_file():
        numbers |= read_evaluation(found)
    words = {"method": _class_name(run.get("method")), "state": _state(run, summary, metrics)}
    name = run.get("name")
    return Row(
        name=name if isinstance(name, str) and name.strip() else folder.name,
        words=words,
        numbers=numbers,
        curves=curves_of(metrics),
        settings=settings_of(run),
    )


def curves_of(metrics: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return metric -> its points (update, value)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if _among(name, CURVES):
                found.setdefault(name, []).append((line["step"], value))
    return found


def _among(name: str, keys: Sequence[str]) -> bool:
    return any(name == key or (key.endswith("/") and name.startswith(key)) for key in keys)


def _of_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, Number]:
    found: dict[str, Number] = {}
    if rewards := [line["reward"] for line in updates][-LAST_UPDATES:]:
        found["reward"] = mean_with_error(rewards)
    alone = [line["seconds"] for line in updates if "seconds" in line and "evaluation_reward" not in line]
    if seconds := alone or [line["seconds"] for line in updates if "seconds" in line]:
        found["seconds"] = Number(median(seconds))
    if clipped := [line["clipped"] for line in updates if "clipped" in line]:
        found["clipped"] = Number(math.fsum(clipped) / len(clipped))
    return found


def _of_evaluation(evaluations: Sequence[Mapping[str, float]], exported: float | None) -> dict[str, Number]:
    """Numbers of the evaluation at the exported step, or of the last one before it."""
    chosen = [line for line in evaluations if exported is None or line["step"] <= exported]
    last = chosen[-1] if chosen else {}
    return {name: Number(value) for name, value in last.items() if _among(name, EVALUATED)}


def _exported(summary: Mapping[str, Any]) -> float | None:
    exported = summary.get("exported")
    return _number(exported.get("step")) if isinstance(exported, dict) else None


def _state(run: Mapping[str, Any], summary: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> str:
    if summary:
        return "stopped early" if summary.get("stopped") else "finished"
    return f"at {metrics[-1]['step'] if metrics else 0:.0f} of {run.get('steps', '?')}"


def _class_name(plug_in: Any) -> str:
    kind = plug_in.get("type") if isinstance(plug_in, dict) else None
    return kind.rpartition(".")[2].rpartition(":")[2] if isinstance(kind, str) else ""


def read_evaluation(path: Path) -> dict[str, Number]:
    """Read evaluation.json: of one model, or of two, whose `after` counts. Raises UserError."""
    record = read_object(path)
    found = _rows(record, "geneval", "geneval/", path) | _rows(record, "rewards", "evaluated/reward/", path)
    found |= _rows(record, "diversity", "evaluated/diversity/", path)
    colors = record.get("open_colors")
    entropy = colors.get("entropy") if isinstance(colors, dict) else None
    value = entropy.get("after") if isinstance(entropy, dict) else entropy
    found |= _numbers({"evaluated/open_color_entropy": value})
    if not found:
        raise UserError(f"{path}: it holds none of geneval, rewards, diversity, open_colors; expected an evaluation")
    return found


def _rows(record: Mapping[str, Any], key: str, prefix: str, path: Path) -> dict[str, Number]:
    rows = record.get(key, {})
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserError(f"{path}: {key!r} is not an object of objects, as evaluations write it; evaluate again")
    found = {}
    for name, row in rows.items():
        kind = next((kind for kind in ("after", "accuracy", "mean") if kind in row), "")
        value = _number(row.get(kind))
        if value is None:
            raise UserError(f"{path}: {key}.{name} has no finite after, accuracy or mean; evaluate again")
        error = row.get("after_standard_error" if kind == "after" else "standard_error")
        found[prefix + name] = Number(value, _number(error))
    return found


def settings_of(record: Any, where: str = "") -> dict[str, str]:
    """Return the leaves of a run.json: place -> value as JSON."""
    if isinstance(record, dict):
        parts = [settings_of(value, f"{where}.{key}".lstrip(".")) for key, value in record.items()]
    elif isinstance(record, list):
        parts = [settings_of(value, f"{where}[{i}]") for i, value in enumerate(record)]
    else:
        return {where: json.dumps(record)}
    return {key: value for part in parts for key, value in part.items()}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError."""
    value = _parsed(_text(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; expected the file as leapalign writes it")
    return value


def read_lines(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl, if it is there: the finite numbers of each line. Raises UserError."""
    if not path.exists():
        return []
    found = []
    *lines, rest = _text(path).split("\n")
    del rest  # empty, or a line that a killed process left unfinished
    for number, line in enumerate(lines, start=1):
        value, where = _parsed(line, f"{path}, line {number}"), f"{path}, line {number}"
        if not isinstance(value, dict) or _number(value.get("step")) is None:
            raise UserError(f"{where}: not a JSON object with a step, as each update writes; is this a metrics.jsonl?")
        found.append({key: number.value for key, number in _numbers(value).items()})
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected the file as leapalign writes it") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else, also for an integer beyond a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST else None


def _numbers(values: Mapping[str, Any]) -> dict[str, Number]:
    """Return those that are finite numbers, by key."""
    return {key: Number(number) for key, value in values.items() if (number := _number(value)) is not None}
