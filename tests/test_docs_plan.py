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
KEYS = page_section("formats.md", "JSON of plan")
COMMANDS = shell_lines(PAGE) + shell_lines(KEYS)
UNTYPED_PARTS = ("--prove", " submit ", "mine.yaml", "--from my-model")
"""Parts of commands that simulate all processes (`tests/proof` runs them) or read a user's files."""


@pytest.fixture
def narrow_grid(monkeypatch: pytest.MonkeyPatch, cwd: Path) -> None:
    """Restrict the search grid to a few values, since a full search exceeds the time limit of a test."""
    monkeypatch.setattr(space, "MICRO_BATCH_SIZES", (1,))
    monkeypatch.setattr(space, "VPP", (1,))
    monkeypatch.setattr(space, "MAX_TP", 4)
    monkeypatch.setattr(space, "_list_modules", lambda model: [])
    monkeypatch.setattr(space, "list_divisors", lambda n: [d for d in (1, 8, 16) if n % d == 0])
    monkeypatch.setattr(space, "_list_powers", lambda most: [p for p in (1, 4, 16) if p <= most])


@pytest.mark.deep
@pytest.mark.parametrize("line", [c for c in COMMANDS if not any(word in c for word in UNTYPED_PARTS)])
def test_a_command_on_the_page_runs(line: str, narrow_grid: None, capsys: pytest.CaptureFixture[str]) -> None:
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


def collect_keys(parsed: Any) -> set[str]:
    """Return all keys of nested JSON, except names that are data."""
    if isinstance(parsed, list):
        return set().union(*map(collect_keys, parsed))
    if not isinstance(parsed, dict):
        return set()
    keys = set(parsed)
    for name, value in parsed.items():
        if name not in ("layout", "seconds", "by_component", "schedule", "memory_bytes", "phases"):
            keys |= collect_keys(value)
    return keys


def test_every_json_key_is_on_the_page(narrow_grid: None, read_output: Any) -> None:
    plan = json.loads(read_output("plan", "qwen3-moe-30b", "--cluster", "h100", "--sweep", "--json"))
    explained = set(re.findall(r"`([a-z_]+)`", KEYS))
    keys_of_rules = {"count", "example"}
    assert collect_keys(plan) - explained - keys_of_rules == set()
    assert plan["sweep"]["looked_at"] == sum(
        kind["fit"] + kind["too_large"] + sum(rule["count"] for rule in kind["rules"])
        for kind in plan["sweep"]["kinds"])
