"""Markers of thoughts and tool calls in released model families, and decoded responses."""

import json
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import ChatEncoder, TurnEncoder
from megatron_sov.chat.marks import (
    FAMILIES, MARKS, THOUGHT_MARKS, CallForm, build_marks_decoder, build_text_decoder, prepend_mark,
    quote_marks, to_hermes_form, unquote_marks)
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.chat.tool_calls import (
    BadCall, ServedTurn, ToolCall, WrittenTurn, parse_served_turn, parse_turn)
from megatron_sov.judge.rewards.reward import get_content, get_text
from megatron_sov.serve.replies import parse_partial_turn
from tests.chat.byte_tokenizer import build_byte_tokenizer
from tokenizer.presets import PRESETS

NOW = ToolCall("now", {})
SEOUL, UTC = ToolCall("get_weather", {"city": "서울"}), ToolCall("get_time", {"tz": "UTC"})


def solar_call(name: str, arguments: str, end: str = "<|tool_call:end|>") -> str:
    return f"<|tool_call:begin|>a1b2c3d4e5<|tool_call:name|>{name}<|tool_call:args|>{arguments}{end}"


CITY_JSON, ZONE_JSON = '{"city": "서울"}', '{"tz": "UTC"}'
BOTH = solar_call("get_weather", CITY_JSON) + solar_call("get_time", ZONE_JSON)
SECTION = "<|end|><|begin|>assistant<|tool_calls|>"
TOOLS = ("<tool_call>", "</tool_call>")
TOOL_LIST = [{"type": "function", "function": {"name": "get_time"}}]
TURNS = {
    "solar: thoughts and an answer": (
        "<|think|>2 + 2<|end|><|begin|>assistant<|content|>It is 4.", "2 + 2", "It is 4.", ()),
    "solar: an answer": ("<|content|>It is 4.", "", "It is 4.", ()),
    "solar: a call": (f"<|tool_calls|>{solar_call('get_time', ZONE_JSON)}", "", "", (UTC,)),
    "solar: a call by itself": (solar_call("get_time", ZONE_JSON), "", "", (UTC,)),
    "solar: an answer and calls": (
        f"<|content|>Let me check.{SECTION}{BOTH}", "", "Let me check.", (SEOUL, UTC)),
    "solar: thoughts reopened": (
        f"<|think|>a<|end|><|begin|>assistant<|content|>Let me.{SECTION}{solar_call('get_time', ZONE_JSON)}",
        "a", "Let me.", (UTC,)),
    "k-exaone": ('<think>\nlook\n</think>\n\n<tool_call>{"name": "get_time", '
                 f'"arguments": {ZONE_JSON}}}</tool_call>', "look", "", (UTC,)),
    "kimi, section in the singular": (
        "Sure.<|tool_call_section_begin|><|tool_call_begin|>functions.get_time:0"
        f"<|tool_call_argument_begin|>{ZONE_JSON}<|tool_call_end|><|tool_call_section_end|>",
        "", "Sure.", (UTC,)),
    "deepseek v3.1: no arguments": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "", "", (NOW,)),
    "deepseek v3: no arguments": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>", "", "", (NOW,)),
    "kimi: no arguments": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|> "
        "<|tool_call_end|><|tool_calls_section_end|>", "", "", (NOW,)),
    "solar: no arguments": (solar_call("now", ""), "", "", (NOW,)),
    "kimi": ("Sure.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0"
             f"<|tool_call_argument_begin|>{ZONE_JSON}<|tool_call_end|><|tool_calls_section_end|>",
             "", "Sure.", (UTC,)),
}


def check_served_turn(text: str, thoughts: str, content: str, calls: tuple[ToolCall, ...],
                      tools: list[dict[str, Any]] = TOOL_LIST, form: CallForm | None = None,
                      in_thoughts: bool = False) -> None:
    """Check the parts of a complete turn, and that they only grow while it is streamed."""
    complete = parse_served_turn(text, in_thoughts, tools, form)
    assert (complete.thoughts, complete.content.strip(), complete.calls) == (thoughts, content, calls)
    previous = ServedTurn("", "")
    for turn in (*(parse_partial_turn(text[:end], in_thoughts, tools, form) for end in range(len(text) + 1)),
                 complete):
        assert turn.thoughts.startswith(previous.thoughts) and turn.content.startswith(previous.content)
        previous = turn


@pytest.mark.each(("text", "thoughts", "content", "calls"), TURNS.values())
def test_turn_parses_equally_in_every_family(
        text: str, thoughts: str, content: str, calls: tuple[ToolCall, ...]) -> None:
    assert parse_turn(text) == WrittenTurn(content, calls)
    check_served_turn(text, thoughts, content, calls)
    assert to_hermes_form(to_hermes_form(text)) == to_hermes_form(text)
    assert ("<think>" in get_text({"response": text}, "response")) == bool(thoughts)


@pytest.mark.each(("text", "code"), [
    (solar_call("f", "{'a': 1}"), "json"), (solar_call("f", '{"a": 1}', ""), "unclosed"),
    (solar_call("f", "[1]"), "form"),
    (solar_call("f", '{"a": 1} and more'), "json"),
    ("<|tool_call:begin|>x<|tool_call:end|>", "unclosed"),
    (solar_call("", "{"), "json"),
    ("<|tool_calls_section_begin|><|tool_call_begin|>f:0 {}", "unclosed"),
    ('<tool_call>{"name": "f", "arguments": {}}', "unclosed"), ("<tool_call>{", "unclosed"),
    ("<tool_call>", "unclosed"),
])
def test_malformed_call_is_neither_call_nor_answer(text: str, code: str) -> None:
    (call,) = parse_turn(text).calls
    assert isinstance(call, BadCall) and call.code == code


def test_call_inside_thoughts_is_thought() -> None:
    inside = f"<|think|>{solar_call('f', '{}')}<|end|><|begin|>assistant<|content|>no"
    assert parse_turn(inside) == WrittenTurn("no", ())
    assert parse_turn(f"<|think|>{solar_call('f', '{}')}") == WrittenTurn("", ())
    assert parse_turn("so<|end|><|begin|>assistant<|content|>4", in_thoughts=True) == WrittenTurn("4", ())
    for text in ("a < b", "a <|end|> b", "<|im_end|>", "<|begin|>"):
        assert to_hermes_form(text) == text, "contains no marks of thoughts or calls"


def test_long_texts_of_marks_take_linear_time() -> None:
    for part in ("<|think|>", "<|tool_call:begin|>", "<|tool_call:begin|>x<|tool_call:name|>",
                 "<|content|><|end|>", "<|tool_call_begin|> ",
                 "<｜tool▁call▁begin｜>a"):
        for text in (part * 5_000, part + " " * 100_000, "<|content|>" + part + "a" * 100_000):
            to_hermes_form(text)


@pytest.fixture(scope="module", params=["k-exaone", "solar-open"])
def response_decoder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a preset's name, its encoder and its response decoder."""
    byte_tokenizer = build_byte_tokenizer(*PRESETS[request.param].special_tokens)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer.save(str(file))
    text_decoder = build_text_decoder(file, [byte_tokenizer.token_to_id(PRESETS[request.param].eos_token)],
                                      lambda ids: str(byte_tokenizer.decode(ids, skip_special_tokens=True)))
    return request.param, lambda text: byte_tokenizer.encode(text).ids, text_decoder


def test_response_text_contains_marks_without_frames(response_decoder: Any) -> None:
    name, encode, text_of_ids = response_decoder
    end, pad = PRESETS[name].eos_token, PRESETS[name].pad_token
    text = {"k-exaone": '<think>I guess 7.</think>The answer is 8.<tool_call>{"name": "f"}</tool_call>',
            "solar-open": "<|think|>I guess 7.<|end|><|begin|>assistant<|content|>The answer is 8."
                          f"<|tool_calls|>{solar_call('f', '{}')}"}[name]
    for ending in ("", end, f"{pad}{end}", pad):
        assert text_of_ids(encode(text + ending)) == text
    assert text_of_ids(encode("It is 4." + end)) == "It is 4." and text_of_ids([]) == ""
    response = get_text({"response": text_of_ids(encode(text))}, "response")
    assert response.startswith("<think>I guess 7.</think>The answer is 8.<tool_call>")
    # the text for `judge.hide_thinking`, `code` and verifiers, also if the template opens the thoughts
    assert get_content({"response": text_of_ids(encode(text))}) == "The answer is 8."
    opening_mark = THOUGHT_MARKS[1 if name == "solar-open" else 0]
    thought = text_of_ids(encode(text)).removeprefix(opening_mark).partition("7.")[0]
    assert get_content({"response": prepend_mark(thought, opening_mark)}) == ""
    assert get_content({"response": thought}) != ""


def test_first_marks_of_families_differ() -> None:
    for family in FAMILIES:
        assert [other for other in FAMILIES if family[0] in other] == [family]


SOLAR_CALL = ("<|tool_call:begin|>{{ c.id }}<|tool_call:name|>{{ c.function.name }}<|tool_call:args|>"
              "{{ c.function.arguments | tojson }}<|tool_call:end|>")
SOLAR = (  # turn marks as in the released template
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<|begin|>assistant<|think|>{{ m.reasoning_content }}<|end|>{% endif %}"
    "{% if m.content %}<|begin|>assistant<|content|>{{ m.content }}"
    "{{ '<|end|>' if m.tool_calls else '<|flush|>' }}{% endif %}"
    "{% if m.tool_calls %}<|begin|>assistant<|tool_calls|>{% for c in m.tool_calls %}CALL{% endfor %}"
    "<|calls|>{% endif %}{% else %}<|begin|>{{ m.role }}<|content|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant{% endif %}")
XML = ("<tool_call><function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
       "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function></tool_call>")
LLAMA = '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'


def test_template_with_unknown_call_form_is_rejected() -> None:
    byte_tokenizer = build_byte_tokenizer(*PRESETS["solar-open"].special_tokens)

    def build_turn_encoder(call: str) -> TurnEncoder:
        return TurnEncoder(ChatEncoder(ChatTemplate(SOLAR.replace("CALL", call), "", "", "tok"),
                                       byte_tokenizer), "tok")

    assert [byte_tokenizer.id_to_token(i)
            for i in build_turn_encoder(SOLAR_CALL).end_ids] == ["<|flush|>", "<|calls|>"]
    assert build_turn_encoder("").end_ids, "a template without calls has no unknown form"
    for call in (XML, LLAMA):
        with pytest.raises(UserError, match="tok: its chat template writes calls of tools in a form"):
            build_turn_encoder(call)


CALL_JSON = '{"name": "f", "arguments": {}}'
ALPHABET = (*MARKS, CALL_JSON, "<\u2060tool_call>", "<\u2060\u2060|content|>", "<", "가", "{}", "f", "\n",
            "assistant")
CALL_MARKS = ("<|tool_call:begin|>", "<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>")
THINKS = ("<think>", "</think>")
FAMILY_FORMS: dict[str, tuple[tuple[str, ...], str, str]] = {  # special tokens, content, and a call of g
    "hermes": ((*THINKS, *TOOLS), "<think>HERE</think>",
               '<tool_call>{"name": "g", "arguments": {}}</tool_call>'),
    "solar": (FAMILIES[1], "<|think|>HERE<|end|><|begin|>assistant<|content|>",
              f"<|end|><|begin|>assistant<|tool_calls|>{solar_call('g', '{}')}"),
    "solar, calls in text": (tuple(m for m in FAMILIES[1] if m not in CALL_MARKS),
                             "<|think|>HERE<|end|><|begin|>assistant<|content|>",
                             f"<|end|><|begin|>assistant<|tool_calls|>{solar_call('g', '{}')}"),
    "deepseek v3": (FAMILIES[2], "", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
                    "<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "deepseek r1": ((*THINKS, *FAMILIES[2]), "<think>HERE</think>", "<｜tool▁calls▁begin｜>"
                    "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    "kimi": ((*THINKS, *FAMILIES[3]), "<think>HERE</think>", "<|tool_calls_section_begin|><|tool_call_begin|>"
             "functions.g:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"),
}


@pytest.mark.each("family", FAMILY_FORMS)
def test_calls_come_from_mark_tokens_only(family: str) -> None:
    mark_tokens, opening_text, call = FAMILY_FORMS[family]
    marks_tokenizer = build_byte_tokenizer(*mark_tokens)
    text_tokenizer = Tokenizer.from_str(marks_tokenizer.to_str())
    text_tokenizer.encode_special_tokens = True
    added = {token.content: id_ for id_, token in marks_tokenizer.get_added_tokens_decoder().items()}
    decode = build_marks_decoder(added, [],
                                 lambda ids: str(marks_tokenizer.decode(ids, skip_special_tokens=False)))
    random = Random(family)
    for _ in range(150):
        content, thought = ("".join(random.choices(ALPHABET, k=random.randrange(9))) for _ in range(2))
        if "<think>" not in mark_tokens and family.startswith("deepseek"):  # its thoughts are text
            content = content.replace("think>", "")
        num_calls = random.randrange(3)
        opening, _, closing = opening_text.partition("HERE")
        ids = marks_tokenizer.encode(opening).ids
        ids += text_tokenizer.encode(thought).ids if opening else []
        ids += marks_tokenizer.encode(closing).ids + text_tokenizer.encode(f"a{content}b").ids
        ids += marks_tokenizer.encode(call * num_calls).ids
        text = decode(ids)
        quoted = quote_marks(content)
        assert unquote_marks(quoted) == content and not any(mark in quoted for mark in MARKS)
        turn = parse_turn(text)
        assert turn == WrittenTurn(f"a{content}b", (ToolCall("g", {}),) * num_calls), (content, thought, text)
        assert to_hermes_form(to_hermes_form(text)) == to_hermes_form(text)
        served = parse_served_turn(text, in_thoughts=False, tools=TOOL_LIST)
        assert (served.content.strip(), served.calls) == (turn.content, turn.calls)
        assert served.thoughts == (thought.strip("\n") if opening else "")


def test_first_mark_determines_form_of_turn() -> None:
    quote = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parse_turn(f"<|content|>It says {quote}</think>.").calls == ()
    assert parse_turn(f"<|content|>It says {quote}</think>.").content == f"It says {quote}</think>."
    assert parse_turn(quote + solar_call("g", "{}")).calls == (ToolCall("f", {}),)
    argument = json.dumps({"q": f"{quote}<|tool_call_begin|>"})
    (call,) = parse_turn(solar_call("g", argument)).calls
    assert call == ToolCall("g", json.loads(argument)), "arguments are as they were written"
