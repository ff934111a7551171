"""How much of a document's text our readers keep, and how much of what stands around it, beside other tools.

    python benchmarks/extraction.py DEBS_UNPACKED [--tools-site DIR] [--output FILE]

DEBS_UNPACKED has a folder for each Debian documentation package (`dpkg-deb -x PACKAGE.deb FOLDER/PACKAGE`).
The reference of a page is the source that its package ships (reStructuredText, AsciiDoc), that of a PDF the
plain text of the same book, or where there is none the text of its HTML.  Markup of the sources is taken off
by a few rules, so that no tool can reach 100 %.

A unit is a word, and of Chinese and Japanese a character; recall is the share of the reference's runs of 4
units that the output has (each as often as it occurs in both), precision the share of the output's runs that
the reference has.  Our reader of pages stands on resiliparse, which is measured alone too.  The other tools
(trafilatura, pdfminer.six, pypdf) are no dependencies: they are imported from --tools-site, and left out
without it.  Fences of code are no text, of any tool.  Times are processor seconds of one
process.

With --pages N only N pages from the middle of each PDF are read; what of the reference stands on them is then
what all tools together find of it (pooled recall).
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data_prep.curate.sources.encodings import decode_page
from data_prep.curate.sources.html import page_text
from data_prep.curate.sources.pdf_layout import PdfOptions, pdf_document
from data_prep.curate.sources.reader import ReadingJob
from data_prep.curate.sources.source import SourcePiece

UNIT = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
RUN_UNITS = 4
MAX_PDF_BYTES = 6_000_000
LEAST_PAGES = 10
"""Some packages have PDFs of one page, which say that the book could not be made."""
HTML_SETS = (
    ("python3.11-doc/usr/share/doc/python3.11/html", "_sources/{}.rst.txt", "library/[a-m]*.html", 12),
    ("python3.11-doc/usr/share/doc/python3.11/html", "_sources/{}.rst.txt", "howto/*.html", 7),
    ("python-pandas-doc/usr/share/doc/python-pandas-doc/html", "_sources/{}.rst.txt", "user_guide/*.html", 9),
    ("debian-policy/usr/share/doc/debian-policy/policy.html", "_sources/{}.rst.txt", "ch-*.html", 7),
    ("git-doc/usr/share/doc/git/html", "{}.txt", "git-[a-r]*.html", 15),
)
"""Folder, the source of a page there, pages, and how many of them, evenly spread."""
PDF_BOOKS = ("maint-guide", "developers-reference", "debian-faq", "debian-reference", "debian-policy",
             "r-doc-pdf", "debian-edu-doc", "bash-doc", "udo-doc")


@dataclass(frozen=True)
class Case:
    """A file with its reference text."""

    file: Path
    reference: str


@dataclass
class Score:
    """What a tool did with all cases."""

    recall: float = 0.0
    precision: float = 0.0
    seconds: float = 0.0
    failed: int = 0


def runs(text: str) -> Counter[tuple[str, ...]]:
    """Return the runs of units of a text."""
    units = UNIT.findall(re.sub(r"^(?:```|~~~~).*$", "", text, flags=re.MULTILINE).lower())
    return Counter(zip(*(units[i:] for i in range(RUN_UNITS)), strict=False))


def plain_source(text: str) -> str:
    """Return reStructuredText or AsciiDoc without marks that no reader sees."""
    text = re.sub(r":[\w:.+-]+:`~?!?([^`<]*?)\s*(?:<[^>]*>)?`", r"\1", text)
    text = re.sub(r"^\.\. (?:index|_|highlight|toctree|currentmodule|meta|ipython|only|module)[^\n]*"
                  r"(?:\n[ \t]+:?[^\n]*)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.\. [\w:-]+::|^\s*:[\w-]+:\s*$|^(?:ifdef|ifndef|endif|include)::.*$|"
                  r"^\[\[.*\]\]$", "", text, flags=re.MULTILINE)
    text = re.sub(r"linkgit:([\w-]+)\[(\d)\]", r"\1 \2", text)
    return re.sub(r"<<[^,>]*,([^>]*)>>", r"\1", text)


def html_cases(root: Path) -> list[Case]:
    """Return the pages that packages ship with their source."""
    cases = []
    for folder, source, pattern, wanted in HTML_SETS:
        base = root / folder
        pairs = [(page, base / source.format(page.relative_to(base).with_suffix("")))
                 for page in sorted(base.glob(pattern))]
        pairs = [(page, text) for page, text in pairs
                 if text.is_file() and not page.is_symlink() and text.stat().st_size > 3000]
        step = max(len(pairs) // wanted, 1)
        cases += [Case(page, plain_source(text.read_text(encoding="utf-8")))
                  for page, text in pairs[::step][:wanted]]
    return cases


def pdf_cases(root: Path, most: int = 50) -> list[Case]:
    """Return the PDFs that packages ship with their text."""
    cases, seen = [], set()
    for file in sorted([*root.glob("*/**/*.pdf"), *root.glob("*/**/*.pdf.gz")]):
        package = file.relative_to(root).parts[0]
        reference = _book_text(root, package, file)
        if not package.startswith(PDF_BOOKS) or not reference or len(reference) < 3000:
            continue
        if file.is_symlink() or file.stat().st_size > MAX_PDF_BYTES or (key := hash(reference)) in seen:
            continue
        if num_pages(_raw(file)) < LEAST_PAGES:
            continue
        seen.add(key)
        cases.append(Case(file, reference))
    step = max(len(cases) / most, 1.0)
    return [cases[int(i * step)] for i in range(min(most, len(cases)))]


def _book_text(root: Path, package: str, file: Path) -> str:
    """Return the text of a PDF's book, from the files beside it."""
    stem = file.name.removesuffix(".gz").removesuffix(".pdf")
    for name in (f"{stem}.txt.gz", f"{stem}.txt"):
        text = file.with_name(name)
        if text.is_file() and not text.is_symlink():
            raw = text.read_bytes()
            return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8", "replace")
    pages = [file.with_name(f"{stem}.html"),
             root / "r-doc-html/usr/share/doc/r-doc-html/manual" / f"{stem}.html"]
    page = next((page for page in pages if page.is_file()), None)
    if page is None or package == "lilypond-doc-pdf":
        return ""
    from lxml import html

    tree = html.fromstring(page.read_bytes())
    for element in tree.xpath("//script|//style|//title"):
        element.drop_tree()
    return "\n".join(tree.itertext())


def _ours_pdf(data: bytes) -> str:
    found = pdf_document(data, "x", ReadingJob(SourcePiece("pdf", "x", 0, 0, 0), Path("/"), "text",
                                               PdfOptions()))
    return getattr(found, "text", "")


def html_tools() -> dict[str, Callable[[bytes], str]]:
    """Return tools for pages."""
    from resiliparse.extract.html2text import extract_plain_text

    tools: dict[str, Callable[[bytes], str]] = {
        "ours": lambda raw: page_text(decode_page(raw))[0],
        f"resiliparse {version('resiliparse')}": lambda raw: extract_plain_text(
            raw.decode("utf-8", "replace"), main_content=True),
        "all text of the page": lambda raw: page_text(decode_page(raw), whole=True)[0],
    }
    if find_spec("trafilatura"):
        import trafilatura

        tools[f"trafilatura {version('trafilatura')}"] = lambda raw: trafilatura.extract(
            raw, output_format="markdown", include_comments=False) or ""
    return tools


def pdf_tools() -> dict[str, Callable[[bytes], str]]:
    """Return tools for PDFs."""
    import io

    import pdfminer.high_level
    import pypdf
    import pypdfium2

    def plain_pdfium(data: bytes) -> str:
        with pypdfium2.PdfDocument(data) as document:
            return "\n".join(page.get_textpage().get_text_range() for page in document)

    return {
        "ours": _ours_pdf,
        f"pdfminer.six {version('pdfminer.six')}": lambda raw: pdfminer.high_level.extract_text(
            io.BytesIO(raw)),
        f"pypdf {version('pypdf')}": lambda raw: "\n".join(
            page.extract_text() for page in pypdf.PdfReader(io.BytesIO(raw)).pages),
        f"pypdfium2 {version('pypdfium2')} as it comes": plain_pdfium,
    }


def middle_pages(raw: bytes, wanted: int) -> bytes:
    """Return a PDF of some pages from the middle of another."""
    import io

    import pypdfium2

    with pypdfium2.PdfDocument(raw) as document, pypdfium2.PdfDocument.new() as part:
        first = max(int(0.4 * len(document)), 0)
        part.import_pages(document, list(range(first, min(first + wanted, len(document)))))
        sink = io.BytesIO()
        part.save(sink)
        return sink.getvalue()


def num_pages(raw: bytes) -> int:
    """Return how many pages a PDF has."""
    import pypdfium2

    with pypdfium2.PdfDocument(raw) as document:
        return len(document)


def measure(cases: Sequence[Case], tools: dict[str, Callable[[bytes], str]],
            count: Callable[[bytes], int], pages: int = 0) -> list[str]:
    """Return a line for each tool."""
    raws = [middle_pages(_raw(case.file), pages) if pages else _raw(case.file) for case in cases]
    scores = {name: Score() for name in tools}
    for raw, case in zip(raws, cases, strict=True):
        reference = runs(case.reference)
        found = {name: _found(name, tool, raw, scores[name]) for name, tool in tools.items()}
        if pages:
            pool: Counter[tuple[str, ...]] = Counter()
            for one in found.values():
                pool |= one & reference
        for name, one in found.items():
            both = (one & reference).total()
            whole = pool.total() if pages else reference.total()
            scores[name].recall += both / max(whole, 1) / len(cases)
            scores[name].precision += both / max(one.total(), 1) / len(cases)
    total = sum(map(count, raws))
    lines = [f"{len(cases)} files, {total} pages",
             f"{'tool':32} {'kept':>7} {'around':>7} {'F1':>6} {'pages/s':>8} {'failed':>7}"]
    for name, score in scores.items():
        f1 = 2 * score.recall * score.precision / max(score.recall + score.precision, 1e-9)
        lines.append(f"{name:32} {score.recall:7.1%} {1 - score.precision:7.1%} {f1:6.3f} "
                     f"{total / max(score.seconds, 1e-9):8.1f} {score.failed:7}")
    return lines


def _found(name: str, tool: Callable[[bytes], str], raw: bytes, score: Score) -> Counter[tuple[str, ...]]:
    began = time.process_time()
    try:
        text = tool(raw)
    except Exception as e:  # each tool has errors of its own
        print(f"{name}: {type(e).__name__}: {e}", file=sys.stderr)
        score.failed, text = score.failed + 1, ""
    score.seconds += time.process_time() - began
    return runs(text)


def _raw(file: Path) -> bytes:
    raw = file.read_bytes()
    return gzip.decompress(raw) if file.suffix == ".gz" else raw


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tools-site", type=Path)
    parser.add_argument("--only", choices=["html", "pdf"])
    parser.add_argument("--pages", type=int, default=0)
    parser.add_argument("--files", type=int, default=50, help="PDFs")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.tools_site:
        sys.path.append(str(arguments.tools_site))
    logging.disable(logging.WARNING)  # pypdf wishes for fontTools at each font
    load = os.getloadavg()[0]
    lines = [f"extraction: {platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python "
             f"{platform.python_version()}", "kept: share of the reference; around: share of the output that "
             "the reference does not have"]
    if arguments.only != "pdf":
        lines += ["", "HTML: " + ", ".join(dict.fromkeys(s[0].partition("/")[0] for s in HTML_SETS)),
                  *measure(html_cases(arguments.folder), html_tools(), lambda raw: 1)]
    if arguments.only != "html":
        lines += ["", "PDF: " + ", ".join(PDF_BOOKS),
                  *measure(pdf_cases(arguments.folder, arguments.files), pdf_tools(), num_pages,
                           arguments.pages)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
