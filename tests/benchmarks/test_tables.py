"""The benchmarks on tiny shapes: that they run, and that what they print follows from what they measured."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.checkout import TRAINED
from harness.llamas import save_material, upcycle

from benchmarks import render, results
from benchmarks.results import Result
from benchmarks.tables.catalogue import TABLES
from benchmarks.tables.table import cell


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where results are kept, instead of the repository's."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    return tmp_path / "results"


def rows(text: str) -> list[list[str]]:
    """Cells of the lines below a Markdown table's header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kept(folder: Path, table: str) -> Result:
    """The result that a table has left."""
    (path,) = folder.glob(f"*/{table}.json")
    return Result.load(path)


def shown(result: Result) -> list[list[Any]]:
    """The rows of its table."""
    return TABLES[result.table].rows(result)[1]


def number(cell: str) -> float:
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))


def bounds(cell: str) -> tuple[float, float]:
    """What may have been rounded to a cell's number."""
    digits = re.match(r"[\d,]+(?:\.(\d+))?", cell)
    half = 0.5 * 10 ** -len(digits[1] or "")
    return number(digits[0]) - half, number(digits[0]) + half


def assert_ratio(ratio: str, above: str, below: str) -> None:
    """Whatever a machine's speed: small figures have few digits."""
    (low, high), (least_above, most_above), (least_below, most_below) = map(bounds, (ratio, above, below))
    assert least_below > 0 and low * least_below <= most_above and least_above <= high * most_below, (
        f"{ratio} is not {above} over {below}"
    )


def test_peers(starts_vllm, nightly, monkeypatch, folder, capsys):
    from benchmarks.engine import config

    from benchmarks import peers, precision
    from vllm_yocou.cli.sizing import KVBytes

    lengths, batches = (100, 2000), (1, 2)
    small = peers.Sizes("peers", "yoco-u-kjv", "float32", dict.fromkeys(lengths, 1), batches, 2000, 1, {})
    for name, value in dict(SMALL=small, ROUNDS=1).items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr("sys.argv", ["peers"])
    monkeypatch.setattr(precision, "dtypes_here", lambda: ["float32"])
    peers.main()
    printed = capsys.readouterr().out
    assert f"{peers.OURS} 3, " in printed and "a group for each cache 10, " in printed
    table = rows(printed)
    names = list(peers.peers(small))
    assert [(number(row[0]), row[1]) for row in table] == [(tokens, name) for tokens in lengths for name in names]
    for row in table:
        ours = next(other for other in table if other[:2] == [row[0], peers.OURS])
        for figure in (2, 4, 6, 8):  # tokens/s of prefill and decode, bytes
            assert_ratio(row[figure + 1], ours[figure], row[figure])
    # A pool's blocks add up to the formula's bytes, and at most two blocks more in each of the ten caches.
    kv = {row[1]: number(row[8]) for row in table if number(row[0]) == 2000}
    cfg = config("yoco-u-kjv")
    formula, token_MiB = KVBytes.yoco_u(cfg, 4).of_request(2000) / 2**20, 2 * 2 * 32 * 4 / 2**20
    assert formula <= kv["YOCO-U, a group for each cache"] < formula + 10 * 2 * 32 * token_MiB + 0.1
    assert formula <= kv[peers.OURS] < 1.5 * formula
    assert kv[peers.LIKE_PAPER] == pytest.approx(6 * 2000 * token_MiB, rel=0.05)
    result = kept(folder, "peers")
    assert len(result.runs("decode step", tokens=100, model=peers.OURS, batch=2)) == peers.STEPS
    render.draw(result)
    assert render.picture(result).stat().st_size > 10_000 and render.is_drawn(result)


def test_dtypes(starts_vllm, nightly, monkeypatch):
    from benchmarks import dtypes

    small = dict(SHAPE="yoco-u-kjv", TOKENS=200, BATCHES=(1, 2), CONTEXT=40, ROUNDS=2, STEPS=3)
    for name, value in small.items():
        monkeypatch.setattr(dtypes, name, value)
    result = dtypes.measure(kv_cache_memory_bytes=32 << 20)
    assert [row[0] for row in shown(result)] == ["prompt", "decode step, 1 requests", "decode step, 2 requests"]
    assert len(result.runs("decode step", dtype="bfloat16", batch=2)) == 6


def test_a_dtype_is_faster_by_its_medians():
    result = Result("dtypes", "")
    for dtype, seconds in (("float32", 0.2), ("bfloat16", 0.1), ("bfloat16, float32 residual", 0.125)):
        result.add("first token", "s", [9.0, seconds, 0.0], dtype=dtype)
        result.add("decode step", "s", [seconds / 10], dtype=dtype, batch=8)
    assert shown(result) == [
        ["prompt", "200.0 ms", "100.0 ms", "125.0 ms", "2.00x", "0.80x"],
        ["decode step, 8 requests", "20.0 ms", "10.0 ms", "12.5 ms", "2.00x", "0.80x"],
    ]


def test_pools_of_peers_hold_what_is_measured():
    """Of the paper's shape too, which no machine without a GPU starts."""
    from benchmarks import peers
    from vllm_yocou.cli.sizing import KVBytes

    for sizes in (peers.SMALL, peers.PAPER):
        longest = max(sizes.prompts) + peers.MARGIN
        models = peers.peers(sizes)
        ours, settings = models[peers.OURS]
        kv = KVBytes.yoco_u(ours, 4 if sizes.dtype == "float32" else 2)
        assert settings["kv_cache_memory_bytes"] >= max(sizes.batches) * kv.of_request(longest)
        for name, (cfg, settings) in models.items():
            assert cfg.max_position_embeddings >= longest
            if "Transformer" in name:
                whole = KVBytes.transformer(ours, 4 if sizes.dtype == "float32" else 2).token // ours.num_hidden_layers
                needed = max(longest, max(sizes.batches) * sizes.together) * whole * cfg.num_hidden_layers
                assert settings["kv_cache_memory_bytes"] >= needed
    total = sum(settings["kv_cache_memory_bytes"] for _, settings in peers.peers(peers.PAPER).values())
    assert total < 120 << 30  # of an H200's 139 GiB


def test_ratios_of_peers_name_the_papers():
    from benchmarks.tables.comparisons import LIKE_PAPER, OURS

    tokens = 16 << 10
    result = Result("peers", "", dict(batches=[1, 8], budget_gib=1))
    for model, first_s, held in ((OURS, 4.0, 1), (LIKE_PAPER, 8.0, 4)):
        result.add("first token", "s", [9.0, 1.0, first_s], tokens=tokens, model=model)
        result.add("KV cache", "MiB", held, tokens=tokens, model=model)
    for model, batch, step_s in ((OURS, 1, 0.5), (LIKE_PAPER, 1, 0.25), (OURS, 8, 1.0)):
        result.add("decode step", "s", [step_s], tokens=tokens, model=model, batch=batch)
    ours, theirs = shown(result)
    assert ours[2:] == ["4,096 (4.00 s)", "1.00x", "2.0", "1.00x", "8.0", "1.00x", "1.0 MiB", "1.00x", "1024"]
    # arXiv 2604.01220: 75,694 tokens/s of prefill against 66,342, of decode 1,966 against 1,795, 62 MB against 640.
    assert theirs[2:5] == ["2,048 (8.00 s)", "2.00x (paper 1.14x)", "4.0"]
    assert theirs[5:] == ["0.50x", "does not fit", "(paper 1.10x)", "4.0 MiB", "0.25x (paper 0.10x)", "256"]


def test_reference_model(starts_vllm, nightly, monkeypatch):
    from benchmarks import reference_model

    for name, value in dict(SHAPE="yoco-u-kjv", PROMPTS=(70,), BATCHES=(1, 2), STEPS=3, ROUNDS=1).items():
        monkeypatch.setattr(reference_model, name, value)
    table = shown(reference_model.measure())
    assert [row[:2] for row in table] == [[70, 1], [70, 2]]
    for row in table:
        assert_ratio(row[4], row[2], row[3])
        assert_ratio(row[7], row[6], row[5])


def test_t_sweep(starts_vllm, nightly, monkeypatch, tmp_path, folder, capsys):
    """Checkpoints that are there are not trained again: here the trained one, which 3 and 1 iterations share."""
    from benchmarks import t_sweep

    report = json.loads((TRAINED / "training.json").read_text())
    for t in (1, 3):
        trained = shutil.copytree(TRAINED, tmp_path / f"T{t}-7")
        config = json.loads((trained / "config.json").read_text())
        (trained / "config.json").write_text(json.dumps(config | {"num_iterations": t}))
        held_out = {"held_out_perplexity": {f"YOCO-U, T = {t}": 40.0 + t}}
        (trained / "training.json").write_text(json.dumps(report | held_out))
    settings = dict(ITERATIONS=(1, 3), PROMPT=200, BATCH=2, ROUNDS=1, STEPS=2)
    for name, value in settings.items():
        monkeypatch.setattr(t_sweep, name, value)
    monkeypatch.setattr("sys.argv", ["t_sweep", "--corpus", "none", "--steps", "7", "--keep", str(tmp_path)])
    t_sweep.main()
    (one, three) = rows(capsys.readouterr().out)
    assert [one[0], one[1], three[0], three[1]] == ["1", "41.00", "3", "43.00"]
    assert "(1.00x)" in one[4] and number(three[4]) > 1.5 * number(one[4])
    result = kept(folder, "t_sweep")
    render.draw(result)
    assert render.picture(result).stat().st_size > 5_000 and render.is_drawn(result)


def test_costs_of_iterations():
    result = Result("t_sweep", "", dict(prompt=1024, batch=8))
    for t, perplexity, first_s, step_s, held in ((1, 50.0, 0.5, 0.01, 1), (3, 40.0, 1.0, 0.04, 3)):
        result.add("held-out perplexity", "", perplexity, T=t)
        result.add("first token", "s", [first_s, 9.0, 0.1], T=t)
        result.add("decode step", "s", [step_s], T=t)
        result.add("KV cache", "MiB", held, T=t)
    one, three = shown(result)
    assert one == [1, "50.00", "2,048 (1.00x)", "800 (1.00x)", "1.00 MiB (1.00x)"]
    assert three == [3, "40.00", "1,024 (0.50x)", "200 (0.25x)", "3.00 MiB (3.00x)"]


def test_bench_serve():
    from benchmarks.tables.comparisons import FIGURES

    result = Result("bench_serve", "")
    for way, figures in (("skipping", [0.5, 1300.0, 250.0, 30.0]), ("every row", [0.25, 650.0, 1000.0, 60.0])):
        for name, value in zip(FIGURES, figures, strict=True):
            result.add(name, "", [value - 0.125, value, value + 1], way=way)
    first, last = shown(result)
    assert first == ["skipping", "0.50 (2.00x)", "1,300.0 (2.00x)", "250.0 (0.25x)", "30.0 (0.50x)"]
    assert all("(1.00x)" in cell for cell in last[1:])


def test_answers_are_compared():
    from benchmarks.evaluation import Evaluated, add, compare

    assert compare([[-1.0, -2.0], [-3.0]], [[-1.0, -2.25], [-3.0]]) == {"largest difference": ("nats", 0.25)}
    assert compare([["a"], ["b"]], [["a"], ["c"]]) == {"texts": ("texts", 2), "texts alike": ("texts", 1)}
    with pytest.raises(ValueError, match="zip"):
        compare([["a"], ["b"]], [["a"]])
    metrics, texts = {"piqa": {"acc": 0.5}, "niah": {"1024": 1.0}}, [["a"], ["b"]]
    one = Evaluated(metrics, {"piqa": [[-1.0]], "niah": texts})
    other = Evaluated(metrics | {"piqa": {"acc": 0.25}}, {"piqa": [[-1.25]], "niah": [["a"], ["c"]]})
    result = Result("evaluation", "")
    add(result, "m", {"hf": one, "vllm": other})
    assert shown(result) == [
        ["m", "piqa", "acc", "hf: 0.5000", "vllm: 0.2500", "log-likelihoods within 2.5e-01"],
        ["m", "niah", "1024", "hf: 1.0000", "vllm: 1.0000", "1 of 2 texts the same"],
    ]


def test_upcycling(starts_vllm, nightly, monkeypatch, tmp_path, folder):
    """Each choice in the order of the table, those that are healed better for it; a start is what upcycle writes."""
    from benchmarks import upcycling
    from vllm_yocou.reference import YocoUForCausalLM

    save_material(tmp_path)
    for name, value in dict(WINDOW=16, TOKENS=32).items():
        monkeypatch.setattr(upcycling, name, value)
    upcycling.save(tmp_path / "llama", tmp_path / "saved", self_layers=2, iterations=2)
    upcycle(tmp_path / "llama", tmp_path / "written", self_layers=2, iterations=2, window=16)
    ids = torch.arange(40)[None]
    saved, written = (
        YocoUForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval() for name in ("saved", "written")
    )
    assert torch.equal(saved(ids).logits, written(ids).logits)

    healed, started = upcycling.choices(5)
    assert [*map(len, (healed, started))] == [6, 5]
    # Each is a process of its own: the first and two more are enough of the former, and one of the latter.
    healed = {name: healed[name] for name in [*healed][:1] + [*healed][3:5]}
    started = {name: started[name] for name in [*started][1:2]}
    monkeypatch.setattr(upcycling, "choices", lambda layers: (healed, started))
    command = ["upcycling", tmp_path / "llama", tmp_path / "text.txt", "--steps", "12", "--held-out", "3"]
    monkeypatch.setattr("sys.argv", [*map(str, command)])
    upcycling.main()
    source, *table = shown(kept(folder, "upcycling"))
    assert source[0] == "the source itself" and [row[0] for row in table] == [*healed, *started]
    assert [row[1:3] for row in table] == [["2 + 3", 1], ["3 + 2", 1], ["2 + 3", 2], ["2 + 2", 1]]
    for row in table:
        assert (number(row[4]) < number(row[3])) if row[0] in healed else row[4:] == ["", "", ""]
    assert table[0][6] == "" and all("±" in row[6] for row in table[1 : len(healed)])


def test_healing(starts_vllm, nightly, monkeypatch, tmp_path, folder, capfd):
    """All but lm-eval: made, healed, served. What is there is not made again."""
    from benchmarks import healing

    settings = dict(ITERATIONS=(2,), WINDOW=16, ROW=48, STEP_ROWS=2, KV_TOKENS=200, CONTEXT=60, STEPS=2, ROUNDS=1)
    settings["scores"] = lambda model, limit: {"PIQA": 0.5, "BoolQ": 0.25, "niah_single_1": 1.0}
    for name, value in settings.items():
        monkeypatch.setattr(healing, name, value)
    save_material(tmp_path, head_dim=32)
    command = ["healing", tmp_path / "llama", tmp_path / "text.txt", "--steps", "2", "--keep", tmp_path / "kept"]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--held-out", "3"])
    healing.main()
    capfd.readouterr()
    made = (tmp_path / "kept" / "T2-2" / "distillation.json").stat().st_mtime_ns
    healing.main()
    assert (tmp_path / "kept" / "T2-2" / "distillation.json").stat().st_mtime_ns == made
    printed = capfd.readouterr().out
    assert "2 steps, 192 tokens. Perplexity of 141 held-out tokens" in printed
    source, start, healed = rows(printed)
    assert [row[:2] for row in (start, healed)] == [["after initialisation", "2"], ["after healing", "2"]]
    assert source[6].endswith("(1/1.0)") and number(healed[6]) < number(source[6])


def test_scores_of_healing():
    result = Result("healing", "")
    for of, perplexity, scores in (
        (dict(model="the source"), 30.0, [0.625, 0.5, 1.0]),
        (dict(model="after initialisation", T=2), 900.0, [0.5, 0.5, 0.0]),
        (dict(model="after healing", T=2), 90.0, [0.6, 0.5, 0.25]),
    ):
        result.add("held-out perplexity", "", perplexity, **of)
        for name, score in zip(("PIQA", "BoolQ", "niah_single_1"), scores, strict=True):
            result.add(name, "", score, **of)
    for of, held, steps_s in ((dict(model="the source"), 180, [0.1]), (dict(T=2), 18, [0.1, 0.2, 0.3])):
        result.add("KV cache", "MiB", held, **of)
        result.add("decode step", "s", steps_s, **of)
    assert shown(result) == [
        ["the source", "", "30.0", "0.625", "0.500", "1.000", "180.0 MiB (1/1.0)", "10.0 (1.00x)"],
        ["after initialisation", 2, "900.0", "0.500", "0.500", "0.000", "18.0 MiB (1/10.0)", "5.0 (0.50x)"],
        ["after healing", 2, "90.0", "0.600", "0.500", "0.250", "18.0 MiB (1/10.0)", "5.0 (0.50x)"],
    ]


def test_trainer_kl(starts_vllm, nightly, monkeypatch):
    """The goal in bfloat16 for a dense model; twice that for a mixture, where of few tokens one expert weighs much."""
    from benchmarks import trainer_kl

    monkeypatch.setattr(trainer_kl, "DTYPES", ("bfloat16",))
    monkeypatch.setattr(trainer_kl, "SHAPES", {"small mixture": trainer_kl.SHAPES["small mixture"]})
    for name, value in dict(ANSWERS=32, TOKENS=64).items():
        monkeypatch.setattr(trainer_kl, name, value)
    result = trainer_kl.measure()
    assert result.median("KL", model="trained example") < 0.001
    assert result.median("KL", model="small mixture", routing="own") < 0.004
    assert result.median("KL", model="small mixture", routing="replayed") < 0.0002
    dense, mixture = shown(result)
    assert dense[4:] == ["", "", ""] and all(mixture)


def test_rows_of_trainer_and_server():
    result = Result("trainer_kl", "")
    result.add("KL", "nats", 2e-4, model="dense", dtype="bfloat16", routing="own")
    result.add("largest |r - 1|", "", 0.1, model="dense", dtype="bfloat16", routing="own")
    assert shown(result) == [["dense", "bfloat16", "2.0e-04", "0.1", "", "", ""]]


def test_rows_of_company():
    result = Result("company", "", dict(prompt=9, answer=2, others=3, longest_other=5, context=7))
    for mode, seconds in (("vLLM's", 2.0), ("invariant", 3.0)):
        result.add("first token", "s", seconds, mode=mode, dtype="float32")
        result.add("decode step", "s", 2 * seconds + 2, mode=mode, dtype="float32", batch=8)
    of = dict(dtype="float32", how="T = 3, eager")
    for model, mode, what, difference in (
        ("57M", "vLLM's", "prompt", 1.7e-5),
        ("57M", "invariant", "prompt", 0.0),
        ("57M", "vLLM's", "answer", 0.0),
        ("57M", "invariant", "answer", 0.0),
        ("mixture", "vLLM's", "prompt", 2e-3),
    ):
        result.add("largest difference", "nats", difference, model=model, mode=mode, of=what, company="alone", **of)
    header, rows = TABLES["company"].rows(result)
    assert header[2:] == ["57M, float32, T = 3, eager", "mixture, float32, T = 3, eager"]
    nothing = cell(None, ".1e")
    assert rows == [
        ["prompt", "alone", "1.7e-05 / 0", f"2.0e-03 / {nothing}"],
        ["answer", "alone", "0 / 0", f"{nothing} / {nothing}"],
    ]
    note = TABLES["company"].note(result)
    assert "In a cell: vLLM's / invariant." in note
    assert note.endswith(": float32: 1.50x for a prompt, 1.33x for a step of 8.")


def test_noise_of_a_server_is_a_divergence(nightly):
    from benchmarks.trainer_kl import deviation, differing

    generator = torch.Generator().manual_seed(0)
    trainer_V = torch.randn(50, generator=generator).log_softmax(-1)
    server_V = (trainer_V + 0.1 * torch.randn(50, generator=generator)).log_softmax(-1)
    exact = (trainer_V.exp() * (trainer_V - server_V)).sum().item()
    tokens = server_V.exp().multinomial(100_000, replacement=True, generator=generator)
    found = deviation(trainer_V[tokens], server_V[tokens])
    assert found.kl == pytest.approx(exact, rel=0.03) and found.largest > 0.1
    assert deviation(trainer_V, trainer_V) == (0, 0)
    served = torch.tensor([[[[0, 1]], [[1, 0]], [[1, 2]], [[-1, -1]]]])
    assert differing(torch.tensor([0, 1]).expand_as(served), served, tokens=4) == 0.25
