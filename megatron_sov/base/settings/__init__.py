"""Settings as frozen dataclasses: bounds in types, one reader for JSON, YAML and `key=value`, one wording for
problems. Nothing here imports torch."""

from megatron_sov.base.settings.acting import (
    FACTS, ActsWhen, AllOf, AnyOf, Condition, When, conditions_of, find_inert, is_none_of, is_one_of, is_set,
    is_unset, value_at)
from megatron_sov.base.settings.options import (
    NO_FLAG, Actions, Flag, add_actions, add_options, command_of, num_cores, options_of, read_options,
    run_action)
from megatron_sov.base.settings.problem import (
    ONCE, RISING, AboveZero, AtLeastOne, Bound, Breach, Finite, Fraction, NotBlank, NotNegative,
    NotNegativeInt, ProblemCode, Relation, SettingsError, SettingsProblem, Share, as_problem, at_most, below,
    find_broken, multiple_of, name_options, not_with, one_of, only_with, other_than)
from megatron_sov.base.settings.reading import (
    by_name, check, fields_of, find_problems, hint_below, hints_of, place_of, plain, problems_of, read,
    read_arguments, rules_of)
from megatron_sov.base.settings.sources import (
    Located, Place, assign_all, change, parse_changes, parse_nested, read_file, read_located, read_text,
    read_yaml)

__all__ = [
    "FACTS", "NO_FLAG", "ONCE", "RISING", "AboveZero", "Actions", "ActsWhen", "AllOf", "AnyOf", "AtLeastOne",
    "Bound", "Breach", "Condition", "Finite", "Flag", "Fraction", "Located", "NotBlank", "NotNegative",
    "NotNegativeInt", "Place", "ProblemCode", "Relation", "SettingsError", "SettingsProblem", "Share", "When",
    "add_actions", "add_options", "as_problem", "assign_all", "at_most", "below",
    "by_name", "change", "check", "command_of", "conditions_of", "fields_of", "find_broken",
    "find_inert", "find_problems", "hint_below", "hints_of", "is_none_of", "is_one_of", "is_set", "is_unset",
    "multiple_of", "name_options", "not_with", "num_cores", "one_of", "only_with", "options_of", "other_than",
    "parse_changes", "parse_nested", "place_of", "plain", "problems_of", "read", "read_arguments",
    "read_file", "read_located", "read_options", "read_text", "read_yaml", "rules_of", "run_action",
    "value_at",
]
