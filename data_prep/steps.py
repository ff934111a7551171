"""Data steps: functions of the user's own that change or leave out documents before they are encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megatron_sov.base.documents import Document, LeftOut
from megatron_sov.base.documents.records import BUCKET_NAME, is_float32
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin, PluginCode, is_reference, load, telling
from megatron_sov.base.plugins.registry import Registry, takes

Function = Callable[[Document], Document | LeftOut]
MAX_REASON_CHARS = 80


def _check(loaded: LoadedPlugin) -> None:
    if not callable(loaded.value) or not takes(loaded.value, ("document",)):
        raise UserError(f"{loaded.reference}: is {loaded.value!r}; a data step is a function of one Document "
                        "that returns a Document or LeftOut(reason)")


OWN: Registry[Function] = Registry("data step", "megatron_sov.data_steps", (), _check)
"""All data steps: none is built in."""


def named_steps(names: Sequence[str]) -> tuple[PluginCode, ...]:
    """Return the record of each step that the command line names, in order; runs the files.

    Raises:
        UserError: one of them cannot be run, or is no data step.
    """
    found = []
    for name in names:
        known = OWN.load(name) if is_reference(name) else name
        OWN.get(known)
        code = OWN.code(known)
        assert code is not None, name
        found.append(code)
    return tuple(found)


def step_of_file(reference: str) -> PluginCode:
    """Return the record of a data step whose name others may have too, by FILE.py:NAME; runs the file.

    Raises:
        UserError: it cannot be run, or is no data step.
    """
    loaded = load(reference)
    _check(loaded)
    return PluginCode("data step", loaded.attribute, loaded.reference, files=loaded.files)


class Steps:
    """Data steps in order, as one process applies them."""

    def __init__(self, codes: Sequence[PluginCode]) -> None:
        """Load the steps that `named_steps` has recorded.

        Raises:
            UserError: a file has changed since.
        """
        self._steps: list[tuple[str, Function]] = []
        for code in codes:
            loaded = load(code.reference)
            if changed := [name for name, sha256 in loaded.files.items()
                           if code.files.get(name, sha256) != sha256]:
                raise UserError(f"{code.reference}: {changed[0]} has changed while it was at work; "
                                "run the command again")
            self._steps.append((code.reference, loaded.value))

    def apply(self, document: Document) -> Document | LeftOut:
        """Return what the steps make of a document.

        Raises:
            UserError: a step fails, or returns something else.
        """
        for reference, step in self._steps:
            try:
                # An error in the user's code is reported with the line of their file.
                with telling(reference.rpartition(":")[0]):
                    found: Any = step(document)
            except UserError as e:
                raise UserError(f"{document.where}: data step {e}") from None
            if (isinstance(found, LeftOut) and isinstance(found.reason, str)
                    and 0 < len(found.reason) <= MAX_REASON_CHARS):
                return found
            if not isinstance(found, Document) or found.kind != document.kind:
                what = (f"a Document of another kind, {found.kind}" if isinstance(found, Document)
                        else repr(found)[:100])
                raise UserError(f"{document.where}: data step {reference} returned {what}; "
                                "it must return a Document of the same kind, or LeftOut(reason) with a "
                                f"reason of at most {MAX_REASON_CHARS} characters")
            document = _carried(found, document, reference)
        return document


def _carried(found: Document, before: Document, reference: str) -> Document:
    """Return what a step has made with the place and the tags that the record has, and its columns and bucket
    where the step names no others.

    Raises:
        UserError: it names columns or a bucket that cannot be.
    """
    # A step that makes a new document keeps the columns that it does not name.
    columns = {**before.columns, **found.columns}
    for name, numbers in before.columns.items():
        given = columns[name]
        if not isinstance(given, tuple) or len(given) != len(numbers) or not all(map(is_float32, given)):
            raise UserError(f"{before.where}: data step {reference} returned {str(given)[:80]} in column "
                            f"{name!r}; it must be a tuple of {len(numbers)} finite numbers")
    bucket = found.bucket or before.bucket
    if bucket != before.bucket and not (isinstance(bucket, str) and BUCKET_NAME.fullmatch(bucket)):
        raise UserError(f"{before.where}: data step {reference} returned the bucket {str(bucket)[:40]!r}; it "
                        "must be a name of letters, digits, '.', '_', '-'")
    return dataclasses.replace(found, where=before.where, line=before.line, columns=columns, bucket=bucket,
                               tags=before.tags)
