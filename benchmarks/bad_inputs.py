"""What three programs say to 200 command lines that cannot work: exit code 2, no traceback, and at most two
sentences on each problem.

    python benchmarks/bad_inputs.py [--before CHECKOUT] > benchmarks/results/bad_inputs.txt

CHECKOUT is an older tree of this repository, whose programs get the same lines: the 20 worst of its answers
are printed beside those of now.

A minute on one core; nothing is trained. Commands run in this process, one after the other, in a folder of
small files: a tokenizer, token shards, and files that are damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
MOST_SENTENCES, MOST_CHARS, SHOWN, WORST = 2, 240, 12, 20
RECIPE = "tiny-solar-open"

TOKENIZER = """
train
train --preset nothing --input a.jsonl --output x
train --preset solar-open --input none.jsonl --output x
train --preset solar-open --vocab-size 10 --input a.jsonl --output x
train --preset solar-open --vocab-size ten --input a.jsonl --output x
train --preset solar-open --vocab-size -5 --input a.jsonl --output x
train --preset solar-open --vocab-size 368 --input empty.jsonl --output x
train --preset solar-open --vocab-size 368 --input broken.jsonl --output x
train --preset solar-open --vocab-size 368 --input latin.txt --output x
train --preset solar-open --vocab-size 368 --input a.jsonl --output tok
train --preset solar-open --vocab-size 368 --input a.jsonl
train --preset solar-open --vocab 368 --input a.jsonl --output x
train a.jsonl
report
report none --input a.jsonl
report a.jsonl --input a.jsonl
report tok --input none
compare tok
compare tok none --input a.jsonl
import none --output x
import damaged --output x
import a.jsonl --output x
export none x
export tok
trian --preset solar-open
--verbose train
media --tokenizer none --output x
"""
DATA = """
pack
pack --tokenizer tok --input a.jsonl
pack --tokenizer none --input a.jsonl --output x
pack --tokenizer shards --input a.jsonl --output x
pack --tokenizer damaged --input a.jsonl --output x
pack --tokenizer tok --input none.jsonl --output x
pack --tokenizer tok --input someone/dataset --output x
pack --tokenizer tok --input empty.jsonl --output x
pack --tokenizer tok --input broken.jsonl --output x
pack --tokenizer tok --input latin.txt --output x
pack --tokenizer tok --input list.json --output x
pack --tokenizer tok --input object.json --output x
pack --tokenizer tok --input bad.parquet --output x
pack --tokenizer tok --input bad.arrow --output x
pack --tokenizer tok --input cut.gz --output x
pack --tokenizer tok --input table.csv --format chat --output x
pack --tokenizer tok --input chats.jsonl --output x
pack --tokenizer tok --input a.jsonl --format chat --output x
pack --tokenizer tok --input a.jsonl --format preference --output x
pack --tokenizer tok --input a.jsonl --format prompt --output x
pack --tokenizer tok --input a.jsonl --format dpo --output x
pack --tokenizer tok --input odd.jsonl --format chat --output x
pack --tokenizer tok --input odd.jsonl --format chat --columns prompt --output x
pack --tokenizer tok --input odd.jsonl --format chat --columns prompt=none,response=say --output x
pack --tokenizer tok --input odd.jsonl --format chat --columns question=ask --output x
pack --tokenizer tok --input kto.jsonl --format chat --output x
pack --tokenizer tok --input odd.jsonl --format chat --columns prompt=ask,prompt=say --output x
pack --tokenizer tok --input odd.jsonl --format chat --columns prompt=ask,response= --output x
pack --tokenizer tok --input a.jsonl --columns text=body --output x
pack --tokenizer tok --input a.jsonl --text-field body --output x
pack --tokenizer tok --input a.jsonl --input a.jsonl --output x
pack --tokenizer tok --input tokenizer=a.jsonl --output x
pack --tokenizer tok --input "a b=a.jsonl" --output x
pack --tokenizer tok --input a.jsonl --heldout 2 --output x
pack --tokenizer tok --input a.jsonl --heldout many --output x
pack --tokenizer tok --input a.jsonl --workers 0 --output x
pack --tokenizer tok --input a.jsonl --shard-tokens -1 --output x
pack --tokenizer tok --input a.jsonl --column loss --output x
pack --tokenizer tok --input a.jsonl --column none --output x
pack --tokenizer tok --input a.jsonl --bucket-by text --output x
pack --tokenizer tok --input a.jsonl --step none.py:f --output x
pack --tokenizer tok --input a.jsonl --step step.py:none --output x
pack --tokenizer tok --input a.jsonl --step step.py:broken --output x
pack --tokenizer tok --input a.jsonl --output shards
pack --tokenizer tok --input a.jsonl --output /proc/x
pack --tokenizer tok --inputs a.jsonl --output x
pack a.jsonl
mix
mix shards
mix shards:x shards2 --output x
mix none shards --output x
mix shards shards --output x
adopt --tokenizer tok --output x
adopt web=none --tokenizer tok --output x
adopt web=shards/first --tokenizer none --output x
inspect
inspect none
stats none
stats tok
sample
sample none
sample shards --count -1
sample shards --source none
sample shards --split test
verify none
verify tok
verify shards --tokens nan
unpaired --input none.jsonl --output x
unpaired --input a.jsonl --output x
groups --input a.jsonl --output x
pairs --input a.jsonl --output x
trajectories --input a.jsonl --output x
decontaminate --input a.jsonl --benchmarks none.jsonl --output x
decontaminate --input a.jsonl --output x
run
run none.yaml --output x
run broken.yaml --output x
run list.yaml --output x
run unknown.yaml --output x
synth
synth nothing --output x
synth none.yaml --output x
report none
difficulty
scorer train --input none --output x
encode-media --input none.jsonl --output x
demo-corpus
demo-corpus --input none --output x
pakc --tokenizer tok
"""
TRAINING = """
pretrain
pretrain RECIPE
pretrain RECIPE --data shards
pretrain RECIPE --run x
pretrain tiny-solar --data shards --run x
pretrain none.py:recipe --data shards --run x
pretrain step.py:none --data shards --run x
pretrain RECIPE --data none --run x
pretrain RECIPE --data a.jsonl --run x
pretrain RECIPE --data tok --run x
pretrain RECIPE --data shards:heavy --run x
pretrain RECIPE --data shards:-1 --run x
pretrain RECIPE --data "w b=shards" --run x
pretrain RECIPE --data shards --data shards --run x
pretrain RECIPE --data shards --data shards2 --run x
pretrain RECIPE --data shards shards2 --run x
pretrain RECIPE --data shards --run a.jsonl
pretrain RECIPE --data shards --run x --steps 10
pretrain RECIPE --data shards --run x --lr 1e-3
pretrain RECIPE --data shards --run x --set
pretrain RECIPE --data shards --run x --set lr=1e-3
pretrain RECIPE --data shards --run x --set train.steps=ten
pretrain RECIPE --data shards --run x --set train.steps=-1
pretrain RECIPE --data shards --run x --set train.steps
pretrain RECIPE --data shards --run x --set trian.steps=1
pretrain RECIPE --data shards --run x --set optim.lr=fast
pretrain RECIPE --data shards --run x --set optim.lr=nan
pretrain RECIPE --data shards --run x --set optim.lr=-1
pretrain RECIPE --data shards --run x --set optim.name=sgd
pretrain RECIPE --data shards --run x --set data.phases=[
pretrain RECIPE --data shards --run x --set data.phases=[]
pretrain RECIPE --data shards --run x --set data.phases.0.seq_len=0
pretrain RECIPE --data shards --run x --set data.phases.7.seq_len=64
pretrain RECIPE --data shards --run x --set model.vocab_size=100
pretrain RECIPE --data shards --run x --set model.head_dim=-8
pretrain RECIPE --data shards --run x --set model.num_layers=0
pretrain RECIPE --data shards --run x --set parallel.tp=2 --nproc 3
pretrain RECIPE --data shards --run x --set parallel.pp=100
pretrain RECIPE --data shards --run x --set train.precision=fp4
pretrain RECIPE --data shards --run x --set train.global_batch_size=3 --nproc 2
pretrain RECIPE --data shards --run x --set objective.name=dpo
pretrain RECIPE --data shards --run x --set objective.name=step.py:broken
pretrain RECIPE --data shards --run x --nproc 0
pretrain RECIPE --data shards --run x --nproc many
pretrain RECIPE --data shards --run x --config none.json
pretrain --config broken.jsonl --data shards --run x
pretrain --config object.json --data shards --run x
pretrain RECIPE --data shards --run x train.steps=3
pretrain --config broken.yaml --data shards --run x
pretrain --config list.yaml --data shards --run x
pretrain --config unknown.yaml --data shards --run x
pretrain RECIPE --config unknown.yaml --data shards --run x
pretrain --config steps.yaml --config object.json --data shards --run x
pretrain RECIPE --config other.yaml --data shards --run x
pretrain RECIPE --data =shards --run x
pretrain RECIPE --data web= --run x
pretrain RECIPE --data web=shards --data web=shards2 --run x
pretrain RECIPE --data web=shards:0.3:0.7 --run x
sft --from damaged --data shards --run x
resume
resume none
resume shards
resume damaged --set train.steps=4
sft RECIPE --from none --data shards --run x
sft RECIPE --data shards --run x
sft RECIPE --from damaged --data shards --run x
sft RECIPE --from shards --data shards --run x
prefer RECIPE --from none --data shards --run x
prefer RECIPE --from damaged --data shards --run x --method dpoo
prefer RECIPE --from damaged --data shards --run x --beta 0.1
distill RECIPE --teacher none --data shards --run x
distill RECIPE --data shards --run x
extend RECIPE --from none --data shards --run x
lora
grpo RECIPE
dpo RECIPE
train RECIPE
"""
OTHERS = """
chat
chat none
chat Qwen/Qwen3-8B
chat shards --temperature 0
chat damaged --temperature -1
chat damaged --system
chat http://127.0.0.1:9/v1
serve damaged damaged
serve shards
score --reward math --input a.jsonl --output x --run none
convert
convert to-hf
convert to-hf none x
convert to-hf shards x
convert to-hf damaged x
convert from-hf none x
convert from-hf shards x
convert from-hf damaged x
convert from-hf Qwen/Qwen3-8B x
convert verify none damaged
convert settings none.yaml
convert settings a.jsonl
convert upside-down none x
generate
generate none --prompt hi
generate Qwen/Qwen3-8B --prompt hi
generate damaged --prompt hi
generate shards --prompt hi
generate damaged
serve none
serve damaged --port 99999999
eval
eval ppl none --data shards
eval ppl damaged
eval lm none --tasks mmlu
eval difference none.jsonl a.jsonl
eval perplexity none
report
report none
report shards
report tok
status none
status shards
plan
plan none
plan RECIPE --cluster h10
plan RECIPE --nodes 2
plan RECIPE --sweep
plan RECIPE --data none
plan RECIPE --data shards --set model.vocab_size=9
recipes nothing
score --reward none --input a.jsonl --output x
score --reward math --input none.jsonl --output x
score --reward math --input broken.jsonl --output x
score --reward step.py:f --input a.jsonl --output x
score --reward math --input a.jsonl --output x --set nothing=1
rl
rl run RECIPE --from none --prompts a.jsonl --reward math --run x
rl run RECIPE --prompts a.jsonl --reward math --run x
rl store none
submit
submit pretrain RECIPE --data shards --run x
submit pretrain RECIPE --data shards --run x --cluster nowhere
submit nothing
inspect none
doctor --nothing
completion csh
bundle
map
logs none
--help-me
pre-train RECIPE
"""


@dataclass(frozen=True)
class BadLine:
    """What became of a command line."""

    command: str
    exit_code: int
    said: str
    """Standard error, or the help that is printed in its place."""
    is_traceback: bool

    @property
    def num_sentences(self) -> int:
        """Sentences of the longest of its problems, each of which has a line of its own."""
        text = re.sub(r"`[^`]*`|'[^']*'", "x", self.said.strip())
        return max(len(re.split(r"(?<=[.!?])\s+(?=[A-Z`-])", line)) for line in text.split("\n"))

    @property
    def faults(self) -> list[str]:
        found = ["traceback"] if self.is_traceback else []
        found += [f"exit code {self.exit_code}"] if self.exit_code != 2 else []
        found += ["nothing said"] if not self.said.strip() else []
        found += [f"{self.num_sentences} sentences"] if self.num_sentences > MOST_SENTENCES else []
        return found


def write_files() -> None:
    """Write the files that command lines name."""
    Path("a.jsonl").write_text("".join(
        json.dumps({"text": f"Line {i} of a small text, {i * i} in all."}) + "\n" for i in range(400)))
    Path("chats.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    Path("odd.jsonl").write_text(json.dumps({"ask": "a", "say": "b"}) + "\n")
    Path("kto.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "label": True}) + "\n")
    Path("list.json").write_text(json.dumps([{"messages": []}]))
    Path("object.json").write_text(json.dumps({"train": {"steps": 3}}, indent=1))
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("latin.txt").write_bytes("déjà vu".encode("latin-1"))
    Path("table.csv").write_text("prompt,completion\na,b\n")
    Path("broken.yaml").write_text("name: [x\n")
    Path("list.yaml").write_text("- a\n- b\n")
    Path("unknown.yaml").write_text("name: x\nnothing: 1\nsources: []\n")
    Path("steps.yaml").write_text("train:\n  steps: 3\n  stpes: 4\n")
    Path("other.yaml").write_text("recipe: tiny-qwen3\n")
    Path("step.py").write_text("def f(row):\n    return row\n\n\nbroken = 1\n")
    Path("cut.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x01")
    for name in ("empty.jsonl", "bad.parquet", "bad.arrow"):
        Path(name).write_bytes(b"" if name == "empty.jsonl" else b"nothing")
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text('{"model_type": "qwen3"')
    Path("damaged/tokenizer.json").write_text("{")
    for program, line in (
            ("sov-tokenizer", "train --preset solar-open --vocab-size 330 --input a.jsonl --output tok"),
            ("sov-data", "pack --tokenizer tok --input first=a.jsonl --output shards --workers 1"),
            ("sov-data", "pack --tokenizer tok --input first=a.jsonl --output shards2 --workers 1")):
        found = type_line(program, line)
        if found.exit_code:
            raise SystemExit(f"{found.command}: {found.said}")


def type_line(program: str, line: str) -> BadLine:
    """Run a command line in this process."""
    out, printed, is_traceback = io.StringIO(), io.StringIO(), False
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(out):
        try:
            code = importlib.import_module(PROGRAMS[program]).main(shlex.split(line))
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except Exception:  # what a user would see
            traceback.print_exc()
            code, is_traceback = 1, True
    said = out.getvalue() or printed.getvalue()
    return BadLine(f"{program} {line}", int(code or 0), said, is_traceback or "Traceback (most" in said)


def type_all() -> list[BadLine]:
    """Run all command lines in a folder of their own."""
    lines = [(program, line.replace("RECIPE", RECIPE))
             for program, text in (("sov-tokenizer", TOKENIZER), ("sov-data", DATA),
                                   ("megatron-sov", TRAINING + OTHERS)) for line in text.split("\n") if line]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_files()
        found = []
        for program, line in lines:
            found.append(type_line(program, line))
            # unfinished work of one line would be what the next one is told of
            for left in (Path("x"), Path(".x.work")):
                shutil.rmtree(left, ignore_errors=True)
                left.unlink(missing_ok=True)
        os.chdir("/")
    return found


def of_tree(tree: Path) -> list[BadLine]:
    """Return what the programs of another tree make of the lines."""
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--rows"], check=True, cwd=tree,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tree.resolve())})
    return [BadLine(**row) for row in json.loads(done.stdout.decode().strip().rpartition("\n")[2])]


def print_worst(before: list[BadLine], now: list[BadLine]) -> None:
    """Print the worst answers of an older tree beside those of now."""
    ranked = sorted(zip(before, now, strict=True), reverse=True, key=lambda pair: (
        pair[0].is_traceback, pair[0].exit_code != 2, pair[0].num_sentences > MOST_SENTENCES,
        len(pair[0].said)))
    print(f"\nthe {WORST} worst of the older tree, and what is said now:")
    for old, new in ranked[:WORST]:
        print(f"  {old.command}")
        for name, one in (("before", old), ("now", new)):
            said = " ".join(one.said.split()).replace(f"{Path(__file__).parents[1]}/", "")
            print(f"    {name}, exit {one.exit_code}{', traceback' if one.is_traceback else ''}, {len(said)} "
                  f"characters: {said if len(said) <= MOST_CHARS else f'{said[:MOST_CHARS]} ...'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rows", action="store_true", help="print the answers alone, as JSON")
    args = parser.parse_args()
    found = type_all()
    if args.rows:
        print(json.dumps([vars(one) for one in found]))
        return 0
    faulty = [one for one in found if one.faults]
    lengths = sorted(len(one.said.strip()) for one in found)
    print(f"{platform.machine()}, Python {platform.python_version()}, one process\n")
    refused, short = (sum(one.exit_code == 2 for one in found),
                      sum(one.num_sentences <= MOST_SENTENCES for one in found))
    print(f"{len(found)} command lines that cannot work: {refused} exit with 2, "
          f"{sum(one.is_traceback for one in found)} with a traceback, {short} with at most {MOST_SENTENCES} "
          "sentences a problem,\n"
          f"{sum(n < MOST_CHARS for n in lengths)} in fewer than {MOST_CHARS} characters "
          f"(median {lengths[len(lengths) // 2]}, longest {lengths[-1]})")
    print(f"\nfaults: {len(faulty)}")
    for one in faulty:
        print(f"  {one.command}\n    {', '.join(one.faults)}\n    {one.said.strip()[-600:]}")
    print("\nthe longest:")
    for one in sorted(found, key=lambda one: -len(one.said))[:SHOWN]:
        print(f"  {len(one.said.strip()):>4} characters, {one.num_sentences} sentences: {one.command}\n"
              f"       {one.said.strip()[:MOST_CHARS]}")
    if args.before:
        print_worst(of_tree(args.before), found)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
