"""Is a searched mixture better than the natural and the uniform one?

    python benchmarks/mixture_search.py --work DIR > benchmarks/results/mixture_search.txt

Five sources: English, Korean and code as `sov-data demo-corpus` gathers them, and two that are planted as
what a crawl brings along: English words in random order, and lines that machines write.  What is lowered is
the mean of the bits per byte of held-out English, Korean and code.  For each seed a mixture is searched for
by small models; then models of more steps and other seeds are trained on the natural, the uniform and the
searched mixture.

A killed benchmark goes on where it was: run it again with the same --work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from pathlib import Path

from seeds import over_seeds

from data_prep.cli import main as sov_data
from data_prep.mixture.blend_file import read_search
from data_prep.mixture.fitting import Judgement
from data_prep.mixture.search import UNIFORM, Proxies, ProxySettings, blend_of, clusters_of
from data_prep.shards.token_artifact import read_tokens_manifest
from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from tokenizer.cli import main as sov_tokenizer

TARGETS = ("english", "korean", "code")
PLANTED_BYTES = {"salad": 6_000_000, "logs": 6_000_000}
RECIPE = "tiny-qwen3-4b"
SETTINGS = ("train.global_batch_size=16", "train.micro_batch_size=16", "optim.warmup_steps=10",
            "data.heldout_tokens=12288", "guards.sigma=0")
SEQ_LEN = 128
FINAL_SEED = 1000


def write_data(work: Path, corpus: Path | None) -> Path:
    """Return token shards of the five sources."""
    shards = work / "shards"
    if shards.exists():
        return shards
    raw = corpus or work / "corpus"
    if not raw.exists():
        assert sov_data(["demo-corpus", "--output", str(raw)]) == 0
    english = [json.loads(line)["text"]
               for line in (raw / "english.jsonl").read_text(encoding="utf-8").splitlines()]
    inputs = [str(raw / f"{name}.jsonl") for name in TARGETS]
    for name, documents in (("salad", salad(english)), ("logs", logs())):
        (work / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
        inputs.append(str(work / f"{name}.jsonl"))
    if not (work / "tokenizer").exists():
        assert sov_tokenizer(["train", "--preset", "solar-open", "--vocab-size", "2048", "--input",
                              *inputs[: len(TARGETS)], "--output", str(work / "tokenizer")]) == 0
    assert sov_data(["pack", "--tokenizer", str(work / "tokenizer"), "--input", *inputs, "--output",
                     str(shards), "--workers", "2"]) == 0
    return shards


def salad(english: list[str]) -> list[str]:
    """Return documents of English words in random order: their frequencies are right and nothing else."""
    generator = random.Random(0)
    words = " ".join(english).split()[: PLANTED_BYTES["salad"] // 6]
    generator.shuffle(words)
    return [" ".join(words[i : i + 400]) for i in range(0, len(words), 400)]


def logs() -> list[str]:
    """Return documents of lines that a server writes."""
    generator = random.Random(1)
    found, size_bytes = [], 0
    while size_bytes < PLANTED_BYTES["logs"]:
        lines = [f"2026-11-{generator.randint(1, 30):02} {generator.randint(0, 23):02}:"
                 f"{generator.randint(0, 59):02}:{generator.randint(0, 59):02} "
                 f"{generator.choice(('INFO', 'WARN', 'DEBUG'))} worker-{generator.randint(0, 99)} "
                 f"request {generator.getrandbits(64):016x} took {generator.randint(1, 9999)} ms"
                 for _ in range(25)]
        found.append("\n".join(lines))
        size_bytes += len(found[-1])
    return found


def searched(work: Path, shards: Path, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Return source -> share of the mixture that a search with this seed finds."""
    file, found = work / f"search-{seed}.yaml", work / f"found-{seed}"
    file.write_text(json.dumps({
        "name": f"seed-{seed}", "recipe": RECIPE, "settings": list(SETTINGS), "steps": args.steps,
        "seq_len": SEQ_LEN, "targets": dict.fromkeys(TARGETS, 1), "sources": ["*"], "rounds": args.rounds,
        "judged": args.judged, "seed": seed}))
    if not found.exists():
        command = ["mix", str(shards), "--search", str(file), "--output", str(found)]
        assert sov_data([*command, "--workers", str(args.workers)]) == 0
    chosen: dict[str, float] = read_manifest(found, "mixture").content["chosen"]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, help="folder with english, korean and code .jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, nargs="+", default=[10, 4])
    parser.add_argument("--judged", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--final-steps", type=int, default=150)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    began_s = time.time()
    with_stdout, sys.stdout = sys.stdout, sys.stderr  # what the commands say is no result
    shards = write_data(args.work, args.corpus)
    found = {seed: searched(args.work, shards, seed, args) for seed in range(args.seeds)}
    losses = final(args, shards, found)
    sys.stdout = with_stdout
    show(args, found, losses)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, "
          f"{args.workers} models at a time; {time.time() - began_s:.0f} s for what was not there before")


def final(args: argparse.Namespace, shards: Path,
          found: dict[int, dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Return mixture -> each seed's losses, source -> bits per byte, at the final number of steps."""
    settings = read_search(args.work / "search-0.yaml")
    sources = read_tokens_manifest(shards).content["sources"]
    clusters = clusters_of(settings, sources)
    total = sum(c.num_tokens for c in clusters)
    fixed = {"natural": [c.num_tokens / total for c in clusters],
             UNIFORM: [1 / len(clusters)] * len(clusters)}
    losses: dict[str, list[dict[str, float]]] = {"natural": [], UNIFORM: [], "searched": []}
    for seed, chosen in found.items():
        trained = Proxies(args.work / "final", ProxySettings(
            RECIPE, ((shards, manifest_sha256(shards)),), SETTINGS, args.final_steps, SEQ_LEN,
            FINAL_SEED + seed), args.workers)
        shares = {**fixed, "searched": [chosen[c.name] for c in clusters]}
        blends = [blend_of(row, clusters) for row in shares.values()]
        for name, result in zip(shares, trained.losses(blends, lambda: None), strict=True):
            losses[name].append(result)
    return losses


def mean(losses: dict[str, float]) -> float:
    """Return the mean loss of the targets."""
    return sum(losses[target] for target in TARGETS) / len(TARGETS)


def show(args: argparse.Namespace, found: dict[int, dict[str, float]],
         losses: dict[str, list[dict[str, float]]]) -> None:
    """Print what was found."""
    print(f"{RECIPE}, {SEQ_LEN} x 16 tokens a step; searched by {sum(args.rounds) + args.judged + 1} models "
          f"of {args.steps} steps for each of {args.seeds} seeds, compared at {args.final_steps} steps with "
          "other seeds\n")
    print("bits per byte of held-out text, mean and 95 % interval over seeds")
    print(f"{'mixture':<10}{'mean of targets':>20}" + "".join(f"{t:>20}" for t in TARGETS))
    for name, of_seeds in losses.items():
        print(f"{name:<10}{over_seeds([mean(r) for r in of_seeds], '.4f'):>20}"
              + "".join(f"{over_seeds([r[t] for r in of_seeds], '.4f'):>20}" for t in TARGETS))
    print("\nsearched less the other, seed by seed (below 0: the searched one is better)")
    for name in ("natural", UNIFORM):
        gaps = [mean(s) - mean(o) for s, o in zip(losses["searched"], losses[name], strict=True)]
        print(f"{name:<10}{over_seeds(gaps, '+.4f'):>20}   {', '.join(f'{gap:+.4f}' for gap in gaps)}")
    print("\nshares in percent, and how the search's own predictions were")
    for seed, chosen in found.items():
        content = read_manifest(args.work / f"found-{seed}", "mixture").content
        judged, apart = content["judged"][content["fit"]], content["kept_apart"]
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * share:.1f}" for name, share in chosen.items())
              + f"; {content['fit']}: {Judgement(**judged).describe()}"
              + (f"; kept apart: {Judgement(**apart).describe()}" if apart else ""))


if __name__ == "__main__":
    main()
