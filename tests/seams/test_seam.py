"""What of a seam can be missing, each kind on an object made for it."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from vllm_yocou.seams import behaviour
from vllm_yocou.seams.seam import Seam


@dataclass
class Batch:
    rows: int


class Layer:
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, width: int, *, prefix: str = ""):
        self.width = width

    @property
    def half(self) -> int:
        return self.width // 2


class Widened(Layer):
    """What it has, it has of its base."""


def ask(model) -> object:
    def inner():
        return model.set_by_us

    return inner() if hasattr(model, "hook_of_ours") else None


def take_anything(**kwargs) -> None:
    pass


def refuse(found) -> bool:
    raise TypeError("changed")


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = ModuleType("stand_in_for_vllm")
    vars(made).update(Batch=Batch, Layer=Layer, Widened=Widened, ask=ask, take_anything=take_anything)
    monkeypatch.setitem(sys.modules, made.__name__, made)


def missing(name: str, **expected) -> str | None:
    return Seam(f"stand_in_for_vllm:{name}", "why", "test", **expected).missing()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Batch", dict(has="rows", takes="rows")),
        ("Layer", dict(has="half", takes="width prefix", mentions="width")),
        ("Widened", dict(has="half", takes="width prefix", mentions="width")),
        ("ask", dict(takes="model", mentions="hook_of_ours set_by_us")),
        ("take_anything", dict(takes="whatever")),
        ("Layer.half", {}),
        ("ask", dict(behaves=callable)),
    ],
)
def test_what_is_there(name, expected):
    assert missing(name, **expected) is None


@pytest.mark.parametrize(
    "name, expected, sentence",
    [
        ("gone", {}, "no stand_in_for_vllm:gone"),
        ("Layer.gone", {}, "no stand_in_for_vllm:Layer.gone"),
        ("Batch", dict(has="rows columns"), "no 'columns' in stand_in_for_vllm:Batch"),
        ("Layer", dict(takes="prefix height"), "no parameter 'height' of stand_in_for_vllm:Layer"),
        ("Layer", dict(mentions="height"), "no use of 'height' in stand_in_for_vllm:Layer"),
        ("ask", dict(mentions="another_hook"), "no use of 'another_hook' in stand_in_for_vllm:ask"),
        ("ask", dict(behaves=refuse), "another 'refuse' in stand_in_for_vllm:ask"),
    ],
)
def test_what_is_not(name, expected, sentence):
    assert missing(name, **expected) == sentence


def test_a_module_that_is_gone():
    assert Seam("stand_in_for_vllm.deeper:name", "why", "test").missing() == "no stand_in_for_vllm.deeper:name"


def test_the_first_place_that_exists_counts():
    places = ("stand_in_for_vllm:gone", "stand_in_for_vllm:Batch")
    assert Seam(places, "why", "test", has="rows").missing() is None
    assert Seam(places, "why", "test", has="columns").missing().endswith("gone or stand_in_for_vllm:Batch")


def groups_of(*sizes: int):
    from types import SimpleNamespace

    return lambda settings, specs: [SimpleNamespace(layer_names=list(range(size))) for size in sizes]


@pytest.mark.parametrize("sizes, holds", [((3, 2, 1), True), ((1, 2, 3), True), ((1,) * 6, False), ((5, 1), False)])
def test_another_packing_rule_is_seen(sizes, holds):
    """One group a cache is what vLLM would do with caches of one size."""
    assert behaviour.packing_rule(groups_of(*sizes)) == holds
