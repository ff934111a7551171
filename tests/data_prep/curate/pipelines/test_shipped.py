"""The shipped pipelines load if the files that they name exist; the smallest one runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from data_prep.curate.pipeline.pipeline_file import load_pipeline
from data_prep.curate.pipeline.step import READY
from data_prep.mixture.blend_file import SHIPPED as BLENDS, read_blend
from data_prep.tags import SOURCE
from megatron_sov.base.settings import parse_located_yaml

SHIPPED = sorted(READY.glob("*.yaml"))
QUESTION = json.dumps({"question": "How many apples are left when four of the eleven on a table are eaten?"})


def test_each_curriculum_has_a_shipped_pipeline() -> None:
    assert [file.stem for file in SHIPPED] == ["k-exaone", "solar-open", "tiny"]


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_pipeline_loads_next_to_its_files(shipped: Path, scorers: dict[str, Path],
                                                    tmp_path: Path) -> None:
    file = Path(shutil.copy(shipped, tmp_path))
    for path in re.findall(r"path: ([\w/-]+)", file.read_text()):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/sums.jsonl").write_text(QUESTION)
    (tmp_path / "models").mkdir()
    for name, kind in (("quality", "classifier"), ("education", "regressor")):
        (tmp_path / "models" / name).symlink_to(scorers[kind])
    pipeline = load_pipeline(file)
    assert pipeline.name == shipped.stem and len(pipeline.steps) >= 7


@pytest.mark.parametrize("blend", sorted(BLENDS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_output_of_a_pipeline_is_sorted_by_the_columns_of_its_blend(blend: Path) -> None:
    """A source with two values of a column would match no entry of the blend."""
    output = parse_located_yaml((READY / blend.name).read_text()).value["output"]
    columns = {key for phase in read_blend(blend).phases for entry in phase.entries for key in entry.where}
    assert columns - {SOURCE} <= set(re.findall(r"{(\w+)}", output["name"]))
