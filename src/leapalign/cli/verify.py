"""`leapalign verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from leapalign.cli.answer import answer


@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """Whether weights are what they should be: files, keys, hashes, our sampler against the pipeline's own, scores."""

    source: Annotated[str, tyro.conf.Positional]
    """A pipeline folder, hub id, run or embedded:generator; or a reward: NAME (leapalign list rewards), NAME=PATH."""
    hashes: str = ""
    """A list as sha256sum writes it, with paths below the folder; empty = the hub's own, where its cache has them."""
    prompt: str = "a photo of a red circle"
    """What both samplers draw."""
    steps: int = 4
    """Sampling steps of that picture."""
    size: int = 0
    """Its height and width in pixels; 0 = the run's, or the pipeline's usual size up to 512."""
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a reward's weights; pipelines are compared in float32."""
    json: bool = False
    """Print every check as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Your own files whose classes the run names; each is executed."""


def verify_command(argv: list[str]) -> int:
    flags = tyro.cli(VerifyFlags, args=argv, prog="leapalign verify")
    from leapalign.verifying import print_table, verify

    found = verify(flags)
    if flags.json:
        answer(found, True, "")
    else:
        print_table(found)
    return 0 if found["good"] else 1
