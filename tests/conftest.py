"""Settings that every test needs before torch starts its threads, and the one server that the online tests share."""

import logging
import os

import pytest

# Tiny tensors: a second thread costs more than it brings. In-process engines bind no threads by themselves either.
os.environ["OMP_NUM_THREADS"] = "1"
# Engines of the tests live in the test process, where scheduler and runner can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def pytest_terminal_summary(terminalreporter):
    from harness.oracle import checked

    if checked:
        terminalreporter.section("served model against the reference, float32")
        for test, difference, compared, rounding in checked:
            terminalreporter.write_line(
                f"|Δlogprob| <= {difference:.1e} of {compared:5} values, reference's rounding {rounding:.1e}: {test}"
            )


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What the plugin logs, taken by a filter: vLLM drops handlers when an engine configures logging."""
    collected, logger = [], logging.getLogger("vllm.plugins.yocou")
    monkeypatch.setattr(logger, "filters", [lambda record: collected.append(record.getMessage())])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    return collected


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    from harness.checkout import serving

    with serving(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="session")
def tokenizer():
    """The trained checkpoint's."""
    from harness.checkout import TRAINED
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TRAINED)


@pytest.fixture(scope="session")
def reference():
    """The trained checkpoint as the reference model."""
    import torch
    from harness.checkout import TRAINED

    from vllm_yocou.reference import YocoUForCausalLM

    return YocoUForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
