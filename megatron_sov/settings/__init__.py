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
from megatron_sov.settings.problem import Code, Problem, SettingsError, find_broken, name_options
from megatron_sov.settings.reading import check, find_problems, place_of, plain, read, read_arguments
from megatron_sov.settings.yaml_file import Located, Place, read_file, read_located, read_text, read_yaml

__all__ = [
    "AboveZero", "AtLeastOne", "Code", "Finite", "Fraction", "Located", "NotNegative", "NotNegativeInt",
    "Place", "Problem", "SettingsError", "Share", "assign_all", "change", "check", "find_broken",
    "find_problems", "name_options", "parse_changes", "parse_nested", "place_of", "plain", "read",
    "read_arguments", "read_file", "read_located", "read_text", "read_yaml",
]
