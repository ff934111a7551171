"""From an empty environment to the first LoRA step on a real model: seconds of each part, and the typed
commands.

Usage: python benchmarks/first_lora.py --work DIR > benchmarks/results/first_lora.txt

The model is the SmolLM2-135M-Instruct folder of `real_model.py`, the data a JSONL of 500 chats. A new
environment gets this checkout by pip, with pip's own settings and cache. Then one command is typed, and the
times of its lines are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import venv
from pathlib import Path

import torch
from real_model import CITIES, PACKAGE, Workspace, make_folder

ROOT = Path(__file__).parents[1]
NUM_CHATS = 500
COMMAND = "megatron-sov sft --from my-model --data chats.jsonl --run runs/lora --set lora.rank=16"
PARTS = {"packing --data": "command checked, model's headers read", "wrote runs/lora/tokenizer":
         "tokenizer imported", "wrote runs/lora/data/chats": "chats packed", "defaults:": "weights converted",
         "my-model: step 1/": "first step"}
"""Beginning of a printed line -> the part that ends with the line."""
ERRORS = ("error:", "Traceback", "usage:")


def write_chats(file: Path) -> None:
    countries = list(CITIES)
    rows = [{"messages": [
        {"role": "user", "content": f"Question {i}: what is the capital of {countries[i % len(countries)]}?"},
        {"role": "assistant", "content": f"It is {CITIES[countries[i % len(countries)]]}."}]}
        for i in range(NUM_CHATS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def install(environment: Path) -> float:
    """Create a virtual environment with this checkout, and return the seconds of pip."""
    venv.create(environment, with_pip=True)
    began = time.monotonic()
    subprocess.run([environment / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt",
                    ROOT], check=True)
    return time.monotonic() - began


def type_command(environment: Path, work: Path) -> list[tuple[float, str]]:
    """Run the command until its first step; return (seconds since its start, line) for each printed line."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    began, lines = time.monotonic(), []
    with subprocess.Popen(shlex.split(COMMAND), cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, env={**variables, "PATH": path, "PYTHONUNBUFFERED": "1"},
                          executable=environment / "bin/megatron-sov") as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - began, line.rstrip()))
            if ": step 1/" in line:
                process.terminate()  # the run saves a checkpoint and ends
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--environment", type=Path, help="an installed environment to use")
    args = parser.parse_args()
    work = args.work.absolute()
    workspace = Workspace(work)
    parameters = make_folder(workspace)[0]
    write_chats(work / "chats.jsonl")
    environment = (args.environment or work / "environment").absolute()
    seconds = None if args.environment else install(environment)
    lines = type_command(environment, work)
    print(f"SmolLM2-135M-Instruct ({parameters}), {PACKAGE}, torch {torch.__version__}, {os.cpu_count()} "
          f"cores, {time.strftime('%Y-%m-%d')}")
    print(f"pip install of the checkout and its dependencies into an empty environment: "
          f"{'not measured' if seconds is None else f'{seconds:.0f} s'}")
    print(f"typed: {COMMAND}")
    previous_s = 0.0
    for beginning, part in PARTS.items():
        end_s = next((end_s for end_s, line in lines if line.startswith(beginning)), None)
        if end_s is None:
            print(f"     {part}: not reached")
            continue
        print(f"     {part}: {end_s - previous_s:.1f} s, at {end_s:.1f} s")
        previous_s = end_s
    wrong = [line for _, line in lines if line.startswith(ERRORS)]
    print(f"     {lines[-1][1]}" if wrong else f"     {next(line for _, line in lines if 'step 1/' in line)}")
    print(f"commands typed: 1, wrong turns: {len(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
