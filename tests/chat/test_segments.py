"""Conversations in segments: what is the template's and what is a message's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sov.chat.segments import Segment, Segments, around_contents, odd_opening
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.documents import BadRecord, Conversation
from megatron_sov.errors import UserError


def around(template: ChatTemplate, *turns: tuple[str, str]) -> Segments:
    return around_contents(template, Conversation.of(*turns))


FORM = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ eos_token }}",
                    "<s>", "</s>", "tok")


def test_pieces_alternate() -> None:
    assert around(FORM, ("user", "hi"), ("assistant", "yo")) == [
        Segment("<user>", None), Segment("hi", 0), Segment("</><assistant>", None), Segment("yo", 1),
        Segment("</></s>", None)]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=12))
def test_no_content_reaches_the_template(messages: list[tuple[str, str]]) -> None:
    pieces = around(FORM, *messages)
    assert [p.text for p in pieces if p.message is not None] == [content for _, content in messages]
    assert ("".join(p.text for p in pieces if p.message is None)
            == "".join(f"<{role}></>" for role, _ in messages) + "</s>")


@pytest.mark.parametrize("content", ["{{ 7 * 7 }}", "{% raw %}", "\ue0000\ue001", "<user>"])
def test_hostile_content_stays_content(content: str) -> None:
    assert around(FORM, ("user", content))[1] == Segment(content, 0)


def test_templates_that_drop_or_refuse_messages() -> None:
    chat = (("system", "be kind"), ("user", "hi"))
    template = ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif "
                "%}{% endfor %}")
    drops = ChatTemplate(template, "", "", "tok")
    with pytest.raises(BadRecord, match=r"is not shown by the chat template of tok with each message once"):
        around(drops, *chat)
    refuses = ChatTemplate("{{ raise_exception('no system role') }}", "", "", "tok")
    with pytest.raises(BadRecord, match=r"refused by the chat template of tok \(no system role\)"):
        around(refuses, *chat)
    with pytest.raises(UserError, match="is not valid Jinja"):
        ChatTemplate("{% for", "", "", "tok")


def test_another_text_before_a_response_than_before_those_trained_on_is_told() -> None:
    shown = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<no thoughts>{% endif %}"
    ends = "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    odd = ChatTemplate(shown + ends + "<thinks>{% endif %}", "", "", "tok")
    said = odd_opening(odd)
    assert said is not None and "behind '<user>a<assistant><thinks>', and shows one behind '<u" in said
    assert odd_opening(ChatTemplate(shown + ends + "<no thoughts>{% endif %}", "", "", "tok")) is None
    assert odd_opening(ChatTemplate("{{ raise_exception('no') }}", "", "", "tok")) is None


def test_a_prompt_ends_where_the_response_begins() -> None:
    form = ChatTemplate("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                    "{% if add_generation_prompt %}<assistant>{% endif %}", "", "", "tok")
    assert [p.text for p in around_contents(form, Conversation.of(("user", "hi")), awaits_response=True)] == [
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
            around(template, ("user", "hi"), ("assistant", content))
    else:
        assert [p.text for p in around(template, ("user", "hi"), ("assistant", content))][3] == content
