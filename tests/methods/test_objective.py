"""The hinge at the latent: closed answers, several rewards, chunks, accumulation, what it refuses."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from leapalign.errors import UserError
from leapalign.methods import DRaFT, DRaFTLV, LeapAlign
from leapalign.methods.base import Surrogate
from leapalign.methods.draft import DRaFTDraws
from leapalign.methods.draft_lv import DRaFTLVDraws
from leapalign.methods.leapalign import LeapDraws
from leapalign.methods.objective import Hinge, latent_gradient
from small_problem import Net, grid, noise, objective, rng, score


def surrogate_of(x: torch.Tensor, weight=None, copies: int = 1) -> Surrogate:
    return Surrogate(x_hat=x, weight=torch.ones(len(x)) if weight is None else weight, copies=copies)


def summed(latents, rows):
    return {"r": latents.sum(-1)}


def test_a_closed_answer():
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.0, 1.0]])  # rewards 2, 6, 1; lambda 4: hinges 2, 0, 3
    result = latent_gradient(
        surrogate_of(x, torch.tensor([0.5, 1.0, 2.0])), summed, {"r": Hinge(threshold=4.0, weight=3.0)}
    )
    assert result.loss.item() == pytest.approx(3 * (0.5 * 2 + 2 * 3) / 3)
    assert result.grad.tolist() == [[-0.5, -0.5], [0.0, 0.0], [-2.0, -2.0]]
    assert result.rewards["r"].tolist() == [2.0, 6.0, 1.0] and result.hinges["r"].tolist() == [2.0, 0.0, 3.0]
    assert result.below.tolist() == [True, False, True] and result.has_gradient
    assert result.reward.tolist() == [2.0, 6.0, 1.0]


def test_all_above_the_threshold_has_no_gradient():
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    result = latent_gradient(surrogate_of(x), summed, {"r": Hinge(threshold=2.0)})  # the first lies exactly on it
    assert not result.has_gradient and result.loss == 0 and not result.grad.any()


def test_nan_counts_as_below_so_that_it_is_not_skipped():
    result = latent_gradient(surrogate_of(torch.tensor([[float("nan")]])), summed, {"r": Hinge(threshold=2.0)})
    assert result.has_gradient and result.loss.isnan()


def unequal(latents, rows):
    """Two rewards that pull on different coordinates, the second a thousand times as hard."""
    return {"small": 0.01 * latents[:, 0].sin(), "large": 10 * latents[:, 1].sin()}


def test_unit_gradients_let_no_reward_starve_another():
    x, weight = torch.randn(6, 4, dtype=torch.float64, generator=rng(3)), torch.linspace(0.5, 2, 6).double()
    terms = {"small": Hinge(threshold=1.0, unit_gradient=True), "large": Hinge(threshold=20.0, unit_gradient=True)}
    plain = {name: Hinge(threshold=term.threshold) for name, term in terms.items()}
    usual, equal = (latent_gradient(surrogate_of(x, weight), unequal, t) for t in (plain, terms))
    assert (usual.grad[:, 1].abs() / usual.grad[:, 0].abs()).min() > 30  # without: the large one decides
    torch.testing.assert_close(equal.grad[:, 0], -weight / 6 * x[:, 0].cos().sign())
    torch.testing.assert_close(equal.grad[:, 1], -weight / 6 * x[:, 1].cos().sign())
    torch.testing.assert_close(equal.slopes["large"], 10 * x[:, 1].cos().abs())
    assert equal.loss == usual.loss and not usual.slopes

    reached = terms | {"large": Hinge(threshold=-20.0, unit_gradient=True)}  # above its threshold: it pulls no more
    alone = latent_gradient(surrogate_of(x, weight), unequal, reached)
    assert not alone.grad[:, 1].any() and torch.equal(alone.grad[:, 0], equal.grad[:, 0])


def test_unit_gradients_are_by_sample_so_that_chunks_and_weights_change_nothing():
    x = torch.randn(6, 4, dtype=torch.float64, generator=rng(4))
    terms = {"small": Hinge(threshold=1.0, unit_gradient=True, weight=2.0), "large": Hinge(threshold=20.0, weight=0.5)}
    whole = latent_gradient(surrogate_of(x), unequal, terms)
    parts = latent_gradient(surrogate_of(x), unequal, terms, chunk=4)
    assert torch.equal(whole.grad, parts.grad) and torch.equal(whole.slopes["small"], parts.slopes["small"])
    torch.testing.assert_close(whole.grad[:, 0].abs(), torch.full((6,), 2 / 6, dtype=torch.float64))
    torch.testing.assert_close(whole.grad[:, 1], -0.5 * 10 * x[:, 1].cos() / 6)  # the other term is as ever


def test_several_rewards_add_up_and_are_returned_by_name():
    x = torch.randn(5, 3, dtype=torch.float64)

    def two(latents, rows):
        return {"a": latents.sum(-1), "b": (latents**2).sum(-1)}

    def one(name):
        return lambda latents, rows: {name: two(latents, rows)[name]}

    terms = {"a": Hinge(threshold=1.0, weight=2.0), "b": Hinge(threshold=4.0, weight=0.5)}
    both = latent_gradient(surrogate_of(x, torch.rand(5).double()), two, terms)
    weight = torch.rand(5).double()
    both = latent_gradient(surrogate_of(x, weight), two, terms)
    parts = {n: latent_gradient(surrogate_of(x, weight), one(n), {n: terms[n]}) for n in terms}
    torch.testing.assert_close(both.grad, parts["a"].grad + parts["b"].grad)
    torch.testing.assert_close(both.loss, parts["a"].loss + parts["b"].loss)
    assert torch.equal(both.below, parts["a"].below | parts["b"].below)
    for name in terms:
        assert torch.equal(both.rewards[name], parts[name].rewards[name])
    torch.testing.assert_close(both.reward, x.sum(-1) + (x**2).sum(-1))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 100])
def test_chunks_change_nothing(chunk):
    x = torch.randn(6, 4, dtype=torch.float64)
    sizes = []

    def counting(latents, rows):
        sizes.append(len(latents))
        return score(latents, rows)

    whole = objective(surrogate_of(x, copies=2))
    parts = latent_gradient(surrogate_of(x, copies=2), counting, {"r": Hinge(threshold=10.0)}, chunk=chunk)
    assert max(sizes) == min(chunk, 6) and sum(sizes) == 6
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-15)
    torch.testing.assert_close(parts.loss, whole.loss)
    assert torch.equal(parts.rewards["r"], whole.rewards["r"])


def test_a_chunks_graph_is_freed_before_the_next():
    graphs = []

    def spying(latents, rows):
        gc.collect()
        assert not any(graph() for graph in graphs)  # nothing of an earlier chunk is alive
        hidden = latents.exp()
        graphs.append(weakref.ref(hidden))
        return {"r": hidden.sum(-1)}

    latent_gradient(surrogate_of(torch.randn(4, 2)), spying, {"r": Hinge(threshold=100.0)}, chunk=1)
    assert len(graphs) == 4


def test_copies_know_their_samples_rows():
    seen = []

    def recording(latents, rows):
        seen.extend(rows)
        return summed(latents, rows)

    latent_gradient(surrogate_of(torch.randn(6, 2), copies=3), recording, {"r": Hinge(threshold=9.0)}, chunk=4)
    assert seen == [0, 1, 0, 1, 0, 1]


def test_the_reward_models_weights_and_the_models_graph_are_left_alone():
    net, w = Net(torch.float32), torch.nn.Parameter(torch.ones(4))
    surrogate = LeapAlign()(net, noise(dtype=torch.float32), grid(8, torch.float32), LeapDraws((6, 3)))
    with torch.no_grad():  # the caller's setting does not matter
        result = latent_gradient(surrogate, lambda z, rows: {"r": z @ w}, {"r": Hinge(threshold=99.0)})
    assert w.grad is None and all(p.grad is None for p in net.parameters())
    assert not any(t.requires_grad for t in (result.loss, result.grad, result.rewards["r"], result.hinges["r"]))
    assert surrogate.has_gradient


def test_half_precision_rewards_are_summed_in_float32():
    x = torch.rand(4, 3)
    result = latent_gradient(surrogate_of(x), lambda z, rows: {"r": z.sum(-1).bfloat16()}, {"r": Hinge(threshold=9.0)})
    assert {result.loss.dtype, result.grad.dtype, result.rewards["r"].dtype} == {torch.float32}


@pytest.mark.parametrize(
    "scored, terms, message",
    [
        (lambda z, rows: {"r": z.sum(-1).detach()}, {"r"}, "no gradient"),
        (lambda z, rows: {"r": z.sum(-1, keepdim=True)}, {"r"}, r"shape \[3, 1\].*expected \[3\]"),
        (lambda z, rows: {"r": z.sum()}, {"r"}, r"shape \[\]"),
        (lambda z, rows: {"other": z.sum(-1)}, {"r"}, "same names"),
        (lambda z, rows: {}, set(), "same names"),
    ],
)
def test_rewards_that_cannot_train_are_refused(scored, terms, message):
    with pytest.raises(UserError, match=message):
        latent_gradient(surrogate_of(torch.randn(3, 2)), scored, {name: Hinge(threshold=1.0) for name in terms})


EPS = torch.randn(2, 8, 4, generator=rng(3), dtype=torch.float64)


@pytest.mark.parametrize(
    "method, draws",
    [
        (LeapAlign(), lambda rows: LeapDraws((6, 3))),
        (DRaFT(num_last_steps=2), lambda rows: DRaFTDraws()),
        (DRaFTLV(), lambda rows: DRaFTLVDraws(EPS[:, rows])),
    ],
)
def test_accumulation_does_not_depend_on_the_micro_batch(method, draws):
    net, x, sigmas = Net(), noise(8), grid(8)

    def accumulated(size: int) -> tuple[torch.Tensor, float]:
        loss = 0.0
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            surrogate = method(net, x[rows], sigmas, draws(rows))

            def offset(latents, local, start=start):
                return score(latents, [start + row for row in local])

            result = latent_gradient(surrogate, offset, {"r": Hinge(threshold=1.0)}, batch_size=8)
            surrogate.backward(result.grad)
            loss += result.loss.item()
        return net.grads(), loss

    (whole, whole_loss), *others = [accumulated(size) for size in (8, 4, 2, 1)]
    assert whole.abs().max() > 1e-3 and whole_loss > 0
    for grads, loss in others:
        torch.testing.assert_close(grads, whole, rtol=0, atol=1e-12)
        assert loss == pytest.approx(whole_loss, abs=1e-12)
