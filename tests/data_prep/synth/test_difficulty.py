"""`sov-data difficulty`: labels from several models, a scorer trained on the labels, and graded rows."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).parent))
from planted_rates import CONFIGURATIONS, draw_problem, write, write_measurements

from data_prep.cli import main
from data_prep.curate.scoring.scorer import load_scorer
from data_prep.synth.difficulty import MAX_LABEL, append_form_words
from megatron_sov.base.artifacts import read_manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with measured pass rates of 400 problems, labels of them, and a scorer trained on the
    labels."""
    folder = tmp_path_factory.mktemp("difficulty")
    words = write_measurements(folder, 400, num_pairs=300)
    assert main(["difficulty", "label", *words, "--output", str(folder / "labels")]) == 0
    assert main(["scorer", "train", "--kind", "regressor", "--labels", str(folder / "labels/labels.jsonl"),
                 "--output", str(folder / "model")]) == 0
    return folder


def test_labels_are_mean_pass_rates_and_record_agreement(trained: Path) -> None:
    content = read_manifest(trained / "labels").content
    assert content["num_problems"] == 400 and list(content["configurations"]) == ["small", "middle", "large"]
    rates = [content["configurations"][name]["pass_rate"] for name in ("small", "middle", "large")]
    assert rates == sorted(rates) and content["judge_agrees"] > 0.9
    first = json.loads((trained / "labels/labels.jsonl").read_text(encoding="utf-8").splitlines()[0])
    shares = [right / count for right, count in first["answers"].values()]
    assert first["pass_rate"] == pytest.approx(sum(shares) / 3)
    assert 0 <= first["label"] <= MAX_LABEL and first["text"].startswith(first["problem"])


def test_predicted_pass_rates_of_new_problems_are_accurate_in_both_languages(trained: Path) -> None:
    """Compare with the pass rates from which the measurements were drawn, on problems of another seed."""
    scorer = load_scorer(trained / "model")
    rng = random.Random(99)
    drawn = [draw_problem(rng) for _ in range(300)]
    for problems in ([d for d in drawn if "What" in d[0]], [d for d in drawn if "What" not in d[0]]):
        predicted = np.array([1 - scorer.score(append_form_words(text)) / MAX_LABEL for text, _ in problems])
        true_rates = np.array([
            np.mean([1 / (1 + np.exp(-logit - ability)) for ability in CONFIGURATIONS.values()])
            for _, logit in problems])
        assert spearmanr(predicted, true_rates).statistic > 0.95
        assert np.abs(predicted - true_rates).mean() < 0.06


def test_rows_are_graded_and_filtered_by_pass_rate(trained: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    measured = json.loads((trained / "labels/labels.jsonl").read_text(encoding="utf-8").splitlines()[0])
    rows = [{"prompt": "What is 1 plus 2?", "answer": "3"}, {"prompt": "What is 9876 times 5432 times 9999?"},
            {"messages": [{"role": "user", "content": measured["problem"]},
                          {"role": "assistant", "content": "?"}]}]
    file = write(tmp_path / "rows.txt", rows)
    command = ["difficulty", "grade", "--input", str(file), "--model", str(trained / "model"), "--labels",
               str(trained / "labels")]
    assert main([*command, "--output", str(tmp_path / "all")]) == 0
    graded = [json.loads(line) for line in (tmp_path / "all/rows.jsonl").read_text().splitlines()]
    assert [row["bucket"] for row in graded[:2]] == ["easy", "hard"] and graded[0]["answer"] == "3"
    assert graded[2]["pass_rate"] == measured["pass_rate"] and graded[2]["difficulty_from"] == "measured"
    assert all(row["difficulty"] == 1 - row["pass_rate"] for row in graded)
    assert main([*command, "--keep", "0.0:0.5", "--output", str(tmp_path / "some")]) == 0
    filtered = [json.loads(line) for line in (tmp_path / "some/rows.jsonl").read_text().splitlines()]
    assert filtered == [row for row in graded if row["pass_rate"] <= 0.5]
    assert f"kept band of pass rates: 0 to 0.5, {len(filtered)} rows" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["label", "--answers", "@rows", "--output", "@out"], "is no measurement of `sov-data synth answers`"),
    (["label", "--answers", "@middle", "@middle", "--output", "@out"], "2 configurations are called middle"),
    (["label", "--answers", "@middle", "--comparisons", "@rows", "--output", "@out"], "is no pair of"),
    (["grade", "--input", "@rows", "--output", "@out"], "names neither --model nor --labels"),
    (["grade", "--input", "@rows", "--labels", "@labels", "--output", "@out"], "was not measured"),
    (["grade", "--input", "@rows", "--model", "@model", "--keep", "0.9:0.1", "--output", "@out"],
     "--keep 0.9:0.1: must be two shares from 0 to 1, the lower one first"),
    (["grade", "--input", "@rows", "--model", "@labels", "--output", "@out"], "difficulty_labels"),
    (["grade", "--input", "@rows", "--model", "@model", "--keep", "1:1", "--output", "@out"], "no row is in"),
])
def test_mistakes_give_one_sentence_and_no_output(words: list[str], message: str, trained: Path,
                                                  tmp_path: Path, get_refusal: Any) -> None:
    """Words with @ are places: the rows, the output, or an entry of the folder `trained`."""
    write(tmp_path / "rows.jsonl", [{"prompt": "What is 977 times 3 times 88?"}])
    places = {"@rows": tmp_path / "rows.jsonl", "@out": tmp_path / "out"}
    argv = [str(places.get(word, trained / word[1:])) if word.startswith("@") else word for word in words]
    assert message in get_refusal("difficulty", *argv)
    assert not (tmp_path / "out").exists()
