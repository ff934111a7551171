"""`megatron-sov ssp probe`: planted answers, scored and estimated by the real commands."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_sov.base.artifacts import create_artifact, find_damaged_files, read_manifest
from megatron_sov.base.errors import ExitCode
from megatron_sov.cli import main
from megatron_sov.commands.evaluate import eval_passk_run as eval_passk
from megatron_sov.commands.rl.ssp import probe_run
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

SAMPLES = 4
PLANTED = {"first": {"algebra": [4, 0], "geometry": [1, 1]},
           "second": {"algebra": [1, 1], "geometry": [0, 0]},
           "third": {"algebra": [1, 1], "geometry": [4, 4]},
           "step-100": {"algebra": [4, 1], "geometry": [0, 0]},
           "step-200": {"algebra": [1, 1], "geometry": [2, 2]},
           "merged": {"algebra": [4, 4], "geometry": [2, 2]}}
"""Checkpoint -> domain -> number of right answers, of `SAMPLES`, to each of two problems."""
PROBE_OPTIONS = [
    "--problems", "algebra=algebra.jsonl", "geometry=geometry.jsonl", "--reward", "stem", "--workers", "1",
    "--samples", str(SAMPLES), "--k", "2", "--max-new-tokens", "12", "--output", "probe"]


@pytest.fixture(autouse=True)
def models(cwd: Path, hf_models: dict[str, Path]) -> None:
    """A folder with problems, and Hugging Face folders of three checkpoints."""
    for name in ("first", "second", "third"):
        Path(name).mkdir()
        for file in hf_models["solar_open"].iterdir():
            Path(name, file.name).symlink_to(file)
    for domain in ("algebra", "geometry"):
        Path(f"{domain}.jsonl").write_text("".join(
            json.dumps({"prompt": f"{domain} {i}:", "answer": "4"}) + "\n" for i in range(2)))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, hf_models: dict[str, Path]) -> list[str]:
    """List of probed checkpoints. Commands run in this process with a double of the engine, which writes
    planted answers."""
    names: list[str] = []
    encode = Tokenizer.from_file(str(hf_models["solar_open"] / "tokenizer.json")).encode

    def run_planted_engine(kind: str, target: Any, work: Callable[[Any], int], **_: object) -> None:
        rows = [(domain, i) for domain in ("algebra", "geometry") for i in range(2)]

        def generate(prompts: list, sampling: object, *, stop: object, streams: list[int]) -> SimpleNamespace:
            texts = []
            for stream in streams:
                domain, problem = rows[stream // SAMPLES]
                num_right = PLANTED[target.path.name][domain][problem]
                texts.append(f"The answer is {4 if stream % SAMPLES < num_right else 5}")
            return SimpleNamespace(continuations=list(map(encode_text, texts)),
                                   finish_reasons=["stop"] * len(texts))

        work(SimpleNamespace(generate=generate))

    def encode_text(text: str) -> list[int]:
        return list(encode(text, add_special_tokens=False).ids)

    def run_in_this_process(argv: list[str], go_on_by: str) -> int:
        names.append(Path(argv[3]).name)
        return main(argv[1:])

    monkeypatch.setattr(eval_passk, "run_with_engine", run_planted_engine)
    monkeypatch.setattr(probe_run, "run_command", run_in_this_process)
    return names


def run_probe(*arguments: str) -> dict[str, Any]:
    assert main(["ssp", "probe", *arguments, *PROBE_OPTIONS]) == 0
    assert find_damaged_files("probe/table") == []
    return dict(read_manifest("probe/table", "ssp_probe").content)


def test_planted_best_checkpoint_of_each_domain_is_found_without_repeating_requests(
        probed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    EventLog(Path(EVENTS)).close()
    result = run_probe("first", "second")
    assert probed == ["first", "second"]
    # pass@2: a right answer among four samples is in 3 of their 6 pairs. "first" solves one of two problems
    # of algebra, "second" half of each: both have 0.5, and the earlier checkpoint is chosen.
    assert [(c["domain"], c["checkpoint"], c["value"], c["as_good"]) for c in result["choice"]] == [
        ("algebra", "first", 0.5, ["second"]), ("geometry", "first", 0.5, [])]
    result = run_probe("third", "--run", ".")
    assert probed == ["first", "second", "third"]
    assert [(c["domain"], c["checkpoint"], c["value"]) for c in result["choice"]] == [
        ("algebra", "first", 0.5), ("geometry", "third", 1.0)]
    assert [c["name"] for c in result["checkpoints"]] == ["first", "second", "third"]
    assert "*100.0% 34%-100%" in capsys.readouterr().out
    assert [i["kind"] for i in read_manifest("probe/table").inputs] == ["passk"] * 3

    (event,) = read_events(Path(EVENTS))
    assert event["event"] == "ssp_probe" and [c["checkpoint"] for c in event["choice"]] == ["first", "third"]


def test_a_killed_probe_resumes_at_its_checkpoint(probed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = probe_run.run_command
    with monkeypatch.context() as killed:
        killed.setattr(probe_run, "run_command",
                       lambda argv, go_on_by: run(argv, go_on_by) if not probed else ExitCode.STOPPED)
        assert main(["ssp", "probe", "first", "second", *PROBE_OPTIONS]) == ExitCode.STOPPED
    assert not Path("probe/table").exists()
    run_probe("first", "second")
    assert probed == ["first", "second"]
    Path("second/config.json").unlink()  # another file in its place makes the folder another model
    Path("second/config.json").write_text(Path("first/config.json").read_text())
    run_probe("second")
    assert probed == ["first", "second", "second"]


def test_probe_and_fuse_also_run_separately(probed: list[str], capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ssp", "probe", "first", "second", *PROBE_OPTIONS, "--dry-run"]) == 0
    for line in capsys.readouterr().out.splitlines():
        program, *words = shlex.split(line)
        assert (program, main(words)) == ("megatron-sov", 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    run_probe("first", "second")
    assert probed == []


def test_experts_of_a_run_are_merged_and_compared_with_the_merge(probed: list[str], imported: dict[str, Path],
                                                                 get_refusal: Any, read_output: Any) -> None:
    for step in (100, 200):
        shutil.copytree(imported["solar_open"], f"run/checkpoints/step-{step}")
    EventLog(Path("run", EVENTS)).close()
    Path("run/checkpoints/.writing-step-300").mkdir()
    result = run_probe("run")
    assert [c["name"] for c in result["checkpoints"]] == ["run/step-100", "run/step-200"]
    assert "0.5 of" in read_output("ssp", "fuse", "probe", "--output", "merged")
    result = run_probe("merged", "--run", "run")
    assert probed == ["step-100", "step-200", "merged"]
    # never the merged checkpoint
    assert [c["checkpoint"] for c in result["choice"]] == ["run/step-100", "run/step-200"]
    gains = {(g["domain"], g["k"]): g["gain"] for g in result["merged"]}
    # the merge solves algebra always; its best expert solves the second problem with one answer of four,
    # which is in half of the pairs: pass@1 is (1 + 1/4) / 2, and pass@2 (1 + 1/2) / 2
    assert gains == {("algebra", 1): 0.375, ("algebra", 2): 0.25, ("geometry", 1): 0.0, ("geometry", 2): 0.0}

    assert main(["convert", "average", "run", "both"]) == 0
    for name in read_manifest("both").files:
        assert Path("both", name).read_bytes() == Path("merged", name).read_bytes()
    # a checkpoint that is best in every domain becomes the merge, bit for bit
    first = "run/checkpoints/step-100"
    assert main(["ssp", "probe", first, *PROBE_OPTIONS[:-1], "alone"]) == 0
    assert "1 of" in read_output("ssp", "fuse", "alone", "--output", "same")
    for name in read_manifest("same").files:
        assert Path("same", name).read_bytes() == Path(first, name).read_bytes()
    assert "a mean needs at least two checkpoints" in get_refusal("ssp", "fuse", first, "--output", "never")
    assert ("merged:x: does not exist, and 'x' after the colon is not a weight"
            in get_refusal("ssp", "fuse", "merged:1", "merged:x", "--output", "never"))
    assert ("--last 3: must be at least 2 and at most 2"
            in get_refusal("convert", "average", "run", "never", "--last", "3"))


@pytest.mark.each(("arguments", "message"), [
    (["--problems", "algebra"], "--problems algebra: must be DOMAIN=FILE.jsonl"),
    (["--problems", "algebra=geometry.jsonl"], "domain algebra already has algebra.jsonl"),
    (["--problems", "statistics=empty.jsonl"], "--problems empty.jsonl: has no rows"),
    (["--k", "9"], "--k 9: must be at most --samples = 4"),
    (["--reward", "stemm"], "did you mean 'stem'?"),
])
def test_mistakes_give_one_sentence_and_no_output(arguments: list[str], message: str,
                                                  get_refusal: Any) -> None:
    Path("empty.jsonl").touch()
    assert message in get_refusal("ssp", "probe", "first", *PROBE_OPTIONS, *arguments)
    assert not Path("probe").exists()


def test_generated_problems_name_their_domains_and_are_unchanged(get_refusal: Any) -> None:
    problem = {"prompt": "2 + 2?", "answer": "4", "domain": "statistics"}
    with create_artifact("sets", "synthesis") as artifact:
        (artifact.path / "kept.jsonl").write_text(json.dumps(problem))
    assert main(["ssp", "probe", "first", *PROBE_OPTIONS, "--problems", "sets", "--dry-run"]) == 0
    assert '"probe_domain": "statistics"' in Path("probe/problems.jsonl").read_text()
    Path("sets/kept.jsonl").write_text(json.dumps({"prompt": "2 + 3?", "answer": "5"}) + "\n")
    assert ("the files have changed since"
            in get_refusal("ssp", "probe", "first", *PROBE_OPTIONS, "--problems", "sets", "--dry-run"))
    with create_artifact("more", "synthesis") as artifact:
        (artifact.path / "kept.jsonl").write_text(json.dumps({**problem, "domain": ""}))
    assert ("kept.jsonl: line 1 has no text in 'domain'"
            in get_refusal("ssp", "probe", "first", *PROBE_OPTIONS, "--problems", "more", "--dry-run"))


def test_incomparable_checkpoints_are_refused(probed: list[str], capsys: Any, get_refusal: Any) -> None:
    run_probe("first")
    assert ("its answers were begun with temperature = 1.0, now it is 0.5"
            in get_refusal("ssp", "probe", "second", *PROBE_OPTIONS, "--temperature", "0.5"))
    (samples,) = Path("probe/checkpoints").glob("first-*/samples.jsonl")
    samples.write_bytes(samples.read_bytes().replace(b'"reward": 0', b'"reward": 1'))
    assert main(["ssp", "probe", "second", *PROBE_OPTIONS]) == 2  # prints figures first
    assert "samples.jsonl: its content differs from the hash in the manifest; delete" in (
        capsys.readouterr().err)
