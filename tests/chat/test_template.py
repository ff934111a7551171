"""Chat templates rendered as transformers renders them, in a sandbox and in bounds."""

from __future__ import annotations

import resource
import threading

import pytest

from megatron_sov.chat.limits import TooLong, bounded
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.documents import BadRecord, Conversation


def shown(template: str, *turns: tuple[str, str]) -> str:
    return ChatTemplate(template, "", "", "tok").render(Conversation.of(*turns))


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(BadRecord, match="refused by the chat template"):
        shown("{{ ''.__class__.__mro__[1].__subclasses__() }}", ("user", "a"))


@pytest.mark.parametrize(("template", "says"), [
    ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "hi"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hi"),
    ("{{ strftime_now('%Y')[:2] }}{{ messages[0].content }}", "20hi"),
    ("{{ {'a': '<'} | tojson }}{{ messages[0].content }}", '{"a": "<"}hi'),
    ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages[0].content }}", "2hi"),
])
def test_templates_have_what_transformers_gives_them(template: str, says: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = shown(template, ("user", "hi"))
    (theirs,), _ = render_jinja_template(conversations=[[{"role": "user", "content": "hi"}]],
                                         chat_template=template)
    assert ours == theirs == says


@pytest.mark.parametrize(("template", "says"), [
    ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ 1 + 'a' }}", "TypeError"),
    ("{{ 'a' * 10**15 }}", "asked for more"),
    ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
    ("{{ 'a'.center(4 * 2**30) }}", "asked for more"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took more than"),
    ("{% set ns = namespace(__class__=1) %}", "may not hold '__class__'"),
])
def test_templates_that_fail_or_do_not_end_cost_a_sentence(template: str, says: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.chat.template.CPU_S", 0.2)
    with pytest.raises(BadRecord, match=says):
        shown(template, ("user", "a"))


# Bounds around foreign code, and that they are gone behind it.


def test_time_and_memory_are_bounded_inside_and_free_outside() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TooLong), bounded(0.05, 1 << 30):
        while True:
            pass
    with pytest.raises(MemoryError), bounded(5, 16 << 20):
        bytearray(64 << 20)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(64 << 20)) == 64 << 20


def test_other_threads_go_without() -> None:
    done = []

    def work() -> None:
        with bounded(0.0, 0):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
