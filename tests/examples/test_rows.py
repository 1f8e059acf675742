"""Rows of tokens hold each document once, know where it begins, and some say a passage again."""

import json
import re

import pytest
import torch
from harness.checkout import training_example
from harness.llamas import TEXT, save_material
from transformers import AutoTokenizer

N = 48


@pytest.fixture(scope="module")
def rows_module():
    with training_example("rows") as module:
        yield module


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_material(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(material):
    return AutoTokenizer.from_pretrained(material / "made")


def test_rows_hold_the_text_once(rows_module, material, tokenizer):
    text = rows_module.read_rows([material / "text.txt"], tokenizer, N)
    lines = rows_module.read_rows([material / "text.jsonl"], tokenizer, N)
    assert TEXT.startswith(tokenizer.decode([token for row in text["input_ids"] for token in row]))
    assert TEXT.replace("\n", "<end>").startswith(
        tokenizer.decode([token for row in lines["input_ids"] for token in row])
    )
    (material / "some.jsonl").write_text('{"id": 0, "text": null}\n' + (material / "text.jsonl").read_text())
    assert rows_module.read_rows([material / "some.jsonl"], tokenizer, N)["input_ids"] == lines["input_ids"]
    training, held_out = rows_module.split(text, 3)
    assert held_out["input_ids"] == [text[i]["input_ids"] for i in range(0, len(text), 20)[:3]]
    assert len(training) + len(held_out) == len(text)


def test_a_document_begins_at_position_0(rows_module, material, tokenizer):
    lines = [json.dumps({"text": text}) + "\n" for text in ("", "one ox", "the hill " * 40, "the sea")]
    (material / "lengths.jsonl").write_text("".join(lines * 9))
    for row in rows_module.read_rows([material / "lengths.jsonl"], tokenizer, N):
        expected, position = [], 0
        for token in row["input_ids"]:
            expected.append(position)
            position = 0 if token == tokenizer.eos_token_id else position + 1
        assert row["position_ids"] == expected


def test_a_batch_is_one_sequence_of_documents(rows_module):
    rows = [
        {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [9, 10, 11, 12], "position_ids": [0, 1, 2, 3]},
    ]
    batch = rows_module.collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, -100, 10, 11, 12]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 4, 8]


def test_rows_that_look_back_end_with_a_passage_of_theirs(rows_module, material, tokenizer):
    rows = rows_module.read_rows([material / "text.txt"], tokenizer, N)
    assert rows_module.look_back(rows, 0.0) is rows
    changed = rows_module.look_back(rows, 0.5)
    again = rows_module.look_back(rows, 0.5)
    assert changed["input_ids"] == again["input_ids"]
    pairs = [(new["input_ids"], old["input_ids"]) for new, old in zip(changed, rows, strict=True)]
    moved = [(new, old) for new, old in pairs if new != old]
    assert 0.3 < len(moved) / len(pairs) < 0.7
    for new, old in moved:
        assert len(new) == N
        kept = next(i for i in range(N) if new[i] != old[i])
        passages = [(begin, length) for length in range(N // 8, N // 2 + 1) for begin in range(N - 2 * length + 1)
                    if new == old[: N - length] + old[begin : begin + length]]  # fmt: skip
        assert kept >= N // 2 and passages
    assert all(torch.equal(torch.tensor(row["position_ids"]), torch.arange(N)) for row in changed)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("chats.jsonl", b'{"text": ["a", "b"]}\n', "the column 'text' of .* give text"),
        ("cut.jsonl", b'{"text": "a"', "cannot be read as .jsonl in UTF-8"),
        ("latin.txt", "Größe".encode("latin-1"), "cannot be read as .txt in UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_in_a_line(name, content, complaint, rows_module, tokenizer, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        rows_module.read_rows([tmp_path / name], tokenizer, N)
    assert re.search(complaint, capsys.readouterr().err.strip().splitlines()[-1])
