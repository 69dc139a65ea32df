"The resumed sweep against the plain one, its bookkeeping, its metrics, and what it says about bad input."
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import overflowing, tiny, tiny_llava

from spatialid import sweeps
from spatialid.edits import add
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.sweeps import (Batch, Shift, Sweep, complement, first_affected, forward_passes, in_float64,
                              largest_difference, log_sum_exp_kernel, recomputed, rounding, sweep)

NAMES = ["cup", "star", "dog", "cat", "hot dog"]
LEFT_RIGHT = "Is the {subject} to the left or right of the {object}?"


def picture(seed, px=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (px, px, 3), dtype=np.uint8))


def questions(n, seed, names=NAMES, px=16, template=LEFT_RIGHT):
    def question(i):
        words = {"subject": names[i % len(names)], "object": names[(i + 1) % len(names)]}
        truth = ("left", "right")[(i + seed) % 2]
        return Query(picture(1000 * seed + i, px), template, words, ("left", "right"), truth)
    return [question(i) for i in range(n)]


@pytest.fixture(scope="module")
def llava(): return in_float64(VLM(*tiny_llava(), "tiny"))


SWAPS = {"image": "image", "text": "text", "objects": "objects", "subject": "subject", "answers": "answers",
         "last": "last", "all": "all", "one": 3, "interleaved": ("image", "last"), "chance": lambda q: [-15, -8, -2],
         "first": 0}
FEW = {name: SWAPS[name] for name in ("image", "text", "objects", "last", "all", "interleaved", "chance")}
ENDS = [1, 2, 4]  # layers: of four, where families differ


def largest(a, b): return max(float((a.logits[n] - b.logits[n]).abs().max()) for n in a.names)


def both(vlm, base, source=None, edits=SWAPS, **others):
    "The resumed sweep and the plain one."
    return [sweep(vlm, base, source, edits, logits=True, plain=plain, **others) for plain in (False, True)]


def is_everywhere(log_probs, wanted): return torch.allclose(log_probs, wanted.expand_as(log_probs), atol=1e-9)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "mllama"])
def test_swaps_equal_whole_forward_passes(family):
    vlm = in_float64(VLM(*tiny(family), "tiny"))
    assert vlm.family.fast
    px = 16 if family == "llava" else 32
    base, source = questions(5, 0, px=px), questions(5, 1, px=px)  # names of one and of two words: padded prompts
    assert len({len(vlm.tokens(q)) for q in base}) > 1
    edits, layers = (SWAPS, None) if family == "llava" else (FEW, ENDS)
    fast, plain = both(vlm, base, source, edits, layers=layers)
    assert (fast.path, plain.path) == ("fast", "plain")
    assert largest(fast, plain) < 1e-9
    first = 1 if vlm.family.cross else 0  # after the first block that reads the picture
    groups = ["image", "objects", "last", *(() if vlm.family.cross else ["text"])]  # of Mllama the text is all there is
    effects = [float((plain.logits[n][first] - plain.logits["all"][first]).abs().max()) for n in groups]
    assert min(effects) > 1e-3, "the edits do something"
    assert torch.allclose(fast.base_log_probs, plain.base_log_probs, atol=1e-9)
    assert torch.allclose(fast.source_log_probs, plain.source_log_probs, atol=1e-9)


def test_a_picture_without_tokens_is_changed_and_left_out():
    "Mllama: edits of the cross-attention states, the same in all queries or not, with words or alone; no picture."
    vlm = in_float64(VLM(*tiny("mllama"), "tiny"))
    base, g = questions(5, 0, px=32), torch.Generator().manual_seed(0)
    n, push = vlm.cross_rows, lambda *size: torch.randn(*size, vlm.width, generator=g, dtype=torch.float64)
    larger = lambda rows, layer, samples: rows * (1 + .1 * layer)
    edits = {"picture": ("image", add(push(n))), "each": ("image", add(push(5, n))),
             "word too": (("object", "image", "last"), larger)}
    fast, plain = both(vlm, base, edits=edits, memory=1e6)
    assert (fast.path, plain.path) == ("fast", "plain") and largest(fast, plain) < 1e-9
    effects = [float((logits[0] - logits[-1]).abs().max()) for logits in plain.logits.values()]
    assert min(effects) > 1e-3, "the edits do something"
    assert torch.equal(plain.logits["picture"][-1], plain.logits["each"][-1]), "no block reads it after the last"
    wide, high = (replace(base[0], image=base[0].image.resize(size)) for size in ((32, 16), (16, 32)))
    with pytest.raises(ValueError, match="query 0 has pictures of other proportions"):
        sweep(vlm, wide, high, {"image": "image"})
    blind = [Query(None, q.template, q.words, q.answers) for q in base]
    edits = {"last": ("last", add(push(1)[0])), "subject": ("subject", lambda rows: 2 * rows)}
    assert largest(*both(vlm, blind, edits=edits)) < 1e-9


def test_each_cell_is_what_patch_and_run_give(llava):
    "The oracle of the oracle: one query, one layer, one group, written out by hand."
    base, source = questions(3, 0), questions(3, 1)
    swept = sweep(llava, base, source, {"objects": "objects"}, [2, 4], logits=True)
    assert swept.layers == [2, 4]
    for i, (b, s) in enumerate(zip(base, source)):
        for k, layer in enumerate(swept.layers):
            with llava.patch({layer: ("objects", llava.run(s, [layer], "objects"))}): run = llava.run(b)
            assert torch.allclose(run.logits[0], swept.logits["objects"][k, i], atol=1e-9)
            assert torch.allclose(run.log_probs[0], swept.log_probs["objects"][k, i], atol=1e-9)


def test_edits_that_compute_rows(llava):
    base = questions(5, 0, ["cup", "star", "dog"])
    vectors = torch.randn(5, 2, llava.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edits = {"double": ("objects", lambda rows, layer, samples: 2 * rows), "one": ("subject", add(vectors[0, 0])),
             "rows": ("objects", add(vectors[0])), "queries": ("objects", add(vectors)),
             "layers": ("subject", add({l: vectors[l, 0] for l in (1, 2, 3, 4)})),
             "zero": ("image", add(torch.zeros(llava.width)))}
    fast, plain = both(llava, base, edits=edits)
    assert largest(fast, plain) < 1e-9
    for i, q in enumerate(base):
        with llava.patch({3: ("objects", lambda rows: rows + vectors[i])}): run = llava.run(q)
        assert torch.allclose(run.logits[0], fast.logits["queries"][2, i], atol=1e-9)
    assert is_everywhere(fast.log_probs["zero"], fast.base_log_probs)
    assert not torch.allclose(fast.log_probs["layers"][0], fast.log_probs["layers"][1])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_attention_in_two_parts_equals_attention_over_all_scores(family, monkeypatch):
    "The prefix in one fused product against all scores held."
    vlm = in_float64(VLM(*tiny(family), "tiny"))
    px, apart = 16 if family == "llava" else 32, []
    base, source = questions(5, 0, px=px), questions(5, 1, px=px)
    inner = sweeps._attend_apart
    monkeypatch.setattr(sweeps, "_APART", {"cpu"})
    monkeypatch.setattr(sweeps, "_attend_apart", lambda *args: apart.append(args[-1]) or inner(*args))
    in_parts = sweep(vlm, base, source, FEW, ENDS, logits=True)
    assert any(len({*hidden}) > 1 for hidden in apart), "prompts of several lengths in one product"
    monkeypatch.setattr(sweeps, "_APART", {})
    monkeypatch.setattr(sweeps, "_attend_apart", None)
    assert largest(in_parts, sweep(vlm, base, source, FEW, ENDS, logits=True)) < 1e-10


def test_what_the_last_rows_do_not_see_of_the_prefix(llava):
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[1, :, :, :2] = False
    run = replace(llava.clean(llava.encode(questions(2, 0, ["cup"]))), masks=[mask, None], real=torch.ones(2, 6))
    assert run.hidden(0, 3) == [0, 2] and run.hidden(1, 3) == [0, 0]
    assert run.hidden(0, 4) is None, "nothing of the prefix of the second prompt is left"
    assert run.hidden(0, 6) is None and run.hidden(1, 6) is None, "no prefix"
    mask[0, :, 4, 1] = False
    assert replace(run, padding={}).hidden(0, 3) is None, "rows that see different parts"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kernel_is_used_only_if_it_is_right(dtype, monkeypatch):
    kernel = log_sum_exp_kernel.__wrapped__
    assert kernel("cpu", dtype, 16) is not None and kernel("mps", dtype, 16) is None
    right = sweeps._KERNELS["cpu"]
    def refused(q, k, v): raise RuntimeError("no such kernel")
    wrong = [lambda q, k, v: right(1.1 * q, k, v), lambda q, k, v: (right(q, k, v)[0], right(q, k, v)[1] + 1), refused]
    for broken in wrong:
        monkeypatch.setitem(sweeps._KERNELS, "cpu", broken)
        assert kernel("cpu", dtype, 16) is None


def test_little_memory_gives_the_same_in_more_pieces(llava, monkeypatch):
    base, source = questions(6, 0), questions(6, 1)
    calls = []
    inner = VLM.resume
    monkeypatch.setattr(VLM, "resume", lambda self, cells, limit: calls.append(len(cells)) or inner(self, cells, limit))
    one = sweep(llava, base, source, SWAPS, logits=True)
    whole = len(calls)
    many = sweep(llava, base, source, SWAPS, logits=True, memory=2e5)
    assert len(calls) - whole > 10 * whole and largest(one, many) < 1e-12


@pytest.mark.slow
def test_more_queries_do_not_need_more_memory(llava):
    "The number of live numbers after a sweep's pieces does not grow: nothing of one piece survives into the next."
    def peak(n):
        seen = []
        def new(rows, layer, samples):
            gc.collect()
            seen.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim >= 3))
            return rows
        sweep(llava, questions(n, 0, ["cup"]), edits={"same": ("subject", new)}, layers=[2], memory=1e5)
        return max(seen)
    assert peak(12) <= 1.2 * peak(3)


def test_kept_runs_are_not_changed(llava):
    base, source = questions(3, 0), questions(3, 1)
    runs = Batch(slice(0, 3), *(llava.clean(llava.encode(q)) for q in (base, source)))
    kept = [t for r in (runs.base, runs.source) for t in (*r.residual, *r.keys, *r.values)]
    copies = [t.clone() for t in kept]
    from spatialid.sweeps import _edits, _plan, _waves
    ids, real = (llava.encode(base)[k] for k in ("input_ids", "attention_mask"))
    tokens = [i[r.bool()] for i, r in zip(ids, real)]
    groups = {name: [llava.resolve_rows(q, group, i) for q, i in zip(base, tokens)] for name, group in SWAPS.items()}
    for cells in _waves(_plan(llava, runs, _edits(SWAPS, source, base), groups, [1, 2, 3, 4]), llava, 2e9):
        for _ in llava.resume(cells): pass
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))


def test_the_model_is_as_before(llava):
    query, config = questions(1, 0)[0], llava.blocks[0].self_attn.config
    hooks = lambda: [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in llava.model.modules()]
    llava.run(query)  # transformers leaves hooks of its own on a vision tower it has run
    standing = hooks()
    before, attention = llava.run(query).logits, config._attn_implementation
    sweep(llava, [query], questions(1, 1), SWAPS)
    def broken(rows, layer, samples): raise RuntimeError("on purpose")
    with pytest.raises(RuntimeError, match="on purpose"): sweep(llava, [query], edits={"x": ("last", broken)})
    assert config._attn_implementation == attention and torch.equal(llava.run(query).logits, before)
    assert hooks() == standing


@pytest.mark.slow
# transformers' eager attention takes its softmax in float32
@pytest.mark.parametrize("implementation,limit", [("sdpa", 1e-9), ("eager", 1e-4)])
def test_attention_implementations(implementation, limit):
    vlm = in_float64(VLM(*tiny_llava(), "tiny"))
    vlm.model.set_attn_implementation(implementation)
    base, source = questions(3, 0), questions(3, 1)
    assert largest(*both(vlm, base, source, FEW, layers=ENDS)) < limit


@pytest.mark.slow
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-4), (torch.bfloat16, .5)])
def test_narrow_numbers(dtype, limit):
    vlm = VLM(*tiny_llava(dtype=dtype), "tiny")
    base, source = questions(3, 0), questions(3, 1)
    fast, plain = both(vlm, base, source, FEW, layers=ENDS)
    assert largest(fast, plain) < limit and fast.log_probs["image"].dtype == torch.float32


def test_complement(llava):
    "Two groups that tile all rows: swapping one into the base is swapping the other into the source."
    base, source = questions(5, 0), questions(5, 1)
    for group in ("image", "objects", "last"):
        rest = lambda q: sorted({*llava.positions(q, "all")} - {*llava.positions(q, group)})
        one = sweep(llava, base, source, {"part": group}, logits=True)
        other = sweep(llava, source, base, {"part": rest}, logits=True)
        assert largest(one, other) < 1e-9
        answer = 0
        shifts = one.shift("part", "log_prob", answer).values + other.shift("part", "log_prob", answer).values
        assert np.allclose(shifts[~np.isnan(shifts)], 1, atol=1e-9)


def test_swapping_everything_or_nothing(llava):
    base, source = questions(4, 0), questions(4, 1)
    swept = sweep(llava, base, source, {"all": "all", "none": lambda q: []})
    assert is_everywhere(swept.log_probs["all"], swept.source_log_probs)
    assert is_everywhere(swept.log_probs["none"], swept.base_log_probs)
    same = sweep(llava, base, base, {"image": "image"})
    assert is_everywhere(same.log_probs["image"], same.base_log_probs)


def test_source_may_ask_something_else(llava):
    "Corrupted prompts of the same length: the words differ, not the picture."
    words = {"subject": "cup", "object": "dog"}
    base = [Query(picture(i), LEFT_RIGHT, words, ("left", "right"), "left") for i in range(3)]
    source = [replace(q, words={"subject": "dog", "object": "cup"}, truth="right") for q in base]
    assert largest(*both(llava, base, source, FEW)) < 1e-9


def test_rows_recomputed_are_few(llava):
    base, source = questions(1, 0), questions(1, 1)
    runs = Batch(slice(0, 1), *(llava.clean(llava.encode(q)) for q in (base, source)))
    T, tail = len(llava.tokens(base[0])), len(llava.positions(base[0], "text"))
    def ways(group, swap=True):
        where = torch.zeros(1, T, dtype=torch.bool)
        where[0, llava.positions(base[0], group)] = True
        return [(run is runs.source, S) for _, run, S in runs.resumptions(where, swap)]
    assert ways("image")[0] == (True, tail) and ways("text")[0] == (False, tail)
    assert ways("subject")[0] == (False, T - llava.positions(base[0], "subject")[0])
    assert ways("last")[0] == (False, 1) and ways("all")[0] == (True, 1)
    assert ways("image", False) == [(False, T - llava.positions(base[0], "image")[0])]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_float64_norms_are_the_models_own(family):
    "Within what float32 rounds, and a change of 1e-12 goes through instead of vanishing or growing to 1e-7."
    plain, exact = VLM(*tiny(family), "tiny"), in_float64(VLM(*tiny(family), "tiny"))
    query = questions(1, 0, px=16 if family == "llava" else 32)[0]
    assert torch.allclose(plain.run(query).logits.double(), exact.run(query).logits, atol=1e-4)
    def edited(e): return sweep(exact, [query], edits={"x": ("subject", lambda rows: rows * (1 + e))}, logits=True)
    assert 1e-14 < (edited(0).logits["x"][0] - edited(1e-12).logits["x"][0]).abs().max() < 1e-10


def test_the_forms_an_edit_may_have(llava):
    "Rows, a function of the rows alone, or of rows, layer and samples; one query or several; one layer or several."
    base = questions(1, 0)[0]
    rows = torch.randn(2, llava.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    edits = {"rows": ("objects", rows), "one": ("objects", lambda h: rows),
             "three": ("objects", lambda h, layer, samples: rows)}
    s = sweep(llava, base, edits=edits, layers=2, logits=True)
    assert s.layers == [2] and torch.equal(s.logits["rows"], s.logits["one"])
    assert torch.equal(s.logits["one"], s.logits["three"])
    with llava.patch({2: ("objects", rows)}): run = llava.run(base)
    assert torch.allclose(run.logits, s.logits["rows"][0], atol=1e-9)
    with llava.patch({2: ("subject", add(rows[0]))}): assert torch.isfinite(llava.run(base).logits).all()
    for wrong in (lambda h: None, lambda h: h[..., :3], lambda h: h[:, :1].expand(-1, 3, -1)):
        with pytest.raises(ValueError, match="the edit 'x' gives"): sweep(llava, base, edits={"x": ("objects", wrong)})
    with pytest.raises(ValueError, match="vectors for the layers .1., not for 2"):
        sweep(llava, base, edits={"x": ("subject", add({1: rows[0]}))})
    with pytest.raises(ValueError, match="image: nothing to swap with"): sweep(llava, base, edits=["image"])
    with pytest.raises(ValueError, match="no edits"): sweep(llava, base, edits=[])
    with pytest.raises(ValueError, match="with a function or with rows needs a name"):
        sweep(llava, base, edits=[("objects", rows)])
    with pytest.raises(ValueError, match="rows for 1 queries of 2"):
        sweep(llava, [base, base], edits={"x": ("objects", rows[None])})
    with pytest.raises(ValueError, match="word='left' is no index"):
        sweep(llava, base, base, {"x": "image"}).shift("x", word="left")
    one = Query(base.image, base.template, base.words, "left", "left")
    with pytest.raises(ValueError, match="needs two answers"): sweep(llava, one, one, {"x": "image"}).shift("x")


def test_largest_difference_and_passes():
    "By hand: the largest over queries and vocabulary at each layer; two clean runs and rows in later blocks."
    a = {"x": torch.zeros(2, 3, 4)}
    assert largest_difference(a, {"x": torch.arange(24.).view(2, 3, 4)})["x"].tolist() == [11, 23]
    assert forward_passes([10, 5], 10, 9) == 2 + 1.5 * 8 / 2


def test_rounding_is_none_in_double_precision(llava):
    base, source = questions(2, 0), questions(2, 1)
    pairs = base, source, {"image": "image", "last": "last"}, [1, 3]
    found = rounding(llava, pairs, sweep(llava, *pairs))
    assert found["resumed_plain"] < 1e-9 and found["resumed_double"] == 0 and found["decisions_changed"] == 0
    assert found["decisions"] == 2 * 2 * 2
    narrow = rounding(VLM(*tiny_llava(dtype=torch.bfloat16), "tiny"), pairs, sweep(llava, *pairs))
    assert narrow["resumed_double"] > 1e-4


def test_what_a_swap_leaves_to_recompute(llava):
    (base,), (source,) = questions(1, 0), questions(1, 1)
    found = recomputed(llava, base, source, {"image": "image", "last": "last"})
    text = len(llava.positions(base, "text"))
    assert (found["image"].from_source, found["image"].rows) == (True, text)
    assert (found["last"].from_source, found["last"].rows) == (False, 1)
    assert found["last"].edited.nonzero().flatten().tolist() == [len(llava.tokens(base)) - 1]
    assert complement(llava, [base], [source], "image") < 1e-9


def test_what_a_run_a_sweep_and_a_shift_hold_is_a_line_each(llava):
    base, source = questions(2, 0), questions(2, 1)
    swept = sweep(llava, base, source, ["image"], [1, 3])
    assert repr(swept).startswith("Sweep (fast) of 2 queries: image after each of 2 layers")
    shift = swept.shift("image")
    assert repr(shift) == f"Shift of {shift.used.sum()} of 2 queries after each of 2 layers: ratio"
    assert repr(llava.run(base)) == "Run of 2 queries: beliefs, logit_diff, log_probs"
    assert repr(llava.run(base, [1], "last")).endswith("residual stream after [1] of ['last']")
    with pytest.raises(ValueError, match="ask for subject, object, objects, image"):
        llava.run(base, [1], "object words")


def test_first_affected():
    causal = torch.ones(6, 6).tril().bool()
    block = causal.clone()
    block[1:4, 1:4] = True
    assert [first_affected(p, causal) for p in range(7)] == list(range(7))
    assert [first_affected(p, block) for p in range(7)] == [0, 1, 1, 1, 4, 5, 6]


def test_belief_shift_by_hand():
    log = torch.tensor([[.8, .2], [.6, .4], [.5, .5]]).log()
    source = torch.tensor([[.2, .8], [.4, .6], [.5001, .4999]]).log()
    edited = torch.tensor([[.5, .5], [.6, .4], [.9, .1]]).log()
    swept = Sweep([1], {"x": edited[None]}, log, source, np.array([0, 1, 0]), "fast", None, 0)
    shift = swept.shift("x", "prob")
    assert np.allclose(shift.numerators, [[.3, 0, -.4]], atol=1e-6)
    assert np.allclose(shift.denominators, [.6, -.2, -.0001], atol=1e-6) and shift.used.tolist() == [True, True, False]
    assert np.allclose(shift.values[0, :2], [.5, 0], atol=1e-6) and np.isnan(shift.values[0, 2])
    found = shift.summary()
    assert found["excluded"] == 1 and found["ratio"]["n"] == 2 and found["raw"]["n"] == 3
    assert np.allclose(found["ratio"]["value"], [.3 / .4], atol=1e-5)
    assert np.allclose(found["median"]["value"], [.25], atol=1e-5) and np.allclose(found["mean"], [.25], atol=1e-5)
    assert np.allclose(swept.shift("x").denominators[:2], [2 * np.log(4), 2 * np.log(.4 / .6)], atol=1e-5)
    assert np.allclose(swept.shift("x", "log_prob", word=1).numerators[0, 0], np.log(.2) - np.log(.5), atol=1e-5)


def test_intervals_of_shifts():
    g = np.random.default_rng(0)
    bottom = g.normal(3, .5, 400)
    found = Shift(np.stack([.7 * bottom, np.zeros(400)]) + g.normal(0, .5, (2, 400)), bottom, .5).summary()
    for k, truth in enumerate((.7, 0)):
        low, high = found["ratio"]["low"][k], found["ratio"]["high"][k]
        assert low < truth < high and high - low < .06
        assert found["median"]["low"][k] < truth < found["median"]["high"][k]
    again = Shift(np.ones((1, 3)), np.zeros(3), .5).summary()
    assert np.isnan(again["ratio"]["value"]).all() and again["ratio"]["n"] == 0
    assert again["excluded"] == 3 and again["raw"]["value"] == [1.]


def test_what_cannot_be_swept_says_why(llava):
    base, source, same = questions(2, 0), questions(2, 1), lambda rows, layer, samples: rows
    def refused(match, *queries, edits=None, **others):
        with pytest.raises(ValueError, match=match): sweep(llava, *queries, edits=edits, **others)
    refused("there are no queries", [], edits={"x": "image"})
    refused("no edits.*name", base, source, edits={})
    refused("nothing to swap with", base, edits={"image": "image"})
    refused("2 base queries but 1 source", base, source[:1], edits={"image": "image"})
    refused("no answers to watch", [Query(picture(0), "Where?")], edits={"x": ("last", same)})
    refused("no layer 9", base, source, edits={"image": "image"}, layers=[9])
    refused("is not a marked word", base, source, edits={"x": "colour"})
    longer = questions(2, 1, ["hot dog", "star", "hot dog"])
    refused("query 0 has .* tokens as base and .* as source", base, longer, edits={"image": "image"})
    texts = "Is {subject} or {subject} left or right?", "Is {subject} left or right?"
    different = [Query(q.image, text, {"subject": "cup"}, q.answers) for q, text in zip(base, texts)]
    refused("has 1 to 2 tokens in these queries", different, edits={"x": ("subject", same)})
    refused("cannot be added to rows", base, edits={"x": ("last", add(torch.zeros(7)))})


def test_what_cannot_be_shifted_says_why(llava):
    base, source = questions(2, 0), questions(2, 1)
    swept = sweep(llava, base, source, {"image": "image"}, [2])
    with pytest.raises(ValueError, match="no edit 'text' in this sweep: there are image"): swept.shift("text")
    with pytest.raises(ValueError, match="no measure 'logit'"): swept.shift("image", "logit")
    alone = sweep(llava, base, edits={"x": ("last", lambda rows: rows)}, layers=[2])
    with pytest.raises(ValueError, match="needs source queries"): alone.shift("x")
    blind = [Query(q.image, q.template, q.words, q.answers) for q in base]
    truthless = sweep(llava, blind, source, {"image": "image"}, [2])
    with pytest.raises(ValueError, match="no truth"): truthless.shift("image")


def test_a_family_without_resuming_says_so_once():
    vlm = in_float64(VLM(*tiny("mllama"), "tiny"))
    vlm.family = replace(vlm.family, fast=False)
    base, source = (questions(2, seed, ["cup", "star"], 32) for seed in (0, 1))
    with pytest.warns(UserWarning, match="not resumed from cached runs"):
        swept = sweep(vlm, base, source, {"image": "image", "all": ("image", "all")}, [1, 2])
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(vlm, base, source, {"last": "last"}, [1])
    assert swept.path == "plain"
    assert is_everywhere(swept.log_probs["all"], swept.source_log_probs)
    assert not torch.allclose(swept.log_probs["image"][0], swept.base_log_probs, atol=1e-6)


def test_there_is_no_sweep_inside_a_patch(llava):
    base, source = questions(2, 0), questions(2, 1)
    patched = lambda: llava.patch({2: ("last", torch.zeros(llava.width))})
    steered = lambda: llava.steer(base, {"subject": torch.ones(llava.width)}, layer=2)
    for change, name in ((patched, "patch"), (steered, "steer")):
        for plain in (False, True):
            with pytest.raises(ValueError, match=f"inside {name} there is no clean run .* as an edit"):
                with change(): sweep(llava, base, source, {"image": "image"}, plain=plain)
    with pytest.raises(ValueError, match="inside patch there is no clean run"):
        with patched(): llava.clean(llava.encode(base))


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_a_model_in_training_is_swept_without_dropout(plain):
    model, processor = tiny_llava()
    for block in model.model.language_model.layers: block.self_attn.attention_dropout = .5
    vlm, base, source = VLM(model, processor), questions(2, 0), questions(2, 1)
    wanted = sweep(vlm, base, source, SWAPS, plain=plain)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    swept = sweep(vlm, base, source, SWAPS, plain=plain)
    assert all(torch.equal(swept.log_probs[n], wanted.log_probs[n]) for n in swept.names) and model.training


def test_a_list_of_groups_goes_by_their_names(llava):
    base, source = questions(2, 0, ["cup", "star"]), questions(2, 1, ["cup", "star"])
    listed = sweep(llava, base, source, ["image", ("subject", "last"), -2], [2])
    named = sweep(llava, base, source, {"image": "image", "subject and last": ("subject", "last"), "-2": -2}, [2])
    assert listed.names == named.names and all(listed.log_probs[n].equal(named.log_probs[n]) for n in named.names)
    assert sweep(llava, base, source, "image", [2]).log_probs["image"].equal(named.log_probs["image"])
    for sets in (dict(edits={"image", "text"}), dict(edits={"x": {"image", "text"}})):
        with pytest.raises(ValueError, match="in a set have no order"): sweep(llava, base, source, **sets)
    with pytest.raises(ValueError, match="queries in a set have no order"): sweep(llava, {*base}, source, ["image"])


@pytest.mark.parametrize("plain", [False, True])
def test_numbers_that_overflow_are_no_beliefs(llava, plain):
    base, source = questions(2, 0, ["cup", "star"]), questions(2, 1, ["cup", "star"])
    burst = {"steady": ("last", lambda rows: rows), "burst": ("last", lambda rows, layer, i: rows / (layer != 2))}
    with pytest.raises(ValueError, match="not finite"): sweep(llava, base, edits=burst, plain=plain)
    half = VLM(*overflowing(), "half")
    with pytest.raises(ValueError, match="half for query 0 are not finite: float16 .* dtype='bfloat16'"):
        sweep(half, base, source, ["image"], plain=plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_of_one_size_and_other_grids_are_swapped_exactly(family):
    "As many tokens in other places: rows swapped in keep the positions of the base."
    vlm = in_float64(VLM(*tiny(family), "tiny"))
    turn = lambda q, size: replace(q, image=q.image.resize(size))
    wide, high = (32, 16), (16, 32)
    base, source = ([turn(q, size) for q in questions(2, i, ["cup", "star"])] for i, size in enumerate((wide, high)))
    mixed = [source[0], base[1]], [base[0], turn(source[1], wide)]
    grids = [vlm.encode(q)["image_grid_thw"].tolist() for q in (base, source)]
    assert grids[0] != grids[1] and len(vlm.tokens(base[0])) == len(vlm.tokens(source[0]))
    for pair in ((base, source), (source, base), mixed):
        assert largest(*both(vlm, *pair, FEW, layers=[1, 3])) < 1e-9
