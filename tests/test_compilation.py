"""One pass through the self-decoder is compiled once, whatever T is, and computes what the reference computes."""

import os
import shutil

import pytest
import tiny
from oracle import Oracle
from test_model import generate, start, stop
from vllm.compilation.counter import compilation_counter
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on a CPU")


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """Compile in this test, and not in one before it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.delenv("TORCHDYNAMO_DISABLE", raising=False)
        yield


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_one_unit_for_all_iterations(iterations, tmp_path, monkeypatch):
    """Chunks, decodes, one row and many: exact, from a single compiled graph that is called T times a step."""
    graphs, calls = {}, []
    from torch._inductor import compile_fx

    compiler = compile_fx.compile_fx

    def compile_and_note(graph, *args, **kwargs):
        graphs[id(graph)] = graph  # inductor calls itself with the same graph
        return compiler(graph, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", compile_and_note)
    call = TorchCompileWithNoGuardsWrapper.__call__
    monkeypatch.setattr(TorchCompileWithNoGuardsWrapper, "__call__", lambda *args: calls.append(args) or call(*args))

    model = tiny.model(tiny.config(num_iterations=iterations, qk_norm="all", num_self_decoder_layers=2))
    model.save_pretrained(tmp_path)
    seen = compilation_counter.num_models_seen
    llm = start(tmp_path, kv_cache_memory_bytes=64 << 20, compilation_config={"mode": 3})
    assert compilation_counter.num_models_seen == seen + 1
    calls.clear()
    oracle, prompts = Oracle(model), [tiny.prompt(length) for length in (1, 16, 17, 50, 333)]
    for prompt, output in zip(prompts, generate(llm, prompts, prompt_logprobs=1), strict=True):
        oracle.compare(prompt, output)
    for prompt, output in zip(prompts, generate(llm, prompts), strict=True):
        oracle.compare(prompt, output)
    oracle.check()
    # vLLM compiles small functions of its own as well. Ours has the layers of one pass, not of T.
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in graphs.values()]
    attentions = [sum("yocou_attend_windows" in target for target in names) for names in targets]
    assert [count for count in attentions if count] == [model.config.num_self_decoder_layers]
    assert calls and len(calls) % iterations == 0
    assert os.environ.get("VLLM_USE_AOT_COMPILE") is None
    stop(llm)
