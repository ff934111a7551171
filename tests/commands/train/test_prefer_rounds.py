"""`megatron-sov prefer --rounds`: five commands a round, each done once, however often all is killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.base import command_line
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.runs.obs.events import read_events

SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_experts=4",
            'data.phases=[{"name": "main", "seq_len": 256}]', "train.global_batch_size=4",
            "train.micro_batch_size=2", "train.steps=2", "train.eval_every_steps=0", "optim.lr=1e-2")
REWARD = """
from dataclasses import dataclass

@dataclass
class Shorter:
    threads: int  # a reward that says so is judged in this process

    def score(self, row):
        return -len(row["response"])
"""
ROUND = ["generate", "score", "pairs", "pack", "prefer"]


def words(*settings: str) -> list[str]:
    return [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]


def killed_rounds(argv: list[str], done: str, kills: list[int]) -> list[int]:
    """Runs in a process that has imported everything, where commands are forks and not new processes; each of
    the first ones of `megatron-sov` is killed when so many of its own commands are done."""
    import data_prep.cli
    from megatron_sov.commands.train import prefer
    from megatron_sov.engine.parallel.world import STORE_PORT

    mains = {"megatron_sov": main, "data_prep.cli": data_prep.cli.main}

    def forked(program: str, argv: list[str]) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", STORE_PORT):
                    os.environ.pop(variable, None)  # it is no rank
                code = mains[program](argv)
            except SystemExit as e:
                code = int(e.code or 0)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def run_job(argv: list[str], go_on_by: str) -> int:
        code = forked(argv[0], argv[1:])
        with open(done, "a") as f:
            f.write(f"{argv[1]} ")
        if len(Path(done).read_text().split()) in kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return code

    prefer.run_command = run_job
    return [forked("megatron_sov", argv) for _ in range(len(kills) + 1)]


@pytest.mark.distributed
def test_rounds_that_are_killed_between_their_commands_do_each_of_them_once(
        ranks: Any, job: Any, packed_data: Any, run_command: Any, tmp_path: Path, capsys) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    done = run_command("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run", str(base),
                       *words())
    assert done.returncode == 0, done.stderr
    (tmp_path / "prompts.jsonl").write_text("\n".join(
        json.dumps({"prompt": f"{i} plus 1?", "answer": i + 1}) for i in range(8)))
    (tmp_path / "shorter.py").write_text(REWARD)
    command = ["prefer", "tiny-solar-open", "--from", str(base), "--run", str(run), "--rounds", "2",
               "--prompts", str(tmp_path / "prompts.jsonl"), "--tokenizer", str(packed_data.tokenizer),
               "--samples", "4", "--max-new-tokens", "12", "--reward", f"{tmp_path}/shorter.py:Shorter",
               "--reward-set", "threads=1", "--keep-unfinished", *words(), "--resume"]
    ((codes,),) = ranks(job(__file__, "killed_rounds", 1,
                            {"argv": command, "done": str(tmp_path / "done"), "kills": [1, 4, 5, 8]}))
    assert codes == [-signal.SIGKILL] * 4 + [0]
    assert (tmp_path / "done").read_text().split() == ROUND * 2

    first, second = run / "rounds/01", run / "rounds/02"
    rows = [[json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
            for folder in (first, second)]
    assert [len(found) for found in rows] == [32, 32] and rows[0][5]["answer"] == 2
    assert [r["response"] for r in rows[0]] != [r["response"] for r in rows[1]], "the model is another one"
    counted = read_manifest(second / "judged", "corpus").content["groups"]
    assert counted["num_unfinished"] > 0 == counted["num_passed_over"], "few end within 12 tokens"
    for pair in map(json.loads, (second / "judged/pairs.jsonl").read_text().splitlines()):
        better, worse = ({r["reward"] for r in rows[1] if r["response"] == pair[side][0]["content"]}
                         for side in ("chosen", "rejected"))
        assert max(better) > min(worse)  # the shorter one
    before, after = (json.loads((folder / "reference/reference.json").read_text()) for folder in (
        first / "run", run))
    assert before["reference_sha256"] != after["reference_sha256"], "each round's is what it starts from"
    assert json.loads((run / "complete.json").read_text())["step"] == 2
    seeds = [json.loads((folder / "config.json").read_text())["train"]["seed"] for folder in (
        first / "run", run)]
    assert seeds[1] == seeds[0] + 1, "another part of the data beside in each round"

    # the same reference for all rounds, as a model that is not the one which is trained
    again = ["prefer", "tiny-solar-open", "--data", str(second / "packed"), *words("train.steps=1")]
    for name, start, more in (("fixed", first / "run", ("--reference", str(base))), ("own", base, ())):
        done = run_command(*again, "--from", str(start), "--run", str(tmp_path / name), *more)
        assert done.returncode == 0, done.stderr
    fixed, own = ({f.name: f.read_bytes() for f in (tmp_path / name / "reference").iterdir()}
                  for name in ("fixed", "own"))
    assert fixed == own and len(fixed) == 2
    losses = {name: next(e["loss"] for e in read_events(tmp_path / name / "events.jsonl")
                         if e["event"] == "step") for name in ("fixed", "own")}
    assert losses["own"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(losses["fixed"] - losses["own"]) > 1e-4, "the model has left its first reference"

    assert main([*command[:-1]]) == 2 and "already holds rounds; pass --resume" in capsys.readouterr().err
    assert main([*command, "--samples", "8"]) == 2
    assert "its rounds were begun with samples = 4, now it is 8; resume with" in capsys.readouterr().err


def test_a_result_that_changed_between_two_commands_is_not_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first two commands of a round leave are plain files, of which nothing else says anything."""
    from megatron_sov.commands.train import prefer

    folder = tmp_path / "rounds/01"
    folder.mkdir(parents=True)
    jobs = [prefer.RoundJob(folder / name, ["x", name])
            for name in ("responses.jsonl", "scored.jsonl", "judged.jsonl")]
    monkeypatch.setattr(prefer, "_checked", lambda args: (None, "1"))
    monkeypatch.setattr(prefer, "_enter", lambda *_: None)
    monkeypatch.setattr(prefer, "jobs_of", lambda *_: iter(jobs))
    done: list[str] = []

    def command(argv: list[str], go_on_by: str) -> int:
        if argv[1] == stops_at:
            return 75
        (folder / argv[1]).write_text(f"{argv[1]} of {len(done) if argv[1] == 'responses.jsonl' else 'x'}\n")
        done.append(argv[1])
        return 0

    monkeypatch.setattr(prefer, "run_command", command)
    args: Any = SimpleNamespace(rounds=1, num_rounds=1, run=tmp_path)
    stops_at = "scored.jsonl"
    assert prefer.run_rounds(args) == 75
    whole = (folder / "responses.jsonl").read_bytes()
    (folder / "responses.jsonl").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match=r"responses.jsonl: is not what its command wrote .* or delete it"):
        prefer.run_rounds(args)
    (folder / "responses.jsonl").unlink()
    stops_at = ""
    assert prefer.run_rounds(args) == 0
    assert done == ["responses.jsonl", "responses.jsonl", "scored.jsonl", "judged.jsonl"]
    (folder / "responses.jsonl").write_text("nobody reads it any more")
    assert prefer.run_rounds(args) == 0 and len(done) == 4


@pytest.mark.parametrize(("more", "said"), [
    ((), "--rounds 2: needs --prompts; add it"),
    (("--prompts", "{prompts}", "--reward", "lenth", "--tokenizer", "t"), "did you mean 'length'"),
    (("--prompts", "{prompts}", "--reward", "length", "--tokenizer", "t", "--reward-set", "unit=miles"),
     'unit = "miles"')])
def test_what_is_wrong_is_said_before_the_first_round(more: tuple[str, ...], said: str, tmp_path: Path,
                                                      capsys) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}')
    given = [word.format(prompts=tmp_path / "prompts.jsonl") for word in more]
    assert main(["prefer", "tiny-solar-open", "--from", "none", "--run", str(tmp_path / "run"), "--rounds",
                 "2", *given]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_rounds_want_the_part_that_their_later_commands_are_in(tmp_path: Path, capsys,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "is_installed", lambda module: not module.startswith("data_prep"))
    assert main(["prefer", "tiny-solar-open", "--from", "none", "--run", str(tmp_path / "run"), "--rounds",
                 "2", "--prompts", "none", "--reward", "length", "--tokenizer", "t"]) == 2
    assert "this needs the part 'data'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_prompt_is_learned_as_it_was_asked(tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "b", "tools": []}\n{"prompt": "a", "tools": [{}]}')
    assert main(["prefer", "tiny-solar-open", "--from", "none", "--run", str(tmp_path / "run"), "--rounds",
                 "2", "--prompts", str(tmp_path / "prompts.jsonl"), "--reward", "length", "--tokenizer",
                 "t"]) == 2
    assert "prompt 'a' has 'tools', and rounds ask each prompt as a user" in capsys.readouterr().err


def test_what_rounds_are_given_goes_with_rounds(tmp_path: Path, capsys) -> None:
    assert main(["prefer", "tiny-solar-open", "--from", "none", "--run", str(tmp_path / "run"), "--data", "d",
                 "--reward", "length"]) == 2
    assert '--reward "length": is only for --rounds; add that, or leave this out' in capsys.readouterr().err
    assert main(["prefer", "tiny-solar-open", "--from", "none", "--run", str(tmp_path / "run"), "--data", "d",
                 "--keep-unfinished"]) == 2
    assert "--keep-unfinished: is only for --rounds" in capsys.readouterr().err
