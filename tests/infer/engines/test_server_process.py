"""Engine server processes: start, health checks, and end."""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines import server_process
from megatron_sov.infer.engines.server_engine import parse_server_settings
from megatron_sov.infer.engines.server_process import WORKER_FOLDER, ServerProcess

PROGRAM = """
import http.server, json, os, subprocess, sys, time
if "--fails" in sys.argv:
    sys.exit("ValueError: no room for the cache")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
told = {"words": sys.argv[1:], "pids": [os.getpid(), child.pid],
        "path": os.environ["PYTHONPATH"], "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "rank": os.environ.get("RANK"), "mode": os.environ["VLLM_SERVER_DEV_MODE"]}
open("told.json", "w").write(json.dumps(told))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def server(folder: Path, *more: str, number: int = 0) -> ServerProcess:
    settings = parse_server_settings(["tp=2", "servers=2", 'devices=["4","5","6","7"]', "ep=true",
                                "quantization=fp8", f"more={json.dumps(more)}"], "--engine-set")
    return ServerProcess(number, Path("model"), 99, settings, folder / "engines",
                         command=(sys.executable, "-c", PROGRAM), with_routes=True)


def never() -> bool:
    return False


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "STOP_S", 0.2)
    monkeypatch.setattr(server_process, "_POLL_INTERVAL_S", 0.05)


def test_server_starts_and_stops_with_its_processes(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    own = server(cwd, number=1)
    assert own.start(never) is not None and own.is_alive()
    parsed = json.loads(Path("told.json").read_text())
    # the trainer's rank is not passed to the server; the worker's folder comes first in the path
    assert (parsed["rank"], parsed["gpus"], parsed["mode"]) == (None, "6,7", "1")
    assert parsed["path"] == f"{WORKER_FOLDER}{os.pathsep}/mine"
    words = " ".join(parsed["words"])
    for part in ("model --served-model-name policy --host 127.0.0.1", "--max-model-len 99",
                 "--enable-scale-out", "--tensor-parallel-size 2", "--enable-expert-parallel",
                 "--quantization fp8",
                 "--worker-extension-cls sov_vllm_worker.Extension", "--enable-return-routed-experts",
                 "--logprobs-mode processed_logprobs"):
        assert part in words
    own.end()
    assert not own.is_alive() and not any(map(psutil.pid_exists, parsed["pids"]))


def test_processes_of_a_killed_server_are_killed_on_restart(cwd: Path) -> None:
    own = server(cwd)
    own.start(never)
    pids = json.loads(Path("told.json").read_text())["pids"]
    os.kill(pids[0], signal.SIGKILL)
    own.start(never)
    assert own.is_alive() and not any(map(psutil.pid_exists, pids))
    own.end()


def test_failed_start_reports_last_log_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="server 0 ended;"):
        server(tmp_path, "--fails").start(never)


@pytest.mark.each(("given", "message"), [
    (["tp=0"], "tp"), (["memory_share=1.5"], "memory_share"), (["nothing=1"], "nothing"),
    (["dtype=bf17"], "dtype"),
    (["servers=2", 'devices=["0"]'], "must be 2, servers x tp x dp"), (["transfer=disk"], "transfer")])
def test_invalid_server_settings_are_rejected(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_server_settings(given, "--engine-set")


def test_data_parallel_server_has_one_api_server(tmp_path: Path) -> None:
    # vLLM opens as many as copies, and a request that came in by one cannot be ended by another
    settings = parse_server_settings(["dp=2", "requests=8"], "--engine-set")
    words = ServerProcess(0, Path("model"), 99, settings, tmp_path).build_command(5)
    assert "--data-parallel-size 2 --api-server-count 1" in " ".join(words)
    # each has its own range after it
    assert "--max-num-seqs 8" in " ".join(words) and settings.room == 16
