"""What the steps `language`, `rules`, `pii` and `safety` cost, and what they take for personal data in code.

Usage: python benchmarks/data_rules.py --docs FOLDER > benchmarks/results/data_rules.txt

Documents are the pages of Debian's documentation packages (one unpacked folder per package), their tags taken
out, and the modules of Python's standard library, whose numbers of versions, dates and constants are nobody's
personal data: what `pii` finds there beside addresses of e-mail is counted as found wrongly.
"""

from __future__ import annotations

import argparse
import html
import os
import platform
import re
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

from data_prep.curate.pipeline.step import Doc, Step
from data_prep.curate.quality.identify import Language, LanguageSettings, form_of
from data_prep.curate.quality.pii.step import FINDERS, Pii, PiiSettings, found_in
from data_prep.curate.quality.rules.step import Rules, RulesSettings
from data_prep.curate.quality.safety import Safety, SafetyList, SafetySettings

PACKAGES = {"en": ("python3.11-doc", "libreoffice-help-en-us", "debian-reference-en"),
            "ko": ("libreoffice-help-ko", "gimp-help-ko"),
            "ja": ("libreoffice-help-ja", "debian-reference-ja"),
            "de": ("libreoffice-help-de", "debian-reference-de"), "vi": ("libreoffice-help-vi",)}
_SCRIPT = re.compile(r"<(script|style)\b.*?</\1>", re.DOTALL)


def pages(folder: Path, names: tuple[str, ...], most: int) -> list[str]:
    """Return the text of pages of HTML, at least 500 characters each."""
    files = [file for name in names for file in sorted((folder / name).rglob("*.html"))]
    texts = []
    for file in files[::max(1, len(files) // most)][:most]:
        plain = html.unescape(re.sub(r"<[^>]+>", "", _SCRIPT.sub("", file.read_text(errors="replace"))))
        text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", plain)).strip()
        if len(text) >= 500:
            texts.append(text)
    return texts


def documents(texts: list[str], **columns: str) -> list[Doc]:
    """Return texts as documents with columns."""
    return [Doc(f"a:0:{i}", text, "a", 0, i, columns) for i, text in enumerate(texts)]


def measured(step: Step, docs: list[Doc]) -> tuple[float, Counter[str]]:
    """Return (CPU seconds, reasons) of a step over documents, the better of two runs."""
    step.outcomes(docs[:2])
    times, outcomes = [], []
    for _ in range(2):
        start = time.process_time()
        outcomes = list(step.outcomes(docs))
        times.append(time.process_time() - start)
    return min(times), Counter(outcome.reason for outcome in outcomes)


def wordlist(folder: Path) -> Safety:
    """Return the step `safety` with a list of 10,000 drawn words."""
    file = folder / "words.txt"
    file.write_text("\n".join(f"w{i * 7919:x}" for i in range(10_000)))
    step = Safety(SafetySettings((SafetyList("words", file),)))
    step.start(None)  # type: ignore[arg-type]
    return step


def speeds(by_language: dict[str, list[str]], folder: Path) -> None:
    """Print documents and MB per second of each step in each language."""
    steps: dict[str, Step] = {
        "language": Language(LanguageSettings()), "rules gopher": Rules(RulesSettings(preset="gopher")),
        "rules c4": Rules(RulesSettings(preset="c4")), "rules fineweb": Rules(RulesSettings()),
        "pii": Pii(PiiSettings()), "safety": wordlist(folder)}
    print(f"{'step':20}{'documents':>10}{'mean kB':>9}{'documents/s':>13}{'MB/s':>8}   most frequent reasons")
    for name, step in steps.items():
        for language, texts in by_language.items():
            docs = documents(texts, language=language, form="prose")
            seconds, reasons = measured(step, docs)
            num_bytes = sum(len(text.encode()) for text in texts)
            shown = ", ".join(f"{n} {reason or 'kept'}" for reason, n in reasons.most_common(3))
            print(f"{name:14}{language:6}{len(docs):10}{num_bytes / 1e3 / len(docs):9.1f}"
                  f"{len(docs) / seconds:13.0f}{num_bytes / 1e6 / seconds:8.2f}   {shown}")


def wrongly_masked(by_language: dict[str, list[str]], most: int) -> None:
    """Print what is taken for personal data in source code, and per language in documentation."""
    code = [path.read_text(errors="replace")
            for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))][:most]
    for name, texts, language in (("Python's standard library", code, "en"), *(
            (f"documentation, {language}", texts, language) for language, texts in by_language.items())):
        counts: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        for text in texts:
            for start, stop, kind in found_in(text, language, list(FINDERS)):
                counts[kind] += 1
                examples.setdefault(kind, []).append(text[start:stop])
        num_bytes = sum(len(text.encode()) for text in texts)
        print(f"\n{name}: {len(texts)} documents, {num_bytes / 1e6:.1f} MB")
        for kind, n in counts.most_common():
            shown = sorted(set(examples[kind]))
            shown = shown if kind not in ("email", "phone") else [re.sub(r"\w", "x", one) for one in shown]
            print(f"  {kind:12}{n:5}   {'; '.join(dict.fromkeys(shown[:6]))}")


def forms(by_language: dict[str, list[str]], docs: Path, most: int) -> None:
    """Print which forms are told of files whose form is known."""
    stdlib = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("[a-z]*.py"))
    headers = sorted(Path("/usr/include").rglob("*.h"))
    html_pages = sorted(page for names in PACKAGES.values() for name in names
                        for page in (docs / name).rglob("*.html"))
    known = {"Python modules": stdlib, "C and C++ headers": headers, "HTML pages": html_pages}
    texts = {name: [path.read_text(errors="replace") for path in files[::max(1, len(files) // most)][:most]]
             for name, files in known.items()}
    texts |= {f"documentation, {language}": found for language, found in by_language.items()}
    print("\nform, of files of at least 300 characters")
    for name, found in texts.items():
        counts = Counter(form_of(text) for text in found if len(text) >= 300)
        print(f"  {name:22}" + ", ".join(f"{n} {form}" for form, n in counts.most_common()))


def main() -> None:
    """Measure all steps on the documents of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--most", type=int, default=300, help="documents per language")
    args = parser.parse_args()
    by_language = {language: pages(args.docs, names, args.most) for language, names in PACKAGES.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
          "speeds by CPU seconds of one core\n")
    with tempfile.TemporaryDirectory() as folder:
        speeds({language: texts for language, texts in by_language.items() if texts}, Path(folder))
    wrongly_masked(by_language, args.most)
    forms(by_language, args.docs, args.most)


if __name__ == "__main__":
    main()
