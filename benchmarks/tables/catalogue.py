"""Every table that there is, by name and by what it is about."""

from benchmarks.tables import caches, comparisons, gpu, prefix_caching, quality, speed
from benchmarks.tables.table import Table

GROUPS: dict[str, tuple[Table, ...]] = {
    "KV cache": (*caches.TABLES, *prefix_caching.TABLES),
    "Speed": speed.TABLES,
    "Compared with what one would use instead": comparisons.TABLES,
    "Answers": quality.TABLES,
    "On a GPU": gpu.TABLES,
}
TABLES: dict[str, Table] = {table.name: table for group in GROUPS.values() for table in group}
