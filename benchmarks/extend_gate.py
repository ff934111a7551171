"""Context extension behind its gate: small models of both kinds learn retrieval, fail the gate at longer
contexts, and pass it.

Usage: python benchmarks/extend_gate.py --work FOLDER [--seeds 0 1 2] [--families k-exaone solar-open] [--text
       FILE.jsonl] python benchmarks/extend_gate.py --work FOLDER --print > benchmarks/results/extend_gate.txt

Everything runs through the ordinary commands on one process of one thread.  For each family and seed:

  short      `pretrain` on a few batches of text, then `extend` with the gate switched off at the short
             length, most samples being needle documents: the model learns to retrieve there
  extension  `extend` in two stages to 2,048 tokens behind the gate: needles at five depths, 20 samples a
             cell, and the loss on short text.  K-EXAONE finds a single needle at any length untrained, so
             half of its contexts are distractors.  YaRN stretches Solar's rotations by a quarter of what the
             length grows by: where it does so in full, documents of the short length, on the stretched
             rotations, are nearly enough to find a single needle at 2,048 tokens
  control    the stages again, each with as many steps as the extension took, without long data: nothing but
             text and needle documents of the short length.  A stage that ends without passing is its last
  rehearsal  the first stage twice for as many steps, without loss on the text around needles, with and
             without short samples between: what becomes of the loss on short text

A run that is complete is not run again, and `--print` writes a table of what there is,
so that seeds can be added.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GATE_STEPS, TOLERANCE_NATS = 80, 0.1
STEP_TOKENS = 2048
MAX_STEPS = (480, 320)
REHEARSAL_STEPS, REHEARSAL_SHARE = 80, 0.25
GATE_FAILED = 3
SIZES = ("vocab_size=2048", "hidden_size=64", "num_layers=4", "num_heads=4", "num_kv_heads=2", "head_dim=32",
         "num_experts=4", "num_experts_per_token=2", "expert_ffn_dim=64", "init_std=0.1")
"""The tiny recipes at a third of their size; every structural choice stays."""
ALWAYS = ("train.num_threads=1", "train.checkpoint_every_steps=100000", "train.eval_every_steps=0",
          "data.heldout_tokens=16384", "data.max_epochs=0", "optim.name=muon", "optim.muon_scale=original",
          "optim.weight_decay=0", "optim.schedule=wsd", "optim.decay_share=0.5",
          "guards.sigma=0",  # beginning to retrieve looks like a spike
          "optim.groups=" + json.dumps([{"pattern": "*word_embeddings.weight", "lr_scale": 0.7},
                                        {"pattern": "output_layer.weight", "lr_scale": 0.7},
                                        {"pattern": "*router.weight", "optimizer": "adamw",
                                         "lr_scale": 0.7}]))
NEEDLES = ("needle.train_share=0", "needle.samples=20", "needle.depths=[0.0, 0.25, 0.5, 0.75, 0.95]")
"""Of extensions."""
SHORT_LR = 1e-2


@dataclass(frozen=True)
class Kind:
    """A family at this size."""

    recipe: str
    short_tokens: int
    """Length at which retrieval is learned."""
    short_phases: tuple[tuple[int, int], ...]
    """(length, steps) on the way there."""
    lengths: tuple[int, int]
    """Of the two stages of the extension."""
    needles: tuple[str, ...]
    """What the test asks, and what the documents of the extension hold."""
    min_accuracy: float
    """Of the gate."""
    lr: float
    """Peak learning rate of the extension."""
    yarn_factors: tuple[float, float] = (0.0, 0.0)
    """`yarn_factor` of the two stages."""
    sizes: tuple[str, ...] = ()
    """Sizes that other families do not have."""


KINDS = {
    "k-exaone": Kind(
        "tiny-k-exaone", 64, ((64, 500),), (512, 2048),
        ('needle.kinds=["multi-key"]', "needle.distractor_share=0.5"), min_accuracy=0.85, lr=5e-3,
        sizes=("dense_ffn_dim=128", "sliding_window_tokens=16")),
    "solar-open": Kind(
        "tiny-solar-open", 128, ((64, 900), (128, 500)), (1024, 2048),
        ('needle.kinds=["single"]', "needle.train_needles=4"), min_accuracy=0.92, lr=2.5e-3,
        yarn_factors=(2.0, 4.0)),
}


def words(settings: Iterable[str]) -> list[str]:
    """Return --set arguments."""
    return [part for setting in settings for part in ("--set", setting)]


def run(log: Path, *arguments: str | Path) -> int:
    """Run a command, its output into a file; returns its exit code.

    Raises:
        SystemExit: it failed otherwise than at its gate.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-W", "ignore", *map(str, arguments)], stdout=out,
                              stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              check=False).returncode
        out.write(f"exit code {code}, {time.monotonic() - start:.0f} s\n")
    if code not in (0, GATE_FAILED):
        raise SystemExit(f"{' '.join(map(str, arguments))}\nended with exit code {code}; see {log}")
    return code


def make_data(work: Path, text: Path | None) -> Path:
    """Return token shards of English text, packed with a tokenizer of its own."""
    shards = work / "shards"
    if not (shards / "manifest.json").exists():
        log, corpus = work / "data.log", work / "corpus"
        if text is None and not corpus.exists():
            run(log, "-m", "data_prep.cli", "demo-corpus", "--output", corpus)
        source = f"english={text or corpus / 'english.jsonl'}"
        run(log, "-m", "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size", "2048", "--input",
            source.partition("=")[2], "--output", work / "tokenizer", "--overwrite")
        run(log, "-m", "data_prep.cli", "pack", "--tokenizer", work / "tokenizer", "--heldout", "0.05",
            "--workers", "1", "--input", source, "--output", shards)
    return shards


class Chain:
    """All runs of one family and seed."""

    def __init__(self, name: str, seed: int, work: Path, shards: Path) -> None:
        self.kind, self.seed, self.shards = KINDS[name], seed, shards
        self.folder = work / f"{name}-{seed}"
        self.log = self.folder / "log"

    def train(self, command: str, run_name: str, start: str | None, *settings: str) -> int:
        """Run a training command unless its run is complete; returns its exit code."""
        target = self.folder / run_name
        done = self.folder / f"{run_name}.exit"
        if done.exists():
            return int(done.read_text())
        begin: list[str | Path] = ["--from", self.folder / start] if start else []
        always = (*ALWAYS, *NEEDLES) if command == "extend" else ALWAYS
        code = run(self.log, "-m", "megatron_sov", command, self.kind.recipe, "--data", self.shards, "--run",
                   target, *begin, "--resume", *words((*always, f"train.seed={self.seed}", *settings)))
        done.write_text(str(code))
        return code

    def short(self) -> None:
        """Make the model that retrieves at its short length."""
        sizes = [f"model.{s}" for s in (*SIZES, *self.kind.sizes)]
        rows = STEP_TOKENS // self.kind.short_tokens
        self.train("pretrain", "text", None, *sizes, "train.steps=20", f"train.global_batch_size={rows}",
                   f"train.micro_batch_size={rows}", "optim.lr=4e-3", "optim.min_lr=4e-3",
                   json_setting("data.phases", [{"name": "text", "seq_len": self.kind.short_tokens}]))
        phases = [{"name": f"needles at {tokens}", "seq_len": tokens, "share": steps,
                   "global_batch_size": STEP_TOKENS // tokens, "blend": {"english": 1, f"needle/{tokens}": 7}}
                  for tokens, steps in self.kind.short_phases]
        self.train("extend", "short", "text", json_setting("data.phases", phases),
                   f"train.global_batch_size={rows}",
                   f"train.steps={sum(steps for _, steps in self.kind.short_phases)}",
                   f"train.micro_batch_size={rows}", f"optim.lr={SHORT_LR}", f"optim.min_lr={SHORT_LR / 10}",
                   "optim.warmup_steps=20", 'needle.kinds=["multi-key"]',
                   f"needle.lengths_tokens=[{self.kind.short_tokens}]")

    def stage(self, number: int, rehearsal_share: float, **more: Any) -> dict[str, Any]:
        """Return one stage of `extend.stages`: long needle documents,
        and short text and needles as rehearsal."""
        tokens, near = self.kind.lengths[number], self.kind.short_tokens
        rehearsal = {"name": "rehearsal", "share": rehearsal_share,
                     "blend": {f"english/{near}": 1, f"needle/{near}": 1}}
        return {"name": str(tokens), "seq_len": tokens, "steps": GATE_STEPS, "max_steps": MAX_STEPS[number],
                "global_batch_size": max(2, STEP_TOKENS // tokens), "lr": self.kind.lr,
                "blend": {"needle": 1}, "yarn_factor": self.kind.yarn_factors[number],
                "parts": [rehearsal] if rehearsal_share else []} | more

    def extend(self, run_name: str, stages: list[dict[str, Any]], *settings: str, gate: bool = True) -> int:
        """Run stages from the short model; returns the exit code."""
        judge = (f"extend.gate.min_accuracy={self.kind.min_accuracy if gate else 0}",
                 f"extend.gate.loss_tolerance_nats={TOLERANCE_NATS if gate else 100}")
        return self.train("extend", run_name, "short", json_setting("extend.stages", stages),
                          *self.kind.needles, f"optim.min_lr={self.kind.lr / 10}", "optim.warmup_steps=5",
                          f"extend.gate.every_steps={GATE_STEPS}", *judge, *settings)

    def extension(self) -> None:
        """Run the short model and the stages behind their gate."""
        self.short()
        self.extend("extension", [self.stage(i, REHEARSAL_SHARE) for i in range(2)])

    def control(self) -> None:
        """Run the stages without long data."""
        steps = [events(folder, "gate")[-1]["step"]
                 for folder in stage_folders(self.folder / "extension", self.kind)]
        self.extend("control", [self.stage(i, 1.0, steps=n, max_steps=n) for i, n in enumerate(steps)])

    def rehearsal(self) -> None:
        """Run the first stage with and without short samples."""
        for name, share in (("with", REHEARSAL_SHARE), ("without", 0.0)):
            stage = self.stage(0, share, steps=REHEARSAL_STEPS, max_steps=REHEARSAL_STEPS)
            self.extend(f"{name}-rehearsal", [stage], "needle.text_weight=0", gate=False)


def json_setting(name: str, value: Any) -> str:
    """Return a setting whose value is JSON."""
    return f"{name}={json.dumps(value)}"


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's events of one kind; none where it has not begun."""
    file = folder / "events.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [e for e in found if e["event"] == kind]


def stage_folders(run: Path, kind: Kind) -> list[Path]:
    """Return the folders of a run's stages that have been judged."""
    return [folder for folder in (run / f"stages/1-{kind.lengths[0]}", run) if events(folder, "gate")]


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, "
          f"Python {platform.python_version()}; one process of one thread each")
    print("gate: 20 samples a cell, mean over depths at the short and the new length, short-context loss at "
          f"most {TOLERANCE_NATS} nats above the start\n")
    for name, kind in KINDS.items():
        for folder in sorted(work.glob(f"{name}-[0-9]*")):
            stretch = "YaRN {:g} and {:g}, ".format(*kind.yarn_factors) if any(kind.yarn_factors) else ""
            print(f"{name}, seed {folder.name.rpartition('-')[2]}, {kind.short_tokens} -> "
                  f"{kind.lengths[1]:,} tokens ({kind.lengths[1] // kind.short_tokens}x), "
                  f"{stretch}{' '.join(kind.needles)}, "
                  f"at least {kind.min_accuracy:.0%}")
            for stage in (folder / "short", *stage_folders(folder / "extension", kind)):
                describe(stage)
            outcome(folder, kind)
            print()


def describe(folder: Path) -> None:
    """Print the checks and the heat maps of a stage."""
    for event in events(folder, "needle"):
        print(f"  {folder.name}, {event['when']} (step {event['step']})")
        rows: dict[tuple[int, int], list[str]] = {}
        for cell in event["cells"]:
            rows.setdefault((cell["length_tokens"], cell["distractors"]), []).append(
                f"{cell['correct'] / cell['samples']:>5.0%}")
        for (tokens, distractors), shares in rows.items():
            print(f"    {tokens:>6,} tokens, {distractors:>3} distractors " + "".join(shares))
    said = [f"{e['step']} {'passes' if e['judged'] else 'fails'} ({means(e)}, loss {e['loss']:.2f} of at "
            f"most {e['loss_limit']:.2f})" for e in events(folder, "gate")]
    if said:
        print(f"  {folder.name}, gate at step " + "; ".join(said))
    times = [e["step_time_s"] for e in events(folder, "step")]
    if times:
        print(f"  {folder.name}: {len(times)} steps, {sum(times):.0f} s of training")


def means(event: dict[str, Any]) -> str:
    """Return the accuracy of each row of a check."""
    return ", ".join(f"{row['accuracy']:.0%} at {row['length_tokens']:,}" for row in event["rows"])


def outcome(folder: Path, kind: Kind) -> None:
    """Print how control and rehearsal ended."""
    ends = {name: folder / f"{name}.exit" for name in ("extension", "control")}
    said = [f"{name} {'exit code ' + end.read_text() if end.exists() else 'not run to its end'}"
            for name, end in ends.items()]
    print("  " + ", ".join(said))
    for stage in stage_folders(folder / "control", kind):
        print("  control without long data, gate at step " + "; ".join(
            f"{e['step']} {'passes' if e['judged'] else 'fails'} ({means(e)})"
            for e in events(stage, "gate")))
    for name in ("with", "without"):
        checks = events(folder / f"{name}-rehearsal", "gate")
        if len(checks) > 1:
            print(f"  {name} rehearsal, {checks[-1]['step']} steps: short-context loss "
                  f"{checks[0]['start_loss']:.3f} -> {checks[-1]['loss']:.3f}; {means(checks[-1])}")


def arguments(description: str | None, seeds: list[int]) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of these chains is told."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--text", type=Path, help="English text instead of this machine's")
    parser.add_argument("--print", action="store_true", help="print what is complete")
    return parser


def main() -> None:
    """Run what is not complete, or print."""
    parser = arguments(__doc__, [0, 1, 2])
    parser.add_argument("--families", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    if args.print:
        report(args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    shards = make_data(args.work, args.text)
    chains = [Chain(name, seed, args.work, shards) for seed in args.seeds for name in args.families]
    for part in (Chain.extension, Chain.control, Chain.rehearsal):
        for chain in chains:
            part(chain)


if __name__ == "__main__":
    main()
