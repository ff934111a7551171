"""Results of every command with SmolLM2-135M-Instruct, compared with an independent program.

Usage: outside/bin/python benchmarks/real/compare_commands.py --work DIR [--only STEP ...]

`model_folder.py` creates the environment outside/. The output is benchmarks/results/real_model.txt. All
references run in float32 on a CPU: transformers for logits, text, losses and steps of AdamW, PEFT for
adapters, lm-eval for scores. Steps whose output exists in DIR are not repeated.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import text_commands
import torch
import training_commands
from model_folder import PACKAGE, create_model_folder
from session import Outcome, Session

from megatron_sov.base.errors import UserError

STEPS: dict[str, Callable[[Session], Outcome]] = {
    "import": text_commands.import_folder, "verify": text_commands.verify_export,
    "generate": text_commands.compare_greedy_texts, "chat": text_commands.chat_once,
    "serve": text_commands.serve_openai,
    "eval lm": text_commands.score_capitals, "eval ppl": text_commands.measure_perplexity,
    "sft": training_commands.fine_tune, "lora": training_commands.train_adapter,
    "dpo": training_commands.train_on_pairs, "rl": training_commands.reinforce,
    "opd": training_commands.distill_on_policy}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the model and the runs")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="steps to run")
    args = parser.parse_args()
    session = Session(args.work.resolve())
    create_model_folder(session.model)
    print(f"SmolLM2-135M-Instruct, {PACKAGE}, torch {torch.__version__}, {os.cpu_count()} cores, "
          f"{time.strftime('%Y-%m-%d')}")
    failed = 0
    for name in args.only:
        begin_s = time.monotonic()
        try:
            ours, reference, agrees = STEPS[name](session)
        except (RuntimeError, UserError) as e:  # a command of ours failed, or its server did not start
            ours, reference, agrees = str(e), "-", False
        failed += not agrees
        print(f"{'ok  ' if agrees else 'FAIL'} {name}, {time.monotonic() - begin_s:.0f} s\n"
              f"     ours: {ours}\n     reference: {reference}", flush=True)
    print(f"{len(args.only) - failed} of {len(args.only)} steps agree with their reference")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
