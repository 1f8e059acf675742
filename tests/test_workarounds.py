"""Each fault that has a workaround is there in the versions of vLLM that are listed as faulty, and in no other.

A test that fails here says that a workaround can go: after the last supported version that has the fault.
"""

import inspect
import weakref
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.checkout import needs_compiler
from torch._inductor.fx_passes.pad_mm import pad_mm
from vllm import _custom_ops
from vllm.compilation.decorators import _try_load_aot_compiled_fn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.determinism import batch_invariant
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe import MoERunner, unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router import fused_topk_router
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
from vllm.utils import cpu_resource_utils
from vllm.v1 import kv_cache_spec_registry
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.version import __version_tuple__

from vllm_yocou import workarounds
from vllm_yocou.rows.hand_over import RowOwner, RowSlots
from vllm_yocou.seams.check import TESTED_VLLM, named
from vllm_yocou.serving.backend import row_selecting_backend
from vllm_yocou.serving.cache_specs import GlobalCacheSpec


def faulty(workaround: str) -> bool:
    """Whether the vLLM of this environment is listed as having the fault; a newer one than any tested as the last."""
    version = min(tuple(__version_tuple__[:2]), TESTED_VLLM[-1])
    return named(version) in workarounds.FAULTY_IN[workaround]


def test_every_workaround_is_listed():
    ours = {
        name
        for name, value in vars(workarounds).items()
        if inspect.isfunction(value) and value.__module__ == workarounds.__name__ and not name.startswith("_")
    }
    assert ours == set(workarounds.FAULTY_IN)
    assert {f"test_{name}" for name in ours} <= set(globals())


@needs_compiler
def test_loading_of_saved_code(tmp_path, trains):
    """What torch's own backend saved cannot finish loading, and vLLM asks it to."""
    compiled = torch.compile(lambda x: x * 2 + 1, fullgraph=True).aot_compile(((torch.ones(3),), {}))
    compiled.save_compiled_function(str(tmp_path / "code"))

    def loaded() -> torch.nn.Module:
        with (tmp_path / "code").open("rb") as file:
            return torch.compiler.load_compiled_function(file)._artifacts.compiled_fn

    asked = "compiled_fn.finalize_loading(" in inspect.getsource(_try_load_aot_compiled_fn)
    assert (asked and not hasattr(loaded(), "finalize_loading")) == faulty("loading_of_saved_code")
    with workarounds.loading_of_saved_code():
        assert loaded().finalize_loading(None) is None
    assert not hasattr(loaded(), "finalize_loading")


def test_spare_rows_without_adapter():
    """Two rows, of which the second has an adapter: the first keeps what the layer computed."""
    wrapper = PunicaWrapperCPU(8, 2, "cpu")
    wrapper._token_lora_indices[:2] = torch.tensor([-1, 1])
    wrapper.indices_len[0] = 2
    wrapper.is_prefill = False
    down, up = torch.ones(2, 1, 4, 3), torch.ones(2, 1, 5, 4)

    def moved_rows() -> list[bool]:
        y_NX = torch.zeros(2, 5)
        wrapper.add_lora_linear(y_NX, torch.ones(2, 3), (down,), (up,), 1.0, (5,))
        return (y_NX != 0).any(1).tolist()

    assert moved_rows() == [faulty("spare_rows_without_adapter"), True]
    workarounds.spare_rows_without_adapter(wrapper)
    assert moved_rows() == [False, True]


def test_refuse_seed():
    """vLLM's runner turns the generator back; no generator of a CPU can be turned."""
    turned = "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner)
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()
    assert turned == faulty("refuse_seed")


def test_check_cache_dtype():
    """The CPU platform selects its backend for a cache that this backend cannot read."""
    dtype, selected = "int8_per_token_head", None
    with set_current_vllm_config(VllmConfig()), suppress(ValueError):
        selected = get_attn_backend(32, torch.float32, dtype)
    assert (selected is not None and not selected.supports_kv_cache_dtype(dtype)) == faulty("check_cache_dtype")


def test_widen_decode_scratch(tmp_path, monkeypatch):
    """Heads of 64 in the cross-decoder where `head_dim` is 32: vLLM's builder has room for 32, ours for 64."""
    tiny.config(cross_head_dim=64, architectures=["YocoUForCausalLM"]).save_pretrained(tmp_path)
    settings = dict(skip_tokenizer_init=True, dtype="float32", load_format="dummy", enforce_eager=True)
    vllm_config = EngineArgs(model=str(tmp_path), **settings).create_engine_config()
    monkeypatch.setattr("vllm_yocou.serving.backend.get_tensor_model_parallel_rank", lambda: 1)  # which counts no rows
    owner = RowOwner()
    owner.rows = RowSlots(4)
    vllm_config.compilation_config.static_forward_context["global"] = owner
    spec = GlobalCacheSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)

    def width(backend: type) -> int:
        with set_current_vllm_config(vllm_config):
            builder = backend.get_builder_cls()(spec, ["global"], vllm_config, torch.device("cpu"))
        return builder.softmax_segm_output.shape[-1]

    assert (width(TritonAttentionBackend) < 64) == faulty("widen_decode_scratch")
    assert width(row_selecting_backend(TritonAttentionBackend, False, False)) == 64


def test_pack_router_scores(monkeypatch):
    """Torch's compiler spaces out the rows of a product of 5 columns, and vLLM hands them to its kernel as they are."""
    h_ND, gate_DE = torch.randn(4, 16), torch.randn(16, 5)
    scores_NE = pad_mm(h_ND, gate_DE, 0, 0, 3)
    torch.testing.assert_close(scores_NE, h_ND @ gate_DE)
    assert scores_NE.stride() == (8, 1)
    taken = []
    take = lambda weights, ids, indices, scores, renormalize: taken.append(scores) or (weights, ids)  # noqa: E731
    monkeypatch.setattr(fused_topk_router, "dispatch_topk_softmax_func", lambda **kwargs: take)
    fused_topk_router.fused_topk(h_ND, scores_NE, 2, renormalize=True)
    assert (not taken[0].is_contiguous()) == faulty("pack_router_scores")
    without = {"shape_padding": False}
    for experts, latent, padding in (
        (5, None, without),
        (16, 60, without),
        (16, 64, {}),
        (16, None, {}),
        (0, None, {}),
    ):
        hf_config = tiny.moe_config(num_experts=experts, moe_latent_size=latent) if experts else tiny.config()
        settings = VllmConfig()
        before = dict(settings.compilation_config.inductor_compile_config)
        workarounds.pack_router_scores(
            SimpleNamespace(
                model_config=SimpleNamespace(hf_config=hf_config), compilation_config=settings.compilation_config
            )
        )
        assert settings.compilation_config.inductor_compile_config == before | padding


def test_refuse_expert_parallel():
    """The experts accept every parallel configuration, and do not look at which of them are their own rank's."""
    accepted = CPUUnquantizedExperts._supports_parallel_config(None)
    ignored = inspect.getsource(CPUUnquantizedExperts.apply).count("expert_map") == 1
    assert (accepted and ignored) == faulty("refuse_expert_parallel")


def test_exchange_rows_on_cpu():
    """A CPU's communicator has the operations from its base alone, which has none; the layer is not an operator."""
    lacks = all(
        getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name)
        for name in ("all_gatherv", "reduce_scatterv")
    )
    assert lacks == faulty("exchange_rows_on_cpu")
    assert not lacks or "NotImplementedError" in inspect.getsource(DeviceCommunicatorBase.all_gatherv)
    runner = SimpleNamespace(_shared_experts=None)
    assert (MoERunner._select_forward(runner) is not torch.ops.vllm.moe_forward) == faulty("exchange_rows_on_cpu")


def test_warn_of_seed():
    """vLLM asks logits processors about a request's parameters, and takes none under speculative decoding."""
    takes_none = "speculative" in inspect.getsource(build_logitsprocs)
    assert takes_none == faulty("warn_of_seed")


def test_refuse_int8_in_float32(monkeypatch):
    """vLLM asks for the sizes of a matrix alone, and the kernel that it then takes asks for the dtype of its input."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    takes_tiles = "check_cpu_sgl_kernel(N, K, dtype)" in inspect.getsource(CPUInt8ScaledMMLinearKernel)
    assert takes_tiles == faulty("refuse_int8_in_float32")
    assert check_cpu_sgl_kernel(16, 32, torch.int8) and not check_cpu_sgl_kernel(16, 88, torch.int8)


def test_refuse_fp8_by_a_given_scale():
    """The CPU build declares the kernels, and takes no arguments for them."""
    import vllm._custom_ops  # noqa: F401  # loads them

    for name in ("static_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant"):
        schema = getattr(torch.ops._C, name).default._schema
        assert (not schema.arguments) == faulty("refuse_fp8_by_a_given_scale")


def test_refuse_engines_without_memory_node(monkeypatch):
    """vLLM finds no memory for an engine on a node that is not there, unless a variable lets engines share nodes."""
    monkeypatch.delenv("VLLM_CPU_SIM_MULTI_NUMA", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    nodes = cpu_resource_utils.get_memory_affinity()
    looks_for_nodes = "assigned_node_ids" in inspect.signature(cpu_resource_utils.get_visible_memory_node).parameters
    assert looks_for_nodes == faulty("refuse_engines_without_memory_node")
    absent = [max(nodes) + 1]

    def start(engines: int) -> None:
        parallel = SimpleNamespace(data_parallel_size=engines, data_parallel_size_local=engines, world_size=1)
        workarounds.refuse_engines_without_memory_node(SimpleNamespace(parallel_config=parallel))

    start(1)
    if looks_for_nodes:
        assert cpu_resource_utils.get_visible_memory_node(absent) == []
        with pytest.raises(ValueError, match=r"set the environment variable VLLM_CPU_SIM_MULTI_NUMA=1\.$"):
            start(max(nodes) + 2)
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with pytest.raises(ValueError, match=r"NUMA=1 and unset VLLM_CPU_OMP_THREADS_BIND\.$"):
            start(max(nodes) + 2)
        monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
        assert cpu_resource_utils.get_visible_memory_node(absent) == nodes
    start(max(nodes) + 2)


def test_fill_spec_registry(monkeypatch):
    """A plugin's spec in an empty registry keeps vLLM's own out."""
    registry = kv_cache_spec_registry.KVCacheSpecRegistry

    def registered(before) -> set[type]:
        monkeypatch.setattr(kv_cache_spec_registry, "_REGISTRY_KVCACHESPEC_LIST", {})
        before()
        registry.register(GlobalCacheSpec, FullAttentionManager, FullAttentionSpec)
        registry._ensure_registered()
        return set(kv_cache_spec_registry._REGISTRY_KVCACHESPEC_LIST)

    assert (FullAttentionSpec not in registered(lambda: None)) == faulty("fill_spec_registry")
    assert {FullAttentionSpec, GlobalCacheSpec} <= registered(workarounds.fill_spec_registry)


def test_as_float_factor():
    """vLLM iterates over a factor that is not a float."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3}
    with set_current_vllm_config(VllmConfig()):
        with pytest.raises(TypeError, match="not iterable") if faulty("as_float_factor") else nullcontext():
            get_rope(32, 64, rope_parameters=rope)
        assert len(get_rope(32, 64, rope_parameters=workarounds.as_float_factor(rope)).cos_sin_cache) == 3 * 64


def test_pack_experts_again(monkeypatch):
    """Experts are set up twice, at a start and at a reload, and packed the second time only if asked to."""
    packed = []
    kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=packed.append))
    method = SimpleNamespace(moe_kernel=None, unquantized_backend=None)
    method._init_moe_kernel = lambda layer: setattr(method, "moe_kernel", kernel)
    monkeypatch.setattr(
        unquantized_fused_moe_method,
        "convert_to_unquantized_kernel_format",
        lambda backend, moe_config, w13_weight, w2_weight, layer: (w13_weight, w2_weight),
    )
    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    experts.quant_method, experts.moe_config = method, None

    def set_up() -> int:
        for name in ("w13_weight", "w2_weight"):
            experts.register_parameter(name, torch.nn.Parameter(torch.zeros(2), requires_grad=False))
        kind = unquantized_fused_moe_method.UnquantizedFusedMoEMethod
        kind._setup_kernel(method, experts, experts.w13_weight, experts.w2_weight)
        return len(packed)

    assert set_up() == 1
    assert (set_up() == 1) == faulty("pack_experts_again")
    before = len(packed)
    workarounds.pack_experts_again(torch.nn.Sequential(experts))
    assert set_up() == before + 1


def test_scales_kept():
    """The kernel reads the scales that it was made of, and does not keep them."""

    def made(scales: torch.Tensor):
        weight = torch.ones(32, 16, dtype=torch.int8).t().contiguous().t()
        return _custom_ops.create_onednn_scaled_mm(weight, scales, torch.float32, True, False, 32)

    def product(handler) -> float:
        out = torch.empty(1, 16)
        x, x_scale, x_zero = _custom_ops.onednn_scaled_int8_quant(torch.ones(1, 32), None, None, True)
        _custom_ops.onednn_scaled_mm(handler, x, out, x_scale, x_zero, None, None)
        return out[0, 0].item()

    scales = torch.ones(16, 1)
    handler, alive = made(scales), weakref.ref(scales)
    before = product(handler)
    scales.mul_(2)
    reads = product(handler) == 2 * before
    del scales
    assert (reads and alive() is None) == faulty("scales_kept")
    with workarounds.scales_kept():
        scales = torch.ones(16, 1)
        handler, alive = made(scales), weakref.ref(scales)
        del scales
    assert alive() is not None


def test_without_overrides_for_gpus():
    """vLLM puts Triton kernels in the place of torch's operators on all devices but one, and a CPU is not that one."""
    source = inspect.getsource(batch_invariant.enable_batch_invariant_mode)
    assert ("if not current_platform.is_xpu():" in source) == faulty("without_overrides_for_gpus")
    vllms = batch_invariant.init_batch_invariance
    with workarounds.without_overrides_for_gpus():
        assert batch_invariant.init_batch_invariance is not vllms
    assert batch_invariant.init_batch_invariance is vllms
