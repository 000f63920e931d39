"""The planner's bytes against bytes measured in a real run, on small models of each family's shape: within 10 %.

    python benches/plan.py > plan.json
    python benches/plan.py --families flux2 qwen-image z-image --methods leapalign > plan_families.json

For each family, method, precision and setting of the graph: what the planner says without weights
(`leapalign.planning`), and what the same update keeps and needs on the CPU, all sampling steps included, counted as in
memory.py. The planner measures one and two blocks of each kind and multiplies; here all blocks are there. `decode`
compares the gradient of a decoded latent. Bytes, not times: equal on every machine with the same versions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from shared import facts
from torch import Tensor

from leapalign.flow.graph import checkpoint_blocks, with_graph
from leapalign.methods.draft_lv import DRaFTLV
from leapalign.methods.drtune import DRTune
from leapalign.methods.flowbp_bridge import FlowBPBridge
from leapalign.methods.flowbp_lagrange import FlowBPLagrange
from leapalign.methods.flowbp_sparse import FlowBPSparse
from leapalign.methods.leapalign import LeapAlign
from leapalign.methods.refl import ReFL
from leapalign.methods.rsm import RSM
from leapalign.models import flux, flux2, qwen_image, z_image
from leapalign.models.base import Conditioning, TextShape
from leapalign.models.decode import Decoder
from leapalign.models.pipeline import Guidance, PipelineModel, parse_dtype
from leapalign.planning.activations import (
    GRAPHS,
    GraphBytes,
    anchor_of,
    draw,
    graph_bytes,
    latent_bytes,
)
from leapalign.planning.forwards import count_forwards
from leapalign.planning.meta_models import META, fake, fake_mode
from leapalign.planning.tensor_bytes import LiveBytes, Saved
from leapalign.prompts import PromptFile
from leapalign.rewards.clip import PickScore
from leapalign.run import RewardTerm, Run
from leapalign.storage.pipeline_folder import PipelineFolder

BOUND = 0.1  # relative
METHODS: dict[str, Any] = {"leapalign": LeapAlign(), "refl": ReFL(), "draft-lv": DRaFTLV(), "drtune": DRTune()}
METHODS |= {m.name: m for m in (FlowBPSparse(), FlowBPBridge(), FlowBPLagrange(), RSM())}
METHODS["pairs"] = LeapAlign(pairs_per_rollout=3, step_draws="stratified")
ANCHORED = {"leapalign, anchored": "leapalign", "pairs, anchored": "pairs", "rsm, anchored": "rsm"}
METHODS |= {name: METHODS[method] for name, method in ANCHORED.items()}


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
    families: tuple[str, ...] = ("flux",)
    """Of flux, flux2, qwen-image and z-image."""
    methods: tuple[str, ...] = tuple(METHODS)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A family's transformer and what goes into it."""

    policy: Callable[[Bench], Any]
    predict: Callable[..., Tensor]  # policy, x, sigma, text -> v
    latent: Callable[[Bench], tuple[int, int, int]] = lambda bench: (4, bench.side, bench.side)
    pooled: int = 0
    masked: bool = False


def sizes(bench: Bench) -> dict[str, Any]:
    """What diffusers calls the same in most families."""
    heads = {"attention_head_dim": 32, "num_attention_heads": bench.width // 32}
    return {"num_layers": bench.double_blocks, "joint_attention_dim": bench.width, **heads}


def flux_policy(bench: Bench) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_single_layers=bench.single_blocks, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(8, 12, 12), **sizes(bench),
    )  # fmt: skip


def flux2_policy(bench: Bench) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_single_layers=bench.single_blocks, timestep_guidance_channels=32, guidance_embeds=False,
        axes_dims_rope=(8, 8, 8, 8), **sizes(bench),
    )  # fmt: skip


def qwen_image_policy(bench: Bench) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(in_channels=16, out_channels=4, axes_dims_rope=(8, 12, 12), **sizes(bench))


def z_image_policy(bench: Bench) -> Any:
    from diffusers import ZImageTransformer2DModel

    heads = bench.width // 32
    return ZImageTransformer2DModel(
        in_channels=4, dim=bench.width, n_layers=bench.double_blocks, n_refiner_layers=2, n_heads=heads,
        n_kv_heads=heads, cap_feat_dim=bench.width, axes_dims=[8, 12, 12], axes_lens=[1024, 128, 128],
    )  # fmt: skip


SHAPES = {
    "flux": Shape(
        policy=flux_policy,
        predict=lambda policy, x, sigma, text: flux.predict(policy, x, sigma * 1000, text, 3.5),
        pooled=32,
    ),
    "flux2": Shape(
        policy=flux2_policy,
        predict=lambda policy, x, sigma, text: flux2.predict(policy, x, sigma * 1000, text),
        latent=lambda bench: (16, bench.side // 2, bench.side // 2),
    ),
    "qwen-image": Shape(
        policy=qwen_image_policy,
        predict=lambda policy, x, sigma, text: qwen_image.predict(policy, x, sigma * 1000, text),
        masked=True,
    ),
    "z-image": Shape(
        policy=z_image_policy,
        predict=lambda policy, x, sigma, text: z_image.predict(policy, x, sigma * 1000, text),
        masked=True,
    ),
}


def model_of(bench: Bench, family: str, dtype: str) -> PipelineModel:
    """A model of the family's blocks and FLUX's VAE, on torch's default device."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2, norm_num_groups=8, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    absent: Any = None  # what only prompts and saving need
    return PipelineModel(
        policy=SHAPES[family].policy(bench).eval(),
        folder=PipelineFolder(Path("scaled-down"), {}),
        prompts=absent,
        load_encoder=absent,
        readers=absent,
        decoder=Decoder(vae.eval().requires_grad_(False), 1.0, 0.0, 1),
        latent_shape=SHAPES[family].latent(bench),
        guidance=Guidance(1.0, True, ""),
        predict=SHAPES[family].predict,
        grid=absent,
        device="cpu",
        dtype=parse_dtype(dtype),
    )


def conditioning(bench: Bench, family: str, dtype: str, mode: AbstractContextManager[Any]) -> Conditioning:
    shape = SHAPES[family]
    text = TextShape(tokens=(bench.text_tokens, bench.width), pooled=shape.pooled, masked=shape.masked)
    return Conditioning(text.empty(bench.micro_batch_size, parse_dtype(dtype), mode))


def run_of(bench: Bench, method: str, dtype: Any) -> Run:
    """Only its method, sizes and steps matter here."""
    return Run(
        name=method,
        model=flux.Flux(path="scaled-down"),
        method=METHODS[method],
        rewards=(RewardTerm(reward=PickScore(), threshold=1.0),),
        prompts=PromptFile(path="unused"),
        out="unused",
        batch_size=bench.micro_batch_size,
        micro_batch_size=bench.micro_batch_size,
        num_sampling_steps=bench.sampling_steps,
        anchor_weight=float(method in ANCHORED),
        dtype=dtype,
    )


def estimated(bench: Bench, family: str, method: str, dtype: str, graph: str, seed: int) -> GraphBytes:
    """By the planner, without weights."""
    mode = fake_mode()
    with torch.device(META):
        model = model_of(bench, family, dtype)
    fake(model.policy, mode)
    texts = conditioning(bench, family, dtype, mode)
    return graph_bytes(run_of(bench, method, dtype), model, texts, mode, graph, seed)


def measured(bench: Bench, family: str, method: str, dtype: str, graph: str, seed: int) -> GraphBytes:
    """The same update with weights: rollout of all steps, gradient at the latent left out, backward."""
    run, model = run_of(bench, method, dtype), model_of(bench, family, dtype)
    checkpoint_blocks(model.policy, graph)
    velocity = model.velocity(conditioning(bench, family, dtype, nullcontext()))
    velocity = with_graph(velocity, graph, anchor=anchor_of(run))
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
        empty = model_of(bench, "flux", "float32")
    fake(empty.decoder.vae, mode)
    guess = latent_bytes(empty, mode, bench.micro_batch_size, lambda images: [images], gradient=True)
    model = model_of(bench, "flux", "float32")
    latents = torch.randn(bench.micro_batch_size, *model.latent_shape, requires_grad=True)
    with LiveBytes() as live:
        live.begin("reward")
        images: Tensor = model.decode(latents)
        torch.autograd.grad(images.float().sum(), latents)
    return {"estimated": guess, "measured": live.peaks()["reward"]}


def compare(bench: Bench) -> dict[str, Any]:
    """family/method/dtype/graph -> estimated and measured bytes."""
    rows: dict[str, Any] = {}
    for family, method in product(bench.families, bench.methods):
        seed = count_forwards(run_of(bench, method, "float32")).seed
        for dtype, graph in product(bench.dtypes, GRAPHS):
            guess, real = (each(bench, family, method, dtype, graph, seed) for each in (estimated, measured))
            name = f"{family}/{method}/{dtype}/{graph}"
            rows[name] = {"estimated": asdict(guess), "measured": asdict(real)}
            print(name, file=sys.stderr, flush=True)
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
