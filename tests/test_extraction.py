"Extraction: the fast path equals the obvious one, resumes to the bit, stays flat, and says plainly what is wrong."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spatialid.benchmarks import placed
from spatialid import extraction
from spatialid.extraction import (
    IDAccumulator, SpatialIDs, axis_null, choices, choose_layer, compare_slots, cosines, disjoint_halves,
    effective_dimensions, exchanged, extract, grid_axes, grid_design, grid_null, grid_statistics, index_scenes, on_axes,
    orthonormal, over_subsets, pair_weights, smooth_codes, spread_layers, stored_ids, subsample, subset_cosines)
from spatialid.processes import ahead
from spatialid.stats import around, leave_one_out, over_null, with_interval
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
        marked = {k: v for k, v in words.items() if "{" + k + "}" in template}
        return Query(self.image(), template, marked, ("left", "right"))


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
                        group = [v for k, v in phi.items() if k[:2] == pair and k[3] == ac
                                 and (protocol == "released" or k[2] == size)]
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


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_some_pairs_give_what_they_would_have_given_alone(double, protocol):
    scenes = subsample(squares(PAIRS[:4], sizes=(224,)), 2)
    some = [scene for scene in scenes if (scene.a, scene.b) in PAIRS[1:4:2]]
    settings = dict(protocol=protocol, batch_size=16, progress=False)
    whole = extract(double, scenes, pair_layers=[2], **settings)
    kept, alone = whole.of_scenes(some), extract(double, some, layers=[2], pair_layers=[2], **settings)
    assert np.abs(kept.table - alone.table).max() < 1e-12 and np.array_equal(kept.counts, alone.counts)
    for name in ("objects", "sizes", "layers", "pairs", "pair_layers", "slot", "protocol"):
        assert getattr(kept, name) == getattr(alone, name), name
    assert np.abs(kept.pair_ids - alone.pair_ids).max() < 1e-12
    with pytest.raises(KeyError, match="is not among the pairs"):
        whole.of_scenes(squares([("star", "hot dog")], sizes=(224,)))
    with pytest.raises(ValueError, match="of one size"):
        replace(whole, pair_layers=[]).of_scenes(some)


@pytest.mark.slow
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
    "φ = word + x·h + y·v + what depends on the reference: linear IDs, and axes in the directions of h and v."
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
        # any two-dimensional code lies in its own plane, but few are linear
        assert stats["r2"]["p"] < 0.002 and stats["r2"]["null_high"] < 0.9
        assert stats["cosine"]["value"] == pytest.approx(cosines(h[layer - 1], v[layer - 1]))
        assert np.allclose(ids.step((0, 3), (2, 1), layer), (1 - 1 / 225) * (2 * h - 2 * v)[layer - 1], atol=1e-12)
    assert np.allclose(ids.step((0, 3), (2, 1))[1], ids.step((0, 3), (2, 1), 2), atol=1e-6)
    assert np.allclose(ids.stderr, 0, atol=1e-12)
    assert ids.counts.shape == (3, 2, 4, 4) and ids.counts.sum() == 4 * 2 * 240
    released = extract(Code(code), plain_scenes(), protocol="released", progress=False)
    assert np.allclose(released.axes(1), 2 / 3 * ids.axes(1), atol=1e-12)


def test_released_reads_the_largest_size():
    "Position is coded twice as strongly at size 224: the released protocol reads that size and centres over both."
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
    plane = ((X @ q)**2).sum() / total
    shares = {"total": plane, "x": share(h), "y": plane - share(h), "y_alone": share(v)}
    cosine = h @ v / np.linalg.norm(h) / np.linalg.norm(v)
    return h, v, {**grid, **shares, "cosine": cosine, "r2": 1 - ((X - fit)**2).sum() / total}


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
    scatter = noise * generator.normal(size=(objects, 1, 1, 4, 4, 8))
    table = (x[..., None] * h + y[..., None] * v + scatter).astype(np.float32)
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
    "What the other axis explains is left alone: a code of rows is as it was with columns permuted, and vice versa."
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
    "Each axis against its own null: 5 % of row codes pass; of the null of min(S_x, S_y) several times as many would."
    n, own, joint = 250, 0, 0
    for i in range(n):
        gram = gram_of(row_code(2.0, seed=i, d=8))
        stats, null = grid_statistics(gram), axis_null(gram, 100, seed=i)
        high = {name: np.quantile(draws, 0.95) for name, draws in null.items()}
        own += all(stats[name] > high[name] for name in high)
        joint += stats["grid_score"] > np.quantile(np.minimum(null["linear_x"], null["linear_y"]), 0.95)
    assert own / n < 0.1 < joint / n


def test_smooth_codes_are_what_they_say():
    "Inner products average to the covariance; R² and the permutation null are fooled by them, the grid score is not."
    codes = smooth_codes(3, 4000, m=3, rows=2)
    y, x = np.divmod(np.arange(6), 3)
    wanted = np.exp(-((x[:, None] - x)**2 + (y[:, None] - y)**2) / 8)
    assert np.abs(codes.mean(0) / 3 - wanted).max() < 0.05
    assert np.linalg.matrix_rank(codes[0]) == 3 and np.array_equal(codes, smooth_codes(3, 4000, m=3, rows=2))
    stats = grid_statistics(smooth_codes(3, 2000))
    low, high = np.quantile(stats["grid_score"], [0.05, 0.95])
    assert np.mean(stats["r2"] > 0.5) > 0.9 and low < 0.15 < high


def test_smooth_codes_are_the_same_whatever_eigenvectors_a_machine_finds(monkeypatch):
    "A square grid has equal eigenvalues: their vectors may come turned and with any sign."
    wanted, eigh = smooth_codes(3, 20), np.linalg.eigh
    def turned(matrix):
        values, vectors = eigh(matrix)
        equal = np.isclose(values[:-1], values[1:], rtol=1e-9) & (values[:-1] > 1e-3)
        i = int(equal.argmax())
        vectors[:, [i, i + 1]] = vectors[:, [i, i + 1]] @ [[.6, -.8], [.8, .6]]
        return values, -vectors
    monkeypatch.setattr(np.linalg, "eigh", turned)
    assert np.allclose(smooth_codes(3, 20), wanted)


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
        assert found[name]["null_high"] == np.quantile(draws, 0.95)
        assert found[name]["p"] == (1 + (draws >= found[name]["value"]).sum()) / 201
    score, weaker = found["grid_score"], found["linear_x"]
    assert score["null_high"] == weaker["null_high"] and score["p"] == weaker["p"] > 0.05
    assert found["grid_score"]["smooth_p"] > 0.5 and found["linear_y"]["p"] < 0.01
    smallest = over_null(found["linear_x"], found["linear_y"])["value"]
    assert smallest == pytest.approx(weaker["value"] - weaker["null_high"])
    assert ids.grid_score(1, n_null=200) == found["grid_score"]


def test_over_null_is_the_smallest_and_has_no_interval_where_one_has_none():
    one = {"value": 0.5, "low": 0.3, "high": 0.7, "n": 5, "null_high": 0.2}
    other = {"value": 0.4, "low": 0.25, "high": 0.6, "n": 4, "null_high": 0.05}
    smallest = {"value": pytest.approx(0.3), "low": pytest.approx(0.1), "high": pytest.approx(0.5), "n": 4}
    assert over_null(one, other) == smallest
    assert over_null(one, {**other, "low": None, "high": None}) == {**smallest, "low": None, "high": None}


def ids_of(units, layers=(1,), objects=None, **fields):
    "SpatialIDs from units (object, y, x, d), or (object, layer, y, x, d)."
    table = units[:, None] if len(layers) > 1 else units[:, None, None]
    names = objects or [f"o{i}" for i in range(len(units))]
    counts, pairs = np.ones((len(units), 1, *table.shape[3:5]), int), [("a", b) for b in names]
    return SpatialIDs(table, counts, names, [224], list(layers), pairs, TEMPLATE, **fields)


def test_the_layer_is_chosen_by_the_grid_score_on_the_objects_given():
    "Rows alone at layer 1, a noisy grid at layer 2, a better one at layer 3 for the second half of the objects only."
    generator = np.random.default_rng(0)
    h, v = generator.normal(size=(2, 12))
    y, x = np.mgrid[:4, :4]
    grid = x[..., None] * h + y[..., None] * v
    noise = lambda scale: scale * generator.normal(size=(4, 4, 4, 12))
    layers = [np.stack([row_code(0)] * 4), np.stack([grid] * 4) + noise(2), np.stack([row_code(0)] * 2 + [grid] * 2)]
    ids = ids_of(np.stack(layers, 1), layers=(1, 2, 3))
    assert choose_layer(ids, [1, 2, 3], ["o0", "o1"]) == 2 and choose_layer(ids, [1, 2, 3], ["o2", "o3"]) == 3
    assert choose_layer(ids, [1, 2], ["o0", "o1"], by="total") == 1 and choose_layer(ids, [1], ["o0"]) == 1
    score = lambda layer: ids.statistics(layer, objects=["o0", "o1"], n_null=2)["grid_score"]["value"]
    scores = {layer: score(layer) for layer in ids.layers}
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
    assert found["n"] == 4
    for end, expected in (("value", x.mean()), ("low", x.mean() - half), ("high", x.mean() + half)):
        assert found[end] == pytest.approx(expected)
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
    message = r"does not say in which cells its objects are: give GridScenes, or placed\(queries, cells\)"
    with pytest.raises(ValueError, match=message):
        extract(vlm, queries)
    with pytest.raises(ValueError, match="never shows the object in cell"):
        extract(vlm, [q for q in own if q.b_cell != (1, 1)])


def test_layers_may_be_an_array_and_batches_hold_images(vlm, tmp_path):
    "An array, a tensor, repeats, any order; numpy's numbers also go into a checkpoint."
    scenes = subsample(squares(PAIRS[:1], sizes=(224,)), 2)
    expected = extract(vlm, scenes, layers=[1, 2], progress=False)
    for k, layers in enumerate((np.arange(1, 3), torch.tensor([2, 1]), (2, 1, 2), range(1, 3))):
        found = extract(vlm, scenes, layers=layers, pair_layers=np.array([2]), checkpoint=tmp_path / f"{k}",
                        progress=False)
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


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3, 10])
def test_intervals_cover(k):
    "The 95 % interval of each statistic holds its mean over fresh draws of k objects most of the time."
    generator = np.random.default_rng(0)
    h, v = generator.normal(size=(2, 8))
    y, x = np.mgrid[:4, :4]
    plane = x[..., None] * h + 0.7 * y[..., None] * v
    noise = lambda seed: 3 * np.random.default_rng(seed).normal(size=(k, 4, 4, 8))
    one = lambda seed: with_interval(grid_statistics, (plane + noise(seed)).reshape(k, 16, 8), weights=np.ones(k))
    fresh, names = [one(seed) for seed in range(200)], ("r2", "total", "linear_x", "grid_score", "cosine")
    truth = {name: np.mean([found[name]["value"] for found in fresh]) for name in names}
    found = [one(1000 + i) for i in range(200)]
    holds = lambda name, mean: [draw[name]["low"] <= mean <= draw[name]["high"] for draw in found]
    covered = {name: np.mean(holds(name, mean)) for name, mean in truth.items()}
    assert min(covered.values()) > 0.85, covered
    assert found[0]["r2"]["n"] == k and one(0) == one(0)


def test_save_load_round_trip(tmp_path, vlm):
    ids = extract(vlm, subsample(squares(PAIRS[:2], sizes=(224,)), 2), pair_layers=[1, 4], progress=False)
    ids.save(tmp_path / "ids.safetensors")
    back = SpatialIDs.load(tmp_path / "ids.safetensors")
    assert all(np.array_equal(getattr(ids, k), getattr(back, k)) for k in ("table", "counts", "pair_ids", "weights"))
    assert all(getattr(ids, k) == getattr(back, k) for k in ("objects", "layers", "pairs"))
    assert (back.pair_layers, back.template) == ([1, 4], TEMPLATE)
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
    path = Path("results/some/spatial_ids_second.safetensors")
    with pytest.raises(FileNotFoundError, match=f"no spatial IDs of some at {path}"):
        stored_ids(vlm, "some", slot="second")
    extract(vlm, scenes, slot="second", progress=False).save(tmp_path / path)
    assert stored_ids(vlm, "some", slot="second").slot == "second"


def test_slots_of_place_and_of_relation():
    "A code of place has cosine 1 between the slots, one of the relation −1; a code may turn along one axis only."
    first = random_ids(objects=5, noise=0.5)
    y, x = np.mgrid[:4, :4]
    h, v = np.random.default_rng(0).normal(size=(2, 8))
    turned = first.table.astype(float) - 2 * (x[..., None] - 1.5) * h  # along x the other way round
    names = {"place": first.table, "relation": -first.table, "x": turned}
    second = lambda table: replace(first, table=table, slot="second")
    place, relation, along_x = (compare_slots(first, second(table), 1) for table in names.values())
    for key in ("cells", "x", "y"):
        assert place[key]["value"] == pytest.approx(1) and relation[key]["value"] == pytest.approx(-1)
    assert place["same_slot"]["value"] == pytest.approx(place["other_slot"]["value"]) and place["cells"]["n"] == 5
    assert along_x["x"]["value"] < -0.9 and along_x["y"]["value"] > 0.9
    assert along_x["x"]["low"] <= along_x["x"]["value"] <= along_x["x"]["high"]
    units = first.units(1)[0]
    pairs = [cosines(units[i], units[j]).mean() for i in range(5) for j in range(5) if i != j]
    assert place["same_slot"]["value"] == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="other objects: extract both from the same scenes"):
        compare_slots(first, random_ids(objects=4), 1)


def pair_ids_of(k, d=6, seed=0):
    "Names, ordered pairs, their IDs (pair, 16, d) and inner products (16, pair, pair)."
    names = [f"o{i}" for i in range(k)]
    pairs = [(a, b) for a in names for b in names if a != b]
    shared = np.random.default_rng(99).normal(size=(16, d))
    of_pair = np.random.default_rng(seed).normal(size=(len(pairs), 16, d)) + shared
    return names, pairs, of_pair, np.einsum("pcd,qcd->cpq", of_pair, of_pair)


def slow_cosine(one, other, pairs, of_pair):
    "Mean over cells of the cosine of the IDs of two sets of objects, from the IDs themselves."
    mean = lambda some: np.mean([of_pair[i] for i, pair in enumerate(pairs) if set(pair) <= set(some)], axis=0)
    return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(mean(one), mean(other))])


def test_subsets_from_inner_products_equal_the_ids_themselves():
    names, pairs, of_pair, gram = pair_ids_of(6)
    subsets = choices(names, 3)
    few = choices(names, 3, limit=7)
    assert len(subsets) == 20 and len(few) == 7 and few == choices(names, 3, limit=7)
    measure = lambda names, some: subset_cosines(pair_weights(pairs, some), pair_weights(pairs, [names]), gram)
    slow = lambda names, some: [slow_cosine(one, names, pairs, of_pair) for one in some]
    assert np.allclose(measure(names, subsets), slow(names, subsets), atol=1e-12)
    found = over_subsets(measure, names, 3)
    others = [[other for other in names if other != name] for name in names]
    without = [np.mean(slow(some, choices(some, 3))) for some in others]
    expected = around(np.array([np.mean(slow(names, subsets)), *without]))
    assert found["subsets"] == 20 and found["n"] == 6
    for end in ("value", "low", "high"): assert found[end] == pytest.approx(expected[end], abs=1e-12)
    complete = over_subsets(lambda names, some: [1.0 * ("o0" in one) for one in some], names, 6)
    assert complete["value"] == 1 and complete["low"] < 1 and complete["subsets"] == 1 and complete["n"] == 6
    with pytest.raises(ValueError, match="no pair of objects: give at least two"):
        pair_weights(pairs, [["o0"]])


def test_disjoint_halves_have_no_object_in_common():
    names, pairs, of_pair, gram = pair_ids_of(5)
    halves = [(one, [n for n in names if n not in one]) for one in choices(names, 2)]
    found = disjoint_halves(names, pairs, gram)
    slow = [slow_cosine(*two, pairs, of_pair) for two in halves]
    assert found["value"] == pytest.approx(np.mean(slow)) and found["n"] == 5
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
    message = "extracted from other weights than those of .*: load that model, or run notebook 03 again"
    with pytest.raises(ValueError, match=message):
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
    smaller = subsample(squares(PAIRS[:1], sizes=(74,)), 2)
    calls = {"weights": lambda: extract(other, scenes, checkpoint=path, progress=False),
             "template": lambda: extract(vlm, scenes, "A {subject} and a {object}.", checkpoint=path, progress=False),
             "batch_size": lambda: extract(vlm, scenes, batch_size=7, checkpoint=path, progress=False),
             "scenes": lambda: extract(vlm, smaller, checkpoint=path, progress=False)}
    for wrong, call in calls.items():
        with pytest.raises(ValueError, match=f"another extraction .different .*{wrong}"):
            call()
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
        sums = IDAccumulator(index_scenes(scenes), [1, 2])
        sums.load(path, {})
        assert sums.done > 0 and f"stopped after {sums.done} of" in str(stopped.value), "counted without a bar, too"
    last = Code(noise.__getitem__)
    resumed = extract(last, scenes, batch_size=50, checkpoint=path, progress=False)
    assert last.images <= 240
    assert np.array_equal(whole.table, resumed.table) and np.array_equal(whole.counts, resumed.counts)


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
ids = extract(Slow(*tiny_llava(), name="tiny"), subsample(squares(), 3), batch_size=16, pair_layers=[2],
              checkpoint={checkpoint!r}, save_every=0, progress=False)
ids.save({result!r})
"""


@pytest.mark.slow
def test_a_killed_process_resumes_bit_identically(tmp_path):
    def start(name, checkpoint, pause):
        script = SCRIPT.format(tests=str(Path(__file__).parent), checkpoint=str(tmp_path / checkpoint),
                               result=str(tmp_path / name), pause=pause)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", script], env=environment, cwd=Path(__file__).parents[1])
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


def accumulated(scenes, pairs, **settings):
    "An accumulator that has seen some of the pairs, with a random φ for each scene."
    sums = IDAccumulator(index_scenes(scenes), [1, 2], **settings)
    phi = np.random.default_rng(0).normal(size=(len(scenes), 2, 5))
    for rows in sums.index.batches(0, 32):
        if sums.index.pair[rows[0]] in pairs:
            sums.add(rows, phi[rows.start:rows.stop])
    return sums


@pytest.mark.parametrize("protocol", ["paper", "released"])
def test_two_halves_merged_equal_one_extraction(protocol):
    "Also where both halves have pairs of the same object; whatever the order of the two."
    scenes = subsample(squares(), 3)
    settings = dict(protocol=protocol, pair_layers=[2])
    whole = accumulated(scenes, {0, 1, 2, 3}, **settings)
    for first, second in (({0, 1}, {2, 3}), ({1, 3}, {0, 2}), (set(), {0, 1, 2, 3})):
        merged = accumulated(scenes, first, **settings).merge(accumulated(scenes, second, **settings))
        one, both = whole.finish(TEMPLATE), merged.finish(TEMPLATE)
        assert np.allclose(one.table, both.table, rtol=0, atol=1e-12) and np.array_equal(one.counts, both.counts)
        assert np.array_equal(one.pair_ids, both.pair_ids) and merged.done == len(scenes)


def test_merging_does_not_change_what_was_merged():
    scenes = subsample(squares(sizes=(224,)), 2)
    part, empty = accumulated(scenes, {0, 1}), accumulated(scenes, set())
    before = part.sums["table"].copy()
    empty.merge(part).merge(accumulated(scenes, {2, 3}))
    assert np.array_equal(part.sums["table"], before) and part.done == len(scenes) // 2


def test_what_cannot_be_merged_or_finished_is_refused():
    scenes = subsample(squares(sizes=(224,)), 2)
    part = accumulated(scenes, {0, 1})
    with pytest.raises(ValueError, match="both extractions have seen the same pair"):
        part.merge(accumulated(scenes, {1, 2}))
    with pytest.raises(ValueError, match="other scenes, layers or protocols"):
        part.merge(accumulated(scenes, {2, 3}, protocol="released"))
    with pytest.raises(ValueError, match="2 of 4 pairs were not added"):
        part.finish(TEMPLATE)
    begun = IDAccumulator(part.index, [1, 2])
    begun.add(range(3), np.zeros((3, 2, 5)))
    with pytest.raises(ValueError, match="in the middle of a pair"):
        part.merge(begun)
    with pytest.raises(ValueError, match="2 scenes of pair .* were not added"):
        begun.add(range(5, 30), np.zeros((25, 2, 5)))


def test_an_accumulator_goes_on_from_its_file(tmp_path):
    scenes, path = subsample(squares(sizes=(224,)), 2), tmp_path / "sums"
    part, again = accumulated(scenes, {0, 1}), IDAccumulator(index_scenes(scenes), [1, 2])
    again.load(path, {"prompt": "a"})
    assert again.done == 0, "there is no file yet"
    part.save(path, {"prompt": "a"})
    again.load(path, {"prompt": "a"})
    assert again.done == part.done and all(np.array_equal(array, again.sums[k]) for k, array in part.sums.items())
    with pytest.raises(ValueError, match="another extraction .different prompt"):
        again.load(path, {"prompt": "b"})


def test_sums_do_not_grow_with_images():
    def size(scenes):
        sums = IDAccumulator(index_scenes(scenes), [1, 2], pair_layers=[1])
        sums.add(range(1), np.zeros((1, 2, 8), np.float32))
        return sum(array.nbytes for array in sums.sums.values())
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
    "Every rule finds its number, or the file says why there is none; intervals contain values; layers follow the rule."
    root = Path(__file__).parents[1]
    found = json.loads((root / "results" / "llava-tiny" / "03_extraction.json").read_text())
    rules = [claim["rule"] for claim in json.loads((root / "nbs" / "claims.json").read_text()) if claim["rule"]]
    rules = [rule for rule in rules if rule["notebook"] == "03_extraction"]
    for key in (part["key"] for rule in rules for part in rule.get("all", [rule])):
        one = found["claims"][key.removeprefix("claims.")]
        assert one.get("not_judged") or one["low"] <= one["value"] <= one["high"], key
    layer = found["layer"]
    assert layer["rule"] == "grid score" and {layer["best"], layer["most_variance"]} <= set(layer["candidates"])
    assert not set(layer["chosen_on"]) & set(layer["reported_on"])
    assert len(layer["chosen_on"]) <= len(layer["reported_on"])
    for one in found["by_layer"].values():
        assert one["r2"]["value"] == pytest.approx(one["linear_x"]["value"] + one["linear_y"]["value"])
        assert one["grid_score"]["value"] == pytest.approx(min(one["linear_x"]["value"], one["linear_y"]["value"]))
    assert set(found["slots"]) == set(found["by_layer"])
    second = SpatialIDs.load(root / "results" / "llava-tiny" / "spatial_ids_second.safetensors")
    assert second.slot == "second" and list(map(str, second.layers)) == list(found["slots"])


# --- the parts of the notebook's experiment

def test_layers_and_objects_are_split_into_halves():
    assert extraction.middle_layers(8) == [3, 4, 5, 6] and extraction.middle_layers(30) == list(range(8, 23))
    assert extraction.split_objects(list("abcde")) == (["b", "d"], ["a", "c", "e"])
    assert extraction.split_objects(list("abcd")) == (["a", "c"], ["b", "d"])
    assert extraction.nested_choices(10) == ([3, 5, 8, 10], 8) and extraction.nested_choices(3) == ([3], 3)
    assert extraction.nested_choices(6) == ([3, 5, 6], 6) and extraction.nested_choices(9) == ([3, 5, 8, 9], 8)


def test_a_checkpoint_has_another_file_for_other_settings():
    path = extraction.checkpoint_path("main", seed=0, sizes=[1])
    assert path == extraction.checkpoint_path("main", sizes=[1], seed=0) and path.name.startswith("03_main_")
    assert path != extraction.checkpoint_path("main", seed=1, sizes=[1]) != extraction.checkpoint_path("prompt", seed=1)


def test_words_are_the_same_in_both_orders(double):
    "Means over the two orders and over the pairs of each object; centred words are opposite to each other."
    ids = extract(double, subsample(squares(PAIRS, sizes=(224,)), 2), progress=False)
    raw = extraction.words_of_objects(double, ids, 2)
    assert raw.shape == (3, 4, ids.table.shape[-1]) and raw.dtype == np.float64
    question = "Is the {subject} to the {right} or {left} of the {object}?"
    by_hand = []
    for a, b in [pair for pair in PAIRS if pair[1] == "cup"]:
        words = {"subject": b, "object": a, "left": "left", "right": "right"}
        for text in (question, question.replace("{right} or {left}", "{left} or {right}")):
            run = double.run([Query(None, text, words)], layers=[2], at="left")
            by_hand.append(run.residuals[2][0, 0].numpy())
    assert np.allclose(raw[ids.objects.index("cup"), 0], np.mean(by_hand, axis=0), atol=1e-10)
    centred = extraction.within_question(raw)
    assert np.allclose(centred[:, 0], -centred[:, 1]) and np.allclose(raw[:, 2] - raw[:, 3], 2 * centred[:, 2])


def test_margins_of_words():
    "A word on the leftmost column is all the way at it; one halfway between the columns at neither."
    ids = random_ids(objects=4, noise=0)
    at = ids.at(1)
    middle = at.mean((0, 1))
    words = np.stack([np.stack([at[:, 0].mean(0), middle, middle, middle])] * 4)
    margins = extraction.word_margins(ids, words, 1)
    assert margins["left"]["value"] == pytest.approx(1) and margins["right"]["value"] == pytest.approx(0, abs=1e-6)
    assert extraction.nearer(5.0, 0.0, 3.0) == -1 and margins["left"]["n"] == 4


def test_words_apart_in_units_of_unrelated_words():
    "Left and right three units apart along h, two unrelated pairs one and seven: root mean square five."
    ids = random_ids(objects=4, noise=0)
    h = orthonormal(ids.axes(1))[0]
    def words(*along): return np.stack([np.stack([x * h for x in along])] * 4)
    found = extraction.apart_over_unrelated(ids, words(-1, 2, 0, 0), words(0, 1, 8, 1), 1)
    assert found["value"] == pytest.approx(3 / 5) and found["n"] == 4
    assert extraction.apart_over_unrelated(ids, words(2, -1, 0, 0), words(0, 1, 8, 1), 1)["value"] < 0


def ids_with_pairs(k=6, noise=0.5, sizes=(74, 224)):
    "IDs of k objects whose table and pairs agree, at one layer."
    names, pairs, of_pair, _ = pair_ids_of(k, d=8, seed=1)
    of_pair = of_pair.reshape(len(pairs), 1, 4, 4, 8)
    table = np.stack([np.mean([of_pair[i] for i, p in enumerate(pairs) if p[1] == name], axis=0) for name in names])
    by_size = np.stack([table + noise * i for i in range(len(sizes))], axis=1) * np.linspace(1, 2, 16).reshape(4, 4, 1)
    provenance = {"model": "tiny", "organism": True, "params": {"images": 7}}
    return SpatialIDs(by_size, np.ones((k, len(sizes), 4, 4), int), names, list(sizes), [1], pairs, TEMPLATE,
                      pair_ids=of_pair, pair_layers=[1], provenance=provenance)


def test_subsets_on_the_axes_of_the_first_objects():
    ids = ids_with_pairs()
    subsets = extraction.PairSubsets(ids, 1, 4)
    some = [("o0", "o1", "o5"), ("o2", "o3", "o4")]
    basis = orthonormal(grid_axes(ids.of_pairs(1, ids.objects[:4])))
    for subset, xy, share in zip(some, subsets.coordinates(some), subsets.variance(some)):
        flat = ids.of_pairs(1, subset).reshape(16, 8)
        centred = flat - flat.mean(0)
        assert np.allclose(xy, flat @ basis.T)
        assert share == pytest.approx(((centred @ basis.T)**2).sum() / (centred**2).sum())
    assert np.allclose(subsets.cosine_to_rest(some), subsets.cosine(some, some[::-1]))
    assert subsets.nearest_column([subsets.reference])[0] == 1
    assert set(subsets.measured(3)) == {"variance", "cosine_to_all", "nearest_column", "cosine_to_rest"}
    assert "cosine_to_rest" not in subsets.measured(4) and subsets.measured(3)["variance"]["low"] >= 0


def slow_measures(ids, names, n, n_reference):
    "Mean over the choices of n of some objects of every measure of Figure A18, from the IDs of pairs in float64."
    of = lambda some: ids.of_pairs(1, some).reshape(16, -1)
    basis = orthonormal(grid_axes(of(names[:n_reference]).reshape(4, 4, -1)))
    rows = []
    for some in choices(names, min(n, len(names))):
        one, rest = of(some), [name for name in names if name not in some]
        centred = one - one.mean(0)
        nearest = extraction.nearest_column(one @ basis.T, of(names[:n_reference]) @ basis.T)
        row = {"variance": ((centred @ basis.T)**2).sum() / (centred**2).sum(), "nearest_column": nearest,
               "cosine_to_all": cosines(one, of(names)).mean()}
        rows.append(row | ({"cosine_to_rest": cosines(one, of(rest)).mean()} if len(rest) > 1 else {}))
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("n", [3, 5, 6])
def test_an_object_left_out_is_left_out_everywhere(n):
    "Intervals of Figure A18: jackknife over objects, each deleted from choices, axes and what they are compared with."
    ids = ids_with_pairs()
    names, found = ids.objects, extraction.PairSubsets(ids, 1, 5).measured(n)
    slow = [slow_measures(ids, names, n, 5)]
    for name in names:
        others = [other for other in names if other != name]
        slow.append(slow_measures(ids, others, n, 5 - (name in names[:5])))
    assert ("cosine_to_rest" in found) == (n == 3)
    for key, one in found.items():
        expected = around([each[key] for each in slow], 0.0 if key in ("variance", "nearest_column") else -1.0)
        assert one["n"] == 6
        for end in ("value", "low", "high"): assert one[end] == pytest.approx(expected[end], abs=1e-12), (key, end)


def test_designs_are_compared_on_the_objects_of_both():
    "Of itself a cosine of 1 and one score; of IDs turned along x the cosine of h turns; other objects do not count."
    ids = random_ids(objects=5, noise=0.5)
    same = extraction.compare_designs(ids, ids, 1)
    assert same["cells"]["value"] == pytest.approx(1) and same["grid_score"] == same["other_grid_score"]
    assert same["grid_score"]["value"] == pytest.approx(ids.statistics(1, n_null=9)["grid_score"]["value"])
    assert same["grid_score"]["low"] == pytest.approx(ids.statistics(1, n_null=9)["grid_score"]["low"])
    mirrored = replace(ids, table=ids.table[..., ::-1, :])
    assert extraction.compare_designs(ids, mirrored, 1)["x"]["value"] == pytest.approx(-1)
    fewer = replace(ids, table=ids.table[:3], objects=ids.objects[:3])
    compared = extraction.compare_designs(ids, fewer, 1)
    assert compared["cells"]["value"] == pytest.approx(1) and compared["cells"]["n"] == 3
    with pytest.raises(ValueError, match="no object in common"):
        extraction.compare_designs(ids, replace(fewer, objects=list("xyz")), 1)


def test_what_an_extraction_took():
    ids = replace(random_ids(objects=3), provenance={"params": {"images": 1200}})
    rings = replace(ids, provenance={"params": {"images": 96, "passes": 96, "reliability": 0.991}})
    assert extraction.cost_of(ids) == {"objects": 3, "pictures": 1200, "passes": 1200,
                                       "words": int(ids.counts.sum()), "reliability": None}
    table = extraction.cost_table({"pairs": extraction.cost_of(ids), "rings": extraction.cost_of(rings)}).splitlines()
    assert len(table) == 4 and table[2].endswith("| – |") and table[3].endswith("| 0.991 |") and "1,200" in table[2]


def test_a_coordinate_begins_where_it_stays_above_its_null():
    lows = [0.2, 0.0, 0.3, 0.4, 0.0]
    by_layer = {layer: {"linear_x": {"low": low, "null_high": 0.1}} for layer, low in enumerate(lows, 1)}
    assert extraction.onset(by_layer, "linear_x") == 3 and extraction.onset(by_layer, "linear_x", 1) == 1
    assert extraction.onset(by_layer, "linear_x", 3) is None
    by_layer[3]["linear_x"]["low"] = None
    assert extraction.onset(by_layer, "linear_x") is None


def test_ids_compared_with_themselves_are_at_home():
    ids = ids_with_pairs()
    same = extraction.compare_ids(ids, ids, 1, 224, 224)
    assert same["nearest_column"]["value"] == 1 and same["cosine"] == pytest.approx(1)
    assert same["variance"]["value"] == pytest.approx(ids.statistics(1, 224)["total"]["value"])
    assert extraction.compare_ids(ids, ids, 1, 224, 74)["nearest_column"]["value"] < 1
    found = extraction.size_invariance(ids, 1, 224)
    shares = [extraction.compare_ids(ids, ids, 1, 224, size)["variance"]["value"] for size in (224, 74)]
    assert found["drop"]["value"] == pytest.approx(shares[0] - shares[1])


def number(value, low=None, high=None, n=5):
    return {"value": value, "low": low, "high": high, "n": n}


def test_claims_say_what_cannot_be_judged():
    held_out = {key: {**number(0.6, 0.4, 0.8), "null_high": 0.55} for key in ("linear_x", "linear_y", "r2", "total")}
    found = extraction.grid_claims({**held_out, "cosine": number(-0.2, -0.3, -0.1)})
    assert found["variance_over_half_and_null"]["low"] == pytest.approx(0.4 - 0.55)
    assert found["axis_cosine"]["value"] == pytest.approx(0.2) and found["grid_score_over_null"]["n"] == 5
    scaling = {6: {"variance": number(0.7), "nearest_column": number(1.0)}}
    few = extraction.pair_claims(scaling, None, 3)
    assert few["variance_6_pairs"]["value"] == 0.7
    assert "20 pairs take 5 objects" in few["variance_20_pairs"]["not_judged"]
    assert few["invariance_cosine"]["value"] is None and few["pairs_nearest_cell"]["value"] == 1
    by_size = {74: {"variance": number(0.5)}, 124: {"variance": number(0.9)}, 224: {"variance": number(0.4)}}
    invariance = {"drop": number(0.1), "nearest_column": number(0.8)}
    assert extraction.size_claims(by_size, invariance, 124)["size_variance_min"]["value"] == 0.4
    one = extraction.size_claims({74: by_size[74]}, invariance, 74)
    assert all("one size of object" in claim["not_judged"] for claim in one.values()) and len(one) == 3
    assert extraction.less(number(0.5), 0.1) == {"value": 0.4, "low": None, "high": None, "n": 5}


def test_tables_have_a_line_for_each_row():
    table = extraction.numbers_table({6: {"variance": number(0.5, 0.25, 0.75), "cosine": 0.123}, 90: {"cosine": 1.0}})
    assert table.splitlines() == ["6   variance 0.50 [0.25, 0.75], cosine 0.12", "90  cosine 1.00"]
    statistics = {"r2": {**number(0.5), "null_mean": 0.1, "null_high": 0.2, "p": 0.001}}
    assert "r2  " in (table := extraction.statistics_table(statistics)) and "95 % below 0.20" in table


def test_figures_show_what_they_say():
    from matplotlib.figure import Figure
    ids = ids_with_pairs()
    by_layer, subsets = {1: ids.statistics(1, n_null=20)}, extraction.PairSubsets(ids, 1, 6)
    compared, slots = extraction.compare_ids(ids, ids, 1), {1: compare_slots(ids, replace(ids, slot="second"), 1)}
    scaling = {30: subsets.measured(6)}
    figures = [Figure() for _ in range(7)]
    extraction.plot_layers(figures[0], ids, by_layer, 1)
    extraction.plot_layer_curves(figures[1], by_layer, 1)
    extraction.plot_pairs(figures[2], subsets, [3, 6], scaling)
    extraction.plot_prompts(figures[3], {"a": ids, "b": ids}, {"a": compared, "b": compared}, 1)
    extraction.plot_slots(figures[4], slots, ids, ids, 1)
    extraction.plot_sizes(figures[5], ids, {74: compared, 224: compared}, 1, 224)
    extraction.plot_designs(figures[6], {1: extraction.compare_designs(ids, ids, 1)}, 1)
    assert [len(figure.axes) for figure in figures] == [8, 3, 3, 2, 3, 3, 2]
    assert "layer 1, chosen" in figures[0].axes[0].get_title() and not figures[0].axes[1].axison
    ax = Figure().subplots()
    extraction.plot_figure5(ax, ids, 1, by_layer[1], {"left": (-99.0, 0.0), "right": (0.5, 0.0)})
    labels = [text.get_text() for text in ax.texts]
    assert any(label.startswith("left (×") for label in labels) and "right" in labels
    assert "tiny (organism, 6 objects, 7 images), layer 1 of 1" in ax.get_title()


# --- several processes

def test_parts_are_whole_pairs_and_all_of_them():
    index = index_scenes(subsample(squares(), 2))
    for world in (1, 2, 4, len(index.pairs)):
        parts = [extraction.Part(rank, world).scenes(index) for rank in range(world)]
        assert [i for part in parts for i in part] == list(range(len(index.pair)))
        for part in parts[1:]: assert index.pair[part.start] != index.pair[part.start - 1]
        batches = [list(rows) for part in parts for rows in index.batches(part.start, 7, part.stop)]
        assert batches == [list(rows) for rows in index.batches(0, 7)]
    with pytest.raises(ValueError, match="9 processes for 4 pairs of objects: start at most one"):
        extraction.Part(0, 9).scenes(index)
    assert extraction.Part(1, 2).file("c.safetensors") == "c.safetensors.2of2" and extraction.Part().file("c") == "c"


def test_rings_are_read_by_one_process(monkeypatch):
    monkeypatch.setattr(extraction, "this_part", lambda: extraction.Part(0, 2))
    with pytest.raises(ValueError, match="one process reads rings, in a minute: start it without torchrun"):
        extraction.extract_rings(None, [], "{subject} {object}")


PARTS = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_extraction import *
class Counted(VLM):
    def run(self, queries, *args, **kwargs):
        with open({folder!r} + "/images." + os.environ["RANK"], "a") as f: f.write("x" * len(queries))
        if os.environ["RANK"] == {killed!r} and os.path.getsize({folder!r} + "/images." + os.environ["RANK"]) > 40:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({pause})
        return super().run(queries, *args, **kwargs)
ids = extract(Counted(*tiny_llava(), name="tiny"), subsample(squares(), 3), batch_size=16, pair_layers=[2],
              checkpoint={folder!r} + "/c", save_every=0, progress=False)
ids.save({folder!r} + f"/ids.{{os.environ['RANK']}}")
"""


def in_two(folder, killed="", pause=0):
    "Runs `PARTS` in two processes of `torchrun`: what they say, and how many pictures each has run so far."
    (folder/"parts.py").write_text(PARTS.format(tests=str(Path(__file__).parent), folder=str(folder), killed=killed,
                                                pause=pause))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launch, folder/"parts.py"], env={**os.environ, "OMP_NUM_THREADS": "1"},
                           cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    return ended, [(folder/f"images.{rank}").stat().st_size for rank in range(2)]


@pytest.mark.slow
def test_two_processes_extract_what_one_does_and_go_on_after_one_was_killed(tmp_path):
    "The same bits as the two parts added in one process; no picture of a kept batch is run twice."
    ended, images = in_two(tmp_path, killed="1", pause=0.2)
    assert ended.returncode and "the same call goes on from" in ended.stderr and "/c.1of2" in ended.stderr
    assert not (tmp_path/"ids.0").exists() and 0 < images[1] < 144
    ended, images = in_two(tmp_path)
    assert ended.returncode == 0, ended.stderr
    scenes, vlm = subsample(squares(), 3), VLM(*tiny_llava(), name="tiny")
    assert sum(images) <= len(scenes) + 3 * 16, "what was kept was run again"
    one, total = IDAccumulator(index_scenes(scenes), vlm_layers(vlm), pair_layers=[2]), None
    for rank in range(2):
        part = extraction.Part(rank, 2)
        sums = IDAccumulator(one.index, one.layers, pair_layers=[2])
        extraction.run_part(sums, vlm, scenes, TEMPLATE, part, None, {"batch_size": 16}, 30, False)
        total = sums if total is None else total.merge(sums)
    alone = total.finish(TEMPLATE)
    for rank in range(2):
        ids = SpatialIDs.load(tmp_path/f"ids.{rank}")
        assert np.array_equal(ids.table, alone.table) and np.array_equal(ids.pair_ids, alone.pair_ids)
        assert ids.provenance["params"]["images"] == len(scenes)


def vlm_layers(vlm): return list(range(1, vlm.n_layers + 1))


def test_the_next_batch_is_drawn_while_the_model_runs():
    "In order, once each, the next one begun before this one is used up; what fails is raised."
    begun = [threading.Event() for _ in range(4)]
    def draw(k):
        assert not begun[k].is_set()
        begun[k].set()
        return -k
    found = []
    for k, made in ahead(draw, range(4)):
        found.append((k, made))
        assert k == 3 or begun[k + 1].wait(20)
    assert found == [(k, -k) for k in range(4)]
    with pytest.raises(ZeroDivisionError): list(ahead(lambda k: 1 // k, [2, 1, 0]))
