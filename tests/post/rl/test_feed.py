"""Rollout rounds for the training loop: waiting for a round, and its columns of log-probabilities."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import write_sealed
from megatron_sov.model.config import PolicyConfig, RolloutConfig
from megatron_sov.post.rl import logprob_columns, round_loader, run
from megatron_sov.post.rl.logprob_columns import LogprobColumns
from megatron_sov.post.rl.publish.metrics import find_round_problem
from megatron_sov.post.rl.round_loader import RoundLoader
from megatron_sov.post.rl.run import RolloutCycle
from megatron_sov.post.rl.teachers import ScoringTeacher
from megatron_sov.runs.rounds import Policy, RunPolicies
from megatron_sov.train.data.ledger import Ledger, LedgerEntry
from megatron_sov.train.data.rounds import PublishedRound, RoundDocuments

ENTRY = LedgerEntry(0, "round-0001", 16, 4, {"rollouts": 1.0})
STEPS_OF_ROUND = {1: (range(2), range(2, 2)), 2: (range(0), range(3)), 3: (range(1), range(1, 3))}
"""Round -> documents of each of its two steps; a step may have no document."""


class FakeDocuments:
    """Documents of 4 tokens, the last two of which are learned."""

    columns = ("behaviour_logprobs", "advantage")

    def __init__(self, number: int) -> None:
        self.lengths = [4] * STEPS_OF_ROUND[number][1].stop

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        return np.array([0, 0, 1, 1], np.float32)[start:start + count]


@pytest.fixture
def trainer_double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Double of a trainer before its first step, in one process. All its log-probabilities are -step, or
    -(step + 100) with the weights of another checkpoint."""
    monkeypatch.setattr(run, "POLL_S", (0.01, 0.01))
    monkeypatch.setattr(run, "sum_dict", lambda values, over: values)
    for module in (logprob_columns, round_loader):
        monkeypatch.setattr(module, "run_on_main", lambda world, action: action())
        monkeypatch.setattr(module, "hash_checkpoint_files", lambda path: path.name)

    def write_logprobs(model: Any, documents: Any, file: Path, identity: str, *, num_skipped: int,
                       routes: Any, **settings: Any) -> None:
        assert routes == ("replayed" if "old" in file.name else None)
        numbers = np.full(4 * len(documents.lengths), -model.step, np.float32)
        numbers[:4 * num_skipped] = np.nan
        write_sealed(file, numbers.tobytes(), identity)

    def run_with_weights(start: Path, trainer_double: Any, compute: Any) -> None:
        trainer_double.step += 100
        compute()
        trainer_double.step -= 100

    monkeypatch.setattr(logprob_columns, "write_logprobs", write_logprobs)
    monkeypatch.setattr(logprob_columns, "run_with_weights", run_with_weights)
    manifest = SimpleNamespace(content={"groups": {"learns": 1}})
    monkeypatch.setattr(round_loader, "read_manifest", lambda path: manifest)
    events: list[tuple[str, dict[str, Any]]] = []
    return SimpleNamespace(
        step=0, world=SimpleNamespace(is_main=True), events_written=events,
        events=SimpleNamespace(write=lambda name, **fields: events.append((name, fields))),
        batches=SimpleNamespace(ledger=Ledger([ENTRY])),
        checkpointer=SimpleNamespace(finish=lambda: events.append(("saved", {}))),
        config=SimpleNamespace(policy=PolicyConfig(), objective=SimpleNamespace(name="policy"),
                               model=recipes.get("tiny-qwen3").model,
                               data=SimpleNamespace(phases=[SimpleNamespace(seq_len=16)]),
                               train=SimpleNamespace(micro_batch_size=1)))


def build_cycle(folder: Path, monkeypatch: pytest.MonkeyPatch, find_missing: Any, names: tuple[str, ...] = (),
                wait_s: float = 0.0, reference: str = "") -> Any:
    """Build the cycle of a run that trains on the rounds `STEPS_OF_ROUND`.

    Args:
        folder: of the rounds.
        monkeypatch: replaces reading of rounds.
        find_missing: round -> what it still lacks; "": it is published.
        names: columns of log-probabilities.
        wait_s: seconds to wait for a round.
        reference: sha256 of the reference checkpoint.
    """
    rounds = RoundDocuments(folder, 10, names)

    def read(number: int, seq_len: int, num_steps: int) -> PublishedRound:
        documents: Any = FakeDocuments(number)
        return PublishedRound(folder / f"{number:04d}", documents, STEPS_OF_ROUND[number], {},
                              np.arange(len(documents.lengths) + 1) * 4)

    monkeypatch.setattr(rounds, "read", read)
    monkeypatch.setattr(rounds, "verify", lambda number, rank, size: None)

    routes: Any = "replayed"
    columns = LogprobColumns(names, 1.0, routes, folder, reference)
    rollout = RolloutConfig(steps_per_round=2, prompts_per_round=2)
    policies = RunPolicies(folder, Policy(folder / "start", 0, "start"), rollout, {})
    policies.restore({"trained": "earlier rounds", "recent": []})
    publisher: Any = SimpleNamespace(publish=find_missing)
    return RolloutCycle(
        rollout=rollout, policies=policies, rollouts=None, publisher=publisher, wait_s=wait_s,
        loader=RoundLoader(documents=rounds, rollout=rollout, columns=columns))


def test_waiting_for_a_round_saves_a_checkpoint_first(trainer_double: Any, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    missing = iter(["one piece"] * 3 + [""])
    cycle = build_cycle(tmp_path, monkeypatch, lambda number: next(missing), wait_s=60)
    assert cycle.prepare_data(trainer_double, lambda: False) is None
    assert [name for name, _ in trainer_double.events_written] == ["saved", "waiting", "warning", "round"]
    assert capsys.readouterr().err.startswith("waits up to 60 s for round 1: one piece\n")
    assert cycle.prepare_data(trainer_double, lambda: False) is None  # the round is open already

    trainer_double.step = 2
    without_waiting = build_cycle(tmp_path, monkeypatch, lambda number: "one piece")
    assert without_waiting.prepare_data(trainer_double,
                                        lambda: False) == "round 2 is not there yet: one piece"
    assert "warning: round 2 is not there yet: one piece" in capsys.readouterr().err
    timed_out = build_cycle(tmp_path, monkeypatch, lambda number: "one part is not judged", wait_s=0.02)
    assert timed_out.prepare_data(trainer_double, lambda: False) == (
        "round 2 is not there yet: one part is not judged; the run waited 0.02 s: check that "
        "`rl generate` and `rl reward` are running, and give the same command with --resume")
    stopped = build_cycle(tmp_path, monkeypatch, lambda number: "one piece", wait_s=60)
    assert stopped.prepare_data(trainer_double,
                                lambda: True) == "asked to stop while waiting for round 2: one piece"


def test_requested_further_prompts_are_generated(trainer_double: Any, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    missing = iter(["2 pieces", "3 further prompts", "1 further prompt", ""])
    generated_rounds: list[int] = []

    def write_round(trainer_double: Any, number: int, policy: Policy, is_stopping: Any) -> dict[str, float]:
        assert policy == cycle.policies.at(trainer_double.step)
        generated_rounds.append(number)
        return {"write_s": 2.0}

    def judge_round(trainer_double: Any, number: int, is_stopping: Any) -> dict[str, float]:
        return {"judge_s": 0.5}

    cycle = build_cycle(tmp_path, monkeypatch, lambda number: next(missing))
    cycle.rollouts = SimpleNamespace(write=write_round, judge=judge_round,
                                     close=lambda: generated_rounds.append(0))
    assert cycle.prepare_data(trainer_double, lambda: False) is None and generated_rounds == [1, 1, 1]
    ((_, round_event),) = [event for event in trainer_double.events_written if event[0] == "round"]
    assert "saved" not in dict(trainer_double.events_written), "a checkpoint was awaited"
    assert (round_event["write_s"], round_event["judge_s"]) == (6.0, 1.5) and round_event["waited_s"] < 60
    trainer_double.step = 2
    cycle.publisher.publish = lambda number: "2 pieces"  # a stopped job has written nothing
    assert cycle.prepare_data(trainer_double,
                              lambda: True) == "asked to stop while waiting for round 2: 2 pieces"
    cycle.close()
    assert generated_rounds == [1, 1, 1, 2, 0]


DENSE, MOE = "tiny-qwen3", "tiny-solar-open"


@pytest.mark.parametrize(("policy", "model", "computed"), [
    (PolicyConfig("grpo"), {}, [2]), (PolicyConfig("dr_grpo"), {}, [2]),
    (PolicyConfig("mgpo", mgpo_lambda=1.0), {}, [2]), (PolicyConfig("dapo"), {}, [2]),
    (PolicyConfig("grpo", kl="k3", kl_coeff=0.0), {}, [2]),
    (PolicyConfig("grpo", kl="k3", kl_coeff=0.1), {}, [1, 2]),
    (PolicyConfig("opd"), {}, [1, 2]), (PolicyConfig("grpo", opd_coeff=0.5), {}, [1, 2]),
    (PolicyConfig("gkd"), {}, [1, 2]), (PolicyConfig("preference"), {}, [1, 2]),
    # Text is drawn for all steps: the third step has a loss, although it has no rollout.
    (PolicyConfig("ink_grpo", knowledge_share=1.0), {}, [1, 2, 3]),
    (PolicyConfig("ink_grpo", knowledge_share=1e-9), {}, [2]),
    (PolicyConfig("grpo"), {"recipe": MOE}, [1, 2]),
    (PolicyConfig("grpo"), {"recipe": MOE, "seq_aux_loss_coeff": 0.0}, [1, 2]),  # updates the router's bias
    (PolicyConfig("grpo"), {"recipe": MOE, "seq_aux_loss_coeff": 0.0, "router_bias_update_rate": 0.0}, [2]),
    (PolicyConfig("grpo"), {"num_mtp_layers": 1}, [1, 2]),
    (PolicyConfig("grpo"), {"num_mtp_layers": 1, "mtp_loss_coeff": 0.0}, [2]),
    (PolicyConfig("grpo"), {"objective": "mine"}, [1, 2])])
def test_a_step_without_gradients_is_skipped(policy: PolicyConfig, model: dict[str, Any], computed: list[int],
                                             trainer_double: Any, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """All advantages of step 1 are 0, one of step 2 is not, and step 3 has no document."""
    monkeypatch.setitem(STEPS_OF_ROUND, 1, (range(2), range(2, 4), range(4, 4)))
    monkeypatch.setattr(FakeDocuments, "column", lambda self, name, document, start, count: np.full(
        count, 0.5 * (document == 3), np.float32))
    trainer_double.config.policy, changes = policy, dict(model)
    trainer_double.config.objective.name = changes.pop("objective", "policy")
    trainer_double.config.model = replace(recipes.get(changes.pop("recipe", DENSE)).model, **changes)
    cycle = build_cycle(tmp_path, monkeypatch, lambda number: "")
    cycle.rollout = replace(cycle.rollout, steps_per_round=3)
    assert cycle.prepare_data(trainer_double, lambda: False) is None
    assert [step + 1 for step in range(3)
            if not trainer_double.batches.ledger.get_entry(step).skip] == computed


RATES = [
    # learning groups, all groups, pass rate, is the first round, pattern of the warning
    (8, 8, 0.4, True, ""), (8, 8, 0.4, False, ""), (8, 8, 0.0, True, ""),  # rewards below right_from
    (1, 8, 1 / 64, True, "1 of 8 groups learn .* only 1.6% .* easier prompts .*difficulty.* sft"),
    (1, 8, 1 / 64, False, ""), (0, 8, 0.0, False, "0 of 8 groups learn .* only 0.0% "),
    (0, 8, 1.0, True, "0 of 8 groups learn .* 100.0% .* right already: take harder prompts"),
    (0, 8, 1.0, False, "right already"), (3, 8, 0.97, True, "97.0% .* harder"), (3, 8, 0.97, False, ""),
    (4, 8, 0.03, True, ""), (0, 8, 0.5, True, "50.0% .* solved always or never; take prompts in between"),
    (1, 20, 0.3, False, "30.0% .* always or never"), (2, 20, 0.3, False, ""),
    (0, 8, None, False, "0 of 8 groups learn .* equal worth"), (8, 8, None, True, "")]


@pytest.mark.each(("num_learning", "num_groups", "pass_rate", "is_first", "pattern"), RATES)
def test_a_round_with_few_learning_groups_warns_with_a_remedy(num_learning: int, num_groups: int,
                                                              pass_rate: float | None,
                                                              is_first: bool, pattern: str) -> None:
    groups = {"learns": num_learning, "no_advantage": num_groups - num_learning}
    means = {} if pass_rate is None else {"pass_rate": pass_rate}
    result = find_round_problem({"groups": groups, "means": means}, is_first=is_first)
    if pattern:
        assert re.search(pattern, result)
    else:
        assert result == ""


def test_the_initial_pass_rate_is_printed_once(trainer_double: Any, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch,
                                               capsys: Any) -> None:
    content = {"groups": {"learns": 1, "no_advantage": 7},
               "means": {"responses": 64, "reward": 0.1, "pass_rate": 1 / 64}}
    monkeypatch.setattr(round_loader, "read_manifest", lambda path: SimpleNamespace(content=content))
    cycle = build_cycle(tmp_path, monkeypatch, lambda number: "")
    assert cycle.prepare_data(trainer_double, lambda: False) is None
    errors = capsys.readouterr().err
    assert ("before the first step: 1.6% of 64 responses have a reward of at least policy.right_from = 1\n"
            ) in errors
    assert "warning: round 1: 1 of 8 groups learn (1 learns, 7 no advantage), and" in errors
    assert cycle.meters["groups_learning"] == 1 / 8
    content["groups"] = {"learns": 0, "no_advantage": 8}
    for trainer_double.step in (2, 4):
        assert cycle.prepare_data(trainer_double, lambda: False) is None
    errors = capsys.readouterr().err
    assert "before the first step" not in errors and "round 3" not in errors, "a warning is repeated"


def test_old_logprobs_belong_to_the_start_of_the_round(trainer_double: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def open_rounds(step: int) -> RoundDocuments:
        trainer_double.step = step
        cycle = build_cycle(tmp_path, monkeypatch, lambda number: "", ("old_logprobs", "reference_logprobs"))
        assert cycle.prepare_data(trainer_double, lambda: False) is None
        return cycle.loader.documents

    document = (3 << 32) + 1
    for step, expected in ((4, -4.0), (5, -4.0)):  # step 5 is inside the round and reads the file
        rounds = open_rounds(step)
        assert rounds.column("old_logprobs", document, 1, 3).tolist() == [expected] * 3
        assert rounds.column("reference_logprobs", document, 1, 3).tolist() == [-104.0] * 3
    old_file, reference_file = (tmp_path / f"0003.{name}_logprobs.f32" for name in ("old", "reference"))
    content = reference_file.read_bytes()
    reference_file.write_bytes(bytes([content[0] ^ 1, *content[1:]]))
    rounds = open_rounds(5)  # recomputed with the initial weights, loaded temporarily
    assert rounds.column("reference_logprobs", document, 1, 3).tolist() == [-105.0] * 3
    errors = capsys.readouterr().err
    assert "0003.reference_logprobs.f32: is damaged or belongs elsewhere (it" in errors
    write_sealed(old_file, bytes(48), "0003 old_logprobs of an earlier run")
    with pytest.raises(UserError, match=r"0003.old_logprobs.f32: is damaged"):
        open_rounds(5)
    old_file.write_bytes(bytes([1, *old_file.read_bytes()[1:]]))
    with pytest.raises(UserError, match=r"0003.old_logprobs.f32: is damaged"):
        open_rounds(5)
    old_file.unlink()
    with pytest.raises(UserError, match=r"0003.old_logprobs.f32: cannot be read"):
        open_rounds(5)


def test_labels_of_the_first_step_have_no_old_logprobs(trainer_double: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = build_cycle(tmp_path, monkeypatch, lambda number: "", ("old_logprobs",))
    for trainer_double.step in (0, 2, 4, 5):
        assert cycle.prepare_data(trainer_double, lambda: False) is None
    # The first step of round 2 has no gradient: its second step needs no stored log-probabilities either.
    assert not any((tmp_path / f"000{n}.old_logprobs.f32").exists() for n in (1, 2))
    column = cycle.loader.documents.column
    first, second = (column("old_logprobs", (3 << 32) + d, 1, 2).tolist() for d in (0, 1))
    assert np.isnan(first).all() and second == [-4.0, -4.0]


def test_a_resumed_run_keeps_its_reference(trainer_double: Any, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def open_with_reference(reference: str) -> None:
        cycle = build_cycle(tmp_path, monkeypatch, lambda number: "", ("reference_logprobs",),
                            reference=reference)
        assert cycle.prepare_data(trainer_double, lambda: False) is None

    for _ in range(2):
        open_with_reference("a" * 64)
    with pytest.raises(UserError, match=r"reference.json: .* sha256 a{12}"):
        open_with_reference("b" * 64)


def test_a_resumed_run_keeps_its_teachers(trainer_double: Any, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def write_teachers(trainer_double: Any, teachers: Any, published: PublishedRound, file: Path,
                       identity: str) -> None:
        write_sealed(file, np.full(8, -float(len(teachers)), np.float32).tobytes(), identity)

    monkeypatch.setattr(logprob_columns, "write_teachers", write_teachers)
    monkeypatch.setattr(round_loader, "compute_reverse_kl",
                        lambda published, column: {"reverse_kl": -float(column.mean())})

    def prepare_round(*teachers: ScoringTeacher) -> None:
        cycle = build_cycle(tmp_path, monkeypatch, lambda number: "", ("teacher_logprobs",))
        cycle.loader.columns = replace(cycle.loader.columns, teachers=teachers)
        assert cycle.prepare_data(trainer_double, lambda: False) is None
        assert cycle.loader.documents.column("teacher_logprobs", 1 << 32, 1, 3).tolist() == [-2.0] * 3

    math_teacher = ScoringTeacher("math", tmp_path, "a" * 64)
    served_teacher = ScoringTeacher("", urls=("http://a",))
    prepare_round(math_teacher, served_teacher)
    assert [fields["reverse_kl"] for name, fields in trainer_double.events_written if name == "round"] == [2]
    prepare_round(math_teacher, replace(served_teacher, urls=("http://b",)))  # servers may move
    with pytest.raises(UserError, match=r"teachers.json: earlier rounds"):
        prepare_round(replace(math_teacher, sha256="b" * 64), served_teacher)
