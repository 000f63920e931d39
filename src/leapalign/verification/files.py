"""Check weight files: complete, keys and shapes of the class that opens them, dtypes, finite values, hashes.

The class is built on the meta device from its config.json, so that no check needs memory for all weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.errors import UserError
from leapalign.storage.files import sha256
from leapalign.storage.hub import blob_hash
from leapalign.storage.pipeline_folder import is_variant, read_json
from leapalign.storage.safetensors_header import Header, read_header
from leapalign.verification.checks import Check, different, good, note, some

FLOATS = {"F32", "F16", "BF16"}
AGAIN = "fetch or copy the file again"
SAME_MODEL = "use weights and config.json of one and the same model"


def check_weights(part: str, folder: Path, kind: Any, library: str) -> list[Check]:
    """Check the safetensors files of one model. `kind`: the model's class, from `library`."""
    files = weight_files(folder)
    if not files:
        return [different(part, "files", "no safetensors", "the weights", "fetch the part's .safetensors files")]
    headers, broken = {}, []
    for file in files:
        try:
            headers[file] = read_header(file)
        except (ValueError, FileNotFoundError) as error:
            came = "is missing" if isinstance(error, FileNotFoundError) else str(error)
            broken.append(different(part, "files", f"{file.name} {came}", "a whole file", AGAIN))
    if broken:
        return broken
    checks = [good(part, "files", f"{len(files)} whole, {_gigabytes(files)}")]
    checks += _check_shards(part, folder, headers)
    checks += _check_keys(part, folder, kind, library, shapes(headers.values()))
    checks.append(check_dtypes(part, headers.values()))
    checks.append(check_finite(part, tensors_of(files)))
    return checks


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that are opened: an index's shards if there is one, without other precisions."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if not (folder / index.name.removesuffix(".index.json")).exists():
            return [folder / name for name in sorted(set(_weight_map(index).values()))]
    found = sorted(folder.glob("*.safetensors"))
    return [file for file in found if not is_variant(file)]


def shapes(headers: Iterable[Header]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(entry["shape"]) for key, entry in _tensors(headers)}


COUNTERS = ("position_ids", "num_batches_tracked")


def check_dtypes(part: str, headers: Iterable[Header]) -> Check:
    """Check that a component has one float dtype; single tensors may be float32, and counters integers."""
    kinds = {key: entry["dtype"] for key, entry in _tensors(headers) if not key.endswith(COUNTERS)}
    counts = Counter(kinds.values())
    came = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    usual = counts.most_common(1)[0][0] if counts else ""
    odd = sorted(key for key, kind in kinds.items() if kind not in FLOATS or kind not in (usual, "F32"))
    if odd:
        expected = "one of F32, F16, BF16 for all (single tensors may be F32)"
        return different(
            part, "number types", f"{came}; e.g. {some(odd)}", expected, "use an unquantised, unmixed copy"
        )
    return good(part, "number types", came)


def check_finite(part: str, tensors: Iterable[tuple[str, Any]]) -> Check:
    import torch

    count, bad = 0, []
    for key, tensor in tensors:
        count += 1
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            bad.append(key)
    if bad:
        return different(part, "values", f"NaN or infinity in {some(sorted(bad))}", "finite numbers", AGAIN)
    return good(part, "values", f"{count} tensors, all finite")


def tensors_of(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Yield (key, tensor), one at a time, from the memory-mapped files."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as content:  # pyright: ignore[reportPrivateImportUsage]
            for key in content.keys():  # noqa: SIM118  # `content` is not a dict
                yield key, content.get_tensor(key)


def _check_shards(part: str, folder: Path, headers: Mapping[Path, Header]) -> list[Check]:
    """Check that every key is in the shard that the index names, and in no other."""
    problems = []
    for index in sorted(folder.glob("*.safetensors.index.json")):
        listed = _weight_map(index)
        if not {file.name for file in headers} >= set(listed.values()):
            continue  # an index beside an unsharded file is not used
        found = {key: file.name for file, header in headers.items() for key in header if key != "__metadata__"}
        if wrong := sorted(key for key in listed.keys() | found.keys() if listed.get(key) != found.get(key)):
            came = f"{index.name} and its files differ in {some(wrong)}"
            problems.append(different(part, "shards", came, "each key where the index says", AGAIN))
    return problems


def _check_keys(part: str, folder: Path, kind: Any, library: str, found: dict[str, tuple[int, ...]]) -> list[Check]:
    try:
        missing, unexpected, reshaped = _against_class(folder, kind, library, found)
    except Exception as error:  # a wrong config.json can make the libraries raise anything
        came = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return [different(part, "keys", came, f"a config.json of {kind.__name__}", SAME_MODEL)]
    name = kind.__name__
    problems = []
    if missing:
        problems.append(different(part, "keys", f"{len(missing)} missing: {some(missing)}", f"those of {name}", AGAIN))
    if unexpected:
        came = f"{len(unexpected)} that {name} does not know: {some(unexpected)}"
        problems.append(different(part, "keys", came, f"those of {name}", SAME_MODEL))
    if reshaped:
        problems.append(different(part, "shapes", some(reshaped), "the sizes of config.json", SAME_MODEL))
    return problems or [good(part, "keys and shapes", f"{len(found)}, all of {name} and no other")]


def _against_class(
    folder: Path, kind: Any, library: str, found: dict[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Return (missing, unexpected, differently shaped) keys, compared with the class's."""
    if library == "diffusers":
        from accelerate import init_empty_weights

        with init_empty_weights():
            model = kind.from_config(kind.load_config(folder))
        expected = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
        return _compare(expected, found)
    # transformers handles tied weights and old key names: use its own report
    _, info = kind.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True,
        use_safetensors=True,
    )  # fmt: skip
    reshaped = [f"{key[0]} {list(key[1])} instead of {list(key[2])}" for key in sorted(info["mismatched_keys"])]
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), reshaped


def _compare(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    other = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    reshaped = [f"{key} {list(found[key])} instead of {list(expected[key])}" for key in other]
    return sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys()), reshaped


@dataclass(frozen=True)
class Hashes:
    """Expected SHA-256 hashes of a model's files."""

    expected: dict[str, str]  # path relative to the model's folder -> 64 hexadecimal digits
    source: str  # the file that lists them


def read_hashes(path: str) -> Hashes:
    """Read a list as `sha256sum` writes it. Raises UserError if it cannot be read or holds no hash."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of hashes ({error}); make one with `sha256sum`") from None
    expected = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match is None and line.strip():
            raise UserError(f"{path}, line {number}: expected a sha256 and a path, as `sha256sum` writes them")
        if match is not None:
            expected[match[2].removeprefix("./")] = match[1].lower()
    if not expected:
        raise UserError(f"{path}: the file has no hashes; make one with `sha256sum` in the folder of the model")
    return Hashes(expected, path)


def check_hashes(part: str, root: Path, files: Iterable[Path], listed: Hashes | None) -> list[Check]:
    """Compare files with a list of hashes, or without one with their names in the hub's cache, which are hashes."""
    files = sorted(files)
    if listed is None:
        return _check_blobs(part, root, files)
    wrong, right = [], 0
    for name, expected in sorted(listed.expected.items()):
        file = root / name
        if not file.is_file():
            wrong.append(different(part, "hash", f"{name} is not there", expected, "fetch the file"))
        elif (found := sha256(file)) != expected:
            wrong.append(different(part, "hash", f"{name} has {found}", expected, AGAIN))
        else:
            right += 1
    others = [str(f.relative_to(root)) for f in files if str(f.relative_to(root)) not in listed.expected]
    unlisted = [note(part, "hash", f"{len(others)} files are not in {listed.source}: {some(others)}")] if others else []
    return [*wrong, *unlisted, *([good(part, "hash", f"{right} files", f"those of {listed.source}")] if right else [])]


def _check_blobs(part: str, root: Path, files: list[Path]) -> list[Check]:
    """Compare files in the hub's cache with their names. Sends no request, as `hf cache verify` does."""
    from huggingface_hub.utils.sha import git_hash

    recorded = {file: name for file in files if (name := blob_hash(file))}
    if not recorded:
        remedy = "for a comparison give --hashes FILE, as `sha256sum` writes it"
        return [note(part, "hash", f"no hash is recorded for the {len(files)} files", remedy)]
    wrong = []
    for file, name in recorded.items():
        found = sha256(file) if len(name) == 64 else git_hash(file.read_bytes())  # git's only for small files
        if found != name:
            came = f"{file.relative_to(root)} has {found}"
            remedy = f"remove {file.resolve()} and fetch the model again"
            wrong.append(different(part, "hash", came, f"{name}, the hub's", remedy))
    return wrong or [good(part, "hash", f"{len(recorded)} files", "those that the hub recorded")]


def _weight_map(index: Path) -> dict[str, str]:
    """Weight -> shard; empty if the index is invalid, which check_component reports."""
    try:
        named = read_json(index).get("weight_map")
    except UserError:
        return {}
    pairs = named.items() if isinstance(named, dict) else ()
    return {key: file for key, file in pairs if isinstance(file, str)}


def _tensors(headers: Iterable[Header]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, entry) for header in headers for key, entry in header.items() if key != "__metadata__")


def _gigabytes(files: Iterable[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e9:.3g} GB"
