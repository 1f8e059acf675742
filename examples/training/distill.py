"""Heal a YOCO-U model that `vllm-yocou upcycle` made: distillation from its source, and next-token loss.

    vllm-yocou upcycle SOURCE MADE --self-layers 15 --iterations 2
    python examples/training/distill.py SOURCE MADE HEALED --text prose.txt --steps 2000

TEXT is one or more files: a .txt file is one document, in .jsonl and .parquet every row's `text` is one. Every
twentieth row of tokens is held out, up to --held-out of them. The loss of a step is

    (1 - next) * KL(source || student) + next * (next-token loss) + hidden * (distance of hidden states)

in nats per token. The distance is the squared difference between the self-decoder's output and the source's hidden
state after its first --hidden-layer layers, relative to the square of the latter. Evaluation takes the next-token loss
alone.

HEALED gets the checkpoint with the tokenizer, loss.png, and distillation.json: settings, history, held-out perplexity
of source and student, and the share of the machine's peak that the model's operations reached. HEALED/steps keeps what
--resume goes on from, to the exact step. Several GPUs: `accelerate launch examples/training/distill.py ...`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import loss
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from torch.nn.functional import kl_div
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from vllm_yocou.checkpoints.write import copy_companions
from vllm_yocou.cli import sizing
from vllm_yocou.cli.config_file import read_keys
from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM

LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT_EVERY = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def refuse(reason: str) -> NoReturn:
    print(f"distill.py: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def read_rows(files: list[Path], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """All documents, one after the other with an end of text between them, as rows of `tokens` token ids."""
    parts = []
    for file in files:
        if file.suffix not in LOADERS or not file.is_file():
            refuse(f"{file} is not a file that ends in {', '.join(LOADERS)}: give text in one of these formats.")
        # Only the loader of .txt knows sample_by.
        how = {"sample_by": "document"} if file.suffix == ".txt" else {}
        part = load_dataset(LOADERS[file.suffix], data_files=str(file), split="train", **how)
        if "text" not in part.column_names:
            refuse(f"{file} has no column 'text' but {', '.join(part.column_names)}: rename the one that is meant.")
        if part.features["text"].dtype not in ("string", "large_string"):
            refuse(f"the column 'text' of {file} is of {part.features['text'].dtype}: give text.")
        parts.append(part.select_columns("text"))

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        stream = []
        documents = [text for text in batch["text"] if text is not None]
        for ids in tokenizer(documents, add_special_tokens=False)["input_ids"] if documents else []:
            stream += [*ids, tokenizer.eos_token_id]
        return {"input_ids": [stream[i : i + tokens] for i in range(0, len(stream) - tokens + 1, tokens)]}

    return concatenate_datasets(parts).map(cut, batched=True, remove_columns="text", desc="tokens")


def split(rows: Dataset, held_out: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows; every twentieth row is held out, up to `held_out` of them."""
    chosen = range(0, len(rows), HELD_OUT_EVERY)[:held_out]
    return rows.select(sorted(set(range(len(rows))) - set(chosen))), rows.select(chosen)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


class Distillation(Trainer):
    """A Trainer whose student learns from `teacher`; the weights of the loss are those on the command line."""

    def __init__(
        self, *, teacher: PreTrainedModel, next_token: float, hidden: float, hidden_layer: int, **settings: Any
    ):
        super().__init__(**settings)
        self.teacher = teacher.to(self.args.device)  # type: ignore[arg-type]  # transformers hides that it is a method
        self.next_token, self.hidden, self.hidden_layer = next_token, hidden, hidden_layer
        # All rows have one length, so the mean over a batch is divided by the accumulation steps alone.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        student = model(**inputs, use_cache=False, output_hidden_states=bool(self.hidden))
        total = student.loss
        if model.training:
            with torch.no_grad():
                settings = dict(use_cache=False, output_hidden_states=bool(self.hidden))
                teacher = self.teacher(inputs["input_ids"], **settings)
            theirs = teacher.logits.float().log_softmax(-1).flatten(0, 1)
            ours = student.logits.float().log_softmax(-1).flatten(0, 1)
            divergence = kl_div(ours, theirs, reduction="batchmean", log_target=True)
            total = self.next_token * total + (1 - self.next_token) * divergence
            if self.hidden:
                config = self.accelerator.unwrap_model(model).config
                output = student.hidden_states[config.num_iterations * config.num_self_decoder_layers].float()
                aim = teacher.hidden_states[self.hidden_layer].float()
                total = total + self.hidden * (output - aim).square().mean() / aim.square().mean()
        return (total, student) if return_outputs else total


class StepClock(TrainerCallback):
    """Seconds spent in steps, without evaluation and saving, and the tokens of all devices in them."""

    def __init__(self) -> None:
        self.s, self.tokens, self.started_s, self.seen = 0.0, 0, 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seen = state.num_input_tokens_seen

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started_s = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.s += time.perf_counter() - self.started_s
        # The last step of a pass over the text takes what is left of it.
        self.tokens, self.seen = self.tokens + state.num_input_tokens_seen - self.seen, state.num_input_tokens_seen


def step_flops(student: YocoUForCausalLM, teacher: PreTrainedModel, tokens: int) -> float:
    """Floating-point operations of a row of a step, without those of recomputed activations.

    A backward pass counts as two forward passes; the source goes forward once.
    """
    config = teacher.config
    matrices = teacher.num_parameters()
    if not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size  # the embeddings are looked up, not multiplied with
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    forward = 2 * matrices * tokens + 4 * width * tokens * (tokens + 1) / 2
    return 3 * sizing.row_flops(student.config, tokens) + forward


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the quickest of ten products of two square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    quickest_s = math.inf
    for _ in range(11):  # the first one warms up
        started_s = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        quickest_s = min(quickest_s, time.perf_counter() - started_s)
    return 2 * size**3 / quickest_s


def at_least(least: int, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse, whose name is what its complaint shows."""

    def number(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise ValueError
        return value

    number.__name__ = f"({kind.__name__}, at least {least}{f', at most {most}' if most < math.inf else ''})"
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the Llama: folder, or name on the hub")
    parser.add_argument("student", type=Path, help="the folder that vllm-yocou upcycle wrote")
    parser.add_argument("output", type=Path, help="folder of the checkpoint to write")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=at_least(1), default=1000)
    parser.add_argument("--sequence", type=at_least(2), default=512, help="tokens of a row")
    parser.add_argument("--batch", type=at_least(1), default=1, help="rows a device takes at a time")
    parser.add_argument("--accumulate", type=at_least(1), default=8, help="batches of a step")
    parser.add_argument("--learning-rate", type=at_least(0, float), default=5e-4)
    parser.add_argument(
        "--next-token", type=at_least(0, float, most=1), default=0.1, help="weight of the next-token loss, 0 to 1"
    )
    parser.add_argument(
        "--hidden", type=at_least(0, float), default=0.0, help="weight of the distance of hidden states"
    )
    parser.add_argument(
        "--hidden-layer", type=at_least(1), help="layers of the source that the self-decoder stands for"
    )
    parser.add_argument("--precision", choices=DTYPES, default="float32", help="mixed with float32 weights")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--held-out", type=at_least(1), default=32, help="rows")
    parser.add_argument(
        "--every", type=at_least(1), default=100, help="steps between evaluations, each of which is saved"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last step saved under OUTPUT/steps")
    return parser.parse_args()


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=arguments.output / "steps",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulate,
        gradient_checkpointing=arguments.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        bf16=arguments.precision == "bfloat16",
        fp16=arguments.precision == "float16",
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(arguments.steps / 20),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        include_num_input_tokens_seen="all",
        logging_steps=max(1, arguments.steps // 100),
        eval_strategy="steps",
        eval_steps=arguments.every,
        eval_on_start=True,
        save_steps=arguments.every,
        save_total_limit=2,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        seed=0,
    )


def load(arguments: argparse.Namespace) -> tuple[YocoUForCausalLM, PreTrainedModel, torch.dtype]:
    """Student in float32, source in the precision that was asked for, and the dtype that the student is stored in."""
    try:
        dtype = YocoUConfig.from_dict(read_keys(str(arguments.student))).dtype
        student = YocoUForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
        teacher = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=DTYPES[arguments.precision]).eval()
    except (OSError, ValueError) as error:
        refuse(str(error))
    if teacher.config.vocab_size != student.config.vocab_size:
        refuse(
            f"{arguments.source} has {teacher.config.vocab_size} tokens and {arguments.student} "
            f"{student.config.vocab_size}: give the model that the student was made of."
        )
    return student, teacher, dtype or torch.float32


def main() -> None:
    arguments = parse()
    try:
        distil(arguments)
    except KeyboardInterrupt:
        if last := last_saved(arguments.output / "steps"):
            refuse(f"interrupted: the same command with --resume goes on from {last.name}.")
        refuse("interrupted before a step was saved: a smaller --every saves more often.")


def last_saved(steps: Path) -> Path | None:
    """The newest step that is there as a whole: the Trainer writes its state last."""
    whole = [file.parent for file in steps.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda folder: int(folder.name.split("-")[-1]), default=None)


def distil(arguments: argparse.Namespace) -> None:
    """Train, and write what the module's docstring promises."""
    steps = arguments.output / "steps"
    last = last_saved(steps) if arguments.resume else None
    if arguments.precision == "float16" and not torch.cuda.is_available():
        refuse("--precision float16 needs a GPU: take bfloat16 or float32 on a CPU.")
    if arguments.resume and last is None:
        refuse(f"{steps} holds no step to resume from: leave out --resume.")
    student, teacher, dtype = load(arguments)
    layer = arguments.hidden_layer or student.config.num_self_decoder_layers
    if arguments.hidden and layer >= teacher.config.num_hidden_layers:
        most = teacher.config.num_hidden_layers - 1
        refuse(
            f"{arguments.source} exposes hidden states after layers 1 to {most}, not {layer}: change --hidden-layer."
        )
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {arguments.student} has no end of text to put between documents: set its eos_token.")
    training, held_out = split(read_rows(arguments.text, tokenizer, arguments.sequence), arguments.held_out)
    if not len(training):
        refuse(f"the text has {len(held_out)} rows of {arguments.sequence} tokens, none to train on: give more.")

    set_seed(0)
    settings, clock = training_arguments(arguments), StepClock()
    trainer = Distillation(
        model=student,
        args=settings,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[clock],
        teacher=teacher,
        next_token=arguments.next_token,
        hidden=arguments.hidden,
        hidden_layer=layer,
    )
    # Perplexities are computed in float32, before and after, whatever dtype the steps compute in.
    rows = [torch.tensor(row) for row in held_out["input_ids"]]
    nats = {"before": loss.nats(student.eval(), rows)}
    state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)) if last else None
    if last and state and state.global_step >= arguments.steps:
        # The run was stopped after its last step; the Trainer would take one more.
        student = YocoUForCausalLM.from_pretrained(str(last), dtype=torch.float32)
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
    if not trainer.is_world_process_zero():
        return

    student.to(dtype).save_pretrained(arguments.output)  # type: ignore[arg-type]  # to() is hidden, as above
    copy_companions(arguments.student, arguments.output)
    saved = YocoUForCausalLM.from_pretrained(arguments.output, dtype=torch.float32).eval().to(settings.device)
    nats |= {"after": loss.nats(saved, rows), "source": loss.nats(teacher.float(), rows)}
    loss.draw(
        state.log_history,
        arguments.output / "loss.png",
        "Healing by distillation",
        training="training (the sum of all terms)",
        levels={"held out, source": nats["source"]},
    )
    report = {
        "settings": json.loads(json.dumps(vars(arguments), default=str)),
        "training_tokens": state.num_input_tokens_seen,
        "held_out_tokens": sum(len(row) - 1 for row in rows),
        "held_out_perplexity": {name: round(math.exp(value), 2) for name, value in nats.items()},
        "history": state.log_history,
    }
    print("held-out perplexity:", report["held_out_perplexity"])
    if clock.s:
        rows_a_second = clock.tokens / arguments.sequence / settings.world_size / clock.s
        achieved = step_flops(student, teacher, arguments.sequence) * rows_a_second
        peak = peak_flops(settings.device, DTYPES[arguments.precision])
        report["model_flops_utilisation"] = round(achieved / peak, 4)
        print(
            f"model FLOPs utilisation: {achieved / peak:.1%}, {achieved / 1e9:,.1f} GFLOP/s a device of the "
            f"{peak / 1e9:,.1f} that a product of matrices reached in {arguments.precision}"
        )
    (arguments.output / "distillation.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
