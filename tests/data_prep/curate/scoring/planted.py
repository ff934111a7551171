"""Labels with a planted cause: the share of "good" words in a text, which a scorer must recover."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GOOD = ("because", "therefore", "theorem", "explains", "evidence", "chapter", "energy", "cells", "history")
BAD = ("click", "subscribe", "cheap", "login", "casino", "banner", "cookies", "share", "sale")
FILLER = ("the", "a", "of", "and", "in", "on", "is", "was", "with", "that", "many", "some", "house", "water")
GOOD_KO = ("설명", "이유", "역사", "세포", "증명")
BAD_KO = ("클릭", "구독", "할인", "배너", "로그인")
FILLER_KO = ("그리고", "이것은", "저것은", "많은", "물이")


def draw_text(rng: random.Random, share: float, *, korean: bool = False) -> str:
    """Return a text of 40 words: a third carry the signal, and a share of these are good words."""
    good, bad, filler = (GOOD_KO, BAD_KO, FILLER_KO) if korean else (GOOD, BAD, FILLER)
    words = [rng.choice(filler) if rng.random() < 0.66 else rng.choice(good if rng.random() < share else bad)
             for _ in range(40)]
    return " ".join(words) + "."


def plant_labels(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return labels that follow the share of good words, every third one Korean."""
    rng = random.Random(seed)
    labels = []
    for i in range(count):
        label = i % 2 if kind == "classifier" else rng.randrange(6)
        share = label if kind == "classifier" else label / 5
        korean = i % 3 == 0
        text = draw_text(rng, 0.15 + 0.7 * share, korean=korean)
        labels.append({"text": text, "label": label, "language": "ko" if korean else "en"})
    return labels


def write_lines(file: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write records as JSONL."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return file
