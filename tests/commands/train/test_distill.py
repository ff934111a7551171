"""`megatron-sov distill`: a teacher of another width computes states once, and a student learns from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.cli import main
from tests.run_files import read_run_events


def read_last_steps(run: Path) -> dict[int, Any]:
    """Return the last record of each step, without times."""
    return {e["step"]: (e["loss"], e["meters"], e["grad_norm"])
            for e in read_run_events(run, "step")}


@pytest.mark.essential
@pytest.mark.distributed
def test_a_student_learns_from_a_teacher(packed_data: Any, teacher: Path, tiny: list[str], run_checked: Any,
                                         tmp_path: Path, get_refusal: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    complete, top = tmp_path / "whole", tmp_path / "top"

    def build_command(run: Path, *more: str) -> list[str]:
        return ["distill", "tiny-solar-open", "--data", str(packed_data.chats), "--run", str(run), *tiny,
                "--set", "train.steps=2", *more]

    # a process is killed, and the launcher restarts all processes
    result = run_checked(*build_command(complete, "--teacher", str(teacher), "--nproc", "2", "--inject",
                                        "kill@step=2"))
    assert "all processes are started again, from step-1" in result.stderr
    assert list(read_last_steps(complete)) == [1, 2]
    manifest = read_manifest(tmp_path / "whole.states", "teacher_states")
    assert manifest.content["hidden_size"] == 48 and manifest.content["dtype"] == "bfloat16"
    parsed = json.loads((complete / "complete.json").read_text())
    events = read_run_events(complete, "heldout_divergence")
    assert [e["step"] for e in events] == [0, 2] and parsed["teacher"] == manifest.settings["teacher"]
    assert events[0]["kl"] > events[1]["kl"] == parsed["heldout_divergence"]["chat"]["kl"] > 0
    assert events[1]["divergence"] == pytest.approx(events[1]["kl"])  # the loss is the forward KL

    states = ("--teacher", str(teacher), "--states", f"{complete}.states")
    # a complete run needs its teacher states no more
    Path(f"{complete}.states").rename(tmp_path / "elsewhere")
    result = run_checked(*build_command(complete, "--teacher", str(teacher), "--nproc", "2", "--resume"))
    assert result.stdout.startswith(f"{complete}: is complete at step 2;")
    (tmp_path / "elsewhere").rename(f"{complete}.states")

    run_checked(*build_command(top, "--teacher", str(teacher), "--top-k", "8", "--set",
                               "train.steps=1", "--set", "distillation.temperature=2.0"))
    content = read_manifest(tmp_path / "top.states", "teacher_states").content
    assert (content["top_k"], content["temperature"]) == (8, 2.0)
    assert read_last_steps(top)[1][1]["kl"] > 0

    two_sources = (*states, "--data", str(packed_data.text), "--states", str(tmp_path / "never"))
    for more, text in (
            (("--teacher", str(teacher / "checkpoints/step-1"), "--states", f"{complete}.states"),
             "step-1 is a different model; choose"),
            ((*states, "--top-k", "4"), "asks for the 4 most probable tokens"),
            ((*two_sources, "--states-dtype", "float32"),
             "whole.states is in bfloat16, and all folders of a run"),
            ((*two_sources, "--top-k", "4"), "asks for the 4 most probable tokens"),
            ((*states, "--set", "model.vocab_size=400"), "has 368 token ids, the student model.vocab_size"),
            ((*states, "--set", 'data.phases.0.blend={"chat@40": 1}'), "reads only packed sources")):
        assert text in get_refusal(*build_command(tmp_path / "no", *more))
    assert not (tmp_path / "no").exists() and not (tmp_path / "never").exists()

    # with existing states: the teacher's files are hashed once for comparison
    from megatron_sov.post.distillation import teacher as teaching

    digest, hashed, begun = teaching.hash_weights, [], []
    monkeypatch.setattr(teaching, "hash_weights", lambda target: hashed.append(1) or digest(target))
    monkeypatch.setattr(teaching, "write_outputs", lambda reading, *rest, redo: begun.append(reading.digest))
    assert "never" in get_refusal(*build_command(tmp_path / "more", *two_sources))
    assert (hashed, begun) == ([1], [manifest.settings["teacher"]])


def test_each_teacher_scores_the_data_with_its_name(packed_data: Any, teacher: Path, tiny: list[str],
                                                    tmp_path: Path, capsys: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sov.post.distillation import teacher as teaching

    readings: list[tuple[str, list[str], str]] = []  # teacher, its data, the folder of its states
    monkeypatch.setattr(teaching, "write_outputs", lambda reading, out, *_, redo: readings.append(
        (str(reading.target.path), list(reading.data), out.name)))
    talk, text, first = f"talk={packed_data.chats}", str(packed_data.text), teacher / "checkpoints/step-1"

    def run(*more: str) -> str:
        assert main(["distill", "tiny-solar-open", "--data", talk, "--data", text, "--run",
                     str(tmp_path / "run"), *tiny, "--set", "train.steps=2", *more]) == 2
        return str(capsys.readouterr().err)

    run("--teacher", str(teacher), "--teacher", f"talk={first}")  # ends with an error: no states were written
    (newest, newest_data, newest_states), talk_reading = readings
    assert (newest_data, newest_states) == ([text], "run.states")
    assert talk_reading == (str(first), [talk], "run.states.talk")
    assert newest != str(first) and newest.startswith(str(teacher))
    for teachers, message in (
            ([f"talk={first}"], f"--data {text}: no --teacher reads it; add a teacher without NAME"),
            ([f"talk={first}", f"talk={teacher}"], "another teacher reads the data talk; give every"),
            ([str(teacher), str(first)], "another teacher reads the remaining data; give every"),
            ([str(teacher), f"code={first}"], "has no data in --data talk="),
            (["talk=gone"], "--teacher gone: does not exist")):
        words: list[str] = []
        for name in teachers:
            words += ["--teacher", name]
        assert message in run(*words)
    assert "never: does not exist; make it with" in run(
        "--teacher", str(teacher), "--teacher", f"talk={first}", "--states", str(tmp_path / "never"))
    assert len(readings) == 2
