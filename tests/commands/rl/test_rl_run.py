"""`megatron-sov rl run`: a run that writes its own rounds, killed, at another layout, with another reward."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.audit.replaying import Replay, compare_replay
from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.model.config import RolloutConfig
from megatron_sov.rollouts.rows import Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import read_events
from megatron_sov.runs.rounds import Policy, policy_of_round

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from rl_reward import Exact

REWARD = Path(__file__).parents[3] / "benchmarks/rl_reward.py"
SETTINGS = ("rollout.rounds=3", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=4",
            "rollout.piece_prompts=2", "rollout.max_new_tokens=6", "rollout.max_prompt_tokens=8",
            "rollout.steps_per_round=2", "train.checkpoint_every_steps=4", "policy.method=dr_grpo",
            'data.phases=[{"name": "main", "seq_len": 32}]', "optim.lr=1e-2", "optim.warmup_steps=0",
            "train.eval_every_steps=0", "model.hidden_size=48")
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl-run")
    # one twice, and one that is too long
    asked = [*(f"{i}?" for i in range(9)), "3?", "why " * 20]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    # one too long, and one that is trained too, in other words of the same form
    held = [{"prompt": f"{i}!", "domain": "ab"[i % 2]} for i in range(5)]
    also = [{"prompt": "how " * 20}, {"messages": [{"role": "user", "content": "3?"}]}]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*held, *also]))
    return folder


@pytest.fixture(scope="module")
def command(folder: Path, teacher: Path, tiny: list[str]) -> Command:
    """Return `command(run, *more, store=, lot=, word=)`: `rl run` with a store beside the run."""
    def command(run: str, *more: str, store: str = "", lot: int = 1, word: str = "run") -> list[str]:
        return ["rl", word, "tiny-solar-open", *tiny, *(w for s in SETTINGS for w in ("--set", s)),
                "--prompts", str(folder / "prompts.jsonl"), "--reward", f"{REWARD}:Exact",
                "--reward-set", f"by_lot={lot}", "--from", str(teacher), "--run", str(folder / run),
                "--store", str(folder / (store or f"{run}-store")), *more]

    return command


@pytest.fixture(scope="module")
def whole(folder: Path, command: Command, run_command: Any) -> Path:
    """Return a run of three rounds that nothing has disturbed."""
    done = run_command(*command("whole", "--plain", "--workers", "1", "--set", "obs.tensorboard=true"))
    assert done.returncode == 0, done.stderr
    assert ("11 prompts read: 9 asked, 2 set aside (1 longer than rollout.max_prompt_tokens = 8, "
            "1 same as another one)") in done.stderr
    listed = json.loads((folder / "whole-store/set_aside.json").read_text())["prompts"]
    assert [row["place"] for row in listed] == ["line 10", "line 11"]
    return folder / "whole"


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == name]


def losses(run: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step; a killed run may have done one twice."""
    return list({e["step"]: (e["loss"], e["grad_norm"]) for e in events(run, "step")}.values())


def weights(run: Path) -> dict[str, str]:
    """Return the digests of the last step's weights."""
    return {name: record.digest for name, record in read_manifest(run / "checkpoints/step-6").files.items()
            if name.endswith(".safetensors")}


def rows(store: Path) -> list[Rollout]:
    opened = RolloutStore.open(store)
    return [row for part in opened.parts() for row in opened.read_rollouts(part.name)]


def validated(folder: Path) -> list[str]:
    """Return the arguments that validate each policy."""
    return ["--validation", str(folder / "heldout.jsonl"), "--set", "rollout.validation_every_rounds=1",
            "--set", "rollout.validation_samples=2", "--set", "rollout.validation_temperature=0.5"]


@contextmanager
def killed_while_it_writes(claim: Path) -> Iterator[list[int]]:
    """Send SIGKILL to whom a claim names, as soon as it does; give the list that its number is put in."""
    killed: list[int] = []

    def watch() -> None:
        deadline_s = time.monotonic() + 600
        while not killed and time.monotonic() < deadline_s:
            try:
                pid = json.loads(claim.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            except (FileNotFoundError, ValueError):
                time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    yield killed
    thread.join()


@pytest.fixture(scope="module")
def killed(folder: Path, command: Command, run_command: Any) -> Path:
    """Return the same run, validated, and killed while the first checkpoint is written, and while round 3
    is."""
    with killed_while_it_writes(folder / "killed-store/claims/round-0003-piece-0001/1.json") as pids:
        done = run_command(*command("killed", "--plain", "--workers", "1", "--inject", "kill@save=4",
                                    *validated(folder)))
    assert done.returncode == 0 and pids, done.stderr
    asked = f"--validation {folder / 'heldout.jsonl'}"
    assert f"{asked}: 1 of 7 prompts are asked in training too (line 7); they are left out" in done.stderr
    assert (f"{asked}: 7 prompts read: 5 asked, 2 set aside (1 asked in training too, 1 longer than "
            "rollout.max_prompt_tokens") in done.stderr
    assert "were begun by policy" not in done.stderr
    return folder / "killed"


def same_to_the_bit(ours: Path, whole: Path) -> None:
    """Check that a run has written, learned and published what the whole one has."""
    assert losses(ours) == losses(whole) and len(losses(whole)) == 6
    assert weights(ours) == weights(whole) and weights(whole)
    stores = [run.with_name(f"{run.name}-store") for run in (ours, whole)]
    for our_row, their_row in zip(*map(rows, stores), strict=True):
        # of the same policies, which no checkpoint tells apart
        assert our_row.key == their_row.key and our_row.versions.tolist() == their_row.versions.tolist()
        assert our_row.tokens.tolist() == their_row.tokens.tolist()
        assert our_row.logprobs.tolist() == their_row.logprobs.tolist()
    published = [{name: record.digest for name, record in read_manifest(run / "rounds" / name).files.items()}
                 for run in (whole, ours) for name in ("0001", "0002", "0003")]
    assert published[:3] == published[3:]
    assert main(["rl", "store", "verify", str(stores[0])]) == 0


@pytest.mark.distributed
def test_kills_with_and_without_a_checkpoint_and_validations_change_no_bit(whole: Path, killed: Path) -> None:
    assert [e["step"] for e in events(whole, "checkpoint")] == [4, 6], "not one for each round"
    # what a dead process has claimed is not waited for: rollout.lease_s is ten minutes
    assert [e["step"] for e in events(killed, "restart")] == [0, 4]
    same_to_the_bit(killed, whole)


@pytest.mark.deep
@pytest.mark.distributed
def test_kills_inside_of_rounds_and_of_a_validation_change_no_bit(whole: Path, folder: Path, command: Command,
                                                                  run_command: Any) -> None:
    """Inside of round 1, inside of round 3, and while the last policy is validated."""
    run = folder / "often"
    with killed_while_it_writes(run / "validation/claims/round-0004-piece-0000/1.json") as pids:
        done = run_command(*command("often", "--plain", "--workers", "1", "--inject",
                                    "kill@step=2,kill@step=6", *validated(folder)))
    assert done.returncode == 0 and pids, done.stderr
    assert [e["step"] for e in events(run, "restart")] == [0, 4, 6]
    same_to_the_bit(run, whole)
    assert [e["step"] for e in events(run, "validation")] == [0, 2, 4, 6], "none is done again behind a kill"


@pytest.mark.distributed
def test_each_policy_is_validated_once_under_the_runs_own_reward(killed: Path) -> None:
    told = events(killed, "validation")
    assert [e["step"] for e in told] == [0, 2, 4, 6], "no validation is done again behind a kill"
    answers = rows(killed / "validation")
    assert [(row.round, set(row.versions.tolist()), row.temperature) for row in answers] == [
        (number + 1, {2 * number}, 0.5) for number in range(4) for _ in range(10)]
    for event in told:
        own = [row for row in answers if row.round == event["round"]]
        rewards = np.array([Exact(1).score({**row.record, "response": row.response}) for row in own])
        by_prompt = rewards.reshape(5, 2)  # a prompt's samples lie together
        assert event["reward"] == pytest.approx(rewards.mean())
        # of two samples: the mean, and whether one is right
        assert [one["value"] for one in event["pass_at_k"]] == pytest.approx([
            by_prompt.mean(), by_prompt.max(axis=1).mean()])
        lot = [row.record["domain"] == "a" for row in own]
        assert event["domains"]["a"]["reward"] == pytest.approx(rewards[lot].mean())
        assert event["response_tokens"] == np.mean([len(row.tokens) for row in own])
        assert event["truncated"] == np.mean([row.finish_reason == "length" for row in own])
    sampled = events(killed, "responses")
    assert {e["step"] for e in sampled if e["of"] == "round"} == {0, 2, 4}
    assert len({row["prompt"] for row in sampled[0]["rows"]}) == 5, "the first sample of each prompt first"


@pytest.mark.deep
@pytest.mark.distributed
def test_two_processes_write_and_learn_what_one_does(whole: Path, killed: Path, folder: Path,
                                                     command: Command, run_command: Any) -> None:
    """In `make test` the replay below does it for one round, and test_rl_teachers.py for a run."""
    done = run_command(*command("ep2", "--plain", "--workers", "1", "--nproc", "2", "--set", "parallel.ep=2",
                                *validated(folder)))
    assert done.returncode == 0, done.stderr
    assert [row.tokens.tolist() for row in rows(folder / "ep2/validation")] == [
        row.tokens.tolist() for row in rows(killed / "validation")]
    for ours, theirs in zip(rows(folder / "ep2-store"), rows(folder / "whole-store"), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert np.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    assert np.allclose(losses(folder / "ep2"), losses(whole), rtol=1e-3, atol=1e-5)


def test_another_reward_judges_what_is_there_and_another_run_learns_from_it(
        whole: Path, folder: Path, command: Command, run_command: Any) -> None:
    store = RolloutStore.open(folder / "whole-store")

    def parts() -> dict[str, str]:
        return {part.name: manifest_sha256(store.path / "rollouts" / part.name)
                for part in store.parts()}

    before, (first,) = parts(), store.versions()
    assert len(before) == 6
    done = run_command(*command("other", "--plain", "--workers", "1", store="whole-store", lot=2))
    assert done.returncode == 0, done.stderr
    assert parts() == before, "nothing was generated"
    (second,) = set(store.versions()) - {first}
    assert [e["reward_version"][:len(second)] for e in events(folder / "other", "round")] == [second] * 3
    assert losses(folder / "other") != losses(whole)
    assert "responses of round 2 were begun by policy" in done.stderr
    # a run that writes nothing itself makes the same of the same rounds
    done = run_command(*command("trained", store="whole-store", word="train"))
    assert done.returncode == 0, done.stderr
    assert losses(folder / "trained") == losses(whole) and weights(folder / "trained") == weights(whole)
    # it is the same policies, and leaves a checkpoint of each
    assert "were begun by policy" not in done.stderr
    assert [e["step"] for e in events(folder / "trained", "checkpoint")] == [2, 4, 6]
    begun = {row.written_versions[0]: row.key.policy for row in rows(folder / "whole-store")}
    rollout = RolloutConfig(steps_per_round=2, max_staleness=1)
    found = policy_of_round(folder / "trained", folder / "none", 4, rollout)
    assert found is not None and found.step == 6 and set(begun) == {0, 2, 4}
    shutil.rmtree(found.path)
    assert policy_of_round(folder / "trained", folder / "none", 4, rollout) == Policy(
        folder / "trained/checkpoints/step-4", 4, begun[4])


def test_why_tells_what_a_step_has_learned_from(whole: Path, folder: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    store, told = folder / "whole-store", {}
    for step in range(1, 7):
        assert main(["rl", "why", str(whole), str(step), "--json"]) == 0
        told[step] = json.loads(capsys.readouterr().out)
    recorded = {e["step"]: e["losses"]["policy"] for e in events(whole, "step")}
    for step in (1, 3, 5):  # a round's first: nothing has moved
        assert told[step]["loss_at_start"] == pytest.approx(recorded[step], rel=1e-5, abs=1e-7)
        assert told[step]["recorded"]["losses"]["policy"] == recorded[step]
    learned = [found for step in told.values() for found in step["responses"]]
    steps = [read_manifest(whole / "rounds" / f"{n:04d}").content["steps"] for n in (1, 2, 3)]
    assert len(learned) == sum(count for of_round in steps for _, count in of_round)
    assert len({(found["part"], found["row"]) for found in learned}) == len(learned)
    for step in told.values():
        assert sum(abs(found["share"]) for found in step["responses"]) == pytest.approx(1)
    for found in learned:
        group = found["group_rewards"]
        assert found["advantage"] == pytest.approx(found["reward"] - sum(group) / len(group), abs=1e-6)
        row = RolloutStore.open(store).read_rollouts(found["part"])[found["row"]]
        assert (row.response, row.num_written) == (found["response"], found["num_tokens"])
    assert main(["rl", "why", str(whole), "3", "--count", "1"]) == 0
    assert "step 3: round 2, its step 1" in (said := capsys.readouterr().out) and " more (--count" in said

    shutil.copytree(whole, tmp_path / "broken")
    manifest = tmp_path / "broken/rounds/0001/manifest.json"
    content = json.loads(manifest.read_text())
    del content["content"]["policies"]
    manifest.write_text(json.dumps(content | {"sha256": ""}))
    shutil.copytree(store, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/rollouts/round-0001-piece-0000")
    for words, problem in (([str(whole), "7"], "has the rounds 1 to 3 of 2 steps each"),
                           ([str(folder), "1"], "so it is not a run"),
                           ([str(tmp_path / "broken"), "1"], "manifest"),
                           ([str(whole), "1", "--store", str(tmp_path / "other")],
                            "round-0001-piece-0000 is missing or is not what the round was made of")):
        assert main(["rl", "why", *words]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.distributed
def test_a_replay_comes_to_the_same_tokens_rewards_and_weights(
        whole: Path, folder: Path, teacher: Path, run_command: Any, capsys: pytest.CaptureFixture[str]
        ) -> None:
    """From the beginning, and on two processes from a round that a checkpoint stands before."""
    code = ("--reward", f"{REWARD}:Exact")

    def replayed(name: str, *words: str) -> tuple[int, dict[str, Any], str]:
        done = run_command("rl", "replay", str(whole), "--output", str(folder / name), *code, *words)
        assert done.returncode in (0, 3), done.stderr
        return done.returncode, json.loads((folder / name / "replay.json").read_text()), done.stdout

    code_, found, said = replayed("again")
    assert (code_, found["weights"]) == (0, "equal") and "moments are the same to the bit" in said
    assert [(one["number"], one["is_equal"], one["tokens"]) for one in found["rounds"]] == [
        (1, True, 0), (2, True, 0), (3, True, 0)]
    assert weights(folder / "again/run") == weights(whole)
    assert (whole / "tensorboard").is_dir() and not (folder / "again/run/tensorboard").exists()
    code_, found, _ = replayed("wide", "--from", "3", "--nproc", "2", "--set", "parallel.ep=2")
    assert (code_, found["begin"]) == (0, 3)
    assert found["distance"] < 1e-5 and not any(one["tokens"] for one in found["rounds"])

    (folder / "whole-store").rename(folder / "elsewhere")
    code_, found, _ = replayed("later", "--from", "3", "--store", str(folder / "elsewhere"))
    (folder / "elsewhere").rename(folder / "whole-store")
    assert (code_, found["weights"]) == (0, "equal")

    # a run that says of itself what it did not do, in its checkpoints too
    def with_other_seed(settings: dict[str, Any]) -> None:
        settings["rollout"]["seed"] += 1

    changed_copy(whole, folder / "edited", with_other_seed)
    done = run_command("rl", "replay", str(folder / "edited"), "--output", str(folder / "caught"),
                       "--from", "3", *code)
    [one] = json.loads((folder / "caught/replay.json").read_text())["rounds"]
    assert done.returncode == 3 and one["tokens"] > 0, done.stderr
    for words, problem in (
            (("--output", str(folder / "other")), "a file that is run is named on the command line"),
            (("--output", str(folder / "wide"), *code), "holds the replay of another run, from another"),
            (("--output", str(folder / "again"), *code, "--nproc", "2", "--set", "parallel.ep=2"),
             "or at another layout"),
            (("--output", str(folder / "other"), *code, "--from", "4"), "is of round 3"),
            (("--output", str(folder), *code), "holds something else than a replay"),
            (("--output", str(folder / "other"), *code, "--set", "optim.lr=1"), "is not of the layout")):
        done = run_command("rl", "replay", str(whole), *words)
        assert done.returncode == 2 and problem in done.stderr

    _damage_is_told(whole, folder, teacher, capsys)


def _damage_is_told(whole: Path, folder: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what is compared: bytes of a round, parts of the store, a round that is gone."""
    config = RunFolder(whole).config()

    def compared(run: Path, store: Path) -> Replay:
        return compare_replay(run, store, folder / "again", config, 1, own_layout=True, start=start)

    assert compared(whole, folder / "whole-store").passed
    shutil.copytree(whole, folder / "damaged")
    trained = folder / "damaged/rounds/0003/rollouts/train-00000.advantage.documents"
    trained.write_bytes(trained.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="give back the file that the run has learned of"):
        compared(folder / "damaged", folder / "whole-store")
    assert main(["rl", "why", str(folder / "damaged"), "5"]) == 2
    assert "advantage.documents: its content differs from the hash" in capsys.readouterr().err
    trained.unlink()
    with pytest.raises(UserError, match=r"advantage.documents: is missing"):
        compared(folder / "damaged", folder / "whole-store")
    shutil.rmtree(folder / "damaged/rounds/0003/rollouts")
    assert compared(folder / "damaged", folder / "whole-store").passed, "rollout.keep_rounds clears it so"
    assert main(["rl", "why", str(folder / "damaged"), "5"]) == 2
    assert "has its manifest alone, since rollout.keep_rounds = 2" in capsys.readouterr().err
    shutil.rmtree(folder / "damaged/rounds/0003")
    with pytest.raises(UserError, match="has not round 3"):
        compared(folder / "damaged", folder / "whole-store")
    shutil.copytree(folder / "whole-store", folder / "cut-store")
    shutil.rmtree(folder / "cut-store/rollouts/round-0002-piece-0000")
    with pytest.raises(UserError, match="round-0002-piece-0000 is missing or is not what"):
        compared(whole, folder / "cut-store")
    shutil.copytree(whole, folder / "torn")
    weights_file = next((folder / "torn/checkpoints/step-6/model").rglob("*.safetensors"))
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="its content differs from the hash in the manifest"):
        compared(folder / "torn", folder / "whole-store")


def changed_copy(run: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Copy a run, and change the settings that it tells of."""
    shutil.copytree(run, target)
    for file in (target / "config.json", *target.glob("checkpoints/*/manifest.json")):
        told = json.loads(file.read_text())
        change(told.get("settings", told))
        file.write_text(json.dumps(told | {"sha256": ""} if "settings" in told else told))
    return str(target)


def test_what_cannot_be_replayed_is_told_before_anything_is_written(
        whole: Path, tmp_path: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own, as code of one name is loaded from several places."""
    output = tmp_path / "replay"

    def refused(run: str, *words: str, reward: str = f"{REWARD}:Exact") -> str:
        done = run_command("rl", "replay", run, "--output", str(output), "--reward", reward, *words)
        assert done.returncode == 2, done.stderr
        return str(done.stderr)

    def with_deadline(settings: dict[str, Any]) -> None:
        settings["rollout"]["deadline_s"] = 5.0

    def with_code(settings: dict[str, Any]) -> None:
        settings["code"] = [{"kind": "model family", "name": "own", "reference": "/own.py:OWN", "files": {}}]

    said = refused(changed_copy(whole, tmp_path / "cut", with_deadline))
    assert "rollout.deadline_s = 5 in its steps 1 to 6, and a clock cuts responses elsewhere each" in said
    coded = changed_copy(whole, tmp_path / "coded", with_code)
    said = refused(coded)
    assert f"type `megatron-sov rl replay {coded} --output {output} --reward" in said
    assert "--plugin /own.py:OWN`" in said
    assert "/own.py: cannot be read" in refused(coded, "--plugin", "/own.py:OWN"), "it is loaded"
    assert not output.exists()

    # a reward is what the person has named from where they are, with the bytes that the run has used
    (tmp_path / "here").mkdir()
    own = REWARD.read_text()
    for text, told in ((own, f"{tmp_path}/here/moved-store: "),
                       (own.replace("< 85", "< 86"), f"and round 1 of {whole} is of version ")):
        (tmp_path / "here/rl_reward.py").write_text(text)
        monkeypatch.chdir(tmp_path / "here")
        assert told in refused(str(whole), "--store", "moved-store", reward="rl_reward.py:Exact")
    assert not output.exists()


@pytest.mark.deep
@pytest.mark.distributed
def test_a_run_that_was_resumed_with_other_settings_is_replayed_by_those_of_each_step(
        folder: Path, command: Command, run_command: Any, tmp_path: Path) -> None:
    """With adapters. In `make test` tests/audit/test_replaying.py shows which settings made which steps."""
    words = command("resumed", "--plain", "--workers", "1", "--set", "rollout.rounds=2", "--set",
                    "lora.rank=2", "--set", "rollout.steps_per_round=1")
    done = run_command(*words, "--until", "1")
    assert done.returncode == 75, done.stderr
    code = ("--reward", f"{REWARD}:Exact")
    done = run_command("resume", str(folder / "resumed"), *code, "--set", "rollout.rounds=3",
                       "--set", "train.micro_batch_size=1", "--workers", "2")
    assert done.returncode == 0, done.stderr
    done = run_command("rl", "replay", str(folder / "resumed"), "--output", str(tmp_path / "again"), *code)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "again/replay.json").read_text())
    assert found["weights"] == "equal" and all(one["is_equal"] for one in found["rounds"])
    for change in ("rollout.rounds was 2, is 3", "train.micro_batch_size was 2, is 1",
                   "--workers was 1, is 2"):
        assert f"from step 2, of round 2: {change}" in found["changes"] and change in done.stdout


def test_a_policy_may_write_several_rounds_at_once_and_its_tokens_find_their_experts_again(
        folder: Path, command: Command, run_command: Any) -> None:
    done = run_command(*command("stale", "--plain", "--workers", "1", "--set", "rollout.max_staleness=1",
                                "--set", "rollout.steps_per_round=1",
                                "--set", "policy.router_replay=true", "--set", "policy.method=gspo",
                                "--set", "train.precision=bf16"))
    assert done.returncode == 0, done.stderr
    written = rows(folder / "stale-store")
    assert [(row.round, set(row.versions.tolist())) for row in written] == [
        *[(1, {0})] * 16, *[(2, {0})] * 16, *[(3, {2})] * 16]
    assert ["write_s" in e for e in events(folder / "stale", "round")] == [True, False, True]
    for step in events(folder / "stale", "step"):
        lengths = [len(row.prompt_tokens) + len(row.tokens) for row in written if row.round == step["step"]]
        replayed = (sum(lengths) - len(lengths)) / sum(lengths)  # nobody has read a response's last token
        assert step["meters"]["replayed_routes"] == pytest.approx(replayed, abs=1e-6)
        # neither an engine that rounds in bf16 nor a policy that is a round old is a step of this one
        assert (step["meters"]["ratio"], step["meters"]["clip_share"]) == (1, 0)
        assert step["meters"]["engine_kl"] > 0


def test_what_cannot_be_run_is_told_before_anything_begins(folder: Path, command: Command, teacher: Path,
                                                           capsys: Any, run_command: Any) -> None:
    def refused(*more: str) -> str:
        assert main(command("refused", *more)) == 2
        return str(capsys.readouterr().err)

    assert "add --environment" in refused("--reward", "environment", "--plain")
    assert "--reward-set by_lot=1: --reward environment takes" in refused(
        "--reward", "environment", "--environment", "calculator")
    assert "--reward-set: 'lot' must have the form key=value" in refused("--reward-set", "lot")
    done = run_command(*command("refused", "--plain", "--set", "rollout.max_prompt_tokens=1"))
    assert done.returncode == 2, done.stderr
    assert "all 10 prompts have more tokens than rollout.max_prompt_tokens = 1, the shortest 2" in done.stderr
    prompts = str(folder / "prompts.jsonl")
    assert (f"--validation {prompts}: 10 of 10 prompts are asked in training too (line 1, line 2, line 3, "
            "...); give prompts that --prompts does not have") in refused("--plain", "--validation", prompts)
    assert main(command("refused", *validated(folder), word="train")) == 2
    assert "use `rl run`, or measure its checkpoints by `megatron-sov eval passk`" in capsys.readouterr().err
    assert "validation_samples" in refused("--plain", *validated(folder), "--set",
                                           "rollout.validation_temperature=0")
    words = command("refused", "--plain", "--reward", "math")
    del words[(at := words.index("--reward-set")):at + 2]
    assert main(words) == 2
    told = str(capsys.readouterr().err)
    assert " has no 'answer', which --reward math needs, and no prompt of round 1 has" in told, told
    assert "/no/python is no program that can be started; name the interpreter that has vLLM" in refused(
        "--plain", "--engine", "vllm", "--engine-python", "/no/python")
    assert "has no vLLM; name the" in refused(
        "--plain", "--engine", "vllm", "--engine-python", sys.executable)
    (folder / "file").touch()
    done = run_command(*command("refused", "--plain", store="file"))
    assert done.returncode == 2 and "file: is no rollout store" in done.stderr, done.stderr
    bare = folder / "bare"
    shutil.copytree(teacher / "checkpoints/step-2", bare, ignore=shutil.ignore_patterns("tokenizer"))
    done = run_command(*command("refused", "--plain", "--from", str(bare)))
    assert done.returncode == 2 and f"--from {bare}: has no tokenizer with it" in done.stderr, done.stderr
    assert not (folder / "refused").exists() and not (folder / "refused-store").exists()
