"The register of claims: verdicts come from it alone."
import json
import re
from pathlib import Path

import pytest

from spatialid.claims import (
    OPS, VERDICTS, claim_text, claims, claims_markdown, claims_text, judge, register, report, side_by_side,
    verdict)
from spatialid.store import save_results

NBS = Path(__file__).parents[1]/"nbs"


def number(value, low=None, high=None, n=9):
    low, high = (value if end is None else end for end in (low, high))
    return {"value": value, "low": low, "high": high, "n": n}


@pytest.mark.parametrize("op", OPS)
def test_the_whole_interval_has_to_pass_or_to_fail(op):
    "One end on the other side leaves a claim undecided, on whichever side it lies."
    rule = {"op": op, "threshold": 1, "exact": True}
    passing = {">": 2, ">=": 1, "<": 0, "<=": 1, "==": 1}[op]
    failing = {">": 1, ">=": 0, "<": 1, "<=": 2, "==": 0}[op]
    ends = {"holds": (passing, passing), "fails": (failing, failing), "undecided": (passing, failing)}
    for said, (low, high) in ends.items(): assert verdict(number(1, low, high), rule) == (said, None)
    assert verdict(number(1, failing, passing), rule)[0] == "undecided"


def test_what_comes_first_is_asked_first():
    "Too few units leave a claim undecided, what the paper leaves open is not judged, in whatever direction it points."
    rule = {"op": ">", "threshold": 0}
    assert verdict(number(2, 1, 3, n=7), {**rule, "least": 20}) == ("undecided", "n = 7, fewer than 20")
    assert verdict(number(2, 1, 3, n=20), {**rule, "least": 20}) == ("holds", None)
    assert verdict(number(-2, -3, -1), {**rule, "open": "which way round"}) == ("not judged", "which way round")


def entry_of(**rule):
    "A claim of the register."
    whole = {"notebook": "01_a", "key": "claims.share", "op": ">", "threshold": .5, **rule}
    return dict(id="x", source="§1", claim="c", sentence="It is so", paper="most of them", brief="most", note="",
                number="share of heads", measure="m", unit="coins", precondition="", headline=False, rule=whole,
                history=[])


def write(folder, *entries): (folder/"claims.json").write_text(json.dumps(entries))


def test_a_verdict_comes_from_the_register(tmp_path, monkeypatch):
    "Another threshold in claims.json is another verdict everywhere."
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(tmp_path))
    later = {**entry_of(), "id": "later", "rule": None}
    write(tmp_path, entry_of(), later)
    assert judge("x", number(.7, .6, .8)) == "holds" and judge("x", number(.7, .5, .8)) == "undecided"
    line = report("01_a", {"claims": {"share": number(.7, .6, .8)}}).splitlines()[2]
    assert line == "| x | c | 0.70 [0.60, 0.80], n = 9 coins | ✓ holds |"
    write(tmp_path, entry_of(threshold=.65), later)
    assert judge("x", number(.7, .6, .8)) == "undecided" and judge("x", number(.6, .5, .65)) == "fails"
    for absent in ({"value": None, "low": None, "high": None, "n": 0, "not_judged": "no pictures"},
                   {"not_judged": "no pictures"}):
        line = report("01_a", {"claims": {"share": absent}}).splitlines()[2]
        assert judge("x", absent) == "not judged" and line == "| x | c | no pictures | · not judged |"
    with pytest.raises(KeyError, match="'y' has no entry in .*claims.json: add it there"): judge("y", number(1))
    with pytest.raises(KeyError, match="'later' has no rule"): judge("later", number(1))
    with pytest.raises(KeyError, match="no claim of .* is measured by '01_a'"): report("01_a", {"claims": {}})


def test_of_a_claim_in_parts_the_one_that_stands_in_its_way_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(tmp_path))
    parts = [{"key": "claims.left", "op": ">", "threshold": 0}, {"key": "claims.right", "op": "<", "threshold": 0}]
    rule = {"notebook": "01_a", "all": parts}
    write(tmp_path, {**entry_of(), "rule": rule})
    up, down, across, none = number(2, 1, 3), number(-2, -3, -1), number(0, -1, 1), {"not_judged": "no pictures"}
    assert judge("x", up, down) == "holds" and judge("x", up, up) == judge("x", none, up) == "fails"
    assert judge("x", across, down) == judge("x", across, none) == "undecided"
    assert judge("x", none, down) == "not judged"
    assert "0.00 [-1.00, 1.00]" in report("01_a", {"claims": {"left": up, "right": across}})


def test_a_table_fits_a_hundred_columns_and_one_claim_is_told_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(NBS))
    rows = claims("llava-tiny")
    text = claims_text(rows)
    assert max(map(len, text.splitlines())) <= 100 and all(f"\n{row['id']} " in text for row in rows)
    for row in rows: assert len(row["claim"]) <= 60 and len(row["brief"]) <= 9 and len(row["id"]) <= 17
    changed = next(row for row in rows if row["history"])
    told = claim_text(changed)
    assert max(map(len, told.splitlines())) <= 100
    flat = " ".join(told.split())
    for part in (changed["sentence"], changed["source"], changed["history"][0]["why"]): assert part in flat


def test_the_register_says_all_it_has_to():
    "Ids, units, dated histories; ten claims for the front page; rules that can be evaluated."
    entries = json.loads((NBS/"claims.json").read_text(encoding="utf-8"))
    assert len({e["id"] for e in entries}) == len(entries) and sum(e["headline"] for e in entries) == 10
    for e in entries:
        assert set(e) == set(entry_of()) and len(e["number"]) <= 60
        assert all(e[key] for key in ("source", "claim", "brief", "number", "measure", "unit"))
        for change in e["history"]: assert set(change) == {"date", "was", "why"} and all(change.values())
        rules = e["rule"].get("all", [e["rule"]])
        assert all(part["op"] in OPS and {"key", "threshold"} <= set(part) for part in rules)
        known = {"notebook", "model", "named", "exact", "least", "open", "all", "key", "op", "threshold"}
        assert set(e["rule"]) <= known and (NBS/f"{e['rule']['notebook']}.ipynb").is_file()


def test_no_experiment_has_a_threshold_of_its_own():
    "Notebooks ask the register: none writes a verdict itself, and every claim they ask for is theirs."
    for path in sorted(NBS.glob("0[0-9]_*.ipynb")):
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        source = "\n".join("".join(c["source"]) for c in cells)
        measures = any(entry["rule"]["notebook"] == path.stem for entry in register().values())
        assert set(re.findall(r'\breport\("([\w.-]+)"', source)) == ({path.stem} if measures else set())


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
    write(tmp_path, entry_of(), {**entry_of(key="claims.other"), "id": "y"})
    assert {row["verdict"] for row in claims("toy")} == {"not yet run"}
    save_results("toy", "01_a", {"claims": {"share": found}}, {"model": "toy"})
    run, left_out = claims("toy")
    assert (run["verdict"], run["why"], run["value"]) == ("not judged", why, None)
    assert (left_out["verdict"], left_out["why"]) == ("not yet run", None)
    assert why in " ".join(claim_text(run).split()) and "1 not judged, 0 not yet run" in claims_text([run])
    assert f"{why} | toy | {VERDICTS['not judged']} not judged |" in claims_markdown([run])


def test_models_stand_side_by_side_with_what_each_found_itself(tmp_path, monkeypatch):
    "A mark, the number, its interval and n; a dot where it was not judged, nothing where there are no results."
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(tmp_path))
    write(tmp_path, entry_of(), {**entry_of(notebook="02_b"), "id": "elsewhere"})
    for name, found in (("one", number(.7, .6, .8)), ("two", number(.5, .4, .6)), ("three", {"not_judged": "none"})):
        save_results(name, "01_a", {"claims": {"share": found}}, {"model": name})
    lines = side_by_side("01_a", ["one", "two", "three", "four"]).splitlines()
    assert lines[0] == "| id | claim | number: holds if | one | two | three | four |"
    assert lines[2:] == ["| x | c | share of heads: > 0.5 | ✓ 0.70 [0.60, 0.80], n 9 | ? 0.50 [0.40, 0.60], n 9 "
                         "| · |  |"]
