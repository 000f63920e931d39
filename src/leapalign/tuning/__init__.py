"""Ways of tuning: which weights are trained, and how they are initialised, saved and loaded. Imports no torch."""

from leapalign.tuning.full import FullFineTuning
from leapalign.tuning.lora import LoRA

__all__ = ["FullFineTuning", "LoRA"]
