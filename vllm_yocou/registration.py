"""What vLLM's entry point calls in each of its processes: it adds names to registries and never raises.

vLLM calls every plugin at every start, whatever the model: an exception here, a slow import or a changed default would
reach users of other models. So the model is named by a string, imported only when a YOCO-U checkpoint is loaded.
"""

import logging

from vllm_yocou import __version__

SUPPORTED_VLLM = ((0, 32),)
ARCHITECTURE = "YocoUForCausalLM"
MODEL_CLASS = "vllm_yocou.serving.model:YocoUForCausalLM"

# A child of vLLM's logger, so that the lines look like vLLM's own and obey its settings.
logger = logging.getLogger("vllm.plugins.yocou")


def register() -> None:
    """Make YOCO-U known to transformers and to vLLM. Safe to call any number of times."""
    try:
        found = _vllm_version()
        if found[:2] not in SUPPORTED_VLLM:
            logger.error(
                "vllm-yocou %s does not serve YOCO-U models with vLLM %s: it supports vLLM %s, install one of these.",
                __version__,
                ".".join(map(str, found)),
                ", ".join(".".join(map(str, version)) for version in SUPPORTED_VLLM),
            )
            return
        _register()
    except Exception as error:  # Invariant of this module: a failure here must not stop vLLM from serving other models.
        logger.error("vllm-yocou %s could not register and YOCO-U models will not load: %r", __version__, error)


def _vllm_version() -> tuple[int, ...]:
    from vllm.version import __version_tuple__

    return tuple(part for part in __version_tuple__[:3] if isinstance(part, int))


def _register() -> None:
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_yocou.config import YocoUConfig
    from vllm_yocou.serving.engine_settings import YocoUEngineSettings

    AutoConfig.register(YocoUConfig.model_type, YocoUConfig, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = YocoUEngineSettings
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
