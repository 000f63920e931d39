"""Full fine-tuning, as in the paper (arXiv 2604.15311, Sec. 6.1): all weights of the transformer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from leapalign.errors import UserError

if TYPE_CHECKING:
    import torch

    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.targets import LoraTargets


QUANTISED = (
    "the base's transformer is quantised already: full fine-tuning needs the unquantised model; a LoRA "
    "(leapalign.tuning.lora.LoRA) trains beside a quantised one"
)


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """All weights of the transformer, as float32 masters."""

    name: ClassVar[str] = "full"
    output: ClassVar[str] = "pipeline"  # a whole diffusers folder
    formats: ClassVar[tuple[str, ...]] = ("pipeline",)

    def load_policy(self, folder: PipelineFolder, device: str, dtype: torch.dtype, targets: LoraTargets) -> Any:
        """Load the transformer with float32 weights; with another `dtype` its forward runs under autocast.

        Weights that are quantised in the folder stay frozen: they can be sampled, and `initialise` refuses them.
        """
        import torch

        from leapalign.storage.components import load_policy
        from leapalign.tuning.quantization import Quantised

        policy = load_policy(folder, device, torch.float32)
        return policy if isinstance(policy, Quantised) else policy.requires_grad_(True)

    def initialise(self, policy: Any, seed: int) -> None:
        """Change nothing: training begins at the folder's weights. Raises UserError if these are quantised."""
        from leapalign.tuning.quantization import Quantised

        if isinstance(policy, Quantised):
            raise UserError(QUANTISED)

    def in_update(self, policy: Any, seed: int, step: int) -> AbstractContextManager[None]:
        """Return an empty context: forwards have no randomness."""
        return nullcontext()

    def save(self, model: Any, folder: Path) -> None:
        """Write the whole pipeline into the folder."""
        model.save(folder)

    def load_tuned(self, model: Any, saved: str, device: str, dtype: str, strength: float = 1.0) -> Any:
        """Load the run's model from the saved pipeline; at a strength other than 1, from the base as well.

        Raises UserError if the base is needed and cannot be opened, or has other weights than the saved pipeline.
        """
        from leapalign.storage.pipeline_folder import TRANSFORMER
        from leapalign.tuning.strength import interpolate

        if strength == 1:
            return model.at(saved).load(device, dtype)
        mixed = model.load(device, dtype)
        interpolate(mixed.policy, Path(saved) / TRANSFORMER, strength)
        return mixed

    def export(self, model: Any, saved: str, target: Path, *, format: str, dtype: str, strength: float = 1.0) -> None:
        """Write the pipeline, its transformer in this dtype."""
        import torch

        tuned = self.load_tuned(model, saved, "cpu", "float32", strength)
        torch.nn.Module.to(tuned.policy, getattr(torch, dtype))  # diffusers' own `to` warns without a cause
        tuned.save(target)


FULL = FullFineTuning()
