"""Tasks that ask several questions in one conversation, each behind the answers to those before: what is
asked next follows from what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.chat.marks import as_written
from megatron_sov.eval.lm.answers import Request
from megatron_sov.eval.lm.bridge import Bridge, NotAnswered
from megatron_sov.eval.lm.scoring import documents_of
from megatron_sov.eval.suites.items import Item, Response
from megatron_sov.eval.suites.rows import TURN, without_thoughts

Messages = list[dict[str, str]]


@dataclass
class _Dialogue:
    """One conversation as far as it has come."""

    doc: Mapping[str, Any]
    messages: Messages
    """Up to the last question."""
    instances: list[Any]
    """lm-eval's, one for each turn that was asked; they live as long as this, for answers are found by
    them."""
    items: list[Item] = field(default_factory=list)
    """Of the turns that are answered."""
    failed: str = ""
    """Why a turn has no answer."""


class Dialogues:
    """The conversations of one task.

    Args:
        protocol: of the task, with `turns_field`.
        task: lm-eval's, with its requests built.
        bridge: which has all answers; its template has the task's mode now.
        generation: how answers are written, in lm-eval's words.
    """

    def __init__(self, protocol: Any, task: Any, bridge: Bridge, generation: Mapping[str, Any]) -> None:
        self._protocol, self._bridge, self._generation = protocol, bridge, generation
        self._template_kwargs = dict(bridge.template_kwargs)
        self.dialogues: dict[int, _Dialogue] = {}
        """Number of the item -> its conversation."""
        for number, instances in documents_of(task).items():
            doc = instances[0].doc
            self.dialogues[number] = self._dialogue(doc, instances[0])

    def _dialogue(self, doc: Mapping[str, Any], instance: Any) -> _Dialogue:
        messages: Messages = [{"role": "user", "content": doc[self._protocol.turns_field][0]}]
        return _Dialogue(doc, messages, [self._asking(instance, messages)])

    def _asking(self, instance: Any, messages: Messages) -> Any:
        self._bridge.template_kwargs = self._template_kwargs
        prompt = self._bridge.apply_chat_template(messages)
        return replace(instance, arguments=(prompt, instance.args[1]))

    def requests(self) -> list[Request]:
        """Return what has to be asked now: the last question of each conversation."""
        return [self._request(dialogue) for dialogue in self.dialogues.values() if not dialogue.failed]

    def _request(self, dialogue: _Dialogue) -> Request:
        return self._bridge.requests_of(dialogue.instances[-1], 0, self._generation)[0]

    def go_on(self) -> list[Request]:
        """Take the answers to what was asked, and return what has to be asked behind them; nothing at the
        end."""
        asked: list[Request] = []
        for dialogue in self.dialogues.values():
            questions, turn = dialogue.doc[self._protocol.turns_field], len(dialogue.items)
            if dialogue.failed or turn == len(questions):
                continue
            try:
                found = self._bridge.answer(self._request(dialogue))
            except NotAnswered as e:
                dialogue.failed = str(e)
                continue
            text = str(found["text"])
            dialogue.items.append(Item({**dialogue.doc, TURN: turn}, list(dialogue.messages),
                                       [Response(text, str(found["finish_reason"]))]))
            if turn + 1 < len(questions):
                dialogue.messages += [
                    {"role": "assistant", "content": as_written(without_thoughts(text, self._protocol.mode))},
                    {"role": "user", "content": questions[turn + 1]}]
                dialogue.instances.append(self._asking(dialogue.instances[0], dialogue.messages))
                asked.append(self._request(dialogue))
        return asked

    def items(self) -> list[tuple[str, Item, str | None]]:
        """Return (number and turn, item, why it has no answer) of every turn, asked or not."""
        found: list[tuple[str, Item, str | None]] = []
        for number, dialogue in self.dialogues.items():
            for turn in range(len(dialogue.doc[self._protocol.turns_field])):
                is_there = turn < len(dialogue.items)
                item = dialogue.items[turn] if is_there else Item({**dialogue.doc, TURN: turn},
                                                                  list(dialogue.messages), [])
                found.append((f"{number}/{turn + 1}", item, None if is_there else dialogue.failed))
        return found
