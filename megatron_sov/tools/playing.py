"""Many episodes, in rounds: in each, a model writes the next turn of all that go on, and then their tools run
side by side.

A round is as long as its longest turn; an episode that ends makes place for the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Protocol

from megatron_sov.chat.turns import TurnEncoder
from megatron_sov.errors import UserError
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards.reward import Result
from megatron_sov.tools.environment import Task
from megatron_sov.tools.episode import Episode, Written, begun, left_of, take_turn, within
from megatron_sov.tools.host import EnvironmentHost
from megatron_sov.tools.journal import EpisodeLines, begin_line, result_line, turn_line
from megatron_sov.tools.limits import EpisodeLimits

STREAMS = 1 << 16
"""Streams of random numbers that an episode has, one for each turn."""


class Policy(Protocol):
    """What writes turns: a model behind an engine, or a script."""

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> Sequence[Written]:
        """Continue prompts to the end of a turn.

        Args:
            prompts: all ids of each conversation.
            max_new_tokens: longest turn.
            streams: number of each turn's stream of random numbers: the same for the same turn of the same
                episode, whatever is asked beside it.
        """
        ...


@dataclass(frozen=True)
class Table:
    """What episodes are played with."""

    asked: Order
    """The environment."""
    encoder: TurnEncoder
    """Of the model."""
    limits: EpisodeLimits
    """Of each episode."""
    parallel: int = 8
    """Episodes at a time, each with a process of its environment."""


@dataclass
class _Seat:
    """A process of the environment, and the episode that it plays."""

    host: EnvironmentHost
    episode: Episode | None = None


def play(tasks: Sequence[Task], policy: Policy, table: Table, journal: EpisodeLines,
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
    episodes = journal.episodes(tasks)
    waiting = deque(n for n in range(len(tasks)) if n not in episodes or episodes[n].result is None)
    ended(len(tasks) - len(waiting))
    with ExitStack() as stack:
        seats = [_Seat(stack.enter_context(EnvironmentHost(table.asked, table.limits)))
                 for _ in range(min(table.parallel, len(waiting)))]
        pool = stack.enter_context(ThreadPoolExecutor(max(len(seats), 1)))

        def sit(newcomer: tuple[_Seat, int]) -> Episode:
            seat, number = newcomer
            return _seated(seat, number, tasks[number], episodes.get(number), table)

        stopped = False
        while waiting or any(seat.episode for seat in seats):
            newcomers = []
            for seat in seats:
                if seat.episode is None and waiting:
                    newcomers.append((seat, waiting.popleft()))
            fresh = [episode for episode in pool.map(sit, newcomers) if episode.number not in episodes]
            journal.add([begin_line(episode) for episode in fresh])
            if not stopped:
                _round(seats, policy, table, journal, pool)
            for seat in seats:
                if seat.episode is not None and (stopped or seat.episode.result is not None):
                    ended(seat.episode.result is not None)
                    episodes[seat.episode.number], seat.episode = seat.episode, None
            stopped = stopped or should_stop()
    return [episodes[n] for n in range(len(tasks))]


def _seated(seat: _Seat, number: int, task: Task, known: Episode | None, table: Table) -> Episode:
    """Begin an episode, or go on in one that the journal knows."""
    try:
        if known is None:
            seat.episode = begun(number, task, seat.host.reset(task), table.encoder, table.limits)
        else:
            if known.turns:
                seat.host.resume(task, known.turns[-1].state)
            else:
                seat.host.reset(task)
            seat.episode = known
    except UserError as e:
        raise UserError(f"task {number + 1}: {e}") from None
    return seat.episode


def _round(seats: Sequence[_Seat], policy: Policy, table: Table, journal: EpisodeLines,
           pool: ThreadPoolExecutor) -> None:
    """Play the next turn of all episodes that go on, and score those that end."""
    playing = [(seat.host, seat.episode) for seat in seats if seat.episode is not None]
    open_ = [(host, episode) for host, episode in playing if not episode.end]
    if open_:
        left = [min(left_of(episode, table.limits), table.limits.max_turn_tokens) for _, episode in open_]
        streams = [episode.number * STREAMS + len(episode.turns) for _, episode in open_]
        found = policy.sample([episode.ids for _, episode in open_], table.limits.max_turn_tokens, streams)
        turns = pool.map(
            lambda given: take_turn(given[0][1], within(given[1], given[2]), given[0][0], table.encoder,
                                    table.limits), zip(open_, found, left, strict=True))
        for (_, episode), turn in zip(open_, turns, strict=True):
            episode.turns.append(turn)
    over = [(host, episode) for host, episode in playing if episode.end]
    for (_, episode), result in zip(over, pool.map(lambda given: scored(*given), over), strict=True):
        episode.result = result
    journal.add([*(turn_line(episode) for _, episode in open_),
                 *(result_line(episode) for _, episode in over)])


def scored(host: EnvironmentHost, episode: Episode) -> Result:
    """Return the reward of an episode that has ended, or why there is none."""
    if episode.end == "infrastructure":
        return Result(None, "failed", {}, next(call["text"] for call in episode.turns[-1].calls
                                               if call["fault"] == "infrastructure"))
    return host.score(episode.answer)


def identity_of(tasks_digest: str, version: str, limits: EpisodeLimits, model: dict[str, object],
                sampling: dict[str, object]) -> dict[str, object]:
    """Return what episodes depend on: another one of these is another set of episodes."""
    return {"tasks": tasks_digest, "environment": version, "limits": asdict(limits), "model": model,
            "sampling": sampling}
