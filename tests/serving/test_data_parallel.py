"""Two engines behind one server, and vLLM's own parsers on what they say: made to say it, by a grammar."""

import json

import openai
import pytest
from harness.checkout import serving
from harness.clients import VERSE, complete, greedy

from vllm_yocou.seams.check import named, vllm_version
from vllm_yocou.workarounds import FAULTY_IN

TOOL = {
    "type": "function",
    "function": {
        "name": "find_verse",
        "parameters": {
            "type": "object",
            "properties": {"book": {"type": "string", "enum": ["Genesis", "Exodus"]}, "chapter": {"enum": [1, 2]}},
            "required": ["book", "chapter"],
            "additionalProperties": False,
        },
    },
}
ASK = [{"role": "user", "content": "In the beginning?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory, both_cores):
    settings = ["--data-parallel-size", "2", "--enforce-eager"]
    settings += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "granite"]
    settings += ["--structured-outputs-config", '{"enable_in_reasoning": true}']
    with pytest.MonkeyPatch.context() as patch:
        if named(vllm_version()[:2]) in FAULTY_IN["refuse_engines_without_memory_node"]:
            patch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
        with serving(tmp_path_factory.mktemp("two-engines"), *settings) as started:
            yield started


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_both_engines_answer_as_the_reference(client, server, tokenizer, reference):
    prompt = tokenizer.encode(VERSE)
    expected = greedy(reference, prompt, 12)
    for _ in range(6):
        assert complete(client, server, prompt, 12).choices[0].token_ids == expected
    # Every engine has requests of its own, and says of each what it skipped.
    answered = server.metric("vllm:e2e_request_latency_seconds_count")
    skipped = server.metric("vllm:yocou_skipped_rows_total")
    assert set(answered) == set(skipped) == {"0", "1"} and sum(answered.values()) == 6
    assert all(0 < skipped[engine] <= answered[engine] * (len(prompt) - 1) for engine in answered)


def test_engines_skip_beside_each_other_and_beside_an_idle_one(client, server, tokenizer, reference):
    """Each request goes to the engine that it names; neither text begins as another does that an engine has seen."""
    long = tokenizer.encode("Now therefore give not your daughters unto their sons, neither take their daughters: " * 3)
    short = tokenizer.encode("Blessed are the meek")

    def to(engine: int) -> dict:
        return {"extra_headers": {"X-data-parallel-rank": str(engine)}}

    def moved(name: str, before: dict) -> list[float]:
        return [server.metric(name)[engine] - before[engine] for engine in "01"]

    for engine in (0, 1):  # whose counters are there from its first request on
        complete(client, server, [engine + 5, 7], 1, **to(engine))
    rows, skipped = "vllm:yocou_cross_decoder_rows_total", "vllm:yocou_skipped_rows_total"
    ran, left_out = server.metric(rows), server.metric(skipped)
    stream = complete(client, server, short, 60, stream=True, **to(1))
    tokens = list(next(stream).choices[0].token_ids)  # from now on it is in decode
    assert complete(client, server, long, 2, **to(0)).choices[0].token_ids == greedy(reference, long, 2)
    tokens += [token for part in stream for token in part.choices[0].token_ids or []]
    assert tokens == greedy(reference, short, 60)
    assert (moved(rows, ran), moved(skipped, left_out)) == ([2, 60], [len(long) - 1, len(short) - 1])
    assert complete(client, server, long[1:], 2, **to(0)).choices[0].token_ids == greedy(reference, long[1:], 2)
    assert (moved(rows, ran), moved(skipped, left_out)) == ([4, 60], [2 * len(long) - 3, len(short) - 1])


def test_the_tool_parser_finds_calls_in_the_text(client, server):
    text = '<tool_call>\n{"name": "find_verse", "arguments": {"book": "Exodus", "chapter": 2}}\n</tool_call>'
    settings = dict(model=server.model, messages=ASK, tools=[TOOL], temperature=0, max_tokens=120)
    answer = client.chat.completions.create(**settings, extra_body={"structured_outputs": {"choice": [text]}})
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"book": "Exodus", "chapter": 2}


def test_the_reasoning_parser_splits_the_text(client, server):
    text = "Here is my thought process: light. Here is my response: And there was light."
    settings = dict(model=server.model, messages=ASK, temperature=0, max_tokens=120)
    answer = client.chat.completions.create(**settings, extra_body={"structured_outputs": {"choice": [text]}})
    message = answer.choices[0].message
    assert message.reasoning.strip() == "light." and message.content.strip() == "And there was light."
