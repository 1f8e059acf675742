"""The cache goes back as far as its windows reach, and not a token further."""

import pytest
import torch
from harness import tiny

from vllm_yocou.reference import YocoUCache, YocoUForCausalLM

PROMPT = torch.tensor([tiny.prompt(40)])
TOO_FAR = r"tokens cannot be removed .* call activate_past_recording\(\) before"


@pytest.fixture(scope="module", params=[16, 1], ids="W{}".format)
def model(request) -> YocoUForCausalLM:
    return tiny.model(tiny.config(sliding_window=request.param)).double()


@torch.no_grad()
def filled(model: YocoUForCausalLM, tokens: int, recorded: bool) -> YocoUCache:
    cache = YocoUCache(model.config)
    if recorded:
        cache.activate_past_recording()
    model(PROMPT[:, :tokens], past_key_values=cache)
    return cache


@torch.no_grad()
def check(model: YocoUForCausalLM, cache: YocoUCache, kept: int) -> None:
    """The cache holds `kept` tokens, with which the rest of the prompt has the uncached logits."""
    assert cache.get_seq_length() == kept
    expected = model(PROMPT).logits[:, kept:]
    torch.testing.assert_close(model(PROMPT[:, kept:], past_key_values=cache).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("crops", [[-5], [-1, -3, 0, -2], [-30], [-99], [12]], ids=str)
def test_a_recorded_past_can_be_cropped(model, crops):
    cache, kept = filled(model, 30, recorded=True), 30
    for crop in crops:
        cache.crop(crop)
        kept = crop if crop > 0 else max(kept + crop, 0)
        if crop != crops[-1]:  # another forward pass, as generation has one between two crops
            with torch.no_grad():
                model(PROMPT[:, kept : kept + 3], past_key_values=cache)
            kept += 3
    check(model, cache, kept)


def test_a_cache_shorter_than_its_windows_can_be_cropped():
    model = tiny.model(tiny.config()).double()
    cache = filled(model, 9, recorded=False)
    cache.crop(-4)
    check(model, cache, 5)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_the_windows_have_dropped_cannot_be_cropped(recorded):
    model = tiny.model(tiny.config()).double()
    cache = filled(model, 30, recorded)
    cache.crop(0)  # drops what lies before the windows
    with pytest.raises(ValueError, match=f"^5 of 30 {TOO_FAR}"):
        cache.crop(-5)
    check(model, cache, 30)


def test_an_empty_cache_stays_empty(model):
    cache = YocoUCache(model.config)
    cache.crop(-3)
    check(model, cache, 0)
