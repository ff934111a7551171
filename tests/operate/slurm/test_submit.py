"""`megatron-sov submit` and `submit chain`: a mistake is one message, and nothing is submitted or written."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sov import cli
from megatron_sov.model.config import RunConfig
from megatron_sov.work.clusters.cluster import load_profile
from tests.pages_typed import blocks, page_text, shell_lines

RUN = ("tiny-solar-open", "--data", "tokens", "--run", "runs/a", "--set", "train.steps=5", "--set",
       "train.global_batch_size=8", "--set", "train.micro_batch_size=1")
CLUSTER = ("--cluster", "site.yaml")
EVALUATION = ("--set", "train.export_every_checkpoints=1", "--set", 'evaluate.background.tasks=["ppl"]',
          "--set", "evaluate.background.where=slurm", "--set")


@pytest.mark.parametrize(("words", "message"), [
    (("pretrian", *CLUSTER, *RUN), "stage 'pretrian': does not exist; did you mean 'pretrain'?"),
    (("pretrain", *RUN),
     "--cluster: is missing; pass one of a100, b200, b300, gb200, gb300, h100, h200, local, one-node"),
    (("pretrain", "--cluster", "h100", *RUN), "--cluster h100: account: is missing; pass --account NAME"),
    (("pretrain", *CLUSTER, "--nodes", "3", *RUN), "--nodes 3 x 1 processes do not fit tiny-solar-open: "
                                                "train.global_batch_size = 8"),
    (("pretrain", *CLUSTER, "--nodes", "2", "--min-nodes", "4", *RUN),
     "--min-nodes 4: must not be above --nodes 2"),
    (("pretrain", *CLUSTER, "tiny-solar-open", "--run", "x"),
     "--data: is missing; pass a file of chats, pairs or text, or a folder made by `sov-data pack`"),
    (("pretrain", *CLUSTER, *RUN, "--nodes-set", "two:a=1"),
     "--nodes-set two:a=1: must have the form N:key=value"),
    (("pretrain", *CLUSTER, "--time", "2", *RUN), "time limit '2': is 120 s, and the job is asked to save"),
    (("pretrain", *CLUSTER, "--nodes-set", "2:parallel.ep=2", *RUN),
     "--nodes-set 2:parallel.ep=2: the job has never 2 nodes"),
    (("pretrain", *CLUSTER, "--nodes", "8", *RUN), "Slurm refuses the job: "),
    (("pretrain", *CLUSTER, *RUN[:4], "/dev/null/x", *RUN[5:]),
     "/dev/null/x/slurm: cannot be made, since a file is in the way"),
    (("data", *CLUSTER, "--prove", "pack", "--input", "a", "--output", "x"),
     "--prove: checks the layout of a training stage"),
    (("data", *CLUSTER, "--array", "3", "pack", "--input", "a", "--output", "x"),
     "--array 3: must lie between 2 and the number of"),
    (("tokenizer", *CLUSTER, "train", "--input", "en=nowhere:0.5", "--output", "x"),
     "/nowhere does not exist; make it before"),
    (("pretrain", *CLUSTER, "--continue", *RUN), "--continue: belongs to a chain"),
    (("pretrain", *CLUSTER, *RUN, *EVALUATION, "evaluate.background.cluster=h100"),
     "evaluate.background.cluster = h100: the run could not submit"),
])
def test_a_mistake_gives_one_sentence_and_no_files(site: Path, capsys: pytest.CaptureFixture[str],
                                                   words: tuple[str, ...], message: str) -> None:
    (site / "tokens").mkdir()
    before = sorted(site.rglob("*"))
    assert cli.main(["submit", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 + errors.count("; write\n"), errors
    assert sorted(site.rglob("*")) == before


def test_missing_slurm_is_reported_but_dry_runs_print_the_script(site: Path,
                                                                 capsys: pytest.CaptureFixture[str],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "tokens").mkdir()
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", "pretrain", *CLUSTER, *RUN]) == 2
    assert "sinfo: is not on PATH, so Slurm is not installed here" in capsys.readouterr().err
    assert cli.main(["submit", "pretrain", *CLUSTER, "--dry-run", *RUN]) == 0
    assert "#SBATCH --job-name=pretrain-a\n" in capsys.readouterr().out
    assert not (site / "runs").exists()


@pytest.mark.parametrize(("refuted_ranks", "code"), [(None, 0), (2, 3)])
def test_every_layout_that_a_job_may_have_is_proved_first(site: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          refuted_ranks: int | None, code: int) -> None:
    (site / "tokens").mkdir()
    proved = []

    def prove_run(config: RunConfig, num_ranks: int) -> tuple[int, SimpleNamespace]:
        proved.append((num_ranks, config.parallel.ep))
        return num_ranks, SimpleNamespace(outcome="differs" if num_ranks == refuted_ranks else "equal")

    # tests/proof covers the proofs, whose imports are heavy; another test may have run the command
    monkeypatch.delitem(sys.modules, "megatron_sov.commands.operate.submit.prove_run", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_sov.proof.layout_proof", SimpleNamespace(
        EQUAL="equal", prove_run=prove_run,
        format_proof=lambda small, verdict: f"{small}: {verdict.outcome}"))
    assert cli.main(["submit", "pretrain", *CLUSTER, "--prove", "--dry-run", "--nodes", "4",
                     "--min-nodes", "2", "--nodes-set", "2:parallel.ep=2", *RUN]) == code

    script, messages = capsys.readouterr()
    assert proved == [(4, 1), (2, 2)]
    assert "4: equal" in messages and ("2: differs" in messages) == (code == 3)
    assert ("#SBATCH" in script) == (code == 0) and "equal" not in script


def test_missing_inputs_are_reported_before_proofs(site: Path, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "megatron_sov.commands.operate.submit.prove_run", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_sov.proof.layout_proof", None)  # importing it fails

    assert cli.main(["submit", "pretrain", *CLUSTER, "--prove", *RUN]) == 2

    assert "/tokens does not exist; make it before" in capsys.readouterr().err


# Chain files.

PACK = "{stage: data, arguments: pack --tokenizer t --input t --output tokens}"
TRAIN = ("{stage: pretrain, arguments: tiny-solar-open --data tokens --run run --set train.steps=2 "
         "--set train.global_batch_size=8 --set train.micro_batch_size=1}")

SHORT = TRAIN.replace("{", "{name: big, time_limit: '1', ")
UNUSED = TRAIN.replace("{", "{nodes_set: ['4:parallel.ep=2'], ")


@pytest.mark.parametrize(("text", "message"), [
    ("cluster: site.yaml\nstages: [{stage: dtaa, arguments: x}]",
     "stage 'dtaa': does not exist; did you mean 'data'?"),
    ("cluster: site.yaml\nstages: [{stage: data, argumets: x}]",
     "argumets: no such setting; did you mean 'stages.0.arguments'?"),
    (f"stages: [{PACK}]", "has no cluster"),
    (f"cluster: site.yaml\nstages: [{PACK}, {PACK.replace('{', '{name: two, ')}]", "two stages write to"),
    (f"cluster: site.yaml\nstages: [{TRAIN}]", "pretrain: {site}/tokens does not exist; make it before"),
    (f"cluster: site.yaml\nstages: [{PACK}, {TRAIN.replace('{', '{after: [dat], ')}]",
     "comes after 'dat', which is not an earlier stage"),
    (f"cluster: site.yaml\nstages: [{PACK}, {TRAIN.replace('{', '{nodes: 3, ')}]",
     "--nodes 3 x 1 processes do not fit"),
    (f"cluster: nowhere\nstages: [{PACK}]", "--cluster nowhere: there is no such profile"),
    (f"cluster: site.yaml\nstages: [{PACK}, {SHORT}]", "chain.yaml: stage big: time limit '1': is 60 s"),
    (f"cluster: site.yaml\nstages: [{PACK}, {UNUSED}]",
     "chain.yaml: stage pretrain: --nodes-set 4:parallel.ep=2: the job"),
])
def test_a_mistake_in_a_chain_is_one_sentence(site: Path, capsys: pytest.CaptureFixture[str], text: str,
                                              message: str) -> None:
    (site / "t").mkdir()
    (site / "chain.yaml").write_text(text)
    before = sorted(site.rglob("*"))
    assert cli.main(["submit", "chain", "chain.yaml"]) == 2
    errors = capsys.readouterr().err
    assert message.replace("{site}", str(site)) in errors and errors.count("\n") == 1, errors
    assert sorted(site.rglob("*")) == before


def test_a_dry_run_shows_every_script(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "t").mkdir()
    (site / "chain.yaml").write_text(f"cluster: site.yaml\nstages: [{PACK}, {TRAIN}]")
    assert cli.main(["submit", "chain", "chain.yaml", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "# pretrain: to be submitted, after data" in output and output.count("#!/bin/bash") == 2
    assert f"for needed in {site}/tokens/manifest.json; do" in output
    assert not (site / "run").exists()


def test_a_job_that_could_not_begin_its_work_says_why(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "t").mkdir()
    (site / "chain.yaml").write_text(f"cluster: site.yaml\nstages: [{PACK}, {TRAIN}]")
    (site / "chain.yaml.jobs.json").write_text(
        json.dumps({"time_s": 0.0, "jobs": {"data": ["999998"], "pretrain": ["999999"]}}))
    (site / "tokens.slurm").mkdir()
    (site / "tokens.slurm/999998.log").write_text("job: modules of the profile cannot be loaded\n")
    assert cli.main(["submit", "chain", "chain.yaml"]) == 2
    output = capsys.readouterr().out
    assert ("data: not complete, its job ended before it started work: "
            "modules of the profile cannot be loaded\n" in output)
    assert "pretrain: not complete, its job 999999 never began" in output


def test_stage_options_belong_into_the_file(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "chain", "chain.yaml", "--nodes", "2"]) == 2
    assert "--nodes belongs to a stage; write it into chain.yaml" in capsys.readouterr().err
    assert cli.main(["submit", "chain"]) == 2
    assert "takes one file, not none" in capsys.readouterr().err


PAGE = page_text("slurm.md")


@pytest.mark.parametrize("line", shell_lines(PAGE, "bash"))
def test_commands_of_the_page_write_scripts(site: Path, capsys: pytest.CaptureFixture[str],
                                            line: str) -> None:
    chains = (block for block in blocks(PAGE, "yaml") if "stages:" in block)
    for name, chain in zip(("chain", "rounds"), chains, strict=True):
        (site / f"{name}.yaml").write_text(chain)
    assert cli.main([*shlex.split(line)[1:], "--dry-run"]) == 0
    assert "#SBATCH --account=mine\n" in capsys.readouterr().out


def test_the_profile_on_the_page_is_sound(site: Path) -> None:
    (profile,) = (block for block in blocks(PAGE, "yaml") if "partition:" in block)
    (site / "mine.yaml").write_text(profile)
    assert load_profile("mine.yaml").container.kind == "apptainer"
