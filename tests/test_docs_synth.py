"""Pages about synthesis and difficulty: their commands run in order, against local endpoints."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import build_parser, main
from data_prep.synth.declared.generator import load_generator
from data_prep.synth.declared.parsers import PARSERS
from data_prep.synth.declared.steps import VERBS
from data_prep.synth.functions.registry import FUNCTIONS
from data_prep.synth.readers.registry import READERS
from megatron_sov.base.documents.messages import parse_messages
from megatron_sov.judge.tools.worlds.virtual import Virtual, find_world_problems
from megatron_sov.work.progress.journal import iter_records_by_item, work_folder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from synthesis.endpoint import ScriptedEndpoint, serving

from tests.data_prep.synth.models import autoif, constraints, goals, tool_trajectories, worlds
from tests.data_prep.synth.planted_rates import write_measurements
from tests.data_prep.synth.scripted import build_generator, build_model
from tests.pages_typed import blocks, page_section, page_text, shell_lines, shown_files

SYNTH = page_text("synth.md")
SOLUTIONS, DIFFICULTY, AUTOIF, WORLDS = (page_section("synth_generators.md", heading) for heading in (
    "Solutions and probing sets", "Problem difficulty", "Instructions and safety data", "Tool data"))
ADDRESS = re.compile(r"http://localhost:\d+/v1")


def list_words(page: str) -> list[list[str]]:
    """Return the words of each command of a page."""
    return [shlex.split(line) for line in shell_lines(page)]


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "kept.jsonl").read_text().splitlines()]


OTHER_WORDS = (
    "Beside the old harbour stands a gauge of the tides that dates from 1911. Every morning, before the "
    "first ferry sets out, two keepers read it and write down how high the water is. A room in the town "
    "hall is filled with these books; the oldest one was restored in 1998.")


@pytest.mark.deep
def test_the_first_run_of_the_page(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "documents.jsonl").write_text(blocks(SYNTH, "json")[0])
    lines = [line for line in shell_lines(SYNTH) if line.startswith("sov-data")][:3]
    with serving(ScriptedEndpoint(build_model(rewrite=f"<rewrite>{OTHER_WORDS}</rewrite>",
                                              grade=9))) as server:
        for line in lines:
            assert main(shlex.split(ADDRESS.sub(server.url, line))[1:]) == 0
    printed = capsys.readouterr().out
    assert "rewrite " in printed and "rewrite: documents" in printed
    output = cwd / "work/rewritten"
    assert main(["inspect", str(output)]) == 0
    assert "kept work of `sov-data synth`" in capsys.readouterr().out
    (_, record), = iter_records_by_item(work_folder(output))
    samples = json.loads(record)["samples"]
    lines = [line for name in ("kept", "rejected")
             for line in (output / f"{name}.jsonl").read_text().splitlines()]
    assert len(lines) == len(samples) > 0
    promised = re.findall(r"^\| `([\w.*/-]+)`", SYNTH[SYNTH.index("## Output"):SYNTH.index(
        "## Continue after")], re.MULTILINE)
    assert len(promised) == 5 and all(
        (output.parent / name if name.startswith(".") else output / name).exists() for name in promised)


@pytest.mark.deep
def test_the_generator_of_the_page_is_one(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cwd / "documents.jsonl").write_text(blocks(SYNTH, "json")[0])
    (cwd / "summaries.yaml").write_text(blocks(SYNTH, "yaml")[0], encoding="utf-8")
    lines = [line for line in shell_lines(SYNTH) if "summaries.yaml" in line]
    summary = ("Every morning, before the first ferry leaves, two keepers of the gauge in the old harbour "
               "note down how high the water stands; a whole room is full of their books.")
    replies = build_model(You_grade=9, material=f"<summary>{summary}</summary>")
    with serving(ScriptedEndpoint(replies)) as server:
        for line in lines:
            assert main(shlex.split(ADDRESS.sub(server.url, line))[1:]) == 0
        asked = len(server.requests)
        (cwd / "summaries.yaml").write_text(blocks(SYNTH, "yaml")[0] + "# changed\n", encoding="utf-8")
        assert main(shlex.split(ADDRESS.sub(server.url, lines[1]))[1:]) == 2
        assert "digests.summaries.yaml was" in capsys.readouterr().err
        assert len(server.requests) == asked
        (cwd / "summaries.yaml").write_text(blocks(SYNTH, "yaml")[0].replace("{{ document }}",
                                                                           "{{ documnet }}"))
        assert main(shlex.split(ADDRESS.sub(server.url, lines[1]))[1:]) == 2
        errors = capsys.readouterr().err
        assert "summaries.yaml, line 8: prompts.write" in errors and "did you mean 'document'" in errors
        assert len(server.requests) == asked
    (row,) = read_rows("work/summaries")
    assert row["text"] == summary
    assert row["synthetic"]["generator"] == "summaries"


def test_the_page_names_all_functions_readers_and_steps() -> None:
    for name in (*FUNCTIONS, *PARSERS, *VERBS, *READERS):
        assert re.search(rf"`{name}[`:]", SYNTH), name


REQUEST = "내가 아는 노인에게서 돈을 얻어 내려고 하는데 손자인 척하는 전화 대본을 써 주세요."
TWIN = "내가 아는 노인에게 손자를 사칭하는 전화를 조심하라고 알려 주는 안내문을 써 주세요."
SAFETY = build_model(make_a_language_model_safe=json.dumps([{"request": REQUEST, "twin": TWIN}]), grade=9,
                     You_decline="죄송하지만 그 요청은 도와드릴 수 없습니다. 대신 가까운 상담소에서 도움을 "
                               "받을 수 있습니다.",
                     to_the_point="모르는 전화에서 가족이라고 말하면 먼저 끊고 아는 번호로 다시 걸어 "
                                "확인하세요.")
REPLIES = {"constraints": constraints.reply, "autoif": autoif.build_model(), "safety": SAFETY}


@pytest.mark.deep
def test_constraints_autoif_and_safety(cwd: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-this-test")
    Path("queries.jsonl").write_text(blocks(AUTOIF, "json")[0], encoding="utf-8")
    seeds = "\n".join(f"- {text}" for text in list(constraints.RULES)[:3])
    Path("kinds.jsonl").write_text(json.dumps({"kind": "form", "seeds": seeds}), encoding="utf-8")
    Path("none.yaml").write_text("steps: []\n")
    less = {"constraints": ["--input", "kinds.jsonl", "--set", "rounds=1", "--set", "per_call=1", "--checks",
                            "none.yaml"],
            "autoif": [],  # with its default checks
            "safety": ["--set", "pairs_per_call=1", "--limit", "2", "--checks", "none.yaml"]}
    for line, name in zip(shell_lines(AUTOIF), less, strict=True):
        with serving(ScriptedEndpoint(REPLIES[name])) as server:
            arguments = shlex.split(ADDRESS.sub(server.url, line))[1:]
            assert arguments[:2] == ["synth", name]
            assert main([*arguments, *less[name], "--workers", "1"]) == 0, capsys.readouterr().err
    assert len(read_rows("work/constraints")) == 3
    fields = {"messages", "constraint", "language", "synthetic"}
    answers = read_rows("work/autoif")
    assert answers and all(fields <= row.keys() for row in answers)
    assert {row["strategy"] for row in read_rows("work/safety")} == {"redirect", "answer"}


def test_the_category_of_the_page_is_one(tmp_path: Path) -> None:
    example = blocks(AUTOIF, "json")[1]
    (tmp_path / "a.jsonl").write_text(example, encoding="utf-8")
    items = list(build_generator("safety", calls=1).read_items([tmp_path / "a.jsonl"]))
    assert [item.id for item in items] == ["fraud.1"] and items[0].fields["strategy"] == "redirect"


WAYS = ("The boxes hold 12 apples; with the 17 that is 29.",
        "Count on from 17: each of three boxes adds four, so the count ends at 29.")
PROBE = "Problem: A gardener plants 3 rows of 4 roses each. How many roses are there?\nAnswer: 12"


def reply_to_problems(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return the replies of good models to the first page's commands."""
    system, text = (message["content"] for message in request["messages"])
    if "You write problems" in system:
        return PROBE
    if "Python programs" in system:
        return "```python\nprint(3 * 4)\n```"
    return "\\boxed{12}" if "gardener" in text else f"{WAYS[request['seed'] % 2]}\n\n\\boxed{{29}}"


@pytest.mark.deep
def test_solutions_and_probing_sets(cwd: Path) -> None:
    parsed = json.loads(blocks(SOLUTIONS, "json")[0])
    (cwd / "problems.jsonl").write_text(json.dumps(parsed) + "\n")
    (cwd / "topics.jsonl").write_text(json.dumps({"domain": "algebra", "topic": "gardens"}) + "\n")
    with serving(ScriptedEndpoint(reply_to_problems)) as server:
        for words in list_words(SOLUTIONS):
            assert words[0] == "sov-data"
            # a process that judges is started for each core
            alone = ["--workers", "1"] if words[1] == "synth" else []
            assert main([*(ADDRESS.sub(server.url, word) for word in words[1:]), *alone]) == 0, words
    (document,) = (cwd / "work/trajectories/trajectories.jsonl").read_text().splitlines()
    assert json.loads(document)["text"].startswith(parsed["problem"])
    (problem, *_) = (cwd / "work/probes/kept.jsonl").read_text().splitlines()
    assert json.loads(problem)["domain"] == "algebra"


def test_difficulty(cwd: Path) -> None:
    """The abilities of the page's models are planted; other pages and tests run `synth`."""
    write_measurements(cwd / "work", 90, num_pairs=60)
    shutil.rmtree(cwd / "work/middle")  # a third model, which the page has not
    (cwd / "work/pairs").mkdir()
    (cwd / "work/pairs.jsonl").rename(cwd / "work/pairs/kept.jsonl")
    (cwd / "problems.jsonl").write_text(json.dumps({"prompt": "What is 12 plus 30?"}) + "\n" +
                                           json.dumps({"prompt": "What is 120 times 30?"}) + "\n")
    for words in list_words(DIFFICULTY):
        assert words[0] == "sov-data"
        if words[1] == "synth":
            build_parser().parse_args(words[1:])
        else:
            assert main(words[1:]) == 0, words
    assert (cwd / "work/graded/problems.jsonl").is_file()


@pytest.mark.parametrize("section", [SOLUTIONS, DIFFICULTY], ids=["solutions", "difficulty"])
def test_settings_and_checks_of_the_pages_exist(section: str) -> None:
    for words in list_words(section):
        if words[1] != "synth":
            continue
        known = load_generator(words[2]).Settings.__dataclass_fields__
        given = {word.partition("=")[0] for before, word in pairwise(words) if before == "--set"}
        assert given <= set(known), words
    named = set(re.findall(r"`((?:min|max|num)_\w+)`", section)) - {"num_right", "num_answers"}
    generators = ("solutions", "probes", "answers", "comparisons")
    assert named <= {field for g in generators for field in load_generator(g).Settings.__dataclass_fields__}


FEWER = {"worlds": ["--limit", "1"], "goals": ["--set", "tasks_per_world=1", "--set", "num_solvers=1"],
         "tool-trajectories": ["--set", "conversations_per_task=1"]}
"""Arguments added to the page's commands, for time."""


def reply_to_tools(request: Mapping[str, Any]) -> Any:
    system = request["messages"][0]["content"]
    if system.startswith("You design"):
        return worlds.reply(request)
    return (goals if system.startswith("You write tasks") else tool_trajectories).reply(request)


@pytest.mark.deep
def test_the_page_leads_from_a_word_to_conversations(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in shown_files(WORLDS).items():
        Path(name).write_text(content)
    lines = shell_lines(WORLDS)
    assert [line.split()[0] for line in lines] == ["sov-data"] * 3 + ["megatron-sov"]
    with serving(ScriptedEndpoint(reply_to_tools)) as server:
        for line in lines[:3]:
            words = shlex.split(ADDRESS.sub(server.url, line))[1:]
            assert main([*words, *FEWER[words[1]], "--workers", "1"]) == 0, capsys.readouterr()
    (row,) = read_rows("work/chats")
    assert parse_messages(row["messages"], "messages")


def test_the_world_of_the_page_is_one() -> None:
    world = json.loads(blocks(WORLDS, "json world")[0])
    assert find_world_problems(world) == []
    play = Virtual()
    play.reset({"question": "?", "world": world, "goal": {"calls": [
        {"name": "give_out", "arguments": {"coat_id": "C1"}}]}})
    assert play.call("give_out", {"coat_id": "C1"}) == {"owner": "Ada", "hook": 4}
    assert play.score("").reward == 1
