"""Image and speech files, and conversations and questions about them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from digits import part
from judges import DIGITS, WORDS
from PIL import Image
from speech import ENGLISH, KOREAN, SAMPLE_RATE_HZ, say

PITCHES = {"train": (30, 35, 40, 45, 50, 55, 60), "heldout": (38, 52)}
SPEEDS_WPM = {"train": (120, 140, 160, 180), "heldout": (130, 170)}
ASKED = {ENGLISH: {"name": "Which digit is it?", "draw": "Draw {}.", "write": "Write what you hear.",
                   "say": "Say {}.", "translate": "Say it in English."},
         KOREAN: {"name": "이 숫자는?", "draw": "{} 그려.", "write": "들은 말을 써.", "say": "{} 말해.",
                  "translate": "한국어로 말해."}}
LANGUAGES = (ENGLISH, KOREAN)
Row = dict[str, Any]


def write_media(root: Path, seed: int = 0) -> dict[str, list[Row]]:
    """Write images and sounds below a folder, and return their labels; file names reveal nothing."""
    draw, index = random.Random(seed), dict[str, list[Row]]()
    for name in ("train", "heldout"):
        seen, labels = part(name)
        order = draw.sample(range(len(seen)), len(seen))
        rows: list[dict[str, Any]] = [{"path": f"pictures-{name}/{number:05d}.png", "digit": int(labels[i])}
                for number, i in enumerate(order)]
        (root / f"pictures-{name}").mkdir(parents=True, exist_ok=True)
        for row, i in zip(rows, order, strict=True):
            pixels = (seen[i].transpose(1, 2, 0) * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(root / row["path"])
        index[f"pictures-{name}"] = rows
        spoken = [(word, voice, pitch, speed) for english, korean in WORDS.items()
                  for word, voice in ((english, ENGLISH), (korean, KOREAN))
                  for pitch in PITCHES[name] for speed in SPEEDS_WPM[name]]
        draw.shuffle(spoken)
        (root / f"sounds-{name}").mkdir(parents=True, exist_ok=True)
        index[f"sounds-{name}"] = []
        for number, (word, voice, pitch, speed) in enumerate(spoken):
            path = f"sounds-{name}/{number:05d}.wav"
            soundfile.write(root / path, say(word, voice, pitch, speed), SAMPLE_RATE_HZ, subtype="PCM_16")
            index[f"sounds-{name}"].append({"path": path, "word": word, "voice": voice})
    return index


def _text(text: str) -> Row:
    return {"type": "text", "text": text}


def _chat(content: list[Row], answer: list[Row]) -> Row:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def other_language(word: str) -> str:
    """Return the word of the same meaning."""
    return WORDS.get(word) or next(english for english, korean in WORDS.items() if korean == word)


def conversations(index: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Return pair -> conversations to learn from."""
    draw, found = random.Random(seed), dict[str, list[Row]]()
    pictures, sounds = index["pictures-train"], index["sounds-train"]
    by_word: dict[str, list[str]] = {}
    for row in sounds:
        by_word.setdefault(row["word"], []).append(row["path"])
    for language in LANGUAGES:
        asked = ASKED[language]
        for row in pictures:
            shown, name = {"type": "image", "path": row["path"]}, DIGITS[language][row["digit"]]
            found.setdefault("image-text", []).append(_chat([shown, _text(asked["name"])], [_text(name)]))
            found.setdefault("text-image", []).append(_chat([_text(asked["draw"].format(name))], [shown]))
    for row in sounds:
        heard, other = {"type": "audio", "path": row["path"]}, other_language(row["word"])
        own, to = (KOREAN, ENGLISH) if row["voice"] == KOREAN else (ENGLISH, KOREAN)
        answer = {"type": "audio", "path": draw.choice(by_word[other])}
        found.setdefault("audio-text", []).append(
            _chat([heard, _text(ASKED[own]["write"])], [_text(row["word"])]))
        found.setdefault("text-audio", []).append(
            _chat([_text(ASKED[own]["say"].format(row["word"]))], [heard]))
        found.setdefault("audio-audio", []).append(_chat([heard, _text(ASKED[to]["translate"])], [answer]))
    return found


def questions(index: dict[str, list[Row]], num_drawn: int) -> dict[str, list[Row]]:
    """Return pair (and language, where it matters) -> rows of `eval media`, on held-out media."""
    found: dict[str, list[Row]] = {}
    english, korean = list(WORDS), list(WORDS.values())
    for n, row in enumerate(index["pictures-heldout"]):
        language = LANGUAGES[n % 2]
        found.setdefault("image-text", []).append(_row(
            [{"type": "image", "path": row["path"]}, _text(ASKED[language]["name"])],
            DIGITS[language][row["digit"]], DIGITS[language]))
    for n in range(num_drawn):
        language = LANGUAGES[n // 10 % 2]
        name = DIGITS[language][n % 10]
        found.setdefault("text-image", []).append(
            _row([_text(ASKED[language]["draw"].format(name))], name, DIGITS[language]))
    for row in index["sounds-heldout"]:
        own, to = (KOREAN, ENGLISH) if row["voice"] == KOREAN else (ENGLISH, KOREAN)
        heard = {"type": "audio", "path": row["path"]}
        spoken, wanted = (korean, english) if own == KOREAN else (english, korean)
        found.setdefault("audio-text", []).append(
            _row([heard, _text(ASKED[own]["write"])], row["word"], spoken))
        found.setdefault(f"text-audio/{own}", []).append(
            _row([_text(ASKED[own]["say"].format(row["word"]))], row["word"], spoken))
        found.setdefault(f"audio-audio/{to}", []).append(
            _row([heard, _text(ASKED[to]["translate"])], other_language(row["word"]), wanted))
    return found


def _row(content: list[Row], answer: str, labels: Iterable[str]) -> Row:
    return {"content": content, "answer": answer, "labels": list(labels)}


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
