"""Engine servers on their own Slurm nodes; scripts replace vLLM's server and the run."""

import json
import re
import socket
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SERVER = """#!{python}
import http.server, os, psutil, sys
if sys.argv[1] == "-c":
    sys.exit()  # `python -c "import vllm"`
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
        if self.path == "/end":
            os._exit(1)
        if self.path == "/end-keeper":
            psutil.Process().parents()[1].kill()  # `rl engines`, with which this server's parent ends
    def log_message(self, *_):
        pass
host, port = (sys.argv[sys.argv.index(name) + 1] for name in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""
RUN = """
import json, os, pathlib, sys, time, urllib.request
words = sys.argv
run = pathlib.Path(words[words.index("--run") + 1])
urls = [words[i + 1] for i, word in enumerate(words) if word == "--engine-url"]
def request(url, path="/health"):
    try:
        return int(urllib.request.urlopen(url + path, timeout=10).read())
    except OSError:
        return None
def wait_for_new_servers(known):  # return the process ids of all servers once none is in `known`
    while True:
        pids = [request(url) for url in urls]
        if all(pid and pid not in known for pid in pids):
            return pids
        time.sleep(0.2)
if os.environ["RANK"] == "0":
    (run / "engines/model").mkdir(parents=True)
    (run / "engines/model/config.json").write_text("{}")
    pids = [wait_for_new_servers([])]
    request(urls[0], "/end")
    while (pid := request(urls[0])) in (None, pids[0][0]):
        time.sleep(0.2)
    pids.append([pid, request(urls[1])])
    request(urls[0], "/end-keeper")
    pids.append(wait_for_new_servers(pids[1]))
    (run / "servers.json").write_text(json.dumps({"urls": urls, "pids": pids}))
    (run / "complete.json").write_text('{"step": 1}')
while not (run / "complete.json").exists():
    time.sleep(0.2)
"""


@pytest.mark.distributed
def test_engine_servers_restart_and_end_with_the_job(cluster: Any, site: Path, submit: Callable[..., str],
                                                     small: tuple[str, ...], warm_python: str) -> None:
    vllm, python = site / "vllm-python", site / "python"
    vllm.write_text(SERVER.format(python=sys.executable))
    (site / "run.py").write_text(RUN)
    python.write_text("#!/bin/bash\n"
                      f'case "$*" in *"megatron_sov rl run"*) exec {sys.executable} {site}/run.py "$@";;\n'
                      f'*"rl engines"*) exec {sys.executable} "$@";; esac\nexec {warm_python} "$@"\n')
    for file in (vllm, python):
        file.chmod(0o755)
    profile = re.sub(r"(?m)^python: .*$", f"python: {python}", (site / "site.yaml").read_text())
    (site / "two.yaml").write_text(profile.replace(
        # the pause before a restart is not tested here
        "cpus_per_node: 1", "cpus_per_node: 2\nranks_per_node: 2\nsetup: ['sleep() { command sleep 0.1; }']"))
    (site / "prompts.jsonl").write_text('{"prompt": "1?"}\n{"prompt": "2?"}\n')
    (site / "start").mkdir()  # empty, as the servers load the run's export
    run, records = site / "run", site / "run/slurm"
    job = submit(records, "rl-run", "--cluster", "two.yaml", "--engine-nodes", "1", "tiny-solar-open", *small,
                 "--prompts", "prompts.jsonl", "--reward", "math", "--from", "start", "--store", "store",
                 "--run", str(run), "--set", "rollout.rounds=1", "--set", "rollout.prompts_per_round=2",
                 "--set", "rollout.max_new_tokens=8", "--set", "rollout.max_prompt_tokens=8", "--engine",
                 "vllm", "--engine-python", str(vllm))
    result = cluster.wait(job, timeout_s=300)
    log = (records / f"{job}.log").read_text()
    assert (result["JobState"], result["NumNodes"]) == ("COMPLETED", "2"), log
    servers = json.loads((run / "servers.json").read_text())
    [attempt] = (records / "logs").iterdir()
    engine_log, _ = sorted((attempt / "engines").glob("n*.log"))
    first, second, third = servers["pids"]
    assert first[0] != second[0] and first[1] == second[1], "one server alone has ended"
    assert not set(third) & set(second), "all servers end with a killed `rl engines`"
    assert "restarting" in engine_log.read_text()
    assert f"ended with 137 and are started again, see {engine_log}" in log
    for url in servers["urls"]:
        # virtual nodes share this machine's network
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(url).port), 5)
