"""The prompt cache: encoded once, text encoders in memory only while there is something to encode."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from leapalign.models.base import Text
from leapalign.models.flux import Flux
from leapalign.models.prompt_embeds.cache import BATCH, PromptCache
from leapalign.models.sd3 import SD3


class Loads:
    """Counts loads, keeps what it was asked to encode; a prompt's row is its length."""

    def __init__(self) -> None:
        self.loads, self.encoded = 0, []

    def __call__(self) -> Callable[[list[str]], Text]:
        self.loads += 1

        def encode(prompts: list[str]) -> Text:
            self.encoded.append(prompts)
            lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
            return Text(lengths[:, None, None].expand(-1, 2, 3), lengths[:, None].expand(-1, 4))

        return encode


def test_each_prompt_is_encoded_once_and_rows_keep_their_order() -> None:
    loads = Loads()
    cache = PromptCache(loads, "cpu")
    cache.prepare(["a", "abc", "a"])
    rows = cache(["abc", "a", "abc"])
    assert rows.tokens[:, 0, 0].tolist() == rows.pooled[:, 0].tolist() == [3, 1, 3]
    assert rows.tokens.shape == (3, 2, 3)
    assert [list(dict.fromkeys(batch)) for batch in loads.encoded] == [["a", "abc"]] and loads.loads == 1


def test_every_batch_has_the_same_size_and_no_prompt_is_lost() -> None:
    loads = Loads()
    prompts = ["x" * n for n in range(2 * BATCH + 3)]
    rows = PromptCache(loads, "cpu")(prompts)
    assert rows.pooled[:, 0].tolist() == list(range(2 * BATCH + 3))
    assert [len(batch) for batch in loads.encoded] == [BATCH] * 3


def test_encoders_are_freed_and_come_back_for_new_prompts() -> None:
    loads = Loads()
    cache = PromptCache(loads, "cpu")
    cache.prepare(["a"])
    assert not cache.holds_encoders
    cache(["a"])
    assert loads.loads == 1 and not cache.holds_encoders
    cache(["new"])
    cache(["newer"])
    assert loads.loads == 2 and cache.holds_encoders  # kept for the next new prompt
    cache.prepare([])
    assert not cache.holds_encoders


def test_prepare_without_new_prompts_loads_nothing() -> None:
    loads = Loads()
    cache = PromptCache(loads, "cpu")
    cache.prepare(["a"])
    cache.prepare(["a"])
    assert loads.loads == 1


def test_text_encoders_really_leave_memory(sd3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPTextModelWithProjection

    alive: list[weakref.ref] = []
    original = CLIPTextModelWithProjection.forward

    def forward(self: CLIPTextModelWithProjection, *args: object, **kwargs: object) -> object:
        alive.append(weakref.ref(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModelWithProjection, "forward", forward)
    model = SD3(path=sd3_folder, height=16, width=16, max_sequence_length=5).load("cpu", "float32")
    assert not alive  # nothing is encoded, or loaded for it, before it is asked for
    model.prepare(["a red circle"])
    assert len(alive) == 2 and not any(reference() for reference in alive)  # both CLIP encoders ran, and are gone


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_new_prompts_after_prepare_are_encoded_as_before(family: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit, whatever was encoded together: what a resumed run and an evaluation rely on."""
    config = {"sd3": SD3, "flux": Flux}[family]
    settings = {"path": request.getfixturevalue(f"{family}_folder"), "height": 16, "width": 16}
    first, second = (config(**settings, max_sequence_length=5).load("cpu", "float32") for _ in range(2))
    first.prepare([*(f"{n} circle" for n in range(BATCH)), "a red circle", "two blue star", "green"])
    second.prepare(["green"])
    a, b = first.encode(["two blue star", "green"]), second.encode(["two blue star", "green"])
    assert torch.equal(a.prompts.tokens, b.prompts.tokens) and torch.equal(a.prompts.pooled, b.prompts.pooled)
    assert not torch.equal(a.prompts.tokens[0], a.prompts.tokens[1])
    assert not a.prompts.tokens.requires_grad


def test_negative_prompt_is_prepared_with_the_others(sd3_folder: str) -> None:
    settings = {"path": sd3_folder, "height": 16, "width": 16, "max_sequence_length": 5, "negative_prompt": "blurry"}
    model = SD3(**settings, guidance_scale=2.0).load("cpu", "float32")
    model.prepare(["green"])
    conditioning = model.encode(["green"])
    assert not model.prompts.holds_encoders and conditioning.negative is not None
    assert torch.equal(conditioning.negative.tokens, model.prompts(["blurry"]).tokens)
    assert SD3(**settings, guidance_scale=1.0).load("cpu", "float32").encode(["green"]).negative is None


def test_text_encoders_are_bfloat16_with_a_bfloat16_model(flux_folder: str) -> None:
    config = Flux(path=flux_folder, height=16, width=16, max_sequence_length=5)
    assert config.load("cpu", "bfloat16").encode(["green"]).prompts.tokens.dtype == torch.bfloat16
    assert config.load("cpu", "float32").encode(["green"]).prompts.tokens.dtype == torch.float32
