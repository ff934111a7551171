"""Step `language`: detect the language of a document and its form (prose, code, markup).

A script with a single language decides by itself; otherwise py3langid's model ranks the languages that share
the script. py3langid (BSD; Lui and Baldwin 2011, 2012) is a naive Bayes classifier over byte n-grams; the
package includes the model, without a pickle.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome
from megatron_sov.base.documents.scripts import count_letters_by_script
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.settings import Share, choice_from

_SPACE = re.compile(r"\s")
Form = Literal["prose", "code", "markup"]
FORMS: tuple[Form, ...] = ("prose", "code", "markup")
MIN_CODE_LINE_SHARE = 0.4
"""Share of code lines, without empty lines and comments, from which a text is code."""
MIN_CODE_LINES = 2
MIN_TAG_CHAR_SHARE = 0.12
"""Share of characters inside HTML or XML tags from which a text is markup."""
MIN_COMMAND_CHAR_SHARE = 0.06
"""Share of characters inside LaTeX commands, e.g. \\section or \\begin{...}, from which a text is markup."""
MIN_FIELD_LINE_SHARE = 0.6
"""Share of lines with a name, a sign and a value (JSON, YAML, TOML, properties) that makes a text markup."""
MAX_STATEMENT_LINE_SHARE = 0.1
"""Share of calls and statements in data files; a text with more is a program full of assignments."""
MIN_SIGN_SHARE = 0.01
"""Share of `_SIGNS` below which a text is no program."""
_SIGNS = "{}()[]=;<>$#"
_NUM_WINDOWS, _WINDOW_CHARS = 5, 1000
_LANGUAGE_WINDOW_CHARS = 8000
_DIRECTIVES = "include|define|if|ifdef|ifndef|endif|else|pragma|undef"
_LINE = re.compile(r"^[^\S\n]*\S", re.MULTILINE)
_BLOCK = re.compile(r"/\*.{0,4000}?\*/|\"{3}.{0,4000}?\"{3}|'{3}.{0,4000}?'{3}", re.DOTALL)
"""Multi-line comments and docstrings."""
_STATEMENT = re.compile(r"^\s*(?:def|class|import|from|return|if|for|while|var|let|const)\b|\w\(",
                        re.MULTILINE)
_TAG = re.compile(r"<(?:[/!?]?[A-Za-z][^<>]{0,500}|!--.{0,2000}?--)>", re.DOTALL)
_CLOSED = re.compile(r"</[A-Za-z]|/>|<!DOCTYPE|<\?xml", re.IGNORECASE)
"""Closing tags and headers, which the angle brackets of programs lack."""
_SCRIPT = re.compile(r"<(script|style)\b[^<]*(?:<(?!/\1)[^<]*)*", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:begin|end|section|subsection|item|documentclass|usepackage|cite|ref|label|textbf"
                    r"|emph|chapter)\b")
_COMMAND = re.compile(r"\\[A-Za-z]+\*?(?:\[[^\]\n]{0,100}\])?")
_MARKER = re.compile(r"^[^\S\n]*[#/*;%\-\"'<!]+", re.MULTILINE)
UNKNOWN_LANGUAGE = "und"
"""ISO 639-2 code for an undetermined language."""
NUM_PIECES, PIECE_CHARS = 5, 300
"""Number and length of the pieces that `identify_language` reads from a longer text."""
TABLES_FILE = Path(__file__).with_suffix(".yaml")
_RARE_WEIGHT = 0.2
"""Factor on the model's probability of a language outside `LanguageTables.common`."""
_WEIGHTS = {"ms": 0.1}
"""Factors by label: Malay reads like Indonesian, which is some twenty times as frequent on the web."""
PARENT_LANGUAGES = {"ary": "ar", "arz": "ar", "uzs": "uz", "sdh": "ku", "nn": "no"}
"""Model label of a variety -> ISO 639-1 code of its language."""
NOISE_LABEL = "zxx"
"""Model label for text without a language: numbers, variable names."""
_CHAR_WEIGHT = {"HANGUL": 3, "CJK": 3, "KANA": 3}
"""Script -> Latin letters with about as much information as a character (measured in UTF-8 bytes)."""
_MIN_KANA_SHARE = 0.1
"""Minimum share of kana in kana and Han characters; with less kana, the text is Chinese with quotes."""
_SETTLED_SHARE = 0.8
"""Share of a piece from which a single-language script decides without the model."""
_NO_WORDS = re.compile(r"\S*(?://|@|www\.|\\)\S*|[\d_]+")


def sample_pieces(text: str, num_pieces: int, piece_chars: int) -> list[str]:
    """Return evenly spaced pieces, starting after a nearby space; a short text is a single piece."""
    if len(text) <= num_pieces * piece_chars:
        return [text]
    step = (len(text) - piece_chars) / max(num_pieces - 1, 1)
    pieces = []
    for number in range(num_pieces):
        start = int(number * step)
        # A piece that starts inside a word would show the model letters in an order no word has.
        space = _SPACE.search(text, start, start + piece_chars // 4) if number else None
        pieces.append(text[space.end() if space else start:start + piece_chars])
    return pieces


def sample_lines(text: str, num_windows: int, window_chars: int) -> str:
    """Join the whole lines of evenly spaced windows; a line longer than a window is cut."""
    if len(text) <= num_windows * window_chars:
        return text
    step = (len(text) - window_chars) / max(num_windows - 1, 1)
    windows = []
    for number in range(num_windows):
        window = text[int(number * step):int(number * step) + window_chars]
        # Incomplete lines are cut off, except at the start and end of the text.
        first = window.find("\n") + 1 if number else 0
        last = window.rfind("\n") if number < num_windows - 1 else len(window)
        windows.append(window[first:last] if last > first else window)
    return "\n".join(windows)


def _compile_lines(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"^[^\S\n]*(?:{'|'.join(alternatives)})[^\n]*$", re.MULTILINE)


_COMMENT = _compile_lines(rf"#(?!!|{_DIRECTIVES})", "//", r"/\*", r"\*(?!\*)", r"--\s", ";;", "%", "<!--",
                  '"{3}', "'{3}")
_CODE_LINE = _compile_lines(
    # words at the start of a statement
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
    # the end or a part of a statement
    r"[^\n]*(?:[A-Za-z0-9_)\]\"'}>]\s?[;{]|\\|&&|\|\||\)\s?[:{]|=>\s?[{(]?|->\s?[{(]?)$",
    r"(?![^\n]*(?:[a-z]+,? ){4}[a-z])[^\n]*(?:==|!==?|\w\(\)|\w->\w|\w::\w|\+=|\bself\.\w|\bthis\.\w)")
_FIELD_LINE = _compile_lines(r"(?:- )?(?:\"[^\"\n]*\"|[\w.-]+)\s?(?::(?:\s|$)|=)",
                             r"[\[\]{}],?$", r"\[[\w. -]+\]$", r"\"[^\"\n]*\",?$")


def detect_form(text: str) -> Form:
    """Return the form of `text`, judged by lines from windows over the whole text."""
    text = sample_lines(text, _NUM_WINDOWS, _WINDOW_CHARS).strip()
    num_lines = len(_LINE.findall(text))
    # Cheap tests first; markup before code, because pages hold scripts and LaTeX is full of brackets.
    if _is_tagged(text) or _is_latex(text) or _is_data(text, num_lines):
        return "markup"
    if sum(map(text.count, _SIGNS)) < MIN_SIGN_SHARE * len(text):
        return "prose"
    # Comments do not count: a program may have more comments than code.
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
    """Return whether `text` is a data file; unlike a program's assignments, data has few statements."""
    return (len(_FIELD_LINE.findall(text)) >= max(3, MIN_FIELD_LINE_SHARE * num_lines)
            and len(_STATEMENT.findall(text)) <= MAX_STATEMENT_LINE_SHARE * num_lines)


def extract_language_text(text: str, form: Form) -> str:
    """Return the natural-language part: all prose; comments of code; markup without tags and commands.

    Code and markup are sampled by windows over the whole text.
    """
    if form == "prose":
        return text
    text = sample_lines(text, _NUM_WINDOWS, _LANGUAGE_WINDOW_CHARS)
    if form == "code":
        blocks = [m.group() for m in _BLOCK.finditer(text)]
        lines = [m.group() for m in _COMMENT.finditer(_BLOCK.sub("", text))]
        return "\n".join(_MARKER.sub("", comment) for comment in [*blocks, *lines])
    return _COMMAND.sub(" ", _TAG.sub(" ", _SCRIPT.sub(" ", text)))


@dataclass(frozen=True)
class LanguageTables:
    """Content of `TABLES_FILE`."""

    by_script: dict[str, str]
    """Script -> its main language."""
    sharing_script: dict[str, frozenset[str]]
    """Script -> model labels for the script's languages."""
    common: frozenset[str]
    """Languages with much text on the web."""

    @property
    def known(self) -> frozenset[str]:
        """All languages that `identify_language` returns."""
        labels = frozenset(self.by_script.values()).union(*self.sharing_script.values())
        return labels - set(PARENT_LANGUAGES)


@lru_cache(maxsize=1)
def load_language_tables() -> LanguageTables:
    raw = load_package_table(TABLES_FILE)
    return LanguageTables(raw["main_languages"], {script: frozenset(names.split()) for script, names
                                                  in raw["shared_scripts"].items()},
                          frozenset(raw["common"].split()))


def identify_language(text: str) -> tuple[str, float]:
    """Return the language (ISO 639-1, else ISO 639-3, or `UNKNOWN_LANGUAGE`) and its score in [0, 1].

    The score is the share of letters in the language, times the model's probability if languages share the
    script. A long text is judged by pieces from the whole text.
    """
    weights: dict[str, float] = defaultdict(float)
    tables = load_language_tables()
    total = 0.0
    for piece in sample_pieces(text, NUM_PIECES, PIECE_CHARS):
        letters_by_script = _count_weighted_letters(piece)
        num_letters = sum(letters_by_script.values())
        # If a single-language script dominates, letters of a shared script are names and quotes: the model
        # would cost time and add noise.
        largest = max((letters for script, letters in letters_by_script.items()
                       if script in tables.by_script), default=0)
        total += num_letters
        for script, letters in letters_by_script.items():
            if script in tables.by_script:
                weights[tables.by_script[script]] += letters
            elif script in tables.sharing_script and largest < _SETTLED_SHARE * num_letters:
                for name, probability in _rank_languages(_NO_WORDS.sub(" ", piece), script):
                    weights[name] += letters * probability
    if not weights:
        return UNKNOWN_LANGUAGE, 0.0
    language, weight = max(weights.items(), key=lambda item: (item[1], item[0]))
    return language, min(weight / total, 1.0)


def _count_weighted_letters(piece: str) -> dict[str, float]:
    """Return script -> letters times `_CHAR_WEIGHT`; kana is a script, Han belongs to its neighbours."""
    counts = count_letters_by_script(piece)
    # Three languages use Han characters: the other letters of the piece decide.
    counts["KANA"] = counts.pop("HIRAGANA", 0) + counts.pop("KATAKANA", 0)
    han = counts["CJK"]
    if counts["KANA"] > _MIN_KANA_SHARE * (counts["KANA"] + han):
        counts["KANA"] += counts.pop("CJK", 0)
    elif counts["HANGUL"] >= han:
        counts["HANGUL"] += counts.pop("CJK", 0)
    return {script: n * _CHAR_WEIGHT.get(script, 1) for script, n in counts.items() if n}


def _rank_languages(piece: str, script: str) -> list[tuple[str, float]]:
    """Return (language, probability) for the languages that share `script`, without noise."""
    # Labels of other scripts are removed before the probabilities are normalized. Noise is removed after, so
    # that noise lowers the scores.
    labels = load_language_tables().sharing_script[script]
    ranked = [(label, p * _get_label_weight(label)) for label, p in _load_model().rank(piece)
              if label in labels or label == NOISE_LABEL]
    total = math.fsum(p for _, p in ranked)
    if total <= 0:
        return []
    return [(PARENT_LANGUAGES.get(label, label), p / total) for label, p in ranked if label != NOISE_LABEL]


def _get_label_weight(label: str) -> float:
    is_common = label == NOISE_LABEL or label in load_language_tables().common
    return _WEIGHTS.get(label, 1.0 if is_common else _RARE_WEIGHT)


@lru_cache(maxsize=1)
def _import_langid() -> Any:
    from py3langid import langid  # optional package, slow to import

    return langid


def get_model_file() -> Path:
    return Path(_import_langid().MODEL_DIR) / _import_langid().MODEL_FILE


@lru_cache(maxsize=1)
def _load_model() -> Any:
    return _import_langid().LanguageIdentifier.from_model_file(get_model_file(), norm_probs=True)


@dataclass(frozen=True)
class LanguageSettings:
    """Settings for `language`."""

    keep: tuple[Annotated[str, choice_from(lambda: load_language_tables().known)], ...] = ()
    """ISO 639-1 codes to keep, e.g. ko, en; empty keeps every language."""
    min_score: Share = 0.5
    """Documents with a lower language score are dropped."""
    forms: Annotated[tuple[Form, ...], MinLen(1)] = FORMS
    """Forms to keep: prose, code, markup. Code is kept in every language."""


class Language(Step):
    """Adds the columns `language`, `language_score` and `form`; drops by language and form."""

    kind = "language"
    added_columns = {"language": "string", "language_score": "float32", "form": "string"}
    Settings = LanguageSettings
    settings: LanguageSettings

    def list_libraries(self) -> Sequence[str]:
        return ("py3langid",)

    def list_files(self) -> Sequence[Path]:
        try:
            return [TABLES_FILE, get_model_file()]
        except ImportError:  # `sov-data run --dry-run` without py3langid
            return [TABLES_FILE]

    def judge_document(self, document: Doc) -> StepOutcome:
        form = detect_form(document.text)
        language, score = identify_language(extract_language_text(document.text, form))
        values = {"language": language, "language_score": score, "form": form}
        return StepOutcome(reason=self._find_drop_reason(language, score, form), values=values)

    def _find_drop_reason(self, language: str, score: float, form: Form) -> str:
        if form not in self.settings.forms:
            return f"form {form}"
        # Before the language: comments are too short for a reliable language.
        if form == "code":
            return ""
        if language == UNKNOWN_LANGUAGE:
            return "no language" if self.settings.keep or self.settings.min_score else ""
        if score < self.settings.min_score:
            return "language not sure"
        if self.settings.keep and language not in self.settings.keep:
            return f"language {language}"
        return ""
