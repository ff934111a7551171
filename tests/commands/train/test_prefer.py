"""`megatron-sov prefer`: pairs and groups, from a run, with a reference that is made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.commands.train import prefer
from megatron_sov.runs.obs.events import read_events
from tests.typed_words import typed

MODEL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_experts=4",
         'data.phases=[{"name": "main", "seq_len": 128}]', "train.global_batch_size=4",
         "train.micro_batch_size=2", "train.steps=2", "optim.lr=0.004")


def command(name: str, data: Path, run: Path, *more: str) -> list[str]:
    settings = [word for setting in MODEL for word in ("--set", setting)]
    return [name, "tiny-solar-open", "--data", str(data), "--run", str(run), *settings, *more]


@pytest.mark.deep
@pytest.mark.distributed
def test_a_model_learns_from_pairs_and_from_groups(packed_data: Any, run_command: Any, tmp_path: Path,
                                                   capsys) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"{i}, I am sure."})
        for i in range(40)))
    (tmp_path / "judged.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "responses": [{"content": f"{i + 1}.", "reward": 1},
                                                 {"content": f"{i}.", "reward": 0}]}) for i in range(40)))
    pack = ["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1"]
    assert sov_data([*pack, "--format", "preference", "--input", str(tmp_path / "pairs.jsonl"), "--output",
                     str(tmp_path / "pairs")]) == 0
    assert sov_data(["groups", "--input", str(tmp_path / "judged.jsonl"), "--output",
                     str(tmp_path / "judged")]) == 0
    assert sov_data([*pack, "--format", "chat", "--column", "advantage", "--column", "group_share", "--input",
                     str(tmp_path / "judged/groups.jsonl"), "--output", str(tmp_path / "groups")]) == 0
    base, tuned, grouped = (tmp_path / name for name in ("base", "tuned", "grouped"))
    assert run_command(*command("pretrain", packed_data.text, base)).returncode == 0
    done = run_command(*command("prefer", tmp_path / "pairs", tuned, "--from", str(base), "--nproc", "2",
                                "--method", "dpo"))
    assert done.returncode == 0, done.stderr
    events = list(read_events(tuned / "events.jsonl"))
    steps = [e for e in events if e["event"] == "step"]
    assert steps[0]["losses"]["preference"] == pytest.approx(0.693147, abs=1e-5)  # its own reference
    assert set(steps[1]["meters"]) == {"pairs_right", "margin", "chosen_logprob", "rejected_logprob"}
    before, after = [e for e in events if e["event"] == "heldout_pairs"]
    assert (before["step"], before["pairs_right"], before["margin"]) == (0, 0.5, 0.0)
    measured = json.loads((tuned / "complete.json").read_text())["heldout_pairs"]["pairs"]
    assert after["step"] == 2 and measured == {name: after[name] for name in measured}
    assert measured["pairs"] > 0 and set(measured) == {"pairs", "chosen_likelier", "pairs_right", "margin"}
    assert "held-out pairs right 50 % -> " in done.stderr and "held-out margin 0 -> " in done.stderr

    done = run_command("convert", "to-hf", str(tuned), str(tmp_path / "hf"), "--workers", "1")
    assert done.returncode == 0, done.stderr
    for target in (tuned, tmp_path / "hf"):
        done = run_command("eval", "pairs", str(target), "--data", str(tmp_path / "pairs"), "--seq-len",
                           "128", "--output", str(tmp_path / "judged.json"))
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "judged.json").read_text()) == {
            "pairs": {name: measured[name] for name in ("pairs", "chosen_likelier")}}

    done = run_command(*command("prefer", tmp_path / "groups", grouped, "--from", str(base), "--method",
                                "grouper"))
    assert done.returncode == 0, done.stderr
    assert not (grouped / "reference").exists()

    exports = ("--set", "train.export_every_checkpoints=1", "--set", 'evaluate.background.tasks=["ppl"]')
    assert main(command("prefer", tmp_path / "pairs", tmp_path / "no", "--from", str(base), *exports)) == 2
    assert "ppl cannot judge by source 'pairs', which holds data of format 'preference'; ask for pairs" in (
        capsys.readouterr().err)
    refused = command("prefer", packed_data.chats, tmp_path / "no", "--from", str(base))
    assert main(refused) == 2 and "holds data of format 'chat'" in capsys.readouterr().err
    assert main([*refused, "--method", "grouper"]) == 2
    assert "has no column 'advantage'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


WORDS = ["tiny-solar-open", "--from", "base", "--run", "run", "--rounds", "3", "--prompts", "p", "--reward",
         "length", "--reward-set", "max_length=4"]


REWARD = """
from dataclasses import dataclass

@dataclass
class Sum:
    threads: int  # a reward that says so is judged in this process

    def score(self, row):
        return float(sum(map(ord, row["response"])) % 3)
"""


def asked(*more: str) -> Any:
    return prefer.rl_options(typed(prefer.PreferOptions, [*WORDS, *more]))


def test_the_door_asks_for_one_run() -> None:
    found = asked("--samples", "4", "--keep-unfinished", "--resume", "--nproc", "2", "--set",
                  "rollout.temperature=0.5")
    assert (found.run, found.store, found.start_from) == (Path("run"), Path("run/store"), Path("base"))
    assert (found.reward, found.reward_set, found.resume, found.nproc) == (
        "length", ("max_length=4",), True, 2)
    assert {"policy.method=preference", "policy.keep_unfinished=true", "rollout.rounds=3",
            "rollout.samples_per_prompt=4", "rollout.max_new_tokens=512"} <= set(found.settings)
    assert found.settings[-1] == "rollout.temperature=0.5", "what is typed goes before"


@pytest.mark.distributed
def test_rounds_are_one_run_with_one_schedule(teacher: Path, tiny: list[str], run_command: Any, tmp_path: Path
                                              ) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i} plus?"}}\n' for i in range(6)))
    (tmp_path / "own.py").write_text(REWARD)
    run = tmp_path / "run"
    words = ["prefer", "tiny-solar-open", "--from", str(teacher), "--run", str(run), "--rounds", "2",
             "--prompts", str(tmp_path / "prompts.jsonl"), "--reward", f"{tmp_path}/own.py:Sum",
             "--reward-set", "threads=1", "--samples", "3", "--max-new-tokens", "8",
             "--keep-unfinished", *tiny, *(word for setting in (
                 "model.hidden_size=48", "rollout.prompts_per_round=4", "rollout.steps_per_round=2",
                 "rollout.max_prompt_tokens=48", "preference.method=ipo") for word in ("--set", setting))]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    events = [*read_events(run / "events.jsonl")]
    assert sum(e["event"] == "round" for e in events) == 2
    # ipo's loss at the weights that begin a round, which the second step has left: 1 / (2 beta) squared
    steps = [e for e in events if e["event"] == "step"]
    assert [e["loss"] for e in steps if e["step"] % 2] == pytest.approx([25.0] * 2, rel=1e-6)
    assert len({e["lr"] for e in steps}) == len(steps) and (run / "store/rollouts").is_dir()
    again = run_command("resume", str(run), "--reward", f"{tmp_path}/own.py:Sum")
    assert again.returncode == 0 and "complete" in again.stdout + again.stderr, again.stderr


@pytest.mark.parametrize(("words", "said"), [
    (WORDS[:7], "--rounds 3: needs --prompts; add it"),
    ([*WORDS[:10], "lenth"], "did you mean 'length'"),
    ([*WORDS, "--data", "pairs"], "--data pairs: rounds learn from the model's own responses alone"),
    ([*WORDS, "--reference", "base"], "--reference base: rounds compare with the model that begins each"),
    ([*WORDS[:5], "--data", "d", "--reward", "length"], '--reward "length": is only for --rounds; add that'),
    ([*WORDS[:5], "--data", "d", "--keep-unfinished"], "--keep-unfinished: is only for --rounds")])
def test_what_is_wrong_is_said_before_the_first_round(words: list[str], said: str, tmp_path: Path, capsys: Any
                                                      ) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    given = [str(tmp_path / {"p": "p.jsonl"}.get(word, word)) if word in ("p", "run") else word
             for word in words]
    assert main(["prefer", *given]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_own_pairs_beside_rounds_are_refused_with_a_way() -> None:
    with pytest.raises(UserError, match="take no pairs beside them; learn your pairs first, by `prefer` "
                                        "without --rounds, and begin the rounds --from that run"):
        asked("--data", "pairs")
