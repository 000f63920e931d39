"""UnifiedReward (arXiv 2503.05236): ask Qwen2.5-VL about one image at a time and read the number in its answer."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.errors import UserError
from leapalign.rewards.base import Reward, check_inputs, check_prompts
from leapalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, each
from leapalign.rewards.pretrained import BICUBIC, check_architecture, load_tokenizer, read_json, read_model, torch_dtype
from leapalign.rewards.qwen_vl import BLOCK, Chat, Patches, QwenPreprocess, check_tokens, check_vision, read_template

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Qwen2_5_VLForConditionalGeneration

MODEL_TYPE = "qwen2_5_vl"
HIGHEST = 5.0
MIN_PIXELS, MAX_PIXELS = 56 * 56, 3584 * 3584  # Qwen2.5-VL's defaults


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt template and the line of the answer to read."""

    template: str  # name of a file beside this module
    axis: str  # "Alignment", "Coherence" or "Style"
    max_new_tokens: int


@dataclass(kw_only=True, eq=False)
class UnifiedJudge(Reward):
    """UnifiedReward, without gradient; see `leapalign.rewards.base.Reward`.

    `failures` counts answers without a readable number since loading; their scores are NaN. Non-finite images score NaN
    too, without running the model.
    """

    name: str
    model: Qwen2_5_VLForConditionalGeneration
    preprocess: QwenPreprocess
    chat: Chat
    question: Question
    failures: int = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], without gradient."""
        check_inputs(self.name, images, prompts)
        return self.scores(self.preprocess(images.detach()), prompts).to(images.device)

    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size through the reference preprocessing: [B]."""
        check_prompts(self.name, images, prompts)
        return self.scores(each(images, self.preprocess.from_pil), prompts)

    def may_fail(self) -> bool:
        return True

    def network(self) -> nn.Module:
        return self.model

    def scores(self, images: Sequence[Patches], prompts: Sequence[str]) -> Tensor:
        """Return one number per image, float32 (float64 for a float64 model)."""
        numbers = [self.score(image, prompt) for image, prompt in zip(images, prompts)]
        return torch.tensor(numbers, dtype=torch.promote_types(self.model.dtype, torch.float32))

    def score(self, image: Patches, prompt: str) -> float:
        """Return the number in the model's answer; NaN without one."""
        if not bool(image.values.isfinite().all()):
            return math.nan  # the network would still answer with a number
        number = parse(self.answer(image, prompt), self.question.axis)
        self.failures += math.isnan(number)
        return number

    @torch.no_grad()  # a text has no gradient
    def answer(self, image: Patches, prompt: str) -> str:
        """Generate the answer; at the length limit the last line is dropped, because its number may be cut."""
        ids = self.chat(prompt, image.num_tokens)[None].to(self.model.device)
        model: Any = self.model  # transformers' annotations are narrower than its code
        out = model.generate(
            **self.inputs(ids, image),
            max_new_tokens=self.question.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        new = out[0, ids.shape[1] :]
        text = self.chat.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if int(new[-1]) in self.end_tokens() else text.rpartition("\n")[0]

    def inputs(self, ids: Tensor, image: Patches) -> dict[str, Tensor]:
        device = ids.device
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": image.values.to(device),
            "image_grid_thw": torch.tensor([image.grid], device=device),
        }
        # newer transformers need the positions of image tokens, older ones reject the argument
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return inputs

    def end_tokens(self) -> set[int]:
        ends: Any = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}


def parse(text: str, axis: str) -> float:
    """Parse the first "Alignment Score (1-5): 3.62" of `axis`; NaN without a number in [0, 5].

    The published pattern is [0-5](?:\\.\\d+)?, which reads 4 from 45 and 3 from 3,5; those are NaN here.
    """
    found = re.search(rf"{axis} Score \(1-5\):\s*(\d+(?:\.\d+)?)(?![.,]?\d)", text, re.ASCII)
    number = float(found[1]) if found else math.nan
    return number if number <= HIGHEST else math.nan


def load_unified(name: str, folder: str, processor: str, question: Question, device: str, dtype: str) -> UnifiedJudge:
    """Load weights, preprocessing and tokenizer of a folder or hub id. Raises UserError on a mismatch."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    architecture = Qwen2_5_VLForConditionalGeneration
    config = check_architecture(name, folder, architecture.__name__, MODEL_TYPE)
    check_vision(name, folder, config.get("vision_config", {}))  # checked before gigabytes are read
    model = read_model(name, folder, architecture, MODEL_TYPE, torch_dtype(name, dtype))
    tokenizer = load_tokenizer(name, processor, len(model.get_input_embeddings().weight))
    template = read_template(Path(__file__).with_name(question.template))
    check_tokens(name, processor, tokenizer, template, model.config.image_token_id)
    return UnifiedJudge(
        name=name,
        model=model.to(device),
        preprocess=load_limits(name, processor),
        chat=Chat(tokenizer=tokenizer, template=template),
        question=question,
    )


def load_limits(name: str, folder: str) -> QwenPreprocess:
    """Read the folder's pixel limits, in either spelling; without a file, Qwen2.5-VL's defaults."""
    config = read_json(folder, "preprocessor_config.json") or read_json(folder, "processor_config.json")
    config = config.get("image_processor", config)  # transformers 5 nests it
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS
    high = config.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS
    usual = {"resample": BICUBIC, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    usual |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    if not BLOCK**2 <= low <= high or any(config.get(key, value) != value for key, value in usual.items()):
        raise UserError(
            f"{name}: the preprocessing in {folder} is not Qwen2.5-VL's (bicubic resize to at least {BLOCK**2} pixels, "
            f"normalised as CLIP's): {json.dumps(config)}; use the processor files of a Qwen2.5-VL model"
        )
    return QwenPreprocess(min_pixels=low, max_pixels=high)
