"""`vllm-yocou check`, as a user starts it: exact as it is, and wrong where the served model is damaged."""

import json
import subprocess
import sys

from harness.checkout import TRAINED

from vllm_yocou.self_check import models, workload

CASES = {workload.BESIDE, workload.CHUNKED, workload.HIT, workload.PREEMPTED}
COMMAND = "from vllm_yocou.cli.command_line import main\nmain()\n"
NOISE = """
import os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
from vllm_yocou.serving.model import YocoUForCausalLM as Served
right = Served.compute_logits
Served.compute_logits = lambda self, hidden: right(self, hidden) + 0.01 * torch.randn(self.config.vocab_size)
"""


def run(program: str, *arguments: str) -> tuple[int, dict, str]:
    """Exit code, the one object on standard output, and standard error."""
    command = [sys.executable, "-c", program, "check", *map(str, arguments), "--enforce-eager", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ended.returncode, json.loads(ended.stdout) if ended.stdout else {}, ended.stderr


def test_tiny_models_are_exact(starts_vllm, nightly):
    code, report, log = run(COMMAND)
    assert (code, report["exact"]) == (0, True), log
    assert report["verdict"].startswith("exact: max |Δlogprob| ")
    assert set(report["tested"]) == {"vllm", "torch"} and report["machine"]["versions"]["vllm"]
    assert [model["name"] for model in report["models"]] == list(models.TINY)
    for model in report["models"]:
        facts = model["facts"]
        assert (facts["dtype"], facts["compilation_mode"], facts["cudagraph_mode"]) == ("float32", "NONE", "NONE")
        assert facts["attention_backends"] == ["YOCOU_CPU_ATTN"] and facts["runner"] == "V1"
        assert facts["rows_skip"] and facts["why_not"] is None
        assert [group["window"] for group in facts["kv_groups"]] == [16, None]
        assert set(model["figures"]["cases"]) == CASES and 0 < model["figures"]["of_bound"] <= 1
        assert model["wrong"] == [] and model["left_out"] == {}


def test_a_damaged_model_is_named(starts_vllm, nightly):
    """The trained checkpoint, with noise of a hundredth on its logits."""
    code, report, log = run(NOISE + COMMAND, TRAINED, "--dtype", "float32")
    assert (code, report["exact"]) == (1, False), log
    (model,) = report["models"]
    assert model["name"] == str(TRAINED) and set(model["figures"]["cases"]) == CASES
    assert all("Δlogprob" in complaint or "a greedy token" in complaint for complaint in model["wrong"])
    assert report["verdict"].startswith(f"wrong: {TRAINED}: max |Δlogprob| is")
