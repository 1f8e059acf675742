"""Triton's interpreter, where it differs from a GPU: what a test that uses it has to mend first."""

import os


def install() -> None:
    """For this process, before any kernel runs; Triton asks TRITON_INTERPRET when it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    def widened(handle):
        """The interpreter keeps bfloat16 as integers, and would multiply these."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    class Builder(interpreter.InterpreterBuilder):
        # Compiled kernels take integers for masks, as vLLM's n-gram kernel gives them; the interpreter wants bool.
        def create_masked_load(self, ptrs, mask, *rest):
            mask.data = mask.data.astype(bool)
            return super().create_masked_load(ptrs, mask, *rest)

        def create_masked_store(self, ptrs, value, mask, *rest):
            mask.data = mask.data.astype(bool)
            return super().create_masked_store(ptrs, value, mask, *rest)

        def create_dot(self, a, b, *rest):
            return super().create_dot(widened(a), widened(b), *rest)

    interpreter.interpreter_builder.__class__ = Builder
