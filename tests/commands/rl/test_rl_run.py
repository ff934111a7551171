"""`megatron-sov rl run` generates rounds and trains on them: kills, validations, rewards, stale rounds."""

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
from megatron_sov.runs.rounds import Policy, find_round_policy
from tests.run_files import list_losses, read_run_events, read_weight_digests

sys.path.append(str(Path(__file__).parents[3] / "benchmarks/learning"))
from tasks import Exact

from tests.typed_words import format_set_options

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
    duplicate, too_long = "3?", "why " * 20
    prompts = [*(f"{i}?" for i in range(9)), duplicate, too_long]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    heldout: list[dict[str, Any]] = [{"prompt": f"{i}!", "domain": "ab"[i % 2]} for i in range(5)]
    heldout += [{"prompt": "how " * 20},  # too long
                {"messages": [{"role": "user", "content": "3?"}]}]  # a training prompt in another form
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    return folder


@pytest.fixture(scope="module")
def build_command(folder: Path, teacher: Path, tiny: list[str]) -> Command:
    """Return `command(run, *more, store=, reward_seed=, word=)`, which returns the arguments of `rl run`.

    `store` is the store's name (default: next to the run), `reward_seed` a setting of the reward, which
    rewards a third of all responses at random, and `word` "run" or "train".
    """
    def build_command(run: str, *more: str, store: str = "", reward_seed: int = 1,
                      word: str = "run") -> list[str]:
        return ["rl", word, "tiny-solar-open", *tiny, *format_set_options(SETTINGS),
                "--prompts", str(folder / "prompts.jsonl"), "--reward", f"{REWARD}:Exact",
                "--reward-set", f"by_lot={reward_seed}", "--from", str(teacher), "--run", str(folder / run),
                "--store", str(folder / (store or f"{run}-store")), *more]

    return build_command


@pytest.fixture(scope="module")
def undisturbed_run(folder: Path, build_command: Command, run_checked: Any) -> Path:
    """Return an undisturbed run of three rounds."""
    result = run_checked(*build_command("whole", "--plain", "--workers", "1", "--set",
                                        "obs.tensorboard=true"))
    assert ("11 prompts read: 9 asked, 2 set aside (1 longer than rollout.max_prompt_tokens = 8, "
            "1 same as another one)") in result.stderr
    set_aside = json.loads((folder / "whole-store/set_aside.json").read_text())["prompts"]
    assert [row["place"] for row in set_aside] == ["line 10", "line 11"]
    return folder / "whole"


def read_rows(store: Path) -> list[Rollout]:
    opened = RolloutStore.open(store)
    return [row for part in opened.parts() for row in opened.read_rollouts(part.name)]


def validation_options(folder: Path) -> list[str]:
    """Return the options for a validation of each policy."""
    return ["--validation", str(folder / "heldout.jsonl"), "--set", "rollout.validation_every_rounds=1",
            "--set", "rollout.validation_samples=2", "--set", "rollout.validation_temperature=0.5"]


@contextmanager
def kill_claim_holder(claim: Path) -> Iterator[list[int]]:
    """Send SIGKILL to the process named in a claim file when the file appears; yield a list with its id."""
    killed_pids: list[int] = []

    def kill_when_claimed() -> None:
        deadline_s = time.monotonic() + 600
        while not killed_pids and time.monotonic() < deadline_s:
            try:
                pid = json.loads(claim.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
                killed_pids.append(pid)
            except (FileNotFoundError, ValueError):
                time.sleep(0.001)

    thread = threading.Thread(target=kill_when_claimed)
    thread.start()
    yield killed_pids
    thread.join()


@pytest.fixture(scope="module")
def killed_run(folder: Path, build_command: Command, run_checked: Any) -> Path:
    """Return the run of `undisturbed_run` with validations, killed while it wrote the first checkpoint, and
    again in round 3."""
    with kill_claim_holder(folder / "killed-store/claims/round-0003-piece-0001/1.json") as pids:
        result = run_checked(*build_command("killed", "--plain", "--workers", "1", "--inject", "kill@save=4",
                                            *validation_options(folder)))
    assert pids
    option = f"--validation {folder / 'heldout.jsonl'}"
    assert f"{option}: 1 of 7 prompts are also training prompts (line 7); the validation" in result.stderr
    assert (f"{option}: 7 prompts read: 5 asked, 2 set aside (1 asked in training too, 1 longer than "
            "rollout.max_prompt_tokens") in result.stderr
    assert "began responses" not in result.stderr
    return folder / "killed"


def check_same_bits(ours: Path, undisturbed_run: Path) -> None:
    """Assert that a run generated, trained and published the same bits as the undisturbed run."""
    assert list_losses(ours) == list_losses(undisturbed_run) and len(list_losses(undisturbed_run)) == 6
    digests = read_weight_digests(undisturbed_run, 6)
    assert digests and read_weight_digests(ours, 6) == digests
    stores = [run.with_name(f"{run.name}-store") for run in (ours, undisturbed_run)]
    for row, expected_row in zip(*map(read_rows, stores), strict=True):
        assert row.key == expected_row.key and row.versions.tolist() == expected_row.versions.tolist()
        assert row.tokens.tolist() == expected_row.tokens.tolist()
        assert row.logprobs.tolist() == expected_row.logprobs.tolist()
    for name in ("0001", "0002", "0003"):
        files, expected = (read_manifest(run / "rounds" / name).files for run in (ours, undisturbed_run))
        assert {file: files[file].digest for file in files} == {
            file: expected[file].digest for file in expected}
    assert main(["inspect", str(stores[0]), "--verify"]) == 0


@pytest.mark.deep
@pytest.mark.distributed
def test_kills_with_and_without_a_checkpoint_and_validations_change_no_bit(undisturbed_run: Path,
                                                                           killed_run: Path) -> None:
    steps = [e["step"] for e in read_run_events(undisturbed_run, "checkpoint")]
    assert steps == [4, 6], "checkpoints follow every_steps, not rounds"
    # a resumed run takes over the claims of a dead process at once, without waiting for ten minutes
    assert [e["step"] for e in read_run_events(killed_run, "restart")] == [0, 4]
    check_same_bits(killed_run, undisturbed_run)


@pytest.mark.distributed
def test_each_policy_is_validated_once_under_the_runs_own_reward(killed_run: Path) -> None:
    events = read_run_events(killed_run, "validation")
    assert [e["step"] for e in events] == [0, 2, 4, 6], "a validation was repeated after a kill"
    responses = read_rows(killed_run / "validation")
    assert [(row.round, set(row.versions.tolist()), row.temperature) for row in responses] == [
        (number + 1, {2 * number}, 0.5) for number in range(4) for _ in range(10)]
    for event in events:
        rows = [row for row in responses if row.round == event["round"]]
        rewards = np.array([Exact(1).score({**row.record, "response": row.response}) for row in rows])
        by_prompt = rewards.reshape(5, 2)  # rows are sorted by prompt
        assert event["reward"] == pytest.approx(rewards.mean())
        pass_at_1, pass_at_2 = by_prompt.mean(), by_prompt.max(axis=1).mean()
        assert [entry["value"] for entry in event["pass_at_k"]] == pytest.approx([pass_at_1, pass_at_2])
        is_of_a = [row.record["domain"] == "a" for row in rows]
        assert event["domains"]["a"]["reward"] == pytest.approx(rewards[is_of_a].mean())
        assert event["response_tokens"] == np.mean([len(row.tokens) for row in rows])
        assert event["truncated"] == np.mean([row.finish_reason == "length" for row in rows])
    samples = read_run_events(killed_run, "responses")
    assert {e["step"] for e in samples if e["of"] == "round"} == {0, 2, 4}
    assert len({row["prompt"] for row in samples[0]["rows"]}) == 5, "the first samples have all prompts"


@pytest.mark.deep
def test_a_second_reward_scores_stored_rounds_and_a_second_run_trains_on_them(
        undisturbed_run: Path, folder: Path, build_command: Command, run_checked: Any) -> None:
    store = RolloutStore.open(folder / "whole-store")

    def digest_parts() -> dict[str, str]:
        return {part.name: manifest_sha256(store.path / "rollouts" / part.name) for part in store.parts()}

    digests, (first_reward,) = digest_parts(), store.versions()
    assert len(digests) == 6
    result = run_checked(*build_command("other", "--plain", "--workers", "1", store="whole-store",
                                        reward_seed=2))
    assert digest_parts() == digests, "responses were generated again"
    (second_reward,) = set(store.versions()) - {first_reward}
    rounds = read_run_events(folder / "other", "round")
    assert [e["reward_version"][:len(second_reward)] for e in rounds] == [second_reward] * 3
    assert list_losses(folder / "other") != list_losses(undisturbed_run)
    assert "began responses of round 2 and does not" in result.stderr
    # `rl train`, which generates nothing, computes the same from the same rounds
    result = run_checked(*build_command("trained", store="whole-store", word="train"))
    assert list_losses(folder / "trained") == list_losses(undisturbed_run)
    assert read_weight_digests(folder / "trained", 6) == read_weight_digests(undisturbed_run, 6)
    # its policies have the hashes of the store's policies, and each has a checkpoint
    assert "began responses" not in result.stderr
    assert [e["step"] for e in read_run_events(folder / "trained", "checkpoint")] == [2, 4, 6]
    policies = {row.versions[row.is_written][0]: row.key.policy for row in read_rows(folder / "whole-store")}
    assert set(policies) == {0, 2, 4}
    rollout = RolloutConfig(steps_per_round=2, max_staleness=1)
    policy = find_round_policy(folder / "trained", folder / "none", 4, rollout)
    assert policy is not None and policy.step == 6
    shutil.rmtree(policy.path)
    assert find_round_policy(folder / "trained", folder / "none", 4, rollout) == Policy(
        folder / "trained/checkpoints/step-4", 4, policies[4])


@pytest.mark.deep
def test_several_rounds_at_once_replay_the_experts_of_their_tokens(folder: Path, build_command: Command,
                                                                   run_checked: Any) -> None:
    run_checked(*build_command("stale", "--plain", "--workers", "1", "--set", "rollout.max_staleness=1",
                               "--set", "rollout.steps_per_round=1",
                               "--set", "policy.router_replay=true", "--set", "policy.method=gspo",
                               "--set", "train.precision=bf16"))
    rows = read_rows(folder / "stale-store")
    assert [(row.round, set(row.versions.tolist())) for row in rows] == [
        *[(1, {0})] * 16, *[(2, {0})] * 16, *[(3, {2})] * 16]
    assert ["write_s" in e for e in read_run_events(folder / "stale", "round")] == [True, False, True]
    for step in read_run_events(folder / "stale", "step"):
        lengths = [len(row.prompt_tokens) + len(row.tokens) for row in rows if row.round == step["step"]]
        # the engine has not read the last token of a response, so it has no route
        replayed = (sum(lengths) - len(lengths)) / sum(lengths)
        assert step["meters"]["replayed_routes"] == pytest.approx(replayed, abs=1e-6)
        # the denominator of ratios is the policy before the step, not the engine in bf16 or an older policy
        assert (step["meters"]["ratio"], step["meters"]["clip_share"]) == (1, 0)
        assert step["meters"]["engine_kl"] > 0


def test_invalid_runs_are_refused_before_work_starts(folder: Path, build_command: Command, teacher: Path,
                                                     capsys: Any, run_checked: Any) -> None:
    def get_refusal(*more: str) -> str:
        """Run the command with further options, and return its error."""
        assert main(build_command("refused", *more)) == 2
        return str(capsys.readouterr().err)

    assert "add --environment" in get_refusal("--reward", "environment", "--plain")
    assert "--reward-set by_lot=1: --reward environment copies" in get_refusal(
        "--reward", "environment", "--environment", "calculator")
    assert "--reward-set: 'lot' must have the form key=value" in get_refusal("--reward-set", "lot")
    result = run_checked(*build_command("refused", "--plain", "--set", "rollout.max_prompt_tokens=1"), code=2)
    assert ("all 10 prompts have more tokens than rollout.max_prompt_tokens = 1, the shortest 2"
            in result.stderr)
    prompts = str(folder / "prompts.jsonl")
    assert (f"--validation {prompts}: 10 of 10 prompts are also training prompts (line 1, line 2, line 3, "
            "...); pass prompts outside --prompts") in get_refusal("--plain", "--validation", prompts)
    assert main(build_command("refused", *validation_options(folder), word="train")) == 2
    assert "use `rl run`, or measure its checkpoints by `megatron-sov eval passk`" in capsys.readouterr().err
    assert "validation_samples" in get_refusal("--plain", *validation_options(folder), "--set",
                                           "rollout.validation_temperature=0")
    words = build_command("refused", "--plain", "--reward", "math")
    index = words.index("--reward-set")
    del words[index:index + 2]
    assert main(words) == 2
    error = str(capsys.readouterr().err)
    assert " has no 'answer', which --reward math needs, and no prompt of round 1 has" in error, error
    assert "/no/python is not an executable program; set the interpreter with vLLM" in get_refusal(
        "--plain", "--engine", "vllm", "--engine-python", "/no/python")
    assert "has no vLLM; install it" in get_refusal(
        "--plain", "--engine", "vllm", "--engine-python", sys.executable)
    (folder / "file").touch()
    result = run_checked(*build_command("refused", "--plain", store="file"), code=2)
    assert "file: is a file; --store needs a folder" in result.stderr
    without_tokenizer = folder / "bare"
    shutil.copytree(teacher / "checkpoints/step-2", without_tokenizer,
                    ignore=shutil.ignore_patterns("tokenizer"))
    result = run_checked(*build_command("refused", "--plain", "--from", str(without_tokenizer)), code=2)
    assert f"--from {without_tokenizer}: has no tokenizer, which" in result.stderr
    assert not (folder / "refused").exists() and not (folder / "refused-store").exists()
