"""The generators that `sov-data synth` knows, each loaded when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.plugins.loading import LoadedPlugin
from megatron_sov.base.plugins.registry import Registry

if TYPE_CHECKING:
    from data_prep.synth.generator import Generator

GENERATORS: dict[str, str] = {
    "answers": "data_prep.synth.generators.measurements:AnswerGenerator",
    "autoif": "data_prep.synth.generators.autoif.answers:AutoIf",
    "code": "data_prep.synth.generators.code:CodeTasks",
    "comparisons": "data_prep.synth.generators.measurements:Comparisons",
    "constraints": "data_prep.synth.generators.autoif.constraints:Constraints",
    "goals": "data_prep.synth.generators.tools.goals:Goals",
    "multihop": "data_prep.synth.generators.multihop:Multihop",
    "probes": "data_prep.synth.generators.probes:Probes",
    "questions": "data_prep.synth.generators.questions:Questions",
    "rewrite": "data_prep.synth.generators.rewrite:Rewrite",
    "safety": "data_prep.synth.generators.safety:SafetyGenerator",
    "solutions": "data_prep.synth.generators.solutions:Solutions",
    "textbook": "data_prep.synth.generators.textbook:Textbook",
    "tool-trajectories": "data_prep.synth.generators.tools.trajectories:ToolTrajectories",
    "translation": "data_prep.synth.generators.translation:TranslationGenerator",
    "triples": "data_prep.synth.generators.triples:Triples",
    "worlds": "data_prep.synth.generators.tools.worlds:Worlds",
}
"""Name on the command line -> module:class."""


def _check(loaded: LoadedPlugin) -> None:
    from data_prep.synth.generator import Generator

    if not (isinstance(loaded.value, type) and issubclass(loaded.value, Generator)):
        raise UserError(f"{loaded.reference}: is {str(loaded.value)[:80]}; a generator is a subclass of "
                        f"{Generator.__module__}.Generator")


OWN: Registry[type[Generator]] = Registry("generator", "megatron_sov.generators", GENERATORS, _check,
                                          lambda generator: str(generator.name))
"""Those of installed packages."""


def generator_names() -> list[str]:
    """Return the names that the command line may use, in order."""
    return sorted([*GENERATORS, *(name for name, _ in OWN.listing())])


def generator_class(name: str) -> type[Generator]:
    """Return the class of a generator.

    Raises:
        UserError: there is none of that name, or a library that it needs is not installed.
    """
    if name not in (known := generator_names()):
        raise UserError(f"{name}: is no generator{nearest(name, known)}; known are {', '.join(known)}")
    return OWN.loaded(name, GENERATORS, "synth")
