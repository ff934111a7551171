"""Near-duplicate removal: precision and recall compared with datasketch and rensa; memory, time and speed at
ten times the shards.

    python benchmarks/dedup.py [--shards 4] [--documents 1000] [--others FOLDER]

The reference is the exact Jaccard similarity of the shingle sets of all pairs of planted documents; a tool
must find all pairs of at least `THRESHOLD`. `--others` is a folder with datasketch and rensa (`pip install
--target FOLDER datasketch rensa`), which are not dependencies. Memory is the peak of a process that runs all
tasks of all passes one after another over documents on disk.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from measurement import describe_machine, read_peak_bytes

from data_prep.curate.dedup.exact import ExactDedup, ExactSettings
from data_prep.curate.dedup.minhash import MinhashDedup, MinhashSettings
from data_prep.curate.pipeline.step import Doc, ShardRef, Step

THRESHOLD = 0.8
SHINGLE_WORDS = 5
SIMILARITIES = (0.95, 0.9, 0.85, 0.82, 0.78, 0.75, 0.7, 0.6, 0.5)
Pairs = set[tuple[int, int]]


@dataclass(frozen=True)
class FolderView:
    """The view that a pipeline gives its steps, here of a folder with one JSONL file per shard."""

    folder: Path
    work_folder: Path

    @property
    def shards(self) -> list[ShardRef]:
        """All shards."""
        return [ShardRef("web", number) for number in range(len(list(self.folder.glob("*.jsonl"))))]

    def iter_documents(self, shard: ShardRef) -> Iterator[Doc]:
        """Yield the documents of a shard."""
        with open(self.folder / f"{shard.number}.jsonl") as f:
            for row, line in enumerate(f):
                yield Doc(f"web:{shard.number}:{row:016x}", json.loads(line), "web", shard.number, row)

    def get_priority(self, source: str) -> int:
        """Return the same priority for all sources."""
        return 0


def draw_words(draw: random.Random, count: int) -> list[str]:
    """Draw `count` words from a Pareto distribution, which resembles the frequencies of words in text."""
    return [f"w{int(draw.paretovariate(0.8)) % 50_000}" for _ in range(count)]


def copy_with_changes(words: list[str], similarity: float, draw: random.Random) -> list[str]:
    """Return a copy of `words` whose shingle set has about the Jaccard similarity `similarity` to the
    original."""
    # a replaced word changes SHINGLE_WORDS shingles; with c of n changed, the similarity is (n - c) / (n + c)
    changed = len(words) * (1 - similarity) / (1 + similarity) / SHINGLE_WORDS
    result = list(words)
    for place in draw.sample(range(len(words)), max(1, round(changed))):
        result[place] = f"x{draw.randrange(10**6)}"
    return result


def draw_near_copies(num_groups: int) -> list[list[str]]:
    """Return `num_groups` random documents, each followed by a near copy of it."""
    draw = random.Random(0)
    documents = []
    for number in range(num_groups):
        words = draw_words(draw, draw.randrange(100, 500))
        documents += [words, copy_with_changes(words, SIMILARITIES[number % len(SIMILARITIES)], draw)]
    return documents


def build_shingles(words: list[str]) -> frozenset[tuple[str, ...]]:
    """Return the set of all runs of SHINGLE_WORDS words."""
    return frozenset(tuple(words[i:i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1))


def compute_similarities(documents: list[list[str]]) -> dict[tuple[int, int], float]:
    """Return (i, j) -> Jaccard similarity for all pairs of documents with a common shingle."""
    sets = [build_shingles(words) for words in documents]
    return {(i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
            for i, j in combinations(range(len(sets)), 2) if not sets[i].isdisjoint(sets[j])}


def run_passes(step: Step, view: FolderView) -> None:
    """Run all tasks of all passes of a step."""
    for step_pass in step.list_passes():
        for task in range(len(view.shards) if step_pass.num_tasks is None else step_pass.num_tasks):
            step_pass.run(view, task)


def find_pairs(documents: list[list[str]]) -> Pairs:
    """Return the pairs (smaller index first) of a removed document and the document that it duplicates."""
    with tempfile.TemporaryDirectory() as folder:
        view = FolderView(Path(folder) / "in", Path(folder) / "work")
        write_shards(view.folder, [" ".join(words) for words in documents], 250)
        step = MinhashDedup(MinhashSettings(threshold=THRESHOLD, ngram=SHINGLE_WORDS, partitions=4))
        run_passes(step, view)
        step.load_inputs(view)
        pairs: Pairs = set()
        for shard in view.shards:
            for document in view.iter_documents(shard):
                outcome = step.judge_document(document)
                if outcome.reason:
                    _, number, row = str(outcome.values["duplicate_of"]).split(":")
                    first, second = sorted([document.shard * 250 + document.row,
                                            int(number) * 250 + int(row, 16)])
                    pairs.add((first, second))
    return pairs


def find_pairs_by_datasketch(documents: list[list[str]]) -> Pairs:
    """Return the pairs that datasketch's index finds, at 120 permutations."""
    from datasketch import MinHash, MinHashLSH

    index, pairs = MinHashLSH(threshold=THRESHOLD, num_perm=120), set()
    for number, words in enumerate(documents):
        min_hash = MinHash(num_perm=120)
        min_hash.update_batch([" ".join(shingle).encode() for shingle in build_shingles(words)])
        pairs |= {(int(earlier), number) for earlier in index.query(min_hash)}
        index.insert(str(number), min_hash)
    return pairs


def find_pairs_by_rensa(documents: list[list[str]]) -> Pairs:
    """Return the pairs that rensa's index finds, at 120 permutations in 20 bands."""
    from rensa import RMinHash, RMinHashLSH

    index, pairs = RMinHashLSH(threshold=THRESHOLD, num_perm=120, num_bands=20), set()
    for number, words in enumerate(documents):
        min_hash = RMinHash(num_perm=120, seed=42)
        min_hash.update([" ".join(shingle) for shingle in sorted(build_shingles(words))])
        pairs |= {(int(earlier), number) for earlier in index.query(min_hash)}
        index.insert(number, min_hash)
    return pairs


def write_shards(folder: Path, texts: list[str], size: int) -> None:
    """Write texts as JSONL shards of `size` documents."""
    folder.mkdir(parents=True)
    for number in range(0, len(texts), size):
        (folder / f"{number // size}.jsonl").write_text(
            "".join(json.dumps(text) + "\n" for text in texts[number:number + size]))


def print_quality(num_groups: int) -> None:
    """Print precision, and recall per similarity, of all tools on `num_groups` planted pairs."""
    documents = draw_near_copies(num_groups)
    similar = compute_similarities(documents)
    expected = {pair for pair, value in similar.items() if value >= THRESHOLD}
    print(f"{len(documents)} documents, {len(expected)} pairs at {THRESHOLD} and above")
    tools: dict[str, Callable[[list[list[str]]], Pairs]] = {
        "ours": find_pairs, "datasketch": find_pairs_by_datasketch, "rensa": find_pairs_by_rensa}
    for name, tool in tools.items():
        begin_s = time.process_time()
        try:
            result = tool(documents)
        except ImportError as e:
            print(f"{name:16} {e}")
            continue
        bins: Counter[float] = Counter()
        hits: Counter[float] = Counter()
        for pair, value in similar.items():
            if value >= 0.5:
                bins[int(value * 20) / 20] += 1
                hits[int(value * 20) / 20] += pair in result
        right = len(result & expected)
        print(f"{name:16} precision {right / max(len(result), 1):.3f}, recall {right / len(expected):.3f}, "
              f"{time.process_time() - begin_s:.1f} CPU s; found at "
              + ", ".join(f"{low:.2f}: {hits[low]}/{bins[low]}" for low in sorted(bins)))


def measure_step(kind: str, num_shards: int, num_documents: int,
                 results: "multiprocessing.Queue[tuple[float, ...]]") -> None:
    """Run a step on generated shards; put (peak MiB before, peak MiB after, CPU seconds, MB of text) into
    `results`."""
    steps: dict[str, Step] = {
        "exact_dedup": ExactDedup(ExactSettings()), "minhash_dedup": MinhashDedup(MinhashSettings())}
    step = steps[kind]
    with tempfile.TemporaryDirectory() as folder:
        view = FolderView(Path(folder) / "in", Path(folder) / "work")
        view.folder.mkdir()
        size = 0
        for number in range(num_shards):
            draw = random.Random(number)
            with open(view.folder / f"{number}.jsonl", "w") as f:
                for _ in range(num_documents):
                    # a fifth of the documents are copies of one of 500
                    source = draw if draw.random() > 0.2 else random.Random(draw.randrange(500))
                    words = draw_words(source, 150)
                    lines = [" ".join(words[i:i + 15]) for i in range(0, 150, 15)]
                    f.write(json.dumps("\n".join(lines)) + "\n")
            size += (view.folder / f"{number}.jsonl").stat().st_size
        # a small shard first, so that imports and compilation are not measured
        write_shards(Path(folder) / "warm", ["a b c d e f g"] * 3, 3)
        run_passes(type(step)(step.settings), FolderView(Path(folder) / "warm", Path(folder) / "warm-work"))
        begin_bytes, begin_s = read_peak_bytes(), time.process_time()
        run_passes(step, view)
        cpu_s = time.process_time() - begin_s
        results.put((begin_bytes / 2**20, read_peak_bytes() / 2**20, cpu_s, size / 1e6))


def print_scaling(num_shards: int, num_documents: int) -> None:
    """Print memory and speed of the steps at `num_shards` shards and at ten times as many."""
    context = multiprocessing.get_context("spawn")
    for kind in ("exact_dedup", "minhash_dedup"):
        for count in (num_shards, 10 * num_shards):
            results: multiprocessing.Queue[tuple[float, ...]] = context.Queue()
            child = context.Process(target=measure_step, args=(kind, count, num_documents, results))
            child.start()
            begin_mib, peak_mib, cpu_s, size_mb = results.get()
            child.join()
            print(f"{kind:18} {count:4} shards, {size_mb:6.1f} MB: peak {peak_mib:5.0f} MiB ({begin_mib:.0f} "
                  f"at the start), {cpu_s:.1f} CPU s, {size_mb / cpu_s:.1f} MB/s and core over all passes")


def main() -> None:
    """Print quality and scaling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--documents", type=int, default=1000, help="documents of a shard")
    parser.add_argument("--groups", type=int, default=900, help="planted pairs")
    parser.add_argument("--others", type=Path, help="folder with datasketch and rensa")
    args = parser.parse_args()
    if args.others:
        sys.path.append(str(args.others))
    print(describe_machine())
    print_quality(args.groups)
    print_scaling(args.shards, args.documents)


if __name__ == "__main__":
    main()
