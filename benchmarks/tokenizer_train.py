"""Cost of training a tokenizer, compared with Hugging Face `tokenizers` and sentencepiece on the same text.

    python benchmarks/tokenizer_train.py --text FOLDER --keep FOLDER [--sentencepiece-python PYTHON]

The --text folder has one `<language>.jsonl` (field `text`) per language. A fiftieth of the documents,
selected by a hash, is held out. Held-out documents and tokenizers stay in the --keep folder for
benchmarks/tokenizer_heldout.py. CPU seconds are summed over all processes of a command; memory is the peak of
the summed resident memory.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from string import ascii_lowercase

from measurement import Cost, describe_machine, run_measured

from megatron_sov.base.artifacts import read_manifest
from tokenizer.presets import PRESETS

SOLAR, EXAONE = ("solar-open", 196_608), ("k-exaone", 153_600)
"""Preset and number of ids."""
HELD_OUT_OF = 50
PARTS = ("superwords", "plain", "paper", "bounded")
PERTURBED_SHARE = 0.02
"""Share of the words that a repetition of the text changes."""
PAPER_VOCAB_SIZE, PAPER_TRANSITION_SIZES = 200_000, (180_000, 160_000, 80_000)
ALL_MB = 1_000_000
"""A sample of this size is the whole text."""
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


def run_training(*command: str | Path) -> Cost:
    """Run a Python program, and return its cost with the summed memory of its processes."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return run_measured(command, environment, sum_memory=True)


def train_tokenizer(preset: str, vocab_size: int, output: Path, *options: str | Path) -> Cost:
    """Run `sov-tokenizer train` and return its cost."""
    return run_training(sys.executable, "-m", "tokenizer.cli", "train", "--preset", preset, "--vocab-size",
                        str(vocab_size), "--output", output, *options)


def list_inputs(text: Path) -> list[str]:
    """Return the `--input` options for all languages of a folder."""
    return [word for f in sorted(text.glob("*.jsonl")) for word in ("--input", f"{f.stem}={f}")]


def train_with_hugging_face(preset: str, vocab_size: int, text: Path, output: Path) -> Cost:
    """Train plain BPE with `tokenizers` on the text of a folder, and return its cost."""
    return run_training(sys.executable, "-c", HUGGING_FACE, preset, str(vocab_size), text, output)


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
                is_held_out = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") % HELD_OUT_OF == 0
                (held if is_held_out else train).write(line)
                sizes[file.stem] = sizes.get(file.stem, 0) + (0 if is_held_out else len(text))
    return sizes


def print_costs(costs: dict[str, Cost]) -> None:
    """Print costs and their ratios to the first."""
    first = next(iter(costs.values()))
    print(f"{'':<58} {'CPU s':>8} {'ratio':>6} {'wall s':>8} {'peak GB':>8} {'ratio':>6}")
    for name, cost in costs.items():
        print(f"{name:<58} {cost.cpu_s:8.1f} {cost.cpu_s / first.cpu_s:6.2f} {cost.wall_s:8.1f} "
              f"{cost.peak_bytes / 1e9:8.2f} {cost.peak_bytes / first.peak_bytes:6.2f}", flush=True)


def read_merges(file: Path) -> list[list[str]]:
    """Return the merges of a tokenizer.json."""
    return json.loads(file.read_text(encoding="utf-8"))["model"]["merges"]


def compare_plain_bpe(work: Path, sentencepiece_python: str | None) -> None:
    """Train Solar Open's tokenizer at full size with this project and with both libraries; print the
    costs."""
    preset, vocab_size = SOLAR
    text, theirs, ours = work / "train", work / "hf-solar.json", work / "solar"
    costs = {"tokenizers: BpeTrainer": train_with_hugging_face(preset, vocab_size, text, theirs),
             "sov-tokenizer train": train_tokenizer(preset, vocab_size, ours, *list_inputs(text))}
    if sentencepiece_python:
        costs["sentencepiece: bpe over characters, its own words"] = run_training(
            sentencepiece_python, "-c", SENTENCEPIECE, str(vocab_size), text, work / "spm")
    print(f"\nbyte-level BPE, {preset}, {vocab_size:,} ids; load {os.getloadavg()[0]:.0f}")
    print_costs(costs)
    is_equal = read_merges(theirs) == read_merges(ours / "tokenizer.json")
    print(f"merges equal those of tokenizers: {is_equal}", flush=True)


def train_superwords(work: Path) -> None:
    """Train K-EXAONE's tokenizer at full size, and compare its cost with plain BPE."""
    preset, vocab_size = EXAONE
    text = work / "train"
    kinds = {"super": ("SuperBPE, a fifth superwords: --superword-share 0.2",),
             "plain": ("plain BPE: --superword-share 0", "--superword-share", "0"),
             "published": ("SuperBPE as published: --transition-size 122880", "--transition-size", "122880")}
    costs = {"tokenizers: BpeTrainer, plain BPE of that size": train_with_hugging_face(
        preset, vocab_size, text, work / "hf-exaone.json")}
    for name, (title, *options) in kinds.items():
        costs[title] = train_tokenizer(preset, vocab_size, work / name, *list_inputs(text), *options)
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
    costs = {}
    for size in (PAPER_VOCAB_SIZE, *PAPER_TRANSITION_SIZES):
        costs[f"transition size {size:,}"] = train_tokenizer(
            "custom", PAPER_VOCAB_SIZE, work / f"paper-{size}", "--config", work / "paper.json",
            "--transition-size", str(size), "--input", f"en={work / 'train/en.jsonl'}",
            "--superword-sample-mb", str(ALL_MB))
    print(f"\nSuperBPE as in its paper: English, {PAPER_VOCAB_SIZE:,} ids; first plain BPE; "
          f"load {os.getloadavg()[0]:.0f}")
    print_costs(costs)


def iter_texts(file: Path) -> Iterator[str]:
    """Yield the documents of a JSONL file."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_with_memory_limit(work: Path, size_gb: float, memory_gb: float) -> None:
    """Train with `--max-memory-gb` on repeated text with perturbed words, so that every round adds distinct
    words; print the cost and the words of each stage."""
    folder = work / "large"
    folder.mkdir()
    rng, size_bytes, round_ = random.Random(0), 0, 0
    documents = [text for f in sorted((work / "train").glob("*.jsonl")) for text in iter_texts(f)]
    while size_bytes < size_gb * 1e9:
        with open(folder / f"round-{round_}.jsonl", "w", encoding="utf-8") as f:
            for text in documents:
                words = text.split(" ")
                num_perturbed = round(PERTURBED_SHARE * len(words)) if round_ else 0
                for i in rng.sample(range(len(words)), num_perturbed):
                    words[i] = words[i][::-1] + "".join(rng.choices(ascii_lowercase, k=3))
                f.write(json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n")
                size_bytes += len(text.encode())
                if size_bytes >= size_gb * 1e9:
                    break
        round_ += 1
    del documents
    preset, vocab_size = EXAONE
    cost = train_tokenizer(preset, vocab_size, work / "bounded", "--input", f"large={folder}",
                           "--max-memory-gb", str(memory_gb))
    shutil.rmtree(folder)
    print(f"\n{size_bytes / 1e9:.2f} GB of text, repeated and perturbed, {preset} {vocab_size:,}, "
          f"--max-memory-gb {memory_gb:g}: {cost.cpu_s:.0f} CPU s, {cost.wall_s:.0f} s wall time, "
          f"peak {cost.peak_bytes / 1e9:.2f} GB")
    for stage in read_manifest(work / "bounded").settings["stages"]:
        print(f"  to {stage['reaches_tokens']:,} ids: {stage['seen_bytes'] / 1e6:.0f} MB of text, "
              f"{stage['distinct_words']:,} distinct words kept, {stage['dropped_words']:,} rarer words "
              f"dropped ({100 * stage['dropped_share']:.2f} % of the text)", flush=True)


def describe_setup() -> str:
    """Return a line with the machine and library versions."""
    versions = (f"{name} {version(name)}" for name in ("tokenizers", "tiktoken", "transformers", "numpy"))
    return ", ".join([describe_machine(), *versions])


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", required=True, type=Path, help="folder of <language>.jsonl")
    parser.add_argument("--keep", required=True, type=Path,
                        help="new folder for the tokenizers and the held-out text")
    parser.add_argument("--sentencepiece-python", metavar="PYTHON",
                        help="interpreter with sentencepiece (default: sentencepiece does not run)")
    parser.add_argument("--bounded-gb", type=float, default=5,
                        help="text of the part `bounded` (default %(default)s)")
    parser.add_argument("--max-memory-gb", type=float, default=4,
                        help="memory limit of the part `bounded` (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    args.keep.mkdir(parents=True)
    sizes = split_documents(args.text, args.keep)
    print(f"{describe_setup()}\n{sum(sizes.values()) / 1e6:.1f} MB of text: "
          + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items()), flush=True)
    parts = {"superwords": lambda: train_superwords(args.keep),
             "plain": lambda: compare_plain_bpe(args.keep, args.sentencepiece_python),
             "paper": lambda: train_paper_tokenizers(args.keep),
             "bounded": lambda: train_with_memory_limit(args.keep, args.bounded_gb, args.max_memory_gb)}
    for part in args.parts:
        parts[part]()


if __name__ == "__main__":
    main()
