"""`megatron-sov eval needle`: a checkpoint and its folder are judged alike, over packed text or files."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sov.cli import main
from megatron_sov.obs.events import EVENTS, EventLog, read_events


def test_the_command_judges_checkpoints_and_folders_alike(one_rank: None, imported: dict[str, Path],
                                                          hf_models: dict[str, Path], token_shards: Path,
                                                          tmp_path: Path, capsys) -> None:
    EventLog(tmp_path / EVENTS).close()
    ask = ["--data", str(token_shards), "--lengths", "96", "128", "--depths", "0", "0.9", "--samples", "3",
           "--run", str(tmp_path)]
    shown = []
    for folder in (imported["exaone_moe"], hf_models["exaone_moe"]):
        assert main(["eval", "needle", str(folder), *ask, "--kinds", "single", "multi-value", "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert ({(c["kind"], c["length_tokens"], c["depth"], c["samples"]) for c in shown[0]["cells"]}
            == {(kind, length, depth, 3) for kind in ("single", "multi-value") for length in (96, 128)
                for depth in (0.0, 0.9)})
    events = list(read_events(tmp_path / EVENTS))
    assert [(e["event"], e["when"], e["step"], e["cells"]) for e in events] \
        == [("needle", "eval", step, shown[0]["cells"]) for step in (0, None)]
    for more, sentence in (
        (["--nproc", "2", "--set", "a=1"], "--set a=1, --nproc 2: is for checkpoints, and"),
        (["--text", "latin=x"], "--text latin=x: must be LANGUAGE=FILE"),
        (["--language", "first=perl"], "--language first=perl: must be SOURCE=LANGUAGE"),
    ):
        assert main(["eval", "needle", str(hf_models["exaone_moe"]), *ask, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["eval", "needle", str(hf_models["exaone_moe"])]) == 2
    assert "pass --data DIR or --text LANGUAGE=FILE" in capsys.readouterr().err


def test_text_files_serve_without_data(hf_models: dict[str, Path], tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("The clocks were striking thirteen.\n" * 50)
    (tmp_path / "b.txt").write_text("모든 권력은 국민으로부터 나온다.\n" * 50, encoding="utf-8")
    assert main(["eval", "needle", str(hf_models["solar_open"]), "--text", f"english={tmp_path / 'a.txt'}",
                 "--text", f"korean={tmp_path / 'b.txt'}", "--lengths", "200", "--depths", "0.5", "--samples",
                 "2", "--seed", "4", "--by", "likelihood", "--distractor-share", "0.4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["by"], shown["seed"], shown["distractor_share"]) == ("likelihood", 4, 0.4)
    assert [(c["kind"], c["language"], c["samples"]) for c in shown["cells"]] \
        == [("multi-key", "english", 2), ("multi-key", "korean", 2)]
