"""HPSv3 (arXiv 2508.03789) on transformers' Qwen2VLModel: key map and published conventions.

- Positions are sequential (0, 1, 2, …) on all three rotary axes: as trained, not Qwen2-VL's own two-dimensional ones.
- The head runs in float32 over a backbone of any precision, on the hidden state at <|Reward|>. Attention is causal, so
  tokens after it are not computed.
- One sample at a time: without padding, scores are bit-identical in any batch. 8 G parameters over some 800 tokens
  keep a device busy without a batch.

Departures: texts of special tokens are removed from prompts; an image too narrow for a block of 28 pixels is an error,
while the published code continues with a size of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leapalign.errors import UserError, opening
from leapalign.rewards.base import Reward, check_ids, check_inputs, check_prompts, tried
from leapalign.rewards.preprocess import each
from leapalign.rewards.pretrained import find, load_tokenizer, read_json, torch_dtype
from leapalign.rewards.qwen_vl import Chat, Patches, QwenPreprocess, check_tokens, check_vision, read_template

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Qwen2VLConfig, Qwen2VLModel

FILE, REWARD_TOKEN = "HPSv3.safetensors", "<|Reward|>"
TEMPLATE = Path(__file__).with_name("prompt.txt")
PIXELS = 448 * 448  # area of every resized image
EMBEDDING = "model.embed_tokens.weight"  # the published name
WIDTHS = (1024, 16, 2)  # output widths of the head's three layers
DROPOUT = 0.05  # as in training; in eval mode it only keeps the published layer indices


class HPSv3Model(nn.Module):
    """Backbone and head: ids [L] and one image -> (mean, log standard deviation) [2]."""

    def __init__(self, backbone: Qwen2VLModel) -> None:
        super().__init__()
        self.backbone = backbone
        width: int = backbone.language_model.config.hidden_size
        self.rm_head = nn.Sequential(
            nn.Linear(width, WIDTHS[0]),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(WIDTHS[0], WIDTHS[1]),
            nn.ReLU(),
            nn.Linear(WIDTHS[1], WIDTHS[2]),
        )

    def forward(self, ids: Tensor, image: Patches) -> Tensor:
        """Score one image; `ids` ends with <|Reward|>, whose hidden state is read."""
        head: Any = self.rm_head[0]
        with KeepDouble() if head.weight.dtype == torch.float64 else nullcontext():
            return self.rm_head(self.hidden(ids, image).to(head.weight.dtype))

    def hidden(self, ids: Tensor, image: Patches) -> Tensor:
        """Return the last hidden state [width] of ids [L]."""
        backbone: Any = self.backbone  # transformers' annotations are narrower than its code
        device = backbone.device
        ids, grid = ids.to(device)[None], torch.tensor([image.grid], device=device)
        embeds = backbone.get_input_embeddings()(ids)
        tokens = backbone.get_image_features(image.values.to(device), grid)
        places = (ids == backbone.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(places, tokens.pooler_output[0].to(embeds.dtype))
        positions = torch.arange(ids.shape[1], device=device).expand(3, 1, -1)
        out = backbone.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        return out.last_hidden_state[0, -1]


class KeepDouble(TorchFunctionMode):
    """Keep float64 through norms and rotations, which transformers always computes in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lowers = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *(kwargs or {}).values()))
        if lowers and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, kw_only=True)
class HPSv3Reward(Reward):
    """HPSv3; see `leapalign.rewards.base.Reward`."""

    name: str
    model: HPSv3Model
    preprocess: QwenPreprocess
    reward_token_id: int
    chat: Chat | None  # None: ids only

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]: [B], differentiable."""
        check_inputs(self.name, images, prompts)
        patches = self.preprocess(images)
        return self.outputs(patches, self.tokenize(prompts, patches))[:, 0].to(images.device)

    def network(self) -> nn.Module:
        return self.model

    def score_ids(self, images: Tensor, input_ids: Sequence[Tensor]) -> Tensor:
        """Score whole chat texts given as rows of ids [L]: [B], differentiable. Ids after <|Reward|> are ignored."""
        check_ids(self.name, images, input_ids)
        return self.outputs(self.preprocess(images), input_ids)[:, 0].to(images.device)

    @torch.no_grad()  # the Pillow path only evaluates files
    def score_pil(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Score 8-bit images of any size through the reference preprocessing: [B]."""
        check_prompts(self.name, images, prompts)
        patches = each(images, self.preprocess.from_pil)
        return self.outputs(patches, self.tokenize(prompts, patches))[:, 0]

    def outputs(self, images: Sequence[Patches], input_ids: Sequence[Tensor]) -> Tensor:
        """Return (mean, log standard deviation) [B, 2] of B images with a row of ids each."""
        rows = [self.until_reward(ids, image) for ids, image in zip(input_ids, images)]
        return torch.stack([self.model(ids, image) for ids, image in zip(rows, images)])

    def until_reward(self, ids: Tensor, image: Patches) -> Tensor:
        """Return ids up to and including <|Reward|>. Raises ValueError without it, or for a wrong image token count."""
        ends = (ids == self.reward_token_id).nonzero()
        found = int((ids == self.model.backbone.config.image_token_id).sum())
        if len(ends) != 1 or found != image.num_tokens:
            raise ValueError(
                f"{self.name}: a row of ids has {len(ends)} reward tokens and {found} image tokens; "
                f"expected 1 and {image.num_tokens} for a grid of {image.grid[1]} x {image.grid[2]} patches"
            )
        return ids[: int(ends) + 1]

    def tokenize(self, prompts: Sequence[str], images: Sequence[Patches]) -> list[Tensor]:
        """Return each prompt's chat text as ids [L], with as many image tokens as its image needs."""
        if self.chat is None:
            raise UserError(f"{self.name}: loaded with prompts=False; only score_ids works. Load with prompts=True")
        return [self.chat(prompt, image.num_tokens) for prompt, image in zip(prompts, images)]


def load_hpsv3(name: str, path: str, processor: str, device: str, dtype: str, *, prompts: bool) -> HPSv3Reward:
    """Load published weights into the backbone that `processor` describes. Raises UserError on any mismatch."""
    known = torch_dtype(name, dtype)
    config, weights = load_config(name, processor), load_weights(name, path)
    vocabulary = len(weights[EMBEDDING])  # includes <|Reward|>, unlike config.json's number
    config.text_config.vocab_size = vocabulary
    chat = load_chat(name, processor, vocabulary, config.image_token_id) if prompts else None
    reward = HPSv3Reward(
        name=name,
        model=build_model(name, path, config, weights, known).to(device),
        preprocess=QwenPreprocess(min_pixels=PIXELS, max_pixels=PIXELS),
        reward_token_id=vocabulary - 1,
        chat=chat,
    )
    return tried(name, path, reward) if prompts else reward


def load_config(name: str, folder: str) -> Any:
    """Return the backbone's config as a Qwen2VLConfig."""
    from transformers import Qwen2VLConfig

    config = read_json(folder, "config.json")
    if config.get("model_type") != "qwen2_vl":
        raise UserError(
            f"{name}: no config.json of a Qwen2-VL model at {folder!r}; expected Qwen/Qwen2-VL-7B-Instruct as a local "
            "folder or as a hub id that can be reached (HF_HUB_OFFLINE=1 forbids it). Name it as `processor` "
            f"(--reward {name}=PATH,processor=FOLDER)"
        )
    check_vision(name, folder, config.get("vision_config", {}))
    with opening(f"{name}: config.json at {folder!r} is none of a Qwen2-VL model", "fetch it again"):
        return Qwen2VLConfig(**config)


def load_weights(name: str, path: str) -> dict[str, Tensor]:
    """Read the file's tensors by their published names, without the unused lm_head."""
    from safetensors import SafetensorError, safe_open

    file = path if Path(path).is_file() else find(path, FILE)
    if file is None:
        raise UserError(
            f"{name}: no {FILE} at {path!r}; expected that file, a local folder with it, or a hub id that can be "
            "reached (HF_HUB_OFFLINE=1 forbids it). Fetch it first, or give its folder (--reward hpsv3=FOLDER)"
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            weights = {key: tensors.get_tensor(key) for key in tensors.keys() if not key.startswith("lm_head.")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: {file} cannot be read as a safetensors file: {error}") from error
    if EMBEDDING not in weights:
        raise UserError(f"{name}: {file} has no {EMBEDDING}; expected the published {FILE}, with its own key names")
    return weights


def build_model(
    name: str, path: str, config: Qwen2VLConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> HPSv3Model:
    """Build it frozen, in eval mode, head in at least float32. Empties `weights`. Raises UserError on a mismatch."""
    from transformers import Qwen2VLModel

    head = {key: weights.pop(key) for key in list(weights) if key.startswith("rm_head.")}
    backbone = {renamed(key): weights.pop(key) for key in list(weights)}
    with opening(f"{name}: the backbone's config.json makes no model", "give that of the file's own backbone"):
        expected = expected_shapes(config)
    check_weights(name, path, expected, backbone | head)
    built: Any = Qwen2VLModel.from_pretrained(None, config=config, state_dict=backbone, dtype=dtype)
    model = HPSv3Model(built)
    model.rm_head.load_state_dict({key.removeprefix("rm_head."): value for key, value in head.items()})
    model.rm_head.to(torch.promote_types(dtype, torch.float32))
    return model.requires_grad_(False).eval()


def renamed(key: str) -> str:
    """Map a published key to transformers' Qwen2VLModel: model.layers.0… -> language_model.layers.0…"""
    return "language_model." + key.removeprefix("model.") if key.startswith("model.") else key


def check_weights(name: str, path: str, expected: dict[str, list[int]], weights: dict[str, Tensor]) -> None:
    for word, keys in (("lacks", expected.keys() - weights.keys()), ("has unknown", weights.keys() - expected.keys())):
        if keys:
            raise UserError(
                f"{name}: {path} {word} {len(keys)} weights, e.g. {min(keys)}; expected the published {FILE} and the "
                "config.json of its backbone, Qwen/Qwen2-VL-7B-Instruct"
            )
    for key, shape in expected.items():
        if list(weights[key].shape) != shape:
            raise UserError(
                f"{name}: {key} at {path} has shape {list(weights[key].shape)}, by config.json it is {shape}; "
                "name the folder of the file's own backbone as `processor`"
            )


def expected_shapes(config: Qwen2VLConfig) -> dict[str, list[int]]:
    """Return name -> shape of all weights of backbone and head, from the meta device."""
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        model = HPSv3Model(Qwen2VLModel(config))
    return {key.removeprefix("backbone."): list(weight.shape) for key, weight in model.state_dict().items()}


def load_chat(name: str, folder: str, vocabulary: int, image_token_id: int) -> Chat:
    """Load the backbone's tokenizer with <|Reward|> as last token, and the instruction."""
    tokenizer, template = load_tokenizer(name, folder, vocabulary), read_template(TEMPLATE)
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    if len(tokenizer) != vocabulary or tokenizer.convert_tokens_to_ids(REWARD_TOKEN) != vocabulary - 1:
        raise UserError(
            f"{name}: the tokenizer at {folder} has {len(tokenizer)} entries with {REWARD_TOKEN}, the weights "
            f"{vocabulary}; name the folder of Qwen/Qwen2-VL-7B-Instruct as `processor`"
        )
    check_tokens(name, folder, tokenizer, template, image_token_id)
    return Chat(tokenizer=tokenizer, template=template)
