"""Pipeline files: all mistakes are reported at once, each with its line, the rule and the fix."""

import re
import sys
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.curate.pipeline.pipeline_file import (
    StepFilter, find_pattern_problems, format_output_name, load_pipeline)
from data_prep.curate.pipeline.step import SOURCE_COLUMNS
from data_prep.curate.quality import identify
from data_prep.curate.sources.formats import FORMATS
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.removed import PIPELINE
from tests.data_prep.curate.pipeline.test_running import run_pipeline

WRONG = """nmae: x
shard_bytes: 10
on_bad: ignore
sources:
  - {name: web, path: web, knd: en}
  - {name: web, path: books}
  - {name: lost, path: nowhere, format: htlm}
  - just a word
steps:
  - shortn: {}
  - shorten: {longest: many}
  - shorten: {longest: -1}
  - unique: {}
    onyl: {sources: [web]}
  - shorten: {lists: [words.txt]}
    only: {sources: [wbe], kinds: [english]}
  - code: missing.py:f
  - education: {model: no-model}
output: {name: "{levle}-{url}"}
pack: {heldout: 2, tokenizer: none}
"""
EXPECTED = [
    "1: nmae: is no key of a pipeline; did you mean 'name'?",
    "1: name: is missing",
    "3: on_bad = \"ignore\" must be",
    "5: knd: no such setting; did you mean 'kind'?",
    "6: name = 'web': line 5 has a source of that name",
    '7: path = "nowhere" does not exist',
    '7: format = "htlm" must be one of',
    "8: 'just a word': a source is a mapping",
    "10: shortn: is no step; did you mean 'shorten'?",
    "11: longest = \"many\" must be a whole number",
    "12: longest = -1 must be at least 1",
    "13: step 4: must be the name of one step",
    "15: shorten: ", "words.txt does not exist",
    "16: sources = 'wbe': there is no such source; did you mean 'web'?",
    "16: kinds = 'english': must be of auto, en,",
    "17: function: ", "missing.py: cannot be read",
    "18: ", "no-model",
    "19: name = '{levle}-{url}': {levle} is no column that names can be made of here",
    "{url} is no column",
    "20: pack: is no key of a pipeline; it was removed in this version: after the run, `sov-data pack",
]


def get_refusal(folder: Path, text: str) -> str:
    """Return the message about a pipeline file with a mistake."""
    (folder / "pipeline.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_pipeline(folder / "pipeline.yaml")
    return str(error.value)


def test_all_mistakes_are_reported_at_once(small_run: Path) -> None:
    file, message = small_run / "pipeline.yaml", get_refusal(small_run, WRONG)
    assert [sentence for sentence in EXPECTED if sentence not in message] == [], message
    lines = message.splitlines()
    assert lines[0].startswith(f"{file}: ") and all(line.startswith(f"  {file}:") for line in lines[1:])
    numbers = [int(line.removeprefix(f"  {file}:").split(":")[0]) for line in lines[1:]]
    assert numbers == sorted(numbers)


REMOVED_FORMATS = ("arrow", "dataset", "epub", "office", "parallel")


@pytest.mark.parametrize("name", list(PIPELINE))
def test_removed_keys_are_refused_with_their_replacement(small_run: Path, name: str) -> None:
    """A name is a format or step, or `OWNER.KEY` for one of its options."""
    owner, _, key = name.partition(".")
    options = f"{{{key}: 1}}" if key else "{}"
    source, step = "{name: web, path: web}", "unique"
    if owner in FORMATS or owner in REMOVED_FORMATS:
        source = f"{{name: web, path: web, format: {owner}, options: {options}}}"
    else:
        step = f"{owner}: {options}"
    text = f"name: x\nsources:\n  - {source}\nsteps:\n  - {step}\n"
    assert PIPELINE[name] in get_refusal(small_run, text)


def test_a_missing_file_is_reported_with_an_example_to_copy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.yaml: does not exist; .*`cp \S+/tiny.yaml \S+`") as error:
        load_pipeline(tmp_path / "gone.yaml")
    assert Path(str(error.value).split("`")[1].split()[1]).is_file()
    with pytest.raises(UserError, match="is a folder; pass a pipeline file"):
        load_pipeline(tmp_path)


def test_a_file_becomes_settings(small_run: Path) -> None:
    (small_run / "words.txt").write_text("a b")
    file = small_run / "pipeline.yaml"
    file.write_text(file.read_text().replace("  - unique: {}", "  - shorten\n  - shorten: 50\n  - shorten: "
                                             "{lists: [words.txt]}\n    only: {kinds: [en]}"))
    pipeline = load_pipeline(file)
    assert [step.kind for step in pipeline.steps] == ["shorten"] * 5
    assert pipeline.steps[2].to_settings() == {"longest": 50, "not_below": 10, "lists": []}  # `shorten: 50`
    step = pipeline.steps[3]
    assert step.only == StepFilter(kinds=("en",))
    assert step.to_settings()["lists"] == ["words.txt"], "the path as written"
    assert step.build_step(pipeline.folder).list_files() == (small_run / "words.txt",), "relative to the file"
    assert pipeline.sources[0].path == ("web",) and pipeline.sources[0].folder == small_run


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no mapping"),
    ("name: x", "sources: must be a list"),
    ("name: [a", "is not valid YAML"),
    ("name: x\nsources: [{name: web, path: web}]\nsteps: {shorten: {}}",
     "steps = {'shorten': {}}: must be a list of steps"),
    ("name: x\nsources: [{name: web, path: web}]\nsteps: [unique]",
     "unique: needs the column 'size', which nothing before it gives; put the step shorten before it"),
    ("name: x\nsources: [{name: ../up, path: web}]", 'name = "../up" must be letters'),
    ("name: x\nsources: [{name: web, path: web, licence: no}]",
     "YAML reads no, off, yes and on as false and true; put it in quotes"),
    ("name: x\nsteps:\n  - shorten\n    only: {kinds: [en]}", "yaml:4: is not valid YAML (mapping values are "
     "not allowed here); a text with `: ` in it stands in quotes, and a key with settings below it has a"),
    ("name: x\n\tsources: 3", "indent with blanks, not with tabs"),
    ("name: x\nsources: [{name: web, path: web}]\noutput: {name: '{size}'}",
     "{size} is no column that names can be made of here; add the step shorten (there are: source, kind,"),
])
def test_a_malformed_pipeline_is_one_message(small_run: Path, text: str, message: str) -> None:
    assert message in get_refusal(small_run, text)


@pytest.mark.parametrize(("kind", "first", "message"), [
    ("ko", "", "no source here is of such a kind"), ("auto", "", "the kind of source 'web' is auto"),
    ("auto", "  - language\n  - kind\n", ""), ("en", "", "")])
def test_a_filter_that_matches_no_source_is_refused(small_run: Path, kind: str, first: str,
                                                    message: str) -> None:
    file = small_run / "pipeline.yaml"
    before, _, _ = file.read_text().replace("kind: en", f"kind: {kind}").partition("steps:")
    file.write_text(f"{before}steps:\n{first}  - shorten: {{}}\n    only: {{kinds: [en]}}\n")
    if message:
        with pytest.raises(UserError, match=message):
            load_pipeline(file)
    else:
        assert load_pipeline(file).steps[-1].only == StepFilter(kinds=("en",))


@pytest.mark.parametrize(("pattern", "columns", "name"), [
    ("{source}", {}, "web"), ("{kind}-x", {"kind": "domain:law"}, "domain-law-x"), ("{kind}", {}, "none"),
    ("{kind}", {"kind": ""}, "none"), ("{synthetic}", {"synthetic": True}, "yes"),
    ("{kind}", {"kind": "../../etc"}, "x..-..-etc"), ("all", {}, "all"),
    ("{kind}", {"kind": "한국어"}, "한국어"),
])
def test_values_become_names(pattern: str, columns: dict[str, object], name: str) -> None:
    assert format_output_name(pattern, "web", columns) == name


@pytest.mark.parametrize(("pattern", "message"), [
    ("", "must be letters"),
    ("{kind", "write columns in braces"), ("{knd}", "did you mean 'kind'?"),
    ("{kind!r}", "take columns as they are"),
])
def test_invalid_name_patterns_are_refused(pattern: str, message: str) -> None:
    assert any(message in problem for problem in find_pattern_problems(pattern, SOURCE_COLUMNS))


@pytest.mark.parametrize(("words", "message"), [
    (["p.yaml", "--output", "out", "--account", "me"], "is only for --cluster"),
    (["p.yaml", "--output", "full"], "full: exists and is no folder of a pipeline"),
    (["p.yaml", "--output", "out", "--cluster", "h1000"], "there is no such profile; did you mean"),
    (["p.yaml", "--output", "raw/out"], "lies in 'raw' of source raw"),
    (["raw", "--output", "out"], "raw: is a folder; pass a pipeline file"),
])
def test_a_wrong_command_line_is_one_message(cwd: Path, words: list[str], message: str,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("raw", "full"):
        (cwd / name).mkdir()
        (cwd / name / "x.txt").write_text("words")
    (cwd / "p.yaml").write_text("name: p\nsources: [{name: raw, path: raw}]\n")
    assert cli.main(["run", *words]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr
    assert not (cwd / "out/manifest.json").exists()


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the optional libraries of steps, and let the steps be imported again."""
    for library in ("ftfy", "py3langid", "phonenumbers"):
        monkeypatch.setitem(sys.modules, library, None)
    for module in ("encoding", "pii.step"):
        monkeypatch.delitem(sys.modules, f"data_prep.curate.quality.{module}", raising=False)
    identify._import_langid.cache_clear()


STEPS_WITH_LIBRARIES = "name: x\nsources: [{name: web, path: web}]\nsteps: [encoding, language, pii]\n"


def test_columns_are_listed_without_the_libraries_of_steps(small_run: Path, no_libraries: None) -> None:
    message = get_refusal(small_run, "name: x\nsources: [{name: web, path: web}]\noutput: {name: '{form}'}")
    assert re.search(r"{form} is no column .* here; add the step language ", message)


def test_a_run_and_not_a_dry_run_needs_the_libraries_of_its_steps(
        small_run: Path, no_libraries: None, capsys: pytest.CaptureFixture[str]) -> None:
    (small_run / "pipeline.yaml").write_text(STEPS_WITH_LIBRARIES)
    run_pipeline(small_run, "--dry-run")
    stdout = capsys.readouterr().out
    assert "step encoding needs ftfy, which is not installed" in stdout and "03-pii: 0 of 1 shards" in stdout
    assert not run_pipeline(small_run, code=2).exists()
    stderr = capsys.readouterr().err
    for library in ("encoding needs ftfy", "language needs py3langid", "pii needs phonenumbers"):
        assert f"step {library}, which is not installed" in stderr


def test_pii_needs_a_library_for_phone_numbers_alone(small_run: Path, no_libraries: None) -> None:
    (small_run / "web/mail.txt").write_text("Write to ann@sea.kr, who answers within a day.")
    (small_run / "pipeline.yaml").write_text("name: x\nsources: [{name: web, path: web}]\n"
                                             "steps: [{pii: {mask: [email]}}]\n")
    assert read_manifest(run_pipeline(small_run), "corpus").content["num_documents"] == 7
