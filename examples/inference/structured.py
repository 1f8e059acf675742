"""Answers that follow a JSON schema, whatever the model prefers: `python examples/inference/structured.py`."""

from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"
BOOKS = ["Genesis", "Exodus", "Psalm", "Isaiah", "Matthew", "John", "Revelation"]
SCHEMA = {
    "type": "object",
    "properties": {"book": {"enum": BOOKS}, "chapter": {"type": "integer", "minimum": 1, "maximum": 50}},
    "required": ["book", "chapter"],
    "additionalProperties": False,
}


def main() -> None:
    # Compact JSON: a small model could go on with line breaks until its tokens are spent.
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    llm = LLM(str(TRAINED), dtype="float32", kv_cache_memory_bytes=256 << 20, structured_outputs_config=compact)
    bound = SamplingParams(temperature=0, max_tokens=60, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    for output in llm.generate(["In the beginning God created", "And Jesus said unto them,"], bound):
        print(f"{output.prompt!r} -> {output.outputs[0].text}")


if __name__ == "__main__":
    main()
