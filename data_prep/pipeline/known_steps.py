"""The steps that pipeline files may name, each loaded when a file asks for it."""

from __future__ import annotations

from importlib import import_module

from data_prep.pipeline.step import Step
from megatron_sov.errors import UserError, how_to_install

STEPS: dict[str, str] = {
    "code": "data_prep.pipeline.code_step:CodeStep",
    "language": "data_prep.quality.language:Language",
    "rules": "data_prep.quality.rules.step:Rules",
    "pii": "data_prep.quality.pii.step:Pii",
    "safety": "data_prep.quality.safety:Safety",
    "exact_dedup": "data_prep.dedup.exact:ExactDedup",
    "minhash_dedup": "data_prep.dedup.minhash:MinhashDedup",
    "paragraph_dedup": "data_prep.dedup.paragraphs:ParagraphDedup",
    "decontaminate": "data_prep.decontamination.step:Decontaminate",
    "quality": "data_prep.scoring.grades:Quality",
    "education": "data_prep.scoring.grades:Education",
    "topics": "data_prep.scoring.topics:Topics",
    "level": "data_prep.scoring.levels:Level",
    "kind": "data_prep.scoring.kinds:Kind",
}
"""Name in pipeline files -> module:class."""


def step_class(kind: str) -> type[Step]:
    """Return the class of a step that `STEPS` has.

    Raises:
        UserError: a library that it needs is not installed.
    """
    module, _, name = STEPS[kind].partition(":")
    try:
        found: type[Step] = getattr(import_module(module), name)
    except ModuleNotFoundError as e:
        raise UserError(f"step {kind}: needs {e.name}, which is not installed; "
                        f"{how_to_install('data')}") from None
    return found
