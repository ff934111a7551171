"""`megatron-sov eval inspect` with a double of inspect-ai's command, which writes the log of a real
evaluation; the library itself is not installed beside the tests."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_sov.base.errors import ExitCode
from megatron_sov.bench.lm.results import read_items, read_results
from megatron_sov.cli import main
from megatron_sov.commands.evaluate import eval_inspect
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events
from megatron_sov.work.endpoints.local_server import serving

LOG = Path(__file__).parents[2] / "bench" / "inspect_logs" / "sums.eval"
URL = "http://127.0.0.1:9/v1"
LIBRARY = f"""#!{sys.executable}
import json, os, pathlib, shutil, signal, sys
here = pathlib.Path(__file__).parent
assert sys.argv[1:4] == ["-m", "inspect_ai", "eval-set"]
calls = here / "calls.jsonl"
first = not calls.exists()
with open(calls, "a") as file:
    file.write(json.dumps([sys.argv[4:], os.environ["SOV_BASE_URL"], os.environ["SOV_API_KEY"]]) + "\\n")
if (here / "fails").exists():
    sys.exit(1)
if first and (here / "stopped").exists():
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
print("what the library says")
logs = pathlib.Path(sys.argv[sys.argv.index("--log-dir") + 1])
shutil.copy({str(LOG)!r}, logs / "2026-11-27T03-38-37-00-00_sums_kw48CE7sg5a8QivkFQMJKo.eval")
"""
SERVER = """import json, os, signal, sys
open("served.json", "w").write(json.dumps(sys.argv[1:]))
file = sys.argv[sys.argv.index("--address-file") + 1]
open(file + ".tmp", "w").write(json.dumps({"url": "http://127.0.0.1:7/v1", "models": ["model"]}))
os.replace(file + ".tmp", file)
signal.pause()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the double."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "library").write_text(LIBRARY)
    (tmp_path / "library").chmod(0o700)
    return tmp_path


def evaluate(*more: str, target: str = URL) -> int:
    return main(["eval", "inspect", target, "--tasks", "sums.py@sums", "--python", "./library",
                 "--output", "out.json", *more])


def calls() -> list[tuple[list[str], str, str]]:
    return [tuple(json.loads(line)) for line in Path("calls.jsonl").read_text().splitlines()]


def test_the_library_asks_the_endpoint_and_its_log_becomes_results_as_of_eval_lm(
        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    assert evaluate("--model", "m", "--key-env", "MY_KEY", "--samples", "2", "--task-set", "count=6") == 0
    ((words, url, key),) = calls()
    assert (words[:3], url, key) == (["sums.py@sums", "--model", "openai-api/sov/m"], URL, "secret")
    assert words[-4:] == ["--epochs", "2", "-T", "count=6"]
    said = capfd.readouterr()
    assert "sums  accuracy (match)  0.6000" in said.out and "what the library says" in said.err
    assert "secret" not in said.out + said.err + Path("out.json").read_text()
    found = read_results(Path("out.json"))
    assert (found.model.path, found.model.kind) == (f"{URL} m", "endpoint")
    assert len(list(read_items(Path("out.json"), found))) == found.tasks["sums"].items == 6
    (log,) = Path("out.logs").glob("*.eval")
    assert log.read_bytes() == LOG.read_bytes(), "the log is kept as it is"


def test_a_stopped_evaluation_goes_on_and_another_one_does_not_take_its_logs(
        folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "stopped").touch()
    assert evaluate("--model", "m") == ExitCode.STOPPED
    assert "run the same command again to go on" in capfd.readouterr().err
    assert not Path("out.json").exists()
    assert evaluate("--model", "m") == 0 and len(calls()) == 2
    assert evaluate("--model", "other") == 2
    assert "has logs of another evaluation (model differ)" in capfd.readouterr().err
    assert len(calls()) == 2


def test_a_folder_is_served_while_the_library_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "serve.py").write_text(SERVER)
    monkeypatch.setattr(eval_inspect, "serving",
                        partial(serving, program=[sys.executable, str(folder / "serve.py")]))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model" / "model.safetensors")
    assert evaluate("--set", "train.precision=fp32", "--max-length", "64", target="model") == 0
    ((words, url, key),) = calls()
    assert words[2] == "openai-api/sov/model" and url == "http://127.0.0.1:7/v1" and len(key) > 30
    assert key not in " ".join(words)
    served = json.loads(Path("served.json").read_text())
    assert served[-4:] == ["--set", "train.precision=fp32", "--max-length", "64"]
    assert read_results(Path("out.json")).model.kind == "huggingface"


def test_a_log_is_read_without_the_library_and_joins_a_run_s_events_once(
        folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    log = EventLog(folder / "run" / EVENTS)
    log.write("step", step=7)
    log.close()
    for _ in range(2):
        assert main(["eval", "inspect", "--from-log", str(LOG), "--output", "out.json", "--run", "run"]) == 0
    (event,) = [e for e in read_events(folder / "run" / EVENTS) if e["event"] == "eval_lm"]
    assert (event["task"], event["metric"], event["value"], event["step"]) == ("sums", "accuracy", 0.6, 7)
    assert "0.6000" in capsys.readouterr().out
    # two of its kind are compared as those of `eval lm`
    shutil.copy("out.json", "again.json")
    assert main(["eval", "difference", "out.json", "again.json"]) == 0
    assert "accuracy,match" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["--output", "o.json"], "needs TARGET and --tasks"),
    ([URL, "--tasks", "a.py", "--output", "o.json"], "--model is missing"),
    ([URL, "--tasks", "a.py", "--output", "o.json", "--model", "m", "--nproc", "2"],
     "--nproc: an endpoint runs its model itself"),
    (["http://me:key@host/v1", "--tasks", "a.py", "--output", "o.json", "--model", "m"], "holds a key"),
    (["missing", "--tasks", "a.py", "--output", "o.json"], "missing"),
    ([".", "--tasks", "a.py", "--output", "o.json", "--model", "m"], "is a folder; leave it out"),
    (["--from-log", str(LOG), "--limit", "2", "--output", "o.json"], "--limit: for an evaluation"),
    (["--from-log", str(LOG), "--from-log", str(LOG), "--output", "o.json"], "several are of task sums"),
    (["--from-log", str(LOG), "--output", str(LOG)], "--output"),
    ([URL, "--tasks", "a.py", "--output", "o.json", "--model", "m", "--python", "./none"], "is no program")])
def test_what_cannot_be_is_refused_before_anything_runs(words: list[str], said: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "inspect", *words]) == 2
    assert said in capsys.readouterr().err and not Path("o.json").exists()


def test_a_library_that_fails_is_told_with_the_way_to_install_it(folder: Path,
                                                                 capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "fails").touch()
    assert evaluate("--model", "m") == 2
    said = capfd.readouterr().err
    assert "inspect-ai ended with 1" in said and "pip install inspect-ai==0.3.285" in said
