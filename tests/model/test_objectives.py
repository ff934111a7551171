"""User-defined objectives: required methods, and their settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model import objectives
from megatron_sov.model.config import RunConfig

METHODS = """
    def collect(self, policy, step): ...
    def prepare(self, batch): ...
    def loss(self, hidden, head, batch): ...
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives.OBJECTIVE_PLUGINS, "_known", {})


def build_config(name: str, **options: Any) -> RunConfig:
    config = recipes.get("tiny-qwen3")
    return replace(config, objective=replace(config.objective, name=name, options=options))


def load(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.py").write_text(text)
    return objectives.OBJECTIVE_PLUGINS.load(f"{tmp_path}/mine.py:Mine")


def test_a_built_in_objective_uses_the_factory_of_its_command() -> None:
    def built_in(context: Any) -> Any: ...

    for name in objectives.BUILT_IN:
        objectives.check_objective(build_config(name))
        assert objectives.get_factory(build_config(name), built_in) is built_in


def test_settings_of_an_objective_are_its_arguments(tmp_path: Path) -> None:
    name = load(tmp_path, "class Mine:\n    def __init__(self, context, *, gamma: float = 2.0, kind='a'):\n"
                          "        self.arguments = context, gamma, kind\n"
                          "        self.coefficients = {'x': 1.0}\n" + METHODS)
    config = build_config(name, gamma=3, kind=["any"])
    objectives.check_objective(config)
    objective: Any = objectives.get_factory(config, None)("context")  # type: ignore[arg-type]
    assert objective.arguments == ("context", 3, ["any"])
    with pytest.raises(UserError, match=r"'gamma'\?\n  objective.options.gamma"):
        objectives.check_objective(build_config(name, gama=1, gamma=None))


def test_type_checking_only_types_are_not_checked(tmp_path: Path) -> None:
    name = load(tmp_path, "from __future__ import annotations\nclass Mine:\n    def __init__(self, context: "
                          f"Context, size: Size = 1): ...\n{METHODS}")
    objectives.check_objective(build_config(name, size="anything"))


@pytest.mark.each(("text", "message"), [
    (f"class Mine:\n    def __init__(self, config, batches): ...\n{METHODS}",
     r"has the signature Mine\(config, batches\); an objective needs Mine\(context"),
    (f"class Mine:\n    def __init__(self, context, *, must): ...\n{METHODS}",
     r"\(context, \*, setting=default"),
    ("class Mine:\n    def loss(self, hidden, head): ...",
     r"needs collect\(.*prepare\(.*loss\(self, hidden, head, batch\); it has loss\(self, hidden, head\)"),
    (f"class Mine:\n    formats = ('chat', 'film')\n    def __init__(self, context): ...\n{METHODS}",
     r"`formats` is \('chat', 'film'\), must be a tuple of 'text', 'chat', 'preference', 'prompt'"),
    (f"class Mine:\n    columns = ['a']\n    def __init__(self, context): ...\n{METHODS}",
     r"`columns` is \['a'\], must be a dict of column -> NeededColumn\(made_by\)"),
    (f"class Mine:\n    def state(self): ...\n    def __init__(self, context): ...\n{METHODS}",
     r"an objective with a memory needs restore\(self, state\); it has none"),
    ("def Mine(context): ...", r"is a function; an objective is a class with collect\(self, policy, step\)"),
])
def test_invalid_objectives_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_an_objective_without_coefficients_is_refused_at_construction(tmp_path: Path) -> None:
    config = build_config(load(tmp_path, f"class Mine:\n    def __init__(self, context): ...\n{METHODS}"))
    with pytest.raises(UserError, match="term -> its weight"):
        objectives.get_factory(config, None)(None)  # type: ignore[arg-type]


def test_required_columns_are_known_before_construction(tmp_path: Path) -> None:
    from megatron_sov.train.objectives.objective import get_columns, get_formats

    name = load(tmp_path, "from megatron_sov import NeededColumn\nclass Mine:\n    formats = 'preference',\n"
                          "    columns = {'score': NeededColumn('sov-data pack --column score')}\n"
                          f"    def __init__(self, context): ...\n{METHODS}")
    factory = objectives.get_factory(build_config(name), None)  # type: ignore[arg-type]
    assert get_formats(factory) == ("preference",) and list(get_columns(factory)) == ["score"]
    assert get_formats(lambda context: None) == ("text", "chat") and get_columns(lambda context: None) == {}
