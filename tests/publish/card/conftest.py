"""A small history as our commands leave it: corpus, tokenizer, shards, two runs, an export, scores."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cli import main as sov_data
from megatron_sov import recipes
from megatron_sov.base.artifacts import manifest_sha256, new_artifact, read_manifest
from megatron_sov.base.sealed import write_json
from megatron_sov.model.config import apply_settings
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EventLog

HOSTILE = "</title><script>alert(1)</script> [x](javascript:alert(1)) | `\x1b[2J\n# Title\n---"
TOKENS_A_STEP = 1000


@dataclass(frozen=True)
class World:
    """Folders of a history."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name.replace("_", "-")


def write_corpus(folder: Path, licence: str = "CC-BY-4.0", name: str = "web") -> None:
    """Write what `sov-data run` leaves."""
    text = ["The ship came in at dawn.", "배가 새벽에 들어왔다."]
    with new_artifact(folder, "corpus") as artifact:
        (artifact.path / f"text/{name}").mkdir(parents=True)
        pq.write_table(pa.table({"text": text, "language": ["en", "ko"]}),
                       artifact.path / f"text/{name}/00000.parquet")
        step = {"folder": "shards/web/00", "documents_in": 3, "documents_kept": 2, "bytes_kept": 50}
        (artifact.path / "summary.json").write_text(json.dumps({"name": "ships", "sources": [
            {"name": name, "licence": licence, "num_files": 1, "steps": [
                {"number": 0, "kind": "parse", **step, "documents_kept": 3},
                {"number": 1, "kind": "language", "settings": {"keep": ["en", "ko"]}, **step}]},
            {"name": "books", "synthetic": True, "num_files": 1, "steps": [
                {"number": 0, "kind": "parse", **step}]}]}))
        artifact.content = {"name": "ships", "num_documents": 2,
                            "num_bytes": sum(len(t.encode()) for t in text)}
    (folder / "inputs").mkdir()
    write_json(folder / f"inputs/{name}.json", {"/home/me/raw/pages.jsonl": [9, 1, 1, 7, "ab" * 16]})


def write_tokens(folder: Path, source: str, tokenizer: Path, *inputs: Path) -> None:
    """Write what `sov-data pack` leaves."""
    with new_artifact(folder, "tokens") as artifact:
        (artifact.path / "train.bin").write_bytes(source.encode())
        split = {"shards": [], "num_documents": 2, "num_tokens": 40, "num_bytes": 50}
        artifact.content = {"content_version": 2, "tokenizer_sha256": "ef" * 32, "sources": [
            {"name": source, "input_sha256": "cd" * 32, "splits": {"train": split}}]}
        for path in (tokenizer, *inputs):
            artifact.add_input(path)


def write_run(folder: Path, inputs: Sequence[Path], *settings: str, objective: str = "lm",
              step: dict[str, Any] | None = None, start: dict[str, Any] | None = None) -> None:
    """Write what a run of four steps leaves that was killed after its third and went on from its second."""
    config = apply_settings(recipes.get("tiny-solar-open"), [f"objective.name={objective}", *settings])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    log = EventLog(folder / "events.jsonl")
    named = [{"kind": read_manifest(path).kind, "path": str(path), "manifest_sha256": manifest_sha256(path)}
             for path in inputs]
    for resumed_from, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log.write("run_start", **{
            "num_ranks": 2, "num_params": 5000, "num_active_params": 3000, "on_gpu": False,
            "resumed_from": resumed_from, "inputs": named[:1] if resumed_from else named,
            "machine": {"host": "secret-host", "device": "Example CPU"}, **(start or {})})
        log.write("phase", step=0, name="a", seq_len=64, global_batch_size=8, blend={})
        log.write("phase", step=3, name="b", seq_len=128, global_batch_size=8, blend={})
        for number in steps:
            log.write("step", step=number, loss=2.0, tokens=number * TOKENS_A_STEP, step_time_s=1.5,
                      **(step or {}))
    log.write("skip", step=2, reason="the loss is nan")
    log.write("skip", step=1, reason="data.skip_steps")
    log.write("eval", step=4, heldout={"web": {"loss": 2.0, "bits_per_byte": 0.875, "tokens": 9}})
    log.write("run_end", step=4, wall_s=9.0, final_loss=2.0)
    log.close()
    checkpoint = folder / "checkpoints/step-4"
    with new_artifact(checkpoint, "checkpoint") as artifact:
        (artifact.path / "model.safetensors").write_bytes(folder.name.encode())
        artifact.content = {"step": 4, "tokens": 4 * TOKENS_A_STEP, "parts": ["model"]}
        artifact.settings = config.to_dict()
    RunFolder(folder).complete({"step": 4, "tokens": 4 * TOKENS_A_STEP, "wall_s": 9.0,
                                "checkpoint": "checkpoints/step-4",
                                "checkpoint_sha256": manifest_sha256(checkpoint)})


def scores_of(model: Path) -> dict[str, Any]:
    """Return what `eval lm` writes of a model."""
    metric = {"name": "acc", "k": None, "filter": "none", "value": 0.75, "stderr": 0.125,
              "interval": [0.5, 0.9375], "clusters": 8, "higher_is_better": True}
    return {"format_version": 1, "kind": "eval-lm", "harness": {"lm_eval": "0.4.13"},
            "model": {"path": "/x", "hash": manifest_sha256(model), "kind": "checkpoint", "step": 4,
                      "run": None},
            "tasks": {"mmlu.v1": {
                "task_hash": "12" * 32, "output_type": "multiple_choice", "dataset": {"files": {}},
                "num_fewshot": 5, "prompt_hash": "34" * 32, "chat_template": False, "mode": "default",
                "sampling": {"temperature": 0.0, "samples": 1}, "judge": None, "agent_limits": None,
                "limit": 8, "items": 8, "failed": 1, "at_limit": 0,
                "metrics": [metric, {**metric, "name": "acc_norm", "value": None, "interval": None}],
                "contamination": {"checked_against": "web", "items_hit": 2, "value_without": 0.5}}},
            "items": {"file": "scores.items.jsonl", "sha256": "56" * 32}}


def write_world(root: Path) -> World:
    """Write the history: pretraining on a corpus, fine-tuning on chats that nobody recorded, an export."""
    world = World(root)
    write_corpus(world.corpus)
    with new_artifact(world.tokenizer, "tokenizer") as artifact:
        (artifact.path / "tokenizer.json").write_text("{}")
    write_tokens(world.text, "web", world.tokenizer, world.corpus)
    write_tokens(world.chat, "chat", world.tokenizer)
    write_run(world.pretrain, [world.text])
    write_run(world.sft, [world.chat, world.pretrain / "checkpoints/step-4"], objective="sft")
    with new_artifact(world.hf, "hf_model") as artifact:
        (artifact.path / "model.safetensors").write_bytes(b"weights")
        artifact.content = {"family": "solar_open", "dtype": "bfloat16", "num_tensors": 7,
                            "num_parameters": 5000}
        artifact.add_input(world.sft / "checkpoints/step-4", leaves=True)
    (root / "scores.json").write_text(json.dumps(scores_of(world.sft / "checkpoints/step-4")))
    (root / "answers.yaml").write_text(
        "licence: apache-2.0\ncontact: lab@example.org\nintensity_g_per_kwh: 400\npower_w: 250\n"
        "languages: [en, ko]\nbase_model: [lab/base]\nlicences: {books: CC0-1.0}\n")
    return world


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A history of one's own, to be changed."""
    return write_world(tmp_path / "world")


@pytest.fixture(scope="session")
def whole_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A history that is not to be changed."""
    return write_world(tmp_path_factory.mktemp("history") / "world")


@pytest.fixture(autouse=True)
def sov_data_in_this_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                             ) -> None:
    """Have `sov-data card` run here, which saves a process in each test; one test has the real one."""
    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        code = sov_data(command[3:])
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    monkeypatch.setattr("megatron_sov.publish.card.data_summary.subprocess.run", run)


@pytest.fixture(scope="session")
def changed() -> Callable[..., None]:
    """`changed(folder, content={...})`: write an artifact anew with other content, and a hash that fits."""
    def change(folder: Path, **fields: Any) -> None:
        manifest = read_manifest(folder)
        kept = folder.with_name(f"{folder.name}.kept")
        shutil.move(folder, kept)
        with new_artifact(folder, manifest.kind) as artifact:
            shutil.copytree(kept, artifact.path, dirs_exist_ok=True)
            (artifact.path / "manifest.json").unlink()
            content = dataclasses.asdict(manifest)
            artifact.content = {**content["content"], **fields.get("content", {})}
            artifact.settings = content["settings"]
            artifact.inputs = fields.get("inputs", content["inputs"])
        shutil.rmtree(kept)
    return change
