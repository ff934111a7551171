"""The pipeline step `code`: call a user's function for each document."""

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


def _find_function_problem(function: Path) -> Violation | None:
    return None if ".py:" in str(function) else (ProblemCode.BOUND, "must have the form FILE.py:FUNCTION", "")


def load_function(reference: str) -> LoadedPlugin:
    """Import FILE.py:FUNCTION; raises `UserError` for a broken file or another signature."""
    loaded = load_plugin(reference)
    if not callable(loaded.value) or not accepts_arguments(loaded.value, ("document",)):
        raise UserError(f"{loaded.reference}: is {loaded.value!r}; a data step is a function of one Document "
                        "that returns a Document or LeftOut(reason)")
    return loaded


@dataclass(frozen=True)
class StepCodeSettings:
    """Settings of `code`."""

    function: Annotated[Path, Bound(_find_function_problem)]
    """FILE.py:FUNCTION; takes a Document and returns a Document or LeftOut(reason)."""
    files: tuple[Path, ...] = ()
    """Files and folders that the function opens; a change repeats the step. The function's file and its
    imports from the same folder are included."""

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
    kind = "code"
    shorthand = "function"
    Settings = StepCodeSettings

    def list_files(self) -> Sequence[Path]:
        """List the function's file, its imports from the same folder, and `settings.files`."""
        settings: StepCodeSettings = self.settings
        imports = [Path(os.path.normpath(settings.file.parent / name))
                   for name in load_function(str(settings.function)).files]
        return sorted({settings.file, *settings.files, *(file for file in imports if file.is_file())})

    def load_inputs(self, view: View) -> None:
        loaded = load_function(str(self.settings.function))
        self._function, self._reference = loaded.value, loaded.reference

    def judge_document(self, document: Doc) -> StepOutcome:
        """Call the function; raises `UserError` if it fails or returns another type."""
        where = document.columns.get("where") or document.id
        try:
            # Errors are reported with the line in the user's file.
            with report_plugin_errors(self._reference.rpartition(":")[0]):
                result: Any = self._function(Document(where, document.text, id=document.id))
        except UserError as e:
            raise UserError(f"{where}: data step {e}") from None
        if isinstance(result, LeftOut):
            if isinstance(result.reason, str) and 0 < len(result.reason) <= MAX_REASON_CHARS:
                return StepOutcome(result.reason)
        elif isinstance(result, Document) and result.kind == "text":
            return StepOutcome(text=result.text)
        raise UserError(f"{where}: data step {self._reference} returned {repr(result)[:100]}; it must return "
                        "a Document of kind text, or LeftOut(reason) with a reason of at most "
                        f"{MAX_REASON_CHARS} characters")
