"""Settings of an update that the paper leaves open: AdamW's eps, which weights decay, gradients of clamped pixels; and
the prompts that a run with another batch size goes on with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from leapalign.checkpoint import checkpoints
from leapalign.errors import UserError
from leapalign.models.decode import straight_through_clamp, with_pixel_gradient
from leapalign.prompts import Prompt
from leapalign.training import batches, direct, loop
from leapalign.training.batches import Start


def test_adam_eps_is_in_the_denominator(tiny_run):
    """AdamW's first step is rate * g / (|g| + eps): with a huge eps it is rate * g / eps."""
    engine = loop.build(tiny_run(adam_eps=1e6, weight_decay=0.0, max_grad_norm=0.0))
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    direct.update(engine, 0)
    for name, p in engine.parameters.items():
        expected = before[name] - engine.run.learning_rate * p.grad / 1e6  # type: ignore[operator]
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-7)
    assert loop.build(tiny_run()).optimizer.defaults["eps"] == 1e-8
    with pytest.raises(UserError, match="adam_eps is -1"):
        tiny_run(adam_eps=-1.0)


@pytest.mark.parametrize("all_decay", [True, False])
def test_biases_and_norms_decay_or_not(tiny_run, all_decay):
    engine = loop.build(tiny_run(weight_decay=0.5, learning_rate=1e-3, decay_biases_and_norms=all_decay))
    with torch.no_grad():
        for p in engine.parameters.values():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    engine.optimizer.step()
    for name, p in engine.parameters.items():
        decayed = all_decay or name.endswith("weight")
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 1e-3 * 0.5 if decayed else 1.0))


def test_the_optimiser_of_two_groups_resumes_bit_for_bit(tiny_run, tmp_path):
    whole = tiny_run(out=str(tmp_path / "whole"), decay_biases_and_norms=False, weight_decay=0.3)
    loop.train(whole)
    half = replace(whole, out=str(tmp_path / "half"), steps=2)
    loop.train(half)
    loop.train(replace(half, steps=whole.steps), resume=True)
    states = [checkpoints.find(replace(whole, out=str(tmp_path / name))).state for name in ("whole", "half")]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert states[0]["files"][name] == states[1]["files"][name]


def test_the_gradient_of_clamped_pixels_is_a_setting():
    """`clamp` is autograd's own clamp; `straight-through` lets it pass."""
    x = torch.tensor([[-3.0, -0.1, 0.2, 0.9, 1.1, 5.0]], requires_grad=True)
    weights = torch.arange(1.0, 7.0)
    gradients = {}
    for how in ("straight-through", "clamp"):
        images = with_pixel_gradient(straight_through_clamp(x), how)  # type: ignore[arg-type]
        assert torch.equal(images.detach(), x.detach().clamp(0, 1))
        (gradients[how],) = torch.autograd.grad((weights * images).sum(), x)
    (clamped,) = torch.autograd.grad((weights * x.clamp(0, 1)).sum(), x)
    assert torch.equal(gradients["clamp"], clamped)
    assert torch.equal(gradients["straight-through"][0], weights)


def test_the_setting_reaches_the_run(tiny_run, tiny_module, monkeypatch):
    """A decoder that leaves half of its pixels outside: the two settings train differently, the reward is the same."""
    monkeypatch.setattr(tiny_module.Tiny, "decode", lambda self, z: straight_through_clamp(z))
    found = {}
    for how in ("straight-through", "clamp"):
        found[how] = direct.update(loop.build(tiny_run(pixel_gradient=how)), 0)
    assert found["clamp"]["reward"] == found["straight-through"]["reward"]
    assert 0 < found["clamp"]["grad_norm"] < found["straight-through"]["grad_norm"]


def test_another_batch_size_reads_on_where_the_run_was(tiny_run, monkeypatch):
    """Two updates of 4 samples, then updates of 2: places 8, 9, then 10, 11; none is skipped or shown again."""
    seen, micro_batches = [], batches.micro_batches

    def watched(*given, **named):
        for micro in micro_batches(*given, **named):
            seen.extend(micro.prompts)
            yield micro

    monkeypatch.setattr(batches, "micro_batches", watched)
    run = tiny_run(steps=2, batch_size=4, checkpoint_every=2, self_checks=False)
    loop.train(run)
    loop.train(replace(run, batch_size=2, steps=5), resume=True, allow_changes=True)
    prompts = run.prompts.load()
    assert seen == [prompts[batches.prompt_index(run.seed, place, len(prompts))].text for place in range(14)]
    assert checkpoints.find(run).state["samples"] == 14


def test_a_resumed_run_encodes_the_prompts_that_it_reaches(tiny_run):
    """Also where it starts in the middle of an epoch and ends in the next one."""
    run = tiny_run(steps=10, batch_size=2, micro_batch_size=1, evaluation_size=1, self_checks=False)
    prompts = run.prompts.load()
    texts = batches.prompts_used(run, prompts, Start(step=9, samples=9))
    reached = {prompts[batches.prompt_index(run.seed, place, len(prompts))].text for place in (9, 10)}
    assert reached <= set(texts) and len(texts) <= 3
    checked = batches.prompts_used(replace(run, self_checks=True), prompts, Start(step=9, samples=9))
    assert checked[0] == prompts[batches.prompt_index(run.seed, 0, len(prompts))].text
    assert set(batches.prompts_used(run, prompts, Start(step=0, samples=3))) == {prompt.text for prompt in prompts}


def test_the_fixed_set_has_an_order_of_its_own(tiny_run):
    """Not the first update's prompts, whatever the seeds."""
    run = tiny_run(batch_size=64, evaluation_size=64)
    prompts = [Prompt(text=f"prompt {i}") for i in range(1000)]
    first = [text for micro in batches.micro_batches(run, prompts, 0) for text in micro.prompts]
    fixed = batches.evaluation_set(run, prompts)
    assert run.seed == run.evaluation_seed and len(set(fixed)) == 64
    assert len(set(first) & set(fixed)) < 16  # 4 are expected by chance
