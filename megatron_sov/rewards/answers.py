"""The final answer of a response: what stands in a box, in answer tags, behind "the answer is"."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 100_000
"""Of a longer response the end is read."""
MAX_ANSWER_CHARS = 500
# "answer" alone is a word like others ("I hope this answer helps"): a mark has to follow it
_SAID = re.compile(r"(?:\banswer\b(?:[\s*]{0,6}is\b|(?=[ \t*]{0,6}\n|\W{0,6}(?:[:：=$\\]|[-+.]?\d|"
                   r"(?:option|choice)\b|(?-i:[A-HJ])\b)))|"
                   r"정답(?:은|:)?|답(?:은|:)|คำตอบ(?:คือ)?|答案(?:是)?|答え(?:は)?)"
                   r"[\s:：*]{0,6}", re.IGNORECASE)
_TAG = re.compile(r"<answer>([^<]{1,500})</answer>")


def final_answer(response: str) -> str | None:
    """Return what a response says in the end, by its clearest mark; None where nothing is marked.

    The marks, of which the last of the first kind that there is counts: \\boxed{...}; <answer>...</answer>;
    "the answer is ..." (also in Korean, Thai, Chinese, Japanese); a last line of few words.
    """
    text = response[-MAX_CHARS:].strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged = _TAG.findall(text)
    if tagged:
        return tagged[-1].strip()
    said = [match.end() for match in _SAID.finditer(text)]
    if said:
        return text[said[-1]:].partition("\n")[0][:MAX_ANSWER_CHARS].strip().strip("*").strip()
    line = text.rsplit("\n", 1)[-1].strip()
    return line if line and len(line.split()) <= 8 and len(line) <= MAX_ANSWER_CHARS else None


def last_boxed(text: str) -> str | None:
    """Return the content of the last whole \\boxed{...}, braces in it balanced; None where there is none."""
    place = last_box(text)
    return None if place is None else text[place[0] + len("\\boxed{"):place[1] - 1]


def last_box(text: str) -> tuple[int, int] | None:
    """Return where the last whole \\boxed{...} begins and ends; None where there is none."""
    end = len(text)
    for _ in range(20):  # of a response of boxes that are never closed the last ones are enough
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            return None
        depth = 0
        for i in range(start + len("\\boxed"), min(len(text), start + MAX_ANSWER_CHARS)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return start, i + 1
        end = start
    return None


def normalized(text: str) -> str:
    """Return a short answer without case, articles, punctuation at its ends, LaTeX's text marks, and with
    single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^(?:the|an?)\s+", "", text.strip().strip("$").strip())
    return re.sub(r"\s+", " ", text).strip(" .,;:!?'\"`*()[]。、$")
