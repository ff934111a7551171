"""Streamed answers: stop strings, turns and tool calls."""

import pytest
from tokenizers import Tokenizer, decoders, models

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from megatron_sov.chat.tool_calls import ServedTurn, ToolCall, parse_served_turn
from megatron_sov.infer.request import LENGTH, STOP
from megatron_sov.serve.replies import AnswerText, parse_partial_turn

TEXT = "Ein Bär 곰 sagt: stop. Und 🐻‍❄️ sagt nichts."


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    """Return a tokenizer whose every token is a byte."""
    tokenizer = Tokenizer(models.WordLevel(byte_alphabet(), "?"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_streamed_text_only_grows_by_whole_characters(by_bytes: Tokenizer) -> None:
    writing, told = AnswerText(by_bytes.decode, (), ()), ""
    for byte in TEXT.encode():
        writing.add_token(byte, None)
        sure = writing.get_stable_text()
        assert sure.startswith(told) and TEXT.startswith(sure)
        told = sure
    assert told == TEXT == writing.get_text()


@pytest.mark.each("stops", [("stop",), (": s", "sagt:"), ("곰 ",), ("🐻",), ("never",)])
def test_no_part_of_a_stop_string_is_streamed(by_bytes: Tokenizer, stops: tuple[str, ...]) -> None:
    writing = AnswerText(by_bytes.decode, stops, ())
    expected = min((TEXT.partition(stop)[0] for stop in stops), key=len)
    for byte in TEXT.encode():
        writing.add_token(byte, None)
        assert expected.startswith(writing.get_stable_text())
    assert writing.get_text() == expected
    assert writing.finish_reason == (STOP if any(stop in TEXT for stop in stops) else None)


def test_a_token_or_the_length_ends_it(by_bytes: Tokenizer) -> None:
    ended, cut = (AnswerText(by_bytes.decode, (), (0,)) for _ in range(2))
    for token, reason in ((65, None), (0, STOP), (66, LENGTH)):
        ended.add_token(token, reason)
    cut.add_token(65, LENGTH)
    assert (ended.tokens, ended.finish_reason) == ([65, 0], STOP)
    assert (cut.tokens, cut.finish_reason) == ([65], LENGTH)


ADD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
CALL = ToolCall("add", {"a": 1})
TOOLS = [{"type": "function", "function": {"name": "add"}}]
TURNS = {
    "plain": (" Hello <b>world</b>.\n", False, ServedTurn("", " Hello <b>world</b>.\n")),
    "thoughts": ("<think>\n1 + 1\n</think>\n\n2 <think> 3", False, ServedTurn("1 + 1", "2 <think> 3")),
    "thoughts opened by the template": ("1 + 1\n</think>\n2", True, ServedTurn("1 + 1", "2")),
    "opened twice": ("<think>1 + 1</think>2", True, ServedTurn("1 + 1", "2")),
    "cut in thoughts": ("<think>1 + 1 </thi", False, ServedTurn("1 + 1 </thi", "")),
    "an end without a beginning": ("2</think>3", False, ServedTurn("", "2</think>3")),
    "no more than a mark": ("<think", False, ServedTurn("", "<think")),
    "a call": (f"<think>x</think>I add.\n{ADD}", False, ServedTurn("x", "I add.", (CALL,))),
    "two calls": (f"{ADD}\n{ADD}\nDone.", False, ServedTurn("", "\nDone.", (CALL, CALL))),
    "a call in thoughts": (f"<think>{ADD}</think>2", False, ServedTurn(ADD, "2")),
    "malformed": ("So: <tool_call>{add}</tool_call> ", False,
                  ServedTurn("", "So: <tool_call>{add}</tool_call> ")),
    "one of two is malformed": (f"{ADD}<tool_call>", False, ServedTurn("", f"{ADD}<tool_call>")),
    "indented code": ("<think>\nplan\n</think>\n\n    return 42\n", False,
                      ServedTurn("plan", "    return 42\n")),
    "indented thoughts": ("<think>\n  a\n b \n</think>\tx", False, ServedTurn("  a\n b ", "\tx")),
    "one line feed": ("plan</think>\n  - a\n  - b", True, ServedTurn("plan", "  - a\n  - b")),
    "no line feed": ("plan</think> a", True, ServedTurn("plan", " a")),
    "a line of blanks": ("plan</think>\n  \n  a", True, ServedTurn("plan", "  \n  a")),
    "carriage return": ("<think>a</think>\r\nb", False, ServedTurn("a", "\r\nb")),
    "white space": ("  \n ", False, ServedTurn("", "  \n ")), "nothing": ("", True, ServedTurn("", "")),
}


@pytest.mark.each(("text", "in_thoughts", "expected"), TURNS.values())
def test_a_partial_turn_is_a_prefix_of_the_whole(text: str, in_thoughts: bool, expected: ServedTurn) -> None:
    assert parse_served_turn(text, in_thoughts, TOOLS) == expected
    for tools in (TOOLS, []):
        streamed = ServedTurn("", "")
        for end in range(len(text) + 1):
            turn = parse_partial_turn(text[:end], in_thoughts, tools)
            assert turn.thoughts.startswith(streamed.thoughts) and turn.content.startswith(streamed.content)
            streamed = turn
        whole = parse_served_turn(text, in_thoughts, tools)
        assert whole.thoughts.startswith(streamed.thoughts) and whole.content.startswith(streamed.content)


def test_without_tools_a_call_is_text() -> None:
    assert parse_served_turn(f"I say {ADD}", False, []) == ServedTurn("", f"I say {ADD}")
