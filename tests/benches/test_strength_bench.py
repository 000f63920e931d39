"""The bench of strengths: a row for each, against the base, and a figure that opens."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from leapalign.codec import dumps
from leapalign.errors import UserError
from leapalign.lookup.recipes import load_file as load_bench
from leapalign.recipes import shapeworld_leapalign
from leapalign.storage.embedded import FOLDER

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        return load_bench(str(BENCHES / "strength.py"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run whose "tuned" transformer is a scaled one."""
    folder = tmp_path / "run"
    shutil.copytree(FOLDER / "generator", folder / "pipeline")
    file = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.02 * value for name, value in load_file(file).items()}, file)
    (folder / "run.json").write_text(dumps(replace(shapeworld_leapalign(), out=str(folder), num_sampling_steps=2)))
    return folder


def test_each_strength_has_a_row_against_the_base_and_a_figure_is_drawn(bench, finished: Path, tmp_path: Path) -> None:
    settings = bench.Strength(
        run=str(finished), strengths=(0.5, 1.0), per_task=1, same_prompt=6, figure=tmp_path / "figure.png"
    )
    found = bench.main(settings)
    assert [row["strength"] for row in found["curve"]] == [0.0, 0.5, 1.0]
    base, half, _ = found["curve"]
    assert base["reward_change"] == 0 and base["entropy_ratio"] == 1 and base["pixels_ratio"] == 1
    assert half["reward"] == pytest.approx(base["reward"] + half["reward_change"]) != base["reward"]
    assert found["comparisons"]["0.5"]["rewards"]["held_out_reward"]["after"] == half["held_out_reward"]
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size[0] > 1000 and len(set(image.convert("RGB").getdata())) > 10


def test_a_folder_that_is_no_run_is_refused(bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the run"):
        bench.main(bench.Strength(run=str(tmp_path)))
