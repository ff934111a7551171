"""A conversation in a tool environment: a model acts through `ask.chat`, tools answer, and a user may go on.

The environment runs in a process of its own (`tools.host`).  Where it breaks, the item is left for a later
run, since the machine is at fault.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.synth.generator import Ask
from data_prep.synth.replies import NoReply, NoUsableReply, Reply
from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.tools.environment import BY_THE_MODEL, EpisodeLimits, Task
from megatron_sov.judge.tools.host import CallResult, EnvironmentHost

Message = dict[str, Any]
User = Callable[[Sequence[Message]], "str | None"]
"""Says what a user answers to a conversation so far; None: nothing more."""
BROKEN = ("timeout", "memory", "ended", "infrastructure")
"""Faults that say something about the machine and nothing about the call."""
REDRAWS = 1 << 10
"""Draws that a conversation may have: one for each of its turns, and those that are asked again."""
MAX_MALFORMED = 1
"""Turns that are asked again because a call in them cannot be read."""
MAX_REPEATS = 2
"""Of the same call with the same result; more of them are a loop."""


@dataclass(frozen=True)
class Manner:
    """How a conversation is held."""

    limits: EpisodeLimits
    """Of turns, calls and results."""
    temperature: float = 0.7
    max_tokens: int = 1024
    """Of a turn."""
    thinking: bool | None = None
    """Whether the model thinks first; None: as it does by itself."""


@dataclass
class Played:
    """A conversation as far as it has come."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    end: str = ""
    """answered; turns: at the limit; loop; malformed: calls that cannot be read; unusable: an answer that is
    none; cut: a turn at its limit of tokens."""
    detail: str = ""
    """More on the end, for a reader."""
    result: Result | None = None
    """The environment's reward, where the conversation ended with an answer."""
    faults: Counter[str] = field(default_factory=Counter)
    """Fault -> calls."""
    num_malformed: int = 0
    """Turns that were asked again."""

    @property
    def answers(self) -> list[str]:
        return [message["content"] for message in self.messages
                if message["role"] == "assistant" and message["content"].strip()]

    @property
    def num_wrong_calls(self) -> int:
        """Return the calls that no tool was found for, or whose arguments were wrong."""
        return sum(count for fault, count in self.faults.items() if fault in BY_THE_MODEL)


@dataclass(frozen=True)
class ConversationTable:
    """What a conversation is played with."""

    ask: Ask
    host: EnvironmentHost
    manner: Manner
    draw: int
    """Number of the conversation among those of its item."""


def play(task: Task, table: ConversationTable, opening: str | None = None,
         user: User = lambda messages: None) -> Played:
    """Return a conversation about a task, played to its end.

    Args:
        task: of the environment.
        table: what is played with.
        opening: what the user says first; None: the task's question.
        user: says what the user answers.

    Raises:
        UserError: the task is none of the environment's.
        NoReply: a model did not answer, or the environment broke.
    """
    begun = table.host.reset(task)
    seen = begun.observation
    system = [{"role": "system", "content": seen.system}] if seen.system else []
    played = Played([*system, {"role": "user", "content": seen.user if opening is None else opening}],
                    list(begun.tools))
    told: Counter[str] = Counter()
    for turn in range(table.manner.limits.max_turns):
        # `_turn` has noted why
        if (reply := _turn(played, table, turn)) is None:
            return played
        played.messages.append(_said(reply, turn))
        if reply.tool_calls:
            # the same call with the same result over and over: more turns would bring no more
            if _call(played, reply, table, turn, told):
                played.end = "loop"
                return played
            continue
        try:
            answer = user(played.messages)
        except NoUsableReply as e:
            played.end, played.detail = "unusable", f"user: {e}"
            return played
        if answer is None:
            played.end = "answered"
            return played
        played.messages.append({"role": "user", "content": answer})
    played.end = "turns"
    return played


def scored(played: Played, host: EnvironmentHost, said: str) -> Result:
    """Return the environment's reward of a conversation that has just been played, and keep it.

    Raises:
        NoReply: the environment broke.
    """
    played.result = host.score(said)
    if played.result.reward is None:
        raise NoReply(f"the environment gave no reward ({played.result.reason})")
    return played.result


def wire(messages: Sequence[Message]) -> list[Message]:
    """Return messages as chat-completions endpoints take them: arguments as JSON, nothing of ours."""
    found = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("train", "reasoning_content")}
        if "tool_calls" in plain:
            plain["tool_calls"] = [_wired(call) for call in plain["tool_calls"]]
        found.append(plain)
    return found


def _wired(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    # endpoints take arguments as text; records for training keep them as objects
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"],
                                                                     ensure_ascii=False)}}


def _turn(played: Played, table: ConversationTable, turn: int) -> Reply | None:
    """Return the model's next turn, or None where the conversation ends without one."""
    manner = table.manner
    while True:
        # A turn that is asked again has a number beyond those of all turns: an equal one would get the same
        # malformed answer from what is kept.
        draw = (table.draw * REDRAWS) + turn + played.num_malformed * manner.limits.max_turns
        try:
            reply = table.ask.chat(wire(played.messages), tools=played.tools, draw=draw,
                                   temperature=manner.temperature, max_tokens=manner.max_tokens,
                                   thinking=manner.thinking)
        except NoUsableReply as e:
            played.end, played.detail = "unusable", str(e)
            return None
        if reply.is_cut:
            played.end = "cut"
            return None
        wrong = next((call["error"] for call in reply.tool_calls if "error" in call), "")
        if not wrong and len(reply.tool_calls) > manner.limits.max_calls_per_turn:
            wrong = f"more than {manner.limits.max_calls_per_turn} calls in a turn"
        if not wrong:
            return reply
        played.num_malformed += 1
        if played.num_malformed > MAX_MALFORMED:
            played.end, played.detail = "malformed", wrong
            return None


def _said(reply: Reply, turn: int) -> Message:
    message: Message = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{turn}_{place}", "type": "function",
             "function": {"name": call["name"], "arguments": dict(call["arguments"])}}
            for place, call in enumerate(reply.tool_calls)]
    return message


def _call(played: Played, reply: Reply, table: ConversationTable, turn: int, told: Counter[str]) -> bool:
    """Make the calls of a turn; returns whether one of them is made over and over."""
    wrong = False
    for place, call in enumerate(reply.tool_calls):
        result = _result(ToolCall(call["name"], dict(call["arguments"])), table.host)
        played.faults.update([result.fault] if result.fault else [])
        wrong = wrong or result.fault in BY_THE_MODEL
        played.messages.append({"role": "tool", "tool_call_id": f"call_{turn}_{place}",
                                "name": call["name"], "content": result.text})
        told[json.dumps([call["name"], call["arguments"], result.text], sort_keys=True)] += 1
    if wrong:  # it may be read, and is not learned
        played.messages[-1 - len(reply.tool_calls)]["train"] = False
    return max(told.values()) > MAX_REPEATS


def _result(call: ToolCall, host: EnvironmentHost) -> CallResult:
    try:
        result = host.call(call)
    except UserError as e:
        raise NoReply(f"the environment cannot go on ({e})") from None
    # says nothing about the model, so the conversation must not be judged by it
    if result.fault in BROKEN:
        raise NoReply(f"the environment broke at a call of {call.name[:60]} ({result.text[:200]})")
    return result
