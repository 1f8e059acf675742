"""Two folders, one package: kernels/ installs as vllm_yocou.kernels. Everything else is in pyproject.toml."""

from setuptools import setup

setup(packages=["vllm_yocou", "vllm_yocou.kernels"], package_dir={"vllm_yocou.kernels": "kernels"})
