"""`megatron-sov rl train`: rounds that arrive during training, a killed run that resumes, and refusals."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.cli import main
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.model.config import RolloutConfig
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.obs.events import read_events
from megatron_sov.runs.rounds import find_round_policy
from tests.run_files import read_run_events, read_weight_digests
from tests.typed_words import format_set_options

ROLLOUT = RolloutConfig(rounds=3, prompts_per_round=4, samples_per_prompt=4, steps_per_round=2,
                        piece_prompts=2, max_new_tokens=12, max_prompt_tokens=6, temperature=0.8)
SETTINGS = ("rollout.rounds=3", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=4",
            "rollout.steps_per_round=2", "rollout.piece_prompts=2", "rollout.max_new_tokens=12",
            "rollout.max_prompt_tokens=6", "rollout.temperature=0.8", "policy.method=dapo", "policy.kl=k3",
            "policy.max_gen_batches=1",
            "policy.kl_coeff=0.1", "policy.correction=token_truncate", "policy.correction_high=2",
            "policy.knowledge_coeff=0.1", "policy.knowledge_share=0.5", "policy.knowledge_batch_size=2",
            'data.phases=[{"name": "main", "seq_len": 32}]', "model.hidden_size=48")

WORDS = format_set_options(SETTINGS)


@dataclass(frozen=True)
class Rounds:
    """Stores with rounds of scripted responses, and the command that trains on them."""

    folder: Path
    start: Path
    """Run whose weights the trained runs start from."""
    text: Path
    """Packed text for the knowledge loss."""
    write: Callable[..., None]
    """The fixture `write_round`."""

    def new_store(self, name: str) -> RolloutStore:
        """Create a store for the tokenizer of the start."""
        return RolloutStore.create(self.folder / name, tokenizer_digest(self.text / "tokenizer"), 368)

    def store(self, name: str, numbers: range) -> Path:
        """Write rounds into a store; create the store if it does not exist."""
        store = self.new_store(name)
        for number in numbers:
            self.write(store, read_prompts(self.folder / "prompts.jsonl"), ROLLOUT, number,
                       build_versioned_reward(request_reward("repetition", {})).version)
        return store.path

    def command(self, store: Path, run: str, *more: str) -> list[str]:
        """Return the command that trains a store's rounds."""
        return ["rl", "train", "tiny-solar-open", "--store", str(store), "--prompts",
                str(self.folder / "prompts.jsonl"), "--reward", "repetition", "--from", str(self.start),
                "--data", str(self.text), "--run", str(self.folder / run), *more]


@pytest.fixture(scope="module")
def rounds(teacher: Path, packed_data: Any, write_round: Callable[..., None],
           tmp_path_factory: pytest.TempPathFactory) -> Rounds:
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(9)))
    return Rounds(folder, teacher, packed_data.text, write_round)


def read_step_numbers(run: Path) -> dict[int, Any]:
    """Return the last numbers of each step; a killed run may have taken a step twice."""
    return {e["step"]: (e["loss"], e["losses"], e["grad_norm"], e["meters"], e["losses_by_source"])
            for e in read_run_events(run, "step")}


@pytest.fixture(scope="module")
def undisturbed_run(rounds: Rounds, run_checked: Any, tiny: list[str]) -> Path:
    """Return an undisturbed run over the three rounds of the store "whole"."""
    store = rounds.store("whole", range(1, 4))
    run_checked(*rounds.command(store, "undisturbed", *tiny, *WORDS, "--set",
                                "train.keep_checkpoints=0", "--set",
                                "train.checkpoint_every_steps=5"))
    return rounds.folder / "undisturbed"


@pytest.mark.essential
@pytest.mark.distributed
def test_rounds_that_come_later_and_a_kill_change_no_bit(undisturbed_run: Path, rounds: Rounds,
                                                         run_checked: Any, tiny: list[str]) -> None:
    settings = [*tiny, *WORDS]
    later = rounds.store("later", range(1, 3))
    # killed and restarted by its launcher inside of round 2; exit code 75, because round 3 is missing
    run_checked(*rounds.command(later, "disturbed", *settings, "--inject", "kill@step=4"), code=75)
    events = list(read_events(rounds.folder / "disturbed/events.jsonl"))
    assert [e["step"] for e in events if e["event"] == "restart"] == [3]
    assert "round 3 is not there yet: 2 of 2 pieces are not written yet" in json.dumps(events[-1])
    policy = find_round_policy(rounds.folder / "disturbed", rounds.start, 3, ROLLOUT)
    assert policy is not None and policy.step == 4
    rounds.store("later", range(3, 4))
    run_checked(*rounds.command(later, "disturbed", *settings, "--resume"))

    disturbed = rounds.folder / "disturbed"
    assert read_step_numbers(disturbed) == read_step_numbers(undisturbed_run)
    assert list(read_step_numbers(disturbed)) == [1, 2, 3, 4, 5, 6]
    assert read_weight_digests(disturbed, 6) == read_weight_digests(undisturbed_run, 6) != {}
    by_source = [losses for *_, losses in read_step_numbers(undisturbed_run).values()]
    assert all("rollouts" in losses for losses in by_source)
    assert 0 < sum("even" in losses or "odd" in losses for losses in by_source) < 6, (
        "text is drawn for some of the steps")
    assert [e["round"] for e in read_run_events(undisturbed_run, "round")] == [1, 2, 3]
    assert [e["name"] for e in read_run_events(undisturbed_run, "phase")] == [
        "round-0001", "round-0002", "round-0003"]
    assert {p.name for p in (undisturbed_run / "checkpoints").iterdir()} == {
        "step-2", "step-4", "step-5", "step-6"}
    _, terms, _, meters, _ = zip(*read_step_numbers(undisturbed_run).values(), strict=True)
    # the denominator of ratios is the policy at the start of a round: in its first step, all ratios are 1
    assert [abs(of_step["ratio"] - 1) < 1e-6 for of_step in meters] == [True, False] * 3
    # the reference is the start of the run, also after the weights have changed
    assert terms[0]["kl"] == pytest.approx(0, abs=1e-9) and terms[2]["kl"] > 1e-3


def test_mistakes_are_reported_before_work_starts(rounds: Rounds, tmp_path: Path, capsys: Any,
                                                  tiny: list[str]) -> None:
    def get_refusal(*more: str) -> str:
        assert main(rounds.command(tmp_path / "no store", str(tmp_path / "run"), *tiny, *more)) == 2
        return str(capsys.readouterr().err)

    assert "rollout.rounds = 0: nothing to train" in get_refusal()
    too_long = get_refusal("--set", "rollout.rounds=1", "--set", "rollout.prompts_per_round=4")
    assert "data.phases.0.seq_len = 128: a row must hold a whole response, up to" in too_long
    small = format_set_options((*SETTINGS[:8], *SETTINGS[-2:]))
    assert "rollout.prompts_per_round = 20: there are 9 prompts" in get_refusal(
        *small, "--set", "rollout.prompts_per_round=20")
    assert "--wait -1" in get_refusal(*small, "--wait", "-1")
    assert "reward 'nothing': does not exist" in get_refusal(*small, "--reward", "nothing")
    assert not (tmp_path / "run").exists()
