"""Prefill with and without skipping the cross-decoder, beside the ceiling: the self-decoder and the head alone."""

from benchmarks.engine import config, prompt_s, runner, start  # isort: skip
import statistics
from contextlib import contextmanager

from benchmarks.table import print_table

ROUNDS = {512: 15, 4096: 5, 16384: 3}
SHAPE = "57M"


def flops(cfg, tokens: int, rows: int) -> float:
    """Multiply-adds times two of a prompt of which `rows` go through the cross-decoder; the head sees one row."""
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
    def __init__(self, cfg):
        settings = dict(max_model_len=max(ROUNDS) + 1, max_num_seqs=4)
        self.llm = start(cfg, kv_cache_memory_bytes=2 << 30, **settings)
        self.model = runner(self.llm).model.model
        groups = [group for groups in runner(self.llm).attn_groups for group in groups]
        builders = [group.get_metadata_builder() for group in groups]
        (self.builder,) = (builder for builder in builders if hasattr(builder, "selector"))

    @contextmanager
    def every_row(self):
        self.builder.selector.may_skip = False
        try:
            yield
        finally:
            self.builder.selector.may_skip = True

    @contextmanager
    def skipping(self):
        yield

    @contextmanager
    def self_decoder_alone(self):
        forward = self.model.cross_decoder.forward
        self.model.cross_decoder.forward = lambda positions_N, x_ND, source: x_ND
        try:
            yield
        finally:
            self.model.cross_decoder.forward = forward


def main() -> None:
    cfg = config(SHAPE)
    prefill, rows = Prefill(cfg), []
    ways = (prefill.every_row, prefill.skipping, prefill.self_decoder_alone)
    prompt_s(prefill.llm, 512)
    for tokens, rounds in ROUNDS.items():
        times = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                with way():
                    times[way].append(prompt_s(prefill.llm, tokens))
        every_s, skipping_s, alone_s = (statistics.median(times[way]) for way in ways)
        by_flops = flops(cfg, tokens, tokens) / flops(cfg, tokens, 0)
        rows.append(
            [
                tokens,
                f"{every_s:.2f} s",
                f"{skipping_s:.2f} s",
                f"{alone_s:.2f} s",
                f"{every_s / skipping_s:.2f}x",
                f"{every_s / alone_s:.2f}x",
                f"{by_flops:.2f}x",
                f"{alone_s / skipping_s:.0%}, {every_s / skipping_s / by_flops:.0%}",
            ]
        )
    header = ["prompt tokens", "every row", "skipping", "self-decoder alone", "speed-up", "ceiling by time"]
    note = f"{SHAPE} shape, float32, chunks of vLLM's scheduler with the plugin's default, medians of rounds in turn."
    header += ["ceiling by FLOPs", "reached, by time and FLOPs"]
    print_table("Prefill without the cross-decoder", note, header, rows)


if __name__ == "__main__":
    main()
