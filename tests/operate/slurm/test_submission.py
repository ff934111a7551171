"""Submission of jobs: parts of arrays, searched layouts, the copied code, inputs, and Slurm's messages."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.operate.slurm import submission
from megatron_sov.operate.slurm.stages import build_stage_work, check_inputs
from megatron_sov.plan.pricing import Machines
from megatron_sov.plan.search.local_search import find_layout
from megatron_sov.runs.folder import list_submitted_jobs
from megatron_sov.work.clusters import client
from megatron_sov.work.clusters.client import environment_outside_jobs
from tests.operate.slurm.test_script import H100, LOCAL, prepare_job

PACK = ("pack", "--tokenizer", "t", "--input", "a=x.jsonl", "--input=b.jsonl", "--workers", "2", "--input",
        "c", "--output", "out")


def test_an_array_shares_the_inputs_and_a_second_job_joins_the_parts(cwd: Path) -> None:
    parts, join = prepare_job("data", PACK, LOCAL, array=2).jobs
    assert parts.array_inputs == ("a=x.jsonl", "b.jsonl", "c")
    assert parts.work.arguments == ("pack", "--tokenizer", "t", "--workers", "2")
    folders = [cwd / "out.parts/part-0", cwd / "out.parts/part-1"]
    assert join.work.arguments == ("mix", *map(str, folders), "--output", f"{cwd}/out")
    assert join.needs == tuple(folder / "manifest.json" for folder in folders)


def test_a_script_that_slurm_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = subprocess.CompletedProcess([], 1, "", "sbatch: error: Invalid account\n")
    monkeypatch.setattr(client, "check_partition", lambda partition: None)
    monkeypatch.setattr(client, "run_slurm_program", lambda *words, **script: refused)
    with pytest.raises(UserError, match=r"Slurm refuses the job: .*Invalid account"):
        submission.check_with_slurm(prepare_job("data", PACK, LOCAL))


SOLAR = ("solar-open-102b", "--data", "tokens", "--run", "run")


def find_layouts(*more: str, nodes: int = 64, **request: Any) -> dict[int, tuple[str, ...]]:
    """Return number of nodes -> settings that the submission of `SOLAR` to H100 nodes adds."""
    return prepare_job("pretrain", (*SOLAR, *more), H100, nodes=nodes, **request).jobs[0].layouts


@pytest.mark.deep
def test_a_run_gets_the_layout_that_a_search_finds_for_its_gpus() -> None:
    """Settings of kernels change the layout; settings of a layout are not changed."""
    result = find_layout(recipes.get("solar-open-102b"), Machines("h100", H100, 64))
    assert result is not None and not any("dispatcher" in setting for setting in result.settings)
    assert find_layouts()[64] == result.settings
    portable = find_layouts("--set", "gpu.attention=local")[64]
    assert portable and not any("attention" in setting for setting in portable)
    assert find_layouts("--set", "parallel.pp=8") == {64: ()}
    assert find_layouts(settings={64: ("parallel.pp=4", "train.micro_batch_size=3")}) == {
        64: ("parallel.pp=4", "train.micro_batch_size=3")}
    script = prepare_job("pretrain", SOLAR, H100, nodes=64).jobs[0]
    stages = next(setting for setting in result.settings if setting.startswith("parallel.pp="))
    assert script.resources.startswith("Asks for 64 x 8 GPUs; layout: ")
    assert f"pp {stages.removeprefix('parallel.pp=')}, " in script.resources


@pytest.mark.deep
def test_a_job_with_fewer_nodes_keeps_its_layout_if_it_fits() -> None:
    config = recipes.get("qwen3-8b")
    found = prepare_job("pretrain", ("qwen3-8b", *SOLAR[1:]), H100, nodes=4, min_nodes=1).jobs[0].layouts
    assert {1, 2, 4} <= set(found) and found[2] == found[4]
    for nodes, settings in found.items():
        assert not apply_settings(config, list(settings)).problems(nodes * H100.tasks_per_node)


@pytest.mark.each(("setting", "fields", "message"), [
    ("parallel.expert_dispatcher=hybridep", {"dispatchers": ("hybridep",)},
     "dispatchers are alltoall, allgather; change the setting, or add hybridep to"),
    ('gpu.cuda_graphs=["moe_router"]', {"cuda_graphs": ("moe_router",)},
     "cuda_graphs are empty; change the setting, or add moe_router to")])
def test_kernels_that_the_profile_does_not_list_are_refused(setting: str, fields: dict[str, Any],
                                                            message: str) -> None:
    chosen = ("parallel.pp=8", "train.recompute=selective", "gpu.expert_spill=1.2",
              'gpu.recompute_modules=["layernorm", "moe_act"]', setting)
    options = [word for change in chosen for word in ("--set", change)]
    with pytest.raises(UserError, match=rf"^{setting.partition('=')[0]} = .*: the profile's {message}"):
        find_layouts(*options)
    built = dataclasses.replace(H100, **fields)
    assert prepare_job("pretrain", (*SOLAR, *options), built, nodes=64).jobs[0].layouts == {64: ()}


def test_a_layout_too_large_for_the_gpus_is_refused_with_a_fitting_one() -> None:
    with pytest.raises(UserError, match=r"needs 111\.3 GiB on each process .* the nearest layout that fits: "
                                        r"--set parallel\.pp=2$"):
        find_layouts("--set", "parallel.ep=8", "--set", "train.fp8=none", nodes=60)
    unknown = prepare_job("pretrain", (*SOLAR, "--set", "parallel.ep=8"), dataclasses.replace(H100, gpu=""),
                          nodes=60)
    assert unknown.jobs[0].layouts == {60: ()}


def test_a_task_takes_every_nth_input(cwd: Path) -> None:
    text = prepare_job("data", PACK, LOCAL, array=2).texts[0]
    block = text[text.index("inputs=("):text.index("run_step \"$attempt/srun.log\"")]

    def read_inputs(task: int) -> list[str]:
        program = f'SLURM_ARRAY_TASK_ID={task} target=there\n{block}\nprintf "%s\\n" "${{command[@]}}"'
        words = subprocess.run(["bash", "-uc", program], capture_output=True, text=True,
                               check=True).stdout.splitlines()
        return [word for flag, word in itertools.pairwise(words) if flag == "--input"]

    assert (read_inputs(0), read_inputs(1)) == (["a=x.jsonl", "c"], ["b.jsonl"])


def test_a_job_runs_the_code_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "submit_script", lambda script, after: "17")
    words = ("to-hf", str(tmp_path / "run"), str(tmp_path / "hf"))
    prepared = prepare_job("convert", words, LOCAL)
    assert submission.submit_jobs(prepared, []) == ["17"]
    assert submission.submit_jobs(prepared, []) == ["17"], "the same code is not copied twice"
    (code,) = (tmp_path / "hf.slurm").glob("code-*")
    program = ("import megatron_sov.operate.slurm.attempts as a, tokenizer, data_prep, slurm\n"
               "print(a.__file__, tokenizer.__file__, slurm.__file__)")
    completed = subprocess.run([sys.executable, "-P", "-c", program], env={"PYTHONPATH": str(code)},
                               capture_output=True, text=True, check=True)
    files = ("megatron_sov/operate/slurm/attempts.py", "tokenizer/__init__.py", "slurm/__init__.py")
    assert completed.stdout.split() == [f"{code}/{file}" for file in files]
    assert (code / "slurm/templates/header.sbatch.j2").is_file()
    assert (code / "slurm/clusters/local.yaml").is_file()
    assert list_submitted_jobs(tmp_path / "hf.slurm") == ["17", "17"]


def test_code_that_changes_while_it_is_copied_is_not_submitted(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_job("convert", ("to-hf", "run", str(tmp_path / "hf")), LOCAL)
    copyfile = submission.shutil.copyfile

    def copy_and_change(source: Path, target: Path) -> None:
        copyfile(source, target)
        if target.name == "cli.py":
            target.write_text("#")

    monkeypatch.setattr(submission.shutil, "copyfile", copy_and_change)
    with pytest.raises(UserError, match="the code changed while it was copied"):
        submission.submit_jobs(prepared, [])
    assert list((tmp_path / "hf.slurm").iterdir()) == []


@pytest.mark.each(("arguments", "path"), [
    (("train", "--input", "en=there/x:0.5", "--output", "o"), "there/x"),
    (("train", "--input", "there/x:2", "--output", "o"), "there/x"),
    (("train", "--input", "there/a:b", "--output", "o"), "there/a:b"),
])
def test_inputs_are_looked_for_without_name_and_weight(arguments: tuple[str, ...], path: str) -> None:
    work = build_stage_work("tokenizer", list(arguments), STAGE_PARSERS)
    assert work.inputs == (Path(path).absolute(),)
    with pytest.raises(UserError, match="does not exist; make it before"):
        check_inputs(work, set())
    check_inputs(work, {Path(path).absolute()})


@pytest.mark.each(("given", "other"), [
    (("distill", "--teacher"), "runs/other"), (("distill", "--teacher"), "tokens=runs/other"),
    (("prefer", "--reference"), "runs/other")])
def test_a_second_model_is_an_input_too(cwd: Path, given: tuple[str, str], other: str) -> None:
    stage, option = given
    for folder in ("tokens", "runs/sft"):
        (cwd / folder).mkdir(parents=True)
    work = build_stage_work(stage, ["tiny-solar-open", "--data", "tokens", "--from", "runs/sft", option,
                                    other, "--run", "runs/a"], STAGE_PARSERS)
    with pytest.raises(UserError, match="runs/other does not exist; make it before"):
        check_inputs(work, set())
    check_inputs(work, {cwd / "runs/other"})


@pytest.mark.each("promised", [False, True])
@pytest.mark.each("given", ["chats.jsonl", "chats.jsonl:0.5", "web=chats.jsonl"])
def test_a_file_is_packed_before_its_job_also_in_a_chain(cwd: Path, given: str, promised: bool) -> None:
    Path("chats.jsonl").touch()
    Path("runs/base").mkdir(parents=True)
    work = build_stage_work("sft", ["tiny-solar-open", "--data", given, "--from", "runs/base", "--run",
                                    "runs/a"], STAGE_PARSERS)
    with pytest.raises(UserError, match=r"is a file, not a folder of token shards; pass a folder made by "
                                        r"`sov-data pack --tokenizer DIR --input chats.jsonl --output "):
        check_inputs(work, {cwd / "runs/base"} if promised else set())


# Output of Slurm's programs as a one-line message, and the jobs that are still in the queue.

@pytest.mark.each(("text", "message"), [
    ("sbatch: error: invalid partition specified: x\n"
     "sbatch: error: Batch job submission failed: Invalid partition\n",
     "invalid partition specified: x; Batch job submission failed: Invalid partition"),
    ("allocation failure: Requested node configuration is not available\n",
     "allocation failure: Requested node configuration is not available"),
    ("sbatch: error: a\nsbatch: error: a\n", "a"),
    ("", "it gives no reason"),
])
def test_the_reason_is_one_line(text: str, message: str) -> None:
    assert client.format_error(text) == message


def test_neither_the_shell_nor_its_allocation_overrules_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_ACCOUNT", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_CONF", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "x")
    environment = environment_outside_jobs()
    assert {"SLURM_CONF", "WANDB_API_KEY"} <= set(environment)
    assert not {"SBATCH_ACCOUNT", "SLURM_MEM_PER_CPU", "SLURM_JOB_ID"} & set(environment)


def test_only_living_jobs_have_a_state(site: Path, cluster: Any) -> None:
    held = cluster.sbatch("--hold", "--output=/dev/null", "--wrap=true")
    ended = cluster.sbatch("--output=/dev/null", "--wrap=true")
    cluster.wait(ended)
    assert client.read_active_states([held, ended, "999999"]) == {held: "PENDING"}
    client.cancel_jobs([held])
    assert client.read_active_states([held]) == {}
    assert client.read_active_states([]) == {}


def test_a_job_after_one_that_failed_is_taken_away(site: Path, cluster: Any) -> None:
    failing = cluster.sbatch("--hold", "--output=/dev/null", "--wrap=exit 3")
    (site / "next.sh").write_text("#!/bin/bash\n#SBATCH --output=/dev/null\ntrue\n")
    follower = client.submit_script(site / "next.sh", after=[failing])
    cluster.run("scontrol", "release", failing)
    assert cluster.wait(follower)["JobState"] == "CANCELLED"
    with pytest.raises(UserError, match=r"Slurm refuses .*: Unable to open file"):
        client.submit_script(site / "none.sh", after=[])


def test_a_dry_run_among_the_arguments_of_a_chains_stage_is_refused() -> None:
    with pytest.raises(UserError, match=r"--dry-run: the job would do nothing; leave it out"):
        build_stage_work("pretrain", [*SOLAR, "--dry-run"], STAGE_PARSERS)
