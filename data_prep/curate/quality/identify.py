"""Identifying a language: by the script where it has one of its own, else by py3langid's model among the
languages of that script.

py3langid (BSD; Lui and Baldwin 2011, 2012) is a naive Bayes classifier over n-grams of bytes; its model lies
in the package and holds no pickle.  The step `language` writes the language, and whether a document is prose,
code or markup.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome
from data_prep.libraries import find_library_problems
from megatron_sov.base.documents.scripts import count_letters_by_script
from megatron_sov.base.settings import SettingsProblem, Share, choice_from, to_problem

# Pieces of a long text that stand for the whole of it.

_SPACE = re.compile(r"\s")


def sample_pieces(text: str, num_pieces: int, piece_chars: int) -> list[str]:
    """Return pieces spread evenly over a text, each begun behind a space where one is near.

    A text that is not longer than all of them together is one piece.
    """
    if len(text) <= num_pieces * piece_chars:
        return [text]
    step = (len(text) - piece_chars) / max(num_pieces - 1, 1)
    found = []
    for number in range(num_pieces):
        start = int(number * step)
        # A piece that begins inside a word would show the model letters in an order that no word has.
        space = _SPACE.search(text, start, start + piece_chars // 4) if number else None
        found.append(text[space.end() if space else start:start + piece_chars])
    return found


def sample_lines(text: str, num_windows: int, window_chars: int) -> str:
    """Return whole lines from windows spread evenly over a text, joined; a line that is longer than a window
    is cut."""
    if len(text) <= num_windows * window_chars:
        return text
    step = (len(text) - window_chars) / max(num_windows - 1, 1)
    found = []
    for number in range(num_windows):
        window = text[int(number * step):int(number * step) + window_chars]
        # The first and the last window have the text's own ends; elsewhere half lines are cut off.
        first = window.find("\n") + 1 if number else 0
        last = window.rfind("\n") if number < num_windows - 1 else len(window)
        found.append(window[first:last] if last > first else window)
    return "\n".join(found)


# Forms of text: prose, code or markup, told by its lines, and the part of each that is in a language.

Form = Literal["prose", "code", "markup"]
FORMS: tuple[Form, ...] = ("prose", "code", "markup")

MIN_CODE_LINE_SHARE = 0.4
"""Of the lines that are neither empty nor comments, those that read as code; from here on a text is code."""
MIN_CODE_LINES = 2
MIN_TAG_CHAR_SHARE = 0.12
"""Of all characters, those inside tags of HTML or XML; from here on a text is markup."""
MIN_COMMAND_CHAR_SHARE = 0.06
"""The same of LaTeX, where commands such as \\section or \\begin{...} show what it is."""
MIN_FIELD_LINE_SHARE = 0.6
"""Of all lines, those of JSON, YAML, TOML or properties: a name, a sign, a value."""
MAX_STATEMENT_LINE_SHARE = 0.1
"""Of such data, lines with calls and statements; more is a program full of assignments."""
MIN_SIGN_SHARE = 0.01
"""Of all characters, signs that programs are full of; a text with fewer is none."""
_SIGNS = "{}()[]=;<>$#"
_NUM_WINDOWS, _WINDOW_CHARS = 5, 1000
_LANGUAGE_WINDOW_CHARS = 8000


def _lines(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"^[^\S\n]*(?:{'|'.join(alternatives)})[^\n]*$", re.MULTILINE)


_DIRECTIVES = "include|define|if|ifdef|ifndef|endif|else|pragma|undef"
_LINE = re.compile(r"^[^\S\n]*\S", re.MULTILINE)
_COMMENT = _lines(rf"#(?!!|{_DIRECTIVES})", "//", r"/\*", r"\*(?!\*)", r"--\s", ";;", "%", "<!--",
                  '"{3}', "'{3}")
_BLOCK = re.compile(r"/\*.{0,4000}?\*/|\"{3}.{0,4000}?\"{3}|'{3}.{0,4000}?'{3}", re.DOTALL)
"""Comments and documentation over several lines."""
_CODE_LINE = _lines(
    # words that begin a statement
    r"(?:async )?def \w+\(", r"class \w+[(:{ ]", r"import [\w.*{\"'(][\w., *{}\"']*;?$",
    r"from [\w.]+ import ", r"return(?: [^.\n]*)?;?$",
    r"(?:else|try|finally|do|begin|then)[:{ ]*$", rf"#(?:{_DIRECTIVES})\b",
    r"(?:if|elif|while|for|with|switch|catch|else if|foreach|except|match) ?[^\n]*[:{]$",
    r"(?:if|elif|for|while|until|case) [^\n]*(?:; ?(?:then|do)|\bin)$", "#!",
    r"@\w+[\w.]*(?:\([^\n]*\))?$", r"(?:fi|done|esac|end|endif|endfunction|endmodule)\b;?$",
    r"(?:public|private|protected|static|final|const|let|var|fn|func|function|pub|impl|struct|enum|namespace"
    r"|using|package|template|typedef|extern|unsigned|void|local|export|module|interface) [^\n]*[;{(=,)]$",
    r"(?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP) [^\n]*(?:;|FROM|\($)",
    # assignments and calls
    r"\w+ <- ", r"\w+(?:\.\w+)* ?(?:[+\-*/|&]?=|:=) ?[^=\n]+$", r"\w+(?:\.\w+)+\([^\n]*\);?$",
    r"\w+\([^\n]*\)[;:{,]?$", r"[\])}]+[;,)]*$",
    # what ends a statement, or is part of one
    r"[^\n]*(?:[A-Za-z0-9_)\]\"'}>]\s?[;{]|\\|&&|\|\||\)\s?[:{]|=>\s?[{(]?|->\s?[{(]?)$",
    r"(?![^\n]*(?:[a-z]+,? ){4}[a-z])[^\n]*(?:==|!==?|\w\(\)|\w->\w|\w::\w|\+=|\bself\.\w|\bthis\.\w)")
_FIELD_LINE = _lines(r"(?:- )?(?:\"[^\"\n]*\"|[\w.-]+)\s?(?::(?:\s|$)|=)", r"[\[\]{}],?$", r"\[[\w. -]+\]$",
                     r"\"[^\"\n]*\",?$")
_STATEMENT = re.compile(r"^\s*(?:def|class|import|from|return|if|for|while|var|let|const)\b|\w\(",
                        re.MULTILINE)
_TAG = re.compile(r"<(?:[/!?]?[A-Za-z][^<>]{0,500}|!--.{0,2000}?--)>", re.DOTALL)
_CLOSED = re.compile(r"</[A-Za-z]|/>|<!DOCTYPE|<\?xml", re.IGNORECASE)
"""What pages have and the angle brackets of programs do not."""
_SCRIPT = re.compile(r"<(script|style)\b[^<]*(?:<(?!/\1)[^<]*)*", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:begin|end|section|subsection|item|documentclass|usepackage|cite|ref|label|textbf"
                    r"|emph|chapter)\b")
_COMMAND = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\]\n]{0,100}\])?")
_MARKER = re.compile(r"^[^\S\n]*[#/*;%\-\"'<!]+", re.MULTILINE)


def detect_form(text: str) -> Form:
    """Return what form a text is of, by lines from all over it."""
    text = sample_lines(text, _NUM_WINDOWS, _WINDOW_CHARS).strip()
    num_lines = len(_LINE.findall(text))
    # Cheap tests first; markup before code, for pages hold scripts and LaTeX is full of brackets.
    if _is_tagged(text) or _is_latex(text) or _is_data(text, num_lines):
        return "markup"
    if sum(map(text.count, _SIGNS)) < MIN_SIGN_SHARE * len(text):
        return "prose"
    # Comments say nothing of the form: a program may have more of them than code.
    rest = _COMMENT.sub("", _BLOCK.sub("", text))
    num_code = len(_CODE_LINE.findall(rest))
    if num_code >= max(MIN_CODE_LINES, MIN_CODE_LINE_SHARE * len(_LINE.findall(rest))):
        return "code"
    return "prose"


def _is_tagged(text: str) -> bool:
    if not _CLOSED.search(text):
        return False
    return sum(len(m.group()) for m in _TAG.finditer(text)) >= MIN_TAG_CHAR_SHARE * len(text)


def _is_latex(text: str) -> bool:
    if len(_LATEX.findall(text)) < 2:
        return False
    return sum(len(m.group()) for m in _COMMAND.finditer(text)) >= MIN_COMMAND_CHAR_SHARE * len(text)


def _is_data(text: str, num_lines: int) -> bool:
    """Say whether a text is names and values; the assignments of a program have statements beside them."""
    return (len(_FIELD_LINE.findall(text)) >= max(3, MIN_FIELD_LINE_SHARE * num_lines)
            and len(_STATEMENT.findall(text)) <= MAX_STATEMENT_LINE_SHARE * num_lines)


def extract_language_text(text: str, form: Form) -> str:
    """Return what of a text is in a language of people: all prose; of code and markup, as far as windows from
    all over it go, the comments, and what is no tag and no command."""
    if form == "prose":
        return text
    text = sample_lines(text, _NUM_WINDOWS, _LANGUAGE_WINDOW_CHARS)
    if form == "code":
        blocks = [m.group() for m in _BLOCK.finditer(text)]
        lines = [m.group() for m in _COMMENT.finditer(_BLOCK.sub("", text))]
        return "\n".join(_MARKER.sub("", comment) for comment in [*blocks, *lines])
    return _COMMAND.sub(" ", _TAG.sub(" ", _SCRIPT.sub(" ", text)))


UNKNOWN_LANGUAGE = "und"
"""ISO 639-2's code for a language that is not determined."""
NUM_PIECES, PIECE_CHARS = 5, 300
"""Of a longer text, so many pieces of so many characters are looked at."""

LANGUAGE_BY_SCRIPT = {
    "HANGUL": "ko", "THAI": "th", "KANA": "ja", "CJK": "zh", "GREEK": "el", "HEBREW": "he", "ARMENIAN": "hy",
    "GEORGIAN": "ka", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "GUJARATI": "gu",
    "GURMUKHI": "pa", "ORIYA": "or", "SINHALA": "si", "KHMER": "km", "LAO": "lo", "MYANMAR": "my",
    "ETHIOPIC": "am", "TIBETAN": "bo",
}
"""Script -> the language that nearly all text in it is of; Han characters beside kana are Japanese, beside
more Hangul Korean."""
_SHARED = {
    "CYRILLIC": "ba be bg ky kk mk mn os ru sr tg tt uk",
    "ARABIC": "ar ary arz fa ps sdh ug ur uzs ku",
    "DEVANAGARI": "hi mr ne sa gom",
    "BENGALI": "bn as",
    "LATIN": "ace af an az bcl br bs ca crh cs cy da de en eo es et eu ext fi fo fr fuv fy ga gcf gcr gd gl "
             "gug guw ha hr ht hu id ig is it jv kab kik ku la lb lg lij ln lt ltg lv mg ms mt nl nn no nso "
             "oc om pcm pl pt qu ro rw se sk sl sn so sq sr st sv sw tk tl tr uz vec vi vo wa xh yo zu",
}
LANGUAGES_BY_SCRIPT = {script: frozenset(names.split()) for script, names in _SHARED.items()}
"""Script -> the languages of the model that are written in it."""
_COMMON_NAMES = ("en ru de ja zh es fr it pt pl nl id tr vi cs ko fa ar sv uk hu el ro da th fi no sk bg hr "
                 "he lt sr sl ca et hi bn lv ta sq az ka mk kk ml te ur mr ms gl ne eu sw tl af")
_COMMON = frozenset(_COMMON_NAMES.split())
"""Languages with much text on the web; the others are far more often guessed than met."""
_RARE_WEIGHT = 0.2
"""What the model's probability of a language that is not common is multiplied by."""
_WEIGHTS = {"ms": 0.1}
"""The same for single ones: Malay reads like Indonesian, of which the web has some twenty times as much."""
PARENT_LANGUAGES = {"ary": "ar", "arz": "ar", "uzs": "uz", "sdh": "ku", "nn": "no"}
"""Label of the model -> the ISO 639-1 code of the language that it is a variety of."""
KNOWN_LANGUAGES = frozenset(LANGUAGE_BY_SCRIPT.values()).union(
    *LANGUAGES_BY_SCRIPT.values()) - set(PARENT_LANGUAGES)
"""All languages that are told apart."""
NOISE_LABEL = "zxx"
"""The model's label for what is in no language: numbers, names of variables."""
_CHAR_WEIGHT = {"HANGUL": 3, "CJK": 3, "KANA": 3}
"""Letters of Latin that say about as much as one character of the script (UTF-8 bytes as a measure)."""
_MIN_KANA_SHARE = 0.1
"""Of kana and Han characters together; less kana is Chinese that quotes."""
_SETTLED_SHARE = 0.8
"""From this share of a piece on, a script of one language settles it, and the model is not asked."""
_NO_WORDS = re.compile(r"\S*(?://|@|www\.|\\)\S*|[\d_]+")


def identify_language(text: str) -> tuple[str, float]:
    """Return (language as ISO 639-1, or ISO 639-3 where there is none, or `UNKNOWN`; score from 0 to 1).

    The score is the share of the text's letters that are in the language, times how sure the model is where
    several languages share a script.  A long text is judged by pieces from all over it.
    """
    found: dict[str, float] = defaultdict(float)
    total = 0.0
    for piece in sample_pieces(text, NUM_PIECES, PIECE_CHARS):
        scripts = _scripts(piece)
        weight = sum(scripts.values())
        # Where one script settles the piece, letters of a shared one are names and quotes: asking the model
        # would cost time and add noise.
        largest = max((n for script, n in scripts.items() if script in LANGUAGE_BY_SCRIPT), default=0)
        total += weight
        for script, letters in scripts.items():
            if language := LANGUAGE_BY_SCRIPT.get(script):
                found[language] += letters
            elif script in LANGUAGES_BY_SCRIPT and largest < _SETTLED_SHARE * weight:
                for name, share in _by_model(_NO_WORDS.sub(" ", piece), script):
                    found[name] += letters * share
    if not found:
        return UNKNOWN_LANGUAGE, 0.0
    language, weight = max(found.items(), key=lambda item: (item[1], item[0]))
    return language, min(weight / total, 1.0)


def _scripts(piece: str) -> dict[str, float]:
    """Return script -> weighted letters; kana as one script, and Han given to Japanese or Korean where it is
    theirs."""
    counts = count_letters_by_script(piece)
    # Han characters are used by three languages: the letters around them say whose they are.
    counts["KANA"] = counts.pop("HIRAGANA", 0) + counts.pop("KATAKANA", 0)
    han = counts["CJK"]
    if counts["KANA"] > _MIN_KANA_SHARE * (counts["KANA"] + han):
        counts["KANA"] += counts.pop("CJK", 0)
    elif counts["HANGUL"] >= han:
        counts["HANGUL"] += counts.pop("CJK", 0)
    return {script: n * _CHAR_WEIGHT.get(script, 1) for script, n in counts.items() if n}


def _by_model(piece: str, script: str) -> list[tuple[str, float]]:
    """Return (language, probability) among the languages of a script, and noise, which is left out."""
    # Labels of other scripts are left out before shares are taken; noise stays in, and lowers the score of
    # what is no language.
    ranked = [(label, p * _weight(label)) for label, p in _load_model().rank(piece)
              if label in LANGUAGES_BY_SCRIPT[script] or label == NOISE_LABEL]
    total = math.fsum(p for _, p in ranked)
    if total <= 0:
        return []
    return [(PARENT_LANGUAGES.get(label, label), p / total) for label, p in ranked if label != NOISE_LABEL]


def _weight(label: str) -> float:
    return _WEIGHTS.get(label, 1.0 if label in _COMMON or label == NOISE_LABEL else _RARE_WEIGHT)


def get_model_file() -> Path:
    # Imported late: the library is optional, and loads for long.
    from py3langid.langid import MODEL_DIR, MODEL_FILE
    return Path(MODEL_DIR) / MODEL_FILE


@lru_cache(maxsize=1)
def _load_model() -> Any:
    from py3langid.langid import LanguageIdentifier
    return LanguageIdentifier.from_model_file(get_model_file(), norm_probs=True)


@dataclass(frozen=True)
class LanguageSettings:
    """What the step `language` keeps."""

    keep: tuple[Annotated[str, choice_from(lambda: KNOWN_LANGUAGES)], ...] = ()
    """Languages that stay, as ISO 639-1 codes such as ko, en; none: all of them."""
    min_score: Share = 0.5
    """Below this score the language of a document is not sure enough to stay."""
    forms: Annotated[tuple[Form, ...], MinLen(1)] = FORMS
    """Forms that stay: prose, code, markup.  Code stays whatever language its comments are in."""

    def problems(self) -> list[SettingsProblem]:
        return list(map(to_problem, find_library_problems("the step language", "py3langid")))


class Language(Step):
    """Adds the language of each document, how sure it is, and its form."""

    kind = "language"
    added_columns: ClassVar[dict[str, ColumnType]] = {
        "language": "string", "language_score": "float32", "form": "string"}
    Settings = LanguageSettings
    settings: LanguageSettings

    def list_files(self) -> Sequence[Path]:
        """Return the model, so that another one is another step."""
        return [get_model_file()]

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(document.text) for document in documents]

    def _outcome(self, text: str) -> StepOutcome:
        form = detect_form(text)
        language, score = identify_language(extract_language_text(text, form))
        values = {"language": language, "language_score": score, "form": form}
        return StepOutcome(reason=self._reason(language, score, form), values=values)

    def _reason(self, language: str, score: float, form: Form) -> str:
        if form not in self.settings.forms:
            return f"form {form}"
        # Code counts before its language: comments are too short to judge a file by.
        if form == "code":
            return ""
        if language == UNKNOWN_LANGUAGE:
            return "no language" if self.settings.keep or self.settings.min_score else ""
        if score < self.settings.min_score:
            return "language not sure"
        if self.settings.keep and language not in self.settings.keep:
            return f"language {language}"
        return ""
