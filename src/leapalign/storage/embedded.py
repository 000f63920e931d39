"""Paths of the shipped folders: `embedded:generator`, `embedded:reward`, `embedded:judge`."""

from __future__ import annotations

from pathlib import Path

from leapalign.errors import UserError

PREFIX = "embedded:"
FOLDER = Path(__file__).parents[1] / "shapeworld" / "assets"
NAMES = ("generator", "reward", "judge")


def resolve(path: str) -> str:
    """Return the folder of an `embedded:NAME` path, and any other path or hub id unchanged.

    Raises UserError for an unknown NAME.
    """
    if not path.startswith(PREFIX):
        return path
    name = path[len(PREFIX) :]
    if name not in NAMES:
        known = ", ".join(PREFIX + n for n in NAMES)
        raise UserError(f"{path!r} is not shipped with leapalign; expected one of {known}")
    return str(FOLDER / name)
