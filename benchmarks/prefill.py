"""Prefill with and without skipping the cross-decoder, and its ceiling: the self-decoder and the head alone."""

from benchmarks.engine import config, prompt_s, runner, start

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from benchmarks.console import progress, publish
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result
from vllm_yocou.config import YocoUConfig

ROUNDS = {512: 15, 4096: 5, 16384: 3}
SHAPE = "57M"


def flops(cfg: YocoUConfig, tokens: int, rows: int) -> float:
    """Operations of a prompt, two a multiply-add; the cross-decoder takes `rows` of it and the head one."""
    D, F, d, dc = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim, cfg.cross_head_dim
    heads, kv_heads, cross_heads = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.cross_num_attention_heads
    passes, cross_layers = cfg.num_iterations * cfg.num_self_decoder_layers, cfg.num_cross_decoder_layers
    window_keys = sum(min(n, cfg.sliding_window) for n in range(1, tokens + 1))
    cross_keys = tokens * (tokens + 1) / 2 if rows == tokens else rows * tokens
    self_layer = tokens * D * (2 * heads * d + 2 * kv_heads * d + 3 * F) + 2 * heads * d * window_keys
    cross_layer = rows * D * (2 * cross_heads * dc + 3 * F) + 2 * cross_heads * dc * cross_keys
    global_kv = tokens * D * 2 * cfg.cross_num_key_value_heads * dc
    return 2 * (passes * self_layer + global_kv + cross_layers * cross_layer + D * cfg.vocab_size)


class Prefill:
    """An engine whose prompts run in three ways."""

    def __init__(self, cfg: YocoUConfig, dtype: str) -> None:
        settings: dict[str, Any] = dict(dtype=dtype, max_model_len=max(ROUNDS) + 1, max_num_seqs=4)
        self.llm = start(cfg, kv_cache_memory_bytes=2 << 30, **settings)
        self.model = runner(self.llm).model.model
        groups = [group for groups in runner(self.llm).attn_groups for group in groups]
        builders = [group.get_metadata_builder() for group in groups]
        (self.builder,) = (builder for builder in builders if hasattr(builder, "selector"))

    @contextmanager
    def every_row(self) -> Iterator[None]:
        self.builder.selector.may_skip = False
        try:
            yield
        finally:
            self.builder.selector.may_skip = True

    @contextmanager
    def skipping(self) -> Iterator[None]:
        yield

    @contextmanager
    def self_decoder_alone(self) -> Iterator[None]:
        forward = self.model.cross_decoder.forward
        self.model.cross_decoder.forward = lambda positions_M, x_MD, *_: x_MD
        try:
            yield
        finally:
            self.model.cross_decoder.forward = forward

    def interleaved(
        self, lengths: dict[int, int], ways: Mapping[str, Callable[[], AbstractContextManager[None]]]
    ) -> Iterator[tuple[int, dict[str, list[float]]]]:
        """Seconds of prompts, of each length as many rounds as are given, every way once a round."""
        prompt_s(self.llm, min(lengths))
        for tokens, rounds in lengths.items():
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds):
                progress(f"{tokens} tokens, round {number + 1} of {rounds}")
                for name, way in ways.items():
                    with way():
                        times[name].append(prompt_s(self.llm, tokens))
            yield tokens, times


def measure(dtype: str = "float32") -> Result:
    cfg = config(SHAPE)
    prefill = Prefill(cfg, dtype)
    ways = {
        "every row": prefill.every_row,
        "skipping": prefill.skipping,
        "self-decoder alone": prefill.self_decoder_alone,
    }
    result = Result.here("prefill", shape=SHAPE, dtype=dtype, rounds=ROUNDS)
    for tokens, times in prefill.interleaved(ROUNDS, ways):
        for name, runs in times.items():
            result.add("first token", "s", runs, tokens=tokens, way=name)
        ceiling = flops(cfg, tokens, tokens) / flops(cfg, tokens, 0)
        result.add("ceiling by FLOPs", "x", ceiling, tokens=tokens)
    return result


if __name__ == "__main__":
    publish(in_each_dtype(measure))
