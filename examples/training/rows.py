"""No token of a row sees another document: documents are packed one after the other, and each begins at position 0.

A row also begins a document, whatever text comes before it. Rows of a .txt file are pieces of one document. A row that
was made to look back is one document as a whole.
"""

import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch
from datasets import Dataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT_EVERY = 20


def refuse(reason: str) -> NoReturn:
    print(f"distill.py: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def read_rows(files: list[Path], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """All documents, with an end of text after each, as rows of `tokens` token ids and their positions."""
    parts = []
    for file in files:
        if file.suffix not in LOADERS or not file.is_file():
            refuse(f"{file} is not a file that ends in {', '.join(LOADERS)}: give text in one of these formats.")
        # Only the loader of .txt knows sample_by.
        how = {"sample_by": "document"} if file.suffix == ".txt" else {}
        try:
            part = load_dataset(LOADERS[file.suffix], data_files=str(file), split="train", **how)
        except DatasetGenerationError as error:
            refuse(f"{file} cannot be read as {file.suffix} in UTF-8 ({error.__cause__ or error}): correct the file.")
        if "text" not in part.column_names:
            refuse(f"{file} has no column 'text' but {', '.join(part.column_names)}: rename the one that is meant.")
        kind = part.features["text"]
        if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string"):
            refuse(f"the column 'text' of {file} is of {getattr(kind, 'dtype', kind)}: give text.")
        parts.append(part.select_columns("text"))

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        stream, ends = [], []
        documents = [text for text in batch["text"] if text is not None]
        for ids in tokenizer(documents, add_special_tokens=False)["input_ids"] if documents else []:
            stream += [*ids, tokenizer.eos_token_id]
            ends.append(len(stream))
        starts = range(0, len(stream) - tokens + 1, tokens)
        # The longest piece without an edge inside: from the last edge at or before a token.
        edges = sorted({0, *ends, *starts})
        position = [i - begin for begin, end in pairwise(edges) for i in range(begin, end)]
        return {
            "input_ids": [stream[i : i + tokens] for i in starts],
            "position_ids": [position[i : i + tokens] for i in starts],
        }

    return concatenate_datasets(parts).map(cut, batched=True, remove_columns="text", desc="tokens")


def split(rows: Dataset, held_out: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; every twentieth row is held out, up to `held_out` of them."""
    chosen = range(0, len(rows), HELD_OUT_EVERY)[:held_out]
    return rows.select(sorted(set(range(len(rows))) - set(chosen))), rows.select(chosen)


def look_back(rows: Dataset, share: float) -> Dataset:
    """The rows, of which about a `share` ends with a passage that it had before: to say it, a model has to look back.

    The passage has an eighth to a half of a row, and comes again at its end.
    """

    def repeat(row: dict[str, list[int]], index: int) -> dict[str, list[int]]:
        draw, N = random.Random(index), len(row["input_ids"])
        if draw.random() >= share:
            return row
        passage = draw.randint(N // 8, N // 2)
        begin = draw.randint(0, N - 2 * passage)
        ids = row["input_ids"][: N - passage] + row["input_ids"][begin : begin + passage]
        return {"input_ids": ids, "position_ids": list(range(N))}

    return rows.map(repeat, with_indices=True, desc="rows that look back") if share else rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows as one sequence (1, B · N), with the edges of its documents (documents + 1,) for attention.

    The first token of a document is no label: nothing says which one follows another document.
    """
    ids, positions = (torch.tensor([row[key] for row in rows]).view(1, -1) for key in ("input_ids", "position_ids"))
    begins = positions[0] == 0
    edges = torch.cat([begins.nonzero()[:, 0], torch.tensor([ids.numel()])])
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(begins, -100),
        "cu_seq_lens_q": edges.int(),
    }
