"""Model cards of the embedded folders: contents, training and measured quality."""

from __future__ import annotations

from typing import Any

from leapalign.studies.shapeworld_build.generator import LESSONS
from leapalign.studies.shapeworld_build.scenes import SLOPPY, STRICT

HEAD = """---
license: apache-2.0
library_name: {library}
---
# {title}

{what}

## Making
Command: `python -m leapalign.studies.shapeworld_build --install`. Commit {commit}, seed {seed}, {steps} steps,
{seconds} s on {threads} thread(s) of {machine} (shared with other work, so an upper bound), torch {torch}. {data}
Weights are stored in float16, and scored as stored.
"""

WHAT = {
    "generator": (
        "ShapeWorld generator",
        "diffusers",
        "A small `StableDiffusion3Pipeline` that draws coloured shapes, 32 × 32 pixels: 6 joint blocks, 5 heads × 32,\n"
        "16 image tokens, 5.4 M parameters. It draws well and follows prompts only partly, so that there is something\n"
        "to align. Call it with `height=32, width=32, max_sequence_length=5`: the default of 256 pads T5 with 251\n"
        "tokens it has never seen.",
    ),
    "reward": (
        "ShapeWorld reward",
        "transformers",
        "A small `CLIPModel` (48 × 48 pixels) that tells whether a caption is true of a ShapeWorld image; the\n"
        "reward is its cosine.",
    ),
    "judge": (
        "ShapeWorld judge",
        "transformers",
        "The held-out `CLIPModel` (40 × 40 pixels): another seed, size and patch than the reward, never trained on.",
    ),
}
CLEAN = "Data: scenes drawn on the fly by `leapalign.shapeworld`, true captions, near misses as adversarial negatives."
HARD = (
    "\nThen {steps} steps more, with badly drawn images as negatives and with images moved up the loss's\n"
    "gradient, so that a generator cannot please it with textures."
)


def card(name: str, facts: dict[str, Any], scores: dict[str, Any]) -> str:
    title, library, what = WHAT[name]
    head = HEAD.format(
        title=title,
        library=library,
        what=what,
        data=data(name, facts),
        **{key: facts[key] for key in ("commit", "seed", "steps", "seconds", "threads", "machine", "torch")},
    )
    return head + (tasks(scores["generator"]) if name == "generator" else accuracies(scores[name]))


def data(name: str, facts: dict[str, Any]) -> str:
    if name == "generator":
        return sloppy(facts["vae"])
    return CLEAN + (HARD.format(steps=facts["hardening"]) if name == "reward" else "")


def sloppy(vae: dict[str, Any]) -> str:
    shares = ", ".join(f"{task} {share:.2f}" for task, share in SLOPPY.truthful.items())
    starts = (0, *(lesson.until for lesson in LESSONS))
    strict = [f"{start} to {lesson.until}" for start, lesson in zip(starts, LESSONS) if lesson.manners == STRICT]
    return (
        "Data: 32,000 scenes a lesson, drawn by `leapalign.shapeworld`; the caption is true of this share of them:\n"
        f"{shares}.\n"
        f"Steps {', '.join(strict)} are a lesson in which every caption is true, without which no relation is learnt.\n"
        f"The VAE took {vae['steps']} steps and {vae['seconds']} s."
    )


def tasks(sweep: dict[str, Any]) -> str:
    """Format the six-task table, one row per guidance scale."""
    names = list(next(iter(sweep.values())))
    num = next(iter(sweep.values()))["single_object"]["num"]
    lines = ["", f"## GenEval's rules on ShapeWorld's test prompts, {num} images a task, 8 steps", ""]
    lines += ["| guidance | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for scale, row in sweep.items():
        cells = [f"{row[n]['accuracy']:.3f} ± {row[n]['standard_error']:.3f}" for n in names]
        lines.append(f"| {scale} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def accuracies(score: dict[str, Any]) -> str:
    lines = ["", "## True caption preferred to a false one, 500 rendered scenes of test combinations a row", ""]
    lines += ["| told apart | accuracy | pairs |", "|---|---|---|"]
    lines += [f"| {kind} | {row['accuracy']:.4f} | {row['pairs']} |" for kind, row in score["accuracy"].items()]
    return "\n".join(lines) + f"\n\nMean cosine of true captions: {score['mean_cosine_of_true_captions']:.3f}.\n"
