"""Play many episodes concurrently, each with its own environment process.

In every round the model writes the next turn of each active episode, then their tools run concurrently. A
finished episode makes room for the next.
"""

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
    """Return counts over finished episodes; the mean covers episodes with a reward."""
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
"""Random streams per episode, one per turn."""


class ToolPolicy(Protocol):
    """Writes turns: a model behind an engine, or a script."""

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> Sequence[GeneratedTurn]:
        """Continue each conversation to the end of a turn.

        Args:
            prompts: token ids per conversation.
            max_new_tokens: longest turn.
            streams: random stream per turn, which depends only on episode and turn, not on the batch.
        """
        ...


@dataclass(frozen=True)
class EpisodeSettings:
    """Settings for playing episodes."""

    request: PluginRequest
    """The environment."""
    encoder: TurnEncoder
    """The model's encoder."""
    limits: EpisodeLimits
    """Limits per episode."""
    parallel: int = 8
    """Concurrent episodes, each with an environment process."""


@dataclass
class _Slot:
    """An environment process with its current episode."""

    host: EnvironmentHost
    episode: Episode | None = None


def play_episodes(tasks: Sequence[Task], policy: ToolPolicy, table: EpisodeSettings, journal: EpisodeLines,
                  ended: Callable[[int], object] = lambda count: None,
                  should_stop: Callable[[], bool] = lambda: False) -> list[Episode]:
    """Play tasks to the end; return the episodes in order.

    Args:
        tasks: tasks.
        policy: writes the turns.
        table: environment, encoder, limits and parallelism.
        journal: records from an earlier run, extended by this run.
        ended: called with the number of newly finished episodes.
        should_stop: called after each round; if true, return unfinished episodes without a result, after
            opening the episodes still waiting.

    Raises:
        UserError: a task does not fit the environment, or the environment cannot be built.
    """
    episodes = journal.read_episodes(tasks)
    waiting = deque(n for n in range(len(tasks)) if n not in episodes or episodes[n].result is None)
    ended(len(tasks) - len(waiting))
    with ExitStack() as stack:
        # Processes are reused for several episodes.
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
            # Processes start concurrently.
            fresh = [episode for episode in pool.map(start_episode, newcomers)
                     if episode.number not in episodes]
            # Before the first turn, so that every journaled turn has its episode.
            journal.add([build_opening_record(episode) for episode in fresh])
            # After a stop, waiting episodes are opened and returned without a turn.
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
    """Begin an episode, or resume a known one.

    Raises:
        UserError: the task does not fit the environment, or the environment cannot be built.
    """
    try:
        if earlier is None:
            return begin(host.reset(task))
        if earlier.turns:
            # The earlier process is gone; the journal has the state after its last turn.
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
        # Engines get the longest limit and turns are cut here, so that samples do not depend on the remaining
        # tokens.
        remaining = [count_remaining_tokens(episode, table.limits) for _, episode in open_]
        # A function of episode and turn, so that a resumed run draws equal samples.
        streams = [episode.number * STREAMS_PER_EPISODE + len(episode.turns) for _, episode in open_]
        generated = policy.sample([episode.ids for _, episode in open_], table.limits.max_turn_tokens,
                                  streams)
        # Tools run concurrently across episodes, and in order within an episode.
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
    # A round is journaled before the next begins.
    journal.add([*(build_turn_record(episode) for _, episode in open_),
                 *(build_result_record(episode) for _, episode in over)])


def score_episode(host: EnvironmentHost, episode: Episode) -> Result:
    """Return a finished episode's result."""
    if episode.result is not None:  # it could not be resumed
        return episode.result
    # No reward, because the model must not learn from a broken machine.
    if episode.end == "infrastructure":
        return Result(None, "failed", {}, next(call["text"] for call in episode.turns[-1].calls
                                               if call["fault"] == "infrastructure"))
    return host.score(episode.answer)


def build_identity(tasks_digest: str, version: str, limits: EpisodeLimits, model: dict[str, object],
                   sampling: dict[str, object]) -> dict[str, object]:
    """Return the inputs that identify a set of episodes."""
    return {"tasks": tasks_digest, "environment": version, "limits": asdict(limits), "model": model,
            "sampling": sampling}
