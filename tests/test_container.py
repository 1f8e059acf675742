"""The container: what it copies is in the context of its build, and vLLM's image is of a tested version."""

import re

from harness.checkout import ROOT

from vllm_yocou.seams.check import TESTED_VLLM

DOCKERFILE = (ROOT / "packaging" / "Dockerfile").read_text()
IGNORED = (ROOT / "packaging" / "Dockerfile.dockerignore").read_text()


def test_the_image_is_of_a_tested_vllm():
    (tag,) = re.findall(r"^ARG VLLM=v(.*)$", DOCKERFILE, re.MULTILINE)
    assert tuple(map(int, tag.split(".")[:2])) in TESTED_VLLM


def test_what_is_copied_is_in_the_build_context():
    patterns = [line for line in IGNORED.splitlines() if not line.startswith("#")]
    sources = [name for copied in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in copied.split()]
    assert patterns[0] == "*" and sources
    assert sorted(pattern[1:] for pattern in patterns if pattern.startswith("!")) == sorted(sources)
