"""Teachers that score responses over HTTP: one per domain, retries and refusals."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import find_seal_damage
from megatron_sov.post.rl import teachers
from megatron_sov.post.rl.teachers import ScoringTeacher, _check_scores, compute_reverse_kl, write_teachers
from megatron_sov.train.data.rounds import PublishedRound
from megatron_sov.work.endpoints.answers import BadAnswer
from tests.token_servers import VllmDouble

LENGTHS = (3, 1, 4, 2, 5)
DOMAINS = [["math", 2], ["", 1], ["code", 2]]


class CountedDocuments:
    """Documents whose token ids count up from 5; all tokens except the first have loss weight 1."""

    is_plain, columns = False, ("behaviour_logprobs",)
    lengths = np.array(LENGTHS)

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return np.arange(5 + start, 5 + start + count) + document

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        return np.minimum(np.arange(start, start + count), 1).astype(np.float32)

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        return np.full(count, -0.25, np.float32)


@pytest.fixture
def server_doubles() -> Iterator[list[Any]]:
    doubles: list[Any] = [VllmDouble(), VllmDouble()]
    yield doubles
    for server in doubles:
        server.close()


@pytest.fixture
def published_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedRound:
    manifest = SimpleNamespace(content={"document_domains": DOMAINS})
    monkeypatch.setattr(teachers, "read_manifest", lambda path: manifest)
    monkeypatch.setattr(teachers, "BACKOFF_S", (0.001, 0.001))
    monkeypatch.setattr(teachers, "run_on_main", lambda world, action: action())
    documents: Any = CountedDocuments()
    return PublishedRound(tmp_path / "0001", documents, (range(5),), {}, np.array([0, *np.cumsum(LENGTHS)]))


VIEW: Any = SimpleNamespace(world=None, checkpointer=SimpleNamespace(advance=lambda: None))


def score_round(published_round: PublishedRound, *teachers: Any) -> list[float]:
    """Return the teachers' scores of a round, in hundredths."""
    file = published_round.path.with_name("0001.teacher_logprobs.f32")
    write_teachers(VIEW, teachers, published_round, file, "these")
    assert find_seal_damage(file, "these") is None and [f.name for f in file.parent.iterdir()] == [file.name]
    return (np.fromfile(file, np.float32, sum(LENGTHS)) * -100).round(3).tolist()


def test_each_teacher_scores_its_documents_on_several_servers(published_round: PublishedRound,
                                                              server_doubles: list[Any]) -> None:
    first_server, second_server = server_doubles
    expected = [0, 6, 7, 0, 0, 8, 9, 10, 0, 9, 0, 10, 11, 12, 13]  # hundredths; the first token has none
    teachers = ScoringTeacher("", urls=(first_server.url,)), ScoringTeacher("code", urls=(second_server.url,))
    assert score_round(published_round, *teachers) == expected
    assert [len(body["token_ids"]) for body in second_server.generate_bodies] in ([2, 5], [5, 2])
    # The document of one token has no label, so it is not sent.
    assert sorted(len(body["token_ids"]) for body in first_server.generate_bodies) == [3, 4]
    result = compute_reverse_kl(published_round, np.array(expected) / -100)
    differences = np.array(expected)[np.array(expected) > 0] / 100 - 0.25
    assert result["reverse_kl"] == pytest.approx(differences.mean())
    domains: Any = result["reverse_kl_domains"]
    assert domains == {"code": pytest.approx(differences[5:].mean()),
                       "math": pytest.approx(differences[:2].mean())}
    with pytest.raises(UserError, match=r"responses of domain '(math|)'"):
        score_round(published_round, ScoringTeacher("code", urls=(second_server.url,)))


def test_scoring_retries_absent_servers_and_reports_refusals(published_round: PublishedRound,
                                                             server_doubles: list[Any]) -> None:
    first_server, second_server = server_doubles
    expected = score_round(published_round, ScoringTeacher("", urls=(first_server.url,)))
    second_server.is_dead = True
    both_servers = ScoringTeacher("", urls=(second_server.url, first_server.url))
    assert score_round(published_round, both_servers) == expected, "the living server answers"
    first_server.refuses = lambda path: path.startswith("/inference")
    # Without the path /inference, the teacher is asked through /v1/completions.
    assert score_round(published_round, ScoringTeacher("", urls=(first_server.url,))) == expected
    first_server.refuses = lambda path: path.startswith(("/inference", "/v1/completions"))
    with pytest.raises(UserError, match=r"--teacher-url http://.*: refuses \d"):
        score_round(published_round, ScoringTeacher("", urls=(first_server.url,)))
    first_server.is_dead = True
    with pytest.raises(UserError, match="HTTP 500: EngineCore"):
        score_round(published_round, ScoringTeacher("", urls=(first_server.url,)))


def test_scoring_rejects_invalid_logprobs() -> None:
    with pytest.raises(BadAnswer, match="and returned 2, 1"):
        _check_scores([-1.0, float("-inf")], 2, "http://a")
    with pytest.raises(BadAnswer, match="return 3 log-probabilities"):
        _check_scores([-1.0], 3, "http://a")
