"""No forward pass of the model waits for the device: where it would read a tensor's values on the host, it raises."""

from functools import wraps
from unittest.mock import patch

READS = ("tolist", "item", "cpu", "numpy")


def refuse(*args, **kwargs):
    raise AssertionError("the forward pass reads a tensor's values on the host, for which a GPU would have to be ready")


def refuse_in_forward_passes() -> None:
    """From now on, in this process; before an engine is started."""
    import torch

    from vllm_yocou.serving.model import YocoUForCausalLM

    forward = YocoUForCausalLM.forward

    @wraps(forward)
    def without_reads(*args, **kwargs):
        with patch.multiple(torch.Tensor, **dict.fromkeys(READS, refuse)):
            return forward(*args, **kwargs)

    YocoUForCausalLM.forward = without_reads
