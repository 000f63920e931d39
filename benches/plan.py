"""The planner's bytes against bytes measured in a real run, on a FLUX-shaped model of a few blocks: within 10 %.

    python benches/plan.py > plan.json

For each method, precision and setting of the graph: what the planner says without weights (`leapalign.planning`), and
what the same update keeps and needs on the CPU, all sampling steps included, counted as in memory.py. The planner
measures one and two blocks of each kind and multiplies; here all blocks are there. `decode` compares the gradient of a
decoded latent. Bytes, not times: equal on every machine with the same versions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from shared import facts
from torch import Tensor

from leapalign.flow.graph import inputs_only
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.models.base import Conditioning, Text
from leapalign.models.decode import Decoder
from leapalign.models.flux import predict
from leapalign.models.folder import PipelineFolder
from leapalign.models.pipeline import Guidance, PipelineModel, parse_dtype
from leapalign.planning.activations import GRAPHS, GraphBytes, count_forwards, draw, graph_bytes, latent_bytes
from leapalign.planning.counting import LiveBytes, Saved
from leapalign.planning.weightless import META, fake, fake_mode
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run

BOUND = 0.1  # relative
METHODS = {"leapalign": LeapAlign(), "refl": ReFL(), "draft-lv": DRaFTLV(), "drtune": DRTune()}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Estimated and measured bytes of one micro-batch, as JSON on stdout."""

    double_blocks: int = 4
    single_blocks: int = 6
    width: int = 128
    """Of the transformer, in heads of 32."""
    side: int = 32
    """Of the latent; a token is 2 x 2 of it."""
    text_tokens: int = 64
    sampling_steps: int = 6
    micro_batch_size: int = 2
    methods: tuple[str, ...] = tuple(METHODS)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def flux_shaped(bench: Bench, dtype: str) -> PipelineModel:
    """A model of FLUX's blocks and VAE's, on torch's default device."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    policy = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=bench.double_blocks, num_single_layers=bench.single_blocks,
        attention_head_dim=32, num_attention_heads=bench.width // 32, joint_attention_dim=bench.width,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    absent: Any = None  # what only prompts and saving need
    return PipelineModel(
        policy=policy.eval(),
        folder=PipelineFolder(Path("flux-shaped"), {}),
        prompts=absent,
        decoder=Decoder(vae.eval().requires_grad_(False), 1.0, 0.0, 1),
        latent_shape=(4, bench.side, bench.side),
        guidance=Guidance(1.0, True, ""),
        predict=lambda module, x, sigma, text: predict(module, x, sigma * 1000, text, 3.5),
        grid=absent,
        device="cpu",
        dtype=parse_dtype(dtype),
    )


def conditioning(bench: Bench, dtype: str) -> Conditioning:
    rows, precision = bench.micro_batch_size, parse_dtype(dtype)
    tokens = torch.zeros(rows, bench.text_tokens, bench.width, dtype=precision)
    return Conditioning(Text(tokens, torch.zeros(rows, 32, dtype=precision)))


def run_of(bench: Bench, method: str, dtype: Any) -> Run:
    """Only its method, sizes and steps matter here."""
    return Run(
        name=method,
        model=None,
        method=METHODS[method],
        rewards=(RewardTerm(reward=PickScore(), threshold=1.0),),
        prompts=PromptFile(path="unused"),
        out="unused",
        batch_size=bench.micro_batch_size,
        micro_batch_size=bench.micro_batch_size,
        num_sampling_steps=bench.sampling_steps,
        dtype=dtype,
    )


def estimated(bench: Bench, method: str, dtype: str, graph: str, seed: int) -> GraphBytes:
    """By the planner, without weights."""
    mode = fake_mode()
    with torch.device(META):
        model = flux_shaped(bench, dtype)
    fake(model.policy, mode)
    with mode:
        texts = conditioning(bench, dtype)
    return graph_bytes(run_of(bench, method, dtype), model, texts, mode, graph, seed)


def measured(bench: Bench, method: str, dtype: str, graph: str, seed: int) -> GraphBytes:
    """The same update with weights: rollout of all steps, gradient at the latent left out, backward."""
    run, model = run_of(bench, method, dtype), flux_shaped(bench, dtype)
    if graph == "blocks":
        model.policy.enable_gradient_checkpointing()  # pyright: ignore
    velocity = model.velocity(conditioning(bench, dtype))
    velocity = inputs_only(velocity) if graph == "inputs" else velocity
    x = torch.randn(bench.micro_batch_size, *model.latent_shape)
    draws = draw(run, seed, lambda n: torch.randn(n, *x.shape))
    saved = Saved([*model.policy.parameters(), *model.policy.buffers()])
    with LiveBytes() as live:
        live.begin("rollout")
        with saved.hooks:
            surrogate = run.method(velocity, x, torch.linspace(0, 1, bench.sampling_steps + 1), draws)
        kept = saved.bytes()
        live.begin("backward")
        surrogate.backward(torch.randn_like(surrogate.x_hat))
    peaks = live.peaks(without=[p.grad for p in model.policy.parameters() if p.grad is not None])
    return GraphBytes(kept=kept, rollout=peaks["rollout"], backward=peaks["backward"])


def decode(bench: Bench) -> dict[str, int]:
    """Most alive while a latent is decoded and its gradient taken, estimated and measured."""
    mode = fake_mode()
    with torch.device(META):
        empty = flux_shaped(bench, "float32")
    fake(empty.decoder.vae, mode)
    guess = latent_bytes(empty, mode, bench.micro_batch_size, lambda images: [images])
    model = flux_shaped(bench, "float32")
    latents = torch.randn(bench.micro_batch_size, *model.latent_shape, requires_grad=True)
    with LiveBytes() as live:
        live.begin("reward")
        images: Tensor = model.decode(latents)
        torch.autograd.grad(images.float().sum(), latents)
    return {"estimated": guess, "measured": live.peaks()["reward"]}


def compare(bench: Bench) -> dict[str, Any]:
    """method/dtype/graph -> estimated and measured bytes."""
    rows: dict[str, Any] = {}
    for method in bench.methods:
        seed = count_forwards(run_of(bench, method, "float32")).seed
        for dtype in bench.dtypes:
            for graph in GRAPHS:
                guess, real = (each(bench, method, dtype, graph, seed) for each in (estimated, measured))
                rows[f"{method}/{dtype}/{graph}"] = {"estimated": asdict(guess), "measured": asdict(real)}
                print(f"{method}/{dtype}/{graph}", file=sys.stderr, flush=True)
    return rows


def errors(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Relative, by what is estimated."""
    return {
        name: {key: row["estimated"][key] / row["measured"][key] - 1 for key in row["measured"]}
        for name, row in rows.items()
    }


def main(bench: Bench) -> dict[str, Any]:
    rows, decoded = compare(bench), decode(bench)
    found = errors(rows)
    worst = max(abs(error) for row in found.values() for error in row.values())
    worst = max(worst, abs(decoded["estimated"] / decoded["measured"] - 1))
    return {"reached": worst <= BOUND, "bound": BOUND, "worst": worst, "errors": found, "bytes": rows} | {
        "decode": decoded,
        **facts(bench),
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Bench)), indent=2))
