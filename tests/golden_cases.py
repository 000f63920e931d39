"""Golden JSON lists as pytest parameters, from the golden folder and from the copy that ships with the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from golden_folder import GOLDEN

COPY = Path(__file__).parent / "golden" / "data"


def every_case(relative: str) -> list[Any]:
    """One parameter a case. An absent folder gives one skipped parameter with the reason, so that it is seen."""
    parameters = []
    for name, folder in (("copy", COPY), ("golden", GOLDEN)):
        file = folder / relative
        if file.is_file():
            cases = json.loads(file.read_text())
            parameters += [pytest.param(case, id=f"{name}-{index}") for index, case in enumerate(cases)]
        else:
            absent = pytest.mark.skip(reason=f"no {file}; set LEAPALIGN_GOLDEN to the golden data's folder")
            parameters.append(pytest.param(None, id=f"{name}-absent", marks=absent))
    return parameters
