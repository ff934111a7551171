"""A run that is stopped, killed and resumed has the same bits as an uninterrupted run."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.checkpoint.host_snapshot import HostSnapshot
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.parallel.world import STORE_PORT
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.checkpoints import find_damage
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.lock import find_living_holder
from megatron_sov.runs.obs.events import read_events
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.stages.launch import run_stage
from megatron_sov.train.stages.stage import Stage
from tests.run_files import read_run_events, read_steps

STEPS = 30
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every_steps=5", "train.keep_checkpoints=0",
            "train.eval_every_steps=10", "optim.warmup_steps=4", "optim.eps=1e-3")
EP2 = ("--nproc", "2", "--set", "parallel.ep=2")


def read_untimed_steps(run: Path) -> list[dict[str, Any]]:
    """Return the event of each step without its times, speeds and memory."""
    timed = ("time_s", "step_time_s", "tokens_per_s", "tokens_per_s_per_process", "tflops_per_process",
             "peak_memory_bytes")
    return [{k: v for k, v in e.items() if k not in timed} for e in read_steps(run)]


def read_last_step(run: Path) -> int:
    return max((e["step"] for e in read_run_events(run, "step")), default=0)


def find_checkpoint(run: Path, step: int) -> Path:
    return next(p for p in (run / "checkpoints").glob("step-*") if int(p.name.removeprefix("step-")) == step)


def read_tensors(run: Path) -> dict[str, torch.Tensor]:
    readers = {part: TensorReader(find_checkpoint(run, STEPS), part) for part in ("model", "optimizer")}
    return {f"{part}/{key}": reader.read(key) for part, reader in readers.items()
            for key in reader.keys()}  # noqa: SIM118


@pytest.mark.distributed
@pytest.mark.essential
def test_stopped_killed_and_continued_equals_uninterrupted(
        tmp_path: Path, pretrain: Any, run_checked: Any, start: Any, until: Any) -> None:
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    run_checked(*pretrain(uninterrupted, *EP2, settings=SETTINGS))

    run = start(pretrain(interrupted, *EP2, settings=SETTINGS))
    until(lambda: read_last_step(interrupted) >= 3, run)
    holder = json.loads((interrupted / "lock.json").read_text())["pid"]
    os.kill(holder, signal.SIGSTOP)  # the run is alive but stopped while a second one tries to start
    second = run_checked(*pretrain(interrupted, *EP2, "--resume", settings=SETTINGS), code=2)
    assert f"held by a living run (process {holder}" in second.stderr
    os.kill(psutil.Process(holder).ppid(), signal.SIGTERM)
    os.kill(holder, signal.SIGCONT)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 75 and "everything is saved; last checkpoint: step " in errors, errors
    stopped_at = read_last_step(interrupted)
    assert find_checkpoint(interrupted, stopped_at).is_dir() and not (interrupted / "lock.json").exists()
    assert stopped_at < STEPS and not (interrupted / "complete.json").exists()

    run = start(pretrain(interrupted, *EP2, "--resume", settings=SETTINGS))
    until(lambda: read_last_step(interrupted) >= stopped_at + 8, run)
    rank_zero = json.loads((interrupted / "lock.json").read_text())["pid"]
    # kills the launcher, whose ranks end with its session; test_launcher.py tests orphans
    os.kill(psutil.Process(rank_zero).ppid(), signal.SIGKILL)
    run.wait(timeout=600)
    assert (interrupted / "lock.json").exists()
    # a rank that waits for a processor may not have received its signal yet
    while find_living_holder(interrupted) is not None:
        time.sleep(0.05)

    # `resume` needs no options: settings, data and the number of processes are in the folder
    run_checked("resume", str(interrupted))
    reasons = [e["event"] for e in read_events(interrupted / "events.jsonl")
               if e["event"] in ("stop", "resume", "run_end")]
    assert reasons == ["stop", "resume", "resume", "run_end"]
    assert [s["step"] for s in read_untimed_steps(interrupted)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(read_untimed_steps(interrupted), read_untimed_steps(uninterrupted), strict=True):
        assert ours == theirs
    ours, theirs = read_tensors(interrupted), read_tensors(uninterrupted)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


KILLED_STEPS = 12
KILLED_SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.head_dim=8",
                   "model.expert_ffn_dim=16", 'data.phases=[{"name": "main", "seq_len": 32}]',
                   "train.global_batch_size=8", "train.micro_batch_size=4", "data.heldout_tokens=128",
                   f"train.steps={KILLED_STEPS}", "train.checkpoint_every_steps=2",
                   "train.keep_checkpoints=1", "train.keep_every_steps=8", "train.eval_every_steps=6",
                   "train.hidden_dropout=0.1", "parallel.ep=2")


def run_and_kill(data: str, folder: str) -> dict[str, Any]:
    """Run 12 steps uninterrupted, and again with kills in steps, in loading and in two places of saving. Each
    run has two ranks and is forked from this process.

    Returns:
        Exit code of a run whose writer hangs ("hung"), number of partial checkpoints after each kill
        ("partial"), damage found in published checkpoints, and names of the final checkpoints.
    """
    config = apply_settings(recipes.get("tiny-solar-open"),
                            [f"data.paths={json.dumps({data: 1.0})}", *KILLED_SETTINGS])
    uninterrupted, interrupted = Path(folder) / "whole", Path(folder) / "broken"
    checkpoints, num_partial, damaged = interrupted / "checkpoints", list[int](), list[str]()

    def start_run(run: Path, config: Any = config, prepare: Callable[[], None] = lambda: None) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setsid()
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", STORE_PORT):
                    os.environ.pop(name, None)  # this process is not a rank, it starts ranks
                prepare()
                run_stage(Stage(config, RunFolder(run), LanguageModelling, resume=True), 2)
                code = 0
            except SystemExit as e:
                code = int(e.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return child

    def kill_when(reached: Callable[[], bool]) -> None:
        child, deadline = start_run(interrupted), time.monotonic() + 600
        while not reached():
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
            time.sleep(0.001)
        ranks = psutil.Process(child).children()
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # killed before it has created its process group
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        psutil.wait_procs(ranks, timeout=600)
        num_partial.append(len(list(checkpoints.glob(".*"))))
        damaged.extend(p for p in map(find_damage, checkpoints.glob("step-*")) if p is not None)

    def read_holder() -> int:
        try:
            return int(json.loads((interrupted / "lock.json").read_text())["pid"])
        except (OSError, ValueError):
            return 0

    def is_loading() -> Callable[[], bool]:
        previous_holder = read_holder()
        return lambda: read_holder() not in (0, previous_holder)

    def is_stepping() -> Callable[[], bool]:
        return lambda: bool(read_run_events(interrupted, "step"))

    def is_writing(file: str) -> Callable[[], bool]:
        return lambda: any((checkpoints / p.name / file).exists() for p in checkpoints.glob(".writing-*"))

    def hang_writer() -> None:
        """Make rank 1 hang while it writes a checkpoint; the ranks are forked after this call."""
        write = HostSnapshot.write
        HostSnapshot.write = lambda self, folder, rank: (
            time.sleep(3600) if rank == 1 else write(self, folder, rank))

    assert os.waitpid(start_run(uninterrupted), 0)[1] == 0
    limited = apply_settings(config, ["train.save_timeout_s=1"])
    hung = os.waitstatus_to_exitcode(os.waitpid(start_run(Path(folder) / "hung", limited, hang_writer), 0)[1])
    for state in (is_stepping, lambda: is_writing("model"), is_loading,
                  lambda: is_writing("model.index.json")):
        kill_when(state())
    assert os.waitpid(start_run(interrupted), 0)[1] == 0
    return {"hung": hung, "partial": num_partial, "damaged": damaged,
            "names": sorted(p.name for p in checkpoints.iterdir())}


@pytest.mark.deep
@pytest.mark.distributed
def test_kills_at_every_state_change_nothing(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    arguments = {"data": str(packed_data.text), "folder": str(tmp_path)}
    ((found,),) = ranks(job(__file__, "run_and_kill", 1, arguments))
    assert found["hung"] == 2, "the process ends although its writing thread hangs"
    assert not list((tmp_path / "hung" / "checkpoints").glob("step-*"))
    assert found["damaged"] == [], "a checkpoint with its final name is complete"
    assert sum(found["partial"]) >= 1, "at least one kill came while a checkpoint was written"
    assert found["names"] == [f"step-{KILLED_STEPS}", "step-8"], "newest, and multiple of 8"
    for step in (8, KILLED_STEPS):
        ours, theirs = (read_manifest(tmp_path / name / f"checkpoints/step-{step}").files
                        for name in ("broken", "whole"))
        state, expected_state = ours.pop("state.json"), theirs.pop("state.json")
        assert ours == theirs
        assert abs(state.size_bytes - expected_state.size_bytes) < 8, "only the digits of wall_s differ"
