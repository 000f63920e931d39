"""The embedded generator: a small SD3 pipeline, trained by flow matching on captions that are partly wrong.

Flow matching (paper Eq. 2) in the VAE's latents, times logit-normal, captions dropped for classifier-free guidance. Two
departures from SD3's recipe, for speed on a CPU: image tokens of a middle layer also predict the shape and colour of
the object in their cell (a dense form of representation alignment, arXiv 2410.06940), and the pooled text also predicts
the caption's layout, because text encoders trained from scratch learn relations last. These heads are discarded after
training.
"""

# diffusers and transformers annotate some constructors more narrowly than they accept
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from leapalign.shapeworld.captions import scene_of
from leapalign.shapeworld.world import COLORS, SHAPES, render
from leapalign.studies.shapeworld_build.progress import Log, flat_then_decay
from leapalign.studies.shapeworld_build.scenes import (
    LAYOUT,
    SLOPPY,
    STRICT,
    Manners,
    captioned_scene,
    cell_labels,
    layout,
    random_caption,
)
from leapalign.studies.shapeworld_build.text import WIDTH, TextEncoders
from leapalign.studies.shapeworld_build.vae import encode

CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
ALIGN_WEIGHT, ALIGN_BLOCK = 0.3, 2
READ_WEIGHT = 3.0
CHECKPOINT_EVERY = 500


@dataclass(frozen=True)
class Lesson:
    """A phase of the training."""

    until: int  # its last step
    manners: Manners  # of its captions
    data_seed: int  # lessons with the same seed share their images
    mean_logit: float  # of the times: 0 = about 0.5, 1 = about 0.73


# First shapes; then places, which are decided above 0.8, where an object's latents begin to show through the noise.
# From sloppy captions alone a small transformer learns no relation at all (LOG.md): so a clean lesson in between.
LESSONS = (
    Lesson(4000, SLOPPY, 0, 0.0),
    Lesson(5000, SLOPPY, 0, 1.0),
    Lesson(7000, STRICT, 1, 1.0),
    Lesson(8500, SLOPPY, 2, 0.5),
)


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make an unshifted scheduler, stretched to end at 1/16: with SD3's own grid the last step is nearly empty."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, shift_terminal=1 / 16)


@dataclass(frozen=True)
class Data:
    """The training set, rendered and encoded once."""

    latents: Tensor  # [N, 8, 8, 8]
    clip_ids: Tensor  # [N, 12]
    t5_ids: Tensor  # [N, 5]
    layouts: Tensor  # [N, LAYOUT] of a scene for which the caption is true; zeros for a dropped caption
    cells: Tensor  # [N, 4, 2] shape and colour number of the object in each cell, 0 for none

    @classmethod
    def make(cls, vae: AutoencoderKL, text: TextEncoders, manners: Manners, num: int, rng: np.random.Generator) -> Data:
        captions = [random_caption(rng, manners) for _ in range(num)]
        scenes = [captioned_scene(caption, rng, manners) for caption in captions]
        prompts = ["" if rng.random() < CAPTION_DROPOUT else caption["prompt"] for caption in captions]
        asked = [layout(scene_of(caption, rng) if prompt else ()) for caption, prompt in zip(captions, prompts)]
        chunks = [torch.from_numpy(render(scenes[i : i + 500])) for i in range(0, num, 500)]
        latents = torch.cat([encode(vae, chunk) for chunk in chunks])
        cells = torch.tensor(np.stack([cell_labels(s) for s in scenes]))
        return cls(latents, *text.token_ids(prompts), torch.from_numpy(np.stack(asked)), cells)


class Denoiser(nn.Module):
    """Text encoders and transformer as one trained module, with two heads that predict the object in each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.transformer = TextEncoders(), new_transformer()
        width = self.transformer.inner_dim
        self.name_shape, self.name_color = nn.Linear(width, len(SHAPES) + 1), nn.Linear(width, len(COLORS) + 1)
        self.place_read = nn.Linear(2 * WIDTH, LAYOUT)
        self.tokens: Tensor | None = None
        self.transformer.transformer_blocks[ALIGN_BLOCK].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, output: tuple) -> None:
        self.tokens = output[1]  # image tokens [B, 16, width]

    def forward(self, x: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, ...]:
        """-> velocity [B, 8, 8, 8]; logits of shape and colour of the four cells [B, 4, classes]; layout as read."""
        text, pooled = self.text(clip_ids, t5_ids)
        v = self.transformer(x, text, pooled, sigma * 1000, return_dict=False)[0]
        tokens, self.tokens = self.tokens, None  # not kept: a graph on the module could not be copied
        assert tokens is not None
        cells = tokens.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)  # 4 × 4 tokens -> 2 × 2 cells
        return v, self.name_shape(cells), self.name_color(cells), self.place_read(pooled)


def losses(
    model: Callable[..., Any], data: Data, rows: Tensor, rng: torch.Generator, mean_logit: float
) -> tuple[Tensor, ...]:
    """Flow-matching loss (Eq. 2), cell loss and layout loss of a batch; times are logit-normal."""
    x_0 = data.latents[rows]
    x_1 = torch.randn(x_0.shape, generator=rng)
    sigma = torch.sigmoid(torch.randn(len(rows), generator=rng) + mean_logit)
    at = sigma[:, None, None, None]
    v, shapes, colors, read = model((1 - at) * x_0 + at * x_1, sigma, data.clip_ids[rows], data.t5_ids[rows])
    labels = data.cells[rows]
    naming = F.cross_entropy(shapes.flatten(0, 1), labels[..., 0].flatten())
    naming = naming + F.cross_entropy(colors.flatten(0, 1), labels[..., 1].flatten())
    return F.mse_loss(v, x_1 - x_0), naming, F.mse_loss(read, data.layouts[rows])


def train_generator(
    folder: Path, vae: AutoencoderKL, steps: int, seed: int, *, num: int = 32_000, batch: int = 64, lr: float = 1e-3
) -> None:
    """Train and save the averaged weights as a pipeline folder; resume from `folder`.state.pt, saved regularly.

    `steps`: at most those of `LESSONS`. The learning rate is constant until the last quarter, so the number of steps
    may be changed before that.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Denoiser()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    state = State(Path(f"{folder}.state.pt"), model, average, optimizer, rng)
    compiled = torch.compile(model)
    log = Log("generator", steps)
    data, data_seed = None, -1
    for step in range(state.load(), steps):
        lesson = next(each for each in LESSONS if step < each.until)
        if data is None or lesson.data_seed != data_seed:
            data_seed = lesson.data_seed
            data = Data.make(vae, model.text, lesson.manners, num, np.random.default_rng([seed, data_seed]))
        rows = torch.randint(num, (batch,), generator=rng)
        flow, naming, reading = losses(compiled, data, rows, rng, lesson.mean_logit)
        flat_then_decay(optimizer, lr, step, steps)
        optimizer.zero_grad()
        (flow + ALIGN_WEIGHT * naming + READ_WEIGHT * reading).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        log(step, flow=flow, naming=naming, reading=reading)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state.save(step + 1)
            save_pipeline(folder, average.module, vae)
    save_pipeline(folder, average.module, vae)


@dataclass(frozen=True)
class State:
    """The state from which the training resumes; a file of the build, read with `weights_only=True`."""

    path: Path
    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    rng: torch.Generator

    def save(self, step: int) -> None:
        parts = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        partial = self.path.with_suffix(".partial")
        torch.save({**state, "rng": self.rng.get_state(), "step": step}, partial)
        partial.replace(self.path)

    def load(self) -> int:
        """Load the state, if there is one; return the next step (0 without a state)."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        return state["step"]


def save_pipeline(folder: Path, model: nn.Module, vae: AutoencoderKL) -> None:
    """Save a complete `StableDiffusion3Pipeline` folder in float16."""
    model = copy.deepcopy(model)
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=new_scheduler(),
        vae=copy.deepcopy(vae),
        text_encoder=model.text.clip_1,
        tokenizer=model.text.tokenizer,
        text_encoder_2=model.text.clip_2,
        tokenizer_2=model.text.tokenizer,
        text_encoder_3=model.text.t5,
        tokenizer_3=model.text.tokenizer_3,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    config = folder / "vae" / "config.json"
    values = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(values, indent=2) + "\n")  # diffusers notes the work folder that the VAE came from
