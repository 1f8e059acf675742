"""What of a seam can be missing, each kind on an object made for it."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from vllm_yocou.seams import behaviour
from vllm_yocou.seams.seam import Seam, behaves


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
    def inner(of_ours):
        return model.set_by_us

    return inner(of_ours=1) if hasattr(model, "hook_of_ours") else None


def take_anything(**kwargs) -> None:
    pass


def refuse(found) -> bool:
    raise TypeError("changed")


class Fields:
    """As a dataclass without defaults is where annotations are no attribute of the class, from Python 3.14 on."""

    __dataclass_fields__: ClassVar[dict] = {"rows": None}


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = ModuleType("stand_in_for_vllm")
    vars(made).update(Batch=Batch, Layer=Layer, Widened=Widened, Fields=Fields, ask=ask, take_anything=take_anything)
    monkeypatch.setitem(sys.modules, made.__name__, made)


def missing(name: str, **expected) -> str | None:
    return Seam(f"stand_in_for_vllm:{name}", "why", "test", **expected).missing()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Batch", dict(has="rows", takes="rows")),
        ("Fields", dict(has="rows")),
        ("Layer", dict(has="half", takes="width prefix", mentions="width")),
        ("Widened", dict(has="half", takes="width prefix", mentions="width")),
        ("ask", dict(takes="model", mentions="hook_of_ours of_ours set_by_us")),
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
        ("take_anything", dict(takes="width"), "no parameter 'width' of stand_in_for_vllm:take_anything"),
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


def test_a_module_that_fails_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "stand_in_that_fails.py").write_text("raise RuntimeError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    sentence = Seam("stand_in_that_fails:name", "why", "test").missing()
    assert sentence == "no stand_in_that_fails:name: no such device"


def levels(*names: str) -> SimpleNamespace:
    return SimpleNamespace(**{name: SimpleNamespace(value=value) for value, name in enumerate(names)})


ORDER = ("NEVER", "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH", "ALWAYS")


@pytest.mark.parametrize(
    "behaviour, found, expected",
    [
        (behaviour.order_of_levels, levels(*ORDER), True),
        (behaviour.order_of_levels, levels(*reversed(ORDER)), False),
        (behaviour.use_of_uuid, lambda config: config.uuid(), True),
        (behaviour.use_of_uuid, vars, False),
        (behaviour.number_in_a_name, lambda name: int(name.rpartition(".")[2]), True),
        (behaviour.number_in_a_name, lambda name: 0, False),
        (behaviour.pair_of_defaults, SimpleNamespace(get_batch_defaults=lambda ranks: ({"offline": 8}, {})), True),
        (behaviour.pair_of_defaults, SimpleNamespace(get_batch_defaults=lambda ranks: {"offline": 8}), False),
    ],
)
def test_a_behaviour_that_changed_is_seen(behaviour, found, expected):
    assert behaves(behaviour, found) == expected
