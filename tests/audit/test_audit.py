"""Audits: what is published, drawn, repeated and told, and which frauds are found."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minisign
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import cli
from megatron_sov.audit import repeating
from megatron_sov.audit.commitment import check_signature, publish, read_commitment, sign
from megatron_sov.audit.drawing import (
    Segment, chance_to_find, draw, needed, read_draw, segments_of, write_draw)
from megatron_sov.audit.repeating import RepeatOutcome, compare, gather_evidence
from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import ExitCode, UserError
from tests.audit.conftest import start_as_child
from tests.pages_typed import ENTRIES, commands_of, lines_of, shell_blocks
from tests.test_readme import gather

DOCS = Path(__file__).parents[2] / "docs"
PAGE, TUTORIAL = ((DOCS / name).read_text(encoding="utf-8") for name in ("audit.md", "tutorials/auditor.md"))
SMALL = ("train.steps=6", "train.checkpoint_every_steps=2", "train.keep_checkpoints=0",
         "train.keep_every_steps=0", "train.eval_every_steps=0", "train.num_threads=1",
         "train.global_batch_size=2", "train.micro_batch_size=1", "model.hidden_size=32",
         "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1",
         "model.head_dim=16", "model.dense_ffn_dim=64",
         'data.phases=[{"name": "main", "seq_len": 32}]')

@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, token_shards: Path,
            run_command: Callable[..., Any]) -> Path:
    """A run of three segments."""
    run = tmp_path_factory.mktemp("audit") / "audited"
    done = run_command("pretrain", "tiny-qwen3", "--data", str(token_shards), "--run", str(run),
                       *(word for setting in SMALL for word in ("--set", setting)))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be falsified."""
    copy = tmp_path / trained.name
    shutil.copytree(trained, copy)
    return copy


def audit(*words: object) -> int:
    return cli.main(["audit", *map(str, words)])


@dataclass(frozen=True)
class Hour:
    """The tutorial, typed in a folder: each line, and what it printed."""

    folder: Path
    printed: dict[str, str]

    def said(self, beginning: str) -> str:
        """Return what the lines printed that begin so."""
        return "".join(text for line, text in self.printed.items() if line.startswith(beginning))


FAILS = ("megatron-sov audit repeat cheated", "megatron-sov audit verdict cheated")
"""What ends with the code of a gate there."""


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory, run_command: Callable[..., Any]) -> Hour:
    """Everything of docs/tutorials/auditor.md but what is gathered, which is small here, and the keys."""
    folder, printed = tmp_path_factory.mktemp("hour"), dict[str, str]()
    for name, content in re.findall(r"`(\w+\.jsonl)`[^\n]*\n\n```json\n(.*?)^```", TUTORIAL, re.M | re.S):
        (folder / name).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start_as_child(patch, run_command)
        for line in lines_of(shell_blocks(TUTORIAL)):
            if line == "sov-data demo-corpus --output work/corpus":
                gather(Path("work/corpus"))
            elif line.startswith("minisign -G"):
                pair = minisign.KeyPair.generate()
                Path("lab.key").write_bytes(bytes(pair.secret_key))
                Path("lab.pub").write_bytes(bytes(pair.public_key))
            else:
                printed[line] = type_line(line, run_command)
    return Hour(folder, printed)


def type_line(line: str, run_command: Callable[..., Any]) -> str:
    """Type a line; returns what it printed."""
    if line.startswith("megatron-sov audit "):
        log = Path("audited.log.jsonl")
        argv = line.replace(" ROOT ", f" {read_commitment(log).root} ") if " ROOT " in line else line
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = cli.main(shlex.split(argv)[1:])
        assert code == (ExitCode.GATE_FAILED if line.startswith(FAILS) else ExitCode.OK), f"{line}: {code}"
        return out.getvalue()
    program, *argv = shlex.split(line)
    done = (run_command(*argv, program=program) if program in ENTRIES else
            subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True))
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return str(done.stdout)


def test_an_auditors_hour_passes_the_honest_run(hour: Hour) -> None:
    assert "steps 0-2, " in hour.said("megatron-sov audit draw --log audited")
    repeated = hour.said("megatron-sov audit repeat draw.json")
    assert "1/2 steps 0-2: equal" in repeated and "all 2 segments are what was published" in repeated
    made = hour.said("megatron-sov audit data")
    assert made.count(": equal") == 3 and {line.split()[0] for line in made.splitlines()} == {
        "tokens", "tokenizer", "documents"}
    assert "document letters:0 of documents" in hour.said("megatron-sov audit check")


def test_an_auditors_hour_finds_what_the_lab_has_hidden(hour: Hour) -> None:
    assert "1/1 steps 0-2: different" in hour.said("megatron-sov audit repeat cheated")
    assert "1 of 1 segments are not what was published" in hour.said("megatron-sov audit verdict cheated")
    told = json.loads((hour.folder / "cheated.json").read_text())
    assert not told["passed"] and "not passed" in (hour.folder / "cheated.html").read_text()


def test_a_run_is_published_drawn_and_repeated_to_the_bit_by_the_pages_commands(
        hour: Hour, as_child: None, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """All commands of docs/audit.md but the first, which trains, where the tutorial was typed: its log has
    nothing new, so that what it repeated counts."""
    monkeypatch.chdir(hour.folder)
    training, *commands = commands_of(PAGE)
    assert training.startswith("megatron-sov pretrain ") and len(commands) == 6
    for line in commands:
        assert cli.main(shlex.split(line)[1:]) == ExitCode.OK
    said = capsys.readouterr().out
    # two segments, tokenizer, shards, documents
    assert "0 new" in said and "1/2 steps 0-2: equal" in said and said.count(": equal") == 5
    told = json.loads(Path("audit.json").read_text())
    assert told["passed"] and told["chance_to_find"]["0.5"] == 0.5
    assert [p["kind"] for p in told["prepared"]] == ["tokens", "tokenizer", "documents"]
    assert read_commitment(Path("audited.log.jsonl")).root in Path("audit.html").read_text()
    assert "global_batch_size" in Path("audit.html").read_text()  # the settings are on the page
    # a result belongs to its log and its bound
    repeat = [*shlex.split(commands[2])[1:]]
    assert cli.main([*repeat, "--bound", "0.5"]) == ExitCode.USER_ERROR
    assert "were repeated with --bound 0.01" in capsys.readouterr().err
    with pytest.raises(UserError, match="name another --work"):
        repeating.kept(Path("audit"), "f" * 64, Segment(0, 2))
    # done once: nothing is started again
    shutil.rmtree(Path("audit/0-2", repeating.REPEATED))
    assert cli.main(shlex.split(commands[2])[1:]) == ExitCode.OK
    assert not Path("audit/0-2", repeating.REPEATED).exists()


def test_another_layout_is_near_and_a_bound_below_it_is_not_passed(
        run: Path, tmp_path: Path, as_child: None, capsys: pytest.CaptureFixture[str]) -> None:
    log, drawn = tmp_path / "log.jsonl", tmp_path / "draw.json"
    publish(run, log)
    write_draw(drawn, draw(read_commitment(log), "x", 0))
    given = (drawn, "--log", log, "--run", run, "--set", "train.micro_batch_size=2")
    assert audit("repeat", *given, "--work", tmp_path / "wide") == ExitCode.OK
    assert "steps 0-2: near, distance" in capsys.readouterr().out
    published, mine, before = (folder / f"checkpoints/step-{step}" for folder, step in (
        (run, 2), (tmp_path / "wide/0-2/run", 2), (tmp_path / "wide/0-2/run", 1)))
    found = compare(Segment(0, 2), published, mine, before, 1e-12)
    assert found.outcome == RepeatOutcome.DIFFERENT and 0 < found.distance < 1e-3


def test_a_changed_weight_sample_or_counter_is_told(run: Path) -> None:
    """Each against the honest checkpoint, in the place of what an auditor would compute."""
    checkpoints = run / "checkpoints"
    honest, before, forged = checkpoints / "step-4", checkpoints / "step-2", run / "forged"
    segment = Segment(2, 4)

    def outcome(bound: float = 1e-2) -> tuple[str, str]:
        found = compare(segment, forged, honest, before, bound)
        return found.outcome.value, found.detail

    shutil.copytree(honest, forged)
    assert outcome() == ("equal", "")
    [file] = (forged / "model").rglob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "linear_fc1" in name)
    save_file(tensors | {name: tensors[name] + 0.01}, file)
    assert outcome()[0] == "different" and "linear_fc1" in outcome()[1]
    # one bit of one weight is seen, though it is near
    bit = tensors[name].clone()
    bit.view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors | {name: bit}, file)
    assert outcome()[0] == "near" and outcome(1e-12)[0] == "different"
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file)
    assert outcome()[0] == "different"
    save_file(tensors, file)
    for key in ("order", "tokens"):
        state = json.loads((honest / "state.json").read_text())
        (forged / "state.json").write_text(json.dumps(state | {key: 1}))
        assert outcome() == ("different", f"other {key} in its state")
    (forged / "state.json").write_text((honest / "state.json").read_text())
    # a shift of one row of an embedding, small beside all that moves
    [embedding] = [name for name in tensors if "word_embeddings" in name]
    row = tensors[embedding].clone()
    row[7] += 0.003
    save_file(tensors | {embedding: row}, file)
    assert outcome()[0] == "different"
    save_file(tensors, file)
    state = json.loads((honest / "state.json").read_text())
    losses = [9.0] * len(state["guard"]["losses"])
    for guard in (state["guard"] | {"losses": losses}, state["guard"] | {"x": 1}):
        (forged / "state.json").write_text(json.dumps(state | {"guard": guard}))
        assert outcome() == ("different", "in what its guards remember")
    (forged / "state.json").write_text((honest / "state.json").read_text())
    [moments] = (forged / "optimizer").rglob("*.safetensors")
    save_file({key: value * 1.5 for key, value in load_file(moments).items()}, moments)
    assert outcome()[0] == "different" and outcome()[1].startswith("first in optimizer")


def test_a_skipped_step_and_other_weights_at_the_start_are_told(run: Path) -> None:
    checkpoints = run / "checkpoints"
    before = checkpoints / "step-2"
    stand_still = compare(Segment(2, 4), before, checkpoints / "step-4", before, 1e-2)
    assert stand_still.outcome == RepeatOutcome.DIFFERENT
    forged = run / "forged"
    shutil.copytree(before, forged)
    shutil.copytree(checkpoints / "step-6/model", forged / "model", dirs_exist_ok=True)
    # a first checkpoint behind step 1 has nothing to measure by: only bits pass
    begun = compare(Segment(0, 1), forged, before, None, 1e-2)
    assert begun.outcome == RepeatOutcome.DIFFERENT and begun.distance == math.inf
    assert compare(Segment(0, 1), before, before, None, 1e-2).outcome == RepeatOutcome.EQUAL


@pytest.mark.parametrize(("falsify", "said"), [
    (lambda run: shutil.rmtree(run / "checkpoints/step-2"), "step-2 is not there"),
    (lambda run: (run / "config.json").write_text(
        (run / "config.json").read_text().replace('"skip_steps": []', '"skip_steps": [[1, 2]]')),
     "the settings of config.json are not what was published"),
    (lambda run: (run / "checkpoints/step-2/more").write_text(""), "more is not in its manifest"),
    (lambda run: (run / "checkpoints/step-2/more").symlink_to("/etc/hostname"), "more is a link"),
    (lambda run: (run / "checkpoints/step-2/state.json").write_text("{}"), "state.json"),
    (lambda run: (run / "checkpoints/step-2" / MANIFEST).write_text(
        (run / "checkpoints/step-2" / MANIFEST).read_text() + " "), "step-2 is not what was published")])
def test_what_is_not_what_was_published_is_unproved(
        run: Path, tmp_path: Path, falsify: Callable[[Path], object], said: str) -> None:
    log = tmp_path / "log.jsonl"
    publish(run, log)
    evidence = gather_evidence(run, read_commitment(log), (), None, (), None, 1e-2)
    falsify(run)
    found = repeating.repeat(evidence, Segment(0, 2), tmp_path / "work")
    assert found.outcome == RepeatOutcome.UNPROVED and said in found.detail


def test_data_are_found_by_their_hash_and_others_are_refused(
        run: Path, tmp_path: Path, token_shards: Path) -> None:
    log = tmp_path / "log.jsonl"
    publish(run, log)
    elsewhere, other = tmp_path / "elsewhere", tmp_path / "other"
    for folder in (elsewhere, other):
        shutil.copytree(token_shards, folder)
    commitment = read_commitment(log)
    found = gather_evidence(run, commitment, [elsewhere], None, (), 1, 1e-2)
    assert found.data == {str(token_shards): elsewhere}
    manifest = json.loads((other / MANIFEST).read_text()) | {"created_s": 1.0, "sha256": ""}
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--data: none of the folders has the manifest"):
        gather_evidence(run, commitment, [other], None, (), 1, 1e-2)
    with pytest.raises(UserError, match=r"--data .*nowhere"):
        gather_evidence(run, commitment, [tmp_path / "nowhere"], None, (), 1, 1e-2)
    (other / "more").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json"):
        gather_evidence(run, commitment, [other / "more"], None, (), 1, 1e-2)
    shards = next(file for file in elsewhere.rglob("*") if file.is_file() and file.name != MANIFEST)
    shards.write_bytes(shards.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="take the data again"):
        gather_evidence(run, commitment, [elsewhere], None, (), 1, 1e-2)
    with pytest.raises(UserError, match=r"--set optim.lr=1: changes what is learned"):
        gather_evidence(run, commitment, (), None, ("optim.lr=1",), 1, 1e-2)


def test_a_log_grows_and_cannot_be_changed(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    late = run / "checkpoints/step-6"
    late.rename(run / "later")
    first = publish(run, log)
    (run / "later").rename(late)
    assert [leaf.name for leaf in publish(run, log)] == ["6"] and publish(run, log) == ()
    whole = log.read_text()
    assert len(read_commitment(log).entries) == 2 and len(first) == 5
    for old, new in (("checkpoint", "data"), ('"number": 0', '"number": 1'), ("0", "1"),
                     ('"number": 0', '"number": Infinity'), ('"name": "4"', '"name": "2"')):
        log.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match="is no log"):
            read_commitment(log)
    log.write_text(whole)
    changed = json.loads((late / MANIFEST).read_text()) | {"created_s": 1.0, "sha256": ""}
    (late / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(UserError, match="a checkpoint that was published cannot change"):
        publish(run, log)
    with pytest.raises(UserError, match="is of the run 'audited'"):
        publish(run.rename(run.with_name("renamed")), log)


def test_a_draw_is_made_again_from_log_and_randomness(run: Path, tmp_path: Path) -> None:
    log, file = tmp_path / "log.jsonl", tmp_path / "draw.json"
    publish(run, log)
    commitment = read_commitment(log)
    assert [s.name for s in segments_of(commitment)] == ["0-2", "2-4", "4-6"]
    drawn = draw(commitment, "a", 1)
    assert {draw(commitment, str(i), 1).drawn[1].name for i in range(20)} == {"2-4", "4-6"}
    write_draw(file, drawn)
    assert read_draw(file, commitment) == drawn
    other = next(s for s in segments_of(commitment)[1:] if s not in drawn.drawn)
    write_draw(file, dataclasses.replace(drawn, drawn=(drawn.drawn[0], other)))
    with pytest.raises(UserError, match="is not what root"):
        read_draw(file, commitment)
    with pytest.raises(UserError, match="has 2 behind the first"):
        draw(commitment, "a", 3)
    with pytest.raises(UserError, match="must be printable text"):
        draw(commitment, "\ud800", 1)
    assert audit("draw", "--log", log, "--randomness", "a", "--output", log) == ExitCode.USER_ERROR
    assert read_commitment(log) == commitment
    # a log that has grown is another one: who drew keeps what was published then
    write_draw(file, dataclasses.replace(drawn, root="0" * 64))
    with pytest.raises(UserError, match="use the log from which it was drawn"):
        read_draw(file, commitment)


def test_the_chance_to_find_a_fraud_is_what_counting_gives() -> None:
    """Against all draws of 2 of 6, of which 2 are false."""
    draws = [(i, j) for i in range(6) for j in range(i)]
    assert chance_to_find(0.3, 2, 6) == pytest.approx(sum(min(d) < 2 for d in draws) / len(draws))
    assert chance_to_find(0.01, 1000, 1000) == 1 and chance_to_find(0.1, 0, 50) == 0
    assert chance_to_find(0.05, needed(0.05, 0.95, 1000), 1000) >= 0.95 > chance_to_find(
        0.05, needed(0.05, 0.95, 1000) - 1, 1000)
    # what the page says an audit costs
    assert needed(0.1, 0.9, 1160) + 1 == 23 <= 0.02 * 1161


def test_a_log_is_signed_in_minisigns_format(run: Path, tmp_path: Path) -> None:
    """Checked by py-minisign on its own."""
    log, key, public = (tmp_path / name for name in ("log.jsonl", "lab.key", "lab.pub"))
    pair = minisign.KeyPair.generate()
    key.write_bytes(bytes(pair.secret_key))
    public.write_bytes(bytes(pair.public_key))
    assert audit("commit", run, "--log", log, "--key", key) == ExitCode.OK
    pair.public_key.verify_file(log, minisign.Signature.from_file(f"{log}.minisig"))
    check_signature(log, public)
    log.write_text(log.read_text() + "\n")
    with pytest.raises(UserError, match="does not sign"):
        check_signature(log, public)
    with pytest.raises(UserError, match=r"lab.pub: cannot sign"):
        sign(log, public)


def test_one_line_is_proved_without_the_others(
        run: Path, token_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, proof, public = tmp_path / "log.jsonl", tmp_path / "proof.json", tmp_path / "public"
    publish(run, log)
    root = read_commitment(log).root
    shard = next(token_shards.rglob("train-*.bin"))
    assert audit("prove", shard, "--log", log, "--output", proof) == ExitCode.OK
    assert str(run) not in proof.read_text() and '"checkpoint"' not in proof.read_text()
    # who checks has the proof, the root and the file, and no log
    shutil.copy(shard, public)
    assert audit("check", proof, "--root", root, "--of", public) == ExitCode.OK
    assert f"data {token_shards} " in capsys.readouterr().out
    public.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert audit("check", proof, "--root", root, "--of", public) == ExitCode.GATE_FAILED
    assert "is not what was published as data" in capsys.readouterr().out
    assert audit("check", proof, "--root", "0" * 64) == ExitCode.GATE_FAILED
    # a folder, and a hash alone
    assert audit("prove", run / "checkpoints/step-4", "--log", log, "--output", proof) == ExitCode.OK
    assert audit("check", proof, "--root", root, "--of", run / "checkpoints/step-4") == ExitCode.OK
    assert audit("check", proof, "--root", root, "--of", run / "checkpoints/step-2") == ExitCode.GATE_FAILED
    (run / "checkpoints/step-4/state.json").write_text("{}")
    assert audit("check", proof, "--root", root, "--of", run / "checkpoints/step-4") == ExitCode.GATE_FAILED
    [settings] = read_commitment(log).find("settings")
    assert audit("prove", settings.sha256, "--log", log, "--output", proof) == ExitCode.OK
    assert audit("check", proof, "--root", root) == ExitCode.OK


def test_a_proof_of_nothing_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, proof = tmp_path / "log.jsonl", tmp_path / "proof.json"
    publish(run, log)
    for what, said in (("f" * 64, "has no line with ffff"), (str(tmp_path), "is neither a hash"),
                       (str(run / "checkpoints/step-4/none"), "is neither a hash")):
        assert audit("prove", what, "--log", log, "--output", proof) == ExitCode.USER_ERROR
        assert said in capsys.readouterr().err
    file = next((run / "checkpoints/step-4/model").rglob("*.safetensors"))
    assert audit("prove", file, "--log", log, "--output", proof) == ExitCode.OK
    whole = json.loads(proof.read_text())
    for changed in ({"manifest": "{}"}, {"index": 99}, {"path": whole["path"][:-1]}, {"path": ["x"]},
                    {"leaf": 3}, {"format": 9}):
        proof.write_text(json.dumps(whole | changed))
        assert audit("check", proof, "--root", "0" * 64) == ExitCode.USER_ERROR
        assert "is no proof of" in capsys.readouterr().err
