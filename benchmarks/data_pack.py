"""Speed of `sov-data pack`, compared with Megatron-LM's preprocessing and datatrove on the same text.

    python benchmarks/data_pack.py [--megabytes 40] [--input PATH ...] [--datatrove-python PYTHON]

The output of all programs must be byte-identical. The Megatron-LM script follows tools/preprocess_data.py:
JSON lines, `encode_batch` of Hugging Face `tokenizers`, `IndexedDatasetBuilder`. datatrove
(`MegatronDocumentTokenizer`) is not a dependency and runs in another interpreter. CPU seconds are summed over
all processes of a command, with start-up; other load on the machine changes them little. `kills.py pack`
kills the command.
"""

import argparse
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from command_lines import write_jsonl
from measurement import describe_machine, run_measured

from megatron_sov.base.artifacts import read_manifest, sha256_file
from megatron_sov.base.documents import Document, RecordReading, list_files, plan_units, read_span

PRESETS = ("solar-open", "k-exaone")
VOCAB_SIZE = 32_768
TRAIN_TOKENIZER_BYTES = 16_000_000
BATCH_DOCUMENTS = 256
ONE_THREAD = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
"""Environment of every measured command: encoding runs on one thread per process."""

MEGATRON = """
import json, sys, itertools, numpy as np, torch
import megatron_sov.engine  # megatron-core needs its stand-ins for Triton on a machine without a GPU
from tokenizers import Tokenizer
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
tokenizer.encode_special_tokens = True
eos = json.load(open(sys.argv[1] + "/manifest.json"))["content"]["eos_id"]
builder = IndexedDatasetBuilder(sys.argv[3] + ".bin", dtype=np.uint16)
with open(sys.argv[2], encoding="utf-8") as f:
    while lines := list(itertools.islice(f, BATCH)):
        for e in tokenizer.encode_batch([json.loads(l)["text"] for l in lines], add_special_tokens=False):
            ids = e.ids + [eos]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
builder.finalize(sys.argv[3] + ".idx")
""".replace("BATCH", str(BATCH_DOCUMENTS))

DATATROVE = """
import json, os, sys
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
folder, corpus, out = sys.argv[1:]
config = json.load(open(folder + "/tokenizer_config.json"))
reader = JsonlReader(os.path.dirname(corpus), glob_pattern=os.path.basename(corpus))
writer = MegatronDocumentTokenizer(os.path.dirname(out), save_filename=os.path.basename(out),
    tokenizer_name_or_path=folder + "/tokenizer.json", eos_token=config["eos_token"], batch_size=BATCH)
writer.tokenizer.encode_special_tokens = True
for _ in writer.run(reader.run(None, 0, 1), 0, 1) or ():
    continue
""".replace("BATCH", str(BATCH_DOCUMENTS))


def iter_texts(inputs: list[Path], limit_bytes: int) -> Iterator[str]:
    """Yield documents until `limit_bytes` are reached, 20 from each input in turn."""
    reading = RecordReading()
    streams = [(item.text for unit in plan_units(list_files(path)) for span in unit
                for item in read_span(span, reading) if isinstance(item, Document) and item.text)
               for path in inputs]
    size_bytes = 0
    while streams and size_bytes < limit_bytes:
        for stream in list(streams):
            texts = list(islice(stream, 20))
            if not texts:
                streams.remove(stream)
            for text in texts:
                size_bytes += len(text.encode())
                yield text


def write_corpus(file: Path, inputs: list[Path], limit_bytes: int) -> int:
    """Write documents of the inputs as JSONL; return the bytes of their text."""
    texts = list(iter_texts(inputs, limit_bytes))
    write_jsonl(file, ({"text": text} for text in texts))
    return sum(len(text.encode()) for text in texts)


def build_pack_command(tokenizer: Path, corpus: Path, output: Path, workers: int) -> list[str]:
    """Return the command that packs the corpus without a held-out split."""
    return [sys.executable, "-m", "data_prep.cli", "pack", "--tokenizer", str(tokenizer), "--input",
            f"all={corpus}", "--output", str(output), "--heldout", "0", "--workers", str(workers)]


def hash_shard(prefix: Path) -> tuple[str, str]:
    """Return the SHA-256 of PREFIX.bin and PREFIX.idx."""
    return sha256_file(Path(f"{prefix}.bin")), sha256_file(Path(f"{prefix}.idx"))


def compare_programs(preset: str, corpus: Path, size_bytes: int, work: Path, datatrove_python: str | None
                     ) -> None:
    """Pack the corpus with all programs and one tokenizer; print their costs, and whether the files are
    equal."""
    tokenizer, megatron = work / preset, work / f"megatron-{preset}"
    costs = {"Megatron-LM: encode_batch + IndexedDatasetBuilder": run_measured(
        [sys.executable, "-W", "ignore", "-c", MEGATRON, tokenizer, corpus, megatron], ONE_THREAD)}
    hashes = {"megatron": hash_shard(megatron)}
    if datatrove_python:
        folder = work / f"datatrove-{preset}"
        folder.mkdir()
        costs["datatrove: MegatronDocumentTokenizer"] = run_measured(
            [datatrove_python, "-c", DATATROVE, tokenizer, corpus, folder / "out"], ONE_THREAD)
        [index] = folder.rglob("*.idx")
        hashes["datatrove"] = hash_shard(index.with_suffix(""))
    for workers in (1, 2):
        output = work / f"ours-{preset}-{workers}"
        costs[f"sov-data pack --workers {workers}"] = run_measured(
            build_pack_command(tokenizer, corpus, output, workers), ONE_THREAD)
        hashes[f"ours-{workers}"] = hash_shard(output / "all/train-00000")
    slowest = next(iter(costs.values())).cpu_s
    print(f"\n{preset}, {VOCAB_SIZE:,} ids ({read_manifest(output).settings['encoder']})")
    print(f"{'':<52} {'CPU s':>8} {'MB/CPU s':>9} {'times':>6} {'wall s':>7} {'peak MiB':>9}")
    for name, cost in costs.items():
        rate = size_bytes / 1e6 / cost.cpu_s
        print(f"{name:<52} {cost.cpu_s:8.1f} {rate:9.2f} {slowest / cost.cpu_s:6.2f} {cost.wall_s:7.1f} "
              f"{cost.peak_bytes / 2**20:9.0f}")
    print(f".bin and .idx of all {len(hashes)} byte-identical: {len(set(hashes.values())) == 1}", flush=True)


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=40, help="text to pack (default %(default)s)")
    parser.add_argument("--input", action="append", type=Path,
                        help="text (default: this Python's library and packages); may be repeated")
    parser.add_argument("--datatrove-python", metavar="PYTHON",
                        help="interpreter with datatrove (default: datatrove does not run)")
    args = parser.parse_args()
    inputs = args.input or [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = work / "corpus/all.jsonl"
        size_bytes = write_corpus(corpus, inputs, round(args.megabytes * 1e6))
        write_corpus(work / "sample.jsonl", inputs, TRAIN_TOKENIZER_BYTES)
        print(f"{describe_machine()}\n{size_bytes / 1e6:.1f} MB of text", flush=True)
        for preset in PRESETS:
            run_measured([sys.executable, "-m", "tokenizer.cli", "train", "--preset", preset, "--vocab-size",
                          str(VOCAB_SIZE), "--input", work / "sample.jsonl", "--output", work / preset])
            compare_programs(preset, corpus, size_bytes, work, args.datatrove_python)


if __name__ == "__main__":
    main()
