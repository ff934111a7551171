"""A tokenizer's chat template, rendered as transformers renders it, and split into what is the template's
and what is a message's.

Contents are replaced by marks before the template runs, so that every character is known to come from the
template or from one message.  A second rendering with the contents themselves shows whether the template
did more with them than show them: what it would change is refused, since a model would be trained on
another text than it is asked with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from megatron_sov.chat.limits import TooLong, bounded
from megatron_sov.documents import BadRecord
from megatron_sov.documents.records import Messages
from megatron_sov.errors import UserError

CPU_S, MEMORY_BYTES = 2.0, 1 << 30
"""What one rendering may take: a template of a model on the hub takes well below a millisecond."""
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Segment:
    """A part of a rendered chat."""

    text: str
    """The characters."""
    message: int | None
    """Which message's content this is; None: the template's own text, where special tokens are meant."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark what an assistant wrote:
    its body, as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """What `namespace()` gives a template: like Jinja's own, but for names that begin with an underscore,
    behind which Python's internals are."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        names = dict(*given, **kwargs)
        if hidden := [name for name in names if str(name).startswith("_")]:
            raise SecurityError(f"a namespace may not hold {hidden[0]!r}")
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        Namespace.__setitem__(self, name, value)


class ChatTemplate:
    """A chat template, split into pieces for each conversation."""

    def __init__(self, template: str, bos_token: str, eos_token: str, where: str) -> None:
        """Compile a template: sandboxed, with what transformers lets templates use.

        Args:
            template: Jinja; "" shows nothing.
            bos_token: what the template knows under this name.
            eos_token: likewise.
            where: names it in messages.

        Raises:
            UserError: it is not a Jinja template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "namespace": _Namespace,
                                "dict": lambda *given, **named: dict(*given, **named)}
        self._where = where
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        if not isinstance(template, str):
            raise UserError(f"{where}: its chat_template is a {type(template).__name__}, must be a string; "
                            "keep the one that is meant as a string")
        try:
            with bounded(CPU_S, MEMORY_BYTES):
                self._template = environment.from_string(template)
        except Exception as e:
            raise UserError(f"{where}: its chat_template is not valid Jinja ({_reason(e)}); "
                            "mend the template") from None

    def pieces(self, messages: Messages, awaits_response: bool = False) -> list[Segment]:
        """Return the pieces of a chat of (role, content) pairs, in order; `awaits_response` opens the
        assistant's turn at the end.

        Raises:
            BadRecord: the template refuses these roles, fails or does not end, does not show every message
                exactly once and in order, or shows a content otherwise than it is.
        """
        now = datetime.now()
        marks = [_MARK.format(i) for i in range(len(messages))]
        rendered = self._render(marks, messages, awaits_response, now)
        parts = _MARKS.split(rendered)  # template text and message numbers, in turn
        if parts[1::2] != [str(i) for i in range(len(messages))]:
            roles = ", ".join(role for role, _ in messages)
            raise BadRecord("template", f"is not shown by the chat template of {self._where} with each "
                                        f"message once and in order (roles: {roles}); "
                                        "change the chat or the template")
        pieces = [Segment(messages[int(part)][1] if i % 2 else part, int(part) if i % 2 else None)
                  for i, part in enumerate(parts) if i % 2 or part]
        self._check_shown(pieces, messages, awaits_response, now)
        return pieces

    def odd_opening(self) -> str | None:
        """Return a sentence where a model is asked behind another text than it is trained behind: the
        template opens an assistant's turn (`add_generation_prompt`) otherwise than it shows one; else None.

        A model of thoughts may mean that (it is asked to think, and shown without), so it is no error.
        """
        try:
            asked = self.pieces((("user", "a"),), awaits_response=True)
            shown = self.pieces((("user", "a"), ("assistant", "b")))
        except BadRecord:  # no such chats: what the data has is checked one by one
            return None
        before = "".join(p.text for p in shown[:next(i for i, p in enumerate(shown) if p.message == 1)])
        opened = "".join(p.text for p in asked)
        if opened == before:
            return None
        return (f"{self._where}: its chat template asks for a response behind {opened[-40:]!r}, and shows "
                f"one behind {before[-40:]!r}: what is trained on chats is asked behind other tokens")

    def _check_shown(self, pieces: Sequence[Segment], messages: Messages, awaits_response: bool,
                     now: datetime) -> None:
        """Refuse a chat of which the template would show another text than its pieces."""
        shown = self._render([content for _, content in messages], messages, awaits_response, now)
        start = 0
        for piece in pieces:
            if not shown.startswith(piece.text, start):
                number = next((p.message for p in pieces[pieces.index(piece):] if p.message is not None),
                              len(messages) - 1)
                raise BadRecord("template", f"is changed by the chat template of {self._where} at message "
                                            f"{number + 1} ({messages[number][0]}): its content would be "
                                            "trained on as it is, but shown otherwise; remove what the "
                                            "template cuts or trims, such as white space around it")
            start += len(piece.text)
        if start != len(shown):
            raise BadRecord("template", f"is changed by the chat template of {self._where}, which adds text "
                                        "for these contents; change the chat or the template")

    def _render(self, contents: Sequence[str], messages: Messages, awaits_response: bool,
                now: datetime) -> str:
        turns = [{"role": role, "content": content}
                 for (role, _), content in zip(messages, contents, strict=True)]
        try:
            with bounded(CPU_S, MEMORY_BYTES):
                return self._template.render(messages=turns, add_generation_prompt=awaits_response,
                                             strftime_now=now.strftime, **self._tokens)
        except TemplateError as e:
            raise BadRecord("template", f"is refused by the chat template of {self._where} ({e}); "
                                        "change its roles") from None
        except Exception as e:  # whatever the template's own code does
            raise BadRecord("template", f"makes the chat template of {self._where} fail ({_reason(e)}); "
                                        "mend the template") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Return JSON as transformers' filter gives it: Jinja's own writes < as an escape."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _reason(error: BaseException) -> str:
    if isinstance(error, TooLong):
        return f"it took more than {CPU_S:g} s"
    if isinstance(error, MemoryError):
        return f"it asked for more than {MEMORY_BYTES >> 20} MiB"
    return f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)


def _refuse(message: str) -> None:
    raise TemplateError(message)
