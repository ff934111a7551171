"""How good and how quick `sov-data scorer` is on labels that were held out, beside plain scikit-learn.

    python benchmarks/scorers.py --docs FOLDER [--pages 120]

FOLDER has unpacked documentation packages (documentation_pages.py says how).  Labels are read off the markup,
which the scorers never see: the share of a page's text in paragraphs of at least 100 characters, times five
(regressor), and whether it is at least a half (classifier).  That is a stand-in for readers' labels, and it
leaks: pages of one package share headings and navigation, so a page from a package that was trained on is an
easy one.  Figures are therefore given twice: for held-out pages of the same packages, and for families of
packages of which nothing was seen, in several languages.  The second column is the honest one.

The baseline is what one writes first: HashingVectorizer(ngram_range=(1, 2), n_features=2**18) with
LogisticRegression, or with Ridge, all else as the library has it.  Times are CPU seconds of scoring.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from documentation_pages import Page, pages
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline

from data_prep.curate.pipeline.step import Doc
from data_prep.curate.scoring.kinds import KindSettings, ScorerKind
from data_prep.curate.scoring.labels import read_labels, split
from data_prep.curate.scoring.scorer import load_scorer

SEEN = ("python3.11-doc", "python-django-doc", "sqlite3-doc", "debian-handbook", "developers-reference",
        "fp-docs-3.2.2", "python-pandas-doc", "libreoffice-help-en-us", "libreoffice-help-ko",
        "libreoffice-help-de", "libreoffice-help-ja", "installation-guide-amd64", "debian-faq",
        "debian-faq-ko")
UNSEEN = ("postgresql-doc-15", "git-doc", "gimp-help-en", "gimp-help-ko", "gimp-help-de", "gimp-help-ja",
          "kicad-doc-en", "kicad-doc-de", "kicad-doc-ja", "debian-reference-en", "debian-reference-de",
          "debian-reference-ja", "maint-guide")
KINDS: dict[str, Callable[[Page], float]] = {
    "classifier": lambda page: float(page.prose >= 0.5),
    "regressor": lambda page: round(5 * page.prose, 2),
}


def write_labels(file: Path, found: Sequence[Page], label: Callable[[Page], float]) -> None:
    """Write labels of pages."""
    file.write_text("".join(json.dumps({"text": page.text, "label": label(page), "language": page.language})
                            + "\n" for page in found))


def figures(labels: np.ndarray, scores: np.ndarray, kind: str) -> str:
    """Return AUC, or Spearman's correlation."""
    if kind == "classifier":
        return f"AUC {roc_auc_score(labels, scores):.4f}"
    return f"Spearman {spearmanr(labels, scores).statistic:.4f}"


def timed(score: Callable[[], Any], num_chars: int) -> tuple[Any, float]:
    """Return scores, and millions of characters in a CPU second."""
    start = time.process_time()
    found = score()
    return found, num_chars / 1e6 / (time.process_time() - start)


def compare(kind: str, work: Path, seen: list[Page], unseen: list[Page]) -> None:
    """Print a line for each model."""
    write_labels(work / f"{kind}.jsonl", seen, KINDS[kind])
    write_labels(work / f"{kind}-unseen.jsonl", unseen, KINDS[kind])
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "data_prep.cli", "scorer", "train", "--labels",
                    work / f"{kind}.jsonl", "--kind", kind, "--output", work / kind], check=True,
                   stdout=subprocess.DEVNULL)
    train_s = time.perf_counter() - start
    labels, _ = read_labels(work / f"{kind}.jsonl", kind, 20_000)  # type: ignore[arg-type]
    parts = split(labels)
    known = [*parts.fit, *parts.calibration]
    tests = {"same packages": [(x.text, x.label) for x in parts.heldout],
             "unseen packages": [(p.text[:20_000], KINDS[kind](p)) for p in unseen]}
    baseline = make_pipeline(HashingVectorizer(ngram_range=(1, 2), n_features=1 << 18),
                             LogisticRegression() if kind == "classifier" else Ridge())
    baseline.fit([x.text for x in known], [x.label for x in known])
    scorer = load_scorer(work / kind)
    scorer.score("compiled beforehand")

    def ours(texts: list[str]) -> np.ndarray:
        return np.array([scorer.score(text) for text in texts])

    def plain(texts: list[str]) -> np.ndarray:
        found = baseline.predict_proba(texts)[:, 1] if kind == "classifier" else baseline.predict(texts)
        return np.asarray(found)

    print(f"{kind}: {len(known):,} pages to train on, {train_s:.0f} s")
    for name, model in (("sov-data scorer", ours), ("plain scikit-learn", plain)):
        cells = []
        for test, rows in tests.items():
            texts, wanted = [text for text, _ in rows], np.array([label for _, label in rows])
            found, speed = timed(lambda model=model, texts=texts: model(texts), sum(map(len, texts)))
            cells.append(f"{test} ({len(rows):,}) {figures(wanted, found, kind)}")
        print(f"  {name:20} {'; '.join(cells)}; {speed:.1f} million characters/s")
    by_language = sorted({p.language for p in unseen})
    scores = ours([p.text[:20_000] for p in unseen])
    wanted = np.array([KINDS[kind](p) for p in unseen])
    masks = {language: np.array([p.language == language for p in unseen]) for language in by_language}
    print("  unseen, by language: " + ", ".join(
        f"{language} ({int(own.sum())}) {figures(wanted[own], scores[own], kind)}"
        for language, own in masks.items() if len(set(wanted[own].tolist())) > 1))


def false_domains(found: Sequence[Page]) -> None:
    """Print how many pages about software the step `kind` takes for documents of a trade."""
    step = ScorerKind(KindSettings())
    listed = [page for page in found if page.language in ("en", "ko", "ja")]
    documents = [Doc(str(i), page.text, "", 0, i, {"language": page.language})
                 for i, page in enumerate(listed)]
    start = time.process_time()
    kinds = [outcome.values["kind"] for outcome in step.outcomes(documents)]
    speed = sum(len(page.text) for page in listed) / 1e6 / (time.process_time() - start)
    wrong = [(kind, page.package) for kind, page in zip(kinds, listed, strict=True)
             if kind.startswith("domain:")]
    print(f"step kind: {len(wrong)} of {len(listed):,} pages about software (English, Korean, Japanese) are "
          f"called domain:finance, law or medicine by their words: {Counter(wrong).most_common(6)}; "
          f"{speed:.1f} million characters/s")


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description="Judge scorers on labels that were held out.")
    parser.add_argument("--docs", type=Path, required=True, help="folder of unpacked documentation packages")
    parser.add_argument("--pages", type=int, default=120, help="pages of a package, at most")
    args = parser.parse_args()
    seen, unseen = (list(pages(args.docs, list(names), args.pages)) for names in (SEEN, UNSEEN))
    size = sum(len(p.text) for p in (*seen, *unseen)) / 1e6
    good = np.mean([p.prose >= 0.5 for p in (*seen, *unseen)])
    print(f"{platform.platform()}, Python {platform.python_version()}, one thread")
    print(f"{len(seen):,} pages of {len(SEEN)} packages, {len(unseen):,} pages of {len(UNSEEN)} others, "
          f"{size:.1f} million characters; {good:.0%} are prose")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            compare(kind, Path(folder), seen, unseen)
    false_domains([*seen, *unseen])


if __name__ == "__main__":
    main()
