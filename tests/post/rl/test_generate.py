"""The generating job with a counting engine: each response is written once, and each token names its
policy."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.request import GenerationBounds, GenerationResult, Sampling, StopRule, Tokens
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate.pieces import PendingPieces, PieceQueue, SampleAttempt
from megatron_sov.post.rl.generate.responses import ResponseSource, compute_sampling_digest
from megatron_sov.post.rl.generate.writers import write_batches
from megatron_sov.rollouts.prompts import PromptList, read_prompts
from megatron_sov.rollouts.round_order import PromptPiece, plan_round_pieces, select_round_prompts
from megatron_sov.rollouts.rows import LENGTH, STOP, UNFINISHED, Rollout, select_last_attempts
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from megatron_sov.work.progress.locks import Claims, IdleTimeout

END = 5
ROLLOUT = RolloutConfig(rounds=3, prompts_per_round=4, samples_per_prompt=2, piece_prompts=2,
                        max_new_tokens=6, deadline_s=3.0)


class CountingEngine:
    """An engine that counts up from the prompt's last token, one token per second.

    A response ends after `get_answer_length` tokens. Log-probabilities are -1 - step of the engine's weights.
    """

    def __init__(self) -> None:
        self.now_s, self.step, self.streams = 0.0, 0, [0]

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None,
                 bounds: GenerationBounds | None = None) -> GenerationResult:
        assert stop is not None and streams is not None
        self.streams += streams
        limits = bounds.limits if bounds else [sampling.max_new_tokens] * len(prompts)
        continuations: list[list[int]] = [[] for _ in prompts]
        while active := [i for i, tokens in enumerate(continuations)
                         if len(tokens) < limits[i] and not (tokens and tokens[-1] == END)]:
            for i in active:
                text = [*prompts[i], *continuations[i]]
                is_complete = text[-1] % 10 == get_answer_length(text[0])
                continuations[i].append(END if is_complete else text[-1] + 1)
            self.now_s += 1
            if bounds and bounds.should_stop():
                break
        completions = [(tokens, [-1.0 - self.step] * len(tokens)) for tokens in continuations]
        return GenerationResult.of(completions, sampling, stop, self.step)

    def update(self, weights: Any, version: int) -> None:
        raise AssertionError("the job loads weights by `load_policy`")


def get_answer_length(first: int) -> int:
    """Return the number of tokens, without the end, that answer a prompt of the token `first`: 30 -> 3."""
    return first // 10 % 9


def build_expected_tokens(prompt: int) -> list[int]:
    tokens = [*range(prompt + 1, prompt + get_answer_length(prompt) + 1), END]
    return tokens[:ROLLOUT.max_new_tokens]


THINKS = 120
"""The prompt after which the template opens a thought."""


class NumberEncoder:
    """Stands for a tokenizer: the text of a prompt is its only token id."""

    end_ids = (END,)

    def encode_prompts(self, prompts: Sequence[Any]) -> list[list[int]]:
        return [[int(p.messages[-1].content)] for p in prompts]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def opened_thoughts(self, prompt: Sequence[int]) -> str:
        return "<think>" if prompt[0] == THINKS else ""


@pytest.fixture
def prompts(tmp_path: Path) -> PromptList:
    path = tmp_path / "prompts.jsonl"
    # Prompts 10 to 120: 3 rounds of 4.
    path.write_text("".join(json.dumps({"prompt": str(10 * k), "answer": k}) + "\n" for k in range(1, 13)))
    return read_prompts(path)


def build_policy(step: int) -> Policy:
    return Policy(Path(f"step-{step}"), step, f"{step:064x}")


class Job:
    """One generating job; `newest` returns the step of the newest policy at the moment of the call."""

    def __init__(self, store: Path, prompts: PromptList, newest: Callable[[], int],
                 rollout: RolloutConfig = ROLLOUT, further: Any = None, **queue: Any) -> None:
        self.engine, self.loaded_steps = CountingEngine(), [0]
        self.store = RolloutStore.create(store, "sha256:0", 1000)

        def find_policy(number: int) -> Policy | None:
            return build_policy(newest()) if newest() >= number - 1 else None

        self.pending = PendingPieces(
            store=self.store, claims=Claims(self.store.claims, 60), prompts=prompts, rollout=rollout,
            rounds=range(1, 4), find_policy=find_policy, further=further,
            sampling_digest=lambda number: compute_sampling_digest(rollout, number, {}))
        self.source = ResponseSource(NumberEncoder(), rollout,  # type: ignore[arg-type]
                                     "counting", False, {}, lambda: self.engine.now_s)
        self.queue = PieceQueue(pending=self.pending, store=self.store,
                                **{"wait_s": 0.0, "provenance": {}, **queue})

    def load_policy(self, new_policy: Policy) -> None:
        self.loaded_steps.append(new_policy.step)
        self.engine.step = new_policy.step

    def run(self) -> dict[str, Any]:
        return write_batches(self.engine, self.source, self.queue, loaded=build_policy(0),
                             load_policy=self.load_policy)


def read_all_rows(store: RolloutStore) -> list[Rollout]:
    return [row for part in store.parts() for row in store.read_rollouts(part.name)]


def check_complete(store: RolloutStore, prompts: PromptList, rounds: Sequence[int]) -> list[Rollout]:
    """Check that the last attempts at all pieces contain each response once and complete; return these rows.

    An attempt continues the unfinished responses of the attempt before it.
    """
    rows = read_all_rows(store)
    assert len({(row.key, row.attempt) for row in rows}) == len(rows)
    last_rows = select_last_attempts(rows)
    assert sorted((r.round, r.key.prompt, r.key.sample) for r in last_rows) == sorted(
        (number, p.id, sample) for number in rounds for p in select_round_prompts(prompts, ROLLOUT, number)
        for sample in range(2))
    for row in last_rows:
        prompt = int(row.prompt_tokens[0])
        assert row.tokens.tolist() == build_expected_tokens(prompt) and row.record["answer"] == prompt // 10
        assert row.finish_reason == (STOP if row.tokens[-1] == END else LENGTH)
        assert row.response == "<think>" * (prompt == THINKS) + " ".join(map(str, row.tokens))
    for row in rows:
        assert np.array_equal(row.logprobs, -1.0 - row.versions)
        assert row.key.policy == build_policy(int(row.versions[0])).sha256
        assert (np.diff(row.versions) >= 0).all()
        if row.attempt:
            (previous,) = [r for r in rows if (r.key, r.attempt) == (row.key, row.attempt - 1)]
            assert previous.finish_reason == UNFINISHED and len(previous.tokens) < len(row.tokens)
            num_previous = len(previous.tokens)
            assert row.tokens[:num_previous].tolist() == previous.tokens.tolist()
            assert row.versions[:num_previous].tolist() == previous.versions.tolist()
    return last_rows


def test_each_round_is_written_by_its_required_policy(tmp_path: Path, prompts: PromptList) -> None:
    newest = 0
    job = Job(tmp_path / "store", prompts, lambda: newest, replace(ROLLOUT, deadline_s=0.0))
    summary = job.run()
    assert (summary["parts"], summary["responses"]) == (2, 8)
    assert summary["waits_for"] == "round 2 waits for a policy that round 1 has trained"
    newest = 2
    resumed = Job(tmp_path / "store", prompts, lambda: newest, replace(ROLLOUT, deadline_s=0.0))
    assert resumed.run()["waits_for"] == "" and resumed.pending.is_complete
    rows = check_complete(job.store, prompts, (1, 2, 3))
    assert {(r.round, int(v)) for r in rows for v in set(r.versions)} == {(1, 0), (2, 2), (3, 2)}
    assert resumed.loaded_steps == [0, 2], "each policy is loaded once"
    streams = job.engine.streams[1:] + resumed.engine.streams[1:]
    assert len(set(streams)) == len(streams) == 24
    first_part, *_ = job.store.parts(2)
    assert first_part.provenance["step"] == 2 and first_part.num_rows == 4  # 2 prompts x 2 samples


def test_the_next_policy_continues_responses_after_a_deadline(tmp_path: Path, prompts: PromptList) -> None:
    num_parts = 0

    def newest() -> int:  # the trainer finishes a round with every two parts
        return min(num_parts // 2, 2)

    job = Job(tmp_path / "store", prompts, newest)
    publish = job.queue.publish

    def publish_and_count(attempts: Sequence[SampleAttempt], rows: Sequence[list[Rollout]]) -> None:
        nonlocal num_parts
        num_parts += len(attempts)
        publish(attempts, rows)

    job.queue.publish = publish_and_count  # type: ignore[method-assign]
    assert job.run()["unfinished"] > 0
    rows_by_response = check_complete(job.store, prompts, (1, 2, 3))
    assert any(len(set(r.versions)) > 1 for r in rows_by_response), "no response was written by two policies"
    assert {r.attempt for r in rows_by_response} == {0, 1}
    parts_in_order = sorted(job.store.parts(), key=lambda part: part.created_s)
    for later_part in (part for part in parts_in_order if part.attempt):
        key = (later_part.round, later_part.piece, later_part.attempt - 1)
        (unfinished_part,) = [part for part in parts_in_order
                              if (part.round, part.piece, part.attempt) == key]
        between = parts_in_order[parts_in_order.index(unfinished_part) + 1:parts_in_order.index(later_part)]
        assert all(part.attempt or part.provenance["step"] <= unfinished_part.provenance["step"]
                   for part in between), (
                       "a newer policy began fresh pieces before it continued those of an older policy")


def test_unread_tokens_get_routes_of_the_next_policy(prompts: PromptList) -> None:
    """Each route of the engine below consists of the step of its weights."""

    class Routed(CountingEngine):
        def generate(self, prompts: Sequence[Tokens], *args: Any, **kwargs: Any) -> GenerationResult:
            result = super().generate(prompts, *args, **kwargs)
            routes = [np.full((len(prompt) + len(tokens) - 1, 2, 2), self.step, np.uint8)
                      for prompt, tokens in zip(prompts, result.continuations, strict=True)]
            if self.step == 0:
                routes[0][1:] = 255  # not recorded: the sequence was still waiting for a decoding slot
            return replace(result, routes=routes)

    engine = Routed()
    writer = ResponseSource(NumberEncoder(), ROLLOUT, "counting", False, {},  # type: ignore[arg-type]
                            lambda: engine.now_s, with_routes=True)
    piece = PromptPiece(1, 0, prompts[5:6])
    [partial_rows] = writer.write(engine, [SampleAttempt(piece, 0, build_policy(0))])
    assert {row.finish_reason for row in partial_rows} == {UNFINISHED}
    engine.step = 1
    [[first, other]] = writer.write(engine, [SampleAttempt(piece, 1, build_policy(1), tuple(partial_rows))])
    routed_steps = [row.routes[:, 0, 0].tolist() for row in (first, other) if row.routes is not None]
    # In 3 s, the first attempt wrote 3 tokens of each response: it read the prompt and two of them. For the
    # first response, only the prompt's routes are recorded.
    assert routed_steps == [[0] + [1] * (len(first.tokens) - 1), [0] * 3 + [1] * (len(other.tokens) - 3)]


def test_further_prompts_are_generated_until_the_round_is_trained(tmp_path: Path,
                                                                  prompts: PromptList) -> None:
    rollout = replace(ROLLOUT, deadline_s=0.0)
    num_further, is_final = 0, False
    job = Job(tmp_path / "store", prompts, lambda: 0, rollout, lambda number: (num_further, is_final))

    def list_written_pieces() -> list[int]:
        return [part.piece for part in job.store.parts(1)]

    planned = [piece.number for piece in plan_round_pieces(prompts, rollout, 1)]
    assert job.run()["waits_for"] == "round 1 is generated, and may need further prompts until it is trained"
    assert list_written_pieces() == planned and all(part.provenance["grows"] for part in job.store.parts())
    num_further = 1
    assert "may need further prompts" in job.run()["waits_for"]
    assert list_written_pieces() == [*planned, len(planned)]
    prompt_ids = {prompt.id for piece in plan_round_pieces(prompts, rollout, 1, 1)
                  for prompt in piece.prompts}
    assert {row.key.prompt for row in read_all_rows(job.store)} == prompt_ids
    is_final = True
    assert "round 2 waits for a policy" in job.run()["waits_for"]
    # A new job reads the further prompts of the round from the store.
    later_job = Job(tmp_path / "store", prompts, lambda: 0, rollout, lambda number: (num_further, is_final))
    assert later_job.run()["parts"] == 0 and "round 2 waits" in later_job.queue.summary["waits_for"]


class HangingEngine(CountingEngine):
    """Generates no token for one prompt; records the prompts and the seconds of each call in `passes`."""

    def __init__(self, silent_prompt: int) -> None:
        super().__init__()
        self.silent_prompt, self.passes = silent_prompt, []
        self.on_wait: Callable[[], object] = lambda: None

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None,
                 bounds: GenerationBounds | None = None) -> GenerationResult:
        assert stop is not None and streams is not None and bounds is not None
        answering = [i for i, text in enumerate(prompts) if text[0] != self.silent_prompt]
        began_s, should_stop = self.now_s, bounds.should_stop
        result = super().generate(
            [prompts[i] for i in answering], sampling, stop=stop, streams=[streams[i] for i in answering],
            bounds=GenerationBounds([bounds.limits[i] for i in answering], should_stop))
        completions: list[tuple[list[int], list[float]]] = [([], [])] * len(prompts)
        for i, tokens, logprobs in zip(answering, result.continuations, result.logprobs, strict=True):
            completions[i] = (tokens, logprobs)
        while len(answering) < len(prompts) and not should_stop():
            self.now_s += 1
            self.on_wait()
        self.passes.append((sorted({text[0] for text in prompts}), self.now_s - began_s))
        return GenerationResult.of(completions, sampling, stop, self.step)


def test_stuck_pieces_come_last_once_per_policy(tmp_path: Path, prompts: PromptList) -> None:
    newest = 0
    rollout = replace(ROLLOUT, deadline_s=20.0)
    job = Job(tmp_path / "store", prompts, lambda: newest, rollout, clock_s=lambda: job.engine.now_s)
    (first, *_) = select_round_prompts(prompts, rollout, 1)
    job.engine = engine = HangingEngine(int(first.record["prompt"]))
    assert job.run()["waits_for"] == ("round 1 waits for responses that got no token in a whole attempt")
    assert [(engine.silent_prompt in texts, length_s) for texts, length_s in engine.passes] == [
        (True, 20.0), (False, engine.passes[1][1]), (True, 20.0)], (
            "first with another prompt, then alone after the fresh piece, then never again by this policy")
    engine.passes.clear()
    for step in (1, 2):
        newest = step
        job.run()
    assert [engine.silent_prompt in texts for texts, _ in engine.passes] == [False, False, True] * 2, (
        "the fresh pieces come first")
    assert engine.passes[2] == engine.passes[5] == ([engine.silent_prompt], 20.0)
    assert {row.round for row in read_all_rows(job.store)} == {1, 2, 3}


def test_continuations_by_the_same_policy_yield_to_a_newer_policy(tmp_path: Path,
                                                                  prompts: PromptList) -> None:
    newest = 0
    job = Job(tmp_path / "store", prompts, lambda: newest, replace(ROLLOUT, deadline_s=20.0),
              clock_s=lambda: job.engine.now_s)
    (first, *_) = select_round_prompts(prompts, ROLLOUT, 1)
    job.engine = engine = HangingEngine(int(first.record["prompt"]))

    def train_a_policy() -> None:
        nonlocal newest
        if len(engine.passes) == 2 and engine.now_s > 30:
            newest = 1

    engine.on_wait = train_a_policy
    job.run()
    # The third pass starts after 20 s and more, and ends soon after 30 s instead of after its own 20 s.
    assert engine.passes[2][0] == [engine.silent_prompt] and engine.passes[2][1] < 12.0
    assert {row.round for row in read_all_rows(job.store)} == {1, 2}


def test_continuations_of_several_pieces_are_generated_together(tmp_path: Path, prompts: PromptList) -> None:
    newest = 0
    job = Job(tmp_path / "store", prompts, lambda: newest, clock_s=lambda: job.engine.now_s)
    batches: list[list[str]] = []
    publish = job.queue.publish

    def publish_and_record(attempts: Sequence[SampleAttempt], rows: Sequence[list[Rollout]]) -> None:
        nonlocal newest
        batches.append([attempt.name for attempt in attempts])
        publish(attempts, rows)
        newest = max(newest, int(len(batches) >= 2))

    job.queue.publish = publish_and_record  # type: ignore[method-assign]
    job.run()
    assert batches[:2] == [["round-0001-piece-0000"], ["round-0001-piece-0001"]]
    assert batches[2] == ["round-0001-piece-0000-attempt-1", "round-0001-piece-0001-attempt-1"]
    assert all(len(names) == 1 or all("attempt" in name for name in names) for names in batches)
    for row in read_all_rows(job.store):
        assert row.tokens.tolist() == build_expected_tokens(int(row.prompt_tokens[0]))[:len(row.tokens)]


def test_published_attempts_are_released(tmp_path: Path, prompts: PromptList) -> None:
    job = Job(tmp_path / "store", prompts, lambda: 0)
    [attempt] = job.pending.claim_attempts()
    other_job = Claims(job.store.claims, 60)
    assert other_job.take(attempt.name) is None
    job.queue.publish([attempt], job.source.write(job.engine, [attempt]))
    assert other_job.take(attempt.name) is not None


def test_two_jobs_share_pieces_and_the_first_responses_of_a_piece_stay(
        tmp_path: Path, prompts: PromptList, capsys: pytest.CaptureFixture[str]) -> None:
    pauses_s: list[float] = []

    def pause(pause_s: float) -> None:
        pauses_s.append(pause_s)
        for claim in (tmp_path / "store/claims").glob("*/1.json"):  # a heartbeat of the other job
            claim.write_text(json.dumps({"beat": len(pauses_s)}))

    first, second = (Job(tmp_path / "store", prompts, lambda: 2, wait_s=7.0, patience=IdleTimeout(pause))
                     for _ in range(2))
    [attempt] = first.pending.claim_attempts()
    assert attempt.name == "round-0001-piece-0000"
    assert second.run()["waits_for"] == "round 1 waits for pieces that other jobs have claimed"
    assert pauses_s == [5.0, 2.0], "the second job waits wait_s seconds"
    second.queue.asked_to_stop = lambda: True
    assert second.run() is second.queue.summary and len(pauses_s) == 2
    # Another job, whose claim had expired, has written the same piece with another policy.
    source = ResponseSource(NumberEncoder(), ROLLOUT, "other", False, {})  # type: ignore[arg-type]
    engine = CountingEngine()
    engine.step = 1
    [rows] = source.write(engine, [replace(attempt, policy=build_policy(1))])
    first.store.add_rollouts(attempt.name, rows, {})
    first.queue.publish([attempt], first.source.write(first.engine, [attempt]))
    assert "stay" in capsys.readouterr().err and first.queue.summary["parts"] == 0
    first.run()
    check_complete(first.store, prompts, (1, 2, 3))


def test_a_store_of_other_settings_or_prompts_is_refused(tmp_path: Path, prompts: PromptList) -> None:
    Job(tmp_path / "store", prompts, lambda: 0).run()
    with pytest.raises(UserError, match="responses of other settings"):
        Job(tmp_path / "store", prompts, lambda: 0, replace(ROLLOUT, temperature=0.5)).run()
    with pytest.raises(UserError, match="another file of prompts"):
        Job(tmp_path / "store", prompts[:6], lambda: 0).run()
    assert compute_sampling_digest(ROLLOUT, 1, {}) == "fb64c6f6e61d1947", "old stores stay valid"


def test_an_empty_prompt_is_named(tmp_path: Path, prompts: PromptList) -> None:
    job = Job(tmp_path / "store", prompts, lambda: 0)
    job.source.encoder.encode_prompts = lambda passes: [[]] * len(passes)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"--prompts: line \d+"):
        job.run()
    assert job.pending.claim_attempts(), "the claim was not released"
