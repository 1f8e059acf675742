"""Reinforcement learning: what a step computes, and how its weights reach an engine that serves requests."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.checkout import ROOT, TRAINED, training_example
from harness.engines import generate
from harness.oracle import agrees
from vllm.outputs import WeightVersionSpan

from benchmarks.server import user_environment
from vllm_yocou.reference import YocoUForCausalLM

PROMPT = tiny.prompt(300)


@pytest.fixture(scope="module")
def rl():
    with training_example("rl") as module:
        yield module


@pytest.fixture(scope="module")
def old_and_new():
    return [tiny.model(tiny.config(), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def llm(rl, module_engine, old_and_new, tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    old_and_new[0].save_pretrained(folder)
    settings = {"weight_transfer_config": {"backend": rl.bucket_transfer.BACKEND}}
    return module_engine(folder, kv_cache_memory_bytes=16 << 20, **settings)


@pytest.fixture
def renew(rl, llm, old_and_new):
    """Sends the weights of `old_and_new` in several buckets; the engine begins with the old ones."""
    client = rl.bucket_transfer.OfflineClient(llm)
    senders = [rl.bucket_transfer.sender(model, client, bucket_bytes=100_000) for model in old_and_new]

    def send(which: int, version: str) -> None:
        rl.bucket_transfer.renew(senders[which], llm, version)

    send(0, "old")
    return send


def spans(output) -> list[tuple[str, int, int]]:
    return [(span.version, span.start, span.end) for span in output.outputs[0].weight_versions]


def test_no_answer_of_new_weights_has_a_stale_hit(llm, renew, old_and_new):
    (first,), (again,) = generate(llm, [PROMPT]), generate(llm, [PROMPT])
    assert again.num_cached_tokens >= 128  # so that there is something stale to hit
    renew(1, "new")
    (renewed,), (hit,) = generate(llm, [PROMPT]), generate(llm, [PROMPT])
    assert renewed.num_cached_tokens == 0 and hit.num_cached_tokens == again.num_cached_tokens
    agrees(old_and_new[0], [PROMPT] * 2, [first, again])
    agrees(old_and_new[1], [PROMPT] * 2, [renewed, hit])
    assert [spans(output) for output in (first, again, renewed, hit)] == [[("old", 0, 12)]] * 2 + [[("new", 0, 12)]] * 2


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_request_under_way_goes_on_with_the_new_weights(rl, llm, renew, old_and_new, is_paused):
    """Paused by vLLM's mode "keep" or not; its output tells which weights have sampled which tokens."""
    engine, outputs = llm.llm_engine, []
    parameters = rl.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5, detokenize=False)
    engine.add_request("under way", {"prompt_token_ids": PROMPT}, parameters)
    while not outputs or len(outputs[-1].outputs[0].token_ids) < 5:
        outputs += engine.step()
    if is_paused:
        llm.sleep(level=0, mode="keep")
        assert not engine.step()
    renew(1, "new")
    if is_paused:
        assert not engine.step()
        llm.wake_up(tags=["scheduling"])
    while engine.has_unfinished_requests():
        outputs += engine.step()
    finished = outputs[-1]
    (_, _, change), _ = spans(finished)
    assert spans(finished) == [("old", 0, change), ("new", change, 12)] and 5 <= change <= 6
    answer = finished.outputs[0]
    for model, prompt, sampled in (
        (old_and_new[0], PROMPT, slice(0, change)),
        (old_and_new[1], [*PROMPT, *answer.token_ids[:change]], slice(change, 12)),
    ):
        part = SimpleNamespace(token_ids=answer.token_ids[sampled], logprobs=answer.logprobs[sampled])
        agrees(model, [prompt], [SimpleNamespace(outputs=[part], prompt_logprobs=None)])


def outputs_of(model, prompts, versions=("v",)) -> list:
    """What vLLM would say of two verses for each prompt, of which the first ends in time."""
    made = []
    for prompt in prompts:
        verses = []
        for length, text, reason in ((4, "He came.", "stop"), (6, "He came and.", "length")):
            tokens = tiny.prompt(length, seed=length)
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *tokens]])
                rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logprobs = [{t: SimpleNamespace(logprob=row[t].item())} for t, row in zip(tokens, rows, strict=True)]
            weights = [WeightVersionSpan(version, 0, length) for version in versions]
            it = dict(text=text, token_ids=tokens, logprobs=logprobs, finish_reason=reason, weight_versions=weights)
            verses.append(SimpleNamespace(**it))
        made.append(SimpleNamespace(prompt_token_ids=prompt, outputs=verses))
    return made


def test_the_rule(rl):
    assert rl.reward("And he died.", True) == 1
    assert rl.reward("And he died.", False) == rl.reward("And he died:", True) == rl.reward("", True) == 0


def test_a_step_makes_rewarded_verses_likelier(rl):
    model = tiny.model(tiny.config())
    samples = rl.score(outputs_of(model, [tiny.prompt(3), tiny.prompt(5)]), "v")
    assert samples.ids.shape == (4, 11) and samples.is_sampled.sum(1).tolist() == [4, 6, 4, 6]
    assert samples.rewards.tolist() == [1, 0, 1, 0] and samples.advantages.tolist() == [1, -1, 1, -1]

    def likelihood() -> torch.Tensor:
        with torch.no_grad():
            return (rl.logprobs(model, samples.ids) * samples.is_sampled).sum(1)

    before = likelihood()
    torch.testing.assert_close(before, samples.logprobs.sum(1))
    assert abs(rl.drift(model, samples)) < 1e-5
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    divergence, ratio = rl.improve(model, optimizer, samples, passes=1)
    assert abs(divergence) < 1e-6 and 1 <= ratio < 1.0001
    gained = likelihood() - before
    assert (gained[::2] > 0).all() and (gained[1::2] < 0).all()
    divergence, ratio = rl.improve(model, optimizer, samples, passes=1)
    assert divergence > 1e-6 and ratio > 1.0001  # the engine's weights are old by now


def test_a_clipped_ratio_gives_no_gradient(rl):
    model = tiny.model(tiny.config())
    samples = rl.score(outputs_of(model, [tiny.prompt(3)]), "v")
    samples.logprobs -= torch.where(samples.advantages > 0, 1.0, -1.0)[:, None] * samples.is_sampled
    before = model.model.norm.weight.clone()
    rl.improve(model, torch.optim.SGD(model.parameters(), lr=1.0), samples, passes=1)
    assert torch.equal(model.model.norm.weight, before)


@pytest.mark.parametrize("versions", [("old",), ("old", "v"), ()])
def test_samples_of_other_weights_are_refused(rl, versions):
    model = tiny.model(tiny.config())
    with pytest.raises(RuntimeError, match="a verse was sampled with the weights"):
        rl.score(outputs_of(model, [tiny.prompt(3)], versions), "v")


def test_the_reward_rises_and_what_is_learned_is_saved(starts_vllm, nightly, tmp_path):
    command = [sys.executable, ROOT / "examples" / "training" / "rl.py", "--output", tmp_path, "--prompts", "4"]
    done = subprocess.run(command, env=user_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.e+-]+) +([\d.]+) +(-?[\d.]+) ", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(10))
    assert all(abs(float(divergence)) < 1e-6 and float(ratio) < 1.001 for _, _, divergence, ratio, _ in rows)
    assert float(rows[0][4]) == 0 and float(rows[-1][4]) > 0.1
    first, last = re.search(r"reward: ([\d.]+) at the first step, ([\d.]+) over the last 3", printed).groups()
    assert float(last) > float(first) + 0.3
    saved, start = (YocoUForCausalLM.from_pretrained(it, dtype=torch.float32) for it in (tmp_path, TRAINED))
    assert not torch.equal(saved.model.embed_tokens.weight, start.model.embed_tokens.weight)
