"""A loaded value model: score, observe, learn, and the state that checkpoints keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from leapalign.errors import RunStopped, UserError
from leapalign.rewards.adapt import load_reward, score_as_tensors
from leapalign.rewards.base import Reward, RewardConfig, check_inputs
from leapalign.rewards.clip.model import Head, load_clip_reward
from leapalign.rewards.pretrained import torch_dtype
from leapalign.rewards.value_model.networks import ClipInputs, ConvNet, FeatureNet, Inputs, PixelInputs
from leapalign.rewards.value_model.parity import parity
from leapalign.rewards.value_model.settings import NAME, Settings
from leapalign.seeds import derived_seed

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Samples with their true rewards, as they were before the value model trains on them; all on the CPU."""

    image: Tensor  # [n, ...] packed
    text: Tensor  # [n, ...]
    prompt: Tensor  # [n] int64: equal for equal prompts
    predicted: Tensor  # [n] float32, in the true reward's scale
    true: Tensor  # [n] float32


class ValueReward(Reward):
    """The value model as a reward. Within an update it does not change; `learn` trains it between two updates."""

    def __init__(self, config: Settings, truth: Reward, inputs: Inputs, network: nn.Module) -> None:
        self.config, self.truth, self.inputs, self.net = config, truth, inputs, network.requires_grad_(False)
        self.device = next(network.parameters()).device
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
        )
        self.seen: list[Seen] = []  # of the micro-batch that is being scored
        self.buffer: Seen | None = None  # newest samples to learn from
        self.window: Seen | None = None  # newest fresh samples, with predictions of their time; without images
        self.rounds = 0  # calls of `learn`

    # As a reward

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], differentiable."""
        check_inputs(NAME, images, prompts)
        raw = self.net(self.inputs.image(self._own(images)), self.inputs.text(prompts).to(self.device))
        return (raw if self.config.output == "logit" else self._scaled(raw)).to(images.device)

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        return score_as_tensors(NAME, self, images, prompts)

    def prepare(self, prompts: Sequence[str]) -> None:
        self.truth.prepare(prompts)

    @property
    def parity(self) -> float | None:
        """Parity over the window; None before two true rewards differ."""
        return parity(self.window.predicted, self.window.true) if self.window else None

    @property
    def believed(self) -> bool:
        """Whether the policy may be trained by this model's gradient."""
        found = self.parity
        return self.rounds >= self.config.warmup_updates and found is not None and found >= self.config.least_parity

    # Learning

    @torch.no_grad()
    def observe(self, images: Tensor, prompts: Sequence[str], scores: Tensor) -> None:
        """Ask the true reward about images that this model has scored, and keep both for `learn`."""
        images, scores = images.detach(), scores.detach()
        self.seen.append(
            Seen(
                image=self.inputs.pack(self.inputs.image(self._own(images))).cpu(),
                text=self.inputs.text(prompts),
                prompt=torch.tensor([derived_seed(0, step=0, sample=0, purpose=prompt) for prompt in prompts]),
                predicted=(scores.sigmoid() if self.config.output == "logit" else scores).float().cpu(),
                true=self.truth(images, prompts).detach().float().cpu(),
            )
        )

    def learn(self, fresh: Seen, generator: torch.Generator) -> dict[str, float]:
        """Hold the predictions of fresh samples against the truth, then train on the buffer, with them in it.

        Returns metrics by name; parities are left out while no two true rewards differ. Raises UserError for rewards
        that the loss cannot learn, RunStopped if the loss is not finite.
        """
        self._check_range(fresh.true)
        self.window = joined([self.window, without_images(fresh)], self.config.parity_window)
        found = {"parity": self.parity, "parity_within": parity_within(self.window)}
        self.buffer = joined([self.buffer, fresh], self.config.buffer_size)
        error, truth = (fresh.predicted - fresh.true).abs().double().mean(), fresh.true.double().mean()
        found |= {"loss": self._train(self.buffer, generator), "error": float(error), "truth": float(truth)}
        self.rounds += 1
        return {name: value for name, value in found.items() if value is not None}

    def _train(self, buffer: Seen, generator: torch.Generator) -> float:
        """Take `train_steps` steps on samples drawn from the buffer; return their mean loss."""
        self.net.requires_grad_(True)
        losses = []
        for _ in range(self.config.train_steps):
            rows = torch.randint(len(buffer.true), (self.config.train_batch,), generator=generator)
            image = self._own(self.inputs.unpack(buffer.image[rows]))
            raw = self.net(image, buffer.text[rows].to(self.device))
            loss = self._loss(raw, buffer.true[rows].to(raw))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        self.optimizer.zero_grad(set_to_none=True)
        self.net.requires_grad_(False)
        mean = sum(losses) / len(losses)
        if not mean < float("inf"):  # also true for NaN
            raise RunStopped(
                f"value-model: the loss of its own training is {mean} after {self.rounds} rounds; lower its "
                "learning_rate, or bring the reward that it learns to a smaller scale"
            )
        return mean

    def _loss(self, raw: Tensor, true: Tensor) -> Tensor:
        if self.config.loss == "squared":
            return functional.mse_loss(raw, true)
        return functional.binary_cross_entropy_with_logits(raw, true)

    def _scaled(self, raw: Tensor) -> Tensor:
        return raw if self.config.loss == "squared" else raw.sigmoid()

    def _check_range(self, true: Tensor) -> None:
        low, high = (float(bound) for bound in true.aminmax())
        if self.config.loss == "cross-entropy" and not 0 <= low <= high <= 1:
            raise UserError(
                f"value-model: the reward to learn gave {low:.4g} to {high:.4g}, and cross-entropy learns rewards in "
                "[0, 1]; use loss squared"
            )

    def _own(self, images: Tensor) -> Tensor:
        """Copy to the network's device and dtype."""
        return images.to(next(self.net.parameters()))

    # State

    def state(self) -> dict[str, Tensor]:
        """Copy everything that the next update depends on, by name, to the CPU."""
        found: dict[str, Tensor] = {f"network.{name}": p for name, p in self.net.named_parameters()}
        for name, p in self.net.named_parameters():
            found |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        for group, samples in (("buffer", self.buffer), ("window", self.window)):
            if samples is not None:
                found |= {f"{group}.{f.name}": getattr(samples, f.name) for f in fields(samples)}
        found["rounds"] = torch.tensor(self.rounds)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`. Raises UserError if it is another network's."""
        for name, p in self.net.named_parameters():
            saved = state.get(f"network.{name}")
            if saved is None or saved.shape != p.shape:
                raise UserError(
                    f"value-model: the checkpoint has no {name} {list(p.shape)}; its value model has another backbone "
                    "or width. Go on with the settings that the run was saved with"
                )
            p.data.copy_(saved)
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        self.buffer, self.window = saved_samples(state, "buffer"), saved_samples(state, "window")
        self.rounds = int(state["rounds"])


def load_value_reward(config: Settings, of: RewardConfig, device: str, dtype: str) -> ValueReward:
    """Load the reward to learn and the backbone; make the network. It computes in at least float32."""
    truth = load_reward(of, device, dtype)
    own = torch.promote_types(torch_dtype(NAME, dtype), torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, step=0, sample=0, purpose="value model"))
        if config.backbone:
            clip = load_clip_reward(NAME, config.backbone, "", Head(), device, dtype, prompts=True)
            features = clip.model.visual_projection.out_features
            inputs, network = ClipInputs(clip=clip), FeatureNet(features, config.width)
        else:
            inputs, network = PixelInputs(size=config.pixels), ConvNet(config.width)
    return ValueReward(config, truth, inputs, network.to(device, own))


def joined(parts: Sequence[Seen | None], most: int = 0) -> Seen:
    """Join samples in order, and keep the last `most` of them; 0: all."""
    present = [part for part in parts if part is not None]
    return Seen(**{f.name: torch.cat([getattr(p, f.name) for p in present])[-most:] for f in fields(Seen)})


def ordered(samples: Seen, rows: Tensor) -> Seen:
    """Return the samples in the order of `rows`."""
    return Seen(**{f.name: getattr(samples, f.name)[rows] for f in fields(Seen)})


def without_images(samples: Seen) -> Seen:
    """Return the samples with empty images and texts, which parity does not need."""
    nothing = torch.zeros(len(samples.true), 0)
    rest = {"prompt": samples.prompt, "predicted": samples.predicted, "true": samples.true}
    return Seen(image=nothing, text=nothing, **rest)


def parity_within(window: Seen) -> float | None:
    """Parity over pairs of the same prompt: knowing which prompts are hard does not raise it."""
    return parity(window.predicted, window.true, window.prompt)


def saved_samples(state: Mapping[str, Tensor], group: str) -> Seen | None:
    """Return the samples that `state` holds under this name."""
    names = [f.name for f in fields(Seen)]
    return Seen(**{n: state[f"{group}.{n}"] for n in names}) if f"{group}.true" in state else None
