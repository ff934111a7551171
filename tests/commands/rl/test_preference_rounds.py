"""`megatron-sov rl run --set policy.method=preference`: rounds of generated pairs and groups, compared with
transformers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.convert import to_hf
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.train.data.sources import open_sources
from tests.run_files import list_losses, read_steps
from tests.typed_words import format_set_options

BETA = 0.7
SETTINGS = ("rollout.rounds=2", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=4",
            "rollout.steps_per_round=2", "rollout.piece_prompts=2", "rollout.max_new_tokens=6",
            "rollout.max_prompt_tokens=8", "rollout.temperature=1.3", "policy.method=preference",
            "policy.keep_unfinished=true", "optim.lr=1e-2", "optim.warmup_steps=0",
            'data.phases=[{"name": "main", "seq_len": 32}]', "train.eval_every_steps=0",
            "train.keep_checkpoints=0", "train.precision=fp32")
REWARD = """
from dataclasses import dataclass

@dataclass
class Early:
    threads: int  # a reward that says so is judged in this process

    def score(self, row):
        return float(sum(map(ord, row["response"])) % 3)
"""
"""Gives 0, 1 or 2, so that some of the four responses to a prompt have equal rewards."""
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}?"}}\n' for i in range(8)))
    (folder / "early.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def build_command(folder: Path, teacher: Path, tiny: list[str]) -> Command:
    """Return `command(run, *settings, store=, more=)`."""
    def build_command(run: str, *settings: str, store: str = "", more: tuple[str, ...] = ()) -> list[str]:
        every = (*SETTINGS, "model.hidden_size=48", *settings)
        return ["rl", "run", "tiny-solar-open", *tiny, *format_set_options(every), "--prompts",
                str(folder / "prompts.jsonl"), "--reward", f"{folder}/early.py:Early", "--reward-set",
                "threads=1", "--plain", "--from", str(teacher), "--run", str(folder / run), "--store",
                str(folder / (store or f"{run}-store")), *more]

    return build_command


@pytest.fixture(scope="module")
def complete_run(folder: Path, build_command: Command, run_checked: Any) -> Path:
    run_checked(*build_command("whole", f"preference.beta={BETA}"))
    return folder / "whole"


def read_documents(run: Path, number: int) -> list[list[tuple[list[int], list[bool], dict[str, float]]]]:
    """Return the documents of each step of a round: tokens, mask of learned tokens, and values of columns
    such as "advantage"."""
    path = run / f"rounds/{number:04d}"
    [source] = open_sources({str(path): 1.0}, 368, ("rollouts",))
    shard, rows = source.open_split("train"), []
    for document, length in enumerate(np.asarray(shard.lengths[np.arange(len(shard.lengths))]).tolist()):
        columns = {name: float(shard.column(name, document, length - 1, 1)[0])
                   for name in shard.columns if name != "behaviour_logprobs"}
        rows.append((shard.tokens(document, 0, length).tolist(),
                     (shard.loss_weights(document, 0, length) > 0).tolist(), columns))
    return [rows[first:first + count] for first, count in read_manifest(path).content["steps"]]


def read_judged_responses(store: Path, version: str,
                          number: int) -> list[list[tuple[list[int], float, bool]]]:
    """Return, for each prompt of a round, its samples as (prompt and response tokens, reward, whether the
    response ended)."""
    opened = RolloutStore.open(store)
    groups: dict[str, list[tuple[int, tuple[list[int], float, bool]]]] = {}
    for part in opened.parts(number):
        rewards = {row.key: row.reward for row in opened.read_rewards(version, part.name)
                   if row.reward is not None}
        for row in opened.read_rollouts(part.name):
            tokens = [*row.prompt_tokens.tolist(), *row.tokens.tolist()]
            response = (tokens, rewards[row.key], row.finish_reason == "stop")
            groups.setdefault(row.key.prompt, []).append((row.key.sample, response))
    # in sample order, because among equal rewards the first sample is chosen
    return [[response for _, response in sorted(group)] for group in groups.values()]


def test_a_round_has_the_best_and_the_worst_of_each_group(complete_run: Path, folder: Path) -> None:
    for number in (1, 2):
        content = read_manifest(complete_run / f"rounds/{number:04d}").content
        expected = []
        for group in read_judged_responses(folder / "whole-store", content["reward_version"], number):
            rewards = [reward for _, reward, _ in group]
            if max(rewards) > min(rewards):
                # Chosen: the first best response that ended, else the first best. Rejected: the first worst.
                best = [(tokens, ended) for tokens, reward, ended in group if reward == max(rewards)]
                chosen = next((tokens for tokens, ended in best if ended), best[0][0])
                rejected = next(tokens for tokens, reward, _ in group if reward == min(rewards))
                expected.append([chosen, rejected])
        samples = [document for step in read_documents(complete_run, number) for document in step]
        pairs = [[samples[i][0], samples[i + 1][0]] for i in range(0, len(samples), 2)]
        assert sorted(pairs) == sorted(expected)
        assert [columns["advantage"] for _, _, columns in samples] == [1.0, -1.0] * (len(samples) // 2)
        assert content["groups"]["learns"] == len(expected) > 1


def compute_reference_logprobs(run: Path, step: int, documents: list[Any], start: Path, folder: Path
                               ) -> tuple[np.ndarray, np.ndarray]:
    """Return each document's sum of log-probabilities of learned tokens after `step` steps, by transformers,
    and the numbers of these tokens. `start`: run with the weights of step 0."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = run / f"checkpoints/step-{step}" if step else start / "checkpoints/step-2"
    to_hf(checkpoint, folder / f"hf-{run.name}-{step}", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder / f"hf-{run.name}-{step}", dtype=torch.float32)
    sums, counts = [], []
    for tokens, learned, _ in documents:
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None]).logits[0, :-1].double()
        labels = torch.tensor(tokens[1:])
        label_logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        sums.append(float(label_logprobs[torch.tensor(learned[1:])].sum()))
        counts.append(sum(learned))
    return np.array(sums), np.array(counts)


def compute_dpo_loss(policy: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean loss of pairs, as in TRL's DPO trainer."""
    log_ratios = policy - reference
    return float(np.mean([-math.log(1 / (1 + math.exp(-BETA * (c - r))))
                          for c, r in zip(log_ratios[0::2], log_ratios[1::2], strict=True)]))


def test_pairs_are_learned_against_the_weights_that_begin_the_round(complete_run: Path, folder: Path,
                                                                    teacher: Path) -> None:
    documents = [*read_documents(complete_run, 1), *read_documents(complete_run, 2)]
    for step in (1, 3):
        # Steps 1 and 3, counted from 0, are the second steps of their round, which began one step before.
        policy, _ = compute_reference_logprobs(complete_run, step, documents[step], teacher, folder)
        reference, _ = compute_reference_logprobs(complete_run, step - 1, documents[step], teacher, folder)
        loss = compute_dpo_loss(policy, reference)
        assert read_steps(complete_run)[step]["loss"] == pytest.approx(loss, rel=1e-3)
        assert read_steps(complete_run)[step]["meters"]["margin"] != 0
    assert [read_steps(complete_run)[i]["loss"] for i in (0, 2)] == pytest.approx([math.log(2)] * 2, rel=1e-6)
    # one schedule over the whole run
    rates = [e["lr"] for e in read_steps(complete_run)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) > 2


@pytest.mark.deep
def test_pairs_are_learned_against_the_start_of_the_run(complete_run: Path, folder: Path, teacher: Path,
                                                        build_command: Command, run_checked: Any) -> None:
    run_checked(*build_command("fixed", f"preference.beta={BETA}", "policy.reference=run",
                               store="whole-store"))
    run = folder / "fixed"
    documents = read_documents(run, 2)[1]
    policy, _ = compute_reference_logprobs(run, 3, documents, teacher, folder)
    reference, _ = compute_reference_logprobs(run, 0, documents, teacher, folder)
    assert read_steps(run)[3]["loss"] == pytest.approx(compute_dpo_loss(policy, reference), rel=1e-3)
    # in round 1, start of the round and start of the run are the same weights
    assert list_losses(run)[1] == pytest.approx(list_losses(complete_run)[1], rel=1e-5)


@pytest.mark.parametrize("method", ["simper", "grouper"])
def test_inverse_perplexities_of_pairs_and_groups(method: str, complete_run: Path, folder: Path,
                                                  teacher: Path, build_command: Command,
                                                  run_checked: Any) -> None:
    run_checked(*build_command(method, f"preference.method={method}", "rollout.rounds=1",
                               store="whole-store"))
    run = folder / method
    for step, documents in enumerate(read_documents(run, 1)):
        sums, counts = compute_reference_logprobs(run, step, documents, teacher, folder)
        inverse = np.exp(sums / counts)
        if method == "simper":
            expected = float(np.mean(inverse[1::2] - inverse[0::2]))
        else:
            advantages, shares = (np.array([columns[name] for _, _, columns in documents])
                                  for name in ("advantage", "group_share"))
            assert (shares == 0.25).all() and {-1.0, 1.0} < set(advantages) | {0.5}
            expected = float(-(advantages * inverse * shares).sum() / shares.sum())
        assert read_steps(run)[step]["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.each(("settings", "message"), [
    (("data.phases.0.seq_len=16",), "a row must hold a whole pair of responses, up to 2 x ("),
    (("policy.kl=k3", "policy.kl_coeff=0.1"),
     'policy.kl = "k3" has no effect with policy.method = "preference"'),
    (("policy.method=gspo",), 'keep_unfinished = true has no effect with policy.method = "gspo"'),
])
def test_impossible_runs_are_refused_before_work_starts(settings: tuple[str, ...], message: str, folder: Path,
                                                        build_command: Command, get_refusal: Any) -> None:
    assert message in get_refusal(*build_command("refused", *settings))
    assert not (folder / "refused").exists()
