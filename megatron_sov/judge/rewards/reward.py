"""A reward: a row in, a number with its components out; and what is made of everything else that one does."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.chat.marks import to_hermes_form
from megatron_sov.chat.tool_calls import parse_turn

Row = Mapping[str, Any]
"""A row: `response`, a text, and what its reward needs."""
Status = Literal["scored", "timeout", "failed", "refused"]
OPERATION: Mapping[str, bool] = {"operation": True}
"""Metadata of a setting that says how a reward is run (speed, cost, where a key lies) and not what it gives:
the version does not depend on it."""
REWARDS = "rewards"
"""Component with the rewards of all rows, where a reward judges the responses to a prompt together."""
MAX_REWARD = 1e30
"""Advantages are of four bytes, which hold no number above 3e38."""
MAX_REASON_CHARS = 300
"""Of what an error says; it may quote a response of megabytes."""


class Refused(Exception):
    """A row that a reward does not judge: it lacks a field, or is beyond a limit; one sentence."""


class TooLong(TimeoutError):
    """Judging a response has used its time of a processor, which no busy machine lengthens."""


@dataclass(frozen=True)
class Score:
    """What a reward gives for one response.

    >>> Score(0.5, {"right": 1, "short": 0}).components["right"]
    1
    """

    reward: float
    """The number."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """What it is made of, and what was seen: numbers and short texts."""
    timed_out: bool = False
    """The response itself took too long, as a program that does not end: the reward says what that is worth,
    the status is timeout."""


@dataclass(frozen=True)
class Result:
    """What became of one row."""

    reward: float | None
    """None: there is none, which is never a 0."""
    status: Status
    """scored; timeout: it took too long, with a reward where that was the response's own doing; failed: the
    fault of the reward or of what it runs on; refused: the row is none that it judges."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """As the reward has them."""
    reason: str = ""
    """Why there is no reward, or why judging the response was given up, which is worth 0."""
    spent: bool = False
    """Judging took what ordinary responses never take: time of a processor, memory, levels."""


class Reward(Protocol):
    """What every reward has; its settings are what it is made with, by name and with defaults.

    >>> class Contains:
    ...     def __init__(self, *, factor: float = 1.0):
    ...         self.factor = factor
    ...
    ...     def score(self, row):
    ...         return Score(self.factor * (row["answer"] in row["response"]))
    >>> Contains(factor=2.0).score({"response": "It is 12.", "answer": "12"}).reward
    2.0
    """

    def score(self, row: Row) -> Score | float:
        """Return the reward of a row's response.

        Raises:
            Refused: the row cannot be judged.
        """
        ...


def get_text(row: Row, name: str) -> str:
    """Return a field of a row that has to be text; thoughts and calls of a response in one form for all
    families of models (`chat.marks`).

    Raises:
        Refused: it is missing or something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise Refused(f"{name} = {format_short(value)} must be text" if name in row else f"has no {name!r}")
    # one form for all families, so that a reward need not know each family's marks
    return to_hermes_form(value) if name == "response" else value


def get_content(row: Row) -> str:
    """Return what a row's response says, without its thoughts and calls of tools; thoughts without an end
    reach to its end.

    Raises:
        Refused: it is missing or no text.
    """
    return parse_turn(get_text(row, "response")).content


def get_messages(row: Row) -> list[dict[str, str]]:
    """Return a row's `prompt` as messages with role and content.

    Raises:
        Refused: it has none.
    """
    prompt = row.get("prompt")
    # a conversation, or else one text
    if isinstance(prompt, list) and prompt and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return [{"role": str(m.get("role", "user")), "content": m["content"]} for m in prompt]
    return [{"role": "user", "content": get_text(row, "prompt")}]


def format_prompt(row: Row) -> str:
    """Return a row's `prompt` as one text: as it is, or its messages with their roles; raises as
    `messages_of` does."""
    if isinstance(row.get("prompt"), str):
        return get_text(row, "prompt")
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in get_messages(row))


def format_short(value: Any) -> str:
    """Return what Python shows of a value, cut."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def run_reward(reward: Any, row: Row | list[Row]) -> Result:
    """Return the result of a row, or one result of the rows of a group (`components[REWARDS]`), whatever the
    reward does; `UserError` alone passes, for it would meet every row."""
    try:
        return to_result(reward.score_group(row) if isinstance(row, list) else reward.score(row))
    except Refused as e:
        return Result(None, "refused", {}, shorten_reason(str(e)))
    # before Exception: `TooLong` is one, and the kind decides who is to blame
    except TimeoutError as e:
        return Result(None, "timeout", {}, shorten_reason(str(e) or "took too long"), isinstance(e, TooLong))
    # a response that makes judging so large is suspect, see `scoring.ProcessRunner`
    except MemoryError:
        return Result(None, "refused", {}, "asks for more memory than a process of the reward may have",
                      spent=True)
    except RecursionError as e:
        return Result(None, "failed", {}, shorten_reason(format_error(e)), spent=True)
    except UserError:
        raise
    except Exception as e:
        return Result(None, "failed", {}, shorten_reason(format_error(e)))


def to_result(given: Any) -> Result:
    """Return the result that a reward's return value stands for: one that is no finite number has failed."""
    value = given.reward if isinstance(given, Score) else given
    components = given.components if isinstance(given, Score) else {}
    # numbers of numpy are Real too; a bool is, and stands for 0 or 1
    if not isinstance(value, numbers.Real):
        return Result(None, "failed", {}, f"returned {format_short(value)}, a {type(value).__name__}, "
                                          "where a number belongs")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        return Result(None, "failed", {}, f"returned {format_short(value)}, which is no finite number")
    if abs(number) > MAX_REWARD:
        return Result(None, "failed", {}, f"returned {format_short(value)}, and may not pass {MAX_REWARD:g}")
    plain = {str(name): _to_json_value(part) for name, part in components.items()}
    timed_out = isinstance(given, Score) and given.timed_out
    return Result(number, "timeout" if timed_out else "scored", plain)


def merge_repeated_results(first: Result, second: Result) -> Result:
    """Return the result of a row that was judged twice: one that changed under one version has failed."""
    # one None may be a passing fault; two different numbers cannot both be the row's
    one, other = ((given.reward, given.components.get(REWARDS)) for given in (first, second))
    if None not in (first.reward, second.reward) and one != other:
        return Result(None, "failed", {}, f"gave {first.reward:g}, then {second.reward:g} for the same row "
                                          "under one version: it depends on something else than the row")
    return first


def shorten_reason(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else line[:MAX_REASON_CHARS - 3] + "..."


def _to_json_value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:  # a whole number that no float holds, over which no mean goes
            return None
        if isinstance(value, numbers.Integral):
            return int(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(name): _to_json_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(part) for part in value]
    return format_short(value)
