"The benchmark measures what it says: all ways give the same logits, counts are right, a few cells can stand for all."
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from spatialid import bench
from spatialid.hooks import VLM


@pytest.fixture(scope="module")
def small(): return bench.in_float64(bench.llava_shaped(64, 3, width=64))


def logits(work): return {way: bench.run_way(way, work, work.cells)[0] for way in bench.ways_of(work)}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", [*bench.WORK])
def test_all_ways_give_the_same_logits(small, kind, n):
    work = bench.WORK[kind](small, n)
    by_way = logits(work)
    assert set(by_way) >= {"full_forward", "ours"} and ("released" in by_way) == (kind == "mirror")
    assert all(set(by_cell) == set(work.cells) for by_cell in by_way.values())
    assert bench.logit_difference(by_way) < 1e-11
    clean = bench.forward(small, work.inputs(work.base), {})
    before_last = [cell for cell in work.cells if cell[1] < small.n_layers]
    changes = [(by_way["ours"][cell] - clean).abs().max() for cell in before_last]
    assert min(changes) > 1e-6, "an edit that changes nothing tests nothing"


def test_norms_do_not_round(small):
    work = bench.mirror_work(small)
    def nudge(h): h[:, work.groups["objects"]] += 1e-11
    moved = bench.forward(small, work.inputs(work.base), {1: nudge}) - bench.forward(small, work.inputs(work.base), {})
    assert 0 < moved.abs().max() < 1e-9


def test_a_difference_is_seen(small):
    work = bench.mirror_work(small)
    by_way = logits(work)
    by_way["ours"]["text", 2] = by_way["ours"]["text", 2] + 1e-3
    assert bench.logit_difference(by_way) == pytest.approx(1e-3, rel=1e-6)


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
    rows = {name: bench.recomputed(work, name) for name in work.edits}
    assert rows == {"image": text, "text": text, "objects": T - first}
    counts = bench.forward_equivalents(work)
    assert (counts["released"], counts["full_forward"], counts["nnsight"]) == (27, 11, 11)
    assert counts["ours"] == pytest.approx(2 + (text + text + T - first) / T * (2 + 1 + 0) / 3)
    steering = bench.forward_equivalents(bench.steering_work(small, ids=4))
    assert "released" not in steering and steering["full_forward"] == 13
    assert steering["ours"] == pytest.approx(1 + 4 * (T - first) / T)
    over = bench.over_counts(counts, ["released", "full_forward", "ours"])
    assert over["released_over_ours"] == 27 / counts["ours"] and list(over) == list(bench.NAMES.values())[:2]
    assert f"image {text}, text {text}, objects {T - first} | 27 | 11 | 11 |" in bench.counts_table([work])


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


def test_ratios_are_medians_over_rounds():
    work = SimpleNamespace(cells=[0, 1])
    seconds = {"full_forward": [np.array([0., 2, 2]), np.array([0., 3, 3]), np.array([0., 9, 9])],
               "ours": [np.array([0., 1, 1])] * 3}
    over = bench.ratios(work, seconds)
    assert list(over) == ["full_forward_over_ours"] and over["full_forward_over_ours"]["value"] == 3
    assert over["full_forward_over_ours"]["n"] == 3


def test_scaling_error_is_of_the_estimated_time():
    work = SimpleNamespace(cells=["a", "b", "c"])
    rounds = [np.array([1., 2, 6, 2])] # 1 once, then three cells: 11 seconds, and 7 by the first and the last cell
    assert bench.scaling_error(work, {"full_forward": rounds, "ours": []}, 2) == pytest.approx(1 - 7 / 11)


@pytest.fixture(scope="module")
def numbers(small): return bench.sweep_times(bench.mirror_work(small), 2)


@pytest.mark.slow
def test_sweep_times(numbers):
    assert numbers["cells"] == numbers["cells_timed"] == 9 and numbers["rounds"] == 2 and numbers["scaling_error"] >= 0
    for way, name in bench.NAMES.items():
        if way in numbers["seconds"]: assert numbers[name] == numbers["intervals"][name]["value"] > 0
    assert numbers["theory"] == pytest.approx(27 / numbers["forward_equivalents"]["ours"])
    json.dumps(numbers)


def test_the_table_of_a_sweep_has_a_row_for_each_way(numbers):
    whole = {**numbers, "max_logit_difference_float64": 1e-14, "memory": None}
    ways = [way for way in numbers["seconds"] if way != "nnsight"]
    whole["seconds"] = {way: numbers["seconds"][way] for way in ways}
    text = bench.sweep_table(whole)
    assert "1.0e-14 in float64" in text and "| (c) nnsight | not installed: `pip install nnsight==0.8.1` |" in text
    assert text.count("\n| (") == 4 and f"{numbers['full_forward_over_ours']:.1f} [" in text
    assert bench.sweep_tables({**whole, "other_models": {"tiny": whole}}).count("(d) ours") == 2


def test_scaling_errors_are_of_sweeps_timed_whole():
    whole = {"model": "tiny", "scaling_error": 0.02}
    sweep = {"model": "large", "scaling_error": None, "other_models": {"tiny": whole}}
    assert bench.scaling_errors({"mirror": sweep}) == {"mirror, tiny": 0.02}


def made_sweep():
    "Numbers of a sweep as `results/bench.json` has them."
    estimate = {"value": 4.0, "low": 3.5, "high": 4.5, "n": 3}
    names = ("released_over_ours", "full_forward_over_ours")
    counts = dict.fromkeys(("theory", "theory_with_attention"), dict.fromkeys(names, 5.0))
    numbers, shapes = {**dict.fromkeys(names, estimate), **counts}, ((4, 8), (16, 8), (16, 2))
    growth = [{"image_tokens": tokens, "blocks": blocks, **numbers} for tokens, blocks in shapes]
    seconds = {"released": 4.0, "full_forward": 4.0, "ours": 1.0}
    return {"cells": 9, "seconds": seconds, "intervals": dict.fromkeys(names, estimate), "growth": growth}


def test_the_figure_of_sweeps_has_bars_and_curves():
    fig = Figure()
    bench.plot_sweeps(fig, {"mirror": made_sweep(), "steering": made_sweep()})
    bars, _, by_tokens, by_depth = fig.axes
    assert [bar.get_height() for bar in bars.patches] == [4, 4, 1]
    assert by_tokens.get_title() == "against image tokens, 8 blocks"
    assert by_depth.get_title() == "against depth, 16 image tokens"
    assert list(by_tokens.lines[0].get_xdata()) == [4, 16] and list(by_depth.lines[0].get_xdata()) == [8, 2]


def test_the_figure_of_extraction_has_a_dot_for_each_round():
    memory = [{"images": n, "before": 2**20, "peak": 2**21} for n in (480, 4800)]
    timing = {"value": 1.5, "seconds": {"extract": [3.0, 4.0], "plain": [2.0, 4.0]}}
    fig = Figure()
    bench.plot_extraction(fig, {"time": timing, "memory": memory})
    assert list(fig.axes[0].lines[0].get_ydata()) == [1.5, 1] and list(fig.axes[1].lines[0].get_ydata()) == [2, 2]
    rows = [{**row, "objects": 90, "table": 3 * 2**19} for row in memory]
    assert "| 4,800 | 90 | 1.5 MiB | 1.0 MiB | 2.0 MiB |" in bench.memory_table(rows)


def test_a_summary_has_the_three_numbers():
    numbers = {"extraction_over_plain_forward": 1.03, "extraction_memory_growth": 1.002}
    text = bench.summary({**numbers, "mirror_sweep": {"released_over_ours": 53.4}})
    assert "1.030 of the time" in text and "1.0020 from" in text and "takes 53 times" in text


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


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    found = bench.way_memory("steering", "llava-tiny", 1, ["ours"])["ours"]
    assert 0 <= found["over_forward"] == found["peak"] - found["before"] < 2e9


def test_a_failed_measurement_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nMemoryError: full")
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: failed)
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
    assert stored == bench.stored_numbers() and stored["mirror_sweep"] and stored["steering_sweep"]
    assert "nnsight" in stored["versions"] and stored["machine"]["cores"]
