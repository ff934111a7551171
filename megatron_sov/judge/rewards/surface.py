"""Rewards for the form of a response: length, repetition, language, format."""

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
"""Longer responses are cut to their last characters, where loops occur."""
_WORD = re.compile(r"\w+|[^\w\s]")
_NO_SPACES = {"THAI", "LAO", "KHMER", "MYANMAR", "CJK", "HIRAGANA", "KATAKANA"}
"""Scripts without spaces: characters count as words."""
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]{1,500}\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+", re.DOTALL)
_ADDRESS = re.compile(r"\b(?:https?://|www\.)\S+")


@dataclass(frozen=True)
class Length:
    """Reward `length`: DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), and a minimum length.

    0 up to `max_length - buffer`, then linear to -1 at `max_length`, and -1 beyond.
    """

    max_length: AtLeastOne = 20_480
    """Length with full punishment (DAPO: 20,480 tokens)."""
    buffer: Annotated[AtLeastOne, at_most_field("max_length")] = 4_096
    """Range over which the punishment grows (DAPO: 4,096 tokens)."""
    min_length: Annotated[NotNegativeInt, at_most_field("max_length")] = 0
    """Shorter responses get full punishment."""
    unit: Literal["tokens", "characters", "words"] = "tokens"
    """`tokens`: from the row's `num_tokens`, as counted by the engine."""

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
    """Return R_length from arXiv 2503.14476, equation 13."""
    # 0 up to max_length - buffer, then linear to -1 at max_length.
    return max(-1.0, min(0.0, (max_length - buffer - length) / buffer))


@dataclass(frozen=True)
class Repetition:
    """Reward `repetition`: 0 for normal text, down to -1 for repetitions or a missing end.

    The share of repeated n-grams is Open-R1's penalty (arXiv 2502.03373, section 4.2), minus an allowance for
    normal text.
    """

    ngram: AtLeastOne = 4
    """Words per n-gram."""
    allowed_share: Annotated[float, Ge(0), Le(0.99)] = 0.2
    """Share of repeated n-grams in normal text."""
    min_loop_repeats: Annotated[int, Ge(2)] = 4
    """Repetitions at the end that count as a loop."""
    min_loop_chars: AtLeastOne = 24
    """Shortest loop, in characters: "......" and table rules are not loops."""
    no_end_penalty: Share = 1.0
    """Penalty for `finish_reason` length. 0: no penalty."""

    def score(self, row: Row) -> Score:
        """Return the worst finding, from -1 to 0."""
        text = get_text(row, "response")[-MAX_CHARS:]
        share = compute_repeated_share(split_words(text), self.ngram)
        piece, repeats = find_final_loop(text, self.min_loop_chars)
        loops = repeats >= self.min_loop_repeats
        unended = row.get("finish_reason") == "length"
        # Excess over the allowed share, scaled to 0..1.
        excess = max(0.0, share - self.allowed_share) / (1 - self.allowed_share)
        # The maximum rather than the sum, because a loop also repeats n-grams and often has no end.
        worst = max(excess, float(loops), self.no_end_penalty if unended else 0.0)
        # 0.0 - 0.0 is 0.0; -0.0 would print as -0.
        return Score(0.0 - worst, {"repeated_share": share, "loop": piece[:40] if loops else "",
                                   "loop_repeats": repeats if loops else 0, "no_end": unended})


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words and signs; into characters for scripts without spaces."""
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        # Check distinct characters, because words in unspaced scripts are long.
        if any(get_script(char) in _NO_SPACES for char in set(word)):
            words.extend(word)
        else:
            words.append(word)
    return words


def compute_repeated_share(words: list[str], ngram: int) -> float:
    """Return the share of n-grams that occurred before; 0 without n-grams."""
    count = len(words) - ngram + 1
    if count <= 0:
        return 0.0
    return 1 - len({tuple(words[i:i + ngram]) for i in range(count)}) / count


def find_final_loop(text: str, min_chars: int = 1) -> tuple[str, int]:
    """Return (piece, repeats) for the loop with the most repeats at the end; ("", 1) without a loop.

    The Knuth-Morris-Pratt failure function on the reversed text gives the shortest period for every prefix.
    Time and memory are linear.

    Args:
        text: text to search.
        min_chars: shortest loop, in characters.
    """
    # Reversed, a repeated suffix becomes a prefix with a period.
    backwards = text.rstrip()[::-1]
    failure = [0] * len(backwards)
    best_period, best_repeats = 0, 1
    k = 0
    for i in range(1, len(backwards)):
        # k: longest proper prefix that also ends at i - 1
        while k and backwards[i] != backwards[k]:
            k = failure[k - 1]
        if backwards[i] == backwards[k]:
            k += 1
        failure[i] = k
        # i + 1 - k is the shortest period of the first i + 1 characters.
        repeats = (i + 1) // (i + 1 - k)
        if repeats > best_repeats and i + 1 >= min_chars:
            best_period, best_repeats = i + 1 - k, repeats
    return backwards[:best_period][::-1], best_repeats


@dataclass(frozen=True)
class LanguageReward:
    """Reward `language`: the share of letters in a language's scripts; 0 below `min_share`.

    Languages with the same script (English, German) are not distinguished.
    """

    language: Annotated[str, choice_from(lambda: {"", *LANGUAGES})] = ""
    """Code such as ko, th, en; empty: the row's field `language`."""
    also: tuple[Annotated[str, choice_from(lambda: LANGUAGES)], ...] = ("en",)
    """Languages also allowed, for names and terms."""
    max_also_share: Share = 0.2
    """Largest rewarded share of letters from `also`; more is code switching."""
    min_share: Share = 0.5
    """Below this share of the language's own letters, the reward is 0."""
    ignore_code: bool = True
    """Ignore code, formulas and addresses."""

    def score(self, row: Row) -> Score:
        """Return the share of allowed letters."""
        language = self.language or get_text(row, "language")
        if language not in LANGUAGES:
            raise Refused(f"language = {language!r} is not known (languages: {', '.join(sorted(LANGUAGES))})")
        text = get_text(row, "response")
        if self.ignore_code:
            # Code first, because a dollar sign in code does not start a formula.
            text = _ADDRESS.sub(" ", _FORMULA.sub(" ", _CODE.sub(" ", text)))
        counts = count_letters_by_script(text)
        total = sum(counts.values())
        if not total:
            return Score(0.0, {"language": language, "num_letters": 0})
        language_scripts = set(LANGUAGES[language])
        # Shared scripts count as the language's own.
        also_scripts = {script for name in self.also for script in LANGUAGES[name]} - language_scripts
        language_share = sum(counts[s] for s in language_scripts) / total
        also_share = sum(counts[s] for s in also_scripts) / total
        foreign_share = 1 - language_share - also_share
        # Other letters count up to their limit.
        reward = language_share + min(also_share,
                                      self.max_also_share) if language_share >= self.min_share else 0.0
        return Score(min(reward, 1.0), {
            "language": language, "own_share": language_share, "also_share": also_share,
            "foreign_share": max(foreign_share, 0.0), "switches_per_100_words": count_script_switches(text)})


def count_script_switches(text: str) -> float:
    """Return script changes between words, per 100 words with letters."""
    scripts = [script for word in text.split() if (script := next(filter(None, map(get_script, word)), ""))]
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
    """Reward `format`: the share of passed checks, or all or nothing."""

    CONTROL, cpu_limit_s = "", 10.0

    regex: Annotated[str, Bound(_find_regex_problem)] = ""
    """Pattern for the whole stripped response; `.` matches line ends."""
    tags: tuple[Annotated[str, Bound(_find_name_problem)], ...] = ()
    """Tag names such as think, answer: non-empty elements <think>...</think>, each once, in this order, with
    only whitespace around them."""
    json: bool = False
    """Require a single JSON value, optionally in a Markdown fence."""
    json_keys: tuple[str, ...] = ()
    """Require a JSON object with these keys."""
    field: str = "response"
    """Row field to check."""
    all_or_nothing: bool = True
    """1 or 0; otherwise the share of passed checks."""

    def problems(self) -> list[SettingsProblem]:
        return [] if self.regex or self.tags or self.json or self.json_keys else [
            SettingsProblem(ProblemCode.RULE, "", "nothing is asked for",
                            way_out="set regex, tags, json or json_keys")]

    def score(self, row: Row) -> Score:
        """Return the share of passed checks, or whether all pass."""
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
    """Return whether a text consists of these elements in order, each once and not empty."""
    place = 0
    for tag in tags:
        begin, end = f"<{tag}>", f"</{tag}>"
        # Count in the whole text: a second <answer> would be ambiguous.
        if text.count(begin) != 1 or text.count(end) != 1:
            return False
        start = text.index(begin)
        stop = text.index(end)
        if start < place or text[place:start].strip() or not text[start + len(begin):stop].strip():
            return False
        place = stop + len(end)
    return not text[place:].strip()
