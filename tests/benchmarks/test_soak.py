"""The soak, for a while and for a minute, and proof that each of its checks can fail."""

import asyncio
import json
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from aiohttp import web

from benchmarks import promises, results, soak, soak_clients
from benchmarks.promises import Expected, Mistake, Reference, Report
from benchmarks.server import Server, free_port, serving
from benchmarks.soak import CHANGES
from benchmarks.soak_changes import Nothing
from benchmarks.soak_clients import Client
from benchmarks.soak_models import Models, Served

PROMPT = [5, 6, 7]
LOGPROBS = [-1.5, -0.25]
# Greedy tokens by what stands before them, and how far the second best is.
NEXT = {7: (8, 1.0), 8: (9, 0.5e-3), 9: (8, 1.0), 10: (8, 1.0)}
EXPECTED = Expected(PROMPT, [8, 9, 8], LOGPROBS)


class Model:
    """Stands in for the reference: a token decides the next; after 8 come 9 and 10 alike."""

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        rows = torch.full((len(token_ids), 16), -9.0)
        for row, token in zip(rows, token_ids, strict=True):
            best, margin = NEXT.get(token, (0, 1.0))
            row[best], row[best + 1] = 0, -margin
        return rows

    check_tokens = Reference.check_tokens


@pytest.mark.parametrize("name", CHANGES)
def test_a_minute_of_mixed_clients(name, starts_vllm, both_cores, nightly, tmp_path):
    change = CHANGES[name](Reference(soak.CHECKPOINT), tmp_path)
    command = soak.command(change)
    with change.beside(command, 1200), serving(command, tmp_path / "log", environment=change.environment) as server:
        with pytest.raises(LookupError, match="vllm:nothing_of_this_name is not among"):
            server.metric("vllm:nothing_of_this_name")
        report = soak.soak(server, change, seconds=45, seed=1)
        assert server.process.poll() is None
    assert not report.sentences()
    assert set(report.sent) == set(soak_clients.KINDS)
    assert report.tokens.total() > 500
    assert change.made >= 2 if name in ("weights", "adapters") else change.made == 0


@pytest.mark.parametrize("served", [[8, 9, 8], [8, 9], [], [8, 10, 8]], ids=["whole", "part", "nothing", "near tie"])
def test_right_tokens(served):
    Model().check_tokens(EXPECTED, served)


@pytest.mark.parametrize(
    "served, seen",
    [([9, 8, 9], "token 0 after a prompt of 3 is 9 instead of 8"), ([8, 10, 9], "token 2 .* is 9 instead of 8")],
    ids=["no tie", "after a tie"],
)
def test_wrong_tokens(served, seen):
    with pytest.raises(Mistake, match=seen):
        Model().check_tokens(EXPECTED, served)


def given(*logprobs: float) -> list:
    return [None, *({str(token): {"logprob": p}} for token, p in zip(PROMPT[1:], logprobs, strict=False))]


def test_prompt_logprobs():
    promises.check_logprobs(EXPECTED, given(*LOGPROBS))
    for wrong in (given(-1.5, -0.252), given(float("nan"), -0.25), given(-1.5)):
        with pytest.raises(Mistake, match="prompt log probabilities"):
            promises.check_logprobs(EXPECTED, wrong)


def test_refusals():
    def body(message):
        return json.dumps({"error": {"message": message}})

    sentence = body("top_p must be in (0, 1], got 2.0.")
    promises.check_refusal(400, sentence, "top_p")
    for status, text in [(200, sentence), (500, sentence), (400, body("top_p")), (400, body("a bad request was sent"))]:
        with pytest.raises(Mistake, match="bad requests are answered"):
            promises.check_refusal(status, text, "top_p")
    for text in ("", "Internal Server Error", "[]", '{"error": null}', body(None)):
        with pytest.raises(Mistake, match="bad requests are answered"):
            promises.check_refusal(400, text, "top_p")


def test_figures_of_the_idle_server():
    promises.check_usage(0.0, 0.0)
    promises.check_growth(1000, 1019)
    promises.check_preemptions(1)
    for check, figures, promise in [
        (promises.check_usage, (0.0, 0.015), "no KV block is leaked"),
        (promises.check_growth, (1000, 1020), "memory grows by less than 2%"),
        (promises.check_preemptions, (0,), "requests are preempted"),
    ]:
        with pytest.raises(Mistake, match=promise):
            check(*figures)


def test_every_promise_that_was_not_kept_gets_one_sentence():
    report = Report()
    for end in (0.5, 0.25):
        report.check(promises.check_usage, 0.0, end)
    report.check(promises.check_growth, 1000, 1001)
    report.note(Mistake("the sky is blue", "it was grey"))
    assert report.sentences() == [
        "not kept: no KV block is leaked: usage of the idle server went from 0.0 to 0.5 (and 1 more).",
        "not kept: the sky is blue: it was grey.",
    ]


# What a broken server might answer to each kind of request, and the promise that it breaks.
CHOICE = dict(text="the LORD", finish_reason="stop", prompt_logprobs=given(*LOGPROBS))
BROKEN = {
    "whole": (CHOICE | {"token_ids": [9, 9, 9]}, "greedy answers are the reference's"),
    "at_the_limit": (CHOICE | {"token_ids": [9, 9, 9]}, "greedy answers are the reference's"),
    "several": (CHOICE | {"token_ids": [9, 9, 9]}, "greedy answers are the reference's"),
    "streamed": (CHOICE | {"token_ids": [9, 9, 9]}, "greedy answers are the reference's"),
    "aborted": (CHOICE | {"token_ids": [9, 9, 9]}, "greedy answers are the reference's"),
    "scored": (CHOICE | {"token_ids": [8, 9, 8], "prompt_logprobs": given(0, 0)}, "prompt log probabilities"),
    "structured": (CHOICE | {"token_ids": [8], "text": "Job"}, "structured output has its form"),
    "sampled": (CHOICE | {"token_ids": []}, "answers are whole"),
    "bad": (CHOICE | {"token_ids": [8]}, "bad requests are answered 4xx"),
}


def ask(kind: str, status: int, choice: dict, drawn: int = -1) -> Report:
    """One request of a kind, drawn from what it chooses among, to a server that always answers the same."""

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        if b'"stream": true' in body and status == 200:
            return web.Response(text=f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")
        several = 3 if b'"n": 3' in body else 1
        return web.json_response({"choices": [choice] * several}, status=status)

    async def run() -> Report:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        server = SimpleNamespace(url=f"http://127.0.0.1:{port}", model="m")
        client = Client(server, Models(Served("m", Model(), [EXPECTED])), Report(), "0")
        client.random = SimpleNamespace(choice=lambda of: of[drawn], randint=lambda low, high: high)
        async with soak_clients.session() as http:
            await client.request(http, kind)
        await runner.cleanup()
        return client.report

    with patch.object(soak_clients, "CONTEXT", len(PROMPT) + len(EXPECTED.tokens)):
        return asyncio.run(run())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_answer_is_seen(kind):
    assert set(BROKEN) == set(soak_clients.KINDS)
    choice, promise = BROKEN[kind]
    (sentence,) = ask(kind, 200, choice).sentences()
    assert promise in sentence


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "bad"])
def test_a_500_is_seen(kind):
    (sentence,) = ask(kind, 500, CHOICE).sentences()
    assert "good requests are answered 200: 500 for" in sentence


def test_a_500_is_seen_by_who_leaves_at_once():
    (sentence,) = ask("aborted", 500, CHOICE, drawn=0).sentences()
    assert "good requests are answered 200: 500 for" in sentence
    assert not ask("aborted", 200, CHOICE | {"token_ids": [8, 9, 8]}, drawn=0).sentences()


@pytest.mark.parametrize("kind", sorted(set(BROKEN) - {"bad"}))
def test_a_right_answer_passes(kind):
    assert not ask(kind, 200, CHOICE | {"token_ids": [8, 9, 8]}).sentences()


def test_a_dead_server_is_seen(monkeypatch, capsys):
    server = Server(f"http://127.0.0.1:{free_port()}", "m", process=None)
    monkeypatch.setattr(soak, "prompts", lambda: [])
    report = soak.soak(server, Nothing(Model(), None), seconds=1, seed=0)
    (sentence,) = report.sentences()
    assert sentence.startswith("not kept: the server is alive: URLError(")


@pytest.mark.parametrize("mistakes, code", [([], 0), ([Mistake("the sky is blue", "it was grey")], 1)], ids=str)
def test_the_command_says_what_was_not_kept(monkeypatch, tmp_path, capsys, mistakes, code):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    report = Report()
    for mistake in mistakes:
        report.note(mistake)
    monkeypatch.setattr(soak, "serving", lambda *_, **__: nullcontext())
    monkeypatch.setattr(soak, "Reference", lambda _: Model())
    monkeypatch.setattr(soak, "soak", lambda *_: report)
    monkeypatch.setattr(soak.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr("sys.argv", ["soak", "--changes", "nothing"])
    assert soak.main() == code
    told = "what changes: nothing\n" + "nothing: not kept: the sky is blue: it was grey.\n" * code
    assert capsys.readouterr().err == told
    assert len(list(tmp_path.glob("*/soak.json"))) == 1 - code


class Says:
    """Stands in for a reference that only takes answers of one token."""

    def __init__(self, token: int):
        self.token = token

    def check_tokens(self, expected: Expected, served: list[int]) -> None:
        if served != [self.token]:
            raise Mistake("greedy answers are the reference's", f"{served} instead of {self.token}")


def test_while_weights_change_an_answer_may_be_of_either():
    old, new = Served("m", Says(8), [EXPECTED]), Served("m", Says(9), [EXPECTED])
    models = Models(old)
    draw = SimpleNamespace(choice=lambda of: of[-1])
    client = Client(None, models, Report(), "0")

    def right(ticket, token: int) -> bool:
        client.ticket = ticket
        try:
            client.check(EXPECTED, lambda reference, expected: reference.check_tokens(expected, [token]))
        except Mistake:
            return False
        return True

    with models.asked(draw) as before, models.replaced_by(new):
        assert models.coming is new
        assert right(before, 8) and right(before, 9) and not right(before, 7)
    with models.asked(draw) as after:
        assert right(after, 9) and not right(after, 8)
    assert not models.under_way


def test_an_adapter_is_used_until_its_last_request_ends():
    base, adapter = Served("m", Says(8), [EXPECTED]), Served("adapter-0", Says(9), [EXPECTED])
    models = Models(base, adapter)
    with models.asked(SimpleNamespace(choice=lambda of: of[-1])) as ticket:
        assert ticket.model is adapter and models.is_used(adapter) and not models.is_used(base)
    assert not models.is_used(adapter)
