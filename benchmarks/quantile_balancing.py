"""Held-out loss and expert loads with selection biases by sign and by quantile, over seeds.

    python benchmarks/quantile_balancing.py --corpus CORPUS > benchmarks/results/quantile_balancing.txt

CORPUS is the folder of `sov-data demo-corpus`. The recipe's balancing loss stays on in both cases.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

from command_lines import format_settings, run_command
from measurement import describe_machine
from seeds import format_over_seeds

RECIPE, STEPS, EVERY_STEPS, VOCAB_SIZE = "tiny-solar-open", 100, 5, 2048
FIRST_STEPS = 30
"""Steps at the start, whose load violations are averaged separately."""


def pack_corpus(corpus: Path, folder: Path) -> Path:
    """Train a tokenizer and pack English text and code, 2 % of the documents held out."""
    texts = [corpus / "english.jsonl", corpus / "code.jsonl"]
    run_command(folder / "log.txt", "tokenizer.cli", "train", "--preset", "solar-open", "--vocab-size",
                str(VOCAB_SIZE), "--input", texts[0], "--output", folder / "tokenizer")
    run_command(folder / "log.txt", "data_prep.cli", "pack", "--tokenizer", folder / "tokenizer", "--input",
                *texts, "--heldout", "0.02", "--output", folder / "tokens")
    return folder / "tokens"


def train_seed(tokens: Path, folder: Path, update: str, seed: int) -> tuple[float, float, float]:
    """Train a model; return its held-out loss, and the mean over layers of the busiest expert's load over the
    mean load minus 1, up to `FIRST_STEPS` and after them."""
    run = folder / f"{update}-{seed}"
    settings = format_settings(f"train.steps={STEPS}", f"train.seed={seed}",
                               f"guards.routing_every_steps={EVERY_STEPS}",
                               f"model.router_bias_update={update}", f"model.vocab_size={VOCAB_SIZE}")
    run_command(folder / "log.txt", "megatron_sov", "pretrain", RECIPE, "--data", tokens, "--run", run,
                "--nproc", "1", *settings)
    run_command(folder / "log.txt", "megatron_sov", "eval", "ppl", run, "--data", tokens, "--output",
                run / "ppl.json")
    violations: dict[bool, list[float]] = {False: [], True: []}
    for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "routing":
            violations[event["step"] > FIRST_STEPS].append(fmean(event["max_violation"]))
    sources = json.loads((run / "ppl.json").read_text(encoding="utf-8")).values()
    loss = sum(s["loss"] * s["tokens"] for s in sources) / sum(s["tokens"] for s in sources)
    return loss, fmean(violations[False]), fmean(violations[True])


def main() -> None:
    """Train all seeds with both updates and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of `sov-data demo-corpus`")
    parser.add_argument("--seeds", type=int, default=5, help="seeds per update")
    args = parser.parse_args()
    print(f"{describe_machine()}\n\n{RECIPE}, {STEPS} steps\n"
          f"{'update':<10}{'seed':>4}{'held-out':>10}{'busiest - 1, steps':>19} 1-{FIRST_STEPS}   later",
          flush=True)
    results: dict[str, list[tuple[float, float, float]]] = {"sign": [], "quantile": []}
    with tempfile.TemporaryDirectory() as name:
        tokens = pack_corpus(args.corpus, Path(name))
        for seed in range(1, args.seeds + 1):
            for update, rows in results.items():
                rows.append(train_seed(tokens, Path(name), update, seed))
                loss, first, later = rows[-1]
                print(f"{update:<10}{seed:>4}{loss:>10.4f}{first:>22.4f}{later:>8.4f}", flush=True)
    differences = [quantile[0] - sign[0] for sign, quantile in zip(*results.values(), strict=True)]
    print(f"\nheld-out loss, quantile minus sign, by seed: {', '.join(f'{d:+.4f}' for d in differences)}\n"
          f"mean: {format_over_seeds(differences, '+.4f')} nats (95 % interval)\n"
          + ", ".join(f"{update}: {fmean(row[2] for row in rows):.4f}" for update, rows in results.items())
          + ": busiest expert's load over the mean load, minus 1, after the first steps")


if __name__ == "__main__":
    main()
