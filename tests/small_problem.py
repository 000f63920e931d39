"""A small float64 problem that the tests of this folder share: a network, noise, a grid, a reward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leapalign.flow.grids import sigma_grid
from leapalign.methods.base import Samples
from leapalign.methods.objective import Hinge, LatentGradient, latent_gradient

DIM = 4


class Net(nn.Module):
    """v(x, sigma) by two small blocks; counts its forwards, and which of them had a graph."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("w1", (6, DIM)), ("u", (6,)), ("w2", (6, 6)), ("w3", (DIM, 6))):
            setattr(self, name, nn.Parameter(0.6 * torch.randn(shape, generator=generator, dtype=dtype)))
        self.forwards: list[bool] = []
        self.block_checkpoint = False

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.forwards.append(torch.is_grad_enabled())
        h = self._block(lambda y: torch.tanh(y @ self.w1.T + sigma[..., None] * self.u), x)
        return self._block(lambda y: torch.tanh(y @ self.w2.T) @ self.w3.T, h)

    def _block(self, block, x: Tensor) -> Tensor:
        if self.block_checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return block(x)

    def grads(self) -> Tensor:
        """All gradients in one vector (zeros where there is none), and forget them."""
        grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.parameters()]
        self.zero_grad(set_to_none=True)
        return torch.cat([g.flatten() for g in grads])


def noise(batch: int = 8, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(batch, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid(num_steps: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return sigma_grid(num_steps, 2.0, dtype)


def samples(draw_noise=None, count: int = 8, **places) -> Samples:
    return Samples(count=count, noise=draw_noise or (lambda n: noise(n * count).unflatten(0, (n, count))), **places)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def score(latents: Tensor, rows: list[int]) -> dict[str, Tensor]:
    """A reward that depends on the sample's row, as prompts do."""
    phase = torch.tensor(rows, dtype=latents.dtype)[:, None]
    return {"r": torch.sin(latents + phase).sum(-1)}


def objective(surrogate, threshold: float = 10.0, **options) -> LatentGradient:
    return latent_gradient(surrogate, score, {"r": Hinge(threshold=threshold)}, **options)


def train_once(method, net, x, sigmas, draws, velocity=None) -> Tensor:
    """One whole update without optimiser: the gradient of every weight, in one vector."""
    surrogate = method(velocity or net, x, sigmas, draws)
    surrogate.backward(objective(surrogate).grad)
    return net.grads()
