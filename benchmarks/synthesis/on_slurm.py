"""Synthesis as jobs of a real Slurm on this machine: two workers ask a server that `--serve-vllm` submits
beside them, a double that is called vllm, and keep what one process keeps.

    python benchmarks/synthesis/on_slurm.py

The cluster is that of the tests (tests/operate/slurm/virtual_cluster.py).  vLLM itself has not been seen
here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "tests/operate/slurm"))
from synthesis.actors import rewrite
from synthesis.endpoint import ScriptedEndpoint, serving
from virtual_cluster import PROFILE, VirtualCluster, why_not

from data_prep import cli
from megatron_sov.work.progress.journal import slurm_folder, work_folder
from megatron_sov.work.submit.arrays import Jobs

ROOT = Path(__file__).parents[2]
VLLM = f"""#!{sys.executable}
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from synthesis.actors import rewrite
from synthesis.endpoint import ScriptedEndpoint
assert os.environ["VLLM_API_KEY"]
ScriptedEndpoint(rewrite.reply, port=int(sys.argv[sys.argv.index("--port") + 1]), host="").serve_forever()
"""
SERVER_ENDS_S = 120.0


def kept(output: Path) -> list[Any]:
    """Return the texts that a run has kept, in order."""
    return [json.loads(line)["text"] for line in (output / "kept.jsonl").read_bytes().splitlines()]


def main() -> int:
    """Do both, and compare; returns 1 where something differs."""
    if reason := why_not():
        raise SystemExit(f"there is no Slurm to be had: {reason}")
    with tempfile.TemporaryDirectory(prefix="synthesis-slurm-") as work, \
            contextlib.chdir(work), VirtualCluster(Path(work) / "cluster") as cluster:
        here = Path(work)
        (here / "programs").mkdir()
        (here / "programs/vllm").write_text(VLLM)
        (here / "programs/vllm").chmod(0o755)
        (here / "model").mkdir()
        (here / "model/config.json").write_text("{}")
        (here / "site.yaml").write_text(PROFILE)
        os.environ |= {"PATH": f"{here / 'programs'}:{os.environ['PATH']}",
                       "SLURM_CONF": cluster.env["SLURM_CONF"]}
        words = ["synth", "rewrite", *rewrite.arguments(here)]
        with serving(ScriptedEndpoint(rewrite.reply)) as server:
            assert cli.main([*words, "--engine", server.url, "--model", "model", "--output", "alone"]) == 0
        began_s = time.monotonic()
        assert cli.main([*words, "--serve-vllm", "model", "--cluster", "site.yaml", "--workers", "2",
                         "--output", "jobs"]) == 0
        numbers = Jobs.read(slurm_folder(here / "jobs")).numbers
        state = cluster.wait(numbers["finish"])["JobState"]
        took_s = time.monotonic() - began_s
        is_same = state == "COMPLETED" and kept(here / "jobs") == kept(here / "alone") != []
        print(f"the last job: {state} after {took_s:.0f} s; kept as by one process: {is_same} "
              f"({len(kept(here / 'alone'))} samples, "
              f"{len(list(work_folder(here / 'jobs').glob('records-*')))} workers)", flush=True)
        began_s = time.monotonic()
        while cluster.job(numbers["server"])["JobState"] == "RUNNING":
            if time.monotonic() - began_s > SERVER_ENDS_S:
                cluster.run("scancel", numbers["server"])
                raise SystemExit("the server did not end with the array")
            time.sleep(1)
        print(f"the server ended {time.monotonic() - began_s:.0f} s later: "
              f"{cluster.job(numbers['server'])['JobState']}")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
