"""Every YocoUConfig that exists describes a model that can be built, to transformers and to vLLM.

The checks of architecture.py run on construction, on loading, on saving and on every override
(`from_pretrained(..., num_iterations=2)`, vLLM's `--hf-overrides`). Importing transformers' config class imports torch;
what needs neither uses `Architecture` alone.
"""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

from vllm_yocou import auto_classes, rope
from vllm_yocou.architecture import SWITCHES, Architecture
from vllm_yocou.config_keys import refuse_foreign

logger = logging.get_logger(__name__)


class YocoUConfig(PreTrainedConfig, Architecture):
    """Configuration of a YOCO-U model (Hugging Face `config.json`, `model_type: "yoco_u"`).

    The keys are `Architecture`'s.

    Raises:
        ValueError: a value from which no model can be built.
    """

    model_type = "yoco_u"
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_foreign(kwargs)
        self.complete()  # layer_types, which transformers reads next, needs the sizes
        others = kwargs | {"rope_parameters": self.rope_parameters}
        self.__dict__["rope_parameters"] = rope.merged({}, rope.gathered(others))
        super().__post_init__(**others)
        self.validate()

    def __setattr__(self, key: str, value: Any) -> None:
        """Set a key. RoPE settings are merged into the present ones: vLLM and transformers set mappings this way."""
        if key == "rope_parameters" and self.__dict__.get(key) is not None:
            value = rope.merged(self.__dict__[key], rope.as_mapping(key, value))
        super().__setattr__(key, value)

    def validate(self) -> None:
        """Raise ValueError unless a model can be built from the present values; transformers calls this to save.

        `check` covers transformers' own checks except the one that follows it.
        """
        self.check()
        self.validate_output_attentions()

    def validate_rope(self) -> None:
        """Raise ValueError unless the RoPE settings are right; vLLM calls this after it has read a config.json.

        transformers' own would warn of every type that it does not know.
        """
        rope.check(self.rope_parameters)

    def uuid(self) -> str:
        """This configuration as JSON without any T and without auto_map: what vLLM puts into its key of compiled code.

        One pass through the self-decoder is compiled and called T times, so that one artifact serves every T. Two
        other features of vLLM share this key and cannot distinguish two T of a checkpoint: the `system_fingerprint` of
        its answers, and the KV-cache size that `VLLM_ENABLE_STARTUP_PLAN` saves. Only what was saved has an auto_map.
        """
        keys = json.loads(self.to_json_string())
        for key in ("num_iterations", "trained_iterations", "auto_map"):
            keys.pop(key, None)
        return json.dumps(keys, sort_keys=True)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in `config_dict`, overridden by `kwargs`; with `return_unused_kwargs`, those as well."""
        loaded = super().from_dict(config_dict, **_with_rope_gathered(kwargs))
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate()
        config._warn_of_untrained_depth()
        return loaded

    def update(self, config_dict: dict[str, Any]) -> None:
        """Override keys of a loaded configuration (vLLM's `--hf-overrides`, except mappings) and check the result."""
        refuse_foreign(config_dict)
        for key in config_dict:
            known = hasattr(self, key) and not callable(getattr(type(self), key, None))
            if not known and key not in ("rope_theta", "quantization_config", "auto_map"):
                raise ValueError(f"config key '{key}' is unknown to YOCO-U: correct the name of the override.")
        super().update(_with_rope_gathered(config_dict))
        self.validate()
        self._warn_of_untrained_depth()

    def to_diff_dict(self) -> dict[str, Any]:
        """The keys that are saved: all but the authors' switches that are off, and a trained T that is the only one."""
        keys = super().to_diff_dict()
        implied = {key: getattr(type(self), key) for key in SWITCHES} | {"trained_iterations": [self.num_iterations]}
        return {key: value for key, value in keys.items() if key not in implied or value != implied[key]}

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the keys as JSON. A config.json also names the classes, whose module is written beside it.

        Everything that saves a config comes here, between what transformers does before and after for its hub.
        """
        path = Path(json_file_path)
        if path.name == CONFIG_NAME:
            self.auto_map = auto_classes.write_module(path.parent)
        super().to_json_file(path, use_diff)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Do nothing: for a registered class transformers saves a copy of its module, where ours names the package."""

    def _warn_of_untrained_depth(self) -> None:
        if self.num_iterations not in self.trained_iterations:
            trained = ", ".join(map(str, self.trained_iterations))
            logger.warning_once(
                f"num_iterations is {self.num_iterations}: the checkpoint was trained with {trained}, other depths "
                "usually cost quality."
            )


def _with_rope_gathered(overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides with every spelling of the RoPE settings under `rope_parameters`, which setting it merges."""
    overrides = dict(overrides)
    if given := rope.gathered(overrides):
        overrides["rope_parameters"] = given
    return overrides
