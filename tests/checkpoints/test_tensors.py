"""Files of weights are read without executing them, and those that cannot be read are refused by name."""

import os

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import planned


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
        planned(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["checkpoint.pth", "model.safetensors"])
def test_files_that_are_cut_short_are_refused(file, tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{file} is not a whole"):
        planned(tmp_path, tmp_path / "converted")


def test_parts_of_a_model_parallel_run_are_refused(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    torch.save(weights, tmp_path / "checkpoint2.pth")
    with pytest.raises(ValueError, match="merge the parts"):
        planned(tmp_path, tmp_path / "converted")
