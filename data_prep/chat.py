"""Chats as tokens with exact masks: the tokenizer's own template, rendered around the messages
instead of through them.

Contents are replaced by marks before the template runs and encoded on their own, as ordinary text, so that no
content can write a special token and every token is known to come from the template or from one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sov.documents import BadRecord
from megatron_sov.documents.records import Messages
from megatron_sov.errors import UserError

_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Segment:
    """A part of a rendered chat."""

    text: str
    """The characters."""
    message: int | None
    """Which message's content this is; None: the template's own text, where special tokens are meant."""


class ChatForm:
    """A tokenizer's chat template, split into pieces for each conversation."""

    def __init__(self, template: str, bos_token: str, eos_token: str, where: str) -> None:
        """Compile a template (as transformers does: sandboxed, blocks trimmed); `where` names it in messages.

        Raises:
            UserError: it is not a Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._where = where
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(template)
        except TemplateError as e:
            raise UserError(f"{where}: its chat_template is not valid Jinja ({e}); "
                            "mend the template") from None

    def pieces(self, messages: Messages, awaits_response: bool = False) -> Iterator[Segment]:
        """Yield the pieces of a chat of (role, content) pairs, in order; `awaits_response` opens the
        assistant's turn at the end.

        Raises:
            BadRecord: the template refuses these roles, or does not show every message exactly
                once and in order.
        """
        marked = [{"role": role, "content": _MARK.format(i)} for i, (role, _) in enumerate(messages)]
        try:
            rendered = self._template.render(messages=marked, add_generation_prompt=awaits_response,
                                             **self._tokens)
        except TemplateError as e:
            raise BadRecord("template", f"is refused by the chat template of {self._where} ({e}); "
                                        "change its roles") from None
        parts = _MARKS.split(rendered)  # template text and message numbers, in turn
        if parts[1::2] != [str(i) for i in range(len(messages))]:
            roles = ", ".join(role for role, _ in messages)
            raise BadRecord("template", f"is not shown by the chat template of {self._where} with each "
                                        f"message once and in order (roles: {roles}); "
                                        "change the chat or the template")
        for i, part in enumerate(parts):
            if i % 2:
                yield Segment(messages[int(part)][1], int(part))
            elif part:
                yield Segment(part, None)


def _refuse(message: str) -> None:
    raise TemplateError(message)
