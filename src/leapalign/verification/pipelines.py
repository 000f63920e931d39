"""Check a pipeline: its files, tokenizers and scheduler, and leapalign's sampler against the pipeline's own call."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.errors import UserError
from leapalign.flow.rollout import rollout
from leapalign.models.diffusers_reference import as_ours, open_pipeline
from leapalign.models.published import Published
from leapalign.storage.components import component_class
from leapalign.storage.pipeline_folder import (
    INDEX,
    TRANSFORMER,
    PipelineFolder,
    check_component,
    components_of,
    locate,
    read_json,
)
from leapalign.verification import known
from leapalign.verification.checks import Check, different, good, note, within
from leapalign.verification.files import Hashes, check_hashes, check_weights

LATENTS = 1e-3  # fraction of the largest value: summation order stays below (2e-6 measured), a wrong setting does not
PIXELS = 1 / 255  # one level of 8 bits
LARGEST = 512  # pixels a side; limit of the default size


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The image that both samplers draw."""

    prompt: str
    num_steps: int
    size: int  # pixels a side; 0 = the pipeline's default, at most LARGEST
    seed: int
    device: str


def check_pipeline(config: Any, trial: Trial, listed: Hashes | None) -> list[Check]:
    """Check a pipeline's files, component by component, and then compare its sampler with leapalign's.

    `config`: the model configuration; `listed`: expected hashes. Raises UserError if its folder cannot be found.
    """
    folder = locate(config.path)
    components = components_of(read_json(folder / INDEX))
    checks = [
        check
        for name, (library, kind) in components.items()
        for check in _check_component(folder / name, library, kind)
    ]
    checks += [
        check
        for name in components
        if name.startswith("tokenizer")
        for check in _check_tokenizer(folder, name, components, trial)
    ]
    checks += _check_scheduler(folder, components)
    files = (file for file in folder.rglob("*") if file.is_file())
    checks += check_hashes("all components", folder, files, listed)
    checks += check_architecture(config.path, folder, config.published)
    return checks + _check_sampler(config, folder, trial)


def _check_component(component: Path, library: str, class_name: str) -> list[Check]:
    from torch import nn

    try:
        check_component(component, library, with_weights=False)
        kind = component_class(library, class_name)
    except (UserError, AttributeError) as error:
        return [
            different(
                component.name, "folder", str(error), f"{class_name} of {library}", "fetch or copy the component again"
            )
        ]
    return check_weights(component.name, component, kind, library) if issubclass(kind, nn.Module) else []


def _check_scheduler(folder: Path, components: dict[str, tuple[str, str]]) -> list[Check]:
    """Check that the scheduler is plain flow-matching Euler, which leaps need."""
    from leapalign.models.pipeline import load_scheduler

    try:
        scheduler = load_scheduler(PipelineFolder(folder, components))
    except UserError as error:
        remedy = "use the scheduler's folder, and its entry in model_index.json, of this very model"
        return [different("scheduler", "kind", str(error), "a plain FlowMatchEulerDiscreteScheduler", remedy)]
    return [good("scheduler", "kind", f"{type(scheduler).__name__}, shift {scheduler.config.shift}")]


def _check_tokenizer(folder: Path, name: str, components: dict[str, tuple[str, str]], trial: Trial) -> list[Check]:
    """Check a tokenizer: its class is the index's, its vocabulary fits its encoder, and it decodes a prompt again."""
    library, class_name = components[name]
    encoder, remedy = name.replace("tokenizer", "text_encoder"), "copy the tokenizer of this very model again"
    told = _json(folder / name / "tokenizer_config.json").get("tokenizer_class") or class_name
    if not isinstance(told, str) or told.removesuffix("Fast") != class_name.removesuffix("Fast"):
        return [different(name, "tokenizer", f"files of a {told}", class_name, remedy)]
    try:
        kind = component_class(library, class_name)
        tokenizer = kind.from_pretrained(folder / name, local_files_only=True)
        again = tokenizer.decode(tokenizer(trial.prompt)["input_ids"], skip_special_tokens=True)
    except Exception as error:  # files of another tokenizer can make transformers raise anything
        return [different(name, "tokenizer", f"{type(error).__name__}: {error}", class_name, remedy)]
    config = _json(folder / encoder / "config.json")
    inner = config.get("text_config")
    rows = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else 0) or len(tokenizer)
    if type(rows) is not int or len(tokenizer) > rows:
        return [different(name, "tokenizer", f"{len(tokenizer)} entries", f"at most {rows}, as {encoder} has", remedy)]
    if _letters(again) != _letters(trial.prompt):
        if _is_shortened(again, trial.prompt):  # a small vocabulary, like the embedded model's
            return [note(name, "tokenizer", f"knows {again!r} of {trial.prompt!r}", "give a --prompt of its words")]
        return [different(name, "tokenizer", f"says {again!r} for {trial.prompt!r}", "the same words", remedy)]
    return [good(name, "tokenizer", f"{len(tokenizer)} entries, says the prompt again", f"at most {rows}")]


def _is_shortened(said: str, prompt: str) -> bool:
    """Return True if `said` has only words of the prompt, in the prompt's order, and at least one."""
    words = iter(prompt.lower().split())
    return bool(said.split()) and all(word in words for word in said.lower().split())


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def check_architecture(source: str, folder: Path, published: Mapping[str, Published]) -> list[Check]:
    """Recognise the published model, compare its scheduler's configuration, and note the paper's scores of it."""
    transformer, scheduler = (
        _json(folder / TRANSFORMER / "config.json"),
        _json(folder / "scheduler" / "scheduler_config.json"),
    )
    named, found = known.by_id(source, published), known.recognise(transformer, published)
    checks = []
    if named and named != found:
        wrong = {key: transformer.get(key) for key, value in named.transformer.items() if transformer.get(key) != value}
        expected = str({key: named.transformer[key] for key in wrong})
        checks.append(different(TRANSFORMER, "architecture", str(wrong), expected, f"fetch {source} again"))
    if found is None:
        sizes = {key: transformer.get(key) for key in ("num_layers", "num_attention_heads", "attention_head_dim")}
        return [*checks, note(TRANSFORMER, "architecture", f"no published one is known with {sizes}")]
    checks.append(good(TRANSFORMER, "architecture", f"the numbers of {' or '.join(found.names)}"))
    other = {key: scheduler.get(key) for key, value in found.scheduler.items() if scheduler.get(key, False) != value}
    expected = str({key: found.scheduler[key] for key in other or found.scheduler})
    remedy = f"use scheduler_config.json of {found.names[0]}"
    checks.append(
        different("scheduler", "numbers", str(other), expected, remedy)
        if other
        else good("scheduler", "numbers", expected)
    )
    for figures in found.figures:
        scores = ", ".join(f"{name} {score:g}" for name, score in figures.scores.items())
        checks.append(note("paper", f"{found.names[0]}, untrained", f"{scores} ({figures.where})"))
    return checks


def _check_sampler(config: Any, folder: Path, trial: Trial) -> list[Check]:
    """Sample the same noise by the pipeline's own call and by leapalign, opened one after the other, and compare."""
    try:
        theirs = _pipeline_call(config, folder, trial)
        gc.collect()  # free the pipeline's weights before leapalign loads its own
        config = replace(config, height=theirs.size, width=theirs.size)
        model = config.load(trial.device, "float32")
        generator = torch.Generator().manual_seed(trial.seed)
        with torch.no_grad():
            latents = rollout(
                model.velocity(model.encode([trial.prompt])), model.noise([generator]), model.sigmas(trial.num_steps)
            )
            image = model.decode(latents)
    except Exception as error:  # a UserError, or anything: a wrong folder can make diffusers raise any error
        remedy = "" if isinstance(error, UserError) else "mend what differs above first"
        came = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return [different("sampler", "opens", came, f"a {config.pipeline} that samples", remedy)]
    checks = [
        good("sampler", "opens", f"{theirs.size} x {theirs.size}, {trial.num_steps} steps, {trial.device}, float32")
    ]
    checks.append(_check_latents(latents, theirs, model))
    difference = float((image.cpu() - theirs.image).abs().max())
    remedy = "report it: one of the two samplers reads these files in another way"
    checks.append(within("sampler", "pixels, ours and the pipeline's own", difference, PIXELS, remedy))
    return [*checks, _check_image(image.cpu())]


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """The result of the pipeline's own call."""

    pipeline: type  # diffusers' class
    size: int  # pixels a side
    latents: Tensor  # in the pipeline's layout, which may be packed
    image: Tensor  # [1, 3, H, W] in [0, 1]


def _pipeline_call(config: Any, folder: Path, trial: Trial) -> Theirs:
    pipeline = open_pipeline(config, folder).to(trial.device)
    size = trial.size or min(LARGEST, _usual_size(pipeline))
    sizes = {"height": size, "width": size, "num_inference_steps": trial.num_steps}
    settings = config.call_arguments(trial.num_steps) | sizes

    def draw(output_type: str) -> Tensor:
        generator = torch.Generator().manual_seed(trial.seed)
        return pipeline(prompt=trial.prompt, generator=generator, output_type=output_type, **settings).images.cpu()

    return Theirs(pipeline=type(pipeline), size=size, latents=draw("latent"), image=draw("pt"))


def _usual_size(pipeline: Any) -> int:
    """Pixels a side of an image whose size is not given; some pipelines leave it to their transformer (AuraFlow)."""
    of_its_own = hasattr(pipeline, "default_sample_size")
    latents = pipeline.default_sample_size if of_its_own else pipeline.transformer.config.sample_size
    return latents * pipeline.vae_scale_factor


def _check_latents(ours: Tensor, theirs: Theirs, model: Any) -> Check:
    expected = as_ours(theirs.latents.to(ours.device), theirs.pipeline, model)
    size = float(expected.abs().max())
    remedy = "report it: one of the two samplers reads these files in another way"
    what = "latents, ours and the pipeline's own"
    return within("sampler", what, float((ours - expected).abs().max()), LATENTS * size, remedy)


def _check_image(image: Tensor) -> Check:
    deviation = float(image.flatten(2).std(dim=2).max())  # per channel; 0 for an image of one colour
    came = f"mean {float(image.mean()):.3f}, deviation {deviation:.3f}"
    if bool(image.isfinite().all()) and deviation > 1e-5:  # low, because a few steps may draw a nearly empty background
        return good("vae", "decodes", came, "an image")
    return different("vae", "decodes", came, "an image of more than one colour", "fetch vae and transformer again")


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON file's object; empty if it is missing or invalid, which its component's check reports."""
    try:
        return read_json(file)
    except UserError:
        return {}
