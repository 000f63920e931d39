"""The embedded reward's second training: against gaming, and for a useful gradient at wrong scenes (LOG.md).

Training adds images between two scenes (between.py). Images between a false and a true scene must score in proportion,
so that the gradient at a wrong image points to the right one. Other mixed or distorted images must score less than
clean ones. Two scenes for which a caption is true must score alike; otherwise unspecified attributes collapse to one
favourite (all shapes yellow). Each image is first moved a little along the loss's gradient: adversarial training, one
step in the L2 norm (arXiv 1412.6572), after which gradients show shapes instead of textures (arXiv 1906.00945). The
judge has only the first training, so that the two do not share their weaknesses.
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

from leapalign.shapeworld.world import render
from leapalign.studies.shapeworld_build.between import Between, between
from leapalign.studies.shapeworld_build.clip import (
    LAYOUT_WEIGHT,
    NEVER,
    Batch,
    Size,
    Trainee,
    contrast,
    head_losses,
    roughen,
    save_clip,
)
from leapalign.studies.shapeworld_build.progress import Log, cosine_lr

ATTACK = 0.5  # largest L2 norm of an image's change; the norm of a shape is about 10
GAP = 5.0  # target margin between a true and a false end, in logits: a third in cosine
STREAM = 77  # makes the random numbers differ from the first training's


def harden_clip(
    source: Path, folder: Path, size: Size, steps: int, seed: int, *, pairs: int = 32, lr: float = 4e-4
) -> None:
    """Continue training the CLIP of `source` and save it as `folder`."""
    torch.manual_seed(seed)  # of the heads, which are initialised again
    noise = torch.Generator().manual_seed(seed)
    model = Trainee(size)
    model.clip = CLIPModel.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    log = Log(folder.name, steps)
    for step in range(steps):
        rng = np.random.default_rng((seed, STREAM, step))
        batch = Batch.make(pairs, rng)
        middle = between(batch.captions[:pairs], batch.scenes[:pairs], rng)
        images = torch.cat([torch.from_numpy(render(batch.scenes)), middle.ends, middle.images])
        (text, layout_read), (wrong, _) = model.read(batch.captions), model.read(batch.misses)
        length = ATTACK * torch.rand(len(images), 1, 1, 1, generator=noise)
        words = (text, layout_read, wrong)
        attack = partial(hard_loss, model, batch, middle, *(each.detach() for each in words))
        loss = hard_loss(model, batch, middle, *words, attacked(roughen(images, noise), length, attack))
        cosine_lr(optimizer, lr, step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log(step, loss=loss)
    save_clip(folder, model)


def hard_loss(
    model: Trainee, batch: Batch, middle: Between, text: Tensor, layout_read: Tensor, wrong: Tensor, images: Tensor
) -> Tensor:
    """The first training's loss with false ends in it, their distance, the way between, bad against good, good ends.

    `images`: the batch's, then the ends and the images between for its first S scenes; `text`, `layout_read` and
    `wrong` are what the text tower made of the batch's captions and misses.
    """
    num, size = len(middle.bad), len(batch.scenes)
    every_image, layout_seen, cells = model.see(images)
    image, ends, mixed = every_image.split([size, num, num])
    naming, placing = head_losses(model, batch.scenes, layout_read, layout_seen[:size], cells[:size])
    every, near = model.logits(batch, image, text, wrong)
    good = every.diagonal()[:num]
    end, score = (model.scale() * (text[:num] * seen).sum(-1) for seen in (ends, mixed))
    falsified = F.pad(end.masked_fill(~middle.false, NEVER), (0, len(text) - num), value=NEVER)[:, None]
    way = middle.share * good.detach() + (1 - middle.share) * end.detach()
    on_the_way = mean_of(F.smooth_l1_loss(score, way, reduction="none"), middle.false)
    worse = mean_of(F.softplus(score - good), middle.bad)
    apart = mean_of(F.relu(GAP - (good - end)), middle.false)
    alike = mean_of(F.smooth_l1_loss(end, good, reduction="none"), middle.true)
    matching = contrast(every, near, falsified) + apart + on_the_way + worse + alike
    return matching + naming + LAYOUT_WEIGHT * placing


def mean_of(values: Tensor, rows: Tensor) -> Tensor:
    """Mean over the selected rows; 0 if none is selected."""
    return values[rows].sum() / max(1, int(rows.sum()))


def attacked(images: Tensor, length: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Move each image by `length` [B, 1, 1, 1] (L2 norm of the pixels' change) up the gradient of the loss."""
    at = images.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(at), at)
    norm = grad.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
    return (images + length * grad / norm).clamp(0, 1)
