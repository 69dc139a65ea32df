"Depth: whole answers under steering against whole sequences, both questions about one pair, depth scenes and IDs, and what the readings say of known cases."
import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, tiny_llava

from spatialid import depth as dp
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.scenes import FreeScenes, Scene, Thing, question_texts, relation
from spatialid.extraction import SpatialIDs, extract
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.edits import gaussian, moves
from spatialid.edits import add
from spatialid.sweeps import in_float64, sweep

ROOT = Path(__file__).parents[1]


def picture(seed, px=16): return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (px, px, 3), dtype=np.uint8))


def ask(i, kind="front_behind", px=16):
    template, answers = dp.QUESTIONS[kind]
    names = ["cup", "hot dog", "star", "cat"] # of one and of two words: prompts of different lengths, padded
    return Query(picture(i, px), template, {"subject": names[i % 4], "object": names[(i + 1) % 4]}, answers, answers[i % 2], kind)


@pytest.fixture(scope="module")
def llava(): return in_float64(VLM(*tiny_llava(), "tiny"))


# --- whole answers, against whole sequences

def by_whole_sequence(vlm, query, string, layer=None, vector=None):
    "The oracle: prompt and answer as one sequence, one plain forward pass with one hook, log-probabilities of the answer's tokens added up."
    batch, k = vlm.encode([query]), len(string)
    n, row = batch["input_ids"].shape[1], vlm.positions(query, "subject")[0]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([string])], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in batch: batch[key] = torch.cat([batch[key], torch.zeros(1, k, dtype=batch[key].dtype)], 1)
    if "cross_attention_mask" in batch: batch["cross_attention_mask"] = torch.cat([batch["cross_attention_mask"]] + k * [batch["cross_attention_mask"][:, -1:]], 1)
    if "position_ids" in batch: batch["position_ids"] = vlm.model.model.get_rope_index(**batch)[0] if vlm.family.mrope else torch.arange(n + k)[None]
    def hook(module, args):
        h = args[0].clone()
        h[0, row] += vector
        return (h, *args[1:])
    handle = vlm.receivers[layer - 1].register_forward_pre_hook(hook) if layer else None
    try:
        with torch.inference_mode(): logits = vlm.model(**batch.to(vlm.device, vlm.model.dtype), use_cache=False).logits[0]
    finally:
        if handle: handle.remove()
    assert len(logits) == n + k
    return float(sum(logits[n - 1 + i].log_softmax(-1)[token] for i, token in enumerate(string)))


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
    assert swept.path == ("fast" if vlm.family.fast else "plain") and swept.log_probs["push"].shape == (1, 2, 2) and swept.truth.tolist() == [0, 1]
    moved = 0
    for b, query in enumerate(queries):
        for k, answer in enumerate(few):
            plain, pushed = (torch.tensor([by_whole_sequence(vlm, query, s, *how) for s in answer], dtype=torch.float64) for how in ((), (2, vector)))
            assert abs(float(swept.base_log_probs[b, k]) - float(plain.logsumexp(0))) < 1e-8
            assert abs(float(swept.log_probs["push"][0, b, k]) - float(pushed.logsumexp(0))) < 1e-8
            assert max(abs(float(clean[k][s][b]) - float(x)) for s, x in zip(answer, plain)) < 1e-8
            moved = max(moved, float((plain - pushed).abs().max()))
    assert moved > 1e-3, "the push does something"


def test_fast_and_plain_sweeps_of_all_spellings_agree_at_every_layer(llava):
    queries = [ask(i, "above_below") for i in range(3)]
    edits = {"push": ("subject", add(torch.ones(llava.width))), "noise": (("subject", "object"), add(torch.randn(2, llava.width, dtype=torch.float64)))}
    fast, plain = (dp.answer_sweep(llava, queries, edits, plain=p) for p in (False, True))
    assert (fast.path, plain.path) == ("fast", "plain") and fast.layers == [1, 2, 3, 4]
    assert max(float((fast.log_probs[n] - plain.log_probs[n]).abs().max()) for n in edits) < 1e-9


def test_one_token_answers_are_one_ordinary_sweep(llava):
    queries = [ask(i) for i in range(3)]
    strings = [[(ids[0],)] for ids in llava.answer_ids(queries[0])]
    edits = {"push": ("subject", add(torch.ones(llava.width)))}
    whole, first = dp.answer_sweep(llava, queries, edits, strings=strings), sweep(llava, queries, edits=edits, logits=True)
    tokens = [s[0][0] for s in strings]
    assert torch.allclose(whole.log_probs["push"], first.logits["push"].log_softmax(-1)[..., tokens], atol=1e-9)
    calls = []
    dp.along_strings(llava, [s for answer in strings for s in answer], lambda view: calls.append(view.said) or {"": torch.zeros(1, len(view.options))})
    assert calls == [()]


def test_strings_of_a_whole_vocabulary_sum_to_one(llava):
    "All strings of one token, and all that go on after one of them, exhaust the probability."
    queries, size = [ask(0)], llava.model.get_output_embeddings().weight.shape[0]
    strings = [(t,) for t in range(size) if t != 7] + [(7, t) for t in range(size)]
    found = dp.answer_strings(llava, queries, [strings])[0]
    assert abs(float(torch.stack([*found.values()]).logsumexp(0)[0])) < 1e-9


def test_the_view_keeps_the_places_of_words(llava):
    query, view = ask(1), dp.Continued(llava, (5, 6, 7), [8])
    assert view.positions(query, ("subject", "object", "last", "image")) == llava.positions(query, ("subject", "object", "last", "image"))
    assert view.positions(query, lambda q: [0, -1]) == llava.positions(query, lambda q: [0, -1])
    assert view.encode([query])["input_ids"][0, -3:].tolist() == [5, 6, 7]
    assert llava.encode([query])["input_ids"].shape[1] + 3 == view.encode([query])["input_ids"].shape[1]


def test_spellings_are_the_forms_less_those_already_counted(llava):
    strings, tok = dp.spellings(llava, [ask(0), ask(1)]), llava.tokenizer
    for word, answer in zip(("front", "behind"), strings):
        assert {tok.decode(s).strip() for s in answer} <= {word, word.capitalize()} and len(answer) >= 2
        assert not any(a != b and b[:len(a)] == a for a, b in permutations(answer, 2))


def test_a_spelling_that_begins_with_another_is_counted_once():
    table = {"P": [0], "Pfront": [0, 1], "PFront": [0, 3, 4], "P front": [0, 1, 2], "P Front": [5]} # the last one swallows the prompt's token
    table |= {"\n" + k[1:]: v for k, v in table.items()}
    stub = SimpleNamespace(tokenizer=Tokens(table))
    assert dp._spellings(stub, "P", ("front",)) == [[(1,), (3, 4)]]


class Tokens(dict):
    unk_token_id = 9
    def __call__(self, text, add_special_tokens): return {"input_ids": self[text]}


def test_what_cannot_be_scored_is_named(llava):
    one = ask(0)
    with pytest.raises(ValueError, match="same answers, in the same order"): dp.spellings(llava, [one, ask(0, "above_below")])
    with pytest.raises(ValueError, match="same answers"): dp.spellings(llava, [Query(None, "Is it?")])
    with pytest.raises(ValueError, match="'behindhand' begins with 'behind'"): dp.spellings(llava, [Query(None, "Where?", answers=("behind", "behindhand"))])
    with pytest.raises(ValueError, match="cannot write '☂'"): dp.spellings(llava, [Query(None, "Where?", answers=("☂", "☃"))])


def test_spellings_in_use():
    low, high = torch.log(torch.tensor([.001, .9])), torch.log(torch.tensor([.999, .1]))
    assert dp.in_use([{(1,): low, (2, 3): high}]) == [[(1,), (2, 3)]] and dp.in_use([{(1,): low[:1], (2, 3): high[:1]}]) == [[(2, 3)]]


# --- questions

@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.slow
def test_both_questions_are_about_one_pair_and_true(flat):
    source = FreeScenes(40, seed=4, flat=flat)
    found, places = dp.both_questions(source, 12, seed=1)
    assert [len(v) for v in found.values()] == [12, 12] and places.shape == (12, 2)
    scenes = [(s, {o.name for o in s.things}) for s in source]
    for height, depth, place in zip(*found.values(), places):
        assert height.words == depth.words and height.image is depth.image
        scene = next(s for s, names in scenes if {*height.words.values()} <= names and np.array_equal(np.asarray(s.image()), np.asarray(height.image)))
        s, o = (next(t for t in scene.things if t.name == height.words[w]) for w in ("subject", "object"))
        assert (height.truth, depth.truth) == (relation("above_below", s, o), relation("front_behind", s, o)) and None not in (height.truth, depth.truth)
        assert np.allclose(place, (4 * s.x - .5, 4 * s.y - .5))
    again, _ = dp.both_questions(source, 12, seed=1, instruction=" Answer {} or {}.")
    assert [q.words for q in again["above_below"]] == [q.words for q in found["above_below"]] and again["front_behind"][0].text.endswith("? Answer front or behind.")
    assert dp.FRONT_BEHIND.format(subject="", object="") in question_texts()


def test_both_questions_of_a_benchmark(tmp_path):
    bench = Benchmark(write_benchmark(tmp_path / "b", n=40))
    found, places = dp.both_questions(bench, 100)
    rows = [r for r in bench if r.kind == "above_below"]
    assert 5 < len(places) == len({r.image_id for r in rows}) and {q.truth for q in found["front_behind"]} == {None}
    by_words = {(r.subject, r.object, r.truth): r for r in rows}
    for q, place in zip(found["above_below"], places):
        row = by_words[q.words["subject"], q.words["object"], q.truth]
        x, y, w, h = row.boxes()[0]
        assert np.allclose(place, (4 * (x + w / 2) / 80 - .5, 4 * (y + h / 2) / 80 - .5))
    with pytest.raises(ValueError, match="no picture of this source"): dp.both_questions(FreeScenes(1, seed=0, things=(1, 1)), 5)


# --- what height says of depth

def test_correlation_from_sums_is_pearson():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    sums = [len(x), x.sum(), y.sum(), (x**2).sum(), (y**2).sum(), (x * y).sum()]
    assert np.isclose(dp.correlation(sums), np.corrcoef(x, y)[0, 1])


def test_height_says_nothing_of_depth_in_flat_scenes():
    found = {flat: dp.height_and_depth(FreeScenes(400, seed=2, flat=flat)) for flat in (False, True)}
    r = {flat: float(dp.correlation(sums.sum(0))) for flat, (sums, _) in found.items()}
    assert r[False] < -.3 and abs(r[True]) < .1
    assert found[False][1].mean() > .7 and .38 < found[True][1].mean() < .62 and set(found[True][1]) <= {0., 1.}


# --- pushes

def made_ids(m=4, d=6, layers=3, seed=0):
    g = np.random.default_rng(seed)
    return SpatialIDs(g.normal(size=(1, 1, layers, m, m, d)).astype("float32"), np.ones((1, 1, m, m)), ["all"], [1], list(range(1, layers + 1)), [("a", "b")], "")


def test_pushes_along_a_line():
    column, row = dp.along(2, 1), dp.along(2, 0, across=1.5)
    assert column[0][0].tolist() == [[[0, 0]]] * 2 and column[0][1].tolist() == [[[0, 3]]] * 2 and row[3][0].tolist() == [[[3, 1.5]]] * 2
    own = dp.along(2, 1, start=np.array([[1, 2], [3, .5]]))
    assert own[3][1].tolist() == [[[1, 2]], [[3, .5]]]
    ids = made_ids()
    for k, (group, new) in enumerate(dp.push_edits(lambda to, frm: moves(ids, to, frm), column, 5.0, "x").values()):
        assert group == "subject"
        rows = torch.zeros(2, 1, 6, dtype=torch.float64)
        wanted = 5 * torch.tensor(ids.at(2)[k, 0] - ids.at(2)[3 - k, 0])
        assert torch.allclose(new(rows, 2, slice(0, 2))[1, 0], wanted)


def test_a_random_axis_has_the_norms_and_sides_of_the_push():
    ids, column = made_ids(), dp.along(3, 1)
    find, noise = (lambda to, frm: moves(ids, to, frm)), gaussian(6, 1, 0, 0)
    real, random = (dp.push_edits(find, column, 5.0, "x", 1, n) for n in (None, noise))
    rows = torch.zeros(3, 1, 6, dtype=torch.float64)
    a, b = (torch.stack([new(rows, 1, slice(0, 3)) for _, new in edits.values()]) for edits in (real, random))
    assert torch.allclose(a.norm(dim=-1), b.norm(dim=-1)) and torch.allclose(b[0], -b[3]) and not torch.allclose(a, b)
    direction = b / b.norm(dim=-1, keepdim=True)
    assert torch.allclose(direction[0], direction[1]) and torch.allclose(direction[2], direction[3]) and not torch.allclose(direction[3, 0], direction[3, 1])


def test_dealt_ids_are_the_same_ids_elsewhere():
    ids = made_ids()
    dealt = dp.dealt_ids(ids, 0, 1)
    rows = lambda x: sorted(map(tuple, x.at(2).reshape(16, -1).round(5).tolist()))
    assert rows(ids) == rows(dealt) and not np.allclose(ids.at(2), dealt.at(2)) and np.array_equal(dealt.at(2), dp.dealt_ids(ids, 0, 1).at(2))


# --- readings of known cases

def test_the_pairing_of_known_curves():
    y = np.arange(4.0)
    with_front, with_behind = np.stack([-y, y, -y, y], -1), np.stack([-y, y, y, -y], -1)
    assert np.isclose(dp.pairing(dp.correlations(with_front)), 1) and np.isclose(dp.pairing(dp.correlations(with_behind)), -1)
    assert np.isnan(dp.correlations(np.stack([y, 0 * y, y, y], -1))[0, 1])
    some = np.random.default_rng(0).normal(size=(5, 4, 4))
    assert np.allclose(dp.correlations(some)[2], np.corrcoef(some[2].T))


def test_the_overlap_of_known_places():
    caption, text = np.array([[0, -1], [0, 1], [0, -1], [0, 1.]]), np.array([[0, -1], [0, 1], [0, 1], [0, -1.]])
    assert dp.overlap(caption) == {"above_front": 0, "above_behind": 1} and dp.overlap(text) == {"above_front": 1, "above_behind": 0}
    assert np.allclose(dp.cosines(caption)[0], [1, -1, 1, -1])
    centred = dp.within_question(np.arange(24.0).reshape(1, 4, 6))
    assert np.allclose(centred[:, 0], -centred[:, 1]) and np.allclose(centred[:, 2], -centred[:, 3])


def test_words_are_read_at_their_tokens_in_both_orders(llava):
    words, vectors = dp.word_vectors(llava, [("cup", "star")], 2)
    assert words == ["above", "below", "front", "behind", "left", "right", "near", "far"] and vectors.shape == (1, 8, llava.width)
    rows = []
    for text in ("Is the cup in front of or behind the star?", "Is the cup behind or in front of the star?"):
        query = Query(None, text.replace("front", "{front}"), {"front": "front"})
        assert query.text == text
        rows.append(llava.run(query, [2], "front").residual(2)[0, 0].double().numpy())
    assert np.allclose(vectors[0, 2], np.mean(rows, 0))


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
            assert (t.depth, t.y) == (dp.DEPTHS[z], dp.HEIGHTS[row]) and .18 <= t.size <= .38 + 1e-9 and .48 <= t.size * t.depth <= .78 + 1e-9
            assert t.y <= scene.horizon + 1 / t.depth - t.size / 2, "such a thing can hang there in an ordinary scene"
            sizes[z].append(t.size)
        assert {t.x for t in scene.things} == set(dp.SIDES) and scene.things[0].depth >= scene.things[1].depth
    assert np.diff([np.mean(v) for v in sizes.values()]).max() < 0, "nearer is larger"
    assert np.array_equal(np.asarray(scenes[5].image()), np.asarray(dp.depth_scenes(source, [("star", "cup")], 3)[5].image()))


def test_depth_ids_are_extracted_like_spatial_ids(llava):
    scenes = dp.depth_scenes(FreeScenes(1, seed=3, px=16), [("star", "cup"), ("cup", "star")], references=2)
    ids = extract(llava, scenes, dp.FRONT_BEHIND, progress=False)
    assert ids.ids.shape == (4, 4, 4, 32) and ids.objects == ["cup", "star"]
    run = llava.run([s.query() for s in scenes[:32]], [2], "subject").residual(2)[:, 0].double().numpy().reshape(2, 16, -1)
    wanted = (run - run.mean(1, keepdims=True)).mean(0).reshape(4, 4, -1) # the cells of b, less their mean, for each cell of a
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
    inner, x = bent - bent.mean(1, keepdims=True), np.arange(4) - 1.5 # the slow way: fit a line for all heights together
    line = np.einsum("x,yxd->d", x, inner) / (4 * (x**2).sum())
    assert np.isclose(dp.depth_statistics(gram(bent, h, v))["r2"], 1 - ((inner - x[None, :, None] * line)**2).sum() / (inner**2).sum())


def test_the_null_deals_depths_within_each_height():
    grid = np.random.default_rng(0).normal(size=(4, 4, 3))
    dealt = dp.depth_null(grid, 50)
    assert dealt.shape == (50, 4, 4, 3) and len({x.tobytes() for x in dealt}) > 40
    for x in dealt[:10]:
        for row, one in zip(grid, x): assert sorted(map(tuple, row)) == sorted(map(tuple, one))


# --- the bundled organism

@pytest.mark.slow
def test_first_tokens_and_whole_answers_on_the_organism():
    vlm, n = VLM.load("llava-tiny"), 3
    queries = dp.both_questions(FreeScenes(100, seed="depth test"), n)[0]["front_behind"]
    ids = SpatialIDs.load(ROOT / "results" / "llava-tiny" / "spatial_ids.safetensors")
    strings = dp.in_use(dp.answer_strings(vlm, queries))
    assert [len(a) for a in strings] == [1, 1] and all(len(s) == 1 for a in strings for s in a), "each answer is one token with a space before it"
    edits = dp.push_edits(lambda to, frm: moves(ids, to, frm), {0: dp.along(n, 1)[0]}, 5.0, "height")
    kept, every = (dp.answer_sweep(vlm, queries, edits, [2], strings=s) for s in (strings, None))
    assert torch.allclose(kept.log_probs["height 0"], every.log_probs["height 0"], atol=1e-3) and not torch.allclose(kept.log_probs["height 0"][0], kept.base_log_probs, atol=1e-2)


def test_the_claims_point_at_numbers_of_the_notebook():
    rules = [c["rule"] for c in json.loads((ROOT / "nbs" / "claims.json").read_text()) if c["id"].startswith("fig7")]
    assert len(rules) == 2 and all(r["notebook"] == "05_depth" for r in rules)
    results = json.loads((ROOT / "results" / "llava-tiny" / "05_depth.json").read_text())
    for rule in rules:
        number = results["claims"][rule["key"].split(".")[1]]
        assert number.get("not_judged") or number["low"] <= number["value"] <= number["high"] and number["n"] > 1
