"""Jobs of every kind that are killed again and again leave the bytes of an undisturbed run.

    python benchmarks/job_kills.py [--kills 30] [--kinds score map ...] [--seed 0]

For each kind: the command once undisturbed; then the same command under SIGKILL of all its processes at
random moments, started anew each time, until it has been killed so often; then to its end.  An output that is
complete before is deleted and made again.  Told are kills that found the command at work, whether all files
that it left are equal to the bit (the time of a manifest aside), what the last output has left beside it, and
for kinds whose items are noted as they are done: items that were never done, and how often one was done again
for each kill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUM_ROWS = 4000
OWN = """
import time

def note(row):
    time.sleep(0.0005)
    with open(f"noted", "a") as f:
        f.write(f"{row['id']}\\n")

class Pays:
    def score(self, row):
        note(row)
        return float(len(row["response"]))

class Step:
    def do(self, row):
        note(row)
        return {"id": row["id"], "length": len(row["response"])}
"""
PIPELINE = """
name: deduplicated
shard_bytes: %d
sources:
  - {name: web, path: raw, format: jsonl, kind: en}
steps:
  - exact_dedup: {}
  - minhash_dedup: {threshold: 0.8}
output: {name: "{source}"}
"""


@dataclass(frozen=True)
class Kind:
    """A kind of job."""

    command: tuple[str, ...]
    """Module and words; OUT stands for the output."""
    output: str
    """Name of the output."""
    notes: bool = False
    """Whether its items are noted as they are done."""
    compared: tuple[str, ...] = ("",)
    """Endings of the files that are compared; others say how long something took."""


KINDS = {
    "score": Kind(("megatron_sov", "score", "--reward", "own.py:Pays", "--input", "rows.jsonl", "--output",
                   "OUT", "--workers", "2"), "scored.jsonl", True),
    "map": Kind(("megatron_sov", "map", "rows.jsonl", "own.py:Step", "--output", "OUT", "--workers", "2"),
                "mapped", True),
    "tokenizer": Kind(("tokenizer", "train", "--preset", "solar-open", "--vocab-size", "1000", "--input",
                       "raw", "--output", "OUT", "--workers", "2"), "tokenizer-out"),
    "pack": Kind(("data_prep", "pack", "--tokenizer", "tokenizer", "--input", "raw", "--output", "OUT",
                  "--workers", "2"), "tokens"),
    "data run": Kind(("data_prep", "run", "pipeline.yaml", "--output", "OUT", "--workers", "2"), "corpus",
                     compared=(".parquet", ".jsonl", ".npy")),
    "convert": Kind(("megatron_sov", "convert", "to-hf", "checkpoint", "OUT", "--max-shard-bytes", "2000000",
                     "--workers", "1"), "hf-out"),
}
PROGRAMS = {"megatron_sov": "megatron_sov.cli", "tokenizer": "tokenizer.cli", "data_prep": "data_prep.cli"}


def prepare(folder: Path) -> None:
    """Write what the commands read."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randrange(1, 5))) for _ in range(3000)]
    (folder / "own.py").write_text(OWN)
    (folder / "pipeline.yaml").write_text(PIPELINE % 60_000)
    (folder / "raw").mkdir()
    texts = [" ".join(draw.choices(words, k=draw.randrange(20, 120))) for _ in range(NUM_ROWS)]
    with open(folder / "rows.jsonl", "w") as f:
        for n, text in enumerate(texts):
            f.write(json.dumps({"id": n, "response": text}) + "\n")
    for number in range(4):
        with open(folder / f"raw/{number}.jsonl", "w") as f:
            for text in texts[number::4]:
                f.write(json.dumps({"text": text}) + "\n")
    started(folder, KINDS["tokenizer"], "tokenizer").wait()
    write_checkpoint(folder)


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint of 80 MB, which becomes 40 files of a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=2)).save_pretrained(folder / "hf")
    from_hf = Kind(("megatron_sov", "convert", "from-hf", "hf", "OUT"), "checkpoint")
    assert started(folder, from_hf, "checkpoint").wait() == 0, (folder / "log").read_text()[-2000:]


def started(folder: Path, kind: Kind, output: str) -> subprocess.Popen[bytes]:
    """Start a command, in a group of processes of its own."""
    module, *words = kind.command
    words = [output if word == "OUT" else word for word in words]
    with open(folder / "log", "ab") as log:
        program = f"import sys; from {PROGRAMS[module]} import main; sys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", program, *words], cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def content(output: Path, endings: tuple[str, ...]) -> dict[str, str]:
    """Return file -> hash of an output, without when it was made."""
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    found = {}
    for file in files:
        data = file.read_bytes()
        if file.name == "manifest.json":
            told = json.loads(data)
            data = json.dumps({name: told[name] for name in ("kind", "content", "files")}).encode()
        if file.name.endswith(endings):
            found[str(file.relative_to(output))] = hashlib.sha256(data).hexdigest()
    return found


def is_there(output: Path) -> bool:
    """Return whether an output is complete."""
    return output.is_file() or (output / "manifest.json").is_file()


def remove(path: Path) -> None:
    """Delete a file or a folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def killed(folder: Path, name: str, kind: Kind, kills: int, draw: random.Random) -> str:
    """Kill a command so often; returns the line of the table."""
    begin_s = time.monotonic()
    whole = folder / f"whole-{kind.output}"
    code = started(folder, kind, whole.name).wait()
    assert code == 0, (name, (folder / "log").read_text()[-2000:])
    wall_s, expected = time.monotonic() - begin_s, content(whole, kind.compared)
    judged = len((folder / "noted").read_text().split()) if kind.notes else 0  # a reward is checked twice
    (folder / "noted").unlink(missing_ok=True)
    output, num_kills, num_again, lost = folder / kind.output, 0, 0, 0
    noted: Counter[str] = Counter()
    while True:
        process = started(folder, kind, output.name)
        if num_kills < kills:
            time.sleep(draw.uniform(0.1, wall_s))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                num_kills += 1
                if not is_there(output):
                    continue
        code = process.wait()
        assert code in (0, -signal.SIGKILL), (name, (folder / "log").read_text()[-2000:])
        if kind.notes:
            noted = Counter((folder / "noted").read_text().split())
            lost += NUM_ROWS - len(noted)
            num_again += sum(noted.values()) - judged
            (folder / "noted").unlink()
        equal = content(output, kind.compared) == expected
        left = [path.name for path in folder.glob(f".{output.name}.*")]
        if num_kills >= kills or not equal:
            break
        remove(output)  # complete before it was killed so often
    items = f"{lost:>6} {num_again / max(num_kills, 1):>10.1f}" if kind.notes else " " * 17
    return (f"{name:<10} {num_kills:>5} {'equal' if equal else 'DIFFERS':>8} "
            f"{', '.join(left) or 'nothing':>9} {items} {wall_s:>10.1f} s")


def main() -> int:
    """Kill all kinds, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
          f"seed {args.seed}, {NUM_ROWS:,} rows")
    print(f"{'kind':<10} {'kills':>5} {'files':>8} {'left':>9} {'lost':>6} {'again/kill':>10} undisturbed")
    draw, code = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="sov-job-kills-") as name:
        prepare(Path(name))
        for kind in args.kinds:
            line = killed(Path(name), kind, KINDS[kind], args.kills, draw)
            print(line, flush=True)
            code |= "DIFFERS" in line
    return code


if __name__ == "__main__":
    sys.exit(main())
