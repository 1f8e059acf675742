"""Converted checkpoints compute what their sources computed; everything that cannot be converted is refused whole."""

import json
import os
import subprocess
import sys

import pytest
import torch
from harness import foreign_sources as sources
from safetensors.torch import load_file

from vllm_yocou.checkpoints import converter
from vllm_yocou.reference import YocoUForCausalLM

TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def convert(source, destination, shard_bytes=1 << 30, **settings):
    plan = converter.plan(source, destination, **settings)
    converter.write(plan, shard_bytes, lambda written: None)
    return plan


def converted_logits(folder) -> torch.Tensor:
    with torch.inference_mode():
        return YocoUForCausalLM.from_pretrained(folder).eval()(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize(
    "config",
    [
        sources.AUTHORS,
        sources.AUTHORS | dict(weight_tying=True, universal_loop=1),
        sources.AUTHORS_MOE,
    ],
    ids=["dense", "tied-T1", "moe"],
)
def test_the_authors_schema(config, tmp_path):
    weights = sources.authors_weights(config)
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    sources.save_authors(source, config, weights)
    (source / "tokenizer.json").write_text("{}")
    convert(source, destination)
    expected = sources.authors_logits(config, weights, TOKENS)
    torch.testing.assert_close(converted_logits(destination), expected, atol=2e-5, rtol=2e-5)
    saved = json.loads((destination / "config.json").read_text())
    assert (saved["model_type"], saved["sliding_window"], saved["eos_token_id"]) == ("yoco_u", 7, 1)
    assert (destination / "tokenizer.json").exists()


def test_the_2024_schema(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    convert(tmp_path, tmp_path / "converted", shard_bytes=30_000)
    expected = sources.yoco2024_logits(sources.YOCO2024, weights, TOKENS)
    torch.testing.assert_close(converted_logits(tmp_path / "converted"), expected, atol=2e-5, rtol=2e-5)
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "converted").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files) and len(files) > 3
    assert max(files.values()) < 30_000 + 4_000  # and a header


def test_tied_embeddings_of_the_2024_schema(tmp_path):
    """One tensor under two names, as torch.save keeps it."""
    weights = sources.yoco2024_weights(sources.YOCO2024)
    weights["output_projection.weight"] = weights["embed_tokens.weight"]
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    plan = convert(tmp_path, tmp_path / "converted")
    assert plan.config.tie_word_embeddings and set(plan.left_out) == {"output_projection.weight"}
    expected = sources.yoco2024_logits(sources.YOCO2024, weights, TOKENS)
    torch.testing.assert_close(converted_logits(tmp_path / "converted"), expected, atol=2e-5, rtol=2e-5)


def test_keys_under_our_names_may_repeat_what_is_known(tmp_path):
    broken(tmp_path, keys={"hidden_size": 48, "num_iterations": 3})
    assert converter.plan(tmp_path, tmp_path / "converted").config.hidden_size == 48


def test_another_dtype(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    convert(tmp_path, tmp_path / "converted", dtype="bfloat16")
    tensors = load_file(tmp_path / "converted" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    torch.testing.assert_close(tensors["model.embed_tokens.weight"], weights["embed_tokens.weight"].bfloat16())
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_source_tensor_is_used_or_named(tmp_path):
    config = sources.AUTHORS | dict(weight_tying=True)
    weights = sources.authors_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = 5000.0 ** -(torch.arange(8) / 8)
    sources.save_authors(tmp_path, config, weights)
    plan = converter.plan(tmp_path, tmp_path / "converted")
    assert {step.source for step in plan.steps} | set(plan.left_out) == set(weights)
    assert set(plan.left_out) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def broken(folder, keys=(), tensors=(), **changed):
    """The authors' checkpoint with some keys of its config and some tensors other than they should be."""
    weights = sources.authors_weights(sources.AUTHORS) | dict(tensors)
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    sources.save_authors(folder, sources.AUTHORS | dict(keys), weights)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(keys={"diff_attention": True}), "'diff_attention' is True"),
        (dict(keys={"qk_rms_clip": 4.0}), "'qk_rms_clip' is 4.0"),
        (dict(keys={"new_trick": 3, "other": False}), "'new_trick' (3), 'other' (False), and what that changes"),
        (dict(keys={"hidden_size": 64}), "'hidden_size' (64), and what that changes"),
        (dict(keys={"norm_eps": None}), "'norm_eps' is missing"),
        (dict(keys={"universal_loop": None}), "'universal_loop' is missing"),
        (dict(keys={"model_type": "yoco_u"}), "there is nothing to convert"),
        (dict(keys={"model_type": "llama"}), "of model_type 'llama'"),
        (dict(keys={"yoco_cross_layers": None}), "'yoco_cross_layers' is None"),
        (dict(keys={"yoco_cross_layers": 5}), "num_self_decoder_layers is 0"),
        (dict(keys={"max_seq_len": None}), "give --context"),
        (dict(keys={"max_seq_len": -1}), "give --context"),
        (dict(keys={"universal_loop": 0}), "num_iterations is 0"),
        (dict(tensors={"model.v_proj.weight": None}), "missing: model.global_kv.v_proj.weight"),
        (dict(tensors={"model.extra.weight": torch.ones(2)}), "unexpected: model.extra.weight"),
        (dict(tensors={"model.rotary_emb.inv_freq": torch.ones(8)}), "unexpected: model.rotary_emb.inv_freq"),
        (dict(tensors={"model.norm.weight": torch.ones(2)}), "misshapen: model.norm.weight is [2] instead of [48]"),
        (dict(tensors={"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "model.norm.weight is of torch.int8"),
        (
            dict(tensors={"model.layers.4.self_attn.k_proj.weight": torch.ones(2, 2)}),
            "unexpected: model.layers.4.self_attn.k_proj.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, complaint, tmp_path):
    broken(tmp_path, **changes)
    with pytest.raises(ValueError) as refusal:
        converter.plan(tmp_path, tmp_path / "converted")
    assert complaint in str(refusal.value)


def test_a_source_without_a_head_is_refused(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    del weights["output_projection.weight"]
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        converter.plan(tmp_path, tmp_path / "converted")


def test_gated_retention_is_refused(tmp_path):
    params = {key: value for key, value in sources.YOCO2024.items() if key != "sliding_window"}
    sources.save_yoco2024(tmp_path, params, {})
    with pytest.raises(ValueError, match="gated retention"):
        converter.plan(tmp_path, tmp_path / "converted")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (dict(weight=Bomb()), "nothing of it was executed"),
        (dict(weight=[1, 2]), "is not a dictionary of tensors alone"),
        (torch.ones(2), "is not a dictionary of tensors alone"),
        ({1: torch.ones(2)}, "is not a dictionary of tensors alone"),
    ],
    ids=["code", "nested", "tensor", "numbered"],
)
def test_pickles_are_not_executed(content, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, content)
    with pytest.raises(ValueError, match=complaint):
        converter.plan(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["checkpoint.pth", "model.safetensors"])
def test_files_that_are_cut_short_are_refused(file, tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{file} is not a whole"):
        converter.plan(tmp_path, tmp_path / "converted")


def test_parts_of_a_model_parallel_run_are_refused(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    torch.save(weights, tmp_path / "checkpoint2.pth")
    with pytest.raises(ValueError, match="merge the parts"):
        converter.plan(tmp_path, tmp_path / "converted")


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    """Nor does it touch a folder that is there; and what a killed one left behind is no hindrance."""
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    broken(source)
    plan = converter.plan(source, destination)

    def full(written):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        converter.write(plan, 30_000, full)
    assert os.listdir(tmp_path) == ["source"]

    leftover = tmp_path / ".converted.unfinished"
    leftover.mkdir()
    (leftover / "model-00009-of-00009.safetensors").write_text("half")
    convert(source, destination)
    assert sorted(os.listdir(tmp_path)) == ["converted", "source"]
    assert sorted(os.listdir(destination)) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="is there already"):
        convert(source, destination)


PEAK = """
import sys, threading
from pathlib import Path
from vllm_yocou.checkpoints import converter

def own_memory():  # without pages of mapped files, which the kernel takes back
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10

source, destination, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
plan = converter.plan(source, destination, dtype="bfloat16")
before, peak, done = own_memory(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, own_memory())

thread = threading.Thread(target=watch)
thread.start()
converter.write(plan, shard_bytes, lambda written: None)
done.set()
thread.join()
largest = max(step.bytes for step in plan.steps) * 2  # in the source, which is float32
print(peak - before, largest, sum(step.bytes for step in plan.steps))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured by Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_memory_stays_below_a_shard_and_two_tensors(kind, tmp_path):
    large = dict(vocab_size=4000, max_seq_len=512)
    if kind == "pickle":
        config = sources.YOCO2024 | large | dict(dim=960, hidden_dim=2000, n_layers=20)
        sources.save_yoco2024(tmp_path, config, sources.yoco2024_weights(config))
    else:
        config = sources.AUTHORS | large | dict(d_model=960, d_ffn=2000, n_layers=20)
        sources.save_authors(tmp_path, config, sources.authors_weights(config))
    shard_bytes = 16 << 20
    arguments = [sys.executable, "-c", PEAK, tmp_path, tmp_path / "converted", str(shard_bytes)]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    peak, largest, everything = map(int, printed.split())
    allowed = shard_bytes + 2 * largest
    assert peak < allowed < everything / 3
