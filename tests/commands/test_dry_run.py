"""`--dry-run` of training commands: the same checks as a run, and no effect on disk."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.commands.evaluate.eval_passk import EvalPasskOptions
from megatron_sov.commands.models.generate import GenerateOptions
from megatron_sov.commands.models.serve import ServeOptions
from megatron_sov.commands.shared_options import list_option_words
from megatron_sov.infer.request import Sampling
from tests.typed_words import format_set_options, parse_settings

ROUNDS = ("rollout.rounds=2", "rollout.prompts_per_round=2", "rollout.samples_per_prompt=2",
          "rollout.max_new_tokens=12", "rollout.max_prompt_tokens=20", "policy.method=dapo", "policy.kl=k3",
          "policy.kl_coeff=0.1", 'data.phases=[{"name": "main", "seq_len": 32}]')


@dataclass(frozen=True)
class TrainingSetup:
    """Data and start weights of the commands under test."""

    folder: Path
    data: dict[str, Path]
    """Command -> its training data."""
    starts: dict[str, Path]
    """"run": a run; "hf": a Hugging Face folder without our manifest.json, as other people's folders."""
    settings: list[str]


@pytest.fixture(scope="module")
def start(teacher: Path, packed_data: Any, run_command: Any, tiny: list[str],
          tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    folder = tmp_path_factory.mktemp("start")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"{i}, sure."}) for i in range(40)))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(9)))
    run_command("pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1",
                "--format", "preference", "--input", str(folder / "pairs.jsonl"), "--output",
                str(folder / "pairs"), program="sov-data").check_returncode()
    run_command("convert", "to-hf", str(teacher), str(folder / "hf"), "--workers", "1").check_returncode()
    (folder / "hf/manifest.json").unlink()
    data = {"pretrain": packed_data.text, "sft": packed_data.chats,
            "prefer": folder / "pairs", "distill": packed_data.text, "rl train": packed_data.text,
            "rl run": packed_data.text}
    return TrainingSetup(folder, data, {"run": teacher, "hf": folder / "hf"}, tiny)


def iter_common_arguments(command: str, start: TrainingSetup) -> Iterator[str]:
    """Yield the arguments of a command besides its start."""
    yield from (*command.split(), "tiny-solar-open", "--data", str(start.data[command]), *start.settings,
                "--set", "model.hidden_size=48")
    if command == "distill":
        yield from ("--teacher", str(start.starts["run"]))
    if not command.startswith("rl"):
        yield from ("--set", "train.steps=2")
    else:
        yield from ("--store", str(start.folder / "store"), "--prompts", str(start.folder / "prompts.jsonl"),
                    "--reward", "repetition", *format_set_options(ROUNDS))


def run_dry(read_output: Any, folder: Path, *words: object) -> list[str]:
    """Run a command that must not change a folder, and return its printed lines."""
    old_files = sorted(folder.rglob("*"))
    lines: list[str] = read_output(*map(str, words), "--dry-run").splitlines()
    assert sorted(folder.rglob("*")) == old_files
    assert lines[-1] == "dry run: nothing was written, and nothing ran"
    return lines


@pytest.mark.each("kind", ["run", "hf"])
@pytest.mark.each("command", ["pretrain", "sft", "prefer", "distill", "rl train", "rl run"])
def test_dry_run_describes_a_run_without_starting_it(read_output: Any, start: TrainingSetup, command: str,
                                                     kind: str) -> None:
    run = start.folder / "new"
    arguments = iter_common_arguments(command, start)
    lines = run_dry(read_output, start.folder, *arguments, "--from", start.starts[kind],
                    "--run", run)
    printed = start.starts[kind]
    if kind == "hf":
        assert f"  converts   {printed} into {run.parent}/.from-hf first" in lines
    else:
        printed = printed / "checkpoints/step-2"
    assert f"  start      {printed}" in lines
    assert any(line.startswith("tiny-solar-open: ") and " steps 1 to " in line for line in lines)
    assert any(line.startswith("  processes  1; fp32, ") for line in lines)
    assert any(line.startswith(f"  run        {run}, a checkpoint ") and " every " in line for line in lines)
    reads = [line for line in lines if line.startswith(f"{start.starts['run']} would read ")]
    assert bool(reads) == (command == "distill")


def test_dry_run_describes_each_extension_stage_and_its_needles(read_output: Any, hf_models: dict[str, Path],
                                                                token_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_models["solar_open"], tmp_path / "hf")
    (tmp_path / "hf/manifest.json").unlink(missing_ok=True)
    stages = [{"name": name, "seq_len": seq_len, "steps": 2} for name, seq_len in (("a", 640), ("b", 768))]
    settings = ("train.global_batch_size=4", "train.micro_batch_size=4", "needle.train_share=0.25",
                f"extend.stages={json.dumps(stages)}")
    lines = run_dry(read_output, tmp_path, "extend", "tiny-solar-open", "--data", token_shards, "--from",
                    tmp_path / "hf", "--run", tmp_path / "run", *format_set_options(settings))
    assert sum(line.startswith("  data ") and "needle" in line for line in lines) == 2
    assert f"  start      {tmp_path / 'hf'}" in lines
    assert sum(line.startswith("  converts ") for line in lines) == 1


def test_dry_run_reports_the_errors_of_the_run(get_refusal: Any, packed_data: Any, tmp_path: Path) -> None:
    assert "its tokenizer has 368 ids" in get_refusal(
        "pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(tmp_path / "run"),
        "--set", "model.vocab_size=100", "--dry-run")


@pytest.mark.each("options", [
    GenerateOptions(target=Path("m"), prompt=("-1 plus 1?", "a  b"), chat=True, logprobs=True, json=True,
                    sampling=Sampling(5, 0.1, top_p=1e-9), nproc=3, settings=("a=1", "b=-x")),
    EvalPasskOptions(target=Path("m"), input=Path("p"), k=(1, 8), output=Path("o"), reward="math",
                     right_from=-0.5, reward_set=("unit=km",)),
    ServeOptions(target=Path("m"))])
def test_words_are_read_as_the_same_options(options: Any) -> None:
    assert parse_settings(type(options), list_option_words(options)) == options
