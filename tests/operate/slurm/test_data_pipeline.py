"""Data pipelines and `map` as Slurm arrays: the same bytes as local processes, failed and stopped jobs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli
from megatron_sov.cli import main
from megatron_sov.work.submit.arrays import Jobs

PIPELINE = """name: small
shard_bytes: 3000
sources:
  - {name: notes, path: raw, kind: en}
steps:
  - code: own.py:judge
output: {name: "{source}-{kind}"}
"""
STEP = """import dataclasses
from megatron_sov.base.documents import LeftOut

def judge(document):
    if "number 3" in document.text:
        return LeftOut("a three")
    return dataclasses.replace(document, text=document.text.upper())
"""


SLOW_STEP = """import dataclasses, os, pathlib, time
FOLDER = pathlib.Path(__file__).parent

def judge(document):
    while (FOLDER / "slow").exists():
        (FOLDER / "begun" / os.environ["SLURM_JOB_ID"]).touch()
        time.sleep(0.2)
    return dataclasses.replace(document, text=document.text.upper())
"""


def write_pipeline(folder: Path) -> Path:
    """Write a pipeline over five files, which become three shards, and return its file."""
    (folder / "raw").mkdir()
    for number in range(5):
        (folder / f"raw/{number}.txt").write_text(f"note number {number}\n" * 100)
    (folder / "own.py").write_text(STEP)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    return folder / "pipeline.yaml"


def hash_output(output: Path) -> dict[str, str]:
    """Return file name -> SHA-256 of the pipeline's Parquet files."""
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((output / "text").rglob("*.parquet"))}


@pytest.mark.distributed
def test_array_jobs_write_the_same_files_as_local_processes(cluster: Any, site: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    file = write_pipeline(site)
    assert cli.main(["run", str(file), "--output", "here", "--workers", "1"]) == 0
    own = (site / "own.py").read_text()
    failing = own.replace('"a three"', '"a three" if not document.text else 1 / 0')
    (site / "own.py").write_text(failing)
    command = ["run", str(file), "--output", "there", "--cluster", "site.yaml"]
    assert cli.main(command) == 0
    assert "submitted 4 jobs" in capsys.readouterr().out
    numbers = Jobs.read(site / "there").numbers
    assert cli.main(["run", str(file), "--output", "there", "--workers", "1"]) == 2, "jobs write there"
    assert "work in this folder" in capsys.readouterr().err
    assert cluster.wait(numbers["00-parse"])["JobState"] == "COMPLETED"
    assert cluster.wait(numbers["finish"])["JobState"] == "CANCELLED", "it depends on a failed job"
    (site / "own.py").write_text(own)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "stopped by: source notes, shard " in printed and ", code: " in printed
    assert "division by zero" in printed
    assert "00-parse: 3 of 3 shards done" in printed and "submitted 3 jobs" in printed
    result = cluster.wait(Jobs.read(site / "there").numbers["finish"])
    assert result["JobState"] == "COMPLETED", (site / "there/logs/finish").glob("**/*.out")
    assert cli.main(command) == 0
    assert "complete from before" in capsys.readouterr().out
    assert hash_output(site / "there") == hash_output(site / "here") != {}


@pytest.mark.deep  # test_jobs.py stops a job
@pytest.mark.distributed
def test_a_stopped_job_is_requeued_and_resumes(cluster: Any, site: Path, until: Callable[..., None]) -> None:
    file = write_pipeline(site)
    (site / "own.py").write_text(SLOW_STEP)
    assert cli.main(["run", str(file), "--output", "here", "--workers", "1"]) == 0
    (site / "slow").touch()
    (site / "begun").mkdir()
    assert cli.main(["run", str(file), "--output", "there", "--cluster", "site.yaml"]) == 0
    numbers = Jobs.read(site / "there").numbers
    until(lambda: any((site / "begun").iterdir()), 600, "a task that begins")
    array = next(number for name, number in numbers.items() if name.endswith("code"))
    # the last task that begins has the array's own number
    until(lambda: (site / "begun" / array).exists(), 600, "the task with the number of its array")
    # job number of each task -> its name "array_index"
    tasks = {cluster.job(f"{array}_{task}")["JobId"]: f"{array}_{task}" for task in range(3)}
    cluster.run("scancel", "--batch", "--signal=USR1", tasks[array])  # as Slurm does before the time limit
    until(lambda: cluster.job(tasks[array])["JobState"] != "RUNNING", 600, "a job that goes back")
    (site / "slow").unlink()
    assert cluster.wait(numbers["finish"])["JobState"] == "COMPLETED"
    assert {number: cluster.job(task)["Restarts"] for number, task in tasks.items()} == {
        number: str(int(number == array)) for number in tasks}
    assert hash_output(site / "there") == hash_output(site / "here") != {}


@pytest.mark.distributed
def test_map_on_nodes_writes_the_same_files_as_local_processes(cluster: Any, site: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    (site / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(500)))
    own = "class Step:\n    def do(self, row):\n        return {'n': row['n'] + 1}\n"
    (site / "mine.py").write_text(own)
    words = ["map", "rows.jsonl", "mine.py:Step", "--workers", "3", "--output"]
    assert main([*words, "here"]) == 0
    (site / "bad.jsonl").write_text('{"n": 1}\n' * 300 + '{"m": 2}\n')
    assert main(["map", "bad.jsonl", *words[2:], "bad", "--cluster", "site.yaml"]) == 0
    bad = Jobs.read(site / ".bad.slurm").numbers
    assert main([*words, "there", "--cluster", "site.yaml"]) == 0
    assert "submitted map " in capsys.readouterr().out
    numbers = Jobs.read(site / ".there.slurm").numbers
    assert main([*words, "there"]) == 2 and "work in this folder" in capsys.readouterr().err
    assert cluster.wait(numbers["finish"])["JobState"] == "COMPLETED"
    assert (site / "there/rows.jsonl").read_bytes() == (site / "here/rows.jsonl").read_bytes()
    assert main([*words, "there", "--cluster", "site.yaml"]) == 0
    assert "is already complete" in capsys.readouterr().out
    assert cluster.wait(bad["finish"])["JobState"] == "CANCELLED"
    assert main(["map", "bad.jsonl", *words[2:], "bad", "--skip-failures", "--redo"]) == 0
    assert len((site / "bad/rows.jsonl").read_text().split("\n")) == 301
