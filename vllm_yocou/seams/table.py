"""Everything of vLLM's that this plugin relies on: every name that it imports, and what it expects of each.

tests/seams/test_table.py compares the table with the plugin's imports, calls and overridden methods.
"""

from vllm_yocou.seams.attention import ATTENTION, CACHES
from vllm_yocou.seams.model import LAYERS, MODEL
from vllm_yocou.seams.ranks import RANKS
from vllm_yocou.seams.self_check import SELF_CHECK
from vllm_yocou.seams.settings import OF_REGISTRATION, REQUESTS, SETTINGS

# What serving relies on, looked at when a model is configured; `vllm-yocou check` looks at SELF_CHECK itself.
__all__ = ["SEAMS", "SELF_CHECK"]

SEAMS = OF_REGISTRATION + SETTINGS + REQUESTS + ATTENTION + CACHES + LAYERS + MODEL + RANKS
