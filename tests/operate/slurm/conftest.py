"""A real Slurm cluster of four virtual nodes, and a folder to submit from."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.runs.obs.events import read_events
from tests.operate.slurm import virtual_cluster
from tests.typed_words import format_set_options

PROFILE = """description: four virtual nodes of one rank each
partition: batch
account: ""
time_limit: "30"
signal_lead_s: 60
gpus_per_node: 0
cpus_per_node: 1
preflight:
  enabled: false
python: {python}
"""
SMALL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16", "model.num_experts=4",
         'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=8",
         "train.micro_batch_size=2", "data.heldout_tokens=128", "train.num_threads=1", "data.max_epochs=0",
         "train.eval_every_steps=0")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running `VirtualCluster`. Tests are skipped on a machine that cannot run one."""
    reason = virtual_cluster.find_obstacle()
    if reason:
        pytest.skip(reason)
    with virtual_cluster.VirtualCluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def until() -> Callable[..., None]:
    """The function `until(condition, timeout_s, what)`, which waits until `condition()` is true."""
    return virtual_cluster.until


@pytest.fixture
def site(cluster: Any, warm_python: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the virtual cluster's profile `site.yaml`; Slurm uses that cluster."""
    for name in os.environ:
        if name.startswith(("SLURM", "SBATCH", "SRUN")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    (cwd / "site.yaml").write_text(PROFILE.format(python=warm_python))
    return cwd


@pytest.fixture
def small() -> tuple[str, ...]:
    """The words `--set KEY=VALUE ...` of a model that trains in seconds."""
    return tuple(format_set_options(SMALL))


@pytest.fixture
def submit(site: Path) -> Callable[..., str]:
    """A function `(records, *words)` that runs `megatron-sov submit` with these words and returns the number
    of the last job in the folder `records`."""

    def run(records: Path, *words: str) -> str:
        assert cli.main(["submit", *words]) == 0
        return [str(r["job"]) for r in read_events(records / "jobs.jsonl")][-1]

    return run
