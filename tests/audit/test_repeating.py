"""Stages behind pretraining are audited as it is: fine-tuning, adapters, preferences, distillation. An honest
run passes to the bit, and what was falsified is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from data_prep.cli import main as sov_data
from megatron_sov import cli
from megatron_sov.audit.commitment import REFERENCE, START, TEACHER, publish, read_commitment
from megatron_sov.audit.counterfactual import plan_repetition
from megatron_sov.audit.drawing import Segment
from megatron_sov.audit.repeating import Repeated, gather_evidence, repeat
from megatron_sov.base.artifacts import MANIFEST, FileRecord, manifest_sha256
from megatron_sov.base.errors import ExitCode, UserError

SETTINGS = [word for setting in (
    "train.steps=4", "train.checkpoint_every_steps=2", "train.keep_checkpoints=0",
    "train.keep_every_steps=0", "train.eval_every_steps=0", "train.num_threads=1",
    "train.global_batch_size=2", "train.micro_batch_size=1", "model.vocab_size=368", "model.hidden_size=32",
    "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
    "model.dense_ffn_dim=64", "optim.lr=0.004", 'data.phases=[{"name": "main", "seq_len": 64}]')
    for word in ("--set", setting)]
SECOND = Segment(2, 4)


@dataclass(frozen=True)
class Lab:
    """Models and data, and how a run is made of them."""

    folder: Path
    chats: Path
    pairs: Path
    command: Callable[..., Any]

    def train(self, stage: str, name: str, data: Path, *more: str) -> Path:
        run = self.folder / name
        done = self.command(stage, "tiny-qwen3", "--data", str(data), "--run", str(run), *SETTINGS, *more)
        assert done.returncode == 0, done.stderr
        return run

    @property
    def base(self) -> Path:
        return self.folder / "base/checkpoints/step-4"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, packed_data: Any, run_command: Callable[..., Any]) -> Lab:
    """A lab with a base model and another one."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"{i}."}) for i in range(24)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--workers", "1", "--format",
                     "preference", "--input", str(folder / "pairs.jsonl"), "--output",
                     str(folder / "pairs")]) == 0
    lab = Lab(folder, packed_data.chats, folder / "pairs", run_command)
    lab.train("pretrain", "base", packed_data.text)
    lab.train("pretrain", "other", packed_data.text, "--set", "train.seed=7")
    return lab


def audit(run: Path, work: Path, *given: str) -> int:
    """Publish a run, and repeat all of it by the commands."""
    log, draw = work / "log.jsonl", work / "draw.json"
    drawn = ["--log", str(log), "--randomness", "x", "--segments", "1", "--output", str(draw)]
    assert cli.main(["audit", "commit", str(run), "--log", str(log)]) == ExitCode.OK
    assert cli.main(["audit", "draw", *drawn]) == ExitCode.OK
    return cli.main(["audit", "repeat", str(draw), "--log", str(log), "--run", str(run), "--work",
                     str(work / "audit"), *given])


def seal(checkpoint: Path) -> None:
    """Make the manifest of a checkpoint agree with its files."""
    manifest = json.loads((checkpoint / MANIFEST).read_text()) | {"sha256": ""}
    for name, told in manifest["files"].items():
        record = FileRecord.of(checkpoint / name)
        told |= {"digest": record.digest, "size_bytes": record.size_bytes}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def falsified(run: Path, work: Path, falsify: Callable[[Path], object], start: Path,
              **given: Any) -> Repeated:
    """Falsify the last checkpoint of a run that was repeated before, publish it, and compare."""
    forged = work / "falsified" / run.name
    shutil.copytree(run, forged)
    falsify(forged / "checkpoints/step-4")
    seal(forged / "checkpoints/step-4")
    publish(forged, work / "falsified.jsonl")
    evidence = gather_evidence(forged, read_commitment(work / "falsified.jsonl"), (), start, (), None, 1e-2,
                               **given)
    return repeat(evidence, SECOND, work / "audit")


def scale_one(part: str) -> Callable[[Path], None]:
    """Return what scales one matrix of a checkpoint by 1.01."""
    def scale(checkpoint: Path) -> None:
        [file] = (checkpoint / part).rglob("*.safetensors")
        tensors = load_file(file)
        name = max(tensors, key=lambda key: tensors[key].abs().sum())
        save_file(tensors | {name: tensors[name] * 1.01}, file)

    return scale


STAGES: dict[str, tuple[str, str, Sequence[str], str]] = {
    "sft": ("sft", "chats", (), "model"),
    "adapter": ("sft", "chats", ("--set", "lora.rank=4"), "adapter"),
    "preferences": ("prefer", "pairs", ("--method", "dpo"), "model")}
"""Name -> command, data, its words, and the part of a checkpoint that is falsified."""


@pytest.mark.parametrize("stage", STAGES)
def test_an_honest_run_passes_to_the_bit_and_an_edited_checkpoint_does_not(
        stage: str, lab: Lab, tmp_path: Path, as_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    command, data, words, part = STAGES[stage]
    run = lab.train(command, stage, getattr(lab, data), "--from", str(lab.base), *words)
    assert audit(run, tmp_path, "--from", str(lab.base)) == ExitCode.OK
    assert "all 2 segments are what was published, 2 of them to the bit" in capsys.readouterr().out
    found = falsified(run, tmp_path, scale_one(part), lab.base)
    assert found.outcome == "different" and f"first in {part}" in found.detail


def test_an_adapter_is_repeated_beside_the_base_that_was_published(
        lab: Lab, tmp_path: Path, as_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an adapter that was trained on: its base is that of its start, wherever the auditor has it."""
    words = ("--set", "lora.rank=4")
    first = lab.train("sft", "first", lab.chats, "--from", str(lab.base), *words)
    run = lab.train("sft", "trained-on", lab.chats, "--from", str(first), *words)
    assert audit(run, tmp_path, "--from", str(first)) == ExitCode.OK
    assert "2 of them to the bit" in capsys.readouterr().out

    def say_other_base(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        other = lab.folder / "other/checkpoints/step-4"
        manifest["content"]["base"] = {"path": str(other), "sha256": manifest_sha256(other)}
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))

    found = falsified(run, tmp_path, say_other_base, first)
    assert (found.outcome, found.detail) == ("unproved", "step-4 stands on another model than the run")
    with pytest.raises(UserError, match="has adapters"):
        plan_repetition(run, ("chat",), tmp_path / "none", first, None)
    # the auditor has the base elsewhere
    moved = shutil.copytree(lab.base, tmp_path / "moved")
    plain = lab.train("sft", "plain", lab.chats, "--from", str(lab.base), *words)
    lab.base.rename(tmp_path / "away")
    try:
        (tmp_path / "elsewhere").mkdir()
        assert audit(plain, tmp_path / "elsewhere", "--from", str(moved)) == ExitCode.OK
    finally:
        (tmp_path / "away").rename(lab.base)


def test_another_reference_than_the_start_is_published_and_asked_for(
        lab: Lab, tmp_path: Path, as_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    other = lab.folder / "other"
    run = lab.train("prefer", "compared", lab.pairs, "--from", str(lab.base), "--reference", str(other))
    (tmp_path / "asked").mkdir()
    assert audit(run, tmp_path / "asked", "--from", str(lab.base)) == ExitCode.GATE_FAILED
    assert "compares with a model; name it by --reference" in capsys.readouterr().out
    given = ("--from", str(lab.base), "--reference", str(other))
    assert audit(run, tmp_path, *given) == ExitCode.OK
    assert "2 of them to the bit" in capsys.readouterr().out
    assert [leaf.kind for leaf in read_commitment(tmp_path / "log.jsonl").find(REFERENCE)] == [REFERENCE]
    with pytest.raises(UserError, match=r"a model with the manifest [0-9a-f]{12}; name it by --reference"):
        plan_repetition(run, ("pairs",), tmp_path / "none", lab.base, None)
    # a segment in the middle needs what the first one leaves
    commitment = read_commitment(tmp_path / "log.jsonl")
    evidence = gather_evidence(run, commitment, (), lab.base, (), None, 1e-2, reference=other)
    assert "when the first segment is repeated" in repeat(evidence, SECOND, tmp_path / "none").detail


def test_a_distillation_is_repeated_from_what_its_teacher_said(
        lab: Lab, tmp_path: Path, as_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hash is published; the teacher itself is not needed."""
    words = ("--from", str(lab.base))
    run = lab.train("distill", "distilled", lab.chats, *words, "--teacher", str(lab.folder / "other"))
    states = tmp_path / "states"
    (lab.folder / "distilled.states").rename(states)
    assert audit(run, tmp_path, *words) == ExitCode.USER_ERROR
    assert "--states " in capsys.readouterr().err
    assert audit(run, tmp_path, *words, "--states", str(states)) == ExitCode.OK
    assert "2 of them to the bit" in capsys.readouterr().out
    commitment = read_commitment(tmp_path / "log.jsonl")
    assert len(commitment.find(TEACHER)) == len(commitment.find(START)) == 1
    found = falsified(run, tmp_path, scale_one("model"), lab.base, states=[states])
    assert found.outcome == "different"

    # whoever has the teacher can ask it again
    asked = ["audit", "data", "--log", str(tmp_path / "log.jsonl"), "--run", str(run), "--work",
             str(tmp_path / "asked"), "--states", str(states), "--teacher"]
    assert cli.main([*asked, str(lab.base)]) == ExitCode.GATE_FAILED
    assert "unproved, no --teacher has the weights blake3:" in capsys.readouterr().out
    assert cli.main([*asked, str(lab.folder / "other")]) == ExitCode.OK
    assert "teacher_states " in (said := capsys.readouterr().out) and said.count(": equal") == 3

    # another teacher's word, told as this one's
    done = lab.command("distill", "states", str(lab.folder / "base"), "--data", str(lab.chats), "--output",
                       str(tmp_path / "others"))
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="--states: none of the folders has the manifest"):
        gather_evidence(run, commitment, (), lab.base, (), None, 1e-2, states=[tmp_path / "others"])
    taught = lab.train("distill", "taught", lab.chats, *words, "--states", str(tmp_path / "others"))
    shutil.copy(run / "events.jsonl", taught)
    publish(taught, tmp_path / "taught.jsonl")
    evidence = gather_evidence(taught, read_commitment(tmp_path / "taught.jsonl"), (), lab.base, (), None,
                               1e-2, states=[states])
    assert repeat(evidence, Segment(0, 2), tmp_path / "taught").outcome == "different"
