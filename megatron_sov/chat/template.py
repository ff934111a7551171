"""Compile and render chat templates in a sandbox, with the functions that transformers provides."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.errors import UserError
from megatron_sov.chat.limits import CpuTimeExceeded, limit_resources
from megatron_sov.chat.marks import BEGIN_GENERATION, END_GENERATION

CPU_S, MEMORY_BYTES = 2.0, 1 << 30
"""Limits per rendering; published templates take well below a millisecond."""
PACKING_DATE = datetime(2026, 1, 1)
"""Date passed to templates during packing, for reproducible output."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks assistant text with `BEGIN_GENERATION` and
    `END_GENERATION` if requested."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        # the marks depend on a variable, so that one compiled template serves both renderings
        def mark(text: str) -> nodes.If:
            is_requested = nodes.Name("marks_generation", "load")
            return nodes.If(is_requested, [nodes.Output([nodes.TemplateData(text)])], [], [], lineno=line)

        return nodes.Scope([mark(BEGIN_GENERATION), *body, mark(END_GENERATION)], lineno=line)


class _Namespace(Namespace):
    """Jinja's `namespace()` without underscore names, which would expose Python internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *arguments = args  # no parameter `self`: a template may use it as a name
        names = dict(*arguments, **kwargs)
        if hidden := [name for name in names if str(name).startswith("_")]:
            raise SecurityError(f"a namespace may not hold {hidden[0]!r}")
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        Namespace.__setitem__(self, name, value)


class ChatTemplate:
    """A compiled, sandboxed chat template."""

    def __init__(self, template: str, bos_token: str, eos_token: str, where: str,
                 today: datetime = PACKING_DATE) -> None:
        """Compile a template in a sandbox with the functions that transformers provides.

        Args:
            template: Jinja source; "" renders nothing.
            bos_token: template variable.
            eos_token: template variable.
            where: name in messages.
            today: date for `strftime_now`.

        Raises:
            UserError: invalid Jinja.
        """
        self._arguments = template, bos_token, eos_token, where, today
        # settings of transformers' `apply_chat_template`, which determine white space
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_template_error, "namespace": _Namespace,
                                "dict": lambda *given, **named: dict(*given, **named)}
        self.where = where
        """Name of the template's source in messages."""
        self._globals = {"bos_token": bos_token, "eos_token": eos_token, "strftime_now": today.strftime}
        if not isinstance(template, str):
            raise UserError(f"{where}: its chat_template is a {type(template).__name__}, must be a string; "
                            "keep the one that is meant as a string")
        try:
            # compiling evaluates constant expressions, which can be arbitrarily large
            with limit_resources(CPU_S, MEMORY_BYTES):
                self._template = environment.from_string(template)
        except Exception as e:
            raise UserError(f"{where}: its chat_template is not valid Jinja ({_describe_error(e)}); "
                            "fix the template") from None

    def __reduce__(self) -> tuple[Any, ...]:  # compiled again after unpickling
        return ChatTemplate, self._arguments

    def render(self, conversation: Conversation, awaits_response: bool = False, *,
               contents: Sequence[str] | None = None, marks_generation: bool = False) -> str:
        """Render a conversation as text.

        Args:
            conversation: the conversation.
            awaits_response: open an assistant turn at the end.
            contents: replacements for the messages' contents.
            marks_generation: put `BEGIN_GENERATION` and `END_GENERATION` around generation blocks.

        Raises:
            BadRecord: the template refuses the conversation, fails, or exceeds its limits.
        """
        turns = [message.to_dict() for message in conversation.messages]
        for turn, content in zip(turns, contents or (), strict=contents is not None):
            turn["content"] = content
        # record variables first: standard variables override them
        variables: dict[str, Any] = {**conversation.template_kwargs, **self._globals,
                                     "tools": list(conversation.tools) or None, "documents": None}
        try:
            with limit_resources(CPU_S, MEMORY_BYTES):
                return self._template.render(messages=turns, add_generation_prompt=awaits_response,
                                             marks_generation=marks_generation, **variables)
        except TemplateError as e:
            raise BadRecord("template", f"is refused by the chat template of {self.where} ({e}); "
                                        "change its roles") from None
        except Exception as e:  # template code may raise anything
            raise BadRecord("template", f"makes the chat template of {self.where} fail "
                                        f"({_describe_error(e)}); fix the template") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON filter of transformers; Jinja's own escapes `<`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _describe_error(error: BaseException) -> str:
    if isinstance(error, CpuTimeExceeded):
        return f"it took more than {CPU_S:g} s"
    if isinstance(error, MemoryError):
        return f"it asked for more than {MEMORY_BYTES >> 20} MiB"
    return f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
