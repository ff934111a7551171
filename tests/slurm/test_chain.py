"""Chain files: what is wrong with one is said before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov import cli

PACK = "{stage: data, arguments: pack --tokenizer t --input t --output tokens}"
TRAIN = ("{stage: pretrain, arguments: tiny-solar-open --data tokens --run run --set train.steps=2 "
         "--set train.global_batch_size=8 --set train.micro_batch_size=1}")

SHORT = TRAIN.replace("{", "{name: big, time_limit: '1', ")
UNUSED = TRAIN.replace("{", "{nodes_set: ['4:parallel.ep=2'], ")


@pytest.mark.parametrize(("text", "sentence"), [
    ("stages: []", "has no stages"),
    ("cluster: site.yaml\nstages: [{stage: dtaa, arguments: x}]",
     "stage 'dtaa': does not exist; did you mean 'data'?"),
    ("cluster: site.yaml\nstages: [{stage: data, argumets: x}]",
     "argumets: no such setting; did you mean 'stages.0.arguments'?"),
    (f"stages: [{PACK}]", "names no cluster"),
    (f"cluster: site.yaml\nstages: [{PACK}, {PACK}]", "'data' names two stages"),
    (f"cluster: site.yaml\nstages: [{PACK}, {PACK.replace('{', '{name: two, ')}]", "two stages write to"),
    (f"cluster: site.yaml\nstages: [{TRAIN}]", "pretrain: {site}/tokens does not exist; make it before"),
    (f"cluster: site.yaml\nstages: [{PACK}, {TRAIN.replace('{', '{after: [dat], ')}]",
     "comes after 'dat', which is no stage"),
    (f"cluster: site.yaml\nstages: [{PACK}, {TRAIN.replace('{', '{nodes: 3, ')}]",
     "--nodes 3 x 1 processes do not fit"),
    (f"cluster: nowhere\nstages: [{PACK}]", "--cluster nowhere: there is no such profile"),
    ("cluster: site.yaml\nstages: [{stage: data, arguments: pack 'x}]",
     "chain.yaml: stage data: arguments = \"pack 'x\": "),
    (f"cluster: site.yaml\nstages: [{PACK}, {SHORT}]", "chain.yaml: stage big: time limit '1': is 60 s"),
    (f"cluster: site.yaml\nstages: [{PACK}, {UNUSED}]",
     "chain.yaml: stage pretrain: --nodes-set 4:parallel.ep=2: the job"),
    ("a: [", "is no YAML"),
])
def test_a_mistake_is_one_sentence(site: Path, capsys: pytest.CaptureFixture[str], text: str,
                                   sentence: str) -> None:
    (site / "t").mkdir()
    (site / "chain.yaml").write_text(text)
    before = sorted(site.rglob("*"))
    assert cli.main(["submit", "chain", "chain.yaml"]) == 2
    said = capsys.readouterr().err
    assert sentence.replace("{site}", str(site)) in said and said.count("\n") == 1, said
    assert sorted(site.rglob("*")) == before


def test_a_dry_run_shows_every_script(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "t").mkdir()
    (site / "chain.yaml").write_text(f"cluster: site.yaml\nstages: [{PACK}, {TRAIN}]")
    assert cli.main(["submit", "chain", "chain.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# pretrain: to be submitted, after data" in shown and shown.count("#!/bin/bash") == 2
    assert f"for needed in {site}/tokens/manifest.json; do" in shown
    assert not (site / "run").exists()


def test_a_job_that_could_not_begin_its_work_says_why(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "t").mkdir()
    (site / "chain.yaml").write_text(f"cluster: site.yaml\nstages: [{PACK}, {TRAIN}]")
    (site / "chain.yaml.jobs.json").write_text(
        json.dumps({"time_s": 0.0, "jobs": {"data": ["999998"], "pretrain": ["999999"]}}))
    (site / "tokens.slurm").mkdir()
    (site / "tokens.slurm/999998.log").write_text("job: modules of the profile cannot be loaded\n")
    assert cli.main(["submit", "chain", "chain.yaml"]) == 2
    said = capsys.readouterr().out
    assert ("data: not complete, its job ended before it began its work: "
            "modules of the profile cannot be loaded\n" in said)
    assert "pretrain: not complete, its job 999999 never began" in said


def test_stage_options_belong_into_the_file(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "chain", "chain.yaml", "--nodes", "2"]) == 2
    assert "--nodes belongs to a stage; write it into chain.yaml" in capsys.readouterr().err
    assert cli.main(["submit", "chain"]) == 2
    assert "takes one file, not none" in capsys.readouterr().err
