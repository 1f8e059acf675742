"""A vLLM that is newer than any tested is neither refused blindly nor trusted blindly: the table of seams decides.

Registration, which every start of every model pays, looks only at the names that it touches. The whole table is looked
at once a YOCO-U model is configured.
"""

import logging
from collections.abc import Iterable
from functools import cache

from vllm_yocou import __version__
from vllm_yocou.seams.seam import Seam

# Every test runs with each of these.
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
            raise SeamMissing(
                f"vLLM {named(vllm_version())} cannot serve YOCO-U with vllm-yocou {__version__}: it has {missing} "
                f"({seam.why}), install vLLM {tested().replace('and', 'or')}, or a newer vllm-yocou."
            )


@cache
def check_all() -> None:
    """Check the whole table, and warn once of a vLLM that nobody has tested.

    Raises:
        SeamMissing: this vLLM lacks a seam.
    """
    from vllm_yocou.seams.table import SEAMS

    check(SEAMS)
    if not is_tested(vllm_version()):
        logger.warning(
            "vllm-yocou %s is tested with vLLM %s, and this is %s: everything that it relies on is there, but compare "
            "some answers with those of a tested version before you rely on them.",
            __version__,
            tested(),
            named(vllm_version()),
        )
