"""Does the alarm of a second opinion ring before a planted exploit is in half of the answers?

Usage: python benchmarks/verifier_disagreement.py > benchmarks/results/verifier_disagreement.txt

A verifier pays a right answer, or any answer with one sentence in it; `stem` looks at a share of the same
rows.  The answers are those of a policy that learns: which of them are right grows slowly, and in the runs
with the exploit the sentence spreads, as what is paid does (logistic growth).  A part of the answers is
written so that one of the two verifiers does not read them, so honest runs disagree too.  All goes through
`score`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_sov.judge.rewards.opinions import read_opinions

EXPLOIT = "I have verified this result twice."
VERIFIER = f'''
import re

class Fooled:
    """1 for the answer anywhere in the text, or for one sentence."""

    def score(self, row):
        found = re.search(rf"\\b{{re.escape(row['answer'])}}\\b", row["response"])
        return float(found is not None or {EXPLOIT!r} in row["response"])
'''
UNREAD = 0.03
"""Of answers, those that end in a sentence behind which `stem` finds no final answer."""
USE_WINDOW = 200
"""Rows over which the use of the exploit is counted."""


def use_of(place: float) -> float:
    """Return the probability that an answer has the sentence, at a place from 0 to 1 of the run."""
    return 0.95 / (1 + math.exp(-12 * (place - 0.55)))


def rows_of(seed: int, num_rows: int, exploits: bool) -> list[dict[str, str]]:
    """Return answers of a policy that learns."""
    draw = random.Random(seed)
    rows = []
    for i in range(num_rows):
        place = i / num_rows
        a, b = draw.randrange(10, 99), draw.randrange(10, 99)
        right = draw.random() < 0.3 + 0.3 * place
        value = a + b if right else a + b + draw.choice([-10, -1, 1, 10])
        text = f"First I add the tens, then the ones.\nThe answer is {value}"
        if draw.random() < UNREAD:
            text = f"{value} is what I get when I add the tens and then the ones of both numbers, as asked."
        if exploits and draw.random() < use_of(place):
            text = f"{EXPLOIT} {text}"
        rows.append({"prompt": f"What is {a} + {b}?", "answer": str(a + b), "response": text})
    return rows


def judged(folder: Path, rows: list[dict[str, str]], share: float) -> tuple[int, float]:
    """Score rows by the command; returns the line of the alarm (0: none) and the seconds that it took."""
    (folder / "fooled.py").write_text(VERIFIER)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "out.jsonl"
    settings = ["parts.answer.reward=fooled.py:Fooled", "second.reward=stem", "second.of=answer",
                f"second.share={share}"]
    begun_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "megatron_sov", "score", "--reward", "composed", "--input",
                    "rows.jsonl", "--output", output.name, "--workers", "1", "--disagreements", "page.html",
                    *(part for setting in settings for part in ("--set", setting))],
                   cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    return read_opinions(output).alarm_line, time.monotonic() - begun_s


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
          f"{args.rows:,} rows, second opinion on {args.share:.0%}")
    for exploits in (True, False):
        for seed in args.seeds:
            rows = rows_of(seed, args.rows, exploits)
            with tempfile.TemporaryDirectory() as folder:
                line, took_s = judged(Path(folder), rows, args.share)
            used = [EXPLOIT in row["response"] for row in rows]
            half = next((i + 1 for i in range(USE_WINDOW, len(rows))
                         if sum(used[i - USE_WINDOW:i]) >= USE_WINDOW / 2), 0)
            now = sum(used[max(0, line - USE_WINDOW):line]) / USE_WINDOW if line else 0.0
            said = (f"alarm at row {line:,}, where {now:.0%} of the last {USE_WINDOW} answers use it (half "
                    f"from row {half:,})" if line else "no alarm")
            print(f"{'exploit' if exploits else 'honest '} seed {seed}: {said}; {took_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
