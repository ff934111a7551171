"""Can a small model learn each kind of needle test from the documents of that kind?

Usage: python benchmarks/needle_kinds.py --work FOLDER [--seeds 0] [--kinds multi-value ...] [--text
       FILE.jsonl] python benchmarks/needle_kinds.py --work FOLDER --print >
       benchmarks/results/needle_kinds.txt

The K-EXAONE of `extend_gate.py` (same folder, same short model), which has learned to find one needle among
others in 64 tokens, is trained on at 128 tokens on documents of one kind (7 of 8 samples; the others are
text), and judged by that kind before and after: 20 samples at each of five depths of held-out text, three
distractors.  One process of one thread; a run that is complete is not run again.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from extend_gate import STEP_TOKENS, Chain, arguments, describe, json_setting, make_data

FAMILY, TOKENS, LR = "k-exaone", 128, 5e-3
STEPS, DECAY_SHARE = 500, 0.4
KINDS = ("multi-value", "multi-query", "variable-tracking")


def learn(chain: Chain, kind: str) -> None:
    """Train the short model on documents of a kind."""
    rows = STEP_TOKENS // TOKENS
    phase = {"name": kind, "seq_len": TOKENS, "blend": {"english": 1, "needle": 7}}
    chain.train("extend", kind, "short", json_setting("data.phases", [phase]), f"train.steps={STEPS}",
                f"train.global_batch_size={rows}", f"train.micro_batch_size={rows}", f"optim.lr={LR}",
                f"optim.min_lr={LR / 10}", "optim.warmup_steps=20", f"optim.decay_share={DECAY_SHARE}",
                json_setting("needle.kinds", [kind]), f"needle.lengths_tokens=[{TOKENS}]")


def report(work: Path) -> None:
    """Print what there is."""
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, "
          f"Python {platform.python_version()}; one process of one thread each\n")
    for folder in sorted(work.glob(f"{FAMILY}-[0-9]*")):
        for kind in KINDS:
            if (folder / f"{kind}.exit").exists():
                print(f"{FAMILY}, seed {folder.name.rpartition('-')[2]}: "
                      "all four answers of a question right")
                describe(folder / kind)
                print()


def main() -> None:
    """Run what is not complete, or print."""
    parser = arguments(__doc__, [0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    if args.print:
        report(args.work)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    shards = make_data(args.work, args.text)
    for seed in args.seeds:
        chain = Chain(FAMILY, seed, args.work, shards)
        chain.short()
        for kind in args.kinds:
            learn(chain, kind)


if __name__ == "__main__":
    main()
