"""Cost of training a tokenizer, compared with Hugging Face `tokenizers` and sentencepiece on the same text.

    python benchmarks/tokenizer_train.py --text FOLDER --keep FOLDER [--sentencepiece-python
    PYTHON] [--bounded-gb 5]

--text contains one `<language>.jsonl` (field `text`) per language. A fiftieth of the documents, selected by a
hash, is held out. Held-out documents and tokenizers stay in the --keep folder for
benchmarks/tokenizer_heldout.py. CPU seconds are summed over all processes of a command; memory is the peak of
the summed resident memory.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from string import ascii_lowercase

import psutil

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.runs.launch_environment import read_processor_name
from tokenizer.presets import PRESETS

SOLAR, EXAONE = ("solar-open", 196_608), ("k-exaone", 153_600)
HELD_OUT_OF = 50
PARTS = ("superwords", "plain", "paper", "bounded")
PERTURBED_SHARE = 0.02
PAPER_VOCAB_SIZE, PAPER_TRANSITION_SIZES = 200_000, (180_000, 160_000, 80_000)
ALL_MB = 1_000_000
PAPER_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
"""Groups of three digits, counted from the right."""
PAPER_SPLIT = rf" ?\p{{L}}+|{PAPER_DIGITS}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
PAPER_SUPERWORDS = rf"[^\r\n\p{{N}}]*[\r\n]+|[^\r\n\p{{N}}]+|{PAPER_DIGITS}"
"""A line up to its first digit or its end: the authors train line by line, and only digits end a unit in a
line."""

HUGGING_FACE = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, trainers, pre_tokenizers, models
from megatron_sov.base.documents import list_files, read_documents
from tokenizer.mixture import iter_pieces
from tokenizer.presets import PRESETS
from tokenizer.bpe.split_pattern import build_untrained_tokenizer
preset = PRESETS[sys.argv[1]]
t = build_untrained_tokenizer(preset, preset.split_pattern)
trainer = trainers.BpeTrainer(
    vocab_size=int(sys.argv[2]) - preset.num_special_ids, min_frequency=2, show_progress=False,
    max_token_length=preset.max_token_bytes + 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
documents = read_documents(list_files(Path(sys.argv[3])))
texts = (piece.text for document in documents for piece in iter_pieces(document))
t.train_from_iterator(texts, trainer)
t.save(sys.argv[4])
"""

SENTENCEPIECE = """
import json, sys, pathlib, sentencepiece
lines = (line for f in sorted(pathlib.Path(sys.argv[2]).glob("*.jsonl")) for r in open(f, encoding="utf-8")
         for line in json.loads(r)["text"].split("\\n") if line)
sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=sys.argv[3], model_type="bpe",
    vocab_size=int(sys.argv[1]), byte_fallback=True, split_digits=True, character_coverage=0.9995,
    num_threads=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    max_sentence_length=100000, minloglevel=2)
"""


@dataclass(frozen=True)
class Cost:
    """CPU time, wall time and memory of a command."""

    cpu_s: float
    """User and system time of all processes."""
    wall_s: float
    peak_gb: float
    """Peak of the summed resident memory of all processes."""


def run_measured(command: list[str]) -> Cost:
    """Run a command to its end and return its cost."""
    start_s, peaks, done = time.monotonic(), [0], threading.Event()

    def watch(pid: int) -> None:
        while not done.wait(0.2):
            try:
                parent = psutil.Process(pid)
                peaks.append(sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]))
            except psutil.NoSuchProcess:
                continue

    with tempfile.TemporaryFile() as output:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command[:4]}: exit code {process.returncode}\n"
                             f"{output.read().decode()[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - start_s,
                max(max(peaks) / 1e9, usage.ru_maxrss * 1024 / 1e9))


def train_command(preset: str, vocab_size: int, text: Path, output: Path, *more: str) -> list[str]:
    """Return the command `sov-tokenizer train` for all languages of a folder, with options `more`."""
    inputs = [word for f in sorted(text.glob("*.jsonl")) for word in ("--input", f"{f.stem}={f}")]
    return [sys.executable, "-m", "tokenizer.cli", "train", "--preset", preset, "--vocab-size",
            str(vocab_size), *inputs, "--output", str(output), *more]


def split_documents(source: Path, work: Path) -> dict[str, int]:
    """Split documents into WORK/train and WORK/held; return language -> bytes of training text."""
    sizes: dict[str, int] = {}
    for name in ("train", "held"):
        (work / name).mkdir()
    for file in sorted(source.glob("*.jsonl")):
        with (open(work / "train" / file.name, "w") as train, open(work / "held" / file.name, "w") as held,
              open(file) as lines):
            for line in lines:
                text = json.loads(line)["text"].encode()
                out = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % HELD_OUT_OF == 0
                (held if out else train).write(line)
                sizes[file.stem] = sizes.get(file.stem, 0) + (0 if out else len(text))
    return sizes


def print_costs(costs: dict[str, Cost]) -> None:
    """Print costs and their ratios to the first."""
    first = next(iter(costs.values()))
    print(f"{'':<58} {'CPU s':>8} {'ratio':>6} {'wall s':>8} {'peak GB':>8} {'ratio':>6}")
    for name, cost in costs.items():
        print(f"{name:<58} {cost.cpu_s:8.1f} {cost.cpu_s / first.cpu_s:6.2f} {cost.wall_s:8.1f} "
              f"{cost.peak_gb:8.2f} {cost.peak_gb / first.peak_gb:6.2f}", flush=True)


def read_merges(file: Path) -> list[list[str]]:
    """Return the merges of a tokenizer.json."""
    return json.loads(file.read_text(encoding="utf-8"))["model"]["merges"]


def compare_plain_bpe(work: Path, sentencepiece_python: str | None) -> None:
    """Train Solar Open's tokenizer at full size with this project and with both libraries; print the
    costs."""
    preset, vocab_size = SOLAR
    text, theirs, ours = work / "train", work / "hf-solar.json", work / "solar"
    hugging_face = [sys.executable, "-c", HUGGING_FACE, preset, str(vocab_size), str(text), str(theirs)]
    costs = {"tokenizers: BpeTrainer": run_measured(hugging_face)}
    costs["sov-tokenizer train"] = run_measured(train_command(preset, vocab_size, text, ours))
    if sentencepiece_python:
        command = [sentencepiece_python, "-c", SENTENCEPIECE, str(vocab_size), str(text), str(work / "spm")]
        costs["sentencepiece: bpe over characters, its own words"] = run_measured(command)
    print(f"\nbyte-level BPE, {preset}, {vocab_size:,} ids; load {os.getloadavg()[0]:.0f}")
    print_costs(costs)
    is_equal = read_merges(theirs) == read_merges(ours / "tokenizer.json")
    print(f"merges as those of tokenizers: {is_equal}", flush=True)


def train_superwords(work: Path) -> None:
    """Train K-EXAONE's tokenizer at full size, and compare its cost with plain BPE."""
    preset, vocab_size = EXAONE
    text = work / "train"
    hugging_face = [sys.executable, "-c", HUGGING_FACE, preset, str(vocab_size), str(text),
                    str(work / "hf-exaone.json")]
    kinds = {"super": ("SuperBPE, a fifth superwords: --superword-share 0.2",),
             "plain": ("plain BPE: --superword-share 0", "--superword-share", "0"),
             "published": ("SuperBPE as published: --transition-size 122880", "--transition-size", "122880")}
    costs = {}
    for name, (title, *options) in kinds.items():
        costs[title] = run_measured(train_command(preset, vocab_size, text, work / name, *options))
    costs = {"tokenizers: BpeTrainer, plain BPE of that size": run_measured(hugging_face)} | costs
    print(f"\n{preset}, {vocab_size:,} ids; load {os.getloadavg()[0]:.0f}")
    print_costs(costs)
    for name in kinds:
        content = read_manifest(work / name).content
        share = content["num_superwords"] / vocab_size
        print(f"{name}: superwords {content['num_superwords']:,} = {100 * share:.2f} %; {content['checked']}",
              flush=True)


def train_paper_tokenizers(work: Path) -> None:
    """Train SuperBPE as in its paper (arXiv 2503.13423) and print the costs: English, 200,000 ids, GPT-2's
    word pattern, the whole text in both stages."""
    rules = {field: value for field, value in asdict(PRESETS[SOLAR[0]]).items()
             if field not in ("name", "superword_share")}
    rules |= {"split_pattern": PAPER_SPLIT, "superword_pattern": PAPER_SUPERWORDS, "superword_share": 0.5}
    (work / "paper.json").write_text(json.dumps(rules))
    english = f"en={work / 'train/en.jsonl'}"
    costs = {}
    for size in (PAPER_VOCAB_SIZE, *PAPER_TRANSITION_SIZES):
        costs[f"transition size {size:,}"] = run_measured(
            [sys.executable, "-m", "tokenizer.cli", "train", "--preset", "custom", "--config",
             str(work / "paper.json"), "--vocab-size", str(PAPER_VOCAB_SIZE), "--transition-size", str(size),
             "--input", english, "--superword-sample-mb", str(ALL_MB), "--output",
             str(work / f"paper-{size}")])
    print(f"\nSuperBPE as in its paper: English, {PAPER_VOCAB_SIZE:,} ids; first plain BPE; "
          f"load {os.getloadavg()[0]:.0f}")
    print_costs(costs)


def texts_of(file: Path) -> Iterator[str]:
    """Yield the documents of a file."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_with_memory_limit(work: Path, size_gb: float, memory_gb: float) -> None:
    """Train on repeated and perturbed text, whose number of distinct words keeps growing, with
    `--max-memory-gb`; print the cost and the words of each stage."""
    folder = work / "large"
    folder.mkdir()
    drawn, size_bytes, round_ = random.Random(0), 0, 0
    documents = [text for f in sorted((work / "train").glob("*.jsonl")) for text in texts_of(f)]
    while size_bytes < size_gb * 1e9:
        with open(folder / f"round-{round_}.jsonl", "w", encoding="utf-8") as f:
            for text in documents:
                words = text.split(" ")
                for i in drawn.sample(range(len(words)),
                                      round(PERTURBED_SHARE * len(words)) if round_ else 0):
                    words[i] = words[i][::-1] + "".join(drawn.choices(ascii_lowercase, k=3))
                f.write(json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n")
                size_bytes += len(text.encode())
                if size_bytes >= size_gb * 1e9:
                    break
        round_ += 1
    del documents
    preset, vocab_size = EXAONE
    cost = run_measured([sys.executable, "-m", "tokenizer.cli", "train", "--preset", preset, "--vocab-size",
                         str(vocab_size), "--input", f"large={folder}", "--output", str(work / "bounded"),
                         "--max-memory-gb", str(memory_gb)])
    shutil.rmtree(folder)
    print(f"\n{size_bytes / 1e9:.2f} GB of text, repeated and perturbed, {preset} {vocab_size:,}, "
          f"--max-memory-gb {memory_gb:g}: {cost.cpu_s:.0f} CPU s, {cost.wall_s:.0f} s on the clock, "
          f"peak {cost.peak_gb:.2f} GB")
    for stage in read_manifest(work / "bounded").settings["stages"]:
        print(f"  to {stage['reaches_tokens']:,} ids: {stage['seen_bytes'] / 1e6:.0f} MB of text, "
              f"{stage['distinct_words']:,} distinct words kept, {stage['dropped_words']:,} rarer ones left "
              f"out ({100 * stage['dropped_share']:.2f} % of the text)", flush=True)


def machine() -> str:
    """Return a line with processor, cores, load and library versions."""
    versions = ", ".join(f"{name} {version(name)}"
                         for name in ("tokenizers", "tiktoken", "transformers", "numpy"))
    return (f"{read_processor_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
            f"Python {platform.python_version()}, {versions}")


def main() -> int:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", required=True, type=Path, help="folder of <language>.jsonl")
    parser.add_argument("--keep", required=True, type=Path,
                        help="new folder for the tokenizers and the held-out text")
    parser.add_argument("--sentencepiece-python", metavar="PYTHON",
                        help="an interpreter that has sentencepiece; left out without it")
    parser.add_argument("--bounded-gb", type=float, default=5,
                        help="text of the run with bounded memory (default %(default)s)")
    parser.add_argument("--max-memory-gb", type=float, default=4,
                        help="bound of that run (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="what to measure (default: everything)")
    args = parser.parse_args()
    args.keep.mkdir(parents=True)
    sizes = split_documents(args.text, args.keep)
    print(f"{machine()}\n{sum(sizes.values()) / 1e6:.1f} MB of text: "
          + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items()), flush=True)
    parts = {"superwords": lambda: train_superwords(args.keep),
             "plain": lambda: compare_plain_bpe(args.keep, args.sentencepiece_python),
             "paper": lambda: train_paper_tokenizers(args.keep),
             "bounded": lambda: train_with_memory_limit(args.keep, args.bounded_gb, args.max_memory_gb)}
    for part in args.parts:
        parts[part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
