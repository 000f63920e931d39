"""Every tracked file of src/leapalign (code, page templates, the embedded folders) is in the wheel that is named."""

from __future__ import annotations

import subprocess
import sys
import zipfile


def main(wheel: str) -> int:
    tracked = subprocess.run(["git", "ls-files", "src/leapalign"], capture_output=True, text=True, check=True).stdout
    expected = {path.removeprefix("src/") for path in tracked.split("\n") if path}
    missing = sorted(expected - set(zipfile.ZipFile(wheel).namelist()))
    print(f"{wheel}: {len(expected) - len(missing)} of {len(expected)} tracked files")
    for path in missing:
        print(f"missing: {path}; list its kind in pyproject.toml, [tool.setuptools.package-data]")
    return 1 if missing or not expected else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
