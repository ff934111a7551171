"""Chat templates in pieces: what is the template's and what is a message's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.chat import ChatForm, Segment
from megatron_sov.documents import BadRecord
from megatron_sov.errors import UserError

FORM = ChatForm("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{{ eos_token }}",
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
    drops = ChatForm(template, "", "", "tok")
    with pytest.raises(BadRecord, match=r"is not shown by the chat template of tok with each message once"):
        list(drops.pieces(chat))
    refuses = ChatForm("{{ raise_exception('no system role') }}", "", "", "tok")
    with pytest.raises(BadRecord, match=r"refused by the chat template of tok \(no system role\)"):
        list(refuses.pieces(chat))
    with pytest.raises(UserError, match="is not valid Jinja"):
        ChatForm("{% for", "", "", "tok")


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(BadRecord, match="refused by the chat template"):
        list(ChatForm("{{ ''.__class__.__mro__[1].__subclasses__() }}", "", "",
                      "tok").pieces((("user", "a"),)))


def test_a_prompt_ends_where_the_response_begins() -> None:
    form = ChatForm("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                    "{% if add_generation_prompt %}<assistant>{% endif %}", "", "", "tok")
    assert [p.text for p in form.pieces((("user", "hi"),), awaits_response=True)] == [
        "<user>", "hi", "<assistant>"]
