"""Conversations about tasks in virtual worlds: the writer calls tools, and may also play the user."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.synth.replies import NoReply, NoUsableReply, Reply
from data_prep.synth.requests import Requester
from megatron_sov.chat.marks import BEGIN_CALL
from megatron_sov.judge.tools.environment import (
    LIMITS, MALFORMED_CALLS, InfrastructureFault, ToolFault, cut_text)
from megatron_sov.judge.tools.worlds.virtual import Virtual

Message = dict[str, Any]
TURN_SEEDS = 1 << 10
"""Seeds reserved for a conversation's turns and retries."""
MAX_MALFORMED = 1
"""Retries after malformed calls."""
MAX_REPEATS = 2
"""Equal calls with equal results; more count as a loop."""
MAX_USER_CHARS = 2000
DONE = "###DONE###"
"""Ends a conversation when the played user writes this word (tau-bench, arXiv 2406.12045)."""


@dataclass
class PlayedConversation:
    """A conversation, complete or in progress."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    end: str = ""
    """answered; turns: turn limit; loop; malformed: unreadable calls; unusable: no usable reply; cut: token
    limit."""
    reward: float = 0.0
    """1 if the tables match the task's goal and all answers were given."""
    num_malformed: int = 0
    """Retried turns."""
    num_wrong_calls: int = 0
    """Calls with an unknown tool or wrong arguments."""
    user_problems: list[str] = field(default_factory=list)
    """Turns in which the played user left the role."""


@dataclass(frozen=True)
class Player:
    """Plays one conversation."""

    requester: Requester
    fields: Mapping[str, Any]
    """Sample fields: `max_turns`, `temperature`, `max_tokens`, `thinking`, and fields for `user_prompt`."""
    number: int
    """Index among the item's conversations."""
    user_prompt: str = ""
    """Prompt with which the writer plays the user; "": the user asks the task's question once."""

    def play_conversation(self, task: Mapping[str, Any]) -> PlayedConversation:
        """Play a conversation about a task and score the final state. Raises `NoReply`: no answer, or the
        sandbox failed. Raises `UserError`: `task` belongs to no virtual world."""
        virtual = Virtual()
        opening = virtual.reset(task)
        system = [{"role": "system", "content": opening.system}] if opening.system else []
        conversation = PlayedConversation(system, virtual.tools())
        try:
            first_turn = self._request_user_turn(conversation) or opening.user
            conversation.messages.append({"role": "user", "content": first_turn})
            conversation.end = self._play_turns(conversation, virtual)
        except NoUsableReply:
            conversation.end = "unusable"
        answers = [message["content"] for message in conversation.messages
                   if message["role"] == "assistant" and message["content"].strip()]
        if conversation.end == "answered" and answers:
            # a played user reads every turn; otherwise only the last answer counts
            read_answers = answers if self.user_prompt else answers[-1:]
            conversation.reward = virtual.score("\n".join(read_answers)).reward
        return conversation

    def _play_turns(self, conversation: PlayedConversation, virtual: Virtual) -> str:
        """Play until the conversation ends and return `PlayedConversation.end`."""
        results: Counter[str] = Counter()
        for turn in range(self.fields["max_turns"]):
            reply = self._request_model_turn(conversation, turn)
            if isinstance(reply, str):
                return reply
            conversation.messages.append(_build_assistant_message(reply, turn))
            for index, call in enumerate(reply.tool_calls):
                result = self._call_tool(conversation, virtual, call, f"call_{turn}_{index}")
                results[result] += 1
            if results and max(results.values()) > MAX_REPEATS:
                return "loop"
            if not reply.tool_calls:
                user_turn = self._request_user_turn(conversation)
                if user_turn is None:
                    return "answered"
                conversation.messages.append({"role": "user", "content": user_turn})
        return "turns"

    def _request_model_turn(self, conversation: PlayedConversation, turn: int) -> Reply | str:
        """Return the model's next turn, or `PlayedConversation.end`."""
        while True:
            # a new seed for a retry, because the cache would return the same answer
            retry = conversation.num_malformed * self.fields["max_turns"]
            reply = self.requester.request_turn(
                _build_request_messages(conversation.messages), tools=conversation.tools,
                draw=self.number * TURN_SEEDS + turn + retry, temperature=self.fields["temperature"],
                max_tokens=self.fields["max_tokens"], thinking=self.fields.get("thinking"))
            if reply.is_cut:
                return "cut"
            is_malformed = any("error" in call for call in reply.tool_calls)
            if not is_malformed and len(reply.tool_calls) <= LIMITS["test"].max_calls_per_turn:
                return reply
            conversation.num_malformed += 1
            if conversation.num_malformed > MAX_MALFORMED:
                return "malformed"

    def _call_tool(self, conversation: PlayedConversation, virtual: Virtual, call: Mapping[str, Any],
                   call_id: str) -> str:
        """Execute a call, append the result, and return call and result as JSON."""
        fault = ""
        try:
            result = virtual.call(call["name"], call["arguments"])
        except InfrastructureFault as e:  # the machine failed, not the model
            raise NoReply(e.reason) from None
        except ToolFault as e:
            fault = e.code
            tool = "" if fault in MALFORMED_CALLS else f"{call['name']}: "
            result = f"error: {tool}{e.reason}"
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        text, _ = cut_text(text, LIMITS["test"].max_tool_chars)
        if fault in MALFORMED_CALLS:
            conversation.num_wrong_calls += 1
            # the turn stays as context, and training skips its tokens
            last_turn = max(i for i, message in enumerate(conversation.messages)
                            if message["role"] == "assistant")
            conversation.messages[last_turn]["train"] = False
        conversation.messages.append(
            {"role": "tool", "tool_call_id": call_id, "name": call["name"], "content": text})
        return json.dumps([call["name"], call["arguments"], text], sort_keys=True)

    def _request_user_turn(self, conversation: PlayedConversation) -> str | None:
        """Return the played user's next turn; None: the user is silent."""
        if not self.user_prompt:
            return None
        heard = [{"who": "You" if message["role"] == "user" else "Assistant", "said": message["content"]}
                 for message in conversation.messages
                 if message["role"] in ("user", "assistant") and message["content"].strip()]
        reply, = self.requester.request_replies(self.user_prompt, {**self.fields, "heard": heard},
                                                first=self.number, temperature=0.9, max_tokens=512)
        text = reply.text.strip()
        if reply.is_cut or len(text) > MAX_USER_CHARS:
            conversation.user_problems.append("a user's turn is too long")
        if BEGIN_CALL in text or text.startswith(("{", "[")):
            conversation.user_problems.append("a user writes a tool call, or JSON")
        turn = text.partition(DONE)[0].strip()
        return None if DONE in text or not turn else turn


def _build_assistant_message(reply: Reply, turn: int) -> Message:
    message: Message = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{turn}_{index}", "type": "function",
             "function": {"name": call["name"], "arguments": dict(call["arguments"])}}
            for index, call in enumerate(reply.tool_calls)]
    return message


def _build_request_messages(messages: list[Message]) -> list[Message]:
    """Convert messages to the chat-completions format: arguments as JSON text, no `train`, no thoughts."""
    converted = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("train", "reasoning_content")}
        if "tool_calls" in plain:
            plain["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(
                    call["function"]["arguments"], ensure_ascii=False)}} for call in plain["tool_calls"]]
        converted.append(plain)
    return converted
