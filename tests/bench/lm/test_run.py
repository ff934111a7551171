"""`eval lm` end to end: scores equal those of lm-eval's own model, item by item."""

import contextlib
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import convert
from megatron_sov.bench.lm import engine_runs, evaluation, results
from megatron_sov.bench.lm.results import EvaluatedModel, Metric, TaskScores
from megatron_sov.bench.lm.settings import LmEvalSettings
from megatron_sov.cli import main
from megatron_sov.infer.engines.load import load_tokenizer
from megatron_sov.infer.engines.transformers_engine import load_hf
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events
from tests.run_files import read_run_events

TASKS = ("last_word", "rolling", "words", "letters", "stopped", "unended")
FAMILY = "solar_open"


@pytest.fixture(scope="session")
def reference(task_dir: Path, hf_models: dict[str, Path]) -> dict[str, Any]:
    """lm-eval's own evaluation of the Hugging Face folder by its own model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before = Path.cwd()
    os.chdir(task_dir)  # where it looks for data files
    try:
        loaded = TaskManager(include_path=str(task_dir), include_defaults=False).load(list(TASKS))
        for task in loaded["tasks"].values():  # as its command does
            task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
            task.set_fewshot_seed(1234)
        model, tokenizer = load_hf(hf_models[FAMILY]), load_tokenizer(hf_models[FAMILY])
        model.generation_config.eos_token_id = tokenizer.eos_token_id  # or sequences continue after their end
        result = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), loaded,
                          bootstrap_iters=0)
    finally:
        os.chdir(before)
    assert result is not None
    return dict(result)


def agrees(out: Path, reference: dict[str, Any]) -> None:
    """Check every item's scores and texts, and every figure, against lm-eval's."""
    result = results.read_results(out)
    items = {(item.task, int(item.item)): item for item in results.read_items(out, result)}
    assert len(items) == sum(map(len, reference["samples"].values())) == 36
    for task, samples in reference["samples"].items():
        for sample in samples:
            item = items[task, sample["doc_id"]]
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                if isinstance(sample[metric], (int, float)) and metric != "perplexity":
                    assert item.scores[name] == sample[metric], (task, sample["doc_id"], name)
            if result.tasks[task].output_type == "generate_until":
                assert [s.response for s in item.samples] == [r for resps in sample["resps"] for r in resps]
    for task, scores in result.tasks.items():
        for figure in scores.metrics:
            if task in reference["samples"]:
                assert figure.value == pytest.approx(
                    reference["results"][task][f"{figure.name},{figure.filter}"], rel=2e-5)


@pytest.mark.deep
def test_scores_of_a_hugging_face_folder_equal_lm_eval(task_dir: Path, hf_models: dict[str, Path],
                                                       reference: dict[str, Any], tmp_path: Path,
                                                       capsys) -> None:
    log = EventLog(tmp_path / EVENTS)
    log.write("step", step=41, loss=1.0)
    log.close()
    out = tmp_path / "out.json"
    argv = ["eval", "lm", str(hf_models[FAMILY]), "--tasks", "last_word,rolling,choices,stopped,unended",
            "--task-dir", str(task_dir), "--output", str(out), "--run", str(tmp_path)]
    assert main(argv) == 0
    agrees(out, reference)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "metric", "value", "95", "%", "interval", "items", "failed", "at",
                                "limit"]
    assert table[-1].split()[:2] == ["choices", "acc"]
    result = results.read_results(out)
    assert result.tasks["unended"].at_limit == result.tasks["unended"].items == 6  # answers that never end
    assert result.tasks["words"].metrics[0].clusters == 3
    assert result.tasks["choices"].metrics[0].value == pytest.approx(
        (result.tasks["words"].metrics[0].value + result.tasks["letters"].metrics[0].value) / 2)
    item = next(results.read_items(out, result))
    assert (item.question, item.answer.strip()) == (item.question.strip(), item.answer.strip()) != ("", "")
    events = read_run_events(tmp_path, "eval_lm")
    assert [e["step"] for e in events] == [41] * 9
    assert {e["output"] for e in events} == {str(out)}

    # stored answers are not generated again, the results have the same bytes, and the run has recorded them
    before = out.read_bytes()
    assert main(argv) == 0
    assert "asked" not in capsys.readouterr().err
    assert out.read_bytes() == before
    assert len(read_run_events(tmp_path, "eval_lm")) == 9


def test_jobs_that_end_together_record_each_score_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                       ) -> None:
    (tmp_path / EVENTS).touch()
    scores = TaskScores("sha256:a", "multiple_choice", 6, (Metric("acc", 0.5),))
    result = results.Results(EvaluatedModel("hf", "sha256:b", "huggingface", step=3), {"quiz": scores}, {})
    both_have_read = threading.Barrier(2)

    def read_together(file: Path) -> list[dict[str, Any]]:
        events = list(read_events(file))
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_read.wait(timeout=1)
        return events

    monkeypatch.setattr(evaluation, "read_events", read_together)
    settings = LmEvalSettings(output=tmp_path / "out.json", run=tmp_path)
    with ThreadPoolExecutor(2) as jobs:
        for job in [jobs.submit(evaluation._record_events, RunEvents(tmp_path), settings, result)
                    for _ in range(2)]:
            job.result()
    assert [(e["task"], e["value"]) for e in read_events(tmp_path / EVENTS)] == [("quiz", 0.5)]


@pytest.mark.deep
def test_a_checkpoint_split_over_processes_is_too(
        task_dir: Path, imported: dict[str, Path], reference: dict[str, Any], tmp_path: Path,
        run_checked: Any) -> None:
    out = tmp_path / "out.json"
    run_checked("eval", "lm", str(imported[FAMILY]), "--tasks", ",".join(TASKS), "--task-dir", str(task_dir),
                "--output", str(out), "--nproc", "4", "--set", "parallel.tp=2", "--set", "parallel.pp=2",
                "--set", "parallel.sp=true", "--batch-size", "2")
    agrees(out, reference)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.deep)])
def test_checkpoint_and_hf_folder_stop_at_the_same_tokens(
        tp: int, task_dir: Path, hf_models: dict[str, Path], tmp_path: Path, as_one_rank: dict[str, str],
        run_checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at ends that generation_config.json alone names."""
    folder = shutil.copytree(hf_models[FAMILY], tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 1024, 4))}))
    convert.from_hf(folder, tmp_path / "checkpoint")

    def argv(target: Path) -> list[str]:
        return ["eval", "lm", str(target), "--tasks", "unended", "--task-dir", str(task_dir), "--output",
                str(tmp_path / f"{target.name}.json")]

    assert main(argv(folder)) == 0
    if tp == 1:
        for name, value in as_one_rank.items():
            monkeypatch.setenv(name, value)
        assert main(argv(tmp_path / "checkpoint")) == 0
    else:
        run_checked(*argv(tmp_path / "checkpoint"), "--nproc", "2", "--set", "parallel.tp=2", "--set",
                    "parallel.sp=true")
    answers = []
    for name in ("hf", "checkpoint"):
        out = tmp_path / f"{name}.json"
        outcome = results.read_results(out)
        assert outcome.tasks["unended"].at_limit < outcome.tasks["unended"].items == 6
        answers.append([[s.response for s in item.samples] for item in results.read_items(out, outcome)])
    assert answers[0] == answers[1]


@pytest.mark.deep
def test_a_killed_evaluation_resumes_after_its_stored_answers(one_rank: None, task_dir: Path,
                                                              imported: dict[str, Path], tmp_path: Path,
                                                              monkeypatch, capsys) -> None:
    def argv(name: str) -> list[str]:
        return ["eval", "lm", str(imported[FAMILY]), "--tasks", "words,stopped", "--task-dir", str(task_dir),
                "--output", str(tmp_path / name), "--batch-size", "1"]

    assert main(argv("whole.json")) == 0
    asked: list[str] = []
    plain, calls = engine_runs._answer_chunk, 0

    def dies(model: Any, running: Any, chunk: Any, flag: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt  # equivalent to a kill: nothing is written afterwards
        asked.extend(request.key for request in chunk)
        return plain(model, running, chunk, flag)

    monkeypatch.setattr(engine_runs, "_answer_chunk", dies)
    codes = [main(argv("killed.json"))]
    while codes[-1]:
        assert not (tmp_path / "killed.json").exists()
        codes.append(main(argv("killed.json")))
    assert len(codes) > 2
    assert len(asked) == len(set(asked)) > 20
    for end in (".json", ".items.jsonl"):
        whole = (tmp_path / f"whole{end}").read_text().replace("whole.items", "killed.items")
        assert (tmp_path / f"killed{end}").read_text() == whole


def test_a_signal_stops_it_in_good_order(one_rank: None, task_dir: Path, imported: dict[str, Path],
                                         tmp_path: Path, monkeypatch, capsys) -> None:
    plain = engine_runs._answer_chunk

    def stops(model: Any, running: Any, chunk: Any, flag: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, running, chunk, flag)

    argv = ["eval", "lm", str(imported[FAMILY]), "--tasks", "words,unended", "--task-dir", str(task_dir),
            "--output", str(tmp_path / "out.json")]
    with monkeypatch.context() as patched:
        patched.setattr(engine_runs, "_answer_chunk", stops)
        before = signal.getsignal(signal.SIGTERM)
        assert main(argv) == 75
        assert signal.getsignal(signal.SIGTERM) == before
    errors = capsys.readouterr().err
    assert "stopped: 18 of 24 requests are answered and kept; run the same command again" in errors
    assert main(argv) == 0
    assert "18 of 24 requests were answered before" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["tasks"]["unended"]["at_limit"] == 6


@pytest.mark.deep
def test_mistakes_are_reported_in_one_sentence(task_dir: Path, hf_models: dict[str, Path], tmp_path: Path,
                                               capsys) -> None:
    model, out = str(hf_models[FAMILY]), str(tmp_path / "out.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in hf_models[FAMILY].iterdir():
        if file.name not in ("tokenizer_config.json", "manifest.json"):
            (bare / file.name).symlink_to(file)
    (bare / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    common = ["--task-dir", str(task_dir), "--output", out]
    cases = [
        ([model, "--tasks", "word", *common], "did you mean 'words'?"),
        ([model, "--tasks", ",", *common], "--tasks: names none"),
        ([model, "--tasks", "words", "--task-dir", "nowhere", "--output", out], "nowhere: is no folder"),
        ([model, "--tasks", "words,words", *common], "words is named twice"),
        (["missing", "--tasks", "words", *common], "missing"),
        ([str(bare), "--tasks", "words", "--apply-chat-template", *common], "has no chat template"),
        ([model, "--tasks", "unended", "--max-length", "4", *common], "pass --max-new-tokens"),
        ([model, "--tasks", "words", "--max-length", "1000", *common], "the model ends at 512"),
        (["http://127.0.0.1:9/v1", "--tasks", "words", *common], "lm_eval --model local-chat-completions"),
        ([model, "--tasks", "words", "--task-dir", str(task_dir), "--output", str(tmp_path)], "is a folder"),
        ([model, "--tasks", "words", "--samples", "4", *common], "--samples 4: none of the tasks samples"),
        ([model, "--tasks", "words", "--judge", "x=1", *common], "--judge x=1: none of the tasks samples"),
        ([model, "--tasks", "words", "--mode", "thinking", *common], "is only for --apply-chat-template"),
    ]
    for argv, said in cases:
        assert main(["eval", "lm", *argv]) == 2, argv
        error = capsys.readouterr().err
        assert said in error, error
        assert "Traceback" not in error
        assert "did you mean" not in error or not (tmp_path / "out.cache").exists()
    assert not Path(out).exists()
