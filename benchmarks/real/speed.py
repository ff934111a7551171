"""Processor seconds and peak memory with a real model, compared with TRL, PEFT, transformers and lm-eval.

Usage: python benchmarks/real/speed.py --work DIR --outside ENVIRONMENT [--only NAME ...]

DIR is the folder of `compare_commands.py`, ENVIRONMENT that of `model_folder.py`, the output
benchmarks/results/real_speed.txt. Both sides run the same rows in float32 on one thread, one process after
the other. Training counts the fastest step after the first, because other programs on the machine only slow
a step; generation counts seconds per token of the responses; evaluation counts the whole command. The seconds
of our decoder's matrix products alone are a lower bound. Memory is the peak of the process; in training the
peak before the last step, because only our command then writes a checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_folder import PACKAGE
from session import QUESTIONS, Session, format_settings
from text_commands import write_capitals
from training_commands import CHATS, PAIRS, PLAIN_SETTINGS, pack
from word_task import WordPrompts

HERE = Path(__file__).parent
NUM_STEPS, NEW_TOKENS = 4, 32
NUM_CHATS = 9
"""Chats that fill a row of 512 tokens, as packing fills the rows of a larger file."""
ROUND_PROMPTS, ROUND_SAMPLES, ROUND_TOKENS = 4, 8, 12


@dataclass(frozen=True)
class Measurement:
    """Cost of one side of a comparison."""

    seconds: float
    """Processor seconds per unit."""
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Our cost and the cost of the peer."""

    unit: str
    peer: str
    ours: Measurement
    theirs: Measurement
    goal: str
    products_s: float | None = None
    """Processor seconds per unit of our matrix products alone."""


class Bench:
    """Runs measured processes in the folder of a session."""

    def __init__(self, session: Session, outside: Path) -> None:
        self.session, self.python = session, outside / "bin/python"
        self.folder = session.folder / "speed"
        self.folder.mkdir(exist_ok=True)

    def run(self, name: str, *words: str | Path) -> Measurement:
        """Run a process to its end; return its processor seconds with its children's, and its peak memory."""
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen([str(word) for word in words], cwd=self.session.folder, stdout=log,
                                       stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{self.folder / name}.log: exit status {status}")
        return Measurement(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)

    def time_ours(self, name: str, *words: str) -> dict[str, Any]:
        """Run one of our commands; return the times of `timed_command.py`."""
        times = self.folder / f"{name}.json"
        self.run(name, sys.executable, "-W", "ignore", HERE / "timed_command.py", times, *words)
        return dict(json.loads(times.read_text()))

    def time_trl(self, name: str, kind: str, rows: str, *words: str) -> Measurement:
        """Run a trainer of TRL; return its fastest step after the first, and its peak memory."""
        run = self.folder / f"{name}.trl"
        peak_bytes = self.run(f"{name}.trl", self.python, "-W", "ignore", HERE / "outside_trl.py", kind,
                              "--model", self.session.model, "--input", self.session.folder / rows, "--run",
                              run, "--steps", str(NUM_STEPS), *words).peak_bytes
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        return Measurement(min(event["processor_s"] for event in events[1:]), peak_bytes)


def format_train_settings(*settings: str) -> list[str]:
    """Return the `--set` words of a short run without evaluations."""
    return format_settings(*PLAIN_SETTINGS, "train.eval_every_steps=0", "train.num_threads=1", *settings)


def compare_training(bench: Bench, kind: str, goal: str, data: str, command: str, lr: str,
                     *settings: str) -> Comparison:
    ours = bench.time_ours(
        kind, command, "--from", "ck", "--data", data, "--run", f"speed/{kind}-{time.time_ns()}",
        *format_train_settings(f"train.steps={NUM_STEPS}", f"optim.lr={lr}", *settings))
    batch = len(bench.session.read_rows(f"{data}.jsonl"))
    theirs = bench.time_trl(kind, kind, f"{data}.jsonl", "--batch", str(batch), "--lr", lr)
    peer = "TRL and PEFT" if kind == "lora" else "TRL"
    return Comparison(f"a step of {batch} rows", peer,
                      Measurement(min(ours["steps"][1:]), ours["peak_bytes"]), theirs, goal)


def compare_sft(bench: Bench) -> Comparison:
    pack(bench.session, "filled", "chat", (2 * CHATS)[:NUM_CHATS])
    return compare_training(bench, "sft", "0.9", "filled", "sft", "2e-5", "data.phases.0.seq_len=512",
                            "train.global_batch_size=1")


def compare_lora(bench: Bench) -> Comparison:
    pack(bench.session, "filled", "chat", (2 * CHATS)[:NUM_CHATS])
    return compare_training(bench, "lora", "0.75, memory 0.45", "filled", "sft", "2e-4",
                            "data.phases.0.seq_len=512", "train.global_batch_size=1", "lora.rank=16")


def compare_dpo(bench: Bench) -> Comparison:
    pack(bench.session, "pairs", "preference", PAIRS)
    return compare_training(bench, "dpo", "memory 1.0", "pairs", "prefer", "5e-6", "data.phases.0.seq_len=96",
                            f"train.global_batch_size={len(PAIRS)}", f"train.micro_batch_size={len(PAIRS)}")


def compare_round(bench: Bench) -> Comparison:
    bench.session.write_rows("words.jsonl", WordPrompts(1, ROUND_PROMPTS * NUM_STEPS).do({}))
    store = f"speed/round-{time.time_ns()}"
    ours = bench.time_ours(
        "round", "rl", "run", "--from", "ck", "--prompts", "words.jsonl", "--reward",
        f"{HERE / 'word_task.py'}:ListedWord", "--workers", "1", "--store", f"{store}.store", "--run", store,
        *format_train_settings(
            "policy.method=grpo", f"rollout.rounds={NUM_STEPS}", "rollout.max_prompt_tokens=64",
            f"rollout.prompts_per_round={ROUND_PROMPTS}", f"rollout.max_new_tokens={ROUND_TOKENS}",
            f"rollout.piece_prompts={ROUND_PROMPTS}", f"rollout.samples_per_prompt={ROUND_SAMPLES}",
            f"train.global_batch_size={ROUND_PROMPTS * ROUND_SAMPLES}", "optim.lr=2e-5"))
    theirs = bench.time_trl("round", "grpo", "words.jsonl", "--batch", str(ROUND_PROMPTS), "--samples",
                            str(ROUND_SAMPLES), "--max-new-tokens", str(ROUND_TOKENS))
    unit = f"a round of {ROUND_PROMPTS} prompts x {ROUND_SAMPLES} responses of {ROUND_TOKENS} tokens"
    return Comparison(unit, "TRL's GRPOTrainer", Measurement(min(ours["steps"][1:]), ours["peak_bytes"]),
                      theirs, "0.33")


GENERATE = f"""
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
chats = [[{{"role": "user", "content": json.loads(line)["prompt"]}}] for line in open(prompts)]
texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
end, tokens, begin_s = tokenizer.convert_tokens_to_ids("<|im_end|>"), 0, time.process_time()
for first in range(0, len(texts), batch):
    rows = tokenizer(texts[first:first + batch], return_tensors="pt", padding=True)
    out = model.generate(**rows, max_new_tokens={NEW_TOKENS}, do_sample=False, pad_token_id=0,
                         eos_token_id=end)
    for row in out[:, rows["input_ids"].shape[1]:].tolist():
        tokens += row.index(end) + 1 if end in row else len(row)
print(json.dumps([time.process_time() - begin_s, tokens]))
"""


def compare_generation(batch: int, goal: str) -> Callable[[Bench], Comparison]:
    def compare(bench: Bench) -> Comparison:
        questions = [f"{question} Answer in a long sentence." for question in QUESTIONS]
        rows = [{"prompt": question} for question in (questions * 2)[:16]][:max(batch, 4)]
        prompts, name = bench.session.write_rows(f"speed_{batch}.jsonl", rows), f"generate-{batch}"
        out = f"speed/{name}.jsonl"
        (bench.session.folder / out).unlink(missing_ok=True)
        ours = bench.time_ours(
            name, "generate", "ck", "--chat", "--prompts", prompts, "--max-new-tokens",
            str(NEW_TOKENS), "--batch-size", str(batch), "--output", out)
        num_tokens = sum(row["num_tokens"] for row in bench.session.read_rows(out))
        theirs = bench.run(f"{name}.transformers", bench.python, "-W", "ignore", "-c", GENERATE,
                           bench.session.model, prompts, str(batch))
        seconds, their_tokens = json.loads(
            (bench.folder / f"{name}.transformers.log").read_text().splitlines()[-1])
        return Comparison(f"a token, {len(rows)} prompts at batch {batch} ({num_tokens} and {their_tokens} "
                          "tokens)", "transformers",
                          Measurement(sum(ours["generations"]) / num_tokens, ours["peak_bytes"]),
                          Measurement(seconds / their_tokens, theirs.peak_bytes), goal,
                          ours["products"] / num_tokens)

    return compare


def compare_evaluation(bench: Bench) -> Comparison:
    num_items = write_capitals(bench.session)
    (bench.session.folder / "speed/scores.json").unlink(missing_ok=True)
    # answers of an earlier run would be read from its cache
    shutil.rmtree(bench.session.folder / "speed/scores.cache", ignore_errors=True)
    ours = bench.run("eval", sys.executable, "-m", "megatron_sov", "eval", "lm", "ck", "--tasks", "capitals",
                     "--task-dir", "tasks", "--output", "speed/scores.json")
    theirs = bench.run("eval.lm-eval", "sh", "-c", (
        f"cd tasks && {bench.python} -W ignore -m lm_eval --model hf --model_args "
        f"pretrained={bench.session.model},dtype=float32 --tasks capitals --include_path . --batch_size 1 "
        "--device cpu"))
    return Comparison(f"the whole command, {num_items} items of 4 choices", "lm-eval", ours, theirs, "0.4")


COMPARISONS: dict[str, Callable[[Bench], Comparison]] = {
    "sft": compare_sft, "lora": compare_lora, "dpo": compare_dpo, "round": compare_round,
    "generate-1": compare_generation(1, "-"), "generate-16": compare_generation(16, "0.5"),
    "eval": compare_evaluation}


def format_comparison(name: str, comparison: Comparison) -> str:
    ours, theirs = comparison.ours, comparison.theirs
    line = (f"{name}: {comparison.unit}: ours {ours.seconds:.4f} s, {ours.peak_bytes / 1e9:.2f} GB; "
            f"{comparison.peer} {theirs.seconds:.4f} s, {theirs.peak_bytes / 1e9:.2f} GB; ratio "
            f"{ours.seconds / theirs.seconds:.2f}, memory {ours.peak_bytes / theirs.peak_bytes:.2f} "
            f"(goal {comparison.goal})")
    if comparison.products_s is not None:
        line += (f"; our matrix products alone {comparison.products_s:.4f} s, ratio "
                 f"{comparison.products_s / theirs.seconds:.2f}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of compare_commands.py")
    parser.add_argument("--outside", type=Path, required=True, help="environment of model_folder.py")
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    args = parser.parse_args()
    bench = Bench(Session(args.work.resolve()), args.outside.absolute())
    print(f"SmolLM2-135M-Instruct, {PACKAGE}, float32, one thread, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.0f}, {time.strftime('%Y-%m-%d')}; processor seconds and peak memory")
    for name in args.only:
        print(format_comparison(name, COMPARISONS[name](bench)), flush=True)


if __name__ == "__main__":
    main()
