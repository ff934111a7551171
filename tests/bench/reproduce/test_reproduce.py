"""Claims that are written before their runs: what is refused, tested, told, and gone on with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from megatron_sov import cli
from megatron_sov.base.digests import code_sha256
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.bench.reproduce import running
from megatron_sov.bench.reproduce.claims import (
    SHIPPED, Measure, PaperClaim, files_read, find_file, read_claims, register)
from megatron_sov.bench.reproduce.running import read_figure, run_steps
from megatron_sov.bench.reproduce.seeds.asked import PictureChat
from megatron_sov.bench.reproduce.seeds.choices import THINGS, ChoicePrompts, Choices
from megatron_sov.bench.reproduce.seeds.noise import LABELLED_SHARE, JunkLabels, WithJunk, junk
from megatron_sov.bench.reproduce.seeds.pictures import SIDE_PIXELS, Pictures
from megatron_sov.bench.reproduce.seeds.right_ones import RightOnes
from megatron_sov.bench.reproduce.seeds.rules import RULES, Drafts, KeptDrafts, RulePrompts
from megatron_sov.bench.reproduce.seeds.tasks import Chats, Exact, TaskQuestions
from megatron_sov.bench.reproduce.seeds.written import Openings, Written
from megatron_sov.bench.reproduce.verdict import (
    ClaimOutcome, apply_test, differences_told, figures_told, outcome_of, paired_interval, power_of)
from megatron_sov.commands.evaluate.reproduce import ClaimsFinish, ClaimsShare, SharedClaims
from megatron_sov.judge.rewards.ifeval import IfEval
from megatron_sov.work.progress.journal import begin_journal

STEP = '''
class Loss:
    def __init__(self, value: float, seed: int) -> None:
        self.value, self.seed = value, seed
    def do(self, row: dict) -> dict:
        return {"loss": self.value * (1 + self.seed / 100), "noise": self.seed % 2}
'''
MAP = "megatron-sov map {claims}/row.json {claims}/step.py:Loss --overwrite --set seed={seed}"
CLAIMS = {
    "seed": "tiny", "paper": "A paper", "words": {"map": MAP},
    "setup": {"shared": ["megatron-sov recipes > {here}/recipes.txt"]},
    "claims": {"better": {
        "says": "New is better than old.", "source": "table 1", "here": "A fake.", "seeds": 2, "minutes": 1,
        "published": {"head": ["model", "loss"], "rows": [["new", "1"], ["old", "2"]]},
        "arms": {"new": ["{map} --set value=1 --output {here}/out"],
                 "old": ["{map} --set value=2 --output {here}/out --workers 1"]},
        "measures": {"loss": {"file": "out/rows.jsonl", "value": "loss", "unit": "nats"}},
        "tests": [{"measure": "loss", "lower": "new", "higher": "old",
                   "power": {"difference": 1, "sd": 0.1, "source": "a guess"}}]}}}


def write_claims(folder: Path, change: Mapping[str, Any] | None = None) -> Path:
    """Write a file of claims with what its commands read; `change`: of the claim."""
    folder.mkdir(exist_ok=True)
    (folder / "row.json").write_text("{}\n")
    (folder / "step.py").write_text(STEP)
    file = folder / "tiny.yaml"
    claims = json.loads(json.dumps(CLAIMS))
    claims["claims"]["better"] |= change or {}
    file.write_text(json.dumps(claims))
    return file


class Commands:
    """Stands for the processes of commands: each leaves the row that the real one would leave."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails_at = -1
        """Number of the command that is killed."""

    def __call__(self, folder: Path, words: Sequence[str]) -> None:
        if len(self.done) == self.fails_at:
            self.fails_at = -1
            raise UserError("killed")
        self.done.append(" ".join(words))
        if "map" in words:
            given = dict(word.split("=") for word in words if "=" in word)
            (folder / "out").mkdir()
            row = {"loss": float(given["value"]) * (1 + int(given["seed"]) / 100)}
            (folder / "out/rows.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    found = Commands()
    monkeypatch.setattr(running, "run_step", found)
    return found


def reproduce(file: Path, output: Path, *more: str) -> int:
    return cli.main(["reproduce", str(file), "--output", str(output), "--workers", "1", *more])


def told(page: Path) -> str:
    """Return a page without the time of its writing."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page.read_text())


def test_ordinary_commands_are_run_and_measured(tmp_path: Path) -> None:
    """From the command line to the page, each command a process."""
    file = write_claims(tmp_path / "claims")
    assert reproduce(file, tmp_path / "out") == ExitCode.OK
    claim = register(read_claims(file), "better", file)
    folder = running.claim_folder(tmp_path / "out", claim)
    assert running.seeds_of(folder, claim.declared) == {
        seed: {"new": {"loss": 1 + seed / 100}, "old": {"loss": 2 * (1 + seed / 100)}} for seed in (0, 1)}
    log = (folder / "seed-1/arms/new/log").read_text()
    assert log.startswith("$ megatron-sov map ") and "1 rows in, 1 out" in log
    assert claim.sha256 in told(tmp_path / "out/reproduce.html")
    with pytest.raises(UserError, match=r"`megatron-sov recipes` ends with exit code 2: .*nothing-such"):
        run_steps(tmp_path / "bad", ["megatron-sov recipes nothing-such > {here}/x"], {}, "bad")
    assert not (tmp_path / "bad/x").exists()


def test_a_claim_that_holds_ends_with_0_and_one_that_does_not_with_3(tmp_path: Path, commands: Commands,
                                                                    capsys: pytest.CaptureFixture[str]
                                                                    ) -> None:
    assert reproduce(write_claims(tmp_path / "claims"), tmp_path / "out") == ExitCode.OK
    assert "new < old in loss" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/results.json").read_text())["claims"]["better"]
    assert found["outcome"] == "holds"
    assert found["tests"][0]["differences"] == pytest.approx([1.0, 1.01])
    page = (tmp_path / "out/reproduce.html").read_text()
    assert found["sha256"] in page and "A fake." in page and "New is better than old." in page
    ran = len(commands.done)
    assert cli.main(["reproduce", str(tmp_path / "claims/tiny.yaml"), "--output", str(tmp_path / "out"),
                     "--dry-run"]) == ExitCode.OK
    assert len(commands.done) == ran
    assert re.search(r"new < old in loss .* holds$", capsys.readouterr().out, re.MULTILINE)
    test = {**CLAIMS["claims"]["better"]["tests"][0], "lower": "old", "higher": "new"}  # type: ignore[index]
    file = write_claims(tmp_path / "others", {"tests": [test]})
    assert reproduce(file, tmp_path / "reverse") == ExitCode.GATE_FAILED
    assert "does not hold" in capsys.readouterr().out


def test_a_killed_command_goes_on_and_leaves_the_same(tmp_path: Path, commands: Commands) -> None:
    file = write_claims(tmp_path / "claims")
    assert reproduce(file, tmp_path / "whole") == ExitCode.OK
    wanted, num = commands.done, len(commands.done)
    for fails_at in range(num):
        commands.done, commands.fails_at = [], fails_at
        output = tmp_path / f"killed-{fails_at}"
        assert reproduce(file, output) == ExitCode.USER_ERROR
        assert reproduce(file, output) == ExitCode.OK
        assert len(commands.done) == num == len(wanted)  # none twice
        assert (output / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
        assert told(output / "reproduce.html") == told(tmp_path / "whole/reproduce.html")


def test_a_claim_that_was_changed_after_its_runs_is_refused_until_it_says_so(
        tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = write_claims(tmp_path / "claims"), tmp_path / "out"
    reproduce(file, output)
    before = register(read_claims(file), "better", file)
    arms = {"new": ["{map} --set value=0 --output {here}/out"],
            "old": CLAIMS["claims"]["better"]["arms"]["old"]}  # type: ignore[index]
    write_claims(tmp_path / "claims", {"arms": arms})
    assert reproduce(file, output) == ExitCode.USER_ERROR
    assert re.search(rf"has run claim better in another form.*sha256: {before.sha256}.*\n  arms.new.0 was "
                     r"megatron-sov map .*value=1.*, and is megatron-sov map .*value=0",
                     capsys.readouterr().err)
    assert reproduce(file, output, "--dry-run") == ExitCode.USER_ERROR
    changes = [{"sha256": before.sha256, "date": "2026-11-25", "what": "The new arm was too slow."}]
    write_claims(tmp_path / "claims", {"arms": arms, "changes": changes})
    assert reproduce(file, output) == ExitCode.OK
    page = (output / "reproduce.html").read_text()
    assert "The new arm was too slow." in page and "seed 1: {" in page
    # what a command reads is part of the claim too
    (file.parent / "step.py").write_text(STEP + "# other\n")
    assert reproduce(file, output) == ExitCode.USER_ERROR


def test_what_commands_read_is_found_however_it_is_spelled(tmp_path: Path) -> None:
    """Beside the file, below it, in quotes, by a detour, as a whole folder, and by an import."""
    file = write_claims(tmp_path / "claims")
    for name, text in {"sub/deep.py": "from beside import x\n", "beside.py": "x = 1\n", "more/a.txt": "a",
                       "more/b.txt": "b", "unread.txt": ""}.items():
        (file.parent / name).parent.mkdir(exist_ok=True)
        (file.parent / name).write_text(text)
    read = partial(files_read, file.parent)
    assert [*read(["x {claims}/'row.json' {claims}/sub/../sub/deep.py:Step --set a={claims}/more"])] == [
        "beside.py", "more/a.txt", "more/b.txt", "row.json", "sub/deep.py"]
    (file.parent / "tool.py").write_text("import json\nfrom claims.beside import row\nfrom sub import (\n"
                                         "    deep)\nfrom .unread import y\n")
    (file.parent / "unread.py").write_text("")
    assert [*read(["x {claims}/tool.py"])] == ["beside.py", "sub/deep.py", "tool.py", "unread.py"]
    before = read(["x {claims}/sub/deep.py"])
    (file.parent / "beside.py").write_text("x = 2\n")
    assert read(["x {claims}/sub/deep.py"]) != before


def test_results_that_were_changed_or_come_from_elsewhere_are_refused(
        tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = write_claims(tmp_path / "claims"), tmp_path / "out"
    claim = register(read_claims(file), "better", file)
    folder = running.claim_folder(output, claim)

    def refused(said: str, *more: str) -> None:
        assert reproduce(file, output, *more) == ExitCode.USER_ERROR
        assert said in capsys.readouterr().err

    output.mkdir()
    (output / "results.json").write_text("{}")
    refused("no claim has run in this folder")
    (output / "results.json").unlink()
    assert reproduce(file, output) == ExitCode.OK
    row = folder / "seed-1/arms/old/out/rows.jsonl"
    kept = row.read_text()
    row.write_text('{"loss": 500}\n')
    refused("have other figures now")
    row.write_text(kept)
    shutil.copy(folder / "seed-0/measured.json", folder / "seed-1/measured.json")  # of another seed
    refused("measured.json")
    refused("measured.json", "--dry-run")
    shutil.rmtree(folder / "seed-1")
    declared = folder / "claim.json"
    declared.rename(tmp_path / "away")
    refused("is gone, and something ran beside it")
    (tmp_path / "away").rename(declared)
    assert reproduce(file, output) == ExitCode.OK
    refused("seeds that are added until it holds prove nothing", "--seeds", "3")


def test_a_copied_seed_is_refused_and_a_damaged_declaration_is_taken_back(
        tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = write_claims(tmp_path / "claims"), tmp_path / "out"
    reproduce(file, output)
    folder = running.claim_folder(output, register(read_claims(file), "better", file))
    shutil.rmtree(folder / "seed-1")
    shutil.copytree(folder / "seed-0", folder / "seed-1")
    (folder / "seed-1/measured.json").unlink()
    assert reproduce(file, output) == ExitCode.USER_ERROR
    assert re.search(r"seed-1/arms/new: its commands ran for another seed.*delete it",
                     capsys.readouterr().err)
    shutil.rmtree(folder / "seed-1")
    assert reproduce(file, output) == ExitCode.OK
    (folder / "claim.json").write_text("{")
    assert reproduce(file, output) == ExitCode.USER_ERROR
    assert "take it back from a copy, or name another --output" in capsys.readouterr().err


def test_what_ran_is_not_dropped_by_running_something_else(
        tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a claim that was changed, removed or of another seed, and of seeds that are not asked for again."""
    file, output = write_claims(tmp_path / "claims"), tmp_path / "out"
    whole = json.loads(file.read_text())
    better = whole["claims"]["better"]
    worse = better | {"tests": [better["tests"][0] | {"lower": "old", "higher": "new"}]}

    def run(claims: Mapping[str, Any], *more: str, seed: str = "tiny") -> int:
        file.write_text(json.dumps(whole | {"seed": seed, "claims": claims}))
        return reproduce(file, output, "--claim", "better", *more)

    file.write_text(json.dumps(whole | {"claims": {"better": better, "worse": worse}}))
    assert reproduce(file, output) == ExitCode.GATE_FAILED
    before = register(read_claims(file), "worse", file)
    other = worse | {"minutes": 2}
    for claims, seed, said in (
            ({"better": better}, "tiny", "which the file of claims has no more"),
            ({"better": better}, "other", "has run claim better of seed tiny"),
            ({"better": better, "worse": other}, "tiny", "has run claim worse in another form")):
        for more in ([], ["--dry-run"]):
            assert run(claims, *more, seed=seed) == ExitCode.USER_ERROR
            assert said in capsys.readouterr().err
    change = {"sha256": before.sha256, "date": "2026-11-27", "what": "More time."}
    assert run({"better": better, "worse": other | {"changes": [change]}}, "--seeds", "1") == ExitCode.OK
    results = json.loads((output / "results.json").read_text())["claims"]
    assert [*results["better"]["seeds"]] == ["0", "1"] and results["better"]["outcome"] == "holds"
    assert results["worse"]["outcome"] == "undecided" and not results["worse"]["seeds"]
    page = (output / "reproduce.html").read_text()
    assert "More time." in page and "It gave: seed 0: {" in page and "1 of 2 claims hold" in page


def test_the_code_that_commands_ran_with_is_told(
        tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    file, output = write_claims(tmp_path / "claims"), tmp_path / "out"
    reproduce(file, output, "--seeds", "1")
    code = code_sha256(running.PACKAGES)
    assert running.PACKAGES == ("megatron_sov", "data_prep", "tokenizer")
    results = output / "results.json"
    assert json.loads(results.read_text())["claims"]["better"]["code"] == {code: ["seed 0"]}
    assert "All ran with one." in (output / "reproduce.html").read_text()
    monkeypatch.setattr(running, "code_sha256", lambda packages: "b" * 64)  # as behind an update
    reproduce(file, output)
    assert json.loads(results.read_text())["claims"]["better"]["code"] == {
        code: ["seed 0"], "b" * 64: ["seed 1"]}
    assert "They ran with more than one" in (output / "reproduce.html").read_text()


def test_a_file_that_changes_while_seeds_run_is_refused(
        tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    file = write_claims(tmp_path / "claims")

    def change(folder: Path, words: Sequence[str]) -> None:
        commands(folder, words)
        if "--set" in words:
            (file.parent / "step.py").write_text(STEP + "# other\n")

    monkeypatch.setattr(running, "run_step", change)
    assert reproduce(file, tmp_path / "out") == ExitCode.USER_ERROR
    assert "step.py: was changed while claim better ran" in capsys.readouterr().err


def test_the_page_has_every_claim_that_ran_in_the_folder(tmp_path: Path, commands: Commands) -> None:
    file = write_claims(tmp_path / "claims")
    claims = json.loads(file.read_text())
    claims["claims"] |= {"again": claims["claims"]["better"], "later": claims["claims"]["better"]}
    file.write_text(json.dumps(claims))
    for name in ("better", "again"):
        assert reproduce(file, tmp_path / "out", "--claim", name) == ExitCode.OK
    assert [*json.loads((tmp_path / "out/results.json").read_text())["claims"]] == ["better", "again"]
    assert "2 of 2 claims hold, 1 more have not run" in (tmp_path / "out/reproduce.html").read_text()


def test_claims_share_a_setup_whatever_else_they_read(tmp_path: Path) -> None:
    file = write_claims(tmp_path / "claims", {"base": ["megatron-sov recipes > {shared}/again.txt"]})
    folders = []
    for text in (STEP, STEP + "# other\n"):
        (file.parent / "step.py").write_text(text)
        claim = register(read_claims(file), "better", file)
        folders.append((claim.address, running.setup_folder(tmp_path, claim, "shared")))
    assert folders[0][0] != folders[1][0] and folders[0][1] == folders[1][1]


def test_shares_of_an_array_leave_what_one_command_leaves(tmp_path: Path, commands: Commands) -> None:
    file = write_claims(tmp_path / "claims")
    reproduce(file, tmp_path / "one")
    claim = register(read_claims(file), "better", file)
    order = running.Order((claim,), {"better": 2}, tmp_path / "many", file.parent)
    shared = SharedClaims(file, order)
    order.begin()
    job = order.job(1, shared.publish)
    begin_journal(job.output, job.made_by, job.identity)
    for task in (1, 0):
        ClaimsShare(shared, 2)(task)
    num = len(commands.done)
    ClaimsFinish(shared)(0)
    assert len(commands.done) == num
    assert (tmp_path / "many/results.json").read_bytes() == (tmp_path / "one/results.json").read_bytes()


@pytest.mark.parametrize(("change", "said"), [
    ({"arms": {"new": ["rm -rf /"], "old": ["megatron-sov recipes"]}}, "must begin with one of megatron-sov"),
    ({"arms": {"new": ["megatron-sov recipes {nobody}"], "old": ["megatron-sov recipes"]}}, "nobody"),
    ({"arms": {"other": ["megatron-sov recipes"], "old": ["megatron-sov recipes"]}}, "tests.0.lower"),
    ({"seeds": 1}, "must be above 1"),
    ({"published": {"head": ["model", "loss"], "rows": [["new"]]}}, "must have a cell for each of 2"),
    ({"arms": {"new": ["{map}"], "old": ["megatron-sov recipes"]}}, "arms.old.*takes no {seed}"),
    ({"arms": {"new": ["{map}"], "../old": ["{map}"]}}, "must be a name of small letters"),
    ({"arms": {"new": ["{map}"], "old": ["{map} --output /tmp/x"]}}, "names a place outside"),
    ({"arms": {"new": ["{map}"], "old": ["{map} {claims}/../x"]}}, "names a place outside"),
    ({"arms": {"new": ["{map}"], "old": ["{map} >"]}}, "may have > only before its last word"),
    ({"arms": {"new": ["{map}"], "old": [""]}}, "must begin with one of"),
    ({"measures": {"loss": {"file": "../x.json", "value": "loss", "unit": ""}}}, "below the arm's folder"),
    ({"changes": [{"sha256": "abc", "date": "2026-11-25", "what": "x"}]}, "64 hexadecimal digits"),
    ({"changes": [{"sha256": "a" * 64, "date": "", "what": "x"}]}, "must be a date"),
    ({"tests": [{"measure": "loss", "lower": "old", "higher": "old",
                 "power": {"difference": 1, "sd": 0.1, "source": ""}}]}, "must be another arm")])
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_claims(write_claims(tmp_path / "claims", change))


def test_shipped_claims_are_well_formed_and_one_of_each_is_quick() -> None:
    files = sorted(SHIPPED.glob("*.yaml"))
    assert files
    for file in files:
        claims = read_claims(find_file(file.stem))
        assert claims.seed == file.stem
        assert sum(claim.quick for claim in claims.claims.values()) == 1
        named = re.findall(r"\{claims\}/([\w.]+)", " ".join(claims.commands()))
        assert [name for name in named if not (file.parent / name).is_file()] == []
        for name, claim in claims.claims.items():
            assert register(claims, name, file).sha256 == register(claims, name, file).sha256
            for test in claim.tests:
                assert power_of(test.power.difference, test.power.sd, claim.seeds) > 0.75
    with pytest.raises(UserError, match="did you mean 'k-exaone'"):
        find_file("k-exaon")


def test_power_and_interval_agree_with_scipy() -> None:
    for difference, sd, num in ((0.1, 0.056, 5), (0.05, 0.1, 3), (1.0, 0.5, 8), (0.0, 1.0, 4)):
        effect, quantile = difference / sd * num**0.5, stats.t.ppf(0.975, num - 1)
        assert power_of(difference, sd, num) == pytest.approx(stats.nct.sf(quantile, num - 1, effect),
                                                              abs=2e-4)
    values = [0.3, 0.1, 0.4, 0.15, 0.2]
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert paired_interval(values) == pytest.approx((wanted.low, wanted.high))
    assert paired_interval([1.0]) is None


def test_large_figures_are_told_in_full() -> None:
    assert differences_told([-39132.5, -39132.5]) == "-39,132 (-39,132 to -39,132)"
    assert differences_told([0.25]) == "+0.25" and differences_told([]) == "has not run"
    assert figures_told([1532914.0]) == "1,532,914"


def test_a_figure_is_read_where_a_command_left_it(tmp_path: Path) -> None:
    """Of dicts and of lists, as `eval passk --json` writes."""
    (tmp_path / "eval.json").write_text(json.dumps(
        {"pass_at_k": [{"k": 4, "value": 0.25}, {"k": 8, "value": 0.75}],
         "kinds": {"a": {"n": 1}, "b": {"n": 2}}}))
    for value, wanted in (("pass_at_k/*/value", 0.5), ("pass_at_k/1/value", 0.75), ("kinds/*/n", 1.5),
                          ("kinds/b/n", 2)):
        assert read_figure(tmp_path, Measure("eval.json", value, "")) == wanted
    for value in ("pass_at_k/4", "pass_at_k/-1"):
        with pytest.raises(UserError, match=f"has no '{value}'"):
            read_figure(tmp_path, Measure("eval.json", value, ""))
    for text in ("NaN", "Infinity", "true", '"0.5"', "1" + "0" * 400):
        (tmp_path / "eval.json").write_text(f'{{"loss": {text}}}')
        with pytest.raises(UserError, match=r"must be finite numbers|too large"):
            read_figure(tmp_path, Measure("eval.json", "loss", ""))


def outcomes(claim: PaperClaim, new: Sequence[float]) -> ClaimOutcome:
    found = {seed: {"new": {"loss": value}, "old": {"loss": 2.0}} for seed, value in enumerate(new)}
    return outcome_of([apply_test(test, claim, found) for test in claim.tests])


def test_the_interval_decides_and_too_few_seeds_decide_nothing(tmp_path: Path) -> None:
    claim = read_claims(write_claims(tmp_path / "claims", {"seeds": 3})).claims["better"]
    decide = partial(outcomes, claim)
    assert decide([1.0, 1.1, 1.2]) == ClaimOutcome.HOLDS
    assert decide([3.0, 3.1, 3.2]) == ClaimOutcome.FAILS
    assert decide([1.0, 3.1, 2.2]) == ClaimOutcome.UNDECIDED
    assert decide([1.0, 1.1]) == ClaimOutcome.UNDECIDED
    assert decide([1.0, 1.0, 1.0]) == ClaimOutcome.UNDECIDED  # seeds that draw nothing
    # nor does rounding: 2.3 - 1.3 is 0.9999999999999998
    alike = {seed: {"new": {"loss": 1 + shift}, "old": {"loss": 2 + shift}}
             for seed, shift in enumerate((0, 0.1, 0.3))}
    assert apply_test(claim.tests[0], claim, alike).outcome == ClaimOutcome.UNDECIDED


def test_questions_have_their_answers_and_keep_half_of_the_wordings() -> None:
    for languages in ("en", "ko", "th"):
        learned, kept = (TaskQuestions(seed=0, count=300, languages=languages, wordings=half).do({})
                         for half in ("learned", "held_out"))
        for row in (*learned, *kept):
            a, b = map(int, re.findall(r"\d", row["prompt"]))
            assert row["answer"] == str(a + b if row["domain"] == "sum" else max(a, b))
        assert not {re.sub(r"\d", "#", r["prompt"]) for r in learned} & {
            re.sub(r"\d", "#", r["prompt"]) for r in kept}
    chats = Chats(seed=1, count=2000, right=0.35).do({})
    right = [eval(" + ".join(re.findall(r"\d", asked["content"]))) == int(answer["content"])
             for asked, answer in (row["messages"] for row in chats)
             if re.search(r"plus|Add|Sum|\+", asked["content"])]
    assert 0.3 < sum(right) / len(right) < 0.4
    assert Exact().score({"response": " 7\n", "answer": "7"}) == 1.0


def test_choices_have_their_shares_and_keep_half_of_the_wordings() -> None:
    learned, kept = (Choices(seed=0, count=2000, wordings=half).do({}) for half in ("learned", "held_out"))
    prompts = [{ChoicePrompts().do(row)["prompt"] for row in rows} for rows in (learned, kept)]
    assert not prompts[0] & prompts[1]
    for even, wanted in ((False, 0.5), (True, 1 / 8)):
        said = [row["messages"][1]["content"].split()[0]
                for row in Choices(seed=1, count=4000, even=even).do({})]
        fruits = [word for word in said if word in THINGS["fruit"].split()]
        most = max(fruits.count(word) for word in set(fruits))
        assert most / len(fruits) == pytest.approx(wanted, abs=0.05)


def test_only_right_responses_become_conversations() -> None:
    row = {"prompt": "1 + 1", "response": "2", "reward": 1.0}
    assert RightOnes().do(row) == {"messages": [{"role": "user", "content": "1 + 1"},
                                                {"role": "assistant", "content": "2"}]}
    assert RightOnes().do(row | {"reward": 0.0}) is None


def test_pictures_are_what_their_sentences_say(tmp_path: Path) -> None:
    rows = Pictures(str(tmp_path / "files"), seed=3, count=60).do({})
    again = Pictures(str(tmp_path / "again"), seed=3, count=60).do({})
    assert rows == again
    for number, row in enumerate(rows):
        shown, said = row["content"]
        with Image.open(tmp_path / "files" / shown["path"]) as picture:
            pixels = np.asarray(picture).astype(int)
        assert pixels.shape == (SIDE_PIXELS, SIDE_PIXELS, 3) and shown["path"] == f"{number:05d}.png"
        _, colour, _, _, _, place = said["text"].removesuffix(".").split()
        brightest = pixels.max(axis=2) > 150
        red, green, blue = pixels[brightest].mean(axis=0)
        assert {"red": red > max(green, blue) + 50, "green": green > max(red, blue) + 50,
                "blue": blue > max(red, green) + 50, "white": min(red, green, blue) > 200}[colour]
        y, x = np.argwhere(brightest).mean(axis=0) - (SIDE_PIXELS - 1) / 2
        assert {"left": x < -3, "right": x > 3, "top": y < -3, "bottom": y > 3}[place]


def test_questions_about_pictures_have_their_sentence_as_the_answer(tmp_path: Path) -> None:
    row = Pictures(str(tmp_path / "files"), seed=3, count=1).do({})[0]
    asked, answer = PictureChat().do(row)["messages"]
    assert asked["content"][0] == row["content"][0]
    assert answer == {"role": "assistant", "content": row["content"][1]["text"]}


def test_junk_is_as_much_as_text_and_labels_are_of_other_documents() -> None:
    texts = [f"Document {number} of some words, which says nothing.\n" * 20 for number in range(400)]
    rows = [row for text in texts for row in WithJunk().do({"text": text})]
    labels = [row for text in texts for row in JunkLabels().do({"text": text})]
    assert {row["text"] for row in rows}.isdisjoint(row["text"] for row in labels)
    assert len(rows) + len(labels) == 2 * len(texts)
    assert abs(len(labels) / (2 * len(texts)) - LABELLED_SHARE) < 0.06
    assert [row["label"] for row in labels] == [1, 0] * (len(labels) // 2)
    for text in texts:
        made = junk(text)
        assert made == junk(text) and made not in texts and len(text) <= len(made) + 1 < len(text) + 130


def test_drafts_keep_their_rule_as_ifeval_has_it_and_pairs_are_held_out() -> None:
    kept, broken = ([IfEval().score(row).reward for row in Drafts(seed=1, count=60, kept=share).do({})]
                    for share in (1, 0))
    assert set(kept) == {1.0} and set(broken) == {0.0}
    asked = RulePrompts().do({})
    assert len({row["domain"] for row in asked}) == len(RULES)
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in Drafts(2, 2000, 0.5).do({})}
    row = Drafts(3, 1, 1).do({})[0]
    assert KeptDrafts().do({**row, "reward": 1.0}) == {"messages": row["messages"]}
    assert KeptDrafts().do({**row, "reward": 0.0}) is None


def test_lines_open_what_a_model_writes() -> None:
    assert Openings().do({"text": f"짧은 줄\n  {'가나' * 20}\n"}) == [{"prompt": "가나" * 4}]
    assert Written().do({"prompt": "가나", "response": "다"}) == {"text": "가나다"}
