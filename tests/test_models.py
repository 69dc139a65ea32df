"Models side by side: checkpoints are the states of a run, a trace goes on where it stopped, correlations are Spearman's."
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from test_organisms import TINY

from spatialid.store import save_results
from spatialid import models
from spatialid.hooks import VLM
from spatialid.models import checkpoints, main, measured, point, rank_correlation, restored, trace, weights_of
from spatialid.organisms import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short training run under the name of a recipe."
    out = tmp_path_factory.mktemp("run")
    train("llava-tiny", out, TINY, every=2)
    return out


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(models.RECIPES, "llava-tiny", TINY)
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))


@pytest.mark.slow
def test_checkpoints_are_the_states_of_the_run(run, tiny):
    found = checkpoints("llava-tiny", run, every=2)
    assert [(e["stage"], e["step"]) for e in found] == [("place", 2), ("place", 4)], "only stages with relations"
    assert [e["step"] for e in checkpoints("llava-tiny", run, every=3)] == [4], "the last one always"
    vlm, saved = restored("llava-tiny", weights_of(run, found[-1])), load_file(weights_of(run, found[-1]))
    of = dict(vlm.model.named_parameters())
    assert saved and all(torch.equal(of[k], v.float()) for k, v in saved.items())
    assert vlm.weight_hash != restored("llava-tiny", weights_of(run, found[0])).weight_hash


@pytest.mark.slow
def test_a_trace_goes_on_where_it_stopped(run, tiny, monkeypatch):
    asked = []
    def stops(vlm, **options):
        if len(asked) == 1: asked.append("stopped"); raise KeyboardInterrupt
        asked.append(vlm.name)
        return {"accuracy": {"value": 0.5}}
    monkeypatch.setattr(models, "point", stops)
    with pytest.raises(KeyboardInterrupt): trace("llava-tiny", run, every=2)
    path = trace("llava-tiny", run, every=2)
    assert asked == ["llava-tiny place_00002", "stopped", "llava-tiny place_00004"]
    made = json.loads(path.read_text())
    assert [(p["stage"], p["step"]) for p in made["points"]] == [("place", 2), ("place", 4)] and made["provenance"]["params"]["every"] == 2
    assert made["points"][0]["weight_hash"] != made["points"][1]["weight_hash"]
    trace("llava-tiny", run, every=2)
    assert len(asked) == 3


def test_points_are_in_the_order_of_training(run, tiny, monkeypatch):
    monkeypatch.setattr(models, "point", lambda vlm, **options: {"accuracy": {"value": 0.5}})
    steps = lambda path: [p["step"] for p in json.loads(path.read_text())["points"]]
    assert steps(trace("llava-tiny", run, every=4)) == [4]
    assert steps(trace("llava-tiny", run, every=2)) == [2, 4]


@pytest.mark.slow
def test_point_is_what_notebook_04_measures():
    vlm = VLM.load("llava-tiny")
    one = point(vlm, n=12, pairs=2)
    assert one["accuracy"]["n"] == 12 and one["accuracy"]["value"] > 0.8
    assert set(one["strength"]["by_layer"]) == set(range(1, 9)) and 0 < one["strength"]["largest"] < 1
    assert one == point(vlm, n=12, pairs=2) and one["steerability_chosen_on_half"]["n"] == 6


@pytest.mark.parametrize("call, says", [
    (lambda out: checkpoints("lava", out), "no recipe 'lava'"),
    (lambda out: checkpoints("llava-tiny", out / "gone"), "train the organism first"),
    (lambda out: rank_correlation([1, 2], [1, 2]), "2 points"),
])
def test_errors_are_a_sentence(tmp_path, call, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says): call(tmp_path)


def test_no_weights_kept(run, tiny, tmp_path):
    (tmp_path / "log.jsonl").write_text((run / "log.jsonl").read_text())
    with pytest.raises(FileNotFoundError, match="keeps no weights"): trace("llava-tiny", tmp_path)


def test_command_says_what_is_wrong(capsys, tmp_path):
    with pytest.raises(SystemExit) as e: main(["trace", "llava-tiny", "--out", str(tmp_path)])
    assert e.value.code == 2 and "train the organism first" in capsys.readouterr().err


def test_measured_leaves_out_quick_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="spatialid reproduce"): measured()
    for name, quick in (("a", False), ("b", True)):
        save_results(name, "04_steering", {}, {"params": {"quick": quick}})
    assert list(measured()) == ["a"]


def test_rank_correlation_is_spearmans():
    g = np.random.default_rng(0)
    x = g.standard_normal(40)
    y = x + 0.3 * g.standard_normal(40)
    one = rank_correlation(x, y)
    assert one["value"] == pytest.approx(spearmanr(x, y).statistic) and one["low"] < one["value"] < one["high"] and one["p"] < 0.01
    covered = [one["low"] < 0 < one["high"] for i in range(20) for one in [rank_correlation(*np.random.default_rng(i).standard_normal((2, 30)), n=200)]]
    assert 16 <= sum(covered) <= 20
    assert rank_correlation([1, 2, 3, 4], [1, 1, 1, 1])["value"] == 0


def test_a_video_organism_is_no_point_of_fig9(tmp_path):
    from spatialid.models import checkpoints
    with pytest.raises(ValueError, match="onevision-tiny watches videos"): checkpoints("onevision-tiny", tmp_path)
