"""The embedded reward's second training, against being gamed by a generator that follows its gradient (LOG.md).

Badly drawn pictures are false of every caption (spoil.py). And each picture, good or bad, is first moved a little up
the loss's gradient at its pixels: adversarial training, one step in the L2 norm (arXiv 1412.6572), after which an
image's gradient tells of shapes and no longer of textures (arXiv 1906.00945). The judge keeps the first training only,
so that the two do not share their blind spots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from leapalign.shapeworld.build.clip import NEVER, Batch, Size, Trainee, contrast, roughen, save_clip
from leapalign.shapeworld.build.progress import Log, cosine_lr
from leapalign.shapeworld.build.spoil import spoil
from leapalign.shapeworld.world import render

ATTACK = 1.2  # largest L2 norm of the change of an image; a shape's own is about 10
STREAM = 77  # keeps the random numbers apart from the first training's


def harden_clip(
    source: Path, folder: Path, size: Size, steps: int, seed: int, *, pairs: int = 48, lr: float = 4e-4
) -> None:
    """Train the CLIP of `source` on and save it as `folder`."""
    noise = torch.Generator().manual_seed(seed)
    model = Trainee(size)
    model.clip = CLIPModel.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.clip.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    log = Log(folder.name, steps)
    for step in range(steps):
        rng = np.random.default_rng((seed, STREAM, step))
        batch = Batch.make(pairs, rng)
        bad, is_bad = spoil(batch.scenes[:pairs], rng)
        images = roughen(torch.cat([torch.from_numpy(render(batch.scenes)), bad]), noise)
        text, wrong = model.read(batch.captions)[0], model.read(batch.misses)[0]
        length = ATTACK * torch.rand(len(images), 1, 1, 1, generator=noise)
        attack = partial(hard_loss, model, batch, is_bad, text.detach(), wrong.detach())
        loss = hard_loss(model, batch, is_bad, text, wrong, attacked(images, length, attack))
        cosine_lr(optimizer, lr, step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.clip.parameters(), 1.0)
        optimizer.step()
        log(step, loss=loss)
    save_clip(folder, model)


def hard_loss(model: Trainee, batch: Batch, is_bad: Tensor, text: Tensor, wrong: Tensor, images: Tensor) -> Tensor:
    """The first training's contrast with bad pictures in it, and each bad picture against its good one.

    `images` are the batch's, followed by spoiled ones of its first S scenes; `is_bad` [S]; `text` and `wrong` are unit
    embeddings of the batch's captions and misses.
    """
    num = len(is_bad)
    image, spoiled = model.see(images)[0].split([len(images) - num, num])
    every, near = model.logits(batch, image, text, wrong)
    bad = (model.scale() * text @ spoiled.T).masked_fill(~is_bad, NEVER)
    worse = F.softplus(bad.diagonal() - every.diagonal()[:num])[is_bad].mean()
    return contrast(every, near, bad) + worse


def attacked(images: Tensor, length: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Each image moved by `length` [B, 1, 1, 1] (L2 norm of the pixels' change) up the gradient of the loss."""
    at = images.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(at), at)
    norm = grad.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
    return (images + length * grad / norm).clamp(0, 1)
