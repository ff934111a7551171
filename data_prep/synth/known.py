"""The generators that `sov-data synth` knows, each loaded when it is asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.hints.removed import suggest_successor

if TYPE_CHECKING:
    from data_prep.synth.generator import Generator

FOLDER = Path(__file__).parent / "generators"
"""Files of the packaged generators."""
ENDINGS = (".yaml", ".yml")
FILES = ("answers", "autoif", "comparisons", "constraints", "goals", "probes", "rewrite", "safety",
         "solutions", "tool-trajectories", "translation", "worlds")
"""Names of the generators that are files of `generators`."""
REMOVED = {
    "autoif.also": "a row has the `functions` of its constraint",
    "autoif.constraints_per_query": "a query has one constraint",
    "autoif.foreign_scripts": "set `foreign`, a regular expression",
    **dict.fromkeys(("autoif.call_time_s", "constraints.call_time_s"), "a call may take 5 s of a processor"),
    **dict.fromkeys(("autoif.modules", "constraints.modules"), "functions compute on texts alone"),
    "probes.benchmarks": "write the step `decontaminate` into a file for --checks",
    "safety.also": "rows are chats", "translation.glossary": "name the terms in a prompt of your own file",
    "solutions.min_judge": "right answers and differences are checked, and no judge reads solutions",
    "tool-trajectories.environment": "tasks are those of `virtual`; `megatron-sov tools run` plays others",
    "tool-trajectories.min_judged": "set `min_score`",
    **dict.fromkeys(("solutions.vote", "solutions.min_votes", "solutions.min_agreement"),
                    "each problem needs its `answer`"),
    **dict.fromkeys((f"tool-trajectories.{name}" for name in ("fault_share", "max_malformed", "max_repeats")),
                    "docs/synth_worlds.md has what is refused"),
    "worlds.min_judged": "the programs of a world are run, and no judge reads them"}
"""GENERATOR.setting of an earlier version -> what to use in its place."""


def generator_class(name: str) -> type[Generator]:
    """Return the class of a generator, by its name or its file.

    Raises:
        UserError: there is none of that name, or its file has mistakes.
    """
    if name.endswith(ENDINGS):
        return _of_file(Path(name))
    if name in FILES:
        return _packaged(name)
    raise UserError(f"{name}: is no generator{suggest_successor(name) or suggest_name(name, FILES)}; known "
                    f"are {', '.join(FILES)}, and files that end with {' or '.join(ENDINGS)}")


@lru_cache(maxsize=len(FILES))
def _packaged(name: str) -> type[Generator]:
    return _of_file(FOLDER / f"{name}.yaml")


def _of_file(file: Path) -> type[Generator]:
    from data_prep.synth.declared.generator_file import read_generator

    return read_generator(file)
