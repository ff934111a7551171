"""Train with TRL on the data of our commands, as a peer in claims and speed comparisons.

Usage: outside/bin/python benchmarks/real/outside_trl.py KIND --model FOLDER --input ROWS.jsonl --run RUN

KIND is sft, lora, dpo or grpo. Training uses one thread, float32, AdamW without weight decay, a constant
learning rate, and gradients clipped to norm 1. RUN/events.jsonl gets an event `round` for each step with its
loss, mean reward, processor seconds and peak memory; `--save` writes the model to RUN/hf.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from word_task import is_listed

COMMON: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "bf16": False,
    "gradient_checkpointing": False, "lr_scheduler_type": "constant", "weight_decay": 0.0,
    "adam_beta2": 0.999, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1, "disable_tqdm": True}
DPO_BETA, LORA_RANK, LORA_ALPHA = 0.1, 16, 32


class StepRecorder(TrainerCallback):
    """Writes an event for each step."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.begin_s = open(file, "w", encoding="utf-8"), 0.0  # noqa: SIM115

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin_s = time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        event = {"event": "round", "step": state.global_step, "loss": logs["loss"],
                 "means": {"reward": logs.get("reward")}, "processor_s": time.process_time() - self.begin_s,
                 "peak_bytes": peak_bytes}
        print(json.dumps(event), file=self.file, flush=True)


def reward_listed(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Return the rewards of a batch, as `word_task.py:ListedWord` gives them."""
    return [float(is_listed(completion[0]["content"], words))
            for completion, words in zip(completions, answer, strict=True)]


def build_trainer(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    """Return the trainer of a kind; every step has `args.batch` rows or prompts."""
    common = {**COMMON, "output_dir": str(args.run / "trl"), "max_steps": args.steps,
              "learning_rate": args.lr, "seed": args.seed}
    shared = {"model": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
              "processing_class": AutoTokenizer.from_pretrained(args.model),
              "callbacks": [StepRecorder(args.run / "events.jsonl")]}
    if args.kind == "grpo":
        data = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
                for row in rows]
        config = GRPOConfig(**common, per_device_train_batch_size=args.batch * args.samples, beta=0.0,
                            num_generations=args.samples, max_completion_length=args.max_new_tokens,
                            temperature=1.0, loss_type="grpo", shuffle_dataset=False)
        return GRPOTrainer(**shared, args=config, train_dataset=Dataset.from_list(data),
                           reward_funcs=reward_listed)
    if args.kind == "dpo":
        data = [{"prompt": [{"role": "user", "content": row["prompt"]}],
                 **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
                for row in rows]
        return DPOTrainer(**shared, args=DPOConfig(**common, beta=DPO_BETA, max_length=None,
                                                   per_device_train_batch_size=args.batch),
                          train_dataset=Dataset.from_list(data))
    data = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    adapter = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear",
                         task_type="CAUSAL_LM")
    config = SFTConfig(**common, per_device_train_batch_size=args.batch, max_length=None)
    return SFTTrainer(**shared, args=config, train_dataset=Dataset.from_list(data),
                      peft_config=adapter if args.kind == "lora" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sft", "lora", "dpo", "grpo"))
    for name in ("--model", "--input", "--run"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="rows or prompts of a step")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.input.read_text(encoding="utf-8").splitlines()]
    trainer = build_trainer(args, rows)
    trainer.train()
    if args.save:
        trainer.save_model(str(args.run / "hf"))
        trainer.processing_class.save_pretrained(args.run / "hf")


if __name__ == "__main__":
    main()
