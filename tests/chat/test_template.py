"""Chat templates: same text as transformers, sandbox, resource limits."""

import json
import resource
import threading
import time
from pathlib import Path

import pytest

from megatron_sov.base.documents import BadRecord, Conversation
from megatron_sov.base.errors import UserError
from megatron_sov.chat.folder import open_tokenizer, read_chat_encoder
from megatron_sov.chat.limits import CpuTimeExceeded, limit_resources
from megatron_sov.chat.template import ChatTemplate
from megatron_sov.chat.tool_calls import BadCall, ToolCall, WrittenTurn, parse_turn
from tests.chat.byte_tokenizer import build_byte_tokenizer


def render_text(template: str, *turns: tuple[str, str]) -> str:
    return ChatTemplate(template, "", "", "tok").render(Conversation.of(*turns))


@pytest.mark.each(("template", "expected"), [
    ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "hi"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hi"),
    ("{{ strftime_now('%Y')[:2] }}{{ messages[0].content }}", "20hi"),
    ("{{ {'a': '<'} | tojson }}{{ messages[0].content }}", '{"a": "<"}hi'),
    ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages[0].content }}", "2hi"),
])
def test_templates_have_functions_of_transformers(template: str, expected: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = render_text(template, ("user", "hi"))
    (theirs,), _ = render_jinja_template(conversations=[[{"role": "user", "content": "hi"}]],
                                         chat_template=template)
    assert ours == theirs == expected


@pytest.mark.each(("template", "expected"), [
    ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ 1 + 'a' }}", "TypeError"),
    ("{{ 'a' * 10**15 }}", "asked for more"),
    ("{% for i in range(10**6) %}{% endfor %}", "Range too big"),
    ("{{ 'a'.center(4 * 2**30) }}", "asked for more"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took more than"),
    ("{% set ns = namespace(__class__=1) %}", "may not hold '__class__'"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused by the chat template"),
])
def test_unsafe_failing_or_endless_templates_raise_bad_record(template: str, expected: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.chat.template.CPU_S", 0.2)
    with pytest.raises(BadRecord, match=expected):
        render_text(template, ("user", "a"))


# Limits for foreign templates, and their removal afterwards.


def test_limits_apply_inside_block_only() -> None:
    old_limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(CpuTimeExceeded), limit_resources(0.05, 1 << 30):
        while True:
            pass
    with pytest.raises(MemoryError), limit_resources(5, 16 << 20):
        bytearray(64 << 20)
    assert resource.getrlimit(resource.RLIMIT_AS) == old_limits
    assert len(bytearray(64 << 20)) == 64 << 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_swallowed_timeout_is_raised_again() -> None:
    class EndlessDestructor:
        # exceptions raised here are lost, as in a callback of the garbage collector
        def __del__(self) -> None:
            while True:
                pass

    with pytest.raises(CpuTimeExceeded), limit_resources(0.05, 1 << 30):
        EndlessDestructor()
        while True:
            pass


def test_other_threads_have_no_limits() -> None:
    finished = []

    def run_with_limits() -> None:
        with limit_resources(0.0, 0):
            finished.append(1)

    thread = threading.Thread(target=run_with_limits)
    thread.start()
    thread.join()
    assert finished == [1]


# Chat templates on disk, in every spelling of the folder's files.


TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_byte_tokenizer("</s>", "<x>").save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(("config", "other_files"), [
    ({"chat_template": TEMPLATE, "eos_token": "</s>"}, {}),
    ({"chat_template": TEMPLATE, "eos_token": {"content": "</s>", "lstrip": False}}, {}),
    ({"chat_template": "another one", "eos_token": "</s>"}, {"chat_template.jinja": TEMPLATE}),
    ({"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
      "eos_token": "</s>"}, {}),
    ({"chat_template": TEMPLATE}, {"special_tokens_map.json": '{"eos_token": "</s>"}'}),
])
def test_every_tokenizer_config_format_is_read(folder: Path, config: dict[str, object],
                                               other_files: dict[str, str]) -> None:
    for name, text in ({"tokenizer_config.json": json.dumps(config)} | other_files).items():
        (folder / name).write_text(text)
    encoder = read_chat_encoder(folder)
    assert encoder is not None and encoder.end_ids() == (256,)


def test_damaged_tokenizer_folder_raises_user_error(folder: Path) -> None:
    assert read_chat_encoder(folder) is None
    for config in ("[" * 200_000, '{"chat_template": 5}', '{"chat_template": "{% for"}',
                   '{"chat_template": [5]}'):
        (folder / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=r"its tokenizer cannot be read|its chat_template is"):
            read_chat_encoder(folder)
    (folder / "tokenizer.json").write_text('{"added_tokens": [{}]}')
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer \(.*\); restore it"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    assert read_chat_encoder(folder) is None


# Tool calls: valid, nearly valid, and none.


def format_call(text: str) -> str:
    return f"<tool_call>{text}</tool_call>"


def test_calls_are_parsed_in_order_with_surrounding_text() -> None:
    turn = parse_turn('I look.\n<tool_call>\n{"name": "search", "arguments": {"query": "가"}}\n</tool_call>\n'
                      + format_call('{"arguments": {}, "name": "now"}') + " Wait.")
    assert turn.calls == (ToolCall("search", {"query": "가"}), ToolCall("now", {}))
    assert turn.content == "I look.\n\n Wait."


@pytest.mark.each("arguments", [{"text": "a </tool_call> b <tool_call> c"}, {"n": [1, {"x": None}]},
                                       {"text": 'quote " and \\ and \n'}, {"n": 1e308}])
def test_json_arguments_round_trip(arguments: dict) -> None:
    text = json.dumps({"name": "f", "arguments": arguments})
    assert parse_turn(format_call(text)).calls == (ToolCall("f", arguments),)


@pytest.mark.each("inside, code", [
    ("", "json"), ("f(1)", "json"), ("{'name': 'f', 'arguments': {}}", "json"),
    ('{"name": "f", "arguments": {}} {}', "json"), ('{"name": "f", "arguments": {"x": NaN}}', "json"),
    ('{"name": "f", "name": "g", "arguments": {}}', "json"), ("[" * 100_000, "json"),
    ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "json"),
    ('{"name": "f", "arguments": {"x": "\\ud800"}}', "json"),
    ('{"name": "f", "arguments": {"x": 1e999}}', "json"),
    ('{"name": "f", "arguments": {"x": ' + "[" * 700 + "]" * 700 + "}}", "json"),
    ("[]", "form"), ("1", "form"), ('{"name": "f"}', "form"), ('{"name": 1, "arguments": {}}', "form"),
    ('{"name": "f", "arguments": "{}"}', "form"), ('{"name": "f", "arguments": {}, "id": 1}', "form"),
])
def test_malformed_call_is_reported_and_parsing_continues(inside: str, code: str) -> None:
    bad, good = parse_turn(format_call(inside) + format_call('{"name": "g", "arguments": {}}')).calls
    assert isinstance(bad, BadCall) and bad.code == code and len(bad.reason) < 300
    assert good == ToolCall("g", {})


@pytest.mark.parametrize("part", [
    "<tool_call>{}", "<tool_call>x</tool_call>\n", '<tool_call>["</tool_call>', "<tool_call>{}x</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"x": "' + "a" * 3000 + '\\u00e4"}}</tool_call>'])
def test_parsing_takes_linear_time(part: str) -> None:
    """With quadratic parsing the first three would take 2 to 8 s."""
    num_parts = 500_000 // len(part)
    began_s = time.process_time()
    calls = parse_turn(part * num_parts).calls
    assert time.process_time() - began_s < 1.5 and num_parts // 2 <= len(calls) <= num_parts


@pytest.mark.each("num_chars", range(1000, 1050))
def test_long_call_is_parsed(num_chars: int) -> None:
    for value in ("a" * num_chars, "\n\\\"" * (num_chars // 4),
                  ["x" * (num_chars - 9), 1e-5, -12345, True, None]):
        arguments = {"x": value}
        assert parse_turn(format_call(json.dumps({"name": "f", "arguments": arguments}))).calls == (
            ToolCall("f", arguments),)


@pytest.mark.each(("text", "content"), [
    ("<think>\nplan\n</think>\n\n    return 42\n", "    return 42"), ("    return 42\n", "    return 42"),
    ("\n\tx = 1", "\tx = 1"), ("plan</think>\n  - a\n    - b", "  - a\n    - b"),
    ("<think>x</think> a ", " a"),
    ("  \n  a\n", "  \n  a"), ("\n \n", ""), ("<|think|>p<|end|><|begin|>assistant<|content|>  a", "  a"),
    (f"  a\n{format_call('{}')}", "  a")])
def test_indentation_of_answer_is_preserved(text: str, content: str) -> None:
    assert parse_turn(text).content == content


def test_call_in_unclosed_thoughts_is_ignored() -> None:
    call = format_call('{"name": "f", "arguments": {}}')
    thought = format_call('{"name": "g", "arguments": {}}')
    assert parse_turn(thought, in_thoughts=True) == WrittenTurn("", ())
    assert parse_turn(f"a <tool_call> tag {thought}</think>b{call}", in_thoughts=True) == WrittenTurn(
        "b", (ToolCall("f", {}),))
    again = parse_turn(f"<think>a</think>b{call}<think>c{thought}")
    assert again == WrittenTurn("b", (ToolCall("f", {}),)), "it thinks again, and never ends"
    between = parse_turn(f"<think>a</think>b{call}<think>c{thought}</think>d{call}")
    assert between == WrittenTurn("bd", (ToolCall("f", {}), ToolCall("f", {})))


def test_first_end_mark_ends_thoughts() -> None:
    call = format_call('{"name": "f", "arguments": {}}')
    turn = parse_turn(f"a</think>b{call}c</think>d{call}")
    assert turn == WrittenTurn("bc</think>d", (ToolCall("f", {}), ToolCall("f", {})))
    text = {"text": "<think>x</think> and </think>"}
    call_with_marks = format_call(json.dumps({"name": "f", "arguments": text}))
    for turn in (f"<think>so</think>{call_with_marks}", call_with_marks):
        assert parse_turn(turn).calls == (ToolCall("f", text),)
