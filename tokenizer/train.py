"""`sov-tokenizer train`: from text to a tokenizer artifact that transformers loads."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sov.artifacts import ArtifactWriter, new_artifact, refuse_existing, sha256_file, to_json
from tokenizer import bpe
from tokenizer.corpus import TextInput, count_bytes, parse_input, repeats, sample, training_text
from tokenizer.hf_files import CONFIG_JSON, TOKENIZER_JSON, tokenizer_config
from tokenizer.presets import CUSTOM, PRESETS, SMALLEST_VOCAB, Preset, load_preset

HELP = "learn a byte-level BPE tokenizer from text"
DESCRIPTION = """Learn a byte-level BPE tokenizer from text.

The vocabulary has exactly the size that you ask for; the same input gives the same file, byte for byte. The k-exaone preset
trains plain BPE with K-EXAONE's rules (NFC, single digits, its special tokens); superwords, tokens that span words, are not
part of this command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--preset", required=True, metavar="NAME", help=f"the tokenizer's rules: {', '.join([*PRESETS, CUSTOM])}")
    parser.add_argument("--preset-file", type=Path, metavar="FILE.json", help="the rules of --preset custom")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N",
                        help=f"number of ids, special ones and bytes included (at least {SMALLEST_VOCAB})")
    parser.add_argument("--input", required=True, action="append", metavar="PATH[:weight]",
                        help="a text file, a .jsonl file (field text, or messages) or a folder of them; repeat it. Weighted "
                             "inputs share their bytes by weight, others are taken as they are")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is already there")


def run(args: argparse.Namespace) -> int:
    """Run `sov-tokenizer train`; returns 0."""
    preset = load_preset(args.preset, args.preset_file)
    train_tokenizer(preset, args.vocab_size, [parse_input(i) for i in args.input], args.output, overwrite=args.overwrite)
    return 0


def train_tokenizer(preset: Preset, vocab_size: int, sources: list[TextInput], output: Path, *, overwrite: bool = False) -> None:
    """Train a tokenizer and write it as an artifact of kind "tokenizer".

    Raises:
        UserError: unreadable input, a vocabulary that cannot be reached, or an output that may not be replaced.
    """
    refuse_existing(output, "tokenizer", overwrite)  # before the work, not after it
    started_s = time.monotonic()
    num_bytes = [count_bytes(source) for source in sources]
    factors = repeats(sources, num_bytes)
    for source, size_bytes, factor in zip(sources, num_bytes, factors, strict=True):
        print(f"{source.path}: {size_bytes / 1e6:.2f} MB of text" + (f", seen {factor:.2f} times" if source.weight else ""))
    total_bytes = round(sum(n * f for n, f in zip(num_bytes, factors, strict=True)))
    with tqdm(total=total_bytes, desc="reading", unit="B", unit_scale=True) as bar:
        trained = bpe.train(preset, vocab_size, training_text(sources, factors, bar.update), show_progress=sys.stderr.isatty())
    print(f"{vocab_size} tokens learned in {time.monotonic() - started_s:.1f} s")
    ratios = {}
    for source, size_bytes in zip(sources, num_bytes, strict=True):
        ratios[str(source.path)] = bpe.bytes_per_token(trained, sample(source, size_bytes))
        print(f"{source.path}: {ratios[str(source.path)]:.3f} bytes per token")
    with new_artifact(output, "tokenizer", overwrite=overwrite) as artifact:
        _write(artifact, trained, preset)
        artifact.content |= {"vocab_size": vocab_size, "bytes_per_token": ratios}
        artifact.settings = {"preset": preset, "vocab_size": vocab_size, "min_frequency": bpe.MIN_FREQUENCY, "inputs": [
            {"path": s.path, "weight": s.weight, "num_bytes": n, "times_seen": f}
            for s, n, f in zip(sources, num_bytes, factors, strict=True)]}
    print(f"wrote {output}")


def _write(artifact: ArtifactWriter, trained: Any, preset: Preset) -> None:
    """Write the two Hugging Face files and the manifest's facts about them."""
    trained.encode_special_tokens = False
    trained.save(str(artifact.path / TOKENIZER_JSON), pretty=False)
    (artifact.path / CONFIG_JSON).write_text(to_json(tokenizer_config(preset)), encoding="utf-8")
    artifact.content = {
        "preset": preset.name,
        "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
        "bos_id": preset.special_tokens[preset.bos_token],
        "eos_id": preset.special_tokens[preset.eos_token],
        "pad_id": preset.special_tokens[preset.pad_token],
    }
