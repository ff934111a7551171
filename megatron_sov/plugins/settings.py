"""Settings by name for code that is made with them: held to the types that its constructor declares."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from megatron_sov.errors import UserError, list_problems, nearest


def typed_settings(made: type[Any], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the given settings by the types that a class declares.

    Args:
        made: the class.
        given: name -> plain value.
        what: names it in messages, e.g. "reward math".

    Raises:
        UserError: a setting does not exist, is missing or has the wrong type; all of them are named.
    """
    from pydantic import TypeAdapter, ValidationError

    known = [name for name, p in inspect.signature(made).parameters.items()
             if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    hints = _hints(made)
    found, problems = {}, []
    for name, value in given.items():
        if name not in known:
            problems.append(f"{name}: no such setting{nearest(name, known)}"
                            + (f" (settings: {', '.join(known)})" if known else " (it has none)"))
            continue
        try:
            found[name] = TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as e:
            for error in e.errors():
                where = ".".join(map(str, (name, *error["loc"])))
                problems.append(f"{where} = {error.get('input')!r}: {error['msg']}")
    missing = [name for name, p in inspect.signature(made).parameters.items()
               if name in known and p.default is p.empty and name not in given]
    problems += [f"{name}: has no default; set it" for name in missing]
    if problems:
        raise UserError(list_problems(what, problems))
    return found


def _hints(made: type[Any]) -> dict[str, Any]:
    """Return the types that a class declares for its settings; none where a name in them is not known."""
    try:
        return get_type_hints(made.__init__)
    except (NameError, TypeError):
        return {}
