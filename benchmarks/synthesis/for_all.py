"""Planted conversations for the checks that all samples go through: 60 that only these can know to be bad,
and 50 good ones that resemble them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthesis.written_runs import fates, write_run

from data_prep.synth.checks.settings import CheckSettings

NUM_OF_EACH = 10
THINGS = ("lamp", "river", "kettle", "violin", "ladder", "orchard", "compass", "harbour", "blanket", "engine",
          "mirror", "garden", "bridge", "candle", "market", "saddle", "window", "anchor", "bottle", "carpet")
VERBS = ("repairs", "paints", "counts", "hides", "describes", "borrows", "weighs", "sells", "cleans", "moves")
KOREAN = ("등대지기는 매일 아침 바다의 높이를 적는다.", "장인은 겨울마다 가마에 자작나무를 땐다.",
          "다리 위에서 아이들이 지나가는 배를 센다.", "시장은 해가 뜨기 전에 문을 연다.")


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """Return a conversation."""
    return {"messages": [*more.get("before", []), {"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def story(draw: random.Random, length: int = 60) -> str:
    """Return sentences that nobody else has."""
    return " ".join(f"The {draw.choice(THINGS)} that {draw.choice(['Mina', 'Joon', 'Sora', 'Anan'])} "
                    f"{draw.choice(VERBS)} stands behind {draw.randrange(10_000)} {draw.choice(THINGS)}s."
                    for _ in range(length // 9))


def bad(number: int, benchmark: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is wrong and a conversation, five ways for each number."""
    draw = random.Random(f"bad {number}")
    leaked = benchmark[number]
    yield "an item of a benchmark", chat(f"Tell me: {leaked.upper()}", story(draw))
    yield "the same in a system turn", chat("And now?", story(draw),
                                            before=[{"role": "system", "content": f"Know: {leaked}"}])
    yield "a loop", chat(story(draw), f"{story(draw, 18)} " * 12)
    yield "another language", chat(story(draw), " ".join(draw.choice(KOREAN) for _ in range(6)))
    yield "a record that no command takes", draw.choice([
        {"messages": [{"role": "user", "content": story(draw)}]}, chat(story(draw), " "),
        {"messages": [{"role": "tool", "content": "a result"}, *chat("Q", "A")["messages"]]},
        chat(story(draw), "half of a pair \ud800")])


def good(number: int, benchmark: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what it resembles and a conversation, five for each number."""
    draw = random.Random(f"good {number}")
    words = benchmark[number].split()
    draw.shuffle(words)
    yield "the words of a benchmark in another order", chat(" ".join(words), story(draw))
    yield "a short answer that others have too", chat(story(draw), "Yes.")
    yield "a list with many alike lines", chat(story(draw), "\n".join(
        f"- the {draw.choice(THINGS)}: {draw.randrange(1000)}" for _ in range(12)))
    yield "a sentence in another language within", chat(
        story(draw), f"{story(draw)} {KOREAN[0]} {story(draw)}")
    yield "the same question with another solution", chat("Why does the harbour freeze in some winters?",
                                                          story(draw))


def copies(kept: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield conversations again: as they are, and with a few words changed."""
    for number, record in enumerate(kept[1::5][:NUM_OF_EACH]):
        answer = record["messages"][-1]["content"]
        question = record["messages"][-2]["content"]
        if number % 2:
            question = question.replace("The ", "Once the ", 1)
        yield "a copy", chat(question, answer)


def row_for_all(folder: Path) -> str:
    """Return the line of these samples."""
    draw = random.Random("benchmark")
    benchmark = [story(draw, 27) for _ in range(NUM_OF_EACH)]
    folder.mkdir(exist_ok=True)
    (folder / "benchmark.jsonl").write_text("".join(
        f"{json.dumps({'question': one})}\n" for one in benchmark))
    fine = [one for number in range(NUM_OF_EACH) for one in good(number, benchmark)]
    wrong = [one for number in range(NUM_OF_EACH) for one in bad(number, benchmark)]
    wrong = [*wrong, *copies([record for _, record in fine])]
    output = folder / "for-all"
    write_run(output, "planted", "chat", [[{"record": record}] for _, record in [*fine, *wrong]])
    fate = fates(output, CheckSettings(benchmarks=(folder / "benchmark.jsonl",), languages=("en",)))
    kept = {number for number, reason in fate.items() if not reason}
    caught = sum(number not in kept for number in range(len(fine), len(fine) + len(wrong)))
    lost = sum(number not in kept for number in range(len(fine)))
    told = [f"    {'kept' if number in kept else 'rejected'}: {what}"
            for number, (what, _) in enumerate([*fine, *wrong]) if (number in kept) != (number < len(fine))]
    return "\n".join([f"{'(checks for all)':<18} {'-':>9} {'-':>8} {f'{caught}/{len(wrong)}':>8} {'-':>9} "
                      f"{f'{lost}/{len(fine)}':>8}", *told])
