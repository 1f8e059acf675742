"""A prefill node answers a placeholder without the cross-decoder and the head, unless somebody reads the answer."""

from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.oracle import check
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_yocou.rows.hand_over import RequestTable, RowSlots, StepRows
from vllm_yocou.rows.prefill_node import PrefillNode
from vllm_yocou.serving.model import YocoUForCausalLM

# A connector that moves nothing.
NOWHERE = {"kv_connector": "MultiConnector", "kv_role": "kv_producer", "kv_connector_extra_config": {"connectors": []}}


def settings(eos, generation: dict, role: str | None = "kv_producer", runner: str = "generate") -> SimpleNamespace:
    """The part of a VllmConfig that decides."""
    hf_config = SimpleNamespace(eos_token_id=eos)
    model_config = SimpleNamespace(
        hf_config=hf_config, runner_type=runner, try_get_generation_config=lambda: generation
    )
    transfer = None if role is None else SimpleNamespace(kv_role=role)
    return SimpleNamespace(kv_transfer_config=transfer, model_config=model_config)


@pytest.mark.parametrize(
    "eos, generation, expected",
    [(None, {}, 0), (0, {}, 1), (2, {"eos_token_id": [0, 1]}, 3), ([0, 2], {"eos_token_id": 1}, 3)],
)
def test_a_placeholder_ends_no_text(eos, generation, expected):
    assert PrefillNode.of(settings(eos, generation)) == PrefillNode(expected)


@pytest.mark.parametrize("role, runner", [(None, "generate"), ("kv_both", "generate"), ("kv_producer", "pooling")])
def test_somebody_reads_the_answers_of_other_engines(role, runner):
    assert PrefillNode.of(settings(0, {}, role, runner)) is None


READ = [
    {"max_tokens": 2},
    {"logprobs": 0},
    {"logprob_token_ids": [3]},
    {"stop_token_ids": [1]},
    {"allowed_token_ids": [2, 3]},
    {"bad_words": ["!"]},
    {"logit_bias": {1: -100}},
    {"structured_outputs": StructuredOutputsParams(choice=["no"])},
    {"prompt_logprobs": 0},
]


def test_what_somebody_reads():
    table = RequestTable(len(READ) + 1, PrefillNode(1))
    for index, sampling in enumerate(({}, *READ)):
        table.add(index, SamplingParams(**{"max_tokens": 1} | sampling), 7)
    assert (table.prefill_length == 7).tolist() == [False] + [True] * (len(READ) - 1) + [False]
    assert table.wants_prompt.tolist() == [False] * len(READ) + [True]


def test_the_placeholder_is_put_where_no_row_ran():
    hidden_RD = torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    logits_RV = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    PrefillNode(1).put(logits_RV, hidden_RD)
    assert logits_RV.argmax(-1).tolist() == [1, 2] and logits_RV[1].tolist() == [1.0, 2.0, 3.0]


def test_no_head_where_no_row_ran():
    slots, hidden_RD = RowSlots(4, PrefillNode(1)), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    global_kv = SimpleNamespace(cache=SimpleNamespace(rows=slots))
    of_model = SimpleNamespace(model=SimpleNamespace(global_kv=global_kv), config=SimpleNamespace(vocab_size=5))
    slots.put(object(), StepRows(torch.empty(0, dtype=torch.int64), 0), 0)
    assert YocoUForCausalLM.compute_logits(of_model, hidden_RD).argmax(-1).tolist() == [1, 1]
    slots.put(object(), StepRows(torch.tensor([3]), 1), 1)
    with pytest.raises(AttributeError, match="logits_processor"):
        YocoUForCausalLM.compute_logits(of_model, hidden_RD)


@pytest.mark.engine
@pytest.mark.parametrize("engine_process", ["v1", pytest.param("v2", marks=pytest.mark.slow)], indirect=True)
def test_no_row_and_no_head(engine_process, tmp_path):
    """One prompt that nobody reads, in chunks of 37; then it beside others whose answers somebody reads."""
    model = tiny.model(tiny.config(eos_token_id=0))
    model.save_pretrained(tmp_path)
    unread = {"prompt": tiny.prompt(100), "sampling": {"max_tokens": 1, "logprobs": None}}
    sampled = {"prompt": tiny.prompt(90, 4), "sampling": unread["sampling"] | {"temperature": 1}}
    read = [
        {"prompt": tiny.prompt(80, 1), "sampling": {"max_tokens": 3}},
        {"prompt": tiny.prompt(60, 2), "sampling": {"max_tokens": 1, "prompt_logprobs": 1}},
        {"prompt": tiny.prompt(50, 3), "sampling": {"max_tokens": 1, "logprobs": 1}},
    ]
    # A last chunk of one token is a decode for vLLM.
    decoded = unread | {"prompt": tiny.prompt(38, 5)}
    batches = [[unread], [unread, sampled, *read], [decoded]]
    alone, together, as_decode = engine_process.run(tmp_path, batches, kv_transfer_config=NOWHERE)
    assert alone.metrics["yocou_self_decoder_rows"] == 100 and alone.metrics["yocou_cross_decoder_rows"] == 0
    for output in (*alone.outputs, *together.outputs[:2]):
        assert list(output.outputs[0].token_ids) == [1]
    check(model, read, together.outputs[2:])
    assert as_decode.metrics["yocou_cross_decoder_rows"] == 1
    best = model(torch.tensor([decoded["prompt"]])).logits[0, -1].argmax()
    assert list(as_decode.outputs[0].outputs[0].token_ids) == [best]
