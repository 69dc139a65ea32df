"Models side by side: checkpoints are the states of a run, a trace goes on, correlations are Spearman's."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy.stats import spearmanr
from test_organisms import TINY

from spatialid.store import save_results
from spatialid import models, organisms
from spatialid.hooks import VLM
from spatialid.models import checkpoints, main, measured, point, rank_correlation, restored, trace, weights_of
from spatialid.organisms import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short training run under the name of a recipe."
    out, plain = tmp_path_factory.mktemp("run"), organisms.held_out_stage
    with pytest.MonkeyPatch.context() as m:
        m.setattr(organisms, "held_out_stage", lambda *given: replace(plain(*given), batch=4))
        train("llava-tiny", out, TINY, every=2)
    return out


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(models.RECIPES, "llava-tiny", TINY)
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))


@pytest.mark.slow
def test_checkpoints_are_the_states_of_the_run(run, tiny):
    entries = checkpoints("llava-tiny", run, every=2)
    assert [(e["stage"], e["step"]) for e in entries] == [("place", 2), ("place", 4)], "only stages with relations"
    assert [e["step"] for e in checkpoints("llava-tiny", run, every=3)] == [4], "the last one always"
    first, last = (weights_of(run, entry) for entry in entries)
    vlm, saved = restored("llava-tiny", last), load_file(last)
    of = dict(vlm.model.named_parameters())
    assert saved and all(torch.equal(of[k], v.float()) for k, v in saved.items())
    assert vlm.weight_hash != restored("llava-tiny", first).weight_hash


@pytest.mark.slow
def test_a_trace_goes_on_where_it_stopped(run, tiny, monkeypatch):
    calls = []
    def stops(vlm, **options):
        if len(calls) == 1:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(vlm.name)
        return {"accuracy": {"value": 0.5}}
    monkeypatch.setattr(models, "point", stops)
    with pytest.raises(KeyboardInterrupt): trace("llava-tiny", run, every=2)
    path = trace("llava-tiny", run, every=2)
    assert calls == ["llava-tiny place_00002", "stopped", "llava-tiny place_00004"]
    made = json.loads(path.read_text())
    assert [(p["stage"], p["step"]) for p in made["points"]] == [("place", 2), ("place", 4)]
    assert made["provenance"]["params"]["every"] == 2
    assert made["points"][0]["weight_hash"] != made["points"][1]["weight_hash"]
    trace("llava-tiny", run, every=2)
    assert len(calls) == 3


@pytest.mark.slow
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


@pytest.mark.slow
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
    (tmp_path / "results" / "a" / "card.json").write_text("{}")
    assert list(models.stored(["a", "b"], "card.json")) == ["a"]


@pytest.mark.slow
def test_rank_correlation_is_spearmans():
    g = np.random.default_rng(0)
    x = g.standard_normal(40)
    y = x + 0.3 * g.standard_normal(40)
    one = rank_correlation(x, y)
    assert one["value"] == pytest.approx(spearmanr(x, y).statistic)
    assert one["low"] < one["value"] < one["high"] and one["p"] < 0.01
    unrelated = [rank_correlation(*np.random.default_rng(i).standard_normal((2, 30)), n=200) for i in range(20)]
    assert 16 <= sum(rho["low"] < 0 < rho["high"] for rho in unrelated) <= 20
    assert rank_correlation([1, 2, 3, 4], [1, 1, 1, 1])["value"] == 0


@pytest.mark.slow
def test_points_of_one_run_are_resampled_together():
    "Ten points a run that hardly differ within it: as wide as the interval of the runs, wider than that of the points."
    g = np.random.default_rng(1)
    x, y = g.standard_normal((2, 8)).repeat(10, 1) + 1e-3 * g.standard_normal((2, 80))
    width = lambda one: one["high"] - one["low"]
    clustered = rank_correlation(x, y, runs=list(np.arange(8).repeat(10)))
    points, runs = rank_correlation(x, y), rank_correlation(x[::10], y[::10])
    assert (clustered["n"], clustered["points"]) == (8, 80) and clustered["value"] == points["value"]
    assert width(clustered) > 2 * width(points) and abs(width(clustered) - width(runs)) < .4


def test_a_video_organism_is_no_point_of_fig9(tmp_path):
    with pytest.raises(ValueError, match="onevision-tiny watches videos"): checkpoints("onevision-tiny", tmp_path)


# --- figures and tables

def estimate(value, n=200): return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def numbers(accuracy, steerability):
    "What `fig9_numbers` gives."
    keys = ("steerability", "steerability_chosen_on_half", "steerability_released")
    return {"accuracy": estimate(accuracy), **dict.fromkeys(keys, estimate(steerability)),
            "strength": {"middle_third": steerability / 2},
            "steerability_alpha_1": {"middle third": {}, "layer 2": {"ID": estimate(0.3), "noise": estimate(0.2)}}}


def results(by_id, noise, accuracy=0.9):
    "What notebook 04 finds for a model."
    reading = {"ID": estimate(by_id), "noise": estimate(noise), "permuted places": estimate(noise),
               "agreeing ID": estimate(noise), "gain": estimate(by_id - noise), "layers": [4]}
    gain, right = estimate(by_id - noise), {"accuracy": estimate(0.9)}
    choices = {"headline": {"ID": estimate(by_id), "gain": gain},
               "α = 1": {"ID": estimate(by_id / 2), "gain": estimate(0.0), **right},
               "few answers": {"ID": estimate(0.9, 20), "gain": gain, **right},
               "other questions": {"ID": estimate(by_id, 20), "gain": gain, **right},
               "at chance": {"ID": estimate(0.9), "gain": gain, "accuracy": estimate(0.5)}}
    table1 = {"layer": 4, "cells": {"on objects": estimate(by_id)}, "paper_percent": {"LLaVA": [80.0]}}
    return {"fig2": {"readings": dict.fromkeys(models.RULES, reading), "choices": choices}, "table1": table1,
            "fig9": numbers(accuracy, by_id - noise)}


@pytest.fixture
def two(): return {"small": results(0.6, 0.2), "large": results(0.4, 0.1, 0.8)}


def test_fig2_over_models_is_the_median(two):
    fig2 = models.fig2_over_models(two)
    assert list(fig2) == [*models.RULES, "chosen on half, α = 1"]
    values = {name: of["value"] for name, of in fig2["top 3"].items()}
    assert values == pytest.approx({"median ID": 0.5, "median noise": 0.15, "median gain": 0.35, "mean gain": 0.35})
    assert fig2["chosen on half, α = 1"]["mean gain"]["value"] == pytest.approx(0.1)
    assert "| middle third | 50 % [40, 60] |" in models.fig2_table(fig2)


def test_the_figure_of_all_models_has_a_bar_for_each_arm(two):
    fig = Figure()
    models.plot_fig2(fig, two)
    assert len(fig.axes) == 3 and len(fig.axes[0].patches) == 2 * len(models.ARMS)
    assert fig.axes[0].get_yticklabels()[1].get_text() == "large (ℓ 4)"


def test_choices_are_compared_with_the_headline_of_the_same_model(two):
    choices = models.largest_choices(two)
    assert list(choices) == ["α = 1", "other questions"], "unreadable choices and those at chance are left out"
    assert choices["α = 1"]["ID"]["value"] == pytest.approx(-0.25) and choices["α = 1"]["size"] == pytest.approx(0.25)
    assert choices["α = 1"]["gain"]["value"] == pytest.approx(-0.35) and choices["other questions"]["size"] == 0
    assert "| α = 1 | 0.25 | -0.25 [" in models.choices_table(choices)


def test_tables_have_a_row_for_each_model(two):
    card = {"architecture": "Llava", "parameters": 1234567, "accuracy": {"left_right": estimate(0.7)}}
    text = models.models_table(two, {"small": card})
    assert "| small | Llava | 1,234,567 | 90 % [80, 100] | 70 % [60, 80] | 200 |" in text
    assert "| large |  |  | 80 % [70, 90] |  | 200 |" in text
    assert models.table_1(two).splitlines()[2:] == [
        "| LLaVA, paper | 80.0 % |", "| small, layer 4 | 60 % [50, 70] |", "| large, layer 4 | 40 % [30, 50] |"]


def checkpoint(stage, step, accuracy, steerability):
    return {"stage": stage, "step": step, **numbers(accuracy, steerability)}


@pytest.fixture
def traced(two, tmp_path, monkeypatch):
    "The two models and a run of the first, whose last checkpoint is the bundled model."
    monkeypatch.setattr(models, "BUNDLED", tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "training.json").write_text(json.dumps({"log": [{"stage": "more", "step": 400}]}))
    made = [checkpoint("more", step, 0.5 + step / 1000, step / 1000) for step in (100, 200, 300, 400)]
    return two, {"small": {"points": made}}


def test_a_checkpoint_that_is_a_bundled_model_is_one_point(traced):
    assert models.measured_twice(*traced) == {"small": traced[1]["small"]["points"][-1]}
    points = models.points_of(*traced)
    assert [(p.run, p.name, p.checkpoint) for p in points[:3]] == [
        ("small", "small", False), ("large", "large", False), ("small", "more 100", True)]
    assert len(points) == 2 + 3 and points[0].accuracy == 0.9 and points[0].reading("steerability") == 0.4
    assert points[0].reading("strength") == 0.2
    record = models.points_record(points)
    assert record[2]["name"] == "more 100" and record[2]["steerability"] == 0.1
    assert set(models.READINGS) < set(record[2])
    assert "small, IDs of `trace` | 0.400 | 0.400 | 0.400 | 0.200 |" in models.twice_table(*traced)


@pytest.mark.slow
def test_correlations_are_of_all_points_and_within_runs(traced):
    points = models.points_of(*traced)
    rho = models.correlations(points)
    assert list(rho) == list(models.READINGS) and "p" not in rho["steerability"]
    assert (rho["steerability"]["points"], rho["steerability"]["n"]) == (5, 2), "checkpoints of a run are one unit"
    assert models.correlations(points[:2]) == {}
    within = models.correlations_within(points, least=4)
    assert list(within) == ["small"] and within["small"]["steerability"]["value"] == 1
    text = models.correlations_table({"all": rho, "cards": {}, **within})
    assert text.count("\n") == 3 and "| small | 4 | 4 | 1.00 [" in text
    assert models.correlations_table({"all": {}}) == "Too few models for a correlation."
    assert models.correlations_on_cards(traced[0], {}) == {}


def test_the_figure_joins_the_points_of_a_run(traced):
    points, fig = models.points_of(*traced), Figure()
    models.plot_fig9(fig, points, {})
    assert len(fig.axes) == 4 and len(fig.axes[0].collections) == len(points)
    assert list(fig.axes[0].lines[0].get_ydata()) == [0.6, 0.7, 0.8, 0.9]


@pytest.mark.slow
def test_claims_over_models_need_enough_of_them(traced):
    points = models.points_of(*traced)
    fig9, grids = models.correlations(points), {str(i): estimate(i / 10) for i in range(5)}
    claims = models.models_claims(points, fig9, grids)
    assert "at least 12" in claims["correlation"]["not_judged"] and claims["weakest"] == estimate(0.0)
    claims = models.models_claims(points * 3, fig9, {})
    assert claims["correlation"] == fig9["steerability"] and "at least 5" in claims["weakest"]["not_judged"]


def test_grid_scores_leave_out_what_is_no_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    whole = {"provenance": {"params": {}}, "layer": {"best": 3}, "held_out": {"grid_score": estimate(0.5)}}
    for name, claims in (("a", {"grid_score_over_null": estimate(0.3)}), ("b", {})):
        (tmp_path / "results" / name).mkdir(parents=True)
        path = tmp_path / "results" / name / "03_extraction.json"
        path.write_text(json.dumps({**whole, "claims": claims}))
    scores, text = models.grid_scores()
    assert list(scores) == ["a"] and text.splitlines()[2] == (
        "| a | 3 | 0.50 [0.40, 0.60] | 0.300 [0.200, 0.400] | 200 |")


def test_claims_of_every_model(monkeypatch):
    monkeypatch.setattr(models, "register", lambda: dict.fromkeys(("one", "two", "none")))
    row = lambda verdict: {"verdict": verdict, "value": 0.1234}
    text = models.models_claims_table({"a": {"one": row("holds")}, "b": {"one": row("fails"), "two": row("holds")}})
    assert text.splitlines()[2:] == ["| one | ✓ 0.123 | ✗ 0.123 |", "| two |  | ✓ 0.123 |",
                                     "| **hold** | **1 of 1** | **1 of 2** |"]


def test_early_checkpoints_have_no_column(monkeypatch):
    monkeypatch.setattr(models, "bundled", lambda: {"a": None, "a-early": None, "b": None})
    monkeypatch.setattr(models, "own_claims", lambda name: {} if name == "b" else {"one": {}})
    assert models.claims_by_model() == {"a": {"one": {}}}


def diagnosis(gain):
    "What notebook 06 finds for a model."
    way = {"read_off": estimate(0.7), "repair": {"gain": estimate(gain)}, "noise": {"gain": estimate(0.0)},
           "over_noise": estimate(gain), "cost_in_forwards": {"all": 1.25}}
    repair = {"n": 2000, "before": estimate(0.75), "way": "match", "ways": {"attention": way, "match": way}}
    claims = {key: estimate(0.1) for key in ("fig8a", "fig8b", "a8_gain")}
    return {"difficulty": {"chosen": "crowded"}, "questions": {"accuracy": {"all": estimate(0.75)}}, "claims": claims,
            "verdict": {pair: {"stage": "belief"} for pair in ("left/right", "above/below")},
            "lesions": {"accuracy": estimate(0.9), "n": 60}, "a8": {"n": 50}, "repair": repair}


def test_repairs_are_those_that_were_best_when_chosen():
    of = {"a": diagnosis(0.3), "b": diagnosis(0.05)}
    gains = models.repair_gains(of)
    assert gains["repair"]["value"] == pytest.approx(0.175) and gains["noise"]["value"] == 0
    assert models.repair_gains({}) == {}
    assert models.repairs_above_zero(of) == {"repair": 1, "over noise": 1, "models": 2}
    text = models.repair_table(of)
    assert text.count("(best when chosen)") == 2
    assert "| a | match (best when chosen) | 0.750 [0.650, 0.850] | 2,000 |" in text
    assert "| a | crowded | 75 % [65, 85] | 0.10 [0.00, 0.20] |" in models.diagnosis_table(of)


def steered(gain, ceiling, accuracy=1.0):
    "What notebook 04 finds, as far as the ceiling is concerned."
    def number(v): return {"value": v, "low": v - .1, "high": v + .1, "n": 25}
    rooms = {"best layer, chosen on half": {"last sub-token": number(ceiling)},
             "same questions": {"last sub-token": {"gain": number(gain)}},
             "efficiency": {"last sub-token": number(gain / ceiling)}}
    return {"fig9": {"accuracy": number(accuracy)}, "dose": {"ceiling": rooms}}


def test_the_gain_follows_the_ceiling_where_it_does():
    "Training runs are the unit: a finished model and its early checkpoint are one. Older results are left out."
    found = {"a": steered(.1, .2), "b": steered(.4, .5), "c": steered(.7, .8, .6), "c-early": steered(.9, 1., .5)}
    older = steered(.4, .5)
    older["dose"]["ceiling"]["same questions"] = older["dose"]["ceiling"]["same questions"]["last sub-token"]
    assert models.with_ceiling({"b": older}) == models.with_ceiling({"b": steered(.4, .5)})
    rows = models.with_ceiling({**found, "oldest": {}})
    assert list(rows) == list(found) and rows["b"]["ceiling"]["value"] == .5 and rows["b"]["gain"]["value"] == .4
    rho = models.predictors(rows)
    assert rho["ceiling"]["value"] == 1 and rho["ceiling"]["n"] == 3 and rho["ceiling"]["points"] == 4
    assert rho["accuracy"]["value"] < -.8
    assert models.predictors({name: rows[name] for name in ("a", "b")}) == {}
