"""Depth: whole answers under steering against whole sequences, both questions about one pair, depth scenes and IDs.

And what the numbers say of known cases."""
import json
from itertools import chain, permutations, product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, tiny_llava

from spatialid import depth as dp
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.edits import add, gaussian, moves
from spatialid.extraction import UNRELATED_TEMPLATES, WORD_TEMPLATES, SpatialIDs, extract, word_activations
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.questions import QUESTIONS
from spatialid.scenes import FreeScenes, each_with_another, question_texts, relation
from spatialid.store import write_json
from spatialid.sweeps import Sweep, in_float64, sweep

ROOT = Path(__file__).parents[1]


def picture(seed, px=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (px, px, 3), dtype=np.uint8))


def ask(i, kind="front_behind", px=16):
    template, answers = QUESTIONS[kind].template, QUESTIONS[kind].answers
    names = ["cup", "hot dog", "star", "cat"] # of one and of two words: prompts of different lengths, padded
    words = {"subject": names[i % 4], "object": names[(i + 1) % 4]}
    return Query(picture(i, px), template, words, answers, answers[i % 2], kind)


@pytest.fixture(scope="module")
def llava(): return in_float64(VLM(*tiny_llava(), "tiny"))


# --- whole answers, against whole sequences

def whole_batch(vlm, query, string):
    "Prompt and answer as one sequence."
    batch, k = vlm.encode([query]), len(string)
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([string])], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in batch: batch[key] = torch.cat([batch[key], torch.zeros(1, k, dtype=batch[key].dtype)], 1)
    if (mask := batch.get("cross_attention_mask")) is not None:
        batch["cross_attention_mask"] = torch.cat([mask] + k * [mask[:, -1:]], 1)
    if "position_ids" in batch and vlm.family.mrope: batch["position_ids"] = vlm.model.model.get_rope_index(**batch)[0]
    elif "position_ids" in batch: batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    return batch


def by_whole_sequence(vlm, query, string, layer=None, vector=None):
    "The oracle: one plain forward pass with one hook, log-probabilities of the answer's tokens added up."
    batch, row = whole_batch(vlm, query, string), vlm.positions(query, "subject")[0]
    n, k = batch["input_ids"].shape[1] - len(string), len(string)
    def hook(module, args):
        h = args[0].clone()
        h[0, row] += vector
        return (h, *args[1:])
    handle = vlm.receivers[layer - 1].register_forward_pre_hook(hook) if layer else None
    try:
        batch = batch.to(vlm.device, vlm.model.dtype)
        with torch.inference_mode(): logits = vlm.model(**batch, use_cache=False).logits[0]
    finally:
        if handle: handle.remove()
    assert len(logits) == n + k
    return float(sum(logits[n - 1 + i].log_softmax(-1)[token] for i, token in enumerate(string)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*not resumed")
def test_an_answer_is_the_sum_over_its_tokens(family):
    vlm = in_float64(VLM(*tiny(family, dtype=torch.float64), "tiny"))
    queries = [ask(i, px=16 if family == "llava" else 32) for i in range(2)]
    strings = dp.spellings(vlm, queries)
    assert min(len(s) for answer in strings for s in answer) > 1, "the tokenizer splits the words"
    few = [answer[:2] for answer in strings]
    vector = torch.tensor(np.random.default_rng(1).normal(size=vlm.width)) * 3
    swept = dp.answer_sweep(vlm, queries, {"push": ("subject", add(vector))}, [2], few)
    clean = dp.answer_strings(vlm, queries, few)
    assert swept.path == ("fast" if vlm.family.fast else "plain") and swept.truth.tolist() == [0, 1]
    assert swept.log_probs["push"].shape == (1, 2, 2)
    moved = 0
    for (b, query), (k, answer) in product(enumerate(queries), enumerate(few)):
        plain, pushed = (torch.tensor([by_whole_sequence(vlm, query, s, *how) for s in answer], dtype=torch.float64)
                         for how in ((), (2, vector)))
        assert abs(float(swept.base_log_probs[b, k]) - float(plain.logsumexp(0))) < 1e-8
        assert abs(float(swept.log_probs["push"][0, b, k]) - float(pushed.logsumexp(0))) < 1e-8
        assert max(abs(float(clean[k][s][b]) - float(x)) for s, x in zip(answer, plain)) < 1e-8
        moved = max(moved, float((plain - pushed).abs().max()))
    assert moved > 1e-3, "the push does something"


def test_fast_and_plain_sweeps_of_all_spellings_agree_at_every_layer(llava):
    queries = [ask(i, "above_below") for i in range(3)]
    noise = torch.randn(2, llava.width, dtype=torch.float64)
    edits = {"push": ("subject", add(torch.ones(llava.width))), "noise": (("subject", "object"), add(noise))}
    fast, plain = (dp.answer_sweep(llava, queries, edits, plain=p) for p in (False, True))
    assert (fast.path, plain.path) == ("fast", "plain") and fast.layers == [1, 2, 3, 4]
    assert max(float((fast.log_probs[n] - plain.log_probs[n]).abs().max()) for n in edits) < 1e-9


def test_one_token_answers_are_one_ordinary_sweep(llava):
    queries = [ask(i) for i in range(3)]
    strings = [[(ids[0],)] for ids in llava.answer_ids(queries[0])]
    edits = {"push": ("subject", add(torch.ones(llava.width)))}
    whole = dp.answer_sweep(llava, queries, edits, strings=strings)
    first = sweep(llava, queries, edits=edits, logits=True)
    tokens = [s[0][0] for s in strings]
    assert torch.allclose(whole.log_probs["push"], first.logits["push"].log_softmax(-1)[..., tokens], atol=1e-9)
    calls = []
    def ask_of(view):
        calls.append(view.prefix)
        return {"": torch.zeros(1, len(view.options))}
    dp.along_strings(llava, list(chain(*strings)), ask_of)
    assert calls == [()]


def test_strings_of_a_whole_vocabulary_sum_to_one(llava):
    "All strings of one token, and all that go on after one of them, exhaust the probability."
    queries, size = [ask(0)], llava.model.get_output_embeddings().weight.shape[0]
    strings = [(t,) for t in range(size) if t != 7] + [(7, t) for t in range(size)]
    found = dp.answer_strings(llava, queries, [strings])[0]
    assert abs(float(torch.stack([*found.values()]).logsumexp(0)[0])) < 1e-9


def test_the_view_keeps_the_places_of_words(llava):
    query, view = ask(1), dp.Continued(llava, (5, 6, 7), [8])
    groups = ("subject", "object", "last", "image")
    assert view.positions(query, groups) == llava.positions(query, groups)
    assert view.positions(query, lambda q: [0, -1]) == llava.positions(query, lambda q: [0, -1])
    assert view.encode([query])["input_ids"][0, -3:].tolist() == [5, 6, 7]
    assert llava.encode([query])["input_ids"].shape[1] + 3 == view.encode([query])["input_ids"].shape[1]


def test_the_view_is_of_the_same_model_and_inside_a_patch_there_is_no_clean_run(llava):
    query, view = ask(1), dp.Continued(llava, (5,), [8, 9])
    assert view.model is llava.model and view.cached("x", lambda: 3) == llava.cached("x", lambda: 4) == 3
    with llava.steer(query, {"subject": torch.ones(llava.width)}, layer=2):
        with pytest.raises(ValueError, match="no clean run"): sweep(view, [query], edits={"a": "subject"})


def test_spellings_are_the_forms_less_those_already_counted(llava):
    strings, tok = dp.spellings(llava, [ask(0), ask(1)]), llava.tokenizer
    for word, answer in zip(("front", "behind"), strings):
        assert {tok.decode(s).strip() for s in answer} <= {word, word.capitalize()} and len(answer) >= 2
        assert not any(a != b and b[:len(a)] == a for a, b in permutations(answer, 2))


def test_a_spelling_that_begins_with_another_is_counted_once():
    table = {"P": [0], "Pfront": [0, 1], "PFront": [0, 3, 4], "P front": [0, 1, 2]}
    table["P Front"] = [5] # swallows the prompt's token
    table |= {"\n" + k[1:]: v for k, v in table.items()}
    stub = SimpleNamespace(tokenizer=Tokens(table))
    assert dp._spellings(stub, "P", ("front",)) == [[(1,), (3, 4)]]


class Tokens(dict):
    unk_token_id = 9
    def __call__(self, text, add_special_tokens): return {"input_ids": self[text]}


def test_what_cannot_be_scored_is_named(llava):
    alike, unknown = (Query(None, "Where?", answers=answers) for answers in (("behind", "behindhand"), ("☂", "☃")))
    with pytest.raises(ValueError, match="same answers, in the same order"):
        dp.spellings(llava, [ask(0), ask(0, "above_below")])
    with pytest.raises(ValueError, match="same answers"): dp.spellings(llava, [Query(None, "Is it?")])
    with pytest.raises(ValueError, match="'behindhand' begins with 'behind'"): dp.spellings(llava, [alike])
    with pytest.raises(ValueError, match="cannot write '☂'"): dp.spellings(llava, [unknown])


def test_spellings_in_use():
    low, high = torch.log(torch.tensor([.001, .9])), torch.log(torch.tensor([.999, .1]))
    assert dp.in_use([{(1,): low, (2, 3): high}]) == [[(1,), (2, 3)]]
    assert dp.in_use([{(1,): low[:1], (2, 3): high[:1]}]) == [[(2, 3)]]


def test_shares_of_spellings_and_the_likelier_answer(llava):
    queries = [ask(i) for i in range(3)]
    found = dp.answer_strings(llava, queries)
    by_tokens = SimpleNamespace(tokenizer=SimpleNamespace(decode=tuple))
    shares = dp.spelling_shares(by_tokens, found)
    assert sum(share for _, share in shares.values()) == pytest.approx(2), "one for each of the two answers"
    assert [tokens for tokens, _ in shares.values()] == [len(s) for s in chain(*found)]
    whole = [torch.stack([*answer.values()]).exp().sum(0) for answer in found]
    assert dp.likelier_answers(llava, queries).tolist() == (whole[1] > whole[0]).long().tolist()
    rigged = [[min(found[0], key=len)], list(found[1])] # front may be written in one way only
    assert dp.answer_strings(llava, queries, rigged)[0].keys() == set(rigged[0])


@pytest.mark.slow
def test_the_difference_of_a_scoring_is_that_of_its_log_odds(llava):
    queries, edits = [ask(i) for i in range(2)], {"push": ("subject", add(torch.ones(llava.width)))}
    strings = dp.spellings(llava, queries)
    few = [answer[:1] for answer in strings]
    found = dp.scoring_difference(llava, queries, edits, [1, 3], few)
    odds = [(s.log_probs["push"][..., 1] - s.log_probs["push"][..., 0]).numpy() for s in
            (dp.answer_sweep(llava, queries, edits, [1, 3], some) for some in (strings, few))]
    assert found["spellings in use"] == pytest.approx(np.abs(odds[0] - odds[1]).max()) and found["first tokens"] > 0
    assert dp.scoring_difference(llava, queries, edits, [1], strings)["spellings in use"] == 0


# --- questions

@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.slow
def test_both_questions_are_about_one_pair_and_true(flat):
    source = FreeScenes(40, seed=4, flat=flat)
    found = dp.both_questions(source, 12, seed=1)
    assert len(found) == 12 and [len(v) for v in found.queries.values()] == [12, 12] and found.places.shape == (12, 2)
    scenes = [(s, {o.name for o in s.things}) for s in source]
    for height, depth, place in zip(*found.queries.values(), found.places):
        assert height.words == depth.words and height.image is depth.image
        scene = next(s for s, names in scenes if {*height.words.values()} <= names
                     and np.array_equal(np.asarray(s.image()), np.asarray(height.image)))
        s, o = (next(t for t in scene.things if t.name == height.words[w]) for w in ("subject", "object"))
        truths = tuple(relation(kind, s, o) for kind in dp.COMPARED)
        assert (height.truth, depth.truth) == truths and None not in truths
        assert np.allclose(place, (4 * s.x - .5, 4 * s.y - .5))
    again = dp.both_questions(source, 12, seed=1, instruction=" Answer {} or {}.").queries
    assert [q.words for q in again["above_below"]] == [q.words for q in found.queries["above_below"]]
    assert again["front_behind"][0].text.endswith("? Answer front or behind.")
    assert dp.FRONT_BEHIND.format(subject="", object="") in question_texts()


def test_both_questions_of_a_benchmark(tmp_path):
    bench = Benchmark(write_benchmark(tmp_path / "b", n=40))
    found = dp.both_questions(bench, 100)
    rows = [r for r in bench if r.kind == "above_below"]
    assert 5 < len(found) == len({r.image_id for r in rows})
    assert {q.truth for q in found.queries["front_behind"]} == {None}
    by_words = {(r.subject, r.object, r.truth): r for r in rows}
    for q, place in zip(found.queries["above_below"], found.places):
        row = by_words[q.words["subject"], q.words["object"], q.truth]
        x, y, w, h = row.boxes()[0]
        assert np.allclose(place, (4 * (x + w / 2) / 80 - .5, 4 * (y + h / 2) / 80 - .5))
    with pytest.raises(ValueError, match="no picture of this source"):
        dp.both_questions(FreeScenes(1, seed=0, things=(1, 1)), 5)


def test_kinds_of_pictures(tmp_path):
    pictures = dp.Pictures(seed=3, px=32)
    assert pictures.kinds == ("ordinary", "flat") and dp.Pictures(benchmark="x").kinds[2:] == ("photographs",)
    assert [pictures.source(kind, "a").flat for kind in pictures.kinds] == [False, True]
    assert pictures.source("flat", "a").seed != pictures.source("flat", "b").seed
    bench = write_benchmark(tmp_path / "b", n=4)
    assert isinstance(dp.Pictures(benchmark=bench).source("photographs", "a"), Benchmark)
    assert len(pictures.questions("flat", "a", 2)) == 2
    plt.close(dp.plot_pairs({kind: pictures.questions(kind, "a", 2) for kind in pictures.kinds}, each=2))


def test_the_kind_that_a_model_was_trained_on(tmp_path):
    model = SimpleNamespace(folder=tmp_path)
    assert dp.training_kind(SimpleNamespace(folder=None)) == dp.training_kind(model) == "ordinary"
    write_json(tmp_path / "training.json", {"recipe": {"flat": True}})
    assert dp.training_kind(model) == "flat" and dp.training_kind(model, flat=False) == "ordinary"
    assert dp.training_kind(model, benchmark="x") == "photographs"


# --- what height says of depth

def test_correlation_from_sums_is_pearson():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    sums = [len(x), x.sum(), y.sum(), (x**2).sum(), (y**2).sum(), (x * y).sum()]
    assert np.isclose(dp.correlation(sums), np.corrcoef(x, y)[0, 1])
    assert np.allclose(dp.correlation([sums, sums]), dp.correlation(sums))


def test_height_says_nothing_of_depth_in_flat_scenes():
    found = {flat: dp.height_and_depth(FreeScenes(400, seed=2, flat=flat)) for flat in (False, True)}
    r = {flat: float(dp.correlation(sums.sum(0))) for flat, (sums, _) in found.items()}
    assert r[False] < -.3 and abs(r[True]) < .1
    assert found[False][1].mean() > .7 and .38 < found[True][1].mean() < .62 and set(found[True][1]) <= {0., 1.}


def test_numbers_of_height_and_depth_count_scenes_and_things():
    scenes = {kind: list(FreeScenes(60, seed=2, px=16, flat=kind == "flat")) for kind in dp.GENERATED}
    found = {kind: dp.height_depth_numbers(some) for kind, some in scenes.items()}
    r = found["ordinary"]["correlation"]
    assert r["n"] == 60 and r["things"] == sum(len(s.things) for s in scenes["ordinary"]) and r["high"] < 0
    lower = dp.height_and_depth(scenes["flat"])[1]
    assert found["flat"]["lower_in_front"]["value"] == pytest.approx(lower.mean())
    fig = dp.plot_height_depth(scenes, found, n=10)
    assert [len(c.get_offsets()) for c in fig.axes[1].collections] == [sum(len(s.things) for s in scenes["flat"][:10])]
    plt.close(fig)


class Answering:
    "Stands for a model that always gives one answer."
    def __init__(self, monkeypatch, answers):
        monkeypatch.setattr(dp, "likelier_answers", lambda vlm, queries, strings: np.array(answers[queries[0].kind]))


def test_accuracy_and_what_height_suggests(monkeypatch):
    "Four pairs: above or below, behind or in front; the model answers behind to all but the first."
    truths = {"above_below": ("above", "above", "below", "below"),
              "front_behind": ("front", "behind", "front", "behind")}
    queries = {}
    for kind, some in truths.items():
        answers = QUESTIONS[kind].answers
        queries[kind] = [SimpleNamespace(answers=answers, truth=truth, kind=kind) for truth in some]
    Answering(monkeypatch, {"above_below": [0, 0, 1, 0], "front_behind": [0, 1, 1, 1]})
    found = dp.depth_accuracy(None, dp.PairQuestions(queries, np.zeros((4, 2))), dict.fromkeys(truths))
    values = {name: number["value"] for name, number in found.items()}
    assert values == {"above_below": .75, "front_behind": .75, "as height suggests": .25, "height is right": .5}
    numbers = {"ordinary": {"front_behind": {"low": .6}}, "flat": {"front_behind": {"low": .5}}}
    at_chance = dp.depth_at_chance(numbers, ("ordinary", "flat", "photographs"))
    assert at_chance == {"ordinary": False, "flat": True, "photographs": False}


# --- pushes

def made_ids(m=4, d=6, layers=3, seed=0):
    g = np.random.default_rng(seed)
    table, counts = g.normal(size=(1, 1, layers, m, m, d)).astype("float32"), np.ones((1, 1, m, m))
    return SpatialIDs(table, counts, ["all"], [1], list(range(1, layers + 1)), [("a", "b")], "")


def test_pushes_along_a_line():
    column, row = dp.along(2, 1), dp.along(2, 0, across=1.5)
    assert column[0][0].tolist() == [[[0, 0]]] * 2 and column[0][1].tolist() == [[[0, 3]]] * 2
    assert row[3][0].tolist() == [[[3, 1.5]]] * 2
    from_subject = dp.along(2, 1, start=np.array([[1, 2], [3, .5]]))
    assert from_subject[3][1].tolist() == [[[1, 2]], [[3, .5]]]
    ids = made_ids()
    for k, (group, new) in enumerate(dp.push_edits(lambda *places: moves(ids, *places), column, 5.0, "x").values()):
        assert group == "subject"
        rows = torch.zeros(2, 1, 6, dtype=torch.float64)
        wanted = 5 * torch.tensor(ids.at(2)[k, 0] - ids.at(2)[3 - k, 0])
        assert torch.allclose(new(rows, 2, slice(0, 2))[1, 0], wanted)


def test_a_random_axis_has_the_norms_and_sides_of_the_push():
    ids, column = made_ids(), dp.along(3, 1)
    find, noise = (lambda *places: moves(ids, *places)), gaussian(6, 1, 0, 0)
    real, random = (dp.push_edits(find, column, 5.0, "x", 1, n) for n in (None, noise))
    rows = torch.zeros(3, 1, 6, dtype=torch.float64)
    a, b = (torch.stack([new(rows, 1, slice(0, 3)) for _, new in edits.values()]) for edits in (real, random))
    assert torch.allclose(a.norm(dim=-1), b.norm(dim=-1)) and torch.allclose(b[0], -b[3]) and not torch.allclose(a, b)
    direction = b / b.norm(dim=-1, keepdim=True)
    assert torch.allclose(direction[0], direction[1]) and torch.allclose(direction[2], direction[3])
    assert not torch.allclose(direction[3, 0], direction[3, 1])


def test_permuted_ids_are_the_same_ids_elsewhere():
    ids = made_ids()
    permuted = dp.permuted_ids(ids, 0, 1)
    rows = lambda x: sorted(map(tuple, x.at(2).reshape(16, -1).round(5).tolist()))
    assert rows(ids) == rows(permuted) and not np.allclose(ids.at(2), permuted.at(2))
    assert np.array_equal(permuted.at(2), dp.permuted_ids(ids, 0, 1).at(2))


def test_all_pushes_and_their_controls():
    ids, places = made_ids(), np.array([[1., 2.], [0., .5]])
    edits = dp.all_pushes(SimpleNamespace(width=6), ids, made_ids(seed=5), places, n_draws=2)
    arms = dict.fromkeys(name.rpartition(" ")[0] for name in edits)
    assert [*arms] == ["height", "one step", "horizontal", "permuted 0", "random step 0", "permuted 1", "random step 1",
                       "depth", "as far", "random axis 0", "random axis 1", "random depth axis 0"]
    assert len(edits) == 4 * len(arms)
    assert set(chain(*dp.arms_of(2).values())) < set(arms)
    rows = torch.zeros(2, 1, 6, dtype=torch.float64)
    push = {name: new(rows, 2, slice(0, 2)) for name, (_, new) in edits.items()}
    for name in ("as far", "random axis 1"): # as far as the vertical IDs
        assert torch.allclose(push[f"{name} 0"].norm(dim=-1), push["height 0"].norm(dim=-1))
    assert torch.allclose(push["random depth axis 0 3"].norm(dim=-1), push["depth 3"].norm(dim=-1))
    axis = torch.tensor(made_ids(seed=5).axes(2)[0])
    assert float(torch.cosine_similarity(push["as far 3"][0, 0], axis, dim=0)) == pytest.approx(1)
    step = ids.at(2)[2, 0] - ids.at(2)[2, 1] # from (1, 2), where the subject is, to (0, 2)
    assert np.allclose(push["one step 2"][0, 0], step)
    sideways = ids.at(2)[0, 3] - ids.at(2)[2, 1] # to (3, 0)
    assert np.allclose(push["horizontal 3"][0, 0], sideways)
    assert torch.allclose(push["random step 1 2"].norm(dim=-1), push["one step 2"].norm(dim=-1))


# --- pushed pictures, made by hand: both questions, four places, two layers

def made_pushes(slopes, n=6, noise=0.0, arms=("height",)):
    "Log-odds of the second answer rise by `slopes[kind][layer]` for each place."
    g, swept = np.random.default_rng(0), {}
    for kind in dp.COMPARED:
        rise, log_probs = np.array(slopes[kind])[:, None], {}
        for arm, k in product(arms, range(4)):
            odds = k * rise + noise * g.normal(size=(len(rise), n))
            log_probs[f"{arm} {k}"] = torch.tensor(np.stack([-odds / 2, odds / 2], -1))
        swept[kind] = Sweep([1, 2], log_probs, torch.zeros(n, 2), None, np.zeros(n), "fast", None, 0.0)
    return dp.Pushed(swept)


def test_slopes_of_made_pushes():
    pushed = made_pushes({"above_below": [1, -3], "front_behind": [-2, -.5]})
    assert len(pushed) == 6 and pushed.layers == [1, 2] and pushed.curves("height").shape == (2, 6, 4, 4)
    found = pushed.slopes("height")
    assert np.allclose(found["height"], [[1] * 6, [-3] * 6]) and np.allclose(found["depth"], [[2] * 6, [.5] * 6])
    assert pushed.strongest("above_below", "height") == 1 and pushed.strongest("front_behind", "height") == 0
    assert range(6)[pushed.choosing] == range(0, 3) and range(6)[pushed.reporting] == range(3, 6)


def test_figure_7a_of_made_pushes():
    "Lower is below and in front: above goes with behind."
    pushed = made_pushes({"above_below": [1, 2], "front_behind": [-2, -1]}, noise=.01, arms=("height", "a", "b"))
    found = dp.fig7a_numbers(pushed, ["a", "b"], 1)
    assert found["pairing"]["n"] == 3 and found["pairing"]["value"] == pytest.approx(-1, abs=.01)
    assert found["slopes"]["height"]["value"] == pytest.approx(2, abs=.02)
    assert found["slopes"]["depth"]["value"] == found["sizes"]["depth"]["value"] == pytest.approx(1, abs=.02)
    assert np.shape(found["curves"]["value"]) == np.shape(found["correlations"]["value"]) == (4, 4)
    assert [v["value"] for v in found["pairings"].values()] == pytest.approx([-1, 1], abs=.01)
    assert dp.speaks_for(found["pairing"]) == "above with behind"
    assert dp.speaks_for({"value": .1, "low": -.1, "high": .3}) == dp.speaks_for({"value": None}) == "undecided"
    layers = dp.numbers_by_layer(pushed, ["a", "b"])
    assert np.allclose(layers["slopes"]["depth"]["value"], [2, 1], atol=.02) and len(layers["pairing"]) == 2
    table = dp.fig7a_table({"height": found}, 5.0)["vertical IDs, α = 5"]
    assert table["speaks for"] == "above with behind"
    assert [table[name][:3] for name in dp.PAIRINGS] == ["-1.", "1.0"], "both pairings, side by side"


def test_flat_curves_have_no_pairing():
    found = dp.fig7a_numbers(made_pushes({"above_below": [0, 0], "front_behind": [0, 0]}), ["height"], 0)
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert found["pairing"] == nothing and [*found["pairings"].values()] == [nothing] * 2
    assert dp.over_pictures(np.array([[1., 2], [np.nan, 0]]))["value"] == [1, 2]


def test_specificity_of_made_pushes():
    pushed = made_pushes({"above_below": [1, 4], "front_behind": [2, -1]}, noise=.001, arms=("height", "noise"))
    found = dp.specificity(pushed, dp.IDSet("height", "above_below", "front_behind", ["noise"]))
    assert found["layer"] == 2 and found["on"]["value"] == pytest.approx(4, abs=.01)
    assert found["off"]["value"] == pytest.approx(-1, abs=.01)
    assert found["off, size"]["value"] == pytest.approx(1, abs=.01)
    assert found["off_over_on"]["value"] == pytest.approx(.25, abs=.01), "without its sign"
    assert np.allclose(found["by_layer"]["on"]["value"], [1, 4], atol=.01)
    still = dp.specificity(made_pushes({"above_below": [0, 0], "front_behind": [1, 1]}),
                           dp.IDSet("height", "above_below", "front_behind", ["height"]))
    assert still["off_over_on"]["value"] is None and "on-axis slope" in dp.specificity_text(still)["off_over_on"]
    assert [s.on for s in dp.id_sets(1).values()] == ["front_behind", "front_behind", "above_below"]


def test_the_summary_compares_slopes_and_says_where_there_is_none():
    pushed = made_pushes({"above_below": [2, 1], "front_behind": [-1, -1]}, noise=.001, arms=("height", "one step"))
    assert dp.depth_over_height(pushed, "height", 0)["value"] == pytest.approx(.5, abs=.01)
    numbers = {arm: dp.fig7a_numbers(pushed, [arm], 0) for arm in ("height", "one step")}
    found = dp.depth_summary(pushed, numbers, None, 0)
    assert found["accuracy"] is None and found["pairing, one step"] == numbers["one step"]["pairing"]
    still = dp.depth_over_height(made_pushes({"above_below": [0, 0], "front_behind": [1, 1]}), "height", 0)
    assert still["value"] is None and "slope of above/below" in still["not_judged"]


def made_steps(depth, controls, height=2.0):
    "A vertical step that moves height and depth, and controls that move depth alone, n = 6 questions."
    arms = dict(zip(("one step", "height", *dp.STEP_CONTROLS), (depth, depth, *controls)))
    swept = {kind: made_pushes({kind: [0, 0] for kind in dp.COMPARED}).sweeps[kind] for kind in dp.COMPARED}
    for arm, slope in arms.items():
        of_height = height if arm in ("one step", "height") else 0
        one = made_pushes({"above_below": [of_height] * 2, "front_behind": [-slope] * 2}, arms=(arm,))
        for kind in dp.COMPARED: swept[kind].log_probs.update(one.sweeps[kind].log_probs)
    return dp.Pushed(swept)


def test_the_cross_slope_is_depth_over_height_less_the_largest_control():
    arms = {name: [name] for name in dp.TITLES}
    for depth in (1.0, -1.0):
        found = dp.cross_slopes(made_steps(depth, (.2, -.4, .1)), arms, 0)
        assert found["one step"]["value"] == pytest.approx(depth / 2, abs=.01), "with its sign"
        assert [found[name]["value"] for name in dp.STEP_CONTROLS] == pytest.approx([.1, .2, .05], abs=.01)
        assert found["beyond controls"]["value"] == pytest.approx(.3, abs=.01) and found["beyond controls"]["n"] == 3
    table = dp.cross_table({"flat": found}, 5.0)
    assert table["flat"]["vertical IDs, one step"] == found["one step"] and "beyond controls" in table["flat"]


def test_the_control_is_averaged_over_draws_without_its_sign():
    pushed = made_pushes({"above_below": [0, 0], "front_behind": [1, 2]}, noise=.001, arms=("a 0",))
    other = made_pushes({"above_below": [0, 0], "front_behind": [-3, -4]}, noise=.001, arms=("a 1",))
    for kind in dp.COMPARED: pushed.sweeps[kind].log_probs.update(other.sweeps[kind].log_probs)
    assert dp.depth_sizes(pushed, ["a 0", "a 1"], 1) == pytest.approx([3] * 3, abs=.01)


def test_the_claim_on_height_and_depth_and_why_it_is_not_judged():
    arms, share = {name: [name] for name in dp.TITLES}, {"value": .5, "low": .4, "high": .6, "n": 9}
    found = dp.cross_slopes(made_steps(1.0, (.2, .4, .1)), arms, 0)
    assert dp.tangled_claim(found, share, False) == found["beyond controls"]
    assert dp.tangled_claim(found, share, True)["not_judged"] == (
        "the model answers 0.50 [0.40, 0.60] of the questions about depth right")
    still = dp.cross_slopes(made_steps(1.0, (.2, .4, .1), height=0.0), arms, 0)
    assert set(still) == {"one step", "height", "beyond controls"}
    assert "slope of above/below" in dp.tangled_claim(still, share, False)["not_judged"]


def test_models_beside_come_from_their_results(monkeypatch):
    results = {"b": {"summary": {"flat": 1}, "home": "flat", "more": 2}}
    def load(name, notebook):
        if name not in results: raise FileNotFoundError
        return results[name]
    monkeypatch.setattr(dp, "load_results", load)
    found, missing = dp.beside(("a", "b", "c"), {"a": {"summary": {}, "home": "ordinary"}})
    assert list(found) == ["a", "b"] and found["b"] == {"summary": {"flat": 1}, "home": "flat"} and missing == ["c"]
    assert dp.commands_for(missing)[1:] == ["spatialid run 03 --model c", "spatialid run 05 --model c"]
    assert dp.commands_for([]) == []


def test_figures_are_drawn_of_every_kind():
    "Also where a number is not judged: panels for each kind, both pushes and the controls."
    number = {"value": .2, "low": .1, "high": .3, "n": 5}
    arms = {name: [name] for name in dp.TITLES}
    pushed = made_pushes({"above_below": [2, 1], "front_behind": [-1, -1]}, noise=.01, arms=tuple(arms))
    fig7a = {kind: {name: dp.fig7a_numbers(pushed, some, 0) for name, some in arms.items()} for kind in dp.GENERATED}
    by_layer = {kind: {name: dp.numbers_by_layer(pushed, some) for name, some in arms.items()} for kind in dp.GENERATED}
    summary = dp.depth_summary(pushed, fig7a["flat"], {"front_behind": number, "as height suggests": number}, 0)
    compared = {"a": {"summary": dict.fromkeys(dp.GENERATED, summary), "home": "flat"}}
    null = {**number, "null_high": .5}
    geometry = dict.fromkeys((1, 2), {"r2": null, "cosine_h": null, "cosine_v": null, "length": number})
    id_set = dp.IDSet("height", "above_below", "front_behind", ["random axis"])
    steered = dict.fromkeys(dp.GENERATED, dict.fromkeys(dp.id_sets(1), dp.specificity(pushed, id_set)))
    figures = [dp.plot_fig7a(fig7a, {"ordinary": 1, "flat": 2}, 5.0), dp.plot_fig7a_layers(by_layer, [1, 2], 5.0),
               dp.plot_compared(compared), dp.plot_depth_ids(geometry, steered, 7)]
    assert [len(fig.axes) for fig in figures] == [6, 6, 4, 4]
    title = figures[0].axes[3].get_title(loc="left")
    assert "flat, ℓ = 2" in title and "n = 3" in title and "n = 6" in figures[3].axes[2].get_title(loc="left")
    assert dp.compared_table(compared, "flat")["a"]["accuracy"] == "0.20 [0.10, 0.30]"
    plt.close("all")


# --- readings of known cases

def test_the_pairing_of_known_curves():
    y = np.arange(4.0)
    with_front, with_behind = np.stack([-y, y, -y, y], -1), np.stack([-y, y, y, -y], -1)
    found = [dp.pairing(dp.correlations(curves)) for curves in (with_front, with_behind)]
    assert np.allclose(found, [1, -1])
    assert np.isnan(dp.correlations(np.stack([y, 0 * y, y, y], -1))[0, 1])
    some = np.random.default_rng(0).normal(size=(5, 4, 4))
    assert np.allclose(dp.correlations(some)[2], np.corrcoef(some[2].T))


def test_the_overlap_of_known_places():
    caption, text = (np.array([[0, -1], [0, 1], [0, y], [0, -y]]) for y in (-1., 1.))
    assert dp.overlap(caption) == {"above_front": 0, "above_behind": 1}
    assert dp.overlap(text) == {"above_front": 1, "above_behind": 0}
    assert np.allclose(dp.cosine_matrix(caption)[0], [1, -1, 1, -1])
    centred = dp.within_question(np.arange(24.0).reshape(1, 4, 6))
    assert np.allclose(centred[:, 0], -centred[:, 1]) and np.allclose(centred[:, 2], -centred[:, 3])


def test_words_are_read_at_their_tokens_in_both_orders(llava):
    words, vectors = word_activations(llava, [("cup", "star")], 2, WORD_TEMPLATES)
    assert words == ["above", "below", "front", "behind", "left", "right", "near", "far"]
    assert vectors.shape == (1, 8, llava.width)
    rows = []
    for text in ("Is the cup in front of or behind the star?", "Is the cup behind or in front of the star?"):
        query = Query(None, text.replace("front", "{front}"), {"front": "front"})
        assert query.text == text
        rows.append(llava.run(query, [2], "front").residual(2)[0, 0].double().numpy())
    assert np.allclose(vectors[0, 2], np.mean(rows, 0))


def test_words_in_the_plane_of_made_ids():
    "Words that lie as the caption says, in the first two of five dimensions, a little noise beside them."
    g, basis = np.random.default_rng(0), np.eye(2, 5)
    four = np.zeros((20, 4, 5)) + np.array([-1, 1, -1, 1])[:, None] * np.eye(5)[1] + .01 * g.normal(size=(20, 4, 5))
    four[:, :2, 4] = 3 # what the two questions differ in
    for x in dp.centrings(four).values(): assert np.allclose(x.mean(1), 0)
    planes = dp.permuted_planes(g.normal(size=(4, 4, 5)), 30)
    assert all(np.allclose(plane @ plane.T, np.eye(2)) for plane in planes) and not np.allclose(planes[0], planes[1])
    found = dp.word_overlaps(dp.centrings(four)["within the question"], basis, planes)
    assert found["above_front"]["value"] < .02 < .9 < found["above_behind"]["value"]
    assert found["closer"]["value"] == found["above_front"]["value"] and 0 < found["closer"]["p"] <= 1
    matrices = dp.word_matrices(four, basis)
    assert np.allclose(matrices["in the plane"]["value"][0], [1, -1, 1, -1], atol=.01)
    assert np.allclose(matrices["coefficients on h, v"]["value"], [[0, -1], [0, 1], [0, -1], [0, 1]], atol=.02)
    assert matrices["all dimensions"]["value"][0][2] < .5, "not where the questions differ"
    assert dp.share_in_plane(four, basis) == pytest.approx(1, abs=.01)
    axes = dp.axis_numbers(np.concatenate([four, four], 1), basis)
    assert dp.axis_table(axes["in the plane"])["behind → front"].startswith("1.00")
    fig = dp.plot_fig7b(g.normal(size=(4, 4, 2)), four @ basis.T, g.normal(size=(12, 2)), matrices, axes, 4)
    assert fig.axes[0].get_title(loc="left") == "layer 4, 20 pairs"
    plt.close(fig)


def test_distances_of_words_are_in_units_of_the_scatter_of_unrelated_ones():
    "Against a loop over all couples; at 1 two words lie as far apart as unrelated ones of different questions."
    g, basis = np.random.default_rng(0), np.eye(2, 5)
    others, four = g.normal(size=(6, 5)), np.zeros((4, 5))
    squares = [((others[i] - others[j]) ** 2).sum() for i, j in permutations(range(6), 2) if i // 2 != j // 2]
    assert dp.scatter(others) == pytest.approx(np.sqrt(np.mean(squares)))
    four[0, 0] = dp.scatter(others @ basis.T) # "above" is one scatter from the other three
    found = dp.word_distances(np.tile(np.concatenate([four, others]), (8, 1, 1)), basis)
    plane = {couple: numbers["by the four words, in the plane"] for couple, numbers in found.items()}
    assert [plane[couple]["value"] for couple in dp.COUPLES] == pytest.approx([1, 0, 1, 0, 1, 0])
    assert plane["above, front"]["n"] == 8
    assert len(found["above, below"]) == 4, "two centrings in the plane and in all dimensions"
    halves = found["above, below"]["within the question, in the plane"]["value"]
    assert halves == pytest.approx(float(plane["above, below"]["value"] * dp.scatter(others @ basis.T)
                                         / dp.scatter(dp.within_question(others) @ basis.T)))


def test_unrelated_words_are_read_like_those_of_place(llava):
    words, vectors = word_activations(llava, [("cup", "star")], 2, UNRELATED_TEMPLATES)
    assert words[:4] == ["yes", "no", "red", "green"] and vectors.shape[:2] == (1, len(words))
    assert not {*chain(*WORD_TEMPLATES)} & set(words)


def test_pairs_of_objects_share_none():
    pairs = dp.object_pairs(5, seed=2)
    assert len(pairs) == 5 and len({*chain(*pairs)}) == 10 and pairs == dp.object_pairs(6, seed=2)[:5]


# --- depth IDs

def test_depth_scenes_are_what_their_cells_say():
    source = FreeScenes(1, seed=3)
    scenes = dp.depth_scenes(source, [("star", "cup"), ("cup", "star")], references=3)
    assert len(scenes) == 2 * 3 * 16 and [s.index for s in scenes] == list(range(96))
    sizes = {z: [] for z in range(4)}
    for s in scenes:
        scene = s.scene()
        thing = {t.name: t for t in scene.things}
        for name, (z, row) in ((s.a, s.a_cell), (s.b, s.b_cell)):
            t = thing[name]
            assert (t.depth, t.y) == (dp.DEPTHS[z], dp.HEIGHTS[row])
            assert .18 <= t.size <= .38 + 1e-9 and .48 <= t.size * t.depth <= .78 + 1e-9
            assert t.y <= scene.horizon + 1 / t.depth - t.size / 2, "such a thing can hang there in an ordinary scene"
            sizes[z].append(t.size)
        assert {t.x for t in scene.things} == set(dp.SIDES) and scene.things[0].depth >= scene.things[1].depth
    assert np.diff([np.mean(v) for v in sizes.values()]).max() < 0, "nearer is larger"
    again = dp.depth_scenes(source, [("star", "cup")], 3)[5]
    assert np.array_equal(np.asarray(scenes[5].image()), np.asarray(again.image()))
    assert each_with_another(["a", "b", "c"]) == [("c", "a"), ("a", "b"), ("b", "c")]
    fig = dp.plot_depth_scenes(scenes, (0, 3))
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["cup: depth 1.5", "cup: depth 3"]
    plt.close(fig)


def test_depth_ids_are_extracted_like_spatial_ids(llava):
    scenes = dp.depth_scenes(FreeScenes(1, seed=3, px=16), [("star", "cup"), ("cup", "star")], references=2)
    ids = extract(llava, scenes, dp.FRONT_BEHIND, progress=False)
    assert ids.ids.shape == (4, 4, 4, 32) and ids.objects == ["cup", "star"]
    rows = llava.run([s.query() for s in scenes[:32]], [2], "subject").residual(2)[:, 0].double().numpy()
    rows = rows.reshape(2, 16, -1) # the cells of b, for each cell of a
    wanted = (rows - rows.mean(1, keepdims=True)).mean(0).reshape(4, 4, -1)
    assert np.allclose(ids.table[0, 0, 1], wanted, atol=1e-5)


def test_depth_statistics_of_known_ids():
    g = np.random.default_rng(0)
    h, v, z = np.linalg.qr(g.normal(size=(9, 3)))[0].T
    grid = np.arange(4.0)[None, :, None] * z + np.arange(4.0)[:, None, None] * v # linear in depth, and in height
    gram = lambda x, *hv: (lambda r: r @ r.T)(np.concatenate([x.reshape(16, -1), np.stack(hv)]))
    found = dp.depth_statistics(gram(grid, h, z + v))
    assert np.isclose(found["r2"], 1) and np.isclose(found["cosine_h"], 0) and np.isclose(found["cosine_v"], .5**.5)
    bent = grid.copy()
    bent[:, :, :] += (np.arange(4) == 2)[None, :, None] * h * 2
    inner, x = bent - bent.mean(1, keepdims=True), np.arange(4) - 1.5 # the slow way: one line for all heights
    line = np.einsum("x,yxd->d", x, inner) / (4 * (x**2).sum())
    left = ((inner - x[None, :, None] * line)**2).sum()
    assert np.isclose(dp.depth_statistics(gram(bent, h, v))["r2"], 1 - left / (inner**2).sum())


def test_the_null_permutes_depths_within_each_height():
    grid = np.random.default_rng(0).normal(size=(4, 4, 3))
    permuted = dp.depth_null(grid, 50)
    assert permuted.shape == (50, 4, 4, 3) and len({x.tobytes() for x in permuted}) > 40
    for x in permuted[:10]:
        for before, after in zip(grid, x): assert sorted(map(tuple, before)) == sorted(map(tuple, after))


def test_the_geometry_of_known_depth_ids():
    "Depth along the vertical axis of the spatial IDs, half as long, for three objects alike."
    h, v = np.eye(2, 9)
    steps = np.arange(4.0) - 1.5
    spatial = steps[None, :, None] * h + steps[:, None, None] * v
    depth = .5 * steps[None, :, None] * v + .001 * np.random.default_rng(0).normal(size=(4, 4, 9))
    def as_ids(grid):
        pairs = [("a", "b"), ("b", "c"), ("c", "a")]
        table = np.broadcast_to(grid, (3, 1, 1, 4, 4, 9)).astype("float32")
        return SpatialIDs(table, np.ones((3, 1, 4, 4)), [b for _, b in pairs], [1], [1], pairs, "")
    found = dp.depth_geometry(as_ids(depth), as_ids(spatial), 1, n_null=100)
    assert found["r2"]["value"] == pytest.approx(1, abs=.01) and found["r2"]["p"] == pytest.approx(1 / 101)
    assert found["cosine_v"]["value"] == pytest.approx(1, abs=.01) and abs(found["cosine_h"]["value"]) < .01
    assert found["length"]["value"] == pytest.approx(.5, abs=.01) and found["r2"]["null_high"] < 1


# --- the bundled organism

@pytest.mark.slow
def test_first_tokens_and_whole_answers_on_the_organism():
    vlm, n = VLM.load("llava-tiny"), 3
    queries = dp.both_questions(FreeScenes(100, seed="depth test"), n).queries["front_behind"]
    ids = SpatialIDs.load(ROOT / "results" / "llava-tiny" / "spatial_ids.safetensors")
    strings = dp.in_use(dp.answer_strings(vlm, queries))
    assert [len(a) for a in strings] == [1, 1]
    assert {len(s) for s in chain(*strings)} == {1}, "each answer is one token with a space before it"
    edits = dp.push_edits(lambda *places: moves(ids, *places), {0: dp.along(n, 1)[0]}, 5.0, "height")
    kept, every = (dp.answer_sweep(vlm, queries, edits, [2], strings=s) for s in (strings, None))
    assert torch.allclose(kept.log_probs["height 0"], every.log_probs["height 0"], atol=1e-3)
    assert not torch.allclose(kept.log_probs["height 0"][0], kept.base_log_probs, atol=1e-2)


def test_the_claims_point_at_numbers_of_the_notebook():
    register = json.loads((ROOT / "nbs" / "claims.json").read_text())
    rules = [c["rule"] for c in register if c["id"].startswith("fig7")]
    assert len(rules) == 2 and all(r["notebook"] == "05_depth" for r in rules)
    results = json.loads((ROOT / "results" / "llava-tiny" / "05_depth.json").read_text())
    for rule in rules:
        number = results["claims"][rule["key"].split(".")[1]]
        assert number.get("not_judged") or number["low"] <= number["value"] <= number["high"] and number["n"] > 1
