"""Every table that there is, by name and by what it is about."""

from benchmarks.tables import (
    caches,
    comparisons,
    gpu,
    long_prompts,
    prefix_caching,
    quality,
    replicas,
    speed,
    step_calls,
    tail_latency,
)
from benchmarks.tables.table import Table

GROUPS: dict[str, tuple[Table, ...]] = {
    "KV cache": (*caches.TABLES, *prefix_caching.TABLES),
    "Speed": (*speed.TABLES, *step_calls.TABLES, *tail_latency.TABLES, *replicas.TABLES),
    "Compared with what one would use instead": (*long_prompts.TABLES, *comparisons.TABLES),
    "Answers": quality.TABLES,
    "On a GPU": gpu.TABLES,
}
TABLES: dict[str, Table] = {table.name: table for group in GROUPS.values() for table in group}
