"""Runs of `sov-data synth` against a scripted endpoint: failures, exit codes, and resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from scripted import ScriptedRequester
from synthesis.endpoint import ScriptedEndpoint, serving, with_model_faults

from data_prep.cli import main
from data_prep.synth import finishing, models
from data_prep.synth.run_records import FinishedItem, describe_item
from data_prep.synth.samples import GeneratedSample, GeneratorItem, SampleVerdict, replace_unwritable_sample
from data_prep.synth.synth_run import create_generator
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.progress.journal import iter_records_by_item, read_job, work_folder

KEY = "sk-very-secret-0123456789"
ECHOES = Path(__file__).with_name("echoes.yaml")
"""Generator that asks for two answers to each line of a file, and has a judge grade each answer."""
FINISH = finishing.finish
"""The real function, which the fixture `settings` replaces."""


def echo(request: Mapping[str, Any]) -> str:
    """Reply as the scripted model: repeat the line, or as its judge, give 2 to a bad text and 8 to others."""
    system, user = (message["content"] for message in request["messages"])
    if "You grade" in system:
        return json.dumps({"reason": "it is", "score": 2 if "bad" in user else 8})
    return f"{user.partition(': ')[2]} ({request['seed']})"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "finish", lambda *args, **more: None)  # tested in test_finishing.py
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(models, "BACKOFF_S", 0.001)


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    with serving(ScriptedEndpoint(echo)) as server:
        yield server


class Run:
    """A `sov-data synth` command on a file of lines, in a folder of its own.

    Calling it runs the command and returns the exit code.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], num_lines: int = 3) -> None:
        self.folder, self.output, self._capsys = folder, folder / "out", capsys
        folder.mkdir(exist_ok=True)
        self.write([{"id": f"i{n}", "text": f"line {n}"} for n in range(num_lines)])

    def write(self, records: list[dict[str, Any]]) -> None:
        lines = [json.dumps({"licence": "CC0", **record}) + "\n" for record in records]
        (self.folder / "lines.jsonl").write_text("".join(lines))

    def build_command(self, engine: str, *more: str) -> list[str]:
        return ["synth", str(ECHOES), "--input", str(self.folder / "lines.jsonl"), "--output",
                str(self.output), "--engine", engine, "--model", "scripted", "--threads", "4", "--workers",
                "1", "--timeout", "600", *more]

    def __call__(self, endpoint: ScriptedEndpoint, *more: str) -> int:
        return main(self.build_command(endpoint.url, *more))

    def get_error(self, endpoint: ScriptedEndpoint, *more: str, code: int = 2) -> str:
        """Return the error of the command, which must end with a code."""
        self._capsys.readouterr()
        assert self(endpoint, *more) == code
        return self._capsys.readouterr().err

    def list_passed(self) -> list[str]:
        """Return the texts of samples that pass the generator's own checks, in order."""
        return [sample["record"]["text"] for item in self.read_items() for sample in item["samples"]
                if all(verdict["passed"] for verdict in sample["verdicts"])]

    def read_items(self) -> list[dict[str, Any]]:
        """Return the journal's records of finished items, each with its samples."""
        return [json.loads(record) for _, record in iter_records_by_item(work_folder(self.output))]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, capsys)


def test_items_become_samples_with_their_requests_and_verdicts(run: Run, endpoint: ScriptedEndpoint,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    run.write([{"id": "a", "text": "line a"}, {"id": "b", "text": "bad line"}])
    assert run(endpoint) == 0
    first, second = run.read_items()
    assert first["item"] | {"digest": ""} == {"id": "a", "source": "lines", "licence": "CC0", "digest": ""}
    assert [sample["verdicts"][1]["passed"] for sample in first["samples"] + second["samples"]] == [
        True, True, False, False]
    assert len(set(run.list_passed())) == 2, "each draw has a seed of its own"
    request = endpoint.requests[0]
    assert request["messages"] == [{"role": "system", "content": "You repeat."},
                                   {"role": "user", "content": request["messages"][1]["content"]}]
    identity = read_job(work_folder(run.output))["identity"]
    assert (list(identity["digests"]), identity["settings"]["tone"]) == (["echoes.yaml"], "plain")
    cache = EndpointCache(run.output / "answers.sqlite")
    assert all(cache.get(key) is not None for key in first["asked"]) and len(first["asked"]) == 4
    assert endpoint.key_header == f"Bearer {KEY}"
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    assert not any(KEY.encode() in file.read_bytes() for file in run.output.rglob("*") if file.is_file())


def test_a_judge_at_another_address_gets_no_key(run: Run, endpoint: ScriptedEndpoint) -> None:
    with serving(ScriptedEndpoint(echo)) as other:
        assert run(endpoint, "--judge-engine", other.url, "--judge-model", "wise", "--limit", "1") == 0
        assert {request["model"] for request in endpoint.requests} == {"scripted"}
        assert {request["model"] for request in other.requests} == {"wise"}
        assert (endpoint.key_header, other.key_header) == (f"Bearer {KEY}", "")
    identity = read_job(work_folder(run.output))["identity"]
    assert (identity["judge"], identity["judge_identity"]) == ("wise", "endpoint:wise")


FALLBACK = "cheap-fallback-7b"


def reply_with_fallback(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Answer as another model to the prompts of line 1, as an endpoint that falls back does."""
    answer = {"role": "assistant", "content": echo(request)}
    is_writing = request["messages"][0]["content"] == "You repeat."
    model = FALLBACK if is_writing and "line 1" in str(request["messages"]) else request["model"]
    return {**answer, "model": model}


@pytest.mark.deep
def test_answers_of_another_model_are_refused_or_recorded_with_its_name(
        run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "finish", FINISH)
    with serving(ScriptedEndpoint(reply_with_fallback)) as falling_back:
        assert (f"was asked for model 'scripted', and '{FALLBACK}' answered; its answer is not used"
                in run.get_error(falling_back))
        assert run(falling_back, "--accept-model", FALLBACK) == 0
    rows = [json.loads(line) for name in ("kept.jsonl", "rejected.jsonl")
            for line in (run.output / name).read_text().splitlines()]
    assert len(rows) == 6
    models = {row["synthetic"]["item"]: row["synthetic"]["model"] for row in rows}
    assert models == {"i0": "scripted", "i1": FALLBACK, "i2": "scripted"}
    summary = json.loads((run.output / "summary.json").read_text())
    assert set(summary["models"]) == {"scripted", FALLBACK}
    # cached answers of the other model are not used without the option
    with serving(ScriptedEndpoint(reply_with_fallback)) as falling_back:
        assert run(falling_back, "--redo") == 2
    with serving(ScriptedEndpoint(echo)) as back:
        assert run(back, "--redo") == 0
        assert 0 < len(back.requests) < 8, "only what the other model had answered is asked again"


def test_answered_requests_are_not_repeated_and_new_items_are_added(
        run: Run, endpoint: ScriptedEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(endpoint) == 0
    num_asked, passed = len(endpoint.requests), run.list_passed()
    assert run(endpoint) == 0
    assert (len(endpoint.requests), run.list_passed()) == (num_asked, passed)
    run.write([{"id": f"i{n}", "text": f"line {n}"} for n in (0, 1, 2, 3, 3)])
    assert run(endpoint) == 0
    assert "1 items have the id of an earlier one and are passed over, such as i3" in capsys.readouterr().out
    # the new item i3: two answers, and a grade for each
    assert (len(endpoint.requests), len(run.list_passed())) == (num_asked + 4, len(passed) + 2)


@pytest.mark.parametrize("more", [["--set", "tone=sharp"], ["--model", "another"]])
def test_changed_settings_are_refused_unless_redo_is_given(more: list[str], run: Run,
                                                           endpoint: ScriptedEndpoint) -> None:
    assert run(endpoint) == 0
    num_asked = len(endpoint.requests)
    error = run.get_error(endpoint, *more)
    assert ("settings.tone was" if "--set" in more else "model was") in error
    assert len(endpoint.requests) == num_asked
    assert run(endpoint, *more, "--redo") == 0
    assert len(run.list_passed()) == 6 and len(endpoint.requests) > num_asked
    num_asked = len(endpoint.requests)
    assert run(endpoint, *more, "--redo") == 0
    assert len(endpoint.requests) == num_asked, "answers are still in the cache"


def test_a_complete_output_without_its_records_needs_redo(run: Run, endpoint: ScriptedEndpoint) -> None:
    assert run(endpoint) == 0
    (run.output / "manifest.json").write_text("{}")
    shutil.rmtree(work_folder(run.output))  # as if a user cleared it, or did not move it with the output
    num_asked = len(endpoint.requests)
    assert "out.work) are gone; pass --redo" in run.get_error(endpoint)
    assert run(endpoint, "--redo") == 0 and len(run.list_passed()) == 6
    assert len(endpoint.requests) == num_asked, "answers are still in the cache"


def test_the_token_limit_is_sent_in_the_field_of_the_endpoint(run: Run, endpoint: ScriptedEndpoint) -> None:
    options = ["--judge-model", "judge", "--max-tokens-field", "max_completion_tokens"]
    assert run(endpoint, *options, "--judge-max-tokens", "3000") == 0
    lengths = [(body["model"], body.get("max_tokens"), body.get("max_completion_tokens"))
               for body in endpoint.requests]
    assert set(lengths) == {("scripted", None, 50), ("judge", None, 3000)}
    num_asked = len(endpoint.requests)
    assert run(endpoint, "--judge-model", "judge", "--judge-max-tokens", "3000", "--redo") == 0
    assert len(endpoint.requests) == num_asked, "the field's name does not change the cache key"
    assert "judge_max_tokens was 3000, and is 1024" in run.get_error(endpoint, "--judge-model", "judge")
    assert '--max-tokens-field "tokens": must be' in run.get_error(endpoint, "--max-tokens-field", "tokens")


def test_an_item_whose_content_changed_is_refused(run: Run, endpoint: ScriptedEndpoint) -> None:
    assert run(endpoint) == 0
    run.write([{"id": "i0", "text": "another line"}])
    assert "1 items are not what they were" in run.get_error(endpoint)
    assert run(endpoint, "--redo") == 0
    assert len(run.list_passed()) == 2


def test_unusable_answers_are_retried_and_then_given_up(run: Run) -> None:
    with serving(ScriptedEndpoint(with_model_faults(echo, 1.0))) as server:
        assert run(server) == 0
        assert {item["unusable"][:29] for item in run.read_items()} <= {
            "3 answers were of no use, the", "the judge gave no score in 3 ", ""}
        num_asked = len(server.requests)
        # 3 items x 3 attempts at least; each attempt has another seed, so that none is cached
        assert num_asked > 3 * 3 and len(set(server.asked)) == num_asked
        assert run(server) == 0
        assert len(server.requests) == num_asked, "unusable answers are cached too"
    assert not run.list_passed()


def test_an_unreachable_endpoint_ends_the_run_with_exit_code_75(run: Run, endpoint: ScriptedEndpoint) -> None:
    endpoint.next = ["503"] * 1000
    error = run.get_error(endpoint, "--patience", "0.2", "--max-attempts", "2", code=75)
    assert "nothing is lost, and the same command goes on" in error
    endpoint.next = []
    assert run(endpoint) == 0
    assert len(run.list_passed()) == 6


@pytest.mark.parametrize(("status", "ids", "options"), [
    ("503", "ab", ["--patience", "0", "--threads", "1"]), ("400", "a", [])])
def test_items_without_an_answer_are_retried_by_the_next_command(
        run: Run, endpoint: ScriptedEndpoint, status: str, ids: str, options: list[str]) -> None:
    run.write([{"id": id_, "text": f"line {id_}"} for id_ in ids])
    endpoint.next = [status] * 1000
    assert (f"{len(ids)} items got no answer, the last: {ids[-1]}: the endpoint answered HTTP {status}"
            in run.get_error(endpoint, "--max-attempts", "2", *options, code=75))
    # 2 answers to each item, with 2 attempts each
    assert 1000 - len(endpoint.next) == len(ids) * 2 * 2
    assert run.read_items() == []
    endpoint.next = []
    assert run(endpoint) == 0 and len(run.list_passed()) == 2 * len(ids)


def test_a_wrong_key_is_one_message_without_the_key(run: Run, endpoint: ScriptedEndpoint) -> None:
    endpoint.next = ["401"] * 100
    stderr = run.get_error(endpoint)
    assert "the key is not accepted (HTTP 401)" in stderr and KEY not in stderr


def test_a_budget_is_never_broken_and_can_be_raised(run: Run, endpoint: ScriptedEndpoint) -> None:
    assert run(endpoint, "--max-tokens-total", "2000") == 75
    usage = EndpointCache(run.output / "answers.sqlite").usage()
    assert 0 < usage.input_tokens + usage.output_tokens <= 2000
    assert run(endpoint, "--max-tokens-total", "2000") == 75, "tokens of earlier commands count"
    assert run(endpoint, "--max-tokens-total", "1000000") == 0
    assert max(endpoint.answered.values()) == 1


def test_generators_and_their_settings_are_listed(read_output: Any, get_refusal: Any) -> None:
    assert "rewrite              documents in other words" in read_output("synth", "--list")
    stdout = read_output("synth", str(ECHOES), "--list")
    assert "echoes: repeat lines" in stdout and "  tone = 'plain': Of the repetition" in stdout
    assert "rewrit: is no generator; did you mean 'rewrite'?" in get_refusal("synth", "rewrit", "--list")


BAD_OPTIONS = {
    "no address": (["--engine", "ftp://x"], "must be an address such as"),
    "no folder": (["--engine", "nowhere"], "is neither an address"),
    "a key in it": (["--engine", f"http://u:{KEY}@h/v1"], "holds a key or a query"),
    "no model": (["--model", ""], "say which model of the endpoint is asked"),
    "no time": (["--max-time", "2h"], "timeout --signal TERM"),
    "no input": (["--input", "missing.jsonl"], "does not exist"),
    "a setting": (["--set", "tome=x"], "no such setting; did you mean 'tone'"),
    "a value": (["--set", "min_score=11"], "min_score = 11 must be at most 10"),
    "a judge's key": (["--judge-api-key-env", "OPENAI_API_KEY"], "there is no judge of its own"),
    "a patience with a unit": (["--patience", "10m"], '--patience "10m": must be'),
    "prompts": (["--prompts", "."], "was removed in this version; pass --input FILE; the generator's YAML"),
    "no steps": (["--checks", "nowhere.yaml"], '--checks "nowhere.yaml": does not exist'),
}
"""Mistake -> its options, and the message."""


def test_a_command_refused_at_its_input_does_not_fix_the_settings(run: Run,
                                                                  endpoint: ScriptedEndpoint) -> None:
    run.write([])
    assert run(endpoint) == 2
    run.write([{"id": "a", "text": "line a"}])
    assert run(endpoint, "--set", "tone=dry") == 0
    assert "settings.tone was" in run.get_error(endpoint, "--set", "tone=odd")


def test_a_list_may_be_written_with_commas() -> None:
    settings = create_generator("rewrite", {"styles": "clearer,dialogue"}).settings
    assert settings == create_generator("rewrite", {"styles": ["clearer", "dialogue"]}).settings


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_command_lines_are_one_message_and_write_no_output(name: str, run: Run,
                                                               endpoint: ScriptedEndpoint) -> None:
    options, message = BAD_OPTIONS[name]
    stderr = run.get_error(endpoint, *options)
    assert message in stderr and KEY not in stderr
    assert not run.output.exists() and not endpoint.requests


@pytest.mark.deep
def test_a_killed_run_resumes_without_repeating_requests(tmp_path: Path, endpoint: ScriptedEndpoint,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    run, undisturbed = (Run(tmp_path / name, capsys, 12) for name in ("killed", "undisturbed"))
    endpoint.slow_s = 0.05
    command = [sys.executable, "-m", "data_prep.cli", *run.build_command(endpoint.url)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    while len(endpoint.requests) < 9:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    cache = EndpointCache(run.output / "answers.sqlite")
    # only what the killed run stored: the endpoint may still work on answers that nobody waits for
    stored = cache.keys()
    num_asked = {key: endpoint.asked[key] for key in stored}
    assert len(stored) >= 4  # 9 requests, of which up to 4 threads were still waiting
    assert run(endpoint) == 0
    assert {key: endpoint.asked[key] for key in stored} == num_asked, "stored answers are not paid for again"
    assert undisturbed(endpoint) == 0
    assert run.list_passed() == undisturbed.list_passed()


def test_a_stopped_run_waits_for_its_open_requests(tmp_path: Path, endpoint: ScriptedEndpoint,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, capsys, 12)
    endpoint.slow_s = 0.05

    def stop_after_requests() -> None:
        while len(endpoint.requests) < 9:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop_after_requests)
    stopping.start()
    assert "received SIGTERM; the same command resumes" in run.get_error(endpoint, code=75)
    stopping.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert EndpointCache(run.output / "answers.sqlite").keys() == set(endpoint.answered)
    assert run(endpoint) == 0
    assert max(endpoint.asked.values()) == 1, "answers to open requests are stored before the run ends"
    assert len(run.list_passed()) == 24  # 12 lines x 2 answers


def nest_lists(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize("sample", [
    GeneratedSample({"text": "\ud800"}), GeneratedSample({"\udfff": 1}),
    GeneratedSample({"text": "a"}, (SampleVerdict("a", True, "\ud83d"),)),
    GeneratedSample({"score": float("inf")}), GeneratedSample({"text": "a"}, notes={"score": float("nan")}),
    GeneratedSample({"deep": nest_lists(5000)})],
                         ids=["value", "name", "verdict", "infinite", "notes", "deep"])
def test_samples_that_json_cannot_hold_are_rejected(sample: GeneratedSample) -> None:
    result = replace_unwritable_sample(sample)
    assert (result.reason, result.record) == ("form", {})
    finished = FinishedItem(describe_item(GeneratorItem("a")), (result,))
    assert json.loads(finished.to_json())["samples"][0]["record"] == {}


def test_half_of_a_surrogate_pair_is_replaced_in_requests() -> None:
    ask = ScriptedRequester(lambda request: "yes")
    ask.request_turn([{"role": "user", "content": "half \ud800"}])
    assert ask.requests[0]["messages"] == [{"role": "user", "content": "half ?"}]
