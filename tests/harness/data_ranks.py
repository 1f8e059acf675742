"""Two data-parallel ranks, each an engine in a process of its own, that take every step together.

A job of harness/engine_process.py with "ranks", the batches of each rank, goes to one such process for each.
"""

import gc
import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection

# The runner of each rank, and how its process comes by what it imports: a copy is made of one without an engine.
CHILDREN = {"two-ranks": ("data-rank", "fork"), "v2": ("v2", "spawn"), "v1-graphs": ("v1-graphs", "spawn")}
# Without executors of their own; a core for each rank, which the kernel finds.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SETTINGS = dict(distributed_executor_backend="uni")


def answer(runner: str, job: dict) -> dict:
    """{"ranks": the answers of the ranks}, or {"error": TRACEBACK} of the first that failed."""
    child, method = CHILDREN[runner]
    context, ranks, port = multiprocessing.get_context(method), len(job["ranks"]), free_port()
    receivers, processes = [], []
    for rank, batches in enumerate(job["ranks"]):
        receiver, sender = context.Pipe(duplex=False)
        own = dict(checkpoint=job["checkpoint"], settings=SETTINGS | job["settings"], batches=batches, calls=None)
        data_parallel = {
            "VLLM_DP_SIZE": str(ranks),
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
        process = context.Process(target=be_rank, args=(child, own, ENVIRONMENT | data_parallel, sender))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    answers = [receiver.recv() for receiver in receivers]
    errors = [found for found in answers if "error" in found]
    for process in processes:
        # The other ranks wait for one that failed.
        if errors:
            process.kill()
        process.join()
    return errors[0] if errors else {"ranks": answers}


def be_rank(runner: str, job: dict, environment: dict[str, str], sender: Connection) -> None:
    os.environ |= environment
    from harness.engine_process import JOB_S, RunnerEngines

    gc.freeze()  # of what the process has copied nothing is garbage, and looking at it all takes half a second
    signal.alarm(JOB_S)  # which a process that starts another does not hand on
    sender.send(RunnerEngines(runner).answer(job))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
