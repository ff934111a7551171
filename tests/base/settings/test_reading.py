"""Convert plain values, YAML, JSON and `key=value` changes to settings, and report problems."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import data_prep.cli
from megatron_sov import cli
from megatron_sov.base.settings import (
    SettingsError, apply_changes, find_declaration_problems, iter_leaves, parse_arguments, parse_changes,
    parse_located_yaml, parse_nested, parse_settings, read_settings_file, to_plain_values)
from tests.base.settings.examples import Block, Recipe


def test_settings_round_trip() -> None:
    settings = Recipe("x", Block(3, 1), (), Block(), "muon", {"en": 1.0}, "y", Path("/b"), ((1, 2),), ("w",),
                      "ko", True)
    assert parse_settings(Recipe, to_plain_values(settings), "f") == settings
    assert find_declaration_problems(settings) == []


def test_iter_leaves_keeps_lists_and_empty_groups() -> None:
    values = {"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}
    leaves = {name: str(value) for name, value in iter_leaves(values)}
    assert leaves == {"a.b": "[1, {'c': 2}]", "a.d": "{}", "e": "None"}


@pytest.mark.each(("raw", "codes"), [
    ({}, [("missing", "name")]),
    ({"name": "x", "block": 3}, [("type", "block")]),
    ({"name": "x", "block": None}, [("type", "block")]),
    ({"name": "x", "blocks": {"size": 1}}, [("type", "blocks")]),
    ({"name": "x", "blocks": [{"size": 0}, {"sise": 1}]},
     [("bound", "blocks.0.size"), ("unknown", "blocks.1.sise")]),
    ({"name": 2024}, [("type", "name")]),
    ({"name": "x", "on": 1}, [("type", "on")]),
    ({"name": "x", "on": "yes"}, [("type", "on")]),
    ({"name": "x", "kind": "adam"}, [("choice", "kind")]),
    ({"name": "x", "weights": {"en": -1}}, [("bound", "weights.en")]),
    ({"name": "x", "weights": {"en": math.nan}}, [("bound", "weights.en")]),
    ({"name": "x", "weights": {"en": math.inf}}, [("bound", "weights.en")]),
    ({"name": "x", "either": [1]}, [("type", "either")]),
    ({"name": "x", "file": 3}, [("type", "file")]),
    ({"name": "x", "pairs": [[1]]}, [("missing", "pairs.0.1")]),
    ({"name": "x", "pairs": [[1, "b"]]}, [("type", "pairs.0.1")]),
    ({"name": "x", "words": []}, [("bound", "words")]),
    ({"name": "x", "words": [3]}, [("type", "words.0")]),
    ({"name": "x", "words": ["a", " \n"]}, [("bound", "words.1")]),
    ({"name": "x", "words": ["a", "b", "a"]}, [("bound", "words")]),
    ({"name": "x", "language": "kr"}, [("choice", "language")]),
    ({"name": "x", "language": 3}, [("type", "language")]),
    ({"name": "x", "block": {"size": "3"}}, [("type", "block.size")]),
    ({"name": "x", "block": {"size": 1.5}}, [("type", "block.size")]),
    ({"name": "x", "block": {"size": True}}, [("type", "block.size")]),
    ({"name": "x", "kind": "muon"}, [("rule", "block.size")]),
    ({"name": "x", "maybe": {"share": 2, "size": -1}}, [("bound", "maybe.size"), ("bound", "maybe.share")]),
    ([1], [("type", "")]), ("text", [("type", "")]), (None, [("type", "")]),
    ({"name": "x", "either": {1, 2}}, [("type", "")]),
])
def test_all_problems_have_code_and_key_in_field_order(raw: Any, codes: list[tuple[str, str]]) -> None:
    with pytest.raises(SettingsError) as e:
        parse_settings(Recipe, raw, "f.json")
    assert e.value.codes == codes
    assert str(e.value).startswith("f.json: ")


@pytest.mark.each(("raw", "message"), [
    ({"name": "x", "block": {"size": 0}}, "f: block.size = 0 must be at least 1"),
    ({"name": "x", "block": {"size": 10**7}}, "f: block.size = 10000000 must be at most 1,000,000"),
    ({"name": "x", "kind": "adam"}, "f: kind = \"adam\" must be 'adamw' or 'muon'; did you mean 'adamw'?"),
    ({"name": "x", "blok": 1}, "f: blok: no such setting; did you mean 'block'?"),
    ({"name": "x", "block": {"q": 1}}, "f: block.q: no such setting; there are size, share"),
    ({}, "f: name: is missing; it has no default; set it"),
    ({"name": "x", "either": 1.5}, "f: either = 1.5 must be a whole number or text"),
    ({"name": True}, "f: name = true must be text; YAML reads no, off, yes and on as false and true; put "
                     "it in quotes"),
    ({"name": 7200}, "f: name = 7200 must be text; put it in double quotes"),
    ({"name": "x", "words": "b"}, 'f: words = "b" must be a list; e.g. ["b"]'),
    ({"name": "x", "words": []}, "f: words = [] must have at least 1 items"),
    ({"name": "x", "words": ["a", "a"]}, 'f: words = ["a", "a"] has "a" twice; name it once'),
    ({"name": "x", "words": [" "]}, 'f: words.0 = " " must not be empty'),
    ({"name": "x", "language": "k{o"}, "f: language = \"k{o\" must be one of en, ko; did you mean 'ko'?"),
    ({"name": "x", "on": "\x1b[31m" + "y" * 99},
     'f: on = "\\u001b[31m' + "y" * 66 + "... must be true or false"),
    ({"name": "x", "kind": "muon"}, "f: block.size = 1 must be above 1 with kind = muon; set it"),
])
def test_sentence_of_each_problem_code(raw: Any, message: str) -> None:
    with pytest.raises(SettingsError) as e:
        parse_settings(Recipe, raw, "f")
    assert str(e.value) == message


def test_bounds_apply_to_settings_built_by_code() -> None:
    (problem,) = find_declaration_problems(replace(Recipe("x"), block=Block(size=0)))
    assert (problem.code, problem.key, problem.value) == ("bound", "block.size", 0)


def test_parse_arguments_by_declared_types() -> None:
    class Reward:
        def __init__(self, limit: int, names: Sequence[str] = (), *, scale: float = 1.0) -> None:
            self.limit, self.names, self.scale = limit, names, scale

    assert parse_arguments(Reward, {"limit": 3, "names": ["a"], "scale": 2}, "reward r") == {
        "limit": 3, "names": ["a"], "scale": 2.0}
    with pytest.raises(SettingsError, match="reward r: 3 problems") as e:
        parse_arguments(Reward, {"scal": 1, "names": [3]}, "reward r")
    assert e.value.codes == [("unknown", "scal"), ("missing", "limit"), ("type", "names.0")]


@pytest.mark.each(("text", "value"), [
    ("3", 3), ("1e-4", 1e-4), ("1e9", 10**9), ("1.0", 1), ("1.5", 1.5), ("true", True), ("True", True),
    ("null", None), ("None", None), ("ko", "ko"), ("", ""),
    ('"3"', "3"), ('{"en": 1}', {"en": 1}), ("[1]", [1]),
    ("a=b", "a=b"), ("1e400", float("inf")),
])
def test_parse_value_as_json_or_text(text: str, value: Any) -> None:
    (parsed,) = parse_changes([f"key={text}"]).values()
    assert (parsed, type(parsed)) == (value, type(value))


def test_last_change_of_a_key_wins() -> None:
    assert parse_changes(["a=1", "b=2", "a=3"]) == {"a": 3, "b": 2}
    assert apply_changes(Recipe("x"), ["block.size=2", "block.size=3"]).block.size == 3


def test_parse_nested_splits_keys_at_dots() -> None:
    assert parse_nested(["a.b=1", "a.c.d=x", "e=2"]) == {"a": {"b": 1, "c": {"d": "x"}}, "e": 2}
    with pytest.raises(SettingsError, match=r"--env-set: a\.b: a is a value and has no fields"):
        parse_nested(["a=1", "a.b=2"], "--env-set")


def test_change_reaches_list_items_and_disabled_groups() -> None:
    before = Recipe("x")
    after = apply_changes(before, ["blocks.0.size=7", "maybe.share=1", "weights.ko=2"])
    assert (after.blocks[0].size, after.weights) == (7, {"ko": 2.0})
    assert after.maybe is not None and after.maybe.share == 1
    assert before == Recipe("x")


@pytest.mark.each(("setting", "code", "key"), [
    ("block.size", "form", ""), ("=1", "form", ""), ("block..size=1", "form", ""),
    ("block.size=[8", "json", "block.size"), ("weights={en: 1}", "json", "weights"),
    ('name="x', "json", "name"),
    ("blok.size=1", "unknown", "blok"), ("block.sise=1", "unknown", "block.sise"),
    ("blocks.3.size=1", "unknown", "blocks.3.size"), ("blocks.x.size=1", "unknown", "blocks.x.size"),
    ("block.size.x=1", "unknown", "block.size.x"), ("maybe.sise=1", "unknown", "maybe.sise"),
    ("block.size=0", "bound", "block.size"), ("block.size=many", "type", "block.size"),
])
def test_invalid_changes_have_code_and_key(setting: str, code: str, key: str) -> None:
    with pytest.raises(SettingsError) as e:
        apply_changes(Recipe("x"), [setting])
    assert e.value.codes == [(code, key)]


def test_all_invalid_changes_are_reported() -> None:
    with pytest.raises(SettingsError, match="--set: 3 problems") as e:
        apply_changes(Recipe("x"), ["a=[", "b", "c={"])
    assert [code for code, _ in e.value.codes] == ["json", "form", "json"]


def test_values_have_line_numbers() -> None:
    document = parse_located_yaml("a:\n  - 1\n  - b: 2\n    c: no\nd: 2024-01-01\n")
    assert document.value == {"a": [1, {"b": 2, "c": False}], "d": "2024-01-01"}
    assert [document.line(place) for place in ((), ("a",), ("a", 1, "c"), ("d",), ("d", "x"))] == [1, 1, 4, 5,
                                                                                                   5]


def test_yaml_aliases_and_merges_are_expanded() -> None:
    assert parse_located_yaml("a: &a {b: 1, c: 2}\nd:\n  <<: *a\n  b: 3\ne: [*a]\n").value == {
        "a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": [{"b": 1, "c": 2}]}


def test_settings_file_mistakes_have_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("\ufeffname: x\nblock:\n  size: 0\n")
    with pytest.raises(SettingsError) as e:
        read_settings_file(Recipe, file)
    assert str(e.value) == f"{file}, line 3: block.size = 0 must be at least 1"
    file.write_text('{"name": "x", "block": {"size": 2}}')
    assert read_settings_file(Recipe, file).block.size == 2
    file.write_text("name: x\nblock: {size: 0}\non: 3\n")
    with pytest.raises(SettingsError, match=r"line 2: block\.size.*\n.*line 3: on = 3"):
        read_settings_file(Recipe, file, "--recipe r.yaml")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9))


@pytest.mark.each(("text", "code", "line"), [
    ("a: [1\n", "file", 2), ("a: b: c\n", "file", 1), ("a:\n\tb: 1\n", "file", 2),
    ("a: &a [*a]\n", "file", 1),
    (BOMB, "file", 1), ("[" * 30, "file", 1), ("a: 1\na: 2\n", "twice", 2),
    ("a:\n  ? [1]\n  : 2\n", "type", 2),
    ("a: 1\nb: !!python/object:os.system x\n", "type", 2), ("a: !!int ''\n", "type", 1),
    ("a: !!timestamp soon\n", "type", 1), ("a: \x00", "file", 1), ("<<: 3\n", "type", 1),
    ("a: *b\n", "file", 1),
])
def test_invalid_yaml_is_reported_with_line(text: str, code: str, line: int) -> None:
    (problem, *_) = parse_located_yaml(text).problems
    assert (problem.code, problem.line) == (code, line)


@pytest.mark.each("text", [
    '{\n\t"a": 1\n}', json.dumps({"a": "\U0001f600 \u2028 x"}), '{"a": "x\\/y", "b": [1.5, null, true]}',
    '{"a": "\\\\ud83d"}', '[{"a:b": "#x"}]'])
def test_json_is_parsed_as_json(text: str) -> None:
    """Tabs, and signs beyond the first 65,536 as two halves, are things of JSON that YAML has not."""
    assert parse_located_yaml(text).value == json.loads(text) and not parse_located_yaml(text).problems


def test_integers_may_have_exponents() -> None:
    for text in ('{"a": 2e9}', "a: 2e9"):
        value = parse_located_yaml(text).value["a"]
        assert (value, type(value)) == (2_000_000_000, int)


def test_integers_follow_yaml_1_2() -> None:
    """In YAML 1.1, 010 is 8 and 12:30 is 750."""
    assert parse_located_yaml("[010, -010, 08, 0o10, 0x10, 1_000, 12:30, 0]").value == [
        10, -10, 8, 8, 16, 1000, "12:30", 0]
    assert parse_located_yaml("{steps: 010}").value == {"steps": 10}
    assert parse_located_yaml("a: !!int x").problems[0].code == "type"


def test_repeated_json_key_is_reported() -> None:
    assert [p.code for p in parse_located_yaml('{"a": {"b": 1,\n\t"b": 2}}').problems] == ["twice"]


def test_unreadable_settings_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    (tmp_path / "long").write_text("#" * 2_000_000)
    for name in ("none", "latin", "long", "."):
        with pytest.raises(SettingsError) as e:
            read_settings_file(Recipe, tmp_path / name)
        assert e.value.codes == [("file", "")], name


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "pretrain": (cli.main, "pretrain tiny-qwen3 --data DIR --run r", "train.steps"),
    "score": (cli.main, "score --reward length --input FILE --output o.jsonl", "max_length"),
    "synth": (data_prep.cli.main, "synth solutions --input FILE --engine http://a:1 --model m --output s",
              "num_draws"),
}
MISTAKES = {
    "{key}": "--set: '{key}' must have the form key=value",
    "{key}=[8": "--set: {key}: [8 begins like JSON but does not parse",
    "{key}x=1": "{key}x: no such setting; did you mean '{key}'?",
    "{key}=many": '{key} = "many" must be a whole number',
    "{key}=null": "{key} = null must be a whole number; give it a value, or leave it out",
}


@pytest.mark.each("mistake", MISTAKES)
@pytest.mark.each("command", COMMANDS)
def test_set_mistakes_have_equal_messages(
        command: str, mistake: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("DIR").mkdir()
    Path("FILE").write_text('{"response": "a", "text": "a"}\n')
    main, line, key = COMMANDS[command]
    assert main([*line.split(), "--set", mistake.format(key=key)]) == 2
    error = capsys.readouterr().err
    assert MISTAKES[mistake].format(key=key) in error and len(error.splitlines()) <= 3
    assert sorted(path.name for path in cwd.iterdir()) == ["DIR", "FILE"], "nothing is left behind"
