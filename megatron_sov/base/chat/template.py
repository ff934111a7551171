"""A tokenizer's chat template, rendered as transformers renders it: in a sandbox, in bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from megatron_sov.base.chat.limits import TemplateTooLong, bounded
from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.errors import UserError

CPU_S, MEMORY_BYTES = 2.0, 1 << 30
"""What one rendering may take: a template of a model on the hub takes well below a millisecond."""
PACKING_DATE = datetime(2026, 1, 1)
"""What templates that show the date are given when data are packed: the same bytes on every day."""
BEGIN, END = "\ue002", "\ue003"
"""Stand around what a template's generation blocks write, where they are asked for."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark what an assistant wrote: its body,
    between `BEGIN` and `END` where `marks_generation` is given."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(text: str) -> nodes.If:
            asked = nodes.Name("marks_generation", "load")
            return nodes.If(asked, [nodes.Output([nodes.TemplateData(text)])], [], [], lineno=line)

        return nodes.Scope([mark(BEGIN), *body, mark(END)], lineno=line)


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
    """A chat template."""

    def __init__(self, template: str, bos_token: str, eos_token: str, where: str,
                 today: datetime = PACKING_DATE) -> None:
        """Compile a template: sandboxed, with what transformers lets templates use.

        Args:
            template: Jinja; "" shows nothing.
            bos_token: what the template knows under this name.
            eos_token: likewise.
            where: names it in messages.
            today: what `strftime_now` formats.

        Raises:
            UserError: it is not a Jinja template.
        """
        self._made_of = template, bos_token, eos_token, where, today
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "namespace": _Namespace,
                                "dict": lambda *given, **named: dict(*given, **named)}
        self.where = where
        """Names it in messages."""
        self._globals = {"bos_token": bos_token, "eos_token": eos_token, "strftime_now": today.strftime}
        if not isinstance(template, str):
            raise UserError(f"{where}: its chat_template is a {type(template).__name__}, must be a string; "
                            "keep the one that is meant as a string")
        try:
            with bounded(CPU_S, MEMORY_BYTES):
                self._template = environment.from_string(template)
        except Exception as e:
            raise UserError(f"{where}: its chat_template is not valid Jinja ({_reason(e)}); "
                            "mend the template") from None

    def __reduce__(self) -> tuple[Any, ...]:  # compiled anew
        return ChatTemplate, self._made_of

    def render(self, conversation: Conversation, awaits_response: bool = False, *,
               contents: Sequence[str] | None = None, marks_generation: bool = False) -> str:
        """Return a conversation as text.

        Args:
            conversation: what is shown.
            awaits_response: open the assistant's turn at the end.
            contents: stand in the place of the messages' own.
            marks_generation: put `BEGIN` and `END` around what generation blocks write.

        Raises:
            BadRecord: the template refuses the conversation, fails, or does not end.
        """
        turns = [message.to_dict() for message in conversation.messages]
        for turn, content in zip(turns, contents or (), strict=contents is not None):
            turn["content"] = content
        given: dict[str, Any] = {**conversation.template_kwargs, **self._globals,
                                 "tools": list(conversation.tools) or None, "documents": None}
        try:
            with bounded(CPU_S, MEMORY_BYTES):
                return self._template.render(messages=turns, add_generation_prompt=awaits_response,
                                             marks_generation=marks_generation, **given)
        except TemplateError as e:
            raise BadRecord("template", f"is refused by the chat template of {self.where} ({e}); "
                                        "change its roles") from None
        except Exception as e:  # whatever the template's own code does
            raise BadRecord("template", f"makes the chat template of {self.where} fail ({_reason(e)}); "
                                        "mend the template") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Return JSON as transformers' filter gives it: Jinja's own writes < as an escape."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _reason(error: BaseException) -> str:
    if isinstance(error, TemplateTooLong):
        return f"it took more than {CPU_S:g} s"
    if isinstance(error, MemoryError):
        return f"it asked for more than {MEMORY_BYTES >> 20} MiB"
    return f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)


def _refuse(message: str) -> None:
    raise TemplateError(message)
