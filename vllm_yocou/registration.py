"""What vLLM's entry point calls in each of its processes: it adds names to registries and never raises.

vLLM calls every plugin at every start, whatever the model: an exception here, a slow import or a changed default would
reach users of other models. So the model is named by a string, imported only when a YOCO-U checkpoint is loaded.
"""

import logging

from vllm_yocou import __version__
from vllm_yocou.seams.check import SeamMissing, check, is_too_old, named, tested, vllm_version

ARCHITECTURE = "YocoUForCausalLM"
MODEL_CLASS = "vllm_yocou.serving.model:YocoUForCausalLM"

# A child of vLLM's logger, so that the lines look like vLLM's own and obey its settings.
logger = logging.getLogger("vllm.plugins.yocou")


def register() -> None:
    """Make YOCO-U known to transformers and to vLLM. Safe to call any number of times."""
    try:
        found = vllm_version()
        if is_too_old(found):
            logger.error(
                "vllm-yocou %s does not serve YOCO-U models with vLLM %s: it supports vLLM %s, install one of these.",
                __version__,
                named(found),
                tested(),
            )
            return
        _register()
    except SeamMissing as missing:
        logger.error("%s", missing)
    except Exception as error:  # Invariant of this module: a failure here must not stop vLLM from serving other models.
        logger.error("vllm-yocou %s could not register and YOCO-U models will not load: %r", __version__, error)


def _register() -> None:
    from vllm_yocou.seams.settings import OF_REGISTRATION

    check(OF_REGISTRATION)
    from transformers import AutoConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from vllm_yocou.config import YocoUConfig
    from vllm_yocou.serving.engine_settings import YocoUArchitecture, YocoUEngineSettings

    AutoConfig.register(YocoUConfig.model_type, YocoUConfig, exist_ok=True)
    MODEL_ARCH_CONFIG_CONVERTORS[YocoUConfig.model_type] = YocoUArchitecture
    MODELS_CONFIG_MAP[ARCHITECTURE] = YocoUEngineSettings
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
