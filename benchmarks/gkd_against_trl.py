"""On-policy distillation beside TRL's GKDTrainer: how near a student comes to its teacher in as many steps.

Usage: python benchmarks/gkd_against_trl.py --work FOLDER --trl SITE [--seeds 0 1 2] [--steps 120]
       python benchmarks/gkd_against_trl.py --work FOLDER --print

SITE is a folder with trl, accelerate and datasets (`pip install --target SITE trl`), which are no dependency
of ours.  The task, models and measure are those of distillation_learning.py, with half of its teacher's
conversations and 400 steps of the teacher and the start in the place of 600.

Both go on from the same student over the same 200 conversations, with the protocol of Typhoon-S's authors: a
draw with probability 0.25 at each step decides whether the student answers eight of the prompts itself;
forward KL over the whole vocabulary, one AdamW (no weight decay) and one cosine from 2e-3 to 0 over the run,
5 % of warm-up, answers of at most 12 tokens at temperature 1.

  TRL   `GKDTrainer`: eight conversations a step, whether their answers are kept or written
  ours  `megatron-sov distill rounds`: eight prompts a round that is written; else two packed rows of 128
        tokens, of four to five conversations each

Printed are, over the seeds with 95 % intervals (Student's t), KL(teacher || student) in nats per token of the
answers to questions in wordings that it has not been asked.  Complete runs stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from distillation_learning import ASKED, LEARNED, RATE, STUDENT, TEACHER, Work, conversations, kl, words_of
from seeds import over_seeds

PRETRAINING, SHARE, NEW_TOKENS, SIZE = 400, 0.25, 12, 8
OURS = ("optim.schedule=cosine", "optim.min_lr=0", "optim.beta2=0.999", "rollout.prompts_per_round=8",
        "rollout.piece_prompts=8", "rollout.max_prompt_tokens=64", "train.global_batch_size=2",
        "train.micro_batch_size=2")
TRL_SCRIPT = '''
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

student, teacher, data, out, seed, steps, share, length, size, rate, warmup, ends = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
ends = json.loads(ends)
if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (student, teacher)]
models[0].generation_config.eos_token_id = ends
rows = [json.loads(line) for line in open(data)]
trainer = GKDTrainer(
    model=models[0], teacher_model=models[1], processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows),
    args=GKDConfig(output_dir=out + ".trl", use_cpu=True, max_steps=int(steps), lmbda=float(share), beta=0.0,
                   temperature=1.0, max_new_tokens=int(length), max_length=128, learning_rate=float(rate),
                   lr_scheduler_type="cosine", warmup_steps=int(warmup), weight_decay=0.0,
                   per_device_train_batch_size=int(size), gradient_accumulation_steps=1, seed=int(seed),
                   report_to=[], save_strategy="no", logging_strategy="no", bf16=False,
                   gradient_checkpointing=False, dataloader_num_workers=0))
trainer.train()
trainer.model.save_pretrained(out)
tokenizer.save_pretrained(out)
'''


def measure(work: Work, seeds: list[int], steps: int, site: Path) -> None:
    """Run all seeds."""
    plenty = work.data("plenty", conversations(1, 6_000, LEARNED + ASKED))
    asked = work.data("asked", conversations(2, 400, ASKED), heldout=0.5)
    even = work.data("even", conversations(3, 4_000, LEARNED + ASKED, even=True))
    rate = (f"train.steps={PRETRAINING}", "optim.lr=4e-3")
    work.train("teacher", "pretrain", plenty, *TEACHER, *rate)
    for seed in seeds:
        own, start = f"train.seed={seed}", f"start-{seed}"
        work.train(start, "pretrain", even, *STUDENT, own, *rate)
        text = conversations(100 + seed, 200, LEARNED)
        few, prompts = work.data(f"few-{seed}", text), work.folder / f"asks-{seed}.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": json.loads(line)["messages"][0]["content"]}) + "\n"
                                   for line in text.splitlines()))
        work.command("megatron_sov", "distill", "rounds", "tiny-qwen3", "--from", work.folder / start,
                     "--teacher", work.folder / "teacher", "--prompts", prompts, "--data", few, "--share",
                     str(SHARE), "--rounds", str(steps), "--output", work.folder / f"ours-{seed}",
                     "--max-new-tokens", str(NEW_TOKENS), "--seed", str(seed),
                     *words_of((own, RATE, *OURS, f"optim.warmup_steps={round(0.05 * steps)}")))
        trl(work, seed, steps, site)
        for name, model in ((start, start), (f"ours-{seed}", f"ours-{seed}/run"),
                            (f"trl-{seed}", f"trl-{seed}.hf")):
            work.train(f"asked-{name}", "distill", asked, own, RATE, "train.steps=1", start=model,
                       states="states-asked")


def trl(work: Work, seed: int, steps: int, site: Path) -> None:
    """Have TRL train a seed."""
    from megatron_sov.chat.folder import read_chat_encoder

    exported = {name: work.folder / f"{name}.hf" for name in (f"start-{seed}", "teacher")}
    for name, folder in exported.items():
        if not (folder / "config.json").exists():
            work.command("megatron_sov", "convert", "to-hf", work.folder / name, folder)
    out, chat = work.folder / f"trl-{seed}.hf", read_chat_encoder(work.folder / "tokenizer")
    assert chat is not None, "the tokenizer has no chat template"
    if not (out / "tokenizer.json").exists():
        with open(work.folder / "log", "a") as log:
            subprocess.run([sys.executable, "-W", "ignore", "-c", TRL_SCRIPT, *map(str, (
                *exported.values(), work.folder / f"few-{seed}.jsonl", out, seed, steps, SHARE, NEW_TOKENS,
                SIZE, RATE.partition("=")[2], round(0.05 * steps), json.dumps(sorted(chat.end_ids()))))],
                stdout=log, stderr=subprocess.STDOUT, check=True, cwd=work.folder,
                env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"})


def report(folder: Path) -> None:
    """Print what there is."""
    seeds = sorted(int(p.parent.name.rpartition("-")[2]) for p in folder.glob("asked-trl-*/complete.json"))
    if not seeds:
        raise SystemExit(f"{folder}: no seed is done yet")
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, load "
          f"{os.getloadavg()[0]:.0f}, Python {platform.python_version()}; KL(teacher || student), nats per "
          f"token of held-out answers; seeds {', '.join(map(str, seeds))}\n")
    found = {name: [kl(folder / f"asked-{name}-{seed}") for seed in seeds]
             for name in ("start", "trl", "ours")}
    found["ours - trl"] = [a - b for a, b in zip(found["ours"], found["trl"], strict=True)]
    for name, values in found.items():
        print(f"  {name:<12} {over_seeds(values, '.4f'):>17}   ({', '.join(f'{v:.4f}' for v in values)})")


def main() -> None:
    """Run, or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trl", type=Path, help="a folder with trl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--print", action="store_true", help="only print what there is")
    args = parser.parse_args()
    if not args.print:
        measure(Work(args.work), args.seeds, args.steps, args.trl.absolute())
    report(args.work)


if __name__ == "__main__":
    main()
