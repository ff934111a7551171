"""Verdicts that many generators need, and how a list of them ends."""

from __future__ import annotations

from collections.abc import Iterable

from data_prep.synth.generator import GeneratedSample, Reply, SampleVerdict

MAX_TOLD_CHARS = 200
"""Of an input that nothing is asked about."""


def until_failed(verdicts: Iterable[SampleVerdict]) -> list[SampleVerdict]:
    """Return verdicts up to the first that a sample does not pass: what comes behind is not asked."""
    found: list[SampleVerdict] = []
    for verdict in verdicts:
        found.append(verdict)
        if not verdict.passed:
            break
    return found


def are_passed(verdicts: Iterable[SampleVerdict]) -> bool:
    """Return whether all checks are passed."""
    return all(verdict.passed for verdict in verdicts)


def complete(reply: Reply) -> SampleVerdict:
    """Return whether an answer ended by itself."""
    return SampleVerdict("complete", not reply.is_cut,
                         "cut off at the limit of tokens" if reply.is_cut else "")


def within(check: str, value: float, least: float, most: float) -> SampleVerdict:
    """Return whether a figure lies within bounds."""
    return SampleVerdict(check, least <= value <= most, f"{value:.2f}, must lie from {least:g} to {most:g}")


def refused(source: str, check: str, detail: str) -> GeneratedSample:
    """Return the sample of an input about which nothing is asked."""
    return GeneratedSample({"text": source[:MAX_TOLD_CHARS]}, (SampleVerdict(check, False, detail),))


def unknown_language(source: str) -> GeneratedSample:
    """Return the sample of a document in no language that is known."""
    return refused(source, "source language", "not sure, or none")
