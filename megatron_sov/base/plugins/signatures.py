"""Checks at the moment of loading: a plug-in that is called wrongly must fail before the
work, in one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from megatron_sov.base.errors import UserError


def takes(function: Any, names: tuple[str, ...]) -> bool:
    """Return whether something can be called with so many arguments by position."""
    try:
        inspect.signature(function).bind(*names)
    except (TypeError, ValueError):
        return False
    return True


def check_methods(value: Any, reference: str, what: str, methods: Mapping[str, tuple[str, ...]]) -> None:
    """Check that a class has methods that take what they will be given.

    Args:
        value: what was found.
        reference: where it stands.
        what: what it should be, e.g. "an objective".
        methods: name -> arguments behind `self`.

    Raises:
        UserError: it is no class, or a method is missing or takes something else; all of them are named.
    """
    shapes = {name: f"{name}({', '.join(('self', *arguments))})" for name, arguments in methods.items()}
    if not inspect.isclass(value):
        raise UserError(f"{reference}: is a {type(value).__name__}; "
                        f"{what} is a class with {', '.join(shapes.values())}")
    wrong = [name for name, arguments in methods.items()
             if not callable(getattr(value, name, None))
             or not takes(getattr(value, name), ("self", *arguments))]
    if wrong:
        found = [f"{name}{inspect.signature(getattr(value, name))}"
                 for name in wrong if callable(getattr(value, name, None))]
        has = f"it has {', '.join(found)}" if found else "it has none"
        raise UserError(f"{reference}: {what} needs {', '.join(shapes[name] for name in wrong)}; {has}")
