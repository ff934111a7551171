"""Time of a GRPO step compared with TRL's GRPOTrainer: the same model, prompts, lengths and number of
responses.

Usage: python benchmarks/rl_against_trl.py --work FOLDER --trl SITE [--steps 12]

FOLDER is that of `learning.py rl/gspo --seeds 1`, whose start and prompts both take; SITE a folder with
trl, accelerate and datasets (`pip install --target SITE trl`), which are no dependency of ours. TRL runs
its own way: transformers' generate. Both write all responses of a step at once, compute it in one
micro-batch, and have no reference (TRL's beta = 0). Each arm runs once in a process of one thread, one after
the other; the first two steps of each are left out. Generation and all the rest are told apart around it, by
the clock and by the seconds that the processor spent in the process, which other programs on the machine
disturb less. Those of our reward's processes are in the clock alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from learning import RECIPES
from seed_runs import run, words

PROMPTS, SAMPLES, NEW_TOKENS = 32, 8, 12
SKIPPED = 2
TRAINER = '''def exact(completions, answer, **_):
    return [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer)]


class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        times["generate"].append([0.0, 0.0])
        self.began = now()

    def on_step_end(self, *args, **kwargs):
        times["step"].append(since(self.began))


count = int(size) * int(samples)
trainer = GRPOTrainer(
    model=folder, reward_funcs=exact, train_dataset=data, callbacks=[Clock()],
    processing_class=AutoTokenizer.from_pretrained(folder),
    args=GRPOConfig(output_dir=out + ".trl", use_cpu=True, max_steps=int(steps), num_generations=int(samples),
                    per_device_train_batch_size=count, gradient_accumulation_steps=1, beta=0.0,
                    max_completion_length=int(length), temperature=1.0, learning_rate=5e-4, report_to=[],
                    loss_type="grpo", save_strategy="no", logging_strategy="no", bf16=False,
                    gradient_checkpointing=False, dataloader_num_workers=0, shuffle_dataset=FalseMORE))
inner = trainer._generate


def timed(*args, **kwargs):
    began = now()
    try:
        return inner(*args, **kwargs)
    finally:
        times["generate"][-1] = [a + b for a, b in zip(times["generate"][-1], since(began))]
'''
"""Of both scripts beside TRL: the trainer as `trainer`, with a clock; `MORE` stands for further settings."""
TRL_SCRIPT = '''
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

folder, prompts, steps, out, size, samples, length = sys.argv[1:]
torch.set_num_threads(1)
rows = [json.loads(line) for line in open(prompts)]
data = Dataset.from_list([{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]}
                          for r in rows])
times = {"generate": [], "step": []}


def now():
    return [time.monotonic(), time.process_time()]


def since(began):
    return [b - a for a, b in zip(began, now())]


''' + TRAINER.replace("MORE", "") + '''

trainer._generate = timed
trainer.train()
json.dump(times, open(out, "w"))
'''
OUR_SCRIPT = '''
import json, sys, time
from megatron_sov import cli
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.train.trainer import Trainer

times = {"generate": [], "step": []}
begins = []


def now():
    return [time.monotonic(), time.process_time()]


def noted(*args, inner=Trainer.fetch_data, **kwargs):
    begins.append(now())
    return inner(*args, **kwargs)


def timed(*args, inner=MegatronEngine.generate, **kwargs):
    began = now()
    try:
        return inner(*args, **kwargs)
    finally:
        times["generate"].append([b - a for a, b in zip(began, now())])


Trainer.fetch_data, MegatronEngine.generate = noted, timed
code = cli.main(sys.argv[2:])
begins.append(now())
times["step"] = [[b - a for a, b in zip(*pair)] for pair in zip(begins, begins[1:])]
json.dump(times, open(sys.argv[1], "w"))
sys.exit(code)
'''
Times = dict[str, list[list[float]]]
"""Of each step, and of generation in each: seconds by the clock, and of the processor."""


@dataclass(frozen=True)
class Setup:
    """Model and prompts of both arms, and the folder of their results."""

    folder: Path
    start: Path
    prompts: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"


def trl(setup: Setup, site: Path, steps: int) -> Times:
    """Return the times of TRL's steps."""
    exported, out = setup.folder / "start.hf", setup.folder / "trl.json"
    if not (exported / "config.json").exists():
        run(setup.log, "megatron_sov", "convert", "to-hf", setup.start, exported)
    if not out.exists():
        with open(setup.log, "a") as log:
            subprocess.run([sys.executable, "-W", "ignore", "-c", TRL_SCRIPT, *map(str, (
                exported, setup.prompts, steps, out, PROMPTS, SAMPLES, NEW_TOKENS))],
                stdout=log, stderr=subprocess.STDOUT, check=True, cwd=setup.folder,
                env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"})
    return dict(json.loads(out.read_text()))


def ours(setup: Setup, steps: int) -> Times:
    """Return the times of our steps, from one to the next."""
    folder, out = setup.folder / "against-trl", setup.folder / "ours.json"
    if not out.exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(setup.folder / "against-trl.store", ignore_errors=True)
        arguments = [
            "rl", "run", "--from", setup.start, "--run", folder,
            "--store", setup.folder / "against-trl.store", "--prompts", setup.prompts,
            "--reward", f"{RECIPES / 'tasks.py'}:Exact", "--workers", "1", "--batch-size", PROMPTS * SAMPLES,
            *words((
                "policy.method=grpo", "policy.kl=none",
                "train.global_batch_size=32", "train.micro_batch_size=32", f"rollout.rounds={steps}",
                f"rollout.prompts_per_round={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}",
                f"rollout.piece_prompts={PROMPTS}", f"rollout.max_new_tokens={NEW_TOKENS}",
                "rollout.max_prompt_tokens=64", "optim.lr=5e-4", "train.num_threads=1",
                'data.phases=[{"name": "main", "seq_len": 512}]', "train.eval_every_steps=0"))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with open(setup.log, "a") as log:  # as torchrun starts it: in this one process
            subprocess.run([sys.executable, "-W", "ignore", "-c", OUR_SCRIPT, str(out), *map(str, arguments)],
                           stdout=log, stderr=subprocess.STDOUT, check=True, env=os.environ | rank)
    return dict(json.loads(out.read_text()))


def main() -> None:
    """Measure both, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trl", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    recipe = args.work / "rl"
    setup = Setup(args.work / "against-trl", recipe / "setup/mixed/run",
                  recipe / "gspo/seed-0/base/prompts/rows.jsonl")
    setup.folder.mkdir(exist_ok=True)
    found = {"TRL": trl(setup, args.trl, args.steps), "ours": ours(setup, args.steps)}
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
          f"{platform.python_version()}; {PROMPTS} prompts x {SAMPLES} responses of at most {NEW_TOKENS} "
          f"tokens, one thread, medians of {args.steps - SKIPPED} steps; ours writes a checkpoint and the "
          "store at each")
    for place, told in enumerate(("by the clock", "of the processor")):
        print(f"seconds {told}")
        medians = {name: median_of(times, place) for name, times in found.items()}
        for name, (step, generate, rest) in medians.items():
            print(f"  {name:<5} step {step:7.3f}   generation {generate:7.3f}   all else {rest:7.3f}")
        whole, _, rest = (a / b for a, b in zip(medians["ours"], medians["TRL"], strict=True))
        print(f"  ours / TRL: step {whole:.2f} (goal 0.8; 0.5 with our engine), outside generation "
              f"{rest:.2f} (goal 0.5)")


def median_of(times: Times, place: int) -> tuple[float, float, float]:
    """Return the medians of whole steps, of generation and of all else.

    Args:
        times: of all steps.
        place: 0: by the clock; 1: of the processor.
    """
    steps, generate = ([one[place] for one in times[kind][SKIPPED:]] for kind in ("step", "generate"))
    return (statistics.median(steps), statistics.median(generate),
            statistics.median(a - b for a, b in zip(steps, generate, strict=False)))


if __name__ == "__main__":
    main()
