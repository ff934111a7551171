# What: a sweep over learning rates as Slurm jobs; each run has a folder, and interrupted jobs resume.
# Run:  python examples/slurm_sweep.py --dry-run
# See:  three job scripts; without --dry-run three jobs, which `megatron-sov status runs` compares.

import json
import subprocess
import sys
from pathlib import Path

RATES = (1e-3, 2e-3, 4e-3)
VOCAB_SIZE = json.loads(Path("tokens/manifest.json").read_text())["content"]["vocab_size"]


def build_command(rate):
    return [sys.executable, "-m", "megatron_sov", "submit", "pretrain", "--cluster", "one-node",
            "--account", "mine", *sys.argv[1:], "tiny-qwen3", "--data", "tokens", "--run", f"runs/lr-{rate:g}",
            "--set", f"optim.lr={rate:g}", "--set", "optim.min_lr=1e-4", "--set", "train.micro_batch_size=2",
            "--set", f"model.vocab_size={VOCAB_SIZE}", "--set", "train.steps=200"]


for rate in RATES:
    print(f"== learning rate {rate:g}", flush=True)
    subprocess.run(build_command(rate), check=True)
