"""Post-training of a tiny model, GPU against CPU: fine-tuning, preferences, distillation, RL rounds,
generation.

Another machine can run the rung of the CPU: the journal then carries its losses and responses, and `work` the
packed data and the pretrained run. In float32, losses and greedy tokens are compared. In bf16, with the
layers of Transformer Engine, only losses are compared. RL rounds only have to complete, because other
rounding samples other tokens.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from part_losses import LIMITS, SMALL, build_training_command, plan_packing
from setting import Figures, Setting, fail_on, find_largest, read_losses

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
            question, answer = f"What is {a} plus {b}?", str(a + b)
            turns = (("user", question), ("assistant", answer))
            chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
            pairs.append({"prompt": question, "chosen": answer, "rejected": str(a + b + 1)})
            prompts.append({"prompt": question, "answer": answer})
    for name, lines in (("chats", chats), ("pairs", pairs), ("prompts", prompts)):
        file = setting.work / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def build_packing_commands(setting: Setting) -> list[list[str | Path]]:
    """Return the commands that pack chats.jsonl and pairs.jsonl into token shards."""
    tokenizer = setting.work / "tokenizer"
    return [["sov-data", "pack", "--tokenizer", tokenizer, "--format", kind,
             "--input", setting.work / f"{name}.jsonl", "--heldout", "0.1",
             "--output", setting.work / name, "--overwrite"]
            for kind, name in (("chat", "chats"), ("preference", "pairs"))]


def build_chain(setting: Setting, start: Path, work: Path, precision: str) -> list[list[str | Path]]:
    """Return the post-training commands that start from the run `start` and write to the folder `work`."""
    def stage(*words: str | Path, run: str) -> list[str | Path]:
        settings = (f"train.precision={precision}", "optim.lr=5e-4", "optim.warmup_steps=0")
        return ["megatron-sov", *words, "--run", work / run, "--nproc", "1",
                *[word for text in settings for word in ("--set", text)]]

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
         *[word for text in rounds for word in ("--set", text)]]]


def read_answers(work: Path) -> list[str]:
    """Return the greedy responses in answers.jsonl of a chain."""
    lines = (work / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


def read_chain(work: Path) -> dict[str, Any]:
    """Return the losses of each stage and the greedy responses of a chain."""
    return {name: read_losses(work / name) for name in STAGES} | {"responses": read_answers(work)}


def compare(gpu: Path, cpu: dict[str, Any], precision: str) -> tuple[dict[str, Any], list[str]]:
    """Return the figures (largest relative loss difference per stage, number of equal responses), and the
    problems."""
    on_gpu = read_chain(gpu)
    figures: dict[str, Any] = {}
    problems = []
    for name in STAGES:
        differences = (abs(a - b) / abs(b) for a, b in zip(on_gpu[name], cpu[name], strict=True))
        figures[name] = find_largest(differences)
        if not figures[name] <= LIMITS[precision]:  # not >: the difference may be NaN
            problems.append(f"{precision}, {name}: losses differ by {figures[name]:.2e}")
    num_equal = sum(a == b for a, b in zip(on_gpu["responses"], cpu["responses"], strict=True))
    figures["same responses"] = f"{num_equal} of {len(cpu['responses'])}"
    if precision == "fp32" and on_gpu["responses"] != cpu["responses"]:
        problems.append(f"greedy responses: {figures['same responses']} are the CPU's")
    figures["losses of rounds"] = read_losses(gpu / "rl")
    return figures, problems


START = "post-start"
"""Folder of the pretrained run."""


def measure(setting: Setting, case: str) -> Figures:
    """Yield the losses and responses of each precision on the CPU, or their comparison on the GPU.

    Raises:
        Failed: a command fails, or its losses or responses differ from the CPU's.
    """
    on_gpu, start, problems = case == "gpu", setting.work / START, []
    cpu = setting.get_figures("post.cpu") if on_gpu else {}
    works = {precision: setting.work / f"post-{precision}-{case}" for precision in PRECISIONS}
    if not on_gpu:
        write_rows(setting)
        pretraining = build_training_command(setting, RECIPE, start, STEPS, *SMALL * setting.dry,
                                             "train.precision=fp32")
        commands = [*plan_packing(setting)[1], *build_packing_commands(setting), pretraining]
        # without data and a pretrained run no chain can start
        fail_on([problem for problem in setting.run_commands(commands, on_gpu=False) if problem])
    chains = [command for precision, work in works.items()
              for command in build_chain(setting, start, work, precision)]
    problems += [problem for problem in setting.run_commands(chains, on_gpu=on_gpu) if problem]
    for precision, work in works.items():
        figures: dict[str, Any] = {}
        try:
            if on_gpu:
                figures, differences = compare(work, cpu[precision], precision)
                problems += differences
            else:
                figures = read_chain(work)
        except OSError as e:  # a failed command has written no losses or answers
            problems.append(f"{precision}: {e}")
        yield precision, figures
        shutil.rmtree(work, ignore_errors=True)
    fail_on(problems)
