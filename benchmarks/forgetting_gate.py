"""A `sft` that forgets what its start could do ends with exit code 3 by `--gate`; one that does not, with 0.

    python benchmarks/forgetting_gate.py [--steps 60] [--items 120] [--nproc 1]

A tiny model learns the paragraphs of a module of Python's library, and is asked which it would rather write,
byte for byte: a line of them, or a sum in words.  Two runs of `sft` on chats of sums start from it, with the
same gate: one at a learning rate that overwrites the model, one at a rate that leaves it nearly as it was.
Everything is done by commands, as a user gives them; the exit codes, the verdicts of both gates, and whether
the folders are complete are printed.  The scores of the gate are held against a second evaluation of the last
checkpoint.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import make_data

from megatron_sov.base.errors import ExitCode
from megatron_sov.bench.lm.results import read_results
from megatron_sov.runs.folder import COMPLETION
from megatron_sov.runs.obs.events import EVENTS, read_events

MODEL = ("model.vocab_size=368", "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=16", "model.expert_ffn_dim=32", "model.num_experts=4")
TRAINING = ('data.phases=[{"name": "main", "seq_len": 128}]', "train.global_batch_size=8",
            "train.micro_batch_size=4", "train.eval_every_steps=0", "data.max_epochs=0",
            "optim.warmup_steps=2", "train.num_threads=1", "train.precision=fp32")
TASK = """task: library
dataset_path: json
dataset_kwargs: {data_files: {test: lines.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: choices
doc_to_target: right
target_delimiter: ""
metric_list:
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LEARNS, FORGETS, KEEPS = 3e-3, 1e-2, 1e-7
"""Learning rates: of the start, and of the two that go on."""
SFT_STEPS, CHATS, TOLERANCE, MIN_WORDS = 30, 80, 0.05, 5


def main() -> int:
    """Train, and judge both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of the start (default %(default)s)")
    parser.add_argument("--items", type=int, default=120, help="of the task (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a model (default %(default)s)")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work (load "
          f"{os.getloadavg()[0]:.1f} at the start); {args.steps} steps, {args.items} items, {args.nproc} "
          "processes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text, chats, tasks = make_data(work), make_chats(work), make_task(work, args.items)
        base = [*MODEL, *TRAINING, f"train.steps={args.steps}", f"optim.lr={LEARNS}"]
        code = command("pretrain", text, work / "base", base, args.nproc)
        assert code == ExitCode.OK, code
        held = [judged(work, chats, tasks, name, rate, expected, args.nproc) for name, rate, expected in (
            ("forgets", FORGETS, ExitCode.GATE_FAILED), ("keeps", KEEPS, ExitCode.OK))]
    print("both ended as they should" if all(held) else "NOT SO")
    return 0 if all(held) else 1


def judged(work: Path, chats: Path, tasks: Path, name: str, rate: float, expected: int, nproc: int) -> bool:
    """Fine-tune with the gate; prints what came of it, and returns whether it is as it should be."""
    run = work / name
    settings = [*TRAINING, f"train.steps={SFT_STEPS}", f"optim.lr={rate}", f"optim.min_lr={rate / 10}"]
    code = command("sft", chats, run, settings, nproc, "--from", str(work / "base"), "--gate", "library",
                   "--tolerance", str(TOLERANCE), "--gate-with", f"--task-dir {tasks}")
    (verdict,) = [e for e in read_events(run / EVENTS) if e["event"] == "forgetting_gate"]
    again = work / f"{name}.json"
    measured = subprocess.run([sys.executable, "-m", "megatron_sov", "eval", "lm", str(run), "--tasks",
                               "library", "--task-dir", str(tasks), "--output", str(again)],
                              capture_output=True, check=False)
    assert measured.returncode == 0, measured.stderr.decode()[-2000:]
    value, told = read_results(again).tasks["library"].metrics[0].value, verdict["tasks"][0]
    is_complete = (run / COMPLETION).is_file()
    print(f"learning rate {rate:g}: exit code {code} (expected {int(expected)}), "
          f"{'complete' if is_complete else 'not complete'}; {told['before']:.4f} to {told['after']:.4f}, "
          f"90 % interval of the difference {told['interval'][0]:+.4f} to {told['interval'][1]:+.4f}, "
          f"tolerance {TOLERANCE}: {told['verdict']}; evaluated again: {value:.4f}", flush=True)
    return code == expected and is_complete == (expected == ExitCode.OK) and value == told["after"]


def command(name: str, data: Path, run: Path, settings: list[str], nproc: int, *more: str) -> int:
    """Give a training command; returns its exit code."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_sov", name, "tiny-solar-open", "--data", str(data),
         "--run", str(run), "--nproc", str(nproc), *more, *(word for s in settings for word in ("--set", s))],
        capture_output=True, text=True, check=False)
    if done.returncode not in (ExitCode.OK, ExitCode.GATE_FAILED):
        print(done.stderr[-2000:], file=sys.stderr)
    elif done.returncode == ExitCode.GATE_FAILED:
        print(done.stderr.strip().splitlines()[-2], flush=True)
    return done.returncode


def make_chats(work: Path) -> Path:
    """Pack conversations about sums."""
    lines = [{"messages": [{"role": "user", "content": f"What is {i} plus {i % 7}?"},
                           {"role": "assistant", "content": f"{i} plus {i % 7} is {i + i % 7}."}]}
             for i in range(CHATS)]
    (work / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    subprocess.run([sys.executable, "-m", "data_prep.cli", "pack", "--tokenizer", "tokenizer", "--format",
                    "chat", "--heldout", "0.1", "--workers", "1", "--input", "chats.jsonl", "--output",
                    "chats"], cwd=work, check=True, capture_output=True)
    return work / "chats"


def make_task(work: Path, items: int) -> Path:
    """Write the task: a line of what the start learns, and a sum that no chat has."""
    (folder := work / "tasks").mkdir()
    drawn, rows = random.Random(0), []
    for line in dict.fromkeys(line.strip() for line in inspect.getsource(argparse).splitlines()):
        if len(line.split()) < MIN_WORDS or len(rows) == items:
            continue
        right, number = drawn.randrange(2), CHATS + len(rows)
        choices = [f"{number} plus {number % 7} is {number + number % 7}."] * 2
        choices[right] = line
        rows.append({"choices": choices, "right": right})
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "library.yaml").write_text(TASK)
    return folder


if __name__ == "__main__":
    sys.exit(main())
