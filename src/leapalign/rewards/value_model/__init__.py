"""A value model: a small network that learns a reward without gradient during the run, and lends it its gradient.

LeapAlign (arXiv 2604.15311, Sec. 5) leaves this as future work; the design is ours, so no paper has its details.

    after each rollout    y_n = r(x_n, c_n)                          the true reward, which may be a rule
    value model           q(x, c), trained on (x_n, c_n, y_n) by cross-entropy or squared error
    policy                the method's loss with q in the place of r: d q / d x is the reward's gradient

A network is right only where it has seen data, and the policy moves to where it errs. So q is held against r on every
new batch, before q trains on it: `parity` is the share of pairs of images that q ranks as r does, over a window of
fresh samples. While parity is low q is not believed: the policy stays as it is and q goes on learning.

`leapalign.training.learning` does this within a run; docs/value-model.md describes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from leapalign.errors import UserError
from leapalign.rewards.base import DescribedReward, Source
from leapalign.rewards.value_model.settings import NAME, Settings, check

if TYPE_CHECKING:
    from leapalign.rewards.base import RewardConfig
    from leapalign.rewards.value_model.model import ValueReward
else:  # the type that the codec sees
    RewardConfig = Any


@dataclass(frozen=True, kw_only=True)
class ValueModel(Settings, DescribedReward):
    """A network that learns the reward `of` during the run. For direct-gradient methods."""

    name: ClassVar[str] = NAME
    differentiable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    resolution: ClassVar[str] = "`pixels`, or the backbone's own"
    prompt_length: ClassVar[str] = "48 words, or the backbone's own"
    output_range: ClassVar[str] = "that of the reward it learns; output=logit: any number"
    code_licence: ClassVar[str] = "Apache-2.0 (ours)"
    weights_licence: ClassVar[str] = "none: its weights are made in the run; those of the backbone are the backbone's"
    memory: ClassVar[str] = "under 1 MB, its buffer, and the backbone"

    of: RewardConfig
    """The reward to learn, which needs no gradient."""

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.of, ValueModel):
            raise UserError("value-model: `of` is a value model itself; give the reward that it is to learn")

    def load(self, device: str = "cpu", dtype: str = "float32") -> ValueReward:
        """Load the reward to learn and the backbone, and make the first weights from `seed`."""
        from leapalign.rewards.value_model.model import load_value_reward

        return load_value_reward(self, self.of, device, dtype)

    def in_evaluations(self) -> RewardConfig:
        """Return the reward to learn: the network that learnt it stays in the run's checkpoints."""
        return self.of

    def sources(self) -> tuple[Source, ...]:
        """List the files of the reward to learn and of the backbone."""
        from leapalign.rewards.adapt import described

        backbone = (Source(field="backbone", path=self.backbone),) if self.backbone else ()
        return *described(self.of).sources(), *backbone
