"""Processes for engines of other runners and of two ranks: one for each runner, shared by all tests of a session.

Such a process imports torch, vLLM and perhaps Triton's interpreter, which takes longer than most of its jobs.
harness/engine_process.py is its other end. A pytest plugin: the fixtures are `engine_process` and `engine_processes`.
"""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.server import user_environment
from harness.checkout import ROOT

IN_PROCESS = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
# What harness/engine_process.py says of each of them, and the environment that it is started with.
RUNNERS = {
    "v1": IN_PROCESS,
    "v1-graphs": IN_PROCESS,
    "v1-breakable": IN_PROCESS | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
    "v2": IN_PROCESS,
    "v2-triton": IN_PROCESS,
    # One core for each rank; vLLM would give all cores to the first.
    "v2-invariant": IN_PROCESS | INVARIANT,
    "two-ranks-invariant": IN_PROCESS | INVARIANT | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    "two-ranks": IN_PROCESS | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
}
END_S = 60


class JobFailed(Exception):
    """The engine did not start or did not answer: the traceback of its process, or the end of its log."""


@dataclass
class Batch:
    """One call of `LLM.generate`: its outputs as vLLM gives them, and how far each metric moved.

    Attributes:
        refusals: what the calls before it that failed said.
    """

    outputs: list
    metrics: dict[str, int]
    refusals: list[str]


class EngineProcess:
    """A started `python -m harness.engine_process RUNNER`."""

    def __init__(self, runner: str, log: Path):
        self.log = log
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.engine_process", runner],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                cwd=ROOT / "tests",
                env=user_environment() | RUNNERS[runner],
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def run(
        self, checkpoint: Path, batches: list[list[dict]], calls: list[list] | None = None, **settings
    ) -> list[Batch]:
        """Start an engine with `settings` of vLLM's `LLM`, generate batch after batch, end the engine.

        Args:
            batches: of requests {"prompt": token ids, "sampling": {...}, "adapter": folder, "aborted_after": steps},
                all but the prompt optional. A request that is aborted has no output.
            calls: for each batch, calls of all workers before it: a method's name and its arguments.

        Raises:
            JobFailed: with the error of the engine. The process is ready for the next job unless it died.
        """
        answer = self.ask({"checkpoint": str(checkpoint), "settings": settings, "batches": batches, "calls": calls})
        return batches_of(answer)

    def run_ranks(self, checkpoint: Path, ranks: list[list[list[dict]]], **settings) -> list[list[Batch]]:
        """As `run`, with batches for each of some data-parallel ranks, which end every batch together.

        A rank without requests in a batch is idle, and only takes the steps of the others.
        """
        answer = self.ask({"checkpoint": str(checkpoint), "settings": settings, "ranks": ranks})
        return [batches_of(of_rank) for of_rank in answer["ranks"]]

    def ask(self, job: dict) -> dict:
        with suppress(BrokenPipeError):  # where it died between two jobs, there is no answer either
            print(json.dumps(job), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait(END_S)
            end_of_log = self.log.read_text()[-5000:]
            raise JobFailed(f"the process ended with {code} (-14: the job took too long):\n{end_of_log}")
        answer = json.loads(line)
        if "error" in answer:
            raise JobFailed(answer["error"])
        return answer

    def close(self) -> None:
        """Let it end by itself, which it does after its current job."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self) -> None:
        self.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class EngineProcesses:
    """The processes of a session, each started when it is first asked for, and again after it died."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: dict[str, EngineProcess] = {}

    def of(self, runner: str) -> EngineProcess:
        if runner not in self.started or not self.started[runner].alive:
            self.started[runner] = EngineProcess(runner, self.folder / f"{runner}.log")
        return self.started[runner]

    def end(self) -> None:
        for process in self.started.values():
            process.close()
        for process in self.started.values():
            process.end()


@pytest.fixture(scope="session")
def engine_processes(tmp_path_factory):
    """For fixtures of a wider scope than a test: `engine_processes.of(runner)`."""
    processes = EngineProcesses(tmp_path_factory.mktemp("engine_processes"))
    yield processes
    processes.end()


@pytest.fixture
def engine_process(request, engine_processes) -> EngineProcess:
    """The process of the runner that `indirect` parametrization names, of V1 by default."""
    return engine_processes.of(getattr(request, "param", "v1"))


def batches_of(answer: dict) -> list[Batch]:
    return [
        Batch([request_output(plain) for plain in it["outputs"]], it["metrics"], it["refusals"])
        for it in answer["batches"]
    ]


def request_output(plain: dict) -> SimpleNamespace:
    """vLLM's RequestOutput again, as far as the tests read it, from the JSON of harness/engine_process.py."""

    def logprobs(rows: list | None) -> list | None:
        return rows and [row and {int(token): SimpleNamespace(logprob=p) for token, p in row.items()} for row in rows]

    completions = [
        SimpleNamespace(**completion | {"logprobs": logprobs(completion["logprobs"])})
        for completion in plain["completions"]
    ]
    return SimpleNamespace(
        outputs=completions,
        prompt_logprobs=logprobs(plain["prompt_logprobs"]),
        num_cached_tokens=plain["num_cached_tokens"],
    )
