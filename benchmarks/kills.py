"""Kill a command repeatedly at random moments, and compare its output with that of an undisturbed run.

    python benchmarks/kills.py TARGET [TARGET ...] [--kills 20] [--seed 0]

Each target is a command of `TARGETS`. It runs once undisturbed. Then the command is started repeatedly, and
SIGKILL ends all its processes after a time drawn uniformly over the duration of the undisturbed run,
`--kills` times. An output that completes earlier is compared, deleted and produced again. The comparison is
bit for bit:

    files       all output files, except times in manifests; no temporary files may remain
    run         all files of all checkpoints, and the training state except its wall time
    rl          as `run`, plus all responses and rewards in the rollout store and all files of the rounds
    items       items that `score` and `map` have processed: none may be missing at the end
"""

import argparse
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from command_lines import PROGRAMS, format_settings, format_single_phase, write_jsonl
from measurement import describe_machine

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.rollouts.inspection import check_store
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.checkpoints import find_damage
from megatron_sov.runs.obs.events import EVENTS, read_events

ROOT = Path(__file__).parents[1]
NUM_ROWS = 4000
# Settings of the commands: of a tiny model, of all training, of each kind of run, and of RL's rounds.
MODEL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16")
TRAINING = ("train.num_threads=1", "train.global_batch_size=8", "train.micro_batch_size=2",
            "data.max_epochs=0", "train.keep_every_steps=50", "train.checkpoint_every_steps=10")
PRETRAIN = (*MODEL, *TRAINING, format_single_phase(32), "train.steps=200", "data.heldout_tokens=128",
            "train.eval_every_steps=50", "train.hidden_dropout=0.1", "parallel.ep=2")
FINE_TUNE = (*TRAINING, format_single_phase(64), "train.steps=60", "train.eval_every_steps=0")
START = (*MODEL, *TRAINING, format_single_phase(64), "train.steps=30", "train.eval_every_steps=0")
ROUNDS = ("rollout.rounds=6", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=4",
          "rollout.piece_prompts=2", "rollout.max_new_tokens=12", "rollout.max_prompt_tokens=48",
          "rollout.lease_s=3", "rollout.max_staleness=1", "policy.method=gspo", "policy.router_replay=true",
          "optim.lr=1e-3", "train.num_threads=1", "train.global_batch_size=4", "train.micro_batch_size=2",
          "train.eval_every_steps=0", "train.keep_checkpoints=0", "train.checkpoint_every_steps=2",
          format_single_phase(64))
OWN_CODE = """
import hashlib
import time

def note_item(row):
    time.sleep(0.0005)
    with open("noted", "a") as f:
        f.write(f"{row['id']}\\n")

class LengthReward:
    def score(self, row):
        note_item(row)
        return float(len(row["response"]))

class LengthStep:
    def do(self, row):
        note_item(row)
        return {"id": row["id"], "length": len(row["response"])}

class RandomReward:
    def score(self, row):
        return float(hashlib.sha256(f"{row['prompt']} {row['response']}".encode()).digest()[0] < 128)
"""
PIPELINE = """
name: deduplicated
shard_bytes: 60000
sources:
  - {name: web, path: raw, format: jsonl, kind: en}
steps:
  - exact_dedup: {}
  - minhash_dedup: {threshold: 0.8}
output: {name: "{source}"}
"""


def hash_files(output: Path, endings: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Return file -> SHA-256 of the files with these endings in an output, without the times in manifests."""
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    hashes = {}
    for file in files:
        content = file.read_bytes()
        if file.name == "manifest.json":
            manifest = json.loads(content)
            content = json.dumps({name: manifest[name] for name in ("kind", "content", "files")}).encode()
        if file.name.endswith(endings):
            hashes[str(file.relative_to(output))] = hashlib.sha256(content).hexdigest()
    return hashes


def hash_corpus(output: Path) -> dict[str, str]:
    """Return the hashes of a corpus without its reports, which contain times."""
    return hash_files(output, (".parquet", ".jsonl", ".npy"))


def hash_run(run: Path) -> dict[str, str]:
    """Return the hashes of all files of all kept checkpoints, and each training state without its wall time.

    Raises:
        SystemExit: a checkpoint is damaged.
    """
    hashes: dict[str, str] = {}
    for path in sorted((run / "checkpoints").iterdir()):
        if (problem := find_damage(path)) is not None:
            raise SystemExit(f"{problem}: damaged checkpoint")
        hashes |= {f"{path.name}/{name}": record.digest for name, record in read_manifest(path).files.items()
                   if name != "state.json"}
        state = json.loads((path / "state.json").read_text())
        hashes[f"{path.name}/state"] = json.dumps({k: v for k, v in state.items() if k != "wall_s"},
                                                  sort_keys=True)
    return hashes


def hash_rl(run: Path) -> dict[str, str]:
    """Return the hashes of an RL run: checkpoints, rollout store (RUN/rollouts) and rounds.

    Raises:
        SystemExit: the store is damaged, or has a response twice.
    """
    store = RolloutStore.open(run / "rollouts")
    if problems := check_store(store).problems:
        raise SystemExit(f"{run}/rollouts: {problems[:3]}")
    hashes = hash_run(run)
    columns = ("tokens", "finish_reason", "logprobs", "versions", "routes")
    for part in store.parts():
        for row in store.read_rollouts(part.name, columns):
            place = f"{row.round}/{row.key.prompt}/{row.key.sample}"
            if place in hashes:
                raise SystemExit(f"{run}/rollouts: response {place} is stored twice")
            hashes[place] = str([row.key.policy, row.finish_reason, *(
                None if column is None else column.tobytes().hex()
                for column in (row.tokens, row.logprobs, row.versions, row.routes))])
    for judged in (part for version in store.versions() for part in store.parts(version=version)):
        for reward in store.read_rewards(judged.version, judged.name):
            hashes[f"reward {judged.round}/{reward.key.prompt}/{reward.key.sample}"] = str(reward.reward)
    for folder in sorted((run / "rounds").glob("[0-9]" * 4)):
        hashes |= {f"{folder.name}/{name}": file.digest for name, file in read_manifest(folder).files.items()}
    return hashes


@dataclass(frozen=True)
class Target:
    """A command that must survive kills."""

    line: str
    """Program and words; OUT stands for the output."""
    output: str
    settings: tuple[str, ...] = ()
    hash_output: Callable[[Path], dict[str, str]] = hash_files
    """Returns name -> hash or value of each compared part of an output."""
    notes_items: bool = False
    """Whether the command appends the id of each processed item to the file `noted`."""
    inputs: tuple[str, ...] = ()
    """Names of `PREPARED`, with those that their commands read."""


TARGETS = {
    "pretrain": Target("megatron-sov pretrain tiny-solar-open --data shards --run OUT --nproc 2 --resume",
                       "pretrain", PRETRAIN, hash_run, inputs=("tokenizer", "shards")),
    "sft": Target("megatron-sov sft --from start --data chats --run OUT --nproc 1 --resume", "sft",
                  (*FINE_TUNE, "lora.rank=4"), hash_run, inputs=("tokenizer", "shards", "start", "chats")),
    "prefer": Target("megatron-sov prefer --from start --method dpo --data pairs --run OUT --nproc 1 "
                     "--resume", "prefer", FINE_TUNE, hash_run,
                     inputs=("tokenizer", "shards", "start", "pairs")),
    "rl": Target("megatron-sov rl run --from start --prompts prompts.jsonl --reward "
                 "own.py:RandomReward --store OUT/rollouts --run OUT --nproc 1 --workers 1 --resume",
                 "rl", ROUNDS, hash_rl, inputs=("tokenizer", "shards", "start")),
    "score": Target("megatron-sov score --reward own.py:LengthReward --input rows.jsonl --output OUT "
                    "--workers 2", "scored.jsonl", notes_items=True),
    "map": Target("megatron-sov map rows.jsonl own.py:LengthStep --output OUT --workers 2", "mapped",
                  notes_items=True),
    "tokenizer": Target("sov-tokenizer train --preset solar-open --vocab-size 1000 --input raw --output OUT "
                        "--workers 2", "tokenizer-out"),
    "pack": Target("sov-data pack --tokenizer tokenizer --input raw --output OUT --workers 2", "tokens",
                   inputs=("tokenizer",)),
    "data": Target("sov-data run pipeline.yaml --output OUT --workers 2", "corpus", hash_output=hash_corpus),
    "convert": Target("megatron-sov convert to-hf checkpoint OUT --max-shard-bytes 2000000 --workers 1",
                      "hf-out", inputs=("checkpoint",)),
}
PREPARED = {
    "tokenizer": "sov-tokenizer train --preset solar-open --vocab-size 368 --input text.jsonl --output OUT",
    "shards": "sov-data pack --tokenizer tokenizer --heldout 0.1 --workers 1 --input text.jsonl --output OUT",
    "chats": "sov-data pack --tokenizer tokenizer --format chat --workers 1 --input chats.jsonl --output OUT",
    "pairs": "sov-data pack --tokenizer tokenizer --format preference --workers 1 --input pairs.jsonl "
             "--output OUT",
    "start": "megatron-sov pretrain tiny-solar-open --data shards --run OUT --nproc 1",
    "checkpoint": "megatron-sov convert from-hf hf OUT",
}
"""Input -> the command that creates it, in order of execution."""


def write_inputs(folder: Path) -> None:
    """Write the texts, rows, chats, pairs, prompts and code that the commands read."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randrange(1, 5))) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(20, 120))) for _ in range(NUM_ROWS)]
    paragraphs = [p for p in inspect.getsource(argparse).split("\n\n") if p.strip()]
    questions = [{"role": "user", "content": f"Say {word}."} for word in words[:400]]
    answers = [{"role": "assistant", "content": word} for word in words[:400]]
    refusal = {"role": "assistant", "content": "no"}
    (folder / "own.py").write_text(OWN_CODE)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    for number in range(4):
        write_jsonl(folder / f"raw/{number}.jsonl", [{"text": text} for text in texts[number::4]])
    write_jsonl(folder / "rows.jsonl", [{"id": i, "response": text} for i, text in enumerate(texts)])
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in paragraphs])
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in zip(questions, answers, strict=True)])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": [question], "chosen": [answer], "rejected": [refusal]}
                                         for question, answer in zip(questions, answers, strict=True)])
    write_jsonl(folder / "prompts.jsonl", [{"id": str(i), "prompt": [question]}
                                           for i, question in enumerate(questions[:24])])


def write_hf_folder(folder: Path) -> None:
    """Write a Hugging Face model of 80 MB, which becomes a checkpoint and 40 files again."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=2)).save_pretrained(folder / "hf")


def prepare_inputs(folder: Path, targets: list[str]) -> None:
    """Create the inputs of all targets with the project's own commands."""
    write_inputs(folder)
    required = {name for target in targets for name in TARGETS[target].inputs}
    if "checkpoint" in required:
        write_hf_folder(folder)
    for name, line in PREPARED.items():
        if name in required:
            check_end(start_command(folder, line, name, START if name == "start" else ()), folder)


def start_command(folder: Path, line: str, output: str, settings: tuple[str, ...] = ()
                  ) -> subprocess.Popen[bytes]:
    """Start a command in its own process group; its standard output and errors go into FOLDER/log."""
    program, *words = line.replace("OUT", output).split()
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", PROGRAMS[program], *words, *format_settings(*settings)],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def check_end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the end of a command.

    Raises:
        SystemExit: the command failed.
    """
    if code := process.wait():
        raise SystemExit(f"exit code {code}:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")


def kill_command(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all of its child processes."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()
    psutil.wait_procs(children, timeout=30)
    process.wait()


def is_complete(output: Path) -> bool:
    """Return whether an output is complete: a file, or a folder with manifest.json or complete.json."""
    return output.is_file() or any((output / name).is_file() for name in ("manifest.json", "complete.json"))


class KilledTarget:
    """Kills a target repeatedly, and compares its output with the output of an undisturbed run."""

    def __init__(self, folder: Path, name: str, target: Target) -> None:
        self.folder, self.name, self.target = folder, name, target
        undisturbed = folder / f"whole-{target.output}"
        begin_s = time.monotonic()
        check_end(start_command(folder, target.line, undisturbed.name, target.settings), folder)
        self.wall_s = time.monotonic() - begin_s
        self.expected = target.hash_output(undisturbed)
        self.num_noted = self._count_noted()
        self.num_repeated = self.num_lost = 0
        self.output = folder / target.output

    def _count_noted(self) -> int:
        """Return the number of lines in `noted`, and delete the file. `score` tries its reward on one row
        first, so a row may be noted twice."""
        file = self.folder / "noted"
        if not file.is_file():
            return 0
        notes = Counter(file.read_text().split())
        file.unlink()
        self.num_distinct = len(notes)
        return notes.total()

    def kill_repeatedly(self, kills: int, draw: random.Random) -> bool:
        """Kill the command `kills` times and let it complete; print a row, and return whether every completed
        output equals the undisturbed output, no temporary file remains and no item is lost."""
        num_kills, num_ends, equal = 0, 0, True
        moments: Counter[str] = Counter()
        while num_kills < kills or not is_complete(self.output):
            if is_complete(self.output):
                num_ends += 1
                equal &= self._is_equal()
                if self.output.is_dir():
                    shutil.rmtree(self.output)
                self.output.unlink(missing_ok=True)
            process = start_command(self.folder, self.target.line, self.target.output, self.target.settings)
            try:
                process.wait(draw.uniform(0.1, self.wall_s) if num_kills < kills else None)
                check_end(process, self.folder)
            except subprocess.TimeoutExpired:
                moments[self._find_phase()] += 1
                kill_command(process)
                num_kills += 1
        equal &= self._is_equal()
        temporary = [path.name for path in self.folder.glob(f".{self.output.name}.*")]
        items = ""
        if self.target.notes_items:
            items = f"; {self.num_lost} items lost, {self.num_repeated / max(kills, 1):.1f} repeated per kill"
        moment_counts = ", ".join(f"{moment} {count}" for moment, count in moments.most_common())
        print(f"{self.name:<10} {num_kills:>5} {num_ends + 1:>5} {'equal' if equal else 'DIFFERS':>8} "
              f"{', '.join(temporary) or 'nothing':>9} {self.wall_s:>8.1f} s  {moment_counts}{items}",
              flush=True)
        return equal and not temporary and not self.num_lost

    def _is_equal(self) -> bool:
        if self.target.notes_items:
            self.num_repeated += self._count_noted() - self.num_noted
            self.num_lost += NUM_ROWS - self.num_distinct
        result = self.target.hash_output(self.output)
        different = sorted(name for name in self.expected.keys() | result.keys()
                           if self.expected.get(name) != result.get(name))
        if different:
            print(f"{self.name}: {len(different)} of {len(self.expected)} differ: {different[:5]}")
        return not different

    def _find_phase(self) -> str:
        """Return the phase of a running command, derived from the files that it has written."""
        if not (self.output / EVENTS).is_file():
            return "at work" if self.output.exists() or any(
                self.folder.glob(f".{self.output.name}.*")) else "start"
        if any((self.output / "checkpoints").glob(".*")):
            return "save"
        steps = sum(event["event"] == "step" for event in read_events(self.output / EVENTS))
        return "step" if steps else "load"


def main() -> int:
    """Kill the requested targets, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"], metavar="TARGET",
                        help=f"{', '.join(TARGETS)}, or all")
    parser.add_argument("--kills", type=int, default=20, help="kills of each target (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default %(default)s)")
    args = parser.parse_args()
    targets = list(TARGETS) if "all" in args.targets else args.targets
    print(f"{describe_machine()}; seed {args.seed}\n{'target':<10} {'kills':>5} {'ends':>5} {'content':>8} "
          f"{'left over':>9} {'undisturbed':>10}  killed at", flush=True)
    all_equal = True
    with tempfile.TemporaryDirectory(prefix="sov-kills-") as name:
        prepare_inputs(Path(name), targets)
        for target in targets:
            draw = random.Random(f"{target}-{args.seed}")
            all_equal &= KilledTarget(Path(name), target, TARGETS[target]).kill_repeatedly(args.kills, draw)
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
