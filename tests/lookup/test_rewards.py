"""The rewards with which a model is evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from leapalign.codec import dumps
from leapalign.lookup.rewards import rewards_of
from leapalign.monitors import HeldOut, Monitors
from leapalign.recipes import shapeworld_leapalign
from leapalign.rewards.clip import CLIPScore, PickScore


def test_a_runs_held_out_rewards_come_after_its_own(tmp_path: Path) -> None:
    other, judge = CLIPScore(path="embedded:reward"), PickScore(path="embedded:judge")
    monitors = Monitors(held_out=(HeldOut(reward=judge), HeldOut(reward=other), HeldOut(reward=other)))
    (tmp_path / "run.json").write_text(dumps(replace(shapeworld_leapalign(), monitors=monitors)))
    found = rewards_of(str(tmp_path), {})
    assert list(found) == ["pickscore", "held_out/clipscore", "held_out/clipscore-3", "held_out_reward"]
    assert found["held_out/clipscore"] == other and found["held_out_reward"] == judge
    assert list(rewards_of("embedded:generator", {})) == ["pickscore", "held_out_reward"]
