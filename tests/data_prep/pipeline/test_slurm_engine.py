"""What Slurm's jobs of a run are, with programs that only take note; `tests/slurm` has a real Slurm."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.pipeline import addresses, inputs
from data_prep.pipeline.slurm_engine import DoTasks, FinishRun
from data_prep.pipeline.tasks import Stage
from megatron_sov.errors import UserError
from megatron_sov.work import array_job
from megatron_sov.work.arrays import MAX_RESTARTS, WORK, Jobs

PROFILE = """description: noted, not run
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
def noted(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the words and the script of each submission, in order."""
    programs, folder = tmp_path / "programs", tmp_path / "noted"
    folder.mkdir()
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("sinfo", "#!/bin/bash\necho batch\n"),
                       ("scontrol", "#!/bin/bash\necho 'MaxArraySize = 3'\n"), ("squeue", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (raw / "cluster.yaml").write_text(PROFILE)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTED_JOBS", str(folder))
    return folder


def command(raw: Path, output: str) -> list[str]:
    return ["run", str(raw / "pipeline.yaml"), "--output", output, "--cluster", str(raw / "cluster.yaml")]


def run_job(logs: Path, monkeypatch: pytest.MonkeyPatch, jobs: int = 1, tasks_per_job: int = 1) -> None:
    """Do what the jobs of an array do."""
    for job in range(jobs):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
        monkeypatch.setattr(sys, "argv", ["array_job", str(logs), str(tasks_per_job)])
        array_job.main()


def test_arrays_wait_for_each_other_and_call_their_program_by_its_path(raw: Path, noted: Path) -> None:
    assert cli.main(command(raw, str(raw / "out"))) == 0
    scripts = [file.read_text() for file in sorted(noted.iterdir())]
    names = list(Jobs.read(raw / "out").numbers)
    assert names == ["00-parse", "01-shorten", "02-unique-hash", "02-unique-choose", "02-unique",
                     "03-shorten", "04-output", "finish"]
    for number, (script, name) in enumerate(zip(scripts, names, strict=True)):
        assert (f"--dependency=afterok:{99 + number}" in script.split("\n")[0]) == (number > 0), name
        assert f"-m megatron_sov.work.array_job {raw}/out/logs/{name} " in script
        assert "--container-image=reg/image:1 --container-mounts=/data" in script
    assert "#SBATCH --array=0-1\n" in scripts[0], "four shards, two to a job, where an array may have two"
    assert "#SBATCH --cpus-per-task=8\n" in scripts[-1] and "--cpus-per-task=8 --label" in scripts[-1]
    assert "#SBATCH --mem-per-cpu=2048M\n" in scripts[-1]


@pytest.mark.usefixtures("without_engine")
def test_large_sources_are_read_by_jobs_and_not_where_the_command_is_typed(
        raw: Path, noted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def never(file: Path) -> str:
        raise AssertionError(f"{file} is read by the machine that plans")

    monkeypatch.setattr(inputs, "READ_HERE_BYTES", 1000)
    monkeypatch.setattr(inputs, "BATCH_BYTES", 2000)
    assert cli.main([*command(raw, str(raw / "out"))[:4], "--dry-run"]) == 0
    assert "in 6 files of source web, 3.4 kB in 4 files of source books are not known yet" in (
        capsys.readouterr().out)
    with monkeypatch.context() as planning:
        planning.setattr(addresses, "_content_hash", never)
        assert cli.main(command(raw, str(raw / "out"))) == 0
    assert list(Jobs.read(raw / "out").numbers) == ["inputs", "submit"]
    reading, rest = (file.read_text() for file in sorted(noted.iterdir()))
    assert "--dependency=afterok:100" in rest.split("\n")[0] and "#SBATCH --array=0-1\n" in reading
    run_job(raw / "out/logs/inputs", monkeypatch, jobs=2, tasks_per_job=2)
    with monkeypatch.context() as planning:
        planning.setattr(addresses, "_content_hash", never)
        run_job(raw / "out/logs/submit", planning)
    assert list(Jobs.read(raw / "out").numbers)[::6] == ["00-parse", "04-output"]
    by_jobs = sorted(folder.name for folder in (raw / "out/shards").glob("*/*"))
    assert cli.main(["run", str(raw / "pipeline.yaml"), "--output", str(raw / "here"), "--workers", "1"]) == 0
    here = sorted(folder.name for folder in (raw / "here/shards").glob("*/*"))
    assert by_jobs == here, "addresses follow from contents, whoever reads them"


@pytest.mark.parametrize("name", ["my corpus", "100%", "a$b", "it's"])
def test_folders_that_scripts_cannot_name_are_refused(raw: Path, noted: Path, name: str,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(raw, str(raw / name))) == 2
    assert "choose a folder without blanks" in capsys.readouterr().err
    assert not (raw / name).exists() and not list(noted.iterdir())


@pytest.mark.parametrize("is_last", [False, True])
def test_a_job_that_is_requeued_for_ever_is_stopped_and_told(tmp_path: Path, is_last: bool,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(MAX_RESTARTS + 1))
    plan = tmp_path / "plan.json"
    work = FinishRun(plan, tmp_path) if is_last else DoTasks(plan, tmp_path, Stage(0, "parse"), ())
    (tmp_path / WORK).write_bytes(pickle.dumps((work, 1)))
    with pytest.raises(UserError, match="requeued 20 times"):
        run_job(tmp_path, monkeypatch)
    assert "requeued" in json.loads((tmp_path / "failed/00000.json").read_text())["sentence"]
