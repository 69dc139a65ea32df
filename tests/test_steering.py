"""Steering: while a model runs and generates, it is what plain hooks do, and nothing of it remains.

Edits, places and readings are what their names say."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatialid.edits import at_place, permuted_places
from spatialid.hooks import RULES, scaled
from spatialid.questions import questions
from spatialid.sweeps import change, layers_near, slope, swept_layers
from spatialid.store import read_results
from spatialid.scenes import between
from spatialid import steering as st
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.scenes import FreeScenes, GridScenes, Thing, grid_pairs
from spatialid.extraction import SpatialIDs
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.sweeps import Sweep, sweep
from tiny import tiny, tiny_llava

ROOT = Path(__file__).parents[1]
QUESTION = "Is the {subject} to the left or right of the {object}?"


def picture(seed, px=16):
    pixels = np.random.default_rng(seed).integers(0, 255, (px, px, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(subject="cup", object="hot dog", seed=0, image=True, **kwargs):
    words = {"subject": subject, "object": object}
    return Query(picture(seed) if image else None, QUESTION, words, ("left", "right"), "left", **kwargs)


@pytest.fixture(scope="module")
def llava(): return VLM(*tiny_llava(dtype=torch.float64), "tiny")


def vector(vlm, seed=0): return torch.tensor(np.random.default_rng(seed).normal(size=(vlm.n_layers, vlm.width)))


# --- the size of a push

def test_each_rule_is_its_formula():
    x, to, frm = (torch.randn(3, 7, dtype=torch.float64) for _ in range(3))
    size, unit = x.norm(dim=1, keepdim=True), lambda v: v / v.norm(dim=1, keepdim=True)
    assert torch.allclose(scaled(to, frm, x, 2, "raw"), 2 * (to - frm))
    assert torch.allclose(scaled(to, frm, x, 2, "diff_norm"), 2 * size * unit(to - frm))
    assert torch.allclose(scaled(to, frm, x, 2, "each_norm"), 2 * size * (unit(to) - unit(frm)))
    assert torch.allclose(scaled(to, None, x, 2), 2 * size * unit(to))
    with pytest.raises(ValueError, match="diff_norm, each_norm, raw"): scaled(to, frm, x, 2, "other")


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
    queries = [ask(), ask("dog", "cup", 1)]
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
    query = ask()
    plain, before = llava.run(query).logits, hooks()
    with llava.steer(query, {"subject": vector(llava)}, layer=1): steered = llava.run(query).logits
    assert hooks() == before and torch.equal(llava.run(query).logits, plain) and not torch.equal(steered, plain)
    with pytest.raises(RuntimeError):
        with llava.steer(query, {"subject": vector(llava)}, layer=1): raise RuntimeError
    assert hooks() == before and torch.equal(llava.run(query).logits, plain)


@pytest.mark.parametrize("rule", RULES)
def test_steer_is_patch(llava, rule):
    queries, to, frm = [ask(), ask("dog", "cat", 3)], vector(llava, 1)[1], vector(llava, 2)[1]
    steered = lambda rows: rows + scaled(to, frm, rows, 2, rule)
    with llava.patch({2: ("subject", steered)}): wanted = llava.run(queries).logits
    with llava.steer(queries, {"subject": (to, frm)}, layer=2, scale=2, rule=rule): found = llava.run(queries).logits
    assert torch.equal(found, wanted)


def test_a_layer_is_taken_from_vectors_of_all_layers(llava):
    v, query = vector(llava), ask()
    with llava.steer(query, {"object": v}, layer=3): one = llava.run(query).logits
    with llava.steer(query, {"object": v[2]}, layer=3): two = llava.run(query).logits
    assert torch.equal(one, two)


def test_many_queries_in_any_batches(llava):
    queries = [ask("cup", "star", 1), ask("hot dog", "cat", 2), ask("dog", "cup", 3)]
    with llava.steer(queries, {"subject": vector(llava)}, layer=2):
        together = llava.run(queries).logits
        apart = torch.cat([llava.run(q).logits for q in queries[::-1]]).flip(0)
        batch = llava.encode(queries[:1]).to("cpu", torch.float64)
        beams = llava.model.generate(**batch, max_new_tokens=2, num_beams=3, num_return_sequences=3)
    assert (together - apart).abs().max() < 1e-12 and len(beams) == 3


def test_captured_rows_are_the_steered_ones(llava):
    query, v = ask(), vector(llava)[1]
    before = llava.run(query, [2], "subject").residual(2)
    with llava.steer(query, {"subject": v}, layer=2): after = llava.run(query, [2], "subject").residual(2)
    assert torch.allclose(after - before, v.expand_as(before), atol=1e-12)


def test_mllama_without_a_picture():
    vlm = VLM(*tiny("mllama", dtype=torch.float64), "tiny")
    query = ask(image=False)
    plain = vlm.run(query).logits
    for layer in (1, 2): # nothing reads the word after block 3, where block 4 is skipped
        with vlm.steer(query, {"subject": vector(vlm)}, layer=layer):
            assert not torch.equal(vlm.run(query).logits, plain)
    with pytest.raises(ValueError, match="only words"):
        with vlm.steer(ask(), {"image": vector(vlm)}, layer=1): pass


def test_what_cannot_be_steered_is_said(llava):
    query, v = ask(), vector(llava)
    def says(text, call, **kwargs):
        with pytest.raises(ValueError, match=text):
            with llava.steer(*kwargs.pop("args", (query, {"subject": v})), **{"layer": 1, **kwargs}): call()
    says("none of the 1 that are steered", lambda: llava.run(ask("dog")))
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
    "IDs of a model, one object, one size; linear in column and row if asked for."
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
    to, frm = np.array([[[0, 0], [3, 1]], [[2, 2], [1, 0]]]), np.array([[[3, 0], [0, 1]], [[0, 2], [1, 3]]])
    found = st.moves(ids, to, frm)(2, slice(1, 2))
    grid = ids.at(2)
    assert np.allclose(found[0], [[grid[2, 2], grid[0, 1]]]) and np.allclose(found[1], [[grid[2, 0], grid[3, 1]]])
    assert st.moves(ids, to)(2, slice(0, 2))[1] is None
    assert np.allclose(st.moves(ids, to, layer=3)(1, slice(0, 1))[0], [[ids.at(3)[0, 0], ids.at(3)[1, 3]]])


def test_an_edit_of_a_sweep_is_steering_the_model(llava):
    ids, queries = grid_ids(llava), [ask("cup", "star", i) for i in range(3)]
    to, frm = np.tile([[[0, 0], [3, 0]]], (3, 1, 1)), np.tile([[[3, 0], [0, 0]]], (3, 1, 1))
    for rule in RULES:
        s = sweep(llava, queries, edits={"ID": (("subject", "object"), st.pushing(st.moves(ids, to, frm), 2, rule))})
        for layer in (1, 3):
            left, right = (torch.as_tensor(ids.at(layer)[0, x]) for x in (0, 3))
            with llava.steer(queries, {"subject": (left, right), "object": (right, left)}, layer, 2, rule):
                steered = llava.run(queries)
            assert (steered.log_probs - s.log_probs["ID"][layer - 1]).abs().max() < 1e-10
    ids.table *= 0
    s = sweep(llava, queries, edits={"ID": ("subject", st.pushing(st.moves(ids, to[:, :1], frm[:, :1])))})
    assert (s.log_probs["ID"] - s.base_log_probs).abs().max() < 1e-12, "a push of nothing changes nothing"


def test_controls_have_the_norm_of_what_they_replace(llava):
    ids, rows = grid_ids(llava), torch.randn(3, 2, llava.width, dtype=torch.float64)
    to, frm = permuted_places(3, 4, 0, 0)
    find = st.moves(ids, to, frm)
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


def test_dealt_cells_differ_and_the_object_goes_the_other_way():
    to, frm = permuted_places(50, 4, 0, 0)
    assert to.shape == (50, 2, 2) and to.min() >= 0 and to.max() <= 3 and (to[:, 0] != frm[:, 0]).any(1).all()
    assert np.array_equal(to[:, 0], frm[:, 1]) and np.array_equal(to[:, 1], frm[:, 0])


# --- questions

def test_opposing_pushes_oppose_the_belief():
    text, words = "Is the {subject} above or below the {object}?", {"subject": "cup", "object": "star"}
    queries = [ask(), ask(), Query(None, text, words, ("above", "below"))]
    to, frm = st.opposing(queries, ["left", "right", "below"])
    assert frm.tolist() == [[[0, 0], [3, 0]], [[3, 0], [0, 0]], [[0, 3], [0, 0]]] and np.array_equal(to, frm[:, ::-1])


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
    asked = questions(FreeScenes(100, seed=4), 4)
    ids = random_ids(vlm, g)
    edits = st.adversarial(vlm, ids, asked, [q.truth for q in asked], alpha=3.0, n_noise=2)
    assert list(edits) == ["ID", "noise 0", "noise 1"]
    rows = torch.tensor(g.standard_normal((4, 2, vlm.width)))
    push = {name: edit(rows, 2, slice(0, 4)) - rows for name, (_, edit) in edits.items()}
    for p in push.values(): assert torch.allclose(p.norm(dim=-1), 3 * rows.norm(dim=-1))
    to = {"left": (3, 0), "right": (0, 0), "above": (0, 3), "below": (0, 0)}[asked[0].truth]
    frm = {"left": (0, 0), "right": (3, 0), "above": (0, 0), "below": (0, 3)}[asked[0].truth]
    step = torch.tensor(ids.step(frm, to, 2))
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
    asked = questions(FreeScenes(100, seed=4), 6)
    ids = random_ids(vlm, g)
    s = sweep(vlm, asked, edits=st.adversarial(vlm, ids, asked, vlm.run(asked).beliefs, n_noise=2))
    one = st.fig9_numbers(vlm, ids, vlm.run(asked, s.layers, ("subject", "object")), s)
    was = s.base_log_probs.argmax(-1)
    turned = lambda name: (s.log_probs[name].argmax(-1) != was).double().numpy()[2:5]
    gain = turned("ID") - (turned("noise 0") + turned("noise 1")) / 2
    assert one["steerability"]["value"] == pytest.approx(gain.mean())
    x = vlm.run(asked, [3], "subject").residual(3)[:, 0].norm(dim=-1).mean()
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
    assert st.share_in_middle(effect, list(range(1, 10)), 9) == 1
    x = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert np.allclose(slope(2.0 * x + 1, x), 2) and np.allclose(slope(np.arange(4.0), np.arange(4)), 1)


def test_the_released_script_finds_every_equal_token(llava):
    query = ask("dog", "hot dog")
    of_subject = st.occurrences(llava, query, "subject")
    assert len(of_subject) == 2 and of_subject == st.occurrences(llava, query, "object")
    assert len(st.occurrences(llava, ask("cup", "star"), "subject")) == 1
    scale = st.released_scale(llava, [query, ask("cup", "star")], 5, [1, 2])(1, slice(0, 2))
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
    ids, query = grid_ids(llava, linear=True), ask()
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
    assert st.share_in_middle(effect, list(range(1, 31)), 30) == 1
    some = swept_layers(30, 19)
    dense = st.share_in_middle(np.ones((10, len(some))), some, 30)
    assert dense == pytest.approx(10 / 29), "layers that are swept more densely do not count more"
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


def test_a_dose_is_chosen_by_the_gain_on_the_first_questions_alone():
    g = np.random.default_rng(0)
    swaps = {a: {"ID": np.zeros((3, 10)), "noise": np.zeros((3, 10))} for a in (0.5, 1.0, 5.0)}
    swaps[5.0]["ID"][:] = swaps[5.0]["noise"][:] = 1  # turns everything, as does noise
    swaps[1.0]["ID"][1] = 1
    for a in swaps: swaps[a]["ID"][:, 5:] = g.random((3, 5))
    assert st.chosen_dose(swaps, 5) == (1.0, 1)
    swaps[0.5]["ID"][2, :5] = 1
    assert st.chosen_dose(swaps, 5) == (0.5, 2), "of equals the smaller dose"
    found = st.at_dose(swaps, 1.0, 1, slice(0, 5))
    assert found["ID"]["value"] == 1
    assert found["noise"]["value"] == 0
    assert found["gain"]["value"] == 1
    assert found["gain"]["low"] < 1


def test_each_word_is_moved_by_the_ids_of_its_slot(llava):
    first, second = grid_ids(llava, seed=0), grid_ids(llava, seed=1)
    to, frm = permuted_places(3, 4, 0, 0)
    found = st.moves_by_slot([first, second], to, frm)(2, slice(1, 3))
    for end, places in zip(found, (to, frm)):
        wanted = [at_place(torch.as_tensor(ids.at(2)), places[1:3, k]) for k, ids in enumerate((first, second))]
        assert end.shape == (2, 2, llava.width) and torch.equal(end, torch.stack(wanted, 1))
    same = st.moves_by_slot([first, first], to, frm)(2, slice(0, 3))
    assert all(torch.equal(a, b) for a, b in zip(same, st.moves(first, to, frm)(2, slice(0, 3))))
    with pytest.raises(ValueError, match="1 sets of IDs for 2 words"): st.moves_by_slot([first], to, frm)


def test_edits_of_all_doses(llava):
    ids, rows = grid_ids(llava), torch.randn(3, 2, llava.width, dtype=torch.float64)
    to, frm = permuted_places(3, 4, 0, 0)
    permuted = [st.moves(ids, *permuted_places(3, 4, 0, 1))]
    noise = [st.gaussian(llava.width, 2, 0, i) for i in range(2)]
    edits = st.dose_edits(st.moves(ids, to, frm), permuted, noise, (0.25, 5.0))
    assert list(edits) == [f"{name} {a}" for a in ("0.25", "5") for name in ("ID", "noise 0", "noise 1", "permuted 0")]
    for name, (group, edit) in edits.items():
        push = edit(rows, 1, slice(0, 3)) - rows
        assert group == st.BOTH and torch.allclose(push.norm(dim=-1), float(name.split()[-1]) * rows.norm(dim=-1))


def test_the_ceiling_exchanges_rows_with_the_mirrored_picture(llava):
    queries = [ask(seed=i, subject=s) for i, s in enumerate(("cup", "hot dog", "star"))]
    found = st.mirror_swaps(llava, queries, [1, 3])
    assert list(found) == ["last sub-token", "whole words"] and all(v.shape == (2, 3) for v in found.values())
    rows = [llava.positions(q, st.whole_words(llava)) for q in queries]
    last = [llava.positions(q, st.BOTH) for q in queries]
    assert len(rows[1]) > len(last[1]) == 2, "a hot dog is several tokens"
    assert all(set(a) >= set(b) for a, b in zip(rows, last))
    from PIL import ImageOps
    for q, want in zip(queries, found["whole words"].T):
        source = Query(ImageOps.mirror(q.image), q.template, q.words, q.answers)
        group = st.whole_words(llava)
        for k, layer in enumerate((1, 3)):
            residual = llava.run(source, [layer], [group]).residual(layer)
            with llava.patch({layer: (group, residual)}): patched = llava.run(q)
            assert bool(want[k]) == (patched.beliefs != llava.run(q).beliefs)


def test_efficiency_is_judged_only_below_a_ceiling():
    assert st.efficiency(np.array([1.0, 0, 1, 0]), np.ones(4))["value"] == 0.5
    none = st.efficiency(np.zeros(4), np.array([1.0, 0, -1, 0]))
    assert none["value"] is None and "not clear" in none["not_judged"]


def test_figures_of_the_dose():
    from matplotlib.figure import Figure
    curve, rows = Figure().subplots(1, 2)
    shares = {"ID": 1.0, "noise": 0.0, "permuted places": 0.5}
    of_arms = {arm: np.full((2, 6), v) for arm, v in shares.items()}
    swaps = {a: of_arms for a in st.DOSES}
    st.plot_dose(curve, swaps, 1, slice(3, None))
    assert [line.get_label() for line in curve.lines] == ["ID", "noise", "permuted places", "paper's α = 5"]
    assert [t.get_text() for t in curve.get_xticklabels()] == [".25", ".5", "1", "2", "5", "10"]
    assert np.allclose(curve.lines[0].get_ydata(), 1)
    st.plot_estimates(rows, [("a", st.wilson([1, 0]), "k"), ("b", st.wilson([0, 0]), "k")])
    assert [t.get_text() for t in rows.get_yticklabels()] == ["a", "b"]
    assert st.listed_layers([3, 4, 5]) == "3, 4, 5" and st.listed_layers([13, 16, 17, 20]) == "13-20"


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
    one, two, v = ask(seed=1), ask(seed=2), vector(llava)
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
    query, token = ask(), torch.tensor([[5]])
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
    queries = [ask(), ask("dog", "cup", 1)]
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
    queries = [ask("cup", "star", 1), ask("hot dog", "cat", 2), ask("dog", "cup", 3), ask("cat", "hot dog", 4)]
    call = lambda q: llava.model(**llava.encode([q]).to("cpu", torch.float64)).logits[:, -1]
    with llava.steer(queries, {"subject": vector(llava)}, layer=2), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, queries * 3))
        for one, query in zip(found, queries * 3): assert torch.allclose(one, llava.run(query).logits, atol=1e-10)
