"""`leapalign verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from leapalign.cli.answer import answer
from leapalign.lookup.recipes import load_plugins
from leapalign.lookup.rewards import is_reward, reward_config
from leapalign.lookup.sources import find_source
from leapalign.report.tables import print_checks
from leapalign.verification.checks import Check, note

if TYPE_CHECKING:
    from leapalign.verification.files import Hashes


@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """Check weights: files, keys, hashes, our sampler against the pipeline's own, a reward's scores."""

    source: Annotated[str, tyro.conf.Positional]
    """A pipeline folder, hub id, run or embedded:generator; or a reward: NAME (leapalign list rewards), NAME=PATH."""
    hashes: str = ""
    """List of hashes as sha256sum writes it, with paths in the folder; empty = the hub's, if its cache has them."""
    prompt: str = "a photo of a red circle"
    """Prompt for both samplers."""
    steps: int = 4
    """Sampling steps of that image."""
    size: int = 0
    """Height and width of that image in pixels; 0 = the run's, or the pipeline's usual size up to 512."""
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of a reward's weights; pipelines are compared in float32."""
    json: bool = False
    """Print every check as JSON on stdout."""
    plugin: tuple[str, ...] = ()
    """Python files of your own whose classes the run uses; each is executed."""


def verify_command(argv: list[str]) -> int:
    flags = tyro.cli(VerifyFlags, args=argv, prog="leapalign verify")
    found = _verify(flags)
    if flags.json:
        answer(found, True, "")
    else:
        print_checks(found)
    return 0 if found["good"] else 1


def _verify(flags: VerifyFlags) -> dict[str, Any]:
    """Return {"source", "kind", "good", "checks"}. Raises UserError if nothing can be checked."""
    from leapalign.distributed.process_group import resolve_device
    from leapalign.verification.files import read_hashes
    from leapalign.verification.rewards import check_reward

    hashes = read_hashes(flags.hashes) if flags.hashes else None
    device = resolve_device(flags.device)
    if is_reward(flags.source):
        checks = check_reward(flags.source, reward_config(flags.source), device, flags.dtype, hashes)
    else:
        checks = _check_model(flags, device, hashes)
    return {
        "source": flags.source,
        "kind": "reward" if is_reward(flags.source) else "pipeline",
        "good": all(check.state != "different" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _check_model(flags: VerifyFlags, device: str, hashes: Hashes | None) -> list[Check]:
    """Check a pipeline; for a run with an adapter check its base, with a note."""
    from leapalign.verification.pipelines import Trial, check_pipeline

    source = find_source(flags.source, load_plugins(flags.plugin))
    whole = source.tuning.output == "pipeline"
    config = source.model.at(source.saved) if whole else source.model
    trained = (Path(flags.source) / "run.json").is_file() or flags.source.startswith("embedded:")
    size = flags.size or (config.height if trained else 0)
    trial = Trial(prompt=flags.prompt, num_steps=flags.steps, size=size, seed=flags.seed, device=device)
    checks = check_pipeline(config, trial, hashes)
    if not whole:
        told = f"{source.tuning.name} in {source.saved}: what is checked here is its base, {config.path}"
        checks.append(note("run", "adapter", told, "`leapalign export` merges both into a pipeline to verify"))
    return checks
