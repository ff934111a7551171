"""Tokenizers and token shards made again from their texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.audit.preparing import Moved, RemadeArtifact, kept, parse_moved, prepare_again
from megatron_sov.audit.repeating import RepeatOutcome
from megatron_sov.base.artifacts import new_artifact, read_manifest
from megatron_sov.base.errors import UserError


@pytest.fixture
def lab(token_shards: Path, tmp_path: Path) -> Path:
    """A copy of what the lab hands over, in another place than its manifests say."""
    shutil.copytree(token_shards.parent, tmp_path / "lab")
    return tmp_path / "lab"


def moved_to(lab: Path) -> Moved:
    """The lab's folder, as its manifests name it, lies here."""
    old = Path(read_manifest(lab / "shards", "tokens").settings["inputs"][0]["path"]).parent
    return parse_moved([f"{old}={lab}"])


def told(found: list[RemadeArtifact]) -> dict[str, tuple[RepeatOutcome, str]]:
    return {prepared.kind: (prepared.outcome, prepared.detail) for prepared in found}


def test_the_same_texts_give_the_same_bytes_and_one_other_word_does_not(
        lab: Path, tmp_path: Path, as_child: None) -> None:
    found = prepare_again(lab / "shards", moved_to(lab), tmp_path / "audit")
    assert {outcome for outcome, _ in told(found).values()} == {RepeatOutcome.EQUAL}
    assert kept(tmp_path / "audit", "tokens", found[1].sha256) == found[1]
    text = lab / "second.jsonl"
    lines = text.read_text().split("\n")
    text.write_text("\n".join([*lines[:5], json.dumps({"text": "what the lab never read"}), *lines[6:]]))
    found = prepare_again(lab / "shards", moved_to(lab), tmp_path / "other")
    assert told(found)["tokens"][0] == told(found)["tokenizer"][0] == RepeatOutcome.DIFFERENT
    assert "second/train-00000.bin" in told(found)["tokens"][1] and "groups" in told(found)["tokenizer"][1]


def test_what_was_not_handed_over_is_unproved_until_it_is(lab: Path, tmp_path: Path, as_child: None) -> None:
    moved, work = moved_to(lab), tmp_path / "audit"
    (lab / "tokenizer").rename(tmp_path / "away")
    assert "the tokenizer of manifest" in told(prepare_again(lab / "shards", moved, work))["tokens"][1]
    (tmp_path / "away").rename(lab / "tokenizer")
    (lab / "first.jsonl").rename(tmp_path / "first.jsonl")
    for outcome, detail in told(prepare_again(lab / "shards", moved, work)).values():
        assert outcome == RepeatOutcome.UNPROVED and "first.jsonl is not there; ask the lab" in detail
    (tmp_path / "first.jsonl").rename(lab / "first.jsonl")
    assert all(prepared.passed for prepared in prepare_again(lab / "shards", moved, work))
    with pytest.raises(UserError, match="--moved a: must be OLD=NEW"):
        parse_moved(["a"])


@pytest.mark.parametrize(("settings", "why"), [
    ({"steps": [{"path": "own.py"}]}, "went through code of the lab's own"),
    ({"shard_tokens": "--output=/"}, "exit code 2"),
    ({"later": 1}, "cannot be told its settings later"),
    ({"inputs": [{"name": "--output=x", "path": "/dev/null"}]}, "exit code 2"),
    ({"reading": None}, "has not a command's settings")])
def test_a_manifest_that_no_command_could_have_written_proves_nothing(
        settings: dict[str, Any], why: str, lab: Path, tmp_path: Path, as_child: None) -> None:
    old = read_manifest(lab / "shards", "tokens")
    with new_artifact(tmp_path / "forged", "tokens") as forged:
        shutil.copytree(lab / "shards", forged.path, dirs_exist_ok=True)
        (forged.path / "manifest.json").unlink()
        forged.content, forged.settings = old.content, {**old.settings, **settings}
        forged.add_input(lab / "tokenizer")
    found = told(prepare_again(tmp_path / "forged", moved_to(lab), tmp_path / "audit"))
    assert found["tokens"][0] == RepeatOutcome.UNPROVED and why in found["tokens"][1], found
