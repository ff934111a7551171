"""Conditions of settings: violated conditions and the messages about inert settings."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_sov.base.settings import (
    AllOf, AnyOf, When, find_inert_settings, get_setting, is_none_of, is_one_of, is_set, is_unset)


@dataclass(frozen=True)
class Item:
    """One of several."""

    lr: float = 0.0
    min_lr: float = 0.0
    schedule: str | None = None
    ACTS_WHEN = {"min_lr schedule": is_set(".lr")}


@dataclass(frozen=True)
class Part:
    """A group."""

    method: str = "dpo"
    beta: float = 0.1
    gamma: float = 0.5
    ACTS_WHEN = {"": AnyOf(is_one_of("name", "pairs"), AllOf(is_one_of("name", "rounds"), is_set("rounds"))),
                 "gamma": is_one_of(".method", "simpo", "orpo")}


@dataclass(frozen=True)
class Settings:
    """All."""

    name: str = "lm"
    rounds: int = 0
    part: Part = Part()
    items: tuple[Item, ...] = (Item(),)
    table: dict[str, float] = field(default_factory=dict)
    decay: float = 0.2
    late: int = 3
    over_long: str = "cut"
    block: Part | None = None
    ACTS_WHEN = {"decay": AnyOf(is_none_of("items.*.schedule", None, "constant"), is_unset("late")),
                 "over_long": When("--data", lambda formats: "chat" in formats, "holds chats", "pack chats")}


WSD = (Item(), Item(1.0, schedule="wsd"))


@pytest.mark.each(("settings", "requested", "refused"), [
    ({}, "part.beta", "part.beta"), ({"name": "pairs"}, "part.beta", ""),
    ({"name": "rounds"}, "part.beta", "part.beta"), ({"name": "rounds", "rounds": 1}, "part.beta", ""),
    ({"name": "pairs"}, "part.gamma", "part.gamma"),
    ({"name": "pairs", "part": Part("simpo")}, "part.gamma", ""),
    ({"part": Part(beta=1.0)}, "part", "part.beta"), ({}, "part", ""),
    ({"part": Part("simpo", 1.0)}, "part", "part.method part.beta"),
    ({"block": None}, "block", ""), ({"block": Part(beta=2.0)}, "block", "block.beta"),
    ({}, "items.0.min_lr", "items.0.min_lr"), ({"items": WSD}, "items.1.min_lr items.1.schedule", ""),
    ({"items": (Item(), Item(min_lr=1.0))}, "items", "items.1.min_lr"),
    ({}, "decay", "decay"), ({"items": WSD}, "decay", ""), ({"late": 0}, "decay", ""),
    ({"items": ()}, "decay", "decay"), ({"table": {"en": 2.0}}, "table.en table items.0.lr name late", ""),
    ({}, "decay part.beta decay", "decay part.beta"), ({}, "", ""),
])
def test_find_inert_settings(settings: dict[str, Any], requested: str, refused: str) -> None:
    problems = find_inert_settings(Settings(**settings), requested.split())
    assert [problem.key for problem in problems] == refused.split()
    assert {problem.code for problem in problems} <= {"inert"}


@pytest.mark.each(("settings", "key", "message"), [
    ({}, "items.0.min_lr", "items.0.min_lr = 0.0 has no effect with items.0.lr = 0.0: it acts when "
     "items.0.lr is set; leave it out, or change items.0.lr"),
    ({"name": "rounds"}, "part.beta", 'part.beta = 0.1 has no effect with name = "rounds" and rounds = 0: it '
     "acts when name is pairs, or name is rounds and rounds is set; leave it out, or change name"),
    ({"name": "pairs"}, "part.gamma", 'part.gamma = 0.5 has no effect with part.method = "dpo": it acts when '
     "part.method is simpo or orpo; leave it out, or change part.method"),
    ({}, "decay", "decay = 0.2 has no effect with items.*.schedule = [null] and late = 3: it acts when "
     "items.*.schedule is not null or constant, or late is not set; leave it out, or change "
     "items.*.schedule"),
])
def test_inert_problem_names_deciding_setting(settings: dict[str, Any], key: str, message: str) -> None:
    [problem] = find_inert_settings(Settings(**settings), [key])
    assert str(problem) == message


def test_known_fact_decides_condition() -> None:
    assert find_inert_settings(Settings(), ["over_long"]) == []
    assert find_inert_settings(Settings(), ["over_long"], {"--data": ["chat"]}) == []
    [problem] = find_inert_settings(Settings(), ["over_long"], {"--data": ["text"]})
    assert str(problem) == ('over_long = "cut" has no effect with --data = ["text"]: it acts when --data '
                            "holds chats; pack chats")


@pytest.mark.each(("key", "value"), [
    ("part.beta", 0.1), ("items.0.lr", 0.0), ("items.7.lr", None), ("table.en", 2.0), ("table.ko", None),
    ("block.beta", None), ("nothing", None)])
def test_get_setting_by_dotted_key(key: str, value: Any) -> None:
    assert get_setting(Settings(table={"en": 2.0}), key) == value
