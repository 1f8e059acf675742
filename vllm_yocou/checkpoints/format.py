"""The tensors of a YOCO-U checkpoint: their names and shapes follow from the config alone.

Layers are stored once, however large T is. The loader compares what it is given with this table, so a wrong checkpoint
ends in one error that names the missing, unexpected and misshapen tensors, the first six of each kind. Damage that
leaves the names and shapes as they are is seen as far as it makes a file unreadable or a number NaN or infinite.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_yocou.config import YocoUConfig

# What a quantization method calls the numbers of a matrix themselves.
NUMBERS = ("weight", "weight_packed", "qweight")
NAMED = 6  # tensors that an error lists by name before it counts the rest


def expected_shapes(config: YocoUConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint; matrices are (out, in) as in torch.nn.Linear."""
    D, V = config.hidden_size, config.vocab_size
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    Hc, Kc, dc = config.cross_num_attention_heads, config.cross_num_key_value_heads, config.cross_head_dim
    self_norms = config.qk_norm in ("self", "all")
    cross_norms = config.qk_norm == "all"

    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_self_decoder_layers):
        layer = f"model.self_decoder.layers.{i}"
        shapes |= _layer_shapes(layer, config)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (H * d, D)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (K * d, D)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (K * d, D)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, H * d)
        if self_norms:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
    shapes["model.global_kv.norm.weight"] = (D,)
    shapes["model.global_kv.k_proj.weight"] = shapes["model.global_kv.v_proj.weight"] = (Kc * dc, D)
    if cross_norms:
        shapes["model.global_kv.k_norm.weight"] = (dc,)
    for j in range(config.num_cross_decoder_layers):
        layer = f"model.cross_decoder.layers.{j}"
        shapes |= _layer_shapes(layer, config)
        shapes[f"{layer}.cross_attn.q_proj.weight"] = (Hc * dc, D)
        shapes[f"{layer}.cross_attn.o_proj.weight"] = (D, Hc * dc)
        if cross_norms:
            shapes[f"{layer}.cross_attn.q_norm.weight"] = (dc,)
    return shapes


def _layer_shapes(layer: str, config: YocoUConfig) -> dict[str, tuple[int, ...]]:
    D = config.hidden_size
    shapes = {f"{layer}.input_layernorm.weight": (D,), f"{layer}.post_attention_layernorm.weight": (D,)}
    if not config.is_moe:
        return shapes | _swiglu_shapes(f"{layer}.mlp", D, config.intermediate_size)
    shapes[f"{layer}.mlp.gate.weight"] = (config.num_experts, D)
    for e in range(config.num_experts):
        shapes |= _swiglu_shapes(f"{layer}.mlp.experts.{e}", D, config.moe_intermediate_size)
    if config.shared_expert_intermediate_size is not None:
        shapes |= _swiglu_shapes(f"{layer}.mlp.shared_expert", D, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, D)
    return shapes


def _swiglu_shapes(prefix: str, D: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, D),
        f"{prefix}.up_proj.weight": (width, D),
        f"{prefix}.down_proj.weight": (D, width),
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, without one all that are not hidden.

    Raises:
        ValueError: the index is none.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("[!.]*.safetensors"))
    try:
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of safetensors files ({error!r}): fetch or convert the checkpoint again."
        ) from None


def check_files(folder: Path) -> None:
    """Raise ValueError for a file of weights that is not there or not whole; reads their headers only.

    vLLM would find out long after this, in an error that does not name the file.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}): fetch or convert the checkpoint again.") from None


def verified(
    weights: Iterable[tuple[str, torch.Tensor]], config: YocoUConfig, quantized: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on the tensors that fit; then raise ValueError if any was missing, unexpected, misshapen or not finite.

    A quantized checkpoint stores several tensors for a matrix, under names of its method. Every matrix must have those
    that others of its kind have: vLLM would leave what is missing of them as it was allocated.
    """
    expected = expected_shapes(config)
    missing, unexpected, misshapen, not_finite = set(expected), [], [], []
    stored: dict[str, dict[str, torch.dtype]] = {}
    for name, tensor in weights:
        matrix, _, part = name.rpartition(".")
        belongs = quantized and len(expected.get(f"{matrix}.weight", ())) == 2
        missing.discard(f"{matrix}.weight" if belongs else name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # Some writers store tied embeddings twice; the embedding's copy is the one in use.
        if not _is_finite(tensor):
            not_finite.append(name)
        if belongs:
            stored.setdefault(matrix, {})[part] = tensor.dtype
        if belongs and part != "weight":
            yield name, tensor
        elif name not in expected:
            unexpected.append(name)
        elif tuple(tensor.shape) != expected[name]:
            misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(expected[name])}")
        elif not quantized and not tensor.is_floating_point():
            misshapen.append(f"{name} is of {tensor.dtype} instead of a floating-point type")
        else:
            yield name, tensor
    missing.update(_missing_parts(stored))
    if problems := deviations(sorted(missing), unexpected, misshapen):
        raise ValueError(
            f"the checkpoint does not fit its config.json, {problems}. Correct the config or convert again."
        )
    if not_finite:
        raise ValueError(
            f"the checkpoint holds NaN or infinity in {_listed(not_finite)}: its training diverged or the file is "
            "damaged, fetch or convert it again."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes propagate NaN, and are found in the time of a copy; isfinite() takes fifteen times as long. float8
    # has no extremes of its own.
    low, high = (tensor if tensor.itemsize > 1 else tensor.bfloat16()).aminmax()
    return bool(low.isfinite() & high.isfinite())


def _missing_parts(stored: dict[str, dict[str, torch.dtype]]) -> Iterator[str]:
    """Names of what a quantized matrix lacks and others have whose numbers are of the same dtype."""
    kinds: dict[torch.dtype | None, set[str]] = {}
    for parts in stored.values():
        kinds.setdefault(_dtype_of_numbers(parts), set()).update(parts)
    for matrix, parts in stored.items():
        dtype = _dtype_of_numbers(parts)
        # Without its numbers a matrix is of a kind that has all the rest.
        alike = [kinds[dtype]] if dtype is not None else [kind for kind in kinds.values() if kind > set(parts)]
        yield from (f"{matrix}.{part}" for part in set().union(*alike) - set(parts))


def _dtype_of_numbers(parts: dict[str, torch.dtype]) -> torch.dtype | None:
    return next((parts[part] for part in NUMBERS if part in parts), None)


def deviations(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """What differs from a config's tensors, the first of each kind by name; empty where nothing does."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in kinds if names)


def _listed(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
