"""`megatron-sov distill rounds`: the student writes, the teacher reads, the student learns, twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.cli import main as sov_data
from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.commands.train import distill
from megatron_sov.commands.train.distill import DistillOptions
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.obs.events import read_events
from megatron_sov.train.data.token_shards import open_sources
from tests.typed_words import typed


def asking(words: list[str]) -> distill.DistillRoundsOptions:
    """Return what a command line asks for."""
    return typed(distill.DistillRoundsOptions, words)


@pytest.mark.distributed
def test_a_student_learns_from_what_it_writes(packed_data: Any, teacher: Path, tiny: list[str],
                                              run_command: Any, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"What is {i} plus 1?"}) for i in range(6)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0", "--workers", "1",
                     "--format", "prompt", "--input", str(tmp_path / "prompts.jsonl"), "--output",
                     str(tmp_path / "prompts")]) == 0
    commands: list[list[str]] = []

    def command(argv: list[str]) -> int:
        commands.append(argv)
        if len(commands) == 3:  # the second round's first
            return 75
        done = run_command(*argv)
        assert done.returncode == 0, done.stderr
        return 0

    asked = ["tiny-solar-open", "--from", str(teacher), "--teacher", str(teacher), "--prompts",
             str(tmp_path / "prompts"), "--rounds", "2", "--output", str(tmp_path / "out"),
             "--max-new-tokens", "8", *tiny, "--set", "model.hidden_size=48", "--set", "train.steps=1"]
    assert distill.do_rounds(asking(asked), command) == 75
    assert [argv[:2] for argv in commands] == [
        ["distill", "write"], ["distill", "tiny-solar-open"], ["distill", "write"]]
    answers, run = tmp_path / "out/round-1/answers", tmp_path / "out/round-1/run"
    ((prompt,), (answer,)) = (open_sources({str(folder): 1.0}, 368, formats) for folder, formats in (
        (tmp_path / "prompts", ("prompt",)), (answers, ("chat",))))
    asked_shard, found = prompt.shard("train"), answer.shard("train")
    assert len(found.lengths) == 6 and answer.name == "prompts-answers"
    for document in range(6):
        length, whole = int(asked_shard.lengths[document]), int(found.lengths[document])
        assert length < whole <= length + 8
        assert np.array_equal(found.tokens(document, 0, length), asked_shard.tokens(document, 0, length))
        types, weights = found.types(document, 0, whole), found.loss_weights(document, 0, whole)
        assert types.tolist() == [1] * length + [2] * (whole - length)
        assert weights.tolist() == [0] * length + [1] * (whole - length)
    assert sov_data(["verify", str(answers)]) == 0
    # the first step's student is its own teacher, whose states were rounded to bf16
    (step,) = [e for e in read_events(run / "events.jsonl") if e["event"] == "step"]
    assert 0 <= step["losses"]["divergence"] < 1e-3
    assert read_manifest(f"{answers}.states", "teacher_states").settings["teacher"]

    def note(argv: list[str]) -> int:
        commands.append(argv)
        return 0

    # the same command goes on; here nothing is run any more
    commands.clear()
    assert distill.do_rounds(asking(asked), note) == 0
    assert [argv[:2] for argv in commands] == [["distill", "write"], ["distill", "tiny-solar-open"]]
    assert commands[0][2] == str(run) and commands[1][commands[1].index("--from") + 1] == str(run)
    # what is done is of this student, and of these answers
    for changed, text in ((("--from", str(run)), f"from = {teacher}, now it is {run}; resume with the same"),
                          (("--temperature", "0.5"), "temperature = 1.0, now it is 0.5")):
        with pytest.raises(UserError, match=re.escape(text)):
            distill.do_rounds(asking([*asked, *changed]), note)
    assert distill.do_rounds(asking([*asked, "--rounds", "3"]), note) == 0

    # beside other data, which the teacher reads once
    commands.clear()
    beside = [*asked, "--data", f"{packed_data.chats}:3", "--share", "0.25", "--output",
              str(tmp_path / "more")]
    assert distill.do_rounds(asking(beside), note) == 0
    assert [argv[:2] for argv in commands[:2]] == [["distill", "states"], ["distill", "write"]]
    assert len(commands) == 5
    seeds = [word for words in commands for word in words if word.startswith("train.seed=")]
    assert len(set(seeds)) == 2, "another part of the other data in each round"
    last, answers = typed(DistillOptions, commands[4][1:]), tmp_path / "more/round-2/answers"
    assert last.data == (f"{packed_data.chats}:0.75", f"{answers}:0.25")
    assert last.states == (tmp_path / "more/data.states", Path(f"{answers}.states"))
    assert main(["distill", "rounds", *asked, "--share", "0.5"]) == 2
    assert "--share 0.5: must be less than 1 with --data" in capsys.readouterr().err
    assert main(["distill", "rounds", *beside, "--prompts", str(packed_data.chats)]) == 2
    assert "source 'chat' holds data of format 'chat'; pack prompts with" in capsys.readouterr().err
    assert main(["distill", "rounds", *asked, "--share", "0.5", "--data", f"{packed_data.chats}:0"]) == 2
    assert "chats:0: at least one weight must be positive" in capsys.readouterr().err


def test_a_student_writes_at_the_layout_of_its_training(packed_data: Any, tmp_path: Path, capsys) -> None:
    """A recipe's own layout and precision, of which --set says nothing; and its own code, by all commands."""
    args = asking(["r", "--from", "s", "--teacher", "t", "--prompts", "p", "--data", str(packed_data.chats),
                   "--share", "0.5", "--output", str(tmp_path), "--plugin", "own.py:MINE"])
    config = apply_settings(recipes.get("tiny-solar-open"), ["parallel.ep=2", "parallel.sp=true"])
    commands = {argv[1]: argv for _, argv in distill._commands(args, config)}
    assert {"parallel.ep=2", "parallel.sp=true", "train.precision=fp32"} <= set(commands["write"])
    for argv in commands.values():
        assert argv[argv.index("--plugin") + 1] == "own.py:MINE"
    for command, option in (("write", "--prompts"), ("states", "--data")):
        assert main(["distill", command, "s", option, "p", "--output", "o", "--plugin", "no.py:MINE"]) == 2
        assert "no.py: cannot be read (No such file or directory); name a" in capsys.readouterr().err
