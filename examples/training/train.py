"""Train a small YOCO-U on the King James Bible, from a folder of text to a checkpoint that vLLM serves.

    python examples/training/train.py --corpus kjv --output examples/yoco-u-kjv  # T = 3, the committed model
    python examples/training/train.py --corpus kjv --output /tmp/yoco-u-kjv-t1 --iterations 1  # its T = 1 twin

`kjv` is the unpacked corpus (see corpus.py). The tokenizer is trained on the same text and saved with a chat template:
the user gives a verse, the assistant answers with the one that follows. Next to the weights the run writes loss.png
and training.json (settings, loss history, held-out perplexity compared with a unigram and a bigram model's).
"""

import argparse
import json
import math
import random
from pathlib import Path

import corpus
import loss
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM

BOS, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_SHARE = 0.25  # of the chapters, seen once more as a dialogue in each pass
VOCABULARY = 4096
SEQUENCE = 512  # tokens of a training row


def train_tokenizer(chapters: list[corpus.Chapter]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((chapter.text for chapter in chapters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        additional_special_tokens=[USER, ASSISTANT, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def model_config(tokenizer: PreTrainedTokenizerFast, iterations: int) -> YocoUConfig:
    """3.1 million parameters. The head size is the smallest that vLLM's CPU attention takes."""
    return YocoUConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_self_decoder_layers=3,
        num_iterations=iterations,
        sliding_window=64,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        qk_norm="all",
        embedding_multiplier=math.sqrt(192),
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def plain(tokenizer: PreTrainedTokenizerFast, chapter: corpus.Chapter) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(chapter.text + "\n", add_special_tokens=False)]


def dialogue(tokenizer: PreTrainedTokenizerFast, chapter: corpus.Chapter) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": verse} for i, verse in enumerate(chapter.verses)]
    return tokenizer.apply_chat_template(messages, return_dict=False)  # type: ignore[return-value]  # a list, of all it may be


class Rows(Dataset):
    """Rows of SEQUENCE consecutive tokens; each pass over the corpus has its own order of chapters and dialogues."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chapters: list[corpus.Chapter], rows: int, seed: int):
        order: list[list[int]] = []
        shuffler = random.Random(seed)
        plain_texts = [plain(tokenizer, chapter) for chapter in chapters]
        dialogues = [dialogue(tokenizer, chapter) for chapter in chapters]
        while sum(map(len, order)) < rows * SEQUENCE:
            one_pass = plain_texts + shuffler.sample(dialogues, int(CHAT_SHARE * len(dialogues)))
            order.extend(shuffler.sample(one_pass, len(one_pass)))
        stream = torch.tensor([token for text in order for token in text])
        self.rows = stream[: rows * SEQUENCE].view(rows, SEQUENCE)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def pieces(tokenizer: PreTrainedTokenizerFast, chapters: list[corpus.Chapter]) -> list[torch.Tensor]:
    """Held-out chapters cut into rows of at most SEQUENCE tokens. The first token of a row is given, not scored."""
    rows = [row for chapter in chapters for row in torch.tensor(plain(tokenizer, chapter)).split(SEQUENCE)]
    return [row for row in rows if len(row) > 1]


def ngram_nats(training: torch.Tensor, rows: list[torch.Tensor]) -> tuple[float, float]:
    """Nats per token of a unigram (add one) and a bigram model (absolute discounting, back-off to the unigram)."""
    V, discount = VOCABULARY, 0.75
    unigram_V = (torch.bincount(training, minlength=V) + 1).double()
    unigram_V /= unigram_V.sum()
    pairs_VV = torch.bincount(training[:-1] * V + training[1:], minlength=V * V).view(V, V).double()
    seen_V = pairs_VV.sum(1).clamp(min=1)
    back_off_V = torch.where(pairs_VV.sum(1) > 0, discount * (pairs_VV > 0).sum(1) / seen_V, 1.0)
    first = torch.cat([row[:-1] for row in rows])
    second = torch.cat([row[1:] for row in rows])
    bigram = (pairs_VV[first, second] - discount).clamp(min=0) / seen_V[first] + back_off_V[first] * unigram_V[second]
    return -unigram_V[second].log().mean().item(), -bigram.log().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the unpacked Debian packages")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--iterations", type=int, default=3, help="T")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {SEQUENCE} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--resume", action="store_true", help="go on from the last step saved under OUTPUT/steps")
    arguments = parser.parse_args()

    training, held_out = corpus.split(corpus.read(arguments.corpus))
    tokenizer = train_tokenizer(training)
    rows = pieces(tokenizer, held_out)
    torch.manual_seed(0)
    model = YocoUForCausalLM(model_config(tokenizer, arguments.iterations))
    model.config.use_cache = False

    settings = TrainingArguments(
        output_dir=arguments.output / "steps",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        weight_decay=0.05,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=100,
        save_steps=100,
        save_total_limit=1,
        seed=0,
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Rows(tokenizer, training, arguments.steps * arguments.batch, seed=0),
        eval_dataset=[{"input_ids": row, "labels": row} for row in rows if len(row) == SEQUENCE][:32],
    )
    trainer.train(resume_from_checkpoint=arguments.resume)

    model.config.use_cache = True
    model.bfloat16().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    end = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    sampling = dict(do_sample=True, temperature=0.7, top_p=0.9)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, **sampling).save_pretrained(
        arguments.output
    )
    loss.draw(trainer.state.log_history, arguments.output / "loss.png", "YOCO-U on the King James Bible")

    saved = YocoUForCausalLM.from_pretrained(arguments.output, dtype=torch.float32).eval()
    unigram, bigram = ngram_nats(torch.tensor([t for c in training for t in plain(tokenizer, c)]), rows)
    scored = [{"input_ids": row[None], "labels": row[None]} for row in rows]
    nats = {"unigram": unigram, "bigram": bigram, f"YOCO-U, T = {arguments.iterations}": loss.nats(saved, scored)}
    report = {
        "settings": {name: getattr(arguments, name) for name in ("iterations", "steps", "batch", "learning_rate")},
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "training_tokens": arguments.steps * arguments.batch * SEQUENCE,
        "held_out_tokens": sum(len(row) - 1 for row in rows),
        "held_out_perplexity": {name: round(math.exp(value), 2) for name, value in nats.items()},
        "history": trainer.state.log_history,
    }
    (arguments.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print("held-out perplexity:", report["held_out_perplexity"])
    prompt = tokenizer.encode(f"{BOS}Genesis 1\n", return_tensors="pt", add_special_tokens=False)
    print(tokenizer.decode(saved.generate(prompt, max_new_tokens=120, do_sample=True)[0]))


if __name__ == "__main__":
    main()
