"""A move that renames is told from one that changes what a function does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from first_losses import digest_of_folder, digest_of_losses
from moved_bodies import WORK_TREE, files_of, report

BEFORE = {"megatron_sov/config/rate.py": b'''
"""Rates."""
from megatron_sov.config import warm
LIMIT = 3

def lowest(a, b):
    """The lower one."""
    return min(a, b)

class Rate:
    start: float = 1.0
    """Where it begins."""
    def at(self, step):
        from megatron_sov.config.warm import share
        return self.start * share(step) * load("megatron_sov.config.rate:Rate", "at step")

def load(path, word):
    return path
''', "megatron_sov/config/warm.py": b'''
def share(step):
    return step / 10
''', "megatron_sov/config/page.html": b"<p>"}
AFTER = {"megatron_sov/model/config/rate.py": b'''
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pathlib import Path
from megatron_sov.model import warm
LIMIT = 3

def smaller(a, b):
    return min(a, b)

class LearningRate:
    start: float = 1.0
    def at(self, step):
        return self.start * warm.share(step) * load_class("megatron_sov.rate:LearningRate", "at step")

def load_class(path, word):
    return path
''', "megatron_sov/model/warm.py": BEFORE["megatron_sov/config/warm.py"],
    "megatron_sov/model/page.html": b"<p>"}


def table(before: dict[str, bytes], after: dict[str, bytes]) -> tuple[dict[str, list[str]], str]:
    lines = list(report(before, after))
    return {line[:16].strip(): line[16:].split() for line in lines[1:8]}, "\n".join(lines)


def test_moved_and_renamed_functions_are_found_again() -> None:
    counts, text = table(BEFORE, AFTER)
    assert counts == {"before": ["4", "2"], "after": ["4", "2"], "to the letter": ["1", "1"],
                      "but for names": ["3", "1"], "names, not 1:1": ["0", "0"],
                      "not found again": ["0", "0"], "new": ["0", "0"]}
    assert "1 before, 1 after, 1 with the same bytes" in text
    for line in ("2  load -> load_class", "1  lowest -> smaller", "1  Rate. -> LearningRate.",
                 "1  megatron_sov.config.rate:Rate -> megatron_sov.rate:LearningRate"):
        assert f"  {line}\n" in f"{text}\n"


@pytest.mark.parametrize(("old", "new", "row", "line"), [
    (b"step / 10", b"step / 11", "not found again", "  megatron_sov/config/warm.py:2 share"),
    (b"LIMIT = 3", b"LIMIT = 3.0", "not found again", "  megatron_sov/config/rate.py:4 LIMIT"),
    (b"float = 1.0", b"float = 2.0", "not found again", "  megatron_sov/config/rate.py:10 Rate"),
    (b'"at step"', b'"after step"', "not found again", "  megatron_sov/config/rate.py:13 Rate.at"),
    (b"min(a, b)", b"min(a, a)", "names, not 1:1",
     "  megatron_sov/config/rate.py:6 lowest  now megatron_sov/model/config/rate.py:8 smaller"),
    (b"min(a, b)", b"max(a, b)", "but for names", "      1  min -> max")])
def test_a_change_is_told(old: bytes, new: bytes, row: str, line: str) -> None:
    before = table(BEFORE, AFTER)[0]
    counts, text = table(BEFORE, {path: content.replace(old, new) for path, content in AFTER.items()})
    assert line in text.splitlines()
    assert row == "but for names" or sum(map(int, counts[row])) == sum(map(int, before[row])) + 1


def test_revisions_and_the_work_tree_are_read(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    git("init")
    (tmp_path / "tokenizer").mkdir()
    for content in (b"a = 1\n", b"a = 2\n"):
        (tmp_path / "tokenizer/a.py").write_bytes(content)
        (tmp_path / "setup.py").write_bytes(content)
        git("add", ".")
        git("commit", "-m", "a")
    (tmp_path / "tokenizer/b.py").write_bytes(b"b = 1\n")
    assert files_of("HEAD~1", tmp_path) == {"tokenizer/a.py": b"a = 1\n"}
    assert files_of(WORK_TREE, tmp_path) == {"tokenizer/a.py": b"a = 2\n", "tokenizer/b.py": b"b = 1\n"}


def test_one_bit_of_a_loss_or_of_an_export_is_seen(tmp_path: Path) -> None:
    assert digest_of_losses([0.1, 0.2]) != digest_of_losses([0.1, 0.2 + 2.0 ** -55])
    (tmp_path / "config.json").write_bytes(b"a")
    (tmp_path / "manifest.json").write_bytes(b"a")
    digest = digest_of_folder(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"b")
    assert digest_of_folder(tmp_path) == digest
    (tmp_path / "config.json").write_bytes(b"b")
    assert digest_of_folder(tmp_path) != digest
