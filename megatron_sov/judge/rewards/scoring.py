"""Score batches of rows and files; results are journaled and counted.

A reward runs in child processes with time and memory limits per row, or in threads if it waits for an
endpoint. A hanging reward, or a response that exhausts a verifier's memory, affects a single row.
"""

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
"""Time per row for rewards without `time_limit_s`, in seconds."""
NUM_FIRST_REPEATED, REPEAT_EVERY = 32, 32
"""The first rows, and every 32nd row after them, are judged twice to detect random rewards."""
RESPONSE_SIGNALS = frozenset((signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE,
                              signal.SIGILL))
"""Signals that the judged response can cause: processor time, stack overflow, ..."""


def create_runner(request: PluginRequest, versioned: VersionedReward, workers: int) -> Runner:
    """Create a runner for a reward.

    Args:
        request: request from which child processes build the reward.
        versioned: the reward in this process.
        workers: processes; rewards with endpoints define their own number of threads.
    """
    reward: Any = versioned.reward
    # Parts have their own runners: one may wait for an endpoint while another needs processes.
    if versioned.parts:
        return ComposedRunner(reward,
                              {name: create_runner(*part, workers) for name, part in versioned.parts.items()})
    if hasattr(reward, "threads"):
        return ThreadRunner(reward, reward.threads)
    # Files from users are not importable by name; each process executes them.
    modules = [type(reward).__module__, *getattr(reward, "PRELOAD", ())] if request.name in BUILT_IN else []
    if hasattr(reward, "score_group"):
        return GroupRunner(ProcessRunner(request, TIME_LIMIT_S, workers))
    # A reward that holds a model uses a single process.
    workers = min(workers, getattr(reward, "MAX_WORKERS", workers))
    return ProcessRunner(request, getattr(reward, "time_limit_s", TIME_LIMIT_S), workers, modules,
                         getattr(reward, "VARIABLES", ()), control=getattr(reward, "CONTROL", None),
                         cpu_limit_s=getattr(reward, "cpu_limit_s", math.inf))


class ThreadRunner(Runner):
    """Runs a reward in threads with common rate and cost limits."""

    def __init__(self, reward: Reward, threads: int) -> None:
        self._reward, self._pool = reward, ThreadPoolExecutor(threads)

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        return list(self._pool.map(lambda row: run_reward(self._reward, row), rows))


class GroupRunner(Runner):
    """Scores the responses to a prompt together, like TRL, for comparing rewards.

    Args:
        running: runner that judges a group like a row, within the rows' total time.
    """

    def __init__(self, running: "ProcessRunner") -> None:
        self._running = running

    def __exit__(self, *error: object) -> None:
        self._running.__exit__(*error)

    def score(self, rows: Sequence[Row]) -> list[Result]:
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            # A row without a response is refused alone.
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
    """Return a text shared by rows with the same prompt; "" without a prompt."""
    prompt = row.get("prompt", row.get("messages"))
    return "" if prompt is None else json.dumps([prompt], sort_keys=True, default=repr)


class ProcessRunner(Runner):
    """Runs a reward in `workers` processes.

    Args:
        request: the reward.
        time_limit_s: clock time per row.
        workers: processes.
        modules: importable modules to load once for all processes.
        variables: environment variables in addition to `children.SAFE_VARIABLES`.
        cpu_limit_s: processor time per row; infinite: only the clock counts.
        control: harmless response. If a row exceeds a limit with its own response but not with this one, its
            response scores 0. None: rows beyond a limit have no reward.
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
        """Return the result for each row, or for each group in a list."""
        results: dict[int, Result] = {}
        suspects: dict[int, Result] = {}
        late: set[int] = set()
        # (row, whether to judge twice). Places count over all batches, so that reruns judge the same rows
        # twice.
        places = range(self._num_seen, self._num_seen + len(rows))
        waiting = deque((i, (row if isinstance(row, list) else dict(row),
                             place < NUM_FIRST_REPEATED or place % REPEAT_EVERY == 0))
                        for i, (place, row) in enumerate(zip(places, rows, strict=True)))
        # `waiting` grows during iteration: rows return to the queue at most twice.
        limit_s = self._time_limit_s * max((len(row) for row in rows if isinstance(row, list)), default=1)
        for i, answer in self._workers.answers(waiting, limit_s):
            is_lost = isinstance(answer, LostAnswer)
            result = self._explain_lost_answer(answer.exit_code, limit_s) if is_lost else Result(**answer)
            # The second answer for a suspect belongs to its control response.
            if i in suspects:
                results[i] = _compare_with_control(suspects[i], result)
            # Response or row at fault? The same row with a harmless response decides.
            elif result.spent and self._control is not None:
                suspects[i] = result
                waiting.append((i, ({**rows[i], "response": self._control}, False)))
            # Only the clock ran out, maybe because the machine is busy, so the row is judged a second time.
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
    """Decide a row beyond a limit by the result for the `control` response."""
    # The row itself is too heavy to judge.
    if control.reward is None:
        return suspect
    reason = f"the response: {suspect.reason}"
    return Result(0.0, "timeout" if suspect.status == "timeout" else "scored", {"why": reason}, reason)


def _start_judge(reward_request: PluginRequest, variables: Sequence[str], cpu_limit_s: float) -> Answer:
    # Keys in the user's environment must not reach code from files.
    remove_unsafe_variables(variables)
    reward = build_reward(reward_request)
    # Before memory is limited, because loading a model may need more.
    if hasattr(reward, "prepare"):
        reward.prepare()
    limit_memory(getattr(reward, "MAX_MEMORY_BYTES", MAX_MEMORY_BYTES))

    def answer(request: tuple[Row | list[Row], bool], restart_limit: Callable[[], None]) -> dict[str, Any]:
        row, twice = request
        result = _run_reward_with_limit(cpu_limit_s, reward, row)
        if twice and result.reward is not None:
            restart_limit()  # each run has the full time
            result = merge_repeated_results(result, _run_reward_with_limit(cpu_limit_s, reward, row))
        return vars(result)

    return answer


def _run_reward_with_limit(cpu_limit_s: float, reward: Any, row: Row | list[Row]) -> Result:
    """Score a row; the kernel ends this process when the processor time is over."""
    if not math.isfinite(cpu_limit_s):
        return run_reward(reward, row)
    # ITIMER_PROF counts processor time, so that other processes do not make a row late. SIGPROF is unhandled
    # and ends the process even inside C code.
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        return run_reward(reward, row)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


MAX_EXAMPLES = 10
"""Rows without a reward to report."""
BATCH_ROWS = 128
"""Rows per batch, which is lost if the command is killed."""
T = TypeVar("T")
Batch = list[tuple[int, Row]]
"""(line number, row)."""


@dataclass
class ScoringTally:
    """Counts over `Result` objects."""

    statuses: Counter[str] = field(default_factory=Counter)
    """`Status` -> rows."""
    num_rewards: int = 0
    """Rows with a reward."""
    reward_sum: float = 0.0
    """Sum over all rewards."""
    examples: list[str] = field(default_factory=list)
    """Descriptions of the first rows without a reward."""

    @property
    def mean(self) -> float | None:
        """The mean reward; None without rewards."""
        return self.reward_sum / self.num_rewards if self.num_rewards else None

    def add(self, reward: float | None, status: str, reason: str = "", where: str = "") -> None:
        """Count a row; describe it by `where` if it has no reward."""
        self.statuses[status] += 1
        if reward is not None:
            self.num_rewards += 1
            self.reward_sum += reward
        elif where and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {status}: {reason}")

    def format_counts(self, rows: str) -> str:
        """Format the counts, e.g. "2 failed, 7 scored rows, mean reward 0.5000".

        Args:
            rows: plural noun.
        """
        counts = ", ".join(f"{count:,} {status}" for status, count in sorted(self.statuses.items())) or "0"
        return f"{counts} {rows}" + ("" if self.mean is None else f", mean reward {self.mean:.4f}")


@dataclass
class ScoringSummary:
    """Counts for a scored file."""

    tally: ScoringTally = field(default_factory=ScoringTally)
    """Counts over all rows."""
    num_kept: int = 0
    """Rows scored by an earlier, interrupted run."""


def score_file(request: PluginRequest, versioned: VersionedReward, source: Path, output: Path, workers: int,
               progress: Callable[[int], object], *, redo: bool = False) -> ScoringSummary:
    """Score a file checked by `check_rows`; the output appears when all rows are scored.

    Args:
        request: request for the reward.
        versioned: the reward.
        source: rows.
        output: output file.
        workers: processes.
        progress: called with the number of finished rows.
        redo: start over if an earlier run used another reward or file.
    """
    summary, by_group = ScoringSummary(), judges_in_groups(versioned)
    batches = iter_batches(read_rows(source), lambda item: get_prompt_key(item[1]) if by_group else "")
    with create_runner(request, versioned, workers) as running:

        # The journal holds output lines, which are joined at the end.
        def score(batch: Batch) -> bytes:
            results = running.score([row for _, row in batch])
            for (line, _), result in zip(batch, results, strict=True):
                summary.tally.add(result.reward, result.status, result.reason, f"line {line}")
            return b"".join(_format_scored_row(row, result, versioned.version)
                            for (_, row), result in zip(batch, results, strict=True))

        # Rows from an earlier run are counted from their lines.
        def count(batch: Batch, record: bytes) -> None:
            summary.num_kept += len(batch)
            for (line, _), raw in zip(batch, record.split(b"\n")[:-1], strict=True):
                row: dict[str, Any] = json.loads(raw)
                summary.tally.add(row["reward"], row["status"], row["reason"], f"line {line}")

        run_job(Job(made_by="megatron-sov score", output=output, items=batches, do=local_executor(score),
                    identity={"input": hash_file(source), "reward": request.name,
                              # Another reward, input or batch size would not fit the interrupted run.
                              "reward_version": versioned.version, "batch_rows": BATCH_ROWS},
                    sink=lambda journal: journal.write_payloads(output), known=count,
                    done=lambda batch: progress(len(batch))), redo=redo)
    return summary


def _format_scored_row(row: Row, result: Result, version: str) -> bytes:
    return format_json_line({**row, "reward": result.reward, "status": result.status,
                             "components": dict(result.components), "reason": result.reason,
                             "reward_version": version})


def judges_in_groups(versioned: VersionedReward) -> bool:
    """Return whether a reward, or a part, judges the responses to a prompt together."""
    return hasattr(versioned.reward, "score_group") or any(judges_in_groups(part) for _,
                                                           part in versioned.parts.values())


def iter_batches(items: Iterable[T], get_key: Callable[[T], str]) -> Iterator[list[T]]:
    """Yield batches with at least `BATCH_ROWS` items, keeping adjacent items with equal keys together.

    Args:
        items: rows.
        get_key: item -> group key; "" for no group.
    """
    batch: list[T] = []
    for item in items:
        if len(batch) >= BATCH_ROWS and (not get_key(item) or get_key(item) != get_key(batch[-1])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
