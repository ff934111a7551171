"""A run as Slurm's jobs, with programs that only take note; the server's script runs with a double of vLLM.
Nothing here has seen vLLM itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import echoes
from synthesis.endpoint import ScriptedEndpoint, serving

from data_prep.cli import main
from data_prep.synth import finishing, slurm_array
from data_prep.synth.known import GENERATORS
from data_prep.synth.options import SynthOptions
from data_prep.synth.running import GeneratorOrder, begun_run, merge_answers, order_of, ready
from data_prep.synth.slurm_array import ADDRESS, FinishSource, MakeShare, server_script
from megatron_sov.base.errors import ExitCode
from megatron_sov.work.clusters.cluster import ClusterProfile
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.progress.journal import records_by_item, slurm_folder, work_folder
from megatron_sov.work.submit.arrays import Jobs

PROFILE = """description: noted, not run
partition: gpu
account: lab
cpus_per_node: 8
gpus_per_node: 4
memory: 16G
scratch: /scratch
"""
SBATCH = """#!/bin/bash
[ "$1" = --test-only ] && exit 0
n=$(ls "$NOTED_JOBS" | wc -l)
{ echo "$@"; echo "key ${#VLLM_API_KEY}"; cat "${@: -1}"; } > "$NOTED_JOBS/$(printf %02d "$n")"
case "$1" in --parsable) echo "$((100 + n))" ;; *) echo "Submitted batch job $((100 + n))" ;; esac
"""
VLLM = f"""#!{sys.executable}
import os, sys
sys.path[:0] = {sys.path!r}
sys.path.append({str(Path(__file__).parents[3] / "benchmarks")!r})
from http.server import BaseHTTPRequestHandler, HTTPServer
assert sys.argv[1] == "serve" and "--api-key" not in sys.argv and os.environ["VLLM_API_KEY"]
class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
HTTPServer(("", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATORS, echoes.NAME, echoes.REFERENCE)
    monkeypatch.setattr(finishing, "finish", lambda *args, **more: ExitCode.OK)  # test_finishing.py has it


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that come first; what sbatch is given lies in `noted`."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (tmp_path / "noted").mkdir()
    for name, text in (("sbatch", SBATCH), ("sinfo", "#!/bin/bash\necho gpu\n"), ("vllm", VLLM),
                       ("scontrol", "#!/bin/bash\necho 'MaxArraySize = 1001'\n"),
                       ("squeue", "#!/bin/bash\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTED_JOBS", str(tmp_path / "noted"))
    return folder


def order_at(folder: Path, engine: str, num_lines: int = 5, **more: Any) -> GeneratorOrder:
    """Return an order over lines, and the folder where its jobs tell of themselves."""
    (folder / "lines.jsonl").write_text("".join(
        json.dumps({"id": f"i{n}", "text": f"line {n}"}) + "\n" for n in range(num_lines)))
    slurm_folder(folder / "out").mkdir()
    return order_of(SynthOptions(
        generator=echoes.NAME, output=folder / "out", engine=engine, model="scripted",
        input=(folder / "lines.jsonl",), prompts=echoes.write_prompts(folder / "prompts"), **more))


def settled(order: GeneratorOrder) -> GeneratorOrder:
    with begun_run(ready(order)):
        return order


def test_workers_share_the_items_and_what_they_paid_for_comes_together(tmp_path: Path) -> None:
    with serving(ScriptedEndpoint(echoes.reply)) as server:
        order = settled(order_at(tmp_path, server.url))
        MakeShare(order, 2)(0)
        MakeShare(order, 2)(1)
        work = work_folder(order.output)
        assert {file.name: len(file.read_bytes().splitlines()) // 2 for file in work.glob("records-*")} == {
            "records-0000": 3, "records-0001": 2}
        assert [number for number, _ in records_by_item(work)] == [0, 1, 2, 3, 4]
        assert len(list(order.output.glob("answers-*.sqlite"))) == 2
        merge_answers(order.output)
        assert list(order.output.glob("answers*.sqlite")) == [order.output / "answers.sqlite"]
        cache = EndpointCache(order.output / "answers.sqlite")
        # each worker has asked four times more, to recognise the model
        assert (cache.keys(), cache.num_requests()) == (set(server.answered), server.asked.total() + 8)
        cache.close()
        for records in work.glob("records-*"):
            records.unlink()
        num_asked = server.asked.total()
        MakeShare(order, 3)(2)
        assert server.asked.total() == num_asked, "another number of workers finds what was paid for"
        FinishSource(order)(0)


def test_what_is_submitted(tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = order_at(tmp_path, "http://h/v1")
    (tmp_path / "cluster.yaml").write_text(PROFILE)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    words = ["synth", echoes.NAME, "--input", str(tmp_path / "lines.jsonl"), "--output", str(order.output),
             "--prompts", str(tmp_path / "prompts"), "--serve-vllm", str(tmp_path / "my-model"),
             "--vllm-args", "--tensor-parallel-size 4", "--cluster", str(tmp_path / "cluster.yaml"),
             "--workers", "3"]
    assert main(words) == 0
    told = capsys.readouterr().out
    ask, server, finish = (file.read_text() for file in sorted((tmp_path / "noted").iterdir()))
    assert f"vllm serve {tmp_path}/my-model --host 0.0.0.0 --served-model-name my-model" in server
    assert "--generation-config vllm --tensor-parallel-size 4 --port" in server
    assert "#SBATCH --gpus-per-node=4\n" in server
    assert "#SBATCH --exclusive\n" in server and 'export TMPDIR=/scratch/"${USER' in server
    assert "#SBATCH --array=0-2\n" in ask and "gpus" not in ask
    assert "--dependency=afterok:100" in finish.split("\n")[0]
    keys = {script.split("\n")[1] for script in (server, ask, finish)}
    assert len(keys) == 1 and int(keys.pop().split()[1]) > 40, "one key, by the environment alone"
    slurm = slurm_folder(order.output)
    assert Jobs.read(slurm).numbers == {"ask": "100", "server": "101", "finish": "102"}
    assert "array=100\n" in server and "submitted ask 100, server 101" in told
    (programs / "squeue").write_text("#!/bin/bash\necho '100 RUNNING'\n")
    assert main(words) == 0
    assert "jobs 100 are at work; 0 of 5 items are done" in capsys.readouterr().out
    here = [*words[:words.index("--serve-vllm")], "--engine", "http://h/v1", "--model", "m"]
    assert main(here) == 2
    assert "work in this folder" in capsys.readouterr().err


BAD = {
    "a folder": (["--engine", "{tmp}", "--cluster", "{tmp}/cluster.yaml"], "is served by --serve-vllm"),
    "both": (["--engine", "http://h/v1", "--serve-vllm", "x", "--cluster", "c"],
             "stands in place of --engine"),
    "no cluster": (["--serve-vllm", "x"], "is only for --cluster"),
    "enroot": (["--serve-vllm", "{tmp}", "--cluster", "{tmp}/enroot.yaml"], "enroot: is not known"),
    "an account": (["--engine", "http://h/v1", "--model", "m", "--account", "a"], "is only for --cluster"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together_is_told(name: str, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    order = order_at(tmp_path, "http://h/v1")
    (tmp_path / "cluster.yaml").write_text(PROFILE)
    (tmp_path / "enroot.yaml").write_text(f"{PROFILE}container: {{kind: enroot, image: x.sqsh}}\n")
    more, sentence = BAD[name]
    assert main(["synth", echoes.NAME, "--input", str(tmp_path / "lines.jsonl"), "--output",
                 str(order.output), *(word.format(tmp=tmp_path) for word in more)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("ends_by", ["the array", "the time limit"])
def test_the_servers_script_tells_where_it_answers_and_ends_or_is_put_back(
        ends_by: str, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_at(tmp_path, str(tmp_path / "programs"))
    address = slurm_folder(order.output) / ADDRESS
    text = server_script(order, ClusterProfile("d"), "7").replace("sleep 300", ":")
    (tmp_path / "server.sh").write_text(text.replace("sleep 10", "sleep 0.1"))
    (programs / "squeue").write_text("#!/bin/bash\necho 7\n")
    (programs / "scontrol").write_text('#!/bin/bash\necho "$@" > "$NOTED_JOBS/requeue"\n')
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    process = subprocess.Popen(["bash", str(tmp_path / "server.sh")], stderr=subprocess.PIPE)
    try:
        while not address.exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        if ends_by == "the time limit":
            process.send_signal(signal.SIGUSR1)
            assert process.wait(600) == 75
            assert (tmp_path / "noted" / "requeue").read_text() == "requeue 12\n"
        else:
            said = json.loads(address.read_text())
            assert said["model"] == "scripted"
            address.write_text(json.dumps(said | {"url": said["url"].replace(
                said["url"].split("/")[2].split(":")[0], "127.0.0.1")}))
            monkeypatch.setattr(slurm_array, "LOOK_S", 0.05)
            writer = slurm_array.served(order).writer
            assert writer.engine.startswith("http://127.0.0.1:") and writer.key_env == "VLLM_API_KEY"
            assert writer.identity() == order.writer.identity(), "wherever it is, it is the model"
            (programs / "squeue").write_text("#!/bin/bash\n")
            assert process.wait(600) == 0
        assert not address.exists()
    finally:
        process.kill()
        process.wait()


def test_a_worker_asks_the_server_beside_it(tmp_path: Path) -> None:
    with serving(ScriptedEndpoint(echoes.reply)) as server:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        order = settled(order_at(tmp_path, "", cluster="c", serve_vllm=tmp_path / "model",
                                 limit=1))
        (slurm_folder(order.output) / ADDRESS).write_text(
            json.dumps({"url": server.url, "model": "scripted"}))
        MakeShare(order, 1)(0)
        assert len(server.requests) == 4
