"""Samples of an update: prompts in a seeded order per epoch, noise from (seed, step, sample).

Accumulation and the number of ranks change no sample. A resumed run continues at the checkpoint's prompt, even with
another batch size, because checkpoints count samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from leapalign.prompts import Prompt
from leapalign.run import Run
from leapalign.seeds import generator


class Start(NamedTuple):
    """Start of this process in the prompts: after `step` updates, which have read `samples` prompts (not repeated)."""

    step: int = 0
    samples: int = 0

    def place(self, step: int, run: Run) -> int:
        """Return the index of update `step`'s first prompt in the endless sequence of prompts."""
        rollouts = step // run.updates_per_rollout - self.step // run.updates_per_rollout
        return self.samples + rollouts * prompts_per_batch(run)


BEGINNING = Start()


@dataclass(frozen=True)
class MicroBatch:
    """Neighbouring samples of one update."""

    step: int  # updates before this one
    samples: range  # their indices in the batch
    prompts: tuple[str, ...]

    def generators(self, seed: int, purpose: str = "noise") -> list[torch.Generator]:
        """Return one generator per sample."""
        return noise_generators(seed, self.step, self.samples, purpose)


def micro_batches(
    run: Run, prompts: Sequence[Prompt], step: int, rank: int = 0, ranks: int = 1, begin: Start = BEGINNING
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches of one update; neighbouring micro-batches go to neighbouring ranks."""
    for start in range(rank * run.micro_batch_size, run.batch_size, ranks * run.micro_batch_size):
        samples = range(start, start + run.micro_batch_size)
        places = [begin.place(step, run) + sample // run.samples_per_prompt for sample in samples]
        texts = tuple(prompts[prompt_index(run.seed, place, len(prompts))].text for place in places)
        yield MicroBatch(step, samples, texts)


def prompts_per_batch(run: Run) -> int:
    """Return the number of prompts that a batch reads."""
    return run.batch_size // run.samples_per_prompt


def prompt_index(seed: int, place: int, count: int, purpose: str = "prompt order") -> int:
    """Return the index of a prompt in the endless sequence, where each epoch is a new permutation."""
    return _epoch_order(seed, place // count, count, purpose)[place % count]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int, purpose: str) -> tuple[int, ...]:
    rng = generator(seed, step=epoch, sample=0, purpose=purpose)
    return tuple(torch.randperm(count, generator=rng).tolist())


def prompts_used(
    run: Run, prompts: Sequence[Prompt], begin: Start = BEGINNING, rank: int = 0, ranks: int = 1
) -> list[str]:
    """List the texts that this rank needs, in a fixed order: sample 0 (self-checks), its samples, the fixed set."""
    training = {prompt_index(run.seed, 0, len(prompts)): None} if run.self_checks else {}
    end = max(begin.step, run.steps) + run.updates_per_rollout - 1  # the last rollout may serve fewer updates
    first, last = begin.place(begin.step, run), begin.place(end, run)
    for place in range(first, last):
        if rank in _ranks_of(run, (place - first) % prompts_per_batch(run), ranks):
            training[prompt_index(run.seed, place, len(prompts))] = None
        if len(training) == len(prompts):
            break
    texts = (prompts[index].text for index in training)
    return list(dict.fromkeys([*texts, *(prompt.text for prompt in evaluation_set(run, prompts))]))


def _ranks_of(run: Run, prompt: int, ranks: int) -> set[int]:
    """Return the ranks that have samples of the batch's prompt of this index."""
    samples = range(prompt * run.samples_per_prompt, (prompt + 1) * run.samples_per_prompt)
    return {sample // run.micro_batch_size % ranks for sample in samples}


def evaluation_set(run: Run, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of the fixed evaluation set, in its own order, unrelated to that of training.

    The same for every run with this evaluation_seed and these prompts.
    """
    seed, count = run.evaluation_seed, len(prompts)
    return [prompts[prompt_index(seed, i, count, "evaluation order")] for i in range(run.evaluation_size)]


def noise_generators(seed: int, step: int, samples: Sequence[int], purpose: str = "noise") -> list[torch.Generator]:
    """Return one CPU generator per sample, seeded by (seed, step, sample, purpose)."""
    return [generator(seed, step=step, sample=sample, purpose=purpose) for sample in samples]


def draw_generator(run: Run, micro: MicroBatch) -> torch.Generator:
    """Return the generator of the structural draws (k, j, ...), shared by `samples_per_draw` neighbouring samples."""
    share = micro.samples.start // (run.samples_per_draw or run.batch_size)
    return generator(run.seed, step=micro.step, sample=share, purpose="draw")
