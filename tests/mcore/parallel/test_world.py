"""Local ranks live and die together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_sov.errors import UserError
from megatron_sov.mcore.parallel import world

folder, case = Path(sys.argv[1]), sys.argv[2]

def rank():
    number = os.environ["RANK"]
    if case in ("forward", "orphan"):
        got = []
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(s, lambda n, frame: got.append(signal.Signals(n).name))
    (folder / f"pid-{number}.part").write_text(str(os.getpid()))
    (folder / f"pid-{number}.part").rename(folder / f"pid-{number}")
    if case == "forward":
        while len(got) < 3:
            time.sleep(0.01)
        (folder / f"got-{number}").write_text(" ".join(sorted(got)))
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

def fails():
    if os.environ["RANK"] == "1":
        done = len(list(folder.glob(f"{case}-*")))
        (folder / f"{case}-{done}").touch()
        return 0 if done >= int(case) else 7
    return 0

if case != "ends":
    sys.exit(world.launch(rank, 2))
codes = {}
threads = []  # of the launcher, at each fork
os.register_at_fork(before=lambda: threads.append(len(os.listdir("/proc/self/task"))))
for case in ("mistake", "code", "dies"):
    codes[case] = world.launch(rank, 2)
for case in ("3", "9"):
    noted = []
    restarts = world.Restarts(2, (folder / f"{case}-1").exists,
                              lambda code, cause: noted.append([code, cause]),
                              lambda code, cause: noted.append([code, f"{cause}, for good"]))
    codes[case] = [world.launch(fails, 2, restarts=restarts), noted]
(folder / "codes.json").write_text(json.dumps(codes))
(folder / "threads.json").write_text(json.dumps(threads))
"""


def start(folder: Path, case: str) -> subprocess.Popen:
    folder.mkdir()
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # of the libraries: threads are counted
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), case],
                            stderr=subprocess.PIPE, text=True, env=one_thread)


def pids(folder: Path) -> list[int]:
    """Wait until both ranks run."""
    deadline = time.monotonic() + 180
    while not all((folder / f"pid-{r}").exists() for r in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int((folder / f"pid-{r}").read_text()) for r in range(2)]


@pytest.mark.distributed
def test_ranks_share_signals_failures_and_their_launchers_end(tmp_path: Path,
                                                              ends: Callable[[int], bool]) -> None:
    started = {case: start(tmp_path / case, case) for case in ("ends", "forward", "orphan")}
    pids(tmp_path / "forward")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        started["forward"].send_signal(number)
    ranks_of_killed = pids(tmp_path / "orphan")
    started["orphan"].kill()
    assert all(ends(pid) for pid in ranks_of_killed)
    said = started["ends"].communicate(timeout=240)[1]
    assert started["forward"].wait(timeout=240) == 0
    assert {(tmp_path / "forward" / f"got-{r}").read_text() for r in range(2)} == {"SIGINT SIGTERM SIGUSR1"}
    # progress is made once, in the second round, and two restarts are allowed without:
    # the fourth round is the last
    again, for_good = [[7, "rank 1 ended with exit code 7"]] * 3, [7,
                                                                   "rank 1 ended with exit code 7, for good"]
    assert json.loads((tmp_path / "ends" / "codes.json").read_text()) == {
        "mistake": 2, "code": 75, "dies": 128 + signal.SIGKILL, "3": [0, again], "9": [7, [*again, for_good]]}
    assert len(list((tmp_path / "ends").glob("9-*"))) == 4
    # a thread that holds a lock while another rank is forked leaves that rank waiting for it
    assert json.loads((tmp_path / "ends" / "threads.json").read_text()) == [1] * 2 * (3 + 4 + 4)
    assert all(ends(pid) for pid in pids(tmp_path / "ends"))  # the other rank did not go on alone
    assert said.count("error: seq_len = 0: must be positive") == 1
    assert "Traceback" not in said
    assert "error: rank 1 was ended by SIGKILL" in said


ON_GPU = """
import os, signal, sys, time
from pathlib import Path
import torch
from megatron_sov.mcore.parallel import world
from megatron_sov.runs import launch_environment

folder, case = Path(sys.argv[1]), sys.argv[2]
asked = poisoned = False

def available():
    global asked
    asked = True
    return True

def after():
    global poisoned
    poisoned = asked

torch.cuda.is_available = available
os.register_at_fork(after_in_child=after)

def rank():
    number, done = os.environ["RANK"], len(list(folder.glob("round-*")))
    if poisoned:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
    (folder / f"round-{done}").write_text(f"{number} {os.environ['WORLD_SIZE']} {handed} {earlier}")
    if case == "again":
        if done == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 75
    got = []
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(s, lambda n, frame: got.append(signal.Signals(n).name))
    (folder / f"pid-{number}.part").write_text(str(os.getpid()))
    (folder / f"pid-{number}.part").rename(folder / f"pid-{number}")
    while True:
        time.sleep(0.01)
        if len(got) == 3:
            (folder / f"got-{number}").write_text(" ".join(sorted(got)))

if not launch_environment.repeats():
    launch_environment.note_result(0.5)  # of an earlier piece of work
handed, earlier = launch_environment.handed().get("round"), launch_environment.earlier_result()
rounds, noted = [], []
def hand():
    rounds.append(len(rounds))
    return {"round": rounds[-1]}
restarts = world.Restarts(2, lambda: 0, lambda code, cause: noted.append(cause), None)
code = world.launch(rank, 1 if case == "again" else 2, restarts=restarts, hand=hand)
(folder / "end").write_text(f"{code} {noted}")
"""


@pytest.mark.distributed
def test_on_gpus_ranks_are_new_processes_that_end_as_forked_ones_do(tmp_path: Path,
                                                                   ends: Callable[[int], bool]) -> None:
    """A double of CUDA that works in no fork of a process which has asked for it."""
    started = {}
    for case in ("again", "signals"):
        (tmp_path / case).mkdir()
        started[case] = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ON_GPU, str(tmp_path / case), case],
            stderr=subprocess.PIPE, text=True)
    ranks_of_killed = pids(tmp_path / "signals")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        started["signals"].send_signal(number)
    for rank in range(2):
        deadline = time.monotonic() + 60
        while not (tmp_path / "signals" / f"got-{rank}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    started["signals"].kill()
    started["signals"].communicate()
    assert all(ends(pid) for pid in ranks_of_killed)
    said = started["again"].communicate(timeout=240)[1]
    assert (tmp_path / "again/end").read_text() == "75 ['rank 0 was ended by SIGKILL']", said
    assert [(tmp_path / f"again/round-{i}").read_text() for i in range(2)] == ["0 1 0 (0.5,)", "0 1 1 (0.5,)"]


def place(layout: dict[str, int]) -> list[int | bool]:
    """Return this process's place, after it had another one."""
    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.parallel import world

    world.join(ParallelConfig(pp=2))
    world.leave()
    w = world.join(ParallelConfig(**layout))
    return [w.rank, w.size, w.dp_rank, w.dp_size, w.first_stage, w.last_stage, w.is_main]


@pytest.mark.distributed
def test_what_one_join_leaves_in_a_store_the_next_does_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import torch.distributed as dist

    from megatron_sov.mcore.parallel import world

    kept = dist.HashStore()
    monkeypatch.delenv(world.STORE_PORT, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(kept, 0, 1)]))
    first, second = (world._rendezvous(0, 1, datetime.timedelta(seconds=1)) for _ in range(2))
    assert (first.add("gpu/one", 1), second.add("gpu/one", 1)) == (1, 1)


def test_a_process_knows_its_place_and_can_take_another(ranks, job) -> None:
    (places,) = ranks(job(__file__, "place", 4, {"layout": {"tp": 2}}))
    assert places == [[0, 4, 0, 2, True, True, True], [1, 4, 0, 2, True, True, False],
                      [2, 4, 1, 2, True, True, False], [3, 4, 1, 2, True, True, False]]


def joining(timeout_s: float) -> list[Any]:
    """Return what the groups are asked for on a double of a GPU."""
    import torch
    from megatron.core import parallel_state

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.parallel import own_gpu, world

    asked: list[Any] = []

    class Asked(Exception):
        """There is no more to see."""

    def take(store: Any, rank: int, size: int, needs_bytes: int, timeout: Any) -> torch.device:
        asked.append([rank, size, needs_bytes, timeout.total_seconds()])
        return torch.device("cuda", 3)

    def groups(*sizes: Any, **given: Any) -> None:
        asked.append([given["create_gloo_process_groups"], given["distributed_timeout_minutes"]])
        raise Asked

    with (mock.patch.object(world, "on_gpu", lambda: True), mock.patch.object(own_gpu, "take", take),
          mock.patch.object(world.dist, "init_process_group", lambda backend, **given: asked.append(
              [backend, str(given["device_id"]), given["timeout"].total_seconds()])),
          mock.patch.object(parallel_state, "initialize_model_parallel", groups), pytest.raises(Asked)):
        world.join(ParallelConfig(timeout_s=timeout_s), 7)
    return asked


@pytest.mark.distributed
def test_on_gpus_groups_are_bound_to_the_device_and_gloo_makes_none(ranks: Any, job: Any) -> None:
    ((asked,),) = ranks(job(__file__, "joining", 1, {"timeout_s": 90.0}))
    assert asked == [[0, 1, 7, 90.0], ["nccl", "cuda:3", 90.0], [False, 2]]


def on_main(fail: bool) -> list[Any]:
    """Runs inside ranks: rank 0 answers or refuses; returns what each rank saw."""
    from megatron_sov.config import ParallelConfig
    from megatron_sov.errors import UserError
    from megatron_sov.mcore.parallel import world

    place = world.join(ParallelConfig())
    asked: list[int] = []

    def action() -> str:
        asked.append(place.rank)
        if fail:
            raise UserError("the disk is full")
        return "answer"

    try:
        seen = world.on_main(place, action)
    except UserError as e:
        seen = f"refused: {e}"
    world.leave()
    return [seen, asked]


@pytest.mark.distributed
def test_every_rank_hears_of_an_answer_and_of_a_failure(ranks: Any, job: Any) -> None:
    answered, refused = ranks(job(__file__, "on_main", 2, {"fail": False}),
                              job(__file__, "on_main", 2, {"fail": True}))
    assert answered == [["answer", [0]], ["answer", []]]
    assert refused == [["refused: the disk is full", [0]], ["refused: the disk is full", []]]
