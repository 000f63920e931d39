"""Check a reward: its files, its scores of a few drawn images in both preprocessing paths, and its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.images import to_tensor
from leapalign.rewards.adapt import described, load_reward
from leapalign.rewards.base import DescribedReward, Reward, RewardConfig, Source
from leapalign.storage.embedded import resolve
from leapalign.storage.files import PICKLES
from leapalign.storage.hub import cached_folder, is_hub_id
from leapalign.storage.pipeline_folder import read_json
from leapalign.storage.safetensors_header import read_header
from leapalign.verification import known
from leapalign.verification.checks import Check, different, good, note, within
from leapalign.verification.files import Hashes, check_dtypes, check_finite, check_hashes, check_weights

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (  # each quotes a word, for rewards that read text in images
    'a red circle and the word "red"',
    'a blue square and the word "blue"',
    'stripes from black to white and the word "grey"',
    'a green triangle and the word "green"',
)
SIZE = 256  # pixels a side
# Fraction of the scores' spread: the paths round and resize differently; a wrong mean, colour or crop differs far more.
PATHS = 0.1


def check_reward(word: str, config: RewardConfig, device: str, dtype: str, listed: Hashes | None) -> list[Check]:
    """Check the reward that `word` names. Raises UserError if it cannot be opened and none of its files are local."""
    config = described(config)
    name = config.name
    try:
        reward = load_reward(config, device, dtype)
        opened = [good(name, "opens", f"{word}, {device}, {dtype}", "every weight in its place")]
    except UserError as error:
        if not places(config):
            raise
        reward, opened = None, [different(name, "opens", str(error), "every weight in its place", "as it says")]
    checks = [check for source, place in places(config) for check in _check_files(name, source, place, listed)]
    if listed is None:
        every = {file for _, place in places(config) for file in _files(place)}
        checks += check_hashes(name, Path("/"), every, None) if every else []
    checks += opened
    if reward is not None:
        checks += _check_scores(name, config, reward, device)
    return checks + [note("paper", "untrained models", sentence) for sentence in known.of_reward(name)]


def places(config: DescribedReward) -> list[tuple[Source, Path]]:
    """Find each source's local path, or its folder in the hub's cache; leave out those not cached.

    Raises UserError for a path that is neither local nor a hub id.
    """
    found = []
    for source in config.sources():
        path = Path(resolve(source.path))
        if path.exists():
            found.append((source, path))
        elif not is_hub_id(source.path):
            raise UserError(
                f"{source.field} {source.path}: no file or folder is there; give one, or a hub id (org/name)"
            )
        elif folder := cached_folder(source.path):
            found.append((source, folder))
    return found


def _check_files(name: str, source: Source, place: Path, listed: Hashes | None) -> list[Check]:
    """Check weights by the class that config.json names, single files by their tensors; hashes against a list."""
    part, checks = f"{name}.{source.field}", []
    if not source.weights:
        return []  # a tokenizer: weights in its folder are not read
    kind = _class_of(place)
    if kind is not None:
        checks += check_weights(part, place, kind, "transformers")
    checkpoints = [file for file in _files(place) if file.suffix in PICKLES or (kind is None and _is_safe(file))]
    for file in checkpoints:
        checks += _check_checkpoint(part, file)
    if listed is not None and source.field == "path":
        checks += check_hashes(part, place if place.is_dir() else place.parent, _files(place), listed)
    return checks


def _check_checkpoint(part: str, file: Path) -> list[Check]:
    from leapalign.rewards.checkpoint import read_weights

    try:
        if _is_safe(file):
            try:
                headers = [read_header(file)]
            except ValueError as error:
                return [
                    different(part, "files", f"{file.name} {error}", "a whole file", "fetch or copy the file again")
                ]
            return [good(part, "files", f"{file.name}, whole"), check_dtypes(part, headers), _finite(part, file)]
        weights = read_weights(part, str(file))
    except UserError as error:
        return [different(part, "files", str(error), "a file of tensors", "fetch or copy the file again")]
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    return [good(part, "files", f"{file.name}, tensors of {', '.join(kinds)}"), check_finite(part, weights.items())]


def _finite(part: str, file: Path) -> Check:
    from leapalign.verification.files import tensors_of

    return check_finite(part, tensors_of([file]))


def _class_of(place: Path) -> Any:
    """Return the transformers class that a folder's config.json names; None if unknown or without safetensors."""
    import transformers

    config = place / "config.json"
    try:
        told = read_json(config) if config.is_file() else {}
    except UserError:
        return None  # opening the reward reports it
    named = told.get("architectures") if isinstance(told, dict) else None
    kind = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    return kind if kind is not None and any(place.glob("*.safetensors")) else None


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())


def _is_safe(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _check_scores(name: str, config: DescribedReward, reward: Reward, device: str) -> list[Check]:
    """Compare the scores of tensors and of image files, each image with its own prompt."""
    images = draw_images()
    pixels = torch.stack([to_tensor(image) for image in images]).to(device).requires_grad_(config.differentiable)
    scores = reward(pixels, PROMPTS)
    by_file = reward.score_pil(images, PROMPTS)
    numbers = [round(float(score), 4) for score in scores.detach()]
    if reward.may_fail():
        return [note(name, "scores", f"{numbers}"), _check_answers(name, by_file)]
    if not bool(scores.isfinite().all()):
        return [different(name, "scores", f"{numbers}", "finite numbers", "fetch the weights again, or use float32")]
    spread = float(scores.detach().max() - scores.detach().min())
    checks = [good(name, "scores of drawn images", f"{numbers}")]
    if spread == 0:
        checks = [
            different(name, "scores of drawn images", f"{numbers}", "not all the same", "fetch the weights again")
        ]
    difference = float((scores.detach().cpu() - by_file.cpu()).abs().max())
    remedy = "use the preprocessor_config.json of this very model"
    checks.append(within(name, "tensors' and files' scores", difference, PATHS * spread, remedy))
    return [*checks, _check_gradient(name, scores, pixels)] if config.differentiable else checks


def _check_answers(name: str, scores: Tensor) -> Check:
    came = f"{int(scores.isfinite().sum())} of {len(scores)} answers hold a number"
    if bool(scores.isfinite().any()):
        return good(name, "answers", came)
    return different(name, "answers", came, "a number in each", "fetch the weights again")


def _check_gradient(name: str, scores: Tensor, pixels: Tensor) -> Check:
    what, expected, remedy = "gradient at the image", "finite, not zero", "fetch the weights again, or use float32"
    if not scores.requires_grad:
        return different(name, what, "none", expected, "let the scores keep the graph of the images")
    (grad,) = torch.autograd.grad(scores.sum(), pixels)
    norms = grad.flatten(1).norm(dim=1)
    came = f"norms {float(norms.min()):.2g} to {float(norms.max()):.2g}"
    if bool(norms.isfinite().all()) and bool((norms > 0).all()):
        return good(name, what, came, expected)
    return different(name, what, came, expected, remedy)


def draw_images() -> list[Image]:
    """Draw a red circle with a word, a blue square, stripes and a green triangle; soft edges make a resize smooth."""
    from PIL import Image, ImageDraw, ImageFilter

    circle, square, triangle = (Image.new("RGB", (SIZE, SIZE), colour) for colour in ("white", "#e0d0c0", "#303040"))
    pen = ImageDraw.Draw(circle)
    pen.ellipse((60, 90, 200, 230), fill="#d02020")
    pen.text((70, 20), "red", fill="black", font_size=48)
    ImageDraw.Draw(square).rectangle((70, 60, 190, 180), fill="#2040c0")
    ImageDraw.Draw(triangle).polygon(((128, 40), (220, 210), (36, 210)), fill="#20a040")
    stripes = Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB")
    return [image.filter(ImageFilter.GaussianBlur(2)) for image in (circle, square, stripes, triangle)]
