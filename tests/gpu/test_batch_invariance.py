"""How far a request's numbers move with its company under CUDA's backends, and that VLLM_BATCH_INVARIANT stops it.

vLLM reads the variable when it is imported, so `make gpu-all` runs this file twice, each time in a process of its own.
"""

import pytest
from harness import tiny
from vllm import envs

from benchmarks.prober import ALONE, Prober

SIZES = dict(hidden_size=512, head_dim=64, num_attention_heads=8, sliding_window=100, vocab_size=1024)
MODELS = {"dense": tiny.config, "mixture": tiny.moe_config}
FURTHEST = 0.5  # nats, without the variable: what it prints is the figure


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("kind", MODELS)
def test_company(kind, backend, engine, tmp_path):
    tiny.model(MODELS[kind](**SIZES)).save_pretrained(tmp_path)
    settings = dict(max_num_batched_tokens=1100, max_num_seqs=32, compilation_config={}, attention_backend=backend)
    settings |= dict(dtype="bfloat16", enable_prefix_caching=True)
    if envs.VLLM_BATCH_INVARIANT and backend == "FLASH_ATTN":
        with pytest.raises(ValueError, match="FLASH_ATTN cannot be used with VLLM_BATCH_INVARIANT=1"):
            engine(tmp_path, **settings)
        return
    llm = engine(tmp_path, **settings)
    prober = Prober(llm, tokens=900, others=15, longest=200, chunks=(100, 333))
    differences = {(what, company): largest for what, company, largest in prober.differences()}
    mode = "invariant" if envs.VLLM_BATCH_INVARIANT else "not invariant"
    for (what, company), largest in differences.items():
        print(f"{kind}, {backend}, {mode}: {what} {company} {largest:.1e}")
    assert differences["answer", ALONE] == 0
    assert max(differences.values()) <= (0 if envs.VLLM_BATCH_INVARIANT else FURTHEST)
