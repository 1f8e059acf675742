"""One pass through the self-decoder and the cross-decoder are compiled once, whatever T is, and stay exact."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from harness import tiny, traced
from harness.checkout import needs_compiler
from harness.engines import generate, model_runner
from harness.oracle import Oracle, agrees
from torch._dynamo.utils import counters
from vllm.compilation import cuda_graph
from vllm.compilation.counter import compilation_counter
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.platforms import current_platform

from vllm_yocou.serving.compilation import PieceCapture, prepare_cuda_graphs
from vllm_yocou.serving.model import CrossDecoder, SelfDecoder

pytestmark = needs_compiler

COMPILED = {"compilation_config": {"mode": 3}}
AHEAD_OF_TIME = ("num_aot_artifacts_saved", "num_aot_artifacts_loaded")
PROMPTS = [tiny.prompt(length) for length in (1, 16, 17, 50, 333)]
# Inductor's code for these runs in `make test`, for the others in `make test-all`; all are traced in both.
BY_INDUCTOR = ("T3-S3-C2-qknorm-interleaved-W7",)


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """Compile in these tests, and not in a run before them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        yield


@pytest.fixture
def graphs(request, monkeypatch) -> list[torch.fx.GraphModule]:
    """What Inductor is given, or kept as it is where the parameter is "traced", in order."""
    if getattr(request, "param", "inductor") == "traced":
        return traced.install(monkeypatch)
    from torch._inductor import compile_fx

    given, compiler = {}, compile_fx.compile_fx

    def compile_and_note(graph, *args, **kwargs):
        given[id(graph)] = graph  # inductor calls itself with the same graph
        return compiler(graph, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_and_note)
    return given.values()


def attentions(graphs) -> list[tuple[int, int]]:
    """Window and cross attentions of each graph that has any; vLLM compiles small functions of its own as well."""
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    counts = [
        (
            sum("yocou_attend_windows" in target for target in names),
            sum("yocou_attend_global" in target for target in names),
        )
        for names in targets
    ]
    return [count for count in counts if any(count)]


def check(llm, model) -> None:
    """Chunks of 37 tokens, decodes, one row and many; all rows in the cross-decoder, few and none."""
    agrees(model, PROMPTS[-1:], generate(llm, PROMPTS[-1:], tokens=1))
    for sampling in ({}, {"prompt_logprobs": 1}):
        agrees(model, PROMPTS, generate(llm, PROMPTS, **sampling))


def compiled_variants() -> list:
    every = [pytest.param(variant, "traced", id=f"{variant}-traced") for variant in tiny.VARIANTS]
    for variant in tiny.VARIANTS:
        marks = [] if variant in BY_INDUCTOR else pytest.mark.slow
        every.append(pytest.param(variant, "inductor", id=variant, marks=marks))
    return every


@pytest.mark.parametrize("variant, graphs", compiled_variants(), indirect=["graphs"])
def test_two_units_whatever_t_is(variant, graphs, engine, tmp_path, monkeypatch):
    model = tiny.model(tiny.config(**tiny.VARIANTS[variant]))
    model.save_pretrained(tmp_path)
    seen = compilation_counter.num_models_seen
    llm = engine(tmp_path, **COMPILED)
    assert compilation_counter.num_models_seen == seen + 2

    cfg, calls = model.config, {SelfDecoder: 0, CrossDecoder: 0, "steps": 0}

    def counted(key, function):
        def call(*args, **kwargs):
            calls[key] += 1
            return function(*args, **kwargs)

        return call

    for unit in (SelfDecoder, CrossDecoder):
        monkeypatch.setattr(unit, "__call__", counted(unit, unit.__call__))
    served = model_runner(llm).model
    served.forward = counted("steps", served.forward)
    check(llm, model)
    assert attentions(graphs) == [(cfg.num_self_decoder_layers, 0), (0, cfg.num_cross_decoder_layers)]
    assert calls[SelfDecoder] == cfg.num_iterations * calls["steps"] > 0
    # Chunks that end no prompt send no row into the cross-decoder.
    assert 0 < calls[CrossDecoder] < calls["steps"]


def test_a_second_start_compiles_nothing_anew(engine, tmp_path):
    """Nothing is traced either, with the first engine still serving, and with another T."""
    model = tiny.model(tiny.config(num_iterations=1, qk_norm="all", intermediate_size=176))
    model.save_pretrained(tmp_path)
    saved, loaded = (lambda name=name: getattr(compilation_counter, name) for name in AHEAD_OF_TIME)
    before = saved()
    first = engine(tmp_path, **COMPILED)
    assert saved() == before + 2
    for settings in ({}, {"hf_overrides": {"num_iterations": 3}}):
        before = saved(), loaded()
        counters.clear()
        llm = engine(tmp_path, **settings, **COMPILED)
        assert (saved(), loaded()) == (before[0], before[1] + 2)
        assert counters["inductor"]["fxgraph_cache_miss"] == 0 and not counters["frames"]

    looped = tiny.model(tiny.config(num_iterations=3, qk_norm="all", intermediate_size=176))
    looped.load_state_dict(model.state_dict())
    for started, served in ((first, model), (llm, looped), (first, model)):
        check(started, served)
    assert llm.llm_engine.vllm_config.model_config.hf_config.num_iterations == 3


@pytest.mark.parametrize("graphs", ["traced", "inductor"], indirect=True)
def test_engines_of_two_shapes_in_one_process(graphs, engine, nightly, tmp_path):
    """vLLM drops the guards that would tell them apart."""
    models = [tiny.model(tiny.config(hidden_size=hidden)) for hidden in (96, 64)]
    engines = []
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
        engines.append(engine(tmp_path / str(i), **COMPILED))
    for i in (0, 1, 0):
        check(engines[i], models[i])
    assert len(attentions(graphs)) == 2 * len(models)


@pytest.mark.parametrize("engine_process", ["v1-graphs"], indirect=True)
@pytest.mark.parametrize(
    "iterations",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.runner("v1-graphs"))],
)
def test_pieces_that_replay_addresses(iterations, engine_process, tmp_path):
    """As under CUDA's piecewise graphs: what a call of a unit reads and writes lies where its first call had it."""
    model = tiny.model(tiny.config(num_iterations=iterations, qk_norm="all"))
    model.save_pretrained(tmp_path)
    requests = [{"prompt": tiny.prompt(length)} for length in (1, 5, 16, 17, 50, 133)]
    all_rows = [request | {"sampling": {"prompt_logprobs": 1}} for request in requests]
    batches = engine_process.run(tmp_path, [requests, all_rows], **COMPILED)
    oracle = Oracle(model)
    for batch in batches:
        for request, output in zip(requests, batch.outputs, strict=True):
            oracle.compare(request["prompt"], output)
        assert batch.metrics["graph_replays"] > batch.metrics["graph_captures"] == 0
    oracle.check()
    assert batches[0].metrics["yocou_skipped_rows"] > 0


@pytest.fixture
def unrecorded(monkeypatch):
    """What vLLM's wrapper of a piece captures and replays; nothing is recorded, since there is no GPU."""
    log = []
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: nullcontext(log.append("capture")))
    monkeypatch.setattr(cuda_graph, "capture_pool", lambda *args: nullcontext())
    monkeypatch.setattr(cuda_graph, "current_stream", lambda: None)
    monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda tensors: tensors)
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    return log


def test_a_capture_is_told_from_a_replay(unrecorded):
    """Three calls of a piece in every step, as T = 3 makes them, but one in the step that captures it.

    Few rows and many have pieces of their own, as where vLLM compiles several ranges of sizes.
    """
    ours, others = VllmConfig(), VllmConfig()
    elsewhere = cuda_graph.CUDAGraphWrapper(lambda x: x, others, CUDAGraphMode.PIECEWISE)
    few, many = (cuda_graph.CUDAGraphWrapper(lambda x: x, ours, CUDAGraphMode.PIECEWISE) for _ in range(2))
    capture = PieceCapture(ours.compilation_config)

    def step(rows: int, mode: CUDAGraphMode) -> list[str]:
        unrecorded.clear()
        descriptor = BatchDescriptor(num_tokens=rows)
        with set_forward_context(None, ours, cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            for _ in range(1 if capture.is_running() else 3):
                (few if rows < 8 else many)(torch.zeros(rows))
        return list(unrecorded)

    assert step(4, CUDAGraphMode.NONE) == []
    assert step(4, CUDAGraphMode.FULL) == []
    assert step(4, CUDAGraphMode.PIECEWISE) == ["capture"]
    assert step(8, CUDAGraphMode.PIECEWISE) == ["capture"]
    assert step(4, CUDAGraphMode.PIECEWISE) == step(8, CUDAGraphMode.PIECEWISE) == ["replay"] * 3
    cuda_graph.CUDAGraphWrapper.clear_all_graphs()  # as vLLM does between its profile and the real capture
    assert step(4, CUDAGraphMode.PIECEWISE) == ["capture"]
    assert not elsewhere.concrete_cudagraph_entries


@pytest.mark.parametrize(
    "given, pieces, expected",
    [
        (CUDAGraphMode.FULL, ["vllm::unified_attention_with_output"], CUDAGraphMode.FULL_AND_PIECEWISE),
        (CUDAGraphMode.FULL, [], CUDAGraphMode.FULL),
        (CUDAGraphMode.FULL_DECODE_ONLY, ["vllm::unified_attention_with_output"], CUDAGraphMode.FULL_DECODE_ONLY),
        (CUDAGraphMode.NONE, ["vllm::unified_attention_with_output"], CUDAGraphMode.NONE),
    ],
)
def test_full_graphs_are_of_decodes_and_the_rest_is_in_pieces(given, pieces, expected):
    compilation = VllmConfig().compilation_config
    compilation.cudagraph_mode, compilation.splitting_ops = given, list(pieces)
    prepare_cuda_graphs(compilation)
    assert compilation.cudagraph_mode == expected
    assert compilation.cudagraph_copy_inputs == expected.has_piecewise_cudagraphs()
    ours = ["vllm::yocou_attend_global", "vllm::yocou_attend_windows"]
    assert compilation.splitting_ops == (pieces and pieces + ours)
