"""A checkpoint on disk names its classes to transformers' auto classes, and they are the installed package's.

With `trust_remote_code=True` transformers runs the module that `auto_map` in config.json names. It is a few lines, and
they import this package: so tools that know only the auto classes can load YOCO-U.
"""

from pathlib import Path

MODULE = "yoco_u"
SOURCE = '''\
"""YOCO-U for transformers' auto classes: the classes are those of the package vllm-yocou (`pip install vllm-yocou`)."""

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM, YocoUModel

__all__ = ["YocoUConfig", "YocoUForCausalLM", "YocoUModel"]
'''
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.YocoUConfig",
    "AutoModel": f"{MODULE}.YocoUModel",
    "AutoModelForCausalLM": f"{MODULE}.YocoUForCausalLM",
}


def write_module(checkpoint: Path) -> dict[str, str]:
    """Write the module into the folder of a checkpoint; return the `auto_map` for the config.json beside it."""
    (checkpoint / f"{MODULE}.py").write_text(SOURCE)
    return dict(AUTO_MAP)
