"""Triton's interpreter, mended where it differs from a GPU, and several times as fast at kernels of a few numbers."""

import os


def install() -> None:
    """Mend it for this process, before Triton is imported: Triton asks TRITON_INTERPRET only then.

    vLLM, imported afterwards, finds in it the backend for CPUs that it looks for.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from types import SimpleNamespace

    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
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

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        """Patch the language for all kernels of a module and leave it so: nothing in this process compiles kernels.

        Triton does it for every launch and every call of one kernel by another, which takes longer than small kernels.
        """
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
