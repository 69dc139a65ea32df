"Numbers with their intervals: each contains its value and covers the truth as often as it says."
import json
from pathlib import Path

import numpy as np
import pytest

from spatialid.cards import perplexity
from spatialid.diagnosis import decide, resampled_losses
from spatialid.extraction import over_subsets
from spatialid.stats import around, leave_one_out, over_null
from spatialid.finetune import crossed
from spatialid.stats import absolute
from spatialid.stats import bootstrap, over_seeds, spanning, wilson
from spatialid.steering import newcombe

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
    yield "subsets", over_subsets(lambda some: g.random(len(some)), list("abcdef"), 3)
    yield "Wilson", wilson(hits)
    yield "difference", newcombe(wilson(hits), wilson(g.random(n) < .9))
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
