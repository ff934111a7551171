"""Many episodes side by side, each with a process of its environment.

`play` has a model write the next turn of all that go on, and then their tools run side by side: a round is as
long as its longest turn; an episode that ends makes place for the next one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.tools.environment import EpisodeLimits, Task
from megatron_sov.judge.tools.episode import (
    Episode, EpisodeLines, GeneratedTurn, begin_episode, build_opening_record, build_result_record,
    build_turn_record, count_remaining_tokens, take_turn, truncate_turn)
from megatron_sov.judge.tools.host import EnvironmentHost, EpisodeLost, Opening


def summarize_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is counted over ended episodes; the mean is that of those with a reward."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    faults: Counter[str] = Counter()
    for row in rows:
        faults.update(row["faults"])
    return {
        "num_episodes": len(rows), "num_scored": len(rewards),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "statuses": dict(Counter(row["status"] for row in rows)),
        "ends": dict(Counter(row["end"] for row in rows)), "faults": dict(faults),
        "num_turns": sum(row["num_turns"] for row in rows),
        "num_calls": sum(row["num_calls"] for row in rows),
        "num_cut": sum(row["num_cut"] for row in rows),
        "num_turns_that_differ": sum(row["num_turns_that_differ"] for row in rows),
    }


STREAMS_PER_EPISODE = 1 << 16
"""Streams of random numbers that an episode has, one for each turn."""


class ToolPolicy(Protocol):
    """What writes turns: a model behind an engine, or a script."""

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> Sequence[GeneratedTurn]:
        """Continue prompts to the end of a turn.

        Args:
            prompts: all ids of each conversation.
            max_new_tokens: longest turn.
            streams: number of each turn's stream of random numbers: the same for the same turn of the same
                episode, whatever is asked beside it.
        """
        ...


@dataclass(frozen=True)
class EpisodeSettings:
    """What episodes are played with."""

    request: PluginRequest
    """The environment."""
    encoder: TurnEncoder
    """Of the model."""
    limits: EpisodeLimits
    """Of each episode."""
    parallel: int = 8
    """Episodes at a time, each with a process of its environment."""


@dataclass
class _Slot:
    """A process of the environment, and the episode that it plays."""

    host: EnvironmentHost
    episode: Episode | None = None


def play_episodes(tasks: Sequence[Task], policy: ToolPolicy, table: EpisodeSettings, journal: EpisodeLines,
         ended: Callable[[int], object] = lambda count: None,
         should_stop: Callable[[], bool] = lambda: False) -> list[Episode]:
    """Return the episodes of tasks, in order, each played to its end.

    Args:
        tasks: what is to be done.
        policy: writes the turns.
        table: what is played with.
        journal: what was played before, and where this is kept.
        ended: is told how many more episodes have ended.
        should_stop: asked behind each round: whether all that go on are given back as they are, without a
            result; those that have not begun are begun, and no more.

    Raises:
        UserError: a task is none of this environment's, or the environment cannot be made.
    """
    episodes = journal.read_episodes(tasks)
    waiting = deque(n for n in range(len(tasks)) if n not in episodes or episodes[n].result is None)
    ended(len(tasks) - len(waiting))
    with ExitStack() as stack:
        # processes are started once and serve one episode after the other
        slots = [_Slot(stack.enter_context(EnvironmentHost(table.request, table.limits)))
                 for _ in range(min(table.parallel, len(waiting)))]
        pool = stack.enter_context(ThreadPoolExecutor(max(len(slots), 1)))

        def start_episode(newcomer: tuple[_Slot, int]) -> Episode:
            seat, number = newcomer
            seat.episode = resume_or_begin(
                seat.host, number, tasks[number], episodes.get(number),
                lambda opening: begin_episode(number, tasks[number], opening, table.encoder, table.limits))
            return seat.episode

        stopped = False
        while waiting or any(seat.episode for seat in slots):
            newcomers = []
            for seat in slots:
                if seat.episode is None and waiting:
                    newcomers.append((seat, waiting.popleft()))
            # processes start side by side
            fresh = [episode for episode in pool.map(start_episode, newcomers)
                     if episode.number not in episodes]
            # before the first turn is asked for: a turn in the journal always finds its episode
            journal.add([build_opening_record(episode) for episode in fresh])
            # where the play is to stop, waiting tasks are still begun, and come back without a turn
            if not stopped:
                _play_round(slots, policy, table, journal, pool)
            for seat in slots:
                if seat.episode is not None and (stopped or seat.episode.result is not None):
                    ended(seat.episode.result is not None)
                    episodes[seat.episode.number], seat.episode = seat.episode, None
            stopped = stopped or should_stop()
    return [episodes[n] for n in range(len(tasks))]


def resume_or_begin(host: EnvironmentHost, number: int, task: Task, earlier: Episode | None,
            begin: Callable[[Opening], Episode]) -> Episode:
    """Return an episode that begins in an environment, or goes on there where it is known.

    Raises:
        UserError: the task is none of the environment's, or the environment cannot be made.
    """
    try:
        if earlier is None:
            return begin(host.reset(task))
        if earlier.turns:
            # the process of the run before is gone; the journal has the state behind its last turn
            try:
                host.resume(task, earlier.turns[-1].state)
            except EpisodeLost as e:
                earlier.result = Result(None, "failed", {}, str(e))
        elif host.reset(task) != earlier.opening:
            earlier.result = Result(None, "failed", {}, "the environment asks something else than before")
        return earlier
    except UserError as e:
        raise UserError(f"task {number + 1}: {e}") from None


def _play_round(slots: Sequence[_Slot], policy: ToolPolicy, table: EpisodeSettings, journal: EpisodeLines,
           pool: ThreadPoolExecutor) -> None:
    playing = [(seat.host, seat.episode) for seat in slots if seat.episode is not None]
    open_ = [(host, episode) for host, episode in playing if not episode.end]
    if open_:
        # the engine is asked for the longest turn, and each is cut here: so samples do not depend on what is
        # left
        remaining = [count_remaining_tokens(episode, table.limits) for _, episode in open_]
        # a function of episode and turn: a resumed play draws the same
        streams = [episode.number * STREAMS_PER_EPISODE + len(episode.turns) for _, episode in open_]
        generated = policy.sample([episode.ids for _, episode in open_], table.limits.max_turn_tokens,
                                  streams)
        # tools of different episodes run at the same time, those of one in order
        turns = pool.map(
            lambda given: take_turn(given[0][1], given[0][1].extend_turn(truncate_turn(given[1], given[2])),
                                    given[0][0],
                                    table.encoder, table.limits), zip(open_, generated, remaining,
                                                                      strict=True))
        for (_, episode), turn in zip(open_, turns, strict=True):
            episode.turns.append(turn)
    over = [(host, episode) for host, episode in playing if episode.end]
    for (_, episode), result in zip(over, pool.map(lambda given: score_episode(*given), over), strict=True):
        episode.result = result
    # all lines of a round are kept before the next one begins
    journal.add([*(build_turn_record(episode) for _, episode in open_),
                 *(build_result_record(episode) for _, episode in over)])


def score_episode(host: EnvironmentHost, episode: Episode) -> Result:
    """Return the reward of an episode that has ended, or why there is none."""
    if episode.result is not None:  # it could not be continued
        return episode.result
    # a broken machine must not be learned from: no reward
    if episode.end == "infrastructure":
        return Result(None, "failed", {}, next(call["text"] for call in episode.turns[-1].calls
                                               if call["fault"] == "infrastructure"))
    return host.score(episode.answer)


def build_identity(tasks_digest: str, version: str, limits: EpisodeLimits, model: dict[str, object],
                sampling: dict[str, object]) -> dict[str, object]:
    """Return what episodes depend on: another one of these is another set of episodes."""
    return {"tasks": tasks_digest, "environment": version, "limits": asdict(limits), "model": model,
            "sampling": sampling}
