"""Generated scripts, submitted to a real Slurm: sick and dead nodes, time limits, chains, and side jobs."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.commands.operate.runs.logs_run import list_log_files
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.obs.events import read_events
from megatron_sov.train.side_jobs.evaluations import ExportEvaluations
from tests.run_files import read_steps

STEPS = {False: 75, True: 100}
"""Whether the test kills a rank -> number of steps, enough for all events before the run ends."""
Submit = Callable[..., str]


def build_arguments(packed: Any, run: Path, small: tuple[str, ...], *more: str) -> list[str]:
    """Return the arguments of a small `pretrain`."""
    return ["tiny-solar-open", "--data", str(packed.text), "--run", str(run), *small, *more]


def read_attempt_ends(records: Path) -> list[dict[str, Any]]:
    return [r for r in read_events(records / "attempts.jsonl") if r["event"] == "end"]


def submit_twice(submit: Submit, capsys: pytest.CaptureFixture[str], records: Path, *words: str) -> str:
    """Submit a job, check that a second job of the same run is refused, and return the job's number."""
    job = submit(records, *words)
    assert cli.main(["submit", *words]) == 2
    assert f"its job {job} is " in capsys.readouterr().err
    return job


@pytest.mark.distributed
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_a_run_survives_sick_nodes_time_limit_crash_and_killed_rank(
        cluster: Any, site: Path, submit: Submit, until: Any, small: tuple[str, ...], packed_data: Any,
        run_command: Any, killed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The losses equal an undisturbed run's. test_attempts.py and tests/e2e cover ranks that crash."""
    length = ("--set", f"train.steps={STEPS[killed]}", "--set", "train.checkpoint_every_steps=10")
    undisturbed = run_command("pretrain", *build_arguments(packed_data, site / "whole", small, *length),
                              "--nproc", "2")
    assert undisturbed.returncode == 0, undisturbed.stderr
    (site / "scratch").mkdir()
    # on n1 the scratch folder is read-only
    cluster.in_node("n1", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(site / "scratch"))
    profile = (site / "site.yaml").read_text().replace("enabled: false",
                                                       "min_free_disk_bytes: 1\n  max_matmul_ratio: 1000")
    (site / "preflight.yaml").write_text(profile + f"scratch: {site / 'scratch'}\n")
    run, records = site / "run", site / "run/slurm"
    cluster.wait_idle(["n1", "n2", "n3", "n4"])  # otherwise the job would not begin on the sick node n1
    job = submit_twice(submit, capsys, records, "pretrain", "--cluster", "preflight.yaml", "--nodes", "2",
                       *build_arguments(packed_data, run, small, *length))

    def wait_for_step(step: int, restarts: int) -> None:
        def is_reached() -> bool:
            result = cluster.job(job)
            assert result["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), (
                result, (records / f"{job}.log").read_text())
            return len(read_steps(run)) >= step and result["Restarts"] == str(restarts)

        until(is_reached, 600, f"step {step}")

    try:
        wait_for_step(8, 1)
        assert cluster.job(job)["NodeList"] == "n[2-3]", "preflight has excluded n1"
        # the signal that Slurm sends before the time limit
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_for_step(len(read_steps(run)) + 8, 2)
        cluster.crash("n2")
        wait_for_step(len(read_steps(run)) + 8, 3)
        assert cluster.job(job)["NodeList"] == "n[3-4]"
        if killed:
            cluster.ranks("n4")[0].kill()
        result = cluster.wait(job, timeout_s=600)
    finally:
        cluster.resume("n1")
        cluster.resume("n2")
    log = (records / f"{job}.log").read_text()
    assert (result["JobState"], result["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert [e["outcome"] for e in read_attempt_ends(records)] == [
        "sick_nodes", "stopped", "cut_off", *["crash"] * killed, "complete"], log
    assert read_attempt_ends(records)[2]["reason"] == "n2 went down"
    assert not killed or "rank 1 on n4" in read_attempt_ends(records)[3]["reason"]
    assert "n1 is not fit: rank 0: disk cannot be written" in log
    losses, expected = ([(step["step"], step["loss"]) for step in read_steps(folder)]
                        for folder in (run, site / "whole"))
    assert losses == expected
    assert len(read_steps(run)) == STEPS[killed]
    script = (records / "pretrain.sbatch").read_text()
    code = next(records.glob("code-*"))
    assert str(code) in script and (code / "megatron_sov/operate/slurm/attempts.py").is_file()
    assert json.loads((records / "pretrain.json").read_text())["config"]["train"]["steps"] == STEPS[killed]
    again = submit(records, "pretrain", "--cluster", "site.yaml",
                   *build_arguments(packed_data, run, small, *length))
    assert cluster.wait(again)["JobState"] == "COMPLETED", "a complete run has nothing left to do"


CHAIN = """cluster: site.yaml
stages:
  - stage: data
    arguments: >-
      pack --tokenizer {tokenizer} --input even={even} --input odd={odd}
      --workers 1 --heldout 0.1 --output tokens
    array: 2
  - stage: pretrain
    arguments: {pretrain}
  - {{stage: convert, arguments: to-hf run hf}}
"""


def test_a_failing_stage_stops_its_chain_and_continue_picks_it_up(cluster: Any, site: Path,
                                                                  small: tuple[str, ...], packed_data: Any,
                                                                  capsys: pytest.CaptureFixture[str],
                                                                  warm_python: str) -> None:
    """The data stage uses plain Python, to run the copied code; other jobs use `warm_python`."""
    python = site / "python"
    python.write_text("#!/bin/bash\n"
                      f'case "$*" in *"-m data_prep.cli "*) exec {sys.executable} "$@";; esac\n'
                      f'exec {warm_python} "$@"\n')
    python.chmod(0o755)
    profile = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text(profile.replace(warm_python, str(python)))
    odd = site / "odd.jsonl"
    odd.write_text("this is no JSON\n")
    words = ("tiny-solar-open", "--data", "tokens", "--run", "run", *small, "--set", "train.steps=3")
    even = packed_data.text.parent / "even.jsonl"
    (site / "chain.yaml").write_text(CHAIN.format(tokenizer=packed_data.tokenizer, even=even, odd=odd,
                                                  pretrain=json.dumps(shlex.join(words))))

    def states() -> list[str]:
        jobs = json.loads((site / "chain.yaml.jobs.json").read_text())["jobs"]
        return [cluster.wait(numbers[-1], timeout_s=600)["JobState"] for numbers in jobs.values()]

    assert cli.main(["submit", "chain", "chain.yaml"]) == 0
    assert states() == ["CANCELLED"] * 3
    assert cli.main(["submit", "chain", "chain.yaml"]) == 2
    captured = capsys.readouterr()
    assert "data: not complete, its job ended by: mistake, rank 0 on" in captured.out
    assert "convert: not complete, its job" in captured.out
    assert "never began: an earlier stage failed" in captured.out
    assert "was submitted before; pass --continue" in captured.err
    odd.write_text((packed_data.text.parent / "odd.jsonl").read_text())
    assert cli.main(["submit", "chain", "--continue", "chain.yaml"]) == 0
    assert states() == ["COMPLETED"] * 3
    assert [s["name"] for s in read_manifest(site / "tokens").content["sources"]] == ["even", "odd"]
    assert read_manifest(site / "hf").kind == "hf_model"
    assert cli.main(["submit", "chain", "chain.yaml", "--continue"]) == 0
    assert "every stage is complete" in capsys.readouterr().out


@pytest.mark.deep  # side_jobs/test_evaluations.py has it without Slurm
@pytest.mark.distributed
def test_a_job_brings_the_figures_of_an_export(site: Path, cluster: Any, until: Callable[..., None],
                                               hf_models: dict[str, Path], token_shards: Path) -> None:
    run = site / "run"
    shutil.copytree(hf_models["solar_open"], run / "exports/step-10")
    (run / "exports/step-10/manifest.json").write_text("{}")
    config = apply_settings(recipes.get("tiny-solar-open"), [
        f"data.paths={json.dumps({str(token_shards): 1.0})}", 'data.phases=[{"name": "main", "seq_len": 64}]',
        "data.heldout_tokens=128", "train.export_every_checkpoints=1", 'evaluate.background.tasks=["ppl"]',
        "evaluate.background.where=slurm", f"evaluate.background.cluster={site / 'site.yaml'}"])
    events: list[dict[str, Any]] = []
    evaluations = ExportEvaluations(run, config,
                                    lambda name, **fields: events.append({"event": name, **fields}))
    # a partition that is down holds the job in the queue, so it cannot end before the assertions
    cluster.run("scontrol", "update", "partitionname=batch", "state=down")
    try:
        evaluations.wait()
        assert events == [] and len(evaluations._submitted) == 1
    finally:
        cluster.run("scontrol", "update", "partitionname=batch", "state=up")

    def has_event() -> bool:
        evaluations.poll(now=True)
        return bool(events)

    until(has_event, 600, "the figures of the job")
    assert [(e["event"], e["step"], e.get("error")) for e in events] == [("evaluation", 10, None)]
    figures = json.loads((run / "evaluations/step-10.ppl.json").read_text())
    assert set(figures) == {"first", "second"} and all(row["bits_per_byte"] > 0 for row in figures.values())
    labels = [file.label for file in list_log_files(run)]
    assert labels[0].startswith("step-10.ppl job ") and f"{labels[0]} rank 0" in labels
