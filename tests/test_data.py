"Properties of the generator, and what it says of bad input."
import json
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from spatialid.data import (COLOURS, KINDS, OBJECTS, PLACES, Benchmark, FreeScenes, GridScenes, Objects, Thing, Videos, background, between, grid_pairs, noise_background, own_colour,
                            paste, place, relation, write_benchmark)
from spatialid.results import bootstrap, rng

pixels = lambda im: np.asarray(im).astype(int)


def test_every_object_is_drawn_and_differs_from_the_others_at_10_px():
    objects = Objects()
    seen = {}
    for name in OBJECTS:
        for px in (10, 224):
            alpha, rgb = objects.sprite(name, px, "red")
            assert max(alpha.shape) >= px and alpha.max() > .9 and np.isfinite(rgb).all() and rgb.max() <= 255
        canvas = np.zeros((16, 16, 3), np.float32)
        paste(canvas, objects.sprite(name, 10, "red"), 8, 8)
        seen[name] = canvas
    assert min(np.abs(seen[a] - seen[b]).mean() for a, b in permutations(OBJECTS, 2)) > 2
    assert {own_colour(n) for n in OBJECTS[:10]} == set(COLOURS)


def test_paste_clips_at_the_edges_and_returns_the_box():
    sprite = Objects().sprite("square", 10, "red")
    h, w = sprite[0].shape[:2]
    canvas = np.zeros((20, 20, 3), np.float32)
    assert paste(canvas, sprite, 0, 10)[0] == 0 and canvas[:, w:].sum() == 0 and canvas.sum() > 0
    assert paste(np.zeros((20, 20, 3), np.float32), sprite, -50, 10)[2] == 0
    l, t, bw, bh = paste(np.zeros((40, 40, 3), np.float32), sprite, 20, 20)
    assert (bw, bh) == (w, h) and abs(l + bw / 2 - 20) <= .5 and abs(t + bh / 2 - 20) <= .5


def test_noise_has_a_one_over_f_spectrum():
    z = np.mean([np.abs(np.fft.fft2(noise_background(128, rng(0, i)).mean(-1) - 128)) for i in range(20)], 0)
    f = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
    band = (f > 3 / 128) & (f < .4)
    slope = np.polyfit(np.log(f[band]), np.log(z[band]), 1)[0]
    assert -1.5 < slope < -.8


def test_grid_scenes_are_exactly_the_product_of_the_factors():
    g = GridScenes(grid_pairs(6), sizes=(124, 224))
    assert len(g) == 6 * 2 * 16 * 15
    keys = {(s.a, s.b, s.size, s.a_cell, s.b_cell) for s in g}
    assert len(keys) == len(g) and all(s.a_cell != s.b_cell for s in g)
    assert {s.b_cell for s in g} == {(x, y) for x in range(4) for y in range(4)}
    assert len(GridScenes(grid_pairs(90))) == 86_400 and set(grid_pairs(6)) < set(grid_pairs(20)) < set(grid_pairs(56)) < set(grid_pairs(90))


def test_the_object_is_drawn_in_its_cell_and_x_is_the_column():
    for background in ("black", "noise"):
        g = GridScenes([("star", "square")], sizes=(224,), background=background)
        for i in range(0, len(g), 7):
            s = g[i]
            x, y = s.b_cell
            assert (s.a, s.b) == ("star", "square")
            if background == "black":
                lit = pixels(s.image()).sum(-1) > 60
                for (cx, cy) in (s.b_cell, s.a_cell): assert lit[cy * 20 + 8:cy * 20 + 12, cx * 20 + 8:cx * 20 + 12].all()
            q = s.query()
            assert q.words == {"subject": "square", "object": "star"}
            assert q.truth == (None if x == s.a_cell[0] else "left" if x < s.a_cell[0] else "right")


def test_an_image_depends_on_seed_and_index_alone():
    a, b = FreeScenes(50, seed=3), FreeScenes(9, seed=3)
    b[8].image()
    assert (pixels(a[7].image()) == pixels(b[7].image())).all() and [q.text for q in a[7].queries(False)] == [q.text for q in b[7].queries(False)]
    assert (pixels(a[7].image()) != pixels(FreeScenes(50, seed=4)[7].image())).any()
    g, h = GridScenes(grid_pairs(2), seed=1), GridScenes(grid_pairs(2), seed=2)
    assert (pixels(g[5].image()) == pixels(GridScenes(grid_pairs(2), seed=1)[5].image())).all() and (pixels(g[5].image()) != pixels(h[5].image())).any()
    with pytest.raises(IndexError): a[50]


def test_truths_follow_from_the_geometry():
    t = lambda x, y, depth=2: Thing("star", "red", x, y, .2, depth, False)
    s, o = t(.2, .3, 1.5), t(.8, .7, 3)
    assert [relation(k, s, o) for k in ("left_right", "above_below", "front_behind", "near_far")] == ["left", "above", "front", "far"]
    assert [relation(k, o, s) for k in ("left_right", "above_below", "front_behind")] == ["right", "below", "behind"]
    assert relation("left_right", t(.5, 0), t(.55, .9)) is None and relation("front_behind", t(0, 0, 2), t(1, 1, 2.2)) is None
    assert between(t(.5, .5), s, o) == "yes" and between(t(.5, .5), o, s) == "yes" and between(s, o, t(.5, .5)) == "no"
    assert [place(x, y) for x, y in ((.1, .1), (.5, .1), (.5, .5), (.9, .9), (1, 1))] == ["top left", "top", "center", "bottom right", "bottom right"]
    assert len({p for row in PLACES for p in row}) == 9


def test_free_scenes_obey_the_camera_and_ask_balanced_questions():
    scenes = FreeScenes(1500, seed=5)
    count, ground = {}, []
    for s in scenes:
        assert 2 <= len(s.things) <= 5 and [o.depth for o in s.things] == sorted((o.depth for o in s.things), reverse=True)
        ground += [(o.y + o.size / 2 - s.horizon, o.depth) for o in s.things if not o.air]
        for o in s.things: assert 0 <= o.x - o.size / 2 and o.x + o.size / 2 <= 1 and 0 <= o.y - o.size / 2 + 1e-9 and o.y + o.size / 2 <= 1 + 1e-9
        by_name = {o.name: o for o in s.things}
        for q in s.queries(image=False):
            count[q.kind, q.truth] = count.get((q.kind, q.truth), 0) + 1
            assert q.truth in q.answers and len(set(q.answers)) == 2
            if q.kind in ("left_right", "above_below", "front_behind", "near_far"): assert relation(q.kind, by_name[q.words["subject"]], by_name[q.words["object"]]) == q.truth
            if q.kind == "existence": assert (q.words["subject"] in by_name) == (q.truth == "yes")
            if q.kind == "colour": assert by_name[q.words["subject"]].colour == q.truth
    foot, depth = np.array(ground).T
    assert np.abs(foot - 1 / depth).max() < 1e-9
    for kind in KINDS:
        n = [c for (k, _), c in count.items() if k == kind]
        assert len(n) >= 2 and min(n) > (.6 if kind != "between" else .35) * max(n), (kind, n)


def test_height_and_depth_are_independent_in_flat_scenes_only():
    def correlation(flat):
        "Of y and depth, over the things of scenes, with a bootstrap interval over scenes."
        rows = [np.array([(1, o.y, o.depth, o.y**2, o.depth**2, o.y * o.depth) for o in s.things]).sum(0) for s in FreeScenes(600, seed=9, flat=flat)]
        def r(v):
            n, y, z, yy, zz, yz = v.sum(0)
            return (n * yz - y * z) / np.sqrt((n * yy - y**2) * (n * zz - z**2))
        return bootstrap(rows, r, n=400)
    flat, ordinary = correlation(True), correlation(False)
    assert flat["low"] < 0 < flat["high"] and abs(flat["value"]) < .08
    assert ordinary["high"] < -.25


def test_flat_scenes_fit_the_picture_and_ordinary_ones_are_as_before():
    for s in FreeScenes(100, seed=3, flat=True):
        assert [o.depth for o in s.things] == sorted((o.depth for o in s.things), reverse=True)
        for o in s.things: assert o.size / 2 <= o.y <= 1 - o.size / 2 and 1.4 <= o.depth <= 3.2 and .18 <= o.size <= .38
    below = lambda flat: sum(o.y + o.size / 2 > s.horizon + 1 / o.depth + 1e-9 for s in FreeScenes(100, seed=3, flat=flat) for o in s.things)
    assert below(True) > 50 and below(False) == 0, "things hang below the ground in flat scenes alone"
    before = [("king", "purple", .468031, .127911, 2.997025), ("circle", "pink", .857729, .43398, 2.702077), ("gear", "green", .219026, .189979, 2.621352),
              ("wheel", "blue", .159727, .497783, 2.605795), ("star", "blue", .390373, .667312, 2.192768)] # what this index gave before there were flat scenes
    assert [(o.name, o.colour, round(float(o.x), 6), round(float(o.y), 6), round(float(o.depth), 6)) for o in FreeScenes(40, seed=3)[7].things] == before


def test_overlapping_things_hide_what_is_behind():
    scenes = FreeScenes(200, seed=6)
    s = next(s for s in scenes if len(s.things) >= 3)
    whole, boxes = s.canvas()
    without, _ = s.canvas(present=tuple(o.name for o in s.things[1:]))
    changed = np.abs(whole - without).sum(-1) > 0
    l, t, w, h = boxes[s.things[0].name]
    assert changed.any() and not changed[:, :l].any() and not changed[:, l + w:].any() and not changed[:t].any()


def test_captions_and_the_order_of_answers():
    s = FreeScenes(10, seed=7)[0]
    assert len(s.captions()) >= len(s.things) and all(any(o.name in c for o in s.things) for c in s.captions())
    orders = {q.answers for s in FreeScenes(60, seed=7) for q in s.queries(False) if q.kind == "left_right"}
    assert orders == {("left", "right"), ("right", "left")}
    assert all(q.text.index(q.answers[0]) < q.text.index(q.answers[1]) for s in FreeScenes(60, seed=7) for q in s.queries(False) if q.kind == "left_right")


def test_benchmark_round_trip(tmp_path):
    b = Benchmark(write_benchmark(tmp_path / "b", n=60, seed=2))
    assert len(b) == 60 and [r.index for r in b] == list(range(60)) and len({r.image_id for r in b}) < 60
    for r in b:
        s, o = r.boxes()
        centre = lambda v, k: v[k] + v[k + 2] / 2
        k = int(r.kind == "above_below")
        assert (centre(s, k) < centre(o, k)) == (r.truth in ("left", "above"))
        assert r.image().mode == "RGB" and r.image().size == (80, 80)
    q = b[0].query()
    assert q.truth in q.answers and q.words["subject"] == b[0].subject


def test_the_real_layout_and_grey_images(tmp_path):
    (tmp_path / "val2017").mkdir(); (tmp_path / "annotations").mkdir()
    Image.new("L", (50, 40), 99).save(tmp_path / "val2017" / f"{7:012d}.jpg")
    (tmp_path / "coco_qa_two_obj.json").write_text(json.dumps([[7, "A photo of a TV to the left of an umbrella", "…"], [7, "A photo of a hot dog above a dog", "…"], [8, "A photo of a dog below a cat", ""]]))
    cats, boxes = ["tv", "umbrella", "hot dog", "dog"], [[0, 0, 5, 5], [30, 0, 5, 5], [0, 0, 4, 4], [0, 30, 4, 4]]
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(dict(
        images=[dict(id=7, file_name="x", width=50, height=40)], categories=[dict(id=k, name=c) for k, c in enumerate(cats)],
        annotations=[dict(id=k, image_id=7, category_id=k, bbox=b, area=1, iscrowd=0) for k, b in enumerate(boxes)])))
    b = Benchmark(tmp_path)
    assert (b[0].subject, b[0].object, b[0].truth) == ("tv", "umbrella", "left") and b[1].kind == "above_below"
    assert b[0].image().mode == "RGB" and b[1].boxes() == ([0, 0, 4, 4], [0, 30, 4, 4])
    with pytest.raises(FileNotFoundError, match="row 2 needs"): b[2].image()
    with pytest.raises(ValueError, match="no boxes"): b[2].boxes()


def test_videos():
    v = Videos(FreeScenes(10, seed=1, things=(2, 3)))[2]
    frames = v.frames()
    assert len(frames) == 8 and len(set(v.appears.values())) == len(v.appears)
    for t in range(1, 8): assert ((pixels(frames[t]) != pixels(frames[t - 1])).any()) == (t + 1 in v.appears.values())
    assert (pixels(frames[-1]) == pixels(v.scene.image())).all() or 8 not in v.appears.values()
    a, b = list(v.appears)[:2]
    assert v.query(a, b).truth == ("before" if v.appears[a] < v.appears[b] else "after") and v.query(a, b).truth != v.query(b, a).truth
    with pytest.raises(KeyError, match="no 'ship' in this video"): v.query("ship", a)
    with pytest.raises(ValueError, match="more frames or fewer things"): Videos(FreeScenes(10), frames=3)


def test_renders_and_photographs(tmp_path):
    for name, mode in (("red_ball", "RGBA"), ("cup", "RGBA")):
        im = Image.new(mode, (60, 40), (0, 0, 0, 0)); im.paste((200, 10, 10, 255), (10, 10, 50, 30)); im.save(tmp_path / f"{name}.png")
    objects = Objects(tmp_path)
    assert objects.names == ["cup", "red ball"]
    alpha, rgb = objects.sprite("red ball", 20)
    assert alpha.shape[:2] == (10, 20) and rgb[5, 5, 0] > 150
    photos = tmp_path / "photos"; photos.mkdir(); Image.new("RGB", (100, 50), (1, 2, 3)).save(photos / "a.jpg")
    s = FreeScenes(5, objects=tmp_path, background=photos, things=(2, 2))[1]
    assert s.image().size == (80, 80) and {q.kind for q in s.queries()} <= set(KINDS) - {"colour"}
    assert len(GridScenes([("cup", "red ball")], objects=tmp_path, background=photos)) == 960


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): Objects(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no"): Objects(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="no alpha channel"): GridScenes([("flat", "flat")], objects=tmp_path)
    with pytest.raises(KeyError, match="no object 'unicorn'.*umbrella"): GridScenes([("unicorn", "star")])
    with pytest.raises(ValueError, match="k·\\(k−1\\)"): grid_pairs(7)
    with pytest.raises(FileNotFoundError, match="no folder"): background(tmp_path / "gone", 80, rng(0))
    with pytest.raises(FileNotFoundError, match="no folder"): Benchmark(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="coco_qa_two_obj.json"): Benchmark(tmp_path)
    (tmp_path / "coco_qa_two_obj.json").write_text(json.dumps([[1, "a dog near a cat", ""]]))
    with pytest.raises(ValueError, match="row 0: cannot read the caption"): Benchmark(tmp_path)
    with pytest.raises(ValueError, match="fewest, most"): FreeScenes(5, things=(3, 2))


def test_the_benchmark_is_written_by_one_command(tmp_path, capsys):
    from spatialid.rerun import main
    assert main(["benchmark", str(tmp_path / "b"), "--rows", "12", "--px", "96"]) == 0
    assert len(Benchmark(tmp_path / "b")) == 12 and Benchmark(tmp_path / "b")[0].image().size == (96, 96)
