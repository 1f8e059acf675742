"""vllm_yocou: serve YOCO-U (arXiv 2604.01220) with vLLM.

vLLM finds the plugin by its entry point. For plain transformers, `import vllm_yocou.reference` once and use
`AutoModelForCausalLM` as usual.
"""

__version__ = "0.2.0"
