"""Heal a YOCO-U model that `vllm-yocou upcycle` made: distillation from its source, and next-token loss.

    vllm-yocou upcycle SOURCE MADE --iterations 2 --window 256 --calibrate prose.txt
    python examples/training/distill.py SOURCE MADE HEALED --text prose.txt --steps 2000

TEXT is one or more files: a .txt file is one document, in .jsonl and .parquet every row's `text` is one. Documents are
packed into rows and do not see each other (rows.py). Every twentieth row is held out, up to --held-out of them. The
loss of a step is that of distillation.py. A long way is a chain of such runs, each from what the one before wrote.

HEALED gets the checkpoint with the tokenizer, loss.png, and distillation.json: settings, history, held-out perplexity
of source and student, and the share of the machine's peak that the model's operations reached. HEALED/steps keeps what
--resume goes on from, to the exact step. Several GPUs: `accelerate launch examples/training/distill.py ...`.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loss
import torch
from distillation import TRAINED, Distillation, StepClock, Terms, iterating, train_only
from packed_attention import NAME as PACKED
from rows import collate, look_back, read_rows, refuse, split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from utilisation import peak_flops, step_flops

from vllm_yocou.checkpoints.write import copy_companions
from vllm_yocou.cli.config_file import read_keys
from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def at_least(least: float, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
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
    parser.add_argument("--sequence", type=at_least(8), default=1024, help="tokens of a row")
    parser.add_argument(
        "--look-back", type=at_least(0, float, most=1), default=0.0, help="share of rows that end as they were before"
    )
    parser.add_argument("--batch", type=at_least(1), default=1, help="rows a device takes at a time")
    parser.add_argument("--accumulate", type=at_least(1), default=8, help="batches of a step")
    parser.add_argument("--learning-rate", type=at_least(0, float), default=5e-4)
    parser.add_argument(
        "--next-token", type=at_least(0, float, most=1), default=0.1, help="weight of the next-token loss, 0 to 1"
    )
    parser.add_argument("--temperature", type=at_least(0.1, float), default=1.0, help="of both distributions")
    parser.add_argument("--hidden", type=at_least(0, float), default=0.0, help="weight of the distance of streams")
    parser.add_argument(
        "--hidden-layers", type=at_least(1), default=1, help="from the last back, those before which streams count"
    )
    parser.add_argument(
        "--train", choices=TRAINED, default="all", help="the global K, V and cross q, o; all cross; all"
    )
    parser.add_argument(
        "--iterations",
        type=at_least(1),
        nargs="+",
        help="each step takes one of these T, by default those of the student's trained_iterations",
    )
    parser.add_argument("--precision", choices=DTYPES, default="float32", help="mixed with float32 weights")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--held-out", type=at_least(1), default=32, help="rows")
    parser.add_argument(
        "--every", type=at_least(1), default=100, help="steps between evaluations, each of which is saved"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the order of rows")
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
        seed=arguments.seed,
    )


def load(arguments: argparse.Namespace) -> tuple[YocoUForCausalLM, PreTrainedModel, torch.dtype]:
    """Student in float32, source in the precision that was asked for, and the dtype that the student is stored in."""
    try:
        dtype = YocoUConfig.from_dict(read_keys(str(arguments.student))).dtype
        student = YocoUForCausalLM.from_pretrained(arguments.student, dtype=torch.float32, attn_implementation=PACKED)
        precision = DTYPES[arguments.precision]
        teacher = AutoModelForCausalLM.from_pretrained(
            arguments.source, dtype=precision, attn_implementation=PACKED
        ).eval()
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


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments as JSON has them, without the one that only says how a run begins."""
    settings = json.loads(json.dumps(vars(arguments), default=str))
    del settings["resume"]
    return settings


def keep_settings(arguments: argparse.Namespace, file: Path) -> None:
    """Keep the settings of a run beside its steps; one that goes on must have the same, or its steps would differ."""
    settings = settings_of(arguments)
    if arguments.resume and file.exists():
        kept = json.loads(file.read_text())
        for name in (name for name in settings if settings[name] != kept.get(name)):
            refuse(f"the run began with {name} {kept.get(name)} and not {settings[name]}: --resume needs the same.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


def refuse_what_does_not_fit(arguments: argparse.Namespace, student: YocoUConfig, source_layers: int) -> None:
    """Refuse settings that mean nothing for these models."""
    most = min(student.num_cross_decoder_layers, source_layers - 1)
    if arguments.hidden and arguments.hidden_layers > most:
        refuse(f"--hidden-layers is {arguments.hidden_layers}: {most} of both models correspond, take at most so many.")
    if arguments.iterations and student.num_iterations not in arguments.iterations:
        refuse(
            f"--iterations leaves out {student.num_iterations}, with which {arguments.student} is served: name it too."
        )
    if arguments.sequence <= student.sliding_window:
        refuse(
            f"rows of {arguments.sequence} tokens stay within the window of {student.sliding_window}: nothing would "
            "train the cross-decoder to look farther back, raise --sequence."
        )


def held_out_nats(
    model: YocoUForCausalLM, rows: list[dict[str, torch.Tensor]], iterations: list[int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What `loss.row_nats` finds with each of the `iterations`, by their number."""
    found = {}
    for T in sorted(set(iterations)):
        with iterating(model.config, T):
            found[str(T)] = loss.row_nats(model, rows)
    return found


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
    if not arguments.resume and (kept := last_saved(steps)):
        refuse(f"{steps} holds {kept.name} of another run: add --resume to go on from it, or give another folder.")
    keep_settings(arguments, steps / "settings.json")
    student, teacher, dtype = load(arguments)
    refuse_what_does_not_fit(arguments, student.config, teacher.config.num_hidden_layers)
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {arguments.student} has no end of text to put between documents: set its eos_token.")
    training, held_out = split(read_rows(arguments.text, tokenizer, arguments.sequence), arguments.held_out)
    if not len(training):
        refuse(f"the text has {len(held_out)} rows of {arguments.sequence} tokens, none to train on: give more.")

    set_seed(arguments.seed)
    train_only(student, arguments.train)
    settings, clock = training_arguments(arguments), StepClock()
    if settings.n_gpu > 1:
        refuse("one process sees several GPUs: start it with `accelerate launch`, or name one in CUDA_VISIBLE_DEVICES.")
    iterations = arguments.iterations or student.config.trained_iterations
    trainer = Distillation(
        model=student,
        args=settings,
        train_dataset=look_back(training, arguments.look_back),
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[clock],
        teacher=teacher,
        terms=Terms(arguments.next_token, arguments.temperature, arguments.hidden, arguments.hidden_layers),
        iterations=iterations,
    )
    rows = [collate([row]) for row in held_out]
    found = {"before": held_out_nats(student.eval(), rows, iterations)}
    state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME)) if last else None
    if last and state and state.global_step >= arguments.steps:
        # The run was stopped after its last step; the Trainer would take one more.
        student = YocoUForCausalLM.from_pretrained(str(last), dtype=torch.float32)
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
    if not trainer.is_world_process_zero():
        return

    student.config.trained_iterations = sorted(set(iterations))
    student.to(dtype).save_pretrained(arguments.output)  # type: ignore[arg-type]  # to() is hidden, as above
    copy_companions(arguments.student, arguments.output)
    saved = YocoUForCausalLM.from_pretrained(arguments.output, dtype=torch.float32, attn_implementation=PACKED).eval()
    found["after"] = held_out_nats(saved.to(settings.device), rows, iterations)
    found["source"] = {"": loss.row_nats(teacher.float(), rows)}
    mean = {
        when: {T: (sums.sum() / labels.sum()).item() for T, (sums, labels) in each.items()}
        for when, each in found.items()
    }
    loss.draw(
        state.log_history,
        arguments.output / "loss.png",
        "Healing by distillation",
        training="training (the sum of all terms)",
        levels={"held out, source": mean["source"][""]},
    )
    perplexity = {when: {T: round(math.exp(nats), 2) for T, nats in each.items()} for when, each in mean.items()}
    report = {
        "settings": settings_of(arguments),
        "training_tokens": state.num_input_tokens_seen,
        "held_out_tokens": int(found["source"][""][1].sum()),
        "held_out_nats": {
            when: {T: (sums / labels).tolist() for T, (sums, labels) in each.items()} for when, each in found.items()
        },
        "held_out_perplexity": perplexity | {"source": perplexity["source"][""]},
        "history": state.log_history,
    }
    print("held-out perplexity:", report["held_out_perplexity"])
    if clock.s and arguments.train == "all":  # or else fewer operations than those of a whole step
        rows_a_second = clock.tokens / arguments.sequence / settings.world_size / clock.s
        flops = [step_flops(student, teacher, arguments.sequence, T) for T in iterations]
        achieved = sum(flops) / len(flops) * rows_a_second
        peak = peak_flops(settings.device, DTYPES[arguments.precision])
        report["model_flops_utilisation"] = round(achieved / peak, 4)
        print(
            f"model FLOPs utilisation: {achieved / peak:.1%}, {achieved / 1e9:,.1f} GFLOP/s a device of the "
            f"{peak / 1e9:,.1f} that a product of matrices reached in {arguments.precision}"
        )
    (arguments.output / "distillation.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
