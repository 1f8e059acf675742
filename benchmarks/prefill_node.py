"""The time until a prompt's caches are whole: with the cross-decoder on every row, on the last one, and on none.

The last is what a prefill node does, of which no connector is needed here: only its choice of rows and its answer.
"""

from benchmarks.engine import config

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.console import publish
from benchmarks.precision import in_each_dtype
from benchmarks.prefill import Prefill
from benchmarks.results import Result
from vllm_yocou.rows.prefill_node import PrefillNode

ROUNDS = {350: 15, 1400: 11, 4096: 5, 16384: 3}
SHAPE = "57M"


class Node(Prefill):
    """An engine that can be told to be a prefill node, and not to be one."""

    @contextmanager
    def no_row(self) -> Iterator[None]:
        requests = self.model.global_kv.cache.rows.requests
        requests.prefill_node = PrefillNode(0)
        try:
            yield
        finally:
            requests.prefill_node = None


def measure(dtype: str = "float32") -> Result:
    node = Node(config(SHAPE), dtype)
    ways = {"every row": node.every_row, "one row": node.skipping, "no row": node.no_row}
    result = Result.here("prefill_node", shape=SHAPE, dtype=dtype, rounds=ROUNDS)
    for tokens, times in node.interleaved(ROUNDS, ways):
        for name, runs in times.items():
            result.add("prefill", "s", runs, tokens=tokens, way=name)
    return result


if __name__ == "__main__":
    publish(in_each_dtype(measure))
