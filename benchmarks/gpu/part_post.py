"""Post-training of a tiny model, GPU against CPU: fine-tuning, preferences, distillation, RL rounds,
generation.

In float32, losses and greedy tokens are compared. In bf16, with the layers of Transformer Engine, only losses
are compared. RL rounds only have to complete, because other rounding samples other tokens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from part_losses import COMMON, LIMITS, SMALL, data, training
from setting import Cost, Figures, Setting, fail_on, largest, losses, training_flops

RECIPE = "tiny-k-exaone"
"""A recipe with sliding windows and a multi-token prediction layer."""
STEPS, NEW_TOKENS = 4, 24
PRECISIONS = ("fp32", "bf16")
STAGES = ("sft", "dpo", "distilled")
"""Run folders whose losses are compared."""
NUMBERS = 24
"""The prompts ask for a + b with a < NUMBERS and b < NUMBERS // 8."""


def write_rows(setting: Setting) -> None:
    """Write chats.jsonl, pairs.jsonl and prompts.jsonl, which ask for sums of two numbers."""
    chats, pairs, prompts = [], [], []
    for a in range(NUMBERS):
        for b in range(NUMBERS // 8):
            asked, right = f"What is {a} plus {b}?", str(a + b)
            turns = (("user", asked), ("assistant", right))
            chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
            pairs.append({"prompt": asked, "chosen": right, "rejected": str(a + b + 1)})
            prompts.append({"prompt": asked, "answer": right})
    for name, lines in (("chats", chats), ("pairs", pairs), ("prompts", prompts)):
        file = setting.work / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def packing(setting: Setting) -> list[list[str | Path]]:
    """Return the commands that pack chats.jsonl and pairs.jsonl into token shards."""
    tokenizer = setting.work / "tokenizer"
    return [["sov-data", "pack", "--tokenizer", tokenizer, "--format", kind,
             "--input", setting.work / f"{name}.jsonl", "--heldout", "0.1",
             "--output", setting.work / name, "--overwrite"]
            for kind, name in (("chat", "chats"), ("preference", "pairs"))]


def chain(setting: Setting, start: Path, work: Path, precision: str) -> list[list[str | Path]]:
    """Return the post-training commands that start from the run `start` and write to the folder `work`."""
    def stage(*words: str | Path, run: str) -> list[str | Path]:
        settings = (f"train.precision={precision}", "optim.lr=5e-4", "optim.warmup_steps=0")
        return ["megatron-sov", *words, "--run", work / run, "--nproc", "1",
                *[word for setting_ in settings for word in ("--set", setting_)]]

    short = ["--set", f"train.steps={STEPS}", "--set", "train.global_batch_size=8"]
    rounds = ("rollout.rounds=2", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=4",
              "rollout.max_prompt_tokens=64", f"rollout.max_new_tokens={NEW_TOKENS}",
              "data.phases.0.seq_len=128")
    shutil.rmtree(work, ignore_errors=True)  # a part that failed earlier may have left it
    prompts = setting.work / "prompts.jsonl"
    return [
        [*stage("sft", "--from", start, "--data", setting.work / "chats", run="sft"), *short],
        [*stage("prefer", "--from", work / "sft", "--data", setting.work / "pairs", run="dpo"), *short],
        [*stage("distill", "--from", start, "--teacher", work / "sft", "--data", setting.work / "chats",
                run="distilled"), *short],
        ["megatron-sov", "generate", work / "sft", "--prompts", prompts, "--chat", "--max-new-tokens",
         str(NEW_TOKENS), "--output", work / "answers.jsonl", "--set", f"train.precision={precision}"],
        [*stage("rl", "run", "--from", work / "sft", "--prompts", prompts, "--reward", "repetition",
                "--store", work / "store", run="rl"),
         *[word for given in rounds for word in ("--set", given)]]]


def answers(work: Path) -> list[str]:
    """Return the greedy responses in answers.jsonl of a chain."""
    lines = (work / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


def compare(gpu: Path, cpu: Path, precision: str) -> tuple[dict[str, Any], list[str]]:
    """Return the figures (largest relative loss difference per stage, number of equal responses), and the
    problems."""
    found: dict[str, Any] = {name: largest(abs(a - b) / abs(b) for a, b in zip(
        losses(gpu / name), losses(cpu / name), strict=True)) for name in STAGES}
    problems = [f"{precision}, {name}: losses differ by {worst:.2e}" for name, worst in found.items()
                if not worst <= LIMITS[precision]]
    on_gpu, on_cpu = answers(gpu), answers(cpu)
    found["same responses"] = f"{sum(a == b for a, b in zip(on_gpu, on_cpu, strict=True))} of {len(on_cpu)}"
    if precision == "fp32" and on_gpu != on_cpu:
        problems.append(f"greedy responses: {found['same responses']} are the CPU's")
    found["losses of rounds"] = losses(gpu / "rl")
    return found, problems


def cost(setting: Setting) -> Cost:
    """Estimate the cost of the part: a chain per precision on each device, counted as training steps."""
    steps = 2 * (5 * STEPS + NEW_TOKENS)
    flops = training_flops(RECIPE, (*COMMON, *SMALL * setting.dry), steps)
    return Cost(starts=3, steps=2 * steps, flops=flops, cpu_flops=2 * flops)


def measure(setting: Setting) -> Figures:
    """Yield the figures of each precision.

    Raises:
        Failed: a command fails, or its losses or responses differ from the CPU's.
    """
    write_rows(setting)
    start = setting.work / "post-start"
    words = training(setting, RECIPE, start, STEPS, *SMALL * setting.dry, "train.precision=fp32")
    before = [*data(setting)[1], *packing(setting), words]
    problems = [problem for problem in setting.commands(before, on_gpu=False) if problem]
    fail_on(problems)  # without data and a pretrained run no chain can start
    where = {(precision, on_gpu): setting.work / f"post-{precision}-{'gpu' if on_gpu else 'cpu'}"
             for precision in PRECISIONS for on_gpu in (False, True)}
    for on_gpu in (False, True):
        commands = [words for (precision, here), work in where.items() if here == on_gpu
                    for words in chain(setting, start, work, precision)]
        problems += [problem for problem in setting.commands(commands, on_gpu=on_gpu) if problem]
    for precision in PRECISIONS:
        try:
            found, wrong = compare(where[precision, True], where[precision, False], precision)
        except OSError as e:  # a failed command has written no losses or answers
            found, wrong = {}, [f"{precision}: {e}"]
        yield precision, found
        problems += wrong
    fail_on(problems)
