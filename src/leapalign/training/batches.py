"""The samples of an update: prompts in a seeded order for each epoch, noise by (seed, step, sample).

Everything is a function of the step's number: nothing has to be saved to resume, and accumulation changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from leapalign.prompts import Prompt
from leapalign.run import Run
from leapalign.seeds import generator


@dataclass(frozen=True)
class MicroBatch:
    """Neighbouring samples of one update."""

    step: int  # updates before this one
    samples: range  # their numbers in the batch
    prompts: tuple[str, ...]

    def generators(self, seed: int, purpose: str = "noise") -> list[torch.Generator]:
        """One generator a sample."""
        return noise_generators(seed, self.step, self.samples, purpose)


def micro_batches(
    run: Run, prompts: Sequence[Prompt], step: int, rank: int = 0, ranks: int = 1
) -> Iterator[MicroBatch]:
    """The rank's micro-batches of one update; neighbouring micro-batches of the batch go to neighbouring ranks."""
    for start in range(rank * run.micro_batch_size, run.batch_size, ranks * run.micro_batch_size):
        samples = range(start, start + run.micro_batch_size)
        places = [step * run.batch_size + sample for sample in samples]
        texts = tuple(prompts[prompt_index(run.seed, place, len(prompts))].text for place in places)
        yield MicroBatch(step, samples, texts)


def prompt_index(seed: int, place: int, count: int) -> int:
    """Index of the prompt at a place of the endless sequence in which each epoch is another permutation."""
    return _epoch_order(seed, place // count, count)[place % count]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    rng = generator(seed, step=epoch, sample=0, purpose="prompt order")
    return tuple(torch.randperm(count, generator=rng).tolist())


def prompts_used(run: Run, prompts: Sequence[Prompt]) -> list[str]:
    """All texts that the run encodes, in a fixed order: the training prompts it reaches, and the evaluation set."""
    reached = min(run.steps * run.batch_size, len(prompts))  # the first epoch holds every prompt
    training = (prompts[prompt_index(run.seed, place, len(prompts))].text for place in range(reached))
    return list(dict.fromkeys([*training, *evaluation_prompts(run, prompts)]))


def evaluation_prompts(run: Run, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts of the fixed evaluation set; the same for every run with this evaluation_seed."""
    return [prompts[prompt_index(run.evaluation_seed, i, len(prompts))].text for i in range(run.evaluation_size)]


def noise_generators(seed: int, step: int, samples: Sequence[int], purpose: str = "noise") -> list[torch.Generator]:
    """One CPU generator a sample, a function of (seed, step, sample, purpose)."""
    return [generator(seed, step=step, sample=sample, purpose=purpose) for sample in samples]


def draw_generator(run: Run, micro: MicroBatch) -> torch.Generator:
    """Generator of the structural draws (k, j, ...), shared by `samples_per_draw` neighbouring samples."""
    share = micro.samples.start // (run.samples_per_draw or run.batch_size)
    return generator(run.seed, step=micro.step, sample=share, purpose="draw")
