"""vLLM's ExampleConnector, which saves and loads cache by cache, without the hybrid KV cache manager."""

from harness import offloading, tiny
from harness.engines import generate, kv_cache_config, metric
from harness.oracle import agrees


def test_a_second_engine_reads_what_the_first_has_saved(engine, nightly, tmp_path):
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "saved").mkdir()
    transfer = dict(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(tmp_path / "saved")},
    )
    prompts = [tiny.prompt(length) for length in (50, 333, 700)]
    for found in (0, 192 + 576):
        llm = engine(
            tmp_path / "checkpoint",
            kv_transfer_config=transfer,
            enable_chunked_prefill=False,
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
        )
        (group,) = kv_cache_config(llm).kv_cache_groups  # every cache keeps every token
        assert len(group.layer_names) == 7 and group.kv_cache_spec.block_size == 192
        before = metric(llm, offloading.HITS)
        agrees(model, prompts, generate(llm, prompts))
        assert metric(llm, offloading.HITS) - before == found
        engine.stop()
