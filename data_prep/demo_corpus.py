"""`sov-data demo-corpus`: real text that is present on any fresh machine,
or one's own files, as JSONL sources.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents import cut_text, list_files, read_documents
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options

# Korean text from Debian documentation packages, where this machine can fetch them.

KOREAN_PACKAGES = ("libreoffice-help-ko", "gnome-user-docs", "debian-faq-ko")
"""12 MB to download; what a distribution does not have is passed over."""
TIMEOUT_S = 150
"""Time for everything: package lists, downloads, unpacking."""
MIN_HANGUL_SHARE = 0.3
"""A line counts as Korean where at least this part of its letters is Hangul (names of menus and
keys stay English)."""
MIN_REPEATED_CHARS = 30
"""Lines of this length or more are kept once over the whole package: notes that stand on every page."""
_SKIPPED_TAGS = frozenset([
    "script", "style", "head", "header", "aside", "nav", "footer", "noscript", "info",
])
_BLOCK_TAGS = frozenset([
    "p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "td", "th", "dt", "dd", "pre", "table", "ul",
    "ol", "section", "br", "title", "blockquote",
])


class CorpusUnavailable(Exception):
    """Korean text cannot be fetched here; the message is the reason in a few words."""


def download_korean_pages() -> dict[str, str]:
    """Download, unpack and read the packages.

    Returns:
        Page inside the package -> its Korean text, sorted by page.

    Raises:
        Unavailable: there is no apt-get or dpkg-deb, no network, or none of the packages.
    """
    with tempfile.TemporaryDirectory(prefix="korean-") as name:
        folder = Path(name)
        # One deadline for all commands together.
        runner = _Runner(folder, time.monotonic() + TIMEOUT_S)
        try:
            _download(runner)
        except CorpusUnavailable:
            if os.geteuid() != 0:
                raise
            runner.call(["apt-get", "-q", "update"])  # a fresh container has no package lists
            _download(runner)
        pages: dict[str, str] = {}
        for package in sorted(folder.glob("*.deb")):
            pages |= _pages(runner.call(["dpkg-deb", "--fsys-tarfile", str(package)]))
    return keep_korean_lines(dict(sorted(pages.items())))


def _pages(archive: bytes) -> dict[str, str]:
    """Return the text of the pages in a package's archive that lie in a folder `ko`;
    nothing is written to disk."""
    texts = {}
    # Members are read in memory: no path of an archive reaches the disk.
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            path = PurePosixPath(member.name)
            wanted = member.isfile() and path.suffix in (".html", ".page") and "ko" in path.parts
            if wanted and (file := members.extractfile(member)):
                texts[path.as_posix()] = extract_html_text(file.read().decode("utf-8", "replace"))
    return texts


class _Runner:
    """Runs commands in a folder until a deadline."""

    def __init__(self, folder: Path, deadline_s: float) -> None:
        self.folder, self.deadline_s = folder, deadline_s

    def call(self, command: list[str]) -> bytes:
        """Run a command and return its output; a failure raises `CorpusUnavailable` with its last line."""
        left_s = max(0.1, self.deadline_s - time.monotonic())
        try:
            done = subprocess.run(command, cwd=self.folder, timeout=left_s, capture_output=True, check=False)
        except FileNotFoundError:
            raise CorpusUnavailable(f"{command[0]} is not on this machine") from None
        except subprocess.TimeoutExpired:
            raise CorpusUnavailable(f"{command[0]} did not finish within {TIMEOUT_S} s") from None
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or b"no message").splitlines()[-1]
            raise CorpusUnavailable(f"{command[0]} failed: {last.decode(errors='replace')}")
        return done.stdout


def _download(runner: _Runner) -> None:
    options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=15"]
    reasons = []
    for package in KOREAN_PACKAGES:
        try:
            runner.call(["apt-get", *options, "download", package])
        except CorpusUnavailable as e:
            reasons.append(e)
    if len(reasons) == len(KOREAN_PACKAGES):
        raise reasons[0]


class _TextParser(HTMLParser):
    """Collects the text of a page's body, a line per block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED_TAGS:
            self._skipping.append(tag)
        elif tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        # Only the innermost ends: pages of others leave tags open.
        if self._skipping and tag == self._skipping[-1]:
            self._skipping.pop()
        elif tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(re.sub(r"\s+", " ", data))


def extract_html_text(page: str) -> str:
    parser = _TextParser()
    parser.feed(page)
    parser.close()
    return "\n".join(line.strip() for line in "".join(parser.parts).split("\n") if line.strip())


def is_korean(line: str) -> bool:
    letters = sum(c.isalpha() for c in line)
    hangul = sum("\uac00" <= c <= "\ud7a3" for c in line)
    return hangul > 0 and hangul >= MIN_HANGUL_SHARE * letters


def keep_korean_lines(pages: dict[str, str]) -> dict[str, str]:
    """Return the pages with only their Korean lines, long repeated lines once;
    pages without any are left out."""
    seen: set[str] = set()
    result = {}
    for name, text in pages.items():
        kept = []
        for line in text.split("\n"):
            if is_korean(line) and line not in seen:
                kept.append(line)
                if len(line) >= MIN_REPEATED_CHARS:
                    seen.add(line)
        if kept:
            result[name] = "\n".join(kept)
    return result


# Text that comes with every Python: sources, docstrings, documentation topics,
# and questions made from docstrings.

PYTHON_PACKAGES = ("numpy", "networkx", "sympy", "jinja2", "pydantic", "torch/nn", "torch/optim",
                   "torch/utils", "torch/distributions")
"""Installed packages (or folders of them) whose docstrings are read where they are present."""
SKIPPED_FOLDERS = frozenset([
    "test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings",
    "lib2to3", "_vendor", "licenses", "turtledemo",
])
"""Tests, other people's packages, and folders that are tables rather than text."""
_ROLE = re.compile(r":[a-zA-Z:+-]+:`[~!]?([^`<]+?)(?:\s*<[^>`]*>)?`")
_NOISE_LINE = re.compile(r"^\s*(\.\. [\w:-]+::.*|\.\. _.*|([=\-~^\"*#+`_.])\2{2,}|<[^>]*>.*"
                         r"|.*!\[.*|\[!?\[.*)$", re.MULTILINE)
_ANSWER_CHARS = (40, 600)
QUESTIONS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}` in Python.",
    "Can you tell me what `{}` does?",
    "I found `{}` in some code. What is it?",
    "Describe `{}` briefly.",
)


@dataclass(frozen=True)
class Docstring:
    """One documented thing."""

    module: str
    """Dotted module."""
    name: str
    """Qualified name inside the module; empty for the module itself."""
    text: str
    """The docstring without its indentation."""


def compute_order_key(identity: str) -> bytes:
    """Return a key that shuffles identities the same way everywhere."""
    return hashlib.blake2b(identity.encode(), digest_size=8).digest()


def list_stdlib_files() -> list[tuple[str, Path]]:
    """Return (path inside the library, file) of the running Python's own sources, sorted;
    tests are left out."""
    return _python_files(Path(sysconfig.get_path("stdlib")), "")


def list_package_files() -> list[tuple[str, Path]]:
    """Return the same for `PACKAGES`, those that are installed."""
    site = Path(sysconfig.get_path("purelib"))
    return [entry for package in PYTHON_PACKAGES for entry in _python_files(site / package, package + "/")]


def _python_files(folder: Path, prefix: str) -> list[tuple[str, Path]]:
    return [(prefix + p.relative_to(folder).as_posix(), p) for p in _files(folder) if p.suffix == ".py"]


def _files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        # In place: `os.walk` goes into what is left in the list.
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(place, name) for name in names]
    return sorted(found)


def read_source(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def parse_docstrings(name: str, source: str) -> list[Docstring]:
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a later Python refuses
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [Docstring(module, inner, text) for inner, text in _walk(tree, "")]


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if (isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and (text := ast.get_docstring(node))):
        yield name, text
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _walk(child, f"{name}.{child.name}" if name else child.name)


def strip_markup(text: str) -> str:
    """Return documentation without markup noise: roles, directives, underlines,
    badges and interactive sessions."""
    text = _ROLE.sub(r"\1", text).replace("``", "`")
    text = _NOISE_LINE.sub("", text).replace("::\n", ":\n")
    paragraphs = [p.rstrip() for p in re.split(r"\n(?:[ \t]*\n)+", text.expandtabs())]
    return "\n\n".join(p for p in paragraphs if p.strip() and not p.lstrip().startswith(">>>"))


def join_docstrings(found: list[Docstring]) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    for d in found:
        if text := strip_markup(d.text):
            parts.setdefault(d.module, []).append(f"{d.module}.{d.name}\n\n{text}" if d.name
                                                  else f"{d.module}\n\n{text}")
    return {module: "\n\n".join(texts) for module, texts in parts.items()}


def read_language_topics() -> dict[str, str]:
    """Return Python's language reference by topic, as `help()` shows it."""
    from pydoc_data.topics import topics as texts

    return {f"topic {name}": strip_markup(text) for name, text in sorted(texts.items())}


def read_package_pages() -> dict[str, str]:
    """Return the documentation files (.rst, .md and descriptions) that lie beside installed packages."""
    site = Path(sysconfig.get_path("purelib"))
    files = [p for p in _files(site)
             if p.suffix in (".rst", ".md") or (p.name == "METADATA" and p.parent.suffix == ".dist-info")]
    texts = {p.relative_to(site).as_posix(): read_source(p) for p in files}
    # what precedes the first blank line of METADATA are mail-like headers
    return {name: strip_markup(text.partition("\n\n")[2] if name.endswith("METADATA") else text)
            for name, text in texts.items()}


def build_question_pair(found: Docstring) -> tuple[str, str] | None:
    """Return a question about a public name and the first paragraph of its docstring,
    or None where it makes no answer."""
    name = f"{found.module}.{found.name}" if found.name else found.module
    if any(part.startswith("_") for part in name.split(".")):
        return None
    answer = " ".join(strip_markup(found.text).partition("\n\n")[0].split())
    if (not _ANSWER_CHARS[0] <= len(answer) <= _ANSWER_CHARS[1] or not answer.endswith(".")
            or not answer[0].isupper()):
        return None
    return QUESTIONS[compute_order_key(name)[0] % len(QUESTIONS)].format(name), answer


KIND = "corpus"
ENGLISH_BYTES, CODE_BYTES, KOREAN_BYTES = 6_000_000, 8_000_000, 6_000_000
NUM_CHATS, NUM_JUDGED, NUM_ASKED = 4000, 400, 100
MIN_CHARS = 100
"""Shorter texts say nothing; they are left out of the gathered sources (never of one's own)."""
USER_DOCUMENT_BYTES = 20_000
"""One's own files are cut at blank lines into documents of this size, so that some can be held out."""


@dataclass(frozen=True, kw_only=True)
class DemoCorpusOptions:
    """Gather a small corpus from this machine."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the corpus."""
    user: Annotated[Path | None, Flag("--input")] = None
    """Your own text: a file, a .jsonl file or a folder; replaces the gathered text (chats are still made
    from docstrings)."""
    overwrite: bool = False
    """Replace a corpus that is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Gather english.jsonl, code.jsonl, korean.jsonl, chat.jsonl, judged.jsonl and "
                          "benchmarks from this machine's Python, its packages and Debian documentation "
                          "packages; or, with --input, user.jsonl, chat.jsonl, judged.jsonl and benchmarks.")
    add_options(parser, DemoCorpusOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(DemoCorpusOptions, typed)
    write_corpus(args.output, user=args.user, overwrite=args.overwrite)
    return 0


def write_corpus(output: Path, *, user: Path | None = None, overwrite: bool = False) -> None:
    """Write an artifact of kind "corpus" with a JSONL file per source.

    Raises:
        UserError: `user` cannot be read or holds no text, or the output may not be replaced.
    """
    check_output_folder(output, KIND, overwrite)
    library = list_stdlib_files()
    sources = {name: read_source(file) for name, file in [*library, *list_package_files()]}
    found = [d for name, source in sources.items() for d in parse_docstrings(name, source)]
    if user is not None:
        texts = {"user": read_user_documents(user)}
    else:
        english = {**read_language_topics(), **join_docstrings(found), **read_package_pages()}
        texts = {"english": select_documents(english, ENGLISH_BYTES),
                 "code": select_documents({n: sources[n] for n, _ in library}, CODE_BYTES)}
        try:
            texts["korean"] = select_documents(download_korean_pages(), KOREAN_BYTES)
        except CorpusUnavailable as e:
            print(f"korean: left out, because {e}")
    records: dict[str, list[dict[str, object]]] = {
        name: [{"id": id_, "text": text} for id_, text in documents.items()]
        for name, documents in texts.items()}
    records["chat"] = build_chats(found)
    records["judged"] = build_judged_responses(records["chat"])
    records["benchmarks/code-switching/test"] = build_language_prompts(records["chat"])
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        for name, lines in records.items():
            file = artifact.path / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            size_bytes = _write_jsonl(file, lines)
            artifact.content[name] = {"num_documents": len(lines), "num_bytes": size_bytes}
            print(f"{name}: {len(lines):,} documents, {size_bytes / 1e6:.2f} MB")
        artifact.settings = {"user": user}
    print(f"wrote {output}")


def read_user_documents(path: Path) -> dict[str, str]:
    """Return the text at `path` as documents by id (place and number), exact duplicates once.

    Raises:
        UserError: it cannot be read or holds no text.
    """
    texts = [(document.where, piece) for document in read_documents(list_files(path, print))
             for piece in cut_text("\n\n".join(document.texts()), USER_DOCUMENT_BYTES) if piece.strip()]
    if not texts:
        raise UserError(f"{path}: holds no text; pass files with text in them")
    ids: dict[str, str] = {}
    for number, (where, text) in enumerate(texts):
        ids.setdefault(text, f"{where}#{number}")
    return {id_: text for text, id_ in ids.items()}


def select_documents(texts: dict[str, str], limit_bytes: int) -> dict[str, str]:
    """Return documents up to a total of bytes: near-empty ones and exact duplicates dropped, the rest a fixed
    random choice, in order of their ids."""
    chosen: dict[str, str] = {}
    seen: set[str] = set()
    total_bytes = 0
    # A fixed shuffle: the same machine gives the same corpus, and no package is preferred.
    for id_ in sorted(texts, key=compute_order_key):
        size_bytes = len(texts[id_].encode())
        if len(texts[id_]) < MIN_CHARS or texts[id_] in seen or total_bytes + size_bytes > limit_bytes:
            continue
        seen.add(texts[id_])
        chosen[id_] = texts[id_]
        total_bytes += size_bytes
    return dict(sorted(chosen.items()))


def build_chats(found: list[Docstring]) -> list[dict[str, object]]:
    """Return question and answer pairs from docstrings, `NUM_CHATS` at most, each answer once,
    ordered by question."""
    pairs = {answer: question for question, answer in filter(None, map(build_question_pair, found))}
    chosen = sorted(pairs.items(), key=lambda pair: compute_order_key(pair[1]))[:NUM_CHATS]
    return [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for answer, question in sorted(chosen, key=lambda pair: pair[1])]


def build_judged_responses(found: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """Return questions with two judged responses: the right one, and the answer to another question."""
    asked = [[message["content"] for message in chat["messages"]] for chat in found[:NUM_JUDGED]]
    return [{"prompt": question, "responses": [{"content": answer, "reward": 1.0},
                                               {"content": asked[i - 1][1], "reward": 0.0}]}
            for i, (question, answer) in enumerate(asked) if len(asked) > 1]


def build_language_prompts(found: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """Return questions of which `eval lm --tasks code-switching` judges the language of the answers."""
    return [{"prompt": chat["messages"][0]["content"], "language": "en"} for chat in found[-NUM_ASKED:]]


def _write_jsonl(file: Path, records: Iterable[dict[str, object]]) -> int:
    with open(file, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return file.stat().st_size
