"""bfloat16 and float16, of which every GPU user gets one without a flag: as exact as the reference in that type."""

import pytest
import torch
from harness import processor, tiny
from harness.engines import generate
from harness.half_precision import HalfPrecision

LENGTHS = (1, 15, 16, 17, 50, 133)
SMALLEST = "T1-S2-C2-nope-mha"
COMMON = "T3-S3-C2-qknorm-interleaved-W7"
needs_units = pytest.mark.skipif(
    not processor.has_bfloat16_units(), reason="without units for bfloat16 only the smallest case is quick enough"
)


def cases() -> list:
    """One in `make test`: on a processor that has bfloat16, with all of its switches, elsewhere the smallest."""
    first = COMMON if processor.has_bfloat16_units() else SMALLEST
    every = [(name, dtype) for name in tiny.CONFIGS for dtype in (torch.bfloat16, torch.float16)]
    every += [(name, torch.bfloat16) for name in tiny.LINEAGE]
    return [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{dtype}".replace("torch.", ""),
            marks=[] if (name, dtype) == (first, torch.bfloat16) else [pytest.mark.slow, needs_units],
        )
        for name, dtype in every
    ]


@pytest.mark.parametrize("name, dtype", cases())
def test_no_less_exact_than_the_reference(name, dtype, engine, tmp_path):
    """Prompts whose rows skip, prompts whose every row runs, and the same again from the prefix cache."""
    config = (tiny.CONFIGS | tiny.LINEAGE)[name]
    oracle = HalfPrecision(tiny.model(config), dtype)
    oracle.stored.save_pretrained(tmp_path)
    options = {"yocou": {"max_global_block": 192}}  # so short that the longest prompt finds hits
    llm = engine(tmp_path, dtype=str(dtype).removeprefix("torch."), additional_config=options)
    prompts = [*map(tiny.prompt, LENGTHS), tiny.prompt(300)]
    for sampling in ({}, {"prompt_logprobs": 3}, {}):
        outputs = generate(llm, prompts, **sampling)
        for prompt, output in zip(prompts, outputs, strict=True):
            oracle.compare(prompt, output)
    # With a window of one token vLLM finds no hits.
    assert any(output.num_cached_tokens for output in outputs) == (config.sliding_window > 1)
    oracle.check()


@needs_units
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_two_ranks(experts, engine_process, nightly, tmp_path):
    config = tiny.moe_config() if experts else tiny.config(qk_norm="all")
    oracle = HalfPrecision(tiny.model(config), torch.bfloat16)
    oracle.stored.save_pretrained(tmp_path)
    requests = [{"prompt": tiny.prompt(length), "sampling": {"prompt_logprobs": 3}} for length in LENGTHS]
    (batch,) = engine_process.run(tmp_path, [requests], dtype="bfloat16")
    for request, output in zip(requests, batch.outputs, strict=True):
        oracle.compare(request["prompt"], output)
    oracle.check()
