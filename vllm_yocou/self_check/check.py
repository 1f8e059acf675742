"""Serves each model, compares its answers with the reference, and reports what it found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

from transformers.utils.logging import disable_progress_bar
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_yocou.seams.check import check as check_seams
from vllm_yocou.seams.table import SELF_CHECK
from vllm_yocou.self_check import models, workload
from vllm_yocou.self_check.comparison import Comparison, Reference
from vllm_yocou.self_check.engine import Settings, serving
from vllm_yocou.self_check.models import Model
from vllm_yocou.self_check.report import ModelReport, Report
from vllm_yocou.serving.backend import LAYOUTS

COMPILED = "compiled code"


def check(
    machine: dict[str, Any],
    settings: Settings,
    checkpoint: tuple[str, int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check the tiny models, or a checkpoint: its name, and how many parameters it has.

    Args:
        say: is given the report's lines as they come to be known, except the verdict.

    Raises:
        ValueError: the checkpoint is none that can be compared, vLLM has no such attention backend, or lacks something
            that the check needs.
    """
    check_seams(SELF_CHECK)
    disable_progress_bar()
    if settings.attention_backend not in (None, *AttentionBackendEnum.__members__):
        raise ValueError(
            f"vLLM has no attention backend '{settings.attention_backend}': the plugin builds on {', '.join(LAYOUTS)}."
        )
    device = current_platform.device_type
    report = Report(machine, device)
    with subjects(settings, checkpoint, device) as found:
        for model in found:
            model.config.check_ranks(settings.tensor_parallel_size)
        for line in report.head():
            say(line)
        for number, model in enumerate(found):
            in_force = settings
            if checkpoint is None and device == "cpu":
                in_force = on_a_cpu(settings, number)
            report.models.append(of_model(model, in_force, device))
            if in_force.enforce_eager and not settings.enforce_eager:
                report.models[-1].left_out[COMPILED] = "it takes long, and the first model shows it"
            for line in report.models[-1].lines():
                say(line)
    return report


def on_a_cpu(settings: Settings, number: int) -> Settings:
    """Those of the tiny model of this number: float32 as the README serves, and only the first one is compiled.

    Compilation takes a core half a minute a model, and two cores are to check all in two.
    """
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    return replace(settings, dtype=dtype, enforce_eager=settings.enforce_eager or number > 0)


@contextmanager
def subjects(settings: Settings, checkpoint: tuple[str, int] | None, device: str) -> Iterator[list[Model]]:
    if checkpoint is not None:
        name, parameters = checkpoint
        yield [models.checkpoint(name, parameters, settings.dtype, device)]
        return
    with models.tiny_models() as tiny:
        yield tiny


def of_model(model: Model, settings: Settings, device: str) -> ModelReport:
    """Everything about one model; an engine that does not start or answer is a complaint like any other."""
    report, answers, began = ModelReport(model.name), {}, monotonic()
    try:
        with serving(model, settings) as engine:
            report.facts, dtype = engine.facts(), engine.dtype
            asked, report.left_out = workload.cases(model.config, model.context, *engine.pool)
            for case in asked:
                answers[case.name], missed = engine.ask(case)
                report.wrong += missed
    except Exception as error:  # whatever vLLM, torch or a compiler raises
        does_not = "answer" if report.facts else "start"
        report.wrong.append(f"the engine does not {does_not}: {reason_of(error)}")
        return report
    comparison = Comparison(Reference(model.reference(dtype, models.reference_device(device))))
    for case_name, given in answers.items():
        for one in given:
            comparison.add(case_name, one)
    report.figures = comparison.figures()
    report.wrong += comparison.wrong()
    report.seconds = round(monotonic() - began, 1)
    return report


def reason_of(error: BaseException) -> str:
    """The last line of an exception, without what pydantic puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("For further information visit")]
    if not told:
        return type(error).__name__
    return told[-1].removeprefix("Value error, ").partition(" [type=")[0].rstrip(".")
