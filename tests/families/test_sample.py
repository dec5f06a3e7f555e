"""Some architectures of the sweep, each odd in another way; `make test-families` runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep import check_family
from tiny_models import families

# AltUp reads its weights; weights rescaled in place; a router that reads its weight; a router below experts.
KINDS = ["gemma3n_text", "rwkv", "longcat_flash", "jetmoe"]


@pytest.mark.parametrize("kind", KINDS)
def test_family(kind: str, tmp_path: Path) -> None:
    check_family(next(family for family in families() if family.kind == kind), tmp_path)
