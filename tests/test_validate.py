"What is submitted is read as a reviewer reads it: the published results are whole, and each damage is one sentence."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spatialid.claims import own_claims
from spatialid.cli import main
from spatialid.validate import faults, number_fault, read_json, validate_text, verdicts

ROOT = Path(__file__).parents[1]
PUBLISHED = sorted(path for path in (ROOT/"results").glob("[!.]*") if path.is_dir())


@pytest.fixture(autouse=True)
def notebooks(monkeypatch): monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(ROOT/"nbs"))


@pytest.fixture
def folder(tmp_path):
    "A copy of some published results: those of notebooks 02 to 05."
    others = shutil.ignore_patterns("*.png", "00_*", "06_*", "07_*", "09_*", "10_*")
    return Path(shutil.copytree(ROOT/"results"/"llava-tiny", tmp_path/"llava-tiny", ignore=others))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_what_is_published_is_whole(path):
    assert faults(path) == []


@pytest.mark.parametrize("name", ["gemma3-tiny", "llava-smol", "onevision-tiny"])
def test_verdicts_are_those_of_the_claims(name, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(ROOT))
    found = {path.stem: read_json(path) for path in (ROOT/"results"/name).glob("[0-9][0-9]_*.json")}
    here = {id: said for id, said in verdicts(name, found).items() if said != "not judged"}
    assert here == {id: row["verdict"] for id, row in own_claims(name).items()} and len(here) > 15


def edit(name, change):
    "A damage: `change` of the JSON of a file."
    def damage(folder):
        found = json.loads((folder/name).read_text())
        change(found)
        (folder/name).write_text(json.dumps(found))
    return damage


def claim(**new): return edit("04_steering.json", lambda found: found["claims"]["id_swaps"].update(new))


def origin(key, value): return edit("provenance/04_steering.json", lambda found: found.update({key: value}))


def without(key): return edit("provenance/04_steering.json", lambda found: found.pop(key))


def not_finite(folder):
    path = folder/"02_mirror_swap.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays[min(arrays)] = np.full_like(arrays[min(arrays)], np.nan)
    safetensors.numpy.save_file(arrays, path)


def text(name, content): return lambda folder: (folder/name).write_text(content)


AGAIN = "; run the notebook again, and leave its files as it wrote them"
NUMBERS, SWAPS, ORIGIN = "04_steering.json", "04_steering.json claims.id_swaps: ", "provenance/04_steering.json"
DAMAGES = { # what: (damage, the sentence, or its beginning)
    "an interval beside its value": (claim(low=.99), SWAPS + "the interval leaves out its value" + AGAIN),
    "n that is no count": (claim(n=2.5), SWAPS + "n is 2.5 and not a whole number" + AGAIN),
    "no unit": (edit(NUMBERS, lambda found: found["claims"]["id_swaps"].pop("n")), SWAPS + "has no n" + AGAIN),
    "a list of another length": (claim(low=[.1, .2]), SWAPS + "value, low and high differ in shape" + AGAIN),
    "a word": (claim(value="most"), SWAPS + "value, low and high are not all numbers" + AGAIN),
    "no value and no reason": (claim(value=None, low=None, high=None), SWAPS + "has no value and does not say why"),
    "a verdict that does not follow": (claim(verdict="undecided"), SWAPS + "says 'undecided', but 'fails' follows"),
    "no probability": (claim(p=1.5), SWAPS + "p is 1.5, and no probability" + AGAIN),
    "no JSON": (text(NUMBERS, "{"), NUMBERS + ": is no JSON of results (Expecting property name"),
    "infinity": (text("card.json", '{"a": Infinity}'), "card.json: is no JSON of results (Infinity is no number of"),
    "no object": (text("card.json", "[]"), "card.json: is no JSON of results (it holds a list and not an object)"),
    "no provenance": (lambda folder: (folder/ORIGIN).unlink(), f"{NUMBERS}: has no {ORIGIN}; add the one that the run"),
    "no numbers": (lambda folder: (folder/NUMBERS).unlink(), f"{ORIGIN}: there are no numbers to it; delete it, or"),
    "no seed": (without("seed"), f"{ORIGIN} seed: is missing, a whole number{AGAIN} (--full, in a checkout)"),
    "no commit": (origin("commit", None), f"{ORIGIN} commit: is None and not a commit of a checkout{AGAIN}"),
    "a date without its zone": (origin("date", "2026-11-28"), f"{ORIGIN} date: is '2026-11-28' and not a date with"),
    "another protocol": (origin("protocol", "mine"), f"{ORIGIN} protocol: is 'mine' and not 'paper' or 'released'"),
    "no version of torch": (origin("versions", {"python": "3"}), f"{ORIGIN} versions: is {{'python': '3'}} and not"),
    "a run in short": (origin("params", {"quick": True}), f"{ORIGIN} params.quick: is true, so these are of a run in"),
    "a path of a machine": (origin("params", {"benchmark": "~/coco"}), f"{ORIGIN} params.benchmark: is a path of one"),
    "another model": (origin("model", "llava-smol"), f"{ORIGIN} model: is 'llava-smol', and the folder is of"),
    "other weights": (origin("weight_hash", "0" * 64), f"{ORIGIN} weight_hash: is of other weights than 1"),
    "arrays that are not finite": (not_finite, "02_mirror_swap.safetensors: "),
    "arrays cut short": (lambda folder: (folder/"spatial_ids.safetensors").write_bytes(b"x" * 40),
                         "spatial_ids.safetensors: cannot be read ("),
    "a file of another kind": (text("ids.pkl", ""), "ids.pkl: results are .json, .png, .safetensors: delete it"),
    "a file too large": (text("a.png", "x" * 11_000_000), "a.png: 11 MB are too many for the repository (10): leave"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_each_damage_is_one_sentence(what, folder):
    damage, beginning = DAMAGES[what]
    damage(folder)
    said = faults(folder)
    assert len(said) == 1 and said[0].startswith(beginning) and "\n" not in said[0], said


def test_ids_of_other_weights(folder):
    shutil.copy(ROOT/"results"/"gemma3-tiny"/"spatial_ids.safetensors", folder)
    (said,) = faults(folder)
    assert said.startswith("spatial_ids.safetensors: spatial_ids is of weights ") and "03_extraction.json" in said


def test_a_verdict_that_follows_may_stand_there(folder):
    claim(verdict="fails")(folder)
    assert faults(folder) == []


def test_a_model_of_the_hub_has_its_id_and_its_commit(folder, tmp_path):
    "And a folder of a machine is no address."
    other = folder.rename(tmp_path/"model")
    for path in (other/"provenance").iterdir():
        edit(path.name, lambda found: found.update(model="owner/model", weight_hash="ab" * 20))(path.parent)
    for path in other.glob("*ids*"): path.unlink()
    assert [line for line in faults(other) if "revision" not in line] == [
        "source.txt: is missing: write the model's id on the Hub into it, as `spatialid run` does",
        *(line for line in faults(other) if " model: is 'owner/model', and the folder is of model" in line)]
    (other/"source.txt").write_text("owner/model")
    said = faults(other)
    assert said and all(" revision: is None, and a model of the Hub has a commit" in line for line in said)
    for path in (other/"provenance").iterdir():
        edit(path.name, lambda found: found.update(revision="ab" * 20))(path.parent)
    assert faults(other) == []
    (other/"source.txt").write_text(str(tmp_path/"checkpoint"))
    assert [line for line in faults(other) if line.startswith("source.txt: names ") and "publish the weights" in line]


def test_what_a_run_keeps_for_itself_is_not_looked_at(folder):
    for name in ("quick/04_steering.json", ".runs/x.bin"):
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text("{")
    assert faults(folder) == []


def test_lists_of_estimates_and_gaps_in_them_are_whole():
    assert number_fault({"value": [.1, None], "low": [0, None], "high": [.2, None], "n": 3}) is None
    assert number_fault({"value": None, "low": None, "high": None, "n": 0, "not_judged": "no pictures"}) is None
    assert number_fault({"value": .1, "low": 0, "high": .2, "n": 0}) == "there is an interval of n = 0"


def test_the_command_says_all_and_ends_with_one_where_anything_is_wrong(folder, tmp_path, capsys):
    whole = ROOT/"results"/"llava-smol"
    assert main(["validate", str(whole)]) == 0
    assert capsys.readouterr().out.startswith("llava-smol: whole; holds ")
    claim(n=-1)(folder)
    assert main(["validate", str(whole), str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"llava-tiny/{SWAPS}n is -1") and lines[2] == "llava-tiny: 1 fault"
    assert main(["validate", str(tmp_path/"none")]) == 1 and "there is no folder" in capsys.readouterr().err
    (tmp_path/"empty").mkdir()
    said, good = validate_text(tmp_path/"empty")
    assert not good and "has no numbers; run `spatialid reproduce --models empty --full` first" in said
