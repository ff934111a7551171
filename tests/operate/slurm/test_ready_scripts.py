"""The scripts in slurm/scripts: they equal their chains, and a real Slurm accepts and runs them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import COMMANDS as DATA_COMMANDS
from data_prep.demo_corpus import build_judged_responses
from megatron_sov import cli, recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.command_line import Parser
from megatron_sov.base.settings import read_command_options
from megatron_sov.bench.lm.task_files import check_task_names
from megatron_sov.commands.operate.submit.chain import list_chains, read_chain
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.operate.slurm.stages import STAGES, build_stage_work
from megatron_sov.plan.search.recommended_layouts import sets_layout
from megatron_sov.post.rl.reward import resolve_reward_version
from megatron_sov.runs.obs.events import final_step_events, read_events
from megatron_sov.work.clusters import cluster as cluster_profiles
from tests.typed_words import format_set_options
from tokenizer.cli import COMMANDS as TOKENIZER_COMMANDS

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "slurm/scripts"
SCRIPT_FILES = sorted(SCRIPTS.glob("*/*.sbatch"))
LARGE = ("k-exaone-236b", "solar-open-102b")
TINY = ("tiny-k-exaone", "tiny-solar-open")
DATA_PROGRAMS = {"data": DATA_COMMANDS, "tokenizer": TOKENIZER_COMMANDS}
"""Stage -> commands of its program."""


def test_published_and_tiny_recipes_have_scripts() -> None:
    assert list_chains() == sorted(p.name for p in SCRIPTS.iterdir()) == [*LARGE, *TINY]
    assert set(list_chains()) <= set(recipes.names())
    for name in list_chains():
        stages = [stage.stage for stage in read_chain(name).stages]
        assert list(dict.fromkeys(stage for stage in stages if stage != "data"))[-9:] == [
            "tokenizer", "pretrain", "extend", "sft", "rl-run", "prefer", "convert", "eval", "eval-lm"], name


@pytest.mark.parametrize(("big", "tiny"), [*zip(LARGE, TINY, strict=True)])
def test_tiny_scripts_use_the_tiny_recipes_of_the_large_ones(big: str, tiny: str) -> None:
    def list_recipes(name: str) -> list[str]:
        stages = [stage for stage in read_chain(name).stages if STAGES[stage.stage].ranks]
        return [shlex.split(stage.arguments)[0] for stage in stages]

    assert [recipes.TINY[recipe] for recipe in list_recipes(tiny)] == list_recipes(big)


@pytest.mark.parametrize("name", [*LARGE, *TINY])
def test_script_parts_that_submit_does_not_check_are_valid(name: str) -> None:
    """Checks options of `sov-data` and `sov-tokenizer`, rewards of rounds, and names of benchmarks."""
    for stage in read_chain(name).stages:
        argv, parser = list(stage.argv("WORK")), Parser(prog=stage.label)
        if stage.stage in DATA_PROGRAMS:
            DATA_PROGRAMS[stage.stage][argv.pop(0)].load().add_arguments(parser)
        elif stage.stage in ("rl-run", "eval-lm"):
            STAGE_PARSERS[stage.stage](parser)
        else:
            continue
        options = read_command_options(parser.parse_args(argv))
        if stage.stage == "rl-run":
            assert resolve_reward_version(options.reward, options.reward_set), stage
        elif stage.stage == "eval-lm":
            check_task_names(options.tasks.split(","), options.settings.sources)


@pytest.mark.parametrize("name", LARGE)
def test_recipe_sources_equal_the_packed_sources_of_the_chain(name: str) -> None:
    packed: dict[str, set[str]] = {}
    for stage in read_chain(name).stages:
        argv = stage.argv("WORK")
        if argv[0] == "pack":
            sources = [Path(argv[i + 1]).stem for i, word in enumerate(argv) if word == "--input"]
            packed[argv[argv.index("--output") + 1]] = set(sources)
        elif STAGES[stage.stage].ranks:
            work = build_stage_work(stage.stage, list(argv), STAGE_PARSERS)
            assert work.config is not None
            config = work.config
            blends = [*(phase.blend for phase in config.data.phases),
                      *(stage.blend for stage in config.extend.stages),
                      *(part.blend for stage in config.extend.stages for part in stage.parts)]
            used_sources = {re.split("[@/]", source)[0] for blend in blends for source in blend} - {"needle"}
            available = set().union(*(packed[folder] for folder in work.data))
            assert used_sources <= available, (stage.label, used_sources)


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize("name", [*TINY, *LARGE])
def test_scripts_are_generated_by_their_chain(name: str, cwd: Path) -> None:
    folder = f"slurm/scripts/{name}"
    assert cli.main(["submit", "chain", name, "--scripts", folder]) == 0
    fresh = {p.name: p.read_text() for p in (cwd / folder).iterdir()}
    committed = {p.name: p.read_text() for p in (SCRIPTS / name).iterdir()}
    assert sorted(fresh) == sorted(committed), "slurm/scripts is stale: run `make scripts`"
    assert [file for file in fresh if fresh[file] != committed[file]] == [], (
        "slurm/scripts is stale: run `make scripts`")


@pytest.mark.deep
@pytest.mark.parametrize("name", LARGE)
def test_submit_writes_the_layouts_of_the_ready_scripts(name: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """A chain names no layout: both take the profile's, with a dispatcher that its image has."""
    chain = read_chain(name)
    dispatchers = cluster_profiles.load_profile(chain.cluster, needs_account=False).dispatchers
    for stage in chain.stages:
        if not STAGES[stage.stage].ranks:
            continue
        arguments = [word.replace("$WORK", "/work") for word in shlex.split(stage.arguments)]
        assert not sets_layout(arguments), stage.label
        assert cli.main(["submit", stage.stage, "--cluster", chain.cluster, "--account", "a", "--nodes",
                         str(stage.nodes), "--dry-run", *arguments]) == 0
        submitted = re.search(r"num_nodes=\d+ settings=\(.*\)", capsys.readouterr().out)
        assert submitted is not None, stage.label
        (ready,) = (script for script in (SCRIPTS / name).iterdir()
                    if re.fullmatch(rf"\d+-{stage.label}\.sbatch", script.name))
        assert submitted[0] in ready.read_text(), stage.label
        assert set(re.findall(r"expert_dispatcher=(\w+)", submitted[0])) <= {*dispatchers}


def test_scripts_contain_no_machine_specific_paths() -> None:
    for script in SCRIPT_FILES:
        text = script.read_text()
        assert not re.search(r"code-[0-9a-f]{12}|PYTHONPATH=|--chdir", text), script
        assert str(ROOT) not in text and sys.executable not in text, script
        assert text.count("records=\"$WORK\"/") == text.count("target=\"$WORK\"/") == 1, script
        account = "--account=NAME " if script.parent.name in LARGE else ""
        assert f"#   sbatch {account}{script.relative_to(ROOT)}\n" in text


def test_slurm_accepts_every_script_unchanged(cluster: Any, site: Path) -> None:
    """With each script's number of nodes: a partition of the virtual cluster has 64 nodes in name only."""
    for script in SCRIPT_FILES:
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0, script
        cluster.run("sbatch", "--test-only", "--partition=wide", str(script))
    pretrain = SCRIPTS / "k-exaone-236b/06-pretrain.sbatch"
    result = subprocess.run(["sbatch", "--test-only", "--partition=wide", "--nodes=65", str(pretrain)],
                            env=cluster.env, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "node configuration is not available" in result.stderr


def export_variables(**variables: object) -> str:
    """Return the sbatch option that exports variables to the job."""
    return "--export=ALL," + ",".join(f"{name}={value}" for name, value in variables.items())


def read_logs(job: str, work: Path) -> str:
    """Return the output of a job's script: next to the place of sbatch, and in its records."""
    ends = (f"{job}.log", f"{job}_*.log")
    paths = [Path(file) for file in os.listdir()]
    # os.walk skips folders that vanish meanwhile: other jobs rename theirs
    for folder, _, names in os.walk(work):
        paths += [Path(folder, name) for name in names]
    files = sorted(path for path in paths if any(fnmatch(path.name, f"*{end}") for end in ends))
    return "".join(file.read_text() for file in files)


@pytest.mark.parametrize(("name", "all_scripts"), [
    *(pytest.param(name, True, marks=pytest.mark.deep) for name in (LARGE[0], TINY[1])), (TINY[1], False)])
def test_scripts_start_and_name_missing_inputs(name: str, all_scripts: bool, cluster: Any, site: Path,
                                               warm_python: str) -> None:
    """All scripts of a recipe, or the first of each stage, in a $WORK with only a tiny recipe's corpus."""
    work, jobs = site / "work", {}
    stages = [stage.stage for stage in read_chain(name).stages]
    if name in TINY:
        (work / name / "corpus").mkdir(parents=True)
        (work / name / "corpus/manifest.json").touch()
    for number, script in enumerate(sorted((SCRIPTS / name).glob("*.sbatch"))):
        if not all_scripts and stages[number] in stages[:number]:
            continue
        needs_nodes = script.parent.name in LARGE and "_NUM_NODES in" in script.read_text()
        nodes = ("--nodes=1",) if needs_nodes else ()
        variables = export_variables(WORK=work / script.parent.name, PYTHON=warm_python)
        jobs[script] = cluster.sbatch(variables, *nodes, str(script), cwd=site)
    for script, job in jobs.items():
        code, sentence = "2:0", "so an earlier stage is not complete; this one does not start"
        if script.name == "01-corpus.sbatch":
            code, sentence = "0:0", "corpus/manifest.json exists: there is nothing left to do"
        elif script.name in ("01-tokenizer.sbatch", "02-tokenizer.sbatch"):
            sentence = "does not exist; pass a text file"
        elif script.name in ("04-groups.sbatch", "05-pairs.sbatch"):
            sentence = "judged.jsonl"
        assert cluster.wait(job)["ExitCode"] == code, (script, read_logs(job, work))
        assert sentence in read_logs(job, work), script


def test_a_python_without_the_package_is_reported(cluster: Any, site: Path) -> None:
    script = SCRIPTS / "tiny-solar-open/02-tokenizer.sbatch"
    (site / "work/corpus").mkdir(parents=True)
    (site / "work/corpus/manifest.json").touch()
    job = cluster.sbatch(export_variables(PYTHON="/usr/bin/false"), str(script), cwd=site)
    assert cluster.wait(job)["ExitCode"] == "1:0"
    assert "job: no answer from megatron_sov.operate.slurm.attempts, see above" in read_logs(job,
                                                                                             site / "work")


TRAINING = ("train.steps=2", "train.num_threads=1", "train.eval_every_steps=0", "data.heldout_tokens=512",
            "data.max_epochs=0")
MODEL = ("model.vocab_size=1024", "model.hidden_size=32", "model.num_layers=4", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16", "model.num_experts=4")
NEEDLES = ("needle.lengths_tokens=[512]", "needle.depths=[0.5]", "needle.samples=1",
           'needle.kinds=["single"]')


def format_settings(*changes: str) -> tuple[str, ...]:
    return tuple(format_set_options(changes))


EXTRA_ARGUMENTS = {
    "tokenizer": ("--vocab-size", "1024"), "tokens": ("--heldout", "0.2"), "chats": ("--heldout", "0.2"),
    "pretrain": format_settings(*TRAINING, *MODEL), "mid": format_settings(*TRAINING),
    "extend": format_settings(*TRAINING[1:], *NEEDLES,
                              *(f"extend.stages.{stage}.{steps}=2" for stage in (0, 1)
                                for steps in ("steps", "max_steps"))),
    "group-tokens": ("--heldout", "0.2"), "sft": format_settings(*TRAINING),
    "rl-run": ("--workers", "1", "--reward", "sum.py:Sum", *format_settings(
        *TRAINING[1:], "rollout.rounds=1", "rollout.prompts_per_round=2", "rollout.samples_per_prompt=2",
        "rollout.steps_per_round=2", "rollout.max_new_tokens=4")),
    "prefer": format_settings(*TRAINING), "verify": ("--lengths", "7"), "eval": ("--max-tokens", "1024"),
    "benchmarks": ("--limit", "1")}
EXTRA_ARGUMENTS |= {"pair-tokens": EXTRA_ARGUMENTS["group-tokens"], "prefer-rounds": (
    *EXTRA_ARGUMENTS["rl-run"], *format_settings("policy.keep_unfinished=true"))}
"""Stage -> arguments added to its script's command, which reduce its time to seconds."""


@pytest.fixture
def work(site: Path, token_shards: Path, packed_data: Any) -> Path:
    """$WORK with the inputs of the first script of a tiny recipe."""
    folder = site / "work/corpus"
    folder.mkdir(parents=True)
    shutil.copyfile(token_shards.parent / "first.jsonl", folder / "english.jsonl")
    shutil.copyfile(token_shards.parent / "second.jsonl", folder / "code.jsonl")
    shutil.copyfile(packed_data.text.parent / "chat.jsonl", folder / "chat.jsonl")
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_judged_responses(
        [{"messages": [{"content": f"What is {i}?"}, {"content": f"{i}."}]} for i in range(20)])))
    benchmark = folder / "benchmarks/code-switching/test.jsonl"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text(json.dumps({"prompt": "What is 2?", "language": "en"}) + "\n")
    (folder / "manifest.json").touch()
    # built-in rewards are equal for responses of four tokens, so use one that differs within a group
    (site / "sum.py").write_text("class Sum:\n    def score(self, row):\n"
                                 "        return float(sum(row['response'].encode()))\n")
    return folder.parent


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "last"), [
    *(pytest.param(name, "benchmarks", marks=pytest.mark.deep) for name in TINY), (TINY[1], "mid")])
def test_scripts_of_a_tiny_recipe_complete(name: str, last: str, cluster: Any, site: Path,
                                           work: Path, warm_python: str) -> None:
    """In the order of the chain: `pretrain` unchanged, with the node check and two ranks; the others adapted
    to this cluster, with one rank. `make test` starts each later stage, and test_jobs.py runs a chain to a
    converted model."""
    assert cli.main(["submit", "chain", name, "--cluster", "site.yaml", "--scripts", "scripts"]) == 0
    shipped = shutil.copy(SCRIPTS / name / "07-pretrain.sbatch", "scripts")
    jobs: dict[str, str] = {}

    def submit(script: Path, *options: str) -> str:
        stage = script.stem.partition("-")[2]
        return cluster.sbatch(export_variables(PYTHON=warm_python), *options, str(script),
                              *EXTRA_ARGUMENTS.get(stage, ()), cwd=site)

    stages = read_chain(name).stages
    is_whole, labels = last == stages[-1].label, [stage.label for stage in stages]
    stages = stages[:labels.index(last) + 1]
    for script, stage in zip(sorted(Path("scripts").iterdir()), stages, strict=is_whole):
        predecessors = tuple(jobs)[-1:] if stage.after is None else stage.after
        after = (f"--dependency=afterok:{':'.join(jobs[label] for label in predecessors)}",
                 "--kill-on-invalid-dep=yes") if predecessors else ()
        jobs[script.stem.partition("-")[2]] = submit(script, *after)
    for label, job in jobs.items():
        result = cluster.wait(job, timeout_s=600)
        assert (result["JobState"], result["ExitCode"]) == ("COMPLETED", "0:0"), (label, read_logs(job, work))
    trained = [stage.label for stage in stages if STAGES[stage.stage].ranks]
    assert set(trained) <= set(jobs)
    for run in trained:
        events = list(read_events(work / {"rl-run": "rl"}.get(run, run) / "events.jsonl"))
        assert [e["step"] for e in final_step_events(events)] == [1, 2], run
        started = next(e["num_ranks"] for e in events if e["event"] == "run_start")
        assert started == (2 if run == "pretrain" else 1), run
    pretrain, records = jobs["pretrain"], work / "pretrain/slurm"
    first_lines = Path(f"{name}-pretrain-{pretrain}.log").read_text()
    assert first_lines == f"job: its log is {records}/{pretrain}.log\n"
    assert len(list((records / f"logs/{pretrain}-0/preflight").glob("rank-*.json"))) == 2
    if is_whole:
        assert read_manifest(work / "hf").kind == "hf_model"
        assert set(json.loads((work / "ppl.json").read_text())) == {"english", "code"}
        assert set(json.loads((work / "scores.json").read_text())["tasks"]) == {"code-switching"}
    repeated = submit(Path(shipped))
    assert cluster.wait(repeated)["ExitCode"] == "0:0"
    assert "complete.json exists: there is nothing left to do" in read_logs(repeated, work)
