"""Data of `any_to_any.py`: image and speech files, training conversations, and questions for the evaluation.

Pairs are INPUT-OUTPUT: image-text names a digit, text-image draws a digit, audio-text writes a spoken word,
text-audio says a word, and audio-audio translates a spoken word between English and Korean.
"""

import random
from collections.abc import Iterable, Iterator
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


def translate(word: str) -> str:
    """Return the word of the same meaning in the other language."""
    return WORDS.get(word) or next(english for english, korean in WORDS.items() if korean == word)


def build_text(text: str) -> Row:
    return {"type": "text", "text": text}


def iter_sound_tasks(row: Row) -> Iterator[tuple[str, str, list[Row], str]]:
    """Yield (pair, language of the answer, parts of the prompt, answer) of each task with a recorded word."""
    audio, word = {"type": "audio", "path": row["path"]}, row["word"]
    own, other = (KOREAN, ENGLISH) if row["voice"] == KOREAN else (ENGLISH, KOREAN)
    yield "audio-text", own, [audio, build_text(PROMPTS[own]["write"])], word
    yield "text-audio", own, [build_text(PROMPTS[own]["say"].format(word))], word
    yield "audio-audio", other, [audio, build_text(PROMPTS[other]["translate"])], translate(word)


def build_conversations(index: dict[str, list[Row]], seed: int) -> dict[str, list[Row]]:
    """Return pair -> training conversations; `seed` chooses the recordings that answer a translation."""
    rng = random.Random(seed)
    result: dict[str, list[Row]] = {
        pair: [] for pair in ("image-text", "text-image", "audio-text", "text-audio", "audio-audio")}
    paths_of_words: dict[str, list[str]] = {}
    for row in index["sounds-train"]:
        paths_of_words.setdefault(row["word"], []).append(row["path"])

    def add(pair: str, prompt: list[Row], answer: Row) -> None:
        result[pair].append({"messages": [{"role": "user", "content": prompt},
                                          {"role": "assistant", "content": [answer]}]})

    for language in LANGUAGES:
        prompts = PROMPTS[language]
        for row in index["pictures-train"]:
            image, name = {"type": "image", "path": row["path"]}, DIGITS[language][row["digit"]]
            add("image-text", [image, build_text(prompts["name"])], build_text(name))
            add("text-image", [build_text(prompts["draw"].format(name))], image)
    for row in index["sounds-train"]:
        translation = rng.choice(paths_of_words[translate(row["word"])])
        for pair, _, prompt, word in iter_sound_tasks(row):
            path = translation if pair == "audio-audio" else row["path"]
            add(pair, prompt, build_text(word) if pair == "audio-text" else {"type": "audio", "path": path})
    return result


def build_questions(index: dict[str, list[Row]], num_drawn: int) -> dict[str, list[Row]]:
    """Return pair, or PAIR/LANGUAGE of a spoken answer -> rows of `eval media` on held-out media.

    Args:
        index: labels of `write_media`.
        num_drawn: number of pictures to draw.
    """
    result: dict[str, list[Row]] = {}

    def add(name: str, prompt: list[Row], answer: str, labels: Iterable[str]) -> None:
        result.setdefault(name, []).append({"content": prompt, "answer": answer, "labels": list(labels)})

    for n, row in enumerate(index["pictures-heldout"]):
        language = LANGUAGES[n % 2]
        prompt = [{"type": "image", "path": row["path"]}, build_text(PROMPTS[language]["name"])]
        add("image-text", prompt, DIGITS[language][row["digit"]], DIGITS[language])
    for n in range(num_drawn):
        language = LANGUAGES[n // 10 % 2]
        name = DIGITS[language][n % 10]
        add("text-image", [build_text(PROMPTS[language]["draw"].format(name))], name, DIGITS[language])
    for row in index["sounds-heldout"]:
        for pair, language, prompt, word in iter_sound_tasks(row):
            name = pair if pair == "audio-text" else f"{pair}/{language}"
            add(name, prompt, word, WORDS if language == ENGLISH else WORDS.values())
    return result
