"""`megatron-sov report`: where it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.cli import main


def test_the_command_writes_into_the_last_run(runs: list[Path], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, runs)]) == 0
    assert "All stages" in (runs[1] / "report.html").read_text(encoding="utf-8")
    assert str(runs[1] / "report.html") in capsys.readouterr().out
    out = tmp_path / "new" / "one.html"
    assert main(["report", str(runs[0]), "--output", str(out)]) == 0
    assert "All stages" not in out.read_text(encoding="utf-8")
    assert [p.name for p in out.parent.iterdir()] == ["one.html"]


def test_mistakes_end_with_one_sentence(runs: list[Path], tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--output", str(tmp_path)]) == 2
    assert "is a folder; name the file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_an_export_is_refused_and_nothing_is_written(tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no events.jsonl, so it is no run folder" in capsys.readouterr().err
    (tmp_path / "model.safetensors").touch()
    assert main(["report", str(tmp_path)]) == 2
    assert "is a Hugging Face folder, not a run; `megatron-sov convert from-hf`" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
