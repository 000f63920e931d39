"""The prompts of a run: their number, their downloads, and the size of their embeds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from leapalign.models.base import TextShape
from leapalign.planning.components import Planned
from leapalign.planning.downloads import Download, hub_file
from leapalign.prompts.base import PublishedPrompts
from leapalign.run import Run


@dataclass(frozen=True, kw_only=True)
class PlannedPrompts:
    """The prompts that a run encodes; `texts` is empty if they must be downloaded first."""

    number: int  # without texts: the most that the run can encode
    texts: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    notes: tuple[str, ...] = ()


def plan_prompts(run: Run) -> PlannedPrompts:
    """Count the prompts that the run encodes. Raises UserError for a file that cannot be read."""
    from leapalign.training.batches import prompts_used

    downloads: tuple[Download, ...] = ()
    if isinstance(run.prompts, PublishedPrompts) and not run.prompts.path:
        source = run.prompts.source
        downloads = (hub_file(source.repo, source.file, source.bytes, "dataset"),)
    if not all(download.cached for download in downloads):
        most = run.steps * run.batch_size // run.samples_per_prompt + run.evaluation_size
        note = "the prompts are not here yet: their number is the most that the run can reach"
        return PlannedPrompts(number=most, downloads=downloads, notes=(note,))
    texts = tuple(prompts_used(run, run.prompts.load()))
    return PlannedPrompts(number=len(texts), texts=texts, downloads=downloads)


def planned_shape(planned: Planned, prompts: PlannedPrompts) -> tuple[TextShape, list[str]]:
    """Return the shape of a prompt's embeds, and a note if it is an upper bound.

    For models that keep each prompt's length, it is the longest prompt's, if prompts and tokenizer are local.
    """
    shape = planned.family.text_shape(planned.folder, planned.model.policy.config)
    if not shape.masked:
        return shape, []
    here = [(planned.folder.path / name).is_dir() for name in planned.folder.components if name.startswith("tokenizer")]
    length, width = shape.tokens
    if planned.source.shipped or not all(here) or not prompts.texts:
        missing = "the prompts are" if not prompts.texts else "the tokenizer is"
        return shape, [f"each prompt is planned at its longest, {length} tokens: {missing} not here to be counted"]
    texts = planned.model.with_negative(prompts.texts)
    longest = max(reader.longest(texts) for reader in planned.family.text_readers(planned.folder))
    return replace(shape, tokens=(longest, width)), []
