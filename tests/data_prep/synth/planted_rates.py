"""Problems whose pass rates follow from their form (English and Korean), and files of measured pass rates."""

import json
import math
import random
from pathlib import Path

CONFIGURATIONS = {"small": -1.5, "middle": 0.0, "large": 1.5}
"""Name -> ability, added to a logit."""


def draw_problem(rng: random.Random) -> tuple[str, float]:
    """Return a sum or a product of two to four numbers, and the logit of its pass rate."""
    count, digits, product = rng.randint(2, 4), rng.randint(1, 4), rng.random() < 0.4
    numbers = [str(rng.randrange(10 ** (digits - 1), 10 ** digits)) for _ in range(count)]
    expression = (" times " if product else " plus ").join(numbers)
    text = f"What is {expression}?"
    if rng.random() < 0.5:
        text = f"{(' 곱하기 ' if product else ' 더하기 ').join(numbers)}는 얼마인가?"
    return text, 6.0 - 1.1 * count - 0.9 * digits - 1.2 * product


def write_measurements(folder: Path, num_problems: int, *, num_pairs: int = 0) -> list[str]:
    """Write what `synth answers` and `synth comparisons` write; return arguments of `difficulty label`."""
    rng = random.Random(0)
    problems = [draw_problem(rng) for _ in range(num_problems)]
    words = ["--answers"]
    for name, ability in CONFIGURATIONS.items():
        (folder / name).mkdir(parents=True)
        rows = []
        for number, (text, logit) in enumerate(problems):
            rate = 1 / (1 + math.exp(-logit - ability))
            rows.append({"prompt": text, "problem_id": f"p{number}", "num_answers": 8,
                         "num_right": sum(rng.random() < rate for _ in range(8))})
        write(folder / name / "kept.jsonl", rows)
        words.append(str(folder / name))
    if num_pairs:
        pairs = []
        for _ in range(num_pairs):
            one, other = sorted(rng.sample(range(num_problems), 2), key=lambda i: -problems[i][1])
            pairs.append({"easier": f"p{one}", "harder": f"p{other}"})
        write(folder / "pairs.jsonl", pairs)
        words += ["--comparisons", str(folder / "pairs.jsonl")]
    return words


def write(file: Path, rows: list[dict[str, object]]) -> Path:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file
