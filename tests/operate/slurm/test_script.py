"""Texts of job scripts: arguments reach the program unchanged, and a real Slurm accepts all templates."""

import dataclasses
import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.operate.slurm.stages import STAGES
from megatron_sov.operate.slurm.submission import PreparedStage, SubmitRequest, prepare_stage
from megatron_sov.work.clusters import client, cluster
from megatron_sov.work.clusters.cluster import ClusterProfile, ContainerConfig, load_profile
from megatron_sov.work.submit.arrays import _step_lines

PAGE = Path(__file__).parents[3] / "docs/slurm.md"
TRAIN = ("--data", "tokens", "--run", "runs/a b", "--set", "train.steps=5", "--set",
         "train.global_batch_size=64", "--set", "train.micro_batch_size=1")
ARGUMENTS = {
    "tokenizer": ("train", "--preset", "solar-open", "--vocab-size", "512", "--input", "text", "--output",
                  "tokenizer"),
    "data": ("pack", "--tokenizer", "tokenizer", "--input", "a.jsonl", "--input", "b.jsonl", "--output",
             "tokens"),
    "pretrain": ("tiny-solar-open", *TRAIN), "extend": ("tiny-solar-open", "--from", "runs/a", *TRAIN),
    "sft": ("tiny-solar-open", "--from", "runs/a", *TRAIN),
    "prefer": ("tiny-solar-open", "--from", "runs/a", "--method", "ipo", *TRAIN),
    "distill": ("tiny-solar-open", "--from", "runs/a", "--teacher", "runs/b", *TRAIN),
    "convert": ("to-hf", "runs/a", "hf"),
    "eval": ("ppl", "hf", "--data", "tokens"),
    "eval-lm": ("runs/a", "--tasks", "mmlu,math500", "--data-dir", "benchmarks", "--output", "scores.json"),
    **dict.fromkeys(("rl-run", "rl-train"), (
        "tiny-solar-open", "--prompts", "p.jsonl", "--store", "store", "--reward", "math", "--from", "runs/a",
        "--run", "runs/b", "--set", "rollout.rounds=3", "--set", "rollout.max_new_tokens=128", "--set",
        "rollout.max_prompt_tokens=128", "--set", "train.global_batch_size=64", "--set",
        "train.micro_batch_size=1")),
    "rl-generate": ("tiny-solar-open", "--prompts", "p.jsonl", "--store", "store", "--from", "runs/a",
                    "--run", "runs/b", "--set", "rollout.rounds=3", "--wait", "3600"),
    "rl-reward": ("--store", "store", "--reward", "math", "--wait", "3600"),
}
"""Stage -> arguments of its program."""
H100, LOCAL = load_profile("h100", account="me"), load_profile("local")
NASTY = "it's $HOME `id` \"x\" \\ & | ; > * ? # ! ~ {} ()\t한국어"


def prepare_job(stage: str, words: tuple[str, ...], profile: ClusterProfile, **request: Any) -> PreparedStage:
    return prepare_stage(SubmitRequest(stage, words, profile, **request), STAGE_PARSERS)


def build_script(stage: str, profile: ClusterProfile, *more: str, **request: Any) -> str:
    """Return the text of the first script of a stage, with `ARGUMENTS` and further arguments."""
    return prepare_job(stage, (*ARGUMENTS[stage], *more), profile, **request).texts[0]


def read_bash_array(text: str, array: str = "command") -> list[str]:
    """Return the words of an array that a script assigns, as bash reads them."""
    (block,) = re.findall(rf"^{array}=\(.*?\)$", text, re.MULTILINE | re.DOTALL)
    program = f'settings=()\n{block}\nprintf "%s\\0" "${{{array}[@]}}"'
    return subprocess.run(["bash", "-uc", program], capture_output=True, text=True,
                          check=True).stdout.split("\0")[:-1]


def test_every_stage_has_a_template_and_is_on_the_page() -> None:
    assert set(ARGUMENTS) == set(STAGES)
    rows = re.findall(r"^\| (`[a-z`, -]+`) \| `(?:megatron-sov|sov-)", PAGE.read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall("[a-z-]+", row)} == set(STAGES)


REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((stage, {}) for stage in STAGES), ("data", {"array": 2}), ("rl-generate", {"array": 2}),
    ("pretrain", {"nodes": 4, "min_nodes": 1}))
"""Stage and fields of its `SubmitRequest`."""
MAIN_PROFILES = ("h100", "local")
"""Profiles with which every template is tried: with and without GPUs and an account."""


@pytest.mark.parametrize(("name", "requests"), [
    *(pytest.param(name, REQUESTS, id=name, marks=() if name in MAIN_PROFILES else pytest.mark.deep)
      for name in cluster.list_profiles()),
    *(pytest.param(name, REQUESTS[-1:], id=f"{name}, training")
      for name in cluster.list_profiles() if name not in MAIN_PROFILES)])
def test_a_real_slurm_takes_every_template(site: Path, name: str,
                                           requests: tuple[tuple[str, dict[str, Any]], ...]) -> None:
    account = "" if name == "local" else "me"
    profile = dataclasses.replace(cluster.load_profile(name, account="me"), account=account)
    texts = [text for stage, request in requests
             for text in prepare_job(stage, ARGUMENTS[stage], profile, **request).texts]
    for text in texts:
        client.check_script(text)
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.each(("stage", "kind"),
                  [*itertools.product(("pretrain", "data"), ("apptainer", "enroot", "pyxis"))])
def test_python_runs_in_the_container(stage: str, kind: Any) -> None:
    box = ContainerConfig(kind, "/images/my image.sif", ("/shared", "/raid:/scratch"))
    profile = dataclasses.replace(H100, container=box, environment={"NCCL_DEBUG": "WARN"})
    text = build_script(stage, profile)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    expected = {
        "apptainer": ["apptainer", "exec", "--nv", "--bind", "/shared", "--bind", "/raid:/scratch", box.image,
                      "python3", "-P"],
        "enroot": ["enroot", "start", "--rw", "--mount", "/shared:/shared", "--mount", "/raid:/scratch"],
        "pyxis": ["python3", "-P"]}[kind]
    assert read_bash_array(text, "python")[:len(expected)] == expected
    if kind == "enroot":
        assert read_bash_array(text, "python")[-5:] == ["--env", "NCCL_DEBUG", box.image, "python3", "-P"]
    if kind == "pyxis":
        assert read_bash_array(text, "srun_options") == [f"--container-image={box.image}",
                                                         "--container-mounts=/shared,/raid:/scratch"]


def test_request_overrides_stage_and_stage_overrides_profile() -> None:
    def limit(stage: str, name: str, **request: Any) -> str:
        match = re.search(r"^#SBATCH --time=(.*)$",
                          build_script(stage, cluster.load_profile(name, account="me"), **request),
                          re.MULTILINE)
        assert match is not None
        return match[1]

    assert limit("convert", "h100") == "4:00:00" and limit("convert", "local") == "2:00:00"
    assert limit("convert", "h100", time_limit="30") == limit("eval", "h100", time_limit="30") == "30"
    assert limit("pretrain", "h100") == "1-00:00:00"


@pytest.mark.each(("stage", "loads"), [*itertools.product(("pretrain", "data"), ("true", "false"))])
def test_the_clusters_own_lines_may_name_variables_that_are_not_set(stage: str, loads: str) -> None:
    profile = dataclasses.replace(H100, setup=('echo "$UNSET_BY_ALL"',), modules=("cuda/13.0",))
    head = build_script(stage, profile).partition("# -- where things are")[0]
    shell = f"module() {{ {loads}; }}\n{head}\necho went on; echo $UNSET_BY_ALL; echo not reached"
    completed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    if loads == "true":
        assert completed.stdout == "\nwent on\n" and "UNSET_BY_ALL: unbound variable" in completed.stderr
    else:
        assert completed.returncode == 2 and completed.stdout == "\n"
        assert completed.stderr == "job: modules of the profile cannot be loaded\n"


def test_jobs_with_a_shared_store_are_one_array() -> None:
    ((text,), (alone,)) = (prepare_job("rl-generate", ARGUMENTS["rl-generate"], H100, array=count).texts
                           for count in (3, 0))
    assert "#SBATCH --array=0-2" in text and "#SBATCH --array" not in alone
    assert read_bash_array(text) == read_bash_array(alone) == ["-m", "megatron_sov", "rl", "generate",
                                                               *ARGUMENTS["rl-generate"]]
    done = [re.findall(r"^(?:target|done)=.*$", script, re.MULTILINE) for script in (text, alone)]
    assert done[0] == done[1]
    assert re.search(r"store\.rl-generate\.slurm/complete-[0-9a-f]{8}\.json", done[0][1])
    assert "records=$records/task-$SLURM_ARRAY_TASK_ID" in text
    assert "--write-done" in text
    more = prepare_job("rl-generate", (*ARGUMENTS["rl-generate"], "--rounds", "4"), H100)
    assert more.work.completion != prepare_job("rl-generate", ARGUMENTS["rl-generate"], H100).work.completion
    with pytest.raises(UserError, match="leave it out for convert"):
        prepare_job("convert", ARGUMENTS["convert"], H100, array=2)


@pytest.mark.parametrize("stage", ["rl-run", "rl-train"])
def test_rounds_are_trained_by_ranks_that_go_on_where_they_were(stage: str) -> None:
    prepared = prepare_job(stage, ARGUMENTS[stage], H100)
    (text,), work = prepared.texts, prepared.work
    assert read_bash_array(text) == ["-m", "megatron_sov", *stage.split("-"), *ARGUMENTS[stage], "--resume"]
    assert "#SBATCH --ntasks-per-node=8" in text and work.completion == Path.cwd() / "runs/b/complete.json"
    assert {path.name for path in work.inputs} == {"a", "p.jsonl"}, "the store may be missing"
    assert work.config is not None
    assert [p.name for p in work.config.data.phases] == ["round-0001", "round-0002", "round-0003"]
    with pytest.raises(UserError, match=r"rollout\.rounds = 0: nothing to train"):
        prepare_job(stage, (*ARGUMENTS[stage], "--set", "rollout.rounds=0"), H100)


def test_user_arguments_reach_the_program_unchanged(tmp_path: Path) -> None:
    words = ("tiny-solar-open", "--data", NASTY, "--run", str(tmp_path / "a b'c"),
             "--set", 'data.phases=[{"name": "$x", "seq_len": 8}]')
    text = prepare_job("pretrain", words, LOCAL).texts[0]
    assert read_bash_array(text) == ["-m", "megatron_sov", "pretrain", *words, "--resume"]


def test_a_profile_is_quoted_too(site: Path, cluster: Any) -> None:
    profile = dataclasses.replace(LOCAL, environment={"X": NASTY}, modules=(NASTY,), scratch=NASTY)
    text = build_script("pretrain", profile)
    (line,) = [line for line in text.splitlines() if line.startswith("export X=")]
    assert subprocess.run(["bash", "-c", f'{line}; printf "%s" "$X"'], capture_output=True, text=True,
                          check=True).stdout == NASTY
    client.check_script(text)


def test_slurm_reads_odd_paths_as_they_are(site: Path, cluster: Any) -> None:
    folder = site / "it's \"odd\" $HOME & `co`"
    work = ("pack", "--tokenizer", "t", "--input", "i", "--output", str(folder / "tokens"))
    header = [line for line in prepare_job("data", work, LOCAL).texts[0].splitlines()
              if line.startswith("#SBATCH")]
    folder.mkdir()
    (folder / "tokens.slurm").mkdir()
    (site / "job.sh").write_text("\n".join(["#!/bin/bash", *header, "echo here"]))
    job = cluster.sbatch(str(site / "job.sh"))
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert (folder / f"tokens.slurm/{job}.log").read_text() == "here\n"


def test_a_path_that_slurm_would_rewrite_is_refused() -> None:
    with pytest.raises(UserError, match="placeholder"):
        prepare_job("pretrain", ("tiny-solar-open", "--data", "d", "--run", "runs/100%j"), LOCAL)


def test_scripts_contain_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    assert "hush-hush" not in build_script("pretrain", LOCAL)


def test_settings_change_with_the_number_of_nodes() -> None:
    text = build_script("pretrain", dataclasses.replace(LOCAL, ranks_per_node=1), "--set", "parallel.ep=4",
                        nodes=4, min_nodes=1, settings={2: ("parallel.ep=2",), 1: ("parallel.ep=1",)})
    assert "#SBATCH --nodes=1-4\n" in text

    def run_choice(count: int) -> str:
        """Run the script's choice of settings on a job with `count` nodes."""
        block = text[text.index("case $SLURM_JOB_NUM_NODES"):text.index("esac") + 4]
        program = f'SLURM_JOB_NUM_NODES={count}\n{block}\necho $num_nodes "${{settings[@]}}"'
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True,
                              check=False).stdout.strip()

    assert [run_choice(count) for count in (4, 3, 2, 1)] == [
        "4", "2 --set parallel.ep=2", "2 --set parallel.ep=2", "1 --set parallel.ep=1"]
    assert run_choice(5) == ""


ARRAY_TASK = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
"""Variables of the last task of an array, whose job number is that of the whole array."""


@pytest.mark.each(("variables", "name"), [
    (ARRAY_TASK, "7_2"), ({**ARRAY_TASK, "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "8"}, "7_0"),
    ({"SLURM_JOB_ID": "7"}, "7")])
def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path, variables: dict[str, str],
                                                  name: str) -> None:
    calls = tmp_path / "calls"
    for program in ("scontrol", "squeue"):
        (tmp_path / program).write_text(f'#!/bin/bash\necho "{program} $*" >> {calls}\necho RUNNING\n')
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}

    def run_lines(lines: str) -> list[str]:
        calls.write_text("")
        subprocess.run(["bash", "-uc", lines], env=environment, check=False, capture_output=True, timeout=60)
        return calls.read_text().splitlines()

    (trap,) = [line for line in _step_lines(LOCAL, tmp_path, 1, 1) if line.startswith("trap")]
    assert run_lines(f"{trap}\nkill -USR1 $$\ntrue") == [f"scontrol requeue {name}"]
    text = build_script("data", LOCAL, array=2)
    answer = text[text.index("answer() {"):text.index("# -- signals")].replace("sleep 300", "true")
    assert run_lines(f"{answer}\nanswer 'requeue n2,n3'") == [
        f"scontrol requeue {name}", f"scontrol update JobId={name} ExcNodeList=n2,n3"]
    stop = text[text.index("asked='' step=''"):text.index("trap 'stop USR1' USR1")]
    assert run_lines(f"{stop}\nstop TERM") == [f"squeue --noheader --jobs={name} --format=%T"]


@pytest.mark.parametrize(("resolves", "address"), [(True, "n7"), (False, "10.0.0.7")])
def test_master_address_is_the_first_node_or_its_ip(tmp_path: Path, resolves: bool, address: str) -> None:
    text = build_script("pretrain", LOCAL)
    lines = text[text.index("MASTER_ADDR=${nodes%%,*}"):text.index("MASTER_PORT=")]
    answer = 'echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=10.0.0.7 NodeHostName=n7"'
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{answer}\n")
    (tmp_path / "getent").write_text(f"#!/bin/bash\nexit {0 if resolves else 2}\n")
    for program in ("scontrol", "getent"):
        (tmp_path / program).chmod(0o755)
    completed = subprocess.run(["bash", "-uc",
                                f'PATH={tmp_path}:$PATH nodes=n7,n8\n{lines}\necho "$MASTER_ADDR"'],
                               capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == address


def test_ranks_make_the_scratch_folder_that_slurm_did_not_find(tmp_path: Path) -> None:
    """Slurm sets TMPDIR of a rank to /tmp if its folder does not exist on the node yet."""
    text = build_script("pretrain", dataclasses.replace(H100, scratch=str(tmp_path / "no such/folder")))
    (as_rank,) = re.findall(r"^as_rank='.*?'$", text, re.MULTILINE | re.DOTALL)
    exports = re.findall(r"^export (?:JOB_)?TMPDIR=.*$", text, re.MULTILINE)
    shell = "\n".join([*exports, as_rank, 'TMPDIR=/tmp bash -c "$as_rank" rank printenv TMPDIR'])
    completed = subprocess.run(["bash", "-c", shell], env={"PATH": os.environ["PATH"], "USER": "ada"},
                               capture_output=True, text=True)
    assert completed.stdout == f"{tmp_path}/no such/folder/ada\n"
    assert (tmp_path / "no such/folder/ada").is_dir()


def test_engine_servers_get_whole_nodes(site: Path) -> None:
    vllm = ("--engine", "vllm", "--engine-set", "tp=4")
    text = build_script("rl-run", H100, *vllm, nodes=2, engine_nodes=2)
    assert "#SBATCH --nodes=4" in text and "tail -n 2" in text and "i < 2" in text
    client.check_script(text)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    engines = read_bash_array(text.replace('"$engine_port"', "30007"), "engines")
    assert engines[:4] == ["-m", "megatron_sov", "rl", "engines"]
    assert engines[-6:-2] == ["--engine-set", "servers=2", "--engine-set",
                              'devices=["0", "1", "2", "3", "4", "5", "6", "7"]']
    assert "settings=(--engine-set weights=" in text and '--engine-url "http://$address:' in text
    shared = build_script("rl-run", H100, *vllm, "--engine-set", "weights=/shared/w", nodes=2, engine_nodes=1)
    assert "engine_settings=()" in shared
    sent = build_script("rl-run", H100, *vllm, "--engine-set", "transfer=collective", nodes=2, engine_nodes=1)
    assert "engine_settings=()" in sent, "a collective transfer needs no folder for weights"
    for words, message in (((), "are for `submit rl-run ... --engine vllm`"),
                           (("--engine", "vllm", "--engine-url", "http://n9:8000"), "without --engine-url"),
                           (("--engine", "vllm", "--engine-set", "tp=16"), "must divide the 8 of a node")):
        with pytest.raises(UserError, match=re.escape(message)):
            build_script("rl-run", H100, *words, nodes=2, engine_nodes=1)
