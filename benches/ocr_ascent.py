"""From an empty image to a word, by the OCR reward's gradient alone: does another recogniser read it too?

    python benches/ocr_ascent.py > ocr_ascent.json                      # images in runs/ocr_ascent
    python benches/ocr_ascent.py --words Hello --grains 1 --copies 1 --noise 0 --shift 0 --zoom 0 --rotation 0

The image is sigmoid(z), grey; z is the sum of coarse images, one for each of `grains`, with one number for
grain x grain pixels, enlarged bicubically. All start at 0: plain grey. Adam, its rate falling along half a cosine,
ascends the mean score of `copies` images, each shifted, zoomed and rotated at random, noisy, and seen at a random
lower resolution, less `smoothness` times the mean absolute difference of neighbouring pixels. Nothing here knows a
letter but the recogniser.

A row says what each recogniser reads in the plain 8-bit image, as the PNG has it: `ocr` is the one that was climbed
(EasyOCR's english_g2); `judge` is RapidOCR's recogniser on the whole image, `judge_detects` behind its text detector.
Needs leapalign[ocr].
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from shared import facts
from torch import Tensor

from leapalign.evaluation.text_accuracy import TextAccuracy, TextJudge
from leapalign.images import to_levels, to_pil
from leapalign.rewards.ocr import OCR
from leapalign.rewards.ocr.model import OCRReward


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Ascend the OCR reward from grey; JSON on stdout, images under --out."""

    words: tuple[str, ...] = ("Hello", "reward", "LEAP", "open")
    seeds: tuple[int, ...] = (0,)
    height: int = 64
    width: int = 256
    """Pixels."""
    steps: int = 400
    learning_rate: float = 0.05
    grains: tuple[int, ...] = (4, 8, 16)
    """Pixels a parameter, of each layer; divisors of height and width."""
    copies: int = 4
    """Augmented images a step."""
    noise: float = 0.1
    """Standard deviation of the pixels' noise; in [0, 1] units."""
    shift: float = 0.03
    """Largest shift, as a share of the width, and three times that of the height."""
    zoom: float = 0.15
    """Largest relative change of size, of each axis by itself."""
    rotation: float = 0.05
    """Largest angle, radians."""
    shrink: float = 0.6
    """Copies are seen at a share of their resolution drawn from [1 - shrink, 1]."""
    smoothness: float = 1.0
    """Weight of the mean absolute difference of neighbours."""
    out: Path = Path("runs/ocr_ascent")


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The recogniser that is climbed, and the one that only judges, without and with its detector."""

    ocr: OCRReward = field(default_factory=lambda: OCR().load())
    judge: TextJudge = field(default_factory=lambda: TextAccuracy(detect=False, ignore_case=False).load())
    detecting: TextJudge = field(default_factory=lambda: TextAccuracy(ignore_case=False).load())

    def row(self, image: Tensor, prompt: str) -> dict[str, Any]:
        """Readings and scores of the 8-bit image."""
        image = torch.from_numpy(to_levels(image[0])).permute(2, 0, 1)[None] / 255
        return {
            "ocr_score": float(self.ocr(image, [prompt])),
            "ocr": self.ocr.read(image)[0],
            "judge": self.judge.read(image)[0],
            "judge_accuracy": float(self.judge(image, [prompt])),
            "judge_detects": self.detecting.read(image)[0],
            "judge_detects_accuracy": float(self.detecting(image, [prompt])),
        }


def ascend(word: str, seed: int, settings: Ascent, readers: Readers) -> list[dict[str, Any]]:
    """Rows of the start, the middle and the end."""
    prompt, random = f'"{word}"', torch.Generator().manual_seed(seed)
    cells = [(settings.height // grain, settings.width // grain) for grain in settings.grains]
    z = [torch.zeros(1, 1, *size, requires_grad=True) for size in cells]
    optimizer = torch.optim.Adam(z, lr=settings.learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    rows = []
    for step in range(settings.steps + 1):
        image = draw(z, settings)
        if step in (0, settings.steps // 2, settings.steps):
            rows.append(kept(image.detach(), f"{word}-{seed}-{step:04d}.png", settings) | readers.row(image, prompt))
            print(f"{word} seed {seed} step {step}: {rows[-1]}", file=sys.stderr)
        loss = settings.smoothness * roughness(image)
        loss = loss - readers.ocr(augmented(image, settings, random), [prompt] * settings.copies).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        falling.step()
    return rows


def draw(z: Sequence[Tensor], settings: Ascent) -> Tensor:
    """Layers [1, 1, h, w] to a grey image [1, 3, H, W] in [0, 1]."""
    size = (settings.height, settings.width)
    layers = torch.stack([F.interpolate(layer, size=size, mode="bicubic", align_corners=False) for layer in z])
    return layers.sum(0).sigmoid().expand(-1, 3, -1, -1)


def roughness(image: Tensor) -> Tensor:
    return image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean()


def augmented(image: Tensor, settings: Ascent, random: torch.Generator) -> Tensor:
    """`copies` images [N, 3, H, W] in [0, 1]; what moves in from outside repeats the edge."""

    def uniform(bound: float, *shape: int) -> Tensor:
        return bound * (2 * torch.rand(*shape, generator=random) - 1)

    n, (height, width) = settings.copies, image.shape[-2:]
    angle, ratio = uniform(settings.rotation, n), width / height  # the grid's axes have different units
    turn = torch.stack([angle.cos(), -angle.sin() / ratio, angle.sin() * ratio, angle.cos()], dim=1).view(n, 2, 2)
    turn = turn * (1 + uniform(settings.zoom, n, 1, 2))
    move = 2 * uniform(settings.shift, n, 2, 1) * torch.tensor([[1.0], [3.0]])  # the grid goes from -1 to 1
    grid = F.affine_grid(torch.cat([turn, move], dim=2), [n, 1, height, width], align_corners=False)
    moved = F.grid_sample(image[:, :1].expand(n, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    share = 1 - settings.shrink * float(torch.rand((), generator=random))
    seen = F.interpolate(moved, scale_factor=share, mode="bilinear", antialias=True)
    seen = F.interpolate(seen, size=(height, width), mode="bilinear")
    noisy = seen + settings.noise * torch.randn(seen.shape, generator=random)
    return noisy.clamp(0, 1).expand(-1, 3, -1, -1)


def kept(image: Tensor, name: str, settings: Ascent) -> dict[str, Any]:
    to_pil(image[0]).save(settings.out / name)
    return {"image": str(settings.out / name)}


def measure(settings: Ascent) -> dict[str, Any]:
    settings.out.mkdir(parents=True, exist_ok=True)
    readers, begun, results = Readers(), time.perf_counter(), []
    for word in settings.words:
        for seed in settings.seeds:
            start, middle, end = ascend(word, seed, settings, readers)
            results.append({"word": word, "seed": seed, "start": start, "middle": middle, "end": end})
    ends = [result["end"] for result in results]
    return {
        **facts(settings),
        "read_by_ocr": sum(end["ocr"] == result["word"] for end, result in zip(ends, results)),
        "read_by_judge": sum(end["judge"] == result["word"] for end, result in zip(ends, results)),
        "read_by_judge_that_detects": sum(end["judge_detects"] == r["word"] for end, r in zip(ends, results)),
        "num": len(results),
        "mean_judge_accuracy": sum(end["judge_accuracy"] for end in ends) / len(ends),
        "seconds": time.perf_counter() - begun,
        "results": results,
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Ascent)), indent=2))
