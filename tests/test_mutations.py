"""Broken command lines and input files: every command ends with one message and a documented exit code,
without traceback, endless work or partial output.

Each case takes a sound command, breaks one argument or one file of its inputs (whose manifest is often
hashed again, as an attacker would), and runs it.  SOV_MUTATIONS=N tries N cases of each command.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.model.config import RolloutConfig
from megatron_sov.omni.codecs.published import import_codec
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.store import RolloutStore
from tests.breakers import TENSORS, break_a_file, break_an_argument
from tests.omni import hf_folders

pytestmark = pytest.mark.deep  # each case runs a command
COUNT = int(os.environ.get("SOV_MUTATIONS", "1"))
TIMEOUT_S = 120.0
SIZES = ("--set", "train.global_batch_size=2", "--set", "train.micro_batch_size=1",
         "--set", 'data.phases=[{"name": "main", "seq_len": 32}]', "--set", "model.hidden_size=32",
         "--set", "model.num_layers=2", "--set", "model.head_dim=8", "--set", "model.expert_ffn_dim=16",
         "--set", "model.vocab_size=368", "--set", "data.heldout_tokens=64", "--set", "train.max_restarts=0",
         "--set", "train.checkpoint_every_steps=1", "--set", "train.num_threads=1",
         "--set", "optim.lr=4e-3")
SMALL = ("--set", "train.steps=2", *SIZES)
ROUNDS = ("--set", "rollout.rounds=2", "--set", "rollout.prompts_per_round=2", "--set",
          "rollout.samples_per_prompt=2", "--set", "rollout.steps_per_round=1", "--set",
          "rollout.piece_prompts=1", "--set", "rollout.max_new_tokens=12", "--set",
          "rollout.max_prompt_tokens=6", "--set", "policy.method=dapo", "--set", "policy.kl=k3", "--set",
          "policy.kl_coeff=0.1", "--set", "policy.max_gen_batches=1")
TRAIN = ("tiny-solar-open", "--run", "@out", "--nproc", "1", *SMALL)
M, D, T = "megatron-sov", "sov-data", "sov-tokenizer"
COMMANDS: dict[str, tuple[str, ...]] = {
    "pretrain": (M, "pretrain", *TRAIN, "--data", "@text"),
    "pretrain --resume": (M, "pretrain", "tiny-solar-open", "--run", "@run", "--nproc", "1", *SMALL,
                          "--data", "@text", "--resume"),
    "pretrain --from": (M, "pretrain", *TRAIN, "--data", "@text", "--from", "@run"),
    "pretrain from hf": (M, "pretrain", *TRAIN, "--data", "@text", "--from", "@hf"),
    "sft": (M, "sft", *TRAIN, "--data", "@chats", "--from", "@run", "--set",
            'data.phases=[{"name": "main", "seq_len": 128}]'),
    "extend": (M, "extend", *TRAIN, "--data", "@text", "--from", "@run"),
    "to-hf": (M, "convert", "to-hf", "@run", "@out", "--workers", "1"),
    "from-hf": (M, "convert", "from-hf", "@hf", "@out", "--workers", "1"),
    "verify": (M, "convert", "verify", "@run", "@hf", "--workers", "1", "--lengths", "8"),
    "inspect": (M, "convert", "inspect", "@run", "--json"),
    "generate": (M, "generate", "@run", "--prompts", "@prompts", "--max-new-tokens", "4", "--nproc", "1"),
    "generate --chat": (M, "generate", "@hf", "--prompt", "hello", "--chat", "--max-new-tokens", "4",
                        "--temperature", "0.5", "--top-k", "5", "--stop", "x"),
    "eval ppl": (M, "eval", "ppl", "@run", "--data", "@text", "--seq-len", "32", "--max-tokens", "64",
                 "--nproc", "1", "--output", "@out"),
    "eval needle": (M, "eval", "needle", "@run", "--data", "@text", "--lengths", "64", "--depths", "0.5",
                    "--samples", "1", "--kinds", "single", "--nproc", "1", "--output", "@out"),
    "submit": (M, "submit", "pretrain", "--cluster", "@cluster", "--nodes", "1", "--dry-run",
               "tiny-solar-open", "--run", "@out", *SMALL, "--data", "@text"),
    "submit chain": (M, "submit", "chain", "@chain", "--dry-run"),
    "status": (M, "status", "@run", "--json"),
    "logs": (M, "logs", "@run", "--tail", "5"),
    "plan": (M, "plan", "tiny-solar-open", *SMALL, "--nproc", "2", "--json"),
    "plan of a file": (M, "plan", "--config", "@config", "--json"),
    "report": (M, "report", "@run", "--output", "@out"),
    "recipes": (M, "recipes", "tiny-solar-open", *SMALL, "--json"),
    "pack": (D, "pack", "--tokenizer", "@tokenizer", "--input", "@documents", "--output", "@out",
             "--heldout", "0.1", "--workers", "1", "--max-document-bytes", "10000", "--shard-tokens", "500"),
    "pack chats": (D, "pack", "--tokenizer", "@tokenizer", "--input", "@messages", "--output", "@out",
                   "--format", "chat", "--workers", "1", "--on-bad", "quarantine"),
    "mix": (D, "mix", "--output", "@out", "@text:0.5", "@chats:0.5"),
    "inspect tokens": (D, "inspect", "@text"),
    "stats": (D, "stats", "@chats", "--json"),
    "sample": (D, "sample", "@text", "--source", "even", "--count", "2", "--max-tokens", "20", "--seed", "1"),
    "verify tokens": (D, "verify", "@text"),
    "train": (T, "train", "--preset", "solar-open", "--vocab-size", "330", "--input", "@documents",
              "--output", "@out", "--workers", "1", "--max-memory-gb", "2"),
    "import": (T, "import", "@hf", "--output", "@out", "--text", "@documents"),
    "import ranks": (T, "import", "@ranks", "--rules", "@rules", "--output", "@out"),
    "export": (T, "export", "@tokenizer", "--format", "tiktoken", "--output", "@out"),
    "compare": (T, "compare", "@tokenizer", "@hf", "--text", "@documents", "--max-text-mb", "0.01",
                "--json", "@out"),
    "average": (M, "convert", "average", "@run", "@out"),
    "to-peft": (M, "convert", "to-peft", "@adapter", "@out"),
    "score math": (M, "score", "--reward", "math", "--input", "@answers", "--output", "@out",
                   "--workers", "1"),
    "rl reward": (M, "rl", "reward", "--store", "@store", "--reward", "length", "--reward-set",
                  "max_length=9", "--reward-set", "buffer=3", "--workers", "1"),
    "inspect --verify store": (M, "inspect", "@store", "--verify", "--json"),
    "rl train": (M, "rl", "train", "tiny-solar-open", "--run", "@out", "--nproc", "1", *SIZES, *ROUNDS,
                 "--data", "@text", "--from", "@run", "--store", "@store", "--prompts", "@asked", "--reward",
                 "repetition"),
    "rl train --resume": (M, "rl", "train", "tiny-solar-open", "--run", "@rounds", "--nproc", "1", *SIZES,
                          *ROUNDS, "--data", "@text", "--from", "@run", "--store", "@store", "--prompts",
                          "@asked", "--reward", "repetition", "--resume"),
    "distill states": (M, "distill", "states", "@hf", "--data", "@text", "--output", "@out"),
    "run": (D, "run", "@raw/pipeline.yaml", "--output", "@out", "--workers", "1"),
}
REFUSED = {"extend": "the tokenizer has too few whole words for needles", "eval needle": "the same"}
"""Commands that exit with code 2 on valid inputs; damaged inputs must be reported first."""
WEIGHTS_READ = ("pretrain from hf", "from-hf", "verify", "generate --chat", "distill states")
"""Commands that read only the weights from @hf: they must refuse a missing tensor."""


@dataclass(frozen=True)
class World:
    """Sound inputs of every kind, copied for each case: name -> path."""

    places: dict[str, Path]

    def copied(self, names: list[str], folder: Path) -> dict[str, Path]:
        """Return copies of some inputs, which a case may break."""
        copies = {}
        for name in names:
            source, target = self.places[name], folder / self.places[name].name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy(source, target)
            copies[name] = target
        return copies


ANSWERS = ("\\boxed{4}", "\\boxed{9^{9^{9^{9}}}}", "{" * 500, "\\boxed{" + "(" * 300 + ")" * 300 + "}",
           "\\boxed{\\frac{1}{0}}", "no answer", "\x00\u2028\\boxed{4", "")
PIPELINE = """name: tiny
shard_bytes: 2000
sources: [{name: raw, path: raw}]
steps: [{pii: {}}, {exact_dedup: {}}]
"""


def write_lines(file: Path, rows: list[Any]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_documents(folder: Path) -> None:
    """Write answers to judge, and a small pipeline."""
    texts = [{"text": f"Chapter {i}: water and stone, mail a{i}@b.com. " * (1 + i % 4)} for i in range(24)]
    (folder / "raw/raw").mkdir(parents=True)
    write_lines(folder / "answers.jsonl", [{"response": text, "answer": "4"} for text in ANSWERS])
    write_lines(folder / "raw/raw/a.jsonl", texts[:12])
    (folder / "raw/raw/b.txt").write_text(texts[13]["text"])
    (folder / "raw/pipeline.yaml").write_text(PIPELINE)


def write_store(folder: Path, tokenizer: Path, write_round: Callable[..., None]) -> None:
    """Write two judged rounds of scripted responses, and the prompts that they answer."""
    write_lines(folder / "asked.jsonl", [{"prompt": f"{i}?"} for i in range(4)])
    rollout = RolloutConfig(rounds=2, prompts_per_round=2, samples_per_prompt=2, steps_per_round=1,
                            piece_prompts=1, max_new_tokens=12, max_prompt_tokens=6)
    store = RolloutStore.create(folder / "store", tokenizer_digest(tokenizer), 368)
    for number in (1, 2):
        write_round(store, read_prompts(folder / "asked.jsonl"), rollout, number,
                    build_versioned_reward(request_reward("repetition", {})).version)


def write_codec(folder: Path) -> None:
    """Write a codec of pictures with random weights."""
    source = folder.with_name(f"{folder.name}-hf")
    hf_folders.save_network("vqmodel", source)
    import_codec("vqmodel", source, folder)
    shutil.rmtree(source)


@pytest.fixture(scope="module")
def world(packed_data: Any, run_command: Any, write_round: Callable[..., None],
          tmp_path_factory: pytest.TempPathFactory) -> World:
    """Token shards, runs with checkpoints and rounds, a Hugging Face folder, texts and settings, all tiny."""
    folder = tmp_path_factory.mktemp("sound")
    run, hf = folder / "run", folder / "hf"

    def call(program: str, *argv: str) -> None:
        result = run_command(*argv, program=program)
        assert result.returncode == 0, result.stderr

    sized = ("tiny-solar-open", "--nproc", "1", *SIZES, "--data", str(packed_data.text), "--run")
    train = ("--set", "train.steps=2", *sized)
    call(M, "pretrain", *train, str(run))
    call(M, "convert", "to-hf", str(run), str(hf))
    call(M, "pretrain", *train, str(folder / "adapter"), "--from", str(run), "--set", "lora.rank=2")
    call(T, "export", str(packed_data.tokenizer), "--format", "tiktoken", "--output",
         str(folder / "ranks.tiktoken"))
    write_store(folder, packed_data.tokenizer, write_round)
    call(M, "rl", "train", *sized, str(folder / "rounds"), *ROUNDS, "--from", str(run), "--store",
         str(folder / "store"), "--prompts", str(folder / "asked.jsonl"), "--reward", "repetition")
    (folder / "rounds/complete.json").unlink()  # as if killed after the publication of the second round
    shutil.rmtree(folder / "rounds/checkpoints/step-2")
    write_codec(folder / "codec")
    write_documents(folder)
    for name, text in {
            "prompts.jsonl": '{"prompt": "Chapter 1"}\n{"prompt": "water"}\n',
            "config.json": (run / "config.json").read_text()}.items():
        (folder / name).write_text(text)
    for kind, name in (("clusters", "local"), ("chains", "tiny-solar-open")):
        text = (Path(__file__).parents[1] / "slurm" / kind / f"{name}.yaml").read_text()
        (folder / f"{kind}.yaml").write_text(text.replace("$WORK", str(folder)))
    data = packed_data.text.parent
    (rules,) = folder.glob("ranks*.json")
    here = {"ranks": "ranks.tiktoken", "prompts": "prompts.jsonl",
            "config": "config.json", "cluster": "clusters.yaml", "chain": "chains.yaml",
            "asked": "asked.jsonl", "answers": "answers.jsonl",
            **{name: name for name in ("adapter", "store", "rounds", "codec", "raw")}}
    return World({
        "text": packed_data.text, "chats": packed_data.chats, "tokenizer": packed_data.tokenizer, "run": run,
        "hf": hf, "documents": data / "even.jsonl", "messages": data / "chat.jsonl", "rules": rules,
        **{kind: folder / name for kind, name in here.items()}})


def is_one_sentence(stderr: str) -> bool:
    """Return whether a refusal is one sentence and no traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return "Traceback" not in stderr and any("error: " in line or line.startswith("gate: ") for line in lines)


def cases() -> list[tuple[str, int]]:
    """Every command with its numbers of cases."""
    return [(name, number) for name in COMMANDS for number in range(COUNT)]


@dataclass
class Case:
    """A command with its own copies of the inputs."""

    name: str
    folder: Path
    world: World
    run_command: Callable[..., Any]
    places: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        self.program, *self.argv = COMMANDS[self.name]
        used = {re.split("[:/]", a[1:])[0] for a in self.argv if a.startswith("@")} & set(self.world.places)
        (self.folder / "in").mkdir(parents=True)
        (self.folder / "here").mkdir()
        self.places = self.world.copied(sorted(used), self.folder / "in")
        self.out = self.folder / "out"

    def run(self) -> Any:
        """Run the command on its copies of the inputs."""
        targets = {**{n: str(p) for n, p in self.places.items()}, "out": str(self.out)}
        for at, argument in enumerate(self.argv):
            result = re.match("@([a-z]+)(.*)", argument, re.DOTALL)
            if result and result[1] in targets:
                self.argv[at] = targets[result[1]] + result[2]
        return self.run_command(*self.argv, program=self.program, timeout_s=TIMEOUT_S)

    def told(self, said: str, done: Any) -> str:
        """Return the description of a failed case."""
        return (f"{said}\n{self.program} {' '.join(a[:80] for a in self.argv)}\nexit code {done.returncode}\n"
                f"{done.stderr[-3000:]}")


@pytest.mark.each(("name", "number"), cases())
def test_a_broken_command_ends_with_a_sentence(name: str, number: int, world: World,
                                               run_command: Callable[..., Any], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(f"{name} {number}")
    case = Case(name, tmp_path / "case", world, run_command)
    by_file = bool(case.places) and rng.random() < 0.5
    damage = break_a_file(case.places, rng) if by_file else break_an_argument(case.argv, rng)
    monkeypatch.chdir(case.folder / "here")
    result = case.run()
    told = case.told(damage, result)
    assert result.returncode in (0, 2, 3, 75), told
    assert "Traceback" not in result.stderr, told
    if result.returncode == 2:
        assert is_one_sentence(result.stderr), told
    if result.returncode == 2 and "run" not in case.places:
        assert not case.out.exists(), f"something was left behind\n{told}"
    if damage.startswith("hf/") and TENSORS in damage and name in WEIGHTS_READ:
        assert result.returncode, told


@pytest.mark.each("name", [*COMMANDS] if COUNT > 1 else ["pack"])  # all of them, for runs with many cases
def test_intact_commands_are_accepted(name: str, world: World, run_command: Callable[..., Any],
                                      tmp_path: Path) -> None:
    case = Case(name, tmp_path / "case", world, run_command)
    result = case.run()
    assert result.returncode == (2 if name in REFUSED else 0), case.told("", result)
