"""The embedded reward and the held-out judge: small CLIP models trained on true captions with adversarial negatives.

A CLIP trained on random batches does not learn left and right, above and below, or which colour belongs to which shape.
Half of each batch are therefore adversarial negatives of the other half, scene and caption, and each image is also
contrasted with negatives of its own caption; pairs that are true by accident are excluded. Left and right were still
not learned (accuracy 0.50 after 3,000 steps, LOG.md), so each tower also predicts, from its pooled output, the number
and position of each shape and colour. Vision tokens predict the object in each cell, as in the generator's training.
All these heads are discarded after training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from leapalign.shapeworld import captions as c
from leapalign.shapeworld.world import COLORS, SHAPES, Scene, render
from leapalign.studies.shapeworld_build.progress import Log, cosine_lr
from leapalign.studies.shapeworld_build.scenes import LAYOUT, cell_labels, layout, random_caption
from leapalign.studies.shapeworld_build.text import clip_text_config, clip_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
MAX_SCALE = math.log(15.0)  # keeps cosines widely spread, so that the reward can rise
NEGATIVES = 3
TEXT_WIDTH = 96
LAYOUT_WEIGHT = 10.0
NEVER = -1e4  # a logit


@dataclass(frozen=True, kw_only=True)
class Size:
    """Geometry of a CLIP; `image / patch` must be even, for at least two tokens per cell."""

    image: int
    patch: int
    width: int
    layers: int
    projection: int = 128


REWARD = Size(image=48, patch=8, width=128, layers=3)
JUDGE = Size(image=40, patch=10, width=160, layers=3)


def new_clip(size: Size) -> CLIPModel:
    vision = CLIPVisionConfig(
        image_size=size.image,
        patch_size=size.patch,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        projection_dim=size.projection,
        hidden_act="gelu",
    )
    text = clip_text_config(clip_tokenizer(), TEXT_WIDTH, 3, size.projection)
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=size.projection,
        logit_scale_init_value=math.log(8.0),
    )
    return CLIPModel(config)


def pixel_values(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> input of the vision tower, preprocessed as the reward does it."""
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def true_by_accident(captions: list[c.Metadata], scenes: list[Scene]) -> np.ndarray:
    """[scene, caption] True if the scene has all objects that the caption names, ignoring their relation."""
    have = np.zeros((len(scenes), len(SHAPES), len(COLORS) + 1), int)
    for i, scene in enumerate(scenes):
        for o in scene:
            have[i, SHAPES.index(o.shape), list(COLORS).index(o.color)] += 1
    have[:, :, -1] = have[:, :, :-1].sum(-1)  # the last column: any colour
    need, exact = np.zeros((len(captions), *have.shape[1:]), int), np.full((len(captions), len(SHAPES)), 99)
    for j, caption in enumerate(captions):
        for item in caption["include"]:
            color = list(COLORS).index(item["color"]) if "color" in item else -1
            need[j, SHAPES.index(item["class"]), color] = item["count"]
        for item in caption.get("exclude", ()):
            exact[j, SHAPES.index(item["class"])] = item["count"] - 1
    enough = (have[:, None] >= need[None]).all((-1, -2))
    return np.asarray(enough & (have[:, None, :, -1] <= exact[None]).all(-1))


def make_batch(pairs: int, rng: np.random.Generator) -> tuple[list[c.Metadata], list[Scene]]:
    """Draw `pairs` captions with scenes, followed by one adversarial negative of each."""
    captions = [random_caption(rng) for _ in range(pairs)]
    misses = [near[rng.integers(len(near))] for near in map(c.near_misses, captions)]
    return captions + misses, [c.scene_of(caption, rng) for caption in captions + misses]


def roughen(images: Tensor, rng: torch.Generator) -> Tensor:
    """Add slight noise and, to a third of the images, slight blur, as in decoded images."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=rng) * (torch.rand(len(images), 1, 1, 1, generator=rng) < 0.33)
    noise = torch.randn(images.shape, generator=rng) * 0.06 * torch.rand(len(images), 1, 1, 1, generator=rng)
    return images + share * (blurred - images) + noise


class Trainee(nn.Module):
    """A CLIP with two heads that predict the shape and colour in each cell."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, self.clip, self.tokenizer = size, new_clip(size), clip_tokenizer()
        self.place_seen, self.place_read = nn.Linear(size.width, LAYOUT), nn.Linear(TEXT_WIDTH, LAYOUT)
        self.name_shape = nn.Linear(size.width, len(SHAPES) + 1)
        self.name_color = nn.Linear(size.width, len(COLORS) + 1)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> unit image embeddings [B, D], predicted layouts [B, LAYOUT], cell tokens [B, 4, width]."""
        output = self.clip.vision_model(pixel_values=pixel_values(images, self.size.image))
        half = self.size.image // self.size.patch // 2
        grid = output.last_hidden_state[:, 1:].unflatten(1, (2, half, 2, half))
        image = F.normalize(self.clip.visual_projection(output.pooler_output), dim=-1)
        return image, self.place_seen(output.pooler_output), grid.mean((2, 4)).flatten(1, 2)

    def read(self, captions: list[c.Metadata]) -> tuple[Tensor, Tensor]:
        """-> unit text embeddings [N, D] and predicted layouts [N, LAYOUT]."""
        prompts = [caption["prompt"] for caption in captions]
        tokens = self.tokenizer(prompts, padding="max_length", max_length=12, return_tensors="pt")
        pooled = self.clip.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1), self.place_read(pooled)

    def scale(self) -> Tensor:
        return self.clip.logit_scale.clamp(max=MAX_SCALE).exp()

    def logits(self, batch: Batch, image: Tensor, text: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """-> [image, caption] without accidental truths, and each image's with its caption's near misses [B, K]."""
        every = (self.scale() * image @ text.T).masked_fill(batch.skip, NEVER)
        near = wrong.unflatten(0, (len(image), NEGATIVES))
        return every, self.scale() * (image[:, None] * near).sum(-1)


@dataclass(frozen=True)
class Batch:
    """Captions with scenes for which they are true, negatives of each caption, and pairs that are true by accident."""

    captions: list[c.Metadata]
    scenes: list[Scene]
    misses: list[c.Metadata]  # NEGATIVES a caption
    skip: Tensor  # [B, B] scene, caption

    @classmethod
    def make(cls, pairs: int, rng: np.random.Generator) -> Batch:
        captions, scenes = make_batch(pairs, rng)
        near = np.eye(len(captions), k=len(captions) // 2, dtype=bool)
        skip = true_by_accident(captions, scenes) & ~np.eye(len(captions), dtype=bool) & ~near & ~near.T
        misses = [near[i] for near in map(c.near_misses, captions) for i in rng.integers(len(near), size=NEGATIVES)]
        return cls(captions, scenes, misses, torch.from_numpy(skip))


def contrast(logits: Tensor, wrong: Tensor, false: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of logits [image, caption], plus each image against negatives of its own caption, [B, K].

    `false` [caption, F] are logits of further images for which that caption is false.
    """
    target = torch.arange(len(logits))
    own = torch.cat([logits.diagonal()[:, None], wrong], dim=1)
    by_caption = logits.T if false is None else torch.cat([logits.T, false], dim=1)
    return F.cross_entropy(logits, target) + F.cross_entropy(by_caption, target) + F.cross_entropy(own, target * 0)


def head_losses(
    model: Trainee, scenes: list[Scene], layout_read: Tensor, layout_seen: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of the predicted objects in each cell, and of the layout predicted by the vision and text towers."""
    labels = torch.tensor(np.stack([cell_labels(s) for s in scenes]))
    naming = F.cross_entropy(model.name_shape(cells).flatten(0, 1), labels[..., 0].flatten())
    naming = naming + F.cross_entropy(model.name_color(cells).flatten(0, 1), labels[..., 1].flatten())
    layouts = torch.from_numpy(np.stack([layout(s) for s in scenes]))
    return naming, F.mse_loss(layout_seen, layouts) + F.mse_loss(layout_read, layouts)


def train_clip(folder: Path, size: Size, steps: int, seed: int, *, pairs: int = 48, lr: float = 1e-3) -> None:
    """Train from scratch and save a float16 CLIPModel folder with tokenizer and image processor."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    model = Trainee(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    log = Log(folder.name, steps)
    for step in range(steps):
        batch = Batch.make(pairs, np.random.default_rng((seed, step)))
        image, *seen = model.see(roughen(torch.from_numpy(render(batch.scenes)), noise))
        text, layout_read = model.read(batch.captions)
        naming, placing = head_losses(model, batch.scenes, layout_read, *seen)
        matching = contrast(*model.logits(batch, image, text, model.read(batch.misses)[0]))
        cosine_lr(optimizer, lr, step, steps)
        optimizer.zero_grad()
        (matching + naming + LAYOUT_WEIGHT * placing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log(step, matching=matching, naming=naming, placing=placing)
    save_clip(folder, model)


@torch.no_grad()
def save_clip(folder: Path, model: Trainee) -> None:
    model.clip.logit_scale.clamp_(max=MAX_SCALE)
    model.clip.half().save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    crop = {"height": model.size.image, "width": model.size.image}
    processor = CLIPImageProcessor(
        size={"shortest_edge": model.size.image}, crop_size=crop, image_mean=MEAN, image_std=STD
    )
    processor.save_pretrained(folder)
