"""Trained tokenizers on held-out text: bytes per token, and equality with SuperBPE's definition and tiktoken.

    python benchmarks/tokenizer_heldout.py --trained FOLDER [--authors FOLDER]

--trained is the --keep folder of benchmarks/tokenizer_train.py, with the tokenizers solar, plain, super and
published, and held-out text in held/<language>.jsonl. --authors is the folder tokenizer_json of
github.com/PythonNut/superbpe, with the tokenizers of SuperBPE's paper. The definition of SuperBPE has two
steps: split the text into words and encode them by the merges of stage 1; then apply the merges of stage 2 to
these tokens inside each unit of the final pattern. A naive loop here follows that definition.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from tokenizer_train import PAPER_SPLIT, PAPER_SUPERWORDS, PAPER_VOCAB_SIZE, describe_setup, iter_texts
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents import cut_text
from megatron_sov.base.documents.byte_bpe import byte_alphabet
from tokenizer.bpe.count_pipeline import ANYTHING
from tokenizer.bpe.segmenting import merge_parts
from tokenizer.bpe.splitter import Splitter
from tokenizer.formats import tiktoken_format
from tokenizer.presets import Preset

PARTS = ("steps", "ratios", "paper")
CHUNK_BYTES = 100_000
"""Documents are encoded in pieces of at most this size."""
IN_THE_PAPER = {200_000: 4.457, 180_000: 6.092, 160_000: 6.337, 80_000: 6.634}
"""Transition size -> bytes per token on 1 GB of the authors' text
(notebooks/superbpe_encoding_efficiency_analysis.ipynb)."""
PROSE_LINE_CHARS = 200
"""Lines with more characters count as prose. The authors train on web text, where a paragraph is one line; in
documentation only long lines are such paragraphs."""
AUTHORS_SUPER, AUTHORS_PLAIN = ("olmo2_p99_truncate_10G_{}K_extend_200K_mw4_colon",
                                "olmo2_p99_truncate_pretok_10G_200K")
Encode = Callable[[str], list[int]]


class TrainedTokenizer:
    """A tokenizer in a folder that `sov-tokenizer train` wrote, for `tokenizers` and tiktoken."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder, "tokenizer")
        self.name, self.transition_size = folder.name, manifest.settings["transition_size"]
        self.preset = Preset(**manifest.settings["preset"])
        self.raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.fast.encode_special_tokens = True
        self.ranks, rules = tiktoken_format.to_tiktoken(self.raw, self.name, {})
        self.by_tiktoken: Encode = tiktoken_format.build_encoder(self.ranks, rules)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts, by `tokenizers`."""
        return [e.ids for e in self.fast.encode_batch_fast(texts, add_special_tokens=False)]

    def build_two_step_encoder(self) -> Encode:
        """Return an encoder that follows the definition of SuperBPE literally."""
        stage_1 = {token: id_ for token, id_ in self.ranks.items() if id_ < self.transition_size}
        encode_word = tiktoken_format.build_encoding(
            stage_1, tiktoken_format.TiktokenRules(ANYTHING, {})).encode_ordinary
        words = Splitter(self.preset, self.preset.split_pattern)
        units = Splitter(self.preset, self.preset.final_pattern)
        spelling, vocab = byte_alphabet(), self.raw["model"]["vocab"]
        stage_2: dict[tuple[bytes, ...], int] = {}  # the two parts of a merge -> its token
        for left, right in self.raw["model"]["merges"]:
            id_ = vocab[left + right]
            if id_ >= self.transition_size:
                stage_2[tuple(bytes(spelling[c] for c in part) for part in (left, right))] = id_
        tokens = {id_: token for token, id_ in self.ranks.items()}
        cache: dict[tuple[str, ...], list[int]] = {}  # words of a unit -> its ids

        def encode(text: str) -> list[int]:
            text = words.normalize(text)
            next_words, ids = iter(words.split_text(text)), []
            for unit in units.split_text(text):
                unit_words, num_chars = [], 0
                while num_chars < len(unit):
                    unit_words.append(next(next_words))
                    num_chars += len(unit_words[-1])
                if num_chars > len(unit):
                    raise SystemExit(f"{self.name}: a word extends over the end of the unit {unit!r}")
                key = tuple(unit_words)
                if key not in cache:
                    parts = [tokens[id_] for word in unit_words for id_ in encode_word(word)]
                    merged = merge_parts(parts, lambda left, right: stage_2.get((left, right)))
                    cache[key] = [self.ranks[token] for token in merged]
                ids += cache[key]
            return ids

        return encode


def print_bytes_per_token(held: Path, plain: TrainedTokenizer, *others: TrainedTokenizer) -> None:
    """Print bytes per token of each language, and the saving of tokens against plain BPE of the same size."""
    num_ids = len(plain.ranks) + len(plain.raw["added_tokens"])
    print(f"\nbytes per token on held-out text, {num_ids:,} ids each; fewer: "
          "tokens, in %, against plain BPE\n"
          f"{'':<8} {'MB':>6} {'plain':>7}" + "".join(f" {t.name:>10} {'fewer':>6}" for t in others))
    total_bytes, totals = 0, [0] * (1 + len(others))
    for file in sorted(held.glob("*.jsonl")):
        texts = list(iter_texts(file))
        size_bytes = sum(len(t.encode()) for t in texts)
        counts = [sum(map(len, t.encode(texts))) for t in (plain, *others)]
        total_bytes, totals = total_bytes + size_bytes, [a + b for a, b in zip(totals, counts, strict=True)]
        print_ratios(file.stem, size_bytes, counts)
    print_ratios("all", total_bytes, totals)


def print_ratios(name: str, size_bytes: int, counts: list[int]) -> None:
    """Print a line with the bytes per token of each tokenizer and its saving of tokens against the first."""
    if size_bytes:
        print(f"{name:<8} {size_bytes / 1e6:6.2f} {size_bytes / counts[0]:7.3f}" + "".join(
            f" {size_bytes / count:10.3f} {100 * (1 - count / counts[0]):6.1f}" for count in counts[1:]),
              flush=True)


def compare_with_paper(trained: Path, authors: Path | None) -> None:
    """Print bytes per token of English for tokenizers trained as in SuperBPE's paper, and for the tokenizers
    of its authors."""
    documents = cut_first_texts(trained / "held/en.jsonl", float("inf"))
    prose = [line for text in documents for line in text.splitlines(keepends=True)
             if len(line) > PROSE_LINE_CHARS]
    ours = {}
    for folder in trained.glob("paper-*"):
        tokenizer = TrainedTokenizer(folder)
        ours[tokenizer.transition_size] = tokenizer.fast
    theirs = {size: load_authors_tokenizer(authors, size) for size in IN_THE_PAPER} if authors else {}
    columns = {"published": IN_THE_PAPER}
    for suffix, texts in (("", documents), (", prose", prose)):
        size_bytes = sum(len(text.encode()) for text in texts)
        for side, tokenizers in (("ours", ours), ("theirs", theirs)):
            columns[side + suffix] = {}
            for size, fast in tokenizers.items():
                encodings = fast.encode_batch_fast(texts, add_special_tokens=False)
                columns[side + suffix][size] = size_bytes / sum(len(encoding.ids) for encoding in encodings)
        title = f"prose, lines of more than {PROSE_LINE_CHARS} characters" if suffix else "held-out English"
        print(f"{title}: {size_bytes / 1e6:.2f} MB")
    print("\nSuperBPE as in its paper, English, 200,000 ids: bytes per token, "
          "and tokens fewer than plain BPE in %\n"
          f"published: theirs on 1 GB of their own held-out text\n{'':<23} "
          + " ".join(f"{name:>16}" for name in columns))
    for size in IN_THE_PAPER:
        cells = (f"{by[size]:8.3f} {100 * (1 - by[PAPER_VOCAB_SIZE] / by[size]):6.1f}%" if size in by else ""
                 for by in columns.values())
        print(f"transition size {size:7,} " + " ".join(f"{cell:>16}" for cell in cells), flush=True)


def load_authors_tokenizer(folder: Path, transition_size: int) -> Tokenizer:
    """Return a tokenizer of the paper from its files of tokens and merges."""
    plain = transition_size == PAPER_VOCAB_SIZE
    files = folder / (AUTHORS_PLAIN if plain else AUTHORS_SUPER.format(transition_size // 1000))
    tokenizer = Tokenizer(models.BPE.from_file(str(files / "vocab.json"), str(files / "merges.txt")))
    split = pre_tokenizers.Split(Regex(PAPER_SPLIT if plain else PAPER_SUPERWORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def cut_first_texts(file: Path, max_bytes: float) -> list[str]:
    """Return documents of a file, cut to pieces of at most CHUNK_BYTES, until `max_bytes` are reached."""
    texts: list[str] = []
    for text in iter_texts(file):
        for piece in cut_text(text, CHUNK_BYTES):
            if max_bytes <= 0:
                return texts
            texts.append(piece)
            max_bytes -= len(piece.encode())
    return texts


def compare_segmentation(held: Path, trained: TrainedTokenizer, max_bytes: float) -> None:
    """Print for each language the number of documents to which the two-step definition or tiktoken gives
    other ids than `tokenizers`, or whose decoded text differs."""
    encode = trained.build_two_step_encoder()
    print(f"\n{trained.name}: documents in which tokens differ from those of `tokenizers`\n"
          f"{'':<8} {'documents':>9} {'MB':>9} {'tokens':>9} {'two steps':>9} {'tiktoken':>9} {'decoded':>9}")
    totals = [0] * 6
    for file in sorted(held.glob("*.jsonl")):
        texts = cut_first_texts(file, max_bytes)
        ids = trained.encode(texts)
        normalize = trained.fast.normalizer.normalize_str if trained.fast.normalizer else str
        decoded = trained.fast.decode_batch(ids, skip_special_tokens=False)
        counts = [len(texts), sum(len(text.encode()) for text in texts), sum(map(len, ids)),
                  sum(encode(text) != text_ids for text, text_ids in zip(texts, ids, strict=True)),
                  sum(trained.by_tiktoken(text) != text_ids
                      for text, text_ids in zip(texts, ids, strict=True)),
                  sum(normalize(text) != text_back for text, text_back in zip(texts, decoded, strict=True))]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        print_counts(file.stem, counts)
    print_counts("all", totals)


def print_counts(name: str, counts: list[int]) -> None:
    """Print a line with documents, megabytes, tokens and the three counts of differences."""
    print(f"{name:<8} {counts[0]:9,} {counts[1] / 1e6:9.2f} " + " ".join(f"{n:9,}" for n in counts[2:]),
          flush=True)


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trained", required=True, type=Path,
                        help="--keep folder of benchmarks/tokenizer_train.py")
    parser.add_argument("--authors", type=Path, metavar="FOLDER", help="tokenizers of SuperBPE's paper")
    parser.add_argument("--steps-mb", type=float, default=float("inf"),
                        help="text of each language for the part `steps`, in MB (default: all text)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    print(describe_setup(), flush=True)
    superwords = [folder for name in ("super", "published") if (folder := args.trained / name).exists()]
    if "steps" in args.parts:
        for folder in superwords:
            compare_segmentation(args.trained / "held", TrainedTokenizer(folder), 1e6 * args.steps_mb)
    if "ratios" in args.parts:
        folders = [args.trained / "plain", *superwords]
        print_bytes_per_token(args.trained / "held", *map(TrainedTokenizer, folders))
    if "paper" in args.parts:
        compare_with_paper(args.trained, args.authors)


if __name__ == "__main__":
    main()
