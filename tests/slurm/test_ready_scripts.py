"""slurm/scripts: what the chains give, what a real Slurm takes, and what runs when somebody types `sbatch`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.slurm import chain_file

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm/scripts"
ALL = sorted(SCRIPTS.glob("*/*.sbatch"))
BIG = ("k-exaone-236b", "solar-open-102b")
TINY = ("tiny-k-exaone", "tiny-solar-open")


def test_there_are_scripts_for_the_published_recipes_and_their_tiny_ones() -> None:
    assert chain_file.names() == sorted(p.name for p in SCRIPTS.iterdir()) == [*BIG, *TINY]
    assert set(chain_file.names()) <= set(recipes.names())
    for name in chain_file.names():
        stages = [stage.stage for stage in chain_file.read_chain(name).stages]
        assert {"tokenizer", "data", "pretrain", "extend", "sft", "convert", "eval"} == set(stages), name


@pytest.mark.parametrize("name", [*BIG, *TINY])
def test_scripts_are_what_their_chain_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = f"slurm/scripts/{name}"
    assert cli.main(["submit", "chain", name, "--scripts", folder]) == 0
    fresh = {p.name: p.read_text() for p in (tmp_path / folder).iterdir()}
    kept = {p.name: p.read_text() for p in (SCRIPTS / name).iterdir()}
    assert sorted(fresh) == sorted(kept), "slurm/scripts is stale: run `make scripts`"
    assert [file for file in fresh if fresh[file] != kept[file]] == [], "slurm/scripts is stale: run `make scripts`"


def test_nothing_of_one_machine_stands_in_a_script() -> None:
    for script in ALL:
        text = script.read_text()
        assert not re.search(r"code-[0-9a-f]{12}|PYTHONPATH=|--chdir", text), script
        assert str(ROOT) not in text and sys.executable not in text, script
        assert text.count("records=\"$WORK\"/") == text.count("target=\"$WORK\"/") == 1, script
        account = "--account=NAME " if script.parent.name in BIG else ""
        assert f"#   sbatch {account}{script.relative_to(ROOT)}\n" in text


def test_slurm_would_take_every_script_as_it_stands(cluster: Any, site: Path) -> None:
    """On as many nodes as it asks for: 64, which a partition of the virtual cluster has in name."""
    for script in ALL:
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script
        cluster.run("sbatch", "--test-only", "--partition=wide", str(script))
    pretrain = SCRIPTS / "k-exaone-236b/04-pretrain.sbatch"
    refused = subprocess.run(["sbatch", "--test-only", "--partition=wide", "--nodes=65", str(pretrain)], env=cluster.env,
                             capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "node configuration is not available" in refused.stderr


def exported(**variables: object) -> str:
    """Return sbatch's option for variables of the shell that submits."""
    return "--export=ALL," + ",".join(f"{name}={value}" for name, value in variables.items())


def log_of(job: str, work: Path) -> str:
    """Return what a job's script has written: to where sbatch was typed, and to its records."""
    files = [file for folder, find in ((Path(), Path.glob), (work, Path.rglob)) for end in (f"{job}.log", f"{job}_*.log")
             for file in find(folder, f"*{end}")]
    return "".join(file.read_text() for file in files)


def test_scripts_of_the_big_recipes_start_and_say_what_is_missing(cluster: Any, site: Path) -> None:
    work, jobs = site / "work", {}
    for script in (script for script in ALL if script.parent.name in BIG):
        nodes = ("--nodes=1",) if "case $SLURM_JOB_NUM_NODES in" in script.read_text() else ()
        variables = exported(WORK=work / script.parent.name, PYTHON=sys.executable)
        jobs[script] = cluster.sbatch(variables, *nodes, str(script), cwd=site)
    for script, job in jobs.items():
        assert cluster.wait(job)["ExitCode"] == "2:0", script
        expected = ("does not exist; pass a text file, a .jsonl file or a folder" if script.name.startswith("01-") else
                    "so an earlier stage is not complete; this one does not start")
        assert expected in log_of(job, work), script


def test_a_python_without_the_package_is_told(cluster: Any, site: Path) -> None:
    script = SCRIPTS / "tiny-solar-open/02-tokenizer.sbatch"
    (site / "work/corpus").mkdir(parents=True)
    (site / "work/corpus/manifest.json").touch()
    job = cluster.sbatch(exported(PYTHON="/usr/bin/false"), str(script), cwd=site)
    assert cluster.wait(job)["ExitCode"] == "1:0"
    assert "job: no answer from megatron_sov.slurm.attempts, see above" in log_of(job, site / "work")


TRAINING = ("train.steps=2", "train.num_threads=1", "train.eval_every_steps=0", "data.heldout_tokens=512",
            "data.max_epochs=0")
MODEL = ("model.vocab_size=1024", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16")
NEEDLES = ("needle.lengths_tokens=[512]", "needle.depths=[0.5]", "needle.samples=1", 'needle.kinds=["single"]')


def settings(*given: str) -> tuple[str, ...]:
    return tuple(word for setting in given for word in ("--set", setting))


SMALLER = {
    "tokenizer": ("--vocab-size", "1024"), "tokens": ("--heldout", "0.2"), "chats": ("--heldout", "0.2"),
    "pretrain": settings(*TRAINING, *MODEL), "extend-512": settings(*TRAINING, *NEEDLES), "sft": settings(*TRAINING)}
"""Stage -> what is added to the command of its script, so that it takes seconds."""


@pytest.fixture
def corpus(token_shards: Path, packed_data: Any, tmp_path: Path) -> Path:
    """What the first script of a tiny recipe would gather."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    shutil.copyfile(token_shards.parent / "first.jsonl", folder / "english.jsonl")
    shutil.copyfile(token_shards.parent / "second.jsonl", folder / "code.jsonl")
    shutil.copyfile(packed_data.text.parent / "chat.jsonl", folder / "chat.jsonl")
    (folder / "manifest.json").touch()
    return folder


@pytest.mark.slow
def test_the_scripts_of_a_tiny_recipe_run_to_their_end(cluster: Any, site: Path, corpus: Path) -> None:
    """Made for the cluster at hand, submitted one after the other, as slurm/README.md shows."""
    assert cli.main(["submit", "chain", "tiny-solar-open", "--cluster", "site.yaml", "--scripts", "scripts"]) == 0
    work, jobs = site / "work", {}
    shutil.copytree(corpus, work / "corpus")
    for script in sorted(Path("scripts").iterdir()):
        stage = script.stem.partition("-")[2]
        after = (f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes") if jobs else ()
        words = (*after, str(script), *SMALLER.get(stage, ()))
        jobs[stage] = cluster.sbatch(exported(PYTHON=sys.executable), *words, cwd=site)
    for stage, job in jobs.items():
        found = cluster.wait(job, timeout_s=600)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), (stage, log_of(job, work))
    assert "manifest.json exists: there is nothing left to do" in log_of(jobs["corpus"], work)
    first_lines = Path(f"tiny-solar-open-pretrain-{jobs['pretrain']}.log").read_text()
    assert first_lines == f"job: its log is {work}/pretrain/slurm/{jobs['pretrain']}.log\n"
    for run in ("pretrain", "extend-512", "sft"):
        assert [e["step"] for e in final_steps(list(read_events(work / run / "events.jsonl")))] == [1, 2]
    assert read_manifest(work / "hf").kind == "hf_model"
    assert set(json.loads((work / "ppl.json").read_text())) == {"english", "code"}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_script_starts_as_it_stands(cluster: Any, site: Path, token_shards: Path) -> None:
    """With the look at the node, and two ranks; sent a second time, it says that nothing is left to do."""
    script = SCRIPTS / "tiny-k-exaone/05-pretrain.sbatch"
    shared = site / "shared"
    shared.mkdir()
    (shared / "tokens").symlink_to(token_shards)
    words = (exported(WORK="shared", PYTHON=sys.executable), str(script), *settings(*TRAINING, *MODEL))
    job = cluster.sbatch(*words, cwd=site)
    found, run = cluster.wait(job, timeout_s=600), shared / "pretrain"
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), log_of(job, shared)
    start = next(e for e in read_events(run / "events.jsonl") if e["event"] == "run_start")
    assert (start["recipe"], start["num_ranks"]) == ("tiny-k-exaone", 2)
    assert len(list((run / f"slurm/logs/{job}-0/preflight").glob("rank-*.json"))) == 2
    again = cluster.sbatch(*words, cwd=site)
    assert cluster.wait(again)["ExitCode"] == "0:0"
    assert "complete.json exists: there is nothing left to do" in log_of(again, shared)
