"""Tables of time are measured in each type that the processor computes in, one after the other."""

import gc
from collections.abc import Callable
from dataclasses import replace

from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.console import progress
from benchmarks.results import Measurement, Result
from vllm_yocou.cli import environment

# Of a processor, each of which multiplies bfloat16 without converting it.
FOR_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def dtypes_here() -> list[str]:
    """The types that a user of this processor chooses between."""
    features = environment.describe()["processor"]["features"]
    return ["float32", *(["bfloat16"] if FOR_BFLOAT16 & set(features) else [])]


def in_each_dtype(measure: Callable[[str], Result]) -> Result:
    """One result with what `measure` finds in each type; its measurements have a key `dtype` more."""
    joined: Result | None = None
    found: list[Measurement] = []
    for dtype in dtypes_here():
        progress(f"in {dtype}")
        result = measure(dtype)
        joined = joined or result
        found += [replace(one, of=one.of | {"dtype": dtype}) for one in result.measurements]
        joined.measurements = found
        joined.save()  # what is done, should the rest be cut
        # Engines whose names are gone would take the groups of the next ones with them.
        gc.collect()
        cleanup_dist_env_and_memory()
    assert joined is not None
    joined.settings["dtype"] = " and ".join(dtypes_here())
    return joined
