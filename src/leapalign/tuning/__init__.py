"""Ways of tuning: which weights are trained, how they begin, are saved and opened. Imports no torch."""

from leapalign.tuning.full import FullFineTuning
from leapalign.tuning.lora import LoRA

__all__ = ["FullFineTuning", "LoRA"]
