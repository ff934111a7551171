"""Scoring: a reward over batches of rows, and over a file of them: rows are kept as they come, and counted.

A reward runs in processes of its own, each row with a limit of time and memory, or in threads where it waits
for an endpoint.  One that hangs, or a response that makes a verifier eat the machine, costs its row alone."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_sov.base.digests import hash_file
from megatron_sov.base.documents.rows import format_json_line, read_rows
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.judge.rewards.composed import ComposedRunner, Runner
from megatron_sov.judge.rewards.registry import BUILT_IN, NOT_JUDGED, VersionedReward, build_reward
from megatron_sov.judge.rewards.reward import (
    REWARDS, Result, Reward, Row, merge_repeated_results, run_reward, to_result)
from megatron_sov.work.processes.children import MAX_MEMORY_BYTES, limit_memory, remove_unsafe_variables
from megatron_sov.work.processes.workers import Answer, LostAnswer, Workers
from megatron_sov.work.progress.jobs import Job, local_executor, run_job

TIME_LIMIT_S = 30.0
"""Per row, where a reward has no setting `time_limit_s`."""
NUM_FIRST_REPEATED, REPEAT_EVERY = 32, 32
"""The first rows, and one of so many behind them, are judged twice: a reward must not change by itself."""
RESPONSE_SIGNALS = frozenset((signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE,
                    signal.SIGILL))
"""Signals that end a process for what it does itself: its time of a processor is over, its stack, ..."""


def create_runner(request: PluginRequest, versioned: VersionedReward, workers: int) -> Runner:
    """Return what runs a reward.

    Args:
        request: the reward's order, from which processes make their own.
        versioned: the reward of this process.
        workers: processes; a reward that waits for an endpoint says itself how many threads it wants.
    """
    reward: Any = versioned.reward
    # parts have runners of their own: one may wait for an endpoint while another needs processes
    if versioned.parts:
        return ComposedRunner(reward,
                              {name: create_runner(*part, workers) for name, part in versioned.parts.items()})
    if hasattr(reward, "threads"):
        return ThreadRunner(reward, reward.threads)
    # a file of a user's is no module that can be found by name, and is run by each process
    modules = [type(reward).__module__, *getattr(reward, "PRELOAD", ())] if request.name in BUILT_IN else []
    if hasattr(reward, "score_group"):
        return GroupRunner(ProcessRunner(request, TIME_LIMIT_S, workers))
    # a reward that holds a model takes one process, however many were asked for
    workers = min(workers, getattr(reward, "MAX_WORKERS", workers))
    return ProcessRunner(request, getattr(reward, "time_limit_s", TIME_LIMIT_S), workers, modules,
                         getattr(reward, "VARIABLES", ()), control=getattr(reward, "CONTROL", None),
                         cpu_limit_s=getattr(reward, "cpu_limit_s", math.inf))


class ThreadRunner(Runner):
    """A reward that waits for others, in threads of this process: they share its limits of rate and cost."""

    def __init__(self, reward: Reward, threads: int) -> None:
        self._reward, self._pool = reward, ThreadPoolExecutor(threads)

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        return list(self._pool.map(lambda row: run_reward(self._reward, row), rows))


class GroupRunner(Runner):
    """Judges the responses to one prompt together, as TRL does: rewards may compare them.

    Args:
        running: judges a group as if it were a row, in the time of its rows together.
    """

    def __init__(self, running: ProcessRunner) -> None:
        self._running = running

    def __exit__(self, *error: object) -> None:
        self._running.__exit__(*error)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            # a row without a response is refused, and not its group
            key = get_prompt_key(row) if isinstance(row.get("response"), str) else ""
            groups.setdefault(key or str(i), []).append(i)
        results: dict[int, Result] = {}
        judgements = self._running.score([[dict(rows[i]) for i in places] for places in groups.values()])
        for places, result in zip(groups.values(), judgements, strict=True):
            rewards = result.components.get(REWARDS, [None] * len(places))
            without = result if result.reward is None else Result(None, "refused", {}, NOT_JUDGED)
            for i, reward in zip(places, rewards, strict=True):
                results[i] = without if reward is None else to_result(reward)
        return [results[i] for i in range(len(rows))]


def get_prompt_key(row: Row) -> str:
    """Return a text that rows of one prompt share; empty: the row has no prompt."""
    prompt = row.get("prompt", row.get("messages"))
    return "" if prompt is None else json.dumps([prompt], sort_keys=True, default=repr)


class ProcessRunner(Runner):
    """A reward in `workers` processes; a context, since processes have to end.

    Args:
        asked: which reward.
        time_limit_s: for a row.
        workers: processes.
        modules: what the reward needs and can be found by name; imported once for all processes.
        variables: of the environment that it needs, beside those of `children.SAFE_VARIABLES`.
        cpu_limit_s: of a processor, for a row; infinite: the clock alone counts.
        control: a response that takes nothing to judge: where a row passes a limit with its own response and
            not with this one, its response is worth 0; None: rows that pass a limit have no reward.
    """

    def __init__(self, request: PluginRequest, time_limit_s: float, workers: int, modules: Sequence[str] = (),
                 variables: Sequence[str] = (), *, cpu_limit_s: float = math.inf,
                 control: str | None = None) -> None:
        self._time_limit_s, self._cpu_limit_s, self._control = time_limit_s, cpu_limit_s, control
        self._workers = Workers("the reward", _start_judge, (request, tuple(variables), cpu_limit_s),
                                num=workers,
                                modules=modules)
        self._num_seen = 0

    def __exit__(self, *error: object) -> None:
        self._workers.end()

    def score(self, rows: Sequence[Any]) -> list[Result]:
        """Return the result of each row, or of each group of rows in a list."""
        results: dict[int, Result] = {}
        suspects: dict[int, Result] = {}
        late: set[int] = set()
        # (row, whether it is judged twice)
        # places count over all batches, so that a rerun judges the same rows twice
        places = range(self._num_seen, self._num_seen + len(rows))
        waiting = deque((i, (row if isinstance(row, list) else dict(row),
                             place < NUM_FIRST_REPEATED or place % REPEAT_EVERY == 0))
                        for i, (place, row) in enumerate(zip(places, rows, strict=True)))
        # `waiting` grows while answers come: a row goes back into it at most twice
        limit_s = self._time_limit_s * max((len(row) for row in rows if isinstance(row, list)), default=1)
        for i, answer in self._workers.answers(waiting, limit_s):
            is_lost = isinstance(answer, LostAnswer)
            result = self._explain_lost_answer(answer.exit_code, limit_s) if is_lost else Result(**answer)
            # the second answer for a suspect is the one to its control response
            if i in suspects:
                results[i] = _compare_with_control(suspects[i], result)
            # was it the response or the row? The same row with a harmless response says it
            elif result.spent and self._control is not None:
                suspects[i] = result
                waiting.append((i, ({**rows[i], "response": self._control}, False)))
            # the clock alone ran out: a busy machine is no fault of the response, so the row gets one more
            # chance
            elif answer == LostAnswer(None) and self._control is not None and i not in late:
                late.add(i)
                waiting.append((i, (dict(rows[i]), False)))
            else:
                results[i] = result
        self._num_seen += len(rows)
        return [results[i] for i in range(len(rows))]

    def _explain_lost_answer(self, exit_code: int | None, limit_s: float) -> Result:
        if exit_code is None:
            return Result(None, "timeout", {}, f"took longer than {limit_s:g} s")
        if exit_code == -signal.SIGPROF:
            return Result(None, "timeout", {}, f"judging took longer than {self._cpu_limit_s:g} s of a "
                                               "processor", spent=True)
        return Result(None, "failed", {}, f"the process that judged it ended (exit code {exit_code})",
                      spent=-exit_code in RESPONSE_SIGNALS)


def _compare_with_control(suspect: Result, control: Result) -> Result:
    """Return the result of a row that passed a limit, from the one that it has with an ordinary response."""
    # the row itself is too heavy to judge: nothing is known about the response
    if control.reward is None:
        return suspect
    reason = f"the response: {suspect.reason}"
    return Result(0.0, "timeout" if suspect.status == "timeout" else "scored", {"why": reason}, reason)


def _start_judge(asked: PluginRequest, variables: Sequence[str], cpu_limit_s: float) -> Answer:
    # keys of the user's environment do not reach code of a user's file
    remove_unsafe_variables(variables)
    reward = build_reward(asked)
    # before memory is limited: loading a model may need more than judging with it
    if hasattr(reward, "prepare"):
        reward.prepare()
    limit_memory(getattr(reward, "MAX_MEMORY_BYTES", MAX_MEMORY_BYTES))

    def answer(request: tuple[Row | list[Row], bool], again: Callable[[], None]) -> dict[str, Any]:
        row, twice = request
        result = _run_reward_with_limit(cpu_limit_s, reward, row)
        if twice and result.reward is not None:
            again()  # each has the whole time
            result = merge_repeated_results(result, _run_reward_with_limit(cpu_limit_s, reward, row))
        return vars(result)

    return answer


def _run_reward_with_limit(cpu_limit_s: float, reward: Any, row: Row | list[Row]) -> Result:
    """Return what a reward makes of a row; where it takes longer, the kernel ends this process, whatever
    that is doing."""
    if not math.isfinite(cpu_limit_s):
        return run_reward(reward, row)
    # ITIMER_PROF counts processor time, so that neighbours on the machine do not make a row late; SIGPROF is
    # not handled and ends the process even inside of C code
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        return run_reward(reward, row)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


MAX_EXAMPLES = 10
"""Rows without a reward that are named."""
BATCH_ROWS = 128
"""Rows that are scored together, and lost at most when the command is killed."""
T = TypeVar("T")
Batch = list[tuple[int, Row]]
"""Lines of the file, and their rows."""


@dataclass
class ScoringTally:
    """Of the verdicts that were counted."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Status -> rows."""
    num_rewards: int = 0
    """Rows that have a reward."""
    reward_sum: float = 0.0
    """Of all of them."""
    examples: list[str] = field(default_factory=list)
    """The first rows without a reward, of those that were counted with their place."""

    @property
    def mean(self) -> float | None:
        """Return the mean reward; None: no row has one."""
        return self.reward_sum / self.num_rewards if self.num_rewards else None

    def add(self, reward: float | None, status: str, reason: str = "", where: str = "") -> None:
        """Count a row; `where` it stands is examples if it has no reward."""
        self.statuses[status] += 1
        if reward is not None:
            self.num_rewards += 1
            self.reward_sum += reward
        elif where and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {status}: {reason}")

    def format_counts(self, rows: str) -> str:
        """Return the counts as commands print them, e.g. "2 failed, 7 scored rows, mean reward 0.5000".

        Args:
            rows: what the rows are, in the plural.
        """
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(self.statuses.items())) or "0"
        return f"{counts} {rows}" + ("" if self.mean is None else f", mean reward {self.mean:.4f}")


@dataclass
class ScoringSummary:
    """What became of the rows."""

    tally: ScoringTally = field(default_factory=ScoringTally)
    """Of all rows."""
    num_kept: int = 0
    """Rows that an earlier, killed command had scored."""


def score_file(request: PluginRequest, versioned: VersionedReward, source: Path, output: Path, workers: int,
               progress: Callable[[int], object], *, redo: bool = False) -> ScoringSummary:
    """Score a file that `check_rows` has passed; the output appears whole, when all rows are there.

    Args:
        request: the reward's order.
        versioned: the reward.
        source: rows.
        output: the file to make.
        workers: processes.
        progress: is called with a number of rows that are done.
        redo: begin anew where rows were scored by another reward, or are of another file.
    """
    summary, by_group = ScoringSummary(), judges_in_groups(versioned)
    batches = iter_batches(read_rows(source), lambda item: get_prompt_key(item[1]) if by_group else "")
    with create_runner(request, versioned, workers) as running:

        # the journal holds the lines of the output themselves: they are joined at the end, nothing is scored
        # again
        def score(batch: Batch) -> bytes:
            results = running.score([row for _, row in batch])
            for (line, _), result in zip(batch, results, strict=True):
                summary.tally.add(result.reward, result.status, result.reason, f"line {line}")
            return b"".join(_format_scored_row(row, result, versioned.version)
                            for (_, row), result in zip(batch, results, strict=True))

        # rows of an earlier run are counted from their lines, so that the summary is that of the whole file
        def count(batch: Batch, record: bytes) -> None:
            summary.num_kept += len(batch)
            for (line, _), raw in zip(batch, record.split(b"\n")[:-1], strict=True):
                row: dict[str, Any] = json.loads(raw)
                summary.tally.add(row["reward"], row["status"], row["reason"], f"line {line}")

        run_job(Job(made_by="megatron-sov score", output=output, items=batches, do=local_executor(score),
                    identity={"input": hash_file(source), "reward": request.name,
                              # another reward, input or batch size would mix with what a killed run left, so
                              # it is refused
                              "reward_version": versioned.version, "batch_rows": BATCH_ROWS},
                    sink=lambda journal: journal.write_payloads(output), known=count,
                    done=lambda batch: progress(len(batch))), redo=redo)
    return summary


def _format_scored_row(row: Row, result: Result, version: str) -> bytes:
    return format_json_line({**row, "reward": result.reward, "status": result.status,
                             "components": dict(result.components), "reason": result.reason,
                             "reward_version": version})


def judges_in_groups(versioned: VersionedReward) -> bool:
    """Return whether a reward, or a part of it, judges the responses to a prompt together."""
    return hasattr(versioned.reward, "score_group") or any(judges_in_groups(part) for _,
                                                           part in versioned.parts.values())


def iter_batches(items: Iterable[T], get_key: Callable[[T], str]) -> Iterator[list[T]]:
    """Yield batches of `BATCH_ROWS` items, and more until neighbours of one key are together.

    Args:
        items: rows.
        get_key: an item -> the key of its group; empty: it is in none.
    """
    batch: list[T] = []
    for item in items:
        if len(batch) >= BATCH_ROWS and (not get_key(item) or get_key(item) != get_key(batch[-1])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
