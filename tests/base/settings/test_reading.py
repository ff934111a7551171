"""From plain values to settings, and what is said of those that are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.settings import SettingsError, by_name, check, plain, read, read_arguments
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
    ({"name": True}, "f: name = true must be text; YAML takes no, off, yes and on for false and true; put "
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
