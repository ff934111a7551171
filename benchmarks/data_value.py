"""What filtering and levels are worth: models of one recipe on raw text, on what rules alone keep, and on
filtered, and filtered and levelled text.

    python benchmarks/data_value.py --work FOLDER --docs FOLDER [--seeds 0 1 2] [--steps 400]
                                    [--variants raw rules ...]
    python benchmarks/data_value.py --work FOLDER --print

raw        pages of English documentation with all their navigation and indices, and as much planted junk
           again: lines repeated with a running number, server logs, base64 and hex, and Korean, Japanese and
           German pages whose UTF-8 was read as Latin-1, a quarter of the documents each
rules      what the steps `language` (English) and `rules` keep by default: no label and no trained score
filtered   what the step `quality` keeps at 0.5
levelled   of that, what the step `level` calls L2 or L3: the better half by the step `education`

The two scorers are trained on labels of other packages and of junk made with other chance numbers.  The
labels are stand-ins: prose is the share of a page's text in paragraphs of at least 100 characters, which the
markup says and the text does not.  Models are judged by bits per byte on paragraphs of handbooks that neither
they nor the scorers have seen.  All read the same number of tokens of one tokenizer, each token at most once,
and differ in the text alone.

A run that is complete is not run again and one that was killed goes on, so seeds may be done side by side.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from documentation_pages import Page, pages
from seed_runs import run
from seeds import over_seeds

from data_prep.curate.pipeline.step import Doc, ShardRef, Step, step_class

RAW = ("python3.11-doc", "python-django-doc", "sqlite3-doc", "postgresql-doc-15", "fp-docs-3.2.2",
       "python-pandas-doc", "libreoffice-help-en-us", "gimp-help-en", "kicad-doc-en", "linuxcnc-doc-en")
LABELLED = ("git-doc", "debian-policy", "aptitude-doc-en", "nginx-doc", "r-doc-html",
            "installation-guide-amd64")
PROSE = ("debian-handbook", "developers-reference", "debian-reference-en", "maint-guide", "debian-faq",
         "debian-edu-doc-en")
GARBLED = ("gimp-help-ko", "libreoffice-help-ja", "libreoffice-help-de")
VARIANTS = ("raw", "rules", "filtered", "levelled")
DOCUMENT_CHARS = 6_000
RAW_CHARS, PROSE_BYTES, NUM_LABELS = 8_000_000, 400_000, 1_200
VOCAB_SIZE, SEQ_LEN, BATCH = 2048, 128, 16
MODEL = (f"model.vocab_size={VOCAB_SIZE}", "model.hidden_size=64", "model.num_layers=3", "model.num_heads=4",
         "model.num_kv_heads=2", "model.head_dim=16", "model.dense_ffn_dim=192")
ALWAYS = ("train.num_threads=1", "train.checkpoint_every_steps=100000", "train.eval_every_steps=0",
          f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "data.max_epochs=1",
          f'data.phases=[{{"name": "main", "seq_len": {SEQ_LEN}}}]')


def junk(rng: random.Random, found: Sequence[Page], garbled: Sequence[Page], count: int) -> Iterator[str]:
    """Yield planted junk, its sorts in turn."""
    for i in range(count):
        sort = i % 4
        if sort == 0:
            line = rng.choice(rng.choice(found).text.splitlines())[:80]
            yield "\n".join(f"{line} ({n})" for n in range(rng.randrange(40, 120)))
        elif sort == 1:
            paths = [f"/{rng.choice(['img', 'api', 'static'])}/{rng.randrange(10**6)}" for _ in range(4)]
            yield "\n".join(
                f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)} - - "
                f"[{rng.randrange(1, 29):02d}/Nov/2025:{rng.randrange(24):02d}:"
                f"{rng.randrange(60):02d}:{rng.randrange(60):02d} +0000] "
                f"\"GET {rng.choice(paths)} HTTP/1.1\" {rng.choice([200, 304, 404])} {rng.randrange(9999)}"
                for _ in range(60))
        elif sort == 2:
            raw = rng.randbytes(2_500)
            yield (base64.encodebytes(raw).decode() if rng.random() < 0.5
                   else "\n".join(raw[j:j + 24].hex(" ") for j in range(0, len(raw), 24)))
        else:
            yield rng.choice(garbled).text[:1_500].encode().decode("latin-1")


def pieces(found: Iterator[Page], num_chars: int, language: str = "en") -> list[Page]:
    """Return pages of one language, cut, until there is enough."""
    taken, size = [], 0
    for page in found:
        if page.language == language:
            taken.append(page)
            size += min(len(page.text), DOCUMENT_CHARS)
            if size > num_chars:
                break
    return taken


def write_texts(file: Path, texts: Sequence[str]) -> None:
    """Write texts as JSONL."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


class Memory:
    """What the steps see: one shard, in memory."""

    def __init__(self, documents: list[Doc], work: Path) -> None:
        self.shards = [ShardRef("pages", 0)]
        self.work = work
        self._documents = documents
        work.mkdir(parents=True, exist_ok=True)

    def documents(self, shard: ShardRef) -> Iterator[list[Doc]]:
        """Yield all documents."""
        yield self._documents

    def priority(self, source: str) -> int:
        """Return 0."""
        return 0


def apply(kind: str, settings: Mapping[str, Any], documents: list[Doc], work: Path) -> list[Doc]:
    """Return what a step makes of documents."""
    made = step_class(kind)
    step: Step = made(made.Settings(**settings))
    view = Memory(documents, work / kind)
    for step_pass in step.passes():
        for task in range(step_pass.num_tasks or 1):
            step_pass.run(view, task)
    step.start(view)
    return [Doc(d.id, d.text if o.text is None else o.text, d.source, d.shard, d.row,
                {**d.columns, **o.values})
            for d, o in zip(documents, step.outcomes(documents), strict=True) if not o.reason]


def write_labels(work: Path, rng: random.Random, docs: Path) -> None:
    """Write labels of other packages and other junk."""
    found = pieces(pages(docs, list(LABELLED), 300), 10**9)
    rng.shuffle(found)
    found = found[:NUM_LABELS // 2]
    rows = [(page.text[:DOCUMENT_CHARS], page.prose) for page in found]
    garbled = list(pages(docs, ["linuxcnc-doc-fr", "kicad-doc-ja", "debian-faq-ko"], 40))
    rows += [(text, 0.0) for text in junk(rng, found, garbled, NUM_LABELS // 2)]
    with open(work / "quality.jsonl", "w") as quality, open(work / "education.jsonl", "w") as education:
        for text, prose in rows:
            education.write(json.dumps({"text": text, "label": round(5 * prose, 2)}) + "\n")
            if not 0.1 <= prose < 0.3:  # what is neither is no example
                quality.write(json.dumps({"text": text, "label": int(prose >= 0.3)}) + "\n")


def make_data(work: Path, docs: Path) -> None:
    """Make the texts of each variant, one tokenizer, and token shards."""
    if (work / "data.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    rng, log = random.Random(0), work / "log"
    write_labels(work, rng, docs)
    for name, kind in (("quality", "classifier"), ("education", "regressor")):
        run(log, "data_prep.cli", "scorer", "train", "--labels", work / f"{name}.jsonl", "--kind", kind,
            "--output", work / f"{name}-model", "--overwrite")
    found = pieces(pages(docs, list(RAW), 250), RAW_CHARS)
    garbled = list(pages(docs, list(GARBLED), 60))
    texts = [("page", page.text[:DOCUMENT_CHARS]) for page in found]
    bad, size = [], 0
    for i, text in enumerate(junk(rng, found, garbled, 10**6)):
        bad.append((("repeated", "logs", "machine", "garbled")[i % 4], text))
        size += len(text)
        if size > sum(len(text) for _, text in texts):
            break
    texts += bad
    rng.shuffle(texts)
    documents = [Doc(f"pages:0:{row:016x}", text, "pages", 0, row, {"sort": sort})
                 for row, (sort, text) in enumerate(texts)]
    by_rules = apply("rules", {}, apply("language", {"keep": ("en",)}, documents, work), work)
    filtered = apply("quality", {"model": work / "quality-model", "min_score": 0.5}, documents, work)
    graded = apply("education", {"model": work / "education-model"}, filtered, work)
    levelled = [d for d in apply("level", {"per": ""}, graded, work) if d.columns["level"] in ("L2", "L3")]
    prose, size = [], 0
    for page in pages(docs, list(PROSE), 400):
        if page.language == "en" and len(page.paragraphs) >= 3:
            prose.append("\n\n".join(page.paragraphs))
            size += len(prose[-1].encode())
            if size > PROSE_BYTES:
                break
    write_texts(work / "prose.jsonl", prose)
    for name, kept in zip(VARIANTS, (documents, by_rules, filtered, levelled), strict=True):
        write_texts(work / f"{name}.jsonl", [d.text for d in kept])
    run(log, "tokenizer.cli", "train", "--preset", "k-exaone", "--vocab-size", str(VOCAB_SIZE), "--input",
        work / "raw.jsonl", "--output", work / "tokenizer", "--overwrite")
    for name, share in (*((name, "0") for name in VARIANTS), ("prose", "0.95")):
        run(log, "data_prep.cli", "pack", "--tokenizer", work / "tokenizer", "--heldout", share,
            "--workers", "1", "--input", work / f"{name}.jsonl", "--output", work / f"{name}-shards",
            "--overwrite")
    (work / "data.json").write_text(json.dumps({
        name: {"documents": len(kept), "characters": sum(len(d.text) for d in kept),
               "sorts": Counter(d.columns["sort"] for d in kept)}
        for name, kept in zip(VARIANTS, (documents, by_rules, filtered, levelled), strict=True)}))


def train(work: Path, variant: str, seed: int, steps: int) -> None:
    """Train and judge a model, unless it is done."""
    folder = work / f"{variant}-{steps}-seed-{seed}"
    out = work / f"{folder.name}.json"
    if out.exists():
        return
    log = work / f"{folder.name}.log"
    if not (folder / "complete.json").exists():
        settings = [*MODEL, *ALWAYS, f"train.steps={steps}", f"train.seed={seed}"]
        run(log, "megatron_sov", "pretrain", "tiny-qwen3-4b", "--data", work / f"{variant}-shards", "--run",
            folder, "--resume", *(part for setting in settings for part in ("--set", setting)))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_sov", "eval", "ppl", folder, "--data",
         work / "prose-shards", "--seq-len", str(SEQ_LEN), "--max-tokens", "150000", "--json"],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    out.write_text(found)


def report(work: Path, steps: int) -> None:
    """Print what there is."""
    data = json.loads((work / "data.json").read_text())
    tokens = steps * BATCH * SEQ_LEN
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; {steps} steps, {tokens:,} tokens for every model")
    figures: dict[str, dict[int, float]] = {}
    for name in VARIANTS:
        sorts = ", ".join(f"{n} {sort}" for sort, n in sorted(data[name]["sorts"].items()))
        print(f"  {name:9} {data[name]['documents']:6,} documents, {data[name]['characters'] / 1e6:5.1f} "
              f"million characters ({sorts})")
        for file in sorted(work.glob(f"{name}-{steps}-seed-*.json")):
            (value,) = json.loads(file.read_text()).values()
            figures.setdefault(name, {})[int(file.stem.rpartition("-")[2])] = value["bits_per_byte"]
    print("bits per byte on held-out prose (less is better); behind it the differences from raw and from "
          "rules, seed by seed")
    for name, found in figures.items():
        gained = ""
        for other in VARIANTS[:2]:
            gains = [value - figures[other][seed] for seed, value in found.items()
                     if name != other and seed in figures.get(other, {})]
            gained += f"{over_seeds(gains, '+.4f') if gains else '':18} "
        each = ", ".join(f"{seed}: {value:.4f}" for seed, value in sorted(found.items()))
        print(f"  {name:9} {over_seeds(list(found.values()), '.4f')}   {gained}seeds {each}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="Measure what filtering and levels are worth.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", type=Path, help="folder of unpacked documentation packages")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--print", dest="only_print", action="store_true")
    args = parser.parse_args()
    if not args.only_print:
        make_data(args.work, args.docs)
        for seed in args.seeds:
            for variant in args.variants:
                train(args.work, variant, seed, args.steps)
    report(args.work, args.steps)


if __name__ == "__main__":
    main()
