"""Generate for a batch of prompts, without a server: `python examples/inference/offline.py [MODEL] [PROMPT ...]`."""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"
PROMPTS = ["In the beginning", "And Jesus said unto them,", "Psalm 23\nThe LORD is my shepherd;"]


def main() -> None:
    checkpoint, *prompts = sys.argv[1:] or [str(TRAINED)]
    # kv_cache_memory_bytes: on a CPU vLLM's own default is a share of all memory.
    llm = LLM(checkpoint, dtype="float32", kv_cache_memory_bytes=256 << 20, max_num_batched_tokens=512)
    greedy = SamplingParams(temperature=0, max_tokens=40)
    for output in llm.generate(prompts or PROMPTS, greedy):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
