"Mirror swap: pairs and groups are what their names say, readings of curves are right, results are complete."
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spatialid.store import read_results
from spatialid.groups import figure4_groups, object_spans, text_but_objects, whole_objects
from spatialid import mirror_swap as ms, stats
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.scenes import COLOURS, FreeScenes
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.questions import left_right, mirrored
from spatialid.stats import rng, absolute, as_text
from spatialid.store import style
from spatialid.sweeps import sweep, third
from tiny import tiny, tiny_llava

ROOT = Path(__file__).parents[1]
TWO = dict(px=32, things=(2, 2))


@pytest.fixture(scope="module")
def vlm(): return VLM(*tiny_llava(px=32))


@pytest.fixture(scope="module")
def base(): return left_right(FreeScenes(1000, seed="test", px=32), 6)


def same(a, b): return np.array_equal(np.asarray(a), np.asarray(b))


# --- pairs

@pytest.mark.slow
def test_mirroring_twice_is_the_identity(base):
    for q in base:
        once, twice = mirrored(q), mirrored(mirrored(q))
        assert same(twice.image, q.image) and twice.truth == q.truth
        assert not same(once.image, q.image) and {once.truth, q.truth} == {"left", "right"} and once.text == q.text


def test_mirroring_leaves_other_truths_alone():
    q = Query(Image.new("RGB", (8, 8)), "Is the {subject} red or blue?", {"subject": "cup"}, ("red", "blue"), "red")
    assert mirrored(q).truth == "red"


def test_questions_are_in_one_wording_and_order(base):
    assert all(q.answers == ("left", "right") and " left or right " in q.text and q.truth in q.answers for q in base)
    again = left_right(FreeScenes(1000, seed="test", px=32), 6)
    assert all(a.text == b.text and same(a.image, b.image) for a, b in zip(base, again))
    instructed = left_right(FreeScenes(1000, seed="test", px=32), 2, instruction=" Answer {} or {}.")
    assert instructed[0].text == base[0].text + " Answer left or right."


@pytest.mark.slow
def test_the_benchmark_gives_one_question_for_each_image(tmp_path):
    rows = Benchmark(write_benchmark(tmp_path, 40, px=32))
    questions = left_right(rows, 1000)
    pictures = {row.image_id for row in rows if row.kind == "left_right"}
    assert len(questions) == len(pictures) and {q.kind for q in questions} == {"left_right"}
    assert [q.text for q in left_right(rows, 5)] == [q.text for q in questions[:5]]
    assert [q.text for q in left_right(rows, 5, seed=1)] != [q.text for q in questions[:5]]


def looks_of(scene): return [(t.x, t.y, t.size, t.depth, t.name) for t in scene.things]


@pytest.mark.parametrize("i", range(4))
def test_repainting_changes_the_colours_of_the_things_and_nothing_else(i):
    "Another colour of the palette for each; the same boxes, and the same pixels outside of what is drawn."
    scene = FreeScenes(50, seed="repaint", px=64)[i]
    other = ms.repainted(scene, rng(0, i))
    assert all(a.colour != b.colour and b.colour in COLOURS for a, b in zip(scene.things, other.things))
    assert looks_of(other) == looks_of(scene) and other.horizon == scene.horizon
    (before, boxes), (after, others) = scene.canvas(), other.canvas()
    assert boxes == others
    drawn = scene.canvas(backdrop=np.full((64, 64, 3), -1e6, np.float32))[0] > -1e6  # wherever a thing covers anything
    assert np.array_equal(before[~drawn], after[~drawn]) and not np.array_equal(before[drawn], after[drawn])
    for left, top, w, h in boxes.values():
        there = np.s_[top:top + h, left:left + w]
        assert not np.array_equal(before[there], after[there])
    assert ms.repainted(scene, rng(0, i)) == other


def test_every_other_colour_can_be_drawn():
    thing = FreeScenes(1, seed="repaint", **TWO)[0]
    drawn = {ms.repainted(thing, rng(0, k)).things[0].colour for k in range(80)}
    assert drawn == set(COLOURS) - {thing.things[0].colour}


def test_renders_cannot_be_repainted():
    scene = FreeScenes(1, seed="repaint", **TWO)[0]
    renders = replace(scene, things=tuple(replace(thing, colour=None) for thing in scene.things))
    with pytest.raises(ValueError, match="bring their own colours"): ms.repainted(renders, rng(0))


def test_controls_ask_the_same_of_other_colours(base):
    scenes = FreeScenes(1000, seed="test", px=32)
    controls = ms.attribute_controls(base, scenes)
    assert list(controls) == ["repainted", "hues"] == list(ms.ATTRIBUTES)
    for queries in controls.values():
        assert [(q.text, q.truth, q.answers) for q in queries] == [(q.text, q.truth, q.answers) for q in base]
        assert not any(same(a.image, b.image) for a, b in zip(base, queries))
    assert all(same(q.image, ms.recoloured(base[i], 0, i).image) for i, q in enumerate(controls["hues"]))
    again, other = (ms.attribute_controls(base, scenes, seed)["repainted"][0].image for seed in (0, 1))
    assert same(again, controls["repainted"][0].image) and not same(again, other)


def test_photographs_have_the_hues_alone(base, tmp_path):
    assert list(ms.attribute_controls(base, Benchmark(write_benchmark(tmp_path, 4, px=32)))) == ["hues"]


def test_recolouring_is_seeded_by_row_and_keeps_shape_and_truth(base):
    q = base[0]
    one, again, other = ms.recoloured(q, 0, 3), ms.recoloured(q, 0, 3), ms.recoloured(q, 0, 4)
    assert same(one.image, again.image) and not same(one.image, other.image)
    assert not same(one.image, ms.recoloured(q, 1, 3).image)
    assert one.truth == q.truth and one.image.size == q.image.size
    value = [np.asarray(p.convert("HSV"))[..., 2].astype(int) for p in (q.image, one.image)]
    assert abs(value[0] - value[1]).max() <= 2  # hue and saturation change, brightness does not


def test_recolouring_handles_grey_and_wide_pictures():
    assert ms.recolour(Image.new("L", (20, 8), 90), rng(0)).size == (20, 8)


def test_exchanging_colours_moves_nothing():
    scenes = FreeScenes(60, seed="colours", **TWO)
    base, source = ms.colour_pairs(scenes, 10)
    assert len(base) == len(source) == 10
    for a, b in zip(base, source):
        assert a.text == b.text and {a.truth, b.truth} == set(a.answers) == {a.words["first"], a.words["second"]}
        assert not same(a.image, b.image)
    scene = next(s for s in scenes if len({t.colour for t in s.things}) == 2)
    colours = [thing.colour for thing in scene.things]
    swapped = replace(scene, things=tuple(replace(t, colour=c) for t, c in zip(scene.things, colours[::-1])))
    assert scene.canvas()[1] == swapped.canvas()[1]  # the same boxes


def test_a_scene_of_one_colour_has_no_colour_question():
    scene = next(s for s in FreeScenes(200, seed="colours", **TWO) if len({t.colour for t in s.things}) == 1)
    assert ms.colour_pair(scene, rng(0)) is None


def test_moving_mirrors_the_places_alone():
    scene = FreeScenes(5, seed="moved", **TWO)[0]
    there = ms.moved(scene)
    assert [1 - t.x for t in there.things] == pytest.approx([t.x for t in scene.things])
    looks = lambda scene: [(t.y, t.size, t.name, t.colour) for t in scene.things]
    assert looks(there) == looks(scene)
    questions = [left_right([s], 1) for s in (scene, there)]
    if questions[0]:
        (here, *_), (moved, *_) = questions
        assert here.text == moved.text and here.truth != moved.truth


# --- groups

def test_released_text_begins_two_image_tokens_early(vlm, base):
    q = base[0]
    text, released, image = (vlm.positions(q, g) for g in ("text", figure4_groups(vlm, "released")["text"], "image"))
    assert released == image[-2:] + text
    others = lambda protocol: {k: v for k, v in figure4_groups(vlm, protocol).items() if k != "text"}
    assert others("released") == others("paper")
    with pytest.raises(KeyError): figure4_groups(vlm, "other")


def characters(vlm, q, rows):
    "The words of the question that the tokens touch."
    layout = vlm.layout(q)
    spans = [layout.offsets[row + len(layout.tail)] for row in rows]
    touched = lambda m: any(start < m.end() and m.start() < end for start, end in spans)
    return {m.group() for m in re.finditer(r"\w+", q.text) if touched(m)}


def test_groups_of_words(vlm, base):
    for q in base:
        subject, object = q.words["subject"], q.words["object"]
        whole = whole_objects(vlm)(q)
        assert characters(vlm, q, whole) == {subject, object}
        assert set(vlm.positions(q, "objects")) <= set(vlm.positions(q, whole_objects(vlm)))
        beside = whole_objects(vlm, 1)(q)
        # the neighbour may be the bare space before the word
        assert set(whole) < set(beside) and len(beside) == len(whole) + 4
        assert characters(vlm, q, beside) <= {subject, object, "the", "to"}
        assert not set(text_but_objects(vlm)(q)) & set(vlm.positions(q, whole_objects(vlm)))
        rest, words = (vlm.positions(q, group(vlm)) for group in (text_but_objects, whole_objects))
        assert sorted(rest + words) == vlm.positions(q, "text")


@pytest.mark.parametrize("draw", range(5))
def test_random_words_avoid_objects_answers_and_everything_special(vlm, base, draw):
    group = ms.random_words(vlm, 2, lambda q: object_spans(q) + q.answer_spans(), draw)
    for q in base:
        rows = group(q)
        assert len(set(rows)) == 2 and rows == group(q)
        assert characters(vlm, q, rows) <= {"Is", "the", "to", "or", "of"}
        assert not set(vlm.positions(q, group)) & set(vlm.positions(q, ("objects", "answers", "last", "image")))


def test_random_words_differ_between_draws_and_run_out_with_a_clear_error(vlm, base):
    draws = {tuple(ms.random_words(vlm, 2, object_spans, i)(base[0])) for i in range(8)}
    assert len(draws) > 1
    with pytest.raises(ValueError, match="has only"): ms.random_words(vlm, 99, object_spans, 0)(base[0])


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "smolvlm"])
def test_groups_on_other_families(family, base):
    vlm, q = VLM(*tiny(family)), base[0]
    drawn = ms.random_words(vlm, 2, lambda q: object_spans(q) + q.answer_spans(), 0)
    for group in (whole_objects(vlm, 1), text_but_objects(vlm), drawn):
        assert set(vlm.positions(q, group)) < set(vlm.positions(q, "text"))


# --- belief shift

def test_image_and_text_tile_what_differs(vlm, base):
    "The identity the notebook shows: the swap of one part is the swap of the other part the other way round."
    vlm64 = VLM(*tiny_llava(px=32, dtype=torch.float64))
    source = [mirrored(q) for q in base]
    groups = {name: figure4_groups(vlm64)[name] for name in ("image", "text")}
    there, back = sweep(vlm64, base, source, groups), sweep(vlm64, source, base, groups, plain=True)
    for a, b in (("image", "text"), ("text", "image")):
        assert (there.log_probs[a] - back.log_probs[b]).abs().max() < 1e-9
    one, other = there.shift("image"), back.shift("text")
    assert np.allclose(one.numerators / one.denominators + other.numerators / other.denominators, 1, atol=1e-6)


@pytest.fixture(autouse=True)
def a_colour(monkeypatch): monkeypatch.setitem(ms.GROUP_COLOURS, "a", "k")


def fake(numerators, denominators, truth=None):
    "A sweep of one group 'a' with given differences of logits: base 0, so patched = −numerator."
    n = len(denominators)
    def pair(d):
        d = torch.as_tensor(d, dtype=torch.float64)
        return torch.stack([d, torch.zeros_like(d)], -1)
    from spatialid.sweeps import Sweep
    edited, source = pair(-np.asarray(numerators)), pair(-np.asarray(denominators))
    return Sweep([*range(1, len(numerators) + 1)], {"a": edited}, pair(np.zeros(n)), source,
                 np.zeros(n, int) if truth is None else truth, "fast", None, 0.)


def test_curves_are_ratios_of_sums_and_count_what_they_leave_out():
    s = fake([[1., 3, 50], [2., 6, 50]], [2., 6, .01])
    c = ms.curves(s, {"b": ["a", "a"]}, draws=50)
    assert np.allclose(c["a"], [[.5, 1]] * 51) and np.allclose(c["b"], c["a"])
    assert (c.n, c.excluded) == (2, 1) and c.threshold == .5 and len(c.denominators) == 3
    none = ms.curves(fake([[1.]], [.01]))
    assert (none.n, none.excluded) == (0, 1) and all(np.isnan(curve).all() for curve in none.draws.values())
    assert ms.estimate(none["a"][:, 0], 0)["value"] is None


@pytest.mark.parametrize("n", [3, 8, 28, 32])
def test_thirds_cover_all_layers_but_the_last(n):
    parts = [third(name, n) for name in ("first", "middle", "last")]
    assert sum(parts, []) == list(range(1, n)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    if n == 8: assert parts == [[1, 2], [3, 4, 5], [6, 7]]


def test_crossing_is_interpolated_first_and_upward():
    layers, flat = [2, 4, 6, 8], np.zeros((1, 4))
    assert ms.crossing(flat, np.array([[-1., 3, -1, 1]]), layers)[0] == 2.5
    assert ms.crossing(flat, np.array([[-1., 0, 2, 2]]), layers)[0] == 4
    assert np.isnan(ms.crossing(flat, np.array([[1., 1, 1, 1], [-1, -1, -1, -1], [1, -1, -1, -1]]), layers)).all()


def test_band_of_known_shapes():
    layers = np.arange(1, 10)
    triangle = np.maximum(0, 1 - np.abs(layers - 5) / 4.)
    assert ms.band(triangle, layers) == (3, 7)
    assert ms.width(triangle[None], layers)[0] == 4 and ms.peak(triangle[None], layers)[0] == 5
    assert ms.band(np.ones(9), layers) == (1, 9)  # never comes down: ends with the layers
    assert np.isnan(ms.width(-triangle[None] - 1, layers)[0]) and np.isnan(ms.peak(-triangle[None] - 1, layers)[0])


def test_share_in_the_middle():
    layers, even = np.arange(1, 10), np.ones((1, 9))
    assert ms.share_in_middle(even, layers, 9)[0] == 3 / 8  # layers 4 to 6 of 1 to 8
    assert ms.share_in_middle(np.where((layers > 3) & (layers < 7), 1., 0)[None], layers, 9)[0] == 1
    assert ms.share_in_middle(-even, layers, 9)[0] == -3 / 8  # an effect the other way is no effect of the kind claimed


def test_estimate_counts_draws_without_a_value():
    one = ms.estimate(np.array([2., 1, 3, np.nan, np.nan]), 7)
    assert one["value"] == 2 and 1 <= one["low"] <= one["high"] <= 3 and (one["n"], one["none"]) == (7, .5)
    assert ms.estimate(np.full(5, np.nan), 7) == {"value": None, "low": None, "high": None, "n": 7, "none": 1.0}
    assert as_text(ms.estimate(np.full(5, np.nan), 7)) == "none" and as_text(one, 1).startswith("2.0 [")


@pytest.mark.parametrize("low, high, expected", [
    (.1, .3, (.2, .1, .3)), (-.3, -.1, (.2, .1, .3)), (-.1, .3, (.1, 0, .3))])
def test_size_of_an_interval(low, high, expected):
    found = absolute({"value": (low + high) / 2, "low": low, "high": high, "n": 1})
    assert (found["value"], found["low"], found["high"]) == pytest.approx(expected)
    assert absolute({"value": -2, "low": None, "high": None, "n": 1})["value"] == 2
    assert absolute({"value": None, "low": None, "n": 0})["value"] is None


def test_signal_to_noise():
    g = np.random.default_rng(0)
    noise = ms.signal_to_noise(fake(g.normal(size=(5, 400)), np.ones(400)), ("a",))
    signal = ms.signal_to_noise(fake(3 + g.normal(size=(5, 400)), np.ones(400)), ("a",))
    assert noise["high"] < .3 and 2.5 < signal["low"] < 3 < signal["high"] < 3.5


def test_the_released_average_leaves_nothing_out():
    s = fake([[1., 3, 0]], [2., 6, 0])
    mean, std = ms.released_shift(s, "a", 0)
    shift = s.shift("a", "log_prob", 0)
    with np.errstate(all="ignore"): values = shift.numerators[0] / shift.denominators
    values = np.where(np.isfinite(values), values, 0)
    assert mean[0] == pytest.approx(values.mean()) and std[0] == pytest.approx(values.std(ddof=1)) and values[2] == 0


def test_belief_follows():
    pair = lambda d: torch.tensor([[x, 0.] for x in d])
    s = SimpleNamespace(base_log_probs=pair([1., 1, -1, -1]), source_log_probs=pair([-1., 1, 1, -1]),
                        truth=np.array([0, 0, 1, 1]))
    assert [ms.belief_follows(s)[k]["value"] for k in ("base", "source", "both")] == [1, .5, .5]
    assert ms.belief_follows(s, flips=False)["source"]["value"] == .5


def test_figures_can_be_drawn(vlm, base):
    from matplotlib.figure import Figure
    source = [mirrored(q) for q in base]
    s = sweep(vlm, base, source, figure4_groups(vlm))
    fig = Figure()
    ms.belief_figure(fig, base, source, s, 1, 2, "objects")
    assert len(fig.axes) == 4 and fig._suptitle.get_text() == base[1].text
    large = fake([[1., 2], [2., 3], [3., 3]], [2., 3])
    ax = Figure().subplots()
    ms.plot_curves(ax, ms.curves(large), ["a"], shift=1)
    assert list(ax.lines[0].get_xdata()) == [0, 1, 2] and "released" in ax.get_xlabel()


@pytest.mark.parametrize("n", [8, 30, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_the_legend_and_the_notes_stand_above_the_curves(n, shared):
    from matplotlib.figure import Figure
    curve = np.linspace(0, 1.6, n)[:, None] * [1., 2]
    with style():
        fig = Figure(figsize=(10.5, 4.2))
        panels = fig.subplots(1, 2, sharey=shared)
        for ax in panels: ms.plot_curves(ax, ms.curves(fake(curve, [1., 2])), ["a"], notes=2)
        ms.mark_layers(panels[0], .6 * n, .7 * n, "objects: half of the peak, ℓ = 17.5 … 19.6", 2, "k")
        fig.draw_without_rendering()
    for ax in panels:
        legend = ax.get_legend().get_window_extent().transformed(ax.transData.inverted())
        assert legend.y0 > 1.6 > 1 and len(ax.get_xticks()) <= 8 and ax.get_xticks()[-1] == n
    box, note = panels[0].get_window_extent(), panels[0].texts[0].get_window_extent()
    assert box.x0 < note.x0 and note.x1 < box.x1 and note.transformed(panels[0].transData.inverted()).y0 > 1.6
    assert note.y1 < panels[0].get_legend().get_window_extent().y0 and panels[0].get_ylim()[1] < 2.5


@pytest.mark.parametrize("layers, expected", [(range(1, 9), 8), (range(1, 33), 8), (range(2, 29), 7)])
def test_ticks(layers, expected):
    found = ms.eight_of(list(layers))
    assert len(found) == expected and found[-1] == max(layers)


# --- the notebook's files

def test_results_are_complete():
    "Every rule of claims.json finds its number, or the file says that the model cannot be judged."
    path = ROOT/"results"/"llava-tiny"/"02_mirror_swap.json"
    found = read_results(path)
    rules = [claim["rule"] for claim in json.loads((ROOT/"nbs"/"claims.json").read_text()) if claim["rule"]]
    rules = [rule for rule in rules if rule["notebook"] == "02_mirror_swap"]
    assert len(rules) == 7
    for rule in (part for rule in rules for part in rule.get("all", [rule])):
        one = found["claims"][rule["key"].removeprefix("claims.")]
        if "not_judged" in one:
            assert one["value"] is None and not found["judged"]["colours exchanged"]
            assert rule["key"].split(".")[1] in ms.CLAIMS_OF["colours exchanged"]
        else:
            assert all(isinstance(one[k], (int, float)) for k in ("value", "low", "high", "n"))
    provenance = found["provenance"]
    assert provenance["organism"] and provenance["protocol"] == "paper" and provenance["params"]["n_scenes"] >= 200
    names = {"image", "text", "objects", "subject", "object", "relation words", "last token"}
    curves = found["fig4a"]["curves"]
    assert names <= set(curves) and all(len(c["value"]) == len(found["layers"]) for c in curves.values())
    assert {"crossing", "peak", "width"} <= set(found["fig4a"]["readings"]) and found["fig4a"]["complement_gap"] < 1e-3
    assert set(found["fig4b"]["numerators"]) == {"mirror", "repainted", "hues"}
    assert found["fig4b"]["control"] == "repainted"
    assert found["claims"]["attribute_signal"] == found["fig4b"]["signal_to_noise"]["repainted"]
    for figure in ("fig4a", "fig4b", "a14", "a15", "a6"): assert (path.parent/f"{figure}.png").stat().st_size > 5000


def test_the_stored_log_probabilities_give_the_stored_curve():
    from safetensors.torch import load_file
    folder = ROOT/"results"/"llava-tiny"
    t, found = load_file(folder/"02_mirror_swap.safetensors"), read_results(folder/"02_mirror_swap.json")
    truth = t["mirror/truth"]
    def lead(x):
        right = truth.expand(x.shape[:-1])[..., None]
        return (x.gather(-1, right) - x.gather(-1, 1 - right))[..., 0].double()
    base, source, patched = (lead(t[f"mirror/{k}"]) for k in ("base", "source", "image"))
    used = (base - source).abs() >= found["fig4a"]["threshold"]
    curve = (base - patched)[:, used].sum(1) / (base - source)[used].sum()
    assert np.allclose(curve, found["fig4a"]["curves"]["image"]["value"], atol=1e-5)


# --- the parts of the notebook's experiment

def test_the_shortest_run_of_most_of_the_effect():
    "Against all runs; of several as short the one that holds most."
    g = np.random.default_rng(0)
    for _ in range(60):
        sizes = g.random(9) ** 4
        ends = [(first, last) for first in range(9) for last in range(first, 9)]
        held = {(first, last): sizes[first:last + 1].sum() for first, last in ends}
        enough = [run for run in ends if held[run] >= .8 * sizes.sum()]
        assert stats.shortest_run(sizes) == min(enough, key=lambda run: (run[1] - run[0], -held[run]))
    curve = np.stack([[0, 0, 0, 1, -1, 0, 0, 9.], np.full(8, np.nan)])
    found = ms.band_of_most(curve, range(1, 9), 8)
    assert found["objects_band_width"][0] == 2 / 8 and found["objects_band_centre"][0] == 4.5 / 8
    assert np.isnan([values[1] for values in found.values()]).all() and ms.largest(curve[:1]) == 9
    first, last = stats.band_ends(curve, range(1, 9), 8)
    assert (first[0], last[0]) == (4, 5) and np.isnan([first[1], last[1]]).all()
    assert [end[0] for end in stats.band_ends(curve[:1, 1::2], [2, 4, 6, 8], 8)] == [4, 4]  # of those swept


def tiny_curves(n=6):
    "Curves of the groups of Figure 4 for three pairs: the image hands over to the objects, these to the text."
    x = np.linspace(0, 1, n)
    shapes = {"image": 1 - x, "text": x, "objects": 1 - abs(2 * x - 1), "whole object words": 1 - abs(2 * x - 1)}
    s = fake(np.ones((n, 3)), np.ones(3))
    c = ms.curves(s, draws=20)
    return replace(c, draws={name: np.tile(shape, (21, 1)) for name, shape in shapes.items()})


def test_readings_of_figure_4_and_its_marks():
    "Both tables and the figure say the same of the object words."
    from matplotlib.figure import Figure
    c = tiny_curves()
    readings = ms.figure4_readings(c)
    assert readings["crossing"]["value"] == pytest.approx(3.5) and readings["peak_effect"]["value"] == pytest.approx(.8)
    assert (readings["band_first"]["value"], readings["band_last"]["value"]) == (2, 4)
    for name in ms.WORDS_COLUMNS: assert readings[f"{name}_of_whole_words"] == readings[name]
    table = ms.words_table(readings).splitlines()
    assert len(table) == 4 and table[2].startswith("| last sub-tokens | 0.80 [0.80, 0.80] |")
    assert len(ms.words_table(ms.figure4_readings(replace(c, draws={k: c[k] for k in ms.FIGURE4}))).splitlines()) == 3
    left, right = ms.plot_figure4(Figure(), c, readings, ["text"])
    notes = [text.get_text() for text in left.texts if text.get_text()]
    assert notes == ["dotted: image → text at ℓ = 3.5 [3.5, 3.5]\ngreen: 80 % of the objects' effect, ℓ = 2 … 4"]
    assert right.get_title() == "text"


def test_models_side_by_side(monkeypatch):
    "Those that have results; the band is the one that their claims have."
    monkeypatch.setenv("SPATIALID_RESULTS", str(ROOT))
    table = ms.figure4_side_by_side(["llava-tiny", "no-such-model"]).splitlines()
    assert len(table) == 3 and table[2].startswith("| llava-tiny | 196 | 8 | ")
    found = read_results(ROOT/"results"/"llava-tiny"/"02_mirror_swap.json")
    first, last = map(int, ms.figure4_row(found)["objects: 80 % at ℓ"].split("–"))
    assert (last - first + 1) / 8 == found["claims"]["objects_band_width"]["value"]


def test_the_table_and_the_figure_of_the_controls(vlm, base):
    from matplotlib.figure import Figure
    sources = {"mirror": [mirrored(q) for q in base], **ms.attribute_controls(base, FreeScenes(1000, "test", 32))}
    groups = {name: figure4_groups(vlm)[name] for name in ms.FIGURE4}
    swaps = {name: sweep(vlm, base, source, groups) for name, source in sources.items()}
    follows = {ms.ATTRIBUTES.get(name, "mirrored"): ms.belief_follows(s, name == "mirror") for name, s in swaps.items()}
    signal = {name: ms.signal_to_noise(s) for name, s in swaps.items()}
    lines = ms.control_table(follows, signal, signal).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| mirrored", "| objects repainted", "| hues rotated"]
    fig = Figure()
    ms.plot_figure4b(fig, swaps, {name: ms.numerators(s) for name, s in swaps.items()})
    assert len(fig.axes) == 6 and fig.axes[4].get_ylim() == fig.axes[3].get_ylim()
    assert fig.axes[1].get_title() == "objects repainted, 6 pairs"


def test_claims_are_judged_where_the_belief_follows():
    "Those that are not say why, and of the object word the size counts."
    c = ms.curves(fake(np.ones((9, 4)) * np.arange(1., 5), np.arange(1., 5)))
    flat = replace(c, draws={name: -np.ones_like(c["a"]) for name in ms.GROUP_COLOURS})
    draws = ms.claim_draws(flat, flat, flat, flat, 9)
    judged = {"mirrored": True, "two things": False, "colours exchanged": True}
    claims = ms.mirror_claims(draws, judged)
    assert claims["object_word"]["value"] == 1 and claims["objects_over_random"]["value"] == 1
    assert claims["image_early_less_late"]["value"] == 0 and "objects_over_rest" not in claims
    follows = {kind: {"both": {"value": .2, "low": .1, "high": .3, "n": 4}} for kind in judged}
    missing = ms.missing_claims(claims, follows, judged)
    reason = missing["objects_over_rest"]["not_judged"]
    assert "the belief follows in 0.20 [0.10, 0.30] of the pairs (two things)" in reason
    assert missing["attribute_signal"]["not_judged"] == "not part of the short run" and len(missing) == 2
    assert {*claims, *missing} == {name for names in ms.CLAIMS_OF.values() for name in names}


def test_curves_with_intervals_and_thirds():
    c = ms.curves(fake([[1., 2], [2., 2], [3., 6]], [2., 4]))
    stored = ms.curves_with_intervals(c, ["a"])["a"]
    assert np.allclose(stored["value"], [.5, 4 / 6, 1.5]) and stored["n"] == 2
    assert (stored["low"] <= stored["high"]).all()
    assert ms.curves_with_intervals(None, ["a"]) is None
    means = {"a": ms.by_third(c, "a", 3)}
    assert means["a"]["first"]["value"] == pytest.approx(.5)
    assert ms.thirds_table(means).splitlines()[2].startswith("| a | 0.50 [")
    assert np.array_equal(ms.from_input(c, "a", 1.)[:, 0], np.ones(len(c["a"])))


def test_a_part_of_a_sweep(vlm, base):
    "Is the sweep of those pairs at those layers."
    source = [mirrored(q) for q in base]
    whole, few = sweep(vlm, base, source, {"text": "text"}), sweep(vlm, base[:2], source[:2], {"text": "text"}, [2])
    part = ms.part_of(whole, 2, [2])
    assert part.layers == [2] and list(part.truth) == list(few.truth) and part.names == ["text"]
    for name in ("base_log_probs", "source_log_probs"):
        assert torch.allclose(getattr(part, name), getattr(few, name), atol=1e-5)
    assert part.log_probs["text"].shape == (1, 2, 2)
    assert torch.allclose(part.log_probs["text"], few.log_probs["text"], atol=1e-5)


def test_the_log_probabilities_of_random_words_are_kept_as_their_mean():
    s = fake([[1., 2]], [2., 4])
    s.log_probs |= {"random words 0": s.log_probs["a"], "random words 1": 3 * s.log_probs["a"]}
    tensors = ms.log_probs_of("mirror", s)
    assert set(tensors) == {f"mirror/{name}" for name in ("a", "random words", "base", "source", "truth")}
    assert torch.equal(tensors["mirror/random words"], 2 * s.log_probs["a"])


def test_both_ways_of_swapping_tile_the_difference(vlm, base):
    found = ms.complement_check(vlm, base, [mirrored(q) for q in base], [1, 2])
    assert found["gap"] < 1e-3 and found["layers"] == [1, 2] and found["pairs"] == len(base)
