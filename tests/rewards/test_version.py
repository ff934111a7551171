"""A version changes with what judges, and with nothing else."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_sov.rewards import version
from megatron_sov.rewards.reward import OPERATION
from megatron_sov.rewards.version import settings_of, version_of

CODE = '''"""What it is."""
from megatron_sov.rewards import parts  # a part of it
LIMIT = 3
"""The most."""

def score(row):
    """Return it."""
    return len(row["response"]) > LIMIT  # more is right
'''


@dataclass(frozen=True)
class Long:
    """Right is what is long."""

    LIBRARIES = ("numpy",)
    min_chars: int = 5
    speed: int = field(default=4, metadata=OPERATION)

    def score(self, row):
        return len(row["response"]) >= self.min_chars


def of(reward: Long, files: dict[str, str] | None = None) -> str:
    return version_of(reward, settings_of(reward, {}), files or {"long.py": "1"})


def test_every_setting_counts_but_those_of_its_operation() -> None:
    assert of(Long()) == of(Long(5)) == of(Long(5, speed=9))
    assert of(Long()) != of(Long(6))


def test_the_code_counts() -> None:
    assert of(Long(), {"long.py": "1"}) != of(Long(), {"long.py": "2"})


def test_a_library_that_judges_along_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(Long())
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: "99.0")
    assert of(Long()) != before


@pytest.mark.parametrize(("old", "new", "same"), [
    ("  # more is right", "  # long enough", True), ('"""Return it."""', '"""Say whether."""', True),
    ('"""The most."""', '"""At most."""', True), ("\n\ndef", "\n\n\n\ndef", True),
    ("LIMIT = 3", "LIMIT = 4", False), ("> LIMIT", ">= LIMIT", False),
    ("import parts", "import other", False),
])
def test_code_is_compared_without_its_words(old: str, new: str, same: bool) -> None:
    assert old in CODE
    before, after = (version._without_words(ast.parse(text)) for text in (CODE, CODE.replace(old, new)))
    assert (before == after) is same


def test_what_a_module_imports_from_the_room_is_part_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"megatron_sov.rewards.registry": "from megatron_sov.rewards import reward\nimport json\n",
             "megatron_sov.rewards.reward": "x = 1\n", "megatron_sov.rewards.version": "y = 1\n"}
    monkeypatch.setattr(version, "_source", files.__getitem__)

    def code() -> dict[str, str]:
        version.code_of.cache_clear()
        return version.code_of("megatron_sov.rewards.registry")

    before = code()
    assert set(before) == {"megatron_sov.rewards.registry", "megatron_sov.rewards.reward"}
    files["megatron_sov.rewards.version"] = "y = 2\n"
    assert code() == before
    files["megatron_sov.rewards.reward"] = "x = 2\n"
    assert code() != before
    version.code_of.cache_clear()


def test_settings_of_a_class_that_is_no_dataclass() -> None:
    class Plain:
        def __init__(self, *, low: float = 0.5, high: float = 1.0) -> None:
            """Nothing is kept."""

    assert settings_of(Plain(), {"low": 0.25}) == {"low": 0.25, "high": 1.0}


def test_the_sources_of_the_room_are_found() -> None:
    code = version.code_of("megatron_sov.rewards.reward")
    assert list(code) == ["megatron_sov.rewards.reward"]
    assert Path(version.__file__).is_file()
