"""Which planted faults the numeric tests catch, that train layouts by several processes.

Usage: python benchmarks/faults_in_tests.py > FOUND.jsonl
       python benchmarks/faults_in_tests.py table FOUND.jsonl

Of each kind of `planted_faults` one or two are planted in a copy of the repository, in all processes of the
one or two tests that are nearest to it, and in `plan --prove`.  What is caught where is a line of JSON each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 150
"""Of one test: a fault may have processes wait for ever."""
_BOTH = "torch.distributed.all_reduce(both, group=group)"
OF_MESSAGES = (
    ("a message left out", "megatron_sov.engine.model.chunked_head:_chunk", _BOTH, "pass"),
    ("a message over another group", "megatron_sov.engine.model.chunked_head:_chunk", _BOTH,
     "torch.distributed.all_reduce(both)"))
"""Kind, function, its text and another one: some of what `layout_proofs` does to messages, as text."""
STAGES, CUT, SFT, PAIRS, KTO, TEACHER = "deepseek_v3 sft", "solar_open2", "sft", "pairs", "kto", "teacher"
NEAREST = {"clipped in part": (CUT, STAGES), "norm of a part": (CUT, STAGES),
           "layers of another stage": (STAGES,), "labels of another rank": (PAIRS,),
           "counted twice over a cut row": (PAIRS,), "norm not summed under SP": (STAGES, CUT),
           "wrong denominator": (SFT, CUT), "rows of another rank": (SFT,), "losses not summed": (SFT,),
           "optimizer's shard shifted": (CUT,), "tokens of another place": (CUT, SFT)}
"""Kind -> cases of the tests that are nearest; others: context parallelism, then stages."""


def chosen() -> list[tuple[Any, tuple[str, ...]]]:
    """Return faults, and the tests that each is planted in."""
    from planted_faults import PAIRS as OF_PAIRS, SOURCE_FAULTS, ZERO, SourceFault

    found: dict[tuple[str, str], tuple[Any, tuple[str, ...]]] = {}
    for fault in SOURCE_FAULTS:
        name = fault.function.rpartition(":")[2]
        of_teacher = "divergence" in fault.function or "distill" in fault.function
        tests = ((KTO,) if name == "_distance" else (TEACHER,) if of_teacher
                 else NEAREST.get(fault.kind, (CUT, STAGES)))
        if fault.kind == "counted twice over a cut row" and fault.layout != OF_PAIRS:
            continue
        found.setdefault((fault.kind, name), (fault, tests))
    for kind, *texts in OF_MESSAGES:
        found[kind, ""] = SourceFault(kind, ZERO, *texts), (CUT, STAGES)
    return [*found.values()]


def _in_tests(tests: tuple[str, ...], calls: dict[str, Callable[[], None]]) -> str:
    """Return the test that fails and how it does, or an empty text."""
    for name in tests:
        try:
            calls[name]()
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            return f"{name}: {type(e).__name__}: {str(e)[-160:]}"
    return ""


def _proved(faults: list[Any]) -> Iterator[str]:
    """Yield what `plan --prove` says of each: its outcome, and what comes first."""
    from megatron_sov.engine.parallel import cpu_shims

    cpu_shims.prepare_without_gpu()
    from planted_faults import LAYOUTS, mutated

    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.proof.proving import prove_run

    for fault in faults:
        recipe, settings = LAYOUTS[fault.layout]
        config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=32"])
        with mutated(fault):
            try:
                verdict = prove_run(config, 4)[1]
                yield " ".join((verdict.outcome, *verdict.places[:1]))
            except Exception as e:
                yield f"fails one process alone: {e}"


def _copied(folder: Path) -> Iterator[str]:
    """Copy the repository, with a worker of tests that plants what a variable names; yields words of
    pytest."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in ("megatron_sov", "tests", "benchmarks", "data_prep", "tokenizer",
                                  "pyproject.toml") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    worker = folder / "tests/rank_main.py"
    begin = '    jobs = json.loads(jobs_file.read_text())\n'
    text = worker.read_text()
    assert begin in text
    worker.write_text(text.replace(begin, begin + '''    if os.environ.get("SOV_PLANTED"):
        sys.path.append(str(ROOT / "benchmarks"))
        import planted_faults
        global planted
        planted = planted_faults.mutated(planted_faults.SourceFault(*json.loads(os.environ["SOV_PLANTED"])))
        planted.__enter__()
'''))
    shutil.copy(__file__, folder / "tests/post/test_planted.py")
    yield from ("-m", "pytest", "-q", "-s", "-p", "no:anyio", "-p", "no:cacheprovider",
                "tests/post/test_planted.py")


if os.environ.get("SOV_PLANTED_OUT"):  # as a test, in the copy
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from tests.layouts import test_layouts_agree
    from tests.post import test_preference
    from tests.post.distillation import test_distill
    from tests.post.distillation.test_distill import kept  # noqa: F401
    from tests.post.test_preference import judged  # noqa: F401

    def test_planted(ranks: Any, job: Any, packed_data: Any, pairs: Path, judged: Path,  # noqa: F811
                     kept: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
        """Write what of each fault is caught."""
        def quick(*jobs: Any, timeout_s: float = TIMEOUT_S) -> Any:
            return ranks(*jobs, timeout_s=TIMEOUT_S)

        def new() -> Path:
            return tmp_path_factory.mktemp("planted")

        calls: dict[str, Callable[[], None]] = {
            case: lambda case=case: test_layouts_agree.test_layouts_agree_with_one_rank(  # type: ignore
                quick, job, packed_data, new(), case) for case in (STAGES, CUT, SFT)}
        calls |= {
            PAIRS: lambda: test_preference.test_every_layout_and_every_split_learn_the_same(
                test_preference.SPLIT, quick, job, pairs, new()),
            KTO: lambda: test_preference.test_the_loss_is_the_papers_over_the_whole_batch_at_every_layout(
                test_preference.SHARED, quick, job, judged, new()),
            TEACHER: lambda: test_distill.test_every_layout_and_every_split_learn_the_same(
                {test_distill.SPLIT: ["top-k"], test_distill.SHARED: ["two"]}, quick, job, kept)}
        os.environ["SOV_PLANTED"] = ""
        with open(os.environ["SOV_PLANTED_OUT"], "a") as out:
            print(json.dumps({"sound": _in_tests((*calls,), calls)}), file=out, flush=True)
            for fault, tests in chosen():
                os.environ["SOV_PLANTED"] = json.dumps([*vars(fault).values()])
                print(json.dumps({"kind": fault.kind, "fault": str(fault), "layout": fault.layout,
                                  "tests": tests, "caught": _in_tests(tests, calls)}), file=out, flush=True)


def main(argv: list[str]) -> int:
    """Plant, or print what was found."""
    if argv:
        rows = [json.loads(line) for line in Path(argv[1]).read_text().splitlines()]
        for kind in dict.fromkeys(row["kind"] for row in rows[1:]):
            of_kind = [row for row in rows[1:] if row["kind"] == kind]
            refuted = [row for row in of_kind if not row["proof"].startswith("equal")]
            print(f"  {kind}: {len(refuted)} and {sum(bool(row['caught']) for row in of_kind)} "
                  f"of {len(of_kind)}")
        for row in rows[1:]:
            if row["proof"].startswith("equal") or not row["caught"]:
                print(f"  {row['kind']}: {row['fault']}: {row['proof']}; tests: "
                      f"{row['caught'].partition(chr(10))[0] or 'pass (' + ', '.join(row['tests']) + ')'}")
        return 0
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as out:
        environment = os.environ | {"SOV_PLANTED_OUT": out.name, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *_copied(Path(folder))], cwd=folder, env=environment,
                              stdout=sys.stderr)
        rows = [json.loads(line) for line in Path(out.name).read_text().splitlines()]
    print(json.dumps(rows[0]), flush=True)
    for row, proved in zip(rows[1:], _proved([fault for fault, _ in chosen()]), strict=True):
        print(json.dumps(row | {"proof": proved}), flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
