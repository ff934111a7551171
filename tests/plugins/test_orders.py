"""What a person named of rewards and tool environments, known by one name alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.errors import UserError
from megatron_sov.plugins.orders import Order
from megatron_sov.rewards import registry as rewards
from megatron_sov.tools import registry as environments


@pytest.mark.parametrize("order, kind, group, name", [
    (rewards.order, "reward", "megatron_sov.rewards", "length"),
    (environments.order, "tool environment", "megatron_sov.environments", "calculator")])
def test_a_package_cannot_take_the_name_of_what_is_built_in(
        order: Callable[[str, dict[str, Any]], Order], kind: str, group: str, name: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    assert order(name, {}) == Order(name)
    (info := tmp_path / "namesake-1.2.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: namesake\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = namesake_code:Other\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as raised:
        order(name, {})
    assert str(raised.value) == (
        f"{kind} '{name}': is built in, and namesake 1.2 declares one of that name; name namesake_code:Other "
        "for that one, uninstall the package for the built-in one")
