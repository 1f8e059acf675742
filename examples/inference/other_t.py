"""Run the self-decoder another number of times than in training: `python examples/inference/other_t.py [T]`."""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"


def main() -> None:
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    # A lower T means less computation and fewer window caches; the weights are the same.
    overrides = {"num_iterations": iterations}
    llm = LLM(str(TRAINED), dtype="float32", kv_cache_memory_bytes=256 << 20, hf_overrides=overrides)
    (output,) = llm.generate("In the beginning", SamplingParams(temperature=0, max_tokens=40))
    print(f"T = {iterations}: {output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
