"""`leapalign cache`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """The prompts that text encoders have encoded, kept on disk (LEAPALIGN_CACHE, LEAPALIGN_CACHE_GB)."""

    clear: bool = False
    """Remove all of them; the next run encodes its prompts again."""
    json: bool = False
    """Print JSON on stdout."""


def cache_command(argv: list[str]) -> None:
    flags = tyro.cli(CacheFlags, args=argv, prog="leapalign cache")
    from leapalign.caching import as_text, show

    found = show(clear=flags.clear)
    answer(found, flags.json, as_text(found))
