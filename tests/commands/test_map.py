"""`megatron-sov map`: rows keep their order, each batch is computed once, and a killed command continues."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.cli import main
from megatron_sov.commands.map import BATCH_ROWS, STEPS
from megatron_sov.work.processes.pool import WAITING_PER_WORKER

STEP = """
import os, signal, sys, time

class Step:
    def __init__(self, *, factor: int = 2):
        self.factor = factor

    def do(self, row):
        n = row["n"]
        with open("done", "a") as f:
            f.write(f"{n} ")
        if n == 300 and os.path.exists("kill"):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        if n == 7:
            return None
        if n == 8:
            return [{"n": 8}, {"n": 8, "again": True}]
        if n == 9 and self.factor == 9:
            return {"n": {1, 2}}
        if n == 10 and self.factor == 10:
            return 3
        return {"n": n * self.factor, "text": row["text"] + "\\u2028" + chr(0xd800)}

class Other:
    pass
"""
# the step drops row 7 and doubles row 8
EXPECTED = [*({"n": 2 * n, "text": f"{n}\n\u2028\ud800"} for n in range(7)),
            {"n": 8}, {"n": 8, "again": True},
            *({"n": 2 * n, "text": f"{n}\n\u2028\ud800"} for n in range(9, 400))]


@pytest.fixture(autouse=True)
def rows(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 rows and a step in an empty folder."""
    monkeypatch.setattr(STEPS, "_known", {})
    Path("rows.jsonl").write_text("".join(json.dumps({"n": n, "text": f"{n}\n"}) + "\n" for n in range(400)))
    Path("mine.py").write_text(STEP)


def build_command(*more: str, step: str = "mine.py:Step", rows: str = "rows.jsonl",
                  output: str = "out") -> list[str]:
    return ["map", rows, step, "--output", output, "--workers", "2", *more]


def read_rows(folder: str = "out", name: str = "rows.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().split("\n")[:-1]]


@pytest.mark.deep
def test_rows_are_written_in_order_with_a_manifest_of_their_origin(
        get_refusal: Any, read_output: Any) -> None:
    assert "out: 400 rows in, 400 out" in read_output(*build_command())
    assert read_rows() == EXPECTED
    assert not find_damaged_files("out")
    assert sorted(os.listdir("out")) == ["manifest.json", "rows.jsonl"]
    manifest = read_manifest("out", "rows")
    assert manifest.content == {"num_rows": 400, "num_failed": 0, "num_rows_in": 400}
    assert [*manifest.settings["code"]] == ["mine.py"]
    assert main(build_command("--set", "factor=3", rows="out", output="again")) == 0
    assert read_manifest("again").inputs[0]["path"] == "out"
    assert "already exists" in get_refusal(*build_command())


@pytest.mark.deep
def test_a_killed_command_resumes_after_its_batches_with_the_same_bytes() -> None:
    assert main(build_command(output="whole")) == 0
    Path("kill").touch()
    Path("done").unlink()
    command = [sys.executable, "-m", "megatron_sov", "map", "rows.jsonl", "mine.py:Step", "--output", "out",
               "--workers", "2"]
    root = str(Path(__file__).parents[2])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=False)
    assert killed.returncode == -signal.SIGKILL and not Path("out").exists()
    Path("kill").unlink()
    before_kill = set(Path("done").read_text().split())
    Path("done").write_text("")
    assert main(build_command()) == 0
    assert Path("out/rows.jsonl").read_bytes() == Path("whole/rows.jsonl").read_bytes()
    after_resume = set(Path("done").read_text().split())
    # at most the batches that waited for the two workers are computed again
    assert len(before_kill & after_resume) <= 2 * WAITING_PER_WORKER * BATCH_ROWS
    assert sorted(map(int, before_kill | after_resume)) == [*range(400)]
    assert sorted(p.name for p in Path().glob(".*")) == []


@pytest.mark.tier1_cases(1)
@pytest.mark.parametrize(("more", "message"), [
    (["--set", "factor=9"], "line 10: "), (["--set", "factor=9"], "is not JSON serializable"),
    (["--set", "factor=10"], "step returned a int, must be a row"), (["--set", "factr=1"], "factr"),
    (["--set", "factor=x"], "factor")])
def test_a_step_that_fails_is_named_with_its_line(more: list[str], message: str, get_refusal: Any) -> None:
    assert message in get_refusal(*build_command(*more)) and not Path("out").exists()


@pytest.mark.parametrize("raised", ["sys.exit(0)", "raise SystemExit('x')", "raise GeneratorExit"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_step_that_ends_the_process_fails(raised: str, threads: str, get_refusal: Any) -> None:
    Path("rows.jsonl").write_text('{"n": 1}\n')
    Path("ends.py").write_text(f"import sys\n\nclass Step:\n    def do(self, row):\n        {raised}\n")
    words = ["map", "rows.jsonl", "ends.py:Step", "--output", "out", "--workers", "1", "--threads", threads]
    error = get_refusal(*words)
    assert re.search(r"line 1: .* raises \((System|Generator)Exit: ", error) and not Path("out").exists()
    assert main([*words, "--skip-failures"]) == 0 and len(read_rows(name="failed.jsonl")) == 1


def test_rows_that_fail_may_be_listed() -> None:
    assert main(build_command("--set", "factor=10", "--skip-failures")) == 0
    (failed,) = read_rows(name="failed.jsonl")
    assert failed["line"] == 11 and failed["row"]["n"] == 10 and "TypeError" in failed["error"]
    assert len(read_rows()) == 399


def test_unfinished_work_of_other_settings_is_refused(get_refusal: Any) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps({"n": n, "text": ""}) + "\n" for n in range(20, 90))
                                  + '{"n": "x"}\n')
    assert main(build_command("--workers", "1")) == 2 and Path(".out.work").is_dir()
    assert "settings.factor was null, and is 3" in get_refusal(*build_command("--set", "factor=3"))
    assert main(build_command("--set", "factor=3", "--redo", "--skip-failures")) == 0
    assert [row["n"] for row in read_rows()] == [3 * n for n in range(20, 90)]


@pytest.mark.parametrize(("words", "message"), [
    (["none.jsonl", "mine.py:Step"], "none.jsonl: cannot be read"),
    (["rows.jsonl", "mine.py:Other"], "a step needs do(self, row)"),
    (["rows.jsonl", "mine.py:Stp"], "did you mean 'Step'?"),
    ([".", "mine.py:Step"], "has no manifest.json"), (["rows.jsonl", "mine"], "does not exist")])
def test_mistakes_are_one_sentence(words: list[str], message: str, get_refusal: Any) -> None:
    assert message in get_refusal("map", *words, "--output", "out")


def test_four_threads_compute_four_rows_at_once() -> None:
    Path("waits.py").write_text("import threading\n\n"
                                "class Step:\n"
                                "    def __init__(self):\n"
                                "        self.together = threading.Barrier(4, timeout=600)\n\n"
                                "    def do(self, row):\n"
                                "        self.together.wait()  # for three others\n"
                                "        return {'n': row['n']}\n")
    assert main(build_command("--threads", "4", step="waits.py:Step")) == 0
    assert read_rows() == [{"n": n} for n in range(400)]
