"""A converted checkpoint of the 2024 code computes what that code computes; what cannot be converted is refused."""

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import TOKENS, convert, converted_logits, planned


def test_it_computes_the_same(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    convert(tmp_path, tmp_path / "converted", shard_bytes=30_000)
    expected = sources.yoco2024_logits(sources.YOCO2024, weights, TOKENS)
    torch.testing.assert_close(converted_logits(tmp_path / "converted"), expected, atol=2e-5, rtol=2e-5)


def test_tied_embeddings(tmp_path):
    """One tensor under two names, as torch.save keeps it."""
    weights = sources.yoco2024_weights(sources.YOCO2024)
    weights["output_projection.weight"] = weights["embed_tokens.weight"]
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    plan = convert(tmp_path, tmp_path / "converted")
    assert plan.config.tie_word_embeddings
    assert set(plan.left_out) == {"output_projection.weight"}
    expected = sources.yoco2024_logits(sources.YOCO2024, weights, TOKENS)
    torch.testing.assert_close(converted_logits(tmp_path / "converted"), expected, atol=2e-5, rtol=2e-5)


def test_a_source_without_a_head_is_refused(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    del weights["output_projection.weight"]
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        planned(tmp_path, tmp_path / "converted")


def test_gated_retention_is_refused(tmp_path):
    params = {key: value for key, value in sources.YOCO2024.items() if key != "sliding_window"}
    sources.save_yoco2024(tmp_path, params, {})
    with pytest.raises(ValueError, match="gated retention"):
        planned(tmp_path, tmp_path / "converted")
