"""The choice among ARM's instruction sets; the fixture ``isa`` brings the kernels' other tests to ARM."""

from __future__ import annotations

import arm_machine
import pytest


def test_the_processor_decides(arm: dict[str, arm_machine.Machine]) -> None:
    assert {best: machine.isa() for best, machine in arm.items()} == {best: best for best in arm}
    assert arm["neon_bf16"].isas() == ["neon_bf16", "neon"]
    assert arm["neon"].isas() == ["neon"]


def test_an_instruction_set_by_name(arm: dict[str, arm_machine.Machine]) -> None:
    machine = arm["neon_bf16"]
    machine.set_isa("neon")
    assert machine.isa() == "neon"
    machine.set_isa("")
    assert machine.isa() == "neon_bf16"
    with pytest.raises(ValueError, match="'neon_bf16' is not usable here; usable: neon$"):
        arm["neon"].set_isa("neon_bf16")
