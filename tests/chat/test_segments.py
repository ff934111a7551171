"""Segments of rendered conversations: template text and message contents."""

from itertools import groupby

import pytest
from hypothesis import given, settings, strategies as st

from megatron_sov.base.documents import BadRecord, Conversation, Message
from megatron_sov.base.errors import UserError
from megatron_sov.chat.marks import KIND_ANSWER, KIND_CALL, KIND_THOUGHT, classify_turn
from megatron_sov.chat.segments import ChatSegment, Segments, find_odd_opening, split_at_contents
from megatron_sov.chat.template import ChatTemplate


def split_segments(template: ChatTemplate, *turns: tuple[str, str]) -> Segments:
    return split_at_contents(template, Conversation.of(*turns))


FORM = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ eos_token }}",
                    "<s>", "</s>", "tok")


def test_template_and_content_pieces_alternate() -> None:
    assert split_segments(FORM, ("user", "hi"), ("assistant", "yo")) == [
        ChatSegment("<user>", None), ChatSegment("hi", 0), ChatSegment("</><assistant>", None),
        ChatSegment("yo", 1), ChatSegment("</></s>", None)]


@pytest.mark.deep
@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), min_size=1, max_size=12))
def test_template_sees_no_contents(messages: list[tuple[str, str]]) -> None:
    pieces = split_segments(FORM, *messages)
    assert [p.text for p in pieces if p.message is not None] == [content for _, content in messages]
    assert ("".join(p.text for p in pieces if p.message is None)
            == "".join(f"<{role}></>" for role, _ in messages) + "</s>")


@pytest.mark.each("content", ["{{ 7 * 7 }}", "{% raw %}", "\ue0000\ue001", "<user>"])
def test_hostile_content_remains_content(content: str) -> None:
    assert split_segments(FORM, ("user", content))[1] == ChatSegment(content, 0)


def test_templates_that_drop_or_refuse_messages_are_rejected() -> None:
    chat = (("system", "be kind"), ("user", "hi"))
    template = ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif "
                "%}{% endfor %}")
    dropping_template = ChatTemplate(template, "", "", "tok")
    with pytest.raises(BadRecord, match=r"is not shown by the chat template of tok with each message once"):
        split_segments(dropping_template, *chat)
    refusing_template = ChatTemplate("{{ raise_exception('no system role') }}", "", "", "tok")
    with pytest.raises(BadRecord, match=r"refused by the chat template of tok \(no system role\)"):
        split_segments(refusing_template, *chat)
    with pytest.raises(UserError, match="is not valid Jinja"):
        ChatTemplate("{% for", "", "", "tok")


def test_odd_opening_is_reported() -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<no thoughts>{% endif %}"
    ends = "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    odd_template = ChatTemplate(turns + ends + "<thinks>{% endif %}", "", "", "tok")
    problem = find_odd_opening(odd_template)
    assert problem is not None
    assert "with '<user>a<assistant><thinks>', but shows responses after '<u" in problem
    assert find_odd_opening(ChatTemplate(turns + ends + "<no thoughts>{% endif %}", "", "", "tok")) is None
    assert find_odd_opening(ChatTemplate("{{ raise_exception('no') }}", "", "", "tok")) is None


def test_prompt_ends_at_response() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                        "{% if add_generation_prompt %}<assistant>{% endif %}", "", "", "tok")
    assert [p.text for p in split_at_contents(template, Conversation.of(("user", "hi")),
                                              awaits_response=True)] == ["<user>", "hi", "<assistant>"]


TURNS = "{% for m in messages %}<{{ m.role }}>CONTENT</>{% endfor %}"


@pytest.mark.each(("expression", "content", "is_rejected"), [
    ("{{ m.content | trim }}", "  hello \n", True), ("{{ m.content | trim }}", "hello", False),
    ("{{ m.content.split('</think>')[-1] }}", "<think>hm</think>yes", True),
    ("{{ m.content.split('</think>')[-1] }}", "yes", False),
    ("{{ m.content }}{% if 'x' in m.content %}!{% endif %}", "x", True),
])
def test_changed_content_is_rejected(expression: str, content: str, is_rejected: bool) -> None:
    """Training and inference prompts would differ."""
    template = ChatTemplate(TURNS.replace("CONTENT", expression), "", "", "tok")
    if is_rejected:
        with pytest.raises(BadRecord, match="is changed by the chat template of tok"):
            split_segments(template, ("user", "hi"), ("assistant", content))
    else:
        assert [p.text for p in split_segments(template, ("user", "hi"),
                                               ("assistant", content))][3] == content


# Thoughts, calls and answer of a turn, in the forms of released templates.


KIND_LETTERS = {KIND_THOUGHT: "t", KIND_CALL: "c", KIND_ANSWER: "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def split_by_kind(text: str, message: Message) -> list[tuple[str, str]]:
    """Return (kind letter, text) per run of equal kinds."""
    kinds = classify_turn(text, message)
    spans, start = [], 0
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        spans.append((KIND_LETTERS[kind], text[start:end]))
        start = end
    return spans


def build_message(content: str = "", reasoning: str = "", calls: int = 0) -> Message:
    return Message("assistant", content, reasoning, (CALL,) * calls)


@pytest.mark.each(("message", "expected"), [
    # Qwen3, K-EXAONE
    (build_message("It is 4.", "2 + 2"),
     [("t", "<think>\n2 + 2\n</think>"), ("a", "\n\nIt is 4.<|im_end|>")]),
    (build_message("", "add", 1), [("t", "<think>\nadd\n</think>"),
                                   ("c", '\n\n<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>')]),
    (build_message("I add.", "add", 2), [
        ("t", "<think>\nadd\n</think>"), ("a", "\n\nI add."),
        ("c", "\n<tool_call>add</tool_call>\n<tool_call>add</tool_call><|im_end|>")]),
    (build_message("I add.", calls=1), [("a", "I add."), ("c", "\n<tool_call>add</tool_call>")]),
    (build_message("yes"), [("t", "<think>\n\n</think>"), ("a", "\n\nyes<|im_end|>")]),
    # the template opens the thoughts, so the turn begins inside them
    (build_message("yes", "hm"), [("t", "hm\n</think>"), ("a", "\n\nyes")]),
    # gpt-oss, Solar Open: thoughts end with their own message
    (build_message("yes", "hm"), [("t", "<|channel|>analysis<|message|>hm<|end|>"),
                                  ("a", "<|start|>assistant<|channel|>final<|message|>yes<|return|>")]),
    (build_message("", "hm", 1), [("t", "<|think|>hm<|end|>"),
                                  ("c", "<|begin|>assistant<|tool_calls|>add {}<|calls|>")]),
    # Mistral
    (build_message("yes", "hm"), [("t", "[THINK]hm[/THINK]"), ("a", "yes</s>")]),
    # a template without marks, and a thought that also occurs in the answer
    (build_message("hm, yes", "hm"), [("t", "hm"), ("a", " hm, yes")]),
    (build_message("<b>yes</b>", "hm"), [("t", "<think>hm</think>"), ("a", "<b>yes</b>")]),
    # an answer that quotes marks, in a message with separate thoughts and calls
    (build_message("The mark is <think>, and <tool_call>.", "hm", 1),
     [("t", "<think>hm</think>"), ("a", "The mark is <think>, and <tool_call>."),
      ("c", "<tool_call>add</tool_call>")]),
])
def test_marks_belong_to_their_parts(message: Message, expected: list[tuple[str, str]]) -> None:
    assert split_by_kind("".join(text for _, text in expected), message) == expected


@pytest.mark.each("expected", [
    [("a", "It is 4.")],
    [("t", "<think>2 + 2</think>"), ("a", "\nIt is 4.")],
    [("t", "2 + 2</think>"), ("a", "It is 4.")],
    [("t", "<think>without an end <tool_call>{}</tool_call>")],
    [("a", "I add. "), ("c", "<tool_call>{}</tool_call>"), ("a", " and "), ("c", "<tool_call>{}")],
    [("t", "<think>a</think>"), ("c", "<tool_call>{}</tool_call>")],
    [("a", "b "), ("t", "<think>a<tool_call></tool_call></think>"), ("a", "c")],
    [("c", '<tool_call>{"a": "<think>"}</tool_call>'), ("a", "c</think>")]])
def test_content_may_spell_thoughts_and_calls(expected: list[tuple[str, str]]) -> None:
    text = "".join(part for _, part in expected)
    assert split_by_kind(text, build_message(text)) == expected


def test_empty_turn_has_no_kinds() -> None:
    assert classify_turn("", build_message("")) == b""


def test_kinds_of_long_contents_take_linear_time() -> None:
    text = "<tool_call></tool_call>" * 2_000 + "<think>" * 50_000
    assert split_by_kind(text, build_message(text))[1] == ("t", "<think>" * 50_000)
