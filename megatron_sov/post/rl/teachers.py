"""What teachers say of the tokens of a round, which the student wrote (on-policy distillation): the column
`policy.TEACHER`, and how far the student is from them.

A teacher of the student's architecture is a checkpoint, whose weights the model has for a while; any other
one is asked at the addresses of its servers.  Several teachers each read the responses to prompts of their
domain.  What each says stands in a file of its own until all have spoken, so that a run that is killed
goes on at the next teacher.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import seal_damage, write_sealed
from megatron_sov.engine.parallel.world import on_main
from megatron_sov.model.modality import EncoderInputs, get_banks, get_encoder_inputs
from megatron_sov.post.policy import REVERSE_KL
from megatron_sov.post.reference import write_logprobs
from megatron_sov.train.data.rounds import BEHAVIOUR, DOMAINS, Round
from megatron_sov.train.data.token_shards import Documents
from megatron_sov.train.stages.feed import FeedView
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused
from megatron_sov.work.endpoints.vllm_server import VllmServer

REQUESTS = 32
"""That a server is given at a time."""
ATTEMPTS = 8
"""At one response, by whichever server."""
BACKOFF_S = (1.0, 60.0)
"""Before a response is asked again: twice as long each time, within these bounds."""
STEP_S = 5.0
"""Of asking, while other processes wait for a message."""
WithWeights = Callable[[Path, FeedView, Callable[[], None]], None]
"""(checkpoint, run, compute): calls `compute` where the model has the checkpoint's weights."""


@dataclass(frozen=True)
class ScoringTeacher:
    """A model that reads what a student wrote."""

    domain: str
    """Of the prompts whose responses it reads; "": those that no other teacher reads."""
    checkpoint: Path | None = None
    """Its weights; None: its servers are asked."""
    sha256: str = ""
    """What stands for them; servers do not tell theirs."""
    urls: tuple[str, ...] = ()
    """Of its servers."""


def teacher_of(domain: str, teachers: Sequence[ScoringTeacher]) -> int | None:
    """Return the place of the teacher of a domain; None: it has none."""
    found = {teacher.domain: place for place, teacher in enumerate(teachers)}
    return found.get(domain, found.get(""))


def identity_of(teachers: Sequence[ScoringTeacher]) -> dict[str, str]:
    """Return domain -> what stands for its teacher."""
    return {teacher.domain: teacher.sha256 or "servers" for teacher in teachers}


def document_domains(opened: Round) -> list[str]:
    """Return the domain of each document of a round."""
    runs: Sequence[tuple[str, int]] = read_manifest(opened.path).content.get(DOMAINS, ())
    domains = list(chain.from_iterable(repeat(str(name), int(count)) for name, count in runs))
    if len(domains) != len(opened.starts) - 1:
        raise UserError(f"{opened.path}: tells the domains of {len(domains)} documents and has "
                        f"{len(opened.starts) - 1}; it was published without policy.opd_coeff: delete it and "
                        "those behind it, and they are published anew")
    return domains


def write_teachers(view: FeedView, teachers: Sequence[ScoringTeacher], opened: Round, file: Path, of: str,
                   with_weights: WithWeights) -> None:
    """Write the teachers' log p(label) of each token of a round, as a sealed file; called by all processes
    together.

    Args:
        view: the run.
        teachers: one for each domain.
        opened: the round.
        file: of float32.
        of: what its checksum is bound to.
        with_weights: puts a checkpoint's weights into the model.

    Raises:
        UserError: a domain has no teacher, a server refuses or is away for too long, or the disk is full.
    """
    assert opened.documents is not None, f"{opened.path} has no documents"
    owners = _owners(opened, teachers)
    parts: list[tuple[np.ndarray, Path]] = []
    for place, teacher in enumerate(teachers):
        chosen = np.flatnonzero(owners == place)
        if not len(chosen):
            continue
        part, part_of = file.with_suffix(f".{place}{file.suffix}"), f"{of} {teacher.domain}"
        if on_main(view.world, partial(seal_damage, part, part_of)):
            own = _ChosenDocuments(opened.documents, chosen)
            if teacher.checkpoint is None:
                _ask_servers(view, teacher, own, part, part_of)
            else:
                with_weights(teacher.checkpoint, view, partial(
                    write_logprobs, view, own, 0, view.config.data.phases[0].seq_len,
                    view.config.train.micro_batch_size, part, part_of))
        parts.append((chosen, part))
    on_main(view.world, partial(_join, opened.starts, parts, file, of))


def _owners(opened: Round, teachers: Sequence[ScoringTeacher]) -> np.ndarray:
    places: dict[str, int] = {}
    domains = document_domains(opened)
    for domain in set(domains):
        place = teacher_of(domain, teachers)
        if place is None:
            raise UserError(f"{opened.path}: has responses of domain {domain!r}, and no teacher reads it; "
                            f"pass --teacher or --teacher-url {domain}=...")
        places[domain] = place
    return np.array([places[domain] for domain in domains], np.int64)


def _join(starts: np.ndarray, parts: Sequence[tuple[np.ndarray, Path]], file: Path, of: str) -> None:
    """Write the numbers of all documents from those of each teacher's."""
    numbers = np.zeros(int(starts[-1]), np.float32)
    for chosen, part in parts:
        found, at = np.fromfile(part, np.float32, int((starts[chosen + 1] - starts[chosen]).sum())), 0
        for document in chosen.tolist():
            begin, end = int(starts[document]), int(starts[document + 1])
            numbers[begin:end] = found[at:at + end - begin]
            at += end - begin
    write_sealed(file, numbers.tobytes(), of)
    for _, part in parts:
        part.unlink()


def reverse_kl(opened: Round, teacher: np.ndarray) -> dict[str, object]:
    """Return the mean over tokens of the log-probability that they were written with minus the teacher's, of
    a round and of its domains: an estimate of KL(student || teacher), in nats a token.

    Args:
        opened: the round.
        teacher: [tokens] its column.
    """
    assert opened.documents is not None, f"{opened.path} has no documents"
    sums: dict[str, list[float]] = {}
    for document, domain in enumerate(document_domains(opened)):
        begin, end = int(opened.starts[document]), int(opened.starts[document + 1])
        written = opened.documents.loss_weights(document, 0, end - begin) > 0
        apart = (opened.documents.column(BEHAVIOUR, document, 0, end - begin).astype(np.float64)
                 - teacher[begin:end])[written]
        total = sums.setdefault(domain, [0.0, 0.0])
        total[0] += float(apart.sum())
        total[1] += len(apart)
    apart_all, count_all = (math.fsum(total[i] for total in sums.values()) for i in (0, 1))
    return {REVERSE_KL: apart_all / max(1.0, count_all), f"{REVERSE_KL}_domains": {
        domain: apart / max(1.0, count) for domain, (apart, count) in sorted(sums.items()) if domain}}


class _ChosenDocuments:
    """Some documents of a split, numbered anew."""

    def __init__(self, documents: Documents, chosen: np.ndarray) -> None:
        self._documents, self._chosen = documents, chosen
        self.lengths = np.asarray(documents.lengths[chosen], np.int64)
        self.is_plain, self.columns, self.banks = documents.is_plain, documents.columns, get_banks(documents)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.tokens(int(self._chosen[document]), start, count)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.loss_weights(int(self._chosen[document]), start, count)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.types(int(self._chosen[document]), start, count)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.column(name, int(self._chosen[document]), start, count)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        return self._documents.routes(int(self._chosen[document]), start, count)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        return get_encoder_inputs(self._documents, int(self._chosen[document]), start, count)


def _ask_servers(view: FeedView, teacher: ScoringTeacher, documents: Documents, file: Path, of: str) -> None:
    """Write what a teacher's servers say of documents."""
    begun: list[_Asking] = []

    def step() -> bool:
        if not begun:
            begun.append(_Asking(teacher, documents))
        return begun[0].advance(STEP_S)

    try:
        # in steps: there is a limit to how long the others wait for a message
        while on_main(view.world, step):
            view.checkpointer.advance()
        on_main(view.world, lambda: write_sealed(file, begun[0].numbers.tobytes(), of))
    finally:
        for asking in begun:
            asking.close()


class _Asking:
    """Documents that are asked about; of the process that asks."""

    def __init__(self, teacher: ScoringTeacher, documents: Documents) -> None:
        self._servers = [VllmServer(url) for url in teacher.urls]
        self._documents = documents
        lengths = np.asarray(documents.lengths[np.arange(len(documents.lengths))], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self.numbers = np.zeros(int(self._starts[-1]), np.float32)
        """Of each token as a label; 0 of first ones."""
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(REQUESTS * len(self._servers))
        self._left = {self._pool.submit(self._score, document) for document in range(len(lengths))}

    def advance(self, limit_s: float) -> bool:
        """Take in answers for so many seconds; returns whether some are still to come.

        Raises:
            UserError: a response has none.
        """
        done, self._left = wait(self._left, limit_s, FIRST_EXCEPTION)
        for future in done:
            future.result()
        return bool(self._left)

    def close(self) -> None:
        self._is_over.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _score(self, document: int) -> None:
        begin, end = int(self._starts[document]), int(self._starts[document + 1])
        if end - begin > 1:
            ids = self._documents.tokens(document, 0, end - begin).tolist()
            self.numbers[begin + 1:end] = self._asked(document, ids)

    def _asked(self, document: int, ids: Sequence[int]) -> np.ndarray:
        """Return what one of the servers says of a response."""
        for attempt in range(ATTEMPTS):
            # another one each time: the first may be away
            server = self._servers[(document + attempt) % len(self._servers)]
            try:
                return _checked(server.score(ids), len(ids) - 1, server.url)
            except RequestRefused as e:
                raise UserError(f"--teacher-url {server.url}: refuses {len(ids)} tokens: {e}; it needs the "
                                "student's tokenizer and room for rollout.max_prompt_tokens + "
                                "rollout.max_new_tokens") from None
            except (BadAnswer, TimeoutError) as e:
                said = str(e)
            if self._is_over.wait(min(BACKOFF_S[0] * 2 ** attempt, BACKOFF_S[1])):
                break
        raise UserError(f"--teacher-url {server.url}: {said}; see whether the server runs there, and give "
                        "the same command with --resume")


def _checked(found: Sequence[float], count: int, url: str) -> np.ndarray:
    numbers = np.asarray(found, np.float32)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise BadAnswer(f"{url}: was to tell {count} log-probabilities, and tells {len(found)}, "
                        f"{int(np.isfinite(numbers).sum())} of them finite")
    return numbers
