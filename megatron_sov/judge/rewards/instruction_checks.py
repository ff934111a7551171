"""The 25 kinds of checkable instructions of IFEval (arXiv 2311.07911), judged as lm-evaluation-harness does.

Each check takes a response and the instruction's arguments.  Two parts of the original need models that are
not shipped here: its sentences are cut by NLTK's punkt, ours by rules; its languages are told by langdetect,
which is asked where it is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.reward import Refused

Check = Callable[..., bool]
RELATIONS = ("less than", "at least")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")
_WORD = re.compile(r"\w+")


def _compared(count: int, relation: str, limit: int) -> bool:
    if relation not in RELATIONS:
        raise Refused(f"relation = {relation!r} must be one of {', '.join(RELATIONS)}")
    return count < limit if relation == RELATIONS[0] else count >= limit


def _sound(pattern: str) -> str:
    """Return a keyword as a pattern, as the original takes it; what is none (C++) word for word."""
    return re.escape(pattern) if patterns.problem(pattern) else pattern


def keywords_exist(response: str, keywords: Sequence[str]) -> bool:
    return all(patterns.search(_sound(word), response, patterns.regex.IGNORECASE) for word in keywords)


def keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    found = patterns.findall(_sound(keyword.strip()), response, patterns.regex.IGNORECASE)
    return _compared(len(found), relation, frequency)


def forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    return not any(patterns.search(rf"\b{_sound(word)}\b", response, patterns.regex.IGNORECASE)
                   for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


def response_language(response: str, language: str) -> bool:
    return _language(response) in (None, language)


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _compared(len(sentences(response)), relation, num_sentences)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    # empty parts at the ends are allowed, in the middle they are a fault: the original's rule
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    if not all(parts[1:-1]):
        return False
    return sum(map(bool, parts)) == num_paragraphs


def number_words(response: str, num_words: int, relation: str) -> bool:
    return _compared(len(_WORD.findall(response)), relation, num_words)


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = response.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if not 0 < nth_paragraph <= count or not parts[nth_paragraph - 1].strip():
        return False
    # the original strips one kind of quotation mark after the other, and so do we
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(patterns.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return patterns.search(known.get(marker, _sound(marker.lower())), response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    # two stars begin bold text and no bullet
    stars = patterns.findall(r"^\s*\*[^\*].*$", response, patterns.regex.MULTILINE)
    dashes = patterns.findall(r"^\s*-.*$", response, patterns.regex.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(response: str) -> bool:
    return any(option in response for option in OPTIONS)


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    # bold text also matches the single pattern at its ends, with nothing inside; the original counts both
    # patterns
    single = patterns.findall(r"\*[^\n\*]*\*", response)
    double = patterns.findall(r"\*\*[^\n\*]*\*\*", response)
    count = sum(bool(text.strip("*").strip()) for text in single)
    return count + sum(bool(text[2:-2].strip()) for text in double) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(patterns.findall(rf"\s?{_sound(section_spliter.strip())}\s?\d+\s?", response)) >= num_sections


def json_format(response: str) -> bool:
    text = response.strip()
    # in this order, as the original removes them
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in patterns.findall(r"<<[^\n]+>>", response))


def two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    found = list(filter(None, parts))
    return all(parts[1:-1]) and len(found) == 2 and found[0] != found[1]


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[^\s,;:?!()\[\]{}\"<>`]+", response)
    return _compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    return response.isupper() and _language(response) in (None, "en")


def english_lowercase(response: str) -> bool:
    return response.islower() and _language(response) in (None, "en")


def no_comma(response: str) -> bool:
    return "," not in response


def quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: Mapping[str, Check] = {
    "keywords:existence": keywords_exist, "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words, "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections, "detectable_format:json_format": json_format,
    "detectable_format:title": title, "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt, "startend:end_checker": end_checker,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital, "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma, "startend:quotation": quotation,
}
"""Name of an instruction, as the data set google/IFEval has it -> its check."""

_PERIOD = "\ufdd0"  # no character of any text; holds the place of a full stop that ends no sentence
_KEPT = [
    (r"(?<=\b(?:Mr|St|Ms|Dr))\.|(?<=\bMrs)\.|(?<=\bPh\.D)\.", _PERIOD), (r"(?<=\d)\.(?=\d)", _PERIOD),
    (r"\.(?=(?:com|net|org|io|gov|edu|me)\b)", _PERIOD),
    (r"(?<=\b[A-Za-z])\.(?=[A-Za-z]\b|\s+[a-z])", _PERIOD),
]


def hold_periods(text: str) -> str:
    """Return a text in which a full stop that ends no sentence is another character."""
    # titles, decimals, addresses and initials keep their full stops while sentences are cut
    for pattern, kept in _KEPT:
        text = re.sub(pattern, kept, text)
    return text


def release_periods(text: str) -> str:
    """Return a text as it was before `hold_periods`."""
    return text.replace(_PERIOD, ".")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: cut behind . ? ! and a closing quotation mark, not behind titles, nor
    in numbers, addresses and initials."""
    parts = re.split(r"(?<=[.?!。？！])[\"”'’)]*(?=\s|$)", hold_periods(text))
    return [part.strip() for part in parts if part.strip(" \n\t.?!\"”'’)")]


def _language(text: str) -> str | None:
    """Return the language of a text as langdetect has it; None where it cannot say, which counts as followed.

    Raises:
        Refused: langdetect is not installed.
    """
    try:
        import langdetect
    except ImportError:
        raise Refused("its language is told by langdetect, which is not installed; "
                      "pip install langdetect") from None
    langdetect.DetectorFactory.seed = 0  # without, it draws at random
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None
