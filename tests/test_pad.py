"The parts of pages that answer without a kernel: their numbers are those of a run, and the browser shows them."
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from spatialid.edits import at_place
from spatialid.extraction import SpatialIDs
from spatialid.hooks import VLM
from spatialid.pad import pad_scene_numbers, pad_scenes
from spatialid.scenes import Scene
from spatialid.steering import QuestionSource, scene_place

ROOT = Path(__file__).parents[1]
PAD = json.loads((ROOT/"results"/"llava-smol"/"pad.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny(): return VLM.load("llava-tiny")


def test_the_numbers_are_those_of_a_steered_run(tiny):
    "Every cell brought in with `steer`, at one layer; the subject is where the dashed cell says."
    ids = SpatialIDs.load(ROOT/"results"/"llava-tiny"/"spatial_ids.safetensors")
    grid = ids.at(3)
    (scene, queries), = pad_scenes(tiny, QuestionSource(), 1)
    found = pad_scene_numbers(tiny, ids, scene, queries)
    subject = scene.things[0]
    assert isinstance(scene, Scene) and found["subject"] == subject.name
    assert found["cell"] == 4 * int(4 * subject.y) + int(4 * subject.x)
    query, question = queries["left_right"], found["questions"]["left_right"]
    after, place = np.array(question["after"]), np.array(scene_place(subject))
    for cell in (0, 7, 14):
        vector = grid[cell // 4, cell % 4] - at_place(grid, place).numpy()
        with tiny.steer(query, {"subject": vector}, layer=3, scale=1):
            odds = np.diff(tiny.run([query]).log_probs.numpy()).item()
        assert abs(odds - after[cell, 2]) < 1e-4
    assert abs(np.diff(tiny.run([query]).log_probs.numpy()).item() - question["before"]) < 1e-4


def test_the_page_is_small_and_says_of_whom_it_is():
    size = sum(path.stat().st_size for path in (ROOT/"results"/"llava-smol").glob("pad*"))
    assert size < 1e6 and PAD["model"] == "llava-smol" and PAD["provenance"]["weight_hash"]
    for scene in PAD["scenes"]:
        assert (ROOT/"results"/"llava-smol"/scene["picture"]).is_file()
        for question in scene["questions"].values():
            assert np.array(question["after"]).shape == (PAD["cells"]**2, len(PAD["layers"]))
    assert np.array(PAD["grid"]).shape == (len(PAD["layers"]), PAD["cells"]**2, 2)


SCRIPT = """
import { answer, cellAt, colour, keyed, placed, polyline, probability, reach } from "./pad.js";
const question = { before: -2, after: [[-2, 3], [-8, 1]] };
console.log(JSON.stringify({
  half: probability(0), out: [cellAt(-1, 0, 4), cellAt(4, 0, 4), cellAt(0, 4, 4), cellAt(3, 1, 4)],
  keys: [keyed(0, "ArrowLeft", 4), keyed(0, "ArrowDown", 4), keyed(15, "ArrowRight", 4), keyed(5, "a", 4)],
  answers: [answer(question, 0, 0).turned, answer(question, 0, 1).turned], reach: reach(question),
  line: polyline([0, 1], [0, 1], 10, 10), placed: placed([[2, 0], [0, -1]], 100), colours: [colour(0, 4), colour(3, 4)],
}));
"""


def in_node(folder, script):
    "What a script that imports the modules of the pages prints, read as JSON."
    for path in (ROOT/"nbs"/"pad").glob("*.js"): shutil.copy(path, folder)
    (folder/"try.mjs").write_text(script)
    (folder/"package.json").write_text('{"type": "module"}')
    made = subprocess.run(["node", folder/"try.mjs"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
def test_what_the_browser_makes_of_it(tmp_path):
    "The edges of the grid hold, an answer turns where its log-odds change sign, the farthest ID is near the edge."
    found = in_node(tmp_path, SCRIPT)
    assert found["half"] == .5 and found["out"] == [None, None, None, 7] and found["keys"] == [0, 4, 15, 5]
    assert found["answers"] == [False, True] and found["reach"] == 8
    assert found["line"] == "0.0,10.0 10.0,0.0" and np.allclose(found["placed"], [[92.5, 50], [50, 28.75]])
    assert found["colours"][0] != found["colours"][1]


# --- the values of Figure 4A, on the page of notebook 02

VALUES = """
import { readFileSync } from "node:fs";
import { around, nearest, range, reading, shown } from "./values.js";
const { layers, fig4a: { curves } } = JSON.parse(readFileSync(process.env.STORED));
const small = { value: [-0.001, null], low: [-0.5, null], high: [1.25, null] };
console.log(JSON.stringify({
  names: shown(curves), peak: reading(curves.objects, layers.indexOf(19)), small: [0, 1].map((k) => reading(small, k)),
  nearest: [nearest(-1, 30), nearest(0.51, 3), nearest(2, 30)], range: [range(curves), range({ image: small })],
  corners: around({ low: [0, 0], high: [1, 0.5] }, [0, 1], 10, 10),
}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
def test_the_values_of_figure_4a_are_the_stored_ones(tmp_path, monkeypatch):
    "Of every group the page knows; a pointer beside the axes reads the first or last layer."
    path = ROOT/"results"/"llava-smol"/"02_mirror_swap.json"
    monkeypatch.setenv("STORED", str(path))
    stored = json.loads(path.read_text(encoding="utf-8"))
    curve, at = stored["fig4a"]["curves"]["objects"], stored["layers"].index(19)
    found = in_node(tmp_path, VALUES)
    assert set(found["names"]) <= stored["fig4a"]["curves"].keys() and len(found["names"]) == 7
    value, low, high = (curve[end][at] for end in ("value", "low", "high"))
    assert found["peak"] == f"{value:.2f} [{low:.2f}, {high:.2f}]"
    assert found["small"] == ["0.00 [−0.50, 1.25]", "–"] and found["nearest"] == [0, 1, 29]
    assert found["range"][0][0] <= 0 and found["range"][0][1] >= 1 and found["range"][1] == [-.5, 1.25]
    assert found["corners"] == "0.0,0.0 10.0,5.0 10.0,10.0 0.0,10.0"


def test_the_page_names_models_with_stored_values_and_publishes_them():
    cells = json.loads((ROOT/"nbs"/"02_mirror_swap.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells)
    models = re.search(r'class="values" data-models="([^"]+)"', text)[1].split()
    assert "llava-smol" in models and all((ROOT/"results"/name/"02_mirror_swap.json").is_file() for name in models)
    resources = yaml.safe_load((ROOT/"_quarto.yml").read_text())["project"]["resources"]
    assert {"pad/*.js", "results/*/02_mirror_swap.json"} <= set(resources)
