"""Settings as frozen dataclasses: bounds in types, a reader for JSON, YAML and `key=value`, and sentences for
problems. Without torch."""

from megatron_sov.base.settings.conditions import (
    DECIDING_FACTS, ActsWhen, AllOf, AnyOf, Condition, When, find_inert_settings, get_setting, is_none_of,
    is_one_of, is_set, is_unset, iter_conditions)
from megatron_sov.base.settings.options import (
    NO_FLAG, ActionGroup, DeclaredCommand, Flag, add_options, count_cores, read_command_options, read_options,
    set_dry_run)
from megatron_sov.base.settings.problem import (
    ASCENDING_PAIR, UNIQUE_ITEMS, AboveZero, AtLeastOne, Bound, Finite, Fraction, NotBlank, NotNegative,
    NotNegativeInt, ProblemCode, Relation, SettingsError, SettingsProblem, Share, Violation, at_most_field,
    below_field, choice_from, differs_from_field, excludes_field, find_broken_rules, multiple_of_field,
    require_that, requires_field, to_problem, use_option_names)
from megatron_sov.base.settings.reading import (
    find_all_problems, find_declaration_problems, find_rule_problems, get_field_hints, get_inner_hint,
    iter_leaves, list_fields, parse_arguments, parse_percent, parse_settings, split_key, to_plain_values,
    try_parse_settings)
from megatron_sov.base.settings.sources import (
    LocatedDocument, Place, apply_changes, assign_values, format_change, parse_changes, parse_located_yaml,
    parse_nested, parse_settings_yaml, read_settings_file, read_settings_text)

__all__ = [
    "ASCENDING_PAIR", "DECIDING_FACTS", "NO_FLAG", "UNIQUE_ITEMS", "AboveZero", "ActionGroup", "ActsWhen",
    "AllOf", "AnyOf", "AtLeastOne", "Bound", "Condition", "DeclaredCommand", "Finite", "Flag", "Fraction",
    "LocatedDocument", "NotBlank", "NotNegative", "NotNegativeInt", "Place", "ProblemCode", "Relation",
    "SettingsError", "SettingsProblem", "Share", "Violation", "When", "add_options",
    "apply_changes", "assign_values", "at_most_field", "below_field", "choice_from",
    "count_cores", "differs_from_field", "excludes_field", "find_all_problems", "find_broken_rules",
    "find_declaration_problems", "find_inert_settings", "find_rule_problems", "format_change",
    "get_field_hints", "get_inner_hint", "get_setting", "is_none_of", "is_one_of", "is_set", "is_unset",
    "iter_conditions",
    "iter_leaves", "list_fields", "multiple_of_field", "parse_arguments", "parse_changes",
    "parse_located_yaml", "parse_nested", "parse_percent", "parse_settings", "parse_settings_yaml",
    "read_command_options", "read_options", "read_settings_file", "read_settings_text", "require_that",
    "requires_field", "set_dry_run", "split_key", "to_plain_values", "to_problem", "try_parse_settings",
    "use_option_names"]
