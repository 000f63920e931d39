"""Recognise published models by their transformer's configuration; the paper's scores of them (arXiv 2604.15311).

Each family's file ships the configurations, which plans use too. Models whose configuration could not be compared with
the published files (`unchecked`) are not recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leapalign.models import FAMILIES
from leapalign.models.published import Figures, Published

SCHEDULER = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


@dataclass(frozen=True, kw_only=True)
class Known:
    """One or several published models with equal configurations."""

    names: tuple[str, ...]  # hub ids
    transformer: Mapping[str, Any]  # entries of its config.json
    scheduler: Mapping[str, Any]  # entries of its scheduler_config.json
    figures: tuple[Figures, ...]


def models_of(published: Mapping[str, Published]) -> list[Known]:
    """List a family's published models; those with equal configurations are one entry."""
    found: list[Known] = []
    for name, model in published.items():
        if model.unchecked:
            continue
        numbers = {"transformer": model.components["transformer"][1], "scheduler": _scheduler(model)}
        same = next((k for k in found if k.transformer == numbers["transformer"]), None)
        if same is not None and same.scheduler == numbers["scheduler"]:
            joined = Known(names=(*same.names, name), figures=(*same.figures, *model.figures), **numbers)
            found[found.index(same)] = joined
        else:
            found.append(Known(names=(name,), figures=model.figures, **numbers))
    return found


def recognise(transformer: Mapping[str, Any], published: Mapping[str, Published]) -> Known | None:
    """Find the published model with this transformer's config.json; None if there is none."""
    fits = (k for k in models_of(published) if all(transformer.get(key) == v for key, v in k.transformer.items()))
    return next(fits, None)


def by_id(hub_id: str, published: Mapping[str, Published]) -> Known | None:
    """Find the published model with this hub id, with or without a revision; None if there is none."""
    return next((known for known in models_of(published) if hub_id.partition("@")[0] in known.names), None)


def of_reward(name: str) -> list[str]:
    """List a reward's scores of the paper's untrained models, one sentence per table."""
    sentences = []
    for known in (known for family in FAMILIES for known in models_of(family.published)):
        for figures in known.figures:
            found = [f"{key} {score:g}" for key, score in figures.scores.items() if key.split()[0] == name]
            if found:
                sentences.append(f"{known.names[0]}: {', '.join(found)} ({figures.where})")
    return sentences


def _scheduler(model: Published) -> dict[str, Any]:
    config = model.components["scheduler"][1]
    return {"use_dynamic_shifting": False} | {key: config[key] for key in SCHEDULER if key in config}
