"""`key=value`: what it is read as, and where it goes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sov.base.settings import SettingsError, change, parse_changes, parse_nested
from tests.base.settings.examples import Recipe


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
