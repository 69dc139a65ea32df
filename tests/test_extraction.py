"Extraction: the fast path equals the obvious one, resumes to the bit, stays flat, and says plainly what is wrong."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spatialid.benchmarks import placed
from spatialid.extraction import (SpatialIDs, around, axis_null, choices, choose_layer, compare_slots, cosines, disjoint_halves,
                                  effective_dimensions, exchanged, extract, grid_axes, grid_design, grid_null, grid_statistics, index_scenes,
                                  leave_one_out, new_state, on_axes, orthonormal, over_null, over_subsets, pair_weights, smooth_codes, spread_layers,
                                  stored_ids, subsample, subset_cosines, with_interval)
from spatialid.extraction import read_checkpoint
from spatialid.hooks import VLM
from spatialid.query import Query
from tiny import tiny_llava

COLOURS = {"cup": (220, 40, 40), "star": (40, 60, 230), "hot dog": (240, 200, 30)}
PAIRS = [("cup", "star"), ("star", "cup"), ("cup", "hot dog"), ("hot dog", "cup")]


@dataclass(frozen=True)
class Square:
    "A grid scene of two coloured squares on 16 pixels: all that extraction asks of a scene."
    a: str
    b: str
    a_cell: tuple
    b_cell: tuple
    size: int

    def image(self):
        image = Image.new("RGB", (16, 16), (10, 30, 20))
        for name, (x, y) in ((self.a, self.a_cell), (self.b, self.b_cell)):
            edge = 2 if self.size < 100 else 4
            image.paste(COLOURS[name], (4 * x, 4 * y, 4 * x + edge, 4 * y + edge))
        return image

    def query(self, template):
        words = {"subject": self.b, "object": self.a}
        return Query(self.image(), template, {k: v for k, v in words.items() if "{" + k + "}" in template}, ("left", "right"))


def squares(pairs=PAIRS, sizes=(74, 224), m=4):
    cells = [(x, y) for y in range(m) for x in range(m)]
    return [Square(a, b, ac, bc, s) for a, b in pairs for s in sizes for ac in cells for bc in cells if ac != bc]


@pytest.fixture(scope="module")
def vlm():
    return VLM(*tiny_llava(), name="tiny")


@pytest.fixture(scope="module")
def double():
    return VLM(*tiny_llava(dtype=torch.float64), name="tiny-double")


class Code:
    "Stands in for a VLM: φ is whatever `code(scene)` says. Counts forwards and images."
    n_layers, name, organism, weight_hash, model = 2, "code", True, "0", torch.nn.Linear(1, 1)

    def __init__(self, code):
        self.code, self.images, self.forwards = code, 0, 0

    def run(self, queries, layers, at, batch_size):
        assert at == "subject"
        self.forwards += 1
        self.images += len(queries)
        phi = torch.stack([torch.as_tensor(self.code(q)) for q in queries])  # (B, L, d)
        return SimpleNamespace(residuals={l: phi[:, None, l - 1] for l in layers})


@dataclass(frozen=True)
class Plain(Square):
    "A scene that is its own query."
    def query(self, template): return self


def plain_scenes(**kwargs):
    return [Plain(s.a, s.b, s.a_cell, s.b_cell, s.size) for s in squares(**kwargs)]


def slow_ids(scenes, phis, protocol="paper"):
    "Eq. 2-4 with everything stored: dictionaries, loops, float64. -> table[object][size] (layer, y, x, d)."
    phi = {(s.a, s.b, s.size, s.a_cell, s.b_cell): np.asarray(p, dtype=np.float64) for s, p in zip(scenes, phis)}
    pairs, sizes = list(dict.fromkeys((s.a, s.b) for s in scenes)), sorted({s.size for s in scenes})
    cells = [(x, y) for y in range(4) for x in range(4)]
    table = {}
    for b in dict.fromkeys(b for _, b in pairs):
        for size in sizes:
            ids = np.zeros((*phis[0].shape[:1], 4, 4, *phis[0].shape[1:]))
            own = [p for p in pairs if p[1] == b]
            for pair in own:
                for x, y in cells:
                    differences = []
                    for ac in cells:
                        if (*pair, size, ac, (x, y)) not in phi: continue
                        group = [v for k, v in phi.items() if k[:2] == pair and k[3] == ac and (protocol == "released" or k[2] == size)]
                        differences.append(phi[(*pair, size, ac, (x, y))] - np.mean(group, axis=0))
                    ids[:, y, x] += np.mean(differences, axis=0) / len(own)
            table[b, size] = ids
    return table


def phis_of(vlm, scenes, template):
    "φ of each scene, one forward at a time."
    runs = [vlm.run(s.query(template), layers=range(1, vlm.n_layers + 1), at="subject") for s in scenes]
    return [torch.stack([r.residuals[l][0, 0] for l in r.residuals]).numpy() for r in runs]


TEMPLATE = "Is the {subject} to the left or right of the {object}?"


@pytest.mark.parametrize("protocol", ["paper", "released"])
@pytest.mark.slow
def test_running_sums_equal_storing_everything_in_double(double, protocol):
    scenes = subsample(squares(PAIRS[:3]), 3)
    ids = extract(double, scenes, protocol=protocol, batch_size=16, pair_layers=[2], progress=False)
    oracle = slow_ids(scenes, phis_of(double, scenes, TEMPLATE), protocol)
    assert ids.table.dtype == np.float64
    for (b, size), slow in oracle.items():
        fast = ids.table[ids.find("objects", b), ids.find("sizes", size)]
        assert np.abs(fast - slow).max() < 1e-12, (b, size)
    own = [np.mean([oracle["star", s][1] for s in ids.sizes], axis=0), oracle["star", 224][1]][protocol == "released"]
    assert np.abs(ids.pair_ids[0, 0] - own).max() < 1e-12  # "star" has one pair, the first


def test_running_sums_equal_storing_everything_in_single(vlm):
    scenes = subsample(squares(PAIRS[:3]), 3)
    ids = extract(vlm, scenes, batch_size=16, progress=False)
    assert ids.table.dtype == ids.ids.dtype == np.float32
    for (b, size), slow in slow_ids(scenes, phis_of(vlm, scenes, TEMPLATE)).items():
        fast = ids.table[ids.find("objects", b), ids.find("sizes", size)]
        assert np.abs(fast - slow).max() < 1e-5 * max(1, np.abs(slow).max()), (b, size)


def test_the_right_word_at_the_right_layer(vlm):
    "φ is the residual of b's last sub-token after ℓ blocks: read here with a hook of our own."
    scenes, kept = subsample(squares(PAIRS[2:3], sizes=(224,)), 2), []
    ids = extract(vlm, scenes, layers=[3], progress=False)
    for s in scenes:
        query = s.query(TEMPLATE)
        start = query.text.index("hot dog")
        inputs = vlm.processor(text=vlm.render(query.text), images=query.image, return_tensors="pt")
        tokens = vlm.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        text, row = vlm.tokenizer.decode(inputs["input_ids"][0]), None
        for i in range(len(tokens)):  # the shortest prefix of the prompt that holds the whole word
            if "the hot dog" in vlm.tokenizer.decode(inputs["input_ids"][0, :i + 1]): row = i; break
        assert start >= 0 and row is not None, text
        out = []
        handle = vlm.model.model.language_model.layers[2].register_forward_hook(lambda m, i, o: out.append(o[0, row]))
        with torch.no_grad(): vlm.model(**inputs)
        handle.remove()
        kept.append(out[0].numpy()[None])
    slow = slow_ids(scenes, kept)["hot dog", 224]
    assert np.abs(ids.table[0, 0] - slow).max() < 1e-5


def test_one_forward_per_image_and_batches_within_a_pair():
    scenes = plain_scenes(sizes=(224,))
    stub = Code(lambda s: np.zeros((2, 3), np.float32))
    extract(stub, scenes, batch_size=100, progress=False)
    assert stub.images == len(scenes) == 4 * 240
    assert stub.forwards == 4 * 3  # 100 + 100 + 40 for each pair
    index = index_scenes(scenes)
    assert [list(b) for b in index.batches(340, 100)] == [list(b) for b in index.batches(0, 100)][4:]


def test_linear_code_is_recovered():
    "φ = word + x·h + y·v + what depends on the reference: the IDs are linear, the axes have the directions of h and v."
    generator = np.random.default_rng(0)
    h, v = generator.normal(size=(2, 2, 6))
    words = {name: 50 * generator.normal(size=(2, 6)) for name in COLOURS}
    places = generator.normal(size=(16, 2, 6))
    code = lambda s: words[s.b] + words[s.a] + s.b_cell[0] * h + s.b_cell[1] * v + places[4 * s.a_cell[1] + s.a_cell[0]]
    ids = extract(Code(code), plain_scenes(), progress=False)
    for layer in (1, 2):
        scale = 5 / 3 * (1 - 1 / 225)  # mean distance of two columns; b is never in the cell of a
        assert np.allclose(ids.axes(layer), [scale * h[layer - 1], scale * v[layer - 1]], atol=1e-12)
        assert np.abs(ids.at(layer).sum((0, 1))).max() < 1e-12
        stats = ids.statistics(layer)
        for key in ("total", "r2"):
            assert stats[key]["value"] == pytest.approx(1, abs=1e-10)
        assert stats["r2"]["p"] < 0.002 and stats["r2"]["null_high"] < 0.9  # (any two-dimensional code lies in its own plane)
        assert stats["cosine"]["value"] == pytest.approx(h[layer - 1] @ v[layer - 1] / np.linalg.norm(h[layer - 1]) / np.linalg.norm(v[layer - 1]))
        assert np.allclose(ids.step((0, 3), (2, 1), layer), (1 - 1 / 225) * (2 * h - 2 * v)[layer - 1], atol=1e-12)
    assert np.allclose(ids.step((0, 3), (2, 1))[1], ids.step((0, 3), (2, 1), 2), atol=1e-6)
    assert np.allclose(ids.stderr, 0, atol=1e-12)
    assert ids.counts.shape == (3, 2, 4, 4) and ids.counts.sum() == 4 * 2 * 240
    released = extract(Code(code), plain_scenes(), protocol="released", progress=False)
    assert np.allclose(released.axes(1), 2 / 3 * ids.axes(1), atol=1e-12)


def test_released_reads_the_largest_size():
    "With the position coded twice as strongly at size 224, the released protocol reads that size and centres over both."
    code = lambda s: np.full((2, 1), float(s.b_cell[0] * (2 if s.size == 224 else 1)))
    paper, released = (extract(Code(code), plain_scenes(), protocol=p, progress=False) for p in ("paper", "released"))
    near = 1 - 1 / 225
    assert np.allclose(paper.at(1)[0, :, 0], 1.5 * near * np.array([-1.5, -0.5, 0.5, 1.5]))
    assert np.allclose(paper.at(1, size=224)[0, :, 0], 2 * near * np.array([-1.5, -0.5, 0.5, 1.5]))
    assert released.at(1)[0, 3, 0] - released.at(1)[0, 0, 0] == pytest.approx(6, rel=0.02)
    assert released.at(1)[..., 0].mean() == pytest.approx(3 - 2.25, rel=0.02)  # its own size's mean is not subtracted


def sum_of_squares_left(X, coordinate):
    "What a least-squares line in one coordinate leaves of the vectors X (cell, d)."
    design = np.stack([np.ones(len(X)), coordinate], 1)
    return ((X - design @ np.linalg.lstsq(design, X, rcond=None)[0])**2).sum()


def naive_statistics(ids):
    "Projection and regression on the vectors themselves."
    m = len(ids)
    h = np.mean([ids[y, p] - ids[y, q] for y in range(m) for p in range(m) for q in range(p)], axis=0)
    v = np.mean([ids[p, x] - ids[q, x] for x in range(m) for p in range(m) for q in range(p)], axis=0)
    X = ids.reshape(m * m, -1) - ids.mean((0, 1))
    total = (X**2).sum()
    q, _ = np.linalg.qr(np.stack([h, v], 1))
    design = np.stack([np.ones(m * m), *np.indices((m, m)).reshape(2, -1)], 1)
    fit = design @ np.linalg.lstsq(design, X, rcond=None)[0]
    share = lambda w: ((X @ w / np.linalg.norm(w))**2).sum() / total
    linear_y, linear_x = (1 - sum_of_squares_left(X, c) / total for c in np.indices((m, m)).reshape(2, -1))
    grid = {"linear_x": linear_x, "linear_y": linear_y, "grid_score": min(linear_x, linear_y)}
    return h, v, grid | {"total": ((X @ q)**2).sum() / total, "x": share(h), "y": ((X @ q)**2).sum() / total - share(h), "y_alone": share(v),
                  "cosine": h @ v / np.linalg.norm(h) / np.linalg.norm(v), "r2": 1 - ((X - fit)**2).sum() / total}


@pytest.mark.parametrize("m", [2, 3, 4])
def test_statistics_equal_projection_and_regression(m):
    ids = np.random.default_rng(m).normal(size=(m, m, 9)) + 3
    h, v, slow = naive_statistics(ids)
    assert np.allclose(grid_axes(ids), [h, v], atol=1e-14)
    flat = ids.reshape(m * m, -1)
    fast = grid_statistics(flat @ flat.T)
    assert {k: pytest.approx(x, abs=1e-12) for k, x in slow.items()} == {k: float(x) for k, x in fast.items()}
    assert fast["total"] >= fast["r2"] - 1e-12
    assert fast["linear_x"] + fast["linear_y"] == pytest.approx(fast["r2"], abs=1e-12)
    basis = orthonormal([h, v])
    assert np.allclose(basis @ basis.T, np.eye(2), atol=1e-12) and basis[0] @ h > 0
    assert np.allclose(grid_design(m).T @ grid_design(m), np.eye(2), atol=1e-12)
    centred = flat - flat.mean(0)
    share = on_axes(flat[None], [h, v], weights=np.ones(1))
    assert share["value"] == pytest.approx(((centred @ basis.T)**2).sum() / (centred**2).sum()) and share["low"] is None


def test_degenerate_ids_give_zeros():
    zero = grid_statistics(np.zeros((16, 16)))
    assert all(float(v) == 0 for v in zero.values())
    x = np.outer(np.tile(np.arange(4.0), 4), [1.0, 2.0])  # nothing varies along y
    only_x = grid_statistics(x @ x.T)
    assert only_x["total"] == pytest.approx(1) and only_x["y"] == 0 and only_x["cosine"] == 0
    y = np.outer(np.repeat(np.arange(4.0), 4), [1.0, 2.0])  # nothing varies along x
    only_y = grid_statistics(y @ y.T)
    assert only_y["total"] == pytest.approx(1) and only_y["r2"] == pytest.approx(1)
    assert only_y["x"] == 0 and only_y["grid_score"] == pytest.approx(0, abs=1e-12)
    assert not orthonormal([[1.0, 0], [2.0, 0]])[1].any()


def test_permutation_null_is_calibrated():
    "For random vectors p is uniform: about 5 % of grids are called linear at 5 %."
    generator = np.random.default_rng(5)
    hits = 0
    for i in range(200):
        flat = generator.normal(size=(16, 12))
        gram = flat @ flat.T
        hits += grid_statistics(gram)["r2"] >= np.quantile(grid_null(gram, 200, seed=i)["r2"], 0.95)
    assert 2 <= hits <= 22
    null = grid_null(gram, 1000)["r2"]
    assert null.mean() == pytest.approx(2 / 15, abs=0.02)


def random_ids(objects=10, noise=1.0, seed=0):
    generator = np.random.default_rng(seed)
    h, v = generator.normal(size=(2, 8))
    y, x = np.mgrid[:4, :4]
    table = (x[..., None] * h + y[..., None] * v + noise * generator.normal(size=(objects, 1, 1, 4, 4, 8))).astype(np.float32)
    names = [f"o{i}" for i in range(objects)]
    return SpatialIDs(table, np.ones((objects, 1, 4, 4), int), names, [224], [1], [("a", b) for b in names], TEMPLATE)


def gram_of(ids):
    flat = ids.reshape(-1, ids.shape[-1])
    return flat @ flat.T


def row_code(noise, seed=0, d=12):
    "IDs (4, 4, d) that tell the rows apart and nothing else, with noise."
    generator = np.random.default_rng(seed)
    return np.mgrid[:4, :4][0][..., None] * generator.normal(size=d) + noise * generator.normal(size=(4, 4, d))


def test_a_code_of_rows_alone_has_a_high_r2_and_no_grid_score():
    gram = gram_of(row_code(0.1))
    stats, null = grid_statistics(gram), axis_null(gram)
    assert stats["r2"] > 0.98 and stats["total"] > 0.98 and stats["r2"] > np.quantile(grid_null(gram)["r2"], 0.95)
    assert stats["linear_y"] > np.quantile(null["linear_y"], 0.95) and stats["linear_y"] > 0.98
    assert stats["grid_score"] == stats["linear_x"] < 0.01 and stats["linear_x"] <= np.quantile(null["linear_x"], 0.95)


def test_axis_null_permutes_within_rows_and_within_columns():
    "What the other axis explains is left alone: with columns permuted within rows, a code of rows is as it was, and the other way round."
    by_row, by_column = row_code(0), row_code(0).swapaxes(0, 1)
    assert np.allclose(axis_null(gram_of(by_row), 50)["linear_x"], 0, atol=1e-12)
    assert np.allclose(axis_null(gram_of(by_column), 50)["linear_y"], 0, atol=1e-12)
    of_three = np.repeat(np.arange(3.0), 5)[:, None] * np.ones(2)  # three rows of five cells, that differ by row
    null = axis_null(of_three @ of_three.T, 200, rows=3)
    assert np.allclose(null["linear_x"], 0, atol=1e-12) and 0.1 < null["linear_y"].mean() < 0.9


def test_axis_null_equals_permuting_the_ids():
    "The range of the null is that of all permutations within rows of a 2 × 2 grid, done one by one on the vectors."
    ids = np.random.default_rng(1).normal(size=(2, 2, 5))
    slow = set()
    for top in ((0, 1), (1, 0)):
        for bottom in ((0, 1), (1, 0)):
            permuted = np.stack([ids[0, list(top)], ids[1, list(bottom)]])
            slow.add(round(naive_statistics(permuted)[2]["linear_x"], 10))
    assert set(np.round(axis_null(gram_of(ids), 200)["linear_x"], 10)) == slow


def test_the_grid_score_keeps_its_level_for_a_code_of_rows_with_noise():
    "Each axis against its own null: 5 % of row codes pass. The null of min(S_x, S_y) would let several times as many pass."
    n, own, joint = 250, 0, 0
    for i in range(n):
        gram = gram_of(row_code(2.0, seed=i, d=8))
        stats, null = grid_statistics(gram), axis_null(gram, 100, seed=i)
        high = {name: np.quantile(draws, 0.95) for name, draws in null.items()}
        own += all(stats[name] > high[name] for name in high)
        joint += stats["grid_score"] > np.quantile(np.minimum(null["linear_x"], null["linear_y"]), 0.95)
    assert own / n < 0.1 < joint / n


def test_smooth_codes_are_what_they_say():
    "Inner products average to the covariance; R² and the permutation null are fooled by them, their share above the measured grid score is not."
    codes = smooth_codes(3, 4000, m=3, rows=2)
    y, x = np.divmod(np.arange(6), 3)
    wanted = np.exp(-((x[:, None] - x)**2 + (y[:, None] - y)**2) / 8)
    assert np.abs(codes.mean(0) / 3 - wanted).max() < 0.05
    assert np.linalg.matrix_rank(codes[0]) == 3 and np.array_equal(codes, smooth_codes(3, 4000, m=3, rows=2))
    stats = grid_statistics(smooth_codes(3, 200))
    assert np.mean(stats["r2"] > 0.5) > 0.9 and np.quantile(stats["grid_score"], 0.05) < 0.15 < np.quantile(stats["grid_score"], 0.95)


def test_effective_dimensions():
    axes = np.eye(16)[:, 1:5] - np.eye(16)[:, 1:5].mean(0)
    basis = np.linalg.qr(axes)[0]
    assert effective_dimensions(basis @ basis.T) == pytest.approx(4)
    assert effective_dimensions(7 + np.outer(basis[:, 0], basis[:, 0])) == pytest.approx(1)
    assert effective_dimensions(np.zeros((16, 16))) == 0


def test_statistics_carry_the_nulls_of_their_axes():
    ids = ids_of(np.stack([row_code(0.3, seed=0)] * 3) + 0.1 * np.random.default_rng(9).normal(size=(3, 4, 4, 12)))
    found = ids.statistics(1, n_null=200)
    assert set(found) == {"total", "x", "y", "y_alone", "cosine", "r2", "linear_x", "linear_y", "grid_score"}
    null = axis_null(gram_of(ids.at(1)), 200)
    for name, draws in null.items():
        assert found[name]["null_high"] == np.quantile(draws, 0.95) and found[name]["p"] == (1 + (draws >= found[name]["value"]).sum()) / 201
    assert found["grid_score"]["null_high"] == found["linear_x"]["null_high"] and found["grid_score"]["p"] == found["linear_x"]["p"] > 0.05
    assert found["grid_score"]["smooth_p"] > 0.5 and found["linear_y"]["p"] < 0.01
    assert over_null(found["linear_x"], found["linear_y"])["value"] == pytest.approx(found["linear_x"]["value"] - found["linear_x"]["null_high"])
    assert ids.grid_score(1, n_null=200) == found["grid_score"]


def test_over_null_is_the_smallest_and_has_no_interval_where_one_has_none():
    one = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 5, "null_high": 0.2}
    other = {"value": 0.4, "low": 0.25, "high": 0.6, "n": 4, "null_high": 0.05}
    assert over_null(one, other) == {"value": pytest.approx(0.3), "low": pytest.approx(0.1), "high": pytest.approx(0.5), "n": 4}
    assert over_null(one, {**other, "low": None, "high": None}) == {"value": pytest.approx(0.3), "low": None, "high": None, "n": 4}


def ids_of(units, layers=(1,), objects=None, **fields):
    "SpatialIDs from units (object, y, x, d), or (object, layer, y, x, d)."
    table = units[:, None] if len(layers) > 1 else units[:, None, None]
    names = objects or [f"o{i}" for i in range(len(units))]
    return SpatialIDs(table, np.ones((len(units), 1, *table.shape[3:5]), int), names, [224], list(layers), [("a", b) for b in names], TEMPLATE, **fields)


def test_the_layer_is_chosen_by_the_grid_score_on_the_objects_given():
    "Rows alone at layer 1 (all of the variance in a plane), a noisy grid at layer 2, a better one at layer 3 for the second half of the objects only."
    generator = np.random.default_rng(0)
    h, v = generator.normal(size=(2, 12))
    y, x = np.mgrid[:4, :4]
    grid = x[..., None] * h + y[..., None] * v
    noise = lambda scale: scale * generator.normal(size=(4, 4, 4, 12))
    layers = [np.stack([row_code(0)] * 4), np.stack([grid] * 4) + noise(2), np.stack([row_code(0)] * 2 + [grid] * 2)]
    ids = ids_of(np.stack(layers, 1), layers=(1, 2, 3))
    assert choose_layer(ids, [1, 2, 3], ["o0", "o1"]) == 2 and choose_layer(ids, [1, 2, 3], ["o2", "o3"]) == 3
    assert choose_layer(ids, [1, 2], ["o0", "o1"], by="total") == 1 and choose_layer(ids, [1], ["o0"]) == 1
    scores = {layer: ids.statistics(layer, objects=["o0", "o1"], n_null=2)["grid_score"]["value"] for layer in ids.layers}
    assert choose_layer(ids, iter([1, 2, 3]), ["o0", "o1"]) == max(scores, key=scores.get)
    with pytest.raises(ValueError, match="no layer to choose from"):
        choose_layer(ids, [])
    with pytest.raises(KeyError, match="7 is not among the layers"):
        choose_layer(ids, [7])


def test_jackknife_is_the_textbook_one_and_contains_its_value():
    "For a mean it is Student's interval; ends stay within the bounds; nothing for one unit."
    x = np.array([0.1, 0.4, 0.2, 0.25])
    found = around(leave_one_out(np.ones(4)) @ x)
    half = 3.182446 * x.std(ddof=1) / 2
    assert (found["value"], found["low"], found["high"], found["n"]) == (pytest.approx(x.mean()), pytest.approx(x.mean() - half), pytest.approx(x.mean() + half), 4)
    assert around(leave_one_out(np.ones(4)) @ x, floor=0.0)["low"] == max(0.0, found["low"])
    over = around(np.array([1 + 1e-12, 1.0, 1.0, 1.0]))
    assert over["low"] <= over["value"] <= over["high"]
    for values in np.random.default_rng(0).uniform(-1, 1, (200, 4)):
        one = around(values)
        assert -1 <= one["low"] <= one["value"] <= one["high"] <= 1
    assert around(leave_one_out(np.ones(1)) @ np.ones(1)) == {"value": 1.0, "low": None, "high": None, "n": 1}
    assert around(np.array([0.5, np.nan, np.nan]))["low"] is None
    assert np.allclose(leave_one_out(np.array([1.0, 3.0])), [[0.25, 0.75], [0, 1], [1, 0]])


def test_ids_of_ones_own_queries_are_those_of_the_scenes(vlm):
    "Also in another order; plain queries are refused with what to give."
    scenes = squares(PAIRS[:2], sizes=(224,))
    queries, cells = [s.query(TEMPLATE) for s in scenes], [(s.b_cell, s.a_cell) for s in scenes]
    shuffled = np.random.default_rng(0).permutation(len(scenes))
    own = placed([queries[i] for i in shuffled], [cells[i] for i in shuffled])
    ours, theirs = (extract(vlm, one, progress=False) for one in (own, scenes))
    order = [ours.objects.index(name) for name in theirs.objects]
    assert np.allclose(ours.table[order], theirs.table, atol=1e-5) and sorted(ours.pairs) == sorted(theirs.pairs)
    with pytest.raises(ValueError, match=r"does not say in which cells its objects are: give GridScenes, or placed\(queries, cells\)"):
        extract(vlm, queries)
    with pytest.raises(ValueError, match="never shows the object in cell"): extract(vlm, [q for q in own if q.b_cell != (1, 1)])


def test_layers_may_be_an_array_and_batches_hold_images(vlm, tmp_path):
    "An array, a tensor, repeats, any order; numpy's numbers also go into a checkpoint."
    scenes = subsample(squares(PAIRS[:1], sizes=(224,)), 2)
    expected = extract(vlm, scenes, layers=[1, 2], progress=False)
    for k, layers in enumerate((np.arange(1, 3), torch.tensor([2, 1]), (2, 1, 2), range(1, 3))):
        found = extract(vlm, scenes, layers=layers, pair_layers=np.array([2]), checkpoint=tmp_path / f"{k}", progress=False)
        assert found.layers == [1, 2] and found.pair_layers == [2] and np.array_equal(found.table, expected.table)
    for layers in ([1.5], 3, "12"):
        with pytest.raises(ValueError, match="layers are whole numbers, not"): extract(vlm, scenes, layers=layers)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1 image, not {size}"):
            extract(vlm, scenes, batch_size=size, progress=False)


def test_the_last_layer_is_read_before_the_final_norm(vlm):
    "The released scripts read after it, which the page says; all layers below are the same state."
    query, last = squares(PAIRS[:1], sizes=(224,))[0].query(TEMPLATE), vlm.n_layers
    run = vlm.run([query], [last - 1, last], "last")
    with torch.no_grad(): states = vlm.model(**vlm.encode([query]), output_hidden_states=True).hidden_states
    assert torch.allclose(run.residuals[last - 1][:, 0], states[last - 1][:, -1], atol=1e-6)
    assert not torch.allclose(run.residuals[last][:, 0], states[last][:, -1], atol=1e-2)
    assert torch.allclose(vlm.receivers[-1](run.residuals[last][:, 0]), states[last][:, -1], atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_intervals_cover(k):
    "The 95 % interval of each statistic holds its mean over fresh draws of k objects most of the time."
    generator = np.random.default_rng(0)
    h, v = generator.normal(size=(2, 8))
    y, x = np.mgrid[:4, :4]
    draw = lambda seed: (x[..., None] * h + 0.7 * y[..., None] * v + 3 * np.random.default_rng(seed).normal(size=(k, 4, 4, 8))).reshape(k, 16, 8)
    one = lambda seed: with_interval(grid_statistics, draw(seed), weights=np.ones(k))
    truth = {name: np.mean([found[name]["value"] for found in map(one, range(200))]) for name in ("r2", "total", "linear_x", "grid_score", "cosine")}
    found = [one(1000 + i) for i in range(200)]
    covered = {name: np.mean([f[name]["low"] <= mean <= f[name]["high"] for f in found]) for name, mean in truth.items()}
    assert min(covered.values()) > 0.85, covered
    assert found[0]["r2"]["n"] == k and one(0) == one(0)


def test_save_load_round_trip(tmp_path, vlm):
    ids = extract(vlm, subsample(squares(PAIRS[:2], sizes=(224,)), 2), pair_layers=[1, 4], progress=False)
    ids.save(tmp_path / "ids.safetensors")
    back = SpatialIDs.load(tmp_path / "ids.safetensors")
    assert all(np.array_equal(getattr(ids, k), getattr(back, k)) for k in ("table", "counts", "pair_ids", "weights"))
    assert (back.objects, back.layers, back.pairs, back.pair_layers, back.template) == (ids.objects, ids.layers, ids.pairs, [1, 4], TEMPLATE)
    assert (ids.slot, back.slot) == ("first", "first")
    assert back.provenance["weight_hash"] == vlm.weight_hash and back.provenance["params"]["images"] == 60
    small = ids.universal()
    small.save(tmp_path / "small.safetensors")
    assert np.allclose(SpatialIDs.load(tmp_path / "small.safetensors").ids, ids.ids, atol=1e-6)
    assert small.statistics(2)["r2"]["low"] is None and small.counts.sum() == 60


def test_ids_saved_before_there_were_slots_are_of_the_first(tmp_path):
    ids = random_ids()
    ids.save(tmp_path / "ids.safetensors")
    import safetensors.numpy
    from safetensors import safe_open
    with safe_open(str(tmp_path / "ids.safetensors"), framework="np") as file:
        arrays, names = {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["spatial_ids"])
    del names["slot"]
    safetensors.numpy.save_file(arrays, tmp_path / "old.safetensors", metadata={"spatial_ids": json.dumps(names)})
    assert SpatialIDs.load(tmp_path / "old.safetensors").slot == "first"


def test_second_slot_reads_the_object_at_the_second_noun(tmp_path, double):
    "φ is read at b's word, which is the second noun of the same question; the rest is as for the first."
    scenes = subsample(squares(PAIRS[:3], sizes=(224,)), 2)
    text = "Is the {object} to the left or right of the {subject}?"
    assert exchanged(TEMPLATE) == text and exchanged(text) == TEMPLATE
    second = extract(double, scenes, slot="second", progress=False)
    for (b, size), slow in slow_ids(scenes, phis_of(double, scenes, text)).items():
        assert np.abs(second.table[second.find("objects", b), second.find("sizes", size)] - slow).max() < 1e-12
    query = scenes[0].query(text)
    assert query.text.index(scenes[0].b) > query.text.index(scenes[0].a)
    assert (second.slot, second.template) == ("second", TEMPLATE) and "second noun" in repr(second)
    assert np.abs(second.table - extract(double, scenes, progress=False).table).max() > 1e-6
    second.universal().save(tmp_path / "second.safetensors")
    back = SpatialIDs.load(tmp_path / "second.safetensors")
    assert back.slot == "second" and back.provenance["params"]["slot"] == "second"


def test_wrong_slots_are_one_clear_sentence(tmp_path, vlm, monkeypatch):
    scenes, path = subsample(squares(PAIRS[:1], sizes=(224,)), 2), tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match="slot must be 'first' or 'second', .* not 'third'"):
        extract(vlm, scenes, slot="third", progress=False)
    with pytest.raises(ValueError, match="has no {object}: mark both nouns, or take slot='first'"):
        extract(vlm, scenes, "Is there a {subject}?", slot="second", progress=False)
    extract(vlm, scenes, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="another extraction .different slot"):
        extract(vlm, scenes, checkpoint=path, slot="second", progress=False)
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no spatial IDs of some at results/some/spatial_ids_second.safetensors"):
        stored_ids(vlm, "some", slot="second")
    extract(vlm, scenes, slot="second", progress=False).save(tmp_path / "results" / "some" / "spatial_ids_second.safetensors")
    assert stored_ids(vlm, "some", slot="second").slot == "second"


def test_slots_of_place_and_of_relation():
    "A code of place has cosine 1 between the slots, one of the relation −1; a code may turn round along one axis only."
    first = random_ids(objects=5, noise=0.5)
    y, x = np.mgrid[:4, :4]
    h, v = np.random.default_rng(0).normal(size=(2, 8))
    turned = first.table.astype(float) - 2 * (x[..., None] - 1.5) * h  # along x the other way round
    names = {"place": first.table, "relation": -first.table, "x": turned}
    seconds = {name: SpatialIDs(table, first.counts, first.objects, [224], [1], first.pairs, TEMPLATE, slot="second") for name, table in names.items()}
    place, relation, along_x = (compare_slots(first, seconds[name], 1) for name in names)
    assert all(place[key]["value"] == pytest.approx(1) and relation[key]["value"] == pytest.approx(-1) for key in ("cells", "x", "y"))
    assert place["same_slot"]["value"] == pytest.approx(place["other_slot"]["value"]) and place["cells"]["n"] == 5
    assert along_x["x"]["value"] < -0.9 and along_x["y"]["value"] > 0.9 and along_x["x"]["low"] <= along_x["x"]["value"] <= along_x["x"]["high"]
    units = first.units(1)[0]
    pairs = [cosines(units[i], units[j]).mean() for i in range(5) for j in range(5) if i != j]
    assert place["same_slot"]["value"] == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="other objects: extract both from the same scenes"):
        compare_slots(first, random_ids(objects=4), 1)


def pair_ids_of(k, d=6, seed=0):
    "Names, ordered pairs, their IDs (pair, 16, d) and inner products (16, pair, pair)."
    names = [f"o{i}" for i in range(k)]
    pairs = [(a, b) for a in names for b in names if a != b]
    of_pair = np.random.default_rng(seed).normal(size=(len(pairs), 16, d)) + np.random.default_rng(99).normal(size=(16, d))
    return names, pairs, of_pair, np.einsum("pcd,qcd->cpq", of_pair, of_pair)


def slow_cosine(one, other, pairs, of_pair):
    "Mean over cells of the cosine of the IDs of two sets of objects, from the IDs themselves."
    means = [np.mean([of_pair[i] for i, pair in enumerate(pairs) if set(pair) <= set(some)], axis=0) for some in (one, other)]
    return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*means)])


def test_subsets_from_inner_products_equal_the_ids_themselves():
    names, pairs, of_pair, gram = pair_ids_of(6)
    subsets = choices(names, 3)
    assert len(subsets) == 20 and len(choices(names, 3, limit=7)) == 7 and choices(names, 3, limit=7) == choices(names, 3, limit=7)
    whole = pair_weights(pairs, [names])
    measure = lambda some: subset_cosines(pair_weights(pairs, some), whole, gram)
    assert np.allclose(measure(subsets), [slow_cosine(one, names, pairs, of_pair) for one in subsets], atol=1e-12)
    found = over_subsets(measure, names, 3)
    without = [np.mean([v for v, one in zip(measure(subsets), subsets) if name not in one]) for name in names]
    assert found == {**around(np.array([measure(subsets).mean(), *without])), "subsets": 20} and found["n"] == 6
    complete = over_subsets(measure, names, 6)
    assert complete["value"] == pytest.approx(1) and complete["subsets"] == 1 and complete["n"] == 6 and complete["low"] < complete["value"]
    with pytest.raises(ValueError, match="no pair of objects: give at least two"):
        pair_weights(pairs, [["o0"]])


def test_disjoint_halves_have_no_object_in_common():
    names, pairs, of_pair, gram = pair_ids_of(5)
    halves = [(one, [n for n in names if n not in one]) for one in choices(names, 2)]
    found = disjoint_halves(names, pairs, gram)
    assert found["value"] == pytest.approx(np.mean([slow_cosine(*two, pairs, of_pair) for two in halves])) and found["n"] == 5
    assert found["low"] <= found["value"] <= found["high"]
    names, pairs, of_pair, gram = pair_ids_of(4)
    assert disjoint_halves(names, pairs, gram)["low"] is None
    with pytest.raises(ValueError, match="at least four objects, not 3"):
        disjoint_halves(names[:3], pairs, gram)


@pytest.mark.parametrize("n_layers, chosen", [(8, 4), (9, 5), (30, 19), (40, 2), (36, 36), (30, 1)])
def test_a_handful_of_layers_is_shown(n_layers, chosen):
    shown = spread_layers(range(1, n_layers + 1), chosen)
    assert shown == sorted(set(shown)) and len(shown) == 8 and {1, chosen, n_layers} <= set(shown)
    assert max(np.diff(shown)) <= 2 * n_layers / 7 + 1


def test_stored_ids_are_those_of_the_same_weights(tmp_path, monkeypatch, vlm):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run notebook 03 first .spatialid run 03 --model here/some."):
        stored_ids(vlm, "here/some")
    ids = extract(vlm, subsample(squares(PAIRS[:2], sizes=(224,)), 2), progress=False)
    ids.save(tmp_path / "results" / "some" / "spatial_ids.safetensors")
    assert np.array_equal(stored_ids(vlm, "here/some").table, ids.table)
    ids.provenance["weight_hash"] = "0"
    ids.save(tmp_path / "results" / "some" / "spatial_ids.safetensors")
    with pytest.raises(ValueError, match="extracted from other weights than those of .*: load that model, or run notebook 03 again"):
        stored_ids(vlm, "here/some")


def test_bad_input_is_one_clear_sentence(tmp_path, vlm):
    scenes = subsample(squares(PAIRS[:2], sizes=(224,)), 2)
    ids = random_ids()
    ids.save(tmp_path / "ids.safetensors")
    data = (tmp_path / "ids.safetensors").read_bytes()
    for n in (0, 5, 200, len(data) - 7):
        (tmp_path / "cut.safetensors").write_bytes(data[:n])
        with pytest.raises(ValueError, match="cut.safetensors is cut short .* extract again"):
            SpatialIDs.load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no file .*nowhere"):
        SpatialIDs.load(tmp_path / "nowhere.safetensors")
    for cell in ((-1, 0), (4, 1), (0.5, 0), 3, (1, 2, 3)):
        with pytest.raises(ValueError, match="is no cell: column and row are whole numbers from 0 to 3"):
            ids.step((0, 0), cell)
    assert len(repr(ids)) < 300 and "4 × 4 cells" in repr(ids)
    with pytest.raises(KeyError, match="7 is not among the layers"):
        ids.at(7)
    with pytest.raises(KeyError, match="'cup' is not among the objects"):
        ids.at(1, objects=["cup"])
    with pytest.raises(ValueError, match="no scenes"):
        extract(vlm, [], progress=False)
    with pytest.raises(ValueError, match="not together: sort"):
        extract(vlm, scenes[::2] + scenes[1::2], progress=False)
    with pytest.raises(ValueError, match="never shows the object in cell"):
        extract(vlm, [s for s in scenes if s.b_cell != (2, 1)], progress=False)
    with pytest.raises(ValueError, match="never shows the object in cell"):
        extract(vlm, subsample(scenes, 1), progress=False)
    with pytest.raises(ValueError, match="'paper' or 'released'"):
        extract(vlm, scenes, protocol="mine", progress=False)
    with pytest.raises(ValueError, match="no layer 9"):
        extract(vlm, scenes, layers=[9], progress=False)
    with pytest.raises(ValueError, match="subject"):
        extract(vlm, scenes, template="Is there a {object}?", progress=False)


def test_checkpoint_of_another_extraction_is_refused(tmp_path, vlm):
    scenes, path = subsample(squares(PAIRS[:1], sizes=(224,)), 2), tmp_path / "c.safetensors"
    extract(vlm, scenes, checkpoint=path, progress=False)
    other = VLM(*tiny_llava(seed=1), name="tiny")
    for wrong, calls in {"weights": lambda: extract(other, scenes, checkpoint=path, progress=False),
                         "template": lambda: extract(vlm, scenes, template="A {subject} and a {object}.", checkpoint=path, progress=False),
                         "batch_size": lambda: extract(vlm, scenes, batch_size=7, checkpoint=path, progress=False),
                         "scenes": lambda: extract(vlm, subsample(squares(PAIRS[:1], sizes=(74,)), 2), checkpoint=path, progress=False)}.items():
        with pytest.raises(ValueError, match=f"another extraction .different .*{wrong}"):
            calls()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cut short"):
        extract(vlm, scenes, checkpoint=path, progress=False)


def test_finished_checkpoint_needs_no_forward(tmp_path):
    stub, scenes = Code(lambda s: np.ones((2, 3), np.float32) * s.b_cell[0]), plain_scenes(sizes=(224,))
    first = extract(stub, scenes, checkpoint=tmp_path / "c.safetensors", progress=False)
    n = stub.images
    again = extract(stub, scenes, checkpoint=tmp_path / "c.safetensors", progress=False)
    assert stub.images == n and np.array_equal(first.table, again.table)


def test_ctrl_c_keeps_the_work_and_says_so(tmp_path):
    scenes, path = plain_scenes(sizes=(224,)), tmp_path / "c.safetensors"
    noise = {s: np.random.default_rng(i).normal(size=(2, 3)).astype(np.float32) for i, s in enumerate(scenes)}
    whole = extract(Code(noise.__getitem__), scenes, batch_size=50, progress=False)

    def stop_at(n):
        stub = Code(None)
        def code(scene):
            if stub.images > n: raise KeyboardInterrupt
            return noise[scene]
        stub.code = code
        return stub
    with pytest.raises(KeyboardInterrupt, match="nothing was kept"):
        extract(stop_at(100), scenes, batch_size=50, progress=False)
    for n in (60, 200, 500):
        with pytest.raises(KeyboardInterrupt, match=r"of 960 images; the same call goes on from") as stopped:
            extract(stop_at(n), scenes, batch_size=50, checkpoint=path, progress=False)
        kept = int(read_checkpoint(path, {})["done"])
        assert kept > 0 and f"stopped after {kept} of" in str(stopped.value), "what is kept is counted without a bar, too"
    last = Code(noise.__getitem__)
    resumed = extract(last, scenes, batch_size=50, checkpoint=path, progress=False)
    assert last.images <= 240 and np.array_equal(whole.table, resumed.table) and np.array_equal(whole.counts, resumed.counts)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_extraction import *
class Slow(VLM):
    def run(self, *args, **kwargs):
        time.sleep({pause})
        return super().run(*args, **kwargs)
ids = extract(Slow(*tiny_llava(), name="tiny"), subsample(squares(), 3), batch_size=16, pair_layers=[2], checkpoint={checkpoint!r}, save_every=0, progress=False)
ids.save({result!r})
"""


@pytest.mark.slow
def test_a_killed_process_resumes_bit_identically(tmp_path):
    def start(name, checkpoint, pause):
        script = SCRIPT.format(tests=str(Path(__file__).parent), checkpoint=str(tmp_path / checkpoint), result=str(tmp_path / name), pause=pause)
        return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1])
    whole = start("whole.safetensors", "whole.checkpoint", 0)
    broken = start("broken.safetensors", "broken.checkpoint", 0.1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "broken.checkpoint").exists() and time.monotonic() < deadline: time.sleep(0.02)
    time.sleep(0.5)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL and not (tmp_path / "broken.safetensors").exists()
    again = start("broken.safetensors", "broken.checkpoint", 0)
    assert whole.wait() == 0 and again.wait() == 0
    a, b = (SpatialIDs.load(tmp_path / f"{n}.safetensors") for n in ("whole", "broken"))
    for key in ("table", "counts", "pair_ids"):
        assert np.array_equal(getattr(a, key), getattr(b, key)), key
    assert a.table.any() and len(list(tmp_path.glob("*"))) == 4  # and no temporary files left


def test_state_does_not_grow_with_images():
    def size(scenes):
        index = index_scenes(scenes)
        return sum(v.nbytes for v in new_state(index, 2, 1, 8, np.float32).values())
    few, many = subsample(squares(), 2), squares()
    assert size(few) == size(many) and len(many) == 8 * len(few)
    index = index_scenes(many)
    assert sum(getattr(index, k).nbytes for k in ("pair", "size", "a", "b")) == 9 * len(many)


def test_subsample_is_even():
    scenes = squares(PAIRS, sizes=(224,))
    some = subsample(scenes, 4)
    assert len(some) == 4 * 60
    for pair in PAIRS:
        cells = {s.a_cell for s in some if (s.a, s.b) == pair}
        assert len(cells) == len({x for x, _ in cells}) == len({y for _, y in cells}) == 4
    counts = np.unique([4 * s.a_cell[1] + s.a_cell[0] for s in some], return_counts=True)[1]
    assert len(counts) == 16 and (counts == 15).all()
    assert subsample(scenes, 16) == scenes


def test_half_precision_is_accumulated_in_single():
    "bfloat16 activations of 100 ± small: sums of their differences are exact."
    code = lambda s: torch.full((2, 3), 100.0 + s.b_cell[0], dtype=torch.bfloat16)
    ids = extract(Code(code), plain_scenes(sizes=(224,)), progress=False)
    assert ids.table.dtype == np.float32
    assert np.abs(ids.at(1)[0, :, 0] - (1 - 1 / 225) * np.array([-1.5, -0.5, 0.5, 1.5])).max() < 1e-6


def test_the_committed_numbers_are_what_the_register_reads():
    "Every rule of this notebook finds its number, or the file says why there is none; intervals contain their values; layers follow the rule."
    root = Path(__file__).parents[1]
    found = json.loads((root / "results" / "llava-tiny" / "03_extraction.json").read_text())
    rules = [c["rule"] for c in json.loads((root / "nbs" / "claims.json").read_text()) if c["rule"] and c["rule"]["notebook"] == "03_extraction"]
    for rule in rules:
        one = found["claims"][rule["key"].removeprefix("claims.")]
        assert one.get("not_judged") or one["low"] <= one["value"] <= one["high"], rule["key"]
    layer = found["layer"]
    assert layer["rule"] == "grid score" and {layer["best"], layer["most_variance"]} <= set(layer["candidates"])
    assert not set(layer["chosen_on"]) & set(layer["reported_on"]) and len(layer["chosen_on"]) <= len(layer["reported_on"])
    for one in found["by_layer"].values():
        assert one["r2"]["value"] == pytest.approx(one["linear_x"]["value"] + one["linear_y"]["value"])
        assert one["grid_score"]["value"] == pytest.approx(min(one["linear_x"]["value"], one["linear_y"]["value"]))
    assert set(found["slots"]) == set(found["by_layer"])
    second = SpatialIDs.load(root / "results" / "llava-tiny" / "spatial_ids_second.safetensors")
    assert second.slot == "second" and list(map(str, second.layers)) == list(found["slots"])
