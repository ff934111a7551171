"""What an audit finds: a small run that was falsified in nine ways, beside honest repetitions of it at other
layouts.

Usage: python benchmarks/audit_frauds.py --work FOLDER

A run of eight segments is trained, and each of them repeated, as its auditor does: at its own layout, and at
others.  Then it is falsified, by a lab that publishes hashes of what it falsified, so that these agree:

  seed        trained in the order of another seed than is told
  rate        trained at a learning rate that is a tenth higher than is told
  data        trained on other text than is told, whose counts agree
  start       trained from another model, and told to be from its seed: the first segment alone is false
  edited      one matrix of a checkpoint is scaled by 1.01
  distilled   weights are moved by a tenth of the way to another model's
  moments     the optimizer's state is that of the checkpoint before
  undone      a segment was not trained: its weights are those before it
  later       weights of four steps later are told as these

The first four are repeated segment by segment.  What an auditor computes of the others is what it computes of
the honest run, since that depends on what stood before alone; so they are compared with that.  A command that
was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from seed_runs import rows_of, run, words

from megatron_sov.audit.commitment import publish, read_commitment
from megatron_sov.audit.drawing import Segment, segments_of
from megatron_sov.audit.repeating import Repeated, RepeatOutcome, compare, gather_evidence, keep, kept, repeat
from megatron_sov.base.artifacts import MANIFEST, FileRecord

STEPS, EVERY, BOUND = 32, 4, 1e-2
SETTINGS = ("train.num_threads=1", "train.eval_every_steps=0", "data.max_epochs=0",
            "train.keep_checkpoints=0", "train.keep_every_steps=0", "train.global_batch_size=8",
            "train.micro_batch_size=4", "model.hidden_size=64", "model.num_layers=2", "model.vocab_size=512",
            rows_of(128), f"train.steps={STEPS}", f"train.checkpoint_every_steps={EVERY}")
LAYOUTS: dict[str, tuple[Sequence[str], int]] = {
    "its own layout": ((), 1), "micro-batches of 2": (("train.micro_batch_size=2",), 1),
    "two processes": ((), 2), "tensor parallel 2": (("parallel.tp=2",), 2)}


class Lab:
    """Who trains, and falsifies."""

    def __init__(self, work: Path) -> None:
        self.work, self.log = work, work / "log"

    def tokens(self, name: str, text: str) -> Path:
        """Return token shards of a text."""
        corpus, shards = self.work / "corpus", self.work / name
        if not (corpus / "english.jsonl").exists():
            run(self.log, "data_prep.cli", "demo-corpus", "--output", corpus, "--overwrite")
        if not (self.work / "tokenizer" / MANIFEST).exists():
            run(self.log, "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "512",
                "--workers", "1", "--input", corpus / "english.jsonl", "--output", self.work / "tokenizer",
                "--overwrite")
        if not (shards / MANIFEST).exists():
            run(self.log, "data_prep.cli", "pack", "--tokenizer", self.work / "tokenizer", "--workers", "1",
                "--input", f"text={corpus / text}.jsonl", "--output", shards, "--overwrite")
        return shards

    def train(self, name: str, data: Path, *more: str | Path) -> Path:
        """Return a run."""
        folder = self.work / "trained" / name
        if not (folder / "complete.json").exists():
            run(self.log, "megatron_sov", "pretrain", "tiny-qwen3", "--data", data, "--run", folder,
                "--resume", *words(SETTINGS), *more)
        return folder

    def falsified(self, name: str, trained: Path, told: Path) -> Path:
        """Return a run that was trained otherwise, with settings and hashes of the one that is told."""
        folder = self.work / "falsified" / name
        if not folder.exists():
            shutil.copytree(trained, folder)
            shutil.copy(told / "config.json", folder)
            shutil.copy(told / "events.jsonl", folder)
            honest = json.loads((told / f"checkpoints/step-{EVERY}/state.json").read_text())["data"]
            for checkpoint in (folder / "checkpoints").iterdir():
                state = json.loads((checkpoint / "state.json").read_text())
                (checkpoint / "state.json").write_text(json.dumps(state | {"data": honest}))
                seal(checkpoint)
        return folder


def seal(checkpoint: Path) -> None:
    """Make the manifest of a checkpoint agree with its files and with the settings that are told."""
    file = checkpoint / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["settings"] = json.loads((checkpoint.parents[1] / "config.json").read_text())
    for name in manifest["files"]:
        record = FileRecord.of(checkpoint / name)
        manifest["files"][name] = {**manifest["files"][name], "digest": record.digest,
                                   "size_bytes": record.size_bytes}
    file.write_text(json.dumps(manifest | {"sha256": ""}))


def scaled(before: Path, forged: Path, other: Path) -> None:
    """Scale one matrix."""
    matrix = next(key for key in tensors_of(forged) if "linear_fc1" in key)
    change(forged, lambda key, value: value * 1.01 if key == matrix else value)


def distilled(before: Path, forged: Path, other: Path) -> None:
    """Move the weights towards another model's."""
    theirs = tensors_of(other)
    change(forged, lambda key, value: value + 0.1 * (theirs[key] - value))


def moments(before: Path, forged: Path, other: Path) -> None:
    """Take the optimizer's state of the checkpoint before."""
    shutil.copytree(before / "optimizer", forged / "optimizer", dirs_exist_ok=True)


def undone(before: Path, forged: Path, other: Path) -> None:
    """Take the weights of the checkpoint before."""
    shutil.copytree(before / "model", forged / "model", dirs_exist_ok=True)


def later(before: Path, forged: Path, other: Path) -> None:
    """Take the weights of the segment behind."""
    step = int(forged.name.removeprefix("step-"))
    shutil.copytree(before.with_name(f"step-{step + EVERY}") / "model", forged / "model", dirs_exist_ok=True)


BY_HAND: dict[str, Callable[[Path, Path, Path], None]] = {
    "edited": scaled, "distilled": distilled, "moments": moments, "undone": undone, "later": later}


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Return the weights of a checkpoint."""
    return {key: value for file in (checkpoint / "model").rglob("*.safetensors")
            for key, value in load_file(file).items()}


def change(checkpoint: Path, edit: Callable[[str, Any], Any]) -> None:
    """Edit the weights of a checkpoint."""
    for file in (checkpoint / "model").rglob("*.safetensors"):
        save_file({key: edit(key, value) for key, value in load_file(file).items()}, file)


class Auditor:
    """Who repeats."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def audit(self, name: str, evidence_run: Path, data: Path, settings: Sequence[str] = (), nproc: int = 1,
              only: int | None = None) -> list[Repeated]:
        """Repeat the segments of a run, or the first ones."""
        log, folder = self.work / f"{name}.jsonl", self.work / "audits" / name
        publish(evidence_run, log)
        commitment = read_commitment(log)
        evidence = gather_evidence(evidence_run, commitment, (), None, settings, nproc, BOUND)
        found = []
        for segment in segments_of(commitment)[:only]:
            if (result := kept(folder, commitment.root, segment)) is None:
                result = repeat(evidence, segment, folder)
                keep(folder, commitment.root, result)
            found.append(result)
        return found


def told(name: str, found: Sequence[Repeated]) -> str:
    """Return a line of the table."""
    outcomes = Counter(r.outcome.value for r in found)
    distances = [r.distance for r in found if r.distance >= 0]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return (f"  {name:<20} {len(found):>3}  {counts:<28}"
            f"  distance {min(distances, default=0):.1e} to {max(distances, default=0):.1e}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.absolute()
    lab, auditor = Lab(work), Auditor(work)
    data, other = lab.tokens("tokens", "english"), lab.tokens("other", "code")
    honest = lab.train("honest", data)
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; {STEPS} steps in segments of {EVERY}, fp32, one process; bound "
          f"{BOUND:g}", flush=True)
    print("honest repetitions: segments, outcomes", flush=True)
    for name, (settings, nproc) in LAYOUTS.items():
        print(told(name, auditor.audit(name.replace(" ", "-"), honest, data, settings, nproc)), flush=True)
    print("frauds", flush=True)
    all_false: dict[str, list[Repeated]] = defaultdict(list)
    model = lab.train("model", data, "--set", "train.seed=5")
    for name, trained, only in (
            ("seed", lab.train("seed", data, "--set", "train.seed=7"), None),
            ("rate", lab.train("rate", data, *words([f"optim.lr={1.1 * rate_of(honest)}"])), None),
            ("data", lab.train("data", other), None),
            ("start", lab.train("start", data, "--from", model), 1)):
        all_false[name] = auditor.audit(name, lab.falsified(name, trained, honest), data, only=only)
        print(told(name, all_false[name]), flush=True)
    last = model / f"checkpoints/step-{STEPS}"
    for name, falsify in BY_HAND.items():
        for end in range(2 * EVERY, STEPS if name == "later" else STEPS + 1, EVERY):
            before, true = (honest / f"checkpoints/step-{step}" for step in (end - EVERY, end))
            forged = work / "forged" / f"step-{end}"
            shutil.rmtree(forged, ignore_errors=True)
            shutil.copytree(true, forged)
            shutil.copytree(before, forged.with_name(before.name), dirs_exist_ok=True)
            if name == "later":
                behind = f"step-{end + EVERY}"
                shutil.copytree(true.with_name(behind), forged.with_name(behind), dirs_exist_ok=True)
            falsify(forged.with_name(before.name), forged, last)
            all_false[name].append(compare(Segment(end - EVERY, end), forged, true, before, BOUND))
        print(told(name, all_false[name]), flush=True)
    flat = [r for found in all_false.values() for r in found]
    different = sum(r.outcome == RepeatOutcome.DIFFERENT for r in flat)
    print(f"{len(flat)} false segments: {different} beyond the bound, "
          f"{sum(r.outcome != RepeatOutcome.EQUAL for r in flat)} where bits are asked for")


def rate_of(run_folder: Path) -> float:
    """Return a run's learning rate."""
    return float(json.loads((run_folder / "config.json").read_text())["optim"]["lr"])


if __name__ == "__main__":
    main()
