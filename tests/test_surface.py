"""Options and settings change only together with tests/surface.txt, which lists them."""

import difflib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import pytest
from freeze_surface import FILE, surface


@pytest.mark.essential
def test_options_and_settings_equal_the_frozen_surface() -> None:
    changed = list(difflib.unified_diff(FILE.read_text(encoding="utf-8").splitlines(),
                                        surface().splitlines(), "promised", "now",
                                        lineterm="", n=0))
    advice = "argue for it in the commit, and run `python tests/freeze_surface.py`"
    assert not changed, "\n".join([advice, *changed])
