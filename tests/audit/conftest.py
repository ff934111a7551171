"""What tests of audits share."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.audit import repeating

PROGRAMS = {"megatron_sov": "megatron-sov", "data_prep.cli": "sov-data", "tokenizer.cli": "sov-tokenizer"}


@pytest.fixture
def as_child(monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Any]) -> None:
    """Commands of an audit run in forks of a process that has their libraries already."""
    start_as_child(monkeypatch, run_command)


def start_as_child(patch: pytest.MonkeyPatch, run_command: Callable[..., Any]) -> None:
    """Have commands of an audit run so until the patch is undone."""
    def start(command: list[str], **options: Any) -> Any:
        module, *words = command[command.index("-m") + 1:]
        done = run_command(*words, program=PROGRAMS[module])
        options["stdout"].write(done.stderr.encode())
        return SimpleNamespace(wait=lambda: done.returncode)

    patch.setattr(repeating, "start_command", start)
