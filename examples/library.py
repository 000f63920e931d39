"""LeapAlign as a library: any velocity(x, sigma), any differentiable reward; no diffusers, no training loop of ours."""

import torch

from leapalign import Hinge, LeapAlign, Samples, inputs_only, latent_gradient, rollout, sigma_grid

torch.manual_seed(0)
rng = torch.Generator().manual_seed(0)
target = torch.tensor([1.0, -1.0])
net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
method, sigmas = LeapAlign(), sigma_grid(10)  # ascending: sigmas[0] = 0 is the image, sigmas[10] = 1 the noise


def velocity(x, sigma):  # v ~ dx/dsigma, [B, 2] -> [B, 2]
    return net(torch.cat([x, sigma.expand(len(x), 1)], dim=-1))


def score(latents, rows):  # rows: which samples of the batch (which prompts) these are
    return {"closeness": -(latents - target).square().sum(-1)}


test_noise = torch.randn(256, 2, generator=rng)
before = score(rollout(velocity, test_noise, sigmas), [])["closeness"].mean().item()
for _ in range(150):
    draws = method.draw(10, rng, Samples(count=32))
    surrogate = method(inputs_only(velocity), torch.randn(32, 2, generator=rng), sigmas, draws)
    result = latent_gradient(surrogate, score, {"closeness": Hinge(threshold=0.0)})  # max(0, lambda - r)
    surrogate.backward(result.grad)
    optimizer.step()
    optimizer.zero_grad()
after = score(rollout(velocity, test_noise, sigmas), [])["closeness"].mean().item()
print(f"mean reward of 256 samples: {before:.3f} before, {after:.3f} after 150 steps")
