"""Requests that vLLM's V2 runner makes up to warm up are told from those of users."""

import inspect
import re
from types import SimpleNamespace

from vllm.v1.worker.gpu import warmup

from vllm_yocou.rows.hand_over import RequestTable
from vllm_yocou.rows.v2_runner import WARM_UPS, YocoUModelState


def test_vllms_names_are_known():
    named = re.findall(r'"(_\w*warmup\w*)', inspect.getsource(warmup))
    assert named and all(name.startswith(WARM_UPS) for name in named)


def test_the_table_is_told_which_are_made_up(monkeypatch):
    monkeypatch.setattr(YocoUModelState.__base__, "add_request", lambda *args: None)
    state = YocoUModelState.__new__(YocoUModelState)
    state.requests = RequestTable(3)
    for index, name in enumerate(("_warmup_0_", "cmpl-1", "7-_warmup_")):
        state.add_request(index, SimpleNamespace(req_id=name, sampling_params=None, prefill_token_ids=[1, 2]))
    assert state.requests.warms_up.tolist() == [True, False, False]
