"""Lists the parts and claims in a rollout store, and checks files, rows, keys and rewards, part by part."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.base.figures import format_size
from megatron_sov.rollouts.rows import UNFINISHED, Rollout, RolloutPart
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.inspection import ArtifactKind
from megatron_sov.work.progress.locks import list_holders
from megatron_sov.work.progress.progress_bar import create_bar

KIND = ArtifactKind(lambda path: format_store(RolloutStore.open(path)),
                    lambda path: check_with_progress(RolloutStore.open(path)).problems)
"""Entry for rollout stores in `megatron-sov inspect`."""
_ROW = np.dtype([("key", "<u8", 2), ("attempt", np.int32), ("is_unfinished", bool),
                 ("part", np.int32), ("row", np.int32)])
"""Head of a row (29 bytes), kept in memory while `check_store` reads further parts."""


@dataclass
class StoreCheck:
    """Counts and problems in a store."""

    parts: int = 0
    rows: int = 0
    rewards: int = 0
    problems: list[str] = field(default_factory=list)
    """Sentences with the names of part and row."""


def check_store(store: RolloutStore, report_done: Callable[[int], object] = lambda num_parts: None
                ) -> StoreCheck:
    """Check the files, rows, keys and rewards of a store; `report_done` receives 1 after each part."""
    result = StoreCheck()
    parts = store.parts(refused=result.problems.append)
    heads: list[np.ndarray] = []
    for number, part in enumerate(parts):
        try:
            rows, problems = store.read_rows_with_problems(part.name)
        except UserError as e:
            result.problems.append(str(e))
            continue
        finally:  # also before `continue`: an unreadable part is a step of the progress bar
            report_done(1)
        result.parts, result.rows = result.parts + 1, result.rows + len(rows)
        result.problems += [f"{part.file}: row {i} {problem}"
                            for i, problem in enumerate(problems) if problem]
        heads.append(_build_heads(rows, number))
    result.problems += _find_key_problems(np.concatenate([np.zeros(0, _ROW), *heads]), parts)
    for version in store.versions():
        for part in store.parts(version=version, refused=result.problems.append):
            result.problems += _find_reward_problems(store, part, result)
            report_done(1)
    return result


def _build_heads(rows: list[Rollout], number: int) -> np.ndarray:
    heads = np.zeros(len(rows), _ROW)
    # 128-bit digests suffice, since keys are only compared for equality.
    digests = (hashlib.blake2b(repr(tuple(row.key)).encode(), digest_size=16).digest() for row in rows)
    heads["key"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    heads["attempt"] = [row.attempt for row in rows]
    heads["is_unfinished"] = [row.finish_reason == UNFINISHED for row in rows]
    heads["part"], heads["row"] = number, np.arange(len(rows))
    return heads


def _find_key_problems(heads: np.ndarray, parts: list[RolloutPart]) -> list[str]:
    """Return a sentence for each key whose attempts are not 0, 1, ... after unfinished attempts."""
    # lexsort takes the last array first: equal keys become neighbours, ordered by attempt.
    heads = heads[np.lexsort((heads["attempt"], *heads["key"].T))]
    follows = np.append([False], (heads["key"][1:] == heads["key"][:-1]).all(1))[:len(heads)]
    previous = np.concatenate([heads[:1], heads[:-1]])
    # A row is compared only with the previous row, and breaks at most one rule.
    repeats = follows & (heads["attempt"] == previous["attempt"])
    continues = follows & (heads["attempt"] == previous["attempt"] + 1)
    begins = ~follows & (heads["attempt"] == 0)
    problems = []
    for i in np.flatnonzero(repeats):
        problems.append(f"{_describe_row(heads[i], parts)} has the key and the attempt of "
                        f"{_describe_row(previous[i], parts)}")
    for i in np.flatnonzero(~(repeats | continues | begins)):
        problems.append(f"{_describe_row(heads[i], parts)} continues an attempt that is not there")
    for i in np.flatnonzero(continues & ~previous["is_unfinished"]):
        problems.append(f"{_describe_row(heads[i], parts)} continues a finished one: "
                        f"{_describe_row(previous[i], parts)}")
    return problems


def _describe_row(head: np.void, parts: list[RolloutPart]) -> str:
    return f"{parts[int(head['part'])].file}: row {int(head['row'])}"


def _find_reward_problems(store: RolloutStore, part: RolloutPart, result: StoreCheck) -> list[str]:
    """Return a sentence for each reward without a row, and for repeated rewards."""
    try:
        rewards = store.read_rewards(part.version, part.name)
        rows, _ = store.read_rows_with_problems(part.name, ())
    except UserError as e:
        if store.part_path(part.name).exists():
            return [str(e)]  # the error names the file
        return [f"{part.path}: judges rows that cannot be read: {e}"]
    result.parts, result.rewards = result.parts + 1, result.rewards + len(rewards)
    stored, judged_keys, problems = {(row.key, row.attempt) for row in rows}, set(), []
    for i, reward in enumerate(rewards):
        key = (reward.key, reward.attempt)
        if key not in stored:
            problems.append(f"{part.file}: row {i} judges sample {reward.key.sample} of prompt "
                            f"{reward.key.prompt}, attempt {reward.attempt}, which {part.name} does not hold")
        if key in judged_keys:
            problems.append(f"{part.file}: row {i} judges a row a second time")
        judged_keys.add(key)
    return problems


def format_store(store: RolloutStore) -> Iterator[str]:
    """Yield a line per part, a line with the sums, and a line per claim."""
    judged = find_reward_versions(store)
    parts = store.parts()
    for part in parts:
        yield (f"{part.name:<33} {part.num_rows:>9,} rows {format_size(part.file.stat().st_size):>9}  "
               f"{format_time(part.created_s)}  judged by {', '.join(judged.get(part.name, [])) or 'none'}"
               + (f", {part.num_excluded:,} rows kept out" if part.num_excluded else ""))
    yield f"{store.path}: {len(parts):,} parts, {sum(part.num_rows for part in parts):,} rows"
    for holder in list_holders(store.claims):
        if holder.is_released:
            continue
        where = f"process {holder.pid} on {holder.host or 'a machine that it does not name'}"
        job = f", Slurm job {holder.slurm_job}" if holder.slurm_job else ""
        yield f"claimed: {holder.name} by {where}{job}, last sign of life {format_time(holder.changed_s)}"


def find_reward_versions(store: RolloutStore, round_: int | None = None) -> dict[str, list[str]]:
    """Return part name -> versions of the rewards in `STORE/rewards`."""
    versions: dict[str, list[str]] = {}
    for version in store.versions():
        for part in store.parts(round_, version):
            versions.setdefault(part.name, []).append(part.version)
    return versions


def format_time(time_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    except (ValueError, OverflowError, OSError):  # another program's number
        return str(time_s)


def check_with_progress(store: RolloutStore) -> StoreCheck:
    with create_bar("read", len(list((store.path / store.ROWS).iterdir())), "part") as bar:
        return check_store(store, bar.update)
