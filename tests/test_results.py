"Numbers with their intervals: each contains its value and covers the truth as often as it says."
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from spatialid.cards import perplexity
from spatialid.cli import main
from spatialid.diagnosis import decide, resampled_losses
from spatialid.extraction import over_subsets
from spatialid.finetune import crossed
from spatialid.stats import (
    Estimate, absolute, around, as_text, bootstrap, leave_one_out, markdown_table, newcombe, not_judged, number_table,
    over_null, over_seeds, ratio, spanning, texts_of, wilson)
from spatialid.store import agree, as_png, load_results, moved, read_results, save_results

RESULTS = Path(__file__).parents[1]/"results"
STALE = set()  # "model/NN_name.json" from an older interval: to be run again


def contains(one):
    "Whether no end of an interval is on the wrong side of the value, element by element."
    low, value, high = (np.asarray(one[k], dtype=float) for k in ("low", "value", "high"))
    return bool((low <= value).all() and (value <= high).all())


def skewed(g, n, *rest):
    "Values of which a resample can easily miss the rare large ones."
    return g.lognormal(sigma=1.5, size=(n, *rest))


def estimates(g):
    "One number from everything that makes an interval, of random data."
    n = int(g.integers(2, 12))
    x, hits, pairs = skewed(g, n), g.random(n) < g.random(), skewed(g, n, 2)
    yield "mean", bootstrap(x, n=40, seed=n)
    yield "median", bootstrap(x, np.median, n=40, seed=n)
    yield "columns", bootstrap(pairs, n=40, seed=n)
    yield "same values", bootstrap(np.full(n, g.random()), n=40, seed=n)
    yield "ratio", bootstrap(pairs, lambda v: v[:, 0].sum() / v[:, 1].sum(), n=40, seed=n)
    yield "largest", bootstrap(x, np.max, n=40, seed=n)
    yield "smallest", bootstrap(-x, lambda v: v.min() ** 2, n=40, seed=n)
    yield "seeds", over_seeds(x)
    yield "size", absolute(over_seeds(x - x.mean() * 2 * g.random()))
    yield "jackknife", around(np.clip(leave_one_out(np.ones(n)) @ x, -1, 1))
    yield "share on axes", around(np.append(g.random(), g.random(n)), floor=0.0)
    yield "over null", over_null(*({**around(g.random(n + 1)), "null_high": g.random()} for _ in range(3)))
    yield "subsets", over_subsets(lambda _, subsets: g.random(len(subsets)), list("abcdef"), 3)
    yield "Wilson", wilson(hits)
    yield "difference", newcombe(wilson(hits), wilson(g.random(n) < .9))
    shares = [wilson(g.random(n) < share) for share in (g.random(), .05, .95)]
    efficient = ratio(newcombe(shares[0], shares[1]), newcombe(shares[2], shares[1]))
    if efficient["value"] is not None: yield "efficiency", efficient
    yield "seeds and rows", crossed(g.random((3, n)), n=40, seed=n)
    yield "perplexity", perplexity(1 + pairs, 1 + pairs[::-1])["ratio"]


def test_no_interval_excludes_its_value():
    outside = [name for seed in range(150) for name, one in estimates(np.random.default_rng(seed)) if not contains(one)]
    assert not outside, sorted(set(outside))


def test_ends_move_to_the_value_and_no_farther():
    low, high = spanning(np.array([1., 2., 3.]), np.array([1.1, 0., 2.]), np.array([2., 1.9, 4.]))
    assert low.tolist() == [1., 0., 2.] and high.tolist() == [2., 2., 4.]


def test_losses_of_a_diagnosis_are_within_their_intervals():
    g = np.random.default_rng(0)
    for _ in range(20):
        found = {k: (g.random(12) < .9).astype(float) for k in ("vision", "binding", "answer")}
        drawn = resampled_losses(found, draws=50)
        low, high = spanning(drawn[0], *np.quantile(drawn[1:], [.025, .975], axis=0))
        assert contains({"value": drawn[0], "low": low, "high": high}) and 0 <= decide(drawn)[1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("n", range(3, 11))
def test_the_jackknife_covers_the_mean_of_few_objects(n):
    "Student's t keeps 95 % for three to ten objects, where a percentile bootstrap has 77 to 92."
    g = np.random.default_rng(n)
    share = leave_one_out(np.ones(n))
    found = [around(share @ x) for x in g.normal(.2, .05, (2000, n))]
    assert .935 < np.mean([one["low"] <= .2 <= one["high"] for one in found]) < .965
    unequal = leave_one_out(g.integers(1, 9, n))
    found = [around(unequal @ x) for x in g.beta(2, 5, (2000, n))]
    assert np.mean([one["low"] <= 2 / 7 <= one["high"] for one in found]) > .88, "skewed, and some objects weigh more"


@pytest.mark.parametrize("n", [5, 20, 100])
def test_wilsons_interval_covers_shares_up_to_the_edge_where_a_bootstrap_does_not(n):
    "Exact coverage over p: every outcome weighed by its probability."
    from scipy.stats import binom
    p = np.linspace(.01, .99, 99)[:, None]
    def covered(interval):
        found = [interval(np.arange(n) < k) for k in range(n + 1)]
        low, high = np.array([[one["low"], one["high"]] for one in found]).T
        return (binom.pmf(np.arange(n + 1), n, p) * ((low <= p) & (p <= high))).sum(1)
    of_wilson, of_bootstrap = covered(wilson), covered(lambda hits: bootstrap(hits, n=400))
    assert of_wilson.min() > .82 and of_wilson.mean() > .94
    assert of_bootstrap.min() < .7, "what the page says of shares near 0 and 1"


@pytest.mark.parametrize("share, noise, room", [(.5, .1, .9), (.95, .02, .97), (.2, .05, .6), (1, 0, 1)])
def test_a_ratio_of_differences_covers_the_truth(share, noise, room):
    "In samples of 25 questions, also where all of them turn."
    g, truth, found = np.random.default_rng(0), (share - noise) / (room - noise), []
    for _ in range(800):
        a, b, c = (wilson(g.random(25) < p) for p in (share, noise, room))
        one = ratio(newcombe(a, b), newcombe(c, b))
        if one["value"] is not None: found.append(one["low"] <= truth <= one["high"])
    assert len(found) > 700 and np.mean(found) > .93
    nothing = wilson(np.zeros(25))
    assert "not clear of 0" in ratio(nothing, newcombe(nothing, nothing))["not_judged"]


def intervals(found, name=""):
    "(name, number) of everything in a results file that has an interval."
    if isinstance(found, dict) and {"value", "low", "high"} <= found.keys():
        if None not in (found["value"], found["low"], found["high"]): yield name, found
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, one in items: yield from intervals(one, f"{name}.{key}")


def test_no_published_number_is_outside_its_interval():
    "To nine digits: cosines of 1 are rounded."
    bad = {}
    for path in sorted(RESULTS.rglob("*.json")):
        for name, one in intervals(json.loads(path.read_text())):
            low, value, high = (np.array(one[k], dtype=float) for k in ("low", "value", "high"))
            if (low > value + 1e-9).any() or (value > high + 1e-9).any():
                bad.setdefault(str(path.relative_to(RESULTS)), []).append(name)
    assert bad.keys() <= STALE, bad


def test_an_estimate_is_a_dictionary_that_prints():
    one = Estimate(.91, .88, .94, 200)
    assert repr(one) == "0.91 [0.88, 0.94], n 200" and (one.value, one.low, one.high, one.n) == (.91, .88, .94, 200)
    assert json.loads(json.dumps(one)) == one == {"value": .91, "low": .88, "high": .94, "n": 200}
    many = bootstrap(np.arange(12.).reshape(6, 2))
    assert many[1] == Estimate(many.value[1], many.low[1], many.high[1], 6) and many[1].value == 6
    assert repr(Estimate(None)) == "none" and repr(Estimate(2., n=1)) == "2.00, n 1"


@pytest.mark.parametrize("low, high", [(.6, .7), (.3, .4), (.6, .4)])
def test_an_estimate_refuses_an_interval_that_misses_its_value(low, high):
    with pytest.raises(ValueError, match="misses its value 0.5"): Estimate(.5, low, high, 9)
    with pytest.raises(ValueError, match="misses its value"): Estimate([.5, .5], [.4, low], [.6, high], 9)


def test_results_are_rounded_and_their_provenance_is_apart(tmp_path, monkeypatch):
    "A run that computes the same numbers to six digits leaves the file of numbers as it was."
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    numbers = {"r": 1/3, "a": [[1.23456789, 2]], "e": Estimate(.5, .25, .75, 8)}
    path = save_results("toy", "03_x", numbers, {"seed": 1})
    before = path.read_bytes()
    estimate = {"value": .5, "low": .25, "high": .75, "n": 8}
    assert json.loads(before) == {"r": .333333, "a": [[1.23457, 2]], "e": estimate}
    assert b"[1.23457, 2]\n" in before, "an array of numbers is a line"
    save_results("toy", "03_x", {**numbers, "r": 1/3 + 1e-9}, {"seed": 2})
    assert path.read_bytes() == before
    assert read_results(path)["provenance"] == {"seed": 2} == load_results("toy", "03_x")["provenance"]


def test_numbers_that_another_machine_rounds_otherwise_stay_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    estimate = Estimate(.5, .25, .75, 8)
    first = {"e": estimate, "list": [.1, .2], "n": 1, "small": 2e-7, "gone": 1., "t": "a"}
    path = save_results("toy", "03_x", first, {})
    before = json.loads(path.read_text())
    close = {"e": Estimate(.50001, .25001, .74999, 8), "list": [.100001, .2], "n": 1, "small": -3e-7, "t": "a"}
    close["new"] = 1.
    save_results("toy", "03_x", close, {})
    assert json.loads(path.read_text()) == {**{k: before[k] for k in ("e", "list", "n", "small", "t")}, "new": 1.}
    moved = {"e": Estimate(.50001, .2501, .74999, 8), "list": [.1001, .2], "n": 2, "small": 2e-6, "t": "b", "new": 1.}
    save_results("toy", "03_x", moved, {})
    assert json.loads(path.read_text()) == json.loads(json.dumps(moved)), "the whole estimate, the whole list"
    save_results("toy", "03_x", {"gap": 1e-14, "zero": 0.}, {})
    save_results("toy", "03_x", {"gap": 9e-7, "zero": 5e-7}, {})
    assert json.loads(path.read_text()) == {"gap": 9e-7, "zero": 5e-7}, "what measures rounding has no allowance"
    path.write_text("{")
    save_results("toy", "03_x", {"n": 1}, {})
    assert json.loads(path.read_text()) == {"n": 1}


@pytest.mark.parametrize("a, b", [(1, 1.), (True, 1), ({"x": 1.}, {"y": 1.}), ([1.], [1., 1.]), (None, 0.), ("1", 1)])
def test_results_of_another_kind_do_not_agree(a, b):
    assert not agree(a, b) and not agree(b, a) and agree(a, a)


def test_numbers_are_read_as_text_whatever_holds_them():
    estimate, none = Estimate(.5, .25, .75, 8), not_judged("too few", 3)
    assert none == {"value": None, "low": None, "high": None, "n": 3, "not_judged": "too few"}
    found = texts_of({"a": {"b": estimate, "c": none}, "layer": 5, "names": ["x"]})
    assert found == {"a": {"b": "0.50 [0.25, 0.75]", "c": "too few"}, "layer": 5, "names": ["x"]}
    assert texts_of(estimate, 1) == as_text(estimate, 1) == "0.5 [0.2, 0.8]"
    assert as_text({**estimate, "high": None}, 1) == "0.5 [0.2, –]"


def test_a_figure_is_drawn_once_and_anew_when_something_in_it_changes(monkeypatch):
    fig, drawn = Figure(), []
    line, = fig.subplots().plot([0, 1])
    save = fig.savefig
    monkeypatch.setattr(fig, "savefig", lambda *args, **kwargs: (drawn.append(1), save(*args, **kwargs)))
    first = as_png(fig)
    assert as_png(fig) == first and len(drawn) == 1
    line.set_ydata([1, 0])
    assert as_png(fig) != first and len(drawn) == 2


def test_a_table_holds_numbers_estimates_and_texts():
    assert markdown_table(["a", "b"], [[1, "x"], [2, "y"]]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"
    rows = {"first": {"a": 1, "b": Estimate(.5, .25, .75, 8)}, 2: {"b": not_judged("why"), "c": [3, 4], "d": None}}
    lines = number_table(rows, 1, "corner").splitlines()
    assert lines[0] == "| corner | a | b | c | d |" and lines[1] == "| --- " * 5 + "|"
    assert lines[2] == "| first | 1.0 | 0.5 [0.2, 0.8] |  |  |", "a cell that is not there stays empty"
    assert lines[3] == "| 2 |  | why | [3, 4] | none |"


def test_what_moved_is_what_left_its_interval():
    share, later = ({"value": v, "low": v - .1, "high": v + .1, "n": 9} for v in (.6, .69))
    was = {"share": share, "plain": 100., "gone": 1, "text": "a", "list": [1., 2.]}
    same = {"share": later, "plain": 100.001, "gone": 1, "text": "b", "list": [1., 2.]}
    assert moved(was, was) == moved(was, same) == []
    assert [row["key"] for row in moved(was, same, within=True)] == ["share", "plain"]
    other = {"share": {"value": .71, "low": .6, "high": .8, "n": 9}, "plain": 101., "list": [1., 3.], "new": 0}
    assert [row["key"] for row in moved(was, other)] == ["share", "plain", "gone", "list.1", "new"]
    assert moved(was, other)[0] == {"key": "share", "before": .6, "after": .71, "low": .5, "high": .7, "beyond": True}


@pytest.mark.slow
def test_diff_compares_with_a_commit_or_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    share = lambda value: {"share": {"value": value, "low": value - .1, "high": value + .1, "n": 9}}
    save_results("toy", "03_x", share(.5), {})
    command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    git = lambda *args: subprocess.run([*command, *args], check=True)
    git("init", "-q"), git("add", "."), git("commit", "-qm", "results")
    assert main(["diff"]) == 0 and "0 numbers moved beyond their interval in 1 files" in capsys.readouterr().out
    save_results("toy", "03_x", share(.55), {})
    assert main(["diff"]) == 0 and main(["diff", "--all"]) == 0
    assert "results/toy/03_x.json share: 0.5 [0.4, 0.6] -> 0.55\n" in capsys.readouterr().out
    save_results("toy", "03_x", share(.8), {})
    assert main(["diff"]) == 1 and "share: 0.5 [0.4, 0.6] -> 0.8" in capsys.readouterr().out
    assert main(["diff", str(tmp_path/"results")]) == 0
    assert main(["diff", "nowhere"]) == 2
    assert "'nowhere' is no commit and no folder of results" in capsys.readouterr().err
