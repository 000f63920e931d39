"""`leapalign compare`: the numbers of tiny folders, the best in bold, files that parse, and wrong input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from leapalign.cli import main
from leapalign.report.comparison import COLUMNS, Comparison, Number, Row, columns_of
from leapalign.report.figures import Point, pareto
from leapalign.report.formats import latex, latex_text, markdown

EVIL = "a|b & <script>_1"


def write_run(folder: Path, name: str, rewards: list[float], **files: dict) -> Path:
    """A run of as many updates, with an evaluation at step 0 and at the last one."""
    folder.mkdir(parents=True)
    run = {"name": name, "learning_rate": 0.001, "steps": 4, "method": {"type": "leapalign.methods.refl.ReFL", "a": 1}}
    lines: list[dict] = [{"step": 0, "evaluation_reward": 0.25, "held_out/judge": 0.5}]
    lines += [{"step": i, "reward": r, "seconds": 2.0, "clipped": i % 2} for i, r in enumerate(rewards, start=1)]
    lines[-1] |= {"evaluation_reward": rewards[-1], "held_out/judge": 0.75, "seconds": 9.0, "drift/0.5": 3.0}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def evaluation(overall: float) -> dict:
    """As `leapalign evaluate` writes it."""
    row = {"accuracy": overall, "standard_error": 0.02, "correct": 1, "num": 2}
    return {"geneval": {"overall": row, "counting": row}, "rewards": {}, "open_colors": {"entropy": 2.5, "counts": {}}}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """good/: finished and evaluated; killed/: two of four updates, the second line of the third; base/: evaluation."""
    monkeypatch.chdir(tmp_path)
    good = write_run(tmp_path / "good", "good", [0.25, 0.5, 0.75], summary={"exported": {"step": 3}, "stopped": ""})
    (good / "evaluation").mkdir()
    pair = {"before": 0.5, "after": 0.625, "after_standard_error": 0.03, "difference": 0.125}
    (good / "evaluation" / "evaluation.json").write_text(json.dumps({"geneval": {"overall": pair}}))
    killed = write_run(tmp_path / "killed", EVIL, [0.5, 0.25])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "evaluation.json").write_text(json.dumps(evaluation(0.5)))
    return tmp_path


def answered(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    assert main(["compare", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_files(folders: Path, capsys: pytest.CaptureFixture) -> None:
    good, killed, base = answered(capsys, "good", "killed", "base")["rows"]
    assert (good["state"], killed["state"], base["state"]) == ("finished", "at 2 of 4", "evaluation")
    assert good["method"] == "ReFL" and killed["name"] == EVIL
    value = {key: number["value"] for key, number in good["numbers"].items()}
    assert value["steps"] == 3 and value["learning_rate"] == 0.001 and value["evaluation_reward"] == 0.75
    assert value["reward"] == 0.5 and value["seconds"] == 2.0 and value["clipped"] == pytest.approx(2 / 3)
    # of 0.25, 0.5, 0.75: deviation 0.25, over the root of 3
    assert good["numbers"]["reward"]["standard_error"] == pytest.approx(0.25 / 3**0.5)
    assert good["numbers"]["geneval/overall"] == {"value": 0.625, "standard_error": 0.03, "best": True}
    assert base["numbers"]["geneval/counting"]["standard_error"] == 0.02
    assert base["numbers"]["evaluated/open_color_entropy"]["value"] == 2.5
    assert "drift/0.5" not in value


def test_the_best_of_a_column_is_marked(folders: Path, capsys: pytest.CaptureFixture) -> None:
    good, killed, base = answered(capsys, "good", "killed", "base")["rows"]
    best = {row["name"]: {k for k, n in row["numbers"].items() if n["best"]} for row in (good, killed, base)}
    assert best["good"] >= {"reward", "evaluation_reward", "held_out/judge", "geneval/overall", "seconds"}
    assert best[EVIL] == {"held_out/judge", "seconds"}  # ties
    assert not best["base"]  # a column with one value has no best, and neither has the number of updates


def test_a_run_that_was_exported_early_shows_that_evaluation(folders: Path, capsys: pytest.CaptureFixture) -> None:
    (folders / "good" / "summary.json").write_text(json.dumps({"exported": {"step": 2}, "stopped": "why"}))
    (row,) = answered(capsys, "good")["rows"]
    assert row["state"] == "stopped early" and row["numbers"]["evaluation_reward"]["value"] == 0.25


def test_the_files_parse(folders: Path, capsys: pytest.CaptureFixture) -> None:
    files = ["--csv", "t.csv", "--markdown", "t.md", "--latex", "t.tex", "--page", "t.html"]
    assert main(["compare", "good", "killed", *files]) == 0
    printed = capsys.readouterr().out
    assert "0.500 ± 0.144" in printed and EVIL in printed
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["good", EVIL]
    assert float(rows[0]["reward_standard_error"]) == pytest.approx(0.25 / 3**0.5) and rows[1]["geneval/overall"] == ""
    lines = [line for line in Path("t.md").read_text().splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    assert len(lines) == 4 and len({len(each) for each in cells}) == 1
    assert "**0.500 ± 0.144**" in lines[2] and "**" not in lines[3].split("0.375")[1].split("|")[0]
    tex = Path("t.tex").read_text()
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
    assert r"$\mathbf{0.500 \pm 0.144}$" in body[1] and r"a|b \& <script>\_1" in body[2]
    html = Path("t.html").read_text()
    assert "<script" not in html and html.count("<svg viewBox") == 3  # batch reward, evaluation reward, held out
    assert 'class="best"><span class="num">0.500</span><span class="err"> ± 0.144' in html
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)


def test_columns_follow_their_table_and_text_is_escaped() -> None:
    rows = [Row(name="x", numbers={"geneval/new": Number(1.0), "geneval/overall": Number(0.5), "reward": Number(2.0)})]
    assert [column.title for column in columns_of(rows)] == ["training reward", "GenEval overall", "new"]
    assert latex_text(r"50%_a\b") == r"50\%\_a\textbackslash{}b"
    empty = Comparison(title="t", rows=[Row(name="x")], columns=COLUMNS[:1], note="n")
    assert "| x |  |" in markdown(empty) and r"x &  \\" in latex(empty)


def test_the_front_leaves_out_what_another_exceeds() -> None:
    points = [Point(name=n, series=0, x=x, y=y) for n, x, y in (("a", 1, 3), ("b", 2, 2), ("c", 1, 2), ("d", 3, 1))]
    assert [point.name for point in pareto(points)] == ["a", "b", "d"]


def damage(folder: Path, file: str, text: str) -> None:
    (folder / "good" / file).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("run.json", "{", "not JSON"),
        ("run.json", "[]", "not a JSON object"),
        ("metrics.jsonl", "3\n", "line 1"),
        ("metrics.jsonl", '{"step": true}\n', "line 1"),
        ("metrics.jsonl", '{"step": 1}\n{\n', "line 2"),
        ("summary.json", "x", "not JSON"),
        ("evaluation/evaluation.json", "{}", "none of geneval"),
        ("evaluation/evaluation.json", '{"geneval": {"overall": {"after": "x"}}}', "geneval.overall"),
        ("evaluation/evaluation.json", '{"geneval": 3}', "not an object of objects"),
    ],
)
def test_damaged_files_are_one_message(folders: Path, capsys, file: str, text: str, told: str) -> None:
    damage(folders, file, text)
    assert main(["compare", "good"]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("nowhere",), "no such folder"),
        (("good/metrics.jsonl",), "a file"),
        (("good/run.json",), "give the run's folder"),
        (("good", "--csv", "taken"), "not overwritten"),
        (("good", "--csv", "base"), "is a folder"),
        (("good", "--csv", "/dev/null", "--overwrite"), "is a folder or a device"),
        (("good", "--csv", "none/t.csv"), "there is no folder"),
        (("good", "--csv", "t", "--latex", "t"), "the same file"),
        (("drawn",), "not finished"),
    ],
)
def test_wrong_input(folders: Path, capsys, argv: tuple[str, ...], told: str) -> None:
    (folders / "taken").write_text("mine")
    (folders / "drawn").mkdir()
    (folders / "drawn" / "images.json").write_text("{}")
    assert main(["compare", *argv]) == 2
    assert told in capsys.readouterr().err
    assert (folders / "taken").read_text() == "mine"


def test_overwrite_replaces(folders: Path) -> None:
    (folders / "taken").write_text("mine")
    assert main(["compare", "good", "--csv", "taken", "--overwrite"]) == 0
    assert (folders / "taken").read_text().startswith("name,")
