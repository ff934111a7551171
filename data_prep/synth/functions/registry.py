"""Function names in templates of generator files."""

from collections.abc import Callable
from typing import Any

from data_prep.synth.functions.answers import (
    count_right_answers, find_boxes, find_final_answers, get_boxed_or_plain, run_programs,
    select_different_solutions, select_right_solutions)
from data_prep.synth.functions.constraints import (
    count_accepting_functions, cross_check, find_wording_problem, parse_list_items)
from data_prep.synth.functions.draws import draw_choice, draw_share
from data_prep.synth.functions.texts import (
    compute_chrf, compute_copied_share, compute_size_ratio, fence_text, fill_phrasing, find_changed_numbers,
    find_code, find_numbers, find_pattern_matches, find_quotations, find_tagged_text, get_language_name,
    identify_likely_language, is_dialogue, is_in_language, is_refusal, remove_code, remove_pattern,
    replace_contents)
from data_prep.synth.functions.worlds import (
    check_task, check_world, find_draft_problem, find_task_problem, format_json_text, parse_json_object)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    # texts
    "changed_numbers": find_changed_numbers, "chrf": compute_chrf, "code_in": find_code,
    "copied_share": compute_copied_share, "fenced": fence_text, "fill_phrasing": fill_phrasing,
    "in_language": is_in_language, "is_dialogue": is_dialogue, "json_object": parse_json_object,
    "json_text": format_json_text, "language_name_of": get_language_name,
    "language_of": identify_likely_language,
    "matches": find_pattern_matches, "numbers_in": find_numbers, "prose_of": remove_code,
    "quotations": find_quotations, "refuses": is_refusal, "size_ratio": compute_size_ratio,
    "text_between": find_tagged_text, "with_texts": replace_contents, "without": remove_pattern,
    # problems
    "boxed_or_plain": get_boxed_or_plain, "boxes": find_boxes, "count_right": count_right_answers,
    "different_solutions": select_different_solutions, "final_answers": find_final_answers,
    "right_solutions": select_right_solutions, "run_programs": run_programs,
    # constraints
    "accepted_by": count_accepting_functions, "choose": draw_choice, "cross_check": cross_check,
    "list_items": parse_list_items, "share_of": draw_share, "wording_problem": find_wording_problem,
    # worlds
    "draft_problem": find_draft_problem, "task_problem": find_task_problem, "task_verdicts": check_task,
    "world_verdicts": check_world}
"""Name in a template -> function."""
