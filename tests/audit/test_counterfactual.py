"""A run without documents: what it repeats, that it is a run that never read them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.audit.counterfactual import find_first_use, plan_repetition
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.model.config import apply_settings
from megatron_sov.model.config.data import documents_named
from megatron_sov.train.data.left_out import left_out
from megatron_sov.train.data.order import SampleOrder
from megatron_sov.train.data.views import with_views
from tests.audit.test_audit import SMALL

EVALUATED = (*SMALL, "data.heldout_tokens=256", "train.deterministic=true")


@pytest.fixture(scope="module")
def train(packed_data: Any, run_command: Callable[..., Any]) -> Callable[..., Path]:
    """Return `train(run, *settings)`: a run of six steps on two sources."""
    def train(run: Path, *settings: str, inject: str = "") -> Path:
        done = run_command("pretrain", "tiny-qwen3", "--data", str(packed_data.text), "--run", str(run),
                           *(["--inject", inject] if inject else []),
                           *(word for setting in (*EVALUATED, *settings) for word in ("--set", setting)))
        assert done.returncode == 0, done.stderr
        return run

    return train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Path]) -> Path:
    return train(tmp_path_factory.mktemp("counterfactual") / "run")


def weights_and_moments(checkpoint: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's tensors."""
    return {name: record.digest for name, record in read_manifest(checkpoint).files.items()
            if name.endswith(".safetensors")}


def documents_read(run: Path, without: tuple[str, ...] = ()) -> dict[int, set[tuple[str, int]]]:
    """Return what each step reads, by walking through its batches."""
    plan = plan_repetition(run, without, run / "none", None, 1)
    sources = plan.sources()
    order = SampleOrder(plan.config, sources)
    return {step: {(sources[sample.source].name, segment.document) for sample in order.next_batch()[1]
                   for segment in sample.segments} for step in range(1, 7)}


def test_what_never_read_a_document_is_what_is_left_when_it_is_taken_out(
        trained: Path, train: Callable[..., Path], tmp_path: Path, as_child: None,
        capsys: pytest.CaptureFixture[str]) -> None:
    read = documents_read(trained)
    # first read behind the checkpoint of step 2, so that half of the run is repeated
    source, document = min(read[4] - read[1] - read[2] - read[3])
    named = f"{source}:{document}"
    words = ["counterfactual", str(trained), "--without", named, "--output", str(tmp_path / "out")]

    assert cli.main([*words, "--control"]) == ExitCode.OK
    assert "steps 3 to 6 were repeated, " in (said := capsys.readouterr().out)
    assert "with nothing left out every bit is the run's" in said
    found = json.loads((tmp_path / "out/removal.json").read_text())
    assert (found["documents"], found["begin"], found["end"], found["control"]) == (1, 2, 6, "equal")
    assert found["first_use"]["step"] == 4 and 0 < found["distance"] < 1
    never = train(tmp_path / "never", f'data.without=["{named}"]')
    removed = weights_and_moments(Path(found["checkpoint"]))
    assert weights_and_moments(never / "checkpoints/step-6") == removed
    assert weights_and_moments(trained / "checkpoints/step-6") != removed
    assert named in (tmp_path / "out/removal.html").read_text()

    # what is done is not done again, and is not taken for something else
    shutil.rmtree(tmp_path / "out/removed/run/checkpoints/step-2")
    assert cli.main(words) == ExitCode.OK
    assert not (tmp_path / "out/removed/run/checkpoints/step-2").exists()
    capsys.readouterr()
    assert cli.main([*words[:3], source, *words[4:]]) == ExitCode.USER_ERROR
    assert "without other documents; name another --output" in capsys.readouterr().err


def test_what_a_guard_refused_was_read(trained: Path, train: Callable[..., Path], tmp_path: Path) -> None:
    run = train(tmp_path / "refused", "train.keep_checkpoints=1", inject="nan@step=5")
    read = documents_read(trained)
    source, document = min(read[5] - set().union(*(read[step] for step in (1, 2, 3, 4, 6))))
    plan = plan_repetition(run, (), run / "none", None, 1)
    assert find_first_use(plan.config, plan.sources(), plan.newest, [f"{source}:{document}"]).step == 5


def test_runs_that_did_not_follow_their_settings_are_refused(trained: Path, tmp_path: Path, as_child: None,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    source, document = min(documents_read(trained)[1])

    def refused(run: Path, problem: str, *more: str) -> None:
        assert cli.main(["counterfactual", str(run), "--without", f"{source}:{document}", "--output",
                         str(tmp_path / "out"), *more]) == ExitCode.USER_ERROR
        assert problem in capsys.readouterr().err

    refused(trained, "began from its seed; leave --from out", "--from", str(trained))
    mine = tmp_path / "out/removed/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    refused(trained, "holds something else than a repetition; name another --output")
    assert mine.read_text() == "years of work"
    shutil.copytree(trained, other := tmp_path / "other")
    state = other / "checkpoints/step-6/state.json"
    sound = json.loads(state.read_text())
    for change, problem in (
            (lambda order: order["history"][0].update(global_batch_size=7), "was resumed with other data"),
            (lambda order: order.update(history=[]), "is damaged"),
            (lambda order: order["history"][0].update(weights=3), "is damaged")):
        broken = json.loads(json.dumps(sound))
        change(broken["order"])
        state.write_text(json.dumps(broken))
        refused(other, problem)
    state.write_text(json.dumps({**sound, "data": dict.fromkeys(sound["data"], "0" * 64)}))
    refused(other, "was packed anew")


def test_documents_of_views_are_not_told_apart(trained: Path) -> None:
    plan = plan_repetition(trained, (), trained / "none", None, 1)
    phases = '[{"name": "main", "seq_len": 32, "blend": {"even/16": 1, "odd": 1}}]'
    config = apply_settings(plan.config, [f"data.phases={phases}"])
    with pytest.raises(UserError, match="the blend has even/16, a view of even"):
        left_out(["even"], with_views(config, plan.sources()))


def test_first_use_is_where_a_walk_through_all_batches_meets_a_document(trained: Path) -> None:
    read = documents_read(trained)
    plan = plan_repetition(trained, (), trained / "none", None, 1)
    for source, document in sorted(set().union(*read.values()))[::3]:
        steps = [step for step, documents in read.items() if (source, document) in documents]
        found = find_first_use(plan.config, plan.sources(), plan.newest, [f"{source}:{document}"])
        assert (found.step, found.steps) == (steps[0], len(steps))
    names = sorted({source for documents in read.values() for source, _ in documents})
    everything = find_first_use(plan.config, plan.sources(), plan.newest, names)
    assert everything.emptied == (1, 2, 3, 4, 5, 6)
    unread = next(i for i in range(10_000) if (names[0], i) not in set().union(*read.values()))
    assert find_first_use(plan.config, plan.sources(), plan.newest, [f"{names[0]}:{unread}"]).step == 0


def test_nothing_else_moves_in_the_order(trained: Path) -> None:
    plan = plan_repetition(trained, (), trained / "none", None, 1)
    sources = plan.sources()
    named = f"{sources[0].name}:3-40"
    removed = left_out([named], sources)[sources[0].name]
    whole, without = (SampleOrder(config, sources) for config in (
        plan.config, apply_settings(plan.config, [f'data.without=["{named}"]'])))
    taken = 0
    for _ in range(6):
        (_, ours), (_, theirs) = whole.next_batch(), without.next_batch()
        for one, other in zip(ours, theirs, strict=True):
            kept = tuple(s for s in one.segments if one.source != 0 or not 3 <= s.document <= 40)
            taken += len(one.segments) - len(kept)
            assert (one.source, kept) == (other.source, other.segments)
    assert taken > 0 and without.state.cursors == whole.state.cursors
    assert removed.counts(sources[0])[0] == 38


@pytest.mark.parametrize(("without", "problem"), [
    ("nobody", "there is no source 'nobody'; the run reads "),
    ("even:5-3", "must be SOURCE, SOURCE:DOCUMENT"),
    ("even:1-99999999", "training documents, numbered from 0"), ("a b", "must be SOURCE, SOURCE:DOCUMENT")])
def test_documents_that_are_not_there_are_refused(
        trained: Path, tmp_path: Path, without: str, problem: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["counterfactual", str(trained), "--without", without,
                     "--output", str(tmp_path / "out")]) == ExitCode.USER_ERROR
    assert problem in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_key_that_cannot_sign_is_refused_before_anything_is_repeated(
        trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.key").write_text("nothing\n")
    assert cli.main(["counterfactual", str(trained), "--without", "even", "--output", str(tmp_path / "out"),
                     "--key", str(tmp_path / "no.key")]) == ExitCode.USER_ERROR
    assert "no.key: cannot sign" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_documents_are_named() -> None:
    assert documents_named("news") == ("news", 0, None)
    assert documents_named("news.2:7") == ("news.2", 7, 7)
    assert documents_named("ko-web:0-9") == ("ko-web", 0, 9)
    with pytest.raises(UserError, match="must be SOURCE"):
        documents_named("news:-1")


@pytest.fixture(scope="module")
def preferred(trained: Path, packed_data: Any, run_command: Callable[..., Any]) -> Callable[..., Path]:
    """Return `prefer(name, *settings)`: a run of eight steps on pairs that it goes through twice, a third of
    which are longer than a row and dropped; it compares with another model than it begins from."""
    folder = trained.parent
    (folder / "pairs.jsonl").write_text("".join(json.dumps({
        "prompt": f"{i}?", "chosen": f"{i}." * (60 if i % 3 == 1 else 1), "rejected": "No."}) + "\n"
        for i in range(12)))
    done = run_command("pack", "--tokenizer", str(packed_data.tokenizer), "--format", "preference",
                       "--heldout", "0", "--workers", "1", "--input", str(folder / "pairs.jsonl"), "--output",
                       str(folder / "pairs"), program="sov-data")
    assert done.returncode == 0, done.stderr

    def prefer(name: str, *settings: str) -> Path:
        told = (*SMALL[:-1], 'data.phases=[{"name": "main", "seq_len": 64}]', "data.over_long=drop",
                "train.deterministic=true", "optim.lr=1e-3", "train.steps=8", *settings)
        done = run_command("prefer", "tiny-qwen3", "--from", str(trained), "--data", str(folder / "pairs"),
                           "--run", str(folder / name), "--reference", str(trained / "checkpoints/step-2"),
                           *(word for setting in told for word in ("--set", setting)))
        assert done.returncode == 0, done.stderr
        return folder / name

    return prefer


def test_pairs_that_are_read_in_several_epochs_are_taken_out_of_all(
        trained: Path, preferred: Callable[..., Path], tmp_path: Path, as_child: None,
        capsys: pytest.CaptureFixture[str]) -> None:
    run = preferred("preferred")
    compared = trained / "checkpoints/step-2"
    plan = plan_repetition(run, (), run / "none", trained, 1, reference=compared)
    sources = plan.sources()
    used = [find_first_use(plan.config, sources, plan.newest, [f"pairs:{document}"])
            for document in range(0, len(sources[0].shard("train").lengths), 2)]
    dropped = [2 * i for i, found in enumerate(used) if found.step == 0]
    assert len(used) == 12 and len(dropped) == 4
    assert all(found.steps >= 2 for found in used if found.step), "each epoch reads all others"
    latest = 2 * max(range(12), key=lambda i: used[i].step)

    def removed(named: str) -> dict[str, Any]:
        code = cli.main(["counterfactual", str(run), "--without", named, "--from", str(trained), "--control",
                         "--reference", str(compared), "--output", str(tmp_path / named)])
        assert code == ExitCode.OK, capsys.readouterr().err
        return dict(json.loads((tmp_path / named / "removal.json").read_text()))

    found = removed(f"pairs:{dropped[0]}")
    assert found["checkpoint"] == str(run / "checkpoints/step-8")
    assert "no step up to 8 has read" in capsys.readouterr().out
    found = removed(f"pairs:{latest + 1}")
    assert (found["documents"], found["control"]) == (2, "equal"), "of a pair both"
    assert found["begin"] >= 2, "it goes on from the middle, with what was compared before the first step"
    never = preferred("never", f'data.without=["pairs:{latest + 1}"]')
    removed_weights = weights_and_moments(Path(found["checkpoint"]))
    assert removed_weights == weights_and_moments(never / "checkpoints/step-8")
    assert removed_weights != weights_and_moments(run / "checkpoints/step-8")

    manifest = shutil.copytree(run, tmp_path / "kto") / "checkpoints/step-8/manifest.json"
    told = json.loads(manifest.read_text())
    told["settings"]["preference"]["method"] = "kto"
    manifest.write_text(json.dumps(told | {"sha256": ""}))
    with pytest.raises(UserError, match=r"pairs:0: by preference\.method = kto each response also stands in"):
        plan_repetition(tmp_path / "kto", ["pairs:0"], tmp_path / "none", trained, 1)
