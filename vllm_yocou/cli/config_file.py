"""The config.json of a model, wherever it is: what a command knows of a model without importing torch."""

from pathlib import Path
from typing import Any

from vllm_yocou.architecture import Architecture
from vllm_yocou.checkpoints.sources import json_object

MODEL_TYPE = "yoco_u"


def read_architecture(model: str) -> Architecture:
    """What the config.json of `model` describes; see `read_keys`."""
    return Architecture.of(read_keys(model))


def read_keys(model: str) -> dict[str, Any]:
    """The keys in the config.json of `model`: a checkpoint's folder, that file or a name on the Hugging Face hub.

    Raises:
        ValueError: it is not a YOCO-U model's, or not JSON.
        OSError: there is no such file.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _downloaded(model)
    keys = json_object(path)
    if keys.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{model} is of model_type '{keys.get('model_type')}': give a checkpoint of '{MODEL_TYPE}'.")
    return keys


def _downloaded(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"{model} is neither a folder with a config.json nor such a file, and the Hugging Face hub gave none "
            f"({reason}): give the folder of a checkpoint."
        ) from None
