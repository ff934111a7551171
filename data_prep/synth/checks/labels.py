"""What people say of samples, and how far checks and judge agree with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.json_lines import read_objects
from data_prep.libraries import require
from data_prep.synth.generator import SampleVerdict
from megatron_sov.base.errors import UserError

ALL_CHECKS, JUDGE = "all checks", "judge"
"""What people are compared with: whether a sample is kept, and the verdicts whose names begin so."""


@dataclass(frozen=True)
class Labels:
    """What people say, by id and by text of a sample."""

    by_id: Mapping[str, bool]
    by_text: Mapping[str, bool]

    def of(self, sample: str, text: str) -> bool | None:
        """Return whether people call a sample good; None: nobody has looked at it."""
        # the id is the surer one: two samples may have one text
        found = self.by_id.get(sample)
        return self.by_text.get(text.strip()) if found is None else found

    def __len__(self) -> int:
        return len(self.by_id) + len(self.by_text)


@dataclass(frozen=True)
class Agreement:
    """How far one of us agrees with people."""

    who: str
    """`ALL_CHECKS`, or the name of a judge's check."""
    num_samples: int
    """With a label and a verdict."""
    num_agreed: int
    """Of them, those where both say the same."""
    num_good: int
    """Of them, those that people call good."""
    num_false_kept: int
    """Called bad by people, and passed."""
    num_false_rejected: int
    """Called good by people, and not passed."""
    kappa: float | None
    """Cohen's (1960): agreement beyond chance; None: undefined, since both said one thing throughout."""


def read_labels(file: Path) -> Labels:
    """Return what people say of samples.

    Raises:
        UserError: the file cannot be read, is empty, or a line is no label, or contradicts another one.
    """
    by: dict[str, dict[str, bool]] = {"id": {}, "text": {}}
    for where, record in read_objects(file):
        named = [name for name in by if isinstance(record.get(name), str)]
        if len(named) != 1 or not isinstance(record.get("good"), bool):
            raise UserError(f"--labels {where}: must have `good`, true or false, and either `id` or `text` "
                            "of a sample; mend it")
        key, name = record[named[0]].strip(), named[0]
        if by[name].setdefault(key, record["good"]) != record["good"]:
            raise UserError(f"--labels {where}: calls {key[:60]!r} {'good' if record['good'] else 'bad'}, "
                            "another line the contrary; keep one of them")
    found = Labels(by["id"], by["text"])
    if not len(found):
        raise UserError(f"--labels {file}: has no lines; each is a JSON object with `id` or `text`, and "
                        "`good`")
    # reported before anything is paid, and not when kappa is computed
    if problems := require("--labels", "sklearn"):
        raise UserError(problems[0])
    return found


class LabelComparison:
    """Collects the verdicts of samples that people have looked at."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._pairs: dict[str, list[tuple[bool, bool]]] = {ALL_CHECKS: []}

    def add(self, sample: str, text: str, verdicts: Iterable[SampleVerdict]) -> None:
        """Take a sample with all of its verdicts, if it has a label."""
        good = self._labels.of(sample, text)
        if good is None:
            return
        told = list(verdicts)
        self._pairs[ALL_CHECKS].append((good, all(verdict.passed for verdict in told)))
        for verdict in told:
            if verdict.check.startswith(JUDGE):
                self._pairs.setdefault(verdict.check, []).append((good, verdict.passed))

    def agreements(self) -> list[Agreement]:
        """Return the agreement of each with people.

        Raises:
            UserError: no label is that of a sample.
        """
        if not self._pairs[ALL_CHECKS]:
            raise UserError(f"--labels: none of {len(self._labels)} labels is that of a sample; `id` is that "
                            "of kept.jsonl's or rejected.jsonl's `synthetic.sample`, `text` a sample's whole "
                            "text")
        return [_agreement(who, pairs) for who, pairs in self._pairs.items()]


def gate_of(agreements: Iterable[Agreement]) -> Agreement:
    """Return the agreement that a bound holds for: the judge's worst where there is one, else that of all
    checks."""
    found = list(agreements)
    # the judge is what people are asked to vouch for; -2 is below every kappa
    judges = [one for one in found if one.who != ALL_CHECKS]
    return min(judges or found, key=lambda one: -2.0 if one.kappa is None else one.kappa)


def _agreement(who: str, pairs: list[tuple[bool, bool]]) -> Agreement:
    good, passed = zip(*pairs, strict=True)
    return Agreement(who, len(pairs), sum(a == b for a, b in pairs), sum(good),
                     sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs),
                     _kappa(good, passed))


def _kappa(one: tuple[bool, ...], other: tuple[bool, ...]) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    if len({*one, *other}) == 1:  # agreement by chance is certain, and more than that undefined
        return None
    return float(cohen_kappa_score(one, other))


def described(agreements: Iterable[Agreement]) -> Iterator[dict[str, Any]]:
    for one in agreements:
        yield {**vars(one), "agreement": one.num_agreed / one.num_samples}
