"""Reward `ifeval`: verifiable instructions from IFEval and IFBench.

The checks come from Google (arXiv 2311.07911) and AllenAI (arXiv 2507.02833), in the package `if-verifiable`.
Seven checks read NLTK data, which must be installed beforehand.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

from megatron_sov.base.errors import UserError, format_error, format_install_command, suggest_name
from megatron_sov.chat.marks import unquote_marks
from megatron_sov.judge.rewards.reward import Refused, Row, Score, format_short, get_text

MAX_CHARS = 400_000
"""Longest response to check, because patterns are slow on longer texts."""
NLTK_DATA = "python -m nltk.downloader punkt_tab stopwords averaged_perceptron_tagger_eng"
TEXT_LISTS = frozenset(("keywords", "forbidden_words"))
WHOLE_NUMBERS = frozenset((
    "N", "capital_frequency", "frequency", "let_frequency", "m", "max_words", "min_words", "n", "n_end",
    "n_start", "nth_paragraph", "num_bullets", "num_highlights", "num_paragraphs", "num_placeholders",
    "num_sections", "num_sentences", "num_words", "percentage", "small_n"))
"""Integer arguments; arguments outside `TEXT_LISTS` and `WHOLE_NUMBERS` are texts."""


@dataclass(frozen=True)
class IfEval:
    """Reward `ifeval`: 1 if all instructions are followed, else 0; or the followed share."""

    LIBRARIES = ("if-verifiable", "langdetect", "nltk", "emoji", "syllapy")
    VARIABLES = ("NLTK_DATA",)
    CONTROL, cpu_limit_s = "", 30.0

    all_or_nothing: bool = True
    """IFEval's accuracy per prompt; otherwise per instruction."""
    loose: bool = False
    """IFEval's loose accuracy: ignore a first or last line, and asterisks."""

    def prepare(self) -> None:
        """Import the checks in the judging process.

        Raises:
            UserError: `if-verifiable` is not installed.
        """
        load_checks()
        # The checks log whole responses in unknown languages.
        logging.getLogger().addHandler(logging.NullHandler())

    def score(self, row: Row) -> Score:
        """Check the response against the row's `instructions`.

        Raises:
            Refused: an instruction is unknown, has wrong arguments, or needs missing data.
        """
        # With thoughts and calls, because the checks read the whole text.
        response = unquote_marks(get_text(row, "response"))
        if len(response) > MAX_CHARS:
            raise Refused(f"response has {len(response):,} characters; at most {MAX_CHARS:,} are checked")
        instructions = read_instructions(row)
        texts = loosen_response(response) if self.loose else [response]
        # An empty response follows nothing, although "no commas" holds.
        texts = [text for text in texts if text.strip()]
        followed = [any(follows_instruction(name, text, arguments) for text in texts)
                    for name, arguments in instructions]
        share = sum(followed) / len(followed)
        components = {f"{i}:{name}": followed[i] for i, (name, _) in enumerate(instructions)}
        return Score(float(share == 1) if self.all_or_nothing else share, components)


def read_instructions(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, arguments) for a row's instructions: objects with `id` and arguments, or google/IFEval's
    columns `instruction_id_list` and `kwargs`.

    Raises:
        Refused: instructions are missing or unknown.
    """
    instructions = row.get("instructions")
    if instructions is None and isinstance(row.get("instruction_id_list"), list):
        names, arguments = row["instruction_id_list"], row.get("kwargs")
        if not isinstance(arguments, list) or len(arguments) != len(names):
            raise Refused("kwargs must be a list as long as instruction_id_list")
        # The id comes last, so that an argument named id cannot replace it.
        instructions = [{**kwargs, "id": name} if isinstance(kwargs, Mapping) else name
                        for name, kwargs in zip(names, arguments, strict=True)]
    if not isinstance(instructions, list) or not instructions:
        raise Refused(f"instructions = {format_short(instructions)} must be a list of objects with an id")
    return [_read_instruction(item) for item in instructions]


def _read_instruction(item: Any) -> tuple[str, dict[str, Any]]:
    name = item.get("id") if isinstance(item, Mapping) else None
    if not isinstance(name, str) or name not in load_checks():
        raise Refused(f"instruction {format_short(name or item)} is not known"
                      f"{suggest_name(str(name), load_checks())}")
    # The data set has a column per argument, empty for other instructions.
    arguments = {key: _read_argument(name, key, value) for key, value in item.items()
                 if key not in ("id", "prompt") and value is not None}
    return name, arguments


def _read_argument(name: str, key: str, value: Any) -> Any:
    """Return an argument with the type that the check compares with.

    A wrong type would compare as false, and empty or negative arguments would be replaced by random ones.
    """
    if key in WHOLE_NUMBERS:
        least = 1 if key in ("n_start", "n_end") else 0
        requirement = f"a whole number of at least {least}"
        # JSON may contain 3.0.
        is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        fits = is_whole and value >= least
        value = int(value) if fits else value
    elif key in TEXT_LISTS:
        requirement = "a list of texts"
        fits = isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)
    else:
        requirement, fits = "a text", isinstance(value, str) and bool(value)
    if not fits:
        raise Refused(f"instruction {name}: {key} = {format_short(value)} must be {requirement}")
    return value


def follows_instruction(name: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether a text follows an instruction.

    Raises:
        Refused: the arguments do not fit the instruction, or NLTK data are missing.
    """
    check = load_checks()[name](name)
    argument_names = check.get_instruction_args_keys()
    # Checks draw missing arguments at random.
    if set(argument_names) != set(arguments):
        raise Refused(f"instruction {name}: takes other arguments than {format_short(dict(arguments))}; "
                      f"write {', '.join(argument_names) or 'none'}")
    try:
        check.build_description(**arguments)
        return bool(check.check_following(text))
    except IndexError:  # the check assumes a longer text
        return False
    except (TypeError, ValueError, AttributeError, LookupError) as e:
        if isinstance(e, LookupError) and "NLTK" in str(e):
            raise Refused(f"instruction {name}: needs data of NLTK; run `{NLTK_DATA}`") from None
        raise Refused(f"instruction {name}: cannot be checked with {format_short(dict(arguments))} "
                      f"({format_error(e):.200})") from None


@lru_cache
def load_checks() -> Mapping[str, Any]:
    """Return instruction name -> class in `if-verifiable`.

    Raises:
        UserError: `if-verifiable` is not installed.
    """
    try:
        import langdetect  # optional packages

        # The package downloads NLTK data on import.
        with patch("nltk.download"):
            from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as ifbench
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as ifeval
    except ImportError as e:
        raise UserError(f"reward ifeval: {e.name} is not installed; run `"
                        f"{format_install_command('rl')}`") from None
    langdetect.DetectorFactory.seed = 0  # seeded randomly otherwise
    return {**ifeval, **ifbench}


def loosen_response(response: str) -> list[str]:
    """Return variants: complete, without first line, last line or both; and each without asterisks."""
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(text.replace("*", "") for text in texts)]
