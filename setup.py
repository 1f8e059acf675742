"""Two folders, one package: kernels/ installs as vllm_yocou.kernels. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_yocou", "vllm_yocou.*"]), "vllm_yocou.kernels"],
    package_dir={"vllm_yocou.kernels": "kernels"},
)
