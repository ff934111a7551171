"""Data of `any_to_any.py`: image and speech files, training conversations, and questions for the evaluation.

Pairs are INPUT-OUTPUT: image-text names a digit, text-image draws a digit, audio-text writes a spoken word,
text-audio says a word, and audio-audio translates a spoken word between English and Korean.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from digits import load_part
from judges import DIGITS, WORDS
from PIL import Image
from speech import ENGLISH, KOREAN, SAMPLE_RATE_HZ, synthesize_speech

PITCHES = {"train": (30, 35, 40, 45, 50, 55, 60), "heldout": (38, 52)}
SPEEDS_WPM = {"train": (120, 140, 160, 180), "heldout": (130, 170)}
PROMPTS = {ENGLISH: {"name": "Which digit is it?", "draw": "Draw {}.", "write": "Write what you hear.",
                     "say": "Say {}.", "translate": "Say it in English."},
           KOREAN: {"name": "이 숫자는?", "draw": "{} 그려.", "write": "들은 말을 써.", "say": "{} 말해.",
                    "translate": "한국어로 말해."}}
LANGUAGES = (ENGLISH, KOREAN)
Row = dict[str, Any]


def write_media(root: Path, seed: int = 0) -> dict[str, list[Row]]:
    """Write images and sounds below a folder, and return their labels.

    Files are shuffled, so their names do not reveal the labels.

    Returns:
        "pictures-train", "sounds-train" and the same for "heldout" -> rows with `path` and `digit`,
        or `path`, `word` and `voice`.
    """
    draw, index = random.Random(seed), dict[str, list[Row]]()
    for name in ("train", "heldout"):
        images, labels = load_part(name)
        (root / f"pictures-{name}").mkdir(parents=True, exist_ok=True)
        index[f"pictures-{name}"] = []
        for number, i in enumerate(draw.sample(range(len(images)), len(images))):
            path = f"pictures-{name}/{number:05d}.png"
            pixels = (images[i].transpose(1, 2, 0) * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(root / path)
            index[f"pictures-{name}"].append({"path": path, "digit": int(labels[i])})
        spoken = [(word, voice, pitch, speed) for english, korean in WORDS.items()
                  for word, voice in ((english, ENGLISH), (korean, KOREAN))
                  for pitch in PITCHES[name] for speed in SPEEDS_WPM[name]]
        draw.shuffle(spoken)
        (root / f"sounds-{name}").mkdir(parents=True, exist_ok=True)
        index[f"sounds-{name}"] = []
        for number, (word, voice, pitch, speed) in enumerate(spoken):
            path = f"sounds-{name}/{number:05d}.wav"
            sound = synthesize_speech(word, voice, pitch, speed)
            soundfile.write(root / path, sound, SAMPLE_RATE_HZ, subtype="PCM_16")
            index[f"sounds-{name}"].append({"path": path, "word": word, "voice": voice})
    return index


def text_part(text: str) -> Row:
    return {"type": "text", "text": text}


def build_conversation(content: list[Row], answer: list[Row]) -> Row:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def translate(word: str) -> str:
    """Return the word of the same meaning in the other language."""
    return WORDS.get(word) or next(english for english, korean in WORDS.items() if korean == word)


def build_conversations(index: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Return pair -> training conversations; `seed` chooses the recordings that answer a translation."""
    draw = random.Random(seed)
    result: dict[str, list[Row]] = {
        pair: [] for pair in ("image-text", "text-image", "audio-text", "text-audio", "audio-audio")}
    pictures, sounds = index["pictures-train"], index["sounds-train"]
    by_word: dict[str, list[str]] = {}
    for row in sounds:
        by_word.setdefault(row["word"], []).append(row["path"])
    for language in LANGUAGES:
        prompts = PROMPTS[language]
        for row in pictures:
            image, name = {"type": "image", "path": row["path"]}, DIGITS[language][row["digit"]]
            result["image-text"].append(
                build_conversation([image, text_part(prompts["name"])], [text_part(name)]))
            result["text-image"].append(
                build_conversation([text_part(prompts["draw"].format(name))], [image]))
    for row in sounds:
        audio, word = {"type": "audio", "path": row["path"]}, row["word"]
        own, other = (KOREAN, ENGLISH) if row["voice"] == KOREAN else (ENGLISH, KOREAN)
        translation = {"type": "audio", "path": draw.choice(by_word[translate(word)])}
        result["audio-text"].append(
            build_conversation([audio, text_part(PROMPTS[own]["write"])], [text_part(word)]))
        result["text-audio"].append(
            build_conversation([text_part(PROMPTS[own]["say"].format(word))], [audio]))
        result["audio-audio"].append(
            build_conversation([audio, text_part(PROMPTS[other]["translate"])], [translation]))
    return result


def build_questions(index: dict[str, list[Row]], num_drawn: int) -> dict[str, list[Row]]:
    """Return pair, or PAIR/LANGUAGE of a spoken answer -> rows of `eval media` on held-out media.

    Args:
        index: labels of `write_media`.
        num_drawn: number of pictures to draw.
    """
    result: dict[str, list[Row]] = {}
    words = {ENGLISH: list(WORDS), KOREAN: list(WORDS.values())}
    for n, row in enumerate(index["pictures-heldout"]):
        language = LANGUAGES[n % 2]
        image = {"type": "image", "path": row["path"]}
        result.setdefault("image-text", []).append(build_question(
            [image, text_part(PROMPTS[language]["name"])], DIGITS[language][row["digit"]], DIGITS[language]))
    for n in range(num_drawn):
        language = LANGUAGES[n // 10 % 2]
        name = DIGITS[language][n % 10]
        result.setdefault("text-image", []).append(
            build_question([text_part(PROMPTS[language]["draw"].format(name))], name, DIGITS[language]))
    for row in index["sounds-heldout"]:
        audio, word = {"type": "audio", "path": row["path"]}, row["word"]
        own, other = (KOREAN, ENGLISH) if row["voice"] == KOREAN else (ENGLISH, KOREAN)
        result.setdefault("audio-text", []).append(
            build_question([audio, text_part(PROMPTS[own]["write"])], word, words[own]))
        result.setdefault(f"text-audio/{own}", []).append(
            build_question([text_part(PROMPTS[own]["say"].format(word))], word, words[own]))
        result.setdefault(f"audio-audio/{other}", []).append(
            build_question([audio, text_part(PROMPTS[other]["translate"])], translate(word), words[other]))
    return result


def build_question(content: list[Row], answer: str, labels: Iterable[str]) -> Row:
    return {"content": content, "answer": answer, "labels": list(labels)}
