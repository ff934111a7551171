"""Scripts by Unicode character names, and code point ranges of scripts without blanks between words."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

# Scripts whose words are not separated by blanks, or not reliably. Each user chooses rows of this table, and
# they differ on purpose:
# - shared runs of words (`documents.overlap`) keep Tibetan whole, because marks separate its syllables, and
#   count Hangul in a size of its own. They work on NFKC, which has no half-width kana or compatibility
#   letters, and count the marks of Han as characters;
# - quality rules (`data_prep.curate.quality.rules.words`) count modern text, without letters of old Korean;
# - n-grams of scorers (`data_prep.curate.scoring.ngrams`) keep runs of lone Hangul letters, bopomofo and
#   half-width kana whole: as words they carry a meaning that single letters lose. A change requires training
#   all scorers again.
CODE_POINTS: dict[str, tuple[tuple[int, int], ...]] = {
    "thai": ((0x0E00, 0x0E80),), "lao": ((0x0E80, 0x0F00),), "tibetan letters": ((0x0F40, 0x0FBD),),
    "tibetan signs": ((0x0F00, 0x0F40), (0x0FBD, 0x1000)), "burmese": ((0x1000, 0x10A0),),
    "khmer": ((0x1780, 0x1800),), "kana": ((0x3040, 0x3100), (0x31F0, 0x3200)),
    "half-width kana": ((0xFF66, 0xFFA0),), "bopomofo": ((0x3100, 0x3130),),
    "han": ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)),
    "marks of han": ((0x3005, 0x3008),), "hangul": ((0x1100, 0x1200), (0xAC00, 0xD7A4)),
    "old hangul": ((0xA960, 0xA980), (0xD7A4, 0xD800)), "lone hangul letters": ((0x3130, 0x3190),)}
"""Script -> ranges of code points (first, end exclusive)."""

RUN_SCRIPTS = ("thai", "lao", "burmese", "khmer", "marks of han", "kana", "han")
"""Scripts that count a quarter word per character in runs."""
RUN_HANGUL_SCRIPTS = ("hangul", "old hangul", "lone hangul letters")
"""Scripts that count a third of a word per character in runs."""
RULE_SCRIPTS = ("thai", "lao", "tibetan letters", "burmese", "khmer", "kana", "bopomofo", "han",
                "half-width kana", "hangul", "lone hangul letters")
"""Scripts that quality rules count by characters."""
SCORER_SCRIPTS = ("thai", "lao", "tibetan letters", "tibetan signs", "burmese", "khmer", "kana", "han",
                  "hangul", "old hangul")
"""Scripts whose characters are n-gram units in scorers."""
LANGUAGES = {
    "ko": ("HANGUL",), "en": ("LATIN",), "th": ("THAI",), "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "zh": ("CJK",),
    "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "bg": ("CYRILLIC",), "ar": ("ARABIC",), "fa": ("ARABIC",),
    "ur": ("ARABIC",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "mr": ("DEVANAGARI",), "ne": ("DEVANAGARI",),
    "bn": ("BENGALI",), "ta": ("TAMIL",), "te": ("TELUGU",), "kn": ("KANNADA",), "ml": ("MALAYALAM",),
    "gu": ("GUJARATI",), "pa": ("GURMUKHI",), "el": ("GREEK",), "ka": ("GEORGIAN",), "hy": ("ARMENIAN",),
    "km": ("KHMER",), "lo": ("LAO",), "my": ("MYANMAR",), "am": ("ETHIOPIC",), "de": ("LATIN",),
    "fr": ("LATIN",), "es": ("LATIN",), "pt": ("LATIN",), "it": ("LATIN",), "nl": ("LATIN",),
    "pl": ("LATIN",),
    "tr": ("LATIN",), "vi": ("LATIN",), "id": ("LATIN",), "sw": ("LATIN",), "fi": ("LATIN",)}
"""Language (ISO 639-1) -> scripts, by the first word in Unicode names."""
_WIDE = ("FULLWIDTH", "HALFWIDTH", "SUPERSCRIPT", "SUBSCRIPT", "MODIFIER", "IDEOGRAPHIC", "MATHEMATICAL")


def list_code_points(scripts: Sequence[str]) -> list[tuple[int, int]]:
    """Return code point ranges (first, end exclusive) for scripts."""
    return [span for script in scripts for span in CODE_POINTS[script]]


def format_regex_ranges(scripts: Sequence[str]) -> str:
    """Format the scripts' ranges for a character class in a regular expression."""
    return "".join(f"{chr(begin)}-{chr(end - 1)}" for begin, end in list_code_points(scripts))


@lru_cache(maxsize=1 << 16)
def get_script(char: str) -> str:
    """Return the script of a letter or mark; "" for digits, symbols and letters without a script.

    Mathematical letters (from U+1D400 on) have no script, because they do not belong to text of a language.
    """
    if unicodedata.category(char)[0] not in "LM":
        return ""
    # Unicode names begin with the script: HANGUL SYLLABLE GA, LATIN SMALL LETTER A
    words = unicodedata.name(char, "").split()
    if not words or words[0] in ("COMBINING", "MATHEMATICAL", "VARIATION"):
        return ""
    if words[0] in _WIDE and len(words) > 1:
        words = words[1:]
    return words[0].partition("-")[0]


def count_letters_by_script(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    # look up each distinct character once: texts have millions of characters but few hundred distinct ones
    for char, count in Counter(text).items():
        if script := get_script(char):
            counts[script] += count
    return counts
