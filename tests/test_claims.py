"The register of claims: verdicts come from it alone."
import json
import re
from pathlib import Path

import pytest

from spatialid.claims import OPS, claims, claims_markdown, claims_text, holds, judge, register, report
from spatialid.store import save_results

NBS = Path(__file__).parents[1]/"nbs"


def number(value, low=None, high=None, n=9):
    low, high = (value if end is None else end for end in (low, high))
    return {"value": value, "low": low, "high": high, "n": n}


@pytest.mark.parametrize("op", OPS)
def test_the_whole_interval_has_to_pass(op):
    "One end on the wrong side is enough to fail, on whichever side it lies."
    rule = {"op": op, "threshold": 1}
    passing = {">": 2, ">=": 1, "<": 0, "<=": 1, "==": 1}[op]
    failing = {">": 1, ">=": 0, "<": 1, "<=": 2, "==": 0}[op]
    assert holds(number(passing), rule)
    assert not holds(number(1, passing, failing), rule) and not holds(number(1, failing, passing), rule)


def test_a_verdict_comes_from_the_register(tmp_path, monkeypatch):
    "Another threshold in claims.json is another verdict everywhere."
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(tmp_path))
    entry = {"id": "x", "claim": "", "rule": {"notebook": "01_a", "key": "claims.share", "op": ">", "threshold": .5}}
    write = lambda threshold: (tmp_path/"claims.json").write_text(
        json.dumps([entry | {"rule": entry["rule"] | {"threshold": threshold}}, {"id": "later", "rule": None}]))
    write(.5)
    assert judge("x", number(.7, .6, .8)) == "holds" and judge("x", number(.7, .5, .8)) == "does not hold"
    assert report("x", {"share": number(.7, .6, .8)}) == "0.70 [0.60, 0.80], n = 9: holds"
    write(.65)
    assert judge("x", number(.7, .6, .8)) == "does not hold"
    for absent in ({"value": None, "low": None, "high": None, "n": 0, "not_judged": "no pictures"},
                   {"not_judged": "no pictures"}):
        assert judge("x", absent) == "not judged" and report("x", {"share": absent}) == "not judged: no pictures"
    with pytest.raises(KeyError, match="'y' has no entry in .*claims.json: add it there"): judge("y", number(1))
    with pytest.raises(KeyError, match="'later' has no rule"): judge("later", number(1))


def test_no_experiment_has_a_threshold_of_its_own():
    "Notebooks ask the register: none writes a verdict itself, and every claim they ask for is theirs."
    for path in sorted(NBS.glob("0[0-9]_*.ipynb")):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        source = "\n".join("".join(c["source"]) for c in cells)
        assert "does not hold" not in source, f"{path.stem}: ask `judge` or `report`"
        asked = re.findall(r"\b(?:report|judge|judged)\('([\w.-]+)'", source)
        assert {register()[id]["rule"]["notebook"] for id in asked} <= {path.stem}


@pytest.mark.parametrize("found, why", [
    ({"value": .8, "low": None, "high": None, "n": 1}, "0.80 has no interval: n = 1 is too small for one"),
    ({"value": .8, "low": .7, "high": .9, "n": None}, "0.80 has no interval: the sample is too small for one"),
    ({"value": 1., "low": 1., "high": 1., "n": 4},
     "1.00 [1.00, 1.00]: an interval of no width, n = 4 is too small for one"),
    ({"value": None, "low": None, "high": None, "n": 0}, "the run found no number"),
    ({"value": None, "low": None, "high": None, "n": 0, "not_judged": "no pictures"}, "no pictures"),
])
def test_what_was_run_without_an_interval_is_not_judged_and_says_why(tmp_path, monkeypatch, found, why):
    "It is not \"not yet run\": running it again would change nothing."
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(tmp_path))
    entry = dict(id="x", source="§1", claim="c", paper="1", note="", measure="m",
                 rule={"notebook": "01_a", "key": "claims.share", "op": ">", "threshold": .5})
    elsewhere = {**entry, "id": "y", "rule": {**entry["rule"], "key": "claims.other"}}
    (tmp_path/"claims.json").write_text(json.dumps([entry, elsewhere]))
    assert {row["status"] for row in claims("toy")} == {"not yet run"}
    save_results("toy", "01_a", {"claims": {"share": found}}, {"model": "toy"})
    run, left_out = claims("toy")
    assert (run["status"], run["reason"], run["ours"]) == ("not judged", why, None)
    assert (left_out["status"], left_out["reason"]) == ("not yet run", None)
    assert why in claims_text([run]) and "1 not judged, 0 not yet run" in claims_text([run])
    assert f"{why} | not judged |" in claims_markdown([run])
