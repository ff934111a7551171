"""What commands take in an earlier version of the code and in this one, in turns.

    python benchmarks/two_versions.py --before COMMIT --demo runs/demo [--rounds 3] [--kinds score pack ...]

Both versions run the same command on the same input, one after the other, as often as `--rounds` says, in
the order before, now, now, before, ...; told is the median of each, of wall time and of processor time of
all processes, and their ratio (above 1: this version is faster).  `--demo` is the folder that `make demo`
leaves.  Memory is the largest of one process, at the input's size and at ten times of it, now.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from job_kills import PIPELINE

ROOT = Path(__file__).parents[1]
OWN = """
class Free:
    def score(self, row):
        return float(len(row["response"]))
"""
APPEND = """
import sys
from pathlib import Path
import numpy as np
try:
    from megatron_sov.rollouts.rows import Key, Rollout
    from megatron_sov.rollouts.store import RolloutStore
except ImportError:  # a version from before the halls
    from megatron_sov.rollouts.rows import Key, Rollout
    from megatron_sov.rollouts.store import Store as RolloutStore

store, count = RolloutStore.create(Path(sys.argv[1]), "sha256:ab", 50_000), int(sys.argv[2])
draw = np.random.default_rng(0)
for piece in range(count // 4096):
    rows = [Rollout(Key(f"p{i}", 0, "f" * 64, "s" * 64), 1, 0, {"prompt": "?"}, np.arange(20, dtype=np.int32),
                    draw.integers(0, 50_000, 64).astype(np.int32), draw.random(64).astype(np.float32) - 1,
                    np.full(64, 1, np.int32), "stop", "text", 1.0, "transformers", 1.5, 2.5)
            for i in range(piece * 4096, piece * 4096 + 4096)]
    store.add_rollouts(f"round-0001-piece-{piece:04d}", rows, {})
"""
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{a}} and {{b}} make"
doc_to_choice: ["one", "two", "three", "four"]
doc_to_target: right
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
Prepare = Callable[[Path, Path, int], tuple[float, list[str]]]
"""Folder, demo and size -> units of the work, and the command: a program, and words, OUT for the output."""


def score(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """20,000 rows by a reward that costs nothing."""
    (folder / "own.py").write_text(OWN)
    with open(folder / "rows.jsonl", "w") as f:
        for n in range(20_000 * size):
            f.write(json.dumps({"id": n, "response": f"answer {n} " * 20}) + "\n")
    return 20_000 * size, ["megatron_sov", "score", "--reward", "own.py:Free", "--input", "rows.jsonl",
                           "--output", "OUT", "--workers", "1"]


def score_code(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """300 programs with two tests each, in the sandbox."""
    with open(folder / "rows.jsonl", "w") as f:
        for n in range(300 * size):
            response = f"```python\ndef add(a, b):\n    return a + b + {n % 5 // 4}\n```"
            f.write(json.dumps({"id": n, "response": response, "tests": [
                "assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]}) + "\n")
    return 300 * size, ["megatron_sov", "score", "--reward", "code", "--input", "rows.jsonl",
                        "--output", "OUT", "--workers", "2"]


def score_math(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """2,000 answers against sums."""
    with open(folder / "rows.jsonl", "w") as f:
        for n in range(2000 * size):
            f.write(json.dumps({"id": n, "response": f"So it is \\boxed{{{n + n % 3 // 2}}}.",
                                "answer": str(n)}) + "\n")
    return 2000 * size, ["megatron_sov", "score", "--reward", "math", "--input", "rows.jsonl",
                         "--output", "OUT", "--workers", "2"]


def _raw(folder: Path, demo: Path, size: int) -> float:
    """Put the demo's English text, so many times as other words, into `raw`; returns its MB."""
    (folder / "raw").mkdir(exist_ok=True)
    lines = (demo / "corpus/english.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for copy in range(size):
        with open(folder / f"raw/{copy}.jsonl", "w") as f:
            f.writelines(json.dumps({"text": text.replace(" the ", f" the{copy} ")}) + "\n" for text in texts)
    return sum(file.stat().st_size for file in folder.glob("raw/*")) / 1e6


def pack(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """MB of JSON lines into token shards."""
    return _raw(folder, demo, size), [
        "data_prep", "pack", "--tokenizer", str(demo / "tokenizer"), "--input", "raw", "--output", "OUT",
        "--workers", "2"]


def data_run(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """MB of JSON lines through two kinds of deduplication."""
    (folder / "pipeline.yaml").write_text(PIPELINE % 2_000_000)
    return _raw(folder, demo, size), [
        "data_prep", "run", "pipeline.yaml", "--output", "OUT", "--workers", "2"]


def tokenizer(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """MB of text that a tokenizer is trained on."""
    return _raw(folder, demo, size), [
        "tokenizer", "train", "--preset", "solar-open", "--vocab-size", "2000", "--input", "raw", "--output",
        "OUT", "--workers", "2"]


def store_append(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """Rows of 64 tokens, in parts of 4,096."""
    (folder / "append.py").write_text(APPEND)
    return 40_960 * size, ["append.py", "OUT", str(40_960 * size)]


def convert(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """Checkpoints that become Hugging Face folders."""
    return 1, ["megatron_sov", "convert", "to-hf", str(demo / "sft"), "OUT"]


def eval_lm(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """Items of four choices, by transformers."""
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/sums.yaml").write_text(TASK)
    with open(folder / "tasks/sums.jsonl", "w") as f:
        for n in range(300 * size):
            f.write(json.dumps({"a": n % 17, "b": n // 17, "right": n % 4}) + "\n")
    return 300 * size, ["megatron_sov", "eval", "lm", str(demo / "hf"), "--tasks", "sums", "--task-dir",
                        "tasks", "--output", "OUT"]


def rl_generate(folder: Path, demo: Path, size: int) -> tuple[float, list[str]]:
    """Responses of 32 tokens at most."""
    with open(folder / "prompts.jsonl", "w") as f:
        for n in range(64 * size):
            f.write(json.dumps({"prompt": f"What is {n} and {n % 7}?", "answer": str(n + n % 7)}) + "\n")
    asked = {"rounds": 1, "prompts_per_round": 64 * size, "samples_per_prompt": 4, "max_new_tokens": 32,
             "max_prompt_tokens": 96}
    words = [word for name, value in asked.items() for word in ("--set", f"rollout.{name}={value}")]
    return 256 * size, ["megatron_sov", "rl", "generate", "tiny-solar-open", "--from", str(demo / "sft"),
                        "--prompts", "prompts.jsonl", "--store", "OUT", "--run", "OUT.run", "--nproc", "1",
                        *words]


KINDS: dict[str, tuple[Prepare, str]] = {
    "score": (score, "rows/s"), "score code": (score_code, "rows/s"), "score math": (score_math, "rows/s"),
    "pack": (pack, "MB/s"), "data run": (data_run, "MB/s"), "tokenizer": (tokenizer, "MB/s"),
    "convert": (convert, "models/s"), "eval lm": (eval_lm, "items/s"),
    "rl generate": (rl_generate, "responses/s"), "store append": (store_append, "rows/s")}


@dataclass(frozen=True)
class Took:
    """What a command took."""

    wall_s: float
    cpu_s: float
    """Of all its processes."""
    memory_mb: float
    """Of the largest of them."""


def run(code: Path, folder: Path, words: list[str]) -> Took:
    """Run a command with a version of the code, and delete what it made."""
    for leftover in folder.glob("*OUT*"):
        (shutil.rmtree if leftover.is_dir() else os.unlink)(leftover)  # type: ignore[operator]
    program = words if words[0].endswith(".py") else [
        "-c", f"import sys; from {words[0]}.cli import main; sys.exit(main())", *words[1:]]
    began_s = time.monotonic()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, *program], cwd=folder, stdout=log, stderr=log, env={
            **os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
    if code_ := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{words} ended with {code_}: {(folder / 'log').read_text()[-2000:]}")
    return Took(time.monotonic() - began_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def compared(name: str, before: Path, demo: Path, rounds: int) -> str:
    """Return the line of the table of one kind."""
    prepare, unit = KINDS[name]
    with tempfile.TemporaryDirectory(prefix="sov-two-versions-") as place:
        folder = Path(place)
        units, words = prepare(folder, demo, 1)
        took: dict[Path, list[Took]] = {before: [], ROOT: []}
        run(ROOT, folder, words)  # compiled code and the disk are warm for both
        for number in range(rounds):
            for code in (before, ROOT) if number % 2 else (ROOT, before):
                took[code].append(run(code, folder, words))
        wall, cpu = ({code: median(getattr(one, field) for one in found) for code, found in took.items()}
                     for field in ("wall_s", "cpu_s"))
        memory = median(one.memory_mb for one in took[ROOT])
        _, words = prepare(folder, demo, 10)
        once = name in ("convert", "rl generate", "score code")
        ten = "-" if once else f"{run(ROOT, folder, words).memory_mb:.0f}"
    return (f"{name:<13} {units / wall[before]:>9,.1f} {units / wall[ROOT]:>9,.1f} {unit:<11} "
            f"{wall[before] / wall[ROOT]:>6.3f} {units / cpu[before]:>9,.1f} {units / cpu[ROOT]:>9,.1f} "
            f"{cpu[before] / cpu[ROOT]:>7.3f} {memory:>7.0f} {ten:>7}")


def main() -> None:
    """Compare all kinds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the "
          f"start; before: {args.before}; medians of {args.rounds} runs in turns")
    print(f"{'':<13} {'a second of wall time':^19} {'':<11} {'':>6} {'of processor time':^19} {'':>7} "
          f"{'MB now, and at ten':>15}")
    print(f"{'':<13} {'before':>9} {'now':>9} {'':<11} {'ratio':>6} {'before':>9} {'now':>9} {'ratio':>7} "
          f"{'':>7} {'times':>7}")
    with tempfile.TemporaryDirectory(prefix="sov-before-") as place:
        before = Path(place) / "code"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-q", str(before), args.before], check=True)
        try:
            for name in args.kinds:
                print(compared(name, before, args.demo.resolve(), args.rounds), flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
