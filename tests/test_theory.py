"""Theory: regressions are their formulas, the planted model is exactly Eq. 6-8, parts add up.

Encodings are those of the modules of every family."""
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from spatialid import organisms, theory as th
from spatialid.scenes import GridScenes, grid_pairs
from spatialid.extraction import extract, grid_statistics, subsample
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.organisms import CELLS as CELL_WORDS
from spatialid.organisms import Recipe, Stage, Steps, build
from spatialid.edits import add
from spatialid.sweeps import in_float64, sweep
from tiny import tiny, tiny_llava

XY = np.stack(np.meshgrid(np.arange(4) - 1.5, np.arange(4) - 1.5), -1)
CELLS = [(x, y) for y in range(4) for x in range(4)]
TEMPLATE = "Is the {subject} to the left or right of the {object}?"


def random(*size, seed=0): return np.random.default_rng(seed).normal(size=size)


def small_scenes(): return subsample(GridScenes(grid_pairs(2), sizes=(224,), px=16), 2)


def largest(array): return np.abs(array).max()


# --- tables

def test_a_null_stands_beside_its_number():
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 3, "null_high": 0.1}
    assert "0.50 [0.25, 0.75]; null 0.10" in th.null_table({"first": {"a": estimate}})


# --- regression

def plain_map(x, y, rank, kind):
    "W of a rank, by the textbook: Eq. 17, or the full fit cut to its first right singular vectors."
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    if kind == "pcr": return vt[:rank].T @ np.diag(1 / s[:rank]) @ u[:, :rank].T @ y
    w = np.linalg.pinv(x) @ y
    v = np.linalg.svd(x @ w, full_matrices=False)[2][:rank].T
    return w @ v @ v.T


def plain_r2(x, y, rank, kind, centre):
    mean_x, mean_y = (x.mean(0), y.mean(0)) if centre else (0, 0)
    left = (y - mean_y) - (x - mean_x) @ plain_map(x - mean_x, y - mean_y, rank, kind)
    return 1 - (left**2).sum() / ((y - y.mean(0))**2).sum()


def plain_left_out(x, y, rank, kind, centre):
    lost = total = 0
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        mean_x, mean_y = (x[rest].mean(0), y[rest].mean(0)) if centre else (0, 0)
        guess = (x[i] - mean_x) @ plain_map(x[rest] - mean_x, y[rest] - mean_y, rank, kind) + mean_y
        lost, total = lost + ((y[i] - guess)**2).sum(), total + ((y[i] - y[rest].mean(0))**2).sum()
    return max(1 - lost / total, -1)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("kind", ["pcr", "rrr"])
@pytest.mark.parametrize("columns", [6, 40]) # fewer than cells, and more
def test_regressions_are_their_formulas(kind, centre, columns):
    x = random(16, columns) + 1
    y = x[:, :5] @ random(5, 9, seed=1) + random(16, 9, seed=2)
    inside, outside = (fit(y @ y.T, x, (1, 2, 4), kind, centre) for fit in (th.low_rank, th.left_out))
    for r in (1, 2, 4):
        assert abs(inside[r] - plain_r2(x, y, r, kind, centre)) < 1e-9
        assert abs(outside[r] - plain_left_out(x, y, r, kind, centre)) < 1e-7


def test_regressions_take_stacks_and_refuse_other_kinds():
    x, y = random(16, 6), random(3, 16, 9, seed=1)
    gram = y @ y.swapaxes(1, 2)
    for fit in (th.low_rank, th.left_out):
        for kind in ("pcr", "rrr"):
            one_by_one = [fit(single, x, (2,), kind)[2] for single in gram]
            assert np.allclose(fit(gram, x, (2,), kind)[2], one_by_one)
        with pytest.raises(ValueError, match="pcr and rrr"): fit(gram, x, kind="ridge")


def test_wide_encodings_make_reduced_rank_regression_empty():
    y = random(16, 9)
    first, second = (th.low_rank(y @ y.T, random(16, 40, seed=seed), (3,), "rrr")[3] for seed in (1, 2))
    assert abs(first - second) < 1e-9


def test_a_constant_moves_the_jump_to_rank_3():
    xy = XY.reshape(16, 2) * [1, 0.99]
    x = np.hstack([xy, np.full((16, 1), 20.0)])
    printed, centred = (th.low_rank(xy @ xy.T, x, (1, 2, 3), centre=centre) for centre in (False, True))
    assert printed[1] < 1e-9 and 0.4 < printed[2] < 0.6 and printed[3] > 1 - 1e-9 and centred[2] > 1 - 1e-9


def test_null_and_intervals():
    x = XY.reshape(16, 2)
    units = x @ random(2, 8) + 0.1 * random(6, 16, 8, seed=1)
    r2 = th.explained(units, x, np.ones(6), n_null=200, ranks=(1, 2))[2]
    assert r2["low"] <= r2["value"] <= r2["high"] and r2["n"] == 6 and r2["p"] < 0.01
    assert r2["null_mean"] < 0.3 < 0.9 < r2["value"]
    random_ids = random(6, 16, 8, seed=3)
    assert th.explained(random_ids, x, np.ones(6), th.left_out, n_null=200, ranks=(2,))[2]["p"] > 0.01


def test_the_null_counts_what_is_as_large():
    null = th.null_statistics(0.5, np.array([0.1, 0.2, 0.3, 0.5]))
    assert null["p"] == 2 / 5 and null["null_mean"] == pytest.approx(0.275) and 0.3 < null["null_high"] < 0.5


def test_cells_are_permuted_as_rows_and_columns_alike():
    y = random(16, 5)
    once = th.permuted_cells(y @ y.T, 3)
    assert once.shape == (3, 16, 16) and not np.allclose(once[0], once[1])
    assert np.allclose(np.sort(np.diagonal(once, axis1=1, axis2=2)), np.sort((y**2).sum(1)))
    again, other = (th.permuted_cells(y @ y.T, 3, seed) for seed in (0, 1))
    assert np.array_equal(once, again) and not np.array_equal(once, other)


# --- Table 2

@pytest.fixture(scope="module")
def fitted():
    "IDs of six objects that are column and row, encodings of them and of nothing, and the table of these."
    units = XY.reshape(16, 2) @ random(2, 8) + 0.1 * random(6, 16, 8, seed=1)
    with_constant = np.column_stack([XY.reshape(16, 2) * [1, 0.99], np.full(16, 20.0)])
    inputs = {"linear": with_constant, "Eq. 19, one-dimensional": th.rotary_index(16)}
    return units, inputs, th.table_2(units, np.ones(6), inputs, n_draws=20)


def test_table_2_has_every_form_and_rank(fitted):
    units, inputs, table = fitted
    assert list(table) == list(inputs) and all(list(by_form) == list(th.FORMS) for by_form in table.values())
    centred = table["linear"]["PCR, centred"]
    assert list(centred["in sample"]) == [1, 2, 3, 4, 5] and centred["in sample"][2]["value"] > 0.9
    direct = th.explained(units, inputs["linear"], np.ones(6), th.left_out, n_null=20)
    assert centred["left out"] == direct
    lines = th.table_2_text(table).splitlines()
    assert len(lines) == 2 + 2 * 4 * 2 + 3 and "LLaVA1.5-7B" in lines[-3] and "*0.458*" in lines[-3]


def test_the_jump_of_a_constant_is_in_the_printed_form_alone(fitted):
    jumps, shares = th.rank_jumps(fitted[2])["linear"], th.constant_shares(fitted[1])
    assert jumps["PCR, as printed"] > 0.3 > 0.05 > jumps["PCR, centred"]
    assert shares["linear"][0] == 1 and sum(shares["linear"]) == pytest.approx(1, abs=1e-3)


def test_geometry_needs_no_radius_for_a_line(fitted):
    r2 = th.geometry_r2(fitted[0], np.ones(6), n_null=20)
    assert list(r2) == ["x, y", "x, y, radius", "x, y, xy, x², y²"]
    values = [of["in sample"]["value"] for of in r2.values()]
    assert values == sorted(values) and values[0] > 0.9 and values[2] - values[0] < 0.05


def test_claims_of_table_2_are_those_of_the_family(fitted):
    linear, index = fitted[2].values()
    table = {"learned, vision tower": linear, "Eq. 19, one-dimensional": index}
    claims = th.table_2_claims(table, False, 6)
    r2 = table["learned, vision tower"]["PCR, as printed"]["in sample"]
    assert claims["table2_rank2"]["value"] == r2[2]["value"] and claims["rank3"]["value"] == r2[3]["value"]
    assert set(claims["rank3"]) == {"value", "low", "high", "n"}
    assert claims["table2_cross_rank2"]["not_judged"] and "rotary" in claims["table2_rotary_rank3"]["not_judged"]
    assert th.table_2_claims(table, True, 6)["table2_cross_rank3"]["value"] == r2[3]["value"]
    rotary = th.table_2_claims({"Eq. 19, one-dimensional": index}, False, 6)
    assert rotary["table2_rotary_rank2"]["value"] > 0 and rotary["table2_rank2"]["not_judged"] == th.NO_TABLE


def test_a_model_at_chance_has_no_read_out_to_judge():
    readout = {"all 15 directions": {"value": 0.9, "low": 0.8, "high": 1.0, "n": 60}}
    assert th.read_out_claim(readout, 0.9, 12) == readout["all 15 directions"]
    assert "50%" in th.read_out_claim(readout, 0.5, 12)["not_judged"]
    assert th.encoding_claim({"rotary, vision tower": {}}, 12) == th.not_judged(th.NO_TABLE, 12)


def test_the_layer_of_other_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    layer = {"best": 4, "chosen_on": ["cup"], "reported_on": ["sun"]}
    (tmp_path / "results" / "llava-tiny").mkdir(parents=True)
    stored = {"provenance": {"weight_hash": "abc"}, "layer": layer}
    (tmp_path / "results" / "llava-tiny" / "03_extraction.json").write_text(json.dumps(stored))
    assert th.chosen_layer("llava-tiny", "abc") == (4, {"cup", "sun"})
    with pytest.raises(ValueError, match="other weights: run notebook 03 again"): th.chosen_layer("llava-tiny", "abd")


# --- pooling and encodings

def test_pooling_is_the_mean_of_a_cell():
    a = random(8, 12, 3)
    assert np.allclose(th.pooled(a)[4 * 1 + 2], a[2:4, 6:9].mean((0, 1)))
    assert np.allclose(th.pooled(random(4, 4, 2)), random(4, 4, 2).reshape(16, 2))
    fine = np.repeat(np.repeat(a[:6, :6], 4, 0), 4, 1) # a patch in two cells counts by its area
    assert np.allclose(th.pooled(a[:6, :6]), th.pooled(fine))


def test_rotary_index_is_eq_19():
    x = th.rotary_index(16, 8)
    angles = 3 * 10000.0 ** (-2 * np.arange(4) / 8)
    assert x.shape == (16, 8) and np.allclose(x[3, ::2], np.cos(angles)) and np.allclose(x[3, 1::2], np.sin(angles))


BOTH_ROTARY = {"rotary, vision tower": 6, "rotary, language model": 3}
SIDES = {"llava": {"learned, vision tower": 4}, "qwen2_vl": BOTH_ROTARY, "qwen2_5_vl": BOTH_ROTARY,
         "qwen3_vl": {"learned, vision tower": 6, **BOTH_ROTARY}, "video_llama_3": {"rotary, vision tower": 6}}


@pytest.mark.parametrize("family", FAMILIES)
def test_encodings_of_every_family(family):
    vlm = VLM(*tiny(family), "tiny")
    state = {k: v.clone() for k, v in vlm.model.state_dict().items()}
    grids = th.encodings(vlm, 24)
    sides = SIDES.get(family, {"learned, vision tower": 4})
    assert {name: grid.shape[:2] for name, grid in grids.items()} == {name: (n, n) for name, n in sides.items()}
    assert all(np.isfinite(grid).all() for grid in grids.values())
    assert all(torch.equal(v, state[k]) for k, v in vlm.model.state_dict().items())
    for name, grid in grids.items():
        if name.startswith("rotary"): assert_turns_with_row_or_column(grid)
    if family in ("llava", "gemma3", "internvl"):
        table = next(v for k, v in vlm.model.state_dict().items() if "position_embedding" in k)
        table = table.reshape(-1, grid.shape[-1])[-16:].double().numpy()
        assert np.array_equal(grid.reshape(16, -1), table)


def assert_turns_with_row_or_column(grid):
    "Each feature of a rotary encoding (H, W, d) turns with the row or with the column, not with both."
    with_column, with_row = (np.abs(np.diff(grid, axis=axis)).max((0, 1)) > 1e-9 for axis in (1, 0))
    assert largest(np.diff(grid, axis=1)) > 1e-4 and largest(np.diff(grid, axis=0)) > 1e-4
    assert not with_column[with_row].any()
    assert np.allclose(grid[:, :1] * with_row, grid * with_row)
    assert np.allclose(grid[:1] * with_column, grid * with_column)


def test_gated_table_is_what_the_module_adds():
    vlm = VLM(*tiny("mllama"), "tiny")
    module = vlm.model.model.vision_model.gated_positional_embedding
    gate = float(torch.tanh(module.gate.detach()))
    tile = module.tile_embedding.weight[1].view(module.max_num_tiles, 17, -1)[0]
    added = ((1 - gate) * module.embedding + gate * tile).detach()[1:]
    table = th.encodings(vlm, 16)["learned, vision tower"].reshape(16, -1)
    assert abs(gate) > 0.01 and np.allclose(table, added.numpy(), atol=1e-6)


def test_no_known_encoding_names_what_was_tried():
    vlm = VLM(*tiny("llava"), "tiny")
    embeddings = vlm.model.model.vision_tower.embeddings
    embeddings.places = embeddings.position_embedding
    del embeddings.position_embedding
    tried = "position_embedding, position_embeddings, pos_embed.*LEARNED"
    with pytest.raises(ValueError, match=tried): th.encodings(vlm, 16)


def test_a_table_is_square():
    for size in ((1, 10, 2), (9, 2)): assert th.square(torch.zeros(*size), "a").shape == (3, 3, 2)
    with pytest.raises(ValueError, match="7 rows"): th.square(torch.zeros(8, 2), "a")


def test_linear_share_of_an_encoding():
    line = th.linear_encoding(np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1) @ random(2, 20), n_draws=100)
    noise = th.linear_encoding(random(6, 6, 20), n_draws=100)
    assert line["all"]["value"] > 1 - 1e-9 and line["three"]["p"] < 0.05 and line["all"]["n"] == 20
    assert noise["all"]["value"] < 0.2 and noise["all"]["p"] > 0.01
    assert noise["all"]["low"] <= noise["all"]["value"] <= noise["all"]["high"]


def test_components_of_a_linear_encoding_are_its_axes():
    x, y = np.meshgrid(np.arange(6.0), np.arange(5.0))
    encoding = np.stack([x, np.zeros_like(x), 3 * y], -1)
    on_axes, on_components, share = th.components(encoding)
    assert np.allclose(on_axes, np.stack([x - 2.5, 3 * (y - 2)], -1))
    assert np.allclose(np.abs(on_components[..., 0]), 3 * np.abs(y - 2)) and share[:2].sum() == pytest.approx(1)


# --- the planted model

@pytest.fixture(scope="module")
def planted():
    radial = (XY**2).sum(-1, keepdims=True)
    one = th.plant(np.concatenate([XY, radial - radial.mean()], -1), n_things=3)
    tiles = th.TileScenes(one.names)
    scenes = [s for s in tiles if s.a_cell in ((0, 0), (2, 1), (3, 3))]
    return one, tiles, extract(one.vlm, tiles, th.PLANTED, progress=False), scenes


def every_cell(tiles): return tiles.everywhere([(0, 0), (2, 1)])


def test_every_cell_is_everywhere(planted):
    _, tiles, _, _ = planted
    scenes = every_cell(tiles)
    assert len(scenes) == 3 * 2 * 16 and {s.b_cell for s in scenes} == set(CELLS)
    assert {s.a_cell for s in scenes} == {(0, 0), (2, 1)} and [(s.a, s.b) for s in scenes[::32]] == tiles.pairs


def test_extraction_finds_what_was_planted(planted):
    one, tiles, ids, _ = planted
    assert largest(ids.at(1) - one.ids * 224 / 225) < 1e-10 * largest(one.ids) # 15 of 16 cells in each mean
    assert largest(extract(one.vlm, every_cell(tiles), th.PLANTED, progress=False).at(1) - one.ids) < 1e-10


def test_extraction_finds_it_in_float32_too(planted):
    one, tiles, _, _ = planted
    single = VLM(th.plant(one.psi, n_things=3).vlm.model.float(), one.vlm.processor, "single")
    for module in single.model.modules():
        if type(module).__name__.endswith("RMSNorm"): del module.forward # that of the class, in float32
    assert largest(extract(single, every_cell(tiles), th.PLANTED, progress=False).at(1) - one.ids) < 1e-5


def test_r2_is_1_at_the_planted_rank_and_not_below(planted):
    one, _, ids, _ = planted
    y, x = ids.at(1).reshape(16, -1), th.pooled(th.encodings(one.vlm, 32)["learned, vision tower"])
    for kind in ("pcr", "rrr"):
        for fit in (th.low_rank, th.left_out):
            r2 = fit(y @ y.T, x, (2, 3), kind)
            assert r2[3] > 1 - 1e-8 and r2[2] < 0.9, (kind, fit.__name__)
    r2 = th.planted_r2({"planted": (one, ids)})
    assert list(r2) == [f"planted: {form}" for form in list(th.FORMS)[:3]]
    assert all(by_rank[3] > 1 - 1e-9 and by_rank[2] < 0.9 for by_rank in r2.values())


def test_steering_changes_the_answer_by_eq_8(planted):
    one, tiles, ids, _ = planted
    scene = next(s for s in tiles if s.b_cell == (1, 2))
    for pushes in (ids.at(1) - ids.at(1)[2, 1], -3 * (ids.at(1) - ids.at(1)[2, 1]), one.ids - one.ids[2, 1]):
        pushes = pushes.reshape(16, -1)
        assert largest(th.logit_change(one, scene, pushes) - pushes @ one.read) < 1e-9
    in_corner = replace(scene, a_cell=(3, 3), b_cell=(0, 0), index=0)
    assert one.vlm.run(in_corner.query(th.PLANTED)).beliefs == ["left"]


def test_a_step_of_eq_7_is_the_picture_with_the_object_there(planted):
    one, tiles, ids, _ = planted
    scene = next(s for s in tiles if s.b_cell == (1, 2))
    check = th.eq8_check(one, ids, scene, (1, 3))
    moved = [replace(scene, b_cell=cell, index=0).query(th.PLANTED) for cell in CELLS]
    answers = one.vlm.run(moved).logit_diff.numpy()
    assert np.ptp(answers) > 1 and np.allclose(check["picture"], answers - answers[CELLS.index((1, 2))])
    assert largest(check["picture"] - check["step"]) < 1e-9 and largest(check["predicted"] - check["measured"]) < 1e-9
    assert check["predicted"].shape == (32,) and np.allclose(check["predicted"][16:], 3 * check["predicted"][:16])


def test_a_push_adds_to_the_subject_alone(planted):
    one, tiles, _, _ = planted
    scene, push = tiles[20], random(64)
    swept = sweep(one.vlm, [scene.query(th.PLANTED)], edits={"push": ("subject", add(push))})
    difference = lambda v: float((v[..., 0] - v[..., 1]).squeeze())
    change = difference(swept.log_probs["push"]) - difference(swept.base_log_probs)
    assert th.logit_change(one, scene, push[None])[0] == pytest.approx(change)


def test_weights_predict_the_planted_ids(planted):
    one, tiles, ids, scenes = planted
    parts = th.decompose(one.vlm, scenes, ids.at(1), th.PLANTED)
    eq_7 = th.from_weights(one.vlm, parts)[0]
    for predicted in (eq_7, th.composed(one.vlm, parts, one.names[0])[0]):
        assert largest(th.centred(predicted) - one.ids.reshape(16, -1)) < 1e-10
    assert parts.error < 1e-12 and largest(parts.attention - 1) < 1e-12 and not parts.mlps.at(1).any()
    assert all(largest(table.at(1)) < 1e-10 for name, table in parts.taken.items() if name != "own patches")
    agrees = th.compared(eq_7 * 224 / 225, ids.units(1)[0], ids.weights, 100)
    assert agrees["cosine"]["value"] > 1 - 1e-9 and agrees["share"]["value"] > 1 - 1e-9 and agrees["share"]["p"] < 0.05


def test_errors_of_the_planted_parts_are_those_of_rounding(planted):
    one, tiles, ids, _ = planted
    parts = th.decompose(one.vlm, tiles, ids.at(1), th.PLANTED)
    errors = th.planted_parts_errors(one, parts, ids)
    assert list(errors) == ["Eq. 7 from the weights", "composed", "own patches", "MLP", "sum"]
    assert max(errors.values()) < 1e-9
    parts.basis = [2 * basis for basis in parts.basis]
    assert th.planted_parts_errors(one, parts, ids)["Eq. 7 from the weights"] > 0.1


@pytest.fixture(scope="module", params=[0, 1])
def known(request):
    "A planted model with its answers about every cell; with a column added to ψ the answers are not balanced."
    one = th.plant(XY + [request.param, 0], n_things=3)
    tiles = th.TileScenes(one.names)
    first, second = (extract(one.vlm, every_cell(tiles), th.PLANTED, slot=slot, progress=False)
                     for slot in ("first", "second"))
    scenes = tiles.everywhere([(1, 0)])
    plain = one.vlm.run([s.query(th.PLANTED) for s in scenes]).logit_diff.numpy()
    return request.param, one, first, second, scenes, plain


def test_the_grid_score_of_the_planted_ids_is_that_of_M(known):
    "Column and row vary alike in ψ, so each has the share of its column of M: the planted columns are not orthogonal."
    _, one, ids, _, _, _ = known
    size, statistics = (one.M**2).sum(0), ids.statistics(1, n_null=9)
    shares = th.planted_shares(one)
    assert np.allclose([shares["S_x"], shares["S_y"]], size / size.sum()) and abs(one.M[:, 0] @ one.M[:, 1]) > 1e-3
    assert statistics["linear_x"]["value"] == pytest.approx(shares["S_x"], abs=1e-9)
    assert statistics["grid_score"]["value"] == pytest.approx(min(size) / size.sum(), abs=1e-9) == shares["grid score"]


def test_a_planted_code_is_one_of_place_at_both_nouns(known):
    _, one, first, second, _, _ = known
    assert largest(first.at(1) - one.ids) < 1e-10 and largest(second.at(1) - one.ids) < 1e-10
    cosines = th.compare_slots(first, second, 1)
    assert all(cosines[name]["value"] == pytest.approx(1, abs=1e-9) for name in ("cells", "x", "y", "other_slot"))


def test_planted_answers_turn_by_eq_8(known):
    "Question by question: opposing IDs at every dose, and the rows of the mirrored picture, which are the ceiling."
    shift, one, ids, _, scenes, plain = known
    turns = th.measured_turns(one, ids, [s.query(th.PLANTED) for s in scenes])
    by_eq_8 = th.known_turns(one, scenes, plain)
    assert all((turns[name] == by_eq_8[name]).all() for name in by_eq_8)
    assert by_eq_8["opposing IDs, α = 1"].all() and not by_eq_8["opposing IDs, α = 0.1"].all()
    mirrored = [replace(s, b_cell=(3 - s.b_cell[0], s.b_cell[1])).query(th.PLANTED) for s in scenes]
    assert ((one.vlm.run(mirrored).logit_diff.numpy() > 0) != (plain > 0)).tolist() == by_eq_8["ceiling"].tolist()
    assert by_eq_8["ceiling"].all() == (shift == 0)


def test_planted_measures_are_those_that_are_known(known):
    shift, one, first, second, scenes, _ = known
    measures = th.planted_measures(one, first, second, scenes)
    assert "known" not in measures["noise"] and measures["noise"]["measured"] < .5
    there = {name: of for name, of in measures.items() if "known" in of and name != "ID efficiency"}
    assert len(there) == 4 + len(th.PLANTED_DOSES) + 1
    assert all(of["measured"] == pytest.approx(of["known"], abs=1e-9) for of in there.values())
    if not shift: assert measures["ID efficiency"]["measured"] == 1
    weak = replace(one, read=-one.read) # what is known is not what is measured: another model's read-out
    assert th.planted_measures(weak, first, second, scenes)["opposing IDs, α = 1"]["known"] < 1


def test_the_planted_constant_is_in_the_table_and_not_in_the_ids():
    one = th.plant(XY * [1, 0.99], constant=9.0, n_things=2)
    ids = extract(one.vlm, th.TileScenes(one.names), th.PLANTED, progress=False)
    x = th.pooled(th.encodings(one.vlm, 32)["learned, vision tower"])
    assert largest(ids.at(1) - one.ids * 224 / 225) < 1e-10
    y = ids.at(1).reshape(16, -1)
    printed, centred = (th.low_rank(y @ y.T, x, (2, 3), centre=centre) for centre in (False, True))
    assert printed[2] < 0.9 and printed[3] > 1 - 1e-9 and centred[2] > 1 - 1e-9


def test_planting_refuses_what_is_no_grid():
    with pytest.raises(ValueError, match=r"\(m, m, r\)"): th.plant(np.zeros((4, 3, 2)))
    with pytest.raises(ValueError, match="224"): th.Tiles(["cup"]).sprite("cup", 5)


def test_patterns_are_their_own_mirror_images_and_orthogonal():
    tiles = th.Tiles([str(i) for i in range(8)])
    patterns = np.stack(list(tiles.patterns.values()))
    assert (patterns == patterns[..., ::-1]).all()
    products = np.einsum("ayx,byx->ab", patterns, patterns)
    assert np.array_equal(products, 64 * np.eye(8)) and not patterns.sum((1, 2)).any()


# --- parts of a trained or random model

BARE = ("{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")


def organism_of(family, kwargs):
    torch.manual_seed(0)
    vision_blocks = 2 if family == "mllama" else 1
    sizes = dict(px=32, width=32, vision_width=32, vision_blocks=vision_blocks, blocks=3, intermediate=48)
    model, processor = build(Recipe(family, **sizes, **kwargs))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1: p.mul_(5)
            if "cross_attn" in name and name.endswith("gate"): p.fill_(1) # 0 hides the picture
    return in_float64(VLM(model, processor, "random"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "gemma3", "mllama"])
def test_parts_add_up_to_the_ids(family):
    merge = dict(patch=4, merge=1) if family in ("llava", "mllama") else dict(patch=4, merge=2)
    vlm = organism_of(family, merge)
    scenes = subsample(GridScenes(grid_pairs(2), sizes=(224,), px=32), 2)
    ids = extract(vlm, scenes, TEMPLATE, progress=False)
    parts = th.decompose(vlm, scenes, ids.at(2), TEMPLATE)
    assert_parts_add_up(parts, ids)
    H = parts.attention.shape[1]
    by_heads = sum(table.table for table in parts.taken.values())[:, 0, :2].sum(1)
    shares = parts.shares.table[:, 0, :2 * H].sum(1).reshape(2, 16, 16)
    assert np.allclose(np.einsum("occ->o", shares), np.einsum("oyxd,yxd->o", by_heads, ids.at(2)))
    looks = ~np.array([vlm.family.cross and hasattr(block, "self_attn") for block in vlm.blocks]) # at patches
    if vlm.family.cross: # nothing of the text is carried through such a block, and its gate is the scale behind
        scales = next(iter(parts.means.values()))[0].scales
        assert not scales["before"][0, looks].any() and np.allclose(np.divide(*scales["behind"][:, looks]), np.tanh(1))
    assert ((parts.attention > 0).all(1) == looks).all() and (parts.attention < 1).all() and parts.error < 1e-6
    assert th.composed(vlm, parts, ids.objects[0]).shape == (3, 16, 32)


def assert_parts_add_up(parts, ids):
    "What heads and MLPs have written up to a layer is its ID; eager attention has its softmax in float32."
    total = sum(table.table for table in parts.taken.values()) + parts.mlps.table
    for l in ids.layers: assert largest(total[:, :, :l].sum(2) - ids.table[:, :, l - 1]) < 1e-6 * largest(ids.table)


@pytest.fixture(scope="module")
def untrained():
    "A random model, scenes, and its IDs."
    vlm = organism_of("llava", dict(patch=4))
    scenes = subsample(GridScenes(grid_pairs(2), sizes=(224,), px=32), 2)
    return vlm, scenes, extract(vlm, scenes, TEMPLATE, progress=False)


@pytest.fixture(scope="module")
def split(untrained):
    "A random model, its IDs, and their parts."
    vlm, scenes, ids = untrained
    return vlm, ids, th.decompose(vlm, scenes, ids.at(2), TEMPLATE)


def test_the_last_rung_of_the_ladder_is_the_id(split):
    vlm, ids, parts = split
    rungs = th.ladder(vlm, parts)
    assert list(rungs) == list(th.LADDER) and th.sum_error(rungs, ids) < 1e-6
    assert np.allclose(rungs["own patches"][:, 1], th.by_object(parts.taken["own patches"])[:, :2].sum(1))
    by_layer = th.ladder_by_layer(rungs, ids, 20)
    assert list(by_layer) == [1, 2, 3]
    assert all(of["heads and MLPs"]["share"]["value"] > 1 - 1e-9 for of in by_layer.values())
    assert by_layer[1]["own patches"]["share"]["value"] < 0.99
    assert th.ladder_table(by_layer, [1, 3, 3]).count("layer 3, all heads") == 1


def test_shares_of_all_sources_add_up_to_1(split):
    _, ids, parts = split
    by_layer = th.shares_by_source(parts, ids)
    assert list(by_layer[2]) == [*th.SOURCES, "MLPs"]
    for shares in by_layer.values(): assert sum(of["value"] for of in shares.values()) == pytest.approx(1, abs=1e-5)
    whole = random(16, 8)
    assert th.share_of(np.stack([whole + 5, 0 * whole, -2 * whole]), whole) == pytest.approx([1, 0, -2])


def test_strongest_heads_are_ranked_on_other_objects(split):
    _, ids, parts = split
    heads, mlps = th.head_shares(parts, ids, 2)
    assert heads.shape == (2, 2 * parts.attention.shape[1])
    assert heads.sum(1).mean() + mlps.mean() == pytest.approx(1, abs=1e-5)
    strongest = th.strongest_heads(parts, ids, 2, n=3)
    order = np.argsort(-heads[0])[:3]
    assert strongest["strongest"] == [th.head_name(i, parts.attention.shape[1]) for i in order]
    first = heads[1, order[0]] / (heads[1].sum() + mlps[1])
    assert strongest["cumulative"][1]["value"] == pytest.approx(first) and list(strongest["cumulative"]) == [1, 2, 3]
    assert th.heads_table(strongest).count("\n") == 1 + 3 + 2
    with pytest.raises(ValueError, match="other IDs"): th.strongest_heads(parts, ids, 3)
    assert th.head_name(5, 4) == "2.2"


def test_figures_of_the_weights_have_their_panels(split):
    vlm, ids, parts = split
    rungs = th.ladder(vlm, parts)
    account = {"by_layer": th.ladder_by_layer(rungs, ids, 20), "sources": th.shares_by_source(parts, ids),
               "heads": th.strongest_heads(parts, ids, 2, n=3)}
    fig = Figure()
    th.plot_weights(fig, account, 2, 2)
    assert [len(ax.lines) for ax in fig.axes] == [len(th.LADDER) + 2, len(th.LADDER) + 2, len(th.SOURCES) + 2, 2]
    assert fig.axes[3].get_xticklabels()[0].get_text() == f"1\n{account['heads']['strongest'][0]}"


def test_a_model_that_cannot_be_split_says_why():
    vlm = VLM(*tiny("llava_onevision"), "tiny")
    parts, why_not = th.try_to_decompose(vlm, small_scenes(), np.zeros((4, 4, 32)), TEMPLATE)
    assert parts is None and "no square grid" in why_not


def test_a_picture_of_one_tile_in_a_model_of_several():
    vlm, scenes = in_float64(VLM(*tiny("mllama"), "tiny")), small_scenes()
    query = scenes[0].query(TEMPLATE)
    assert vlm.encode([query])["pixel_values"].shape[2] == 2 and th.grid_of(vlm, query) == 4
    T = vlm.encode([query])["input_ids"].shape[1]
    assert th.patch_rows(vlm, query) == [*range(T + 1, T + 17)] and vlm.cross_rows == 34
    ids = extract(vlm, scenes, TEMPLATE, progress=False)
    assert_parts_add_up(th.decompose(vlm, scenes, ids.at(2), TEMPLATE), ids)
    wide = Query(Image.new("RGB", (32, 16)), "a")
    with pytest.raises(ValueError, match="no larger than a tile of 16 px"): th.grid_of(vlm, wide)


def test_a_head_is_its_part_of_the_output():
    vlm = organism_of("llava", dict(patch=4))
    block, g = vlm.blocks[0], torch.Generator().manual_seed(0)
    weights = torch.rand(2, 4, 9, generator=g, dtype=torch.float64)
    value = torch.randn(2, 9, 32, generator=g, dtype=torch.float64)
    mixed = torch.cat([torch.einsum("bt,btd->bd", weights[:, h], value[..., 8 * h:8 * h + 8]) for h in range(4)], -1)
    with torch.no_grad(): assert torch.allclose(th.by_head(block, weights, value).sum(1), block.self_attn.o_proj(mixed))


def test_heads_that_share_a_key_head_read_its_values():
    "Four heads, two key heads: heads 0 and 1 read the first, 2 and 3 the second; attention writes their sum."
    vlm = organism_of("internvl", dict(patch=4, merge=2))
    reads, g = vlm.blocks[0].self_attn, torch.Generator().manual_seed(0)
    size, weights = reads.head_dim, torch.rand(2, 4, 9, generator=g, dtype=torch.float64)
    value = torch.randn(2, 9, 2 * size, generator=g, dtype=torch.float64)
    heads = th.by_head(vlm.blocks[0], weights, value)
    for h in range(4):
        shared = value[..., h // 2 * size:(h // 2 + 1) * size]
        output = reads.o_proj.weight[:, h * size:(h + 1) * size].detach()
        assert torch.allclose(heads[:, h], torch.einsum("bt,bts,ds->bd", weights[:, h], shared, output))


def grouped(one, n_things=2):
    "The planted model with one key head for its two heads, and its M: both heads read the values of the first."
    block, config = one.vlm.blocks[0], one.vlm.model.config
    config.text_config.num_key_value_heads = 1
    model = type(one.vlm.model)(config).double().requires_grad_(False)
    state = one.vlm.model.state_dict()
    for name in state:
        if name.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight")) and "vision" not in name:
            state[name] = state[name][:32]
    model.load_state_dict(state)
    values, outputs = block.self_attn.v_proj.weight.numpy(), block.self_attn.o_proj.weight.numpy()
    whole = outputs[:, :32] @ values[:32] + outputs[:, 32:] @ values[32:]
    P = np.linalg.lstsq(whole, one.M, rcond=None)[0]
    M = (outputs[:, :32] + outputs[:, 32:]) @ values[:32] @ P
    return in_float64(VLM(model, one.vlm.processor, "grouped", organism=True)), M


def test_weights_predict_the_ids_of_a_model_with_grouped_heads():
    "Eq. 7 without a fit is exact where two heads share a key head."
    one = th.plant(XY * [1, 0.99], n_things=2)
    vlm, M = grouped(one)
    scenes = every_cell(th.TileScenes(one.names))
    ids = extract(vlm, scenes, th.PLANTED, progress=False)
    by_hand = (one.psi - one.psi.mean((0, 1))).reshape(16, 2) @ M.T
    assert vlm.blocks[0].self_attn.v_proj.weight.shape[0] == 32 and largest(ids.at(1).reshape(16, -1) - by_hand) < 1e-9
    parts = th.decompose(vlm, scenes, ids.at(1), th.PLANTED)
    for predicted in (th.from_weights(vlm, parts)[0], th.composed(vlm, parts, one.names[0])[0]):
        assert largest(th.centred(predicted) - by_hand) < 1e-9
    assert parts.error < 1e-12 and largest(parts.taken["own patches"].at(1).reshape(16, -1) - by_hand) < 1e-9
    assert not np.allclose(by_hand, one.ids.reshape(16, -1)) # other IDs than those of the model with two key heads


def head_by_head(block, patterns, rows):
    "What attention writes, one head and token at a time: patterns (H, T), rows (T, d) as the values are made of."
    reads = block.self_attn
    size, W_V, W_O = reads.head_dim, reads.v_proj.weight.detach().numpy(), reads.o_proj.weight.detach().numpy()
    n_heads, n_keys = W_O.shape[1] // size, W_V.shape[0] // size
    written = 0
    for h in range(n_heads):
        key = h * n_keys // n_heads
        W = W_O[:, h * size:(h + 1) * size] @ W_V[key * size:(key + 1) * size]
        written = written + sum(pattern * W @ row for pattern, row in zip(patterns[h], rows))
    return written


def composed_by_hand(vlm, means, basis, cell):
    "Eq. 7 composed over blocks, at the word after each, for one cell (patches,) bool."
    before, behind = (product / square for product, square in means.scales.values())
    R = before.shape[1]
    rows, at_word = np.zeros(before.shape[1:]), []
    for l, block in enumerate(vlm.blocks):
        patterns = means.attention[l] / means.n # (H, R, R + 1)
        read = [*(before[l] * rows), basis[l][cell].mean(0)]
        rows = rows + np.stack([head_by_head(block, patterns[:, r], read) for r in range(R)]) * behind[l]
        at_word.append(rows[-1])
    return np.stack(at_word)


def test_composition_is_its_sum_over_heads_tokens_and_blocks_where_heads_share_keys():
    "Four heads, two key heads, three blocks of random weights, float64; with one attention per head alike."
    vlm = organism_of("internvl", dict(patch=4, merge=2))
    scenes = small_scenes()
    parts = th.decompose(vlm, scenes, np.zeros((4, 4, 32)), TEMPLATE)
    assert vlm.blocks[0].self_attn.v_proj.weight.shape[0] == 16 < 32
    name, cells = scenes[0].b, th.in_cell(th.grid_of(vlm, scenes[0].query(TEMPLATE)), 4)
    by_hand = np.mean([[composed_by_hand(vlm, means, parts.basis, cell) for cell in cells]
                       for means in parts.means[name]], 0).swapaxes(0, 1)
    assert largest(th.centred(th.composed(vlm, parts, name)) - th.centred(by_hand)) < 1e-12 * largest(by_hand)
    once = np.cumsum([[head_by_head(block, attended[:, None], [basis[cell].mean(0)]) for cell in cells]
                      for block, attended, basis in zip(vlm.blocks, parts.attention, parts.basis)], 0)
    assert largest(th.centred(th.from_weights(vlm, parts)) - th.centred(once)) < 1e-12 * largest(once)


def test_a_prompt_needs_no_token_before_the_picture():
    "Parts add up whether or not the prompt begins with <s>, and the patches are found behind what stands before them."
    first_patch, scenes = {}, small_scenes()
    for bos in (False, True):
        vlm = in_float64(VLM(*tiny_llava(kind="bytes", bos=bos, chat=None if bos else BARE), "tiny"))
        first_patch[bos] = th.patch_rows(vlm, scenes[0].query(TEMPLATE))[0]
        ids = extract(vlm, scenes, TEMPLATE, progress=False)
        assert_parts_add_up(th.decompose(vlm, scenes, ids.at(2), TEMPLATE), ids)
    assert first_patch[False] == 0 < first_patch[True]


def test_composition_is_linear_attention_over_blocks():
    """Where attention is the same in every picture and nothing but ψ moves, composed Eq. 7 is the model.

    Norms are a fixed scale and MLPs are 0."""
    one = th.plant(XY, n_things=2)
    scenes = every_cell(th.TileScenes(one.names))
    parts = th.decompose(one.vlm, scenes, one.ids, th.PLANTED)
    block = one.vlm.blocks[0]
    twice = type("Two", (), {"blocks": [block, block]})
    means = parts.means[one.names[0]][0]
    means.attention = np.concatenate([means.attention] * 2)
    means.scales = {norm: np.concatenate([v, v], 1) for norm, v in means.scales.items()}
    last = means.attention.shape[2] - 1
    means.attention[1, :, last] = 0
    means.attention[1, :, last, last] = means.n # in block 2 the word reads itself
    parts.basis = parts.basis * 2
    ids = one.ids.reshape(16, -1)
    reads, heads = block.self_attn, (slice(0, 32), slice(32, 64))
    W = sum(reads.o_proj.weight[:, head] @ reads.v_proj.weight[head] for head in heads).numpy()
    scale = np.divide(*means.scales["before"][:, 1, last])
    first, second = map(th.centred, th.composed(twice, parts, one.names[0]))
    assert np.allclose(first, ids) and np.allclose(second, ids + (ids * scale) @ W.T)


def test_families_whose_blocks_write_otherwise_are_refused():
    gated, cut = VLM(*tiny("llava"), "tiny"), VLM(*tiny("llava_onevision"), "tiny")
    gated.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
    for vlm, why in ((gated, "another norm or a gate"), (cut, "no square grid of one picture")):
        with pytest.raises(ValueError, match=why): th.decompose(vlm, small_scenes(), np.zeros((4, 4, 32)), TEMPLATE)


def test_nothing_remains_after_watching():
    vlm = organism_of("llava", dict(patch=4))
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules())
    before, name = hooks(), vlm.blocks[0].self_attn.config._attn_implementation
    with pytest.raises(RuntimeError):
        with th.written(vlm, [3]): raise RuntimeError
    th.encodings(vlm, 32)
    assert hooks() == before and vlm.blocks[0].self_attn.config._attn_implementation == name


def test_patches_of_a_cell():
    cells = th.in_cell(8, 4)
    assert cells.shape == (16, 64) and (cells.sum(1) == 4).all() and cells[5].nonzero()[0].tolist() == [18, 19, 26, 27]
    assert th.in_cell(6, 4).sum() == 36
    assert th.grid_of(VLM(*tiny("llava"), "tiny"), Query(Image.new("RGB", (16, 16)), "a")) == 4


def test_a_linear_read_out_is_recovered_and_noise_is_not():
    vectors, w = random(40, 16, 6), random(6, seed=1)
    train = np.arange(40) % 2 == 0
    predicted, found = th.read_out(vectors, vectors @ w + 3, np.eye(6), train, intercept=True)
    assert np.allclose(found, w) and th.r_squared(np.stack([vectors @ w + 3, predicted], 1)) > 1 - 1e-9
    noise = random(40, 16, seed=2)
    predicted, _ = th.read_out(vectors, noise, np.eye(6), train)
    assert abs(th.r_squared(np.stack([noise, predicted], 1)[~train])) < 0.2
    inside = th.read_out(vectors, vectors @ w, np.eye(6)[:2], train)[1]
    assert not inside[2:].any()


# --- pushes

@pytest.fixture(scope="module")
def pushed(untrained):
    "A random model, IDs of it, twelve questions, and what pushing their words changes."
    vlm, _, ids = untrained
    pairs = th.read_out_questions(12, px=32)
    return vlm, ids, pairs, th.push_everywhere(vlm, ids, pairs, 2, [1, 2])


def test_questions_of_the_read_out_are_about_two_things(pushed):
    _, _, pairs, _ = pushed
    assert len(pairs) == 12 and all(len(scene.things) == 2 for scene, _ in pairs)
    assert all(set(q.words.values()) == {t.name for t in scene.things} for scene, q in pairs)
    assert [q.text for _, q in th.read_out_questions(2, px=32)] == [q.text for _, q in pairs[:2]]


def test_places_are_those_of_the_words(pushed):
    _, _, pairs, result = pushed
    scene, query = pairs[1]
    thing = next(t for t in scene.things if t.name == query.words["object"])
    assert np.allclose(result.places["object"][1], [4 * thing.x - 0.5, 4 * thing.y - 0.5])


def test_pushing_a_word_adds_the_id_step(pushed):
    vlm, ids, pairs, result = pushed
    steps = th.id_steps(ids, 2, result.places)
    assert steps.shape == (12, 16, 32) and np.allclose(steps[:, 1] - steps[:, 0], ids.at(2)[0, 1] - ids.at(2)[0, 0])
    swept = sweep(vlm, [pairs[2][1]], layers=[2], edits={"step": ("subject", add(steps[2, 7]))})
    difference = lambda v: float((v[..., 0] - v[..., 1]).squeeze())
    change = difference(swept.log_probs["step"]) - difference(swept.base_log_probs)
    assert result.changes[2][2, 7] == pytest.approx(change, abs=1e-9)
    assert result.plain[2] == pytest.approx(difference(swept.base_log_probs), abs=1e-9)


def test_both_words_go_to_opposite_cells(pushed):
    _, ids, _, result = pushed
    opposite = th.id_steps(ids, 2, result.places, "object")
    assert np.allclose(opposite[:, 0] - opposite[:, 15], ids.at(2)[3, 3] - ids.at(2)[0, 0])
    assert result.both.shape == (12, 16) and largest(result.both - result.changes[2]) > 1e-6


def test_the_control_has_the_steps_of_another_question_of_the_same_half():
    steps = random(6, 16, 3)
    others = th.of_other_questions(steps)
    assert np.allclose(np.sort(others[3], axis=0), np.sort(steps[1], axis=0)) and not np.allclose(others[3], steps[1])


def test_layers_to_push_are_spread_over_the_middle_third():
    assert th.middle_layers(8, 6) == [3, 4, 5, 6]
    many = th.middle_layers(40, 2)
    assert len(many) == 7 and many[:2] == [2, 14] and many[-1] == 26


# --- the read-out

def test_a_read_out_is_judged_on_the_other_half():
    judge = th.Judge(40, 50)
    vectors, basis = random(40, 16, 6), np.eye(6)
    exact = judge.fitted(vectors, vectors @ random(6, seed=1), basis)
    assert exact["value"] > 1 - 1e-9 and exact["n"] == 20
    values = random(40, 16, seed=2)
    predicted = np.where(judge.train[:, None], 0, values) # wrong where it was fitted alone
    assert judge.r2(values, predicted)["value"] == 1


def test_read_outs_and_their_figure(pushed):
    _, ids, _, result = pushed
    judge = th.Judge(12, 20)
    r2 = th.read_outs(ids, result, 2, judge)
    assert len(r2) == 9 and all(of["n"] == 6 for of in r2.values())
    by_layer = th.read_outs_by_layer(ids, result, judge)
    assert list(by_layer) == [1, 2] and by_layer[2] == r2["all 15 directions"]
    assert th.every_direction(ids, 2).shape == (15, 32)
    fig = Figure()
    th.plot_read_out(fig, ids, result, 2, judge)
    assert f"R² {r2['all 15 directions']['value']:.2f}" in fig.axes[0].get_title()
    assert len(fig.axes[2].collections[0].get_offsets()) == 12


# --- why linear

def test_questions_shape_the_toy():
    places = {kind: th.toy(kind, 0, steps=200) for kind in ("relations", "cells")}
    r2 = {kind: float(grid_statistics(v @ v.T)["r2"]) for kind, v in places.items()}
    assert r2["relations"] > 0.9 and r2["cells"] < 0.4
    first, again, other = (th.toy("both", seed, steps=3) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    over = th.toy_r2("cells", steps=1, seeds=2)
    assert over["n"] == 2 and over["low"] < over["value"] < over["high"]


def made_run(arm, seed, r2):
    "A run as `why` stores it."
    estimate = {"value": r2, "low": r2 - 0.1, "high": r2 + 0.1, "null_high": 0.3}
    by_layer = [{"layer": l, "value": r2} for l in (1, 2, 3, 4)]
    ids = {template: {"r2": estimate, "by_layer": by_layer} for template in (th.WHERE, th.LEFT_RIGHT)}
    return {"arm": arm, "seed": seed, "ids": ids, "log": {"recognised": 0.96, "left_right": 0.5}}


def made_arms():
    values = dict(zip(th.WHY, ((0.6, 0.8), (0.5, 0.6), (0.4,))))
    return {arm: [made_run(arm, seed, r2) for seed, r2 in enumerate(of)] for arm, of in values.items()}


def test_effects_of_supervision_are_paired_by_seed():
    effects = th.supervision_effects(made_arms())
    assert list(effects) == ["people's words, relations", "sixteen unrelated words", "less sixteen unrelated words"]
    assert effects["less sixteen unrelated words"]["value"] == pytest.approx(0.15)
    assert effects["people's words, relations"]["value"] == pytest.approx(0.7)
    assert th.supervision_effects({arm: [] for arm in th.WHY}) == {}


def test_runs_have_a_row_and_a_dot_each():
    arms = made_arms()
    assert "| no place asked | 0 | 0.40 [0.30, 0.50]; null 0.30 | 96% |  | 50% |  |" in th.runs_table(arms)
    fig = Figure()
    th.plot_why(fig, arms)
    assert len(fig.axes[2].lines) == 5 and fig.axes[0].get_title() != fig.axes[1].get_title()
    th.plot_why(Figure(), {arm: [] for arm in th.WHY})


def test_stored_runs_are_sorted_by_arm(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    assert th.stored_runs() == {arm: [] for arm in th.WHY}
    runs = [run for of in made_arms().values() for run in of]
    (tmp_path / "results" / "models").mkdir(parents=True)
    (tmp_path / "results" / "models" / "09_why_linear.json").write_text(json.dumps({"runs": runs[::-1]}))
    assert {arm: len(of) for arm, of in th.stored_runs().items()} == dict(zip(th.WHY, (2, 2, 1)))


@pytest.fixture
def small_recipes():
    "The recipes of `why` with two steps of four pictures a stage."
    sizes = dict(vision_width=32, width=32, vision_blocks=1, blocks=2, heads=2, intermediate=48, cells=True)
    first, small = Stage("recognise", 2, 4, 1e-3), {}
    for arm, recipe in th.WHY.items():
        later = [replace(stage, steps=2, batch=4) for stage in recipe.stages[1:]]
        small[arm] = Recipe(**sizes, stages=(first, *later))
    return small


@pytest.mark.slow
def test_why_linear_trains_both_kinds_from_one_first_stage(tmp_path, monkeypatch, small_recipes):
    "The first stage is trained once for a seed, the other arms go on from it, and a second call finds everything done."
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    monkeypatch.setattr(th, "line_of", partial(th.line_of, pairs=6))
    few = lambda *given, of=organisms.held_out_stage: replace(of(*given), batch=4)
    monkeypatch.setattr(organisms, "held_out_stage", few)
    made = json.loads(th.why(tmp_path / "runs", 1, small_recipes).read_text())
    assert [r["arm"] for r in made["runs"]] == list(th.WHY)
    for run in made["runs"]:
        assert set(run["ids"]) == {th.WHERE, th.LEFT_RIGHT} and 0 <= run["ids"][th.WHERE]["r2"]["value"] <= 1
    logs = [tmp_path / "runs" / "seed 0" / name / "log.jsonl" for name in ("first", *th.WHY)]
    stages = [[json.loads(line)["stage"] for line in log.read_text().splitlines()] for log in logs]
    all_stages = ["recognise", "point", "relate", "more"]
    assert stages == [["recognise"], all_stages, all_stages, ["recognise"]]
    again = json.loads(th.why(tmp_path / "runs", 1, small_recipes).read_text())
    assert [r["ids"] for r in again["runs"]] == [r["ids"] for r in made["runs"]]
    th.why(tmp_path / "elsewhere", 1, small_recipes)
    assert not (tmp_path / "elsewhere").exists() # what is recorded is not trained again
    arm, recipe = next((arm, r) for arm, r in small_recipes.items() if len(r.stages) > 1)
    shorter = replace(recipe, stages=(recipe.stages[0], *(replace(stage, steps=1) for stage in recipe.stages[1:])))
    monkeypatch.setattr(th, "line_of", lambda *_, **__: {}) # measured above; here it is about what is trained
    th.why(tmp_path / "elsewhere", 1, {arm: shorter})
    assert (tmp_path / "elsewhere").exists()


def test_arms_share_their_first_stage():
    assert len({repr(replace(recipe, stages=recipe.stages[:1])) for recipe in th.WHY.values()}) == 1


@pytest.mark.slow
def test_arms_have_the_words_they_say(small_recipes):
    _, processor = build(next(iter(small_recipes.values())))
    words = {}
    for arm in ("people's words, relations", "sixteen unrelated words"):
        recipe = small_recipes[arm]
        steps = Steps(processor, recipe, recipe.stages[1])
        drawn = [steps.questions(steps.item(i), np.random.default_rng(i)) for i in range(300)]
        words[arm] = {q[2] for of in drawn for q in of}
    unrelated = {word for row in CELL_WORDS for word in row}
    assert words["sixteen unrelated words"] == unrelated and "top left" in words["people's words, relations"]
    tokens = lambda word: processor.tokenizer(f" {word}", add_special_tokens=False).input_ids
    assert all(len(tokens(word)) == 1 for word in unrelated)
