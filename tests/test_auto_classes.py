"""Tools that know only transformers' auto classes load a checkpoint; what they save names the same classes again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from harness import tiny
from harness.checkout import ROOT, TRAINED
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM, YocoUModel

AUTO_MAP = {
    "AutoConfig": "yoco_u.YocoUConfig",
    "AutoModel": "yoco_u.YocoUModel",
    "AutoModelForCausalLM": "yoco_u.YocoUForCausalLM",
}
PROMPT, GENERATED = "In the beginning", 20
LM_EVAL_ITEMS = 4

# One process for each way of starting, forked when transformers is imported and nothing else: a process that knows
# nothing of YOCO-U, then one that knows the config alone, as vLLM's do. The second loads what the first has saved.
LOAD_AND_SAVE = """
import os, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

source, folder, prompt, length = sys.argv[1:]

def load_and_save(knows, source, saved):
    assert "vllm_yocou" not in sys.modules
    if knows == "config":
        from vllm_yocou.config import YocoUConfig
        AutoConfig.register("yoco_u", YocoUConfig)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    base = AutoModel.from_pretrained(source, trust_remote_code=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    classes = [f"{type(made).__module__}.{type(made).__name__}" for made in (config, model, base)]
    tokens = model.generate(ids, max_new_tokens=int(length), do_sample=False)[0].tolist()
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    torch.save([classes, tokens, model(ids).logits.detach()], f"{saved}.found")

for knows in ("nothing", "config"):
    if os.fork() == 0:
        load_and_save(knows, source, f"{folder}/{knows}")
        sys.exit()
    assert os.wait()[1] == 0
    source = f"{folder}/{knows}"
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict[str, str]:
    """The environment of a process in which transformers keeps its copies of modules in a folder of the test."""
    return dict(os.environ, HF_MODULES_CACHE=str(tmp_path_factory.mktemp("modules")), HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def copies(offline, tmp_path_factory) -> list[Path]:
    """What the processes of LOAD_AND_SAVE saved, with their findings beside it."""
    folder = tmp_path_factory.mktemp("copies")
    command = [sys.executable, "-c", LOAD_AND_SAVE, TRAINED, folder, PROMPT, str(GENERATED)]
    done = subprocess.run(command, env=offline, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[transformers]" not in done.stderr  # which begins its warnings
    return [folder / "nothing", folder / "config"]


def test_a_process_that_imports_only_transformers_gets_the_reference(copies, reference, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = reference(ids).logits
    names = ["config.YocoUConfig", "reference.model.YocoUForCausalLM", "reference.model.YocoUModel"]
    for saved in copies:
        classes, tokens, found = torch.load(f"{saved}.found")
        assert classes == [f"vllm_yocou.{name}" for name in names]
        assert tokens == reference.generate(ids, max_new_tokens=GENERATED, do_sample=False)[0].tolist()
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_what_such_a_process_saves_is_the_same_checkpoint(copies):
    """With the names of its classes and their module, where transformers would save a copy of the package's."""
    expected = json.loads((TRAINED / "config.json").read_text())
    assert expected["auto_map"] == AUTO_MAP
    expected |= dict(dtype="float32", transformers_version=transformers.__version__)
    for saved in copies:
        assert json.loads((saved / "config.json").read_text()) == expected
        assert [file.name for file in saved.glob("*.py")] == ["yoco_u.py"]
        assert (saved / "yoco_u.py").read_text() == (TRAINED / "yoco_u.py").read_text()


def test_a_config_has_the_module_beside_it(tmp_path):
    cfg = tiny.config()
    cfg.to_json_file(tmp_path / "other.json")
    assert os.listdir(tmp_path) == ["other.json"] and "auto_map" not in cfg.to_dict()
    cfg.auto_map = {"AutoConfig": "somebody--elses.Config"}
    cfg.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (tmp_path / "yoco_u.py").read_text() == (TRAINED / "yoco_u.py").read_text()


def test_a_config_is_uploaded_with_its_module(tmp_path, monkeypatch):
    uploaded = []

    class Hub:
        def create_repo(self, repo_id: str, exist_ok: bool):
            self.repo_id = repo_id
            return self

    def upload(self, folder, repo_id, timestamps, **kwargs):
        uploaded.extend(sorted(set(os.listdir(folder)) - set(timestamps)))

    monkeypatch.setattr("transformers.configuration_utils.hf_api", Hub)
    monkeypatch.setattr(YocoUConfig, "_upload_modified_files", upload)
    tiny.config().save_pretrained(str(tmp_path), push_to_hub=True, repo_id="tiny")
    assert uploaded == ["config.json", "yoco_u.py"]


def test_where_the_package_is_missing_the_error_says_how_to_get_it(monkeypatch):
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "vllm_yocou":
                raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.delitem(sys.modules, "vllm_yocou")
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"not found in your environment: vllm_yocou\. Run `pip install vllm_yocou`"):
        get_class_from_dynamic_module("yoco_u.YocoUConfig", TRAINED)


@pytest.fixture
def silent(monkeypatch, caplog):
    """Fails a test that asks the user, runs a checkpoint's module, or warns."""

    def never(*args, **kwargs):
        raise AssertionError(f"called with {args} {kwargs}")

    monkeypatch.setattr("builtins.input", never)
    for name in ("auto_factory", "configuration_auto", "tokenization_auto"):
        monkeypatch.setattr(f"transformers.models.auto.{name}.get_class_from_dynamic_module", never)
    monkeypatch.setattr("vllm.model_executor.models.registry.try_get_class_from_dynamic_module", never)
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    yield
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_where_the_reference_is_imported_the_module_is_not_run(trust, silent):
    assert type(AutoConfig.from_pretrained(TRAINED, **trust)) is YocoUConfig
    assert type(AutoModel.from_pretrained(TRAINED, **trust)) is YocoUModel
    model = AutoModelForCausalLM.from_pretrained(TRAINED, **trust)
    assert type(model) is YocoUForCausalLM
    assert type(AutoModelForCausalLM.from_config(model.config, **trust)) is YocoUForCausalLM
    assert AutoTokenizer.from_pretrained(TRAINED, **trust).vocab_size == model.config.vocab_size


@pytest.mark.parametrize("trust", [False, True])
def test_vllm_does_not_run_the_module(trust, silent):
    load_general_plugins()
    config = ModelConfig(str(TRAINED), trust_remote_code=trust)
    assert type(config.hf_config) is YocoUConfig
    assert config.registry.inspect_model_cls(config.architectures, config)[1] == "YocoUForCausalLM"


def test_lm_eval_scores_a_checkpoint_as_the_reference_answers(trains, offline, reference, tokenizer, tmp_path):
    """By lm-eval's model `hf`, which is given nothing but the checkpoint."""
    model = f"pretrained={TRAINED},trust_remote_code=True,dtype=float32"
    command = [Path(sys.executable).parent / "lm_eval", "--model", "hf", "--model_args", model, "--include_path"]
    command += ["examples/evaluation", "--tasks", "kjv_last_word", "--limit", str(LM_EVAL_ITEMS)]
    command += ["--log_samples", "--output_path", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=offline, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,), (samples,) = tmp_path.rglob("results_*.json"), tmp_path.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(samples) == LM_EVAL_ITEMS
    right = 0
    for sample in samples:
        ids = tokenizer(sample["doc"]["context"], return_tensors="pt").input_ids
        generated = reference.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(generated, skip_special_tokens=True).split("\n")[0]
        assert sample["resps"][0][0] == answer
        right += answer.split()[0].strip(".,;:").lower() == sample["doc"]["word"].lower()
    scores = json.loads(results.read_text())["results"]["kjv_last_word"]
    assert scores["exact_match,first-word"] == pytest.approx(right / LM_EVAL_ITEMS)
