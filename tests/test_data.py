"Properties of the generator, and what it says of bad input."
import json
import wave
import zipfile
from itertools import permutations

import av
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import spatialid.benchmarks
import spatialid.scenes
from spatialid.benchmarks import (
    SCENES, Benchmark, MVBench, Questions, draw_boxes, grey_levels_apart, placed, write_benchmark, write_mvbench)
from spatialid.questions import KINDS
from spatialid.scenes import (
    COLOURS, OBJECTS, PLACES, FreeScenes, GridScenes, Objects, Thing, asked_of, background, between, grid_pairs,
    height_and_depth, noise_background, own_colour, paste, place, relation, sheet)
from spatialid.stats import bootstrap, rng
from spatialid.videos import Video, Videos, read_video, stamped, write_video

pixels = lambda im: np.asarray(im).astype(int)


@pytest.mark.parametrize("name", ["target", "vine", "cow"])
def test_a_silhouette_is_what_a_flood_from_the_corner_does_not_reach(name):
    "Pixel by pixel: nests of rings, many pieces, eyes."
    font = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", 320)
    left, top, right, bottom = font.getbbox(spatialid.scenes.GLYPHS[name])
    ink = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(ink).text((4 - left, 4 - top), spatialid.scenes.GLYPHS[name], font=font, fill=255)
    flooded = ink.point(lambda v: 255 if v > 100 else 0)
    ImageDraw.floodfill(flooded, (0, 0), 128)
    body = flooded.point(lambda v: 0 if v == 128 else 255).crop(ink.getbbox())
    found = spatialid.scenes._glyph(name)[1]
    assert np.array_equal(found, body.resize(found.size, Image.Resampling.LANCZOS))


@pytest.mark.slow
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
    assert len(GridScenes(grid_pairs(90))) == 86_400
    assert set(grid_pairs(6)) < set(grid_pairs(20)) < set(grid_pairs(56)) < set(grid_pairs(90))


def test_the_object_is_drawn_in_its_cell_and_x_is_the_column():
    for background in ("black", "noise"):
        g = GridScenes([("star", "square")], sizes=(224,), background=background)
        for i in range(0, len(g), 7):
            s = g[i]
            x, y = s.b_cell
            assert (s.a, s.b) == ("star", "square")
            if background == "black":
                lit = pixels(s.image()).sum(-1) > 60
                for column, row in (s.b_cell, s.a_cell):
                    assert lit[row * 20 + 8:row * 20 + 12, column * 20 + 8:column * 20 + 12].all()
            q = s.query()
            assert q.words == {"subject": "square", "object": "star"}
            assert q.truth == (None if x == s.a_cell[0] else "left" if x < s.a_cell[0] else "right")


def test_an_image_depends_on_seed_and_index_alone():
    a, b = FreeScenes(50, seed=3), FreeScenes(9, seed=3)
    b[8].image()
    assert (pixels(a[7].image()) == pixels(b[7].image())).all()
    assert [q.text for q in a[7].queries(False)] == [q.text for q in b[7].queries(False)]
    assert (pixels(a[7].image()) != pixels(FreeScenes(50, seed=4)[7].image())).any()
    first, again, other = (pixels(GridScenes(grid_pairs(2), seed=seed)[5].image()) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    with pytest.raises(IndexError): a[50]


RELATIONS = ("left_right", "above_below", "front_behind", "near_far")


def test_truths_follow_from_the_geometry():
    t = lambda x, y, depth=2: Thing("star", "red", x, y, .2, depth, False)
    s, o = t(.2, .3, 1.5), t(.8, .7, 3)
    assert [relation(k, s, o) for k in RELATIONS] == ["left", "above", "front", "far"]
    assert [relation("near_far", s, t(.2 + dx, .3)) for dx in (.3, .4, .6)] == ["near", None, "far"]
    assert [relation(k, o, s) for k in ("left_right", "above_below", "front_behind")] == ["right", "below", "behind"]
    assert relation("left_right", t(.5, 0), t(.55, .9)) is None
    assert relation("front_behind", t(0, 0, 2), t(1, 1, 2.2)) is None
    assert between(t(.5, .5), s, o) == "yes" and between(t(.5, .5), o, s) == "yes" and between(s, o, t(.5, .5)) == "no"
    points = ((.1, .1), (.5, .1), (.5, .5), (.9, .9), (1, 1))
    assert [place(x, y) for x, y in points] == ["top left", "top", "center", "bottom right", "bottom right"]
    assert len({p for row in PLACES for p in row}) == 9


def far_to_near(scene):
    depths = [thing.depth for thing in scene.things]
    return depths == sorted(depths, reverse=True)


def test_free_scenes_obey_the_camera_and_ask_balanced_questions():
    scenes = FreeScenes(1500, seed=5)
    count, ground = {}, []
    for s in scenes:
        assert 2 <= len(s.things) <= 5 and far_to_near(s)
        ground += [(o.y + o.size / 2 - s.horizon, o.depth) for o in s.things if not o.air]
        for o in s.things:
            assert 0 <= o.x - o.size / 2 and o.x + o.size / 2 <= 1
            assert 0 <= o.y - o.size / 2 + 1e-9 and o.y + o.size / 2 <= 1 + 1e-9
        by_name = {o.name: o for o in s.things}
        for q in s.queries(image=False):
            count[q.kind, q.truth] = count.get((q.kind, q.truth), 0) + 1
            assert q.truth in q.answers and len(set(q.answers)) == 2
            if q.kind in RELATIONS:
                assert relation(q.kind, by_name[q.words["subject"]], by_name[q.words["object"]]) == q.truth
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
        moments = lambda y, z: np.array([y**0, y, z, y**2, z**2, y * z]).sum(1)
        rows = [moments(*height_and_depth([scene])) for scene in FreeScenes(600, seed=9, flat=flat)]
        def r(v):
            n, y, z, yy, zz, yz = v.sum(0)
            return (n * yz - y * z) / np.sqrt((n * yy - y**2) * (n * zz - z**2))
        return bootstrap(rows, r, n=400)
    flat, ordinary = correlation(True), correlation(False)
    assert flat["low"] < 0 < flat["high"] and abs(flat["value"]) < .08
    assert ordinary["high"] < -.25


def test_flat_scenes_fit_the_picture_and_ordinary_ones_are_as_before():
    for s in FreeScenes(100, seed=3, flat=True):
        assert far_to_near(s)
        for o in s.things: assert o.size / 2 <= o.y <= 1 - o.size / 2 and 1.4 <= o.depth <= 3.2 and .18 <= o.size <= .38
    def below(flat):
        "How many things hang below the ground on which they would stand."
        things = [(s.horizon, o) for s in FreeScenes(100, seed=3, flat=flat) for o in s.things]
        return sum(o.y + o.size / 2 > horizon + 1 / o.depth + 1e-9 for horizon, o in things)
    assert below(True) > 50 and below(False) == 0, "things hang below the ground in flat scenes alone"
    before = [ # what this index gave before there were flat scenes
        ("king", "purple", .468031, .127911, 2.997025), ("circle", "pink", .857729, .43398, 2.702077),
        ("gear", "green", .219026, .189979, 2.621352), ("wheel", "blue", .159727, .497783, 2.605795),
        ("star", "blue", .390373, .667312, 2.192768)]
    rounded = lambda *numbers: [round(float(number), 6) for number in numbers]
    assert [(o.name, o.colour, *rounded(o.x, o.y, o.depth)) for o in FreeScenes(40, seed=3)[7].things] == before


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
    sideways = [q for s in FreeScenes(60, seed=7) for q in s.queries(False) if q.kind == "left_right"]
    assert {q.answers for q in sideways} == {("left", "right"), ("right", "left")}
    assert all(q.text.index(q.answers[0]) < q.text.index(q.answers[1]) for q in sideways)
    first = s.queries(False)[0]
    assert asked_of(s, 1) == f"{first.text} {first.truth}" and len(asked_of(s).splitlines()) == 3


def test_what_the_notebooks_draw():
    objects = Objects()
    drawn = sheet(objects, 8, columns=20)
    assert drawn.shape == (3 * 10, 20 * 10, 3) and drawn.dtype == np.uint8
    assert all((drawn[y:y + 10, x:x + 10] != 150).any() for y in range(0, 30, 10) for x in range(0, 200, 10))
    scenes = FreeScenes(4, seed=1)
    y, depth = height_and_depth(scenes)
    things = [thing for scene in scenes for thing in scene.things]
    assert y.tolist() == [thing.y for thing in things] and depth.tolist() == [thing.depth for thing in things]
    fig, ax = plt.subplots()
    draw_boxes(ax, ([1, 2, 3, 4], [10, 20, 5, 6]))
    subject, object = ax.patches
    assert (subject.get_xy(), subject.get_width(), subject.get_height()) == ((.5, 1.5), 3, 4)
    assert object.get_xy() == (9.5, 19.5) and subject.get_edgecolor() != object.get_edgecolor()
    plt.close(fig)
    red, dark = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (155, 0, 0)))
    assert grey_levels_apart([red, red], [red, dark]) == pytest.approx(100 / 3 / 2)
    assert grey_levels_apart([red], [dark], "L") == pytest.approx(30, abs=1)


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
    for folder in ("val2017", "annotations"): (tmp_path / folder).mkdir()
    Image.new("L", (50, 40), 99).save(tmp_path / "val2017" / f"{7:012d}.jpg")
    listed = [[7, "A photo of a TV to the left of an umbrella", "…"], [7, "A photo of a hot dog above a dog", "…"],
              [8, "A photo of a dog below a cat", ""]]
    (tmp_path / "coco_qa_two_obj.json").write_text(json.dumps(listed))
    boxes = {"tv": [0, 0, 5, 5], "umbrella": [30, 0, 5, 5], "hot dog": [0, 0, 4, 4], "dog": [0, 30, 4, 4]}
    annotated = dict(
        images=[dict(id=7, file_name="x", width=50, height=40)],
        categories=[dict(id=k, name=name) for k, name in enumerate(boxes)],
        annotations=[dict(id=k, image_id=7, category_id=k, bbox=box, area=1, iscrowd=0)
                     for k, box in enumerate(boxes.values())])
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(annotated))
    b = Benchmark(tmp_path)
    assert (b[0].subject, b[0].object, b[0].truth) == ("tv", "umbrella", "left") and b[1].kind == "above_below"
    assert b[0].image().mode == "RGB" and b[1].boxes() == ([0, 0, 4, 4], [0, 30, 4, 4])
    with pytest.raises(FileNotFoundError, match="row 2 needs"): b[2].image()
    with pytest.raises(ValueError, match="no boxes"): b[2].boxes()


def test_crowds_and_boxes_without_an_area_are_left_out_and_counted(tmp_path):
    "A crowd's box encloses many things; one without a width has no place."
    kinds = [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]
    note = lambda kind, box, crowd=0: {"image_id": 7, "category_id": kind, "bbox": box, "area": 1, "iscrowd": crowd}
    def benchmark(name, *notes):
        (tmp_path / name).mkdir()
        listed = [[7, "A photo of a dog to the left of a cat", ""]]
        (tmp_path / name / "coco_qa_two_obj.json").write_text(json.dumps(listed))
        (tmp_path / name / "instances_val2017.json").write_text(json.dumps(
            {"images": [{"id": 7}], "categories": kinds, "annotations": [{"id": k, **n} for k, n in enumerate(notes)]}))
        return Benchmark(tmp_path / name)[0]
    dog, cat = [20, 0, 5, 5], [30, 0, 5, 5]
    crowd, flat = note(0, [0, 0, 9, 9], crowd=1), note(1, [60, 0, 0, 5])
    assert benchmark("mixed", crowd, note(0, dog), note(1, cat), flat).boxes() == (dog, cat)
    with pytest.raises(ValueError, match=r"stand as its caption says \(2 left out: a crowd, or a box without an area"):
        benchmark("unusable", crowd, note(1, cat), flat).boxes()


def small_benchmark(folder, listed=None, annotations=None, image="000000000007.jpg"):
    "A benchmark of one question, its two files as given (text as it is, other things as JSON)."
    folder.mkdir()
    kinds = [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]
    box = lambda kind, x: {"image_id": 7, "category_id": kind, "bbox": [x, 0, 5, 5], "iscrowd": 0}
    noted = {"images": [{"id": 7}], "categories": kinds, "annotations": [box(0, 20), box(1, 30)]}
    if listed is None: listed = [[7, "A photo of a dog to the left of a cat", ""]]
    if annotations is None: annotations = noted
    if callable(annotations): annotations = annotations(noted)
    for name, given in (("coco_qa_two_obj", listed), ("instances_val2017", annotations)):
        text = given if isinstance(given, str) else json.dumps(given)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if image: Image.new("RGB", (50, 40), (9, 9, 200)).save(folder / image)
    return folder


@pytest.mark.parametrize("listed, words", [
    ("{", "coco_qa_two_obj.json' is no JSON .*write the benchmark again"),
    ("[]", "lists no questions"), ({"a": 1}, "lists no questions: it has to be"), ([7], "row 0: 7 is no question"),
    ([["seven", "A photo of a dog above a cat", ""]],
     "coco_qa_two_obj.json', row 0: the image id 'seven' is no whole number"),
    ([[7.5, "A photo of a dog above a cat", ""]], "the image id 7.5"),
    ([[7, None, ""]], "row 0: cannot read the caption None"),
    ([[7, "A photo of a dog above a cat", ""], [8]], r"row 1: \[8\] is no question"),
])
def test_a_broken_list_of_questions_is_named_with_its_row(tmp_path, listed, words):
    with pytest.raises(ValueError, match=words): Benchmark(small_benchmark(tmp_path / "b", listed))


def changed(part, k, **fields):
    "The annotations with one entry of one list changed; a field of None is left out."
    def change(noted):
        entry = {**noted[part][k], **fields}
        noted[part][k] = {f: v for f, v in entry.items() if v is not None}
        return noted
    return change


@pytest.mark.parametrize("annotations, words", [
    ('{"images": [', "instances_val2017.json' is no JSON"), ({"categories": []}, "no list of images and annotations"),
    ([], "no list of images and annotations and categories"),
    (changed("annotations", 1, bbox=[1, 2, 3]), "entry 1 of its annotations has no usable bbox"),
    (changed("annotations", 0, bbox=[1, 2, "3", 4]), "entry 0 of its annotations has no usable bbox"),
    (changed("annotations", 0, image_id=None), "no usable image_id"),
    (changed("categories", 1, name=None), "no usable name"),
    (changed("annotations", 1, category_id=9),
     "entry 1 of its annotations has a category_id that is none of its categories"),
    ({"images": [7], "annotations": [], "categories": []}, "entry 0 of its images has no usable id"),
])
def test_broken_annotations_are_named_and_do_not_pass_for_missing_boxes(tmp_path, annotations, words):
    "A ValueError would be taken for a row whose boxes do not stand as its caption says, and left out."
    row = Benchmark(small_benchmark(tmp_path / "b", annotations=annotations))[0]
    with pytest.raises(OSError, match=words): row.boxes()


def test_ids_may_be_text_and_files_may_begin_with_a_mark(tmp_path):
    "As spreadsheets and some editors write them."
    text = lambda noted: changed("annotations", 0, image_id="7", category_id="0")(noted)
    folder = small_benchmark(tmp_path / "b", [["7", "A photo of a dog to the left of a cat", ""]], text)
    for name in ("coco_qa_two_obj.json", "instances_val2017.json"):
        (folder / name).write_text("\ufeff" + (folder / name).read_text())
    row = Benchmark(folder)[0]
    assert row.image_id == 7 and row.image().size == (50, 40) and row.boxes() == ([20, 0, 5, 5], [30, 0, 5, 5])


def test_boxes_with_one_number_are_all_found(tmp_path):
    "An index by the numbers of the annotations would keep the last of them."
    both = lambda noted: changed("annotations", 0, id=3)(changed("annotations", 1, id=3)(noted))
    assert Benchmark(small_benchmark(tmp_path / "b", annotations=both))[0].boxes() == ([20, 0, 5, 5], [30, 0, 5, 5])


def test_pictures_may_be_png_and_damaged_ones_are_named(tmp_path):
    row = lambda name, image: Benchmark(small_benchmark(tmp_path / name, image=image))[0]
    assert row("png", "000000000007.png").image().getpixel((0, 0)) == (9, 9, 200)
    missing = r"row 0 needs .*0007.jpg' \(or .jpeg, .png\), which is not there: put it there"
    with pytest.raises(FileNotFoundError, match=missing): row("none", None).image()
    cut = row("cut", "000000000007.jpg")
    cut.path.write_bytes(cut.path.read_bytes()[:300])
    with pytest.raises(ValueError, match="0007.jpg' cannot be read as a picture"): cut.image()
    (tmp_path / "cut" / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"): background(tmp_path / "cut", 80, rng(0))
    with pytest.raises(ValueError, match="cannot be read as a picture"): Objects(tmp_path / "cut").sprite("text", 8)


def test_a_benchmark_is_checked_before_it_is_used(tmp_path):
    "Kinds, pictures and boxes; what is missing is counted or named."
    one = Benchmark(small_benchmark(tmp_path / "one"))
    assert one.check() is one and one.check(("left_right",), boxes=True) is one
    with pytest.raises(ValueError, match="one' asks no question about above/below: add such rows"):
        one.check(("left_right", "above_below"))
    with pytest.raises(FileNotFoundError, match="1 of 1 rows of .*none' have no picture, such as 000000000007.jpg"):
        Benchmark(small_benchmark(tmp_path / "none", image=None)).check()
    crowd = Benchmark(small_benchmark(tmp_path / "crowd", annotations=changed("annotations", 0, iscrowd=1)))
    assert crowd.check(("left_right",)) is crowd
    with pytest.raises(ValueError, match="no row of .*crowd' about left/right has two boxes that stand as its caption"):
        crowd.check(boxes=True)
    (tmp_path / "one" / "instances_val2017.json").unlink()
    with pytest.raises(OSError, match="holds no instances_val2017.json"): Benchmark(tmp_path / "one").check(boxes=True)


def test_a_video_list_may_begin_with_a_mark_and_has_to_be_a_list(tmp_path):
    (tmp_path / "mvbench_scene_queries.json").write_text("\ufeff[]", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="leaves no question"): MVBench(tmp_path)
    (tmp_path / "mvbench_scene_queries.json").write_text('{"video_path": "a"}')
    with pytest.raises(ValueError, match="lists no questions"): MVBench(tmp_path)


HEAD, QUESTION = "picture,question,answers,truth", "Is the {subject:cup} to the left or right of the {object:hot dog}?"


def with_picture(folder, text, name="mine.csv"):
    "A file of questions beside a picture."
    Image.new("RGB", (50, 40), (9, 9, 200)).save(folder / "desk.png")
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_questions_of_ones_own_are_the_same_from_every_kind_of_file(tmp_path):
    "Commas, semicolons or tabs, with a byte-order mark or spaces after the commas, or JSON Lines."
    line = json.dumps(dict(picture="desk.png", question=QUESTION, answers=["left", "right"], truth="left"))
    table = f"{HEAD}\ndesk.png,{QUESTION},left|right,left\n"
    files = {"a.csv": table, "b.csv": f"\ufeff{HEAD}\r\ndesk.png,{QUESTION},left | right,left\r\n\r\n",
             "c.csv": table.replace(",", ";").rstrip("\n"), "d.tsv": table.replace(",", "\t"),
             "e.csv": table.replace(",", ", "), "f.jsonl": f"\n\ufeff{line}\n".lstrip()}
    for name, text in files.items():
        question, = Questions(with_picture(tmp_path, text, name))
        q = question.query()
        assert q.text == "Is the cup to the left or right of the hot dog?", name
        assert q.words == {"subject": "cup", "object": "hot dog"}, name
        assert (q.answers, q.truth, q.image.size) == (("left", "right"), "left", (50, 40)), name
    row = ",Is a {subject:cup} a {{thing}}?,yes|no,,text"
    q = Questions(with_picture(tmp_path, f"{HEAD},kind\n{row}\n"))[0].query()
    assert (q.image, q.text, q.truth, q.kind) == (None, "Is a cup a {thing}?", None, "text"), "no picture, no truth"


@pytest.mark.parametrize("row, words", [
    ("gone.png,Is it {subject:a}?,yes|no,yes", r"mine.csv', line 2: no picture '.*gone.png': paths are seen from"),
    ("desk.png,Is the {subject} red?,yes|no,yes",
     r"line 2: the mark \{subject\} has no word: write it as \{subject:cup\}"),
    ("desk.png,Is the {subject:a} by the {subject:b}?,yes|no,yes",
     "marks 'a' and 'b': give each word a mark of its own"),
    ("desk.png,Is the {subject:a red?,yes|no,yes", "line 2: "),
    ("desk.png,Is it {subject:a}?,yes|no,maybe", "truth is 'maybe'"),
    ("desk.png,Is it {subject:a}?,yes|,yes", "one of the answers .* is empty"),
    ("desk.png,Is it {image:a}?,yes|no,yes", "name of a group"),
    ("desk.png,Is it, perhaps, {subject:a}?,yes|no,yes",
     "line 2: not as many columns as the first line: put texts with commas in quotes"),
    ("desk.png,Is it {subject:a}?", "line 2: not as many columns"), ("", "holds no question"),
])
def test_a_question_that_cannot_be_asked_is_named_with_file_and_line(tmp_path, row, words):
    with pytest.raises(ValueError, match=words): Questions(with_picture(tmp_path, f"{HEAD}\n{row}\n"))


@pytest.mark.parametrize("text, words", [
    ("{", "mine.jsonl', line 1: no JSON"), ("[1]", "line 1: .1. is no object"),
    ('{"picture": "desk.png", "question": "?"}', "line 1: no answers; it has picture, question"),
    ('{"picture": null, "question": "?", "answers": 3}', "line 1: "),
])
def test_broken_json_lines_are_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words): Questions(with_picture(tmp_path, text, "mine.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file"): Questions(tmp_path / "gone.csv")


def test_own_questions_with_cells_are_scenes_pair_by_pair(tmp_path):
    rows = [f'desk.png,Where is the {{subject:{s}}} from the {{object:{o}}}?,left|right,,1 3,"0, 2"'
            for s, o in ("ab", "cb", "ab")]
    questions = Questions(with_picture(tmp_path, "\n".join([f"{HEAD},subject_cell,object_cell", *rows])))
    scenes = questions.scenes()
    assert [(q.a, q.b, q.index) for q in scenes] == [("b", "a", 0), ("b", "a", 2), ("b", "c", 1)]
    assert (scenes[0].b_cell, scenes[0].a_cell) == ((1, 3), (0, 2))
    assert scenes[0].query("The {subject}").text == "The a", "asked otherwise, with the marks that there are"
    with pytest.raises(ValueError, match="question 0 does not say where its objects stand: give it subject_cell and"):
        Questions(with_picture(tmp_path, f"{HEAD}\ndesk.png,{QUESTION},left|right,left")).scenes()
    with pytest.raises(ValueError, match="cannot read the cells '1' and '': give column and row of both, such as 1 3"):
        Questions(with_picture(tmp_path, f"{HEAD},subject_cell,object_cell\ndesk.png,{QUESTION},left|right,left,1,"))
    query = questions[0].query()
    again, = placed([query], [((1, 3), (0, 2))])
    assert (again.b, again.a, again.b_cell, again.a_cell, again.query().text) == ("a", "b", (1, 3), (0, 2), query.text)
    with pytest.raises(ValueError, match="1 queries and 0 pairs of cells"): placed([query], [])


def test_videos():
    v = Videos(FreeScenes(10, seed=1, things=(2, 3)))[2]
    frames = v.frames()
    assert len(frames) == 8 and len(set(v.appears.values())) == len(v.appears)
    for t in range(1, 8): assert ((pixels(frames[t]) != pixels(frames[t - 1])).any()) == (t + 1 in v.appears.values())
    assert (pixels(frames[-1]) == pixels(v.scene.image())).all() or 8 not in v.appears.values()
    a, b = list(v.appears)[:2]
    assert v.query(a, b).truth == ("before" if v.appears[a] < v.appears[b] else "after")
    assert v.query(a, b).truth != v.query(b, a).truth
    with pytest.raises(KeyError, match="no 'ship' in this video"): v.query("ship", a)
    with pytest.raises(ValueError, match="more frames or fewer things"): Videos(FreeScenes(10), frames=3)
    changing = Video(v.scene, {"cup": 2, "star": 3}, 8, {"cup": 3})
    assert [changing.changes(frame) for frame in (1, 2, 3)] == ["", "+ cup", "+ star\n− cup"]


def test_renders_and_photographs(tmp_path):
    for name, mode in (("red_ball", "RGBA"), ("cup", "RGBA")):
        im = Image.new(mode, (60, 40), (0, 0, 0, 0))
        im.paste((200, 10, 10, 255), (10, 10, 50, 30))
        im.save(tmp_path / f"{name}.png")
    objects = Objects(tmp_path)
    assert objects.names == ["cup", "red ball"]
    alpha, rgb = objects.sprite("red ball", 20)
    assert alpha.shape[:2] == (10, 20) and rgb[5, 5, 0] > 150
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (100, 50), (1, 2, 3)).save(photos / "a.jpg")
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


@pytest.mark.slow
def test_the_benchmark_is_written_by_one_command(tmp_path, capsys):
    from spatialid.cli import main
    assert main(["benchmark", str(tmp_path / "b"), "--rows", "12", "--px", "96"]) == 0
    assert len(Benchmark(tmp_path / "b")) == 12 and Benchmark(tmp_path / "b")[0].image().size == (96, 96)


def clip(n=16, size=(48, 32)):
    "Frames that tell their number: grey level 20 + 10·k."
    return [Image.new("RGB", size, (20 + 10 * k,) * 3) for k in range(n)]

def numbers(frames):
    "Which frame of `clip` each one is."
    return [round((pixels(f).mean() - 20) / 10) for f in frames]


def test_frames_come_back_in_order_with_their_times(tmp_path):
    frames, seconds, duration = read_video(write_video(tmp_path / "a.mp4", clip()))
    assert numbers(frames) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert all(f.mode == "RGB" and f.size == (48, 32) for f in frames)
    assert seconds == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7.5]) and duration == pytest.approx(8)
    frames, seconds, duration = read_video(write_video(tmp_path / "b.mp4", clip(3), fps=12.5), 5)
    assert numbers(frames) == [0, 0, 1, 1, 2]
    assert seconds == pytest.approx([0, 0, .08, .08, .16]) and duration == pytest.approx(.24)
    assert numbers(read_video(tmp_path / "a.mp4", 1)[0]) == [0]


def test_what_the_codec_changes(tmp_path):
    made = Videos(FreeScenes(3, seed=4, px=81, things=(2, 3)))[0].frames()
    frames, _, _ = read_video(write_video(tmp_path / "odd.mp4", made))
    assert frames[0].size == (82, 82), "an odd side grows by one pixel"
    for a, b in zip(made, frames):
        assert np.abs(pixels(a) - pixels(b)[:81, :81]).mean() < 4
        assert np.abs(pixels(b)[:, 81] - pixels(b)[:, 80]).mean() < 8
        assert np.abs(pixels(b)[81] - pixels(b)[80]).mean() < 8
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_frames_are_counted_not_believed(tmp_path):
    def write(path, cut, **options):
        with av.open(str(path), "w", options=options) as file:
            stream = file.add_stream("libx264", rate=4, options=dict(bf="0"))
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for p in [p for f in clip() for p in stream.encode(av.VideoFrame.from_image(f))] + stream.encode():
                p.pts, p.dts = p.pts - cut, p.dts - cut
                file.mux(p)
        with av.open(str(path)) as file: return file.streams.video[0].frames
    assert write(tmp_path / "a.mkv", 0) == 0, "no number in the header"
    assert numbers(read_video(tmp_path / "a.mkv")[0]) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert write(tmp_path / "late.mkv", -8) == 0, "begins after 2 seconds"
    _, seconds, duration = read_video(tmp_path / "late.mkv", 2)
    assert seconds == pytest.approx([0, 3.75]) and duration == pytest.approx(4)
    hidden = dict(use_editlist="1", avoid_negative_ts="disabled")
    assert write(tmp_path / "a.mp4", 6, **hidden) == 16, "an edit list hides the first 6"
    frames, seconds, duration = read_video(tmp_path / "a.mp4", 4)
    assert numbers(frames) == [6, 9, 12, 15]
    assert seconds == pytest.approx([0, .75, 1.5, 2.25]) and duration == pytest.approx(2.5)


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video .*gone.mp4"): read_video(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video at all " * 99)
    whole = write_video(tmp_path / "a.mp4", clip()).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"00" * 999)
    for name in ("text.mp4", "half.mp4", "empty.mp4", "sound.wav"):
        with pytest.raises(ValueError, match=f"cannot decode .*{name}.*: the file is no video, or damaged"):
            read_video(tmp_path / name)
    with pytest.raises(ValueError, match="n_frames must be at least 1"): read_video(tmp_path / "a.mp4", 0)
    sizes = [Image.new("RGB", size) for size in ((8, 8), (9, 8))]
    with pytest.raises(ValueError, match="frames of one size, not 2 frames"): write_video(tmp_path / "b.mp4", sizes)
    with pytest.raises(ValueError, match="frames of one size, not 0 frames"): write_video(tmp_path / "b.mp4", [])
    with pytest.raises(ValueError, match="fps must be above 0"): write_video(tmp_path / "b.mp4", clip(2), fps=0)
    assert not (tmp_path / "b.mp4").exists()


def test_time_stamps_stand_before_the_question():
    assert stamped("Is the {subject} {{here}}?", [0, 1, 2.5], 3) == (
        "The video lasts for 3.00 seconds, and 3 frames are uniformly sampled from it. "
        "These frames are located at 0.00s,1.00s,2.50s. "
        "Please answer the following questions related to this video.\nIs the {subject} {{here}}?")


def marked(query):
    "(mark, word) of every marked place."
    return [(mark, query.text[i:j]) for mark, places in query.spans.items() for i, j in places]


def test_mvbench_round_trip(tmp_path):
    folder = write_mvbench(tmp_path / "m", n=6, seed=3, px=48, vanish=.3)
    videos = Videos(FreeScenes(6, seed=3, px=48), vanish=.3)
    listed = json.loads((folder / "mvbench_scene_queries.json").read_text())
    assert set(listed[0]) == {"video_path", "scene1", "scene2", "query", "correct_order", "query_order"}
    b = MVBench(folder)
    assert len(b) == 6 and not b.missing and not b.skipped and {r.truth for r in b} == {"before", "after"}
    for video, row in zip(videos, b):
        q = row.query()
        truth = "before" if video.appears[row.subject] < video.appears[row.object] else "after"
        assert q.truth == row.truth == truth and q.kind == "before_after" and q.answers == ("before", "after")
        assert q.text == video.query(row.subject, row.object).text and len(q.image) == 8
        assert max(np.abs(pixels(x) - pixels(y)).mean() for x, y in zip(q.image, video.frames())) < 6
    q = MVBench(folder, n_frames=4, stamps=True)[0].query("Is the {subject} {{early}}, before the {object}?")
    assert q.text.startswith("The video lasts for 4.00 seconds, and 4 frames are uniformly sampled from it. "
                             "These frames are located at 0.00s,1.00s,2.00s,3.50s. Please")
    assert q.text.endswith(f"\nIs the {b[0].subject} {{early}}, before the {b[0].object}?") and len(q.image) == 4
    assert marked(q) == [("subject", b[0].subject), ("object", b[0].object)]


def test_writing_mvbench_goes_on_where_it_stopped(tmp_path):
    first = sorted((write_mvbench(tmp_path, n=2, px=32) / "video").iterdir())
    first[0].write_bytes(b"kept"), first[1].unlink()
    assert len(MVBench(write_mvbench(tmp_path, n=3, px=32))) == 3
    assert first[0].read_bytes() == b"kept" and first[1].is_file()
    MVBench(write_mvbench(tmp_path, n=3, px=34))[0].query() # another set has other files, and none of the first


def answers_to(folder, *items, videos=("a.mp4",), under="video"):
    "A folder with MVBench's own list of these (video, answer) and some videos."
    (folder / "json").mkdir(parents=True)
    question = "What's the right option for how the scenes in the video change?"
    listed = [dict(video=video, question=question, candidates=[answer], answer=answer) for video, answer in items]
    (folder / "json" / "scene_transition.json").write_text(json.dumps(listed))
    for v in videos: write_video(folder / under / v, clip(2, (16, 16)))
    return folder


def test_mvbench_s_own_list(tmp_path):
    answers = ("From the kitchen to the bedroom.", "From the hall to the garden to the street.",
               "From a car's {back} seat to the \"Red 'Lion'\".", "It gets dark.", "From office to the roof",
               "From the sea to the sea.", "From the bar, then the road, to the car, then home.")
    folder = answers_to(tmp_path / "m", *(("a.mp4", answer) for answer in answers), under="video/scene_qa/video")
    b = MVBench(folder)
    assert [(r.index, r.subject, r.truth, r.object) for r in b] == [
        (0, "kitchen", "before", "bedroom"), (2, "\"Red 'Lion'\"", "after", "car's {back} seat"),
        (4, "office", "before", "roof")]
    assert b.skipped == [1, 3, 5, 6]
    for r in b:
        q = r.query()
        assert q.text == SCENES.replace("{subject}", r.subject).replace("{object}", r.object)
        assert marked(q) == [("subject", r.subject), ("object", r.object)]


def test_the_authors_list_with_any_names(tmp_path):
    def row(a, b, query, order, query_order):
        return dict(video_path="data/mvbench/video/a.mp4", scene1=a, scene2=b, query=query, correct_order=order,
                    query_order=query_order)
    kitchen, table = "kitchen", "kitchen table"
    rows = [row("scene", "it's a {bar}", "In this video there are two scenes. Does the scene 'scene' occur before or "
                                         "after the scene 'it's a {bar}'?", [1, 2], [1, 2]),
            row(kitchen, table, f"Is {{x}} right: does the {table} occur before or after the {kitchen}?",
                [kitchen, table], [table, kitchen]),
            row(kitchen, table, "Which comes first?", 1, 1),
            row("tree", "car", "In this street, does the tree occur before or after the car?", 0, 0),
            row("Kitchen", "hall", 'Does "kitchen" occur before or after "hall"?', "Kitchen, hall", "Kitchen, hall")]
    (tmp_path / "mvbench_scene_queries.json").write_text(json.dumps(rows))
    write_video(tmp_path / "video" / "a.mp4", clip(2, (16, 16)))
    b = MVBench(tmp_path)
    assert [(r.subject, r.truth, r.object) for r in b] == [
        ("scene", "before", "it's a {bar}"), (table, "after", kitchen), ("tree", "before", "car"),
        ("kitchen", "before", "hall")]
    assert b.skipped == [2]
    for r, listed in zip(b, rows[:2] + rows[3:]):
        q = r.query()
        assert q.text == listed["query"] and [word for _, word in marked(q)] == [r.subject, r.object]
    start = b[0].query().spans["subject"][0][0]
    assert start == rows[0]["query"].index("'scene'") + 1, "the scene in quotes, not the word before it"
    assert b[2].query().spans["subject"][0][0] == rows[3]["query"].index("tree occur"), "a word, not the end of another"


@pytest.mark.parametrize("under", ["video", "scene_qa", "video/scene_qa", "."])
def test_missing_videos_are_named(tmp_path, under):
    folder = answers_to(tmp_path / "m", *((f"{v}.mp4", f"From the {v} to the x.") for v in "bcacbde"), under=under)
    warning = r"4 videos of .* are missing \(b.mp4, c.mp4, d.mp4, …\).*from_hub"
    with pytest.warns(UserWarning, match=warning) as warned: b = MVBench(folder)
    assert warned[0].filename == __file__, "the warning names the line that opened the benchmark"
    assert b.missing == ["b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    assert [(r.index, r.subject, r.truth) for r in b] == [(2, "a", "before")]
    next(folder.rglob("a.mp4")).unlink()
    with pytest.raises(FileNotFoundError, match="leaves no question: 5 videos are missing and 0 items"): MVBench(folder)


def test_a_wrong_mvbench_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): MVBench(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="holds no MVBench; looked for mvbench_scene_queries.json"):
        MVBench(tmp_path)
    path = tmp_path / "mvbench_scene_queries.json"
    for text, words in (("{", "is no JSON"), ('["a"]', "cannot read item 0"), ("[]", "leaves no question"),
                        ('[{"video_path": 1}]', "cannot read item 0.*'video'.*expected video_path")):
        path.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=words): MVBench(tmp_path)


def test_mvbench_from_the_hub(tmp_path, monkeypatch):
    folder, hub = answers_to(tmp_path / "m", ("a.mp4", "From the kitchen to the bedroom."), under="."), tmp_path / "hub"
    archive = folder / "video" / "scene_qa.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as z:
        z.write(folder / "a.mp4", "../../scene_qa/video/a.mp4")
        for name in ("__MACOSX/._a.mp4", "/etc/evil.sh", "notes.txt"): z.writestr(name, "x")
    fetched = []
    def download(repo, name, repo_type, cache_dir):
        fetched.append((repo, name, repo_type, cache_dir))
        return str(folder / name)
    monkeypatch.setattr(spatialid.benchmarks, "hf_hub_download", download)
    b = MVBench.from_hub(cache=hub, n_frames=3, stamps=True)
    assert fetched == [("OpenGVLab/MVBench", "json/scene_transition.json", "dataset", hub),
                       ("OpenGVLab/MVBench", "video/scene_qa.zip", "dataset", hub)]
    assert b[0].subject == "kitchen" and len(b[0].query().image) == 3 and "located at" in b[0].query().text
    new = [p for p in tmp_path.rglob("*") if p.is_file() and folder not in p.parents]
    assert sorted(p.name for p in new) == ["a.mp4", "scene_transition.json"] and b[0].path.is_relative_to(hub)
    before = b[0].path.stat().st_mtime_ns
    assert MVBench.from_hub(cache=hub)[0].path.stat().st_mtime_ns == before, "unpacked once"
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(ValueError, match="no whole zip archive"): MVBench.from_hub(cache=hub)
    assert len(list(hub.iterdir())) == 1, "nothing half-unpacked is left"


def test_without_the_hub(tmp_path):
    message = "cannot fetch MVBench from the Hub's dataset 'OpenGVLab/MVBench'.*HF_TOKEN, or give MVBench a local"
    with pytest.raises(OSError, match=message): MVBench.from_hub(cache=tmp_path)


def test_a_benchmark_needs_a_row_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="at least one"): write_benchmark(tmp_path / "new", 0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file is a file: give a folder"): write_benchmark(tmp_path / "file", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
