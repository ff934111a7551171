"""Start-up cost of commands: CPU seconds to print help, to refuse an unknown option, and to refuse settings.

    python benchmarks/start_up.py [--repetitions 5] > benchmarks/results/start_up.txt

The minimum over the repetitions counts, because other load on the machine only adds time; bytecode is cached.
"torch" at the end of a line: the command has imported torch.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from measurement import describe_machine, read_child_cpu_s

from data_prep.cli import COMMANDS as DATA_COMMANDS
from megatron_sov.cli import COMMANDS
from tokenizer.cli import COMMANDS as TOKENIZER_COMMANDS

ROOT = Path(__file__).parents[1]
UNKNOWN = "--no-such-option"
TRAINING = ["tiny-solar-open", "--data", "none", "--run", "run"]
REFUSED = {
    "megatron-sov": [["pretrain", *TRAINING, "--set", "optim.lr=fast"],
                     ["pretrain", *TRAINING, "--nproc", "0"], ["sft", *TRAINING, "--from", "none"],
                     ["rl", "run", "tiny-solar-open"],
                     ["eval", "lm", "none", "--tasks", "a", "--output", "x.json", "--samples", "0"],
                     ["plan", "solar-open-102b", "--cluster", "none"], ["recipes", "solar"]],
    "sov-data": [["pack", "--tokenizer", "none", "--input", "none", "--output", "x", "--heldout", "2"],
                 ["mix", "none", "--output", "x"], ["run", "none.yaml"]],
    "sov-tokenizer": [["train", "--preset", "solar", "--input", "none", "--output", "x"]]}
"""Program -> commands with known options and invalid values."""
PROGRAM = """
import sys
from {module} import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
sys.exit(100 if "torch" in sys.modules else code)
"""
PROGRAMS = {"megatron-sov": ("megatron_sov.cli", COMMANDS), "sov-data": ("data_prep.cli", DATA_COMMANDS),
            "sov-tokenizer": ("tokenizer.cli", TOKENIZER_COMMANDS)}


def run_command(module: str, words: list[str]) -> tuple[float, int]:
    """Return the processor seconds of a command with its child processes, and its exit code (100: it has
    imported torch)."""
    begin_cpu_s = read_child_cpu_s()
    completed = subprocess.run([sys.executable, "-c", PROGRAM.format(module=module), *words], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    return read_child_cpu_s() - begin_cpu_s, completed.returncode


def main() -> None:
    """Measure all commands, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    print(f"start-up: {describe_machine()}; CPU seconds, the least of {args.repetitions}\n")
    for kind in ("--help", UNKNOWN, "refused"):
        least_s = []
        for program, (module, commands) in PROGRAMS.items():
            command_lines = [[*name.split(), kind] for name in commands]
            if kind == "refused":
                command_lines = REFUSED[program]
            for words in command_lines:
                runs = [run_command(module, words) for _ in range(args.repetitions)]
                least_s.append(min(seconds for seconds, _ in runs))
                has_torch = " torch" if runs[-1][1] == 100 else ""
                print(f"{' '.join((program, *words))[:59]:60}{least_s[-1]:8.2f}{has_torch}", flush=True)
        print(f"\n{f'median of {kind}':60}{statistics.median(least_s):8.2f}\n"
              f"{f'largest of {kind}':60}{max(least_s):8.2f}\n")


if __name__ == "__main__":
    main()
