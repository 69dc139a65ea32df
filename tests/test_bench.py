"The benchmark measures what it says: all ways give the same logits, counts are right, a few cells can stand for all."
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spatialid import bench
from spatialid.hooks import VLM


@pytest.fixture(scope="module")
def small(): return bench.in_float64(bench.llava_shaped(64, 3, width=64))


def logits(work): return {way: bench.run_way(way, work, work.cells)[0] for way in bench.ways_of(work)}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", [*bench.WORK])
def test_all_ways_give_the_same_logits(small, kind, n):
    work = bench.WORK[kind](small, n)
    found = logits(work)
    assert set(found) >= {"full_forward", "ours"} and ("released" in found) == (kind == "mirror")
    assert all(set(one) == set(work.cells) for one in found.values())
    assert bench.logit_difference(found) < 1e-11
    clean = bench.forward(small, work.inputs(work.base), {})
    assert all((found["ours"][cell] - clean).abs().max() > 1e-6 for cell in work.cells if cell[1] < small.n_layers), "an edit that changes nothing tests nothing"


def test_norms_do_not_round(small):
    work = bench.mirror_work(small)
    def nudge(h): h[:, work.groups["objects"]] += 1e-11
    moved = bench.forward(small, work.inputs(work.base), {1: nudge}) - bench.forward(small, work.inputs(work.base), {})
    assert 0 < moved.abs().max() < 1e-9


def test_a_difference_is_seen(small):
    work = bench.mirror_work(small)
    found = logits(work)
    found["ours"]["text", 2] = found["ours"]["text", 2] + 1e-3
    assert bench.logit_difference(found) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("image_tokens, blocks", [(64, 3), (144, 2)])
def test_shape(image_tokens, blocks):
    vlm = bench.load(f"llava-shaped-{image_tokens}x{blocks}")
    assert len(vlm.positions(bench.queries(vlm, 1)[0], "image")) == image_tokens and vlm.n_layers == blocks
    assert not vlm.organism


def test_same_seed_same_model():
    a, b, c = (bench.llava_shaped(64, 2, width=32, seed=s).weight_hash for s in (0, 0, 1))
    assert a == b != c


def test_counts(small):
    work = bench.mirror_work(small)
    T, text = len(small.tokens(work.base[0])), len(small.positions(work.base[0], "text"))
    first = min(small.positions(work.base[0], "objects"))
    assert {name: bench.recomputed(work, name) for name in work.edits} == {"image": text, "text": text, "objects": T - first}
    counts = bench.forward_equivalents(work)
    assert (counts["released"], counts["full_forward"], counts["nnsight"]) == (27, 11, 11)
    assert counts["ours"] == pytest.approx(2 + (text + text + T - first) / T * (2 + 1 + 0) / 3)
    steering = bench.forward_equivalents(bench.steering_work(small, ids=4))
    assert "released" not in steering and steering["full_forward"] == 13
    assert steering["ours"] == pytest.approx(1 + 4 * (T - first) / T)


def test_attention_counts_in_narrow_models_only(small):
    assert bench.row_weight(29, 609, 128, 12 * 128**2) > 1.2 and bench.row_weight(29, 609, 4096, 12 * 4096**2) < 1.02
    assert bench.row_weight(609, 609, 128, 12 * 128**2) == pytest.approx(1), "all rows are average"
    work = bench.mirror_work(small)
    assert bench.forward_equivalents(work, attention=True)["ours"] > bench.forward_equivalents(work)["ours"]


def test_a_seven_billion_model_costs_four_passes():
    work = bench.mirror_work(bench.llava_shaped(576, 32, width=32))
    counts = bench.forward_equivalents(work)
    assert counts["released"] == 288 and 3.5 < counts["ours"] < 4.5


def test_time_of_some_cells_stands_for_all():
    assert bench.total(np.array([2., 1, 3]), 10) == 22
    assert bench.total(np.array([2., 1, 3]), 2) == 6
    assert bench.spread([*range(9)], 3) == [0, 4, 8] and bench.spread([1, 2], 5) == bench.spread([1, 2], None) == [1, 2]


def test_sweep_times(small):
    found = bench.sweep_times(bench.mirror_work(small), 2)
    assert found["cells"] == found["cells_timed"] == 9 and found["rounds"] == 2 and found["scaling_error"] >= 0
    for way, name in bench.NAMES.items():
        if way in found["seconds"]: assert found[name] == found["intervals"][name]["value"] > 0
    assert found["theory"] == pytest.approx(27 / found["forward_equivalents"]["ours"])
    json.dumps(found)


def test_without_nnsight(small, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    work = bench.mirror_work(small)
    assert "nnsight" not in bench.ways_of(work) and bench.nnsight_version() is None
    assert bench.sweep_times(work, 1, 3)["nnsight_over_ours"] is None


def test_growth(monkeypatch):
    monkeypatch.setattr(bench, "ways_of", lambda work: ["full_forward", "ours"])
    small, large = bench.growth("mirror", [(16, 2), (64, 2)], rounds=1, n_cells=2, progress=False)
    assert small["theory"]["full_forward_over_ours"] < large["theory"]["full_forward_over_ours"]
    assert large["full_forward_over_ours"]["value"] > 0


def test_memory_is_measured_in_a_process_of_its_own():
    found = bench.way_memory("steering", "llava-tiny", 1, ["ours"])["ours"]
    assert 0 <= found["over_forward"] == found["peak"] - found["before"] < 2e9


def test_a_failed_measurement_says_why(monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=1, stderr="Traceback\nMemoryError: full"))
    with pytest.raises(RuntimeError, match="--way ours failed: MemoryError: full"): bench.in_a_process("--way", "ours")


@pytest.mark.skipif(not importlib.util.find_spec("nnsight"), reason="nnsight is not installed")
def test_nnsight_leaves_the_model_alone(small):
    work = bench.mirror_work(small)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small.model.modules()]
    bench.run_way("nnsight", work, work.cells[:2])
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small.model.modules()] == before
    assert all(a is not b for a, b in zip(small.model.parameters(), work.traced._module.parameters()))


def test_numbers_are_merged_into_the_file(tmp_path):
    vlm = VLM.load("llava-tiny")
    bench.write_bench({"mirror_sweep": {"theory": 1.0}}, vlm)
    path = bench.write_bench({"steering_sweep": {"theory": 2.0}}, vlm)
    stored = json.loads(path.read_text())
    assert stored["mirror_sweep"] and stored["steering_sweep"] and "nnsight" in stored["versions"] and stored["machine"]["cores"]
