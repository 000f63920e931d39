"""examples/library.py runs as printed: LeapAlign without diffusers raises the reward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "library.py"


def test_the_example_raises_the_reward_without_diffusers():
    code = (
        "import runpy, sys; result = runpy.run_path(sys.argv[1]); "
        "assert not {'diffusers', 'transformers'} & set(sys.modules); print(result['before'], result['after'])"
    )
    output = subprocess.run([sys.executable, "-c", code, EXAMPLE], capture_output=True, text=True, check=True).stdout
    before, after = map(float, output.splitlines()[-1].split())
    assert before < -1 and after > before / 2 and after > -1
    assert output.startswith("mean reward of 256 samples")


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40
