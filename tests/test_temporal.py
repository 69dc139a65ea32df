"Time: videos shown backwards, IDs of moments against their definition, the notebook for every video family."
import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy.stats import spearmanr
from tiny import tiny

from spatialid import runner, temporal as tm
from spatialid.benchmarks import write_mvbench
from spatialid.questions import BEFORE_AFTER
from spatialid.scenes import FreeScenes
from spatialid.videos import GridVideos, Videos
from spatialid.extraction import SpatialIDs, extract, grid_axes, grid_statistics, orthonormal
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.store import read_results
from spatialid.stats import rng, as_text
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
        assert [f.tobytes() for f in back.image] == [f.tobytes() for f in q.image][::-1]
        assert (back.text, back.answers) == (q.text, q.answers)
    with pytest.raises(ValueError, match="take fewer things or more frames"):
        tm.passing(SCENES[0], 0, n_frames=4, stay=4)


def test_the_mirror_leaves_the_order():
    q = Videos(SCENES)[1].query(*[o.name for o in SCENES[1].things[:2]])
    side = tm.sideways(q)
    assert side.truth == q.truth
    assert all(ImageOps.mirror(a).tobytes() == b.tobytes() for a, b in zip(q.image, side.image))


def test_order_questions():
    queries = tm.order_questions(SCENES, 12, seed=1, instruction=" Answer in one word.")
    assert len(queries) == 12 and {q.truth for q in queries} == {"before", "after"}
    assert all(q.answers == ("before", "after") and q.text.endswith("? Answer in one word.") for q in queries)
    again = tm.order_questions(SCENES, 12, seed=1, instruction=" Answer in one word.")
    assert [q.text for q in queries] == [q.text for q in again]


def test_order_questions_of_rows():
    video = [Image.new("RGB", (8, 8))] * 2
    def row(i):
        words = dict(subject="cup", object=str(i))
        return SimpleNamespace(query=lambda: Query(video, BEFORE_AFTER, words, ("before", "after"), "before"))
    given = tm.order_questions([row(i) for i in range(5)], 3, instruction=" Now.")
    assert len({q.words["object"] for q in given}) == 3 and all(q.text.endswith("? Now.") for q in given)


def test_side_questions():
    queries = tm.side_questions(SCENES, 6, seed=2, instruction=" Now.")
    assert len(queries) == 6 and {q.truth for q in queries} == {"left", "right"}
    assert all(q.answers == ("left", "right") and q.text.endswith("? Now.") and len(q.image) == 8 for q in queries)
    assert len({q.image[-1].tobytes() for q in queries}) == 6, "one for each video"


def test_a_model_for_videos():
    with pytest.raises(ValueError, match="takes no videos"): tm.video_model("llava-tiny", 8)
    with pytest.raises(ValueError, match="frames is 4: .* at least 5"): tm.video_model("onevision-tiny", 4)
    vlm = tm.video_model("onevision-tiny", 8)
    assert tm.trained_px(vlm) == 80 and tm.trained_px(VLM(*tiny("llava_onevision")), 224) == 224


def test_untrained_weights():
    vlm = VLM(*tiny("llava_onevision"), "small")
    one, other = tm.untrained_copy(vlm, 3), tm.untrained_copy(vlm, 3)
    trained, first, second = (dict(m.model.named_parameters()) for m in (vlm, one, other))
    assert all(torch.equal(first[k], second[k]) for k in first) and one.name == "small, untrained"
    assert any(not torch.equal(first[k], trained[k]) for k in first)


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
            centred = [p - mean[v.a_cell] for p, v in zip(phi, items) if v.b_cell == cell]
            slow.setdefault((b, cell), []).append(np.mean(centred, 0))
    assert ids.table.shape == (2, 1, 4, 3, 4, 32)
    for (b, (f, x)), found in slow.items():
        got = ids.table[ids.objects.index(b), 0, :, x, f][[0, 2]]
        assert np.abs(got - np.mean(found, 0)).max() < 1e-9
    def at(f, x): return np.mean(slow["star", (f, x)], 0)[1]
    in_time = [np.mean([at(f, x) for x in range(3)], 0) for f in range(4)]
    assert np.allclose(tm.in_time(ids, 3)[0], in_time, atol=1e-9)


def test_ids_with_the_order_fixed_are_means_of_single_questions():
    vlm = in_float64(VLM(*tiny("llava_onevision")))
    grid = GridVideos(tm.partners(["cup", "star", "cat"], 1), n_frames=4, px=16)
    assert grid.pairs == [("star", "cup"), ("cat", "star"), ("cup", "cat")]
    found = tm.fixed_order_ids(vlm, grid, ["cat", "star"], 0, 2)
    assert found.shape == (2, 3, 32)
    picked = [v for v in grid if v.b == "cat" and v.a_cell[0] == 0 and v.b_cell[0] == 2]
    alone = [vlm.run(v.query(), [2], "subject").residual(2)[0, 0].numpy() for v in picked]
    assert len(alone) > 1 and np.abs(found[0, 1] - np.mean(alone, 0)).max() < 1e-9


def test_grids_of_more_columns_than_rows():
    "Axes and statistics of a 3 × 8 grid: exact for a linear code, equal to slow sums for noise."
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 16))
    linear = np.arange(8)[None, :, None] * a + np.arange(3)[:, None, None] * b
    h, v = grid_axes(linear)
    assert np.allclose(h / np.linalg.norm(h), a / np.linalg.norm(a))
    assert np.allclose(v / np.linalg.norm(v), b / np.linalg.norm(b))
    flat = linear.reshape(24, -1)
    assert np.isclose(grid_statistics(flat @ flat.T, 3)["r2"], 1) and grid_statistics(flat @ flat.T, 4)["r2"] < .99
    noise = g.normal(size=(3, 8, 16))
    across = [noise[y, i] - noise[y, j] for y in range(3) for i in range(8) for j in range(i)]
    down = [noise[i, x] - noise[j, x] for x in range(8) for i in range(3) for j in range(i)]
    slow = np.mean(across, 0), np.mean(down, 0)
    assert np.allclose(grid_axes(noise), slow)
    flat = (noise - noise.mean((0, 1))).reshape(24, -1)
    design = np.stack(np.meshgrid(np.arange(8), np.arange(3)), -1).reshape(24, 2)
    design = design - design.mean(0)
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
        total, largest = (c**2).sum(), np.linalg.svd(c, compute_uv=False)[0]
        slow = {"r2": (fit**2).sum() / total, "axis": (on**2).sum() / total, "pc1": largest**2 / total,
                "order": spearmanr(on, time)[0], "last": steps[-1] / steps[:-1].mean()}
        for name, value in slow.items(): assert np.isclose(stats[name], value), name
    assert all(v == 0 for v in tm.time_statistics(np.zeros((8, 8))).values())


def test_rank_correlation():
    values = np.random.default_rng(3).normal(size=(4, 9)).round(1)
    assert np.allclose(tm.rank_correlation(values), [spearmanr(v, range(9))[0] for v in values])
    assert tm.rank_correlation(np.ones(5)) == 0


def test_a_line_in_time():
    line = np.arange(8.)[:, None] * np.eye(5)[0]
    assert np.allclose([*tm.time_statistics(line @ line.T).values()], 1)
    far = line + 3 * np.eye(8)[-1][:, None] * np.eye(5)[1]
    assert np.isclose(tm.time_statistics(far @ far.T)["last"], np.sqrt(10))
    backwards = line[::-1]
    assert np.isclose(tm.time_statistics(backwards @ backwards.T)["order"], 1), "the axis points from early to late"


def test_line_statistics_know_chance():
    g, drawn = np.random.default_rng(2), []
    for i in range(60):
        units = np.repeat(g.normal(size=(1, 8, 20)), 4, 0) + .01 * g.normal(size=(4, 8, 20))
        drawn.append(tm.line_statistics(units, 20, 200, seed=i)["r2"])
    assert 0 <= np.mean([d["p"] <= .05 for d in drawn]) <= .15
    assert abs(np.mean([d["null_mean"] for d in drawn]) - 1 / 7) < .02


def test_a_far_last_frame_has_a_long_last_step():
    g = np.random.default_rng(2)
    far = np.arange(8.)[:, None] * np.eye(20)[0]
    far[-1] += 5 * np.eye(20)[1]
    found = tm.line_statistics(np.stack([far] * 4) + .01 * g.normal(size=(4, 8, 20)), 50, 50)
    assert found["last"]["high"] > found["last"]["low"] > 4
    shown = tm.with_null(found, ("r2", "pc1"))
    assert shown["r2"].keys() == {"value", "null", "95 %"} and shown["pc1"] == {"value": as_text(found["pc1"])}


def test_layers():
    assert tm.middle_half(list(range(1, 9)), 8) == [3, 4, 5, 6]
    assert tm.layers_shown(list(range(1, 41)), 3) == [3, 11, 16, 21, 25, 30]
    ids = planted()
    ids.table[:, :, 1, :, :, 0] = np.arange(4.) # the second layer is a line
    assert tm.most_linear(ids, [1, 2], ["cup"]) == 2


def test_words_in_frames():
    line = np.arange(8.)[:, None] * np.eye(6)[2] * .5
    assert np.allclose(tm.in_frames(np.array([[0, 0, 1.5, 0, 9, 0], [0, 0, -.5, 0, 0, 0]]), line), [3, -1])


def test_order_words_do_not_depend_on_the_order():
    vlm = in_float64(VLM(*tiny("llava_onevision"))) # the pairs of names are padded to one length, which float32 notices
    pairs = [("cup", "star"), ("hot dog", "cat")]
    words = tm.order_words(vlm, pairs, [1, 2])
    both = [dict(subject="cup", object="star", x=x, y=y) for x, y in (("before", "after"), ("after", "before"))]
    queries = [Query(None, "Does the {subject} appear {x} or {y} the {object}?", words) for words in both]
    one = vlm.run(queries, [2], ["x", "y"]).residual(2).double().numpy()
    assert words.shape == (2, 2, 2, 32)
    assert np.allclose(words[0, 1, 0], (one[0, 0] + one[1, 1]) / 2)
    assert np.allclose(words[0, 1, 1], (one[0, 1] + one[1, 0]) / 2)


def test_words_that_say_nothing_of_time_stand_in_the_same_place():
    vlm = in_float64(VLM(*tiny("llava_onevision")))
    left_right = tm.order_words(vlm, [("cup", "star")], [2], words=("left", "right"))
    assert np.allclose(left_right[:, :, ::-1], tm.order_words(vlm, [("cup", "star")], [2], words=("right", "left")))
    assert not np.allclose(left_right, tm.order_words(vlm, [("cup", "star")], [2]))


def words_along(*steps, n=5):
    "Pairs of words whose second one lies further along the third direction by given steps."
    words = np.zeros((n, 2, 6))
    words[:, 1, 2] = steps
    return words


def test_the_gap_of_words():
    units = np.stack([np.arange(4.)[:, None] * np.eye(6)[2]] * 3)
    words = {"before/after": words_along(1, 2, 3, 4, 5), "left/right": words_along(1), "yes/no": words_along(-2)}
    found = tm.word_gaps(words, units, rng(0, "gap"))
    one = found["before/after"]
    assert one["value"] == 3 and one["n"] == 5 and 1 <= one["low"] < 3 < one["high"] <= 5
    assert found["yes/no"]["value"] == found["yes/no"]["low"] == -2
    assert found["over controls"]["value"] == 1, "the largest control counts by its size"
    assert np.isclose(found["over controls"]["low"], one["low"] - 2) and found["over controls"]["n"] == 5


def test_the_gap_of_words_by_hand():
    "Every draw resamples objects and pairs of names once, for all words."
    g = rng(1, "words")
    units, words = g.normal(size=(3, 4, 6)), {name: g.normal(size=(5, 2, 6)) for name in ("in question", "control")}
    found, draws, again = tm.word_gaps(words, units, rng(0, "gap"), 50), [], rng(0, "gap")
    for _ in range(50):
        pairs, objects = again.integers(5, size=5), again.integers(3, size=3)
        line = units[objects].mean(0)
        gap = {name: tm.in_frames((some[pairs, 1] - some[pairs, 0]).mean(0), line) for name, some in words.items()}
        draws.append(gap["in question"] - abs(gap["control"]))
    assert np.allclose(np.quantile(draws, [.025, .975]), [found["over controls"][end] for end in ("low", "high")])


def planted():
    "IDs of 4 frames × 3 places: frame f is f² along one direction, a place moves along another."
    table = np.zeros((2, 1, 2, 3, 4, 5))
    table[..., 0] = np.arange(4.)**2
    table[..., 1] = np.arange(3.)[:, None] - 1
    pairs = [("star", "cup"), ("cup", "star")]
    return SpatialIDs(table, np.ones((2, 1, 3, 4)), ["cup", "star"], [8], [1, 2], pairs, BEFORE_AFTER)


def test_moments():
    ids, go = planted(), lambda *a, **k: tm.moments(ids, *a, **k)(1, slice(0, 3))
    at = lambda f, **k: float(go(f, **k)[0][0, 0, 0])
    assert [at(f) for f in (1, 2, 4, 2.5, 0, 5)] == [0, 1, 9, 2.5, -1, 14]
    assert go(2)[1] is None and float(go(2, 3)[1][0, 0, 0]) == 4
    assert float(go(2)[0][0, 0, 1]) == 0, "places are averaged"
    assert ids.step((0, 2), (3, 2), 1)[0] == 9
    with pytest.raises(ValueError, match="from 0 to 3 and 2"): ids.step((0, 3), (3, 0), 1)


def added(edit, layer=1, batch=1):
    "What an edit adds to rows of zeros of width 5."
    group, new = edit
    assert group == "subject"
    return new(torch.zeros(batch, 1, 5, dtype=torch.float64), layer, slice(0, batch))[:, 0].numpy()


def test_pushes_in_time():
    ids = planted()
    assert np.allclose(added(tm.push_to(ids, 3, 2.)), [[8, 0, 0, 0, 0]])
    assert np.allclose(added(tm.push_to(ids, 3, 1., start=2)), [[3, 0, 0, 0, 0]])
    edits = tm.path_edits(ids, 1.)
    assert list(edits)[:3] == ["to -1", "to -0.5", "to 0"] and list(edits)[-4:] == [f"paper {f}" for f in range(1, 5)]
    assert np.allclose(added(edits["to 2.5"])[0, 0], 2.5) and np.allclose(added(edits["paper 4"])[0, 0], 9)


def test_noise_has_the_norm_of_the_ids_and_is_opposite_at_the_ends():
    ids = planted()
    ids.table += 1
    edits = tm.end_edits(ids, 2., 2, seed=0)
    assert list(edits)[:4] == ["ID first", "ID last", "noise first 0", "noise last 0"] and len(edits) == 2 + 2 * 2 * 2
    first, last = added(edits["noise first 0"], batch=3), added(edits["noise last 0"], batch=3)
    size = np.linalg.norm(last, axis=-1)
    assert np.allclose(size, np.linalg.norm(added(edits["ID last"])))
    assert np.allclose(first / np.linalg.norm(first, axis=-1, keepdims=True), -last / size[:, None])
    assert np.allclose(added(edits["outside last 0"])[:, 0], 0), "nothing along the frames"
    assert np.abs(added(edits["noise last 0"])[:, 0]).min() > .01
    assert len(tm.end_dose_edits(ids, [1, 2], 2, 0)) == 2 * 2 + 2 * 2 * 2


def test_steps_along_the_axes():
    ids = planted()
    cells = ids.at(1)
    assert np.allclose(tm.axis_step(cells, "time"), [9, 0, 0, 0, 0])
    assert np.allclose(tm.axis_step(cells, "space"), [0, 2, 0, 0, 0])
    edits = tm.axis_edits(ids, 2., 1, seed=0)
    assert list(edits) == ["time +", "time -", "space +", "space -", "time 0 +", "time 0 -", "space 0 +", "space 0 -"]
    assert np.allclose(added(edits["time +"]), [[9, 0, 0, 0, 0]])
    assert np.allclose(added(edits["space -"]), [[0, -2, 0, 0, 0]])
    assert np.allclose(added(edits["space 0 +"]), -added(edits["space 0 -"]))
    assert np.isclose(np.linalg.norm(added(edits["space 0 +"])), 2)


# --- what was steered

def swept(log_odds, base, truth, layers=(1,)):
    "A sweep with given log-odds of the second answer: {edit: (L, B)}, before (B,)."
    def answers(x): return torch.stack([torch.zeros(x.shape), x], -1)
    found = {name: answers(torch.as_tensor(np.array(x))) for name, x in log_odds.items()}
    return SimpleNamespace(log_probs=found, base_log_probs=answers(torch.as_tensor(base, dtype=torch.float64)),
                           truth=np.array(truth), layers=list(layers))


BASE = [-1., -1., 1., 1.]


def test_effects_and_turned_answers_at_the_ends():
    odds = {"ID first": [[-8., -2, -2, 2]], "ID last": [[6., -1, 2, 9]], "noise first 0": [[-1., -1, 1, 1]],
            "noise last 0": [[-1., 2, 1, 1]], "outside first 0": [BASE], "outside last 0": [BASE]}
    s = swept(odds, BASE, [0, 1, 1, 1])
    assert tm.first_answers(s).tolist() == [0, 0, 1, 1]
    effects = tm.end_effects(s, 1, 8)
    assert np.allclose(effects["ID"], [[2, 1 / 7, 4 / 7, 1]]) and np.allclose(effects["noise"], [[0, 3 / 7, 0, 0]])
    swaps = tm.end_swaps(s, 1, 1, np.ones(4, bool), 0)
    shares = {arm: one["value"] for arm, one in swaps.items()}
    assert shares == {"opposing ID": .5, "agreeing ID": 0, "noise": .25, "outside the span": 0,
                      "opposing less noise": .25}


def test_slopes_over_the_frames():
    rise, frames = np.array([1., 2, 3, 4]), np.arange(1., 6)
    odds = {f"{arm} {f:g}": [sign * rise * f + BASE] for f in frames for arm, sign in (("to", 1), ("paper", -1))}
    slopes = tm.frame_slopes(swept(odds, BASE, [0, 1, 1, 1]), 5, np.array([False, True, True, True]), 0)
    values = {name: one["value"] for name, one in slopes.items()}
    assert values.pop("truth before") is None
    assert np.allclose(list(values.values()), [3, 2, 3.5, 3, -3]) and slopes["truth after"]["n"] == 3
    assert tm.smaller_slope(slopes)["not_judged"] == "all videos have the same answer"
    both = {"truth before": dict(value=2, low=1, high=3, n=4), "truth after": dict(value=1, low=.5, high=2, n=5)}
    assert tm.smaller_slope(both)["n"] == 5


def test_slopes_with_frames_in_random_order():
    one = tm.permuted_slopes(np.arange(6.), 600, 0)
    assert abs(one["mean"]) < .05 and .3 < one["high"] < 1 and one["p"] < .01 and one["n"] == 600
    assert tm.permuted_slopes(np.arange(6.)[::-1], 200, 0)["p"] == 1


def test_dose_effects():
    odds = {"dose 1 first": [[0., 0, 0, 0]], "dose 1 last": [[1., 2, 3, 4]],
            "noise 0 1 first": [[0., 0, 0, 0]], "noise 0 1 last": [[-2., 2, -2, 2]]}
    ids, noise = tm.dose_effects(swept(odds, BASE, [0, 0, 1, 1]), [1], 1, np.array([False, False, True, True]), 0)
    assert ids[1]["value"] == 3.5 and noise[1]["value"] == 2 and ids[1]["n"] == 2


def test_cross_steering():
    def sweep_of(time, space):
        odds = {"time +": [[time] * 4, [0.] * 4], "time -": [[-time] * 4, [0.] * 4],
                "space +": [[0.] * 4, [space] * 4], "space -": [[0.] * 4, [-space] * 4]}
        odds |= {f"{axis} 0 {sign}": [[.1 * (sign == "+")] * 4] * 2 for axis in tm.AXES for sign in "+-"}
        return swept(odds, BASE, [0, 0, 1, 1], (3, 5))
    cross = {"time": sweep_of(2., .5), "space": sweep_of(-1., 0.)}
    at = tm.axis_layers(cross, 2)
    assert at["time"] == 3
    effects = tm.cross_effects(cross, {"time": 3, "space": 5}, 2, 1, 0)
    assert {name: round(one["value"], 6) for name, one in effects.items()} == {
        "time on time": 4, "time on time, random": .1, "time on space": -2, "time on space, random": .1,
        "space on time": 1, "space on time, random": .1, "space on space": 0, "space on space, random": .1}
    assert tm.off_over_on(cross, "time", 3, 2, effects, 0)["value"] == .5
    none = tm.off_over_on(cross, "space", 5, 2, effects, 0)
    assert none["value"] is None and none["n"] == 2 and "random directions" in none["not_judged"]


def test_the_mirror_of_a_video_is_measured_in_units_of_the_reversal(monkeypatch):
    shift = SimpleNamespace(used=np.array([True, True, False]), denominators=np.array([2., 4, 0]))
    side = SimpleNamespace(shift=lambda group: SimpleNamespace(numerators=np.array([[1., 2, 9], [0, 0, 9]])))
    monkeypatch.setattr(tm, "sweep", lambda vlm, base, source, groups: side)
    found = tm.sideways_shift(None, [], SimpleNamespace(shift=lambda group: shift))
    assert [one["value"] for one in found] == [.5, 0] and found[0]["n"] == 2
    shift.used[:] = False
    assert tm.sideways_shift(None, [], SimpleNamespace(shift=lambda group: shift)) == []


def test_answers_from_files():
    queries = tm.order_questions(SCENES, 4)
    again = tm.through_files(queries)
    assert [q.text for q in again] == [q.text for q in queries] and all(len(q.image) == 8 for q in again)
    off = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(again[0].image, queries[0].image)]
    assert 0 < max(off) < 12, "nearly the same pictures"
    vlm = SimpleNamespace(run=lambda some: SimpleNamespace(beliefs=["before"] * 4))
    found = tm.answers_from_files(vlm, queries, ["before", "before", "before", "after"])
    assert found["same_answer"]["value"] == .75
    assert found["right"]["value"] == np.mean([q.truth == "before" for q in queries])


def test_what_is_not_judged():
    one, good, poor = (dict(value=v, low=v - .1, high=v + .1, n=9) for v in (.3, .8, .55))
    assert tm.judged(one, good) is one
    assert tm.judged(one, good, poor)["not_judged"] == f"the model answers {as_text(poor)} of these questions right"


def test_the_weakest_of_several_models(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    def of(low): return {"claims": {"line_over_null": {"value": .5, "low": low}}, "layers": {1: np.arange(2)}}
    folder = tmp_path / "results" / "other"
    folder.mkdir(parents=True)
    (folder / "08_temporal.json").write_text(json.dumps({"claims": of(.1)["claims"]}))
    found = tm.with_stored("mine", of(.2), ["other", "none"])
    assert list(found) == ["mine", "other"] and found["mine"]["layers"] == {"1": [0, 1]}
    assert tm.weakest_line(found, [])["low"] == .1
    assert tm.weakest_line(found, ["none"])["not_judged"] == "no results of none yet"
    assert "no other model" in tm.weakest_line({"mine": of(.2)}, [])["not_judged"]


# --- figures

def test_the_plane_has_later_frames_to_the_right():
    ids = planted()
    ids.table[..., 0] *= -1
    xy = tm.plane(ids, 1)
    assert xy.shape == (4, 2) and xy[-1, 0] > xy[0, 0] and np.allclose(np.abs(xy[-1, 0] - xy[0, 0]), 9)


def test_figures_of_ids():
    ids, fig = planted(), Figure()
    frames, cells, layers = fig.subplots(1, 3)
    tm.draw_frames(frames, ids, 1)
    tm.draw_words(frames, ids, 1, np.array([[-1., 0, 0, 0, 0], [1, 0, 0, 0, 0]]))
    heights = frames.collections[0].get_offsets()[:, 1]
    assert np.allclose(np.diff(heights) * 3, [1, 3, 5]), "in mean steps"
    assert [text.get_text() for text in frames.texts] == ["before", "after"]
    tm.draw_cells(cells, ids, 1)
    assert len(cells.collections) == 4 and len(cells.lines) == 3 + 4
    by_layer = {layer: tm.line_statistics(tm.in_time(ids, layer), 20, 20) for layer in (1, 2)}
    tm.draw_layers(layers, by_layer, {})
    assert np.allclose(layers.lines[0].get_ydata(), [one["r2"]["value"] for one in by_layer.values()])
    gaps = {layer: {"before/after": by_layer[layer]["r2"], "over controls": by_layer[layer]["r2"]} for layer in (1, 2)}
    beside = Figure().subplots()
    tm.draw_gaps(beside, gaps)
    assert [text.get_text() for text in beside.get_legend().get_texts()] == ["before/after"]


def test_figures_of_steering():
    frames = np.arange(1, 6)
    odds = {f"to {m:g}": [np.array([1., 2, 3, 4]) * m] for m in tm.path_moments(5)}
    odds |= {f"paper {f}": [np.zeros(4)] for f in frames}
    fig = Figure()
    panels = fig.subplots(1, 4)
    tm.plot_truths(panels[:2], swept(odds, BASE, [0, 0, 1, 1]), 5, np.ones(4, bool), 0)
    after = next(line for line in panels[0].lines if line.get_label() == "“after”")
    assert np.allclose(after.get_ydata(), 1.5 * tm.path_moments(5) + 1)
    assert panels[1].get_title() == "truth: after (n = 2)"
    one = dict(value=1., low=0., high=3., n=4)
    tm.draw_effects(panels[2], [1, 2], {"ID": [one, one], "noise": [one, one]}, 2)
    tm.draw_doses(panels[3], {1: one, 5: one}, {1: one, 5: one})
    assert panels[3].get_xscale() == "log" and np.allclose(tm.ends_of([one]), [[1], [2]])
    bars = Figure().subplots()
    tm.draw_cross(bars, {"time on space": one, "time on space, random": one})
    assert [text.get_text() for text in bars.get_yticklabels()] == ["time on left/right"]


def test_figure_a13_has_a_row_for_each_model():
    line = dict(value=.9, low=.8, high=1., n=4, null_high=.5)
    numbers = {"layer": 3, "lines": {str(k): [[0, 0], [1, 1]] for k in range(1, 9)},
               "by_layer": {str(k): {"r2": line} for k in range(1, 9)}}
    fig = Figure()
    layers = {"one": list(range(1, 9)), "two": [1, 2, 3, 4]}
    tm.plot_planes(fig, {name: {"layers": some, "fig10b": numbers} for name, some in layers.items()})
    shown = [ax for ax in fig.axes if ax.axison]
    assert len(shown) == 4 + 2 and shown[0].get_ylabel().startswith("one")
    assert [ax.title.get_weight() for ax in shown[:2]] == ["bold", "normal"]


def test_frames_side_by_side():
    queries, fig = tm.order_questions(SCENES, 2), Figure()
    tm.plot_videos(fig, queries)
    assert len(fig.axes) == 16 and fig.axes[8].get_ylabel() == queries[1].truth and fig.axes[7].get_title() == "8"
    ax, video = Figure().subplots(), GridVideos([("cup", "star")], px=16)[5]
    tm.plot_grid_video(ax, video)
    assert f"star: frame {video.b_cell[0] + 1}" in ax.get_title()


# --- the notebook

LITTLE = dict(n_pairs=6, n_steered=6, n_objects=3, n_words=4, n_permuted=100)

@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3"])
@pytest.mark.slow
def test_the_notebook_runs_for_other_families(family, tmp_path, monkeypatch):
    """Random weights, loaded from a folder as any model: nothing is judged where the model knows nothing.

    LLaVA-OneVision is the bundled one."""
    model, processor = tiny(family)
    folder = tmp_path / f"random-{family}"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    runner.run_notebook(runner.find_notebook("08"), str(folder), quick=True, px=24, **LITTLE)
    found = read_results((tmp_path / "results" / folder.name / "quick" / "08_temporal.json"))
    assert found["claims"]["emerges"]["not_judged"] and found["fig10b"]["videos"] == 336
    assert found["claims"]["objects_band_width"]["not_judged"]
    assert found["claims"]["before_over_controls"]["n"] == 4
    assert found["provenance"]["params"]["quick"]
    assert found["fig10c"]["from_files"]["same_answer"]["n"] == found["fig10c"]["right"]["n"]
    for figure in ("fig10a", "fig10b", "fig10c", "figA13", "figA17"):
        assert (tmp_path / "results" / folder.name / "quick" / f"{figure}.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_notebook_asks_about_files_in_the_format_of_mvbench(tmp_path, monkeypatch):
    "Videos as mp4, read back: a missing one is named and left out, and Figures 10A and 10C are of the others."
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    folder = write_mvbench(tmp_path / "mvbench", 12)
    sorted((folder / "video").glob("*.mp4"))[0].unlink()
    runner.run_notebook(runner.find_notebook("08"), "onevision-tiny", benchmark=str(folder), quick=True, **LITTLE)
    found = read_results((tmp_path / "results" / "onevision-tiny" / "quick" / "08_temporal.json"))
    assert found["fig10c"]["right"]["n"] == 6 and found["fig10a"]["answers"]["base"]["n"] == 6
    assert found["fig10c"]["right"]["value"] > .5
    assert found["fig10c"]["swapped"]["noise"]["n"] == 3 and found["fig10c"]["from_files"] is None


@pytest.mark.slow
def test_a_picture_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(runner.RunError, match="takes no videos"):
        runner.run_notebook(runner.find_notebook("08"), "llava-tiny", quick=True)


def test_reproduce_asks_what_a_model_was_trained_on(tmp_path):
    names = lambda model: {p.stem for p in runner.experiments(model)}
    assert "08_temporal" not in names("llava-tiny") and "04_steering" in names("llava-tiny")
    folder = tmp_path / "video"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}))
    assert runner.medium_of(str(folder)) is None and {"08_temporal", "04_steering"} <= names(str(folder))
    (folder / "training.json").write_text(json.dumps({"recipe": {"frames": 8}}))
    assert runner.medium_of(str(folder)) == "video"
    stages = (dict(still=True), "video"), (dict(relations=2), "video"), (dict(still=True, relations=2), None)
    for stage, medium in stages:
        (folder / "training.json").write_text(json.dumps({"recipe": {"frames": 8, "stages": [stage]}}))
        assert runner.medium_of(str(folder)) == medium
    assert runner.medium_of("llava-hf/llava-1.5-7b-hf") == "image"
    assert runner.medium_of("Qwen/Qwen2-VL-2B-Instruct") is None
