"""How many rows went through which half of the model, counted in the worker and shown on the server's /metrics.

Workers are processes of their own and vLLM carries no numbers of a model's from them to the server (a
`vllm.stat_logger_plugins` entry would see none either, and would turn statistics on for every model in the
environment). So the first rank writes prometheus_client's multiprocess format, a file for each process, and the
process that answers /metrics merges them. Where vLLM itself runs in that mode, its own directory is used. Ranks on
other machines are not seen, and engines of this process that have ended stay in the sums.
"""

import atexit
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from vllm.config import VllmConfig

HELP = {
    "vllm:yocou_self_decoder_rows": "Token rows that went through the self-decoder.",
    "vllm:yocou_cross_decoder_rows": "Token rows that went through the cross-decoder.",
    "vllm:yocou_skipped_rows": "Token rows that skipped the cross-decoder.",
}
VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

logger = logging.getLogger("vllm.plugins.yocou")


def directory(vllm_config: "VllmConfig") -> Path:
    """Where workers write; the same in every process of one engine, and for all its data-parallel ranks."""
    if VLLM_DIRECTORY in os.environ:
        return Path(os.environ[VLLM_DIRECTORY])
    instance = vllm_config.instance_id.partition("_dp")[0]
    return Path(tempfile.gettempdir()) / f"vllm-yocou-{instance}"


class RowCounters:
    """The worker's side."""

    def __init__(self, vllm_config: "VllmConfig"):
        names = ["model_name", "engine"]
        values = [str(vllm_config.model_config.served_model_name), str(vllm_config.parallel_config.data_parallel_index)]
        self.keys = [mmap_key(name, f"{name}_total", names, values, text) for name, text in HELP.items()]
        self.totals = [0, 0, 0]
        self.file: MmapedDict | None = None
        where, instance = directory(vllm_config), vllm_config.instance_id.replace("_", "-")
        try:
            where.mkdir(mode=0o700, exist_ok=True)
            # One file for each engine of a process; vLLM's own counters may live in `counter_<pid>.db` there.
            self.file = MmapedDict(str(where / f"counter_yocou-{instance}-{os.getpid()}.db"))
        except OSError as error:
            logger.warning("YOCO-U's row counters are not on /metrics, %s cannot be written: %s.", where, error)

    def count(self, self_decoder: int, cross_decoder: int) -> None:
        if self.file is None:
            return
        now = time.time()
        for i, rows in enumerate((self_decoder, cross_decoder, self_decoder - cross_decoder)):
            self.totals[i] += rows
            self.file.write_value(self.keys[i], self.totals[i], now)


class RowCollector:
    """The server's side: one for the process, over the directories of all engines that it has started."""

    def __init__(self) -> None:
        self.directories: list[Path] = []

    def collect(self) -> Iterable[Metric]:
        return MultiProcessCollector.merge([str(file) for where in self.directories for file in where.glob("*.db")])


collector = RowCollector()


def expose(vllm_config: "VllmConfig") -> None:
    """Show the counters of this engine's workers in this process's registry."""
    if VLLM_DIRECTORY in os.environ:
        return
    if not collector.directories:
        REGISTRY.register(collector)
    where = directory(vllm_config)
    collector.directories.append(where)
    atexit.register(shutil.rmtree, where, ignore_errors=True)
