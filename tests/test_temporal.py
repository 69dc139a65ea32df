"Time: videos that can be shown backwards, IDs of moments against their definition, and the notebook for every video family."
import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import spearmanr
from tiny import tiny

from spatialid.store import read_results
from spatialid import runner, temporal as tm
from spatialid.benchmarks import write_mvbench
from spatialid.questions import BEFORE_AFTER
from spatialid.scenes import FreeScenes
from spatialid.videos import GridVideos, Videos
from spatialid.extraction import SpatialIDs, extract, grid_axes, grid_statistics, orthonormal
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.sweeps import in_float64

SCENES = FreeScenes(40, seed=5, px=32, things=(2, 3))


# --- videos

@pytest.mark.slow
def test_a_passing_video_reversed_is_one_of_the_other_order():
    for i in range(20):
        video = tm.passing(SCENES[i], 0)
        shown = [set(video.shown(f)) for f in range(1, 9)]
        assert all(sum(o.name in s for s in shown) == 3 for o in video.scene.things)
        first = lambda run, name: next(t for t, s in enumerate(run) if name in s)
        a, b = (t.name for t in video.scene.things[:2])
        q = video.query(a, b)
        back = tm.backwards(q)
        assert q.truth == ("before" if first(shown, a) < first(shown, b) else "after")
        assert back.truth == ("before" if first(shown[::-1], a) < first(shown[::-1], b) else "after") != q.truth
        assert [f.tobytes() for f in back.image] == [f.tobytes() for f in q.image][::-1] and (back.text, back.answers) == (q.text, q.answers)
    with pytest.raises(ValueError, match="take fewer things or more frames"): tm.passing(SCENES[0], 0, n_frames=4, stay=4)


def test_the_mirror_leaves_the_order():
    q = Videos(SCENES)[1].query(*[o.name for o in SCENES[1].things[:2]])
    side = tm.sideways(q)
    assert side.truth == q.truth and all(ImageOps.mirror(a).tobytes() == b.tobytes() for a, b in zip(q.image, side.image))


def test_order_questions():
    asked = tm.order_questions(SCENES, 12, seed=1, instruction=" Answer in one word.")
    assert len(asked) == 12 and {q.truth for q in asked} == {"before", "after"} and all(q.answers == ("before", "after") and q.text.endswith("?" + " Answer in one word.") for q in asked)
    assert [q.text for q in asked] == [q.text for q in tm.order_questions(SCENES, 12, seed=1, instruction=" Answer in one word.")]
    rows = [SimpleNamespace(query=lambda i=i: Query([Image.new("RGB", (8, 8))] * 2, BEFORE_AFTER, dict(subject="cup", object=str(i)), ("before", "after"), "before")) for i in range(5)]
    given = tm.order_questions(rows, 3, instruction=" Now.")
    assert len({q.words["object"] for q in given}) == 3 and all(q.text.endswith("? Now.") for q in given)


# --- the extraction set

def test_grid_videos():
    grid = GridVideos([("cup", "star"), ("star", "cup"), ("cat", "cup")], px=48)
    each = len(grid) // 3
    assert each == 8 * 7 * 2 and grid.shape == (3, 8)
    for pair in range(3):
        cells = [(v.a_cell, v.b_cell) for v in (grid[pair * each + k] for k in range(each))]
        assert len(set(cells)) == each and all(a[0] != b[0] and a[1] != b[1] for a, b in cells)
        assert {b for _, b in cells} == set(product(range(8), range(3))) and {a[0] for a, _ in cells} == set(range(8))
    used = {v.a_cell for v in (grid[i] for i in range(len(grid)))}
    assert used == set(product(range(8), range(3))), "over three pairs the reference is at every place in every frame"
    v = grid[each + 7]
    frames = [np.asarray(f, float) for f in v.query().image]
    changed = [t for t in range(1, 8) if (frames[t] != frames[t - 1]).any()]
    assert changed == sorted({v.a_cell[0], v.b_cell[0]} - {0})
    new = np.abs(frames[v.b_cell[0]] - frames[v.b_cell[0] - 1]).sum((0, 2)) if v.b_cell[0] else None
    if new is not None: assert v.b_cell[1] == int((new * np.arange(48)).sum() / new.sum() / 16)
    assert v.query().truth == ("before" if v.b_cell[0] < v.a_cell[0] else "after") and v.image().size == (8 * 48, 48)
    with pytest.raises(IndexError): grid[len(grid)]


def test_extraction_in_time_is_its_definition():
    "Eq. 2-4 by loops over single questions in float64, on a grid of 4 frames and 3 places, against `extract`."
    vlm = in_float64(VLM(*tiny("llava_onevision")))
    grid = GridVideos([("cup", "star"), ("cat", "star"), ("star", "cup")], n_frames=4, px=16)
    ids = extract(vlm, grid, progress=False, template=BEFORE_AFTER, batch_size=7)
    each, slow = len(grid) // 3, {}
    for pair, (a, b) in enumerate(grid.pairs):
        items = [grid[pair * each + k] for k in range(each)]
        phi = [vlm.run(v.query(), [1, 3], "subject").residuals for v in items]
        phi = [np.stack([r[l][0, 0].numpy() for l in (1, 3)]) for r in phi]
        mean = {c: np.mean([p for p, v in zip(phi, items) if v.a_cell == c], 0) for c in {v.a_cell for v in items}}
        for cell in product(range(4), range(3)):
            slow.setdefault((b, cell), []).append(np.mean([p - mean[v.a_cell] for p, v in zip(phi, items) if v.b_cell == cell], 0))
    assert ids.table.shape == (2, 1, 4, 3, 4, 32)
    for (b, (f, x)), found in slow.items():
        got = ids.table[ids.objects.index(b), 0, :, x, f][[0, 2]]
        assert np.abs(got - np.mean(found, 0)).max() < 1e-9
    assert np.allclose(tm.in_time(ids, 3)[0], [np.mean([np.mean(slow["star", (f, x)], 0)[1] for x in range(3)], 0) for f in range(4)], atol=1e-9)


def test_grids_of_more_columns_than_rows():
    "Axes and statistics of a 3 × 8 grid: exact for a linear code, equal to slow sums for noise."
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 16))
    linear = np.arange(8)[None, :, None] * a + np.arange(3)[:, None, None] * b
    h, v = grid_axes(linear)
    assert np.allclose(h / np.linalg.norm(h), a / np.linalg.norm(a)) and np.allclose(v / np.linalg.norm(v), b / np.linalg.norm(b))
    flat = linear.reshape(24, -1)
    assert np.isclose(grid_statistics(flat @ flat.T, 3)["r2"], 1) and grid_statistics(flat @ flat.T, 4)["r2"] < .99
    noise = g.normal(size=(3, 8, 16))
    slow = np.mean([noise[y, i] - noise[y, j] for y in range(3) for i in range(8) for j in range(i)], 0), np.mean([noise[i, x] - noise[j, x] for x in range(8) for i in range(3) for j in range(i)], 0)
    assert np.allclose(grid_axes(noise), slow)
    flat = (noise - noise.mean((0, 1))).reshape(24, -1)
    design = np.stack(np.meshgrid(np.arange(8), np.arange(3)), -1).reshape(24, 2); design = design - design.mean(0)
    fit = design @ np.linalg.lstsq(design, flat, rcond=None)[0]
    stats = grid_statistics(flat @ flat.T, 3)
    assert np.isclose(stats["r2"], (fit**2).sum() / (flat**2).sum())
    assert np.isclose(stats["total"], ((flat @ orthonormal(grid_axes(noise)).T)**2).sum() / (flat**2).sum())


# --- a line in time

def test_time_statistics_against_vectors():
    g = np.random.default_rng(1)
    for F in (5, 8):
        x = g.normal(size=(F, 12)) + np.arange(F)[:, None] * g.normal(size=12) * .3
        stats, c = tm.time_statistics(x @ x.T), x - x.mean(0)
        t = np.mean([c[i] - c[j] for i in range(F) for j in range(i)], 0)
        on = c @ t / np.linalg.norm(t)
        time = np.arange(F) - (F - 1) / 2
        fit = np.outer(time, time @ c / (time @ time))
        steps = np.linalg.norm(np.diff(x, axis=0), axis=1)
        slow = dict(r2=(fit**2).sum() / (c**2).sum(), axis=(on**2).sum() / (c**2).sum(), pc1=np.linalg.svd(c, compute_uv=False)[0]**2 / (c**2).sum(), order=spearmanr(on, time)[0], last=steps[-1] / steps[:-1].mean())
        for name, value in slow.items(): assert np.isclose(stats[name], value), name
    assert all(v == 0 for v in tm.time_statistics(np.zeros((8, 8))).values())


def test_line_statistics_know_chance():
    g = np.random.default_rng(2)
    drawn = [tm.line_statistics(np.repeat(g.normal(size=(1, 8, 20)), 4, 0) + .01 * g.normal(size=(4, 8, 20)), 20, 200, seed=i)["r2"] for i in range(60)]
    assert 0 <= np.mean([d["p"] <= .05 for d in drawn]) <= .15 and abs(np.mean([d["null_mean"] for d in drawn]) - 1 / 7) < .02
    far = np.arange(8.)[:, None] * np.eye(20)[0]; far[-1] += 5 * np.eye(20)[1]
    assert (one := tm.line_statistics(np.stack([far] * 4) + .01 * g.normal(size=(4, 8, 20)), 50, 50)["last"])["low"] > 4 and one["high"] > one["low"]


def test_words_in_frames():
    line = np.arange(8.)[:, None] * np.eye(6)[2] * .5
    assert np.allclose(tm.in_frames(np.array([[0, 0, 1.5, 0, 9, 0], [0, 0, -.5, 0, 0, 0]]), line), [3, -1])


def test_order_words_do_not_depend_on_the_order():
    vlm = in_float64(VLM(*tiny("llava_onevision"))) # the pairs of names are padded to one length, which float32 notices
    pairs = [("cup", "star"), ("hot dog", "cat")]
    words = tm.order_words(vlm, pairs, [1, 2])
    one = vlm.run([Query(None, "Does the {subject} appear {x} or {y} the {object}?", dict(subject="cup", object="star", x=x, y=y)) for x, y in (("before", "after"), ("after", "before"))], [2], ["x", "y"]).residual(2).double().numpy()
    assert words.shape == (2, 2, 2, 32) and np.allclose(words[0, 1, 0], (one[0, 0] + one[1, 1]) / 2) and np.allclose(words[0, 1, 1], (one[0, 1] + one[1, 0]) / 2)


def planted():
    "IDs of 4 frames × 3 places: frame f is f² along one direction, a place moves along another."
    table = np.zeros((2, 1, 2, 3, 4, 5))
    table[..., 0] = np.arange(4.)**2; table[..., 1] = np.arange(3.)[:, None] - 1
    return SpatialIDs(table, np.ones((2, 1, 3, 4)), ["cup", "star"], [8], [1, 2], [("star", "cup"), ("cup", "star")], BEFORE_AFTER)


def test_moments():
    ids, go = planted(), lambda *a, **k: tm.moments(ids, *a, **k)(1, slice(0, 3))
    at = lambda f, **k: float(go(f, **k)[0][0, 0, 0])
    assert [at(f) for f in (1, 2, 4, 2.5, 0, 5)] == [0, 1, 9, 2.5, -1, 14] and go(2)[1] is None and float(go(2, 3)[1][0, 0, 0]) == 4
    assert float(go(2)[0][0, 0, 1]) == 0, "places are averaged"
    assert ids.step((0, 2), (3, 2), 1)[0] == 9
    with pytest.raises(ValueError, match="from 0 to 3 and 2"): ids.step((0, 3), (3, 0), 1)


# --- the notebook

@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3"])
@pytest.mark.slow
def test_the_notebook_runs_for_other_families(family, tmp_path, monkeypatch):
    "Random weights, loaded from a folder as any model: nothing is judged where the model knows nothing. LLaVA-OneVision is the bundled one."
    model, processor = tiny(family)
    folder = tmp_path / f"random-{family}"
    model.save_pretrained(folder); processor.save_pretrained(folder)
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    runner.run_notebook(runner.find_notebook("08"), str(folder), quick=True, px=24, n_objects=3)
    found = read_results(tmp_path / "results" / folder.name / "quick" / "08_temporal.json")
    assert found["claims"]["emerges"]["not_judged"] and found["fig10b"]["videos"] == 336 and found["provenance"]["params"]["quick"]
    assert found["fig10c"]["from_files"]["same_answer"]["n"] == found["fig10c"]["right"]["n"]
    for figure in ("fig10a", "fig10b", "fig10c", "figA13", "figA17"): assert (tmp_path / "results" / folder.name / "quick" / f"{figure}.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_notebook_asks_about_files_in_the_format_of_mvbench(tmp_path, monkeypatch):
    "Videos as mp4, read back: a missing one is named and left out, and Figures 10A and 10C are of the others."
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    folder = write_mvbench(tmp_path / "mvbench", 12)
    sorted((folder / "video").glob("*.mp4"))[0].unlink()
    runner.run_notebook(runner.find_notebook("08"), "onevision-tiny", benchmark=str(folder), quick=True, n_objects=3)
    found = read_results(tmp_path / "results" / "onevision-tiny" / "quick" / "08_temporal.json")
    assert found["fig10c"]["right"]["n"] == 6 and found["fig10a"]["answers"]["base"]["n"] == 6 and found["fig10c"]["right"]["value"] > .5
    assert found["fig10c"]["swapped"]["noise"]["n"] == 3 and found["fig10c"]["from_files"] is None


@pytest.mark.slow
def test_a_picture_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(runner.RunError, match="takes no videos"): runner.run_notebook(runner.find_notebook("08"), "llava-tiny", quick=True)


def test_reproduce_asks_what_a_model_was_trained_on(tmp_path):
    names = lambda model: {p.stem for p in runner.experiments(model)}
    assert "08_temporal" not in names("llava-tiny") and "04_steering" in names("llava-tiny")
    folder = tmp_path / "video"; folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}))
    assert runner.medium_of(str(folder)) is None and {"08_temporal", "04_steering"} <= names(str(folder))
    (folder / "training.json").write_text(json.dumps({"recipe": {"frames": 8}}))
    assert runner.medium_of(str(folder)) == "video"
    for stage, medium in ((dict(still=True), "video"), (dict(relations=2), "video"), (dict(still=True, relations=2), None)):
        (folder / "training.json").write_text(json.dumps({"recipe": {"frames": 8, "stages": [stage]}}))
        assert runner.medium_of(str(folder)) == medium
    assert runner.medium_of("llava-hf/llava-1.5-7b-hf") == "image" and runner.medium_of("Qwen/Qwen2-VL-2B-Instruct") is None
