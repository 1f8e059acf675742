"""The trained checkpoint behind `vllm serve`: what clients see, compared with the reference model."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from harness.checkout import TRAINED
from harness.clients import VERSE, complete, greedy

TOLERANCE = 1e-3  # |Δlogprob|; the exact bound is held by test_model, this one tells a right answer from a wrong one


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def metric(server, name: str) -> float:
    return sum(server.metric(name).values())


def test_greedy_completion_is_the_references(client, server, tokenizer, reference):
    prompt = tokenizer.encode(VERSE)
    answer = complete(client, server, prompt, 30)
    assert answer.choices[0].token_ids == greedy(reference, prompt, 30)


def test_logprobs_of_prompt_and_completion(client, server, tokenizer, reference):
    prompt = tokenizer.encode(f"Genesis 11\n{VERSE}")
    choice = complete(client, server, prompt, 12, logprobs=1, echo=True).choices[0]
    tokens = [*prompt, *choice.token_ids]
    with torch.inference_mode():
        rows = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    served = choice.logprobs.token_logprobs
    assert served[0] is None and len(served) == len(tokens)
    for position, value in enumerate(served[1:], start=1):
        assert abs(value - rows[position - 1, tokens[position]].item()) < TOLERANCE


def test_many_requests_at_once_are_each_the_references(client, server, tokenizer, reference):
    items = (TRAINED.parent / "evaluation" / "kjv_last_word.jsonl").read_text().splitlines()
    text = tokenizer.encode("\n".join(json.loads(item)["context"] for item in items))
    prompts = [text[start : start + length] for start, length in enumerate([1, 2, 63, 64, 65, 129, 300, 700, 1400] * 2)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(client, server, prompt, 8), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.choices[0].token_ids == greedy(reference, prompt, 8)


def test_chat_uses_the_template_and_streams_the_same_text(client, server, tokenizer, reference):
    messages = [{"role": "user", "content": "And God said, Let there be light: and there was light."}]
    settings = dict(model=server.model, messages=messages, max_tokens=40, temperature=0)
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(**settings, stream=True)
    pieces = [event.choices[0].delta.content or "" for event in stream if event.choices]
    assert len(pieces) > 3 and "".join(pieces) == whole.choices[0].message.content
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = tokenizer.decode(greedy(reference, prompt, 40)).split("<|end|>")[0]
    assert whole.choices[0].message.content == expected
    assert whole.usage.prompt_tokens == len(prompt)


def test_a_repeated_prompt_hits_the_prefix_cache(client, server, tokenizer):
    prompt = tokenizer.encode(VERSE) * 100
    hits = metric(server, "vllm:prefix_cache_hits_total")
    first, second = (complete(client, server, prompt[:1000], 5).choices[0].token_ids for _ in range(2))
    assert first == second
    assert metric(server, "vllm:prefix_cache_hits_total") - hits >= 512


def test_prompts_skip_the_cross_decoder_and_metrics_say_so(client, server, tokenizer):
    names = [f"vllm:yocou_{rows}_rows_total" for rows in ("self_decoder", "cross_decoder", "skipped")]
    before = [metric(server, name) for name in names]
    prompt = tokenizer.encode(VERSE, add_special_tokens=False) * 20
    complete(client, server, prompt, 5)
    complete(client, server, prompt[1:], 5, logprobs=1, echo=True)
    moved = [metric(server, name) - old for name, old in zip(names, before, strict=True)]
    both, scored = 2 * len(prompt) - 1 + 8, len(prompt) - 1
    assert moved == [both, scored + 1 + 8, both - scored - 9]


def test_structured_output_beside_scored_prompts(client, server, tokenizer, reference):
    """A grammar after a prompt of several chunks, echoed log probabilities and a plain request in one batch."""
    prompt = tokenizer.encode(VERSE)
    choice = {"structured_outputs": {"choice": ["the LORD", "the king"]}}
    settings = dict(model=server.model, prompt=VERSE, temperature=0, max_tokens=12)
    with ThreadPoolExecutor(3) as pool:
        chosen = pool.submit(client.completions.create, **settings | {"prompt": prompt * 90}, extra_body=choice)
        echoed = pool.submit(complete, client, server, prompt * 30, 12, logprobs=1, echo=True)
        plain = pool.submit(complete, client, server, prompt, 12)
    assert chosen.result().choices[0].text in ("the LORD", "the king")
    assert plain.result().choices[0].token_ids == greedy(reference, prompt, 12)
    assert echoed.result().choices[0].token_ids == greedy(reference, prompt * 30, 12)


def test_an_aborted_stream_leaves_nothing_behind(client, server):
    settings = dict(model=server.model, prompt=VERSE, max_tokens=1900, temperature=0, stream=True)
    stream = client.completions.create(**settings, extra_body={"ignore_eos": True})
    for _ in zip(range(5), stream, strict=False):
        pass
    assert metric(server, "vllm:num_requests_running") == 1
    stream.close()
    deadline = time.monotonic() + 20
    while metric(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


BAD = [
    (dict(prompt=[5] * 2049, max_tokens=1), "2048"),
    (dict(prompt="In", max_tokens=-1), "max_tokens"),
    (dict(prompt="In", temperature=-1.0), "temperature"),
    (dict(prompt=[4096], max_tokens=1), "vocab"),
    (dict(prompt="In", model="nobody"), "nobody"),
    (dict(prompt="In", seed=1, temperature=1.0), "seed cannot be used"),
]


@pytest.mark.parametrize(
    "request_, word", BAD, ids=["too-long", "max-tokens", "temperature", "token-id", "model", "seed"]
)
def test_bad_requests_get_a_sentence(client, server, request_, word):
    with pytest.raises(openai.APIStatusError) as refusal:
        client.completions.create(**dict(model=server.model) | request_)
    assert 400 <= refusal.value.status_code < 500
    assert word in refusal.value.message
    assert complete(client, server, [5] * 1500, 1, seed=1).choices[0].token_ids  # still alive; greedy needs no seed
