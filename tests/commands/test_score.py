"""`megatron-sov score`: rows keep their order, no partial output, and a killed command continues."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main
from megatron_sov.commands.score import hash_questions
from megatron_sov.judge.rewards.registry import REWARD_PLUGINS
from megatron_sov.work.progress.journal import RECORDS, work_folder
from tests.pages_typed import page_text, shell_lines, shown_files

PAGE = page_text("rewards.md")
ROWS = [{"id": i, "response": "가" * i + "a" * (4 - i)} for i in range(5)]


@pytest.fixture(autouse=True)
def folder(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with rows, and no reward of another test."""
    monkeypatch.setattr(REWARD_PLUGINS, "_known", {})
    write_rows(ROWS)
    return cwd


def write_rows(rows: list[dict], name: str = "rows.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(name: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def score(*more: str, reward: str = "language", output: str = "out.jsonl") -> list[str]:
    return ["score", "--reward", reward, "--input", "rows.jsonl", "--output", output, "--workers", "1", *more]


def test_rows_are_written_in_order_with_their_input_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(score("--set", "language=ko")) == 0
    rows = read_rows()
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["reward"] for row in rows] == [0.0, 0.0, pytest.approx(0.7), pytest.approx(0.95), 1.0]
    assert {row["status"] for row in rows} == {"scored"}
    assert len({row["reward_version"] for row in rows}) == 1
    assert re.search(r"out.jsonl: language [0-9a-f]{16}: 5 rows read: 5 scored, 0 set aside; "
                     r"mean reward 0.5300\n", capsys.readouterr().out)
    assert not work_folder(Path("out.jsonl")).exists()


def test_the_mean_is_recorded_in_the_events_of_the_generating_run(get_refusal: Any) -> None:
    refusal = get_refusal(*score("--set", "language=ko", "--run", "none"))
    assert "--run none: holds no events.jsonl" in refusal and not Path("out.jsonl").exists()
    Path("run").mkdir()
    Path("run/events.jsonl").write_text('{"event": "step", "step": 7}\n')
    assert main(score("--set", "language=ko", "--run", "run")) == 0
    event = json.loads(Path("run/events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["step"], event["reward"], event["settings"], event["rows"], event["scored"],
            event["mean_reward"]) == ("score", 7, "language", {"language": "ko"}, 5, 5, pytest.approx(0.53))


def test_records_of_a_run_are_refused_as_output(get_refusal: Any) -> None:
    Path("run").mkdir()
    Path("run/events.jsonl").write_text('{"event": "step", "step": 7}\n')
    assert "is run/events.jsonl itself, which is read" in get_refusal(
        *score("--set", "language=ko", "--run", "run", output="run/../run/events.jsonl"))
    Path("run/config.json").write_text("{}")
    Path("link").symlink_to("run/events.jsonl")
    for output in ("run/events.jsonl", "run/config.json", "link"):
        assert "is a record of the run" in get_refusal(*score("--set", "language=ko", output=output))
    assert main(score("--set", "language=ko", "--run", "run", output="run/scored.jsonl")) == 0
    assert [e["event"] for e in read_rows("run/events.jsonl")] == ["step", "score"]


def test_question_hash_ignores_responses() -> None:
    def questions(*rows: dict[str, object]) -> str:
        write_rows(list(rows))
        return hash_questions(Path("rows.jsonl"))

    first = questions({"prompt": "1 + 1", "response": "2"}, {"prompt": "2 + 2", "response": "4"})
    assert first == questions({"prompt": "1 + 1", "response": "3", "num_tokens": 1},
                              {"prompt": "2 + 2", "response": "4"})
    assert first != questions({"prompt": "1 + 1", "response": "2"}, {"prompt": "2 + 3", "response": "4"})
    assert questions({"response": "a", "answer": "1"}) != questions({"response": "a", "answer": "2"})


def test_a_row_without_a_field_of_its_reward_is_refused_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows([{"response": "a"}, {"response": "a", "language": "en"}])
    assert main(score()) == 0
    assert [(row["reward"], row["status"]) for row in read_rows()] == [(None, "refused"), (1.0, "scored")]
    assert "line 1: refused: has no 'language'" in capsys.readouterr().err


def test_rows_without_any_reward_are_written_and_the_command_fails(
        capsys: pytest.CaptureFixture[str]) -> None:
    write_rows([{"response": "a"}, {"response": "b"}])
    assert main(score()) == 3
    assert [row["status"] for row in read_rows()] == ["refused", "refused"]
    assert "out.jsonl: none of its 2 rows has a reward; see their" in capsys.readouterr().err


@pytest.mark.each(("lines", "messages"), [
    (b'{"response": "a"}\n[1]\n{"response": 3}\n{}\n{"response": "a"', [
        "line 2: is not a JSON object, but a list", "line 3: response is of type int, and must be text",
        "line 4: has no 'response'", "line 5: is not JSON"]),
    (b'{"response": "a", "x": NaN}\n', ["line 1: is not JSON (NaN is not JSON)"]),
    (b'{"response": "\xff"}\n', ["line 1: is not UTF-8"]), (b"[" * 100_000, ["line 1: is nested too deeply"]),
    (b"x\n" * 12, ["lines 1, 2, 3 and 9 more: is not JSON"]), (b"\n\n", ["has no rows"]),
    (b'{"response": "a", "n": ' + b"9" * 5000 + b"}\n", ["line 1: is not JSON"]),
    (b'{"response": "a", "n": 1e999}\n', ["line 1: is not JSON (1e999 is more than a float holds)"]),
    (b'{"response": "a", "n": ' + b"[" * 900 + b"]" * 900 + b"}\n", ["line 1: is nested more than 64"]),
])
def test_bad_rows_are_named_by_line_and_nothing_is_written(lines: bytes, messages: list[str],
                                                           get_refusal: Any) -> None:
    Path("rows.jsonl").write_bytes(lines)
    error = get_refusal(*score("--set", "language=ko"))
    assert [text for text in messages if text not in error] == []
    assert sorted(os.listdir()) == ["rows.jsonl"]


@pytest.mark.each(("arguments", "message"), [
    (["--set", "langauge=ko"], "langauge: no such setting; did you mean 'language'?"),
    (["--set", "language"], "must have the form key=value"),
    (["--output", "rows.jsonl"], "is the --input"),
    (["--output", "."], "is a folder"), (["--input", "none.jsonl"], "none.jsonl: cannot be read"),
    (["--reward", "langage"], "did you mean 'language'?"),
])
def test_mistakes_are_one_sentence(arguments: list[str], message: str, get_refusal: Any) -> None:
    assert message in get_refusal(*score(*arguments))


def test_a_pipe_is_refused(get_refusal: Any) -> None:
    os.remove("rows.jsonl")
    os.mkfifo("rows.jsonl")
    assert "is not a regular file, and it is read more than once" in get_refusal(
        *score("--set", "language=ko"))


OWN_REWARD = '''
import os, pathlib, signal, time

class Counts:
    """Writes the id of each row to `judged`, and kills the command at row 300, the first time."""

    def score(self, row):
        with open("judged", "a") as f:
            f.write(f"{row['id']} ")
        if row["id"] == 300 and not os.path.exists("killed"):
            pathlib.Path("killed").touch()
            os.kill(int(pathlib.Path("pid").read_text()), signal.SIGKILL)
            time.sleep(60)
        return row["id"]
'''


def test_a_killed_command_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(OWN_REWARD)
    write_rows([{"id": i, "response": ""} for i in range(400)])
    command = ["score", "--reward", "own.py:Counts", "--input", "rows.jsonl", "--output", "out.jsonl",
               "--workers", "1"]
    program = ("import os, sys; open('pid', 'w').write(str(os.getpid()))\n"
               "from megatron_sov.cli import main\nsys.exit(main())")
    killed = subprocess.Popen([sys.executable, "-c", program, *command])
    assert killed.wait(timeout=600) == -signal.SIGKILL
    assert not Path("out.jsonl").exists()
    with open(work_folder(Path("out.jsonl")) / RECORDS, "ab") as f:
        f.write(b'[2, 5000, 7]\n{"id": 256, "resp')  # a row that was written only in part
    time.sleep(0.1)
    Path("judged").write_text("")
    assert main(score("--set", "language=ko")) == 2
    assert main(command) == 0
    captured = capsys.readouterr()
    assert 'reward was "Counts", and is "language"' in captured.err
    assert "400 rows read: 400 scored, 0 set aside; mean reward 199.5000" in captured.out
    assert "256 rows were already scored" in captured.out
    assert [row["reward"] for row in read_rows()] == list(range(400))
    judged_after_resume = set(map(int, Path("judged").read_text().split()))
    assert judged_after_resume == set(range(256, 400))
    assert not work_folder(Path("out.jsonl")).exists()


@pytest.mark.deep
def test_commands_of_the_page_run() -> None:
    for name, content in shown_files(PAGE).items():
        Path(name).write_text(content)
    outputs = {}
    for line in shell_lines(PAGE, "bash"):
        program, *arguments = shlex.split(line)
        assert (program, main([*arguments, "--workers", "1"])) == ("megatron-sov", 0), line
        name = arguments[arguments.index("--output") + 1]
        outputs[name] = [row["reward"] for row in read_rows(name)]
    assert outputs["language.jsonl"] == [1.0, 1.0, 0.0]
    assert outputs["format.jsonl"] == [1.0, 0.0, 0.0]
    assert outputs["length.jsonl"] == [-0.625, 0.0, -1.0]
    assert outputs["repetition.jsonl"] == [0.0, 0.0, -1.0]
    assert outputs["math.jsonl"] == [1.0, 0.0, 1.0]
    assert outputs["stem.jsonl"] == [1.0, 1.0, 1.0]
    assert outputs["composed.jsonl"] == [pytest.approx(x) for x in (1.0, 1.0, 1.0)]
    assert outputs["code.jsonl"] == [1.0, 0.5, 0.0]
    assert outputs["kept.jsonl"] == [1.0, 0.0]
    assert outputs["contains.jsonl"] == [1.0, 0.0, 0.0]
