"""Fetch needed files from the model hub or its cache, and explain failed downloads in one sentence.

All downloads use `snapshot_download`: unlike `hf_hub_download` it sends one request, so that a missing file costs no
25 seconds of retries without a network; with HF_HUB_OFFLINE=1 it sends none.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from errno import ENOSPC
from pathlib import Path
from typing import Any, Literal

from leapalign.errors import UserError

RepoType = Literal["model", "dataset"]
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_id(word: str) -> bool:
    """Return True for `org/name` or `org/name@revision` (branch, tag or commit), unless the word is a path on disk.

    Asking the hub about a path would report a network problem, and send a private path off the machine.
    """
    return _ID.fullmatch(word) is not None and not _means_a_place(word)


def _means_a_place(word: str) -> bool:
    """Return True for a path: starts with `.`, `/`, `~`, `runs/`, or with a local folder and is not in the cache."""
    first = word.partition("/")[0]
    if word.startswith((".", "/", "~")) or first == "runs":
        return True
    return Path(first).is_dir() and cached_folder(word) is None


def no_such_place(word: str) -> str:
    """Return the error message for a word that is neither a local path nor a hub id."""
    parent, name = Path(word).expanduser().parent, Path(word).name
    near: list[str] = []
    with suppress(OSError):  # a parent that does not exist or cannot be read suggests nothing
        near = difflib.get_close_matches(name, [path.name for path in parent.iterdir()], n=1, cutoff=0.5)
    suggested = f"; did you mean {str(parent / near[0])!r}?" if near else ""
    first = word.partition("/")[0]
    local = _ID.fullmatch(word) and not first.startswith((".", "~")) and first != "runs" and Path(first).is_dir()
    kept = f" ({first} is a folder here, so the hub is not asked; for its model `hf download {word}`)" if local else ""
    return f"{word}: folder not found{suggested}{kept}"


def split_id(hub_id: str) -> tuple[str, str]:
    """Split `org/name@revision` into (org/name, revision); the default is `main`. Raises UserError if it is no id."""
    match = _ID.fullmatch(hub_id)
    if match is None:
        raise UserError(f"{hub_id!r} is not a hub id; expected org/name or org/name@revision")
    return match[1], match[2] or "main"


def snapshot(hub_id: str, patterns: Sequence[str], ignore: Sequence[str] = (), repo_type: RepoType = "model") -> Path:
    """Fetch missing files (glob patterns) and return their folder in the hub's cache. Raises UserError if it fails."""
    from huggingface_hub import snapshot_download

    repo, revision = split_id(hub_id)
    try:
        folder = snapshot_download(
            repo, repo_type=repo_type, revision=revision, allow_patterns=[*patterns], ignore_patterns=[*ignore]
        )
        return Path(folder)
    except Exception as error:  # from requests, httpx, xet or the disk, depending on the hub client's version
        raise UserError(f"{hub_id}: {explain(hub_id, error, repo_type)}") from error


def find_file(hub_id: str, file: str) -> str | None:
    """Return the local path of one file, fetched if missing; None if it does not exist or cannot be fetched."""
    if not is_hub_id(hub_id):
        return None
    try:
        found = snapshot(hub_id, [file]) / file
    except UserError:  # the caller reports it, because it knows what the file is for
        return None
    return str(found) if found.is_file() else None


def cached_folder(hub_id: str) -> Path | None:
    """Return the snapshot's folder in the hub's cache, perhaps incomplete; None if absent. Sends no request."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repo, revision = split_id(hub_id)
    home = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    reference = home / "refs" / revision
    folder = home / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    return folder if folder.is_dir() else None


def commit_of(folder: Path) -> str:
    """Return the commit of a folder in the hub's cache; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""


def blob_hash(file: Path) -> str:
    """Return the hash by which the hub's cache names a file: sha256, or git's for small files; empty if elsewhere.

    A snapshot's file is a link to `blobs/HASH`, which may itself be a link into the store that repositories share.
    """
    while not (file.parent.name == "blobs" and _HASH.fullmatch(file.name)):
        if not file.is_symlink():
            return ""
        file = Path(os.path.normpath(file.parent.resolve() / file.readlink()))
    return file.name


def explain(hub_id: str, error: Exception, repo_type: RepoType = "model") -> str:
    """Return one sentence with the cause of a failed download and its remedy."""
    repo, revision = split_id(hub_id)
    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    option, cache = "--repo-type dataset " if repo_type == "dataset" else "", _cache()
    elsewhere = f"fetch it where there is a network (`hf download {option}{repo}`) and give that folder"
    causes = list(_chain(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    status = next((cause.response.status_code for cause in causes if getattr(cause, "response", None) is not None), 0)
    return next(sentence for applies, sentence in _SENTENCES if applies(kinds, status, causes)).format(
        page=page, revision=revision, cache=cache, elsewhere=elsewhere, repo=repo, repo_type=repo_type, status=status,
        reason=_first_line(causes[-1]), kind=type(error).__name__,
    )  # fmt: skip


_NETWORK = {"ConnectError", "TimeoutException", "ConnectionError", "Timeout", "NetworkError", "ProxyError"}
_TOKENS = "https://huggingface.co/settings/tokens"
# `explain` uses the first that applies. kinds: class names, with base classes, of the error and its causes.
_SENTENCES: tuple[tuple[Callable[[set[str], int, list[Any]], bool], str], ...] = (
    (
        lambda kinds, status, causes: "GatedRepoError" in kinds,
        "this {repo_type} is gated: accept its licence on {page} with your account, then log in with `hf auth login` "
        "(or set HF_TOKEN), and try again",
    ),
    (
        lambda kinds, status, causes: "DisabledRepoError" in kinds,
        "the hub has disabled this repository: see {page}, or give a folder with your own copy",
    ),
    (
        lambda kinds, status, causes: "RepositoryNotFoundError" in kinds,
        "the hub has no {repo_type} of this name, or it is private: check the name at {page}; for a private one "
        "`hf auth login`",
    ),
    (
        lambda kinds, status, causes: "RevisionNotFoundError" in kinds,
        "the {repo_type} has no revision {revision!r}: choose one of its branches, tags or commits at {page}/tree/main",
    ),
    (
        lambda kinds, status, causes: status == 401,
        "the hub refuses your token, it was revoked or has expired: make a new one at "
        f"{_TOKENS} and run `hf auth login` (HF_TOKEN, where set, goes first)",
    ),
    (
        lambda kinds, status, causes: status == 403,
        f"your token may not read {{repo}}: give it that permission at {_TOKENS}",
    ),
    (
        lambda kinds, status, causes: status == 429,
        "the hub has had too many requests from this machine: wait some minutes, or log in with `hf auth login`",
    ),
    (
        lambda kinds, status, causes: status >= 500,
        "the hub reports an internal error (status {status}): try again later, or {elsewhere}",
    ),
    (
        lambda kinds, status, causes: "OfflineModeIsEnabled" in kinds,
        "HF_HUB_OFFLINE forbids the network, and it is not completely in the cache ({cache}): unset it, or {elsewhere}",
    ),
    (
        lambda kinds, status, causes: "PermissionError" in kinds,
        "the hub's cache cannot be written ({cache}): make it yours, or set HF_HOME to a folder that is",
    ),
    (
        lambda kinds, status, causes: bool(kinds & _NETWORK),
        "the hub cannot be reached ({reason}): check network and proxy, or {elsewhere}",
    ),
    (
        lambda kinds, status, causes: any(isinstance(cause, OSError) and cause.errno == ENOSPC for cause in causes),
        "the disk of the hub's cache is full ({cache}): make room, or set HF_HOME to a folder on another disk",
    ),
    (
        lambda kinds, status, causes: "LocalEntryNotFoundError" in kinds,
        "it is not completely in the cache ({cache}), and the hub does not answer: try again, or {elsewhere}",
    ),
    (lambda kinds, status, causes: True, "the download failed ({kind}: {reason}): try again, or {elsewhere}"),
)


def _chain(error: Any) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
