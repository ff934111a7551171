"""Reward interface: a row in, a score with components out; errors become results."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.chat.marks import to_hermes_form
from megatron_sov.chat.tool_calls import parse_turn

Row = Mapping[str, Any]
"""A row with a `response` text and the fields for its reward."""
Status = Literal["scored", "timeout", "failed", "refused"]
OPERATION: Mapping[str, bool] = {"operation": True}
"""Metadata for operational settings (speed, cost, key location), which do not enter the version."""
REWARDS = "rewards"
"""Component with the rewards for all rows in a group."""
MAX_REWARD = 1e30
"""Advantages are float32, with a maximum near 3e38."""
MAX_REASON_CHARS = 300
"""Longest error text; errors may quote megabytes."""


class Refused(Exception):
    """The reward does not apply to a row: a field is missing or beyond a limit."""


class TooLong(TimeoutError):
    """Judging a response exceeded its processor time, independent of other load."""


@dataclass(frozen=True)
class Score:
    """Result returned by a reward.

    >>> Score(0.5, {"right": 1, "short": 0}).components["right"]
    1
    """

    reward: float
    """The reward."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and short texts that explain the reward."""
    timed_out: bool = False
    """The response's own program timed out: the reward counts, and the status is timeout."""


@dataclass(frozen=True)
class Result:
    """Result for a row."""

    reward: float | None
    """None: no reward, unlike 0."""
    status: Status
    """`scored`; `timeout` (with a reward if the response itself was slow); `failed`: a fault in the reward or
    its environment; `refused`: the reward does not apply."""
    components: Mapping[str, Any] = field(default_factory=dict)
    """Components from `Score`."""
    reason: str = ""
    """Reason for a missing reward, or for giving up on a response."""
    spent: bool = False
    """Judging exceeded limits that ordinary responses never reach: processor time, memory, recursion."""


class Reward(Protocol):
    """Reward protocol; settings are the keyword arguments of the constructor, with defaults.

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
        """Score a row's response.

        Raises:
            Refused: the reward does not apply to the row.
        """
        ...


def get_text(row: Row, name: str) -> str:
    """Return a text field; thoughts and calls in `response` are converted to Hermes form (`chat.marks`).

    Raises:
        Refused: the field is missing or not text.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise Refused(f"{name} = {format_short(value)} must be text" if name in row else f"has no {name!r}")
    # A common form, so that rewards need not know each family's marks.
    return to_hermes_form(value) if name == "response" else value


def get_content(row: Row) -> str:
    """Return the response without thoughts and tool calls; unclosed thoughts extend to the end.

    Raises:
        Refused: the response is missing or not text.
    """
    return parse_turn(get_text(row, "response")).content


def get_messages(row: Row) -> list[dict[str, str]]:
    """Return a row's `prompt` as messages with role and content.

    Raises:
        Refused: the prompt is missing.
    """
    prompt = row.get("prompt")
    # A conversation, or a single text.
    if isinstance(prompt, list) and prompt and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return [{"role": str(m.get("role", "user")), "content": m["content"]} for m in prompt]
    return [{"role": "user", "content": get_text(row, "prompt")}]


def format_prompt(row: Row) -> str:
    """Return a row's `prompt` as text, with roles for a conversation; raises like `get_messages`."""
    if isinstance(row.get("prompt"), str):
        return get_text(row, "prompt")
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in get_messages(row))


def format_short(value: Any) -> str:
    """Return `repr(value)`, truncated."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def run_reward(reward: Any, row: Row | list[Row]) -> Result:
    """Score a row, or a group in a list (`components[REWARDS]`), and turn exceptions into results; only
    `UserError` propagates, because it would recur for every row."""
    try:
        return to_result(reward.score_group(row) if isinstance(row, list) else reward.score(row))
    except Refused as e:
        return Result(None, "refused", {}, shorten_reason(str(e)))
    # Before Exception: `TooLong` is a TimeoutError, and the class decides who is at fault.
    except TimeoutError as e:
        return Result(None, "timeout", {}, shorten_reason(str(e) or "took too long"), isinstance(e, TooLong))
    # The response is suspect, see `scoring.ProcessRunner`.
    except MemoryError:
        return Result(None, "refused", {}, "asks for more memory than a process of the reward may have",
                      spent=True)
    except RecursionError as e:
        return Result(None, "failed", {}, shorten_reason(format_error(e)), spent=True)
    except UserError:
        raise
    except Exception as e:
        return Result(None, "failed", {}, shorten_reason(format_error(e)))


def to_result(returned: Any) -> Result:
    """Convert a reward's return value; non-finite numbers become failures."""
    value = returned.reward if isinstance(returned, Score) else returned
    components = returned.components if isinstance(returned, Score) else {}
    # numpy numbers are Real; bool counts as 0 or 1.
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
    timed_out = isinstance(returned, Score) and returned.timed_out
    return Result(number, "timeout" if timed_out else "scored", plain)


def merge_repeated_results(first: Result, second: Result) -> Result:
    """Merge the results from judging a row twice; different rewards become a failure."""
    # A single None may be a transient fault; two different numbers cannot both be right.
    first_value, second_value = ((result.reward, result.components.get(REWARDS))
                                 for result in (first, second))
    if None not in (first.reward, second.reward) and first_value != second_value:
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
        except OverflowError:  # an integer beyond the float range, which no mean could include
            return None
        if isinstance(value, numbers.Integral):
            return int(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(name): _to_json_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(part) for part in value]
    return format_short(value)
