"""Files of settings: YAML and JSON, by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.base.settings import SettingsError, read_file, read_located
from tests.base.settings.examples import Recipe


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
