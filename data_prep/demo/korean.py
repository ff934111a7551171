"""Korean text from Debian documentation packages, where this machine can fetch them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import tarfile
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

PACKAGES = ("libreoffice-help-ko", "gnome-user-docs", "debian-faq-ko")
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


class Unavailable(Exception):
    """Korean text cannot be fetched here; the message is the reason in a few words."""


def korean_pages() -> dict[str, str]:
    """Download, unpack and read the packages.

    Returns:
        Page inside the package -> its Korean text, sorted by page.

    Raises:
        Unavailable: there is no apt-get or dpkg-deb, no network, or none of the packages.
    """
    with tempfile.TemporaryDirectory(prefix="korean-") as name:
        folder = Path(name)
        runner = _Runner(folder, time.monotonic() + TIMEOUT_S)
        try:
            _download(runner)
        except Unavailable:
            if os.geteuid() != 0:
                raise
            runner.call(["apt-get", "-q", "update"])  # a fresh container has no package lists
            _download(runner)
        pages: dict[str, str] = {}
        for package in sorted(folder.glob("*.deb")):
            pages |= _pages(runner.call(["dpkg-deb", "--fsys-tarfile", str(package)]))
    return korean_only(dict(sorted(pages.items())))


def _pages(archive: bytes) -> dict[str, str]:
    """Return the text of the pages in a package's archive that lie in a folder `ko`;
    nothing is written to disk."""
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            path = PurePosixPath(member.name)
            wanted = member.isfile() and path.suffix in (".html", ".page") and "ko" in path.parts
            if wanted and (file := members.extractfile(member)):
                texts[path.as_posix()] = html_text(file.read().decode("utf-8", "replace"))
    return texts


class _Runner:
    """Runs commands in a folder until a deadline."""

    def __init__(self, folder: Path, deadline_s: float) -> None:
        self.folder, self.deadline_s = folder, deadline_s

    def call(self, command: list[str]) -> bytes:
        """Run a command and return its output; raises `Unavailable` with its last line where it fails."""
        left_s = max(0.1, self.deadline_s - time.monotonic())
        try:
            done = subprocess.run(command, cwd=self.folder, timeout=left_s, capture_output=True, check=False)
        except FileNotFoundError:
            raise Unavailable(f"{command[0]} is not on this machine") from None
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{command[0]} did not finish within {TIMEOUT_S} s") from None
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or b"no message").splitlines()[-1]
            raise Unavailable(f"{command[0]} failed: {last.decode(errors='replace')}")
        return done.stdout


def _download(runner: _Runner) -> None:
    """Download the packages one by one; raises the first reason where none comes."""
    options = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=15"]
    reasons = []
    for package in PACKAGES:
        try:
            runner.call(["apt-get", *options, "download", package])
        except Unavailable as e:
            reasons.append(e)
    if len(reasons) == len(PACKAGES):
        raise reasons[0]


class _TextParser(HTMLParser):
    """Collects the text of a page's body, a line per block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line at a block, and silence at what a reader does not see."""
        if tag in _SKIPPED_TAGS:
            self._skipping.append(tag)
        elif tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End the line, or the silence."""
        if self._skipping and tag == self._skipping[-1]:
            self._skipping.pop()
        elif tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Collect text with its white space as a browser shows it."""
        if not self._skipping:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Return the visible text of an HTML page, one block a line."""
    parser = _TextParser()
    parser.feed(page)
    parser.close()
    return "\n".join(line.strip() for line in "".join(parser.parts).split("\n") if line.strip())


def is_korean(line: str) -> bool:
    """Tell whether enough of a line's letters are Hangul."""
    letters = sum(c.isalpha() for c in line)
    hangul = sum("\uac00" <= c <= "\ud7a3" for c in line)
    return hangul > 0 and hangul >= MIN_HANGUL_SHARE * letters


def korean_only(pages: dict[str, str]) -> dict[str, str]:
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
