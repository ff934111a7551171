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
def test_an_adapter_is_trained_resumed_and_merged(packed_data: Any, tmp_path: Path, run_checked: Any) -> None:
    def run_pretrain(run: Path, *arguments: str, settings: tuple[str, ...], code: int = 0) -> Any:
        chosen = format_set_options((*SMALL, *settings))
        return run_checked("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(run),
                           *arguments, *chosen, code=code)

    base, other, run, killed_run = (tmp_path / name for name in ("base", "other", "run", "again"))
    for folder, seed in ((base, 1), (other, 2)):
        run_pretrain(folder, settings=("train.steps=1", f"train.seed={seed}"))
    assert "base model; add --from" in run_pretrain(run, settings=LORA, code=2).stderr
    assert not run.exists()
    run_pretrain(run, "--from", str(base), settings=LORA)
    assert (base / "checkpoints" / "step-1" / ADAPTER_BASE_MARKER).is_file(), (
        "the base run must not delete a checkpoint that an adapter needs")

    last_checkpoint = run / "checkpoints" / "step-4"
    adapter_bytes = sum(p.stat().st_size for p in last_checkpoint.rglob("*.safetensors"))
    base_bytes = sum(p.stat().st_size for p in (base / "checkpoints" / "step-1").rglob("*.safetensors"))
    assert adapter_bytes < base_bytes / 2 and not (last_checkpoint / "model").exists()
    manifest = json.loads((last_checkpoint / "manifest.json").read_text())
    assert manifest["content"]["base"]["path"] == str(base / "checkpoints" / "step-1")
    index = json.loads((last_checkpoint / "optimizer.index.json").read_text())
    assert all("/adapter.model.layers." in key for key in index), "the frozen model has no state"

    shutil.copytree(run, killed_run)  # like a run that was killed after step 2
    shutil.rmtree(killed_run / "checkpoints" / "step-4")
    (killed_run / "complete.json").unlink()
    other_base = run_pretrain(killed_run, "--resume", "--from", str(other), settings=LORA, code=2)
    assert "is another model than" in other_base.stderr
    same_targets = 'lora.targets=["all-linear", "q_proj"]'  # the default, written in another way
    run_pretrain(killed_run, "--resume", settings=(*LORA, same_targets))
    for part in ("adapter", "optimizer"):
        assert read_files(killed_run / "checkpoints" / "step-4", part) == read_files(last_checkpoint, part)

    inspection = run_checked("convert", "inspect", str(run))
    assert "LoRA, rank 4, alpha 16, of down_proj, experts" in inspection.stdout
    run_checked("convert", "to-hf", str(run), str(tmp_path / "hf"))
    verification = run_checked("convert", "verify", str(run), str(tmp_path / "hf"), "--no-load")
    assert "verified" in verification.stdout
    full_training = run_pretrain(tmp_path / "full", "--from", str(run), settings=("train.steps=1",), code=2)
    assert "is an adapter with lora.rank = 4, not 0" in full_training.stderr
    peft_export = run_checked("convert", "to-peft", str(base), str(tmp_path / "peft"), code=2)
    assert "contains all weights, not an adapter" in peft_export.stderr

    shutil.move(base, tmp_path / "moved")
    moved_base = run_checked("convert", "to-hf", str(run), str(tmp_path / "no"), code=2)
    assert "restore that folder from a copy" in moved_base.stderr
