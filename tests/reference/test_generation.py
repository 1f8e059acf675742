"""transformers' ways to generate() end in the tokens of plain greedy decoding, or in one sentence."""

import pytest
import torch
from harness import tiny
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from vllm_yocou.reference import YocoUCache, YocoUForCausalLM

PROMPT = torch.tensor([tiny.prompt(19) * 3])  # it repeats, so that prompt lookup finds candidates
GREEDY = dict(max_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module", params=[16, 1], ids="W{}".format)
def model(request) -> YocoUForCausalLM:
    return tiny.model(tiny.config(sliding_window=request.param))


@pytest.fixture(scope="module")
def plain(model) -> list[list[int]]:
    """Tokens without any cache."""
    return model.generate(PROMPT, **GREEDY, use_cache=False).tolist()


@pytest.mark.parametrize("given", [False, True], ids=["own cache", "given cache"])
@pytest.mark.parametrize(
    "way", [dict(prompt_lookup_num_tokens=3), dict(prefill_chunk_size=7)], ids=["prompt lookup", "chunked prefill"]
)
def test_prompt_lookup_and_chunked_prefill_are_greedy_decoding(model, plain, way, given):
    cache = dict(past_key_values=YocoUCache(model.config)) if given else {}
    assert model.generate(PROMPT, **GREEDY, **way, **cache).tolist() == plain


@pytest.mark.parametrize("seed", [0, 1], ids=["always right", "mostly wrong"])
def test_assisted_generation_is_greedy_decoding(model, plain, seed):
    """The assistant's cache outlives its own windows: it goes back by each candidate that the model rejects."""
    assistant = tiny.model(model.config, seed)
    assert model.generate(PROMPT, **GREEDY, assistant_model=assistant).tolist() == plain
    given = YocoUCache(model.config)
    assert model.generate(PROMPT, **GREEDY, assistant_model=assistant, past_key_values=given).tolist() == plain


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_other_caches_of_transformers_are_refused(kind):
    model = tiny.model(tiny.config())
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}' cannot be used with YOCO-U: .*, leave it out"):
        model.generate(PROMPT, **GREEDY, cache_implementation=kind)


def test_continuous_batching_is_refused():
    settings = dict(
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(default_compile_level=0),
    )
    with pytest.raises(ValueError, match=r"continuous batching .*generate_batch.* cannot be used .* call generate\(\)"):
        tiny.model(tiny.config()).generate_batch(PROMPT.tolist(), **settings)
