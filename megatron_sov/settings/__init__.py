"""Settings, declared once and read in one way: frozen dataclasses whose types carry the bounds, one reader
for JSON, YAML and `key=value`, one table of sentences.  Nothing here imports torch."""

from megatron_sov.settings.bounds import (
    AboveZero,
    AtLeastOne,
    Finite,
    Fraction,
    NotNegative,
    NotNegativeInt,
    Share,
)
from megatron_sov.settings.changes import assign_all, change, parse_changes, parse_nested
from megatron_sov.settings.options import (
    NO_FLAG,
    Actions,
    Flag,
    add_actions,
    add_options,
    num_cores,
    options_of,
    read_options,
    run_action,
)
from megatron_sov.settings.problem import Code, Problem, SettingsError, as_problem
from megatron_sov.settings.reading import (
    check,
    find_problems,
    place_of,
    plain,
    problems_of,
    read,
    read_arguments,
    rules_inside,
    rules_of,
)
from megatron_sov.settings.yaml_file import Located, Place, read_file, read_located, read_text, read_yaml

__all__ = [
    "NO_FLAG",
    "AboveZero",
    "Actions",
    "AtLeastOne",
    "Code",
    "Finite",
    "Flag",
    "Fraction",
    "Located",
    "NotNegative",
    "NotNegativeInt",
    "Place",
    "Problem",
    "SettingsError",
    "Share",
    "add_actions",
    "add_options",
    "as_problem",
    "assign_all",
    "change",
    "check",
    "find_problems",
    "num_cores",
    "options_of",
    "parse_changes",
    "parse_nested",
    "place_of",
    "plain",
    "problems_of",
    "read",
    "read_arguments",
    "read_file",
    "read_located",
    "read_options",
    "read_text",
    "read_yaml",
    "rules_inside",
    "rules_of",
    "run_action",
]
