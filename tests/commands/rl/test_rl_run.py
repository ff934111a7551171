"""`megatron-sov rl run`: a run that generates its own rounds, after a kill, at another layout, and with
another reward."""

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

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.cli import main
from megatron_sov.model.config import RolloutConfig
from megatron_sov.rollouts.rows import Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import read_events
from megatron_sov.runs.rounds import Policy, find_round_policy

sys.path.append(str(Path(__file__).parents[3] / "benchmarks/learning"))
from tasks import Exact

REWARD = Path(__file__).parents[3] / "benchmarks/learning/tasks.py"
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
    """Return `command(run, *more, store=, lot=, word=)`: `rl run` with a store next to the run."""
    def command(run: str, *more: str, store: str = "", lot: int = 1, word: str = "run") -> list[str]:
        return ["rl", word, "tiny-solar-open", *tiny, *(w for s in SETTINGS for w in ("--set", s)),
                "--prompts", str(folder / "prompts.jsonl"), "--reward", f"{REWARD}:Exact",
                "--reward-set", f"by_lot={lot}", "--from", str(teacher), "--run", str(folder / run),
                "--store", str(folder / (store or f"{run}-store")), *more]

    return command


@pytest.fixture(scope="module")
def whole(folder: Path, command: Command, run_command: Any) -> Path:
    """Return an undisturbed run of three rounds."""
    result = run_command(*command("whole", "--plain", "--workers", "1", "--set", "obs.tensorboard=true"))
    assert result.returncode == 0, result.stderr
    assert ("11 prompts read: 9 asked, 2 set aside (1 longer than rollout.max_prompt_tokens = 8, "
            "1 same as another one)") in result.stderr
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
        result = run_command(*command("killed", "--plain", "--workers", "1", "--inject", "kill@save=4",
                                      *validated(folder)))
    assert result.returncode == 0 and pids, result.stderr
    asked = f"--validation {folder / 'heldout.jsonl'}"
    assert f"{asked}: 1 of 7 prompts are also training prompts (line 7); the validation" in result.stderr
    assert (f"{asked}: 7 prompts read: 5 asked, 2 set aside (1 asked in training too, 1 longer than "
            "rollout.max_prompt_tokens") in result.stderr
    assert "began responses" not in result.stderr
    return folder / "killed"


def same_to_the_bit(ours: Path, whole: Path) -> None:
    """Check that a run generated, trained and published the same bits as the undisturbed one."""
    assert losses(ours) == losses(whole) and len(losses(whole)) == 6
    assert weights(ours) == weights(whole) and weights(whole)
    stores = [run.with_name(f"{run.name}-store") for run in (ours, whole)]
    for our_row, their_row in zip(*map(rows, stores), strict=True):
        # written by the same policies, so checkpoints are equal
        assert our_row.key == their_row.key and our_row.versions.tolist() == their_row.versions.tolist()
        assert our_row.tokens.tolist() == their_row.tokens.tolist()
        assert our_row.logprobs.tolist() == their_row.logprobs.tolist()
    published = [{name: record.digest for name, record in read_manifest(run / "rounds" / name).files.items()}
                 for run in (whole, ours) for name in ("0001", "0002", "0003")]
    assert published[:3] == published[3:]
    assert main(["inspect", str(stores[0]), "--verify"]) == 0


@pytest.mark.deep
@pytest.mark.distributed
def test_kills_with_and_without_a_checkpoint_and_validations_change_no_bit(whole: Path, killed: Path) -> None:
    assert [e["step"] for e in events(whole, "checkpoint")] == [4, 6], "not one for each round"
    # claims of a dead process are not awaited: rollout.lease_s is ten minutes
    assert [e["step"] for e in events(killed, "restart")] == [0, 4]
    same_to_the_bit(killed, whole)


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
def test_a_second_reward_scores_stored_rounds_and_a_second_run_trains_on_them(whole: Path, folder: Path,
                                                                              command: Command,
                                                                              run_command: Any) -> None:
    store = RolloutStore.open(folder / "whole-store")

    def parts() -> dict[str, str]:
        return {part.name: manifest_sha256(store.path / "rollouts" / part.name) for part in store.parts()}

    before, (first,) = parts(), store.versions()
    assert len(before) == 6
    result = run_command(*command("other", "--plain", "--workers", "1", store="whole-store", lot=2))
    assert result.returncode == 0, result.stderr
    assert parts() == before, "nothing was generated"
    (second,) = set(store.versions()) - {first}
    assert [e["reward_version"][:len(second)] for e in events(folder / "other", "round")] == [second] * 3
    assert losses(folder / "other") != losses(whole)
    assert "began responses of round 2 and does not" in result.stderr
    # a run that writes nothing itself makes the same of the same rounds
    result = run_command(*command("trained", store="whole-store", word="train"))
    assert result.returncode == 0, result.stderr
    assert losses(folder / "trained") == losses(whole) and weights(folder / "trained") == weights(whole)
    # it is the same policies, and leaves a checkpoint of each
    assert "began responses" not in result.stderr
    assert [e["step"] for e in events(folder / "trained", "checkpoint")] == [2, 4, 6]
    begun = {row.versions[row.is_written][0]: row.key.policy for row in rows(folder / "whole-store")}
    rollout = RolloutConfig(steps_per_round=2, max_staleness=1)
    outcome = find_round_policy(folder / "trained", folder / "none", 4, rollout)
    assert outcome is not None and outcome.step == 6 and set(begun) == {0, 2, 4}
    shutil.rmtree(outcome.path)
    assert find_round_policy(folder / "trained", folder / "none", 4, rollout) == Policy(
        folder / "trained/checkpoints/step-4", 4, begun[4])


@pytest.mark.deep
def test_several_rounds_at_once_replay_the_experts_of_their_tokens(folder: Path, command: Command,
                                                                   run_command: Any) -> None:
    result = run_command(*command("stale", "--plain", "--workers", "1", "--set", "rollout.max_staleness=1",
                                  "--set", "rollout.steps_per_round=1",
                                  "--set", "policy.router_replay=true", "--set", "policy.method=gspo",
                                  "--set", "train.precision=bf16"))
    assert result.returncode == 0, result.stderr
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


def test_invalid_runs_are_refused_before_work_starts(folder: Path, command: Command, teacher: Path,
                                                     capsys: Any, run_command: Any) -> None:
    def refused(*more: str) -> str:
        assert main(command("refused", *more)) == 2
        return str(capsys.readouterr().err)

    assert "add --environment" in refused("--reward", "environment", "--plain")
    assert "--reward-set by_lot=1: --reward environment copies" in refused(
        "--reward", "environment", "--environment", "calculator")
    assert "--reward-set: 'lot' must have the form key=value" in refused("--reward-set", "lot")
    result = run_command(*command("refused", "--plain", "--set", "rollout.max_prompt_tokens=1"))
    assert result.returncode == 2, result.stderr
    assert ("all 10 prompts have more tokens than rollout.max_prompt_tokens = 1, the shortest 2"
            in result.stderr)
    prompts = str(folder / "prompts.jsonl")
    assert (f"--validation {prompts}: 10 of 10 prompts are also training prompts (line 1, line 2, line 3, "
            "...); pass prompts outside --prompts") in refused("--plain", "--validation", prompts)
    assert main(command("refused", *validated(folder), word="train")) == 2
    assert "use `rl run`, or measure its checkpoints by `megatron-sov eval passk`" in capsys.readouterr().err
    assert "validation_samples" in refused("--plain", *validated(folder), "--set",
                                           "rollout.validation_temperature=0")
    words = command("refused", "--plain", "--reward", "math")
    del words[(at := words.index("--reward-set")):at + 2]
    assert main(words) == 2
    told = str(capsys.readouterr().err)
    assert " has no 'answer', which --reward math needs, and no prompt of round 1 has" in told, told
    assert "/no/python is not an executable program; set the interpreter with vLLM" in refused(
        "--plain", "--engine", "vllm", "--engine-python", "/no/python")
    assert "has no vLLM; install it" in refused(
        "--plain", "--engine", "vllm", "--engine-python", sys.executable)
    (folder / "file").touch()
    result = run_command(*command("refused", "--plain", store="file"))
    assert result.returncode == 2 and "file: is no rollout store" in result.stderr, result.stderr
    bare = folder / "bare"
    shutil.copytree(teacher / "checkpoints/step-2", bare, ignore=shutil.ignore_patterns("tokenizer"))
    result = run_command(*command("refused", "--plain", "--from", str(bare)))
    assert result.returncode == 2, result.stderr
    assert f"--from {bare}: has no tokenizer, which" in result.stderr, result.stderr
    assert not (folder / "refused").exists() and not (folder / "refused-store").exists()
