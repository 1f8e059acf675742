"""How exact a GPU is: log probabilities and greedy tokens of a checkpoint in vLLM, next to the reference on the CPU.

float32 is compared with the reference in float32, whose own error is its difference from float64. bfloat16 is compared
with float64 of the same rounded weights; the reference's own error is then the difference of its bfloat16 from that.
"""

import os
import tempfile
from pathlib import Path

# Triton reads the precision where it compiles a kernel, and its cache does not tell kernels of another one apart.
os.environ["TRITON_F32_DEFAULT"] = "ieee"
os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"yocou-bench-triton-ieee-{os.getuid()}"))
from benchmarks.engine import SHARE, stop

import argparse
import copy
import gc
import statistics
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.metrics.reader import Counter

from benchmarks.console import progress, publish
from benchmarks.promises import MARGIN
from benchmarks.results import ROOT, Result
from benchmarks.tables.gpu import (
    COMPARED,
    GREEDY,
    LARGEST,
    MEDIAN,
    OTHERS,
    OWN_LARGEST,
    OWN_MEDIAN,
    SKIPPED,
    TO_SKIP,
)
from vllm_yocou.reference import YocoUForCausalLM

NAME_OF_SKIPPED = "vllm:yocou_skipped_rows"
CHECKPOINT = ROOT / "examples" / "yoco-u-kjv"
LENGTHS = (1, 2, 3, 31, 32, 33, 63, 64, 65, 95, 129, 193, 350)
SIZES = [1, 2, 4, 8, 16, 24, 32, 40]  # of CUDA graphs
COMMON: dict[str, Any] = dict(max_model_len=1024, max_num_batched_tokens=40, max_num_seqs=8)
EAGER = dict(enforce_eager=True)
GRAPHS = dict(compilation_config={"cudagraph_capture_sizes": SIZES})
TRITON = dict(attention_backend="TRITON_ATTN")
# (dtype, run) -> engine settings. FlashAttention has no float32.
RUNS: dict[tuple[str, str], dict[str, Any]] = {
    ("float32", "eager, TRITON_ATTN"): EAGER | TRITON,
    ("float32", "graphs, TRITON_ATTN"): GRAPHS | TRITON,
    ("bfloat16", "eager, TRITON_ATTN"): EAGER | TRITON,
    ("bfloat16", "eager, vLLM's choice of backend"): EAGER,
    ("bfloat16", "graphs, vLLM's choice of backend"): GRAPHS,
}
SCENARIOS = {"mixed lengths": 12, "the same with prompt_logprobs on every second one": 12, "decode": 60}


class Reference:
    """The checkpoint's model on the CPU, in the dtype that is served and in float64."""

    def __init__(self, checkpoint: Path, dtype: str):
        self.single = YocoUForCausalLM.from_pretrained(str(checkpoint), dtype=getattr(torch, dtype)).eval()
        self.double = copy.deepcopy(self.single).double()
        self.exact_is_double = dtype != "float32"

    @torch.inference_mode()
    def log_probabilities(self, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, vocab_size) that served ones are compared with, and (N, vocab_size) in the other precision."""
        ids = torch.tensor([token_ids])
        single = self.single(ids).logits[0].float().log_softmax(-1).double()
        double = self.double(ids).logits[0].log_softmax(-1)
        return (double, single) if self.exact_is_double else (single, double)


class Comparison:
    """The differences of one scenario, and its greedy tokens where the reference's choice is clear."""

    def __init__(self) -> None:
        self.served: list[float] = []
        self.own: list[float] = []
        self.largest_own = 0.0
        self.tokens = self.others = 0

    def add(self, reference: Reference, prompt: list[int], output: Any) -> None:
        """Add vLLM's RequestOutput for a prompt; it has log probabilities of its tokens and perhaps of the prompt's."""
        completion = output.outputs[0]
        expected, other = reference.log_probabilities([*prompt, *completion.token_ids])
        entries = [(position - 1, served) for position, served in enumerate(output.prompt_logprobs or []) if served]
        for step, (token, served) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            row = expected[len(prompt) - 1 + step]
            best, second = row.topk(2).values
            self.tokens += 1
            self.others += bool(token != row.argmax() and best - second > MARGIN)
            entries.append((len(prompt) - 1 + step, served))
        for position, served in entries:
            for token, entry in served.items():
                self.served.append(abs(entry.logprob - expected[position, token].item()))
                self.own.append(abs(other[position, token].item() - expected[position, token].item()))
        self.largest_own = max(self.largest_own, (expected - other).abs().max().item())


def skipped_rows(llm: LLM) -> int:
    return sum(one.value for one in llm.get_metrics() if isinstance(one, Counter) and one.name == NAME_OF_SKIPPED)


def check(llm: LLM, reference: Reference, scenario: str) -> dict[tuple[str, str], float]:
    """Generate the scenario's answers and compare them; the figures by name and unit."""
    tokens, scored = SCENARIOS[scenario], "prompt_logprobs" in scenario
    lengths = [40] * 8 if scenario == "decode" else LENGTHS
    vocabulary = llm.model_config.get_vocab_size()
    torch.manual_seed(len(scenario))
    prompts = [torch.randint(vocabulary, (length,)).tolist() for length in lengths]
    common: dict[str, Any] = dict(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5, detokenize=False)
    wanted = [scored and number % 2 == 0 for number in range(len(prompts))]
    parameters = [SamplingParams(**common, prompt_logprobs=2 if one else None) for one in wanted]
    before, seen = skipped_rows(llm), Comparison()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], parameters, use_tqdm=False)
    skipped = skipped_rows(llm) - before
    for ids, output in zip(prompts, outputs, strict=True):
        seen.add(reference, ids, output)
    found: dict[tuple[str, str], float] = {
        (COMPARED, ""): len(seen.served),
        (GREEDY, "tokens"): seen.tokens,
        (OTHERS, "tokens"): seen.others,
        (LARGEST, "nats"): max(seen.served),
        (OWN_LARGEST, "nats"): max(seen.own) if reference.exact_is_double else seen.largest_own,
        (MEDIAN, "nats"): statistics.median(seen.served),
    }
    if reference.exact_is_double:
        found[OWN_MEDIAN, "nats"] = statistics.median(seen.own)
    to_skip = sum(len(ids) - 1 for ids, one in zip(prompts, wanted, strict=True) if not one)
    return found | {(SKIPPED, "rows"): skipped, (TO_SKIP, "rows"): to_skip}


def run(checkpoint: Path, dtype: str, settings: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Run every scenario on one engine; by name and unit, a value for each scenario."""
    reference = Reference(checkpoint, dtype)
    more: dict[str, Any] = dict(disable_log_stats=False, kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False)
    more |= dict(skip_tokenizer_init=True, dtype=dtype)
    llm = LLM(str(checkpoint), **SHARE | COMMON | more | settings)
    checks = [check(llm, reference, scenario) for scenario in SCENARIOS]
    stop(llm)
    return {key: [found[key] for found in checks] for key in checks[0]}


def measure(checkpoint: Path = CHECKPOINT) -> Result:
    result = Result.here("gpu_exactness", bound="3x", margin=MARGIN, checks=list(SCENARIOS))
    for (dtype, name), settings in RUNS.items():
        progress(f"{dtype}: {name}")
        for (what, unit), runs in run(checkpoint, dtype, settings).items():
            result.add(what, unit, runs, dtype=dtype, run=name, model=checkpoint.name)
        gc.collect()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT, help="the trained example by default")
    checkpoint = parser.parse_args().checkpoint
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_exactness needs a GPU, and torch finds none on this machine.\n")
    publish(measure(checkpoint))


if __name__ == "__main__":
    main()
