"""Published rewards at their full size: parameters, bytes, and what the score and gradient of one picture cost.

    python benches/rewards.py                           # sizes alone: nothing is allocated (meta device)
    python benches/rewards.py --run hpsv2 > hpsv2.json  # time and memory of that one too, random weights in float32

No weights are read: sizes do not depend on them, nor do time and memory. `--run` scores one random picture with one
random row of token ids, as long as the reward reads, and takes the gradient at the picture. It counts
- `seconds`: of the score (text included, which is cached in a training for CLIPs) and of the gradient, after a warm-up;
- `cpu_seconds`: the same of the processor, all threads together: what stays the same beside other processes;
- `peak`: the most bytes alive among the tensors made in each phase, weights left out (see memory.py);
- `weights`: bytes of the weights and buffers;
- `resident`: the most memory that the process had, libraries and the making of random weights included (Linux, CPU).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from accelerate import init_empty_weights
from memory import LiveBytes
from shared import facts, synchronized
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.rewards.aesthetic_model import AestheticReward, AestheticScorer
from leapalign.rewards.clip_model import ClipReward, Head
from leapalign.rewards.hpsv3_model import PIXELS, HPSv3Model, HPSv3Reward
from leapalign.rewards.imagereward_model import BlipReward, BlipScorer, imagereward_preprocess
from leapalign.rewards.linear_head import WIDTHS, LinearHead
from leapalign.rewards.preprocess import Preprocess
from leapalign.rewards.qwen_vl import QwenPreprocess


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Sizes of the published rewards, and the cost of one picture, as JSON on stdout."""

    run: str = ""
    """Name of the reward to run, e.g. hpsv2; empty: sizes alone."""
    pixels: int = 512
    """Height and width of the picture before the reward's own resize."""
    repeats: int = 1
    device: str = "cpu"
    most_bytes: int = 24 * 2**30
    """A reward whose weights need more than that in float32 is not run."""


# The architectures. A further reward is one more entry of ARCHITECTURES.


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A loaded reward of the published sizes, whatever its weights hold, and its scores without a tokenizer."""

    make: Callable[[], Any]  # has `model`, an nn.Module; called where weights have no memory
    score: Callable[[Any, Tensor], Tensor]  # the reward and images [B, 3, H, W] -> [B]


def token_ids(vocabulary: int, length: int) -> Callable[[Any, Tensor], Tensor]:
    """Scores with random ids of that length, the highest of them last, as the end token of CLIP is."""

    def score(reward: Any, images: Tensor) -> Tensor:
        ids = torch.randint(vocabulary - 1, (len(images), length))
        ids[:, -1] = vocabulary - 1
        return reward.score_ids(images, ids)

    return score


def vit_h() -> Any:
    """CLIP ViT-H/14: HPSv2 and PickScore."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
        text_config={**text, "hidden_act": "gelu", "eos_token_id": 2},
        projection_dim=1024,
    )


def vit_l() -> Any:
    """OpenAI's CLIP ViT-L/14: CLIPScore and the aesthetic score."""
    from transformers import CLIPConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPConfig(
        vision_config={**vision, "patch_size": 14, "image_size": 224},
        text_config={**text, "eos_token_id": 2},
        projection_dim=768,
    )


def clip(name: str, config: Callable[[], Any], preprocess: Preprocess) -> Architecture:
    from transformers import CLIPModel

    def make() -> ClipReward:
        model = CLIPModel(config())
        return ClipReward(name=name, model=model, preprocess=preprocess, head=Head(), logit_scale=100.0, tokenizer=None)

    return Architecture(make=make, score=token_ids(49408, 77))


def aesthetic() -> AestheticReward:
    from transformers import CLIPModel

    model = AestheticScorer(CLIPModel(vit_l()), LinearHead((768, *WIDTHS)))
    return AestheticReward(name="aesthetic", model=model, preprocess=Preprocess(size=224, rounding="half-even"))


def imagereward() -> BlipReward:
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
    )
    text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)  # the rest is BERT-base's, as it stands
    return BlipReward(
        name="imagereward",
        model=BlipScorer(vision, text, (768, *WIDTHS)),
        preprocess=imagereward_preprocess(vision),
        tokenizer=None,
    )


HPSV3_VOCABULARY = 151_658  # <|Reward|> comes last


def hpsv3(text_layers: int, vision_layers: int) -> Architecture:
    """Qwen2-VL-7B with HPSv3's head; fewer layers than 28 and 32 are a cut of the same width, which fits in memory."""

    def make() -> HPSv3Reward:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": text_layers}
        text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": HPSV3_VOCABULARY}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
        vision = {"depth": vision_layers, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=151655)
        return HPSv3Reward(
            name="hpsv3",
            model=HPSv3Model(Qwen2VLModel(config)),
            preprocess=QwenPreprocess(min_pixels=PIXELS, max_pixels=PIXELS),
            reward_token_id=HPSV3_VOCABULARY - 1,
            chat=None,
        )

    def score(reward: HPSv3Reward, images: Tensor) -> Tensor:
        """Ids as many as the instruction has (about 500) around the picture's tokens."""
        num = reward.preprocess(images)[0].num_tokens
        words = torch.randint(150_000, (500,))
        ids = torch.cat([words, torch.full((num,), 151655), torch.tensor([HPSV3_VOCABULARY - 1])])
        return reward.score_ids(images, [ids] * len(images))

    return Architecture(make=make, score=score)


ARCHITECTURES = {
    "pickscore": clip("pickscore", vit_h, Preprocess(size=224)),
    "hpsv2": clip("hpsv2", vit_h, Preprocess(size=224, fit="pad")),
    "clipscore": clip("clipscore", vit_l, Preprocess(size=224, rounding="half-even")),
    "aesthetic": Architecture(make=aesthetic, score=lambda reward, images: reward.score_images(images)),
    "imagereward": Architecture(make=imagereward, score=token_ids(30522, 35)),
    "hpsv3": hpsv3(28, 32),
    "hpsv3-cut": hpsv3(2, 2),  # 2 of 28 and 2 of 32 layers
}


# Measuring

PHASES = ("score", "gradient")
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def empty(architecture: Architecture) -> Any:
    """The reward with weights that have shapes and no memory."""
    with init_empty_weights(include_buffers=False):
        return architecture.make()


def sizes(architecture: Architecture) -> dict[str, int]:
    parameters = sum(weight.numel() for weight in empty(architecture).model.parameters())
    return {"parameters": parameters, "bytes_float32": 4 * parameters, "bytes_bfloat16": 2 * parameters}


def randomised(architecture: Architecture, device: str) -> Any:
    """The reward with random weights of a usual size: transformers' own for BLIP are so small that they underflow."""
    reward = empty(architecture)
    model: nn.Module = reward.model
    weights = {
        key: 0.02 * torch.randn(weight.shape) + (weight.ndim == 1 and key.endswith("weight"))  # norms: about 1
        for key, weight in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False).eval().to(device)
    return reward


def cost(architecture: Architecture, bench: Rewards) -> dict[str, Any]:
    """Seconds and bytes of the score and gradient of one picture."""
    reward = randomised(architecture, bench.device)
    weights = (*reward.model.parameters(), *reward.model.buffers())
    images = torch.rand(1, 3, bench.pixels, bench.pixels, device=bench.device, requires_grad=True)
    with LiveBytes() as live:
        live.begin("score")
        score = architecture.score(reward, images)
        live.begin("gradient")
        (gradient,) = torch.autograd.grad(score.sum(), images)
        live.begin("end")
    if not (score.isfinite().all() and gradient.isfinite().all() and gradient.any()):
        raise RuntimeError("the random weights give no finite score and gradient: the numbers would mean nothing")
    peaks = live.peaks()
    times = [timed(architecture, reward, images) for _ in range(bench.repeats)]
    return {
        **{clock: {phase: min(each[clock][phase] for each in times) for phase in PHASES} for clock in CLOCKS},
        "peak": {phase: peaks[phase] for phase in PHASES},
        "weights": sum(weight.untyped_storage().nbytes() for weight in weights),
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def timed(architecture: Architecture, reward: Any, images: Tensor) -> dict[str, dict[str, float]]:
    """clock -> phase -> seconds."""
    found: dict[str, Tensor] = {}

    def score() -> None:
        found["score"] = architecture.score(reward, images)

    readings = [{clock: read() for clock, read in CLOCKS.items()}]
    for action in (score, lambda: torch.autograd.grad(found["score"].sum(), images)):
        synchronized(action)()
        readings.append({clock: read() for clock, read in CLOCKS.items()})
    spans = {phase: (readings[i], readings[i + 1]) for i, phase in enumerate(PHASES)}
    return {clock: {phase: end[clock] - start[clock] for phase, (start, end) in spans.items()} for clock in CLOCKS}


def main(bench: Rewards) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {name: dict(sizes(each)) for name, each in ARCHITECTURES.items()}
    if bench.run:
        if bench.run not in table:
            raise UserError(f"--run {bench.run}: unknown; one of {', '.join(table)}")
        if (needed := table[bench.run]["bytes_float32"]) > bench.most_bytes:
            raise UserError(
                f"--run {bench.run}: its weights need {needed} bytes in float32, more than --most-bytes "
                f"{bench.most_bytes}; run it on a larger machine and raise the number"
            )
        table[bench.run]["one_picture"] = cost(ARCHITECTURES[bench.run], bench)
    return {"rewards": table, **facts(bench)}


if __name__ == "__main__":
    try:
        print(json.dumps(main(tyro.cli(Rewards)), indent=2))
    except UserError as error:
        sys.exit(str(error))
