"""The arena: equal compute, tables against a second derivation, search, resumption after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from leapalign.cli import main
from leapalign.codec import encode
from leapalign.errors import UserError
from leapalign.report.records import read_object
from leapalign.run import Run
from leapalign.studies.arena import conduct, work
from leapalign.studies.arena.ablations import ablations, ablations_guided
from leapalign.studies.arena.cost import Cost, equal_compute
from leapalign.studies.arena.named import arena, arena_smoke
from leapalign.studies.arena.search import Found, climb
from leapalign.studies.arena.study import Axis, Contender, with_setting
from leapalign.studies.arena.table import page, tables
from leapalign.training.loop import train
from leapalign.training.tracking import read_metrics


def cost(total: float) -> Cost:
    return Cost(updates=1, forwards=1.0, generator_forward=total, generator_backward=0.0, scoring=0.0)


def test_equal_compute() -> None:
    assert equal_compute(120, cost(3.0), cost(3.05)) == 120  # 118.03, within 2 %: the same run
    assert equal_compute(120, cost(3.0), cost(3.2)) == 112  # 112.5, to even
    assert equal_compute(120, cost(3.0), cost(1.0)) == 360
    assert equal_compute(120, cost(3.0), cost(1.1), uses=4) == 328  # 327.3, whole rollouts
    assert equal_compute(2, cost(1.0), cost(100.0)) == 1


def write_result(run: Run, overall: float, reward: float) -> None:
    """A finished and evaluated run."""
    folder = Path(run.out)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": run.name, "steps": run.steps}))
    (folder / "summary.json").write_text(json.dumps({"steps": run.steps}))
    lines = [{"step": 1, "reward": reward, "seconds": 2.0}, {"step": run.steps, "reward": reward, "seconds": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"after": overall, "after_standard_error": 9.0}
    record = {"geneval": {"overall": row}, "rewards": {"held_out_reward": row}}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(record))


def test_standard_errors_are_over_seeds_and_paired(tmp_path: Path) -> None:
    study = replace(arena_smoke(), out=str(tmp_path), seeds=(0, 1, 2))
    updates = {"leapalign": (2, 2), "refl": (2, 6)}
    values = {("leapalign", 2): [0.5, 0.7, 0.6], ("refl", 2): [0.4, 0.55, 0.5], ("refl", 6): [0.6, 0.75, 0.5]}
    for (name, steps), overall in values.items():
        for seed, value in zip(study.seeds, overall):
            write_result(work.run_of(study.contender(name), tmp_path, steps, seed), value, value / 2)
    (tmp_path / "base").mkdir()
    base = {"geneval": {"overall": {"accuracy": 0.45, "standard_error": 0.02}}}
    (tmp_path / "base" / "evaluation.json").write_text(json.dumps(base))
    found = tables(study, tmp_path, {"leapalign": cost(3e12), "refl": cost(1e12)}, updates)
    for table, steps in ((found.equal_updates, 2), (found.equal_compute, 6)):
        row = table.rows[2]
        own, reference = np.array(values["refl", steps]), np.array(values["leapalign", 2])
        error = own.std(ddof=1) / np.sqrt(3)
        overall = row.numbers["geneval/overall"]
        assert (overall.value, overall.error) == (pytest.approx(own.mean()), pytest.approx(error))
        change = row.numbers["change/geneval/overall"]
        assert (change.value, change.error) == (pytest.approx(own.mean() - 0.45), pytest.approx(error))
        against, paired = row.numbers["against/geneval/overall"], own - reference
        assert against.value == pytest.approx(paired.mean())
        assert against.error == pytest.approx(paired.std(ddof=1) / np.sqrt(3))
        assert row.numbers["compute"].value == steps and row.numbers["minutes"].value == steps * 2 / 60
    assert [row.name for row in found.equal_updates.rows] == ["base", "leapalign", "refl"]
    assert "against/geneval/overall" not in found.equal_updates.rows[1].numbers
    overall = next(column for column in found.equal_compute.columns if column.key == "geneval/overall")
    assert found.equal_updates.best(overall) == {1} and found.equal_compute.best(overall) == {2}
    assert found.costs.rows[1].numbers["steps"].value == 6
    alone = replace(study, equal_compute=False)
    assert work.updates_of(alone, {}) == {"leapalign": (2, 2), "refl": (2, 2)}
    found = tables(alone, tmp_path, {"leapalign": cost(3e12), "refl": cost(1e12)}, work.updates_of(alone, {}))
    assert found.equal_compute is None and list(found.by_name) == ["updates", "costs"]
    assert "steps" not in found.costs.rows[1].numbers and "compute" not in page(alone, found, "leapalign arena", ())


def searched(score: Callable[[tuple[float, ...]], float], *grid: Axis, widenings: int = 3) -> Found:
    run = with_setting(arena_smoke().contender("refl").run, "method.early_stop", 0.5)
    return climb(Contender(name="refl", run=run, grid=grid), score, widenings)


def test_a_search_widens_at_the_edge(capsys: pytest.CaptureFixture) -> None:
    rates = Axis(setting="learning_rate", values=(1.0, 2.0))
    shares = Axis(setting="method.early_stop", values=(0.5, 1.0), most=1.0)
    seen = []

    def score(point: tuple[float, ...]) -> float:
        seen.append(point)
        return -abs(point[0] - 5) + point[1]

    found = searched(score, rates, shares)
    assert found.best == (4.0, 1.0) and not found.edges  # 1.0 is the bound of its axis, and no edge
    assert len(seen) == len(set(seen))
    assert set(seen) == {(rate, 0.5) for rate in (1.0, 2.0, 4.0, 8.0)} | {(rate, 1.0) for rate in (1.0, 2.0, 4.0, 8.0)}
    assert "learning_rate is at the grid's edge; widening" in capsys.readouterr().err
    stuck = searched(lambda point: point[0], rates, widenings=1)
    assert stuck.record["at_edge"] == ["learning_rate"] and stuck.record["settings"] == {"learning_rate": 4.0}
    counts = searched(lambda point: -point[0], Axis(setting="method.early_stop", values=(2, 3), least=1), widenings=2)
    assert counts.best == (1.0,) and not counts.edges


def test_a_search_leaves_out_what_one_axis_after_another_does_not_need() -> None:
    seen = []

    def score(point: tuple[float, ...]) -> float:
        seen.append(point)
        return -((point[0] - 2) ** 2) - (point[1] - 0.5) ** 2

    rates = Axis(setting="learning_rate", values=(1.0, 2.0, 3.0))
    shares = Axis(setting="method.early_stop", values=(0.25, 0.5, 0.75))
    found = searched(score, rates, shares)
    assert found.best == (2.0, 0.5) and len(seen) == len(found.scores) == 5


def test_found_settings_are_used(tmp_path: Path) -> None:
    study = arena_smoke()
    (tmp_path / "search").mkdir()
    found = {"settings": {"learning_rate": 0.5, "method.early_stop": 0.25}}
    (tmp_path / "search" / "refl.json").write_text(json.dumps(found))
    run = work.settled(study, tmp_path).contender("refl").run
    assert (run.learning_rate, run.method.early_stop) == (0.5, 0.25)
    assert work.settled(study, tmp_path).contender("leapalign") == study.contender("leapalign")


def test_what_is_not_equal_is_refused() -> None:
    study = arena_smoke()
    odd = replace(study.contenders[1], run=replace(study.contenders[1].run, batch_size=8))
    wrong = {
        "batch_size: 4 -> 8": {"contenders": (study.contenders[0], odd)},
        "none of the contenders": {"reference": "x"},
        "different names": {"contenders": (study.contenders[0], study.contenders[0])},
        "share": {"search": replace(study.search, seeds=(1,))},
        "prompts or the seed": {"search": replace(study.search, judging=study.judging)},
        "different seeds": {"seeds": (0, 0)},
        "batch is no field": {"varied": ("batch",)},
    }
    for told, change in wrong.items():
        with pytest.raises(UserError, match=told):
            replace(study, **change)
    assert replace(study, contenders=(study.contenders[0], odd), varied=("batch_size",))
    with pytest.raises(UserError, match="is no number of ReFL; it has early_stop"):
        with_setting(study.contenders[1].run, "method.steps", 1)
    with pytest.raises(UserError, match="ascending"):
        Axis(setting="learning_rate", values=(2, 1))


def test_the_named_study_compares_before_saturation_with_equal_clipping() -> None:
    study = arena()
    runs = [contender.run for contender in study.contenders]
    assert len(runs) == 8 and len(study.seeds) == 5 and study.steps == 120
    assert all((run.clip_quantile, run.max_grad_norm, run.batch_size) == (0.5, 0.0, 16) for run in runs)
    assert all(contender.grid for contender in study.contenders)


def test_the_ablations_move_one_switch_each() -> None:
    study, guided = ablations(), ablations_guided()
    for each in (study, guided):
        first, *others = (encode(contender.run) for contender in each.contenders)
        for contender, record in zip(each.contenders[1:], others):
            changes = [key for key in first if record[key] != first[key] and key not in ("name", "out")]
            assert changes == ["rewards" if contender.name.startswith("lambda") else "method"], contender.name
        assert not each.equal_compute and each.seeds == (0, 1, 2)
    assert [c.run.rewards[0].threshold for c in study.contenders[-3:]] == [0.5, 0.8, 0.95]
    assert {c.run.model.guidance_scale for c in guided.contenders} == {4.0}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("arean",), "did you mean"),
        (("nowhere.json",), "cannot read"),
        (("nowhere.py:x",), "file not found"),
        (("arena-smoke", "--part", "3/2"), "--part 3/2"),
        (("arena-smoke", "--out", "taken"), "holds no study"),
        (("arena-smoke", "--seeds", "0", "0"), "different seeds"),
    ],
)
def test_wrong_input(tmp_path: Path, monkeypatch, capsys, argv: tuple[str, ...], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert main(["arena", *argv]) == 2
    assert told in capsys.readouterr().err


class Killed(Exception):
    pass


def test_a_killed_study_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """arena-smoke, killed in its second run; that run again without a kill; and the study once more, which is done."""
    study = replace(arena_smoke(), out=str(tmp_path / "study"))
    begun = []

    def killed(run: Run, **how: object):
        begun.append(run)

        def kill(metrics: dict) -> None:
            if len(begun) == 2 and metrics["step"] == 1:
                raise Killed

        return train(run, **how, on_step=kill)

    with monkeypatch.context() as patch:
        patch.setattr(work, "train", killed)
        with pytest.raises(Killed):
            conduct.conduct(study)
    found = conduct.conduct(study)

    again = Path(train(replace(begun[1], out=str(tmp_path / "again"))).out)
    resumed, file = Path(begun[1].out), "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (resumed / file).read_bytes() == (again / file).read_bytes()
    one, two = ([{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(p)] for p in (resumed, again))
    assert one == two

    assert [row.numbers["runs"].value for row in found.equal_compute.rows[1:]] == [2, 2]
    counted = found.costs.rows[0].numbers  # LeapAlign at three steps: three forwards, two of them with a backward
    assert counted["forwards"].value == 3 and counted["backwards"].value == pytest.approx(2, abs=0.1)
    assert counted["scoring"].value > 0
    record = read_object(study_file(study, "arena.json"))
    assert [row["name"] for row in record["updates"]["rows"]] == ["base", "leapalign", "refl"]
    numbers = record["updates"]["rows"][1]["numbers"]
    assert {"geneval/overall", "drift", "clipped", "evaluated/diversity/pixels"} <= numbers.keys()
    assert study_file(study, "arena.html").read_text().count("<svg viewBox") >= 2
    monkeypatch.setattr(work, "train", None)  # no run is left
    monkeypatch.setattr(work, "measure", None)
    conduct.conduct(study)
    with pytest.raises(UserError, match="holds another study"):
        conduct.conduct(replace(study, counted_updates=3))


def study_file(study, name: str) -> Path:
    return Path(study.out) / name
