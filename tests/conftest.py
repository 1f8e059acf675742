"""Settings that every test needs before torch starts its threads."""

import os

# Tiny tensors: a second thread costs more than it brings. In-process engines bind no threads by themselves either.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Engines of the tests live in the test process, where scheduler and runner can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
