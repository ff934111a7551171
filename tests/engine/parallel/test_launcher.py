"""The launcher of local ranks: plan files, signals, failures, restarts and CPU threads."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import load_plugin
from megatron_sov.engine.parallel import launcher
from megatron_sov.engine.parallel.launcher import read_plan, write_plan_file
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.data.token_shards import ShardChain, map_numbers
from megatron_sov.work.processes.stop_signals import catch_stop_signals
from tests.waiting import wait_until

# Plan files for ranks that are new processes.

def pickle_to_new_process(value: Any) -> Any:
    """Return the value that a new process would unpickle."""
    with write_plan_file(lambda: value, 1) as plan:
        return read_plan(os.dup(plan))()


def test_shards_are_reopened_instead_of_pickled(packed_data: Any) -> None:
    shard = open_sources({str(packed_data.text): 1.0}, 368)[0].open_split("train")
    reopened = pickle_to_new_process(shard)
    assert isinstance(reopened, ShardChain) and reopened is not shard
    assert reopened.tokens(3, 0, 9).tolist() == shard.tokens(3, 0, 9).tolist()
    assert pickle_to_new_process(np.arange(3)).tolist() == [0, 1, 2]
    (index,) = {file for file in Path(packed_data.text).rglob("*.bin") if "even" in str(file)
                and "train" in str(file)}
    with pytest.raises(TypeError, match="map of a file"):
        pickle_to_new_process(map_numbers(index, np.dtype(np.uint8), index.stat().st_size)[3:9])


def test_user_code_runs_unchanged_in_new_processes(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("class Own:\n    number = 7\n")
    value = load_plugin(f"{file}:Own").value()
    assert pickle_to_new_process(value).number == 7
    with write_plan_file(lambda: value, 1) as plan:
        file.write_text("class Own:\n    number = 8\n")
        with pytest.raises(UserError, match=r"own\.py: has changed"):
            read_plan(os.dup(plan))


def test_a_stop_signal_reaches_the_rank() -> None:
    with catch_stop_signals() as flag:
        rank_flag = pickle_to_new_process(flag)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (rank_flag.reason, flag.reason) == ("SIGUSR1", None)


CASES = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import launcher
pids = {}
for case in sys.argv[2:]:
    pids[case] = os.fork()
    if not pids[case]:
        break
else:
    print(json.dumps(pids | {"threads": len(os.listdir("/proc/self/task"))}), flush=True)
    print(json.dumps({case: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for case, pid in pids.items()}))
    sys.exit()
folder = Path(sys.argv[1], case)
os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT), 2)
"""
"""Start of a program that imports once and forks a launcher for each case in its arguments. The forking
process prints the launchers' process ids, then their exit codes."""
PROGRAM = CASES + """
def rank():
    number = os.environ["RANK"]
    if case in ("forward", "orphan"):
        received = []
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(s, lambda n, frame: received.append(signal.Signals(n).name))
    (folder / f"pid-{number}.part").write_text(str(os.getpid()))  # renamed, so that no reader sees it empty
    (folder / f"pid-{number}.part").rename(folder / f"pid-{number}")
    if case == "forward":
        while len(received) < 3:
            time.sleep(0.01)
        (folder / f"signals-{number}").write_text(" ".join(sorted(received)))
        return 0
    if number == "1" and case == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if number == "1" and case == "code":
        return 75
    if case == "mistake":
        raise UserError("seq_len = 0: must be positive")
    while case in ("dies", "orphan"):
        time.sleep(0.05)
    return 0

def fail_rounds():  # rank 1 fails in the first rounds, as many as the case's number
    if os.environ["RANK"] == "1":
        num_rounds = len(list(folder.glob(f"{case}-*")))
        (folder / f"{case}-{num_rounds}").touch()
        return 0 if num_rounds >= int(case) else 7
    return 0

if case != "ends":
    sys.exit(launcher.launch_ranks(rank, 2))
codes = {}
threads = []  # of the launcher, at each fork
os.register_at_fork(before=lambda: threads.append(len(os.listdir("/proc/self/task"))))
for case in ("mistake", "code", "dies"):
    codes[case] = launcher.launch_ranks(rank, 2)
for case in ("3", "9"):
    noted = []
    restarts = launcher.RestartPolicy(2, (folder / f"{case}-1").exists,
                                     lambda code, cause: noted.append([code, cause]),
                                     lambda code, cause: noted.append([code, f"{cause}, for good"]))
    codes[case] = [launcher.launch_ranks(fail_rounds, 2, restarts=restarts), noted]
(folder / "codes.json").write_text(json.dumps(codes))
(folder / "threads.json").write_text(json.dumps(threads))
"""


@contextmanager
def start_launchers(program: str, folder: Path,
                    *cases: str) -> Iterator[tuple[dict[str, int], Callable[..., Any]]]:
    """Start the launcher of each case.

    Yields:
        Process id of each case's launcher, and a function that waits for them and returns their exit codes.
    """
    for case in cases:
        (folder / case).mkdir()
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # for the libraries: the test counts threads
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, str(folder), *cases],
                          stdout=subprocess.PIPE, text=True, env=one_thread) as process:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert started.pop("threads") == 1
        try:
            yield started, lambda: json.loads(process.communicate(timeout=600)[0])
        finally:
            process.kill()  # do not wait after a failure


def wait_for_ranks(folder: Path) -> list[int]:
    """Wait until both ranks run; return their process ids."""
    wait_until(lambda: all((folder / f"pid-{r}").exists() for r in range(2)))
    return [int((folder / f"pid-{r}").read_text()) for r in range(2)]


@pytest.mark.deep
@pytest.mark.distributed
def test_ranks_share_signals_failures_and_their_launchers_end(tmp_path: Path,
                                                              ends: Callable[[int], bool]) -> None:
    with start_launchers(PROGRAM, tmp_path, "ends", "forward", "orphan") as (started, ended):
        wait_for_ranks(tmp_path / "forward")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(started["forward"], number)
        ranks_of_killed = wait_for_ranks(tmp_path / "orphan")
        os.kill(started["orphan"], signal.SIGKILL)
        assert all(ends(pid) for pid in ranks_of_killed)
        assert ended() == {"ends": 0, "forward": 0, "orphan": -signal.SIGKILL}
    text = (tmp_path / "ends/errors").read_text()
    signals = {(tmp_path / "forward" / f"signals-{rank}").read_text() for rank in range(2)}
    assert signals == {"SIGINT SIGTERM SIGUSR1"}
    # The run makes progress once, in the second round, and may restart twice without progress: the fourth
    # round is the last.
    restarts = [[7, "rank 1 ended with exit code 7"]] * 3
    last_failure = [7, "rank 1 ended with exit code 7, for good"]
    assert json.loads((tmp_path / "ends" / "codes.json").read_text()) == {
        "mistake": 2, "code": 75, "dies": 128 + signal.SIGKILL,
        "3": [0, restarts], "9": [7, [*restarts, last_failure]]}
    assert len(list((tmp_path / "ends").glob("9-*"))) == 4
    # A lock that another thread holds during a fork is never released in the forked rank, so launchers have
    # one thread. Two ranks are forked in three runs without restarts and in twice four rounds.
    assert json.loads((tmp_path / "ends" / "threads.json").read_text()) == [1] * 2 * (3 + 4 + 4)
    assert all(ends(pid) for pid in wait_for_ranks(tmp_path / "ends"))  # the other rank ended as well
    assert text.count("error: seq_len = 0: must be positive") == 1
    assert "Traceback" not in text
    assert "error: rank 1 was ended by SIGKILL" in text


def test_the_result_of_forked_work_is_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that returns its warnings is complete. Under a launcher the work runs in this process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launcher.run_in_fork(lambda: ["a warning"]) == 0


@pytest.mark.each(("num_threads", "num_ranks", "threads_per_rank"), [
    (None, 2, 4), (None, 16, 1), ("", 2, 4), ("0", 2, 4), ("many", 2, 4), ("9" * 5000, 2, 4),
    ("3", 2, 3), (" 5 ,2", 2, 5)])
def test_ranks_share_the_cores_unless_the_environment_names_their_threads(
        monkeypatch: pytest.MonkeyPatch, num_threads: str | None, num_ranks: int,
        threads_per_rank: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if num_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", num_threads)
    assert launcher._count_threads(num_ranks) == threads_per_rank
