"""Tutorials: pages that continue one folder run in order, with few steps; commands under "On a laptop" run
in order up to the slow ones; commands under other headings run as dry runs or plans.

The corpus is a few small documents.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli
from tests.pages_typed import blocks, iter_command_lines, page_text, shell_blocks, shown_files
from tests.test_readme import gather

PAGES = {name: page_text(f"tutorials/{name}.md") for name in ("cluster", "language", "rl")}
ONE_FOLDER = ("tutorials/pretrain.md", "distill.md", "tutorials/preferences.md", "tutorials/rl.md",
              "tutorials/context.md", "tutorials/publish.md")
"""Pages that continue the folder `work` of the first."""
FEWER = {r"train\.(steps=\d+|epochs=2)": "train.steps=2", r"rollout\.rounds=\d+": "rollout.rounds=1",
         r"rollout\.(prompts_per_round|samples_per_prompt)=\d+": r"rollout.\g<1>=2",
         r"steps: 80, max_steps: 400": "steps: 2, max_steps: 2", r"every_steps: 80": "every_steps: 2",
         r"train_share: 0,": "train_share: 0, samples: 1,",
         r"--reward format --set 'regex=.*?'": "--reward language --set language=en",
         r"(sov-data pairs .*)": r"\g<1> --keep-unfinished"}
"""Text of the pages -> replacement that this test runs, for time and for a small corpus."""
GATE_FAILED = 3
QUICK = 6
"""How many commands of a page are typed, from text to the plan: training takes long, and the way from a run
to the report is typed by tests/test_readme.py."""
TRAINS = ("megatron-sov pretrain", "megatron-sov convert", "megatron-sov sft")


def under(heading: str, text: str) -> list[str]:
    """Return the commands under a heading, up to the next heading of its level."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return list(iter_command_lines(shell_blocks(section)))


@pytest.mark.deep
@pytest.mark.distributed
def test_laptop_commands_of_tutorials_run(cwd: Path, run_command: Callable[..., Any]) -> None:
    typed: set[str] = set()
    for name, text in PAGES.items():
        for line in under("On a laptop", text)[:QUICK]:
            if line == "sov-data demo-corpus --output work/corpus":
                if not Path("work/corpus").exists():
                    gather(Path("work/corpus"))
            elif line not in typed and not line.startswith(TRAINS):
                program, *argv = shlex.split(line)
                result = run_command(*argv, program=program)
                printed = f"{result.stdout[-500:]}\n{result.stderr[-3000:]}"
                assert result.returncode == 0, f"{name}: {line}\n{printed}"
                typed.add(line)
    assert len(typed) == 6  # and the collected files


def shorten_commands(text: str) -> str:
    for pattern, few in FEWER.items():
        text = re.sub(pattern, few, text)
    return text


@pytest.mark.deep
@pytest.mark.distributed
def test_pages_that_continue_one_folder_work_as_they_are_typed(
        cwd: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., Any],
        warm_python: str) -> None:
    monkeypatch.setenv("SOV_TESTS_PYTHON", warm_python)  # by which `chat` serves
    gather(Path("work/corpus"))
    for page in ONE_FOLDER:
        text = page_text(page)
        for file, content in shown_files(text).items():
            Path(file).write_text(shorten_commands(content))
        shown = blocks(text, "bash")[:1] if page == "distill.md" else blocks(text, "sh")
        for line in iter_command_lines(shown):
            if line == "sov-data demo-corpus --output work/corpus" or " plan " in line:
                continue  # gathered; CLUSTER
            program, *argv = shlex.split(shorten_commands(line))
            done = run_command(*argv, program=program)
            codes = (0, GATE_FAILED) if "gate.yaml" in line else (0,)
            assert done.returncode in codes, f"{page}: {line}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    for made in ("work/export/model.safetensors", "work/export.verification.json", "work/capitals.json",
                 "work/report.html", "work/distilled/complete.json", "work/rl/complete.json"):
        assert Path(made).is_file(), made


CLUSTER = [pytest.param(line, id=f"{name}: {line[:60]}") for name, text in PAGES.items()
           for line in iter_command_lines(shell_blocks(text)) if line not in under("On a laptop", text)
           and re.match(r"megatron-sov (submit (?!chain .*--continue)|plan (?!.*--(?:sweep|days)))", line)]


@pytest.mark.deep
@pytest.mark.parametrize("line", CLUSTER)
def test_cluster_commands_of_tutorials_pass_a_dry_run(line: str, cwd: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORK", str(cwd / "shared"))
    for folder in re.findall(r"(?:--from|--data|--teacher|--states|to-hf) (\S+)", line):
        Path(folder.replace("$WORK", str(cwd / "shared"))).mkdir(parents=True, exist_ok=True)
    words = shlex.split(line.replace("$WORK", str(cwd / "shared")))[1:]
    dry = ["--dry-run"] if words[0] == "submit" and "--dry-run" not in words else []
    assert cli.main([words[0], *dry, *words[1:]]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.deep
@pytest.mark.distributed
def test_typed_commands_for_lora_on_a_hugging_face_model_run(cwd: Path, monkeypatch: pytest.MonkeyPatch,
                                                             run_command: Callable[..., Any],
                                                             hf_models: dict[str, Path],
                                                             warm_python: str) -> None:
    """With a tiny model, and few steps."""
    monkeypatch.setenv("SOV_TESTS_PYTHON", warm_python)  # by which `sft` packs, and `chat` serves
    text = page_text("tutorials/lora.md")
    [(file, content)] = shown_files(text).items()
    Path(file).write_text(content, encoding="utf-8")
    Path("SmolLM2-135M-Instruct").symlink_to(hf_models["solar_open"])
    by_hand: list[str] = []
    for line in iter_command_lines(shell_blocks(text)):
        program, *argv = shlex.split(line.replace("train.epochs=20", "train.steps=2"))
        result = run_command(*argv, program=program)
        assert result.returncode == 0, f"{line}\n{result.stdout[-500:]}\n{result.stderr[-3000:]}"
        by_hand += re.findall(r"^sov-.*", result.stdout, re.MULTILINE)
    assert Path("merged/model.safetensors").is_file() and Path("adapter/adapter_config.json").is_file()
    shards = Path("runs/lora/data/chats")
    Path("runs/lora").rename("runs/first")
    for line in by_hand:
        program, *argv = shlex.split(line)
        run_command(*argv, program=program).check_returncode()
    for name in ("train-00000.bin", "train-00000.idx", "heldout-00000.bin"):
        assert ((shards / "chats" / name).read_bytes()
                == (Path("runs/first/data/chats/chats") / name).read_bytes()), "as the printed commands make"
    assert len(by_hand) == 2
