"""YOCO-U for transformers' auto classes: the classes are those of the package vllm-yocou (`pip install vllm-yocou`)."""

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM, YocoUModel

__all__ = ["YocoUConfig", "YocoUForCausalLM", "YocoUModel"]
