"""LoRA adapters as peft saves them equal merged weights: several in one batch, next to none, with rows skipped."""

import peft
import pytest
import torch
from harness import tiny
from harness.oracle import Oracle

from vllm_yocou.reference import YocoUForCausalLM

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
        model = YocoUForCausalLM.from_pretrained(checkpoint)
        (targets,) = targets if name == "cross-decoder" else (targets,)  # peft takes a string for a pattern
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        torch.manual_seed(rank)
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_" in parameter_name:
                    parameter.normal_(std=0.1)
        folder = tmp_path_factory.mktemp(name)
        adapted.save_pretrained(folder)
        models[str(folder)] = adapted.merge_and_unload().eval()
    return models


LENGTHS = (1, 36, 37, 90, 300)
RUNNERS = [
    pytest.param("v1", LENGTHS, id="v1"),
    # In Triton's interpreter, which is slow.
    pytest.param("v2", LENGTHS[:3], id="v2", marks=pytest.mark.slow),
    pytest.param("two-ranks", LENGTHS, id="two-ranks", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine_process, lengths", RUNNERS, indirect=["engine_process"])
def test_several_adapters_in_a_batch_equal_merged_weights(engine_process, lengths, checkpoint, merged):
    # Neighbours differ in adapter, in length and in whether their prompt rows run through the cross-decoder.
    requests = [
        {"prompt": tiny.prompt(length, seed), "adapter": folder, "sampling": {"prompt_logprobs": 2} if scored else {}}
        for length in lengths
        for seed, folder in enumerate(merged)
        for scored in [(length + seed) % 3 == 0]
    ]
    (batch,) = engine_process.run(checkpoint, [requests], enable_lora=True, max_loras=3, max_lora_rank=16)
    oracles = {folder: Oracle(model) for folder, model in merged.items()}
    for request, output in zip(requests, batch.outputs, strict=True):
        oracles[request["adapter"]].compare(request["prompt"], output)
    for oracle in oracles.values():
        oracle.check()
    skipped = sum(len(request["prompt"]) - 1 for request in requests if not request["sampling"])
    assert batch.metrics["yocou_skipped_rows"] == skipped


def test_every_adapter_changes_the_answers(merged):
    """Otherwise a served model that ignored one would pass."""
    prompt = torch.tensor([tiny.prompt(90)])
    plain, *others = (model(prompt).logits.log_softmax(-1) for model in merged.values())
    assert all((plain - other).abs().max() > 0.1 for other in others)
