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

from spatialid.extraction import (SpatialIDs, add_batch, extract, grid_axes, grid_design, grid_null, grid_statistics, index_scenes,
                                  new_state, on_axes, orthonormal, stored_ids, subsample)
from spatialid.hooks import VLM, Query
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
    return h, v, {"total": ((X @ q)**2).sum() / total, "x": share(h), "y": ((X @ q)**2).sum() / total - share(h), "y_alone": share(v),
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


def test_intervals_cover():
    "The 95 % interval of R² holds its mean over fresh draws of ten objects most of the time."
    generator = np.random.default_rng(0)
    h, v = generator.normal(size=(2, 8))
    y, x = np.mgrid[:4, :4]

    def one(seed, draws):
        table = (x[..., None] * h + y[..., None] * v + 3 * np.random.default_rng(seed).normal(size=(10, 1, 1, 4, 4, 8)))
        names = [f"o{i}" for i in range(10)]
        return SpatialIDs(table, np.ones((10, 1, 4, 4), int), names, [224], [1], [("a", b) for b in names], TEMPLATE).statistics(1, n_draws=draws, n_null=2)["r2"]
    truth = np.mean([one(i, 2)["value"] for i in range(300)])
    covered = sum(r["low"] <= truth <= r["high"] for r in (one(1000 + i, 400) for i in range(100)))
    assert 85 <= covered <= 100
    assert one(0, 400)["n"] == 10 and one(0, 400) == one(0, 400)


def test_save_load_round_trip(tmp_path, vlm):
    ids = extract(vlm, subsample(squares(PAIRS[:2], sizes=(224,)), 2), pair_layers=[1, 4], progress=False)
    ids.save(tmp_path / "ids.safetensors")
    back = SpatialIDs.load(tmp_path / "ids.safetensors")
    assert all(np.array_equal(getattr(ids, k), getattr(back, k)) for k in ("table", "counts", "pair_ids", "weights"))
    assert (back.objects, back.layers, back.pairs, back.pair_layers, back.template) == (ids.objects, ids.layers, ids.pairs, [1, 4], TEMPLATE)
    assert back.provenance["weight_hash"] == vlm.weight_hash and back.provenance["params"]["images"] == 60
    small = ids.universal()
    small.save(tmp_path / "small.safetensors")
    assert np.allclose(SpatialIDs.load(tmp_path / "small.safetensors").ids, ids.ids, atol=1e-6)
    assert small.statistics(2)["r2"]["low"] is None and small.counts.sum() == 60


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
        with pytest.raises(KeyboardInterrupt, match=r"stopped after \d+ of 960 images; the same call goes on from"):
            extract(stop_at(n), scenes, batch_size=50, checkpoint=path, progress=False)
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
