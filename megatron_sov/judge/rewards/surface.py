"""What a response looks like: its length, its repetitions, its language, its form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Le

from megatron_sov.base.documents.scripts import LANGUAGES, count_letters_by_script, get_script
from megatron_sov.base.settings import (
    AtLeastOne, Bound, NotNegativeInt, ProblemCode, SettingsProblem, Share, Violation, at_most_field,
    choice_from)
from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.reward import Refused, Row, Score, get_text

MAX_CHARS = 400_000
"""Of a longer response the end is looked at: loops stand there."""
_WORD = re.compile(r"\w+|[^\w\s]")
_NO_SPACES = {"THAI", "LAO", "KHMER", "MYANMAR", "CJK", "HIRAGANA", "KATAKANA"}
"""Scripts written without spaces: a word there would be a sentence, so its characters count as words."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]{1,500}\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+", re.DOTALL)
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")


@dataclass(frozen=True)
class Length:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), and a least length.

    0 up to `max_length - buffer`, then falling evenly to -1 at `max_length`, and -1 beyond.
    """

    max_length: AtLeastOne = 20_480
    """Where the punishment is whole (DAPO: 20,480 tokens)."""
    buffer: Annotated[AtLeastOne, at_most_field("max_length")] = 4_096
    """Over how much before that it grows (DAPO: 4,096 tokens)."""
    min_length: Annotated[NotNegativeInt, at_most_field("max_length")] = 0
    """A shorter response is punished whole."""
    unit: Literal["tokens", "characters", "words"] = "tokens"
    """tokens: the row's field `num_tokens`, as the engine that wrote the response counts them."""

    def score(self, row: Row) -> Score:
        length = self._measure_length(row)
        if length < self.min_length:
            return Score(-1.0, {"length": length, "too_short": True})
        return Score(compute_overlong_penalty(length, self.max_length, self.buffer), {"length": length})

    def _measure_length(self, row: Row) -> int:
        text = get_text(row, "response")
        if self.unit == "characters":
            return len(text)
        if self.unit == "words":
            return len(text.split())
        length = row.get("num_tokens")
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise Refused(f"num_tokens = {length!r} must be the number of the response's tokens; "
                          "or set unit=characters or unit=words")
        return length


def compute_overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """Return R_length of arXiv 2503.14476, equation 13."""
    # 0 up to max_length - buffer, then a line down to -1 at max_length
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))


@dataclass(frozen=True)
class Repetition:
    """0 for a sound response, down to -1 for one that repeats itself or never ends.

    The share of repeated n-grams is the penalty of Open-R1 (arXiv 2502.03373, section 4.2): one less
    than the share of different n-grams, here beyond a share that sound text has anyway.
    """

    ngram: AtLeastOne = 4
    """Words of an n-gram."""
    allowed_share: Annotated[float, Ge(0), Le(0.99)] = 0.2
    """Of repeated n-grams; sound text repeats some."""
    min_loop_repeats: Annotated[int, Ge(2)] = 4
    """How often the same piece in a row, at the end of the response, is a loop."""
    min_loop_chars: AtLeastOne = 24
    """Length of a loop in all, at least: "......" is none, and no table's rule."""
    no_end_penalty: Share = 1.0
    """For a row whose `finish_reason` is length: the response did not end by itself. 0: is no fault."""

    def score(self, row: Row) -> Score:
        """Return the worst of what was seen, as a number from -1 to 0."""
        text = get_text(row, "response")[-MAX_CHARS:]
        share = compute_repeated_share(split_words(text), self.ngram)
        piece, repeats = find_final_loop(text, self.min_loop_chars)
        loops = repeats >= self.min_loop_repeats
        unended = row.get("finish_reason") == "length"
        # what is beyond the allowed share, over all that could be: 0 to 1
        excess = max(0.0, share - self.allowed_share) / (1 - self.allowed_share)
        # the worst and not the sum: a loop is also repeated n-grams and often has no end
        worst = max(excess, float(loops), self.no_end_penalty if unended else 0.0)
        # 0.0 - 0.0 is 0.0, and -0.0 would print as -0
        return Score(0.0 - worst, {"repeated_share": share, "loop": piece[:40] if loops else "",
                                   "loop_repeats": repeats if loops else 0, "no_end": unended})


def split_words(text: str) -> list[str]:
    """Return the words and signs of a text; each character where a script has no spaces."""
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        # each different character once: words of unspaced scripts are long
        if any(get_script(char) in _NO_SPACES for char in set(word)):
            words.extend(word)
        else:
            words.append(word)
    return words


def compute_repeated_share(words: list[str], ngram: int) -> float:
    """Return the share of n-grams that have stood before; 0 where there are none."""
    count = len(words) - ngram + 1
    if count <= 0:
        return 0.0
    return 1 - len({tuple(words[i:i + ngram]) for i in range(count)}) / count


def find_final_loop(text: str, min_chars: int = 1) -> tuple[str, int]:
    """Return the piece of at least `min_chars` in all that a text ends with over and over, and how often it
    stands there in a row; an empty text and 1 where nothing does.

    The failure function of Knuth, Morris and Pratt over the reversed text gives the shortest period of each
    of its beginnings; the one with the most repeats counts.  Work and memory grow with the length alone.
    """
    # reversed, an end that repeats is a beginning with a period
    backwards = text.rstrip()[::-1]
    failure = [0] * len(backwards)
    best_period, best_repeats = 0, 1
    k = 0
    for i in range(1, len(backwards)):
        # k: length of the longest proper beginning that also ends at i - 1
        while k and backwards[i] != backwards[k]:
            k = failure[k - 1]
        if backwards[i] == backwards[k]:
            k += 1
        failure[i] = k
        # i + 1 - k is the shortest period of the first i + 1 characters
        repeats = (i + 1) // (i + 1 - k)
        if repeats > best_repeats and i + 1 >= min_chars:
            best_period, best_repeats = i + 1 - k, repeats
    return backwards[:best_period][::-1], best_repeats


@dataclass(frozen=True)
class LanguageReward:
    """The share of letters in the scripts of a language; below a share it is 0.

    Languages that share a script (English, German) are not told apart.
    """

    language: Annotated[str, choice_from(lambda: {"", *LANGUAGES})] = ""
    """Code such as ko, th, en; empty: the row's own field `language`."""
    also: tuple[Annotated[str, choice_from(lambda: LANGUAGES)], ...] = ("en",)
    """Languages whose letters may stand beside it, as names and terms do."""
    max_also_share: Share = 0.2
    """Of all letters, those of `also`; more is code switching."""
    min_share: Share = 0.5
    """Below this share of the language's own letters the reward is 0."""
    ignore_code: bool = True
    """Leave out code, formulas and addresses, which are in no language."""

    def score(self, row: Row) -> Score:
        """Return the share of letters that may stand there, less what is too many of the others."""
        language = self.language or get_text(row, "language")
        if language not in LANGUAGES:
            raise Refused(f"language = {language!r} is not known (languages: {', '.join(sorted(LANGUAGES))})")
        text = get_text(row, "response")
        if self.ignore_code:
            # code first: a dollar sign inside of it begins no formula
            text = _ADDRESS.sub(" ", _FORMULA.sub(" ", _CODE.sub(" ", text)))
        counts = count_letters_by_script(text)
        total = sum(counts.values())
        if not total:
            return Score(0.0, {"language": language, "num_letters": 0})
        own_scripts = set(LANGUAGES[language])
        # scripts that both languages use count as the language's own
        other_scripts = {script for name in self.also for script in LANGUAGES[name]} - own_scripts
        language_share = sum(counts[s] for s in own_scripts) / total
        also_share = sum(counts[s] for s in other_scripts) / total
        foreign_share = 1 - language_share - also_share
        # other letters are paid up to their limit; below `min_share` it is another language
        reward = language_share + min(also_share,
                                      self.max_also_share) if language_share >= self.min_share else 0.0
        return Score(min(reward, 1.0), {
            "language": language, "own_share": language_share, "also_share": also_share,
            "foreign_share": max(foreign_share, 0.0), "switches_per_100_words": count_script_switches(text)})


def count_script_switches(text: str) -> float:
    """Return how often the script changes from one word to the next, per 100 words that have letters."""
    scripts = [script for word in text.split()
               if (script := next(filter(None, map(get_script, word)), ""))]
    if len(scripts) < 2:
        return 0.0
    return 100 * sum(a != b for a, b in pairwise(scripts)) / len(scripts)


def _find_regex_problem(text: str) -> Violation | None:
    wrong = patterns.find_pattern_problem(text) if text else ""
    return (ProblemCode.RULE, f"is no regular expression ({wrong})", "mend it") if wrong else None


def _find_name_problem(text: str) -> Violation | None:
    return None if re.fullmatch(r"[A-Za-z_][\w-]*", text) else (
        ProblemCode.RULE, "must be a name of letters, digits, - and _", "")


@dataclass(frozen=True)
class Format:
    """The share of the asked-for checks that a response passes; all or nothing by setting."""

    CONTROL, cpu_limit_s = "", 10.0

    regex: Annotated[str, Bound(_find_regex_problem)] = ""
    """A pattern that the response, white space around it removed, matches as a whole; `.` takes line ends."""
    tags: tuple[Annotated[str, Bound(_find_name_problem)], ...] = ()
    """Names such as think, answer: each stands once as <think>...</think>, in this order, with something in
    it, and nothing but white space stands around them."""
    json: bool = False
    """The response is one JSON value, in a Markdown fence or not."""
    json_keys: tuple[str, ...] = ()
    """The JSON is an object with these keys."""
    field: str = "response"
    """Field of the row that is looked at."""
    all_or_nothing: bool = True
    """1 or 0; without, the share of checks that pass."""

    def problems(self) -> list[SettingsProblem]:
        return [] if self.regex or self.tags or self.json or self.json_keys else [
            SettingsProblem(ProblemCode.RULE, "", "nothing is asked for",
                            way_out="set regex, tags, json or json_keys")]

    def score(self, row: Row) -> Score:
        """Return the share of checks that pass, or whether all do."""
        passed = dict(self._run_checks(get_text(row, self.field).strip()))
        share = sum(passed.values()) / len(passed)
        return Score(float(share == 1) if self.all_or_nothing else share, passed)

    def _run_checks(self, text: str) -> Iterator[tuple[str, bool]]:
        if self.regex:
            yield "regex", patterns.fullmatch(self.regex, text, patterns.regex.DOTALL) is not None
        if self.tags:
            yield "tags", has_tag_sequence(text, self.tags)
        if self.json or self.json_keys:
            value = patterns.parse_json(text)
            yield "json", value is not patterns.NO_JSON
            if self.json_keys:
                yield "json_keys", isinstance(value, dict) and set(self.json_keys) <= set(value)


def has_tag_sequence(text: str, tags: tuple[str, ...]) -> bool:
    """Return whether a text is these elements one after the other, each once and not empty."""
    place = 0
    for tag in tags:
        begin, end = f"<{tag}>", f"</{tag}>"
        # counted in the whole text: a second <answer> anywhere would leave open which one counts
        if text.count(begin) != 1 or text.count(end) != 1:
            return False
        start = text.index(begin)
        stop = text.index(end)
        if start < place or text[place:start].strip() or not text[start + len(begin):stop].strip():
            return False
        place = stop + len(end)
    return not text[place:].strip()
