"""The authors' tensors in terms of ours: each is used, left out with a reason, or ends the conversion.

Tensors are called here by the names under which their serving fork loads them, whatever the form of the source. Tensors
that their code keeps fused are read in parts, so a layer's experts are never in memory together.
"""

import re
from functools import partial

import torch

from vllm_yocou.checkpoints.authors_keys import BITNET, EMBEDDING_PROJECTION, VISION, Reading
from vllm_yocou.checkpoints.format import expected_shapes
from vllm_yocou.checkpoints.mapping import Mapping, Origin, redundant, refuse_misfits
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.config import YocoUConfig

GLOBAL_KV = {"norm": "yoco_norm", "k_norm": "yoco_k_norm"}
# What a name ends or begins with that belongs to a model that is not converted.
REFUSED = (
    (r"(^|\.)emb_(proj_in|proj_out|in_norm|out_norm)(\.|$)", EMBEDDING_PROJECTION),
    (r"(weight_clip_val|act_scale|act_bias)$", BITNET),
    (r"^(language_model|vision_\w+|multi_modal_projector|mm_projector)\.", VISION),
)
# What training alone uses.
DROPPED = (
    (r"(^|\.)moe_loss\.", "counted for the training's loss"),
    (r"^(model\.)?mtp(_\w+)?\.", "predicts further tokens in training"),
)
SHORTEST_ROW = 1e-6


def mapping(found: dict[str, Origin], reading: Reading) -> Mapping:
    """What becomes of the tensors that were `found`, by their served names.

    Raises:
        ValueError: one of them belongs to what this architecture does not compute, or is misshapen.
    """
    config = reading.config
    for origin in found.values():
        _refuse_foreign(origin.name)
    if not reading.weighted_norms:
        _refuse_undeclared_weights(found)
    if config.tie_word_embeddings:
        _refuse_other_head(found)
    made = Mapping(config, {}, {}, [], reading.notes)
    used = set()
    for target, shape in expected_shapes(config).items():
        if re.search(r"\.[qk]_norm\.weight$", target) and not reading.weighted_norms:
            made.origins[target] = Origin("ones", SourceTensor.mapped(torch.ones(shape, dtype=_dtype(found))))
            continue
        name, origin = _origin(served_name(target, config), found, config)
        if target.endswith(".mlp.gate.weight") and not reading.normalised_router:
            origin = _normalised(origin)
        made.origins[target] = origin
        used.add(name)
    for name, origin in found.items():
        if name in used or origin.tensor is None:
            continue
        reason = redundant(name, origin.tensor, config, is_head=name == "lm_head.weight")
        if reason := reason or dropped(origin.name):
            made.left_out[origin.name] = reason
        else:
            made.unexpected.append(origin.name)
    return made


def served_name(target: str, config: YocoUConfig) -> str:
    """The name in the authors' fork of the tensor that a YOCO-U checkpoint calls `target`, as if none were fused."""
    if layer := re.fullmatch(r"model\.(self|cross)_decoder\.layers\.(\d+)\.(.+)", target):
        i = int(layer[2]) + (config.num_self_decoder_layers if layer[1] == "cross" else 0)
        rest = layer[3].replace("cross_attn.", "self_attn.").replace("shared_expert_gate", "shared_gate")
        return f"model.layers.{i}.{rest.replace('shared_expert.', 'shared_experts.')}"
    if part := re.fullmatch(r"model\.global_kv\.(\w+)\.(weight|bias)", target):
        return f"model.{GLOBAL_KV.get(part[1], part[1])}.{part[2]}"
    return target


def _origin(name: str, found: dict[str, Origin], config: YocoUConfig) -> tuple[str, Origin]:
    """The tensor of this name, or the part of a fused tensor that it is; and the name of what was used."""
    if expert := re.fullmatch(r"(.+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight", name):
        width, outside = config.moe_intermediate_size or 0, config.moe_latent_size or config.hidden_size
        fused = expert[1] + ("w2_weight" if expert[3] == "down" else "w13_weight")
        shape = (outside, width) if expert[3] == "down" else (2 * width, outside)
        return fused, _rows(fused, found, config.num_experts or 0, int(expert[2]), shape, expert[3])
    if name in found:
        return name, found[name]
    if shared := re.fullmatch(r"(.+\.mlp\.shared_experts\.)(gate|up)_proj\.weight", name):
        fused = f"{shared[1]}gate_up_proj.weight"
        shape = (2 * (config.shared_expert_intermediate_size or 0), config.hidden_size)
        return fused, _rows(fused, found, 1, 0, shape, shared[2])
    return name, Origin(name, None)


def _rows(name: str, found: dict[str, Origin], experts: int, expert: int, shape: tuple[int, int], part: str) -> Origin:
    """Of a tensor with matrices of `shape` of all experts, 2-D or 3-D: one expert's, or the gate or up half of it."""
    if name not in found or (whole := found[name].tensor) is None:
        return Origin(name, None)
    rows = shape[0]
    if whole.shape not in ((experts * rows, shape[1]), (experts, *shape)):
        wanted = f"{[experts * rows, shape[1]]}"
        refuse_misfits(misshapen=[f"{found[name].name} is {list(whole.shape)} instead of {wanted}"])
    first, last = {"gate": (0, rows // 2), "up": (rows // 2, rows), "down": (0, rows)}[part]
    if len(whole.shape) == 3:
        return Origin(found[name].name, whole.part(expert, slice(first, last)))
    return Origin(found[name].name, whole.part(slice(expert * rows + first, expert * rows + last)))


def _normalised(origin: Origin) -> Origin:
    """The router as their code uses it: every row divided by its length, in float32."""
    router = origin.tensor
    if router is None or not router.dtype.is_floating_point:
        return origin

    def change(rows_ED: torch.Tensor) -> torch.Tensor:
        rows_ED = rows_ED.float()
        return rows_ED / rows_ED.norm(dim=-1, keepdim=True).clamp(min=SHORTEST_ROW)

    return Origin(origin.name, router.changed(change, torch.float32, router.shape), "rows divided by their lengths")


def interleaved(origin: Origin) -> Origin:
    """Gates that are stored first for all first heads, then for all second, in pairs as the heads are."""
    if origin.tensor is None or len(origin.tensor.shape) != 2:
        return origin
    pairs = partial(torch.Tensor.unflatten, dim=0, sizes=(2, -1))
    tensor = origin.tensor.changed(
        lambda gates: pairs(gates).transpose(0, 1).flatten(0, 1), origin.tensor.dtype, origin.tensor.shape
    )
    return Origin(origin.name, tensor, "rows interleaved")


def flattened(origin: Origin, last: int) -> Origin:
    """Without the division into heads: only the `last` dimensions are kept apart."""
    tensor = origin.tensor
    if tensor is None or len(tensor.shape) <= last + 1:
        return origin
    kept = tensor.shape[len(tensor.shape) - last :]
    rows = torch.Size(tensor.shape[: len(tensor.shape) - last]).numel()
    flat = tensor.changed(lambda heads: heads.reshape(rows, *kept), tensor.dtype, (rows, *kept))
    return Origin(origin.name, flat, origin.change)


def _refuse_foreign(name: str) -> None:
    for pattern, reason in REFUSED:
        if re.search(pattern, name):
            raise ValueError(f"the source has {name}: {reason}, convert a checkpoint trained without it.")


def _refuse_undeclared_weights(found: dict[str, Origin]) -> None:
    for name, origin in found.items():
        if re.search(r"\.([qk]_norm|yoco_k_norm)\.weight$", name):
            raise ValueError(
                f"the source has {origin.name} and its 'qk_rms_gamma' is not true, so the authors' code would leave it "
                "out: set 'qk_rms_gamma' to true if it was trained with these weights, or remove them."
            )


def _refuse_other_head(found: dict[str, Origin]) -> None:
    """Raise ValueError if there is a head that is not the embeddings, which the config says it is."""
    head, embeddings = (found.get(name, Origin(name, None)) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head.tensor and embeddings.tensor and not torch.equal(head.tensor.read(), embeddings.tensor.read()):
        raise ValueError(
            f"the source's {head.name} differs from its {embeddings.name}, and the config says that they are tied: set "
            "'tie_word_embeddings' to false, or remove the head."
        )


def dropped(name: str) -> str | None:
    return next((reason for pattern, reason in DROPPED if re.search(pattern, name)), None)


def _dtype(found: dict[str, Origin]) -> torch.dtype:
    embeddings = found.get("model.embed_tokens.weight")
    return embeddings.tensor.dtype if embeddings and embeddings.tensor else torch.float32
