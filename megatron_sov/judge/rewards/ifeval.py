"""Instruction following: whether a response does what its checkable instructions ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_sov.base.errors import nearest
from megatron_sov.chat.marks import as_written
from megatron_sov.judge.rewards.ifbench import FORM_CHECKS, NEEDS_MORE, WORD_CHECKS
from megatron_sov.judge.rewards.instruction_checks import CHECKS as IFEVAL_CHECKS, Check
from megatron_sov.judge.rewards.reward import Refused, Row, Score, text_of, told_short

CHECKS: Mapping[str, Check] = {**IFEVAL_CHECKS, **WORD_CHECKS, **FORM_CHECKS}
"""Of IFEval and IFBench, whose names have nothing in common."""
MAX_CHARS = 400_000
"""Of a longer response nothing is checked: patterns over it would take long."""


@dataclass(frozen=True)
class IfEval:
    """1 where all instructions are followed, else 0; or the share of them."""

    LIBRARIES = ("langdetect",)
    CONTROL, cpu_limit_s = "", 30.0

    all_or_nothing: bool = True
    """IFEval's accuracy per prompt; without, per instruction."""
    loose: bool = False
    """IFEval's loose accuracy: a first or last line, or asterisks, may be in the way."""

    def score(self, row: Row) -> Score:
        """Return whether the response follows the row's `instructions`."""
        # thoughts and calls as the model wrote them: the checks are over the whole text
        response = as_written(text_of(row, "response"))
        if len(response) > MAX_CHARS:
            raise Refused(f"response has {len(response):,} characters; at most {MAX_CHARS:,} are checked")
        asked = instructions_of(row)
        texts = loosened(response) if self.loose else [response]
        # an empty response follows nothing, though "no commas" holds for it
        followed = [any(text.strip() and checked(name, text, arguments) for text in texts)
                    for name, arguments in asked]
        share = sum(followed) / len(followed)
        components = {f"{i}:{name}": followed[i] for i, (name, _) in enumerate(asked)}
        return Score(float(share == 1) if self.all_or_nothing else share, components)


def instructions_of(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, arguments) of a row's instructions: objects with `id` and the arguments beside it, or the
    columns of google/IFEval, `instruction_id_list` and `kwargs`.

    Raises:
        Refused: there are none, or one is not known.
    """
    given = row.get("instructions")
    if given is None and isinstance(row.get("instruction_id_list"), list):
        names, arguments = row["instruction_id_list"], row.get("kwargs")
        if not isinstance(arguments, list) or len(arguments) != len(names):
            raise Refused("kwargs must be a list as long as instruction_id_list")
        # the id last: an argument of that name must not replace it
        given = [{**kwargs, "id": name} if isinstance(kwargs, Mapping) else name
                 for name, kwargs in zip(names, arguments, strict=True)]
    if not isinstance(given, list) or not given:
        raise Refused(f"instructions = {told_short(given)} must be a list of objects with an id")
    return [_instruction(item) for item in given]


def _instruction(item: Any) -> tuple[str, dict[str, Any]]:
    name = item.get("id") if isinstance(item, Mapping) else None
    if isinstance(name, str) and name in NEEDS_MORE:
        raise Refused(f"instruction {name} is not judged: it takes {NEEDS_MORE[name]}, which is not here")
    if not isinstance(name, str) or name not in CHECKS:
        raise Refused(f"instruction {told_short(name or item)} is not known{nearest(str(name), CHECKS)}")
    # the data set's table has a column for each argument of any instruction, empty for all others
    return name, {key: value for key, value in item.items()
                  if key not in ("id", "prompt") and value is not None}


def checked(name: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a text follows an instruction.

    Raises:
        Refused: the arguments are not those of the instruction.
    """
    # a wrong type would compare false, and a response would pay for a fault of the data
    hints = get_type_hints(CHECKS[name])
    for key, value in arguments.items():
        if key in hints and key != "return" and not _is_of(hints[key], value):
            raise Refused(f"instruction {name}: {key} = {told_short(value)} must be {_WANTED[hints[key]]}")
    try:
        return CHECKS[name](text, **arguments)
    except (TypeError, AttributeError) as e:
        raise Refused(f"instruction {name}: takes other arguments than {told_short(dict(arguments))} "
                      f"({e})") from None


_WANTED = {str: "text", int: "a whole number", Sequence[str]: "a list of texts"}


def _is_of(wanted: Any, value: Any) -> bool:
    """Return whether an argument is of its check's type: a check takes a text for a list of letters, and no
    number equals its digits."""
    if wanted is str:
        return isinstance(value, str)
    if wanted is int:
        return type(value) is int or (isinstance(value, float) and value.is_integer())
    return isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)


def loosened(response: str) -> list[str]:
    """Return a response as it is, without its first line, its last, both; and each without asterisks."""
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(text.replace("*", "") for text in texts)]
