"""Task folders from elsewhere: code, downloads and files outside the folder are refused by name."""

import http.client
import json
import os
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.evaluated_lm import EvaluatedLM
from megatron_sov.bench.lm.evaluation import _build_task
from megatron_sov.bench.lm.harness import can_reach_hub
from megatron_sov.bench.lm.settings import LmEvalSettings, TaskSources
from megatron_sov.bench.lm.task_files import TaskFolder, find_tasks
from megatron_sov.bench.lm.tasks import hash_task, load_tasks

PLAIN = ("task: plain\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
         "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
         "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/d.jsonl").write_text(json.dumps({"q": "1 + 1 =", "a": "2"}) + "\n")
    return tmp_path / "tasks"


def load(folder: Path, text: str, **more: object) -> object:
    (folder / "plain.yaml").write_text(text)
    return load_tasks(["plain"], TaskSources((folder,), **more))  # type: ignore[arg-type]


def test_a_plain_task_is_loaded_with_the_hashes_of_its_data(folder: Path) -> None:
    loaded = load(folder, PLAIN)
    assert list(loaded.tasks) == ["plain"]
    assert list(loaded.files["plain"]) == ["tasks/d.jsonl"]


def test_a_task_of_the_hub_needs_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.bench.lm.tasks.can_reach_hub", lambda: False)
    monkeypatch.setattr("megatron_sov.bench.lm.tasks.forbid_downloads", lambda: None)
    manager = SimpleNamespace(task_index={"hellaswag": None}, load=lambda names: {}["data"])
    monkeypatch.setattr("megatron_sov.bench.lm.tasks.TaskManager", lambda **_: manager)
    with pytest.raises(UserError, match="'hellaswag': its data are on the Hugging Face hub"):
        load_tasks(["hellaswag"], TaskSources((folder,), allow_download=True))


@pytest.mark.each(("answer", "is_reached"), [
    (http.client.BadStatusLine("SSH-2.0"), False), (OSError("no route"), False),
    (ValueError("no address"), False),
    (urllib.error.HTTPError("hub", 403, "forbidden", http.client.HTTPMessage(), None), True)])
def test_a_refusal_of_the_hub_is_an_answer(answer: Exception, is_reached: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=answer))
    assert can_reach_hub() is is_reached


EVIL = [
    ("process_docs: !function evil.run", "process_docs is !function evil.run"),
    ("doc_to_text: !function evil.run", "doc_to_text is !function"),
    ("metric_list: [{metric: ./evil.py}]", "metric './evil.py' is not built into lm-eval"),
    ("metric_list: [{metric: exact_match, hf_evaluate: true}]", "metric 'exact_match'"),
    ("unsafe_code: true", "unsafe_code"),
    ("use_prompt: 'x.yaml:y'", "use_prompt"),
    ("dataset_path: pandas", "would be fetched"),
    ("dataset_path: someone/dataset", "someone/dataset' would be fetched"),
    ("dataset_kwargs: {data_files: {test: /etc/hostname}}", "lies outside of its folder"),
    ("dataset_kwargs: {data_files: {test: ../../../../etc/hostname}}", "lies outside of its folder"),
    ("dataset_kwargs: {data_files: {test: 'https://example.com/d.jsonl'}}", "does not exist"),
    ("dataset_kwargs: {data_files: {test: '${DATA}/d.jsonl'}}", "pass --data-dir DIR"),
    ("dataset_kwargs: {data_files: {test: gone.jsonl}}", "gone.jsonl does not exist; put the split's items"),
    ("dataset_kwargs: {data_files: {test: d.jsonl}, cache_dir: /}", "cache_dir, which `dataset_path: json`"),
    ("include: ../outside.yaml", "lies outside of"),
    ("include: gone.yaml", "so the task folder is incomplete"),
    ("include: 5", "include is 5; write a text"), ("tag: 5", "tag is 5; write a text"),
    ('include: "a\\0b"', "no valid path"), ("x: !!int ''", "is no YAML of a task"),
    ("x: !!timestamp soon", "is no YAML of a task"),
    ("dataset_path: [a]", "dataset_path is ['a']; write a text"),
    ("metric_list: 5", "metric_list is 5; write a list"), ("metric_list: [{metric: [a]}]", "metric ['a']"),
    ("dataset_kwargs: [a]", "dataset_kwargs is ['a']; write names and values"),
    ("dataset_kwargs: {data_files: {test: d.jsonl}, field: easy}", "dataset_kwargs has field, which"),
    ("dataset_kwargs: {data_files: {test: d.jsonl}, 5: 1}", "dataset_kwargs has 5, which"),
    ('dataset_kwargs: {data_files: "\\ud800.json"}', "no valid path"),
    ("include: plain.yaml", "form a circle"),
    ("doc_to_text: !!python/object/apply:os.system ['true']", "is no YAML of a task"),
    ("description: &a [*a]", "50,000 values, aliases counted"),
    ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
     "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]",
     "50,000 values, aliases counted"),
    ("doc_to_text: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"", "SecurityError"),
    ("doc_to_text: '{{ nothing }}'", "'nothing' is undefined"),
    ("test_split: other", "KeyError: 'other'"),
    ("output_type: paint", "Got invalid output_type"),
    ("metric_list: [{metric: exact_match, aggregation: sum_of_all}]",
     "the aggregation for its metric 'exact_match' is unknown to lm-eval"),
]


@pytest.mark.tier1_cases(10)
@pytest.mark.parametrize(("line", "message"), EVIL, ids=[line[:60] for line, _ in EVIL])
def test_task_files_that_run_code_or_read_elsewhere_are_refused(folder: Path, line: str,
                                                                message: str) -> None:
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    (folder.parent / "outside.yaml").write_text("num_fewshot: 1")
    key = line.partition(":")[0]
    other_lines = [old for old in PLAIN.splitlines() if not old.startswith(f"{key}:")]
    with pytest.raises(UserError) as error:
        load(folder, "\n".join([*other_lines, line]))
    assert message in str(error.value)


def test_merged_mappings_do_not_fill_the_memory(folder: Path) -> None:
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    with pytest.raises(UserError, match="more than 50,000 values"):  # they would be a thousand million
        load(folder, PLAIN + "\n".join(lines))
    merged = ("base: &base {test_split: test}\nother: &other {test_split: train, b: 2}\n"
              "more: {<<: *base, a: 1}\nboth: {<<: [*base, *other], a: 1}\n")
    assert find_tasks([TaskFolder(folder, False)]).definitions == {}
    (folder / "plain.yaml").write_text(PLAIN + merged)
    found = find_tasks([TaskFolder(folder, False)]).definitions["plain"]
    assert found.config["more"] == {"test_split": "test", "a": 1}
    assert found.config["both"] == {"test_split": "test", "a": 1, "b": 2}  # PyYAML 6.0.4 took the last


def test_a_file_too_large_for_a_task_is_not_parsed(folder: Path) -> None:
    with pytest.raises(UserError, match="more than 4,194,304 characters"):
        load(folder, PLAIN + "x: " + "a" * (4 << 20))


def test_pipes_and_links_to_outside_are_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")  # would wait for a writer for ever
    (folder.parent / "outside.yaml").write_text("task: outside")
    (folder / "link.yaml").symlink_to(folder.parent / "outside.yaml")
    result = find_tasks([TaskFolder(folder, False)])
    assert not result.definitions
    assert {Path(file).name: said for file, said in result.problems.items()} == {
        "pipe.yaml": f"{folder}/pipe.yaml: is no readable file; the task folder is incomplete",
        "link.yaml": f"{folder}/link.yaml: is a link out of {folder}; copy the file into the folder"}
    assert list(find_tasks([TaskFolder(folder, True)]).definitions) == ["outside"]


def test_changed_data_with_same_name_and_time_is_reread(folder: Path) -> None:
    os.utime(folder / "d.jsonl", (1, 1))  # as archives that are made to be reproducible set it
    first = load(folder, PLAIN)
    (folder / "d.jsonl").write_text(json.dumps({"q": "2 + 2 =", "a": "4"}) + "\n")
    os.utime(folder / "d.jsonl", (1, 1))
    second = load(folder, PLAIN)
    assert [loaded.tasks["plain"].eval_docs[0]["a"] for loaded in (first, second)] == ["2", "4"]


def test_a_hash_knows_no_place_in_memory() -> None:
    made = [SimpleNamespace(dump_config=lambda place=place: {"doc_to_text": f"partial(<f at {place}>)"},
                            eval_docs=[]) for place in ("0x7f00", "0x7f01")]
    assert hash_task(made[0], {}) == hash_task(made[1], {})


def test_code_runs_where_the_user_trusts_the_folder(folder: Path) -> None:
    (folder / "mine.py").write_text("def text(doc):\n    return 'How much is ' + doc['q']\n")
    text = PLAIN.replace("'{{q}}'", "!function mine.text")
    task = load(folder, text, allow_code=True).tasks["plain"]
    assert task.doc_to_text(task.eval_docs[0]) == "How much is 1 + 1 ="


def test_data_in_the_users_folder_is_found(folder: Path) -> None:
    mine = folder.parent / "mine"
    mine.mkdir()
    (folder / "d.jsonl").rename(mine / "d.jsonl")
    loaded = load(folder, PLAIN.replace("d.jsonl", "'${DATA}/d.jsonl'"), data_dir=mine)
    assert list(loaded.files["plain"]) == ["mine/d.jsonl"]


def test_names_that_mean_two_things_are_refused(folder: Path) -> None:
    (folder / "other.yaml").write_text(PLAIN)
    with pytest.raises(UserError, match="defines 'plain', and so does"):
        load(folder, PLAIN)
    (folder / "other.yaml").write_text("group: g\ntask: [{task: plain, dataset_path: evil}]")
    (folder / "plain.yaml").write_text(PLAIN)
    with pytest.raises(UserError, match="write each member into a file of its own"):
        load_tasks(["g"], TaskSources((folder,)))
    (folder / "other.yaml").write_text("group: g\ntask: [plain]\ndataset_path: evil")
    with pytest.raises(UserError, match="sets 'dataset_path' for its members"):
        load_tasks(["g"], TaskSources((folder,)))


@pytest.mark.parametrize("split", ["test_split", "validation_split"])
def test_no_prompt_holds_its_own_answer(folder: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvaluatedLM, "_encode_prompt", lambda self, prompt: list(map(ord, prompt)))
    rows = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(6)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load(folder, PLAIN.replace("test_split", split))
    settings = LmEvalSettings(output=folder / "out.json", num_fewshot=5)
    built = _build_task("plain", loaded, EvaluatedLM(None, 512, {}), settings)  # type: ignore[arg-type]
    assert len(built.requests) == 6
    for instance in built.task.instances:
        assert instance.args[0].count("question") == 6 and instance.doc["a"] not in instance.args[0]


def test_warnings_of_lm_eval_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(folder, PLAIN.replace(", higher_is_better: true", ""))
    errors = capsys.readouterr().err
    assert "lm-eval: " in errors and "higher_is_better is not" in errors and "Custom kwargs" not in errors
