"""Options for `megatron-sov rl knowledge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import check_output_folder
from megatron_sov.base.settings import Bound, DeclaredCommand, Flag, ProblemCode, Violation
from megatron_sov.commands.shared_options import OverwriteOptions

KNOWLEDGE_KIND = "corpus"


def _check_split(text: str) -> Violation | None:
    return None if all(text.partition("=")) else (ProblemCode.FORM, "must be FIELD=VALUE", "e.g. split=train")


@dataclass(frozen=True, kw_only=True)
class KnowledgeOptions(OverwriteOptions):
    """Write document sections as text for InK-GRPO, without sections that contain test answers."""

    input: Annotated[tuple[Path, ...], Flag(value="FILE.jsonl", many=True)]
    """Records in the training split: a JSON object per line with a section's text, or with `messages`, whose
    assistant turns are the text."""
    tests: Annotated[tuple[Path, ...], Flag(value="FILE.jsonl", many=True)]
    """Test rows; a section that shares ten consecutive words with an answer is omitted."""
    answer_field: Annotated[str, Flag(value="FIELD")] = "answer"
    """Field with the answer in --tests."""
    text_field: Annotated[str, Flag(value="FIELD")] = "text"
    """Field with the text; a dot leads into an object."""
    document_field: Annotated[str, Flag(value="FIELD")] = "document"
    """Field that names the section's document."""
    section_field: Annotated[str, Flag(value="FIELD")] = "section"
    """Field that names the section."""
    records_in: Annotated[str, Flag(value="FIELD")] = ""
    """Field with a record's list of sections, e.g. a question's contexts."""
    split: Annotated[Annotated[str, Bound(_check_split)] | None, Flag(value="FIELD=VALUE")] = None
    """Use only records with this value, e.g. split=train."""
    output: Annotated[Path, Flag(value="DIR")]
    """Artifact to write: knowledge.jsonl, and omitted sections counted by reason."""


def check_knowledge(options: KnowledgeOptions) -> KnowledgeOptions:
    check_output_folder(options.output, KNOWLEDGE_KIND, options.overwrite)
    return options


KNOWLEDGE = DeclaredCommand(KnowledgeOptions, check_knowledge,
                            "megatron_sov.commands.rl.ssp.knowledge_run:write_knowledge")
