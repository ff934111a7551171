"""A run of reinforcement learning again, from its beginning or from a round on: whether the same tokens were
written, the same rewards given and the same weights learned."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.audit.drawing import Segment
from megatron_sov.audit.own_folder import make_once
from megatron_sov.audit.repeating import RepeatOutcome, compare, weights_apart
from megatron_sov.base.artifacts import damaged_files, manifest_sha256, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig
from megatron_sov.post.rl.publish import is_published
from megatron_sov.rollouts.prompts import SET_ASIDE
from megatron_sov.rollouts.rows import RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import CONFIG, ROUNDS, RunFolder
from megatron_sov.train.data.rounds import folder_of_round

REPLAYED_RUN, REPLAYED_STORE = "run", "store"
"""Of a replay's folder."""
LAYOUT_BOUND = 1e-4
"""Of `Replay.distance`, at another layout than the run's; two layouts of the tests' sizes leave 1e-5."""


@dataclass(frozen=True)
class ReplayedRound:
    """How a round differs from its replay."""

    number: int
    responses: int
    """That it has."""
    tokens: int
    """Responses of which a token is another one, or which are not there."""
    rewards: int
    """Responses of the same tokens that have another reward."""
    is_equal: bool
    """Whether what was trained of it has the same bits: tokens, log-probabilities, advantages."""


@dataclass(frozen=True)
class Replay:
    """What a replay came to."""

    run: str
    begin: int
    """First round that was written again."""
    step: int
    """Last step of both."""
    own_layout: bool
    """Whether the replay had the run's processes and layout, at which every bit has to be the same."""
    rounds: tuple[ReplayedRound, ...]
    weights: str
    """`RepeatOutcome.EQUAL`: every bit of weights, moments and counters; else `DIFFERENT`."""
    detail: str
    """What differs first, where bits do."""
    distance: float
    """|weights - weights of the run| / |weights of the run|."""

    @property
    def passed(self) -> bool:
        """Whether every token and every reward is the same, and all bits, or at another layout the weights
        within `LAYOUT_BOUND`."""
        if any(found.tokens or found.rewards for found in self.rounds):
            return False
        if self.own_layout:
            return self.weights == RepeatOutcome.EQUAL and all(found.is_equal for found in self.rounds)
        return self.distance <= LAYOUT_BOUND


def prepare_replay(run: Path, store: Path, output: Path, config: RunConfig, begin: int,
                   layout: Mapping[str, Any]) -> int:
    """Make a folder in which a run's command goes on before a round; returns the round.

    Args:
        run: the run.
        store: its rollout store.
        output: the replay's folder; one that was begun is left as it is.
        config: settings of the run.
        begin: the round; of the rounds before, the newest that a checkpoint stands before is taken.
        layout: processes and settings of the layout that were asked for, as plain JSON values.

    Raises:
        UserError: the folder holds something else, the run has not so many rounds, or its store is gone.
    """
    per_round, folder = config.rollout.steps_per_round, RunFolder(run)
    newest = checkpoints.find_checkpoint(run)
    if begin > (last := -(-checkpoints.step_of(newest) // per_round)):
        raise UserError(f"--from {begin}: the newest checkpoint of {run} is of round {last}")
    RolloutStore.open(store)
    steps = [step for path in checkpoints.complete(folder.checkpoints)
             if (step := checkpoints.step_of(path)) <= (begin - 1) * per_round and step % per_round == 0]
    first = max(steps, default=0) // per_round + 1
    if first > 1 and config.rollout.max_staleness:
        raise UserError("--from: rounds were written by policies of earlier rounds (rollout.max_staleness = "
                        f"{config.rollout.max_staleness}); replay the run from its beginning")
    make_once(output, {"run": manifest_sha256(newest), "begin": first, **layout},
              (REPLAYED_RUN, REPLAYED_STORE), lambda: _copy_before(
                  folder, store, output, first, (first - 1) * per_round) if first > 1 else None,
              what="replay", other="the replay of another run, from another round or at another layout")
    return first


def _copy_before(folder: RunFolder, store_path: Path, output: Path, first: int, step: int) -> None:
    """Copy what a run had before a round: its checkpoint, the rounds before and their responses."""
    store = RolloutStore.open(store_path)
    target = RunFolder(output / REPLAYED_RUN)
    shutil.copytree(folder.checkpoint(step), target.checkpoint(step))
    rounds = folder.path / ROUNDS
    for path in rounds.iterdir():
        named = path.name.partition(".")[0]
        if named.isdecimal() and int(named) >= first:
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copy
        target.path.joinpath(ROUNDS).mkdir(exist_ok=True)
        copy(path, target.path / ROUNDS / path.name)
    copied = RolloutStore.create(output / REPLAYED_STORE, store.tokenizer_digest, store.vocab_size)
    if (aside := store.path / SET_ASIDE).is_file():  # which prompts count is read before any is written
        shutil.copy(aside, copied.path)
    for number in range(1, first):
        for part in store.parts(number):
            shutil.copytree(part.path, copied.part_path(part.name))
            for version in store.versions():
                if (path := store.part_path(part.name, version)).exists():
                    shutil.copytree(path, copied.part_path(part.name, version))
    shutil.copy(folder.path / CONFIG, target.path)


def compare_replay(run: Path, store: Path, output: Path, config: RunConfig, begin: int, *,
                   own_layout: bool) -> Replay:
    """Return what a replay came to.

    Raises:
        UserError: it has not come to the end of the run, or files of either are damaged or missing.
    """
    newest = checkpoints.find_checkpoint(run)
    step = checkpoints.step_of(newest)
    mine = RunFolder(output / REPLAYED_RUN).checkpoint(step)
    if not mine.is_dir():
        raise UserError(f"{output}: the replay has no checkpoint of step {step}, the newest of {run}; give "
                        "the same command again")
    stores = RolloutStore.open(store), RolloutStore.open(output / REPLAYED_STORE)
    last = -(-step // config.rollout.steps_per_round)
    written = [number for number in range(begin, last + 1)
               if config.policy.is_on_policy(config.rollout.seed, number)]
    for folder in (folders := (run / ROUNDS, output / REPLAYED_RUN / ROUNDS)):
        for number in written:
            if not is_published(folder, number):
                raise UserError(f"{folder}: has not round {number}, of which the run has learned; give back "
                                "what was taken out")
    rounds = tuple(_compare_round(number, folders, stores) for number in written)
    found = compare(Segment(0, step), newest, mine, None, 1e-300)
    is_same = found.outcome == RepeatOutcome.EQUAL
    return Replay(str(run), begin, step, own_layout, rounds,
                  (found.outcome if is_same else RepeatOutcome.DIFFERENT).value, found.detail,
                  0.0 if is_same else weights_apart(mine, newest))


Rows = Mapping[tuple[str, int], tuple[Rollout, float | None]]


def _compare_round(number: int, rounds: Sequence[Path], stores: Sequence[RolloutStore]) -> ReplayedRound:
    manifests = []
    for folder in (folder_of_round(rounds_of, number) for rounds_of in rounds):
        manifests.append(manifest := read_manifest(folder, "tokens"))
        # what keep_rounds has cleared is gone, but for the hashes in its manifest
        there = [name for name in manifest.files if (folder / name).is_file()]
        if damaged := damaged_files(folder, there):
            raise UserError(f"{folder}: {damaged[0]}; give back the file that the run has learned of")
    theirs, ours = (_rows(store, made.content) for store, made in zip(stores, manifests, strict=True))
    tokens = len(ours.keys() - theirs.keys())
    rewards = 0
    for key, (row, reward) in theirs.items():
        again, judged = ours.get(key, (None, None))
        if again is None or not np.array_equal(row.tokens, again.tokens):
            tokens += 1
        elif reward != judged:
            rewards += 1
    files = [{name: record.digest for name, record in made.files.items()} for made in manifests]
    return ReplayedRound(number, len(theirs), tokens, rewards, files[0] == files[1])


def _rows(store: RolloutStore, content: Mapping[str, Any]) -> Rows:
    """Return the last attempt at each response that a round was made of, by prompt and sample, with its
    reward; other runs may have put more into the store."""
    version = str(content["reward_version"])
    found: dict[tuple[str, int], Rollout] = {}
    said: dict[tuple[str, int, int], RewardRow] = {}
    for made in content["store"]:
        name = str(made["name"])
        part = store.part_of_round(name, str(made["rollouts"]))
        for row in store.read_all(name, ("tokens", "prompt_tokens", "versions", "finish_reason"))[0]:
            place = row.key.prompt, row.key.sample
            if place not in found or row.attempt > found[place].attempt:
                found[place] = row
        if store.part_path(name, version).exists():
            said |= {(judged.key.prompt, judged.key.sample, judged.attempt): judged
                     for judged in store.read_rewards(version, name, part)}
    return {place: (row, judged.reward if (judged := said.get((*place, row.attempt))) else None)
            for place, row in found.items()}
