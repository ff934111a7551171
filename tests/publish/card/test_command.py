"""`megatron-sov card` as users type it: its page, its files, and sentences for what cannot be."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_sov.base.artifacts import MANIFEST, manifest_sha256, read_manifest
from megatron_sov.cli import main

PAGE = (Path(__file__).parents[3] / "docs/card.md").read_text(encoding="utf-8")
FILES = {"README.md", "card.json", "provenance.json", "provenance.svg", "annex_xi.md", "data"}


def card(*arguments: object) -> int:
    return main(["card", *map(str, arguments)])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_command_of_the_page_runs_in_order(world: Any, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(world.root)
    (world.root / "answers.yaml").write_text(blocks("yaml")[0])
    (world.root / "about.yaml").write_text("provider: Harbour Office\n")
    (world.root / "archive").mkdir()
    for line in [line for block in blocks("sh") for line in block.splitlines()]:
        if "archive" in line:
            for name in ("pretrain", "text"):
                shutil.move(name, f"archive/{name}")
        words = shlex.split(line)
        assert words.pop(0) == "megatron-sov" and main(words) == 0, line
        assert {p.name for p in Path("card").iterdir()} == FILES
    found = json.loads(Path("card/card.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == ["pretrain", "sft"]
    figure = json.loads(blocks("json")[0])
    assert found["model"]["num_params"] == figure
    export = ModelCard.load(world.hf / "README.md").data
    assert export.base_model == "harbour/harbour-base" and export.model_name == "Harbour 1B"
    assert "Harbour Office" not in Path("card/data/training_content.md").read_text(), "of the last command"
    assert read_manifest(world.hf).files.keys() == {"model.safetensors"}, "the card is no part of it"
    assert "not known: licence of source 'books'; add it" in capsys.readouterr().out


def test_what_is_passed_on_names_no_folder_of_this_machine(world: Any) -> None:
    report = world.root.parent / "report.html"
    assert main(["report", str(world.pretrain), str(world.sft), "--output", str(report)]) == 0
    made = world.root.parent / "card"
    assert card(world.sft, "--output", made, "--answers", world.root / "answers.yaml",
                "--hf-folder", world.hf) == 0
    files = [report, *(p for folder in (made, world.hf) for p in folder.rglob("*") if p.is_file())]
    assert len(files) == 12
    assert [p.name for p in files if str(world.root.parent).encode() in p.read_bytes()] == []


def test_the_card_of_the_data_is_made_by_the_program_itself(world: Any,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of what runs `sov-data` in this process
    assert card(world.sft, "--output", world.root / "card") == 0
    assert (world.root / "card/data/training_content.md").read_text().startswith("# Public summary")


def test_mistakes_are_told_in_a_sentence_and_nothing_is_written(
        world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = world.root / "out"
    (world.root / "mine").mkdir()
    (world.root / "mine/README.md").write_text("# My project\n")
    (world.root / "exported").mkdir()
    (world.root / "exported/config.json").write_text('{"model_type": "qwen3"}')
    (world.root / "bad.yaml").write_text("licens: mit\npue: 0.5\nlanguages: 3\n")
    (world.root / "list.yaml").write_text("[1]\n")
    (world.root / "number.yaml").write_text("pue: 0.5\nintensity_g_per_kwh: -.inf\n")
    for arguments, said in (
            ((world.root / "none", "--output", out), ["holds no events.jsonl, so it is no run folder"]),
            ((world.text, "--output", out), ["token shards"]),
            ((world.root / "exported", "--output", out), ["holds no events.jsonl, so it is no run folder"]),
            ((world.sft, "--output", world.root / "scores.json"), ["is a file; name a folder"]),
            ((world.sft, "--output", world.root / "mine"), [
                "has a README.md of something else", "--overwrite"]),
            ((world.sft, "--output", out, "--hf-folder", world.text), ["was not made from a checkpoint of"]),
            ((world.sft, "--output", out, "--answers", world.root / "bad.yaml"), [
                "3 problems", "licens: no such setting; did you mean 'licence", "languages = 3"]),
            ((world.sft, "--output", out, "--answers", world.root / "number.yaml"), [
                "2 problems", "pue = 0.5 must be at least 1", "intensity_g_per_kwh = -inf"]),
            ((world.sft, "--output", out, "--answers", world.root / "none"), ["cannot be read"]),
            ((world.sft, "--output", out, "--about", world.root / "bad.yaml"), [
                "--about", "licens: no such setting"]),
            ((world.sft, "--output", out, "--answers", world.root / "list.yaml"), [
                "list.yaml, line 1: [1] must be an object of settings"]),
            ((world.sft, "--output", out, "--eval", world.root / "none"), ["none: cannot be read"]),
            ((world.sft, "--output", out, "--eval", world.sft / "complete.json"), ["is no result of"]),
            ((world.sft, "--output", out, "--from", world.root), ["is neither a run nor an artifact"]),
            ((world.sft,), ["--output"])):
        assert card(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert all(part in error for part in said), (said, error)
        assert "Traceback" not in error
    assert not out.exists() and (world.root / "mine/README.md").read_text() == "# My project\n"
    assert card(world.sft, "--output", world.root / "mine", "--overwrite") == 0
    assert card(world.sft, "--output", world.root / "mine") == 0, "one of ours is replaced"
    shutil.rmtree(world.text)
    shutil.rmtree(world.chat)
    assert card(world.sft, "--output", out, "--about", world.root / "bad.yaml") == 2
    assert "none of the data was found" in capsys.readouterr().err


def test_damaged_files_of_a_run_are_told(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, said in (("complete.json", '{"step": "1e999", "tokens": 1}', "is damaged"),
                             ("complete.json", "{", "is damaged"), ("gate_failed.json", "{}", "is damaged"),
                             ("config.json", "{}", "cannot be read as a run's settings"),
                             ("checkpoints/step-4/" + MANIFEST, "[]", "restore")):
        file = world.sft / name
        before = file.read_bytes() if file.exists() else None
        file.write_text(text)
        assert card(world.sft, "--output", world.root / "card") == 2, name
        assert said in capsys.readouterr().err
        file.unlink() if before is None else file.write_bytes(before)
    hostile = [{"event": "run_start", "on_gpu": [], "num_ranks": {}, "time_s": [], "machine": 3, "inputs": 3},
               {"event": "phase", "step": None, "seq_len": "1e400"},
               {"event": "phase", "step": 0, "seq_len": "9"},
               {"event": "step", "step": 1, "tokens": [], "loss": "x", "energy_j": "nan", "power_w": 1e400},
               {"event": ["gate"], "step": 1}, {"event": "eval", "step": 1, "heldout": [1]},
               {"event": "eval_lm", "task": [], "metric": {}, "k": [], "interval": "x", "value": [],
                "model_hash": manifest_sha256(world.sft / "checkpoints/step-4"), "failed": "<b>"},
               {"event": "needle", "step": 1, "score": {}}, {"event": "energy", "energy_j": {}}]
    (world.sft / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in hostile))
    assert card(world.sft, "--output", world.root / "card") == 0
    (world.sft / "complete.json").write_text('{"checkpoint": "\\u0000/../..", "step": 1}')
    assert card(world.sft, "--output", world.root / "card") == 0
    (world.sft / "events.jsonl").write_text("")
    assert card(world.sft, "--output", world.root / "card") == 0
    assert "its events tell of no start" in (world.root / "card/README.md").read_text()
