"""What pages, PDFs and the search for near duplicates cost in an older tree and in this one, side by side.

    python benchmarks/data_speed.py --before CHECKOUT --docs DEBS_UNPACKED [--repetitions 3] [--output FILE]

CHECKOUT is an older tree of this repository; DEBS_UNPACKED is that of benchmarks/extraction.py.  The trees
take turns, each time in a process of its own; the least CPU seconds of the repetitions count, since what else
the machine does can only add to them.  What comes out is hashed: a tree that is faster has to find the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARDS, DOCUMENTS = 100, 300
PDFS = ("debian-policy/**/policy.pdf.gz", "debian-faq/**/debian-faq.en.pdf.gz", "r-doc-pdf/**/R-ints.pdf",
        "developers-reference/**/developers-reference.pdf")


def html(docs: Path) -> tuple[float, str]:
    """Return CPU seconds of the pages of the extraction benchmark, and a hash of their text."""
    from benchmarks.extraction import html_cases
    from data_prep.curate.sources.encodings import decode_page
    from data_prep.curate.sources.html import page_text

    return _timed(lambda raw: page_text(decode_page(raw)), [c.file.read_bytes() for c in html_cases(docs)])


def pdf(docs: Path) -> tuple[float, str]:
    """Return CPU seconds of four books, and a hash of their text."""
    from benchmarks import extraction

    files = [next(iter(sorted(docs.glob(pattern)))) for pattern in PDFS]
    return _timed(extraction._ours_pdf, [extraction._raw(file) for file in files])


def minhash(_: Path) -> tuple[float, str]:
    """Return CPU seconds of all passes, and a hash of what is dropped."""
    from benchmarks import dedup

    with tempfile.TemporaryDirectory() as name:
        view = dedup.FolderView(Path(name) / "in", Path(name) / "work")
        view.folder.mkdir()
        for number in range(SHARDS):
            draw = random.Random(number)
            texts = [dedup.text(draw if draw.random() > 0.2 else random.Random(draw.randrange(500)), 150)
                     for _ in range(DOCUMENTS)]
            (view.folder / f"{number}.jsonl").write_text(
                "".join(json.dumps(" ".join(words)) + "\n" for words in texts))
        step = dedup.MinhashDedup(dedup.MinhashSettings())
        dedup.run_passes(step, dedup.FolderView(dedup._one(Path(name)), Path(name) / "warm-work"))
        began = time.process_time()
        dedup.run_passes(step, view)
        taken = time.process_time() - began
        dropped = hashlib.sha256()
        for file in sorted((view.work / "dropped").rglob("*")):
            dropped.update(file.read_bytes() if file.is_file() else b"")
        return taken, dropped.hexdigest()


def _timed(action: Callable[[bytes], object], raws: list[bytes]) -> tuple[float, str]:
    action(raws[0])
    began = time.process_time()
    found = [action(raw) for raw in raws]
    taken = time.process_time() - began
    return taken, hashlib.sha256(repr(found).encode()).hexdigest()


PARTS = {"html": html, "pdf": pdf, "minhash": minhash}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:  # in a process of its own, with the tree that PYTHONPATH names
        print(json.dumps(PARTS[args.part](args.docs)))
        return
    lines = [f"data: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
             f"{platform.python_version()}; CPU seconds, the least of {args.repetitions} interleaved", "",
             f"{'part':10}{'before':>9}{'now':>9}{'ratio':>8}  outcome"]
    for part in PARTS:
        found: dict[Path, list[tuple[float, str]]] = {args.before: [], ROOT: []}
        for _ in range(args.repetitions):
            for tree, runs in found.items():
                program = f"import sys; sys.path.insert(0, {str(tree)!r}); sys.argv[0] = 'x'\n" \
                          f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
                done = subprocess.run([sys.executable, "-c", program, "--before", str(args.before), "--docs",
                                       str(args.docs), "--part", part], check=True, text=True, cwd=tree,
                                      stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
                runs.append(tuple(json.loads(done.stdout)))
        before, now = (min(seconds for seconds, _ in runs) for runs in found.values())
        same = len({outcome for runs in found.values() for _, outcome in runs}) == 1
        lines.append(f"{part:10}{before:9.2f}{now:9.2f}{before / now:7.2f}x  "
                     f"{'the same' if same else 'OTHER'}")
        print(lines[-1], flush=True)
    lines += ["", f"html: 50 pages, pdf: 461 pages, minhash: exact, {SHARDS} shards of {DOCUMENTS} documents"]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
