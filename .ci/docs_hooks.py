"""Hooks of mkdocs: pages from files beside docs/, and the table of all names from the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")  # pages of the site, which stay where people look for them
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not written in docs/."""
    for name in BESIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text("utf-8")))
    files.append(File.generated(config, "names.md", content=names()))
    for path in sorted(linked(ROOT / "docs") | linked(ROOT)):
        files.append(File.generated(config, f"files/{path}.md", content=shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Let links to files of the repository lead to pages of the site."""
    written = ROOT if page.file.src_uri in BESIDE else ROOT / "docs"
    here = Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        target = (written / match[1]).resolve()
        if not target.is_relative_to(ROOT) or page.file.src_uri.startswith("files/"):
            return match[0]
        return f"]({os.path.relpath(place(target), here)}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def place(target: Path) -> str:
    """Return where the site has a file of the repository."""
    if target.is_relative_to(ROOT / "docs"):
        return str(target.relative_to(ROOT / "docs"))
    path = str(target.relative_to(ROOT))
    return path if path in BESIDE else f"files/{path}.md"


def linked(folder: Path) -> set[str]:
    """Return the files outside of docs/ that its pages, or those beside it, link to."""
    pages = folder.glob("*.md") if folder.name == "docs" else [folder / name for name in BESIDE]
    found = {(page.parent / match[1]).resolve() for page in pages for match in LINK.finditer(page.read_text("utf-8"))}
    paths = {str(path.relative_to(ROOT)) for path in found if path.is_file() and path.is_relative_to(ROOT)}
    return {path for path in paths if not path.startswith("docs/") and path not in BESIDE}


def shown(path: str) -> str:
    """Return a page that shows a file."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"


def names() -> str:
    """Return the page of all methods, models, rewards, prompts and recipes, as `leapalign list` has them."""
    command = [sys.executable, "-m", "leapalign", "list", "--json"]
    kinds = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    page = ["# All names", "", "Made from the code: what `leapalign list` prints."]
    for kind, entries in kinds.items():
        page += ["", f"## {kind.capitalize()}", "", "| name | what it is |", "|---|---|"]
        page += [f"| `{entry['name']}` | {entry['text'].replace('|', '&#124;')} |" for entry in entries]
    return "\n".join(page) + "\n"
