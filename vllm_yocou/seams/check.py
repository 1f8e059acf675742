"""A vLLM that is newer than any tested is neither refused blindly nor trusted blindly: the table of seams decides.

Registration, which every start of every model pays, looks only at the names that it touches. The whole table is looked
at once a YOCO-U model is configured.
"""

import logging
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from vllm_yocou import __version__
from vllm_yocou.seams.behaviour import packing_rule
from vllm_yocou.seams.seam import Seam, behaves

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# `make test` passes with each of these.
TESTED_VLLM = ((0, 32), (0, 33))

logger = logging.getLogger("vllm.plugins.yocou")


class SeamMissing(ValueError):
    """This vLLM lacks something that the plugin relies on; one sentence."""


def vllm_version() -> tuple[int, ...]:
    """The numbers of vLLM's version; (0, 0) for a build of its sources that knows none."""
    from vllm.version import __version_tuple__

    return tuple(part for part in __version_tuple__[:3] if isinstance(part, int))


def is_too_old(version: tuple[int, ...]) -> bool:
    return (0, 0) < version[:2] < TESTED_VLLM[0]


def is_tested(version: tuple[int, ...]) -> bool:
    return version[:2] in TESTED_VLLM


def named(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def tested() -> str:
    return " and ".join(map(named, TESTED_VLLM))


def check(seams: Iterable[Seam]) -> None:
    """Raise SeamMissing for the first seam that this vLLM lacks."""
    for seam in seams:
        if missing := seam.missing():
            raise refusal(missing, seam)


def refusal(missing: str, seam: Seam) -> SeamMissing:
    return SeamMissing(
        f"vLLM {named(vllm_version())} cannot serve YOCO-U with vllm-yocou {__version__}: {seam.why}, and it has "
        f"{missing}; install vLLM {tested().replace('and', 'or')}, or a newer vllm-yocou."
    )


@cache
def check_all() -> None:
    """Check the whole table, and warn once of a vLLM that nobody has tested.

    Raises:
        SeamMissing: this vLLM lacks a seam.
    """
    from vllm.platforms import current_platform

    from vllm_yocou.seams.table import SEAMS

    check(seam for seam in SEAMS if seam.only in (None, current_platform.device_type))
    if not is_tested(vllm_version()):
        logger.warning(
            "vllm-yocou %s is tested with vLLM %s, and this is %s: everything that it relies on is there, but compare "
            "some answers with those of a tested version before you rely on them.",
            __version__,
            tested(),
            named(vllm_version()),
        )


def check_packing(vllm_config: "VllmConfig") -> None:
    """Check the one behaviour that only an engine's configuration can show: how vLLM groups caches.

    Raises:
        SeamMissing: they would be grouped in another way, and the KV cache would take more than it is said to.
    """
    from vllm_yocou.seams.attention import GROUPING

    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return  # one group, which is said at start
    grouping = GROUPING.find()
    if not behaves(lambda get_kv_cache_groups: packing_rule(get_kv_cache_groups, vllm_config), grouping):
        raise refusal(f"another packing rule in {' or '.join(GROUPING.places)}", GROUPING)
