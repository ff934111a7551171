"""LoRA with the commands: train, resume bit for bit, inspect, merge; another base model is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.runs.checkpoints import ADAPTER_BASE_MARKER
from tests.typed_words import format_set_options

SMALL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.expert_ffn_dim=16",
         'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=4",
         "train.micro_batch_size=2", "data.heldout_tokens=64", "train.num_threads=1")
LORA = ("train.steps=4", "train.checkpoint_every_steps=2", "train.keep_checkpoints=0", "lora.rank=4",
        "optim.warmup_steps=1")


def read_files(checkpoint: Path, part: str) -> dict[str, bytes]:
    """Return the files of a part of a checkpoint."""
    return {p.relative_to(checkpoint).as_posix(): p.read_bytes()
            for p in sorted((checkpoint / part).rglob("*")) if p.is_file()}


@pytest.mark.essential
def test_an_adapter_is_trained_resumed_and_merged(packed_data: Any, tmp_path: Path, run_command: Any) -> None:
    def command(run: Path, *arguments: str, settings: tuple[str, ...]) -> Any:
        chosen = format_set_options((*SMALL, *settings))
        return run_command("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(run),
                           *arguments, *chosen)

    base, other, run, again = (tmp_path / name for name in ("base", "other", "run", "again"))
    for folder, seed in ((base, 1), (other, 2)):
        result = command(folder, settings=("train.steps=1", f"train.seed={seed}"))
        assert result.returncode == 0, result.stderr
    lost = command(run, settings=LORA)
    assert lost.returncode == 2 and "base model; add --from" in lost.stderr and not run.exists()
    result = command(run, "--from", str(base), settings=LORA)
    assert result.returncode == 0, result.stderr

    assert (base / "checkpoints" / "step-1" / ADAPTER_BASE_MARKER).is_file(), "its run does not prune it"

    last = run / "checkpoints" / "step-4"
    size = sum(p.stat().st_size for p in last.rglob("*.safetensors"))
    whole = sum(p.stat().st_size for p in (base / "checkpoints" / "step-1").rglob("*.safetensors"))
    assert size < whole / 2 and not (last / "model").exists()
    manifest = json.loads((last / "manifest.json").read_text())
    assert manifest["content"]["base"]["path"] == str(base / "checkpoints" / "step-1")
    index = json.loads((last / "optimizer.index.json").read_text())
    assert all("/adapter.model.layers." in key for key in index), "the frozen model has no state"

    shutil.copytree(run, again)  # like a run that was killed after step 2
    shutil.rmtree(again / "checkpoints" / "step-4")
    (again / "complete.json").unlink()
    refusal = command(again, "--resume", "--from", str(other), settings=LORA)
    assert refusal.returncode == 2 and "is another model than" in refusal.stderr, refusal.stderr
    respelled = 'lora.targets=["all-linear", "q_proj"]'
    assert command(again, "--resume", settings=(*LORA, respelled)).returncode == 0
    for part in ("adapter", "optimizer"):
        assert read_files(again / "checkpoints" / "step-4", part) == read_files(last, part)

    outcome = run_command("convert", "inspect", str(run))
    assert "LoRA, rank 4, alpha 16, of down_proj, experts" in outcome.stdout, outcome.stderr
    merged = run_command("convert", "to-hf", str(run), str(tmp_path / "hf"))
    assert merged.returncode == 0, merged.stderr
    same = run_command("convert", "verify", str(run), str(tmp_path / "hf"), "--no-load")
    assert same.returncode == 0 and "verified" in same.stdout, same.stdout
    full = command(tmp_path / "full", "--from", str(run), settings=("train.steps=1",))
    assert full.returncode == 2 and "is an adapter with lora.rank = 4, not 0" in full.stderr
    told = run_command("convert", "to-peft", str(base), str(tmp_path / "peft"))
    assert told.returncode == 2 and "contains all weights, not an adapter" in told.stderr

    shutil.move(base, tmp_path / "moved")
    gone = run_command("convert", "to-hf", str(run), str(tmp_path / "no"))
    assert gone.returncode == 2 and "restore that folder from a copy" in gone.stderr
