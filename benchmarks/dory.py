"""YOCO-U with T = 2 compared with NVIDIA's Dory, vLLM's looped model whose weights are public, in the same vLLM.

Both have the peers' width, heads and feed-forward, store S + C attention layers and run the first S of them twice.
Dory's attention layers keep their own mix: one in four reads all tokens, the others a window. It has two modes of KV
cache: one cache for each loop, or one that every loop overwrites.
"""

from benchmarks.engine import config

import dataclasses
import sys
from importlib import import_module
from typing import Any

from transformers import PretrainedConfig
from vllm import ModelRegistry

from benchmarks.console import publish
from benchmarks.peers import SMALL, Sizes, measure, our_pool, pool
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result
from benchmarks.tables.comparisons import OURS

SIZES = dataclasses.replace(SMALL, table="dory", changed=SMALL.changed | dict(num_iterations=2))
MODES = {"Dory, a cache for each loop": "per_loop", "Dory, the last loop's cache": "last_loop"}


def models(sizes: Sizes) -> dict[str, tuple[PretrainedConfig, dict[str, Any]]]:
    """Config and engine settings by name."""
    cfg, room = config(sizes.shape, **sizes.changed), our_pool(sizes)
    S, C = cfg.num_self_decoder_layers, cfg.num_cross_decoder_layers
    same = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim sliding_window"
    kept = {key: getattr(cfg, key) for key in (*same.split(), "max_position_embeddings")}
    found: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {OURS: (cfg, room)}
    for name, mode in MODES.items():
        dory = import_module("vllm.transformers_utils.configs.dory").DoryConfig(
            **kept,
            # An attention and a feed-forward layer of Dory's are one layer of the others'.
            num_hidden_layers=2 * (S + C),
            n_recurrent_layers=2 * S,
            n_output_layers=2 * C,
            n_recurrent_loops=cfg.num_iterations,
            recurrent_kv_cache_mode=mode,
            architectures=["DoryForCausalLM"],
        )
        found[name] = (dory, pool(sizes, cfg.num_iterations * S + C))
    return found


def of_dtype(dtype: str) -> Result:
    sizes = dataclasses.replace(SIZES, dtype=dtype)
    return measure(sizes, models(sizes))


def main() -> None:
    if "DoryForCausalLM" not in ModelRegistry.get_supported_archs():
        sys.exit("this vLLM has no Dory: run the table with vLLM 0.33 (make bench VLLM=0.33 ARGS=dory).")
    publish(in_each_dtype(of_dtype))


if __name__ == "__main__":
    main()
