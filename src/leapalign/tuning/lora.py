"""LoRA (arXiv 2106.09685): a frozen base, and float32 low-rank matrices beside its linear layers.

Design choices:
- the adapter's scale is alpha / rank; alpha defaults to the rank;
- dropout draws one mask over input features per update: the velocity stays one function of (x, sigma) in the rollout,
  its gradient and every recomputation. A mask per forward would train on the gradient of another model;
- a bfloat16 base computes in bfloat16; float32 arithmetic over a bfloat16 base is refused;
- a run may begin with the values of an adapter (`start`); its reference is still the base without the adapter.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from leapalign.errors import UserError

if TYPE_CHECKING:
    import torch

    from leapalign.storage.pipeline_folder import PipelineFolder
    from leapalign.tuning.targets import LoraTargets


Quantization: TypeAlias = Literal["none", "int8", "nf4"]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on a frozen base; attention and feed-forward of every block unless told otherwise."""

    name: ClassVar[str] = "lora"
    output: ClassVar[str] = "lora"  # a folder for diffusers' load_lora_weights
    formats: ClassVar[tuple[str, ...]] = ("pipeline", "lora")

    rank: int = 32
    alpha: float = 0.0  # strength: the adapter is scaled by alpha / rank; 0 = the rank, so a scale of 1
    dropout: float = 0.0  # probability that an input feature of a layer's adapter is off for an update
    target_modules: tuple[str, ...] = ()  # ends of the layers' paths, * is any text; empty = the family's default
    init: Literal["kaiming", "gaussian"] = "kaiming"  # of A; B begins at 0
    base_dtype: Literal["", "float32", "bfloat16"] = ""  # of the frozen weights; empty = the run's dtype
    quantization: Quantization = "none"  # of the frozen linear layers: torchao, bitsandbytes
    start: str = ""  # an adapter that training begins with: file, folder or hub id; empty = zero update

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}; it must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(f"alpha is {self.alpha}; it must be positive, or 0 for the rank")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if not all(self.target_modules):
            raise UserError("target_modules: an empty name; give ends of module paths, for instance attn.to_q")

    def load_policy(self, folder: PipelineFolder, device: str, dtype: torch.dtype, targets: LoraTargets) -> Any:
        """Load the frozen transformer, with an adapter whose B = 0.

        Raises UserError if a target matches no layer, or if `start` is no adapter of this rank.
        """
        from leapalign.storage.components import load_policy
        from leapalign.tuning.adapter import attach, initialise
        from leapalign.tuning.quantization import compute_in, quantization_config, refuse_twice
        from leapalign.tuning.targets import find_targets

        base = self._base_dtype(dtype)
        refuse_twice(folder, self.quantization)
        self._check_start(folder)
        policy = load_policy(folder, device, base, quantization_config(self.quantization))
        compute_in(policy, base)
        layers = find_targets(policy, self.target_modules, targets)
        attach(policy, layers, rank=self.rank, alpha=self.alpha or self.rank)
        initialise(policy, self.init, seed=0)
        return policy

    def _check_start(self, folder: PipelineFolder) -> None:
        """Check `start`, before the base is loaded; a plan, which loads no files, fetches nothing for it."""
        from leapalign.storage.pipeline_folder import TRANSFORMER
        from leapalign.tuning.start import check_start, on_hub

        if self.start and not (folder.loading.component and on_hub(self.start)):
            check_start(self.start, self.rank, folder.components[TRANSFORMER][1])

    def _base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        base = getattr(torch, self.base_dtype) if self.base_dtype else dtype
        if base == torch.bfloat16 and dtype == torch.float32:
            raise UserError(
                "base_dtype bfloat16 with dtype float32: a bfloat16 base computes in bfloat16; "
                "set the run's dtype to bfloat16, or base_dtype to float32"
            )
        if self.quantization != "none" and base != torch.bfloat16:
            raise UserError(
                f"quantization {self.quantization}: arithmetic and unquantised layers are bfloat16; "
                "set the run's dtype to bfloat16 and leave base_dtype empty"
            )
        return base

    def initialise(self, policy: Any, seed: int) -> None:
        """Draw A from the seed and each layer's name, and set B = 0; or read both from `start`.

        Independent of the global generators. With `start` the policy equals the base with that adapter, as diffusers'
        load_lora_weights computes it, and `model.reference()` is still the base without it. Raises UserError on a file
        that is not an adapter of this rank on these layers.
        """
        from leapalign.tuning.adapter import initialise

        if not self.start:
            return initialise(policy, self.init, seed)
        from leapalign.tuning.start import begin_with

        begin_with(policy, self.start)

    def in_update(self, policy: Any, seed: int, step: int) -> AbstractContextManager[None]:
        """Return a context with the update's dropout masks."""
        from leapalign.tuning.adapter import dropout

        return dropout(policy, self.dropout, seed, step) if self.dropout else nullcontext()

    def save(self, model: Any, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors, in float32, for diffusers' load_lora_weights."""
        from leapalign.tuning.adapter import adapter_state
        from leapalign.tuning.files import write_lora

        write_lora(folder, adapter_state(model.policy))

    def load_tuned(self, model: Any, saved: str, device: str, dtype: str, strength: float = 1.0) -> Any:
        """Load the run's base in `dtype`, with the saved adapter times `strength`, not merged.

        In bfloat16 the base is quantised as in the run; in float32 it is not.
        """
        kind = self.quantization if dtype == "bfloat16" else "none"
        return self._open(model, saved, device, dtype, kind, strength)

    def export(self, model: Any, saved: str, target: Path, *, format: str, dtype: str, strength: float = 1.0) -> None:
        """Write base and adapter merged (format "pipeline"), or the adapter's file (format "lora"), in this dtype.

        The adapter is scaled by `strength` in float32.
        """
        import torch

        from leapalign.storage.atomic import complete_folder
        from leapalign.tuning.files import read_lora, write_lora
        from leapalign.tuning.strength import scale_adapter

        if format == "pipeline":
            self._open(model, saved, "cpu", dtype, "none", strength).save(target)
            return
        scaled = scale_adapter(read_lora(Path(saved)), strength)
        state = {name: value.to(getattr(torch, dtype)) for name, value in scaled.items()}
        with complete_folder(target) as folder:
            write_lora(folder, state)

    def _open(
        self, model: Any, saved: str, device: str, dtype: str, quantization: Quantization, strength: float
    ) -> Any:
        from leapalign.tuning.adapter import restore
        from leapalign.tuning.files import read_lora
        from leapalign.tuning.strength import scale_adapter

        state = scale_adapter(read_lora(Path(saved)), strength)
        # the saved B contains the scale, so alpha must be the rank here
        opened = replace(self, alpha=0.0, base_dtype="", quantization=quantization, start="")
        tuned = model.load(device, dtype, opened)
        restore(tuned.policy, state, saved)
        tuned.policy.requires_grad_(False)
        return tuned
