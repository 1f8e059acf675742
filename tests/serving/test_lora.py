"""LoRA adapters as peft saves them equal merged weights: several in one batch, next to none, with rows skipped."""

from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
from harness import tiny
from harness.oracle import Oracle
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_yocou.reference import YocoUForCausalLM
from vllm_yocou.serving.model import YocoUModel

SELF_DECODER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GLOBAL_KV = ["global_kv.k_proj", "global_kv.v_proj"]
CROSS_DECODER = ["cross_attn.q_proj", "cross_attn.o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]

TARGETS = {
    "everywhere": [*SELF_DECODER, *GLOBAL_KV, *CROSS_DECODER, *FEED_FORWARD],
    "values-of-the-global-cache": ["global_kv.v_proj"],
    "cross-decoder": [r"model\.cross_decoder\..*\.(q_proj|o_proj|gate_proj|down_proj)"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model(tiny.config(qk_norm="all")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(checkpoint, tmp_path_factory):
    """Adapter folder -> the reference with that adapter merged into its weights; None -> without any."""
    models = {None: YocoUForCausalLM.from_pretrained(checkpoint).eval()}
    for rank, (name, targets) in zip((8, 3, 16), TARGETS.items(), strict=True):
        (targets,) = targets if name == "cross-decoder" else (targets,)  # peft takes a string for a pattern
        folder = tmp_path_factory.mktemp(name)
        models[str(folder)] = adapted(checkpoint, folder, targets, rank)
    return models


def adapted(checkpoint, folder, targets: list[str] | str, rank: int) -> YocoUForCausalLM:
    """The checkpoint's model with an adapter merged into it that is saved to `folder`."""
    model = YocoUForCausalLM.from_pretrained(checkpoint)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    torch.manual_seed(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


LENGTHS = (1, 36, 37, 90, 300)
RUNNERS = [
    pytest.param("v1", LENGTHS, 0, id="v1"),
    pytest.param("v1", LENGTHS, 3, id="compiled", marks=pytest.mark.slow),
    # In Triton's interpreter, which is slow.
    pytest.param("v2", LENGTHS[:3], 0, id="v2", marks=pytest.mark.slow),
    pytest.param("two-ranks", LENGTHS, 0, id="two-ranks", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine_process, lengths, mode", RUNNERS, indirect=["engine_process"])
def test_several_adapters_in_a_batch_equal_merged_weights(engine_process, lengths, mode, checkpoint, merged):
    # Neighbours differ in adapter, in length and in whether their prompt rows run through the cross-decoder.
    requests = [
        {"prompt": tiny.prompt(length, seed), "adapter": folder, "sampling": {"prompt_logprobs": 2} if scored else {}}
        for length in lengths
        for seed, folder in enumerate(merged)
        for scored in [(length + seed) % 3 == 0]
    ]
    settings = dict(enable_lora=True, max_loras=3, max_lora_rank=16, compilation_config={"mode": mode})
    (batch,) = engine_process.run(checkpoint, [requests], **settings)
    oracles = {folder: Oracle(model) for folder, model in merged.items()}
    for request, output in zip(requests, batch.outputs, strict=True):
        oracles[request["adapter"]].compare(request["prompt"], output)
    for oracle in oracles.values():
        oracle.check()
    skipped = sum(len(request["prompt"]) - 1 for request in requests if not request["sampling"])
    assert batch.metrics["yocou_skipped_rows"] == skipped


@pytest.mark.parametrize("rows", [None, [0, 2]])
def test_adapters_are_mapped_to_selected_rows_only_where_some_are_left_out(rows):
    """A map of an earlier step would give rows the adapters of others."""
    step = None if rows is None else SimpleNamespace(rows_M=torch.tensor(rows))
    cache = SimpleNamespace(step_rows=lambda: step, wanted_rows=lambda: 3 if rows is None else len(rows))
    entered = []
    adapters = SimpleNamespace(in_force=lambda: nullcontext(entered.append(True)))
    model = SimpleNamespace(
        global_kv=SimpleNamespace(cache=cache), norm=lambda x: x, cross_decoder=lambda p, x, w: x + 1, adapters=adapters
    )
    out_ND = torch.zeros(4, 2)
    with set_forward_context(None, VllmConfig()):
        YocoUModel.cross_decode(model, torch.arange(4), torch.ones(4, 2), torch.empty(0), None, out_ND)
    assert bool(entered) == (rows is not None)
    assert out_ND.sum(1).nonzero().flatten().tolist() == (rows or [0, 1, 2])


def test_every_adapter_changes_the_answers(merged):
    """Otherwise a served model that ignored one would pass."""
    prompt = torch.tensor([tiny.prompt(90)])
    plain, *others = (model(prompt).logits.log_softmax(-1) for model in merged.values())
    assert all((plain - other).abs().max() > 0.1 for other in others)


@pytest.mark.parametrize(
    "switches, targets",
    [
        (dict(differential_attention="v3"), [*TARGETS["everywhere"], "lambda_proj"]),
        # In attention a layer of its own, in the feed-forward half of a merged one.
        (dict(headwise_glu=True), ["gate_proj", "up_proj", "q_proj"]),
    ],
    ids=["pairs", "heads"],
)
@pytest.mark.parametrize("engine_process", ["v1"], indirect=True)
def test_gates_of_heads_take_adapters(switches, targets, engine_process, nightly, tmp_path):
    plain, adapter = tmp_path / "plain", tmp_path / "adapter"
    tiny.model(tiny.config(swiglu_limit=0.4, **switches, **tiny.BIAS)).save_pretrained(plain)
    models = {str(adapter): adapted(plain, adapter, targets, 8), None: YocoUForCausalLM.from_pretrained(plain).eval()}
    requests = [{"prompt": tiny.prompt(length), "adapter": folder} for length in LENGTHS for folder in models]
    (batch,) = engine_process.run(plain, [requests], enable_lora=True, max_lora_rank=8)
    for folder, model in models.items():
        oracle = Oracle(model)
        for request, output in zip(requests, batch.outputs, strict=True):
            if request["adapter"] == folder:
                oracle.compare(request["prompt"], output)
        oracle.check()
