"""One thing of vLLM's that this plugin relies on, and how to see whether it is still there.

A seam is looked at by importing it and reading its signature, its fields and the names in its code. Nothing is run,
except the behaviours of behaviour.py that need no engine.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import CodeType, FunctionType
from typing import Any


@dataclass(frozen=True)
class Seam:
    """A name in vLLM, and what it must be.

    Attributes:
        place: `module:name`. Of several, the first that exists counts: vLLM moved it between the supported versions.
        why: what the plugin needs it for; it stands in the sentence that refuses a start without the seam.
        test: the module of tests/ that fails where the seam changes its meaning.
        has: attributes, fields, methods or members, separated by spaces, as in the next two.
        takes: parameters by name, those of `__init__` for a class.
        mentions: attributes, keywords or strings in its code; how vLLM is seen to read or set something of ours.
        behaves: a function of the object that is true while it behaves as the plugin expects.
        moved: the last version of vLLM in which the places after the first are needed.
        only: the one device that needs it, "cpu" or "cuda"; by default every device.
    """

    place: str | tuple[str, ...]
    why: str
    test: str
    has: str = ""
    takes: str = ""
    mentions: str = ""
    behaves: Callable[[Any], bool] | None = None
    moved: str | None = None
    only: str | None = None

    @property
    def places(self) -> tuple[str, ...]:
        return (self.place,) if isinstance(self.place, str) else self.place

    def find(self) -> Any:
        """The object itself.

        Raises:
            Exception: its module cannot be imported, or has no such name.
        """
        for place in self.places[:-1]:
            try:
                return resolve(place)
            except (ImportError, AttributeError):
                continue
        return resolve(self.places[-1])

    def missing(self) -> str | None:
        """What is not as the plugin needs it, to be read after "vLLM has"; None if nothing."""
        name = " or ".join(self.places)
        try:
            found = self.find()
        except (ModuleNotFoundError, AttributeError):
            return f"no {name}"
        except Exception as error:  # whatever a module of a changed vLLM raises when it is imported
            return f"no {name}: {error}"
        for attribute in self.has.split():
            if not has(found, attribute):
                return f"no '{attribute}' in {name}"
        accepted = parameters(found) if self.takes else set()
        for parameter in self.takes.split():
            if parameter not in accepted:
                return f"no parameter '{parameter}' of {name}"
        mentioned = names_in_code(found) if self.mentions else set()
        for attribute in self.mentions.split():
            if attribute not in mentioned:
                return f"no use of '{attribute}' in {name}"
        if self.behaves is not None and not behaves(self.behaves, found):
            return f"another '{self.behaves.__name__.replace('_', ' ')}' in {name}"
        return None


def resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))


def has(found: Any, attribute: str) -> bool:
    """Whether the object, or an instance of the class, has the attribute; a field of a dataclass needs no default."""
    return hasattr(found, attribute) or attribute in getattr(found, "__dataclass_fields__", {})


def parameters(found: Any) -> set[str]:
    """Names of parameters, without those that `**` would take: vLLM might pass these on, or ignore them."""
    # Not the signature of a class: vLLM's layers have a `__new__` that takes anything.
    return set(inspect.signature(found.__init__ if inspect.isclass(found) else found).parameters)


def names_in_code(found: Any) -> set[str]:
    """Attributes, keywords and strings in the code of a function, or of a class's methods and its bases'."""
    owners = inspect.getmro(found) if inspect.isclass(found) else ()
    members = [member for owner in owners for member in vars(owner).values()] or [found]
    names: set[str] = set()
    for member in members:
        if isinstance(member, property):
            member = member.fget
        function: Any = inspect.unwrap(getattr(member, "__func__", member))
        codes = [function.__code__] if isinstance(function, FunctionType) else []
        while codes:
            code = codes.pop()
            names.update(code.co_names)
            for constant in code.co_consts:
                texts = constant if isinstance(constant, tuple) else (constant,)  # the keywords of a call are one tuple
                names.update(text for text in texts if isinstance(text, str))
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def behaves(behaviour: Callable[[Any], bool], found: Any) -> bool:
    try:
        return behaviour(found)
    except Exception:  # whatever a changed vLLM raises, it is not what the plugin relies on
        return False
