"""Steering: while a model runs and generates, it is what plain hooks do, and nothing of it remains.

Edits, places and readings are what their names say."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatialid.ceiling import mirror_swaps
from spatialid.edits import at_place, permuted_places
from spatialid.hooks import RULES, scaled
from spatialid.questions import answers_right, questions
from spatialid.sweeps import change, layers_near, slope, swept_layers
from spatialid.store import read_results, results_dir
from spatialid.scenes import between
from spatialid import steering as st
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.scenes import FreeScenes, GridScenes, Thing, grid_pairs
from spatialid.extraction import SpatialIDs
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.plots import plot_line
from spatialid.query import Query
from spatialid.sweeps import Sweep, sweep
from tiny import tiny, tiny_llava

ROOT = Path(__file__).parents[1]
QUESTION = "Is the {subject} to the left or right of the {object}?"


def picture(seed, px=16):
    pixels = np.random.default_rng(seed).integers(0, 255, (px, px, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def query_about(subject="cup", object="hot dog", seed=0, image=True, **kwargs):
    words = {"subject": subject, "object": object}
    return Query(picture(seed) if image else None, QUESTION, words, ("left", "right"), "left", **kwargs)


@pytest.fixture(scope="module")
def llava(): return VLM(*tiny_llava(dtype=torch.float64), "tiny")


def vector(vlm, seed=0): return torch.tensor(np.random.default_rng(seed).normal(size=(vlm.n_layers, vlm.width)))


# --- the size of a push

def test_each_rule_is_its_formula():
    x, to, origin = (torch.randn(3, 7, dtype=torch.float64) for _ in range(3))
    size, unit = x.norm(dim=1, keepdim=True), lambda v: v / v.norm(dim=1, keepdim=True)
    assert torch.allclose(scaled(to, origin, x, 2, "raw"), 2 * (to - origin))
    assert torch.allclose(scaled(to, origin, x, 2, "diff_norm"), 2 * size * unit(to - origin))
    assert torch.allclose(scaled(to, origin, x, 2, "each_norm"), 2 * size * (unit(to) - unit(origin)))
    assert torch.allclose(scaled(to, None, x, 2), 2 * size * unit(to))
    with pytest.raises(ValueError, match="diff_norm, each_norm, raw"): scaled(to, origin, x, 2, "other")


@pytest.mark.parametrize("rule", RULES)
def test_two_equal_places_push_nothing(rule):
    x, to = torch.randn(2, 3, 7)
    assert torch.equal(scaled(to, to, x, 5, rule), torch.zeros_like(x))


def test_half_precision_is_scaled_in_float32():
    x = torch.full((4,), 200.0, dtype=torch.float16) # the squares overflow
    push = scaled(torch.ones(4), None, x, 5)
    assert push.dtype == torch.float16 and torch.equal(push, torch.full((4,), 1000.0, dtype=torch.float16))


# --- steering a model, against plain hooks

def unsaid(vlm): return [*vlm.image_ids, vlm.tokenizer.eos_token_id]


def by_hooks(vlm, batch, layer, where, v, scale, rule, steps):
    """Greedy generation without a cache: one whole pass per token.

    The rows of the prompt are changed in each by a forward hook on the receiving module."""
    def hook(module, args):
        h = args[0].clone()
        for b, row in where: h[b, row] = h[b, row] + scaled(v, None, h[b, row], scale, rule)
        return (h, *args[1:])
    handle = vlm.receivers[layer - 1].register_forward_pre_hook(hook)
    batch, logits = dict(batch), []
    try:
        for _ in range(steps):
            with torch.inference_mode(): logits.append(vlm.model(**batch, use_cache=False).logits[:, -1])
            allowed = logits[-1].index_fill(1, torch.tensor(unsaid(vlm)), -torch.inf) # random weights may say anything
            said = allowed.argmax(-1, keepdim=True)
            batch["input_ids"] = torch.cat([batch["input_ids"], said], 1)
            batch["attention_mask"] = torch.cat([batch["attention_mask"], batch["attention_mask"][:, -1:]], 1)
            for key in ("token_type_ids", "mm_token_type_ids"):
                if key in batch: batch[key] = torch.cat([batch[key], torch.zeros_like(batch[key][:, :1])], 1)
            if "position_ids" in batch:
                positions = batch["position_ids"]
                batch["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], -1)
            if "cross_attention_mask" in batch:
                mask = batch["cross_attention_mask"]
                batch["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
    finally: handle.remove()
    return torch.stack(logits, 1), batch["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_plain_hooks(family):
    vlm = VLM(*tiny(family, dtype=torch.float64), "tiny")
    queries = [query_about(), query_about("dog", "cup", 1)]
    batch = vlm.encode(queries)
    batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    layer, v = 2, vector(vlm)[1]
    pad = (batch["attention_mask"] == 0).sum(1).tolist()
    where = [(b, pad[b] + vlm.positions(q, "subject")[0]) for b, q in enumerate(queries)]
    plain, said = by_hooks(vlm, batch, layer, [], v, 3, "diff_norm", 4)
    wanted, said_steered = by_hooks(vlm, batch, layer, where, v, 3, "diff_norm", 4)
    state = {k: t.clone() for k, t in vlm.model.state_dict().items()}
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=unsaid(vlm),
                    return_dict_in_generate=True, output_logits=True)
    with vlm.steer(queries, {"subject": vector(vlm)}, layer=layer, scale=3, rule="diff_norm"):
        out = vlm.model.generate(**batch, **settings)
        run = vlm.run(queries)
    found = torch.stack(out.logits, 1) # float32, whatever the model is
    assert torch.equal(out.sequences, said_steered)
    assert (found - wanted).abs().max() < 1e-5 and (run.logits - wanted[:, 0]).abs().max() < 1e-10
    assert (wanted - plain).abs().max() > 1e-3, "steering must do something for this test to mean anything"
    after = vlm.model.generate(**batch, **settings)
    assert torch.equal(after.sequences, said) and (torch.stack(after.logits, 1) - plain).abs().max() < 1e-5
    assert all(torch.equal(t, state[k]) for k, t in vlm.model.state_dict().items())


def test_nothing_remains_after_the_with(llava):
    count = lambda module: (len(module._forward_pre_hooks), len(module._forward_hooks))
    hooks = lambda: {name: count(module) for name, module in llava.model.named_modules()}
    query = query_about()
    plain, before = llava.run(query).logits, hooks()
    with llava.steer(query, {"subject": vector(llava)}, layer=1): steered = llava.run(query).logits
    assert hooks() == before and torch.equal(llava.run(query).logits, plain) and not torch.equal(steered, plain)
    with pytest.raises(RuntimeError):
        with llava.steer(query, {"subject": vector(llava)}, layer=1): raise RuntimeError
    assert hooks() == before and torch.equal(llava.run(query).logits, plain)


@pytest.mark.parametrize("rule", RULES)
def test_steer_is_patch(llava, rule):
    queries, to, origin = [query_about(), query_about("dog", "cat", 3)], vector(llava, 1)[1], vector(llava, 2)[1]
    steered = lambda rows: rows + scaled(to, origin, rows, 2, rule)
    with llava.patch({2: ("subject", steered)}): wanted = llava.run(queries).logits
    with llava.steer(queries, {"subject": (to, origin)}, layer=2, scale=2, rule=rule): found = llava.run(queries).logits
    assert torch.equal(found, wanted)


def test_a_layer_is_taken_from_vectors_of_all_layers(llava):
    v, query = vector(llava), query_about()
    with llava.steer(query, {"object": v}, layer=3): one = llava.run(query).logits
    with llava.steer(query, {"object": v[2]}, layer=3): two = llava.run(query).logits
    assert torch.equal(one, two)


def test_many_queries_in_any_batches(llava):
    queries = [query_about("cup", "star", 1), query_about("hot dog", "cat", 2), query_about("dog", "cup", 3)]
    with llava.steer(queries, {"subject": vector(llava)}, layer=2):
        together = llava.run(queries).logits
        apart = torch.cat([llava.run(q).logits for q in queries[::-1]]).flip(0)
        batch = llava.encode(queries[:1]).to("cpu", torch.float64)
        beams = llava.model.generate(**batch, max_new_tokens=2, num_beams=3, num_return_sequences=3)
    assert (together - apart).abs().max() < 1e-12 and len(beams) == 3


def test_captured_rows_are_the_steered_ones(llava):
    query, v = query_about(), vector(llava)[1]
    before = llava.run(query, [2], "subject").residual(2)
    with llava.steer(query, {"subject": v}, layer=2): after = llava.run(query, [2], "subject").residual(2)
    assert torch.allclose(after - before, v.expand_as(before), atol=1e-12)


def test_mllama_without_a_picture():
    vlm = VLM(*tiny("mllama", dtype=torch.float64), "tiny")
    query = query_about(image=False)
    plain = vlm.run(query).logits
    for layer in (1, 2): # nothing reads the word after block 3, where block 4 is skipped
        with vlm.steer(query, {"subject": vector(vlm)}, layer=layer):
            assert not torch.equal(vlm.run(query).logits, plain)
    with pytest.raises(ValueError, match="only words"):
        with vlm.steer(query_about(), {"image": vector(vlm)}, layer=1): pass


def test_what_cannot_be_steered_is_said(llava):
    query, v = query_about(), vector(llava)
    def says(text, call, **kwargs):
        with pytest.raises(ValueError, match=text):
            with llava.steer(*kwargs.pop("args", (query, {"subject": v})), **{"layer": 1, **kwargs}): call()
    says("none of the 1 that are steered", lambda: llava.run(query_about("dog")))
    says("no layer 9", lambda: None, layer=9)
    says("nothing to steer", lambda: None, args=(query, {}))
    says("nothing to steer", lambda: None, args=(query, np.zeros(64)))
    says("a push is 32 numbers", lambda: None, args=(query, {"subject": v[:2]}))
    says("not a marked word", lambda: None, args=(query, {"third": v}))
    says("scales both ends", lambda: None, rule="each_norm")
    says("no rule", lambda: llava.run(query), rule="none")
    unchanged = {"x": ("subject", lambda rows, layer, samples: rows)}
    says("sweep outside the with", lambda: sweep(llava, [query], edits=unchanged))
    embedded = llava.model.get_input_embeddings()(llava.encode([query])["input_ids"])
    says("input_ids", lambda: llava.model(inputs_embeds=embedded))
    cache = llava.model(**llava.encode([query]).to("cpu", torch.float64), use_cache=True).past_key_values
    says("before the steering began", lambda: llava.model(input_ids=torch.tensor([[5]]), past_key_values=cache))


# --- places and edits

def grid_ids(vlm, m=4, seed=0, linear=False):
    "IDs of a model, one object, one size; linear in column and row if queries for."
    g = np.random.default_rng(seed)
    table = g.normal(size=(1, 1, vlm.n_layers, m, m, vlm.width))
    if linear:
        y, x = np.mgrid[:m, :m][..., None]
        table = np.stack([x * h + y * v for h, v in g.normal(size=(vlm.n_layers, 2, vlm.width))])[None, None]
    layers, counts = list(range(1, vlm.n_layers + 1)), np.ones((1, 1, m, m), int)
    return SpatialIDs(table, counts, ["all"], [224], layers, [("a", "b")], QUESTION)


def random_ids(vlm, g):
    "IDs drawn from a generator, for all eight layers of llava-tiny."
    table = g.standard_normal((1, 1, 8, 4, 4, vlm.width))
    return SpatialIDs(table, np.ones((1, 1, 4, 4)), ["all"], [224], list(range(1, 9)), [("a", "all")], "")


def test_places_are_exact_at_cells_and_linear_between_and_beyond():
    ids = np.random.default_rng(0).normal(size=(4, 4, 5))
    y, x = np.mgrid[:4, :4]
    assert np.allclose(at_place(ids, np.stack([x, y], -1)), ids)
    assert np.allclose(at_place(ids, (1.5, 2)), (ids[2, 1] + ids[2, 2]) / 2)
    assert np.allclose(at_place(ids, (4, 1)), 2 * ids[1, 3] - ids[1, 2])
    assert np.allclose(at_place(ids, (0, -1)), 2 * ids[0, 0] - ids[1, 0])
    h, v = np.random.default_rng(1).normal(size=(2, 5))
    line = x[..., None] * h + y[..., None] * v
    for place in np.random.default_rng(2).uniform(-3, 7, (20, 2)):
        assert np.allclose(at_place(line, place), place[0] * h + place[1] * v)


def test_moves_take_every_row_of_every_query_to_its_place(llava):
    ids = grid_ids(llava)
    to, origin = np.array([[[0, 0], [3, 1]], [[2, 2], [1, 0]]]), np.array([[[3, 0], [0, 1]], [[0, 2], [1, 3]]])
    found = st.moves(ids, to, origin)(2, slice(1, 2))
    grid = ids.at(2)
    assert np.allclose(found[0], [[grid[2, 2], grid[0, 1]]]) and np.allclose(found[1], [[grid[2, 0], grid[3, 1]]])
    assert st.moves(ids, to)(2, slice(0, 2))[1] is None
    assert np.allclose(st.moves(ids, to, layer=3)(1, slice(0, 1))[0], [[ids.at(3)[0, 0], ids.at(3)[1, 3]]])


def test_an_edit_of_a_sweep_is_steering_the_model(llava):
    ids, queries = grid_ids(llava), [query_about("cup", "star", i) for i in range(3)]
    to, origin = np.tile([[[0, 0], [3, 0]]], (3, 1, 1)), np.tile([[[3, 0], [0, 0]]], (3, 1, 1))
    for rule in RULES:
        s = sweep(llava, queries, edits={"ID": (("subject", "object"), st.pushing(st.moves(ids, to, origin), 2, rule))})
        for layer in (1, 3):
            left, right = (torch.as_tensor(ids.at(layer)[0, x]) for x in (0, 3))
            with llava.steer(queries, {"subject": (left, right), "object": (right, left)}, layer, 2, rule):
                steered = llava.run(queries)
            assert (steered.log_probs - s.log_probs["ID"][layer - 1]).abs().max() < 1e-10
    ids.table *= 0
    s = sweep(llava, queries, edits={"ID": ("subject", st.pushing(st.moves(ids, to[:, :1], origin[:, :1])))})
    assert (s.log_probs["ID"] - s.base_log_probs).abs().max() < 1e-12, "a push of nothing changes nothing"


def test_controls_have_the_norm_of_what_they_replace(llava):
    ids, rows = grid_ids(llava), torch.randn(3, 2, llava.width, dtype=torch.float64)
    to, origin = permuted_places(3, 4, 0, 0)
    find = st.moves(ids, to, origin)
    for rule in RULES:
        one = st.pushing(find, 2, rule)(rows, 1, slice(0, 3)) - rows
        other = st.pushing(find, 2, rule, instead=st.gaussian(llava.width, 2, 0, 0))(rows, 1, slice(0, 3)) - rows
        assert torch.allclose(one.norm(dim=-1), other.norm(dim=-1)) and not torch.allclose(one, other)


def test_noise_depends_on_query_layer_and_draw_alone():
    noise = st.gaussian(8, 2, 0, 0)
    whole = noise(1, slice(0, 5))
    assert np.array_equal(whole[3:], noise(1, slice(3, 5))), "not on how queries are batched"
    other_draw, other_seed = st.gaussian(8, 2, 0, 1), st.gaussian(8, 2, 1, 0)
    others = [noise(2, slice(0, 5)), other_draw(1, slice(0, 5)), other_seed(1, slice(0, 5)), whole[[1, 0, 2, 3, 4]]]
    assert all(not np.allclose(whole, other) for other in others)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0].T
    assert np.abs(st.gaussian(8, 2, 0, 0, lambda layer: basis)(1, slice(0, 5)) @ basis.T).max() < 1e-12


def test_permuted_cells_differ_and_the_object_goes_the_other_way():
    to, origin = permuted_places(50, 4, 0, 0)
    assert to.shape == (50, 2, 2) and to.min() >= 0 and to.max() <= 3 and (to[:, 0] != origin[:, 0]).any(1).all()
    assert np.array_equal(to[:, 0], origin[:, 1]) and np.array_equal(to[:, 1], origin[:, 0])


# --- questions

def test_opposing_pushes_oppose_the_belief():
    text, words = "Is the {subject} above or below the {object}?", {"subject": "cup", "object": "star"}
    queries = [query_about(), query_about(), Query(None, text, words, ("above", "below"))]
    to, origin = st.opposing(queries, ["left", "right", "below"])
    assert origin.tolist() == [[[0, 0], [3, 0]], [[3, 0], [0, 0]], [[0, 3], [0, 0]]]
    assert np.array_equal(to, origin[:, ::-1])


@pytest.mark.slow
def test_questions_have_one_wording_and_order_and_their_own_pictures(tmp_path):
    scenes = FreeScenes(1000, seed="test", px=32)
    found = questions(scenes, 6)
    assert [q.kind for q in found] == ["left_right", "above_below"] * 3
    assert {q.answers for q in found} == {("left", "right"), ("above", "below")}
    assert len({np.asarray(q.image).tobytes() for q in found}) == 6 and all(q.truth in q.answers for q in found)
    assert [q.text for q in found] == [q.text for q in questions(scenes, 6)]
    assert questions(scenes, 1, instruction=' "{}" or "{}"?')[0].text == found[0].text + ' "left" or "right"?'
    rows = Benchmark(write_benchmark(tmp_path, 30, px=32))
    some = questions(rows, 100)
    assert len(some) == len({row.image_id for row in rows}) and {q.kind for q in some} == {"left_right", "above_below"}
    assert all(q.kind == "left_right" for q in questions(rows, 100, kinds=("left_right",)))


def test_arranged_scenes_ask_what_they_show():
    source = FreeScenes(10**6, seed="test", px=32)
    seen = set()
    for i in range(60):
        q, (subject, other) = st.near_far(source, i, 0)
        assert subject[1] == other[1] and other[0] in (0, 3)
        assert q.truth == {1: "near", 3: "far"}[abs(subject[0] - other[0])]
        seen.add((other[0], q.truth))
        b, (at, one, two) = st.in_between(source, i, 0)
        things = [Thing("", None, (x + .5) / 4, (y + .5) / 4, .2, 2, True) for x, y in (at, one, two)]
        assert between(*things) == b.truth and len(set(b.words.values())) == 3
        r, (place, centre) = st.surrounded(source, i, 0)
        assert r.truth == ("yes" if place == centre else "no")
        assert place == centre or max(abs(place[0] - centre[0]), abs(place[1] - centre[1])) >= 2
        assert min(centre) >= 1 and max(centre) <= 2
        seen.add(r.truth)
    assert len(seen) == 6


def test_the_edits_of_figure_2():
    vlm, g = VLM.load("llava-tiny"), np.random.default_rng(0)
    queries = questions(FreeScenes(100, seed=4), 4)
    ids = random_ids(vlm, g)
    edits = st.adversarial(vlm, ids, queries, [q.truth for q in queries], alpha=3.0, n_noise=2)
    assert list(edits) == ["ID", "noise 0", "noise 1"]
    rows = torch.tensor(g.standard_normal((4, 2, vlm.width)))
    push = {name: edit(rows, 2, slice(0, 4)) - rows for name, (_, edit) in edits.items()}
    for p in push.values(): assert torch.allclose(p.norm(dim=-1), 3 * rows.norm(dim=-1))
    to = {"left": (3, 0), "right": (0, 0), "above": (0, 3), "below": (0, 0)}[queries[0].truth]
    origin = {"left": (0, 0), "right": (3, 0), "above": (0, 0), "below": (0, 3)}[queries[0].truth]
    step = torch.tensor(ids.step(origin, to, 2))
    assert torch.allclose(push["ID"][0, 0] / push["ID"][0, 0].norm(), step / step.norm())
    assert abs(torch.cosine_similarity(push["noise 0"][0, 0], step, dim=0)) < .5
    assert not torch.equal(push["noise 0"], push["noise 1"])


def test_strength_is_relative_norm_times_fit():
    vlm, g = VLM.load("llava-tiny"), np.random.default_rng(0)
    ids, queries = random_ids(vlm, g), questions(FreeScenes(100, seed=4), 4)
    run = vlm.run(queries, [3], "subject")
    found = st.id_strength(ids, run, 3)
    ids.table *= 2
    twice = st.id_strength(ids, run, 3)
    assert found["strength"] == pytest.approx(found["relative_norm"] * found["r2"])
    assert twice["relative_norm"] == pytest.approx(2 * found["relative_norm"])
    assert twice["r2"] == pytest.approx(found["r2"])


def test_a_point_of_figure_9():
    vlm, g = VLM.load("llava-tiny"), np.random.default_rng(0)
    queries = questions(FreeScenes(100, seed=4), 6)
    ids = random_ids(vlm, g)
    s = sweep(vlm, queries, edits=st.adversarial(vlm, ids, queries, vlm.run(queries).beliefs, n_noise=2))
    one = st.fig9_numbers(vlm, ids, vlm.run(queries, s.layers, ("subject", "object")), s)
    was = s.base_log_probs.argmax(-1)
    turned = lambda name: (s.log_probs[name].argmax(-1) != was).double().numpy()[2:5]
    gain = turned("ID") - (turned("noise 0") + turned("noise 1")) / 2
    assert one["steerability"]["value"] == pytest.approx(gain.mean())
    x = vlm.run(queries, [3], "subject").residual(3)[:, 0].norm(dim=-1).mean()
    relative = float(np.linalg.norm(ids.ids[2], axis=-1).mean() / x)
    assert one["strength"]["by_layer"][3]["relative_norm"] == pytest.approx(relative, rel=1e-5)
    assert one["strength"]["by_layer"][3]["r2"] < .5, "random IDs are not linear in the place"


# --- readings

def made_up(**log_probs):
    "A sweep of two answers with given log-probabilities; base is `base` (B, 2)."
    base = torch.tensor(log_probs.pop("base"))
    edited = {name: torch.tensor(v) for name, v in log_probs.items()}
    return Sweep([1, 2], edited, base, None, np.zeros(len(base), int), "fast", None, 0)


def test_swaps_and_changes():
    a = [[[-1.0, -2], [-1, -3]], [[-2, -1], [-3, -1]]]
    b = [[[-2.0, -1], [-1, -3]], [[-2, -1], [-3, -1]]]
    s = made_up(base=[[-1.0, -2], [-3, -1]], a=a, b=b)
    assert st.swapped(s, ["a"]).tolist() == [[0, 1], [1, 0]] and st.swapped(s, ["a", "b"]).tolist() == [[.5, 1], [1, 0]]
    assert st.odds(change(s, "a")).tolist() == [[0, -4], [2, 0]]


def test_layer_rules():
    g = np.random.default_rng(0)
    one = (g.random((9, 400)) < np.array([.1, .2, .3, .9, .5, .4, .3, .2, 0])[:, None]).astype(float)
    found = st.readings({"ID": one, "noise": one * .5}, list(range(1, 10)), 9)
    assert found["top 3"]["layers"] == [4, 5, 6]
    assert found["chosen on half"]["layers"] == [4]
    assert found["middle third"]["layers"] == [4, 5, 6]
    assert found["chosen on half"]["ID"]["value"] == one[3, 200:].mean() and found["chosen on half"]["ID"]["n"] == 200
    assert np.isclose(found["top 3"]["gain"]["value"], one[3:6].mean() / 2)
    one[3, 200:], one[3, :200] = 1, 0
    found = st.readings({"ID": one, "noise": one}, list(range(1, 10)), 9)
    assert found["chosen on half"]["layers"] == [5], "the second half has no say"


def test_thirds_and_slopes():
    assert st.middle_third(8) == [3, 4, 5] and st.middle_third(32) == list(range(11, 22)) and st.middle_third(3) == [2]
    effect = np.zeros((10, 9))
    effect[:, 3:6] = 1
    assert st.effect_band(effect, list(range(1, 10)), 9).tolist() == [4, 6]
    found = st.band_numbers(effect, list(range(1, 10)), 9)
    assert found["band_width"]["value"] == 3 / 9 and found["band_centre"]["value"] == 5 / 9
    assert found["band_width"]["n"] == 10
    x = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert np.allclose(slope(2.0 * x + 1, x), 2) and np.allclose(slope(np.arange(4.0), np.arange(4)), 1)


def test_the_released_script_finds_every_equal_token(llava):
    query = query_about("dog", "hot dog")
    of_subject = st.occurrences(llava, query, "subject")
    assert len(of_subject) == 2 and of_subject == st.occurrences(llava, query, "object")
    assert len(st.occurrences(llava, query_about("cup", "star"), "subject")) == 1
    scale = st.released_scale(llava, [query, query_about("cup", "star")], 5, [1, 2])(1, slice(0, 2))
    assert (scale[0] > 5).all() and torch.equal(scale[1], torch.full((2, 1), 5.0))


def test_ids_are_read_at_the_words_of_the_relation(llava):
    scene = GridScenes(grid_pairs(2), sizes=(224,), px=16)[0]
    for word in ("left", "right"):
        q = st.AtWord(scene, word).query(st.at_word(word))
        assert q.text == scene.query().text and q.text[slice(*q.spans["subject"][0])] == word
        row, = llava.positions(q, "subject")
        assert row == llava.positions(scene.query(), st.relation_words(llava))[("left", "right").index(word)]
    words = {"subject": "cup", "object": "star"}
    twice = Query(picture(0), QUESTION + " Answer left or right.", words, ("left", "right"))
    assert len(llava.positions(twice, st.relation_words(llava))) == 2


def test_a_pad_of_places(llava):
    ids, query = grid_ids(llava, linear=True), query_about()
    log_odds, before = st.pad_odds(llava, ids, query, (1, 1), [(1, 1), (3, 1)])
    assert log_odds.shape == (2, llava.n_layers)
    assert np.allclose(log_odds[0], before)
    assert not np.allclose(log_odds[1], before)
    assert np.isclose(before, -float(llava.run(query).logit_diff))
    from matplotlib.figure import Figure
    panels = Figure().subplots(1, 2)
    st.pad_figure(*panels, query, (1, 1), log_odds[0], before, list(range(1, 5)))
    assert panels[0].get_title() == "cup at (1, 1)" and panels[1].get_ylabel() == "probability of “right”"


# --- deep models: which layers are swept

def test_every_layer_of_a_small_model_and_some_of_a_deep_one_are_swept():
    assert swept_layers(8, 5) == list(range(1, 9)) and swept_layers(12, 1) == list(range(1, 13))
    deep = swept_layers(30, 19)
    assert deep == [1, 4, 7, 10, 13, 16, 17, 18, 19, 20, 21, 22, 25, 28, 30]
    assert swept_layers(30, 30, 10, 1) == [1, 11, 21, 29, 30] and swept_layers(30, 1, 10, 1) == [1, 2, 11, 21, 30]
    assert layers_near(deep, 30, 19) == [13, 16, 17, 18, 19, 20, 21] and layers_near([1, 2, 3], 3, 1) == [1, 2, 3]
    with pytest.raises(ValueError, match="layer 31 is none of 1 to 30"): swept_layers(30, 31)
    assert st.ticks(list(range(1, 9))) == list(range(1, 9)) and st.ticks(deep) == [2, 6, 10, 14, 18, 22, 26, 30]


def test_layers_between_those_swept_are_interpolated():
    values = np.random.default_rng(0).random((5, 4, 2))
    assert np.array_equal(st.at_every_layer(values, [1, 2, 3, 4, 5], 5), values)
    every = st.at_every_layer(values[:3], [1, 3, 6], 7)
    assert every.shape == (7, 4, 2)
    assert np.allclose(every[[0, 2, 5, 6]], values[[0, 1, 2, 2]])
    assert np.allclose(every[1], values[:2].mean(0))
    effect = np.zeros((10, 30))
    effect[:, 10:20] = 1
    some = swept_layers(30, 19)
    even = st.band_numbers(np.ones((10, len(some))), some, 30)
    assert even["band_width"]["value"] == 24 / 30, "layers that are swept more densely do not count more"
    assert even["band_width"] == st.band_numbers(np.ones((10, 30)), list(range(1, 31)), 30)["band_width"]
    found = st.readings({"ID": np.ones((15, 8)), "noise": np.zeros((15, 8))}, some, 30)
    assert found["middle third"]["gain"]["value"] == 1


# --- the dose

def test_wilson_and_newcombe_are_the_published_intervals():
    one = st.wilson([1] * 81 + [0] * (263 - 81))
    assert (round(one["low"], 4), round(one["high"], 4), one["n"]) == (0.2553, 0.3662, 263), "Newcombe 1998, table I"
    assert st.wilson([0] * 20)["low"] == 0
    assert round(st.wilson([0] * 20)["high"], 4) == 0.1611
    assert st.wilson([1] * 20)["high"] == 1
    ends = [st.wilson(np.arange(n) < k) for n in range(1, 60) for k in (0, 1, n - 1, n)]
    assert all(one["low"] <= one["value"] <= one["high"] for one in ends), "rounding must not exclude the value"
    gap = st.newcombe(st.wilson([1] * 56 + [0] * 14), st.wilson([1] * 48 + [0] * 32))
    found = [round(gap[key], 4) for key in ("value", "low", "high")]
    assert found == [0.2, 0.0524, 0.3339], "Newcombe 1998, table II, method 10"
    with pytest.raises(ValueError, match="at least one question"): st.wilson([])


def test_shares_of_the_same_units_have_the_published_interval():
    a = np.repeat([1, 1, 0, 0], (36, 12, 2, 0))
    b = np.repeat([1, 0, 1, 0], (36, 12, 2, 0))
    gap = st.newcombe_paired(a, b)
    assert [round(gap[key], 4) for key in ("value", "low", "high")] == [0.2, 0.0569, 0.3404], "Newcombe 1998, paired"
    same = st.newcombe_paired(np.ones(20), np.ones(20))
    assert same["value"] == 0 and same["low"] < 0 < same["high"], "no difference seen is none known"
    apart = st.newcombe(st.wilson(a), st.wilson(b))
    half = np.repeat([1, 0], (25, 25))
    tight, loose = st.newcombe_paired(half, half), st.newcombe(st.wilson(half), st.wilson(half))
    assert tight["high"] < loose["high"] and apart["value"] == gap["value"]


def test_a_dose_is_chosen_by_the_gain_on_the_first_questions_alone():
    g = np.random.default_rng(0)
    swaps = {a: {"ID": np.zeros((3, 10)), "noise": np.zeros((3, 10))} for a in (0.5, 1.0, 5.0)}
    swaps[5.0]["ID"][:] = swaps[5.0]["noise"][:] = 1  # turns everything, as does noise
    swaps[1.0]["ID"][1] = 1
    for a in swaps: swaps[a]["ID"][:, 5:] = g.random((3, 5))
    assert st.chosen_dose(swaps, 5) == (1.0, 1)
    swaps[0.5]["ID"][2, :5] = 1
    assert st.chosen_dose(swaps, 5) == (0.5, 2), "of equals the smaller dose"
    rounded = {**swaps, 1.0: {**swaps[1.0], "ID": swaps[1.0]["ID"] + 1e-15}}
    assert st.chosen_dose(rounded, 5) == (0.5, 2), "also where they differ by rounding"
    found = st.at_dose(swaps, 1.0, 1, slice(0, 5))
    assert found["ID"]["value"] == 1
    assert found["noise"]["value"] == 0
    assert found["gain"]["value"] == 1
    assert found["gain"]["low"] < 1


def test_each_word_is_moved_by_the_ids_of_its_slot(llava):
    first, second = grid_ids(llava, seed=0), grid_ids(llava, seed=1)
    to, origin = permuted_places(3, 4, 0, 0)
    found = st.moves_by_slot([first, second], to, origin)(2, slice(1, 3))
    for end, places in zip(found, (to, origin)):
        wanted = [at_place(torch.as_tensor(ids.at(2)), places[1:3, k]) for k, ids in enumerate((first, second))]
        assert end.shape == (2, 2, llava.width) and torch.equal(end, torch.stack(wanted, 1))
    same = st.moves_by_slot([first, first], to, origin)(2, slice(0, 3))
    assert all(torch.equal(a, b) for a, b in zip(same, st.moves(first, to, origin)(2, slice(0, 3))))
    with pytest.raises(ValueError, match="1 sets of IDs for 2 words"): st.moves_by_slot([first], to, origin)


def test_edits_of_all_doses(llava):
    ids, rows = grid_ids(llava), torch.randn(3, 2, llava.width, dtype=torch.float64)
    to, origin = permuted_places(3, 4, 0, 0)
    permuted = [st.moves(ids, *permuted_places(3, 4, 0, 1))]
    noise = [st.gaussian(llava.width, 2, 0, i) for i in range(2)]
    edits = st.dose_edits(st.moves(ids, to, origin), permuted, noise, (0.25, 5.0))
    arms = ("ID", "noise 0", "noise 1", "permuted places 0")
    assert list(edits) == [f"{name} {a}" for a in ("0.25", "5") for name in arms]
    for name, (group, edit) in edits.items():
        push = edit(rows, 1, slice(0, 3)) - rows
        assert group == st.BOTH and torch.allclose(push.norm(dim=-1), float(name.split()[-1]) * rows.norm(dim=-1))


def test_the_ceiling_exchanges_rows_with_the_mirrored_picture(llava):
    queries = [query_about(seed=i, subject=s) for i, s in enumerate(("cup", "hot dog", "star"))]
    found = mirror_swaps(llava, queries, [1, 3])
    assert list(found) == ["last sub-token", "whole words"] and all(v.shape == (2, 3) for v in found.values())
    rows = [llava.positions(q, st.whole_objects(llava)) for q in queries]
    last = [llava.positions(q, st.BOTH) for q in queries]
    assert len(rows[1]) > len(last[1]) == 2, "a hot dog is several tokens"
    assert all(set(a) >= set(b) for a, b in zip(rows, last))
    from PIL import ImageOps
    for q, want in zip(queries, found["whole words"].T):
        source = Query(ImageOps.mirror(q.image), q.template, q.words, q.answers)
        group = st.whole_objects(llava)
        for k, layer in enumerate((1, 3)):
            residual = llava.run(source, [layer], [group]).residual(layer)
            with llava.patch({layer: (group, residual)}): patched = llava.run(q)
            assert bool(want[k]) == (patched.beliefs != llava.run(q).beliefs)


def pushes_of(vlm, n):
    "Opposing IDs of two slots, one draw of permuted places and two of noise, for n questions."
    slots = [grid_ids(vlm, seed=0), grid_ids(vlm, seed=1)]
    find = st.moves_by_slot(slots, *permuted_places(n, 4, 0, 0))
    return find, st.dose_controls(vlm, slots[0], n, n_noise=2, n_controls=1)


def test_on_words_of_one_token_whole_words_are_their_last_sub_tokens(llava):
    queries = [query_about(a, b, i) for i, (a, b) in enumerate((("cup", "star"), ("dog", "cat"), ("star", "dog")))]
    assert all(len(st.rows_of_words(llava, q)) == 2 for q in queries)
    find, controls = pushes_of(llava, 3)
    which = np.arange(3)
    rows = [st.word_by_word(one, which, (0, 1)) for one in (find, *controls["permuted"], *controls["noise"])]
    last = st.dose_edits(find, **controls, alphas=(0.5, 5.0))
    whole = st.dose_edits(rows[0], [rows[1]], rows[2:], (0.5, 5.0), st.whole_objects(llava))
    one, other = (sweep(llava, queries, layers=[1, 3], edits=edits).log_probs for edits in (last, whole))
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == torch.float64 and torch.allclose(one[name], other[name], rtol=0, atol=1e-12), name
    swaps = st.whole_word_swaps(llava, queries, [1, 3], find, **controls, alphas=(0.5, 5.0))
    s = sweep(llava, queries, layers=[1, 3], edits=last)
    for a in (0.5, 5.0):
        assert np.array_equal(swaps[a]["ID"], st.swapped(s, [f"ID {a:g}"]))
        assert np.array_equal(swaps[a]["noise"], st.swapped(s, [f"noise {i} {a:g}" for i in range(2)]))


def test_every_sub_token_is_pushed_as_its_word_is(llava):
    "Against one question, one layer at a time, in plain patches; the questions have other numbers of sub-tokens."
    names = (("cup", "hot dog"), ("hot dog", "cat"), ("star", "dog"), ("hot dog", "cup"))
    queries = [query_about(a, b, i) for i, (a, b) in enumerate(names)]
    counts = [len(st.rows_of_words(llava, q)) for q in queries]
    assert len(set(counts)) > 1 and [k for _, k in st.rows_of_words(llava, queries[0])][:2] == [0, 1]
    find, controls = pushes_of(llava, 4)
    swaps = st.whole_word_swaps(llava, queries, [1, 3], find, **controls, alphas=(5.0,))[5.0]
    draws = {"ID": [None], "noise": controls["noise"], "permuted places": [None]}
    for i, query in enumerate(queries):
        words = [k for _, k in st.rows_of_words(llava, query)]
        was, (group,) = llava.run(query).beliefs, ([row for row, _ in st.rows_of_words(llava, query)],)
        for at, layer in enumerate((1, 3)):
            rows = llava.run(query, [layer], [tuple(group)]).residual(layer)
            for arm, directions in draws.items():
                give = controls["permuted"][0] if arm == "permuted places" else find
                turned = []
                for noise in directions:
                    push = scaled(*(end[:, words] for end in give(layer, slice(i, i + 1))), rows, 5.0)
                    if noise:
                        drawn = torch.tensor(noise(layer, slice(i, i + 1)))[:, words]
                        push = drawn * push.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
                    with llava.patch({layer: (tuple(group), rows + push)}): now = llava.run(query).beliefs
                    turned.append(now != was)
                assert swaps[arm][at, i] == np.mean(turned), (arm, layer, names[i])


def test_efficiency_is_judged_only_below_a_ceiling():
    half, none, most, whole = (st.wilson(np.arange(40) < n) for n in (20, 0, 38, 40))
    found = st.efficiency(half, none, whole)
    assert found["value"] == 0.5 and 0.3 < found["low"] < 0.5 < found["high"] < 0.7 and found["n"] == 40
    all_turn = st.efficiency(whole, none, whole)
    assert all_turn["value"] == 1 and all_turn["low"] < 0.95 and all_turn["high"] > 1.05, "40 questions are not all"
    assert st.efficiency(whole, none, half)["low"] > 1
    without = st.efficiency(most, half, half)
    assert without["value"] is None and "not clear of it" in without["not_judged"]


def test_figures_of_the_dose():
    from matplotlib.figure import Figure
    curve, rows = Figure().subplots(1, 2)
    shares = {"ID": 1.0, "noise": 0.0, "permuted places": 0.5}
    of_arms = {arm: np.full((2, 6), v) for arm, v in shares.items()}
    swaps = {a: of_arms for a in st.DOSES}
    st.plot_dose(curve, st.wilson_by_layer(swaps, slice(3, None)), 1)
    assert [line.get_label() for line in curve.lines] == ["ID", "noise", "permuted places", "paper's α = 5"]
    assert [t.get_text() for t in curve.get_xticklabels()] == [".25", ".5", "1", "2", "5", "10"]
    assert np.allclose(curve.lines[0].get_ydata(), 1)
    st.plot_estimates(rows, [("a", st.wilson([1, 0]), "k"), ("b", st.wilson([0, 0]), "k")])
    assert [t.get_text() for t in rows.get_yticklabels()] == ["a", "b"]
    assert st.listed_layers([3, 4, 5]) == "3, 4, 5" and st.listed_layers([13, 16, 17, 20]) == "13-20"


# --- what stands behind the figures: functions of the story cells

def swept(changes, base=((0.0, 0.0),) * 4, truth=(0, 1, 0, 1), layers=(1, 2)):
    "A sweep whose edits change log-probabilities as given: {name: broadcast to (L, B, 2)}."
    base = torch.tensor(base, dtype=torch.float64)
    shape = (len(layers), *base.shape)
    log_probs = {name: base + torch.tensor(np.broadcast_to(v, shape).copy()) for name, v in changes.items()}
    return Sweep(list(layers), log_probs, base, None, np.array(truth), "fast", None, 0)


def title(ax):
    "The title of a panel in the project's style: on the left."
    return ax.get_title(loc="left")


def pushed_rows(edit, vlm, n, seed=0, layer=2):
    "Rows before an edit, and what it adds to them."
    group, new = edit
    words = 2 if group == st.BOTH or callable(group) else 1
    rows = torch.tensor(np.random.default_rng(seed).normal(size=(n, words, vlm.width)))
    return rows, new(rows, layer, slice(0, n)) - rows


@pytest.fixture(scope="module")
def small(): return VLM.load("llava-tiny")


@pytest.fixture(scope="module")
def mixed():
    "Questions of both kinds about generated scenes."
    return st.QuestionSource(seed=1, px=80).questions("test", 6)


def test_questions_come_from_scenes_of_an_experiment_or_from_the_benchmark(tmp_path):
    source = st.QuestionSource(seed=1, px=32, instruction=" Answer {} or {}.")
    found = source.questions("here", 4)
    assert [q.kind for q in found] == ["left_right", "above_below"] * 2
    assert all(q.text.endswith(f" Answer {' or '.join(q.answers)}.") for q in found)
    first, other = (next(iter(source.scenes(name))) for name in ("here", "there"))
    assert first.things != other.things, "no two experiments share their scenes"
    assert source.number() == 200
    rows = st.QuestionSource(px=32, benchmark=write_benchmark(tmp_path, 8, px=32))
    assert rows.number() == len(Benchmark(rows.benchmark))
    assert {q.kind for q in rows.questions("any", 4, ("left_right",))} == {"left_right"}


def test_answers_and_kinds_of_questions(mixed):
    beliefs = [q.truth for q in mixed[:-1]] + ["neither"]
    assert answers_right(mixed, beliefs).tolist() == [True] * 5 + [False]
    kinds = st.masks_of_kinds(mixed)
    assert kinds["left/right questions"].tolist() == [True, False] * 3
    assert (kinds["left/right questions"] ^ kinds["above/below questions"]).all()
    fig = st.plot_answers(mixed, beliefs)
    assert [ax.get_xlabel() for ax in fig.axes][-1] == f"{mixed[-1].truth}; the model: neither"


def test_a_model_answers_in_words_while_it_is_steered(small, mixed):
    query, ids = mixed[0], random_ids(small, np.random.default_rng(0))
    said = small.generate(query, 2)
    assert said in query.answers
    found = st.steered_answers(small, ids, query, said, [1, 3], (0, 5.0))
    assert found["as it is"] == said and found["α = 0, after each block"] == [said] * 2
    cell = {"left": 0, "right": 3}
    step = ids.step((cell[said], 0), (3 - cell[said], 0))
    with small.steer(query, {"subject": step, "object": -step}, layer=3, scale=5, rule="diff_norm"):
        assert found["α = 5, after each block"][1] == small.generate(query, 2)


def test_the_arms_of_figure_2(small, mixed):
    ids, beliefs = random_ids(small, np.random.default_rng(0)), [q.truth for q in mixed]
    edits = st.fig2_edits(small, ids, mixed, beliefs, 3.0, n_noise=2, n_controls=2)
    draws = st.draws_of_arms(edits)
    assert list(draws) == list(st.ARMS) and sum(map(len, draws.values())) == len(edits)
    assert draws["noise"] == ["noise 0", "noise 1"] and draws["ID"] == ["ID"]
    push = {name: pushed_rows(edit, small, 6)[1] for name, edit in edits.items() if edit[0] == st.BOTH}
    assert torch.allclose(push["agreeing ID"], -push["ID"])
    basis = torch.tensor(st.orthonormal(ids.axes(2)))
    assert (push["off the plane 0"] @ basis.T).abs().max() < 1e-8 < (push["noise 0"] @ basis.T).abs().max()
    for name, v in push.items(): assert torch.allclose(v.norm(dim=-1), push["ID"].norm(dim=-1)), name
    rows, alone = pushed_rows(edits["object only"], small, 6)
    both = edits["ID"][1](torch.cat([rows, rows], 1), 2, slice(0, 6))
    assert edits["object only"][0] == "object" and torch.allclose(rows + alone, both[:, 1:])


def test_swaps_of_a_dose_come_from_the_sweep_that_has_it():
    turned, kept = [2.0, 0], [0.0, 0]
    opposed = swept({"ID": turned, "noise 0": kept, "noise 1": turned}, base=((0.0, 1),) * 4, layers=(1, 2, 3))
    by_dose = swept({"ID 0.5": kept, "noise 0 0.5": kept, "noise 1 0.5": kept}, base=((0.0, 1),) * 4, layers=(2, 3))
    draws = st.draws_of_arms(opposed.names)
    swaps = {dose: st.swaps_at_dose(by_dose, opposed, dose, draws) for dose in (0.5, 5.0)}
    assert swaps[0.5]["ID"].shape == swaps[5.0]["ID"].shape == (2, 4)
    assert swaps[0.5]["ID"].sum() == 0 and (swaps[5.0]["ID"] == 1).all() and (swaps[5.0]["noise"] == 0.5).all()
    swaps[5.0]["ID"][1] = 0
    found = st.dose_readings(swaps, [2, 3], 2, 6)
    assert list(found) == ["layer 2", "middle third"]
    assert [found[where][5.0]["ID"]["value"] for where in found] == [1, 0], "3 and 4, of which 3 was swept"
    assert list(st.dose_readings(swaps, [2, 3], 5, 15)) == [], "nothing that was not swept"


def test_doses_still_to_be_swept(small, mixed):
    assert st.other_doses(5.0, (20.0,)) == [0.25, 0.5, 1.0, 2.0, 10.0, 20.0]
    ids, beliefs = random_ids(small, np.random.default_rng(0)), [q.truth for q in mixed]
    edits = st.fig2_dose_edits(small, ids, mixed, beliefs, [1.0, 20.0], n_noise=2, n_controls=1)
    assert list(edits) == ["ID 1", "noise 0 1", "noise 1 1", "permuted places 0 1", "ID 20", "noise 0 20"]
    opposed = st.fig2_edits(small, ids, mixed, beliefs, 20.0, n_noise=1, n_controls=1)
    for name in ("ID", "noise 0"):
        pushes = [pushed_rows(edit, small, 6)[1] for edit in (opposed[name], edits[f"{name} 20"])]
        assert torch.allclose(*pushes), "the same draws as Figure 2"


def test_ids_of_the_second_noun_are_those_of_the_model(llava, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    assert st.second_noun_ids(llava, "llava-tiny", "paper") is None
    second = grid_ids(llava, seed=1)
    second.provenance = {"weight_hash": llava.weight_hash}
    second.save(results_dir("llava-tiny")/"spatial_ids_second.safetensors")
    found = st.second_noun_ids(llava, "llava-tiny", "released")
    assert np.allclose(found.table, second.table) and found.protocol == "released"
    second.provenance = {"weight_hash": "other"}
    second.save(results_dir("llava-tiny")/"spatial_ids_second.safetensors")
    with pytest.raises(ValueError, match="run notebook 03 again"): st.second_noun_ids(llava, "llava-tiny", "paper")


def doses_of(L=3, B=8):
    "Swaps that choose α = 1 and the second of L layers."
    swaps = {a: {arm: np.zeros((L, B)) for arm in st.DOSE_COLUMNS[:3]} for a in st.DOSES}
    swaps[1.0]["ID"][1] = 1
    swaps[5.0]["ID"][2, :6] = 1
    return swaps


def test_the_chosen_dose_stands_beside_that_of_the_paper():
    rows = st.dose_choices(doses_of(), [3, 4, 5], 4)
    chosen, paper = rows.values()
    assert (chosen["alpha"], chosen["layer"], chosen["ID"]["value"]) == (1.0, 4, 1)
    assert (paper["alpha"], paper["layer"], paper["ID"]["value"]) == (5.0, 5, 0.5)
    lines = st.dose_table(rows).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| dose chosen | 1 | 4 | 1.00 [0.51, 1.00] |")


def test_the_ceiling_is_chosen_on_the_first_questions_and_reported_on_the_others():
    which = np.array([0, 2, 4, 6])  # of eight questions every other one
    shares = {"words": st.at_layer(doses_of(), [3, 4, 5], {"alpha": 1.0, "layer": 4})}
    turns = {"words": np.array([[1.0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]])}
    found = st.ceiling_numbers(turns, shares, [3, 4, 5], 4, which, 4)
    assert found["at the chosen layer"]["words"]["value"] == 1
    assert found["best layer, chosen on half"]["words"]["layer"] == 3
    assert found["best layer, chosen on half"]["words"]["value"] == 0.5
    same = found["same questions"]["words"]
    assert same["ID"]["n"] == 2 and same["gain"]["value"] == 1
    assert found["efficiency"]["words"]["not_judged"]


def test_efficiency_compares_like_with_like():
    "Whole words pushed against whole words exchanged, last sub-tokens against last sub-tokens."
    which, one, none = np.arange(8), np.ones(8), np.zeros(8)
    shares = {"last sub-token": {"ID": none, "noise": none}, "whole words": {"ID": one, "noise": none}}
    turns = {rows: np.ones((1, 8)) for rows in shares}
    found = st.ceiling_numbers(turns, shares, [3], 3, which, 4)["efficiency"]
    assert (found["last sub-token"]["value"], found["whole words"]["value"]) == (0, 1)


def test_figures_of_the_chosen_dose():
    swaps = doses_of()
    rows = st.dose_choices(swaps, [3, 4, 5], 4)
    best = {"words": {"layer": 4, **st.wilson([1, 0])}}
    ceiling = {"same questions": {"words": rows["dose chosen"]}, "best layer, chosen on half": best}
    assert st.layers_beside([3, 4, 5, 6], 4, 6) == [3, 4, 5, 6] and st.layers_beside([3, 4, 5, 6], 3, 9) == [3, 4]
    points = st.dose_points(rows, ceiling)
    assert len(points) == 3 + 3 + 3 and points[0][0] == "ID, dose chosen" and "ℓ = 4" in points[-1][0]
    on_words = {a: {arm: v[1:2] for arm, v in arms.items()} for a, arms in swaps.items()}
    fig = st.plot_dose_choice(swaps, on_words, [3, 4, 5], [3, 4, 5], rows, ceiling, 4, "toy")
    assert [title(ax) for ax in fig.axes[:3]] == ["layer 3", "layer 4, chosen", "layer 5"]
    labels = [line.get_label() for line in fig.axes[1].lines]
    assert "ID, whole words" in labels and "ID, whole words" not in [line.get_label() for line in fig.axes[0].lines]


def test_ids_from_rings_steer_the_same_questions(small, mixed):
    ids = SpatialIDs.load(ROOT/"results"/"llava-tiny"/"spatial_ids.safetensors")
    rings = st.rings_like(ids)
    assert rings.k == 5 and rings.names == sorted(ids.provenance["params"]["scenes"]["objects"]), "ten objects"
    read = st.packed_ring_ids(small, ids, 3, most=32)
    assert list(read) == ["first", "second"] and read["first"].layers == [3]
    beliefs = small.run(mixed).beliefs
    of_rings = list(read.values())
    pushed = moves_of(of_rings, mixed, beliefs)
    by_hand = st.swapped(sweep(small, mixed, layers=[3], edits={"ID": (st.BOTH, pushed)}), ["ID"])[0]
    chosen = {"alpha": 1.0, "layer": 3}
    found = st.ring_numbers(small, of_rings, of_rings, mixed, beliefs, by_hand, chosen, 2)
    assert found["rings"] == found["design"] == st.wilson(by_hand[2:]) and found["difference"]["value"] == 0
    assert found["pictures"] == found["passes"] == 32 and found["cosine"] == pytest.approx({"subject": 1, "object": 1})
    other = st.ring_numbers(small, of_rings, of_rings, mixed, beliefs, 1 - by_hand, chosen, 2)
    assert other["difference"]["value"] == pytest.approx(2 * by_hand[2:].mean() - 1) and other["difference"]["n"] == 4


def moves_of(slots, queries, beliefs):
    "The opposing push of both words, α = 1."
    return st.pushing(st.moves_by_slot(slots, *st.opposing(queries, beliefs)), 1.0)


def test_families_that_cannot_pack_are_refused_rings():
    vlm, ids = VLM.load("gemma3-tiny"), SpatialIDs.load(ROOT/"results"/"gemma3-tiny"/"spatial_ids.safetensors")
    with pytest.raises(ValueError, match="cannot take several questions behind one picture"):
        st.packed_ring_ids(vlm, ids, 3)
    ids.provenance["params"]["scenes"]["objects"] = ["cup"] * 7
    with pytest.raises(ValueError, match="7 objects cannot be shown 6 at a time"): st.rings_like(ids)


def test_the_figure_and_claims_of_figure_2():
    swaps = {arm: np.zeros((9, 8)) for arm in st.ARMS}
    swaps["ID"][3], swaps["noise"][3] = 1, 0.25
    numbers = st.readings(swaps, list(range(1, 10)), 9)
    claims = st.fig2_claims(swaps, numbers, list(range(1, 10)))
    assert [claims[key]["value"] for key in ("id_swaps", "gain", "noise_far_less")] == [1, 0.75, 0.5]
    assert claims["noise_far_less"]["n"] == 4
    dose_at = st.dose_readings({1.0: swaps, 5.0: swaps}, list(range(1, 10)), 4, 9)
    fig = st.plot_fig2(swaps, list(range(1, 10)), numbers, dose_at, 5.0)
    by_layer, by_rule, by_dose = fig.axes
    assert np.allclose(by_layer.lines[0].get_ydata(), swaps["ID"].mean(1)) and "n = 8" in title(by_layer)
    labels = [line.get_label() for line in by_layer.lines]
    assert "agreeing ID" in labels and "subject only" not in labels
    assert "paper, ID (64.4 %)" in [line.get_label() for line in by_rule.lines]
    assert np.allclose(by_dose.lines[0].get_ydata(), 1)
    assert [t.get_text() for t in by_dose.get_xticklabels()] == ["1", "5"]
    found = st.wilson_by_layer({1.0: swaps}, slice(4, None))
    assert found[1.0]["ID"][3]["value"] == 1 and found[1.0]["ID"][3]["n"] == 4


def test_norms_of_steered_words(llava):
    ids, queries = grid_ids(llava), [query_about("cup", "star", i) for i in range(2)]
    to, origin = permuted_places(2, 4, 0, 0)
    find, run = st.moves(ids, to, origin), llava.run(queries, [1, 3], st.BOTH)
    growth = st.norm_growth(run, find, [1, 3], "raw", 2.0)
    x, (there, here) = run.residual(3).double(), find(3, slice(None))
    wanted = ((x + 2 * (there - here)).norm(dim=-1) / x.norm(dim=-1)).mean(1)
    assert growth.shape == (2, 2) and np.allclose(growth[1], wanted, rtol=1e-4)
    norms, size = st.norm_numbers(run, find, [1, 3], 5.0)
    assert list(norms) == ["each_norm, α = 5", "diff_norm, α = 5", "raw, α = 5", "diff_norm, α = 1", "raw, α = 1"]
    assert 4 <= norms["diff_norm, α = 5"]["value"] <= 6, "a push of five times the norm"
    assert size["value"] == pytest.approx(np.abs(st.norm_growth(run, find, [1, 3], "each_norm", 5.0) - 1).mean())


def test_each_variant_changes_one_choice(small, mixed):
    ids, beliefs = random_ids(small, np.random.default_rng(0)), [q.truth for q in mixed]
    edits = st.variant_edits(small, ids, mixed, beliefs, [2], 5.0)
    assert next(iter(edits)) == "subject only/noise" and len(edits) == 1 + 2 * 8
    headline = pushed_rows(st.fig2_edits(small, ids, mixed, beliefs)["ID"], small, 6)[1]
    names = {name.split("/")[0] for name in edits} - {"subject only"}
    for name in names:
        (_, one), (_, noise) = (pushed_rows(edits[f"{name}/{arm}"], small, 6) for arm in ("ID", "noise"))
        assert torch.allclose(one.norm(dim=-1), noise.norm(dim=-1)) and not torch.allclose(one, noise)
        same = name in ("against the truth, not the belief", "IDs of the largest objects only",
                        "norm and token of the released script")
        assert torch.allclose(one, headline) == same, name
    two = {name: edits[name] for name in ("subject only/noise", "rule raw, α = 5/ID")}
    s = sweep(small, mixed, layers=[2], edits=two)
    swaps = st.swaps_of_variants(s)
    assert {name: list(v) for name, v in swaps.items()} == {"subject only": ["noise"], "rule raw, α = 5": ["ID"]}
    assert swaps["subject only"]["noise"].shape == (1, 6)
    assert st.largest_only(ids).protocol == "released" and ids.protocol == "paper"


def test_words_that_stand_twice(llava):
    queries = [query_about("dog", "hot dog"), query_about("cup", "star")]
    assert st.repeated_words(llava, queries) == {"repeated": 2, "of": 4}


def test_beliefs_in_other_scorings(small, mixed):
    left, above = mixed[:2]
    right = small.tokenizer("right", add_special_tokens=False)["input_ids"][-1]
    logits = torch.zeros(2, len(small.tokenizer) + 1)
    logits[:, small.answer_ids(left)[1][0]] = 9
    logits[:, right] += 1
    assert st.word_said(small, [left, above])(logits).tolist() == [1, st.NEITHER]
    spelled = st.one_spelling(small, [left], lambda answer: answer)
    assert spelled(logits[:1]).tolist() == [1]
    alike = st.one_spelling(small, [left, above], lambda answer: "the")
    assert alike(logits).tolist() == [st.UNREADABLE] * 2
    names = ["answer “ left”", "answer “ Left”", "answer “left”", "the word said"]
    assert list(st.other_scorings(small, mixed)) == names


def test_swaps_of_another_scoring_are_counted_where_a_belief_can_be_read():
    code = {"clean": [0, 0, 0, 1, -1, -2], "id": [1, 1, 1, 1, 1, 1], "noise": [0, 0, 0, 0, -1, 0]}
    names = {i: values for i, values in enumerate(code.values())}
    read = lambda logits: torch.tensor(names[int(logits)])
    found = st.scoring_numbers(read, 0, {"ID": 1, "noise 0": 2}, np.array([0, 0, 0, 0, 0, 0]))
    assert found["ID"]["n"] == 2, "of the second half, less what cannot be read"
    assert found["ID"]["value"] == 0 and found["noise"]["value"] == 0.5 and found["gain"]["value"] == -0.5
    assert found["accuracy"]["value"] == 0, "neither is no right answer"
    names[0] = [0, 0, 0, -1, -1, -1]
    assert st.scoring_numbers(read, 0, {"ID": 1, "noise 0": 2}, np.zeros(6)) is None


def test_other_prompts_ask_the_same(small, mixed):
    assert st.reworded(mixed[0], " Say {} or {}.").text == mixed[0].text + " Say left or right."
    turned = st.answers_turned(mixed[0])
    assert "right or left" in turned.text and turned.answers == mixed[0].answers
    without = st.other_prompts(mixed, "")
    assert list(without) == ["prompt: with an instruction", "prompt: answers in the other order"]
    assert "prompt: without instruction" in st.other_prompts(mixed, " x")
    ids = random_ids(small, np.random.default_rng(0))
    swaps, right = st.swaps_of_prompt(small, ids, mixed, [2], 0.0)
    assert right.tolist() == [b == q.truth for b, q in zip(small.run(mixed).beliefs, mixed)]
    assert list(swaps) == ["ID", "noise"] and (swaps["ID"] == 0).all(), "a push of nothing swaps nothing"


def test_choices_are_ranked_by_what_they_change():
    layers, ones = [1, 2, 3], np.ones((3, 40))
    numbers = st.readings({"ID": ones, "noise": 0 * ones}, layers, 3)
    nothing = {"ID": 0 * ones, "noise": 0 * ones}
    by_variant = {"half": {**nothing, "ID": ones * (np.arange(40) % 2)}, "none": nothing, "unread": nothing}
    right = {"headline": np.ones(40, bool), "unread": np.zeros(40, bool)}
    scoring = {"spelled": {"ID": {"value": 1}, "noise": {"value": 0}, "accuracy": {"value": 0.9, "low": 0.8}}}
    table = st.choice_numbers(numbers, by_variant, scoring, right, layers, 3)
    assert table["spelled"]["accuracy"]["value"] == 0.9 and table["half"]["accuracy"]["value"] == 1
    ranked = st.ranked_choices(table)
    assert list(ranked)[:3] == ["headline", "none", "half"]
    assert list(st.not_ranked(table)) == ["unread"] and "unread" not in ranked
    assert table["half"]["ID"]["n"] == 20 and table["half"]["layers"] == [1]
    drawn = {name: row for name, row in ranked.items() if name != "spelled"}
    ax, = st.plot_choices(drawn, 20).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == list(drawn) and "n = 20" in title(ax)


def test_words_are_pushed_apart_and_one_by_one(small):
    ids = random_ids(small, np.random.default_rng(0))
    edits = st.apart_edits(ids, 2, 5.0, fixed=4)
    assert len(edits) == 2 * 4 and set(edits) == {f"{name}{what}" for name in st.APART for what in st.EFFECTS}
    push = {name: pushed_rows(edit, small, 2)[1] for name, edit in edits.items()}
    apart, past = (torch.stack([push[f"{name}{what}"] for what in ("", ", fixed")]) for name in st.APART)
    assert torch.allclose(apart, -past)
    step = [torch.tensor(ids.step((0, 1), (3, 1), layer)) for layer in (2, 4)]
    assert torch.allclose(apart[0, 0, 0], 5 * step[0]) and torch.allclose(apart[1, 0, 0], 5 * step[1])
    assert torch.allclose(push["subject right, object left, object only"][:, 0], -5 * step[0])


def test_the_subject_is_pushed_along_lines(small):
    ids = random_ids(small, np.random.default_rng(0))
    edits = st.line_edits(ids, 2, 5.0)
    assert len(edits) == 16 and list(edits)[:4] == ["x0", "x1", "x2", "x3"]
    push = {name: pushed_rows(edit, small, 2)[1][0, 0] for name, edit in edits.items()}
    assert torch.allclose(push["x3"], 5 * torch.tensor(ids.step((0, 0), (3, 0), 2)))
    assert torch.allclose(push["y1"], 5 * torch.tensor(ids.step((0, 2), (0, 1), 2)))
    middle = (ids.step((0, 1), (3, 1), 2) + ids.step((0, 2), (3, 2), 2)) / 2
    assert torch.allclose(push["x3 middle"], 5 * torch.tensor(middle))
    query, late = query_about(), st.late_edits(small, edits)
    assert list(late) == ["behind x0", "behind x3"]
    assert late["behind x3"][0](query) == small.layout(query).rows["subject"][-1] + 1


def test_effects_of_pushes_and_the_example():
    base = ((0.0, 1), (1.0, 0), (0.0, 3), (0.0, 0.5))
    first, second = st.APART
    s = swept({first: [0.0, 3], second: [0.0, -1]}, base=base, truth=(1, 1, 1, 1))
    assert (st.push_effect(s) == 2).all() and st.push_effect(s).shape == (2, 4)
    assert st.wrong_answers(s).tolist() == [1] and st.example_question(s) == 1
    right = swept({first: 0}, base=base, truth=(1, 0, 1, 1))
    assert st.example_question(right) == 3, "where none is wrong, the least sure"


def lines(along_x=1.0, along_y=0.0):
    "A sweep along lines: right (below) rises with the place, left (above) falls."
    changes = {}
    for axis, size in (("x", along_x), ("y", along_y)):
        for k in range(4): changes[f"{axis}{k}"] = changes[f"{axis}{k} middle"] = [-k * size, k * size]
    changes |= {"behind x0": [0.0, 0], "behind x3": [0.0, 1]}
    return swept(changes, base=((0.0, 1), (1, 0.0), (0.0, 1), (0.0, 1)), truth=(0, 1, 1, 1))


def test_changes_by_place_and_groups_of_questions():
    s = lines()
    changes = st.changes_along(s, "x")
    assert changes.shape == (2, 4, 4, 2) and changes[0, 0, :, 1].tolist() == [0, 1, 2, 3]
    groups = st.answer_groups(s, ("left", "right"))
    assert list(groups) == ["truth left", "truth right", "answered left", "answered right"]
    assert groups["truth left"].tolist() == [True, False, False, False]
    assert groups["answered left"].tolist() == [False, True, False, False]
    rise = st.rises(changes[0])
    assert rise["right"][0].tolist() == [3, 3] and rise["left"][0].tolist() == [0, 0]
    assert st.smaller_mean(np.array([[1.0, 5], [3, 0]])) == 2
    assert (st.rightmost_less_leftmost(s) == 6).all() and (st.rightmost_less_leftmost(s, "behind ") == 1).all()
    by_answer = st.across_by_answer(np.arange(4.0), groups)
    assert len(by_answer) == 1 and by_answer[0]["value"] == pytest.approx(5 / 3), "one question alone is no group"
    assert "one answer" in st.same_trend(by_answer, 4)["not_judged"]
    two = [{"value": 1, "low": 0.5}, {"value": 0.9, "low": 0.6}]
    assert st.same_trend(two, 4)["low"] == 0.5
    fig = st.plot_fig6b(changes[0], groups, 1)
    assert [title(ax) for ax in fig.axes] == [f"{name} (n = {mask.sum()})" for name, mask in groups.items()]
    assert st.fig6b_results(changes[0])["(3, 0)"]["right"]["value"] == 3


def test_the_other_axis_beside_the_one_that_is_asked_about():
    sweeps = {"left/right": lines(1.0, 0.5), "above/below": lines(0.25, 1.0)}
    slopes = st.axis_slopes(sweeps)
    assert {name: float(v[0, 0]) for name, v in slopes.items()} == pytest.approx(
        {"left/right, along x": 2, "left/right, along y": 1, "above/below, along y": 2, "above/below, along x": 0.5})
    chosen = {"left/right": 1, "above/below": 2}
    ratios = st.off_axis_ratios(st.at_layers(slopes, [1, 2], chosen))
    assert ratios["x"]["value"] == pytest.approx(0.25) and ratios["y"]["value"] == pytest.approx(0.5)
    assert "on-axis slope" in st.off_over_on(np.zeros(4), np.ones(4))["not_judged"]
    found = st.direction_numbers(sweeps, chosen, middle=True)
    assert found["layers"] == chosen and found["rightmost"]["value"] == 3
    assert found["off_axis_x"]["value"] == pytest.approx(0.25)
    by_layer = {name: st.bootstrap(v.T) for name, v in slopes.items()}
    fig = st.plot_a16(sweeps, by_layer, 1)
    assert title(fig.axes[0]).startswith("above/below (n = 4): along x")
    assert [line.get_label() for line in fig.axes[2].lines[:4]] == list(slopes)


def test_a_layer_of_each_kind_is_its_own():
    slopes = {"left/right, along x": np.array([[1.0], [2]]), "above/below, along y": np.array([[3.0], [4]])}
    found = st.at_layers(slopes, [5, 7], {"left/right": 5, "above/below": 7})
    assert [v.tolist() for v in found.values()] == [[1], [4]]


def test_norms_of_steps_across_the_grid(llava):
    found = st.step_norms(grid_ids(llava, linear=True), 2)
    assert np.allclose(found["row"], found["row"][0]) and np.allclose(found["column"], found["column"][0])
    ids = grid_ids(llava)
    assert st.step_norms(ids, 2)["column"][1] == pytest.approx(np.linalg.norm(ids.at(2)[3, 1] - ids.at(2)[0, 1]))


def test_the_subject_is_pushed_to_every_cell_of_its_line(small):
    stage = st.QuestionSource(px=32).scenes("stage")
    queries, cells = st.made_questions(st.near_far, stage, 3, 0, first=5)
    assert cells.shape == (3, 2, 2) and cells[1].tolist() == [list(map(float, c)) for c in st.near_far(stage, 6, 0)[1]]
    assert [ax.get_xlabel() for ax in st.plot_made(queries).axes] == [q.truth for q in queries]
    ids = random_ids(small, np.random.default_rng(0))
    edits = st.relation_edits(ids, cells[:, 0], 0, 5.0)
    assert len(edits) == 12 and list(edits)[:3] == [f"{push}/0" for push in st.relation_pushes()]
    x, y = map(int, cells[0, 0])
    opposite, from_cell, step = (pushed_rows(edits[f"{push}/3"], small, 3)[1][0, 0] for push in st.relation_pushes())
    assert torch.allclose(opposite, 5 * torch.tensor(ids.step((0, y), (3, y), 2)))
    assert torch.allclose(from_cell, 5 * step) and torch.allclose(step, torch.tensor(ids.step((x, y), (3, y), 2)))
    assert st.implied_distances(np.array([[3.0, 1]]), 0).tolist() == [[3, 2, 1, 0]]
    assert st.implied_distances(np.array([[3.0, 1]]), 1).tolist() == [[1, 0, 1, 2]]


def test_slopes_on_what_a_target_implies():
    push, words = "push", ("near", "far")
    changes = {f"{push}/{k}": [-2.0 * k, 1.0 * k] for k in range(4)}
    s = swept(changes, base=((0.0, 1),) * 3 + ((1.0, 0),), truth=(1, 1, 0, 0))
    implied = np.tile(np.arange(4), (4, 1))
    assert st.relation_changes(s, push).shape == (2, 4, 4, 2)
    found = st.relation_numbers(s, push, implied, words, layer=2)
    assert found["odds"]["value"] == pytest.approx([3, 3]) and found["raised"]["value"] == pytest.approx(1)
    assert found["lowered"]["value"] == pytest.approx(2) and found["both"]["value"] == pytest.approx(1)
    assert list(found["groups"]) == ["truth near", "truth far", "answer far"], "one question alone is no group"
    reverse = st.relation_numbers(s, push, implied, words, layer=2, sign=-1)
    assert reverse["raised"]["value"] == pytest.approx(-1)
    assert st.right_share(s)["value"] == 0.75
    assert "| toy | 3.00 [3.00, 3.00] | 1.00 [1.00, 1.00] |" in st.relation_table({"toy": found}, 1)
    fig = st.plot_relation(s, implied, words, {"other": found, push: found}, 2, "distance (cells)")
    assert len(fig.axes) == 5 and title(fig.axes[1]) == "truth far (n = 2)"
    assert fig.axes[1].containers[0].lines[0].get_ydata().tolist() == [0, -2, -4, -6]


def test_a_ring_is_entered_from_every_cell(small):
    ids = random_ids(small, np.random.default_rng(0))
    edits = st.ring_edits(ids, np.array([[1.0, 2], [0, 0]]))
    assert len(edits) == 32
    _, push = pushed_rows(edits["ID 3 2"], small, 2)
    assert torch.allclose(push[0, 0], torch.tensor(ids.step((1, 2), (3, 2), 2)))
    _, noise = pushed_rows(edits["noise 3 2"], small, 2)
    assert torch.allclose(noise.norm(dim=-1), push.norm(dim=-1))
    middles = np.array([[1.0, 1]] * 4)
    distance = {cell: np.hypot(cell[0] - 1, cell[1] - 1) for cell in st.ALL_CELLS}
    changes = {f"ID {x} {y}": [0.0, -2 * distance[x, y]] for x, y in st.ALL_CELLS}
    changes |= {f"noise {x} {y}": [0.0, 0] for x, y in st.ALL_CELLS}
    found = st.ring_slopes(swept(changes), middles)
    assert np.allclose(found["ID"], 2) and np.allclose(found["noise"], 0)
    queries = [st.surrounded(FreeScenes(10, seed="ring", px=32), i, 0)[0] for i in range(4)]
    fig = st.plot_ring(queries, {arm: st.bootstrap(v.T) for arm, v in found.items()}, [1, 2])
    assert len(fig.axes) == 4 and title(fig.axes[3]) == "surrounded (n = 4)"


def test_subjects_move_along_a_path(small):
    source = st.QuestionSource(seed=2, px=80)
    scenes, queries, places = st.movable_questions(source, 3)
    assert places.shape == (3, 1, 2)
    subject = next(t for t in scenes[0].things if t.name == queries[0].words["subject"])
    assert places[0, 0].tolist() == [4 * subject.x - 0.5, 4 * subject.y - 0.5] == list(st.scene_place(subject))
    same = st.redrawn(scenes[0], queries[0], places[0, 0, 0])
    assert np.array_equal(np.asarray(same.image), np.asarray(queries[0].image)) and same.truth == queries[0].truth
    truths = {st.redrawn(scenes[0], queries[0], column).truth for column in (-5, 9)}
    assert truths == {"left", "right"}
    there = st.towards(places, 1.5)
    assert (there[..., 0] == 1.5).all() and np.array_equal(there[..., 1], places[..., 1])
    ids = random_ids(small, np.random.default_rng(0))
    edits = st.move_edits(ids, places, 2.0)
    assert list(edits) == ["ID, one step", "ID, α = 5"]
    one, five = (pushed_rows(edit, small, 3)[1] for edit in edits.values())
    assert torch.allclose(five, 5 * one)
    columns = np.array([0.0, 3.0])
    found = st.path_changes(small, ids, scenes, queries, places, columns, 4)
    assert list(found) == ["real picture", "real rows", *edits] and all(v.shape == (3, 2) for v in found.values())
    redrawn = [st.redrawn(scene, query, 3.0) for scene, query in zip(scenes, queries)]
    wanted = -small.run(redrawn).logit_diff + small.run(queries).logit_diff
    assert np.allclose(found["real picture"][:, 1], wanted, atol=1e-3)
    outside = st.outside_changes(small, ids, queries, places, np.array([0.0, 4.0]), 4)
    assert np.allclose(outside["ID, one step"][:, 0], found["ID, one step"][:, 0], atol=1e-4)
    inside, beyond = {"a": np.array([[1.0, 2], [1, 2]])}, {"a": np.array([[0.0, 0.5, 3, 5], [0, 0.5, 3, 5]])}
    steps = st.beyond_steps(inside, beyond)["a"]
    assert (steps["left"]["value"], steps["right"]["value"]) == (1, 3)


def test_the_figure_of_a_path():
    inside, outside = np.array([0.0, 1, 2, 3]), np.array([-2.0, -1, 4, 5])
    names = ["real picture", "real rows", *st.path_names(5.0)]
    path = {name: np.tile(inside, (4, 1)) for name in names}
    path_outside = {name: np.tile(outside, (4, 1)) for name in st.path_names(5.0)}
    wide, close = st.plot_path(path, inside, path_outside, outside, 3).axes
    drawn = {line.get_label(): line for line in wide.lines}
    assert drawn["ID, one step"].get_ydata().tolist() == [-2, -1, 0, 1, 2, 3, 4, 5]
    assert len(drawn["real picture"].get_xdata()) == 4
    assert "real picture" not in [line.get_label() for line in close.lines]


def test_other_words_are_steered_with_other_ids(small):
    queries = st.QuestionSource(px=80).questions("table", 4, ("left_right",))
    g = np.random.default_rng(0)
    ids, of_word = random_ids(small, g), {word: random_ids(small, g) for word in ("left", "right")}
    edits = st.table1_edits(small, ids, of_word, queries, ["left"] * 4, 2.0, n_controls=2)
    assert len(edits) == 4 + 2 * 2
    push = {name: pushed_rows(edit, small, 4)[1] for name, edit in edits.items()}
    unit = lambda v: torch.tensor(v) / np.linalg.norm(v)
    on_words = push["relation IDs on relation words"][0]
    for k, found in enumerate(of_word.values()):
        assert torch.allclose(on_words[k] / on_words[k].norm(), unit(found.step((0, 0), (3, 0), 2)))
    mean = np.mean([found.step((0, 0), (3, 0), 2) for found in of_word.values()], axis=0)
    subject, other = push["relation IDs on objects"][0]
    assert torch.allclose(subject / subject.norm(), unit(mean)) and torch.allclose(other / other.norm(), -unit(mean))
    subject, other = push["object IDs on relation words"][0]
    assert torch.allclose(subject / subject.norm(), other / other.norm()), "both words carry the subject's move"
    assert all(callable(edits[name][0]) == name.endswith("words") for name in edits if not name.startswith("noise"))


def test_table_1_is_read_where_objects_gain_most_on_the_first_half():
    turned, kept, base = [2.0, 0], [0.0, 0], ((0.0, 1),) * 4
    cells = {"relation IDs on relation words": kept, "relation IDs on objects": kept,
             st.OBJECTS_ON_OBJECTS: np.array([kept, turned])[:, None], "object IDs on relation words": kept,
             "noise on relation words 0": turned, "noise on objects 0": kept, "noise on objects 1": turned}
    swaps = st.table1_swaps(swept(cells, base=base))
    assert list(swaps)[-2:] == ["noise on relation words", "noise on objects"]
    assert (swaps["noise on objects"] == 0.5).all() and swaps[st.OBJECTS_ON_OBJECTS].sum(1).tolist() == [0, 4]
    gains = st.less_noise(swaps)
    assert list(gains) == list(cells)[:4], "noise is no cell"
    assert (gains["relation IDs on relation words"] == -1).all() and (gains["relation IDs on objects"] == -0.5).all()
    found = st.table1_numbers(swaps)
    assert found["at"] == 1 and found["cells"][st.OBJECTS_ON_OBJECTS]["n"] == 2
    assert found["less_noise"][st.OBJECTS_ON_OBJECTS]["value"] == 0.5
    assert found["margin"]["value"] == 1, "a half less the −½ of relation IDs on objects, the largest of the others"
    text = st.table1_text(found, "toy").splitlines()
    assert len(text) == 2 + 3 + 4 and text[-4].startswith("| Qwen-3b, swapped (paper) | 0.19 | 0.51 | 0.81 | 0.48 |")
    assert text[2].startswith("| **toy, less noise** | -1.00 [-1.00, -1.00] | -0.50 [-0.50, -0.50] | 0.50 [0.50,")
    assert text[3].startswith("| toy, swapped | 0.00 [0.00, 0.66] | 0.00 [0.00, 0.66] | 1.00 [0.34, 1.00] |")


@pytest.mark.slow
def test_ids_at_the_words_of_the_relation_are_extracted(small):
    scenes = st.word_scenes(st.QuestionSource(px=80), 2)
    found = st.ids_at_words(small, scenes)
    assert list(found) == ["left", "right"] and found["left"].ids.shape == (8, 4, 4, small.width)
    assert not np.allclose(found["left"].ids, found["right"].ids)


def test_the_pad_is_the_scene_whose_surer_answer_is_least_sure(small):
    source = st.QuestionSource(seed=3, px=80)
    scenes = [st.pad_scene(small, source, n) for n in (1, 3)]
    sure = [max(float(small.run(q).logit_diff.abs()) for q in st.pad_queries(scene).values()) for scene in scenes]
    assert sure[1] <= sure[0]
    queries = st.pad_queries(scenes[0], " {} or {}?")
    assert list(queries) == ["left_right", "above_below"]
    assert queries["left_right"].text.endswith(" left or right?")
    assert queries["left_right"].words["subject"] == scenes[0].things[0].name
    ids, place = random_ids(small, np.random.default_rng(0)), (0.2, 2.9)
    fig = st.plot_pad(small, ids, queries, place, [2, 4])
    titles = [title(ax).split(" at ")[1] for ax in fig.axes if title(ax)]
    assert titles == [f"({k}, 3)" for k in range(4)] + [f"(0, {k})" for k in range(4)]


def test_the_live_pad_steers_anew(small, mixed):
    pytest.importorskip("ipywidgets")
    ids = random_ids(small, np.random.default_rng(0))
    queries = {"left_right": mixed[0], "above_below": mixed[1]}
    kind, size, pad, view = st.playground(small, ids, queries, (1, 1), [2]).children
    assert kind.options == ("left_right", "above_below") and pad[3, 0].description == "0, 3"
    pad[3, 0].click()
    kind.value, size.value = "above_below", 2.0


def test_claims_about_questions_that_are_answered_at_chance_are_not_judged():
    number, chance = {"value": 1, "low": 0.5, "high": 2, "n": 7}, {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    assert st.claim_or_reason(number, {**chance, "low": 0.51}) is number
    none = st.claim_or_reason(number, chance)
    assert none["value"] is None and none["n"] == 7 and "0.50 [0.40, 0.60]" in none["not_judged"]


def test_figure_6a_and_its_numbers(mixed):
    names = [f"{name}{what}" for name in st.APART for what in st.EFFECTS]
    s = swept({name: [0.0, 1] for name in names}, base=((0.0, 1),) * 4, truth=(1, 0, 1, 1))
    effects = {what: st.bootstrap(st.push_effect(s, what).T) for what in st.EFFECTS}
    found = st.fig6a_results(s, mixed[0], 1, effects)
    assert found["answered_right"] is False and found["question"] == mixed[0].text
    assert set(found["log_probs"]) == set(names) and found["log_probs"][names[0]].shape == (2, 2)
    fig = st.plot_fig6a(s, mixed[0], 1, effects, 4, (1, 2))
    titles = ["IDs of the same layer", "IDs of layer 4", "4 questions; shaded: 80 %"]
    assert [title(ax) for ax in fig.axes][1:] == titles
    assert fig.axes[3].get_ylabel() == "effect (log-odds)"


def test_a_line_takes_estimates_or_an_estimate_of_arrays():
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    found = st.bootstrap(np.arange(6.0).reshape(3, 2))
    plot_line(ax, [1, 2], found)
    plot_line(ax, [1, 2], [found[0], found[1]])
    assert np.allclose(ax.lines[0].get_ydata(), ax.lines[1].get_ydata()) and len(ax.collections) == 2
    gap = plot_line(ax, [1, 2], [found[0], {"value": None, "low": None, "high": None, "n": 0}])
    assert np.isnan(gap.get_ydata()).tolist() == [False, True], "a line with a gap"
    plot_line(ax, [1], [{"value": 1, "low": None, "high": None, "n": 1}])
    assert len(ax.lines) == 4 and len(ax.collections) == 3, "no band without an interval"


# --- the results

def number(estimate):
    "Whether it is an estimate inside its interval, or one that says why it is not judged."
    if estimate["value"] is None: return estimate["n"] > 0 and estimate["not_judged"]
    return estimate["n"] > 0 and estimate["low"] <= estimate["value"] <= estimate["high"]


@pytest.mark.parametrize("path", sorted((ROOT/"results").glob("*/04_steering.json")), ids=lambda p: p.parent.name)
def test_results_are_complete(path):
    found = read_results(path)
    assert all(number(one) for one in found["claims"].values()) and found["provenance"]["params"]["alpha"] == 5
    assert {"ID", "noise", "permuted places", "off the plane", "agreeing ID"} <= set(found["fig2"]["curves"])
    assert set(found["fig2"]["readings"]) == {"top 3", "chosen on half", "middle third"}
    params = found["provenance"]["params"]
    deep = "layer_step" in params  # more than twelve blocks: dear, so fewer questions
    assert params["n_scenes"] >= (24 if deep else 200)
    assert params["n_noise"] >= (2 if deep else 5)
    assert not params["quick"]
    if deep or "dose" in found:
        chosen = found["dose"]["chosen"]
        assert chosen["gain"]["n"] == chosen["ID"]["n"]
        assert {"layer", "alpha", "noise", "permuted places"} <= set(chosen)
        assert (path.parent/"fig2_dose.png").is_file()
    assert found["fig9"]["strength"]["largest"] > 0 and number(found["fig9"]["steerability"])
    figures = "fig2", "fig2_choices", "fig6a", "fig6b", "fig6c", "fig6d", "a16", "steering_path", "steering_pad"
    assert all((path.parent/f"{name}.png").is_file() for name in figures)
    of_ids = SpatialIDs.load(path.parent/"spatial_ids.safetensors").provenance
    of_results = found["provenance"]["weight_hash"]
    assert of_results == of_ids["weight_hash"], "notebook 04 is older than the IDs: run it again"


# --- which prompt is it?

def left_of(mark, **kwargs):
    "The same text, one of its two cups marked."
    template = ("Is a {subject} left of a cup?", "Is a cup left of a {subject}?")[mark]
    return Query(None, template, {"subject": "cup"}, ("left", "right"), **kwargs)


def test_two_queries_of_one_text_are_steered_at_their_own_marks(llava):
    one, two, v = left_of(0), left_of(1), vector(llava)
    alone = []
    for query in (one, two):
        with llava.steer(query, {"subject": v}, layer=2): alone.append(llava.run(query).logits)
    with llava.steer([one, two], {"subject": v}, layer=2):
        assert torch.allclose(llava.run([one, two]).logits, torch.cat(alone), atol=1e-12)
        equal = llava.run([left_of(1), left_of(0)]).logits # not the same objects
        assert torch.allclose(equal, torch.cat(alone[::-1]), atol=1e-12)
        with pytest.raises(ValueError, match="prompt 0 of this call reads like several of the queries"):
            llava.model(**llava.encode([one]))
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_groups_that_are_functions_tell_queries_of_one_wording_apart(llava):
    one, two, v = query_about(seed=1), query_about(seed=2), vector(llava)
    near = lambda query: -2 if query is one else -3
    with llava.steer([one, two], {near: v}, layer=2): together = llava.run([one, two]).logits
    for row, query in zip(together, (one, two)):
        with llava.steer(query, {near(query): v}, layer=2): alone = llava.run(query).logits[0]
        assert torch.allclose(alone, row, atol=1e-12)


def test_a_prompt_that_begins_like_another_is_its_own():
    vlm = VLM(*tiny_llava(dtype=torch.float64, chat=None), "bare")
    short = Query(None, "The {subject}", {"subject": "cup"})
    long = Query(None, "The cup is left of the {subject}", {"subject": "star"})
    v, settings = vector(vlm), dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
    settings["suppress_tokens"] = unsaid(vlm)
    for order in ([short, long], [long, short]):
        with vlm.steer(order, {"subject": v}, layer=2):
            together = [vlm.run(q).logits for q in (short, long)]
            calls = [(q, cache) for q in (short, long) for cache in (True, False)]
            generate = lambda q, cache: vlm.model.generate(**vlm.encode([q]), use_cache=cache, **settings)
            said = [torch.stack(generate(*call).logits) for call in calls]
            ids = vlm.encode([long])["input_ids"]
            with pytest.raises(ValueError, match="reads like several"): vlm.model(input_ids=torch.cat([ids, ids], 1))
        for query, found in zip((short, long), together):
            with vlm.steer(query, {"subject": v}, layer=2): alone = vlm.run(query).logits
            assert torch.allclose(alone, found, atol=1e-12)
        for cached, uncached, found in ((*said[:2], together[0]), (*said[2:], together[1])):
            assert torch.allclose(cached, uncached, atol=1e-5)
            assert torch.allclose(cached[0].double(), found, atol=1e-5)


@torch.no_grad()
def test_a_cache_is_steered_if_its_prompt_was_read_inside(llava):
    import copy
    query, token = query_about(), torch.tensor([[5]])
    batch = llava.encode([query]).to("cpu", torch.float64)
    older = llava.model(**batch, use_cache=True).past_key_values
    with llava.steer(query, {"subject": vector(llava)}, layer=1):
        inside = llava.model(**batch, use_cache=True).past_key_values
        branch = copy.deepcopy(inside)
        assert torch.equal(*(llava.model(input_ids=token, past_key_values=c).logits for c in (inside, branch)))
        with pytest.raises(ValueError, match="before the steering began"):
            llava.model(input_ids=token, past_key_values=older)
    with llava.steer(query, {"subject": vector(llava, 1)}, layer=1):
        with pytest.raises(ValueError, match="before the steering began"):
            llava.model(input_ids=token, past_key_values=branch)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_generation_with_a_static_cache_is_steered(family):
    vlm = VLM(*tiny(family, dtype=torch.float64), family)
    queries = [query_about(), query_about("dog", "cup", 1)]
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=unsaid(vlm),
                    return_dict_in_generate=True, output_logits=True)
    generate = lambda batch, **cache: torch.stack(vlm.model.generate(**batch, **settings, **cache).logits)
    with vlm.steer(queries, {"subject": vector(vlm)}, layer=2, scale=3):
        batch = vlm.encode(queries).to("cpu", torch.float64)
        assert (batch["attention_mask"] == 0).any(), "one of them is padded"
        plain, static = generate(batch), generate(batch, cache_implementation="static")
        assert (plain - static).abs().max() < 1e-5 and (static[0] - vlm.run(queries).logits).abs().max() < 1e-5


def test_each_thread_steers_its_own_call(llava):
    "Streaming idioms generate in a thread of their own, inside the with."
    from concurrent.futures import ThreadPoolExecutor
    pairs = ("cup", "star"), ("hot dog", "cat"), ("dog", "cup"), ("cat", "hot dog")
    queries = [query_about(*pair, seed) for seed, pair in enumerate(pairs, 1)]
    call = lambda q: llava.model(**llava.encode([q]).to("cpu", torch.float64)).logits[:, -1]
    with llava.steer(queries, {"subject": vector(llava)}, layer=2), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, queries * 3))
        for one, query in zip(found, queries * 3): assert torch.allclose(one, llava.run(query).logits, atol=1e-10)
