"""Each entry of SOURCES has its module, and a folder that none of a command's schemas takes is told which there are."""

import json
from importlib import import_module
from inspect import signature

import pytest

from vllm_yocou.checkpoints.sources import SOURCES, recognise


@pytest.mark.parametrize("schema", SOURCES, ids=lambda schema: schema.module)
def test_an_entry_has_a_module_that_recognises_and_maps(schema):
    module = import_module(f"vllm_yocou.checkpoints.{schema.module}")
    assert list(signature(module.recognise).parameters)[:2] == ["folder", "keys"]
    assert next(iter(signature(module.mapping).parameters)) == "tensors"


@pytest.mark.parametrize(
    "command, files, complaint",
    [
        (
            "convert",
            {},
            "neither params.json nor config.json nor metadata.json: give the folder of a checkpoint of the 2024",
        ),
        ("upcycle", {}, "no config.json: give the folder of a Llama in Hugging Face's format"),
        ("convert", {"config.json": "yoco"}, "'yoco': convert makes YOCO-U from the 2024 code's params.json or the au"),
        ("upcycle", {"config.json": "yoco"}, "'yoco': upcycle makes YOCO-U from 'llama'"),
        ("upcycle", {"params.json": "llama"}, "no config.json"),
    ],
)
def test_other_folders_are_refused(command, files, complaint, tmp_path):
    for file, model_type in files.items():
        (tmp_path / file).write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=complaint):
        recognise(command, tmp_path, None)


def test_a_new_schema_is_an_entry_and_a_module(tmp_path, monkeypatch):
    """What SOURCES has no entry for is not tried: without its entry, the authors' schema is unknown."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yoco", "yoco_window_size": 6}))
    assert recognise("convert", tmp_path, None).folder == tmp_path
    others = tuple(schema for schema in SOURCES if schema.module != "authors")
    monkeypatch.setattr("vllm_yocou.checkpoints.sources.SOURCES", others)
    with pytest.raises(ValueError, match=r"neither params\.json nor metadata\.json"):
        recognise("convert", tmp_path, None)
