"""A conversation about a task of a virtual world: a model calls tools, and a model may play the user."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.synth.generator import Ask
from data_prep.synth.replies import NoReply, NoUsableReply, Reply
from megatron_sov.chat.marks import BEGIN_CALL
from megatron_sov.judge.tools.environment import (
    LIMITS, MALFORMED_CALLS, InfrastructureFault, ToolFault, cut_text)
from megatron_sov.judge.tools.worlds.virtual import Virtual

Message = dict[str, Any]
TURN_SEEDS = 1 << 10
"""Seeds of a conversation: one for each turn, and for those that are asked again."""
MAX_MALFORMED = 1
"""Turns that are asked again because a call in them cannot be read."""
MAX_REPEATS = 2
"""Equal calls with equal results; more of them are a loop."""
MAX_USER_CHARS = 2000
"""Of a user's turn."""
DONE = "###DONE###"
"""Ends a conversation, as the user's prompt says; tau-bench (arXiv 2406.12045) has such a word."""


@dataclass
class Conversation:
    """A conversation as far as it has come."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    end: str = ""
    """answered; turns: at the limit; loop; malformed: calls that cannot be read; unusable: an answer that is
    none; cut: a turn at its limit of tokens."""
    reward: float = 0.0
    """1 where the tables are as the task wants them and all is said."""
    num_malformed: int = 0
    """Turns that were asked again."""
    num_wrong_calls: int = 0
    """Calls that no tool was found for, or whose arguments were wrong."""
    user_problems: list[str] = field(default_factory=list)
    """Turns in which the model that plays the user fell out of its role."""


@dataclass(frozen=True)
class Player:
    """Plays one conversation."""

    ask: Ask
    fields: Mapping[str, Any]
    """Of the sample: `max_turns`, `temperature`, `max_tokens`, `thinking`, and those of the user's prompt."""
    number: int
    """Of the conversation among those of its item."""
    user_prompt: str = ""
    """By which a model plays the user; empty: the user asks the task's question alone."""

    def play(self, task: Mapping[str, Any]) -> Conversation:
        """Return a conversation about a task with its reward.

        Raises:
            NoReply: a model did not answer, or the sandbox failed.
            UserError: the task is none of a virtual world.
        """
        virtual = Virtual()
        opening = virtual.reset(task)
        played = Conversation([{"role": "system", "content": opening.system}] if opening.system else [],
                              virtual.tools())
        try:
            played.messages.append({"role": "user", "content": self._user_turn(played) or opening.user})
            played.end = self._play_turns(played, virtual)
        except NoUsableReply:
            played.end = "unusable"
        answers = [message["content"] for message in played.messages
                   if message["role"] == "assistant" and message["content"].strip()]
        if played.end == "answered" and answers:
            # a user hears every turn; who asks once reads the last one
            heard = answers if self.user_prompt else answers[-1:]
            played.reward = virtual.score("\n".join(heard)).reward
        return played

    def _play_turns(self, played: Conversation, virtual: Virtual) -> str:
        """Play to the end of a conversation, and return it."""
        results: Counter[str] = Counter()
        for turn in range(self.fields["max_turns"]):
            reply = self._model_turn(played, turn)
            if isinstance(reply, str):
                return reply
            played.messages.append(_assistant_message(reply, turn))
            for place, call in enumerate(reply.tool_calls):
                results[self._call(played, virtual, call, f"call_{turn}_{place}")] += 1
            # the same call with the same result over and over: more turns would bring no more
            if results and max(results.values()) > MAX_REPEATS:
                return "loop"
            if not reply.tool_calls:
                answer = self._user_turn(played)
                if answer is None:
                    return "answered"
                played.messages.append({"role": "user", "content": answer})
        return "turns"

    def _model_turn(self, played: Conversation, turn: int) -> Reply | str:
        """Return the model's next turn, or how the conversation ends without one."""
        while True:
            # a turn that is asked again has another seed: an equal request would get the same answer
            seed = self.number * TURN_SEEDS + turn + played.num_malformed * self.fields["max_turns"]
            reply = self.ask.chat(_wire(played.messages), tools=played.tools, draw=seed,
                                  temperature=self.fields["temperature"],
                                  max_tokens=self.fields["max_tokens"], thinking=self.fields.get("thinking"))
            if reply.is_cut:
                return "cut"
            is_malformed = any("error" in call for call in reply.tool_calls)
            if not is_malformed and len(reply.tool_calls) <= LIMITS["test"].max_calls_per_turn:
                return reply
            played.num_malformed += 1
            if played.num_malformed > MAX_MALFORMED:
                return "malformed"

    def _call(self, played: Conversation, virtual: Virtual, call: Mapping[str, Any], id_: str) -> str:
        """Make a call; returns the call with its result, as JSON."""
        fault = ""
        try:
            result = virtual.call(call["name"], call["arguments"])
        except InfrastructureFault as e:  # nothing is known about the model
            raise NoReply(e.reason) from None
        except ToolFault as e:
            fault = e.code
            tool = "" if fault in MALFORMED_CALLS else f"{call['name']}: "
            result = f"error: {tool}{e.reason}"
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        text, _ = cut_text(text, LIMITS["test"].max_tool_chars)
        if fault in MALFORMED_CALLS:
            played.num_wrong_calls += 1
            # the turn may be read, and is not learned
            last_turn = max(i for i, m in enumerate(played.messages) if m["role"] == "assistant")
            played.messages[last_turn]["train"] = False
        played.messages.append({"role": "tool", "tool_call_id": id_, "name": call["name"], "content": text})
        return json.dumps([call["name"], call["arguments"], text], sort_keys=True)

    def _user_turn(self, played: Conversation) -> str | None:
        """Return what the user says next; None: nothing more."""
        if not self.user_prompt:
            return None
        heard = [{"who": "You" if message["role"] == "user" else "Assistant", "said": message["content"]}
                 for message in played.messages
                 if message["role"] in ("user", "assistant") and message["content"].strip()]
        reply, = self.ask(self.user_prompt, {**self.fields, "heard": heard},
                          first=self.number, temperature=0.9, max_tokens=512)
        text = reply.text.strip()
        if reply.is_cut or len(text) > MAX_USER_CHARS:
            played.user_problems.append("a user's turn is too long")
        if BEGIN_CALL in text or text.startswith(("{", "[")):
            played.user_problems.append("a user writes a tool call, or JSON")
        said = text.partition(DONE)[0].strip()
        return None if DONE in text or not said else said


def _assistant_message(reply: Reply, turn: int) -> Message:
    message: Message = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{turn}_{place}", "type": "function",
             "function": {"name": call["name"], "arguments": dict(call["arguments"])}}
            for place, call in enumerate(reply.tool_calls)]
    return message


def _wire(messages: list[Message]) -> list[Message]:
    """Return messages as chat-completions endpoints take them: arguments as JSON, nothing of ours."""
    found = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("train", "reasoning_content")}
        if "tool_calls" in plain:
            plain["tool_calls"] = [_wire_call(call) for call in plain["tool_calls"]]
        found.append(plain)
    return found


def _wire_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    # endpoints take arguments as text; records for training keep them as objects
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"],
                                                                     ensure_ascii=False)}}
