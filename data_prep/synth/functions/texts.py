"""Functions over texts: language, numbers, quotations, code, refusals, and overlap."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import regex

from data_prep.curate.quality.identify import (
    UNKNOWN_LANGUAGE, detect_form, extract_language_text, identify_language, load_language_tables)
from data_prep.synth.declared.parsers import parse_tagged_texts
from megatron_sov.base.documents.overlap import find_units
from megatron_sov.base.documents.scripts import LANGUAGES, count_letters_by_script
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.settings import choice_from
from megatron_sov.judge.rewards.surface import LanguageReward

LANGUAGE_NAMES, REFUSALS = (Path(__file__).with_name(f"{name}.yaml") for name in ("languages", "refusals"))
ID_CHARS = 24
"""Hexadecimal digits in ids and fences."""
TIMEOUT_S = 2.0
"""Time limit for a generator file's regular expression."""
MIN_SCORE = 0.5
"""Minimum `identify_language` score for a certain language."""
MIN_LETTERS = 80
"""Minimum letters for `identify_language` to distinguish languages with a common script."""
MAX_FOREIGN_SHARE = 0.1
"""Maximum share of letters outside Latin and the language's script."""
MIN_DIGITS = 3
"""Numbers with fewer significant digits may be words in another text: 3 and three, 5 and May."""
BEGINNING_CHARS = 240
"""Characters searched for a refusal; later text may quote one."""
# up to 40 % of the letters may be Latin: every language borrows terms and names
_SCRIPTS = LanguageReward(also=("en",), max_also_share=0.4, min_share=0.4)
_QUOTATION = re.compile("|".join(
    rf"{opening}([^{opening}{closing}\n]{{1,300}}){closing}" for opening, closing in
    ("“”", "「」", "『』", "《》", "〈〉", "«»", "„“"))
    + r'|"([^"\n]{1,300})"|`([^`\n]{1,300})`|<<([^<>\n]{1,300})>>')
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`"  # code
    r"|\$\$[^$]{1,2000}\$\$|\$(?!\s)[^$\n]{1,300}(?<!\s)\$(?!\d)"  # formulas
    r"|\\\([^\\]{1,300}\\\)|\\\[[^\]]{1,2000}\\\]"
    r"|\b(?:https?://|www\.)(?:[^\s<>()\"'）」』，。、]*[\w/#=&%-])"  # addresses
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{0,63}\w"
    r"|\{\{[^{}\n]{1,80}\}\}|\$?\{[^{}\n]{0,80}\}|%(?:\(\w+\))?[-+0#]?\d*(?:\.\d+)?[sdfrx]\b|<<[^<>\n]{1,80}>>"
    r"|</?[A-Za-z][^<>\n]{0,200}>|\[[A-Z][A-Z_ ]*\]", re.DOTALL)
"""Text outside every language: code, formulas, addresses, placeholders, tags."""
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?:[.,'’]\d+|[십백천만억조十百千万萬億亿兆]+\s?\d+)*")
"""Digits after Latin letters, as in B52, belong to a name; 3만 5천 is a single number."""
LanguageCode = Annotated[str, choice_from(lambda: LANGUAGES)]
"""ISO 639-1 code in `LANGUAGES`, which lists scripts."""
IdentifiableLanguage = Annotated[str, choice_from(
    lambda: {"", *set(LANGUAGES) & load_language_tables().known})]
"""ISO 639-1 code that `identify_language` recognizes, or ""."""


@lru_cache(maxsize=2)
def _read_yaml(file: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = load_package_table(file)
    return content


def get_language_name(language: str) -> str:
    """Return a language's English name, for prompts."""
    name: str = _read_yaml(LANGUAGE_NAMES).get(language, f"the language with the ISO 639 code {language}")
    return name


def identify_likely_language(text: str) -> str:
    """Return the most likely ISO 639-1 code."""
    return identify_language(text)[0]


def identify_certain_language(document: str) -> str:
    """Return a document's ISO 639-1 code; "" below `MIN_SCORE`, or outside `LANGUAGES`."""
    language, score = identify_language(extract_language_text(document, detect_form(document)))
    return language if score >= MIN_SCORE and language != UNKNOWN_LANGUAGE and language in LANGUAGES else ""


def is_in_language(text: str, language: str) -> bool:
    """Return whether a text is in a language, apart from names and terms in Latin letters.

    Letters alone decide about a text shorter than `MIN_LETTERS`; languages with one script pass as each
    other.
    """
    script = _SCRIPTS.score({"response": text, "language": language})
    if not script.components.get("num_letters", 1):
        return True
    if script.reward == 0 or script.components["foreign_share"] > MAX_FOREIGN_SHARE:
        return False
    identified, score = identify_language(text)
    is_long = sum(count_letters_by_script(text).values()) >= MIN_LETTERS
    return not is_long or identified in (language, UNKNOWN_LANGUAGE) or score < MIN_SCORE


def find_numbers(text: str) -> list[str]:
    """Return each different number's significant digits: 12 for 1,200,000, 1.2 million and 120만."""
    # convert Thai, Arabic and full-width digits to ASCII
    ascii_text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    digits = (re.sub(r"\D", "", number).strip("0") for number in _NUMBER.findall(ascii_text))
    return list(dict.fromkeys(filter(None, digits)))


def find_changed_numbers(text: str, source: str, *, may_drop: bool = False) -> list[str]:
    """Return numbers in either `text` or `source`.

    A number with one or two significant digits may be a word on the other side. Such numbers count only
    if both texts have numbers that the other text lacks.

    Args:
        text: text made from `source`.
        source: the original.
        may_drop: whether `text` may lack numbers of `source`.
    """
    numbers, source_numbers = find_numbers(text), find_numbers(source)
    new = [number for number in numbers if number not in source_numbers]
    lost = [number for number in source_numbers if number not in numbers]
    changed = new if may_drop else [*new, *lost]
    return changed if new and lost else [number for number in changed if len(number) >= MIN_DIGITS]


def find_quotations(text: str) -> list[str]:
    """Return the texts between quotation marks, backquotes or double angle brackets, in order."""
    quotations = (next(filter(None, match.groups())).strip(" .,!?…") for match in _QUOTATION.finditer(text))
    return [quotation for quotation in quotations if quotation]


def find_code(text: str) -> list[str]:
    """Return code, formulas, addresses, placeholders and tags, sorted."""
    return sorted(_CODE.findall(text))


def remove_code(text: str, quotations: Iterable[str] = ()) -> str:
    """Remove code, formulas, addresses, placeholders, tags and `quotations` from a text."""
    text = _CODE.sub(" ", text)
    # longest first, because quotations may be nested
    for quotation in sorted(quotations, key=len, reverse=True):
        text = text.replace(quotation, " ")
    return text


def compute_copied_share(text: str, source: str, words: int) -> float:
    """Return the share of runs with `words` words in `text` that `source` contains.

    For a shorter text: 1 if `source` is equal, else 0.
    """
    runs = find_units(text).runs(words)
    if len(runs):
        return float(np.isin(runs, find_units(source).runs(words)).mean())
    return float(text.split() == source.split() and any(c.isalpha() for c in text))


def compute_size_ratio(text: str, source: str) -> float:
    """Return words in `text` per word in `source`."""
    return find_units(text).size / max(find_units(source).size, 1)


def replace_contents(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Replace `content` in the first messages by `texts`."""
    replaced = [{**message, "content": text} for message, text in zip(messages, texts, strict=False)]
    return [*replaced, *map(dict, messages[len(texts):])]


@lru_cache(maxsize=1)
def _load_chrf() -> Any:
    from sacrebleu.metrics import CHRF  # optional package

    return CHRF()


def compute_chrf(text: str, reference: str) -> float:
    """Return chrF against a reference, 0 to 100."""
    return float(_load_chrf().sentence_score(text, [reference]).score)


def fill_phrasing(phrasing: str, **fields: str) -> str:
    """Replace each {name} in a phrasing by a field; {name} inside a field stays."""
    return re.sub(r"\{(\w+)\}", lambda place: fields.get(place[1], place[0]), phrasing)


def fence_text(text: str) -> str:
    """Put a text between two equal lines that the author could not predict."""
    # hashed from the text: a text cannot contain the closing line
    fence = f"=== {hashlib.sha256(text.encode()).hexdigest()[:ID_CHARS]} ==="
    return f"{fence}\n{text}\n{fence}"


def find_tagged_text(text: str, tag: str) -> str:
    """Return the text between <tag> and </tag> in a reply, or ""."""
    return (parse_tagged_texts(text, [tag]) or {tag: ""})[tag]


def remove_pattern(text: str, pattern: str) -> str:
    return str(regex.sub(pattern, "", text, timeout=TIMEOUT_S))


def find_pattern_matches(text: str, pattern: str) -> list[str]:
    return [match[0] for match in regex.finditer(pattern, text, timeout=TIMEOUT_S)]


@lru_cache(maxsize=1)
def _compile_refusals() -> dict[str, list[regex.Pattern[str]]]:
    return {language: [regex.compile(pattern, regex.IGNORECASE) for pattern in patterns]
            for language, patterns in _read_yaml(REFUSALS).items()}


def is_refusal(answer: str, language: str) -> bool:
    """Return whether an answer begins with a refusal in `language`, or in English, the models' fallback."""
    # cut twice: long answers cost no time, and blanks do not use up the beginning
    beginning = " ".join(answer[:2 * BEGINNING_CHARS].replace("’", "'").split())[:BEGINNING_CHARS]
    patterns = [pattern for name in dict.fromkeys((language, "en"))
                for pattern in _compile_refusals().get(name, ())]
    return any(pattern.search(beginning, timeout=TIMEOUT_S) for pattern in patterns)


def is_dialogue(text: str, min_turns: int = 4) -> bool:
    """Return whether the lines are alternating turns by A and B, beginning with A."""
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) >= min_turns and all(
        regex.fullmatch(rf"{'AB'[number % 2]}: \S.*", line) for number, line in enumerate(lines))
