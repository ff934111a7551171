"""On-policy distillation: response log-probabilities by teachers, the column `policy.TEACHER`.

A teacher with the architecture of the student is a checkpoint, whose weights the model loads temporarily;
engine servers run teachers with another architecture. With several teachers, each scores the responses to
prompts in one domain. Until the column is complete, the log-probabilities of every teacher have a separate
file: a killed run continues at the next teacher.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import find_seal_damage, write_sealed
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.post.document_logprobs import run_with_weights, write_logprobs
from megatron_sov.post.policy import REVERSE_KL
from megatron_sov.train.data.rounds import BEHAVIOUR, DOCUMENT_DOMAINS, PublishedRound
from megatron_sov.train.data.token_shards import Documents, DocumentView
from megatron_sov.train.feed import FeedView
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused
from megatron_sov.work.endpoints.vllm_server import VllmServer

REQUESTS = 32
"""Concurrent requests per server."""
ATTEMPTS = 8
"""Attempts per response, over all servers."""
BACKOFF_S = (1.0, 60.0)
"""Bounds for the pause before a retry; every pause doubles the previous pause."""
SLICE_S = 5.0
"""Seconds of requests between two collectives, in which other processes wait for `run_on_main`."""


@dataclass(frozen=True)
class ScoringTeacher:
    """A model that scores the student's responses: a `checkpoint`, or servers at `urls`."""

    domain: str
    """Domain of the scored prompts; "": domains without a teacher."""
    checkpoint: Path | None = None
    sha256: str = ""
    """Weight digest; "" for servers, which report no digest."""
    urls: tuple[str, ...] = ()


def describe_teachers(teachers: Sequence[ScoringTeacher]) -> dict[str, str]:
    return {teacher.domain: teacher.sha256 or "servers" for teacher in teachers}


def read_document_domains(opened: PublishedRound) -> list[str]:
    """Return a domain per document in a round, from the manifest field `DOCUMENT_DOMAINS`."""
    runs: Sequence[tuple[str, int]] = read_manifest(opened.path).content.get(DOCUMENT_DOMAINS, ())
    domains = list(chain.from_iterable(repeat(str(name), int(count)) for name, count in runs))
    if len(domains) != len(opened.starts) - 1:
        raise UserError(f"{opened.path}: lists the domains of {len(domains)} documents and has "
                        f"{len(opened.starts) - 1}; it was published without policy.opd_coeff: delete it and "
                        "later rounds, and they are published again")
    return domains


def write_teachers(view: FeedView, teachers: Sequence[ScoringTeacher], opened: PublishedRound, file: Path,
                   identity: str) -> None:
    """Write log p(label) by the teachers per token in a round; called by all processes together. Raises
    `UserError`: a domain has no teacher, a server rejects a response or does not answer, or the disk is full.
    """
    assert opened.documents is not None, f"{opened.path} has no documents"
    document_teachers = _assign_teachers(opened, teachers)
    teacher_files: list[tuple[np.ndarray, Path]] = []
    for index, teacher in enumerate(teachers):
        teacher_documents = np.flatnonzero(document_teachers == index)
        if not len(teacher_documents):
            continue
        teacher_file = file.with_suffix(f".{index}{file.suffix}")
        teacher_identity = f"{identity} {teacher.domain}"
        if run_on_main(view.world, partial(find_seal_damage, teacher_file, teacher_identity)):
            documents = _SelectedDocuments(opened.documents, teacher_documents)
            if teacher.checkpoint is None:
                _score_by_servers(view, teacher, documents, teacher_file, teacher_identity)
            else:
                run_with_weights(teacher.checkpoint, view, partial(
                    write_logprobs, view, documents, teacher_file, teacher_identity,
                    seq_len=view.config.data.phases[0].seq_len,
                    rows_per_batch=view.config.train.micro_batch_size))
        teacher_files.append((teacher_documents, teacher_file))
    run_on_main(view.world, partial(_join_parts, opened.starts, teacher_files, file, identity))


def _assign_teachers(opened: PublishedRound, teachers: Sequence[ScoringTeacher]) -> np.ndarray:
    """Return the index in `teachers` per document, [documents] int64."""
    indices = {teacher.domain: index for index, teacher in enumerate(teachers)}
    domains = read_document_domains(opened)
    for domain in set(domains):
        if domain not in indices and "" not in indices:
            raise UserError(f"{opened.path}: has responses of domain {domain!r}, and no teacher scores it; "
                            f"pass --teacher or --teacher-url {domain}=...")
    return np.array([indices.get(domain, indices.get("")) for domain in domains], np.int64)


def _join_parts(starts: np.ndarray, teacher_files: Sequence[tuple[np.ndarray, Path]], file: Path,
                identity: str) -> None:
    """Join `teacher_files`, (document indices, a teacher's file), to the column `file`, and delete them."""
    logprobs = np.zeros(int(starts[-1]), np.float32)
    for teacher_documents, teacher_file in teacher_files:
        num_tokens = int((starts[teacher_documents + 1] - starts[teacher_documents]).sum())
        scores, offset = np.fromfile(teacher_file, np.float32, num_tokens), 0
        for document in teacher_documents.tolist():
            begin, end = int(starts[document]), int(starts[document + 1])
            logprobs[begin:end] = scores[offset:offset + end - begin]
            offset += end - begin
    write_sealed(file, logprobs.tobytes(), identity)
    for _, teacher_file in teacher_files:
        teacher_file.unlink()


def compute_reverse_kl(opened: PublishedRound, teacher: np.ndarray) -> dict[str, object]:
    """Estimate KL(student || teacher) in nats per token, for a round and per domain: the mean over generated
    tokens of log p(student) - log p(teacher).

    Args:
        opened: the round; log p(student) is the column `BEHAVIOUR`.
        teacher: [tokens] log p(label) by the teachers.
    """
    assert opened.documents is not None, f"{opened.path} has no documents"
    sums: dict[str, list[float]] = {}
    for document, domain in enumerate(read_document_domains(opened)):
        begin, end = int(opened.starts[document]), int(opened.starts[document + 1])
        is_generated = opened.documents.loss_weights(document, 0, end - begin) > 0
        student = opened.documents.column(BEHAVIOUR, document, 0, end - begin).astype(np.float64)
        log_ratios = (student - teacher[begin:end])[is_generated]
        total = sums.setdefault(domain, [0.0, 0.0])
        total[0] += float(log_ratios.sum())
        total[1] += len(log_ratios)
    sum_all = math.fsum(total for total, _ in sums.values())
    count_all = math.fsum(count for _, count in sums.values())
    domains = {domain: total / max(1.0, count) for domain, (total, count) in sorted(sums.items()) if domain}
    return {REVERSE_KL: sum_all / max(1.0, count_all), f"{REVERSE_KL}_domains": domains}


class _SelectedDocuments(DocumentView):
    """Selected documents in a split, renumbered from 0."""

    def __init__(self, documents: Documents, indices: np.ndarray) -> None:
        super().__init__(documents, documents.is_plain)
        self._indices, self.lengths = indices, np.asarray(documents.lengths[indices], np.int64)

    def locate(self, document: int) -> tuple[Documents, int, int]:
        return self._documents, int(self._indices[document]), 0


def _score_by_servers(view: FeedView, teacher: ScoringTeacher, documents: Documents, file: Path, identity: str
                      ) -> None:
    """Write log p(label) for documents, computed by a teacher's servers, to a sealed file."""
    jobs: list[_ScoringRequests] = []

    def advance() -> bool:
        if not jobs:
            jobs.append(_ScoringRequests(teacher, documents))
        return jobs[0].advance(SLICE_S)

    try:
        # In slices of SLICE_S, because collectives of the waiting processes time out.
        while run_on_main(view.world, advance):
            view.checkpointer.advance()
        run_on_main(view.world, lambda: write_sealed(file, jobs[0].numbers.tobytes(), identity))
    finally:
        for job in jobs:
            job.close()


class _ScoringRequests:
    """Requests to a teacher's servers, a request per document; on rank 0."""

    def __init__(self, teacher: ScoringTeacher, documents: Documents) -> None:
        self._servers = [VllmServer(url) for url in teacher.urls]
        self._documents = documents
        lengths = np.asarray(documents.lengths[np.arange(len(documents.lengths))], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self.numbers = np.zeros(int(self._starts[-1]), np.float32)
        """log p per token as a label; 0 for the first token in a document."""
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(REQUESTS * len(self._servers))
        self._pending = {self._pool.submit(self._score_rows, document) for document in range(len(lengths))}

    def advance(self, limit_s: float) -> bool:
        """Collect answers for `limit_s` seconds; return whether requests are pending."""
        done, self._pending = wait(self._pending, limit_s, FIRST_EXCEPTION)
        for future in done:
            future.result()
        return bool(self._pending)

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _score_rows(self, document: int) -> None:
        begin, end = int(self._starts[document]), int(self._starts[document + 1])
        if end - begin > 1:
            ids = self._documents.tokens(document, 0, end - begin).tolist()
            self.numbers[begin + 1:end] = self._request_scores(document, ids)

    def _request_scores(self, document: int, ids: Sequence[int]) -> np.ndarray:
        """Return log p for `ids[1:]` by the first server that answers. Raises `UserError`: a server rejects
        the tokens, or no server answers within `ATTEMPTS`."""
        for attempt in range(ATTEMPTS):
            # Attempts rotate through the servers.
            server = self._servers[(document + attempt) % len(self._servers)]
            try:
                return _check_scores(server.score(ids), len(ids) - 1, server.url)
            except RequestRefused as e:
                raise UserError(f"--teacher-url {server.url}: refuses {len(ids)} tokens: {e}; it needs the "
                                "student's tokenizer and room for rollout.max_prompt_tokens + "
                                "rollout.max_new_tokens") from None
            except (BadAnswer, TimeoutError) as e:
                error = str(e)
            if self._closed.wait(min(BACKOFF_S[0] * 2 ** attempt, BACKOFF_S[1])):
                break
        raise UserError(f"--teacher-url {server.url}: {error}; see whether the server runs there, and give "
                        "the same command with --resume")


def _check_scores(scores: Sequence[float], count: int, url: str) -> np.ndarray:
    numbers = np.asarray(scores, np.float32)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise BadAnswer(f"{url}: must return {count} log-probabilities, and returned {len(scores)}, "
                        f"{int(np.isfinite(numbers).sum())} of them finite")
    return numbers
