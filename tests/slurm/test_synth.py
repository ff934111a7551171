"""Synthesis as jobs of a real Slurm: workers ask a server beside them, a double that is called vllm, and keep
what one process keeps."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from synthesis.actors import rewrite
from synthesis.endpoint import ScriptedEndpoint, serving

from data_prep import cli
from data_prep.pipeline.slurm_jobs import Jobs

ROOT = Path(__file__).parents[2]
VLLM = f"""#!{sys.executable}
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from synthesis.actors import rewrite
from synthesis.endpoint import ScriptedEndpoint
assert os.environ["VLLM_API_KEY"]
ScriptedEndpoint(rewrite.reply, port=int(sys.argv[sys.argv.index("--port") + 1]), host="").serve_forever()
"""


def kept(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["text"] for line in (output / "kept.jsonl").read_bytes().splitlines()]


@pytest.mark.distributed
def test_workers_and_their_server_keep_what_one_process_keeps(
        cluster: Any, site: Path, until: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "programs").mkdir()
    (site / "programs/vllm").write_text(VLLM)
    (site / "programs/vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{site / 'programs'}:{os.environ['PATH']}")
    (site / "model").mkdir()
    (site / "model/config.json").write_text("{}")
    words = ["synth", "rewrite", *rewrite.arguments(site)]
    with serving(ScriptedEndpoint(rewrite.reply)) as server:
        assert cli.main([*words, "--engine", server.url, "--model", "model", "--output", "here"]) == 0
    jobs = [*words, "--serve-vllm", "model", "--cluster", "site.yaml", "--workers", "2", "--output", "there"]
    assert cli.main(jobs) == 0
    numbers = Jobs.read(site / "there").numbers
    try:
        assert cluster.wait(numbers["finish"])["JobState"] == "COMPLETED"
    finally:
        cluster.run("scancel", numbers["server"])
    assert kept(site / "there") == kept(site / "here") != []
    parts = {part.name[:10] for part in (site / "there/candidates").iterdir()}
    assert parts == {"part-w0000", "part-w0001"} and not list((site / "there").glob("answers-*"))
    until(lambda: cluster.job(numbers["server"])["JobState"] != "RUNNING", 60, "a server that ends")
    assert cli.main(jobs) == 0
