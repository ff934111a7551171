"""Chat templates in pieces: what is the template's and what is a message's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.chat.template import ChatTemplate, Segment
from megatron_sov.documents import BadRecord
from megatron_sov.errors import UserError

FORM = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ eos_token }}",
                    "<s>", "</s>", "tok")


def test_pieces_alternate() -> None:
    assert list(FORM.pieces((("user", "hi"), ("assistant", "yo")))) == [
        Segment("<user>", None), Segment("hi", 0), Segment("</><assistant>", None), Segment("yo", 1),
        Segment("</></s>", None)]


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=12))
def test_no_content_reaches_the_template(messages: list[tuple[str, str]]) -> None:
    pieces = list(FORM.pieces(tuple(messages)))
    assert [p.text for p in pieces if p.message is not None] == [content for _, content in messages]
    assert ("".join(p.text for p in pieces if p.message is None)
            == "".join(f"<{role}></>" for role, _ in messages) + "</s>")


@pytest.mark.parametrize("content", ["{{ 7 * 7 }}", "{% raw %}", "\ue0000\ue001", "<user>"])
def test_hostile_content_stays_content(content: str) -> None:
    assert list(FORM.pieces((("user", content),)))[1] == Segment(content, 0)


def test_templates_that_drop_or_refuse_messages() -> None:
    chat = (("system", "be kind"), ("user", "hi"))
    template = ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif "
                "%}{% endfor %}")
    drops = ChatTemplate(template, "", "", "tok")
    with pytest.raises(BadRecord, match=r"is not shown by the chat template of tok with each message once"):
        list(drops.pieces(chat))
    refuses = ChatTemplate("{{ raise_exception('no system role') }}", "", "", "tok")
    with pytest.raises(BadRecord, match=r"refused by the chat template of tok \(no system role\)"):
        list(refuses.pieces(chat))
    with pytest.raises(UserError, match="is not valid Jinja"):
        ChatTemplate("{% for", "", "", "tok")


def test_another_text_before_a_response_than_before_those_trained_on_is_told() -> None:
    shown = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<no thoughts>{% endif %}"
    ends = "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    odd = ChatTemplate(shown + ends + "<thinks>{% endif %}", "", "", "tok")
    said = odd.odd_opening()
    assert said is not None and "behind '<user>a<assistant><thinks>', and shows one behind '<u" in said
    assert ChatTemplate(shown + ends + "<no thoughts>{% endif %}", "", "", "tok").odd_opening() is None
    assert ChatTemplate("{{ raise_exception('no') }}", "", "", "tok").odd_opening() is None


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(BadRecord, match="refused by the chat template"):
        list(ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", "", "",
                      "tok").pieces((("user", "a"),)))


def test_a_prompt_ends_where_the_response_begins() -> None:
    form = ChatTemplate("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                    "{% if add_generation_prompt %}<assistant>{% endif %}", "", "", "tok")
    assert [p.text for p in form.pieces((("user", "hi"),), awaits_response=True)] == [
        "<user>", "hi", "<assistant>"]


TURNS = "{% for m in messages %}<{{ m.role }}>CONTENT</>{% endfor %}"


@pytest.mark.parametrize(("shows", "content", "refused"), [
    ("{{ m.content | trim }}", "  hello \n", True), ("{{ m.content | trim }}", "hello", False),
    ("{{ m.content.split('</think>')[-1] }}", "<think>hm</think>yes", True),
    ("{{ m.content.split('</think>')[-1] }}", "yes", False),
    ("{{ m.content }}{% if 'x' in m.content %}!{% endif %}", "x", True),
])
def test_a_content_that_is_shown_otherwise_is_refused(shows: str, content: str, refused: bool) -> None:
    """Trained on as it is, a model would be asked with another text."""
    template = ChatTemplate(TURNS.replace("CONTENT", shows), "", "", "tok")
    if refused:
        with pytest.raises(BadRecord, match="is changed by the chat template of tok"):
            template.pieces((("user", "hi"), ("assistant", content)))
    else:
        assert [p.text for p in template.pieces((("user", "hi"), ("assistant", content)))][3] == content


@pytest.mark.parametrize(("template", "says"), [
    ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "hi"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hi"),
    ("{{ strftime_now('%Y')[:2] }}{{ messages[0].content }}", "20hi"),
    ("{{ {'a': '<'} | tojson }}{{ messages[0].content }}", '{"a": "<"}hi'),
    ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages[0].content }}", "2hi"),
])
def test_templates_have_what_transformers_gives_them(template: str, says: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = "".join(p.text for p in ChatTemplate(template, "", "", "tok").pieces((("user", "hi"),)))
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
        ChatTemplate(template, "", "", "tok").pieces((("user", "a"),))
