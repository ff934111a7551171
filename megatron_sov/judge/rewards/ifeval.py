"""Reward `ifeval`: whether a response follows the checkable instructions of IFEval and IFBench.

The checks are those of Google (arXiv 2311.07911) and AllenAI (arXiv 2507.02833) as the package
`if-verifiable` has them. Seven of them read data of NLTK, which nothing here downloads.
"""

from __future__ import annotations

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
"""Longest response that is checked: patterns over a longer one would take long."""
NLTK_DATA = "python -m nltk.downloader punkt_tab stopwords averaged_perceptron_tagger_eng"
TEXT_LISTS = frozenset(("keywords", "forbidden_words"))
WHOLE_NUMBERS = frozenset((
    "N", "capital_frequency", "frequency", "let_frequency", "m", "max_words", "min_words", "n", "n_end",
    "n_start", "nth_paragraph", "num_bullets", "num_highlights", "num_paragraphs", "num_placeholders",
    "num_sections", "num_sentences", "num_words", "percentage", "small_n"))
"""Arguments of instructions by their types; all others are texts."""


@dataclass(frozen=True)
class IfEval:
    """1 where all instructions are followed, else 0; or the share of them."""

    LIBRARIES = ("if-verifiable", "langdetect", "nltk", "emoji", "syllapy")
    VARIABLES = ("NLTK_DATA",)
    CONTROL, cpu_limit_s = "", 30.0

    all_or_nothing: bool = True
    """IFEval's accuracy per prompt; without, per instruction."""
    loose: bool = False
    """IFEval's loose accuracy: a first or last line, or asterisks, may be in the way."""

    def prepare(self) -> None:
        """Import the checks, in the process that judges.

        Raises:
            UserError: if-verifiable is not installed.
        """
        load_checks()
        # The checks log whole responses whose language is not known.
        logging.getLogger().addHandler(logging.NullHandler())

    def score(self, row: Row) -> Score:
        """Return whether the response follows the row's `instructions`.

        Raises:
            Refused: an instruction is unknown, has wrong arguments, or needs data that are not installed.
        """
        # Thoughts and calls as the model wrote them: the checks read the whole text.
        response = unquote_marks(get_text(row, "response"))
        if len(response) > MAX_CHARS:
            raise Refused(f"response has {len(response):,} characters; at most {MAX_CHARS:,} are checked")
        instructions = read_instructions(row)
        texts = loosen_response(response) if self.loose else [response]
        # An empty response follows nothing, though "no commas" holds for it.
        texts = [text for text in texts if text.strip()]
        followed = [any(follows_instruction(name, text, arguments) for text in texts)
                    for name, arguments in instructions]
        share = sum(followed) / len(followed)
        components = {f"{i}:{name}": followed[i] for i, (name, _) in enumerate(instructions)}
        return Score(float(share == 1) if self.all_or_nothing else share, components)


def read_instructions(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, arguments) of a row's instructions: objects with `id` and the arguments next to it, or
    the columns of google/IFEval, `instruction_id_list` and `kwargs`.

    Raises:
        Refused: there are none, or an instruction is unknown.
    """
    instructions = row.get("instructions")
    if instructions is None and isinstance(row.get("instruction_id_list"), list):
        names, arguments = row["instruction_id_list"], row.get("kwargs")
        if not isinstance(arguments, list) or len(arguments) != len(names):
            raise Refused("kwargs must be a list as long as instruction_id_list")
        # The id last: an argument of that name must not replace it.
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
    # The data set's table has a column for each argument of any instruction, empty for all others.
    arguments = {key: _read_argument(name, key, value) for key, value in item.items()
                 if key not in ("id", "prompt") and value is not None}
    return name, arguments


def _read_argument(name: str, key: str, value: Any) -> Any:
    """Return an argument in the type that the checks compare with; a wrong type would compare as false, and
    an empty or negative one would make a check draw a random argument."""
    if key in WHOLE_NUMBERS:
        least = 1 if key in ("n_start", "n_end") else 0
        requirement = f"a whole number of at least {least}"
        # JSON may bring 3.0.
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
        Refused: the arguments are not those of the instruction, or its check needs data of NLTK.
    """
    check = load_checks()[name](name)
    argument_names = check.get_instruction_args_keys()
    # Without one of its arguments a check draws it at random.
    if set(argument_names) != set(arguments):
        raise Refused(f"instruction {name}: takes other arguments than {format_short(dict(arguments))}; "
                      f"write {', '.join(argument_names) or 'none'}")
    try:
        check.build_description(**arguments)
        return bool(check.check_following(text))
    except IndexError:  # the text is shorter than the check takes for granted
        return False
    except (TypeError, ValueError, AttributeError, LookupError) as e:
        if isinstance(e, LookupError) and "NLTK" in str(e):
            raise Refused(f"instruction {name}: needs data of NLTK; run `{NLTK_DATA}`") from None
        raise Refused(f"instruction {name}: cannot be checked with {format_short(dict(arguments))} "
                      f"({format_error(e):.200})") from None


@lru_cache
def load_checks() -> Mapping[str, Any]:
    """Return the name of each instruction -> its class in if-verifiable.

    Raises:
        UserError: if-verifiable is not installed.
    """
    try:
        import langdetect

        # The package asks the network for data of NLTK when it is imported.
        with patch("nltk.download"):
            from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as ifbench
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as ifeval
    except ImportError as e:
        raise UserError(f"reward ifeval: {e.name} is not installed; run `"
                        f"{format_install_command('rl')}`") from None
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    return {**ifeval, **ifbench}


def loosen_response(response: str) -> list[str]:
    """Return a response as it is, without its first line, its last, both; and each without asterisks."""
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(text.replace("*", "") for text in texts)]
