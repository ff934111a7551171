"""`megatron-sov ladder` with runs that are only written: what is trained, fitted, predicted, refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov import cli
from megatron_sov.base.errors import UserError
from megatron_sov.runs.obs.events import EventLog
from megatron_sov.train.data import token_shards
from megatron_sov.work.processes import children as run_commands

SIZES = "12K,24K,48K,96K"
ALWAYS = ["tiny-solar-open", "--tokens-per-param", "5", "--set", "train.global_batch_size=8", "--set",
          'data.phases=[{"name": "main", "seq_len": 64}]']


class Trained:
    """Stands for the processes of runs: each leaves what a complete run leaves, with the loss of a law."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.code_at: dict[str, int] = {}
        """Run -> exit code that it ends with instead."""
        self.packed_heldout_tokens = self.heldout_tokens = 100
        self.offset, self.exponent = 0.0, -0.25

    def __call__(self, argv: list[str], go_on_by: str) -> int:
        self.commands.append(argv)
        folder = Path(argv[argv.index("--run") + 1])
        settings = json.loads(Path(argv[argv.index("--config") + 1]).read_text())
        if folder.name in self.code_at or "submit" in argv:
            return self.code_at.get(folder.name, 0)
        folder.mkdir()
        tokens = settings["train"]["tokens"]
        loss = 1.5 + 30 * tokens**self.exponent + self.offset
        if self.exponent > 0:  # it falls faster and faster
            loss = 8 - tokens**self.exponent
        log = EventLog(folder / "events.jsonl")
        log.write("eval", step=9, heldout={"web": {"loss": loss - 0.2, "tokens": self.heldout_tokens},
                                           "code": {"loss": loss + 0.2, "tokens": self.heldout_tokens}})
        log.close()
        (folder / "complete.json").write_text("{}")
        return 0


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """What trains in the place of processes."""
    found = Trained()
    monkeypatch.setattr(run_commands, "run_command", found)
    monkeypatch.setattr(token_shards, "open_sources", lambda paths, vocab_size: [
        SimpleNamespace(num_tokens={"train": 10**6, "heldout": found.packed_heldout_tokens})])
    return found


def ladder(folder: Path, *more: str, sizes: str = SIZES) -> int:
    (shards := folder.parent / "shards").mkdir(exist_ok=True)
    return cli.run_command(["ladder", *ALWAYS, "--sizes", sizes, "--data", str(shards), "--run",
                            str(folder), *more], 0.0)


def names(trained: Trained) -> list[str]:
    return [Path(argv[argv.index("--run") + 1]).name for argv in trained.commands]


def test_runs_are_trained_a_law_is_fitted_and_the_next_size_predicted(
        trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ladder"
    assert ladder(folder) == 0
    assert names(trained) == ["12K", "24K", "48K", "96K"]
    assert trained.commands[0][:2] == ["megatron_sov", "pretrain"] and "--resume" in trained.commands[0]
    found = json.loads((folder / "ladder.json").read_text())
    (told,) = found["predictions"]
    assert (told["name"], told["measured"]) == ("192K", None)
    true = 1.5 + 30 * told["num_tokens"]**-0.25
    assert told["predicted"]["low"] < true < told["predicted"]["high"]
    assert told["predicted"]["loss"] == pytest.approx(true, rel=0.003)
    out = capsys.readouterr().out
    assert "E + A N^-a" in out and "192K" in out and f"{folder}/ladder.html" in out
    page = (folder / "ladder.html").read_text()
    assert "Scaling ladder" in page and "192K" in page


def test_the_prediction_stands_before_its_run_and_beside_its_loss(trained: Trained, tmp_path: Path) -> None:
    ladder(tmp_path / "a")
    before = json.loads((tmp_path / "a/ladder.json").read_text())["predictions"][0]
    trained.offset = 0.5
    assert ladder(tmp_path / "a", "--verify") == 0
    assert names(trained)[4:] == ["192K"], "what is complete is not trained again"
    after = json.loads((tmp_path / "a/ladder.json").read_text())["predictions"][0]
    assert (after["predicted"], after["made_s"]) == (before["predicted"], before["made_s"])
    assert after["inside"] is False and after["error"] == pytest.approx(
        after["predicted"]["loss"] / after["measured"] - 1) and after["error"] < -0.1
    assert "outside" in (tmp_path / "a/ladder.html").read_text()


def test_runs_too_small_for_the_law_are_said_to_be(trained: Trained, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    trained.exponent = 0.1
    assert ladder(tmp_path / "a", "--verify") == 0
    said = capsys.readouterr()
    assert "not in its regime yet" in said.err and "(no interval)" in said.out
    found = json.loads((tmp_path / "a/ladder.json").read_text())
    (told,) = found["predictions"]
    assert found["law"]["in_regime"] is False and told["predicted"]["low"] is None and told["inside"] is None
    page = (tmp_path / "a/ladder.html").read_text()
    assert "not in its regime yet" in page and "interval of the law" not in page


def test_a_ladder_that_was_stopped_goes_on(trained: Trained, tmp_path: Path) -> None:
    trained.code_at = {"48K": 75}
    assert ladder(tmp_path / "a") == 75
    assert names(trained) == ["12K", "24K", "48K"] and not (tmp_path / "a/ladder.json").exists()
    trained.code_at = {}
    assert ladder(tmp_path / "a") == 0
    assert names(trained)[3:] == ["48K", "96K"]


def test_runs_are_submitted_and_fitted_later(trained: Trained, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder(tmp_path / "a", "--submit", "local", "--nodes", "2") == 0
    assert trained.commands[0][:6] == ["megatron_sov", "submit", "pretrain", "--cluster", "local", "--nodes"]
    assert "12K, 24K, 48K, 96K train on the cluster" in capsys.readouterr().out
    assert ladder(tmp_path / "b", "--submit", "h100", "--account", "mine") == 0
    command = trained.commands[-1]
    assert command[command.index("--account") + 1] == "mine"


def test_a_dry_run_prints_the_models_and_writes_nothing(trained: Trained, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder(tmp_path / "a", "--dry-run", "--predict", "400K") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:6]] == ["12K", "24K", "48K", "96K", "400K"]
    assert not (tmp_path / "a").exists() and trained.commands == []


def test_another_ladder_in_the_folder_is_refused(trained: Trained, tmp_path: Path) -> None:
    ladder(tmp_path / "a")
    with pytest.raises(UserError, match=r"12K\.json: the ladder in this folder was started with other"):
        ladder(tmp_path / "a", "--set", "optim.lr=1e-3")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no ladder"):
        ladder(tmp_path / "b")
    with pytest.raises(UserError, match="is a file"):
        ladder(tmp_path / "b/thesis.tex")
    (tmp_path / "a/ladder.json").write_text("{")
    with pytest.raises(UserError, match=r"ladder\.json: is damaged"):
        ladder(tmp_path / "a")


def test_runs_without_held_out_text_are_named(trained: Trained, tmp_path: Path) -> None:
    trained.heldout_tokens = 0
    with pytest.raises(UserError, match="has no held-out loss; pack the data with --heldout"):
        ladder(tmp_path / "a")


def test_data_that_do_not_suffice_are_told_of_before(trained: Trained, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder(tmp_path / "a", "--predict", "400K") == 0
    assert "shards: holds 1 M tokens, and the largest run learns from " in capsys.readouterr().err
    trained.packed_heldout_tokens = 0
    with pytest.raises(UserError, match="holds no held-out text, by whose loss models are compared"):
        ladder(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_losses_that_rise_are_named(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    call = Trained.__call__

    def worse(self: Trained, argv: list[str], go_on_by: str) -> int:
        self.offset += 1.0
        return call(self, argv, go_on_by)

    monkeypatch.setattr(Trained, "__call__", worse)
    with pytest.raises(UserError, match="do not fall with size"):
        ladder(tmp_path / "a")


@pytest.mark.parametrize(("more", "said"), [
    (["--sizes", "1M,2M"], "makes 2 runs, and a law needs 4 at least"),
    (["--sizes", "1M,2M,x"], "'x': must be a number of parameters"),
    (["--tokens-per-param", "0"], "--tokens-per-param '0': must be numbers above 0"),
    (["--tokens-per-param", "5,5"], "each once"),
    (["--tokens-per-param", "nan"], "must be numbers above 0"),
    (["--predict", "24K"], "--predict 24K: is one of --sizes"),
    (["--set", "train.tokens=5"], "a ladder makes train.tokens itself"),
    (["--set", "train.tokns=5"], "did you mean"),
    (["--submit", "nowhere"], "nowhere"),
    (["--submit", "h100"], "account: is missing; pass --account NAME"),
    (["--account", "mine"], "--account mine: is for --submit"),
    (["--set", "parallel.tp=3"], "size 12K: "),
    (["--sizes", "12K,12.001K,12.002K,12.003K"], "some give the same model or name")])
def test_mistakes_are_one_sentence_before_anything_is_trained(
        more: list[str], said: str, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")) as e:
        ladder(tmp_path / "a", *more)
    assert "Traceback" not in str(e.value) and trained.commands == [] and not (tmp_path / "a").exists()


def test_other_objectives_and_missing_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a ladder is of pretraining"):
        cli.run_command(["ladder", "tiny-vibethinker-code", "--sizes", SIZES, "--run", str(tmp_path / "a"),
                         "--dry-run"], 0.0)
    with pytest.raises(UserError, match="--data: is missing"):
        cli.run_command(["ladder", *ALWAYS, "--sizes", SIZES, "--run", str(tmp_path / "a")], 0.0)
