"""A run of reinforcement learning again, from its beginning or from a round on: whether the same tokens were
written, the same rewards given and the same weights learned."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.audit.drawing import Segment
from megatron_sov.audit.own_folder import REPLAYED_RUN, REPLAYED_STORE, make_once
from megatron_sov.audit.repeating import RepeatOutcome, compare, learned_share, weights_apart
from megatron_sov.base.artifacts import atomic_write, damaged_files, manifest_sha256, read_manifest, to_json
from megatron_sov.base.documents.shard_files import ROUTES
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.evaluate import EvaluateConfig
from megatron_sov.model.config.train import ObsConfig
from megatron_sov.post.rl.gathering import LATE, LATE_FROM
from megatron_sov.post.rl.publish import CHOSEN_BY, PROMPTS, is_published
from megatron_sov.rollouts.prompts import SET_ASIDE
from megatron_sov.rollouts.rows import RewardRow, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import (
    CHANGED, CONFIG, ROUNDS, RunFolder, TypedCommand, changed_settings, read_command, tell_changes,
    with_earlier)
from megatron_sov.runs.obs.events import EVENTS, read_events
from megatron_sov.train.data.rounds import BEHAVIOUR, SOURCE, folder_of_round

LAYOUT_BOUND = 1e-4
"""Of `Replay.distance`, at another layout than the run's; two layouts of the tests' sizes leave 1e-5."""
MOVED_BOUND = 0.1
"""Of `Replay.distance` as a share of `Replay.moved`, there too: a small learning rate moves weights by less
than the bound above. Two layouts leave 1e-6 of it in fp32."""
OF_NO_LAYOUT = (PROMPTS, CHOSEN_BY, "reward_version", "temperature", "steps", "groups", "unjudged", LATE,
                LATE_FROM)
"""Entries of a round's manifest that every layout gives."""
OF_LAYOUT = (f".{BEHAVIOUR}", f".{ROUTES}")
"""Ends of the names of its files that another layout rounds otherwise."""


@dataclass(frozen=True)
class RunStretch:
    """Steps of a run that one command and the same settings made."""

    first: int
    """From 1."""
    end: int
    """Last step."""
    config: RunConfig
    began: TypedCommand

    def changes(self, before: RunStretch) -> list[str]:
        """Return what is another setting than in the stretch before, in words."""
        return tell_changes(changed_settings(before.config, self.config))


@dataclass(frozen=True)
class ReplayedRound:
    """How a round differs from its replay."""

    number: int
    responses: int
    """That it has."""
    tokens: int
    """Responses of which a token, or one of their prompt, is another one, or which are not there."""
    rewards: int
    """Responses of the same tokens that have another reward."""
    is_equal: bool
    """Whether what was trained of it has the same bits: tokens, log-probabilities, advantages."""
    others: tuple[str, ...] = ()
    """What is another one besides: entries of its manifest, and columns, that no layout changes."""


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
    """|weights - weights of the run| / |weights of the run|; infinite: of other samples, or other tensors."""
    moved: float
    """|weights of the run - weights before| / |weights of the run|, of new adapters `learned_share`; 0 where
    all bits are equal."""

    @property
    def passed(self) -> bool:
        """Whether every token and every reward is the same, and all bits, or at another layout the weights
        within `LAYOUT_BOUND`, and within `MOVED_BOUND` of how far they moved."""
        if any(found.tokens or found.rewards or found.others for found in self.rounds):
            return False
        if self.own_layout:
            return self.weights == RepeatOutcome.EQUAL and all(found.is_equal for found in self.rounds)
        return self.distance <= min(LAYOUT_BOUND, MOVED_BOUND * self.moved)


def stretches_of(run: Path) -> list[RunStretch]:
    """Return the steps up to a run's newest checkpoint, by the commands and settings that made them.

    Raises:
        UserError: its records are damaged.
    """
    folder, file = RunFolder(run), run / EVENTS
    newest = checkpoints.find_checkpoint(run)
    config, began, end = folder.config(), read_command(run), checkpoints.step_of(newest)
    assert config is not None, f"{run} was read before"
    found: list[RunStretch] = []
    try:
        for event in reversed([e for e in read_events(file) if e["event"] == CHANGED]):
            # steps behind this one were done again, or are of an earlier start
            if (step := int(event["step"])) < end:
                found.append(RunStretch(step + 1, end, config, began))
                end = step
            config = with_earlier(config, event["was"])
            began = began if event["command"] is None else TypedCommand.of(event["command"])
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{file}: an event {CHANGED!r} is damaged ({type(e).__name__} {str(e)[:200]}); "
                        "restore the file from a copy") from None
    if end:
        found.append(RunStretch(1, end, config, began))
    return found[::-1]


def refuse_untold(run: Path, stretches: Sequence[RunStretch], begin: int) -> None:
    """Refuse a run of which steps behind one were made with other settings than its records tell, as far as
    its checkpoints and starts show that.

    Args:
        run: the run.
        stretches: of it.
        begin: the step.

    Raises:
        UserError: naming setting, both values and the round.
    """
    for path in checkpoints.complete(RunFolder(run).checkpoints):
        step = checkpoints.step_of(path)
        told = next((s.config for s in stretches if s.first <= step <= s.end), None)
        if step <= begin or told is None:
            continue
        for name, (was, now) in changed_settings(checkpoints.settings_of(path), told).items():
            raise _untold(path, name, was, now, step, told)
    end = stretches[-1].end
    for event in reversed([e for e in read_events(run / EVENTS) if e["event"] == "run_start"]):
        before = event.get("resumed_from") or 0
        if before < end and begin < end:  # else its steps were done again, or are not replayed
            stretch = next(s for s in stretches if s.first <= before + 1 <= s.end)
            for name, was, now in (("train.steps", event.get("num_steps"), stretch.config.num_steps()),
                                   ("--nproc", event.get("num_ranks"), stretch.began.processes)):
                if was is not None and was != now:
                    raise _untold(run / EVENTS, name, was, now, before + 1, stretch.config)
        end = min(end, before)


def _untold(where: Path, name: str, was: object, now: object, step: int, config: RunConfig) -> UserError:
    number = -(-step // config.rollout.steps_per_round)
    return UserError(f"{where}: step {step}, of round {number}, was made with {name} = {was}, and by the "
                     f"records of the run it is {now}: an earlier version resumed it with other settings, or "
                     f"{CONFIG} was changed; replay --from a round behind it, or put back what the run had")


def first_round(run: Path, stretches: Sequence[RunStretch], begin: int) -> int:
    """Return the first round that can be written again: the one behind the newest checkpoint between rounds.

    Args:
        run: the run.
        stretches: of it.
        begin: the round, from 1.

    Raises:
        UserError: the run has not so many rounds, was resumed with settings that nobody knows, or its rounds
            were written by policies of earlier ones.
    """
    per_round = stretches[-1].config.rollout.steps_per_round
    if begin > (last := -(-stretches[-1].end // per_round)):
        raise UserError(f"--from {begin}: the newest checkpoint of {run} is of round {last}")
    steps = [step for path in checkpoints.complete(RunFolder(run).checkpoints)
             if (step := checkpoints.step_of(path)) <= (begin - 1) * per_round and step % per_round == 0]
    step = max(steps, default=0)
    stale = max(stretch.config.rollout.max_staleness for stretch in stretches)
    if step and stale:
        raise UserError("--from: rounds were written by policies of earlier rounds (rollout.max_staleness = "
                        f"{stale}); replay the run from its beginning")
    refuse_untold(run, stretches, step)
    return step // per_round + 1


def prepare_replay(run: Path, store: Path, output: Path, stretches: Sequence[RunStretch], first: int,
                   layout: Mapping[str, Any]) -> None:
    """Make a folder in which a run's commands go on before a round.

    Args:
        run: the run.
        store: its rollout store.
        output: the replay's folder; one that was begun is left as it is.
        stretches: of the run.
        first: the round, as `first_round` gives it.
        layout: processes and settings of the layout that were asked for, as plain JSON values.

    Raises:
        UserError: the folder holds something else, or the run's store is gone.
    """
    RolloutStore.open(store)
    step = (first - 1) * stretches[-1].config.rollout.steps_per_round
    again = [stretch for stretch in stretches if stretch.end > step]
    identity = {"run": manifest_sha256(checkpoints.find_checkpoint(run)), "begin": first,
                "stretches": [[stretch.first, stretch.end, stretch.config.to_dict()] for stretch in again]}

    def make() -> None:
        for stretch in again:
            atomic_write(config_of(output, stretch), to_json(own_settings(stretch.config).to_dict()))
        if step:
            _copy_before(RunFolder(run), store, output, first, step)
        # what it goes on with is held to these settings, and the bytes of its code
        (output / REPLAYED_RUN).mkdir(exist_ok=True)
        atomic_write(output / REPLAYED_RUN / CONFIG, to_json(own_settings(again[0].config).to_dict()))

    make_once(output, identity | dict(layout), (REPLAYED_RUN, REPLAYED_STORE), make, what="replay",
              other="the replay of another run, from another round or at another layout")


def config_of(output: Path, stretch: RunStretch) -> Path:
    """Return where a replay has the settings of a stretch."""
    return output / f"settings-{stretch.end}.json"


def own_settings(config: RunConfig) -> RunConfig:
    """Return settings without what is done beside training: nobody watches a replay."""
    train = dataclasses.replace(config.train, export_every_checkpoints=0, average_last=0)
    return dataclasses.replace(config, obs=ObsConfig(), evaluate=EvaluateConfig(), train=train)


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


def compare_replay(run: Path, store: Path, output: Path, config: RunConfig, begin: int, *,
                   own_layout: bool, start: Path) -> Replay:
    """Return what a replay came to.

    Args:
        run: the run.
        store: its rollout store.
        output: the replay's folder.
        config: settings of the run.
        begin: first round that was written again.
        own_layout: see `Replay`.
        start: checkpoint that the run began from.

    Raises:
        UserError: it has not come to the end of the run, or files of either are damaged or missing.
    """
    newest = checkpoints.find_checkpoint(run)
    step = checkpoints.step_of(newest)
    mine = RunFolder(output / REPLAYED_RUN).checkpoint(step)
    if not mine.is_dir():
        raise UserError(f"{output}: the replay has no checkpoint of step {step}, the newest of {run}; give "
                        "the same command again")
    for path in (newest, mine):
        if problem := checkpoints.damage(path):
            raise UserError(f"{problem}; {checkpoints.instead_of(path)}")
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
    distance = moved = 0.0
    if not is_same:
        # of other samples, or of other tensors: no distance says anything
        distance = math.inf if found.distance < 0 else weights_apart(mine, newest)
        moved = _moved(newest, RunFolder(run).checkpoint((begin - 1) * config.rollout.steps_per_round)
                       if begin > 1 else start)
    return Replay(str(run), begin, step, own_layout, rounds,
                  (found.outcome if is_same else RepeatOutcome.DIFFERENT).value, found.detail, distance,
                  moved)


def _moved(newest: Path, before: Path) -> float:
    # adapters that began with the run
    if checkpoints.adapter_base(newest) is not None and checkpoints.adapter_base(before) is None:
        return learned_share(newest)
    return weights_apart(before, newest)


Rows = Mapping[tuple[str, int], tuple[Rollout, float | None]]


def _compare_round(number: int, rounds: Sequence[Path], stores: Sequence[RolloutStore]) -> ReplayedRound:
    manifests = []
    for folder in (folder_of_round(rounds_of, number) for rounds_of in rounds):
        manifests.append(read_manifest(folder, "tokens"))
        # what keep_rounds has cleared is gone as a whole, but for the hashes in its manifest
        if (folder / SOURCE).is_dir() and (damaged := damaged_files(folder)):
            raise UserError(f"{folder}: {damaged[0]}; give back the file that the run has learned of")
    theirs, ours = (_rows(store, made.content) for store, made in zip(stores, manifests, strict=True))
    tokens = len(ours.keys() - theirs.keys())
    rewards = 0
    for key, (row, reward) in theirs.items():
        again, judged = ours.get(key, (None, None))
        if again is None or not (np.array_equal(row.tokens, again.tokens)
                                 and np.array_equal(row.prompt_tokens, again.prompt_tokens)):
            tokens += 1
        elif reward != judged:
            rewards += 1
    files = [{name: record.digest for name, record in made.files.items()} for made in manifests]
    # an earlier version noted fewer entries
    others = [name for name in OF_NO_LAYOUT if name in manifests[0].content
              and manifests[0].content[name] != manifests[1].content.get(name)]
    others += [name for name in {**files[0], **files[1]} if not name.endswith(OF_LAYOUT)
               and files[0].get(name) != files[1].get(name)]
    return ReplayedRound(number, len(theirs), tokens, rewards, files[0] == files[1], tuple(others))


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
