"Diagnosis: readings of Figure 8 are their formulas, damage leaves no trace, and a verdict follows from known losses."
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from spatialid import diagnosis as dg
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.edits import gaussian
from spatialid.extraction import SpatialIDs, orthonormal
from spatialid.hooks import VLM, scaled
from spatialid.scenes import FreeScenes, paste
from spatialid.sweeps import sweep
from tiny import tiny, tiny_llava

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llava(): return VLM(*tiny_llava(dtype=torch.float64), "tiny")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return Benchmark(write_benchmark(tmp_path_factory.mktemp("benchmark"), 30, seed=4, px=32, size=0.6))


@pytest.fixture(scope="module")
def questions(benchmark): return dg.cases(benchmark, 12)


def some_ids(vlm, seed=0):
    "IDs that are linear in the place, in a plane of each layer, plus a little noise."
    g, (y, x) = np.random.default_rng(seed), np.divmod(np.arange(16), 4)
    axes = g.normal(size=(vlm.n_layers, 2, vlm.width))
    table = np.einsum("pk,lkd->lpd", np.stack([x, y], 1) - 1.5, axes)
    table = table + 0.01 * g.normal(size=(vlm.n_layers, 16, vlm.width))
    table = (table - table.mean(1, keepdims=True)).reshape(1, 1, vlm.n_layers, 4, 4, vlm.width)
    counts, layers = np.ones((1, 1, 4, 4), int), list(range(1, vlm.n_layers + 1))
    return SpatialIDs(table, counts, ["all"], [74], layers, [("cup", "star")], "")


def weights(vlm): return {k: v.clone() for k, v in vlm.model.state_dict().items()}


def same(before, vlm): return all(torch.equal(v, before[k]) for k, v in vlm.model.state_dict().items())


# --- scenes that are harder to see

def test_scenes_are_as_before_by_default():
    for i in range(3):
        scene = FreeScenes(10, seed=3, px=48)[i]
        canvas, _ = replace(scene, things=()).canvas()
        for o in scene.things:
            sprite = scene.source.objects.sprite(o.name, max(2, round(o.size * 48)), o.colour)
            paste(canvas, sprite, o.x * 48, o.y * 48)
        assert np.array_equal(scene.canvas()[0], canvas)


def test_harder_scenes_keep_their_layout():
    plain, hard = FreeScenes(10, seed=3), FreeScenes(10, seed=3, size=0.5, contrast=0.25)
    for a, b in zip(plain[1].things, hard[1].things):
        assert (a.name, a.x, a.y) == (b.name, b.x, b.y) and b.size == a.size / 2
    faint, full = FreeScenes(10, seed=3, contrast=0.25)[1], plain[1]
    empty = replace(full, things=()).canvas()[0]
    assert np.abs(faint.canvas()[0] - empty).mean() < 0.4 * np.abs(full.canvas()[0] - empty).mean()
    for wrong in (dict(size=0), dict(contrast=1.5)):
        with pytest.raises(ValueError, match="size and contrast"): FreeScenes(10, **wrong)


# --- questions and places

@pytest.mark.slow
def test_cases_are_one_to_a_picture_with_the_boxes_of_their_rows(benchmark):
    found = dg.cases(benchmark)
    assert len({row.image_id for row in found.rows}) == len(found)
    for q, row, boxes in zip(found.queries, found.rows, found.boxes):
        assert np.allclose(boxes * np.tile(q.image.size, 2), row.boxes()) and q.truth == row.truth
    centres = found.centres
    assert (found.sign * (centres[:, 0] - centres[:, 1])[np.arange(len(found)), found.axis] > 0).all()
    part = found[found.axis == 1]
    assert {q.kind for q in part.queries} == {"above_below"} and len(part) == (found.axis == 1).sum()
    assert found.of_kind("above_below").rows == part.rows and len(found.of_kind("left_right", 2)) == 2
    assert [q.answers[k] for q, k in zip(found.queries, found.truth)] == [q.truth for q in found.queries]


def test_names_can_be_left_out_and_rows_without_boxes_are_counted(benchmark, tmp_path):
    taken = benchmark[0].subject
    assert all(taken not in (row.subject, row.object) for row in dg.cases(benchmark, without=[taken]).rows)
    with pytest.raises(ValueError, match="no row of the benchmark.*left out"):
        dg.cases(benchmark, without={r.subject for r in benchmark.rows})
    for file in benchmark.folder.iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    notes = json.loads((tmp_path / "instances_val2017.json").read_text())
    gone = notes["images"][0]["id"]
    notes["annotations"] = [a for a in notes["annotations"] if a["image_id"] != gone]
    (tmp_path / "instances_val2017.json").write_text(json.dumps(notes))
    found = dg.cases(Benchmark(tmp_path))
    assert found.dropped == 1 and gone not in {row.image_id for row in found.rows}


def test_true_places_are_at_the_centres_of_cells_and_the_released_ones_are_not():
    centres = (np.arange(4) + 0.5) / 4
    assert np.allclose(dg.cell_of(np.stack([centres, centres], 1)), np.arange(4)[:, None])
    assert dg.cell_of([0, 1]).tolist() == [0, 3]
    ones, ramp = np.ones((4, 4, 1)), np.arange(4.0)[None, :, None] * np.ones((4, 1, 1))
    assert np.allclose(dg.released_ids(ones, np.array([[0.76, 0.3], [0.9, 0.3], [0.3, 0.9]]))[:, 0], [0.04, 0.6, 0.6])
    assert np.isclose(dg.released_ids(ramp, np.array([0.375, 0.3]))[0], 1.5)  # the centre of column 1


# --- Figure 8A

def test_readings_are_single_forwards_projected_by_hand(llava, questions):
    ids = some_ids(llava)
    read = dg.read_ids(llava, ids, questions, [2])
    for i in (0, 5):
        q, basis = questions.queries[i], orthonormal(ids.axes(2))
        rows = [llava.run(x, [2], dg.BOTH).residual(2)[0].numpy() for x in (q, replace(q, image=None))]
        assert np.allclose(read.extracted["text"][0, i], (rows[0] - rows[1]) @ basis.T, atol=1e-9)
        assert np.allclose(read.extracted["none"][0, i], rows[0] @ basis.T, atol=1e-9)
        assert read.right[i] == (llava.run(q).beliefs[0] == q.truth)
    for axis in (0, 1): assert np.allclose(read.extracted["mean"][0][questions.axis == axis].mean(0), 0, atol=1e-9)
    x, y = dg.cell_of(questions.centres[0, 0])
    near = 0
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = (x % 1 if dx else 1 - x % 1) * (y % 1 if dy else 1 - y % 1)
        near = near + weight * ids.at(2)[min(int(y) + dy, 3), min(int(x) + dx, 3)]
    assert np.allclose(read.true[0, 0, 0], near @ orthonormal(ids.axes(2)).T)
    assert np.array_equal(dg.right_answers(llava, questions), read.right)
    counts = dg.question_numbers(questions, read)
    assert counts["accuracy"]["all"]["value"] == read.right.mean() and counts["n"] == 12
    about_x = questions.axis == 0
    assert counts["accuracy"]["left/right"]["value"] == pytest.approx(read.right[about_x].mean())
    tops = [int(llava.run(q).logits[0].argmax()) for q in questions.queries]
    said = [any(top in tokens for tokens in llava.answer_ids(q)) for top, q in zip(tops, questions.queries)]
    assert counts["another_word_likelier"] == len(said) - sum(said)


def test_margins_point_to_the_truth(questions):
    places = questions.centres
    assert (dg.towards_truth(places, questions) > 0).all()
    short = dg.margins(places / 2, places, questions)
    assert (short["raw"] < 0).all() and not short["opposed"].any(), "short, but not opposed"
    assert np.allclose(short["standardised"], 0)
    assert dg.margins(-places, places, questions)["opposed"].all()


def test_the_effect_size_counts_pairs():
    g = np.random.default_rng(0)
    values, right = g.integers(0, 6, 40).astype(float), g.random(40) < 0.6
    pairs = np.sign(values[right][:, None] - values[~right][None])
    assert np.isclose(dg.rank_biserial(values, right), pairs.mean())
    found = dg.compare(values, right)
    effect = found["effect"]
    assert effect["low"] <= effect["value"] <= effect["high"] and found["right"]["n"] == right.sum()
    greater = mannwhitneyu(values[right], values[~right], alternative="greater").pvalue
    assert np.isclose(found["p_right_larger"], greater)
    few = dg.compare(values, np.arange(40) > 2)
    assert few["effect"]["value"] is None and "only 3 wrong" in few["effect"]["not_judged"]
    assert dg.test_text(few) == few["effect"]["not_judged"] and dg.short_test(few).startswith("r = only 3 wrong")
    assert f"p = {found['p']:.1g}" in dg.short_test(found) and few["p"] is None
    assert dg.texts_of({"a": {"b": found}, "c": 3}) == {"a": {"b": dg.test_text(found)}, "c": 3}


def test_figure_8a_compares_every_baseline(llava, questions, monkeypatch):
    "Each baseline and the ground truth of the released code at the layer of the IDs, and each kind of question."
    ids, compared = some_ids(llava), []
    read = dg.read_ids(llava, ids, questions)
    def keep(values, right, seed=0): compared.append((np.array(values), right))
    monkeypatch.setattr(dg, "compare", keep)
    tests, by_kind, deviation = dg.fig8a_numbers(ids, questions, read, 3)
    assert list(tests) == ["text", "mean", "none", "released ground truth"]
    assert list(by_kind) == ["left/right", "above/below"]
    wanted = dg.margins(read.extracted["text"][2], read.true[2], questions)
    assert all(np.array_equal(deviation[unit], v) for unit, v in wanted.items())
    assert np.array_equal(compared[0][0], wanted["raw"]) and len(compared) == 3 * (4 + 2)
    assert [len(v) for v, _ in compared[12:]] == [(questions.axis == a).sum() for a in (0, 1) for _ in range(3)]
    assert len(dg.fig8a_by_layer(questions, read)) == llava.n_layers


def test_centres_of_the_released_code_are_those_of_the_first_annotation(questions):
    found = dg.released_centres(questions)
    assert found.shape == (12, 2, 2) and (found > 0).all() and (found < 1).all()
    row, size = questions.rows[0], questions.queries[0].image.size
    boxes = [box for name, box in dg.things_in(row) if row.subject in name]
    centres = [np.add(box[:2], np.divide(box[2:], 2)) / size for box in boxes]
    assert any(np.allclose(found[0, 0], centre) for centre in centres)


# --- Figure 8B

@pytest.mark.parametrize("seed", range(5))
def test_boxes_elsewhere_are_disjoint_inside_and_reproducible(seed):
    taken = [(3, 4, 9, 7), (20, 10, 8, 8)]
    found, again = (dg.disjoint_boxes(taken, (9, 7), (64, 48), 10, np.random.default_rng(seed)) for _ in range(2))
    drawn = np.zeros((48, 64), int)
    for l, t, w, h in taken + found:
        assert l >= 0 and t >= 0 and l + w <= 64 and t + h <= 48
        drawn[t:t + h, l:l + w] += 1 if (l, t, w, h) in found else 10
    assert found == again and len(found) == 10 and set(np.unique(drawn)) <= {0, 1, 10, 20}, "none overlaps another"


def test_boxes_that_do_not_fit_are_none():
    assert dg.disjoint_boxes([(0, 0, 8, 8)], (8, 8), (16, 16), 4, np.random.default_rng(0)) is None
    only = dg.disjoint_boxes([(0, 0, 8, 8)], (8, 16), (16, 16), 1, np.random.default_rng(0))
    assert only == [(8, 0, 8, 16)], "the one place there is"
    assert dg.disjoint_boxes([], (20, 2), (16, 16), 1, np.random.default_rng(0)) is None


def test_blur_stays_in_its_box():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    other = image.copy()
    other.paste((255, 255, 255), (0, 0, 32, 4))
    a, b = (np.asarray(dg.blurred(x, (5, 6, 10, 12), 3)) for x in (image, other))
    changed = (a != np.asarray(image)).any(-1)
    assert changed[6:18, 5:15].mean() > 0.9 and changed.sum() == changed[6:18, 5:15].sum()
    assert np.array_equal(a[6:18, 5:15], b[6:18, 5:15])  # nothing comes in from outside


def test_masked_answers_are_those_of_masked_pictures(llava, questions):
    kept, found = dg.mask_log_probs(llava, questions, 3, at_once=5)
    queries = dg.masked_queries(questions, 3)
    assert list(kept) == list(queries) and found.shape[:2] == (len(kept), 4)
    i = int(kept[-1])
    assert np.allclose(found[-1], llava.run(queries[i]).log_probs.numpy(), atol=1e-9)
    box = dg.pixels(questions.boxes[i, 0], questions.queries[i].image.size)
    blurred = dg.blurred(questions.queries[i].image, box, 32 * dg.RADIUS)
    assert np.array_equal(np.asarray(queries[i][0].image), np.asarray(blurred))
    with pytest.raises(ValueError, match="fewer boxes"): dg.mask_log_probs(llava, questions, 500)
    fig, ax = plt.subplots()
    dg.draw_masks(ax, questions, i, 3)
    assert len(ax.patches) == 2 and ax.images[0].get_array().shape[0] == 3 * questions.queries[i].image.height
    plt.close(fig)


def test_sensitivity_is_equation_11():
    p = np.array([[0.2, 0.5, 0.9, 0.7]])
    found = dg.sensitivities(np.log(p))
    wanted = {"prob min": 0.5 - 0.2, "prob mean": 0.7 - 0.2, "prob z": 0.5 / 0.2, "log_prob min": np.log(0.5 / 0.2)}
    for name, value in wanted.items(): assert np.isclose(found[name], value)


def test_sensitivity_of_the_true_answer_and_of_the_one_given():
    "Two answers, six boxes; four of them for the released reading."
    p = np.array([[0.2, 0.5, 0.9, 0.7, 0.6, 0.3, 0.4]])
    found = dg.fig8b_measures(np.log(np.stack([p, 1 - p], -1)), np.array([0]), np.array([1]))
    assert np.isclose(found["true answer"]["prob min"], 0.3 - 0.2)
    assert np.isclose(found["answer given"]["prob min"], 0.1 - 0.8)
    assert np.isclose(found["true answer"]["log_prob min of 4"], np.log(0.5 / 0.2))


# --- evidence

def test_image_tokens_are_what_the_first_block_receives(llava, questions):
    queries = questions.queries[:4]
    with dg.image_tokens(llava) as found: llava.run(queries)
    batch = llava.encode(queries)
    clean = llava.clean(batch)
    for i, row in enumerate(found):
        image = batch["input_ids"][i] == llava.image_ids[0]
        assert torch.allclose(row.double(), clean.residual[0][i, image], atol=1e-5)
    with pytest.raises(ValueError, match="no square"): dg.token_places(12)


def test_a_picture_that_enters_by_cross_attention(questions):
    """Mllama: image tokens are what the vision tower gives, attention to them is that of the blocks that look.

    And without their heads the picture is gone."""
    vlm = VLM(*tiny("mllama", dtype=torch.float64), "tiny")
    square = [replace(q, image=q.image.resize((16, 16))) for q in questions.queries[:4]] # one tile
    with dg.image_tokens(vlm) as found: vlm.run(square)
    batch, inner = vlm.encode(square), vlm.model.model
    inputs = {k: batch[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad(): states = inner.multi_modal_projector(inner.vision_model(**inputs).last_hidden_state)
    assert len(found) == 4 and len(found[0]) == 16
    assert all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(found, states[:, 0, 0, 1:]))
    with pytest.raises(ValueError, match="no larger than a tile"):
        with dg.image_tokens(vlm): vlm.run(replace(square[0], image=square[0].image.resize((32, 16))))

    across = vlm.cross_blocks
    seen = dg.looks(vlm, square)
    assert across == (1, 3) and seen.shape == (4, vlm.n_layers, 4, 2, 16)
    for b in range(vlm.n_layers):
        assert (seen[:, b].sum(-1) > 0).all() == (b in across) and (seen[:, b].sum(-1) < 1).all()
    other = replace(square[0], image=square[1].image)
    heads = [(b, h) for b in across for h in range(4)]
    assert not torch.allclose(vlm.run(square[0]).logits, vlm.run(other).logits, atol=1e-6)
    with dg.heads_off(vlm, heads): assert torch.allclose(vlm.run(square[0]).logits, vlm.run(other).logits, atol=1e-12)
    assert set(dg.looking_heads(vlm, square, vlm.n_layers)[:8]) == set(heads)
    plans = dg.lesion_plans(vlm)
    assert "shield" not in {how for plan in plans.values() for how, _, _ in plan} and len(plans["test"]) == 34


def test_crowds_and_boxes_without_an_area_label_no_token(tmp_path):
    "As for the boxes of a question: a crowd's box encloses many things, one without an area shows none."
    row = Benchmark(write_benchmark(tmp_path / "b", 4))[0]
    before, notes = dg.things_in(row), row.source.coco.dataset["annotations"]
    assert len(before) >= 2
    mine = [note for note in notes if note["image_id"] == row.image_id]
    mine[0]["iscrowd"], mine[1]["bbox"] = 1, [9., 9., 0., 5.]
    assert len(dg.things_in(row)) == len(before) - 2


def test_places_are_found_in_tokens_that_show_them(questions):
    labels = dg.token_labels(questions, 64)
    names = sorted(set(labels.ravel()))
    g = np.random.default_rng(0)
    shown = np.eye(len(names))[np.searchsorted(names, labels.astype(str))]
    found = dg.locate_in_tokens(shown + 0.01 * g.normal(size=shown.shape), questions)
    def seen_elsewhere(i, word):
        there = (labels == word).any(1)
        return there[i] and there.sum() > 1
    known = [[seen_elsewhere(i, word) for word in (row.subject, row.object)] for i, row in enumerate(questions.rows)]
    known, close = np.array(known), np.abs(found - questions.centres).max(-1) < 0.2
    assert known.sum() >= 4 and np.isnan(found).any() and close[known & ~np.isnan(found[..., 0])].mean() > 0.8


def test_classifier_is_linear_discriminant_analysis():
    g = np.random.default_rng(0)
    means, labels = 4 * g.normal(size=(3, 5)), np.repeat(["a", "b", "c"], 50)
    x = means[np.repeat([0, 1, 2], 50)] + g.normal(size=(150, 5))
    names, scores = dg.linear_scores(x, labels, x)
    assert np.allclose(np.exp(scores).sum(-1), 1) and (np.array(names)[scores.argmax(-1)] == labels).mean() > 0.98


def test_probes_are_fitted_on_other_pictures():
    g = np.random.default_rng(0)
    places = g.random((60, 2, 2))
    assert np.allclose(dg.probed(places @ g.normal(size=(2, 2)) + 1, places), places)
    blind = dg.probed(g.normal(size=(60, 2, 20)), places)
    assert abs(np.corrcoef(blind[:, 0, 0], places[:, 0, 0])[0, 1]) < 0.35


# --- verdict

def outcomes(*shares, n=80):
    return {k: (np.arange(n) < s * n).astype(float) for k, s in zip(("vision", "binding", "answer"), shares)}


def test_losses_add_up_to_that_of_the_model():
    for shares in ((0.95, 0.9, 0.8), (0.7, 0.7, 0.9)):
        assert np.isclose(dg.losses(shares).sum(), -np.log(2 * shares[-1] - 1))
    assert np.isfinite(dg.losses((0.5, 0.4, 0.5))).all()


@pytest.mark.parametrize("shares, stage, why", [
    ((0.7, 0.69, 0.68), "vision", "vision loses most"), ((0.98, 0.7, 0.68), "binding", "binding loses most"),
    ((0.98, 0.97, 0.7), "readout", "readout loses most"), ((0.98, 0.97, 0.97), "undetermined", "98% of the answers"),
    ((0.84, 0.72, 0.63), "undetermined", "the largest loss is"),
    ((0.92, 0.92, 0.92), "undetermined", "no stage loses more")])
def test_the_stage_that_loses_most_is_named(shares, stage, why):
    tolerance = {"vision": 0.2, "binding": 0.2, "readout": 0.2}
    assert dg.decide(dg.resampled_losses(outcomes(*shares)), tolerance)[0] == stage
    found = dg.verdict(outcomes(*shares) | {"repaired": outcomes(*shares)["answer"]}, tolerance)
    assert found["stage"] == stage and why in found["why"] and found["repaired"]["value"] == 0
    for number in found["losses"].values(): assert number["low"] <= number["value"] <= number["high"]


def test_no_stage_is_named_where_the_answers_are_right():
    "However badly the probes of a few pictures do."
    assert dg.decide(dg.resampled_losses(outcomes(0.75, 0.8, 1, n=24)), dg.TOLERANCE) == ("undetermined", 0)
    assert dg.decide(dg.resampled_losses(outcomes(0.75, 0.8, 0.8, n=80)), dg.TOLERANCE)[0] == "vision"


def test_tolerances_are_fitted_and_judged():
    shares_of = {"vision": (0.7, 0.7, 0.7), "binding": (0.9, 0.65, 0.65), "readout": (0.9, 0.9, 0.62),
                 "undetermined": (0.9, 0.9, 0.9)}
    found = [{"truth": stage, "loss": dg.resampled_losses(outcomes(*shares))} for stage, shares in shares_of.items()]
    tolerance, right = dg.calibrated(found)
    assert right == 1 and tolerance["vision"] > 0 and tolerance["binding"] == tolerance["readout"] == 0
    wrong = [*found, {"truth": "readout", "loss": found[0]["loss"]}]
    result = dg.judged(wrong, tolerance)
    assert result["n"] == 4 and result["accuracy"]["value"] == 0.75
    assert result["confusion"]["readout"] == {"vision": 1, "binding": 0, "readout": 1, "undetermined": 0}
    assert result["chance"]["always the commonest"] == 0.5 and result["confusion"]["undetermined"]["undetermined"] == 1
    assert result["named"] == {"n": 4, "right": .75} and result["undetermined"] == 0


def lesion_of(how, shares, strength=1.0, **more):
    truth = {None: "undetermined", "shield": "binding", "heads": "binding"}.get(how, how)
    found = outcomes(*shares)
    packed = dg.packed(found | {"repaired": found["answer"]})
    return {"how": how, "strength": strength, "seed": 0, "truth": truth, "evidence": packed, **more}


def test_a_study_of_lesions_counts_what_costs_accuracy():
    intact, wrong_eyes = lesion_of(None, (.95, .95, .95)), lesion_of("vision", (.7, .7, .7))
    tested = [intact, wrong_eyes, lesion_of("readout", (.95, .95, .7)), lesion_of("binding", (.95, .9, .9))]
    calibrate = [intact, wrong_eyes, lesion_of("readout", (.95, .95, .7))]
    record = {"kind": "left_right", "words": {"left_right": .9}, "calibrate": calibrate, "test": tested}
    heads = [lesion_of("heads", (.95, .95, .7), 2, heads=[[0, 1], [1, 1]]),
             lesion_of(None, (.95, .95, .95), 0, heads=[])]
    study = dg.LesionStudy(record, heads)
    assert [len(some) for some in (study.counted, study.harmless, study.headless_counted)] == [3, 1, 1]
    found = study.numbers()
    assert found["n"] == 3 and found["accuracy"]["value"] == pytest.approx(2 / 3), "heads off count, and fail"
    without = found["heads_off"]["without_them"]
    assert without["n"] == 2 and without["accuracy"]["value"] == 1
    assert found["heads_off"]["judged"]["n"] == 1 and found["heads_off"]["each"][0]["verdict"][0] == "readout"
    assert found["harmless"] == {"n": 1, "undetermined": 1} and found["right_on_calibration"] == 1
    row = found["each"][1]
    assert row["truth"] == row["verdict"][0] == "vision" and "evidence" not in row
    assert row["vision"] == pytest.approx(-np.log(.4))
    assert dg.lesion_table(found)["heads not counted"].startswith("1.00")
    shares = {"vision": .95, "binding": .95, "answer": .7, "repaired": .7}
    assert dg.heads_table(found)[2] == {"verdict": "readout", "counts": True, **shares}
    fig = dg.plot_lesions(study)
    texts = [t.get_text() for t in fig.axes[1].texts]
    assert len(texts) == 4 * 4 and texts[:5] == ["1", "0", "0", "0", "0"]
    assert fig.axes[1].get_yticklabels()[3].get_text() == "intact"
    plt.close(fig)


def test_plans_of_lesions():
    plan = dg.lesion_plan({"vision": (1, 2), "shield": (.5,)}, ((0, 1), (2,)))
    vision, shield = [("vision", 1, 0), ("vision", 1, 1), ("vision", 2, 2)], [("shield", .5, 0), ("shield", .5, 1)]
    assert plan == [(None, 0, 0), *vision, *shield]
    model = SimpleNamespace(family=SimpleNamespace(cross=False))
    full, quick = dg.lesion_plans(model), dg.lesion_plans(model, quick=True)
    assert len(full["test"]) == 1 + 3 * 13 and not set(full["test"][1:]) & set(full["calibrate"]), "other strengths"
    assert quick["test"] == full["test"][::9] and quick["calibrate"][0] == (None, 0, 0)


@pytest.mark.slow
def test_evidence_of_damaged_models_is_recorded(llava, tmp_path):
    source = dg.CaseSource(str(tmp_path), px=32)
    plans = {"calibrate": [(None, 0, 0)], "test": [(None, 0, 0), ("readout", 3.0, 1)]}
    found = dg.lesion_record(llava, some_ids(llava), 2, source, 6, plans)
    assert found["kind"] == max(found["words"], key=found["words"].get) and len(found["test"]) == 2
    assert [lesion["truth"] for lesion in found["test"]] == ["undetermined", "readout"]
    assert {len(text) for text in found["test"][1]["evidence"].values()} == {6}
    heads = dg.heads_record(llava, 2, source, 6, found["kind"], (2,))
    rows = [(lesion["how"], lesion["truth"], len(lesion["heads"])) for lesion in heads]
    assert rows == [("heads", "binding", 2), (None, "undetermined", 0)]


def test_recorded_evidence_reads_back_the_same():
    found = {"vision": np.array([0, 0.5, 1]), "answer": np.array([1.0, 0, 0])}
    assert all(np.array_equal(v, dg.unpacked(dg.packed(found))[k]) for k, v in found.items())
    some = [lesion_of(None, (0.9, 0.9, 0.95)), lesion_of("readout", (0.9, 0.9, 0.9))]
    for least, counts in ((0.1, [True, False]), (0.04, [True, True])):
        assert [lesion["counts"] for lesion in dg.with_losses(some, least)] == counts


def test_numbers_are_kept_while_their_conditions_hold(tmp_path):
    made = []
    make = lambda: made.append(1) or {"n": len(made)}
    twice = [dg.recorded(tmp_path / "x.json", {"a": (1, 2)}, make) for _ in range(2)]
    assert twice == [({"n": 1}, False), ({"n": 1}, True)]
    assert dg.recorded(tmp_path / "x.json", {"a": (1, 3)}, make) == ({"n": 2}, False)


# --- damage

@pytest.mark.parametrize("how", ["vision", "binding", "readout", "shield"])
def test_damage_changes_answers_and_leaves_no_trace(llava, questions, how):
    queries, before = questions.queries[:4], weights(llava)
    logits = llava.run(queries).logits
    with dg.lesion(llava, how, 0.8, 1, 2): hurt = llava.run(queries).logits
    assert not torch.allclose(hurt, logits) and same(before, llava) and torch.equal(llava.run(queries).logits, logits)
    with pytest.raises(KeyError, match="stop"):
        with dg.lesion(llava, how, 0.8, 1, 2): raise KeyError("stop")
    assert same(before, llava) and torch.equal(llava.run(queries).logits, logits)
    with dg.lesion(llava, how, 0.8, 1, 2): assert torch.equal(llava.run(queries).logits, hurt)  # the seed decides


def test_damage_stays_in_its_stage(llava):
    stages = {s: set(dg.stage_weights(llava, s, 2)) for s in dg.STAGES}
    assert all(stages.values())
    assert not stages["vision"] & stages["binding"] and not stages["binding"] & stages["readout"]
    assert all(".layers.0." in n or ".layers.1." in n for n in stages["binding"])
    assert not any("language_model" in n for n in stages["vision"])
    with pytest.raises(ValueError, match="no stage 'sight'"): dg.stage_weights(llava, "sight", 2)


def test_heads_switched_off_write_nothing(llava, questions):
    before = {k: v.clone() for k, v in llava.model.named_parameters()}
    size, off = llava.blocks[0].self_attn.head_dim, [(0, 1), (1, 0)]
    def silence(block):
        def hook(module, args):
            x = args[0].clone()
            for b, h in off:
                if b == block: x[..., h * size:(h + 1) * size] = 0
            return (x,)
        return hook
    hooks = [llava.blocks[b].self_attn.o_proj.register_forward_pre_hook(silence(b)) for b in (0, 1)]
    try: silent = llava.run(questions.queries[:4]).logits
    finally:
        for h in hooks: h.remove()
    plain = llava.run(questions.queries[:4]).logits
    with dg.heads_off(llava, off): found = llava.run(questions.queries[:4]).logits
    assert torch.allclose(found, silent, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in llava.model.named_parameters())
    order = dg.looking_heads(llava, questions.queries[:4], 2)
    seen = dg.looks(llava, questions.queries[:4], [1, 2]).sum(-1).mean((0, 3))
    assert len(set(order)) == len(order) == 2 * seen.shape[1] and order[0] == divmod(int(seen.argmax()), seen.shape[1])
    assert [float(seen[b, h]) for b, h in order] == sorted(seen.flatten().tolist(), reverse=True)


def test_hidden_image_tokens_are_not_seen(llava, questions):
    q, other = questions.queries[0], questions.queries[1].image
    short = replace(q, words={"subject": "cup", "object": "dog"})
    with dg.shielded(llava, 1.0):
        unseen = llava.run(replace(q, image=other)).logits
        assert torch.allclose(llava.run(q).logits, unseen, atol=1e-12), "the question sees no picture"
        padded, alone = llava.run([q, short]).logits[1], llava.run(short).logits[0]
        assert torch.allclose(padded, alone, atol=1e-9), "padding does not matter"
        edit = {"x": ("subject", lambda rows: rows * 2)}
        fast, plain = (sweep(llava, [q], edits=edit, plain=p).log_probs["x"] for p in (False, True))
        assert torch.allclose(fast, plain, atol=1e-9)
    with dg.shielded(llava, 0.0): assert torch.allclose(llava.run(q).logits, llava.run(q).logits)
    assert not torch.allclose(llava.run(q).logits, llava.run(replace(q, image=other)).logits)
    with pytest.raises(ValueError, match="cross-attention"):
        with dg.shielded(VLM(*tiny("mllama"), "tiny"), 0.5): pass


# --- writing IDs

def test_correcting_is_its_formula_and_fast_is_plain(llava, questions):
    ids, part = some_ids(llava), questions[:6]
    alone, places = dg.words_alone(llava, part.queries), part.centres
    rows = llava.run(part.queries, [2], dg.BOTH).residual(2)
    plane = orthonormal(ids.axes(2))
    target = torch.stack([dg.at_place(ids.at(2), dg.cell_of(p)) for p in places])
    held = (rows - alone[2]) @ torch.as_tensor(plane.T @ plane)
    everything = slice(0, 6)
    assert torch.allclose(dg.correcting(ids, alone, places)(rows, 2, everything), rows - held + target)
    added = dg.correcting(ids, alone, places, 0.5, "diff_norm", False)(rows, 2, everything)
    assert torch.allclose(added, rows + scaled(target, None, rows, 0.5))
    noisy = dg.correcting(ids, alone, places, instead=gaussian(llava.width, 2, 0, 0))(rows, 2, everything) - rows
    assert torch.allclose(noisy.norm(dim=-1), (target - held).norm(dim=-1))
    edits = {"a": (dg.BOTH, dg.correcting(ids, alone, places)),
             "b": (dg.BOTH, dg.correcting(ids, alone, places, 0.5, "diff_norm"))}
    fast, plain = (sweep(llava, part.queries, edits=edits, plain=p) for p in (False, True))
    for name in edits: assert torch.allclose(fast.log_probs[name], plain.log_probs[name], atol=1e-9)


def test_injections_have_their_controls(llava, questions):
    answers, before = dg.injected(llava, some_ids(llava), questions[:6], 2, (0.1, 1.0))
    assert before.shape == (6,) and all(v.shape == (llava.n_layers, 6) for v in answers.values())
    assert {f"{name}, raw" for name in ("replace", "own", "permuted", "noise")} <= set(answers)
    assert {f"{name} 1" for name in ("add", "replace", "noise", "permuted")} <= set(answers)
    some, _ = dg.injected(llava, some_ids(llava), questions[:6], 2, (0.1, 1.0), layers=[1, 3])
    assert all(np.array_equal(v, answers[name][[0, 2]]) for name, v in some.items()), "at some layers as at all"


def test_layers_before_the_reference_get_its_ids(llava, questions):
    ids, part = some_ids(llava), questions[:3]
    alone, everything = dg.words_alone(llava, part.queries), slice(None)
    rows = torch.randn(3, 2, llava.width, dtype=torch.float64)
    def written(reference):
        edit = dg.correcting(ids, alone, part.centres, exchange=False, reference=reference)
        return [edit(torch.zeros_like(rows), layer, everything) for layer in (1, 2, 3)]
    later, each = written(2), written(1)
    assert torch.equal(later[0], each[1]) and torch.equal(later[1], each[1]) and torch.equal(later[2], each[2])
    assert not torch.equal(each[0], each[1])


def test_paired_changes_are_mcnemars():
    before, after = np.array([1] * 10 + [0] * 10), np.array([1] * 9 + [0] + [1] * 6 + [0] * 4)
    found = dg.paired(before, after)
    assert (found["gained"], found["lost"]) == (6, 1)
    assert np.isclose(found["gain"]["value"], 0.25) and np.isclose(found["p"], 2 * (1 + 7) / 2**7)
    assert dg.paired(before, before)["p"] == 1


def test_a_layer_is_chosen_on_one_half_and_reported_on_the_other():
    "Layer 2 of 1, 2, 3 is best on the first half and changes nothing on the second; the last layer is left out."
    before, right = np.zeros(8, dtype=bool), np.zeros((3, 8), dtype=bool)
    right[1, :4], right[0, 4:], right[2] = True, True, True
    noise = np.zeros((3, 8), dtype=bool)
    noise[1, 4:6] = True
    found = dg.chosen_on_half({"add 1": right, "noise 1": noise}, before, [1, 2, 3])["add 1"]
    assert found["layer"] == 2 and found["gain"]["value"] == 0 and found["gain"]["n"] == 4
    assert found["over_noise"]["value"] == -.5


def test_injections_are_recorded_and_drawn(llava, tmp_path):
    ids, source = some_ids(llava), dg.CaseSource(str(tmp_path), px=32)
    found = dg.injection_record(llava, ids, 2, source, 8, "as trained", [1, 2, 3, 4])
    held_out = source.questions("inject", 8, "as trained", {"cup", "star"})
    assert not {"cup", "star"} & {name for row in held_out.rows for name in (row.subject, row.object)}
    answers, before = dg.injected(llava, ids, held_out, 2)
    assert found["n"] == 8 and found["before"]["value"] == before.mean()
    early, late = answers["replace, raw"][:2].mean(0) - before, answers["add 1"][2].astype(float) - before
    assert found["up_to_the_layer_of_the_ids"]["value"] == pytest.approx(early.mean())
    assert found["arms"]["add 1"][2]["gain"]["value"] == pytest.approx(late.mean())
    assert "layer" in dg.injection_table(found)["add 1"] and isinstance(dg.injection_table(found)["add 1"]["gain"], str)
    fig = dg.plot_injected(found, [1, 2, 3, 4], 2)
    assert len(fig.axes) == 4 and len(fig.legends[0].get_texts()) == 5 and "n = 8" in fig.axes[0].get_title(loc="left")
    plt.close(fig)


# --- places without the truth

def test_matching_finds_the_token_of_the_word(llava, questions):
    q, words = questions.queries[0], dg.word_embeddings(llava, questions.queries[:1])
    first, last = q.spans["subject"][0]
    inside = [t for t, (a, b) in zip(llava.layout(q).tail, llava.layout(q).offsets) if a < last and b > first]
    assert torch.allclose(words[0, 0], llava.model.get_input_embeddings().weight[inside].float().mean(0))
    tokens = 0.01 * torch.randn(1, 16, llava.width)
    tokens[0, 6], tokens[0, 9] = words[0, 0], words[0, 1]
    assert np.allclose(dg.matched_places(llava, tokens, [q]), dg.token_places(16)[[6, 9]])


def test_attention_is_the_models_own_and_the_sharpest_head_is_read(llava, questions):
    found = dg.looks(llava, questions.queries[:3], [1, 3])
    q = questions.queries[2]
    llava.model.set_attn_implementation("eager")
    with torch.inference_mode(): weights = llava.model(**llava.encode([q]), output_attentions=True).attentions
    llava.model.set_attn_implementation("sdpa")
    word, image = llava.positions(q, "object")[0], llava.positions(q, "image")
    assert found.shape == (3, 2, 4, 2, 16)
    assert torch.allclose(found[2, 1, :, 1].double(), weights[2][0, :, word, image], atol=1e-6)
    made = torch.full((2, 2, 3, 2, 16), 0.01)
    made[:, 1, 2, :, 5] = 0.8
    places, head = dg.attended_places(made)
    assert head == (1, 2) and np.allclose(places, dg.token_places(16)[5])
    assert np.allclose(dg.attended_places(made, (0, 0))[0], dg.token_places(16)[0])


def test_halves_of_a_benchmark_share_no_picture(benchmark):
    "Whoever is left out, and with another number questions for."
    images = lambda half, **kw: {r.image_id for r in dg.cases(benchmark, half=half, seed=3, **kw).rows}
    name = benchmark[0].subject
    assert images(0) | images(1) == images(None) and not images(0) & images(1)
    assert min(len(images(0)), len(images(1))) > 3 and images(1, n=2) <= images(1)
    assert not images(0, without=(name,)) & images(1) and images(0, without=(name,)) < images(0) | images(1)


def test_questions_come_from_scenes_or_from_halves_of_a_benchmark(benchmark, tmp_path):
    source, given = dg.CaseSource(str(tmp_path), px=32), dg.CaseSource("", seed=3, benchmark=benchmark.folder)
    found = source.questions("a", 5, "tiny")
    assert len(found) == 5 and found.rows[0].source.folder == tmp_path / "a tiny"
    halves = [{row.image_id for row in given.questions(name, None).rows} for name in ("choose", "repair")]
    assert all(halves) and not halves[0] & halves[1]
    assert halves[0] | halves[1] == {row.image_id for row in given.questions("figure 8", None).rows}


def test_a_difficulty_is_the_first_at_which_a_model_fails(monkeypatch):
    shares = dict(zip(dg.LADDER, (1, .95, .9, .75, .4)))
    monkeypatch.setattr(dg.CaseSource, "questions", lambda self, name, n, level: level)
    monkeypatch.setattr(dg, "right_answers", lambda vlm, level: np.arange(20) < 20 * shares.get(level, .9))
    level, found = dg.CaseSource("").difficulty(None, 20)
    assert level == "small, crowded" and list(found) == list(dg.LADDER)[:4] and found[level]["value"] == .75
    shares.clear()
    assert dg.CaseSource("").difficulty(None, 20)[0] == "as trained", "of equals the first"
    assert list(dg.CaseSource("", benchmark="x").difficulty(None, 20)[1]) == ["as trained"]


def test_a_diagnosis_without_ids_says_where_they_come_from(llava, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run notebook 03 first"): dg.diagnose(llava, questions)


def test_places_come_back_from_ids(llava):
    ids = some_ids(llava)
    at = np.array([[0.2, 0.7], [0.6, 0.4]])
    coordinates = ids.project(dg.at_place(ids.at(3), dg.cell_of(at)).numpy(), 3)
    assert np.allclose(dg.place_from_ids(ids, coordinates, 3), at, atol=0.02)


def test_the_exchanged_question_is_about_the_other(questions):
    q = questions.queries[0]
    turned = dg.exchanged_question(q)
    assert turned.words == {"subject": q.words["object"], "object": q.words["subject"]}
    assert {q.truth, turned.truth} == set(q.answers) and dg.exchanged_question(turned).truth == q.truth


def test_a_repair_is_chosen_and_reported(llava, questions):
    ids, some, others = some_ids(llava), questions[:5], questions[5:]
    places = dg.inferred_places(llava, ids, some.queries, 2)
    one_layer = dg.inferred_places(llava, ids, some.queries, 3, ["other layers"])["other layers"] # 2, 3: the middle
    rows = llava.run(some.queries, [2], dg.BOTH).residual(2) - dg.words_alone(llava, some.queries, [2])[2]
    assert np.allclose(one_layer, dg.place_from_ids(ids, ids.project(rows.numpy(), 2), 2))
    assert list(places) == list(dg.PLACE_SOURCES)
    assert all(p.shape == (5, 2, 2) and (0 <= p).all() and (p <= 1).all() for p in places.values())
    chosen = dg.choose_repair(llava, ids, some, places)
    for dose, layer, accuracy in chosen.values():
        edit = dg.correcting(ids, dg.words_alone(llava, some.queries), places["match"], *dg.DOSES[dose])
        assert callable(edit) and 1 <= layer <= llava.n_layers and 0 <= accuracy <= 1
    assert {layer for _, layer, _ in dg.choose_repair(llava, ids, some, places, [1, 3]).values()} <= {1, 3}
    found = dg.repaired(llava, ids, others, others.centres, "raw", 2)
    assert {name: len(v) for name, v in found.items()} == dict.fromkeys(("before", "after", "noise", "places alone"), 7)
    assert found["places alone"].all()


def test_the_choice_is_the_best_dose_and_layer(llava, questions):
    ids, some = some_ids(llava), questions[:5]
    places = {"match": some.centres}
    dose, layer, accuracy = dg.choose_repair(llava, ids, some, places)["match"]
    alone, tried = dg.words_alone(llava, some.queries), []
    for how in dg.DOSES.values():
        edits = {"x": (dg.BOTH, dg.correcting(ids, alone, some.centres, *how))}
        s = sweep(llava, some.queries, edits=edits)
        tried.append(dg.right_of(s.log_probs["x"], s.truth).mean(1))
    assert accuracy == np.max(tried) and accuracy == tried[list(dg.DOSES).index(dose)][layer - 1]


def test_what_a_repair_costs():
    cost = dg.repair_costs(100, 20, 0.25, "other prompt")
    assert cost["the edit"] == pytest.approx(.15) and cost["all"] == pytest.approx(1 + .2 + .15 + 1.2)
    assert dg.repair_costs(100, 20, 0.25, "match")["all"] == pytest.approx(1.35)


def test_numbers_of_a_repair():
    found = {"before": np.array([1, 1, 0, 0], dtype=bool), "after": np.array([1, 1, 1, 0], dtype=bool),
             "noise": np.array([1, 0, 0, 0], dtype=bool), "places alone": np.array([1, .5, 0, 0])}
    numbers = dg.repair_numbers(found, {"left_right": np.array([True, False, True, False])})
    assert numbers["repair"]["gain"]["value"] == .25 and numbers["noise"]["lost"] == 1
    assert numbers["over_noise"]["value"] == .5 and numbers["read_off"]["value"] == .375
    some = numbers["by_kind"]["left_right"]
    assert some["gained"] == 1 and some["read_off"]["value"] == .5
    assert dg.joined([{"a": np.ones(1)}, {"a": np.zeros(2)}])["a"].tolist() == [1, 0, 0]


def test_a_repair_is_recorded_source_by_source(llava, tmp_path):
    source = dg.CaseSource(str(tmp_path), px=32)
    found = dg.repair_record(llava, some_ids(llava), 2, source, 5, 7, "as trained", [1, 2, 3, 4])
    assert found["n"] == 7 and list(found["ways"]) == list(dg.PLACE_SOURCES) and found["way"] in dg.PLACE_SOURCES
    right = {name: numbers["when_chosen"]["accuracy"] for name, numbers in found["ways"].items()}
    assert right[found["way"]] == max(right.values())
    for name, numbers in found["ways"].items():
        assert numbers["when_chosen"]["n"] == 5 and numbers["after"]["n"] == 7
        assert numbers["repair"]["gain"]["value"] == pytest.approx(numbers["after"]["value"] - found["before"]["value"])
    lines = dg.repair_table(found).splitlines()
    assert len(lines) == 2 + 4 and {line.count("|") for line in lines} == {len(dg.REPAIR_COLUMNS) + 1}
    assert sum("**" in line for line in lines) == 1 and f"**{found['way']}**" in dg.repair_table(found)


# --- amplifying the layout

def test_every_picture_is_read_in_four_ways(questions):
    four = dg.with_mirrors(questions.queries[:2])
    plain, across, down, both = (np.asarray(q.image) for q in four[::2])
    assert len(four) == 8 and four[:2] == questions.queries[:2]
    assert np.array_equal(across, plain[:, ::-1]) and np.array_equal(down, plain[::-1])
    assert np.array_equal(both, plain[::-1, ::-1])


def test_the_slope_is_the_mean_difference_of_mirror_images_turned_back_token_by_token(llava, questions):
    some, layer = questions.queries[:3], 2
    layout = dg.layout_of(llava, some, [layer])
    rows = llava.run(dg.with_mirrors(some), [layer], "image").residual(layer)
    side = dg.isqrt(rows.shape[1])
    plain, across, down, both = rows.unflatten(1, (side, side)).unflatten(0, (4, 3)).numpy()
    turned_back = np.concatenate([plain - across[:, :, ::-1], down - both[:, :, ::-1]]).mean(0)
    x = np.arange(side) - (side - 1) / 2
    slope = np.einsum("x,yxd->d", x, turned_back) / (2 * side * (x**2).sum())
    assert np.allclose(layout.slopes(layer)[0], slope, atol=1e-12)
    assert 0 < layout.linear(layer) <= 1


def test_a_planted_layout_is_wholly_linear_and_what_is_not_in_its_plane_stays():
    g = np.random.default_rng(0)
    axes, xy = np.linalg.qr(g.normal(size=(6, 3)))[0].T, dg.token_places(16) * 4
    layout = dg.Layout({1: xy @ np.stack([2 * axes[0], axes[0] + axes[1]]) + 5 * axes[2]})
    assert np.allclose(layout.slopes(1), [2 * axes[0], axes[0] + axes[1]]) and np.isclose(layout.linear(1), 1)
    rows = torch.as_tensor(g.normal(size=(3, 16, 6)))
    push = dg.amplified(layout, 3)(rows, 1, slice(0, 3)) - rows
    centred = rows - torch.as_tensor(layout.means[1].mean(0))
    inside = torch.as_tensor(axes[:2])
    assert torch.allclose(push, 3 * centred @ inside.T @ inside)


def test_controls_of_the_layout_are_as_long(llava, questions):
    layout, rows = dg.layout_of(llava, questions.queries[:2], [2]), torch.randn(3, 16, llava.width).double()
    layout.means[2] = np.random.default_rng(1).normal(size=(16, llava.width))
    push = layout.along(rows, 2)
    random, others = dg.random_plane(layout, 0)(push, rows, 2), dg.other_tokens(0)(push, rows, 2)
    assert torch.allclose(random.norm(dim=-1), push.norm(dim=-1)) and not torch.allclose(random, push)
    assert torch.linalg.matrix_rank(random.flatten(0, 1)) == 2
    assert torch.allclose(others.norm(dim=-1).sort(1).values, push.norm(dim=-1).sort(1).values)
    assert not torch.allclose(others, push)


def test_an_amplified_layout_is_a_patch_and_at_zero_the_clean_run(llava, questions):
    some = questions.queries[:5]
    layout = dg.layout_of(llava, questions.queries[5:8], [1, 3])
    edits = {name: ("image", dg.amplified(layout, beta)) for name, beta in (("none", 0.0), ("twice", 1.0))}
    fast, plain = (sweep(llava, some, edits=edits, layers=[1, 3], plain=oracle) for oracle in (False, True))
    assert fast.path == "fast"
    for name in edits: assert torch.allclose(fast.log_probs[name], plain.log_probs[name], atol=1e-12, rtol=0)
    assert (plain.log_probs["none"] == plain.base_log_probs).all()
    assert torch.allclose(fast.log_probs["none"], fast.base_log_probs.expand(2, -1, -1), atol=1e-12, rtol=0)
    with llava.patch({3: ("image", lambda rows: edits["twice"][1](rows, 3, slice(None)))}):
        patched = llava.run(some).log_probs
    assert torch.allclose(patched, plain.log_probs["twice"][1], atol=1e-12, rtol=0)
    assert not torch.allclose(patched, plain.base_log_probs)


def test_layer_and_dose_are_the_best_and_the_smallest_of_equals(llava, questions):
    some, layers = questions[:6], [1, 3]
    layout = dg.layout_of(llava, questions.queries[6:8], layers)
    chosen = dg.choose_amplification(llava, layout, some, layers)
    assert list(chosen["tried"]) == [f"{beta:g}" for beta in dg.BETAS] and chosen["n"] == 6
    best = [beta for beta, each in chosen["tried"].items() if max(each) == chosen["accuracy"]][0]
    assert chosen["beta"] == float(best)
    assert chosen["layer"] == layers[chosen["tried"][best].index(chosen["accuracy"])]
    assert chosen["accuracy"] == max(map(max, chosen["tried"].values()))


def test_errors_corrected_are_of_the_wrong_and_answers_broken_of_the_right():
    answers = {"before": np.array([1, 1, 1, 0, 0], dtype=bool), "layout": np.array([1, 1, 0, 1, 1], dtype=bool),
               "random plane": np.array([1, 1, 1, 0, 1], dtype=bool)}
    numbers = dg.amplification_numbers(answers)
    layout, plane = numbers["layout"], numbers["random plane"]
    assert list(numbers) == ["layout", "random plane"] and layout["corrected"]["value"] == 1
    assert layout["corrected"]["n"] == 2 and layout["broken"]["n"] == 3 and np.isclose(layout["broken"]["value"], 1 / 3)
    assert np.isclose(layout["gain"]["value"], .2) and plane["gained"] == 1 and plane["lost"] == 0
    assert layout["layout_less_this"]["value"] == 0 and np.isclose(plane["layout_less_this"]["value"], 0)
    assert dg.share_of(np.array([], dtype=bool))["not_judged"] == "no such answers"


def test_an_amplified_layout_is_recorded_and_drawn(llava, tmp_path):
    source = dg.CaseSource(str(tmp_path), px=32)
    found = dg.layout_record(llava, source, (), 5, 7, "as trained", [1, 3], pictures=2)
    assert found["n"] == 7 and found["before"]["n"] == 7 and found["chosen"]["layer"] in (1, 3)
    assert list(found["arms"]) == ["layout", "random plane", "other tokens"] and found["cost"]["forwards_once"] == 8
    assert found["cost"]["relative_time"] > 0 and list(found["linear"]) == ["1", "3"]
    for arm in found["arms"].values():
        assert arm["gain"]["value"] == pytest.approx(arm["after"]["value"] - found["before"]["value"])
    lines = dg.layout_table(found).splitlines()
    assert len(lines) == 2 + 3 and {line.count("|") for line in lines} == {len(dg.LAYOUT_COLUMNS) + 1}
    fig = dg.plot_layout("tiny", found)
    assert "n = 5" in fig.axes[0].get_title(loc="left") and len(fig.axes[0].lines) == len(dg.BETAS) + 2
    plt.close("all")


def test_a_picture_that_enters_by_cross_attention_has_no_layout(questions):
    vlm = SimpleNamespace(family=SimpleNamespace(cross=True, title="Mllama"))
    with pytest.raises(ValueError, match="cross-attention in Mllama"): dg.layout_of(vlm, questions.queries, [1])


def test_quick_sizes_are_no_larger_than_given():
    given = dict.fromkeys(dg.QUICK["deep"], None) | {"n_level": 5, "n_lesion": 56, "n_repair": 0}
    deep, shallow = (dg.quick_sizes(n, **given) for n in (30, 8))
    assert deep["n_level"] == 5 and deep["n_lesion"] == 0 and deep["n_repair"] == shallow["n_repair"] == 0
    assert shallow["n_lesion"] == 24 and shallow["layer_step"] is None
    assert deep["n_questions"] == dg.QUICK["deep"]["n_questions"]
    assert dg.quick_sizes(8, **given | {"layer_step": 2})["layer_step"] == 2


# --- claims and figures

def test_claims_about_cross_attention_are_of_such_models():
    number, none = {"value": -.3, "low": -.4, "high": -.2, "n": 9}, dg.not_judged("not run", 0)
    plain, cross = (dg.diagnosis_claims(number, number, none, cross) for cross in (False, True))
    assert plain["fig8a_cross"]["value"] is None and "cross-attention" in plain["fig8b_cross_none"]["not_judged"]
    assert cross["fig8a_cross"] == number and cross["fig8b_cross_none"]["value"] == .3 and cross["a8_gain"] == none


def test_figures_of_right_and_wrong_answers(llava, questions):
    g, ids = np.random.default_rng(0), some_ids(llava)
    read = replace(dg.read_ids(llava, ids, questions), right=np.arange(12) % 2 == 0)
    values = {"raw": g.normal(size=12), "standardised": g.normal(size=12)}
    tests = {unit: dg.compare(v, read.right, least=3) for unit, v in values.items()}
    fig = dg.plot_fig8a("tiny", values, tests, [tests["raw"]] * 4, read, 2)
    assert dg.short_test(tests["raw"]) in fig.axes[0].get_title(loc="left")
    assert "6 of 12 answers wrong" in fig.axes[0].get_title(loc="left")
    assert len(fig.axes[2].collections) == 1
    assert "n = 12" in fig.axes[2].get_title(loc="left")
    kept = np.flatnonzero([i in dg.masked_queries(questions, 3) for i in range(12)])
    rules = dict.fromkeys(("prob min", "prob mean"), values["raw"][kept])
    sensitivity = {"true answer": rules, "answer given": rules}
    compared = dict.fromkeys(sensitivity, dict.fromkeys(rules, tests["raw"]))
    other = dg.plot_fig8b("tiny", questions, kept, read.right[kept], sensitivity, compared, 3)
    assert other.axes[1].get_xlabel() == "Eq. 11: probability of the true answer" and len(other.axes[1].patches) > 1
    pictures = dg.plot_cases(questions, read.right, 2)
    assert [len(ax.patches) for ax in pictures.axes] == [2] * 4 and pictures.axes[3].get_xlabel().endswith("wrong")
    plt.close("all")


# --- the whole, on the bundled model

@pytest.mark.slow
def test_a_damaged_readout_is_named_and_the_model_is_whole_afterwards(tmp_path):
    vlm = VLM.load("llava-tiny")
    ids, benchmark = dg.quick_ids(vlm, 4, pairs=3), Benchmark(write_benchmark(tmp_path, 110, seed="test diagnosis"))
    questions = dg.cases(benchmark, 70)
    before = weights(vlm)
    assert dg.diagnose(vlm, questions, ids, 4, "above_below")["stage"] == "undetermined"  # nothing fails
    with dg.lesion(vlm, "readout", 4.0, 3, 4): found = dg.diagnose(vlm, questions, ids, 4, "above_below")
    assert found["stage"] == "readout" and found["strength"] >= 0.9 and same(before, vlm)
    lost = sum(loss["value"] for loss in found["losses"].values())
    assert np.isclose(lost, -np.log(max(found["skills"]["answer"]["value"], 0.05)))
    with pytest.raises(ValueError, match="at least ten"): dg.diagnose(vlm, questions[:5], ids, 4)
    with pytest.raises(FileNotFoundError): dg.diagnose(vlm, tmp_path / "nowhere", ids, 4)
    of_folder, of_benchmark = (dg.diagnose(vlm, b, ids, 4, n=20) for b in (str(tmp_path), Benchmark(tmp_path)))
    assert of_folder == of_benchmark and of_folder["n"] == 20
    few = questions[:24]
    gathered = dg.evidence(vlm, ids, few, 4)
    again, from_evidence = (dg.diagnose(vlm, few, ids, 4, "above_below", gathered=what) for what in (None, gathered))
    assert again == from_evidence


@pytest.mark.parametrize("model", ["llava-tiny", "llava-tiny-early"])
def test_results_say_what_the_issue_asks(model):
    found = json.loads((ROOT / "results" / model / "06_diagnosis.json").read_text())
    lesions = found["lesions"]
    assert lesions["n"] >= 30 and set(lesions["accuracy"]) == {"value", "low", "high", "n"}
    assert lesions["chance"]["one of three"] == pytest.approx(1 / 3, rel=1e-5)
    confusion = {stage: sum(row.values()) for stage, row in lesions["confusion"].items() if stage != "undetermined"}
    assert sum(confusion.values()) == lesions["n"]
    right = sum(lesions["confusion"][stage][stage] for stage in dg.STAGES) / lesions["n"]
    assert np.isclose(right, lesions["accuracy"]["value"], rtol=1e-5)
    assert found["repair"]["n"] >= 2000 and {"fig8a", "fig8b", "a8_gain"} <= set(found["claims"])
