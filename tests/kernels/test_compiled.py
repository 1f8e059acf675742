"""The kernels compile for each kind of GPU and fit into its shared memory: the interpreter checks neither.

What they compute is tested in tests/kernels, in processes of their own.
"""

import pytest
import torch
from harness import paged
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction, mangle_type

from vllm_yocou.kernels.cross_attention import cross_attention
from vllm_yocou.kernels.global_write import global_write
from vllm_yocou.kernels.window_step import window_step

# Shared memory that one program may have, in KiB, by compute capability (NVIDIA's CUDA C++ programming guide).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


IN_MAKE_TEST = (86, 90)  # the least shared memory, and an H100


@pytest.fixture(params=[pytest.param(it, marks=[] if it in IN_MAKE_TEST else pytest.mark.slow) for it in SHARED_KIB])
def capability(request) -> int:
    return request.param


@pytest.fixture
def shared_bytes(capability, monkeypatch) -> list[int]:
    """Launches compile instead, as for a GPU's aligned tensors; the shared memory of each."""
    needed, target = [], GPUTarget("cuda", capability, 32)

    def run(self, *args, grid, warmup, **options):
        values = dict(zip(self.arg_names, args, strict=False)) | options
        constants, signature, known = {}, {}, {}
        for i, parameter in enumerate(self.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                constants[(i,)], signature[parameter.name] = value, "constexpr"
                continue
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                known[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, known)
        chosen = {name: options[name] for name in ("num_stages", "num_warps") if name in options}
        needed.append(compile(source, target=target, options=chosen).metadata.shared)

    monkeypatch.setattr(JITFunction, "run", run)
    return needed


WIDTHS = [
    (128, torch.bfloat16),
    pytest.param(256, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(256, torch.float32, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("d, dtype", WIDTHS, ids=str)
def test_kernels_compile_and_fit(d, dtype, capability, shared_bytes):
    turned = paged.rotation(d, False)
    norm_d = torch.ones(d, dtype=dtype)
    for fresh in (1, 40):  # a step of decodes and one with chunks are compiled apart
        batch, slots_N = paged.batch([(40, fresh)] * 2, 64, 16)
        cache = paged.caches(128, 16, 2, d, dtype)
        q_NHd, k_NKd, v_NKd = torch.zeros(2 * fresh, 14, d, dtype=dtype).split([10, 2, 2], 1)
        window_step(q_NHd, k_NKd, v_NKd, *cache, slots_N, batch, fresh, 512, 0.1, turned, norm_d, norm_d)
    cross_attention(q_NHd, *cache, batch, 0.1)
    global_write(k_NKd, v_NKd, *cache, slots_N, norm_d, rotation=turned, positions_N=slots_N)
    if capability >= 89:  # the first that has this type, without which vLLM refuses such a cache
        in_eight_bits = cache.to(torch.float8_e4m3fn)
        cross_attention(q_NHd, *in_eight_bits, batch, 0.1)
        global_write(k_NKd, v_NKd, *in_eight_bits, slots_N, norm_d, rotation=turned, positions_N=slots_N)
    assert len(shared_bytes) == (8 if capability >= 89 else 5)  # cross attention is two
    assert 0 < max(shared_bytes) <= SHARED_KIB[capability] << 10
