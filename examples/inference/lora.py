"""Answer prompts without and with a LoRA adapter, as peft saves it: `python examples/inference/lora.py ADAPTER`."""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"
PROMPTS = ["In the beginning", "And Jesus said unto them,"]


def main() -> None:
    adapter = LoRARequest("adapter", 1, sys.argv[1])
    llm = LLM(str(TRAINED), dtype="float32", kv_cache_memory_bytes=256 << 20, enable_lora=True, max_lora_rank=64)
    greedy = SamplingParams(temperature=0, max_tokens=40)
    for request in (None, adapter):
        for output in llm.generate(PROMPTS, greedy, lora_request=request):
            name = request.lora_name if request else "none"
            print(f"{name}: {output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
