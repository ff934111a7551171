"""Failures of a pipeline run: killed processes, errors in user code, full disks, requeued Slurm jobs."""

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_prep import cli
from data_prep.curate.pipeline.running import run_array_task, run_finish_task
from data_prep.curate.pipeline.tasks import PipelineStage
from megatron_sov.base.artifacts import is_locked
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.locks import lock_folder
from megatron_sov.work.submit import array_job
from megatron_sov.work.submit.arrays import MAX_RESTARTS, WORK_FILE, Jobs
from tests.data_prep.curate.pipeline.memory_view import read_files
from tests.waiting import wait_until

OWN = """import dataclasses, os, pathlib
from megatron_sov.base.documents import LeftOut

def judge(document):
    flag = pathlib.Path(__file__).with_name("killed")
    if flag.exists() and "text 3" in document.text:
        flag.unlink()
        os.kill(os.getpid(), 9)
    return dataclasses.replace(document, text=document.text.upper())
"""
STEPS = """  - shorten: {longest: 400}
  - unique: {}
  - shorten: {longest: 300}
"""


@pytest.fixture
def own_step_pipeline(small_run: Path) -> Path:
    """Write a pipeline with a user-defined step, which kills its process once if a file `killed` exists."""
    (small_run / "own.py").write_text(OWN)
    file = small_run / "pipeline.yaml"
    file.write_text(file.read_text().replace(STEPS, "  - code: own.py:judge\n").replace("{size}", "x"))
    return small_run


def build_command(small_run: Path, *words: str) -> list[str]:
    return ["run", str(small_run / "pipeline.yaml"), "--output", str(small_run / "out"), *words]


@pytest.mark.deep
def test_a_run_killed_in_a_task_resumes_to_the_same_bytes(own_step_pipeline: Path) -> None:
    assert cli.main(build_command(own_step_pipeline, "--workers", "1")) == 0
    undisturbed = read_files(own_step_pipeline / "out/text")
    shutil.rmtree(own_step_pipeline / "out")
    (own_step_pipeline / "killed").touch()
    command = [sys.executable, "-m", "data_prep.cli", *build_command(own_step_pipeline, "--workers", "1")]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (own_step_pipeline / "out/manifest.json").exists()
    (leftover,) = (own_step_pipeline / "out/shards").glob("web/01-code-*/.*.tmp-*")
    assert cli.main(build_command(own_step_pipeline, "--workers", "1")) == 0
    assert not leftover.exists() and read_files(own_step_pipeline / "out/text") == undisturbed


@pytest.mark.deep
@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "how"), [
    pytest.param(1, signal.SIGKILL, marks=pytest.mark.deep), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_command_leaves_neither_processes_nor_its_lock(
        own_step_pipeline: Path, tmp_path: Path, request: pytest.FixtureRequest, workers: int,
        how: signal.Signals) -> None:
    (own_step_pipeline / "own.py").write_text("import pathlib, time\n\ndef judge(document):\n"
                                              "    pathlib.Path(__file__).with_name('begun').touch()\n"
                                              "    time.sleep(600)\n")
    with open(tmp_path / "messages", "w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "data_prep.cli",
             *build_command(own_step_pipeline, "--workers", str(workers))],
            stdout=log, stderr=log, start_new_session=True,
            # a parallel test runner ignores SIGINT, and its children would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    request.addfinalizer(lambda: [os.kill(pid, signal.SIGKILL) for pid in list_living_processes(running.pid)])
    wait_until(lambda: (own_step_pipeline / "begun").exists() or running.poll() is not None)
    if how == signal.SIGINT:
        os.killpg(running.pid, how)  # as a terminal does
    else:
        running.send_signal(how)
    assert running.wait(600) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: not is_locked(own_step_pipeline / "out"))
    wait_until(lambda: not list_living_processes(running.pid))
    messages = (tmp_path / "messages").read_text()
    assert "Traceback" not in messages, messages


def list_living_processes(group: int) -> list[int]:
    """Return the ids of the running processes of a process group."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_an_error_in_user_code_is_one_message(own_step_pipeline: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    (own_step_pipeline / "own.py").write_text("def judge(document):\n    return 1 / 0\n")
    assert cli.main(build_command(own_step_pipeline, "--workers", "1")) == 2
    stderr = capsys.readouterr().err
    assert "source web, shard " in stderr and ", code: " in stderr
    assert "division by zero" in stderr and "Traceback" not in stderr


def test_a_defect_in_a_step_keeps_its_traceback(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.curate.pipeline import pipeline_file
    from megatron_sov.work.submit.arrays import TaskFailed

    monkeypatch.setattr(pipeline_file.load_step_class("shorten"), "judge_document",
                        lambda step, document: document.nothing)
    with pytest.raises(TaskFailed, match=r"no attribute 'nothing'\n.*source web, shard \d+, step shorten"):
        cli.main(build_command(small_run, "--workers", "1"))


def test_a_full_disk_is_one_message(small_run: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep.curate.pipeline import pipeline_file
    from megatron_sov.work.submit import arrays

    def raise_no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="a sentence"), arrays.record_failure(small_run / "nowhere", 0):
        raise UserError("a sentence")
    monkeypatch.setattr(pipeline_file.load_step_class("shorten"), "judge_document", raise_no_space)
    assert cli.main(build_command(small_run, "--workers", "1")) == 2
    stderr = capsys.readouterr().err
    assert "no space left on the device; free some space" in stderr and "Traceback" not in stderr


def test_two_commands_do_not_share_a_folder(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_run / "out/plans").mkdir(parents=True)
    with lock_folder(small_run / "out", "out"):
        assert cli.main(build_command(small_run)) == 2
    assert "is being written by another process" in capsys.readouterr().err


# The Slurm jobs of a run, with programs that only record the submissions; `tests/operate/slurm` has a real
# Slurm.

PROFILE = """description: jobs are recorded, not run
partition: batch
account: ""
qos: long
cpus_per_node: 8
gpus_per_node: 0
memory: 16G
container: {kind: pyxis, image: "reg/image:1", mounts: [/data]}
"""
SBATCH = """#!/bin/bash
[ "$1" = --test-only ] && exit 0
n=$(ls "$NOTED_JOBS" | wc -l)
{ echo "$@"; cat "${@: -1}"; } > "$NOTED_JOBS/$(printf %02d "$n")"
echo "$((100 + n))"
"""


@pytest.fixture
def submissions(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file per submission, in order: the arguments of sbatch, then the script."""
    programs, folder = tmp_path / "programs", tmp_path / "noted"
    folder.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("sinfo", "#!/bin/bash\necho batch\n"),
                       ("scontrol", "#!/bin/bash\necho 'MaxArraySize = 3'\n"), ("squeue", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (small_run / "cluster.yaml").write_text(PROFILE)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTED_JOBS", str(folder))
    return folder


def build_cluster_command(small_run: Path, output: str) -> list[str]:
    return ["run", str(small_run / "pipeline.yaml"), "--output", output, "--cluster",
            str(small_run / "cluster.yaml")]


def run_job(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Slurm array of one job with one task in this process."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(sys, "argv", ["array_job", str(logs), "1"])
    array_job.main()


def test_arrays_wait_for_each_other_and_call_their_program_by_its_path(small_run: Path,
                                                                       submissions: Path) -> None:
    assert cli.main(build_cluster_command(small_run, str(small_run / "out"))) == 0
    scripts = [file.read_text() for file in sorted(submissions.iterdir())]
    names = list(Jobs.read(small_run / "out").numbers)
    assert names == ["00-parse", "01-shorten", "02-unique-hash", "02-unique-choose", "02-unique",
                     "03-shorten", "04-output", "finish"]
    for number, (script, name) in enumerate(zip(scripts, names, strict=True)):
        assert (f"--dependency=afterok:{99 + number}" in script.split("\n")[0]) == (number > 0), name
        assert f"-m megatron_sov.work.submit.array_job {small_run}/out/logs/{name} " in script
        assert "--container-image=reg/image:1 --container-mounts=/data" in script
        assert f"export PYTHONPATH={Path(array_job.__file__).parents[3]} " in script
    assert "#SBATCH --array=0-1\n" in scripts[0], "MaxArraySize = 3 needs several shards per job"
    assert "#SBATCH --cpus-per-task=8\n" in scripts[-1] and "--cpus-per-task=8 --label" in scripts[-1]
    assert "#SBATCH --mem-per-cpu=2048M\n" in scripts[-1]


@pytest.mark.parametrize("name", ["my corpus", "100%", "a$b", "it's"])
def test_folders_that_scripts_cannot_name_are_refused(small_run: Path, submissions: Path, name: str,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(build_cluster_command(small_run, str(small_run / name))) == 2
    assert "choose a folder without blanks" in capsys.readouterr().err
    assert not (small_run / name).exists() and not list(submissions.iterdir())


@pytest.mark.parametrize("is_last", [False, True])
def test_a_job_that_is_requeued_too_often_is_stopped_and_reported(tmp_path: Path, is_last: bool,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(MAX_RESTARTS + 1))
    plan = tmp_path / "plan.json"
    work = (partial(run_finish_task, plan, tmp_path) if is_last else
            partial(run_array_task, plan, tmp_path, PipelineStage(0, "parse"), ()))
    (tmp_path / WORK_FILE).write_bytes(pickle.dumps((work, 1)))
    with pytest.raises(UserError, match="requeued 20 times"):
        run_job(tmp_path, monkeypatch)
    assert "requeued" in json.loads((tmp_path / "failed/00000.json").read_text())["sentence"]
