"""What transformers' generate() asks of the model class: which cache to fill, and what it must not try."""

from typing import Any, NoReturn

from transformers.generation import GenerationConfig, GenerationMixin

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.cache import YocoUCache


class YocoUGenerationMixin(GenerationMixin):
    """generate() with a YocoUCache: a cache of transformers' has one entry for each stored layer, not for each pass.

    transformers finds out by the name of this class that the model generates.
    """

    config: YocoUConfig

    def _prepare_cache_for_generation(  # type: ignore[override]  # its other arguments size a static cache
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Set model_kwargs["past_key_values"], unless the caller gave a cache or wants none.

        Raises:
            ValueError: a cache_implementation other than "dynamic", which is the default.
        """
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation='{kind}' cannot be used with YOCO-U: such a cache of transformers has no entry "
                "for each iteration, leave it out."
            )
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]  # its self is a protocol
            return
        cache = model_kwargs["past_key_values"] = YocoUCache(self.config)
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse continuous batching, to which generate_batch() leads as well.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (generate_batch) cannot be used with YOCO-U: the paged cache of transformers has no "
            "entry for each iteration, call generate(), or serve the checkpoint with vLLM."
        )
