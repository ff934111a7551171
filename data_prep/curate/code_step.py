"""The step `code` of a pipeline: a function of the user's own, called for each document."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome, View
from megatron_sov.base.documents import Document, LeftOut
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin, load_plugin, report_plugin_errors
from megatron_sov.base.plugins.registry import accepts_arguments
from megatron_sov.base.settings import Bound, ProblemCode, SettingsProblem, Violation

MAX_REASON_CHARS = 80


def _no_function(function: Path) -> Violation | None:
    return None if ".py:" in str(function) else (ProblemCode.BOUND, "must have the form FILE.py:FUNCTION", "")


def load_function(reference: str) -> LoadedPlugin:
    """Run the file of FILE.py:FUNCTION and return the function.

    Raises:
        UserError: the file cannot be run, or the name is no function of one Document.
    """
    loaded = load_plugin(reference)
    if not callable(loaded.value) or not accepts_arguments(loaded.value, ("document",)):
        raise UserError(f"{loaded.reference}: is {loaded.value!r}; a data step is a function of one Document "
                        "that returns a Document or LeftOut(reason)")
    return loaded


@dataclass(frozen=True)
class StepCodeSettings:
    """Which function."""

    function: Annotated[Path, Bound(_no_function)]
    """FILE.py:FUNCTION; it takes a Document and returns one, or LeftOut(reason)."""
    files: tuple[Path, ...] = ()
    """Files and folders that the function opens: where they change, the step is done again. Its own file and
    the modules that this imports from its folder count without it."""

    @property
    def file(self) -> Path:
        return Path(str(self.function).rpartition(":")[0])

    def problems(self) -> list[SettingsProblem]:
        try:
            load_function(str(self.function))
        except UserError as e:
            return [SettingsProblem(ProblemCode.FILE, "function", str(e))]
        return [SettingsProblem(ProblemCode.FILE, "files", "does not exist", file,
                                "name a file or a folder that the function reads")
                for file in self.files if not file.exists()]


class CodeStep(Step):
    """Calls a function for each document."""

    kind = "code"
    shorthand = "function"
    Settings = StepCodeSettings

    def list_files(self) -> Sequence[Path]:
        """Return the function's file, the modules that it imports from its folder, and the files that the
        settings name."""
        settings: StepCodeSettings = self.settings
        return sorted({settings.file, *settings.files, *(
            file for name in load_function(str(settings.function)).files
            if (file := Path(os.path.normpath(settings.file.parent / name))).is_file())})

    def load_inputs(self, view: View) -> None:
        loaded = load_function(str(self.settings.function))
        self._function, self._reference = loaded.value, loaded.reference

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Return the outcome of the function for each document.

        Raises:
            UserError: the function fails, or returns neither a text nor a reason.
        """
        return [self._call(Document(document.columns.get("where") or document.id, document.text,
                                    id=document.id)) for document in documents]

    def _call(self, document: Document) -> StepOutcome:
        try:
            # An error in the user's code is reported with the line of their file.
            with report_plugin_errors(self._reference.rpartition(":")[0]):
                made: Any = self._function(document)
        except UserError as e:
            raise UserError(f"{document.where}: data step {e}") from None
        if isinstance(made, LeftOut):
            if isinstance(made.reason, str) and 0 < len(made.reason) <= MAX_REASON_CHARS:
                return StepOutcome(made.reason)
        elif isinstance(made, Document) and made.kind == document.kind:
            return StepOutcome(text=made.text)
        raise UserError(f"{document.where}: data step {self._reference} returned {repr(made)[:100]}; it must "
                        f"return a Document of kind {document.kind}, or LeftOut(reason) with a reason of at "
                        f"most {MAX_REASON_CHARS} characters")
