"""`megatron-sov rl generate` and `rl reward`: a tiny policy generates, a later policy continues, a reward
scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.commands.rl.checks import choose_rounds
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.rounds import build_start_policy
from tests.typed_words import format_set_options

# at this temperature, samples are the most probable tokens
ROLLOUT = ("rollout.rounds=2", "rollout.prompts_per_round=2", "rollout.samples_per_prompt=2",
           "rollout.piece_prompts=1", "rollout.max_new_tokens=6", "rollout.max_prompt_tokens=64",
           "rollout.temperature=1e-4")


@pytest.fixture
def words(teacher: Path, tiny: list[str], tmp_path: Path) -> list[str]:
    """Return a command `rl generate`, with the first checkpoint of `teacher` as start, a run that does not
    exist yet, and three prompts."""
    records = [{"prompt": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(2)]
    records.append({"messages": [{"role": "user", "content": "Name a river."}], "answer": "Rhine"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return ["rl", "generate", "tiny-solar-open", *tiny, *format_set_options(ROLLOUT),
            "--prompts", str(tmp_path / "prompts.jsonl"), "--store", str(tmp_path / "store"), "--from",
            str(sorted((teacher / "checkpoints").glob("step-*"))[0]), "--run", str(tmp_path / "run")]


@pytest.mark.deep
@pytest.mark.distributed
def test_two_policies_write_two_rounds_and_a_reward_judges_them(words: list[str], teacher: Path,
                                                                run_checked: Any, tmp_path: Path,
                                                                read_output: Any) -> None:
    words = [*words, "--set", "policy.router_replay=true"]
    result = run_checked(*words, code=75)
    assert "2 parts with 4 responses" in result.stdout
    assert "round 2 waits for a policy that round 1 has trained" in result.stderr
    first, second = sorted((teacher / "checkpoints").glob("step-*"))
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-1").symlink_to(second)
    result = run_checked(*words, "--nproc", "2", "--engine-set", "parallel.ep=2")
    assert "2 parts with 4 responses" in result.stdout and "rounds 1 to 2 are written" in result.stdout
    store = RolloutStore.open(tmp_path / "store")
    prompts = {p.id: p for p in read_prompts(tmp_path / "prompts.jsonl")}
    # the second checkpoint belongs to no RL run, so its policy is identified by its manifest
    for number, checkpoint, sha256 in ((1, first, build_start_policy(first).sha256),
                                       (2, second, manifest_sha256(second))):
        rows = [row for part in store.parts(number) for row in store.read_rollouts(part.name)]
        assert len(rows) == 4 and {row.key.policy for row in rows} == {sha256}
        assert {int(v) for row in rows for v in row.versions} == {number - 1}
        greedy = _generate_greedily(run_checked, checkpoint, tmp_path / "asked.jsonl")
        for row in rows:
            assert row.record == prompts[row.key.prompt].record
            text = row.record.get("prompt") or row.record["messages"][0]["content"]
            assert (row.tokens.tolist(), row.response) == greedy[text]
            assert row.routes is not None and row.routes.shape[0] == len(row.prompt_tokens) + 5
            assert row.routes.max() < 4, "all tokens have routes to the four experts"
    judge = ["rl", "reward", "--store", str(tmp_path / "store"), "--reward", "length", "--reward-set",
             "max_length=100", "--reward-set", "buffer=50", "--workers", "1"]
    assert "4 parts, 8 scored responses" in read_output(*judge)
    assert "0 parts, 0 responses" in read_output(*judge)


def _generate_greedily(run_checked: Any, checkpoint: Path, file: Path) -> dict[str, tuple[list[int], str]]:
    """Return the greedy output of `generate` for each prompt."""
    texts = [f"What is {i} plus 1?" for i in range(2)] + ["Name a river."]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    result = run_checked("generate", str(checkpoint), "--prompts", str(file), "--chat", "--max-new-tokens",
                         "6", "--json")
    return {row["prompt"]: (row["tokens"], row["text"]) for row in json.loads(result.stdout)}


WRONG_OPTIONS = {
    "rounds": (["--rounds", "3-2"], "must be a round, or the first and the last one"),
    "later": (["--rounds", "2-9"], "--rounds 2-9: rollout.rounds = 2, and no later round"),
    "task": (["--env-set", "a=1"], "is only for --environment"),
    "limit": (["--environment", "calculator", "--limit", "max_prompt_tokens=3"],
              "is rollout.max_prompt_tokens"),
    "rollout": (["--set", "rollout.temperature=0"], "rollout.temperature = 0"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_invalid_prompts_are_reported_before_torch_is_imported(case: str, words: list[str], tmp_path: Path,
                                                               get_refusal: Any) -> None:
    more, message = WRONG_OPTIONS[case]
    assert message in get_refusal(*words, *more)
    assert not (tmp_path / "store").exists()


def test_problems_of_the_start_name_its_option(words: list[str], teacher: Path, run_checked: Any,
                                               tmp_path: Path) -> None:
    def get_refusal(*more: str) -> str:
        *notes, error = run_checked(*words, *more, code=2).stderr.splitlines()
        assert all("prompts read" in line for line in notes)
        return str(error)

    bare = tmp_path / "bare"
    shutil.copytree(teacher / "checkpoints/step-2", bare, ignore=shutil.ignore_patterns("tokenizer"))
    assert f"--from {bare}: has no tokenizer, which" in get_refusal("--from", str(bare))
    assert "--engine-set: parallel.epp: no such setting" in get_refusal("--engine-set", "parallel.epp=2")
    assert "--engine-set lora.rank=2: the adapters of" in get_refusal("--engine-set", "lora.rank=2")
    assert "rollout.max_new_tokens = 6000 make 6064 tokens, but the model has a context of" in get_refusal(
        "--set", "rollout.max_new_tokens=6000")
    assert not (tmp_path / "store").exists()


def test_other_rounds_than_those_of_the_run_are_refused(words: list[str], tmp_path: Path,
                                                        get_refusal: Any) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.declare(recipes.get("tiny-solar-open"))  # one step in a round, at temperature 1
    errors = get_refusal(*words, "--set", "rollout.steps_per_round=2")
    assert f"rollout.steps_per_round = 2: --run {run.path} trains with 1; use equal" in errors
    assert "rollout.temperature = 0.0001: --run" in errors and "rollout.rounds" not in errors
    assert not (tmp_path / "store").exists()


def test_rounds_are_named_or_all() -> None:
    assert choose_rounds("2", 9) == range(2, 3)
    assert choose_rounds("2-4", 9) == range(2, 5)
    assert choose_rounds(None, 3) == range(1, 4)
    with pytest.raises(UserError, match="there are no rounds"):
        choose_rounds(None, 0)
