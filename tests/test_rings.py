"IDs from rings of objects: balanced pictures, parts found as they were put in, packed as singly, resumed to the bit."
from collections import Counter
from functools import partial

import numpy as np
import pytest

from spatialid import extraction
from spatialid.extraction import RingSums, additive_fit, cell_table, extract, extract_rings, reliability
from spatialid.hooks import VLM
from spatialid.scenes import OBJECTS, RingScenes
from spatialid.sweeps import in_float64
from tiny import tiny


def rings(n, k, m): return RingScenes(OBJECTS[:n], k=k, m=m)


def ring_sums(n=6, m=3, k=3, pictures=None, seed=0):
    "Sums of invented activations with known parts: (sums, the cells' part by slot)."
    scenes = rings(n, k, m)
    g = np.random.default_rng(seed)
    word, cell, other = g.normal(size=(2, n, 4, 5)), g.normal(size=(2, m * m, 4, 5)), g.normal(size=(2, m * m, 4, 5))
    sums = RingSums(scenes.names, m, [1, 2, 3, 4], scenes.round)
    for i in range(pictures or scenes.round):
        scene = scenes[i]
        at = [y * m + x for x, y in scene.cells]
        which = [scenes.names.index(name) for name in scene.names]
        phi = np.empty((k, 2, 4, 5))
        for q in range(k):
            for slot, (a, b) in enumerate(((q, (q + 1) % k), ((q + 1) % k, q))):
                phi[q, slot] = word[slot, which[a]] + cell[slot, at[a]] + other[slot, at[b]]
        sums.add(scene, phi)
    return sums, cell - cell.mean(1, keepdims=True)


def test_a_round_shows_every_object_in_every_cell_once():
    scenes = rings(8, 4, 4)
    for start in (0, 3 * scenes.round):
        shown = [(name, cell) for i in range(scenes.round) for name, cell in zip(scenes[start + i].names,
                                                                                scenes[start + i].cells)]
        assert len(shown) == len({*shown}) == 8 * 16
        for i in range(scenes.round):
            scene = scenes[start + i]
            assert len({*scene.cells}) == len({*scene.names}) == 4
    assert scenes[5].cells == rings(8, 4, 4)[5].cells and scenes[5].cells != scenes[5 + scenes.round].cells
    shown = [each for i in range(4 * scenes.round) for each in zip(scenes[i].names, scenes[i].cells, scenes[i].sizes)]
    assert {*Counter(shown[:128]).values()} == {1} == {*Counter(shown).values()} and len(shown) == 8 * 16 * 4
    for key in (0, 1): # of each object, and in each cell
        assert len({*Counter((each[key], each[2]) for each in shown[:128]).values()}) == 1
    with pytest.raises(ValueError, match="multiple of k"): rings(7, 4, 4)


def part(sums, slot): return [array[slot] for array in sums.values()]


def test_the_parts_of_a_ring_are_found_as_they_were_put_in():
    "Word, cell and the cell of the other, without noise exactly; also before a round is over."
    begun, cell = ring_sums(pictures=17)
    for slot in (0, 1): assert np.abs(additive_fit(*part(begun.now, slot))[1] - cell[slot]).max() < 1e-9
    with pytest.raises(ValueError, match="no round of pictures was finished"): begun.ids(0, "", {})
    sums, cell = ring_sums(pictures=2 * rings(6, 3, 3).round)
    for slot in (0, 1):
        table = cell_table(*part(sums.whole, slot))
        assert np.abs(table - cell[slot]).max() < 1e-9 and np.abs(table.mean(1)).max() < 1e-12
    layer, found = sums.reached([1, 3])
    assert layer in (1, 3) and found == pytest.approx(1)
    few, _ = ring_sums(pictures=5)
    with pytest.raises(ValueError, match="some object was never in some cell"): cell_table(*part(few.now, 0))


def test_the_fit_of_running_sums_is_that_of_all_rows():
    "Least squares on every activation, kept and stacked, in float64."
    scenes, g, rows, values = rings(6, 3, 3), np.random.default_rng(3), [], []
    again = RingSums(scenes.names, 3, [1], scenes.round)
    for i in range(15):
        scene = scenes[i]
        phi = g.normal(size=(3, 2, 1, 2))
        again.add(scene, phi)
        at, which = [y * 3 + x for x, y in scene.cells], [scenes.names.index(name) for name in scene.names]
        for q in range(3):
            row = np.zeros(6 + 9 + 9)
            row[[which[q], 6 + at[q], 15 + at[(q + 1) % 3]]] = 1
            rows.append(row), values.append(phi[q, 0].ravel())
    fitted = np.linalg.lstsq(np.array(rows), np.array(values))[0][6:15]
    assert np.abs(additive_fit(*part(again.now, 0))[1][:, 0] - (fitted - fitted.mean(0))).max() < 1e-9


def test_the_reliability_of_rounds_is_that_of_their_mean():
    "Its root is the correlation of the mean with the truth; of two rounds it is Spearman's and Brown's."
    g = np.random.default_rng(0)
    truth = g.normal(size=(16, 400))
    for noise, n in ((.3, 2), (1., 2), (1., 5)):
        rounds = truth + noise * g.normal(size=(n, *truth.shape))
        found = reliability(rounds.sum(0), (rounds**2).sum(), n)
        with_truth = np.corrcoef(rounds.mean(0).ravel(), truth.ravel())[0, 1]
        assert abs(np.sqrt(found) - with_truth) < .01
        if n > 2: continue
        r = np.corrcoef(*(each.ravel() for each in rounds))[0, 1]
        assert found == pytest.approx(2 * r / (1 + r), abs=2e-3)
    assert reliability(truth, (truth**2).sum(), 1) == 0 and reliability(0 * truth + 1e-9, 2 * (truth**2).sum(), 2) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_rings_end_when_they_are_reliable_and_go_on_from_a_checkpoint(family, tmp_path, monkeypatch):
    "Packed where the family allows it; both give the same IDs as asking singly."
    vlm = in_float64(VLM(*tiny(family)))
    scenes = RingScenes(OBJECTS[:4], k=4, m=2, px=16, sizes=(100,))
    found = extract_rings(vlm, scenes, target=2., most=8, at_once=3)
    params = found["second"].provenance["params"]
    assert params["images"] == 8 and params["passes"] == (8 if family == "llava" else 32)
    assert found["first"].slot == "first" and found["first"].table.shape == (4, 1, vlm.n_layers, 2, 2, vlm.width)
    queries = [scenes[i].queries() for i in range(8)]
    singly = RingSums(scenes.names, 2, list(range(1, vlm.n_layers + 1)), scenes.round)
    for i, of_scene in enumerate(queries):
        run = vlm.run(of_scene, layers=singly.layers, at=("subject", "object"))
        singly.add(scenes[i], np.stack([run.residuals[layer] for layer in singly.layers], 2))
    for slot, name in enumerate(("first", "second")):
        assert np.abs(singly.ids(slot, "", {}).table - found[name].table).max() < 1e-5
    assert extract_rings(vlm, scenes, target=-1., most=8)["first"].provenance["params"]["images"] == scenes.round
    calls, plain = [], extraction.capture_shared
    def stops(*given):
        calls.append(given)
        if len(calls) == 2: raise KeyboardInterrupt
        return plain(*given)
    monkeypatch.setattr(extraction, "capture_shared", stops)
    kept = dict(target=2., most=8, at_once=3, checkpoint=tmp_path / "ring")
    with pytest.raises(KeyboardInterrupt, match="goes on from"): extract_rings(vlm, scenes, **kept)
    again = extract_rings(vlm, scenes, **kept)
    assert all(np.array_equal(again[name].table, found[name].table) for name in found)
    other = RingScenes(OBJECTS[:4], k=4, m=2, px=16, sizes=(100,), seed=1)
    with pytest.raises(ValueError, match="belongs to another extraction"): extract_rings(vlm, other, **kept)


def test_extract_takes_rings_too(monkeypatch):
    "As `extract_rings`, of one slot."
    vlm, scenes = VLM(*tiny("llava")), RingScenes(OBJECTS[:4], k=4, m=2, px=16, sizes=(100,))
    monkeypatch.setattr(extraction, "extract_rings", partial(extract_rings, most=4))
    found = extract(vlm, scenes, layers=[1], slot="second")
    assert found.slot == "second" and found.layers == [1] and found.provenance["params"]["images"] == 4
    with pytest.raises(ValueError, match="slot"): extract(vlm, scenes, slot="third")
    for unknown in ({"protocol": "released"}, {"pair_layers": [1]}):
        with pytest.raises(ValueError, match="rings have no pairs of their own"): extract(vlm, scenes, **unknown)
