"""Where the golden data is: $LEAPALIGN_GOLDEN, by default ../shared/golden beside the repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPY = Path(__file__).parent / "data"  # what ships with the repository
GOLDEN = Path(os.environ.get("LEAPALIGN_GOLDEN", ROOT.parent / "shared" / "golden"))


def every_case(relative: str) -> list[Any]:
    """One pytest parameter a case of a JSON list: from the repository's copy and from the golden folder.

    A folder that is absent gives one skipped parameter with the reason, so that it is seen.
    """
    parameters = []
    for name, folder in (("copy", COPY), ("golden", GOLDEN)):
        file = folder / relative
        if file.is_file():
            cases = json.loads(file.read_text())
            parameters += [pytest.param(case, id=f"{name}-{index}") for index, case in enumerate(cases)]
        else:
            absent = pytest.mark.skip(reason=f"no {file}: set LEAPALIGN_GOLDEN to the golden data's folder")
            parameters.append(pytest.param(None, id=f"{name}-absent", marks=absent))
    return parameters
