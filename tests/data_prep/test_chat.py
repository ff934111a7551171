"""Chat templates in pieces: what is the template's and what is a message's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.chat import ChatForm, Piece
from megatron_sov.errors import UserError

FORM = ChatForm("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{{ eos_token }}", "<s>", "</s>", "tok")


def test_pieces_alternate() -> None:
    assert list(FORM.pieces((("user", "hi"), ("assistant", "yo")), "a:1")) == [
        Piece("<user>", None), Piece("hi", 0), Piece("</><assistant>", None), Piece("yo", 1), Piece("</></s>", None)]


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=12))
def test_no_content_reaches_the_template(messages: list[tuple[str, str]]) -> None:
    pieces = list(FORM.pieces(tuple(messages), "a:1"))
    assert [p.text for p in pieces if p.message is not None] == [content for _, content in messages]
    assert "".join(p.text for p in pieces if p.message is None) == "".join(f"<{role}></>" for role, _ in messages) + "</s>"


@pytest.mark.parametrize("content", ["{{ 7 * 7 }}", "{% raw %}", "\ue0000\ue001", "<user>"])
def test_hostile_content_stays_content(content: str) -> None:
    assert list(FORM.pieces((("user", content),), "a:1"))[1] == Piece(content, 0)


def test_templates_that_drop_or_refuse_messages() -> None:
    chat = (("system", "be kind"), ("user", "hi"))
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    drops = ChatForm(template, "", "", "tok")
    with pytest.raises(UserError, match=r"data\.jsonl:3: the chat template of tok does not show each message once"):
        list(drops.pieces(chat, "data.jsonl:3"))
    refuses = ChatForm("{{ raise_exception('no system role') }}", "", "", "tok")
    with pytest.raises(UserError, match="refuses this chat \\(no system role\\)"):
        list(refuses.pieces(chat, "data.jsonl:3"))
    with pytest.raises(UserError, match="is not valid Jinja"):
        ChatForm("{% for", "", "", "tok")


def test_templates_run_in_a_sandbox() -> None:
    with pytest.raises(UserError, match="refuses this chat"):
        list(ChatForm("{{ ''.__class__.__mro__[1].__subclasses__() }}", "", "", "tok").pieces((("user", "a"),), "a:1"))
