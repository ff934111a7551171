"""Arrays of jobs on Kubernetes: the Jobs held against the API's published schema, and whole commands through
the kills of pods by a double of `kubectl` that runs their containers here."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep import cli as data_cli
from data_prep.curate.pipeline import addresses
from megatron_sov import cli
from megatron_sov.base.errors import ExitCode
from megatron_sov.commands.map import STEPS
from megatron_sov.work.clusters import kubernetes
from megatron_sov.work.submit import array_job
from megatron_sov.work.submit.arrays import MAX_KILLS, Arrays, Jobs
from tests.operate.kubernetes.local_cluster import LocalCluster
from tests.operate.kubernetes.test_submit import PROFILE as PAGE_PROFILE, refused
from tests.operate.slurm.test_data_pipeline import text_hashes, write_pipeline

PUBLISHED = yaml.safe_load(Path(__file__).with_name("job_schema.yaml").read_text())
PROFILE = """kind: k8s
description: processes of this machine
image: none
gpus_per_node: 0
resources: {{cpu: "8", memory: 16Gi}}
python: {python}
volumes: [{{claim: shared, mount: {folder}}}]
environment: {{ODD: "$(HOME) $$"}}
"""
STEP = """import os, pathlib, signal, time

class Step:
    def do(self, row):
        assert os.environ.get("ODD", "$(HOME) $$") == "$(HOME) $$"
        index = os.environ.get("JOB_COMPLETION_INDEX", "none")
        with open("done", "a") as f:
            f.write(f"{row['n']} ")
        while row["n"] > 300 and os.path.exists("slow"):
            pathlib.Path(f"begun-{index}-{os.getpid()}").touch()
            time.sleep(0.02)
        if os.path.exists("deadly") and row["n"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.path.exists("wrong") and row["n"] == 5:
            raise ValueError("a five")
        return {"n": row["n"] + 1}
"""
THERE = ("--cluster", "site.yaml")


@pytest.fixture
def cluster(tmp_path: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster that sees the current folder, which has a profile of it, rows and a step."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(STEPS, "_known", {})
    (folder / "site.yaml").write_text(PROFILE.format(python=warm_python, folder=folder))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(500)))
    (folder / "mine.py").write_text(STEP)
    with LocalCluster(tmp_path / "cluster") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def until(condition: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def mapped(output: str, *more: str) -> int:
    return cli.main(["map", "rows.jsonl", "mine.py:Step", "--workers", "3", "--output", output, *more])


def numbers(folder: str = ".there.slurm") -> dict[str, str]:
    return Jobs.read(Path(folder)).numbers


def test_a_map_through_the_kills_of_pods_leaves_what_processes_here_leave(
        cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert mapped("here") == 0
    Path("slow").touch()
    Path("done").unlink()
    assert mapped("there", *THERE) == 0
    jobs = numbers()
    assert f"submitted map {jobs['map']}, finish {jobs['finish']}; the same" in capsys.readouterr().out
    until(lambda: len({path.name.split("-")[1] for path in Path().glob("begun-*")}) == 3, "three pods")
    first, second = (cluster.pods[jobs["map"], index] for index in (0, 1))
    first.send_signal(signal.SIGKILL)
    second.send_signal(signal.SIGTERM)
    until(lambda: len(cluster.ended) == 2, "two pods that are gone")
    assert sorted(cluster.ended) == [(jobs["map"], 0, 137), (jobs["map"], 1, ExitCode.STOPPED)]
    assert mapped("there", *THERE) == 0
    assert f"Kubernetes' jobs {jobs['finish']}, {jobs['map']} are at work; " in capsys.readouterr().out
    assert mapped("there") == 2
    assert "or `kubectl delete jobs --namespace default` them" in capsys.readouterr().err
    Path("slow").unlink()
    until(lambda: cluster.conditions(jobs["finish"]) == ["Complete"], "an end")
    assert Path("there/rows.jsonl").read_bytes() == Path("here/rows.jsonl").read_bytes()
    done = Path("done").read_text().split()
    assert {*map(int, done)} == {*range(500)} and len(done) <= 500 + 2 * 64, "two batches were cut off"
    assert mapped("there", *THERE) == 0 and "complete from before" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["wrong", "deadly"])
def test_what_fails_takes_those_behind_it_away_and_the_same_command_goes_on(
        cluster: LocalCluster, capsys: pytest.CaptureFixture[str], how: str) -> None:
    """A task that says why fails at once; one that is killed each time after some."""
    Path(how).touch()
    assert mapped("there", *THERE) == 0
    jobs = numbers()
    until(lambda: cluster.conditions(jobs["map"]) == ["Failed"], "an array that fails")
    first = [code for job, index, code in cluster.ended if (job, index) == (jobs["map"], 0)]
    assert first == ([1] if how == "wrong" else [137] * (MAX_KILLS + 1))
    if how == "wrong":
        until(lambda: cluster.conditions(jobs["finish"]) == ["Failed"], "a job that waits for it")
    Path(how).unlink()
    assert mapped("there", *THERE) == 0
    said = capsys.readouterr().out
    assert ("mine.py:Step fails (ValueError: a five)" in said) is ("stopped by: line 6: " in said) is (
        how == "wrong")
    assert not (cluster.folder / "jobs" / jobs["finish"]).exists()
    until(lambda: cluster.conditions(numbers()["finish"]) == ["Complete"], "an end")
    assert len(Path("there/rows.jsonl").read_text().split("\n")) == 501


def test_the_arrays_of_a_pipeline_wait_for_each_other(
        cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And raw files are read by pods first, where they are many; then the same command submits the steps."""
    file = write_pipeline(Path.cwd())
    assert data_cli.main(["run", str(file), "--output", str(Path("here").absolute()), "--workers", "1"]) == 0
    monkeypatch.setattr(addresses, "READ_HERE_BYTES", 1000)
    there = ["run", str(file), "--output", "there", *THERE]
    assert data_cli.main(there) == 0
    assert "submitted 1 job: inputs-" in capsys.readouterr().out and [*numbers("there")] == ["inputs"]
    until(lambda: cluster.conditions(numbers("there")["inputs"]) == ["Complete"], "pods that read")
    assert data_cli.main(there) == 0
    assert "submitted 4 jobs: 00-code 00-code-" in capsys.readouterr().out.replace("parse", "code")
    until(lambda: cluster.conditions(numbers("there")["finish"]) == ["Complete"], "an end")
    assert text_hashes(Path("there")) == text_hashes(Path("here")) != {}
    ends = [job for job, _, code in cluster.ended if code == 0 and not job.startswith("inputs")]
    assert [*dict.fromkeys(ends)] == [*numbers("there").values()], "in order"


def test_a_pod_that_waits_gives_its_place_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_job, "WAIT_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *words: None)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(sys, "argv", ["array_job", str(tmp_path / "finish"), "1", str(tmp_path / "map"), "2"])
    (tmp_path / "map/done").mkdir(parents=True)
    (tmp_path / "map/done/1").touch()
    with pytest.raises(SystemExit) as ended:
        array_job.main()
    assert ended.value.code == ExitCode.STOPPED


def invalid(job: dict[str, Any]) -> Iterator[str]:
    """Yield what the API server says against an Indexed Job whose fields fit the schema
    (pkg/apis/batch/validation)."""
    spec = job["spec"]
    pod = spec["template"]["spec"]
    if pod["restartPolicy"] != "Never" or spec["completionMode"] != "Indexed":
        yield "podFailurePolicy and backoffLimitPerIndex need Never and Indexed"
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if (codes is None) == ("onPodConditions" not in rule):
            yield "a rule has one requirement"
        if codes and (codes["values"] != sorted({*codes["values"]}) or 0 in codes["values"]
                      or codes["containerName"] not in [c["name"] for c in pod["containers"]]):
            yield "values have an order, 0 is none, the container is one of the pod's"
    mounted = {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]}
    if mounted - {volume["name"] for volume in pod["volumes"]}:
        yield "a mount without a volume"
    if not kubernetes.LABEL.fullmatch(f"{job['metadata']['generateName']}xxxxx-{spec['completions'] - 1}"):
        yield "the name of a pod's host"


@pytest.mark.parametrize(("name", "num_tasks", "gpus"), [
    ("02-unique-near_duplicates", 3, 0), ("encode", 25_000, 1), ("x" * 90, 1, 0)])
def test_an_array_is_an_indexed_job_of_the_published_schema(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_tasks: int, gpus: int) -> None:
    (tmp_path / "site.yaml").write_text(PAGE_PROFILE.replace("mount: /shared", f"mount: {tmp_path}"))
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def noted(*words: str, text: str) -> str:
        made.append(text)
        return "job.batch/made-1"

    monkeypatch.setattr(kubernetes, "kubectl", noted)
    profile = kubernetes.load("site.yaml")
    with Arrays(tmp_path, "address", profile) as arrays:
        arrays.submit(name, print, num_tasks, cpus=2, gpus=gpus)
        arrays.submit("finish", print)
    assert Jobs.read(tmp_path) == Jobs("address", {name: "made-1", "finish": "made-1"}, "training")
    array, last = map(json.loads, made)
    assert [*refused(array, PUBLISHED), *invalid(array), *refused(last, PUBLISHED), *invalid(last)] == []
    assert json.loads((tmp_path / "logs" / name / "job.json").read_text()) == array
    assert array["spec"]["completions"] == array["spec"]["parallelism"] == min(num_tasks, 8334)
    (container,) = array["spec"]["template"]["spec"]["containers"]
    asked = {"cpu": "2", "memory": str(int(1600 * 2**30 / 96 * 2))}
    asked |= {"nvidia.com/gpu": "1"} if gpus else {}
    assert container["resources"] == {"requests": asked, "limits": asked}
    (finishing,) = last["spec"]["template"]["spec"]["containers"]
    assert finishing["command"][-2:] == [str(tmp_path / "logs" / name), str(array["spec"]["completions"])]
    assert array["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "megatron-sov",
                                           "kueue.x-k8s.io/queue-name": "llm"}


def test_the_schema_refuses_what_the_api_would(cluster: LocalCluster) -> None:
    assert mapped("there", *THERE) == 0
    job = json.loads(Path(".there.slurm/logs/map/job.json").read_text())
    job["spec"] |= {"parallelism": "3", "tasks": 3}
    job["spec"]["podFailurePolicy"]["rules"][0]["action"] = "Retry"
    del job["spec"]["template"]["spec"]["containers"][0]["name"]
    assert {sentence.split(":")[0] for sentence in refused(job, PUBLISHED)} == {
        ".spec.parallelism", ".spec.tasks", ".spec.podFailurePolicy.rules.0.action",
        ".spec.template.spec.containers.0.name"}


@pytest.mark.parametrize(("words", "sentence"), [
    (("there", *THERE, "--account", "me"), "--account me: belongs to Slurm"),
    (("../there", *THERE), "lies on no volume of the profile that may be written to"),
    (("there", *THERE, "--no-kubectl"), "kubectl: is not on PATH; install it, or type the command where"),
    (("there", *THERE, "--elsewhere"), "lies on no volume of the profile (mounts: "),
])
def test_a_mistake_is_one_sentence(
        cluster: LocalCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        words: tuple[str, ...], sentence: str) -> None:
    if words[-1] == "--no-kubectl":
        monkeypatch.setenv("PATH", "/nowhere")
    if words[-1] == "--elsewhere":
        profile, mount = Path("site.yaml").read_text(), f"mount: {Path.cwd()}"
        Path("out").mkdir()
        Path("site.yaml").write_text(profile.replace(mount, f"{mount}/out"))
        words = ("out/there", *THERE)
    assert mapped(*(word for word in words if word != "--no-kubectl")) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1, said
    assert not os.listdir(cluster.folder / "jobs")
