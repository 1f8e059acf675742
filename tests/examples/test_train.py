"""The training example from text to checkpoint, on a corpus of a few words, and the figure on the model card."""

import json
import math
import os
import subprocess
import sys

import torch
from harness.checkout import ROOT, TRAINED
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_yocou.reference import YocoUForCausalLM

# Stands in for the reader of Debian's package: 66 books of 3 chapters.
READER = """#!/bin/sh
for book in a b c d e f; do for second in a b c d e f g h i j k; do for chapter in 1 2 3; do for verse in 1 2 3 4; do
  echo "B$book$second$chapter:$verse It came to pass on day $verse of month $chapter, in the house of $book $second."
done; done; done; done
"""


def test_training_writes_a_checkpoint_that_loads(tmp_path, trains, nightly):
    reader = tmp_path / "corpus" / "usr" / "bin" / "bible"
    reader.parent.mkdir(parents=True)
    reader.write_text(READER)
    reader.chmod(0o755)
    output = tmp_path / "trained"
    script = ROOT / "examples" / "training" / "train.py"
    command = [sys.executable, script, "--corpus", tmp_path / "corpus", "--output", output]
    settings = ["--steps", "3", "--batch", "1", "--iterations", "2"]
    done = subprocess.run([*map(str, command), *settings], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3/3" in done.stderr + done.stdout  # the progress bar
    assert "held-out perplexity: {" in done.stdout
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "training.json").read_text())
    assert set(report["held_out_perplexity"]) == {"unigram", "bigram", "YOCO-U, T = 2"}
    assert AutoModelForCausalLM.from_pretrained(output).config.num_iterations == 2
    assert AutoTokenizer.from_pretrained(output).chat_template


@torch.inference_mode()
def test_the_committed_model_has_learned_its_book():
    """Held-out verses from the evaluation's data; another text than the card's, but the same order of perplexity."""
    model = YocoUForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    items = (ROOT / "examples" / "evaluation" / "kjv_last_word.jsonl").read_text().splitlines()[:40]
    nats = tokens = 0
    for item in items:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(json.loads(item)["context"])]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    card = json.loads((TRAINED / "training.json").read_text())["held_out_perplexity"]
    perplexity = math.exp(nats / tokens)
    assert perplexity < card["bigram"] / 2 and abs(math.log(perplexity / card["YOCO-U, T = 3"])) < math.log(1.3)
