"""docs/plan.md: its commands print what it says; docs/formats.md explains every JSON key."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.plan.search import space
from tests.pages_typed import page_section, page_text, shell_lines

PAGE = page_text("plan.md")
KEYS = page_section("formats.md", "plan --json")
COMMANDS = shell_lines(PAGE) + shell_lines(KEYS)
OF_FILES = ("--prove", " submit ", "mine.yaml", "--from my-model")
"""Commands that simulate all processes (`tests/proof` runs them), and those that read a user's files."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Restrict the search grid to a few values, since a full search exceeds the time limit of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(space, "MICRO_BATCH_SIZES", (1,))
    monkeypatch.setattr(space, "VPP", (1,))
    monkeypatch.setattr(space, "MAX_TP", 4)
    monkeypatch.setattr(space, "_list_modules", lambda model: [])
    monkeypatch.setattr(space, "list_divisors", lambda n: [d for d in (1, 8, 16) if n % d == 0])
    monkeypatch.setattr(space, "_list_powers", lambda most: [p for p in (1, 4, 16) if p <= most])


@pytest.mark.deep
@pytest.mark.parametrize("line", [c for c in COMMANDS if not any(word in c for word in OF_FILES)])
def test_a_command_on_the_page_runs(line: str, narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)
    assert main(words[1:]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    if "--days" in words:
        assert "tokens/parameter" in output and "14 days" in output
    elif "--json" in words:
        assert json.loads(output)["totals"]["cost_usd"] > 1e6
    else:
        for table in ("What it takes", "Memory of the fullest GPU", "A step"):
            assert f"\n{table}" in output
    if "--sweep" in words:
        (submit,) = re.findall(r"^submit: +(.*)$", output, re.MULTILINE)
        # the printed command must parse
        typed = shlex.split(submit)[1:]
        assert main([typed[0], "--dry-run", *typed[1:]]) == 0, capsys.readouterr().err
        assert "looked at" in output


def keys_of(found: Any) -> set[str]:
    """Return all keys of nested JSON, except names that are data."""
    if isinstance(found, dict):
        return set(found) | {key for name, value in found.items()
                             if name not in ("layout", "seconds", "by_component", "schedule",
                                             "memory_bytes", "phases")
                             for key in keys_of(value)}
    return {key for value in found for key in keys_of(value)} if isinstance(found, list) else set()


def test_every_json_key_is_on_the_page(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen3-moe-30b", "--cluster", "h100", "--sweep", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    told = set(re.findall(r"`([a-z_]+)`", KEYS))
    fine = {"count", "example"}  # of a rule
    assert keys_of(plan) - told - fine == set()
    assert plan["sweep"]["looked_at"] == sum(
        kind["fit"] + kind["too_large"] + sum(rule["count"] for rule in kind["rules"])
        for kind in plan["sweep"]["kinds"])
