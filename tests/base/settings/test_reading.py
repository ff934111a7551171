"""From plain values to settings, and what is said of those that are none."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import (
    SettingsError, by_name, change, check, parse_changes, parse_nested, plain, read, read_arguments,
    read_file, read_located)
from tests.base.settings.examples import Block, Recipe


def test_settings_read_back_equal() -> None:
    settings = Recipe("x", Block(3, 1), (), Block(), "muon", {"en": 1.0}, "y", Path("/b"), ((1, 2),), ("w",),
                      "ko", True)
    assert read(Recipe, plain(settings), "f") == settings
    assert check(settings) == []


def test_settings_by_name_keep_lists_and_empty_parts_as_values() -> None:
    found = {name: str(value) for name, value in by_name({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None})}
    assert found == {"a.b": "[1, {'c': 2}]", "a.d": "{}", "e": "None"}


@pytest.mark.parametrize(("raw", "codes"), [
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
def test_everything_wrong_is_named_by_code_and_key_in_the_order_of_the_fields(
        raw: Any, codes: list[tuple[str, str]]) -> None:
    with pytest.raises(SettingsError) as e:
        read(Recipe, raw, "f.json")
    assert e.value.codes == codes
    assert str(e.value).startswith("f.json: ")


@pytest.mark.parametrize(("raw", "sentence"), [
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
def test_each_code_has_its_sentence(raw: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as e:
        read(Recipe, raw, "f")
    assert str(e.value) == sentence


def test_settings_that_code_made_are_held_to_the_same_bounds() -> None:
    (problem,) = check(replace(Recipe("x"), block=Block(size=0)))
    assert (problem.code, problem.key, problem.value) == ("bound", "block.size", 0)


def test_arguments_go_by_what_a_constructor_declares() -> None:
    class Reward:
        def __init__(self, limit: int, names: Sequence[str] = (), *, scale: float = 1.0) -> None:
            self.limit, self.names, self.scale = limit, names, scale

    assert read_arguments(Reward, {"limit": 3, "names": ["a"], "scale": 2}, "reward r") == {
        "limit": 3, "names": ["a"], "scale": 2.0}
    with pytest.raises(SettingsError, match="reward r: 3 problems") as e:
        read_arguments(Reward, {"scal": 1, "names": [3]}, "reward r")
    assert e.value.codes == [("unknown", "scal"), ("missing", "limit"), ("type", "names.0")]


@pytest.mark.parametrize(("text", "value"), [
    ("3", 3), ("1e-4", 1e-4), ("1e9", 10**9), ("1.0", 1), ("1.5", 1.5), ("true", True), ("True", True),
    ("null", None), ("None", None), ("ko", "ko"), ("", ""),
    ('"3"', "3"), ('{"en": 1}', {"en": 1}), ("[1]", [1]),
    ("a=b", "a=b"), ("1e400", float("inf")),
])
def test_a_value_is_json_where_it_parses_and_else_text(text: str, value: Any) -> None:
    (found,) = parse_changes([f"key={text}"]).values()
    assert (found, type(found)) == (value, type(value))


def test_of_a_key_that_is_given_twice_the_last_one_counts() -> None:
    assert parse_changes(["a=1", "b=2", "a=3"]) == {"a": 3, "b": 2}
    assert change(Recipe("x"), ["block.size=2", "block.size=3"]).block.size == 3


def test_dots_lead_inwards_where_there_is_nothing_to_change() -> None:
    assert parse_nested(["a.b=1", "a.c.d=x", "e=2"]) == {"a": {"b": 1, "c": {"d": "x"}}, "e": 2}
    with pytest.raises(SettingsError, match=r"--env-set: a\.b: a is a value and has no fields"):
        parse_nested(["a=1", "a.b=2"], "--env-set")


def test_a_change_reaches_items_and_blocks_that_are_off() -> None:
    before = Recipe("x")
    after = change(before, ["blocks.0.size=7", "maybe.share=1", "weights.ko=2"])
    assert (after.blocks[0].size, after.weights) == (7, {"ko": 2.0})
    assert after.maybe is not None and after.maybe.share == 1
    assert before == Recipe("x")


@pytest.mark.parametrize(("setting", "code", "key"), [
    ("block.size", "form", ""), ("=1", "form", ""), ("block..size=1", "form", ""),
    ("block.size=[8", "json", "block.size"), ("weights={en: 1}", "json", "weights"),
    ('name="x', "json", "name"),
    ("blok.size=1", "unknown", "blok"), ("block.sise=1", "unknown", "block.sise"),
    ("blocks.3.size=1", "unknown", "blocks.3.size"), ("blocks.x.size=1", "unknown", "blocks.x.size"),
    ("block.size.x=1", "unknown", "block.size.x"), ("maybe.sise=1", "unknown", "maybe.sise"),
    ("block.size=0", "bound", "block.size"), ("block.size=many", "type", "block.size"),
])
def test_what_cannot_be_taken_is_refused_by_code_and_key(setting: str, code: str, key: str) -> None:
    with pytest.raises(SettingsError) as e:
        change(Recipe("x"), [setting])
    assert e.value.codes == [(code, key)]


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SettingsError, match="--set: 3 problems") as e:
        change(Recipe("x"), ["a=[", "b", "c={"])
    assert [code for code, _ in e.value.codes] == ["json", "form", "json"]


def test_every_value_knows_its_line() -> None:
    found = read_located("a:\n  - 1\n  - b: 2\n    c: no\nd: 2024-01-01\n")
    assert found.value == {"a": [1, {"b": 2, "c": False}], "d": "2024-01-01"}
    assert [found.line(place) for place in ((), ("a",), ("a", 1, "c"), ("d",), ("d", "x"))] == [1, 1, 4, 5, 5]


def test_aliases_and_merges_are_written_out() -> None:
    assert read_located("a: &a {b: 1, c: 2}\nd:\n  <<: *a\n  b: 3\ne: [*a]\n").value == {
        "a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": [{"b": 1, "c": 2}]}


def test_a_file_is_read_and_a_mistake_pointed_at(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("\ufeffname: x\nblock:\n  size: 0\n")
    with pytest.raises(SettingsError) as e:
        read_file(Recipe, file)
    assert str(e.value) == f"{file}, line 3: block.size = 0 must be at least 1"
    file.write_text('{"name": "x", "block": {"size": 2}}')
    assert read_file(Recipe, file).block.size == 2
    file.write_text("name: x\nblock: {size: 0}\non: 3\n")
    with pytest.raises(SettingsError, match=r"line 2: block\.size.*\n.*line 3: on = 3"):
        read_file(Recipe, file, "--recipe r.yaml")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(("text", "code", "line"), [
    ("a: [1\n", "file", 2), ("a: b: c\n", "file", 1), ("a:\n\tb: 1\n", "file", 2),
    ("a: &a [*a]\n", "file", 1),
    (BOMB, "file", 1), ("[" * 30, "file", 1), ("a: 1\na: 2\n", "twice", 2),
    ("a:\n  ? [1]\n  : 2\n", "type", 2),
    ("a: 1\nb: !!python/object:os.system x\n", "type", 2), ("a: !!int ''\n", "type", 1),
    ("a: !!timestamp soon\n", "type", 1), ("a: \x00", "file", 1), ("<<: 3\n", "type", 1),
    ("a: *b\n", "file", 1),
])
def test_what_is_no_settings_is_said_with_its_line(text: str, code: str, line: int) -> None:
    (problem, *_) = read_located(text).problems
    assert (problem.code, problem.line) == (code, line)


@pytest.mark.parametrize("text", [
    '{\n\t"a": 1\n}', json.dumps({"a": "\U0001f600 \u2028 x"}), '{"a": "x\\/y", "b": [1.5, null, true]}',
    '{"a": "\\\\ud83d"}', '[{"a:b": "#x"}]'])
def test_json_is_read_as_json(text: str) -> None:
    """Tabs, and signs beyond the first 65,536 as two halves, are things of JSON that YAML has not."""
    assert read_located(text).value == json.loads(text) and not read_located(text).problems


def test_a_whole_number_may_have_an_exponent_in_both() -> None:
    for text in ('{"a": 2e9}', "a: 2e9"):
        value = read_located(text).value["a"]
        assert (value, type(value)) == (2_000_000_000, int)


def test_whole_numbers_are_those_of_yaml_1_2() -> None:
    """In YAML 1.1, 010 is 8 and 12:30 is 750."""
    assert read_located("[010, -010, 08, 0o10, 0x10, 1_000, 12:30, 0]").value == [
        10, -10, 8, 8, 16, 1000, "12:30", 0]
    assert read_located("{steps: 010}").value == {"steps": 10}
    assert read_located("a: !!int x").problems[0].code == "type"


def test_a_key_twice_is_told_in_json_too() -> None:
    assert [p.code for p in read_located('{"a": {"b": 1,\n\t"b": 2}}').problems] == ["twice"]


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    (tmp_path / "long").write_text("#" * 2_000_000)
    for name in ("none", "latin", "long", "."):
        with pytest.raises(SettingsError) as e:
            read_file(Recipe, tmp_path / name)
        assert e.value.codes == [("file", "")], name
