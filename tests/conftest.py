"""Settings that every test needs before torch starts its threads, and fixtures that several modules share."""

import logging
import os
import sys

import pytest

# Tiny tensors: a second thread costs more than it brings. In-process engines bind no threads by themselves either.
os.environ["OMP_NUM_THREADS"] = "1"
# Engines of the tests live in the test process, where scheduler and runner can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

pytest_plugins = ["harness.tiers", "harness.runners", "harness.figures", "harness.cuda"]


@pytest.fixture(scope="session", autouse=True)
def model_class_is_known():
    """To the engines in this process, if any test of the session starts one."""
    if "vllm.config" in sys.modules:
        from harness.engines import know_the_model_class

        know_the_model_class()


@pytest.fixture(autouse=True)
def environment():
    """What a test, or a module that it imports, sets in the environment ends with it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def engine():
    """Starts vLLM engines in this process, `engine(folder, **settings)`, which end with the test."""
    from harness.engines import Engines

    engines = Engines()
    yield engines
    engines.stop()


@pytest.fixture(scope="module")
def module_engine():
    """As `engine`, for a module's fixtures."""
    from harness.engines import Engines

    engines = Engines()
    yield engines
    engines.stop()


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
    """The trained checkpoint's, which all online tests share; the soak's has no flag and is compiled."""
    from harness.checkout import serving

    with serving(tmp_path_factory.mktemp("server"), "--enforce-eager") as started:
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
