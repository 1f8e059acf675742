"""Importing this package makes transformers' auto classes know YOCO-U, without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.cache import YocoUCache
from vllm_yocou.reference.model import YocoUForCausalLM, YocoUModel, YocoUPreTrainedModel

__all__ = ["YocoUCache", "YocoUForCausalLM", "YocoUModel", "YocoUPreTrainedModel"]

AutoConfig.register(YocoUConfig.model_type, YocoUConfig, exist_ok=True)
AutoModel.register(YocoUConfig, YocoUModel, exist_ok=True)
AutoModelForCausalLM.register(YocoUConfig, YocoUForCausalLM, exist_ok=True)
