"""Jobs on a real Ray cluster with two nodes: same bytes as a single process, no lost items."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from megatron_sov.cli import main
from megatron_sov.commands.map import STEPS
from megatron_sov.work.submit import ray_executor
from tests.work.ray_nodes import STORE_BYTES, two_nodes

STEP = """
import os, time, ray

class Step:
    def do(self, row):
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        with open(os.path.join(FOLDER, "nodes"), "a") as f:
            f.write(f"{row['n']} {node} {os.getpid()}\\n")
        while "until" in row and not os.path.exists(os.path.join(FOLDER, row["until"])):
            time.sleep(0.01)
        return {"n": row["n"] * 2 if row["n"] != "bad" else 1 / 0}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as local_cluster:
        yield local_cluster


@pytest.fixture(autouse=True)
def folder(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A step in an empty folder."""
    monkeypatch.setattr(STEPS, "_known", {})
    (cwd / "mine.py").write_text(f"FOLDER = {str(cwd)!r}\n{STEP}")
    return cwd


def run_map(cluster: Any, output: str, *rows: dict[str, Any], workers: int = 2) -> int:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ray_options = ["--ray", cluster.address] if cluster else []
    words = ["map", "rows.jsonl", "mine.py:Step", "--output", output, "--workers", str(workers)]
    return main([*words, *ray_options])


def read_node_ids() -> set[str]:
    return {line.split()[1] for line in Path("nodes").read_text().split("\n") if line}


def run_when_started(condition: Callable[[], bool], do: Callable[[], None]) -> Thread:
    """Run an action when the step's marker file appears."""

    def wait() -> None:
        while not Path("nodes").exists() or not condition():
            time.sleep(0.01)
        do()

    (thread := Thread(target=wait, daemon=True)).start()
    return thread


@pytest.mark.deep  # the test below has nodes, too
@pytest.mark.distributed
def test_local_clustergive_output_of_single_process(cluster: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"n": n, "until": "both"} for n in range(200)]
    Path("both").touch()
    assert run_map(None, "here", *rows, workers=1) == 0
    for name in ("nodes", "both"):
        Path(name).unlink()
    run_when_started(lambda: len(read_node_ids()) == 2, Path("both").touch)  # tasks on the first node wait
    assert run_map(cluster, "there", *rows, workers=5) == 0  # more than there are cores: they wait for ever
    assert Path("there/rows.jsonl").read_bytes() == Path("here/rows.jsonl").read_bytes()
    assert run_map(cluster, "bad", *rows[:100], {"n": "bad"}, workers=1) == 2
    error = capsys.readouterr().err
    assert "line 101: " in error and "ZeroDivisionError" in error and "Traceback" not in error


@pytest.mark.distributed
def test_lost_node_loses_no_items(cluster: Any) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def lose_node() -> None:
        cluster.remove_node(node, allow_graceful=False)
        Path("lost").touch()

    thread = run_when_started(lambda: node.node_id in read_node_ids(), lose_node)
    rows = [{"n": n, "until": "lost"} for n in range(400)]  # each node waits with its unfinished items
    assert run_map(cluster, "out", *rows, workers=3) == 0
    thread.join(0)
    assert not thread.is_alive(), "the node was lost while it worked"
    local_cluster = Path("out/rows.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["n"] for line in local_cluster] == [2 * n for n in range(400)]


def build_marker(marker: str) -> Callable[[int], bytes]:
    def mark(item: int) -> bytes:
        Path(marker).touch()
        return bytes([item])

    return mark


def test_a_process_builds_its_step_for_the_first_item() -> None:
    worker = ray_executor._RayWorker(build_marker, ("built",))
    assert [Path("built").exists(), worker.do(3), worker.do(4)] == [False, b"\3", b"\4"]


@pytest.mark.distributed
def test_a_process_holds_its_gpu_between_items(cluster: Any, tmp_path: Path) -> None:
    """A built step has a model on the GPU: no other task may get the GPU until the job ends."""
    is_gpu_free: list[bool] = []

    def read_items() -> Iterator[tuple[int, int]]:
        yield 0, 0
        while not marker.exists():
            time.sleep(0.01)
        other = ray.remote(num_gpus=1, num_cpus=0)(lambda: None).remote()
        is_gpu_free.append(bool(ray.wait([other], timeout=5)[0]))
        ray.cancel(other)
        yield 1, 1

    marker = tmp_path / "done"
    execute = ray_executor.ray_executor(build_marker, (str(marker),), 1, cluster.address, gpus=1)
    assert [number for number, _ in execute(read_items())] == [0, 1]
    assert is_gpu_free == [False]


@pytest.mark.distributed
def test_missing_cluster_raises_user_error(monkeypatch: pytest.MonkeyPatch, get_refusal: Any) -> None:
    Path("rows.jsonl").write_text('{"n": 1}\n')
    monkeypatch.setenv("RAY_ADDRESS", "")
    words = ["map", "rows.jsonl", "mine.py:Step", "--output", "out", "--ray", "nonsense"]
    assert "--ray nonsense: cannot connect to a Ray cluster" in get_refusal(*words)
    assert "exclude each other" in get_refusal(*words, "--cluster", "a")


class NewestFirstRay:
    """Ray double: the newest pending task finishes first."""

    exceptions = ray.exceptions

    def wait(self, pending: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        *others, newest = pending
        return [newest], others

    def get(self, reference: list[Any]) -> bytes:
        return str(reference).encode()


def test_slow_item_does_not_end_iteration() -> None:
    actor = SimpleNamespace(is_there=SimpleNamespace(remote=object),
                            do=SimpleNamespace(remote=lambda item: f"done {item}"))
    processes = ray_executor._RayProcesses(NewestFirstRay(), lambda: actor, 2)
    assert list(ray_executor._iter_records(processes, enumerate(range(40)))) == [
        (number, f"done {number}".encode()) for number in range(40)]
