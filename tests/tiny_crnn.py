"""The file of a recogniser with english_g2's keys, but few and random numbers."""

from __future__ import annotations

from pathlib import Path

import torch


def write_tiny_crnn(folder: Path, *, seed: int = 1, classes: int = 97) -> Path:
    """Sizes that all differ, so that a loader that mixes two of them up fails."""
    from leapalign.rewards.ocr.model import CRNN

    torch.manual_seed(seed)
    model = CRNN(channels=(3, 4, 5, 6), hidden=(7, 8), features=(9, 10), classes=classes)
    with torch.no_grad():  # torch starts with weights so small that all pictures look alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
            elif name.endswith("12.weight") or name.endswith("15.weight"):
                parameter.uniform_(0.5, 2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    file = folder / "english_g2.pth"
    torch.save({f"module.{key}": weight for key, weight in model.state_dict().items()}, file)
    return file
