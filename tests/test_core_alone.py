"""Which tests are among those of the core alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import core_alone
from tests.core_alone import TestModule, needed_by, typed_part


@pytest.mark.parametrize(("text", "found"), [
    ("import json\nfrom megatron_sov.model import config", ""),
    ("from megatron_sov.judge.rewards import registry", "megatron_sov.judge.rewards.registry"),
    ("import data_prep.cli", "data_prep.cli"),
    ("import no_such_library.deep", "no_such_library.deep"),
    ("def test_it():\n    import data_prep.cli", ""),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import data_prep.cli", "")])
def test_a_file_needs_what_it_imports_when_it_is_loaded(text: str, found: str, tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(text)
    assert TestModule(file).absent() == found


def test_a_file_needs_what_a_module_of_the_tests_imports(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_alone, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/shared.py").write_text("from data_prep import tags\n")
    (tmp_path / "tests/test_it.py").write_text("from tests.shared import x\n")
    assert TestModule(tmp_path / "tests/test_it.py").absent() == "data_prep.tags"


@pytest.mark.parametrize(("body", "found"), [
    ("    assert helper()\n", "megatron_sov.bench.lm"),
    ("    assert ranks('on_a_rank')\n", "megatron_sov.post.rl"),
    ("    assert nothing()\n", ""),
    ("    patch('megatron_sov.commands.score.score_file')\n", "megatron_sov.commands.score.score_file"),
    ("    main(['rl', 'run', 'tiny'])\n", "megatron_sov.commands.rl.rounds:RUN"),
    ("    run('import sys, tokenizer.cli')\n", "tokenizer.cli"),
    ("    main(['pretrain', 'tiny'])\n", "")])
def test_a_test_needs_what_its_function_uses(body: str, found: str, tmp_path: Path) -> None:
    file = tmp_path / "test_uses.py"
    file.write_text("def helper():\n    import megatron_sov.bench.lm\n"
                    "def on_a_rank():\n    import megatron_sov.post.rl\n"
                    f"def nothing():\n    return 1\ndef test_it():\n{body}")
    module = TestModule(file)
    assert needed_by(module, module.names["test_it"], set()) == found


@pytest.mark.parametrize(("line", "found"), [
    ("'score --reward code'", True), ("['sov-data', 'pack']", True), ("'eval lm {there} --tasks x'", True),
    ("'eval ppl {there} --data x'", False), ("'the score'", False), ("run('plan', 'tiny')", True),
    ("['convert', 'to-hf']", False)])
def test_a_command_of_a_part_is_seen_where_it_is_typed(line: str, found: bool) -> None:
    assert any(map(typed_part, ast.walk(ast.parse(line)))) is found
