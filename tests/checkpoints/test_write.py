"""A checkpoint appears whole or not at all, in shards of the size that was asked for and in the memory of one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import convert, planned, save_changed
from safetensors.torch import save_file

from vllm_yocou.checkpoints.write import appearing, write


def test_shards_have_an_index_and_the_size_that_was_asked_for(tmp_path):
    sources.save_yoco2024(tmp_path, sources.YOCO2024, sources.yoco2024_weights(sources.YOCO2024))
    convert(tmp_path, tmp_path / "converted", shard_bytes=30_000)
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "converted").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files)
    assert len(files) > 3
    assert max(files.values()) < 30_000 + 4_000  # and a header


def test_files_are_as_readable_as_their_folder(tmp_path):
    with appearing(tmp_path / "made") as folder:
        save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    mode = (tmp_path / "made").stat().st_mode
    assert (tmp_path / "made" / "model.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    """Nor does it touch a folder that is there; and what a killed one left does not get in the way."""
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    save_changed(source)
    plan = planned(source, destination)

    def full(written):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(plan, 30_000, full)
    assert os.listdir(tmp_path) == ["source"]

    leftover = tmp_path / ".converted.unfinished"
    leftover.mkdir()
    (leftover / "model-00009-of-00009.safetensors").write_text("half")
    convert(source, destination)
    assert sorted(os.listdir(tmp_path)) == ["converted", "source"]
    assert sorted(os.listdir(destination)) == ["config.json", "model.safetensors", "yoco_u.py"]
    with pytest.raises(ValueError, match="already exists"):
        convert(source, destination)


PEAK = """
import sys, threading
from pathlib import Path
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.checkpoints.write import write

def own_memory():  # without pages of mapped files, which the kernel takes back
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10

source, destination, shard_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
plan = plan_of(recognise("convert", source, None), destination, dtype="bfloat16")
before, peak, done = own_memory(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, own_memory())

thread = threading.Thread(target=watch)
thread.start()
write(plan, shard_bytes, lambda written: None)
done.set()
thread.join()
largest = max(step.bytes for step in plan.steps) * 2  # in the source, which is float32
print(peak - before, largest, sum(step.bytes for step in plan.steps))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured by Linux's /proc")
@pytest.mark.parametrize("kind", ["fused safetensors", "pickle"])
def test_memory_stays_below_a_shard_and_two_tensors(kind, tmp_path):
    """Tensors of the new checkpoint: not even one of the source's fused tensors would fit."""
    large = dict(vocab_size=4000, max_seq_len=512)
    if kind == "pickle":
        config = sources.YOCO2024 | large | dict(dim=960, hidden_dim=2000, n_layers=8)
        sources.save_yoco2024(tmp_path, config, sources.yoco2024_weights(config))
    else:
        experts = dict(d_model=480, moe_expert_num=32, moe_ffn_dim=400, d_shared_expert=40)
        config = sources.AUTHORS_MOE | large | experts
        sources.save_authors(tmp_path, config, sources.authors_weights(config))
    shard_bytes = 16 << 20
    arguments = [sys.executable, "-c", PEAK, tmp_path, tmp_path / "converted", str(shard_bytes)]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    peak, largest, everything = map(int, printed.split())
    allowed = shard_bytes + 2 * largest
    assert peak < allowed < everything / 3
