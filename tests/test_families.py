"The parity matrix of `tools/families.py`, family by family, and the file that shows it."
import json
from pathlib import Path

import pytest

from families import rows
from spatialid.families import FAMILIES

SHOWN = json.loads((Path(__file__).parents[1] / "results" / "families.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_parity(family):
    found, key = rows([family]), lambda row: (row["medium"], row["check"], row["ok"], row["limit"])
    assert not [row for row in found if not row["ok"]]
    assert sorted(map(key, found)) == sorted(key(row) for row in SHOWN["rows"] if row["family"] == family)


def test_every_family_is_shown_and_nothing_else():
    assert {row["family"] for row in SHOWN["rows"]} == {*FAMILIES} and {"torch", "transformers"} <= {*SHOWN["versions"]}
    swept = {row["family"] for row in SHOWN["rows"] if row["check"] == "fast sweep"}
    assert swept == {key for key, family in FAMILIES.items() if family.fast}
