"Diagnosis: readings of Figure 8 are their formulas, damage leaves no trace, and a verdict follows from known losses."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from spatialid import diagnosis as dg
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.scenes import FreeScenes, paste
from spatialid.extraction import SpatialIDs, orthonormal
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.edits import gaussian
from spatialid.hooks import scaled
from spatialid.sweeps import sweep
from tiny import tiny, tiny_llava

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llava(): return VLM(*tiny_llava(dtype=torch.float64), "tiny")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory): return Benchmark(write_benchmark(tmp_path_factory.mktemp("benchmark"), 30, seed=4, px=32, size=0.6))


@pytest.fixture(scope="module")
def asked(benchmark): return dg.cases(benchmark, 12)


def some_ids(vlm, seed=0):
    "IDs that are linear in the place, in a plane of each layer, plus a little noise."
    g, (y, x) = np.random.default_rng(seed), np.divmod(np.arange(16), 4)
    axes = g.normal(size=(vlm.n_layers, 2, vlm.width))
    table = np.einsum("pk,lkd->lpd", np.stack([x, y], 1) - 1.5, axes) + 0.01 * g.normal(size=(vlm.n_layers, 16, vlm.width))
    table = (table - table.mean(1, keepdims=True)).reshape(1, 1, vlm.n_layers, 4, 4, vlm.width)
    return SpatialIDs(table, np.ones((1, 1, 4, 4), int), ["all"], [74], list(range(1, vlm.n_layers + 1)), [("cup", "star")], "")


def weights(vlm): return {k: v.clone() for k, v in vlm.model.state_dict().items()}


def same(before, vlm): return all(torch.equal(v, before[k]) for k, v in vlm.model.state_dict().items())


# --- scenes that are harder to see

def test_scenes_are_as_before_unless_asked():
    for i in range(3):
        scene = FreeScenes(10, seed=3, px=48)[i]
        canvas, _ = replace(scene, things=()).canvas()
        for o in scene.things: paste(canvas, scene.source.objects.sprite(o.name, max(2, round(o.size * 48)), o.colour), o.x * 48, o.y * 48)
        assert np.array_equal(scene.canvas()[0], canvas)


def test_harder_scenes_keep_their_layout():
    plain, hard = FreeScenes(10, seed=3), FreeScenes(10, seed=3, size=0.5, contrast=0.25)
    for a, b in zip(plain[1].things, hard[1].things): assert (a.name, a.x, a.y) == (b.name, b.x, b.y) and b.size == a.size / 2
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


def test_names_can_be_left_out_and_rows_without_boxes_are_counted(benchmark, tmp_path):
    taken = benchmark[0].subject
    assert all(taken not in (row.subject, row.object) for row in dg.cases(benchmark, without=[taken]).rows)
    with pytest.raises(ValueError, match="no row of the benchmark.*left out"): dg.cases(benchmark, without={r.subject for r in benchmark.rows})
    for file in benchmark.folder.iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    notes = json.loads((tmp_path / "instances_val2017.json").read_text())
    gone = notes["images"][0]["id"]
    notes["annotations"] = [a for a in notes["annotations"] if a["image_id"] != gone]
    (tmp_path / "instances_val2017.json").write_text(json.dumps(notes))
    found = dg.cases(Benchmark(tmp_path))
    assert found.dropped == 1 and gone not in {row.image_id for row in found.rows}


def test_true_places_are_at_the_centres_of_cells_and_the_released_ones_are_not():
    centres = (np.arange(4) + 0.5) / 4
    assert np.allclose(dg.cell_of(np.stack([centres, centres], 1)), np.arange(4)[:, None]) and dg.cell_of([0, 1]).tolist() == [0, 3]
    ones, ramp = np.ones((4, 4, 1)), np.arange(4.0)[None, :, None] * np.ones((4, 1, 1))
    assert np.isclose(dg.released_ids(ones, np.array([0.76, 0.3]))[0], 0.04) and np.isclose(dg.released_ids(ones, np.array([0.9, 0.3]))[0], 0.6)
    assert np.isclose(dg.released_ids(ramp, np.array([0.375, 0.3]))[0], 1.5)  # the centre of column 1


# --- Figure 8A

def test_readings_are_single_forwards_projected_by_hand(llava, asked):
    ids = some_ids(llava)
    read = dg.read_ids(llava, ids, asked, [2])
    for i in (0, 5):
        q, basis = asked.queries[i], orthonormal(ids.axes(2))
        rows = [llava.run(x, [2], dg.BOTH).residual(2)[0].numpy() for x in (q, replace(q, image=None))]
        assert np.allclose(read.extracted["text"][0, i], (rows[0] - rows[1]) @ basis.T, atol=1e-9)
        assert np.allclose(read.extracted["none"][0, i], rows[0] @ basis.T, atol=1e-9)
        assert read.right[i] == (llava.run(q).beliefs[0] == q.truth)
    for axis in (0, 1): assert np.allclose(read.extracted["mean"][0][asked.axis == axis].mean(0), 0, atol=1e-9)
    x, y = dg.cell_of(asked.centres[0, 0])
    near = (1 - x % 1) * (1 - y % 1) * ids.at(2)[int(y), int(x)]
    for dx, dy in ((1, 0), (0, 1), (1, 1)): near = near + (x % 1 if dx else 1 - x % 1) * (y % 1 if dy else 1 - y % 1) * ids.at(2)[min(int(y) + dy, 3), min(int(x) + dx, 3)]
    assert np.allclose(read.true[0, 0, 0], near @ orthonormal(ids.axes(2)).T)


def test_margins_point_to_the_truth(asked):
    places = asked.centres
    assert (dg.towards_truth(places, asked) > 0).all()
    short = dg.margins(places / 2, places, asked)
    assert (short["raw"] < 0).all() and not short["opposed"].any() and np.allclose(short["standardised"], 0)  # short, but not opposed
    assert dg.margins(-places, places, asked)["opposed"].all()


def test_the_effect_size_counts_pairs():
    g = np.random.default_rng(0)
    values, right = g.integers(0, 6, 40).astype(float), g.random(40) < 0.6
    pairs = np.sign(values[right][:, None] - values[~right][None])
    assert np.isclose(dg.rank_biserial(values, right), pairs.mean())
    found = dg.compare(values, right)
    assert found["effect"]["low"] <= found["effect"]["value"] <= found["effect"]["high"] and found["right"]["n"] == right.sum()
    assert np.isclose(found["p_right_larger"], mannwhitneyu(values[right], values[~right], alternative="greater").pvalue)
    few = dg.compare(values, np.arange(40) > 2)
    assert few["effect"]["value"] is None and "only 3 wrong" in few["effect"]["not_judged"]


# --- Figure 8B

@pytest.mark.parametrize("seed", range(5))
def test_boxes_elsewhere_are_disjoint_inside_and_reproducible(seed):
    taken = [(3, 4, 9, 7), (20, 10, 8, 8)]
    found, again = (dg.disjoint_boxes(taken, (9, 7), (64, 48), 10, np.random.default_rng(seed)) for _ in range(2))
    drawn = np.zeros((48, 64), int)
    for l, t, w, h in taken + found:
        assert l >= 0 and t >= 0 and l + w <= 64 and t + h <= 48
        drawn[t:t + h, l:l + w] += 1 if (l, t, w, h) in found else 10
    assert found == again and len(found) == 10 and set(np.unique(drawn)) <= {0, 1, 10, 11 - 1, 20} and not (drawn == 11).any() and not (drawn == 2).any()


def test_boxes_that_do_not_fit_are_none():
    assert dg.disjoint_boxes([(0, 0, 8, 8)], (8, 8), (16, 16), 4, np.random.default_rng(0)) is None
    assert len(dg.disjoint_boxes([(0, 0, 8, 8)], (8, 16), (16, 16), 1, np.random.default_rng(0))) == 1  # the one place there is
    assert dg.disjoint_boxes([], (20, 2), (16, 16), 1, np.random.default_rng(0)) is None


def test_blur_stays_in_its_box():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    other = image.copy()
    other.paste((255, 255, 255), (0, 0, 32, 4))
    a, b = (np.asarray(dg.blurred(x, (5, 6, 10, 12), 3)) for x in (image, other))
    changed = (a != np.asarray(image)).any(-1)
    assert changed[6:18, 5:15].mean() > 0.9 and changed.sum() == changed[6:18, 5:15].sum()
    assert np.array_equal(a[6:18, 5:15], b[6:18, 5:15])  # nothing comes in from outside


def test_masked_answers_are_those_of_masked_pictures(llava, asked):
    kept, found = dg.mask_log_probs(llava, asked, 3, at_once=5)
    queries = dg.masked_queries(asked, 3)
    assert list(kept) == list(queries) and found.shape[:2] == (len(kept), 4)
    i = int(kept[-1])
    assert np.allclose(found[-1], llava.run(queries[i]).log_probs.numpy(), atol=1e-9)
    box = dg.pixels(asked.boxes[i, 0], asked.queries[i].image.size)
    assert np.array_equal(np.asarray(queries[i][0].image), np.asarray(dg.blurred(asked.queries[i].image, box, 32 * dg.RADIUS)))
    with pytest.raises(ValueError, match="fewer boxes"): dg.mask_log_probs(llava, asked, 500)


def test_sensitivity_is_equation_11():
    p = np.array([[0.2, 0.5, 0.9, 0.7]])
    found = dg.sensitivities(np.log(p))
    assert np.isclose(found["prob min"], 0.5 - 0.2) and np.isclose(found["prob mean"], 0.7 - 0.2) and np.isclose(found["prob z"], 0.5 / 0.2) and np.isclose(found["log_prob min"], np.log(0.5 / 0.2))


# --- evidence

def test_image_tokens_are_what_the_first_block_receives(llava, asked):
    queries = asked.queries[:4]
    with dg.image_tokens(llava) as found: llava.run(queries)
    batch = llava.encode(queries)
    clean = llava.clean(batch)
    for i, row in enumerate(found): assert torch.allclose(row.double(), clean.residual[0][i, batch["input_ids"][i] == llava.image_ids[0]], atol=1e-5)
    with pytest.raises(ValueError, match="no square"): dg.token_places(12)


def test_a_picture_that_enters_by_cross_attention(asked):
    "Mllama: image tokens are what the vision tower gives, attention to them is that of the blocks that look, and without their heads the picture is gone."
    vlm = VLM(*tiny("mllama", dtype=torch.float64), "tiny")
    square = [replace(q, image=q.image.resize((16, 16))) for q in asked.queries[:4]] # one tile
    with dg.image_tokens(vlm) as found: vlm.run(square)
    batch, inner = vlm.encode(square), vlm.model.model
    with torch.no_grad(): states = inner.multi_modal_projector(inner.vision_model(**{k: batch[k].double() if k == "pixel_values" else batch[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}).last_hidden_state)
    assert len(found) == 4 and all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(found, states[:, 0, 0, 1:])) and len(found[0]) == 16
    with pytest.raises(ValueError, match="no larger than a tile"):
        with dg.image_tokens(vlm): vlm.run(replace(square[0], image=square[0].image.resize((32, 16))))

    across = dg.cross_blocks(vlm)
    seen = dg.looks(vlm, square)
    assert across == [1, 3] and seen.shape == (4, vlm.n_layers, 4, 2, 16)
    for b in range(vlm.n_layers): assert (seen[:, b].sum(-1) > 0).all() == (b in across) and (seen[:, b].sum(-1) < 1).all()
    other = replace(square[0], image=square[1].image)
    heads = [(b, h) for b in across for h in range(4)]
    assert not torch.allclose(vlm.run(square[0]).logits, vlm.run(other).logits, atol=1e-6)
    with dg.heads_off(vlm, heads): assert torch.allclose(vlm.run(square[0]).logits, vlm.run(other).logits, atol=1e-12)
    assert set(dg.looking_heads(vlm, square, vlm.n_layers)[:8]) == set(heads)


def test_crowds_and_boxes_without_an_area_label_no_token(tmp_path):
    "As for the boxes of a question: a crowd's box encloses many things, one without an area shows none."
    row = Benchmark(write_benchmark(tmp_path / "b", 4))[0]
    before, notes = dg.things_in(row), row.source.coco.dataset["annotations"]
    assert len(before) >= 2
    mine = [note for note in notes if note["image_id"] == row.image_id]
    mine[0]["iscrowd"], mine[1]["bbox"] = 1, [9., 9., 0., 5.]
    assert len(dg.things_in(row)) == len(before) - 2


def test_places_are_found_in_tokens_that_show_them(asked):
    labels = dg.token_labels(asked, 64)
    names = sorted(set(labels.ravel()))
    g = np.random.default_rng(0)
    tokens = np.stack([np.eye(len(names))[[names.index(n) for n in row]] for row in labels]) + 0.01 * g.normal(size=(*labels.shape, len(names)))
    found = dg.locate_in_tokens(tokens, asked)
    known = np.array([[sum((labels[j] == w).any() for j in range(len(asked)) if j != i) > 0 and (labels[i] == w).any() for w in (row.subject, row.object)] for i, row in enumerate(asked.rows)])
    close = np.abs(found - asked.centres).max(-1) < 0.2
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

def outcomes(*shares, n=80): return {k: (np.arange(n) < s * n).astype(float) for k, s in zip(("vision", "binding", "answer"), shares)}


def test_losses_add_up_to_that_of_the_model():
    for shares in ((0.95, 0.9, 0.8), (0.7, 0.7, 0.9)): assert np.isclose(dg.losses(shares).sum(), -np.log(2 * shares[-1] - 1))
    assert np.isfinite(dg.losses((0.5, 0.4, 0.5))).all()


@pytest.mark.parametrize("shares, stage", [((0.7, 0.69, 0.68), "vision"), ((0.98, 0.7, 0.68), "binding"), ((0.98, 0.97, 0.7), "readout"), ((0.98, 0.97, 0.97), "undetermined"), ((0.84, 0.72, 0.63), "undetermined")])
def test_the_stage_that_loses_most_is_named(shares, stage):
    assert dg.decide(dg.resampled_losses(outcomes(*shares)), {"vision": 0.2, "binding": 0.2, "readout": 0.2})[0] == stage


def test_no_stage_is_named_where_the_answers_are_right():
    "However badly the probes of a few pictures do."
    assert dg.decide(dg.resampled_losses(outcomes(0.75, 0.8, 1, n=24)), dg.TOLERANCE) == ("undetermined", 0)
    assert dg.decide(dg.resampled_losses(outcomes(0.75, 0.8, 0.8, n=80)), dg.TOLERANCE)[0] == "vision"


def test_tolerances_are_fitted_and_judged():
    found = [{"truth": stage, "loss": dg.resampled_losses(outcomes(*shares))} for stage, shares in
             (("vision", (0.7, 0.7, 0.7)), ("binding", (0.9, 0.65, 0.65)), ("readout", (0.9, 0.9, 0.62)), ("undetermined", (0.9, 0.9, 0.9)))]
    tolerance, right = dg.calibrated(found)
    assert right == 1 and tolerance["vision"] > 0 and tolerance["binding"] == tolerance["readout"] == 0
    wrong = [*found, {"truth": "readout", "loss": found[0]["loss"]}]
    result = dg.judged(wrong, tolerance)
    assert result["n"] == 4 and result["accuracy"]["value"] == 0.75 and result["confusion"]["readout"] == {"vision": 1, "binding": 0, "readout": 1, "undetermined": 0}
    assert result["chance"]["always the commonest"] == 0.5 and result["confusion"]["undetermined"]["undetermined"] == 1


def test_recorded_evidence_reads_back_the_same():
    found = {"vision": np.array([0, 0.5, 1]), "answer": np.array([1.0, 0, 0])}
    assert all(np.array_equal(v, dg.unpacked(dg.packed(found))[k]) for k, v in found.items())
    intact, hurt = ({"how": how, "evidence": dg.packed(outcomes(0.9, 0.9, a))} for how, a in ((None, 0.95), ("readout", 0.9)))
    assert [o["counts"] for o in dg.with_losses([intact, hurt])] == [True, False] and [o["counts"] for o in dg.with_losses([intact, hurt], 0.04)] == [True, True]


def test_numbers_are_kept_while_their_conditions_hold(tmp_path):
    made = []
    make = lambda: made.append(1) or {"n": len(made)}
    assert [dg.recorded(tmp_path / "x.json", {"a": (1, 2)}, make) for _ in range(2)] == [({"n": 1}, False), ({"n": 1}, True)]
    assert dg.recorded(tmp_path / "x.json", {"a": (1, 3)}, make) == ({"n": 2}, False)


# --- damage

@pytest.mark.parametrize("how", ["vision", "binding", "readout", "shield"])
def test_damage_changes_answers_and_leaves_no_trace(llava, asked, how):
    queries, before = asked.queries[:4], weights(llava)
    logits = llava.run(queries).logits
    with dg.lesion(llava, how, 0.8, 1, 2): hurt = llava.run(queries).logits
    assert not torch.allclose(hurt, logits) and same(before, llava) and torch.equal(llava.run(queries).logits, logits)
    with pytest.raises(KeyError, match="stop"):
        with dg.lesion(llava, how, 0.8, 1, 2): raise KeyError("stop")
    assert same(before, llava) and torch.equal(llava.run(queries).logits, logits)
    with dg.lesion(llava, how, 0.8, 1, 2): assert torch.equal(llava.run(queries).logits, hurt)  # the seed decides


def test_damage_stays_in_its_stage(llava):
    stages = {s: set(dg.stage_weights(llava, s, 2)) for s in dg.STAGES}
    assert all(stages.values()) and not stages["vision"] & stages["binding"] and not stages["binding"] & stages["readout"]
    assert all(".layers.0." in n or ".layers.1." in n for n in stages["binding"]) and not any("language_model" in n for n in stages["vision"])
    with pytest.raises(ValueError, match="no stage 'sight'"): dg.stage_weights(llava, "sight", 2)


def test_heads_switched_off_write_nothing(llava, asked):
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
    try: silent = llava.run(asked.queries[:4]).logits
    finally:
        for h in hooks: h.remove()
    plain = llava.run(asked.queries[:4]).logits
    with dg.heads_off(llava, off): found = llava.run(asked.queries[:4]).logits
    assert torch.allclose(found, silent, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in llava.model.named_parameters())
    order = dg.looking_heads(llava, asked.queries[:4], 2)
    seen = dg.looks(llava, asked.queries[:4], [1, 2]).sum(-1).mean((0, 3))
    assert len(set(order)) == len(order) == 2 * seen.shape[1] and order[0] == divmod(int(seen.argmax()), seen.shape[1])
    assert [float(seen[b, h]) for b, h in order] == sorted(seen.flatten().tolist(), reverse=True)


def test_hidden_image_tokens_are_not_seen(llava, asked):
    q, other = asked.queries[0], asked.queries[1].image
    short = replace(q, words={"subject": "cup", "object": "dog"})
    with dg.shielded(llava, 1.0):
        assert torch.allclose(llava.run(q).logits, llava.run(replace(q, image=other)).logits, atol=1e-12)  # the question sees no picture
        assert torch.allclose(llava.run([q, short]).logits[1], llava.run(short).logits[0], atol=1e-9)  # padding does not matter
        edit = {"x": ("subject", lambda rows: rows * 2)}
        fast, plain = (sweep(llava, [q], edits=edit, plain=p).log_probs["x"] for p in (False, True))
        assert torch.allclose(fast, plain, atol=1e-9)
    with dg.shielded(llava, 0.0): assert torch.allclose(llava.run(q).logits, llava.run(q).logits)
    assert not torch.allclose(llava.run(q).logits, llava.run(replace(q, image=other)).logits)
    with pytest.raises(ValueError, match="cross-attention"):
        with dg.shielded(VLM(*tiny("mllama"), "tiny"), 0.5): pass


# --- writing IDs

def test_correcting_is_its_formula_and_fast_is_plain(llava, asked):
    ids, part = some_ids(llava), asked[:6]
    alone, places = dg.words_alone(llava, part.queries), part.centres
    rows = llava.run(part.queries, [2], dg.BOTH).residual(2)
    plane = orthonormal(ids.axes(2))
    target = torch.stack([dg.at_place(ids.at(2), dg.cell_of(p)) for p in places])
    held = (rows - alone[2]) @ torch.as_tensor(plane.T @ plane)
    everything = slice(0, 6)
    assert torch.allclose(dg.correcting(ids, alone, places)(rows, 2, everything), rows - held + target)
    assert torch.allclose(dg.correcting(ids, alone, places, 0.5, "diff_norm", False)(rows, 2, everything), rows + scaled(target, None, rows, 0.5))
    noisy = dg.correcting(ids, alone, places, instead=gaussian(llava.width, 2, 0, 0))(rows, 2, everything) - rows
    assert torch.allclose(noisy.norm(dim=-1), (target - held).norm(dim=-1))
    edits = {"a": (dg.BOTH, dg.correcting(ids, alone, places)), "b": (dg.BOTH, dg.correcting(ids, alone, places, 0.5, "diff_norm"))}
    fast, plain = (sweep(llava, part.queries, edits=edits, plain=p) for p in (False, True))
    for name in edits: assert torch.allclose(fast.log_probs[name], plain.log_probs[name], atol=1e-9)


def test_injections_have_their_controls(llava, asked):
    answers, before = dg.injected(llava, some_ids(llava), asked[:6], 2, (0.1, 1.0))
    assert before.shape == (6,) and all(v.shape == (llava.n_layers, 6) for v in answers.values())
    assert {"own, raw", "add 1", "replace 1", "noise 1", "permuted 1", "replace, raw", "noise, raw", "permuted, raw"} <= set(answers)
    some, _ = dg.injected(llava, some_ids(llava), asked[:6], 2, (0.1, 1.0), layers=[1, 3])
    assert all(np.array_equal(v, answers[name][[0, 2]]) for name, v in some.items()), "at some layers as at all"


def test_layers_before_the_reference_get_its_ids(llava, asked):
    ids, part = some_ids(llava), asked[:3]
    alone, rows, everything = dg.words_alone(llava, part.queries), torch.randn(3, 2, llava.width, dtype=torch.float64), slice(None)
    later = [dg.correcting(ids, alone, part.centres, exchange=False, reference=2)(torch.zeros_like(rows), l, everything) for l in (1, 2, 3)]
    own = [dg.correcting(ids, alone, part.centres, exchange=False)(torch.zeros_like(rows), l, everything) for l in (1, 2, 3)]
    assert torch.equal(later[0], own[1]) and torch.equal(later[1], own[1]) and torch.equal(later[2], own[2]) and not torch.equal(own[0], own[1])


def test_paired_changes_are_mcnemars():
    before, after = np.array([1] * 10 + [0] * 10), np.array([1] * 9 + [0] + [1] * 6 + [0] * 4)
    found = dg.paired(before, after)
    assert (found["gained"], found["lost"]) == (6, 1) and np.isclose(found["gain"]["value"], 0.25) and np.isclose(found["p"], 2 * (1 + 7) / 2**7)
    assert dg.paired(before, before)["p"] == 1


# --- places without the truth

def test_matching_finds_the_token_of_the_word(llava, asked):
    q, words = asked.queries[0], dg.word_vectors(llava, asked.queries[:1])
    inside = [t for t, (a, b) in zip(llava.layout(q).tail, llava.layout(q).offsets) if a < q.spans["subject"][0][1] and b > q.spans["subject"][0][0]]
    assert torch.allclose(words[0, 0], llava.model.get_input_embeddings().weight[inside].float().mean(0))
    tokens = 0.01 * torch.randn(1, 16, llava.width)
    tokens[0, 6], tokens[0, 9] = words[0, 0], words[0, 1]
    assert np.allclose(dg.matched_places(llava, tokens, [q]), dg.token_places(16)[[6, 9]])


def test_attention_is_the_models_own_and_the_sharpest_head_is_read(llava, asked):
    found = dg.looks(llava, asked.queries[:3], [1, 3])
    q = asked.queries[2]
    llava.model.set_attn_implementation("eager")
    with torch.inference_mode(): each = llava.model(**llava.encode([q]), output_attentions=True).attentions
    llava.model.set_attn_implementation("sdpa")
    word, image = llava.positions(q, "object")[0], llava.positions(q, "image")
    assert found.shape == (3, 2, 4, 2, 16) and torch.allclose(found[2, 1, :, 1].double(), each[2][0, :, word, image], atol=1e-6)
    made = torch.full((2, 2, 3, 2, 16), 0.01)
    made[:, 1, 2, :, 5] = 0.8
    places, head = dg.attended_places(made)
    assert head == (1, 2) and np.allclose(places, dg.token_places(16)[5]) and np.allclose(dg.attended_places(made, (0, 0))[0], dg.token_places(16)[0])


def test_halves_of_a_benchmark_share_no_picture(benchmark):
    "Whoever is left out, and with another number asked for."
    images = lambda half, **kw: {r.image_id for r in dg.cases(benchmark, half=half, seed=3, **kw).rows}
    name = benchmark[0].subject
    assert images(0) | images(1) == images(None) and not images(0) & images(1) and min(len(images(0)), len(images(1))) > 3
    assert not images(0, without=(name,)) & images(1) and images(0, without=(name,)) < images(0) | images(1) and images(1, n=2) <= images(1)


def test_a_diagnosis_without_ids_says_where_they_come_from(llava, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run notebook 03 first"): dg.diagnose(llava, asked)


def test_places_come_back_from_ids(llava):
    ids = some_ids(llava)
    at = np.array([[0.2, 0.7], [0.6, 0.4]])
    assert np.allclose(dg.place_from_ids(ids, ids.project(dg.at_place(ids.at(3), dg.cell_of(at)).numpy(), 3), 3), at, atol=0.02)


def test_the_exchanged_question_is_about_the_other(asked):
    q = asked.queries[0]
    turned = dg.exchanged(q)
    assert turned.words == {"subject": q.words["object"], "object": q.words["subject"]} and {q.truth, turned.truth} == set(q.answers) and dg.exchanged(turned).truth == q.truth


def test_a_repair_is_chosen_and_reported(llava, asked):
    ids, some, others = some_ids(llava), asked[:5], asked[5:]
    places = dg.own_places(llava, ids, some.queries, 2)
    one_layer = dg.own_places(llava, ids, some.queries, 3, ["other layers"])["other layers"] # of four blocks, 2 and 3 are the middle half
    rows = llava.run(some.queries, [2], dg.BOTH).residual(2) - dg.words_alone(llava, some.queries, [2])[2]
    assert np.allclose(one_layer, dg.place_from_ids(ids, ids.project(rows.numpy(), 2), 2))
    assert list(places) == list(dg.WAYS) and all(p.shape == (5, 2, 2) and (0 <= p).all() and (p <= 1).all() for p in places.values())
    chosen = dg.choose_repair(llava, ids, some, places)
    for dose, layer, accuracy in chosen.values(): assert dose in dg.DOSES and 1 <= layer <= llava.n_layers and 0 <= accuracy <= 1
    assert {layer for _, layer, _ in dg.choose_repair(llava, ids, some, places, [1, 3]).values()} <= {1, 3}
    found = dg.repaired(llava, ids, others, others.centres, "raw", 2)
    assert {k: len(v) for k, v in found.items()} == dict.fromkeys(("before", "after", "noise", "read off"), len(others)) and found["read off"].all()


# --- the whole, on the bundled model

@pytest.mark.slow
def test_a_damaged_readout_is_named_and_the_model_is_whole_afterwards(tmp_path):
    vlm = VLM.load("llava-tiny")
    ids, asked = dg.quick_ids(vlm, 4, pairs=3), dg.cases(Benchmark(write_benchmark(tmp_path, 110, seed="test diagnosis")), 70)
    before = weights(vlm)
    assert dg.diagnose(vlm, asked, ids, 4, "above_below")["stage"] == "undetermined"  # nothing fails
    with dg.lesion(vlm, "readout", 4.0, 3, 4): found = dg.diagnose(vlm, asked, ids, 4, "above_below")
    assert found["stage"] == "readout" and found["strength"] >= 0.9 and same(before, vlm)
    assert np.isclose(sum(one["value"] for one in found["losses"].values()), -np.log(max(found["skills"]["answer"]["value"], 0.05)))
    with pytest.raises(ValueError, match="at least ten"): dg.diagnose(vlm, asked[:5], ids, 4)
    with pytest.raises(FileNotFoundError): dg.diagnose(vlm, tmp_path / "nowhere", ids, 4)
    of_folder, of_benchmark = (dg.diagnose(vlm, b, ids, 4, n=20) for b in (str(tmp_path), Benchmark(tmp_path)))
    assert of_folder == of_benchmark and of_folder["n"] == 20
    few = asked[:24]
    assert dg.diagnose(vlm, few, ids, 4, "above_below", gathered=dg.evidence(vlm, ids, few, 4)) == dg.diagnose(vlm, few, ids, 4, "above_below")


@pytest.mark.parametrize("model", ["llava-tiny", "llava-tiny-early"])
def test_results_say_what_the_issue_asks(model):
    found = json.loads((ROOT / "results" / model / "06_diagnosis.json").read_text())
    lesions = found["lesions"]
    assert lesions["n"] >= 30 and set(lesions["accuracy"]) == {"value", "low", "high", "n"} and lesions["chance"]["one of three"] == pytest.approx(1 / 3, abs=1e-6)
    assert sum(sum(row.values()) for stage, row in lesions["confusion"].items() if stage != "undetermined") == lesions["n"]
    assert np.isclose(sum(lesions["confusion"][s][s] for s in dg.STAGES) / lesions["n"], lesions["accuracy"]["value"])
    assert found["repair"]["n"] >= 2000 and {"fig8a", "fig8b", "a8_gain"} <= set(found["claims"])
