"""The ids of a conversation that grows turn by turn: what a model wrote stays as it was written, and what the
template puts behind it is appended.

Encoding the whole conversation again for each turn would give a model other ids than it wrote (many texts
have several spellings in tokens), and train it on tokens that it never sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_sov.base.chat.encode import CALL, CALL_PROBE, TYPE_RESPONSE, ChatEncoder, EncodedChat
from megatron_sov.base.chat.marks import marks_decoder
from megatron_sov.base.chat.tool_calls import ToolCall, parse_turn
from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.base.errors import UserError

_ASKED, _SAID = Message("user", "a"), Message("assistant", "b")
_REMEDY = "take a model whose chat template knows tools, such as Qwen3's"


class TurnEncoder:
    """A chat encoder for conversations with tools."""

    def __init__(self, encoder: ChatEncoder, where: str,
                 template_kwargs: Mapping[str, Any] | None = None) -> None:
        """Take the encoder of a model.

        Args:
            encoder: of its tokenizer and template.
            where: names it in messages.
            template_kwargs: variables of the template, such as `enable_thinking`.

        Raises:
            UserError: its template ends no turn with a special token, or shows no results of tools.
        """
        self._encoder, self._where = encoder, where
        self._template_kwargs = dict(template_kwargs or {})
        self.end_ids = encoder.end_ids()
        """Special tokens with which a model ends its turn."""
        if not self.end_ids:
            raise UserError(f"{where}: its chat template ends no turn with a special token, so nothing tells "
                            f"where a turn ends; {_REMEDY}")
        self._text = marks_decoder(encoder.added_ids(), self.end_ids, encoder.decode)
        self.behind_turn(["c"])
        self._refuse_unread_calls()

    def _refuse_unread_calls(self) -> None:
        """Refuse a template whose calls of tools would be taken for answers: it shows one, which has to be
        found again."""
        chat = replace(CALL_PROBE, template_kwargs=self._template_kwargs)
        try:
            encoded = self._encoder.encode(chat)
        except BadRecord:
            return
        # the whole text: with contents that cannot be told from it, a template's calls may be no response
        shown = self._encoder.decode(encoded.ids)
        said = self._encoder.decode([i for i, kind in zip(encoded.ids, encoded.types, strict=True)
                                     if kind == TYPE_RESPONSE])
        call = ToolCall(**CALL["function"])
        seen = said if call.name in said else shown
        if call.name in seen and call not in parse_turn(seen).calls:
            raise UserError(f"{self._where}: its chat template writes calls of tools in a form that is not "
                            f"read here ({said.strip()[:80]!r}); {_REMEDY}")

    def opening(self, chat: Conversation) -> list[int]:
        """Return the ids with which a model is asked first.

        Raises:
            BadRecord: the template refuses the conversation.
        """
        asked = replace(chat, template_kwargs={**chat.template_kwargs, **self._template_kwargs})
        return self._encoder.encode(asked, awaits_response=True).ids

    def behind_turn(self, results: Sequence[str]) -> list[int]:
        """Return the ids behind the end of a model's turn: results of tools, and the opening of the next one.

        Special tokens that a result spells out are text; where the template does not let them be told from
        its own, a space breaks them.

        Raises:
            UserError: the template does not show results of tools.
        """
        try:
            encoded = self._encoded(results)
        except BadRecord:
            try:
                encoded = self._encoded([self._plain(result) for result in results])
            except BadRecord as e:
                raise UserError(f"{self._where}: its chat template shows no results of tools (a conversation "
                                f"with one {e.reason}); {_REMEDY}") from None
        end = encoded.types.rfind(bytes([TYPE_RESPONSE])) + 1
        if not end or encoded.ids[end - 1] not in self.end_ids or end == len(encoded.ids):
            raise UserError(f"{self._where}: its chat template does not show where a turn before a tool's "
                            f"result ends; {_REMEDY}")
        return encoded.ids[end:]

    def _encoded(self, results: Sequence[str]) -> EncodedChat:
        tools = tuple(Message("tool", result) for result in results)
        chat = Conversation((_ASKED, _SAID, *tools), (), self._template_kwargs)
        return self._encoder.encode(chat, awaits_response=True)

    def _plain(self, result: str) -> str:
        for special in self._encoder.special_texts():
            result = result.replace(special, f"{special[0]} {special[1:]}")
        return result.strip()

    def opens_thoughts(self, asked: Sequence[int]) -> bool:
        """Return whether what a model is asked with ends in the beginning of its thoughts."""
        return self._encoder.opens_thoughts(asked)

    def text(self, written: Sequence[int]) -> str:
        """Return what a model wrote, without the token that ends its turn."""
        return self._text(list(written))

    def encode(self, text: str) -> list[int]:
        """Return a text as a turn of a model, with the token that ends it."""
        return [*self._encoder.encode_text(text), self.end_ids[0]]

    def differs(self, written: Sequence[int]) -> bool:
        """Return whether the text of what a model wrote has other ids when it is encoded again."""
        return self._encoder.encode_text(self._encoder.decode(written)) != list(written)
