"""Every example runs as its README line says, on the trained checkpoint."""

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch
from harness.checkout import ROOT, TRAINED

from benchmarks.server import user_environment

LIMIT = 12  # items of a task
MODEL_ARGUMENTS = (
    f"pretrained={TRAINED},dtype=float32,max_model_len=2048,max_num_batched_tokens=512,kv_cache_memory_bytes=268435456"
)

CHAT = "examples/inference/chat.py"


def run(*command: str, **settings) -> str:
    """Standard output of a program started from the root of the tree."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=600,
        **settings,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "features, dtype",
    [
        (["avx2"], "float32"),
        (["avx2", "avx512f"], "float32"),
        (["avx512f", "avx512_bf16"], "bfloat16"),
        (["amx_tile", "amx_bf16"], "bfloat16"),
        (["neon", "bf16"], "bfloat16"),
        ([], "float32"),
    ],
)
def test_serve_takes_the_type_that_the_processor_is_faster_in(features, dtype, monkeypatch):
    serve = SourceFileLoader("serve", str(ROOT / "examples" / "inference" / "serve.py")).load_module()
    monkeypatch.setattr(serve, "processor", lambda: {"features": features})
    command = serve.command(TRAINED, "127.0.0.1", 8000)
    assert command[command.index("--dtype") + 1] == dtype


def test_offline_generates_what_the_reference_generates(starts_vllm, nightly, reference, tokenizer):
    """Compiled, in a process of its own; test_features.py runs it eagerly."""
    prompts = ["In the beginning", "And Jesus said unto them,"]
    printed = run(sys.executable, "examples/inference/offline.py", TRAINED, *prompts)
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")
        generated = reference.generate(**tokens, max_new_tokens=40, do_sample=False)[0, tokens.input_ids.shape[1] :]
        assert f"{prompt!r} -> {tokenizer.decode(generated, skip_special_tokens=True)!r}" in printed


def test_chat_holds_a_conversation(server):
    said = "And God said, Let there be light: and there was light.\nAnd God saw the light, that it was good.\n"
    printed = run(
        sys.executable, "examples/inference/chat.py", "--url", f"{server.url}/v1", "--temperature", "0", input=said
    )
    answers = printed.strip().splitlines()
    assert len(answers) == 2 and all(len(answer.split()) > 3 for answer in answers)


def test_chat_says_when_there_is_no_server():
    lost = subprocess.run(
        [sys.executable, "examples/inference/chat.py", "--url", "http://127.0.0.1:1/v1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert lost.returncode == 2
    assert lost.stderr.startswith("no server answers at http://127.0.0.1:1/v1: start one with 'make serve'")


@pytest.fixture(scope="module")
def evaluated(starts_vllm, nightly, tmp_path_factory) -> dict:
    """All tasks of examples/evaluation in one engine start: task -> (results, samples)."""
    run(sys.executable, "examples/evaluation/fetch.py")
    folder, tasks = (
        tmp_path_factory.mktemp("lm_eval"),
        ["kjv_next_verse", "kjv_last_word", "piqa_local", "niah_single_1"],
    )
    lm_eval = Path(sys.executable).parent / "lm_eval"
    command = [lm_eval, "--model", "vllm", "--model_args", MODEL_ARGUMENTS, "--include_path", "examples/evaluation"]
    command += ["--tasks", ",".join(tasks), "--metadata", '{"max_seq_lengths":[512]}', "--limit", str(LIMIT)]
    run(*command, "--batch_size", "auto", "--log_samples", "--output_path", folder)
    (results,) = folder.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    samples = {task: next(folder.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines() for task in tasks}
    return {task: (scores[task], [json.loads(line) for line in samples[task]]) for task in tasks}


def check_choices(scores: dict, samples: list[dict], reference, tokenizer) -> None:
    """Each choice's log likelihood is the reference's, and the accuracy follows from them."""
    right = 0
    for sample in samples:
        ours = []
        for request, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, continuation = request["arg_0"], request["arg_1"]
            tokens = tokenizer.encode(context + continuation)
            start = len(tokenizer.encode(context))
            with torch.inference_mode():
                rows = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
            ours.append(sum(rows[position - 1, tokens[position]].item() for position in range(start, len(tokens))))
            assert abs(ours[-1] - float(response[0][0])) < 1e-2
        right += ours.index(max(ours)) == int(sample["target"])
    assert scores["acc,none"] == pytest.approx(right / len(samples))


def check_words(scores: dict, samples: list[dict], reference, tokenizer) -> None:
    """Each answer is what the reference generates, and the score follows from them."""
    for sample in samples:
        tokens = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"], return_tensors="pt")
        generated = reference.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens.input_ids.shape[1] :]
        expected = tokenizer.decode(generated, skip_special_tokens=True).split("\n")[0]
        assert sample["resps"][0][0] == expected
    right = sum(sample["filtered_resps"][0].lower() == sample["target"].lower() for sample in samples)
    assert scores["exact_match,first-word"] == pytest.approx(right / len(samples))


@pytest.mark.parametrize("task", ["kjv_next_verse", "piqa_local"])
def test_multiple_choice_scores_are_the_references_log_likelihoods(evaluated, reference, tokenizer, task):
    scores, samples = evaluated[task]
    assert len(samples) == LIMIT
    check_choices(scores, samples, reference, tokenizer)


def test_generation_tasks_score_what_the_reference_generates(evaluated, reference, tokenizer):
    scores, samples = evaluated["kjv_last_word"]
    assert len(samples) == LIMIT
    check_words(scores, samples, reference, tokenizer)
    retrieval, samples = evaluated["niah_single_1"]
    found = sum(all(needle in sample["resps"][0][0] for needle in sample["doc"]["outputs"]) for sample in samples)
    assert len(samples) == LIMIT and retrieval["512,none"] == pytest.approx(found / LIMIT)
