"""The step `code` of a pipeline: a function of the user's own, called for each document."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data_prep.curate.pipeline.step import Doc, Step, StepOutcome, View
from data_prep.steps import Steps, step_of_file
from megatron_sov.base.documents import Document, LeftOut
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import recording_reads
from megatron_sov.base.settings import Bound, Breach, ProblemCode, SettingsProblem


def _no_function(function: Path) -> Breach | None:
    return None if ".py:" in str(function) else (ProblemCode.BOUND, "must have the form FILE.py:FUNCTION", "")


@dataclass(frozen=True)
class StepCodeSettings:
    """Which function."""

    function: Annotated[Path, Bound(_no_function)]
    """FILE.py:FUNCTION; it takes a Document and returns one, or LeftOut(reason)."""
    files: tuple[Path, ...] = ()
    """Files and folders that the function opens when it is called; what its file reads or imports while it
    is loaded is known without it."""

    @property
    def file(self) -> Path:
        return Path(str(self.function).rpartition(":")[0])

    def problems(self) -> list[SettingsProblem]:
        try:
            step_of_file(str(self.function))
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

    def files(self) -> Sequence[Path]:
        """Return the function's file, what it imports from its folder and reads when it is loaded, and what
        the settings name."""
        settings: StepCodeSettings = self.settings
        return sorted({settings.file, *settings.files, *(
            file for name in step_of_file(str(settings.function)).files
            if (file := Path(os.path.normpath(settings.file.parent / name))).is_file())})

    def start(self, view: View) -> None:
        self._steps = Steps([step_of_file(str(self.settings.function))])
        self._files = [file.resolve() for file in self.files()]

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        """Return what the function makes of each document.

        Raises:
            UserError: it fails, returns something else, or opens a file that the address does not know.
        """
        # A file that the function opens is part of what its outcome follows from, so the address has to know
        # it.
        with recording_reads() as reads:
            made = self._made(documents)
        if unknown := sorted(read for read in reads if not any(read.is_relative_to(f) for f in self._files)):
            raise UserError(f"{self.settings.function}: opens {unknown[0]} when it is called, so that a "
                            "change of that file would not be noticed; read it while the code is loaded, or "
                            "name it in `files` of the step")
        if reads.unseen and not self.settings.files:
            raise UserError(f"{self.settings.function}: starts {reads.unseen} when it is called, and files "
                            "that this opens are not seen; name them in `files` of the step (its own file, "
                            "where there are none)")
        return made

    def _made(self, documents: Sequence[Doc]) -> list[StepOutcome]:
        made = []
        for document in documents:
            where = document.columns.get("where") or document.id
            found = self._steps.apply(Document(where, document.text, id=document.id))
            made.append(StepOutcome(found.reason) if isinstance(found,
                                                                LeftOut) else StepOutcome(text=found.text))
        return made
