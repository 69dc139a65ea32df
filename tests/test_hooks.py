"""spatialid.hooks against slow oracles.

Positions by decoding, capture by `output_hidden_states`, patches by runs that must come out equal."""
import copy
import json
import shutil
from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import peft
import pytest
import torch
from PIL import Image, ImageOps
from tokenizers import normalizers
from transformers import AutoConfig, LlavaConfig

from spatialid import hooks as library, registry
from spatialid.pictures import as_seen
from spatialid.families import FAMILIES, parity_table
from spatialid.hooks import VLM, largest_gap, readable, relative_difference
from spatialid.query import Query
from spatialid.registry import HUB, find_checkpoint, locate
from tiny import CHAT, overflowing, tiny, tiny_llava, tiny_tokenizer

LR = "Is the {subject} to the left or right of the {object}?"


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8))


def ask(seed=0, subject="cup", object="star", template=LR, answers=("left", "right"), **kwargs):
    return Query(picture(seed), template, {"subject": subject, "object": object}, answers, **kwargs)


@pytest.fixture(scope="module")
def vlm(): return VLM(*tiny_llava(), "tiny")


@pytest.fixture(scope="module")
def exact(): return VLM(*tiny_llava(dtype=torch.float64), "tiny64")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "saved"
    for part in tiny_llava(): part.save_pretrained(folder)
    return folder


@pytest.fixture()
def broken(saved, tmp_path): return shutil.copytree(saved, tmp_path / "broken")


EVERY = range(1, 5)
# different pictures, questions of different length, one without a picture
MIXED = [ask(0), ask(1, "umbrella", "hot dog"), ask(2, template="Is the {subject} left of the {object}, or right?"),
         replace(ask(subject="dog", object="cup", template="Is a {subject} larger than a {object}? Say left or right."),
                 image=None)]


# Words and positions -------------------------------------------------------------------------------------------------

NAMES = [("cup", "star"), ("star", "cup"), ("cup", "cup"), ("hot dog", "dog"), ("dog", "hot dog"),
         ("umbrella", "airplane"), ("Umbrella", "umbrella"), ("traffic light", "right whale"), ("é", "naïve café")]
TEMPLATES = [LR, "{subject} left or right of {object}", "What is left or right: the {object} or the {subject}"]


STRIPPING = CHAT.replace("part['text']", "part['text'] | trim")


@pytest.mark.parametrize("chat", [CHAT, None, "{{ bos_token }}" + CHAT, STRIPPING])
@pytest.mark.parametrize("kind,bos", [("metaspace", False), ("bytes", True)])
def test_positions_agree_with_decoding(chat, kind, bos):
    "The tokens up to a position hold the template up to the end of the word; without the last of them they do not."
    vlm = VLM(*tiny_llava(chat=chat, kind=kind, bos=bos))
    for template in TEMPLATES:
        for subject, other in NAMES:
            if kind == "metaspace" and not (subject + other).isascii(): continue # unknown to it: nothing to decode
            query = ask(0, subject, other, template)
            ids = vlm.encode([query])["input_ids"][0]
            text = template.replace("{subject}", "\x00").replace("{object}", "\x01")
            for mark, at in (("subject", text.index("\x00")), ("object", text.index("\x01"))):
                (row,) = vlm.positions(query, mark)
                upto = (text[:at + 1]).replace("\x00", subject).replace("\x01", other)
                assert upto in vlm.tokenizer.decode(ids[:row + 1]) and upto not in vlm.tokenizer.decode(ids[:row])
            for answer, row in zip(("left", "right"), vlm.positions(query, "answers")):
                assert answer in vlm.tokenizer.decode(ids[row - 4:row + 1])
                assert answer not in vlm.tokenizer.decode(ids[row - 4:row])
            assert vlm.positions(query, "objects") == vlm.positions(query, ("subject", "object"))
            assert ids.tolist().count(vlm.tokenizer.bos_token_id) == (bos or bool(chat and "bos_token" in chat))


@pytest.mark.parametrize("text,word", [
    (" Is the {subject} left? ", "cup"), ("{subject}", "S"), ("ASSISTANT: {subject} ASSISTANT:", "ASSISTANT:")])
@pytest.mark.parametrize("chat", [CHAT, STRIPPING, None])
def test_question_that_looks_like_the_chat_template(text, word, chat):
    vlm = VLM(*tiny_llava(chat=chat))
    query = Query(picture(0), text, {"subject": word})
    (row,) = vlm.positions(query, "subject")
    upto = vlm.tokenizer.decode(vlm.encode([query])["input_ids"][0, :row + 1]).replace("\n ", "\n")
    assert upto.endswith("<image>\n" + text.split("{")[0].lstrip() + word)


def test_image_and_text_tile_what_can_differ(vlm):
    query = ask()
    ids = vlm.encode([query])["input_ids"][0]
    image, text = vlm.positions(query, "image"), vlm.positions(query, "text")
    assert (ids[image] == vlm.model.config.image_token_id).all() and len(image) == 16
    assert sorted(image + text) == list(range(image[0], len(ids))) and vlm.positions(query, "last") == [len(ids) - 1]
    assert vlm.positions(query, ("subject", np.int64(0), -1)) == [*vlm.positions(query, "subject"), 0, len(ids) - 1]
    assert vlm.positions(MIXED[3], "text") == vlm.positions(MIXED[3], "all") # no picture, no <s>
    with_bos = VLM(*tiny_llava(bos=True))
    assert with_bos.positions(MIXED[3], "text") == with_bos.positions(MIXED[3], "all")[1:]


def test_answers_are_whole_words_outside_marked_ones(vlm):
    template = "Is the {subject} right or left of the {object}? Upright. Answer Left or right."
    query = ask(0, "right whale", "leftover", template)
    assert [query.text[a:b] for a, b in query.answer_spans()] == ["left", "Left", "right", "right"]
    marked = Query(None, "Is it {left} or {right}?", {"left": "left", "right": "right"}, ("left", "right"))
    assert vlm.positions(marked, "answers") == vlm.positions(marked, ("left", "right"))


def test_a_word_marked_twice_has_two_positions(vlm):
    query = Query(None, "Is the {subject} a {subject}?", {"subject": "star"})
    assert len(set(vlm.positions(query, "subject"))) == 2


@pytest.mark.parametrize("make,message", [
    (lambda v: Query(None, "Is the {subject} here?", {}), "marks {subject} but there is no word"),
    (lambda v: Query(None, "Is the {subject} here?", {"subject": ""}), "marks {subject} but there is no word"),
    (lambda v: Query(None, "Is the cup here?", {"subject": "cup"}), "has no mark {subject} for the word 'cup'"),
    (lambda v: Query(None, "Left?", {}, ("left", "right"), truth="above"), "none of the answers left, right"),
    (lambda v: Query(None, "Left?", answers=("left", "")), "is empty"),
    (lambda v: v.positions(ask(template="Where is the {subject}, by the {object}?"), "answers"),
     "'left' is not a word of the query"),
    (lambda v: v.positions(Query(None, "Where?"), "answers"), "has no answers"),
    (lambda v: v.positions(ask(), "colour"), "'colour' is not a marked word"),
    (lambda v: v.positions(Query(None, "Where?"), "image"), "without a picture, so it has no group 'image'"),
    (lambda v: v.positions(ask(), lambda query: "colour"), "'colour' is not a marked word"),
    (lambda v: v.positions(ask(), 999), "outside the"),
    (lambda v: v.run([Query(np.zeros((4, 4, 3)), "Where?")]), "takes one PIL image a query, not a ndarray"),
    (lambda v: v.run([Query([picture(0)], "Where?")]), "of a video, one frame"),
    (lambda v: v.run([]), "no queries"),
    (lambda v: v.run(ask(), [0]), "no layer 0: layers are 1 to 4"),
    (lambda v: v.run(ask(), "4"), "whole numbers from 1 to 4, not '4'"),
    (lambda v: v.run(ask(), [[4]]), "whole numbers from 1 to 4, not"),
    (lambda v: v.run(ask(), [5]), "no layer 5: layers are 1 to 4"),
    (lambda v: v.run(MIXED[:3], [1], "text"), "run those of one length together"),
    (lambda v: v.run(MIXED[:3], [1], batch_size=1), "run those of one length together"),
    (lambda v: v.run(ask(), [1], "subject").residual(2), "layer 2 was not captured"),
    (lambda v: v.run(ask(), [1], "subject").residual(1, "object"), "'object' was not captured"),
    (lambda v: v.run(Query(None, "Where?")).log_probs, "have no answers"),
    (lambda v: v.run(ask(answers=("left", "Left"))), "cannot be told apart"),
])
def test_a_mistake_is_one_clear_sentence(vlm, make, message):
    with pytest.raises(ValueError) as error: make(vlm)
    assert message in str(error.value) and "\n" not in str(error.value)


# Capture -------------------------------------------------------------------------------------------------------------

def oracle(vlm, query):
    "All hidden states of one query by the model's own means, one at a time, without padding."
    inputs = vlm.processor(text=vlm.layout(query).prompt, images=query.image, return_tensors="pt")
    with torch.no_grad(): return vlm.model(**inputs.to(dtype=vlm.model.dtype), output_hidden_states=True)


def test_capture_is_the_residual_stream(exact):
    for query in MIXED:
        run, out = exact.run(query, EVERY), oracle(exact, query)
        for l in range(1, 4): assert (run.residual(l) - out.hidden_states[l]).abs().max() <= 1e-12
        with torch.no_grad(): final = exact.model.model.language_model.norm(run.residual(4))
        assert (final - out.hidden_states[4]).abs().max() <= 1e-12
        assert (run.logits - out.logits[:, -1]).abs().max() <= 1e-12
        assert run.logits.dtype == torch.float64 # never narrower than float32, as wide as the model


def test_rows_of_groups_are_the_rows_of_the_whole(exact):
    whole, some = exact.run(ask(), EVERY), exact.run(ask(), EVERY, ("subject", "image", "last"))
    for group, n in (("subject", 1), ("image", 16), ("last", 1)):
        rows = exact.positions(ask(), group)
        assert len(rows) == n
        for l in EVERY: assert torch.equal(some.residual(l, group), whole.residual(l)[:, rows])
    assert some.rows.tolist() == [exact.positions(ask(), ("subject", "image", "last"))]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_a_batch_equals_its_singles(vlm, batch_size):
    "Prompts of different lengths, padded on the left, one without a picture."
    batch = vlm.run(MIXED, EVERY, ("objects", "last"), batch_size=batch_size)
    for i, query in enumerate(MIXED):
        single = vlm.run(query, EVERY, ("objects", "last"))
        assert (batch.logits[i] - single.logits[0]).abs().max() <= 1e-5
        assert batch.rows[i].tolist() == single.rows[0].tolist()
        for l in EVERY: assert (batch.residual(l)[i] - single.residual(l)[0]).abs().max() <= 1e-5


def test_padding_to_1e_12_in_float64(exact):
    batch = exact.run(MIXED, EVERY, "objects")
    for i, query in enumerate(MIXED):
        out = oracle(exact, query)
        assert (batch.logits[i] - out.logits[0, -1]).abs().max() <= 1e-12
        for l in range(1, 4):
            there = out.hidden_states[l][0, exact.positions(query, "objects")]
            assert (batch.residual(l)[i] - there).abs().max() <= 1e-12


def test_only_what_is_asked_for_is_kept(vlm, monkeypatch):
    hooked = []
    register = torch.nn.Module.register_forward_pre_hook
    def noted(self, *args, **kwargs):
        hooked.append(self)
        return register(self, *args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", noted)
    run = vlm.run([ask(i) for i in range(5)], [2, 4], "subject", batch_size=2)
    assert {id(m) for m in hooked} == {id(vlm.blocks[2]), id(vlm.model.model.language_model.norm)}
    assert list(run.residuals) == [2, 4] and run.logits.shape == (5, len(vlm.tokenizer))
    for rows in run.residuals.values():
        assert rows.shape == (5, 1, 32) and rows.untyped_storage().nbytes() == 5 * 32 * 4 and rows.device.type == "cpu"
        rows += 1 # an ordinary tensor, not an inference one
    hooked.clear()
    assert not vlm.run(ask()).residuals and not hooked


def test_hooks_leave_the_logits_bit_equal(vlm):
    queries = [ask(i) for i in range(3)]
    plain = vlm.run(queries).logits
    assert torch.equal(vlm.run(queries, EVERY).logits, plain)
    with vlm.patch({l: ("all", lambda rows: rows) for l in EVERY}): assert torch.equal(vlm.run(queries).logits, plain)
    assert vlm.check() is vlm


# Patch ---------------------------------------------------------------------------------------------------------------

def test_patching_a_run_with_itself_changes_nothing(vlm):
    queries = [ask(i) for i in range(3)]
    clean = vlm.run(queries, EVERY, ("all", "image", "objects"))
    for group in ("all", "image", "objects"):
        with vlm.patch({l: (group, clean) for l in EVERY}): assert torch.equal(vlm.run(queries).logits, clean.logits)


def test_patching_everything_gives_the_other_run(exact):
    base, source = [ask(0), ask(1)], [ask(2), ask(3)]
    other = exact.run(source, EVERY)
    assert (exact.run(base).logits - other.logits).abs().max() > .1
    for l in EVERY:
        with exact.patch({l: ("all", other)}): assert (exact.run(base).logits - other.logits).abs().max() <= 1e-12


def test_image_in_one_run_is_text_in_the_other(exact):
    base, source = ask(0), ask(1)
    runs = {q: exact.run(q, EVERY, ("image", "text")) for q in (base, source)}
    for l in EVERY:
        with exact.patch({l: ("image", runs[base])}): a = exact.run(source).logits
        with exact.patch({l: ("text", runs[source])}): b = exact.run(base).logits
        assert (a - b).abs().max() <= 1e-12


def by_hand(vlm, query, layer, rows, new):
    "One query with `new` written into `rows` after `layer` blocks, by a hook of our own."
    def write(module, args, output): output[0, rows] = new; return output
    handle = vlm.blocks[layer - 1].register_forward_hook(write)
    try: return oracle(vlm, query).logits[0, -1]
    finally: handle.remove()


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_patch_is_what_writing_by_hand_does(exact, batch_size):
    "Mixed lengths, a group by name, values for each query, each row, or all."
    torch.manual_seed(0)
    values = torch.randn(len(MIXED), 2, 32, dtype=torch.float64)
    for l in (1, 4):
        for new in (values, values[:1], values[0], values[0, 0]):
            with exact.patch({l: ("objects", new)}): run = exact.run(MIXED, [l], "objects", batch_size=batch_size)
            full = new.expand(len(MIXED), 2, 32)
            assert torch.equal(run.residual(l), full) # capture reads what the patch wrote
            for i, query in enumerate(MIXED):
                written = by_hand(exact, query, l, exact.positions(query, "objects"), full[i])
                assert (written - run.logits[i]).abs().max() <= 1e-12


def test_patches_nest_and_functions_add(exact):
    v = torch.randn(32, dtype=torch.float64)
    rows = exact.run(ask(), [2, 3], ("subject", "object"))
    with exact.patch({2: ("subject", lambda rows: rows + v)}):
        moved = exact.run(ask(), [2], "subject")
        with exact.patch({2: ("object", v), 3: (-1, v)}): both = exact.run(ask(), [2, 3], ("subject", "object", -1))
    assert torch.equal(moved.residual(2), rows.residual(2, "subject") + v)
    assert torch.equal(both.residual(2, "subject"), moved.residual(2))
    assert torch.equal(both.residual(2, "object")[0, 0], v)
    assert torch.equal(both.residual(3, -1)[0, 0], v)


@pytest.mark.parametrize("shape", [(3, 32), (2, 1, 32), (1, 5), (5, 1, 32)])
def test_a_patch_that_does_not_fit(vlm, shape):
    with vlm.patch({2: ("subject", torch.zeros(shape))}):
        with pytest.raises(ValueError, match="takes 4 x 1 x 32 numbers"):
            vlm.run([ask(i) for i in range(4)], batch_size=2)


def hooks(vlm): return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*vlm.blocks, *vlm.receivers)]


def test_nothing_survives(vlm, monkeypatch):
    before, logits = hooks(vlm), vlm.run(ask()).logits
    with pytest.raises(KeyboardInterrupt):
        with vlm.patch({1: ("all", torch.zeros(32))}):
            vlm.run(ask()); raise KeyboardInterrupt
    assert torch.equal(vlm.run(ask()).logits, logits) and hooks(vlm) == before
    with monkeypatch.context() as m:
        def fail(*args, **kwargs): raise RuntimeError("out of memory")
        m.setattr(vlm.blocks[2], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"): vlm.run(ask(), EVERY)
    assert torch.equal(vlm.run(ask()).logits, logits) and hooks(vlm) == before
    with pytest.raises(ValueError, match="no layer 7"):
        with vlm.patch({7: ("last", torch.zeros(32))}): pass
    assert torch.equal(vlm.run(ask()).logits, logits)


# What the notebook shows ---------------------------------------------------------------------------------------------

def test_resolved_rows_are_the_positions_without_encoding_again(vlm):
    ids = vlm.encode([ask()])["input_ids"][0]
    for group in ("image", "text", "objects", "answers", ("last", 0), lambda query: "subject"):
        assert vlm.resolve_rows(ask(), group, ids) == vlm.positions(ask(), group)
    assert vlm.resolve_rows(None, "all", ids) == list(range(len(ids))), "groups that are no words need no query"
    with pytest.raises(ValueError, match="does not say where the group 'subject' is"):
        vlm.resolve_rows(None, "subject", ids)
    with pytest.raises(ValueError, match="position 99 is outside the 9 tokens of .a prompt"):
        vlm.resolve_rows(None, 99, ids[:9])


def test_a_prompt_is_drawn_with_a_box_for_each_token_and_one_for_the_picture(vlm):
    fig, ax = plt.subplots()
    vlm.show_prompt(ax, ask(), {"image": "red", "text": "blue", "subject": "lime"}, per_line=60)
    boxes = {int(text.get_text().split("\n")[1]): text for text in ax.texts}
    image, subject = vlm.positions(ask(), "image"), vlm.positions(ask(), "subject")[0]
    assert sorted(boxes) == [i for i in range(len(vlm.tokens(ask()))) if i not in image[1:]]
    assert boxes[image[0]].get_text().startswith("16 × image\n")
    face = {i: tuple(text.get_bbox_patch().get_facecolor()[:3]) for i, text in boxes.items()}
    assert (face[0], face[image[0]], face[subject], face[subject + 1]) == ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    assert min(text.get_position()[1] for text in ax.texts) < 0, "more than one line"
    assert readable("▁a") == readable("Ġa") == "␣a" and readable("\n") == readable("Ċ") == "↵"
    plt.close(fig)


def test_the_largest_gap_is_that_of_any_logit_or_row(vlm):
    run, singles = vlm.run([ask(0), ask(1)], [2], "subject"), [vlm.run(ask(i), [2], "subject") for i in (0, 1)]
    assert largest_gap(run, singles) < 1e-4
    for tensor in (run.logits, run.residuals[2]):
        tensor[1, 0] += 5
        assert largest_gap(run, singles) == pytest.approx(5, abs=1e-3)
        tensor[1, 0] -= 5


def test_the_difference_of_two_runs_is_relative_to_the_first(vlm):
    run = vlm.run([ask(0), ask(1)], [1, 3], ("subject", "image", "text"))
    run.residuals[3][1] = 3 * run.residuals[3][0]
    difference = relative_difference(run, "image")
    base, source = run.residual(1, "image")
    assert difference.shape == (2, 16) and torch.allclose(difference[1], torch.tensor(2.))
    assert difference[0, 5].item() == pytest.approx(((source - base)[5].norm() / base[5].norm()).item(), rel=1e-5)
    fig, axes = plt.subplots(1, 2)
    drawn = {group: relative_difference(run, group).numpy() for group in ("image", "text")}
    mesh = vlm.show_difference(axes, drawn, ask(), {"subject": "red"})
    labels, tokens = axes[1].get_xticklabels(), vlm.tokens(ask())
    assert [label.get_text() for label in labels] == [readable(tokens[i]) for i in vlm.positions(ask(), "text")]
    assert sum(label.get_color() == "red" for label in labels) == 1 and mesh.get_clim()[0] == 0
    plt.close(fig)


def test_belief_shift_of_what_must_give_the_source_or_nothing(exact):
    shift = exact.shift_by_patching(ask(0), ask(1), ("all", "last", "image"))
    assert shift["all"] == pytest.approx([1] * 4) and shift["last"][-1] == pytest.approx(1)
    assert shift["image"][-1] == pytest.approx(0) and len(shift["image"]) == 4
    taken = exact.run(ask(1), [2], "image")
    with exact.patch({2: ("image", taken)}): patched = exact.run(ask(0)).logit_diff.item()
    base, source = exact.run([ask(0), ask(1)]).logit_diff.tolist()
    assert shift["image"][1] == pytest.approx((patched - base) / (source - base))


def test_the_table_of_families_says_what_is_within_its_limit():
    row = dict(family="llava", medium="image", check="capture", limit=1e-4, value=3e-6, ok=True)
    equal = dict(family="qwen2_vl", medium="video", check="hooks", limit=0, value=0, ok=True)
    wrong = {**equal, "check": "capture", "limit": 1e-4, "value": 2e-3, "ok": False}
    table = parity_table([row, equal, wrong], {"torch": "2"})
    assert table.splitlines() == [
        "| family | capture (≤ 1e-04) | hooks (0) |", "| --- | --- | --- |", "| LLaVA, image | ✓ 3e-06 | – |",
        "| Qwen2-VL, video | ✗ 2e-03 | ✓ 0 |", "", "torch 2"]


# Answers -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("chat,template", [
    (CHAT, LR), (None, LR + " ANSWER:"), (None, LR + " ANSWER: "), (None, LR + " A")])
def test_answers_stand_for_all_their_first_tokens(kind, chat, template):
    "Also after a prompt that ends in a space, or in a letter that joins the word."
    vlm = VLM(*tiny_llava(kind=kind, chat=chat))
    space = "▁" if kind == "metaspace" else "Ġ"
    for answer, ids in zip(("left", "right"), vlm.answer_ids(ask(template=template))):
        spelt = {answer, answer.title(), space + answer, space + answer.title()}
        assert set(vlm.tokenizer.convert_ids_to_tokens(ids)) == spelt


def test_answers_of_several_sub_tokens_begin_with_the_first(vlm):
    ids = vlm.answer_ids(Query(None, "Which?", answers=("zebra", "quilt")))
    tokens = [vlm.tokenizer.convert_ids_to_tokens(i) for i in ids]
    assert tokens == [sorted(t, key=vlm.tokenizer.convert_tokens_to_ids) for t in tokens]
    assert set(tokens[0]) == {"z", "Z"} and set(tokens[1]) == {"q", "Q"} # a token that is only a space says nothing


def test_shared_first_tokens_are_dropped(vlm):
    alone = [set(vlm.answer_ids(Query(None, "Which?", answers=(w,)))[0]) for w in ("left", "lemon")]
    together = [set(i) for i in vlm.answer_ids(Query(None, "Which?", answers=("left", "lemon")))]
    assert together == [alone[0] - alone[1], alone[1] - alone[0]]
    for answers, message in ((("zebra", "zoo"), "'zebra' and 'zoo' cannot be told apart"),
                             (("日", "左"), "is unknown to it")):
        with pytest.raises(ValueError, match=message): vlm.answer_ids(Query(None, "Which?", answers=answers))


def test_belief_measures(exact):
    three = Query(picture(2), "Is it {subject}, or what?", {"subject": "above"}, ("above", "below", "near"))
    queries = [ask(0), ask(1), three]
    run = exact.run(queries[:2])
    p = run.logits.softmax(-1)
    for a, ids in enumerate(exact.answer_ids(queries[0])):
        assert torch.allclose(run.probs[:, a], p[:, ids].sum(1), atol=1e-14, rtol=0)
        assert torch.allclose(run.log_probs[:, a], p[:, ids].sum(1).log(), atol=1e-12, rtol=0)
    first, second = (run.logits[:, ids].logsumexp(1) for ids in exact.answer_ids(queries[0]))
    assert torch.allclose(run.logit_diff, first - second, atol=1e-12, rtol=0)
    mixed = exact.run(queries) # two and three answers in one run
    assert mixed.log_probs.shape == (3, 3) and mixed.log_probs[0, 2] == -torch.inf
    assert torch.equal(mixed.log_probs[:2, :2], run.log_probs)
    assert mixed.beliefs == [q.answers[i] for q, i in zip(queries, mixed.log_probs.argmax(1))]


# Families ------------------------------------------------------------------------------------------------------------
# What holds for every family is the parity matrix, in `tools/families.py`; here is what is particular.

def film(*seeds, template=LR, px=20):
    frames = [Image.fromarray(np.random.default_rng(s).integers(0, 255, (px, px, 3), dtype=np.uint8)) for s in seeds]
    return Query(frames, template, {"subject": "cup", "object": "star"}, ("left", "right"))


@pytest.fixture(scope="module")
def qwen(): return VLM(*tiny("qwen2_vl"), "qwen")


def test_a_group_may_be_a_function_of_the_query(vlm):
    near = lambda query: tuple(row + shift for row in vlm.positions(query, "objects") for shift in (-1, 1))
    assert vlm.positions(ask(), near) == [row + shift for row in vlm.positions(ask(), "objects") for shift in (-1, 1)]
    assert vlm.positions(ask(), (lambda query: -1, "subject")) == vlm.positions(ask(), ("last", "subject"))
    run = vlm.run([ask(0), ask(1)], [2], near)
    assert torch.equal(run.residual(2, near), vlm.run([ask(0), ask(1)], [2]).residual(2)[:, vlm.positions(ask(), near)])
    assert vlm.positions(ask(), "video") == vlm.positions(ask(), "image")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_rotary_positions_are_those_of_the_model_itself(family):
    "Also when the model still remembers another picture, and when a text stands beside one."
    vlm = VLM(*tiny(family, dtype=torch.float64), family)
    queries = [ask(0), film(0, 1, 2), Query(None, "Is it left or right?", answers=("left", "right"))]
    for query in queries:
        media = {"image": {"images": [query.image]}, "video": {"videos": [query.image]}, None: {}}[query.medium]
        inputs = vlm.processor(text=[vlm.layout(query).prompt], **media, return_tensors="pt").to(dtype=torch.float64)
        with torch.no_grad(): itself = vlm.model(**inputs).logits[:, -1]
        vlm.model.model.rope_deltas = torch.tensor([[77]])
        assert (vlm.run(query).logits - itself).abs().max() <= 1e-12 and vlm.model.model.rope_deltas.item() == 77
    assert vlm.encode([queries[0]])["position_ids"].shape[0] == 3


def test_visual_tokens_need_not_be_in_one_piece():
    "As many runs of tokens as the prompts of these families have, with text between them."
    for family, frames, pieces, each in (
            ("qwen3_vl", 4, 2, 9), ("internvl", 4, 4, 4), ("video_llama_3", 4, 4, 4), ("smolvlm", 4, 4, 4),
            ("qwen2_vl", 4, 1, 18), ("llava_onevision", 4, 1, 17), ("llava_next_video", 4, 1, 16),
            ("qwen3_vl", 3, 2, 16)):
        vlm = VLM(*tiny(family), family)
        rows = np.array(vlm.positions(film(*range(frames)), "video"))
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        assert [len(run) for run in runs] == [each] * pieces, family
        text = vlm.positions(film(*range(frames)), "text")
        assert sorted([*rows, *text]) == list(range(rows[0], len(vlm.tokens(film(*range(frames))))))
    still = film(5, 5, 5, 6) # VideoLLaMA3 leaves out what did not move, but for one token a frame
    assert len(VLM(*tiny("video_llama_3"), "v").positions(still, "video")) == 4 + 1 + 1 + 4


@pytest.mark.parametrize("family,frames", [("qwen2_vl", 4), ("qwen2_vl", 3), ("video_llama_3", 3)])
def test_frames_are_cut_into_patches_as_documented(family, frames):
    "Time, then 2 x 2 blocks of patches, then the patches of a block; in a patch: colour, frame, row, column."
    vlm = VLM(*tiny(family), family)
    if family == "video_llama_3":
        vlm.processor.video_processor.size = {"shortest_edge": 576, "longest_edge": 576 * frames}
    query, t = film(*range(frames), px=24), vlm.processor.image_processor.temporal_patch_size
    whole = [*query.image, query.image[-1]][:-(-frames // t) * t]
    video = np.stack([np.asarray(frame, dtype=np.float64) / 255 * 2 - 1 for frame in whole])
    corners = [(by + y, bx + x) for by, bx, y, x in product((0, 8, 16), (0, 8, 16), (0, 4), (0, 4))]
    rows = [video[k:k + t, y:y + 4, x:x + 4].transpose(3, 0, 1, 2).ravel()
            for k in range(0, len(video), t) for y, x in corners]
    assert np.abs(vlm.encode([query])["pixel_values_videos"].numpy() - np.stack(rows)).max() <= 1e-6


def test_time_stamps():
    vlm = VLM(*tiny("video_llama_3"), "video")
    assert "Time 2.0s:" in vlm.tokenizer.decode(vlm.encode([film(0, 1, 2)])["input_ids"][0])
    vlm.processor.video_processor.rate = 4
    assert "Time 0.5s:" in vlm.tokenizer.decode(vlm.encode([film(0, 1, 2)])["input_ids"][0])


@pytest.mark.parametrize("family,make,message", [
    ("qwen2_vl", lambda v: v.run(Query([], "Where?")),
     "takes one PIL image a query, or a list of them (the frames of a video), not a list (no frames)"),
    ("qwen2_vl", lambda v: v.run(Query([picture(0), 2], "Where?")), "a list (frame 1 is a int): open it"),
    ("llava", lambda v: v.run(Query("cup.png", "Where?")), "takes one PIL image a query, not a str: open it"),
    ("qwen2_vl", lambda v: v.run(Query([1, 2], "Where?")), "takes one PIL image a query, or a list of them"),
    ("qwen2_vl", lambda v: v.run([ask(), film(0, 1)]), "either pictures or videos"),
    ("internvl", lambda v: v.run([film(0, 1), film(0, 1, 2)]),
     "have 2 to 3 frames: with InternVL run those of one length together"),
    ("mllama", lambda v: v.run([ask(), MIXED[3]]), "run queries with and without one apart"),
    ("mllama", lambda v: v.positions(ask(), "image"), "no positions in Mllama"),
    ("mllama", lambda v: v.run(MIXED[3], [1], "image"), "without a picture"),
    ("mllama", lambda v: v.run(film(0, 1)), "of a video, one frame"),
])
def test_a_mistake_with_a_family_is_one_clear_sentence(family, make, message):
    with pytest.raises(ValueError) as error: make(VLM(*tiny(family), family))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_picture_of_mllama_is_its_cross_attention_states():
    """Patching them at a layer changes what later cross-attention reads, and nothing before.

    Without a picture those blocks do not run."""
    vlm = VLM(*tiny("mllama", dtype=torch.float64), "mllama")
    base, other = vlm.run(ask(0), EVERY, ("image", "all")), vlm.run(ask(1), EVERY, ("image", "all"))
    assert base.residual(1, "image").shape == (1, 2 * 17, 32)
    assert torch.equal(base.residual(1, "image"), base.residual(4, "image"))
    cross = vlm.model.config.text_config.cross_attention_layers # blocks 2 and 4
    for l in EVERY:
        with vlm.patch({l: ("image", other)}): run = vlm.run(ask(0), EVERY, ("image", "all"))
        first = min((c + 1 for c in cross if c >= l), default=5) # the first layer after it that has read the picture
        for k in EVERY:
            assert torch.equal(run.residual(k, "all"), base.residual(k, "all")) == (k < first)
            assert torch.equal(run.residual(k, "image"), (other if k >= l else base).residual(k, "image"))
    text = vlm.run(MIXED[3], EVERY)
    for c in cross: assert torch.equal(text.residual(c), text.residual(c + 1))
    with vlm.patch({c + k: (-1, torch.ones(32)) for c in cross for k in (0, 1)}): run = vlm.run(MIXED[3], EVERY, -1)
    for c in cross: assert (run.residual(c + 1) == 1).all(), "two layers with one receiver are both there"


# Loading -------------------------------------------------------------------------------------------------------------

def test_a_folder_loads_as_what_was_saved(saved, vlm):
    loaded = VLM.load(saved, device="cpu")
    assert torch.equal(loaded.run(MIXED).logits, vlm.run(MIXED).logits)
    assert (loaded.name, loaded.n_layers, loaded.width) == ("saved", 4, 32)
    assert loaded.family == FAMILIES["llava"] and not loaded.organism
    assert VLM.load(saved, device="cpu", dtype=torch.float64).model.dtype == torch.float64


def test_organisms_are_stored_small_and_run_in_float32(saved, tmp_path):
    model, processor = tiny_llava(dtype=torch.float16)
    model.config.organism = True
    for part in (model, processor): part.save_pretrained(tmp_path / "own")
    loaded = VLM.load(tmp_path / "own", device="cpu")
    assert loaded.organism and loaded.model.dtype == torch.float32 and "organism" in repr(loaded)
    assert VLM.load(tmp_path / "own", device="cpu", dtype="auto").model.dtype == torch.float16


def test_what_is_passed_through(saved, vlm):
    for kwargs in ({"device_map": "cpu", "dtype": "float64"}, {"device": "cpu", "attn_implementation": "eager"}):
        loaded = VLM.load(saved, **kwargs)
        assert loaded.model.dtype == getattr(torch, kwargs.get("dtype", "float32"))
        assert loaded.model.config._attn_implementation == kwargs.get("attn_implementation", "sdpa")
        assert (loaded.run(MIXED).logits - vlm.run(MIXED).logits).abs().max() <= 1e-4
    with pytest.raises(ValueError, match=r"'dtpye' \(look at the names of the options that were given\)"):
        VLM.load(saved, device="cpu", dtpye="float64")


def test_models_of_the_paper(saved, monkeypatch):
    "What a config says is held against what is known; an alias stands for its id."
    assert len({k.id for k in HUB}) == len(HUB) == 15 and {k.family for k in HUB} <= {*FAMILIES}
    assert locate("qwen-7b") == ("Qwen/Qwen2.5-VL-7B-Instruct", None) and find_checkpoint("qwen-7b").dtype == "bfloat16"
    checkpoint = find_checkpoint("llava-hf/llava-1.5-7b-hf")
    checkpoint.check(LlavaConfig(text_config={"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096}))
    config = AutoConfig.from_pretrained(saved)
    with pytest.raises(ValueError, match="llava-1.5-7b-hf says llava with 4 blocks of width 32, but it should be llava "
                                         "with 32 blocks of width 4096"):
        checkpoint.check(config)
    with pytest.raises(ValueError, match="authors' own format"): find_checkpoint("llava-video").check(config)
    monkeypatch.setattr(registry, "HUB", [registry.Checkpoint("small", "some/small", "llava", "float16", 4, 32)])
    monkeypatch.setattr(library, "locate", lambda name: (str(saved), saved))
    assert VLM.load("small", device="cpu").model.dtype == torch.float16


def test_a_model_that_does_not_fit(saved, monkeypatch):
    memory = library.psutil.virtual_memory()
    monkeypatch.setattr(library.psutil, "virtual_memory", lambda: memory._replace(available=100_000))
    message = load_error(saved)
    assert "saved wants 0.0 GB of memory" in message and "float32" in message and "device_map='auto'" in message
    assert VLM.load(saved, device_map="cpu").n_layers == 4 # who places it himself knows better


def test_weight_hash(saved, broken, vlm):
    first, again = VLM.load(saved, device="cpu").weight_hash, VLM.load(broken, device="cpu").weight_hash
    assert first == again and len(first) == 64
    assert vlm.weight_hash == VLM(*tiny_llava()).weight_hash != VLM(*tiny_llava(seed=1)).weight_hash
    other = VLM.load(broken, device="cpu")
    with torch.no_grad(): other.model.lm_head.weight[0, 0] += 1
    other.model.save_pretrained(broken)
    assert VLM.load(broken, device="cpu").weight_hash != first


def load_error(folder, kind=ValueError):
    with pytest.raises(kind) as error: VLM.load(folder, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_truncated_weights(broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged or cut short" in load_error(broken)
    file.write_bytes(b"")
    assert "damaged or cut short" in load_error(broken)
    file.unlink()
    assert "cannot load the weights" in load_error(broken)


def test_weights_that_do_not_belong(broken):
    "A tensor is missing; the config asks for more blocks, or another width; numbers that are not finite."
    config = json.loads((broken / "config.json").read_text())
    deeper = copy.deepcopy(config); deeper["text_config"]["num_hidden_layers"] = 5
    (broken / "config.json").write_text(json.dumps(deeper))
    assert "tensors that its config asks for" in load_error(broken)
    wider = copy.deepcopy(config); wider["text_config"]["intermediate_size"] = 48
    (broken / "config.json").write_text(json.dumps(wider))
    assert "cannot load the weights" in (message := load_error(broken)) or "tensors that its config asks for" in message
    (broken / "config.json").write_text(json.dumps(config))
    model = VLM.load(broken, device="cpu").model
    with torch.no_grad(): model.lm_head.weight[:] = torch.nan
    model.save_pretrained(broken)
    assert "not finite" in load_error(broken)


def test_names_and_folders_without_a_model(broken, tmp_path):
    assert "no model is called 'lava-tiny'" in load_error("lava-tiny", FileNotFoundError)
    assert "no model is called" in load_error(tmp_path / "nowhere", FileNotFoundError)
    assert "has no config.json" in load_error(tmp_path, FileNotFoundError)
    assert locate("some-body/some.model-7b") == ("some-body/some.model-7b", None)
    for file in broken.glob("*token*"): file.unlink()
    assert "tokenizer" in load_error(broken)


def test_unknown_architecture(broken, vlm):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    message = load_error(broken)
    assert "'mistral'" in message and "llava with its blocks at model.language_model.layers" in message
    (broken / "config.json").write_text("{")
    assert "cannot load the config" in load_error(broken)
    model, processor = tiny_llava()
    model.model.language_model.layers = model.model.language_model.layers[:3]
    with pytest.raises(ValueError, match="has 3 blocks .* its config says 4"): VLM(model, processor, "short")
    del model.model.language_model
    with pytest.raises(ValueError, match="has no module model.language_model.layers"): VLM(model, processor, "headless")


def test_a_model_whose_blocks_misbehave_is_found_out(vlm):
    model, processor = tiny_llava()
    for block in model.model.language_model.layers: # a block that counts its hooks
        block.register_forward_hook(lambda m, args, out: out + .1 * len(m._forward_pre_hooks))
    with pytest.raises(ValueError, match="hooks that change nothing change the logits"):
        VLM(model, processor, "odd").check()


def test_what_is_no_query_or_no_edit_says_so(tmp_path):
    vlm, query = VLM(*tiny_llava(), "tiny"), Query(None, "a")
    with pytest.raises(ValueError, match="a question is a Query.*not a str"): vlm.run("Where is the cup?")
    with pytest.raises(ValueError, match="an edit is .layer: .group, new"):
        with vlm.patch({1: torch.zeros(32)}): pass
    with vlm.patch({1: ("last", [0.] * 32)}): listed = vlm.run(query)
    with vlm.patch({1: ("last", torch.zeros(32))}): assert torch.equal(vlm.run(query).logits, listed.logits)
    assert vlm.run(query, layers=2).residuals.keys() == {2}
    with pytest.raises(ValueError, match="{text} is the name of a group of positions"):
        Query(None, "Is the {text} red?", {"text": "cup"})


# Patches in any call -------------------------------------------------------------------------------------------------

def inputs(vlm, queries): return vlm.encode(queries).to("cpu", vlm.model.dtype)


def generated(vlm, queries, **settings):
    "Logits of three generated tokens, (B, 3, V), the tokens themselves being fixed."
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True,
                    output_logits=True, suppress_tokens=[*vlm.image_ids, vlm.tokenizer.eos_token_id]) | settings
    return torch.stack(vlm.model.generate(**inputs(vlm, queries), **settings).logits, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "gemma3"])
def test_a_patch_acts_in_every_call_of_the_model(family):
    vlm, v = VLM(*tiny(family, dtype=torch.float64), family), torch.randn(32, dtype=torch.float64)
    queries = [ask(0), ask(1, "umbrella", "hot dog")]
    for edits in ({2: ("image", v)}, {1: ("last", v), 3: (-2, lambda rows: 2 * rows)},
                  {2: ("subject", torch.stack([v, -v])[:, None])}):
        with torch.no_grad(): plain = vlm.model(**inputs(vlm, queries)).logits[:, -1]
        with vlm.patch(edits, queries), torch.no_grad():
            wanted = vlm.run(queries).logits
            assert (vlm.model(**inputs(vlm, queries)).logits[:, -1] - wanted).abs().max() < 1e-10
            cached, uncached = generated(vlm, queries), generated(vlm, queries, use_cache=False)
            assert (cached[:, 0] - wanted).abs().max() < 1e-5 and (cached - uncached).abs().max() < 1e-5
        assert (wanted - plain).abs().max() > 1e-4, "the patch must do something for this test to mean anything"
        with torch.no_grad(): assert torch.equal(vlm.model(**inputs(vlm, queries)).logits[:, -1], plain)


def test_rows_for_each_query_serve_all_its_beams(vlm):
    rows = torch.randn(2, 1, 32)
    settings = dict(max_new_tokens=1, do_sample=True, num_return_sequences=3, return_dict_in_generate=True,
                    output_logits=True)
    with vlm.patch({2: ("last", rows)}):
        wanted = vlm.run([ask(0), ask(1)]).logits
        (logits,) = vlm.model.generate(**inputs(vlm, [ask(0), ask(1)]), **settings).logits
        assert torch.allclose(logits, wanted.repeat_interleave(3, 0), atol=1e-5)
        with pytest.raises(ValueError, match="takes 3 x 1 x 32 numbers"):
            vlm.model(**inputs(vlm, [ask(0), ask(1), ask(2)]))


def test_a_call_that_does_not_name_its_words_says_so(vlm):
    with vlm.patch({2: ("subject", torch.zeros(32))}):
        with pytest.raises(ValueError, match="does not say where the group 'subject' is: patch.edits, queries"):
            vlm.model(**inputs(vlm, [ask()]))
        assert not vlm.run(ask(), 2, "subject").residual(2).any()
    with vlm.patch({2: ("subject", torch.zeros(32))}, ask()):
        with pytest.raises(ValueError, match="none of the 1 that are patched"):
            vlm.model(**inputs(vlm, [ask(0, "dog")]))
        with pytest.raises(ValueError, match="input_ids"): vlm.model(inputs_embeds=torch.zeros(1, 3, 32))
    cache = vlm.model(**inputs(vlm, [ask()]), use_cache=True).past_key_values
    with vlm.patch({2: ("last", torch.zeros(32))}):
        with pytest.raises(ValueError, match="before the patching began"):
            vlm.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_patches_may_end_in_any_order(vlm):
    plain = vlm.run(ask()).logits
    one, two = (vlm.patch({1: ("last", torch.full((32,), fill))}) for fill in (1., 0.))
    with vlm.patch({1: ("last", torch.zeros(32))}): zero = vlm.run(ask()).logits
    one.__enter__(); two.__enter__(); one.__exit__(None, None, None)
    assert torch.equal(vlm.run(ask()).logits, zero)
    two.__exit__(None, None, None)
    assert torch.equal(vlm.run(ask()).logits, plain) and not vlm._edits


# The state a model is found in ---------------------------------------------------------------------------------------

def compiled_in_place(model): model.compile(backend="eager")
def compiled_language_model(model): model.model.language_model.compile(backend="eager")
def compiled_forward(model): model.forward = torch.compile(model.forward, backend="eager")
def compiled_block(model): model.model.language_model.layers[2].compile(backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("how", [compiled_in_place, compiled_language_model, compiled_forward, compiled_block])
def test_hooks_act_in_a_compiled_model(vlm, how):
    model, processor = tiny_llava()
    how(model)
    compiled, zeros = VLM(model, processor, "compiled"), torch.zeros(32)
    with torch.no_grad(): compiled.model(**inputs(compiled, [ask()])) # compiled before any hook is there
    captured = compiled.run(ask(), [2], "subject")
    assert torch.allclose(captured.residual(2), vlm.run(ask(), [2], "subject").residual(2), atol=1e-5)
    with compiled.patch({2: ("last", zeros)}), torch.no_grad():
        ours, raw = compiled.run(ask()).logits, compiled.model(**inputs(compiled, [ask()])).logits[:, -1]
    with vlm.patch({2: ("last", zeros)}): wanted = vlm.run(ask()).logits
    assert torch.allclose(ours, wanted, atol=1e-5) and torch.allclose(raw, wanted, atol=1e-5)
    assert compiled.check() is compiled


def test_a_model_in_training_is_asked_without_dropout_and_goes_on_training():
    model, processor = tiny_llava()
    for block in model.model.language_model.layers: block.self_attn.attention_dropout = .5
    wanted = VLM(model, processor).run(ask(), EVERY)
    model.train()
    model.model.vision_tower.eval() # frozen
    modes = [m.training for m in model.modules()]
    vlm = VLM(model, processor)
    assert [m.training for m in model.modules()] == modes
    run = vlm.run(ask(), EVERY)
    assert torch.equal(run.logits, wanted.logits)
    assert all(torch.equal(run.residual(l), wanted.residual(l)) for l in EVERY)
    with pytest.raises(ValueError):
        with vlm.patch({2: ("last", torch.zeros(7))}): vlm.run(ask())
    assert vlm.check() and [m.training for m in model.modules()] == modes


def test_a_thread_beside_a_patch_is_not_patched(vlm):
    from concurrent.futures import ThreadPoolExecutor
    plain = vlm.run(ask()).logits
    with ThreadPoolExecutor(1) as pool:
        with vlm.patch({1: ("last", torch.zeros(32))}):
            with pytest.raises(ValueError, match="another thread is inside tiny.patch"):
                pool.submit(vlm.run, ask()).result()
            inside = vlm.run(ask()).logits
        assert torch.equal(pool.submit(vlm.run, ask()).result().logits, plain) and not torch.equal(inside, plain)


def test_runs_of_two_threads_do_not_meet(vlm):
    from concurrent.futures import ThreadPoolExecutor
    queries = [ask(i) for i in range(8)]
    alone = [vlm.run(q, [2], "subject").residual(2) for q in queries]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda q: vlm.run(q, [2], "subject").residual(2), queries))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert copy.deepcopy(vlm).run(queries[0]).logits.equal(vlm.run(queries[0]).logits)


# What goes in, what comes out ----------------------------------------------------------------------------------------

def test_tensors_of_one_shape_and_type_are_copied_in_one_piece(monkeypatch):
    kept = {layer: torch.full((2, 3), float(layer)) for layer in range(5)}
    kept |= {"logits": torch.ones(2, 7), "rows": torch.arange(6).view(2, 3)}
    stacked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: stacked.append(len(tensors)) or stack(tensors))
    away = library.copied(kept, "meta", most=18)
    assert stacked == [3, 2, 1, 1] and [*away] == [*kept]
    assert {what: (value.device.type, value.dtype, value.shape) for what, value in away.items()} == {
        what: ("meta", value.dtype, value.shape) for what, value in kept.items()}
    assert all(library.copied(kept, "cpu")[what] is value for what, value in kept.items()), "already there"


def test_logits_that_are_not_finite_are_no_beliefs(tmp_path):
    half = VLM(*overflowing(), "half")
    words = replace(ask(), image=None)
    assert half.run(words).beliefs, "only a picture overflows"
    with pytest.raises(ValueError, match="half for query 1 are not finite: float16 ends at 65,504, so load it with"):
        half.run([words, ask()], batch_size=1)
    with pytest.raises(ValueError, match="half for query 0 are not finite"): half.check()
    for part in overflowing(): part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite"): VLM.load(tmp_path, device="cpu", dtype="fp16")
    assert VLM.load(tmp_path, device="cpu", dtype="bf16").run(ask()).logits.isfinite().all()


def test_what_a_patch_makes_infinite_is_found(vlm):
    with vlm.patch({2: ("last", lambda rows: rows / 0)}):
        with pytest.raises(ValueError, match="not finite: float32 is wide enough, so its weights or what was written"):
            vlm.run(ask())
    with vlm.patch({4: ("subject", torch.full((32,), torch.inf))}): # behind all blocks: no logit sees it
        assert vlm.run(ask()).logits.isfinite().all()
        with pytest.raises(ValueError, match="the rows at layer 4 of tiny for query 0 are not finite"):
            vlm.run(ask(), [4], "subject")


def other_template(vlm): vlm.processor.chat_template = CHAT.replace("USER", "U").replace("| upper", "| lower")
def no_template(vlm): vlm.processor.chat_template = None
def other_tokenizer(vlm): vlm.processor.tokenizer = tiny_tokenizer("bytes")
def more_tokens(vlm): vlm.tokenizer.add_tokens(["left or right"])


@pytest.mark.parametrize("change", [other_template, no_template, other_tokenizer, more_tokens])
def test_prompts_follow_the_chat_template_and_the_tokenizer(change):
    seen, fresh = (VLM(*tiny_llava(), "tiny") for _ in range(2))
    before = seen.layout(ask()), seen.answer_ids(ask())
    for vlm in (seen, fresh): change(vlm)
    for query in (ask(), ask(1, "umbrella", "hot dog")):
        assert seen.layout(query) == fresh.layout(query) and seen.answer_ids(query) == fresh.answer_ids(query)
        assert seen.encode([query])["input_ids"].equal(fresh.encode([query])["input_ids"])
    assert before != (seen.layout(ask()), seen.answer_ids(ask()))


@pytest.mark.parametrize("kwargs", [{"dtype": "bf16"}, {"torch_dtype": torch.bfloat16}, {"dtype": torch.bfloat16},
                                    {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16", "torch_dtype": "bf16"}])
def test_every_spelling_of_a_type_is_taken(saved, kwargs):
    assert VLM.load(saved, device="cpu", **kwargs).model.dtype == torch.bfloat16


@pytest.mark.parametrize("kwargs,message", [
    ({"dtype": "float17"}, "no type of weights is called 'float17': there are float16, bfloat16"),
    ({"torch_dtype": torch.int8}, "no type of weights is called torch.int8"),
    ({"dtype": "load"}, "no type of weights is called 'load'"),
    ({"dtype": "float32", "torch_dtype": "bf16"}, "dtype='float32' and torch_dtype='bf16' differ"),
])
def test_other_types_are_refused(saved, kwargs, message):
    with pytest.raises(ValueError, match=message): VLM.load(saved, device="cpu", **kwargs)


def opened(image, path, **kwargs):
    "A picture as it comes back from a file."
    image.save(path, **kwargs)
    return Image.open(path)


def test_pictures_are_read_as_a_viewer_shows_them(vlm, tmp_path):
    plain, grey = picture(0), picture(0).convert("L")
    exif = Image.Exif()
    exif[0x112] = 6 # stored on its side: to be turned by 90 degrees
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 2, (20, 20), dtype=np.uint8) * 255)
    clear, cut = plain.copy(), plain.copy()
    clear.putalpha(alpha)
    cut.paste("white", mask=alpha.point(lambda a: 255 - a))
    deep = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    palette = Image.fromarray(np.asarray(alpha) // 255).convert("P")
    palette.putpalette([200, 0, 0, 0, 90, 0])
    pairs = {"16 bits": (opened(deep, tmp_path / "d.png"), grey), "TIFF": (opened(deep, tmp_path / "d.tiff"), grey),
             "turned": (opened(plain.rotate(90), tmp_path / "t.png", exif=exif), plain),
             "hidden colour": (opened(clear, tmp_path / "c.png"), cut),
             "grey, hidden": (opened(clear.convert("LA"), tmp_path / "l.png"), cut.convert("L")),
             "palette": (opened(palette, tmp_path / "p.png", transparency=0), on_white(palette))}
    for name, (given, shown) in pairs.items():
        ours, theirs = (np.asarray(image, int) for image in (as_seen(given), shown.convert("RGB")))
        assert np.abs(ours - theirs).max() <= (name == "grey, hidden"), name
        query, wanted = (vlm.encode([replace(ask(), image=i)])["pixel_values"] for i in (given, shown))
        assert torch.allclose(query, wanted, atol=.01), name
    film = VLM(*tiny("qwen2_vl")), [replace(ask(), image=[i] * 2) for i in (clear, cut)]
    assert torch.equal(*(film[0].encode([q])["pixel_values_videos"] for q in film[1]))
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="without an agreed range"):
            vlm.run(replace(ask(), image=grey.convert(mode)))


def on_white(palette):
    "Colour 0 of a palette made white."
    palette = palette.copy()
    palette.putpalette([255, 255, 255, *palette.getpalette()[3:]])
    return palette


def test_a_turned_picture_is_turned_before_it_is_mirrored(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    query = ask()
    turned = replace(query, image=opened(query.image.rotate(90), tmp_path / "t.png", exif=exif))
    assert np.array_equal(as_seen(ImageOps.mirror(turned.image)), ImageOps.mirror(query.image))
    assert query.image is ask_again(query).image, "others are the very pictures given"


def ask_again(query): return replace(query, truth="left")


@pytest.mark.parametrize("make", [
    lambda v: Query(None, "Left?", answers={"left", "right"}),
    lambda v: Query(None, "Left?", answers=frozenset(("left", "right"))),
    lambda v: v.run({ask(0), ask(1)}),
    lambda v: v.run(ask(), [1], {"subject", "object"}),
    lambda v: v.positions(ask(), {"subject", "object"}),
])
def test_what_has_no_order_is_refused(vlm, make):
    with pytest.raises(ValueError, match="in a set have no order of their own: give them in a list"): make(vlm)


@pytest.mark.parametrize("make,message", [
    (lambda v: v.run(ask(), batch_size=-1), "batch_size is a whole number of queries from 1, not -1"),
    (lambda v: v.run(ask(), batch_size=2.5), "batch_size is a whole number of queries from 1, not 2.5"),
    (lambda v: Query(None, "Which?", answers=(1, 2)), "the answer 1 is no word"),
    (lambda v: Query(None, "A {subject}", {"subject": 1}), "the word for {subject} is a int"),
    (lambda v: Query(None, "A { brace"), "a brace that marks no word"),
    (lambda v: Query(None, "A } brace"), "a brace that marks no word"),
    (lambda v: Query(None, "A {subject:>8}", {"subject": "cup"}), "formats its mark {subject}"),
    (lambda v: v.run(ask(answers=("left",))).logit_diff, "a logit difference needs two answers"),
    (lambda v: v.run([ask(answers=("left",)), ask()]).logit_diff, "a logit difference needs two answers"),
    (lambda v: v.run(ask(), at="verb"), "'verb' is not a marked word"),
    (lambda v: v.run(ask(), [1.5]), "whole numbers from 1 to 4, not 1.5"),
    (lambda v: v.run(ask(), torch.tensor([1, 9])), "no layer 9"),
])
def test_another_mistake_is_one_clear_sentence(vlm, make, message):
    with pytest.raises(ValueError) as error: make(vlm)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_layers_come_in_arrays_and_braces_in_templates(vlm):
    for layers in (np.arange(1, 3), torch.arange(1, 3), range(1, 3), (np.int64(1), 2)):
        assert list(vlm.run(ask(), layers, "last").residuals) == [1, 2]
    assert list(vlm.run(ask(), torch.tensor(2), "last").residuals) == [2]
    assert Query(None, "{{a}} {subject}", {"subject": "cup"}).text == "{a} cup"


@pytest.mark.parametrize("function", [lambda rows: None, lambda rows: rows[..., :3], lambda rows: 0.])
def test_a_function_that_returns_no_rows_says_so(vlm, function):
    with vlm.patch({2: ("subject", function)}):
        with pytest.raises(ValueError, match="the patch of 'subject' at layer 2 gives .* for rows"): vlm.run(ask())
    with pytest.raises(ValueError, match="edits are .layer: .group, new"):
        with vlm.patch([("subject", torch.zeros(32))]): pass


# Weights as they are now ---------------------------------------------------------------------------------------------

def scaled(model): model.model.language_model.layers[1].self_attn.o_proj.weight.mul_(3)
def one_neuron(model): model.model.language_model.layers[1].mlp.down_proj.weight[:, 5] = 0
def past_autograd(model): model.model.language_model.layers[1].mlp.down_proj.weight.data[3, 7] += 1
def two_rows_exchanged(model):
    rows = model.get_input_embeddings().weight
    rows[5:7] = rows[5:7].flip(0).clone()
def another_tensor(model): model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
def an_adapter(model): model.add_adapter(peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))


@pytest.mark.slow
@pytest.mark.parametrize("change", [scaled, one_neuron, past_autograd, two_rows_exchanged, another_tensor, an_adapter])
def test_the_identity_is_that_of_the_live_weights(saved, change):
    first, second = (VLM.load(saved, device="cpu") for _ in range(2))
    before = first.weight_hash
    for vlm in (first, second):
        torch.manual_seed(0)
        with torch.no_grad(): change(vlm.model)
    assert first.weight_hash != before and first.weight_hash == second.weight_hash, "changed alike, asked after"


def test_weights_put_back_are_those_of_the_file(saved):
    vlm = VLM.load(saved, device="cpu")
    before, kept = vlm.weight_hash, {k: v.clone() for k, v in vlm.model.state_dict().items()}
    with torch.no_grad(): scaled(vlm.model)
    assert vlm.weight_hash != before
    vlm.model.load_state_dict(kept)
    assert vlm.weight_hash == before
    vlm.revision = "0" * 40 # as from the Hub
    vlm._hash.clear()
    assert vlm.weight_hash == vlm.revision
    with torch.no_grad(): scaled(vlm.model)
    assert vlm.weight_hash not in (before, vlm.revision)


def test_an_adapter_that_is_switched_off_is_another_model(saved):
    vlm = VLM.load(saved, device="cpu")
    with torch.no_grad(): an_adapter(vlm.model)
    on = vlm.weight_hash
    vlm.model.disable_adapters()
    off = vlm.weight_hash
    vlm.model.enable_adapters()
    assert off != on == vlm.weight_hash


# Found elsewhere -----------------------------------------------------------------------------------------------------

VIDEO = [name for name, family in FAMILIES.items() if family.frames]


@pytest.mark.parametrize("family", VIDEO)
def test_a_video_may_be_a_single_frame(family):
    vlm = VLM(*tiny(family), family)
    run, moved = vlm.run([film(0), film(1)], [2], "objects"), vlm.run(film(0, 1))
    assert run.logits.isfinite().all() and not torch.equal(run.logits[0], run.logits[1])
    assert vlm.positions(film(0), "video") and not torch.equal(run.logits[:1], moved.logits)


WORDS = ("cafe\u0301", "e\u0301", "ås", "\u1112\u1161\u11ab", "cup\ufe0f") # composed by NFC, or of no width


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "NFD"])
def test_a_word_may_be_written_in_more_characters_than_its_tokens_hold(kind, normalizer):
    model, processor = tiny_llava(kind=kind)
    processor.tokenizer.backend_tokenizer.normalizer = getattr(normalizers, normalizer)()
    vlm = VLM(model, processor)
    for word in WORDS:
        query = Query(None, "Is the {subject} left of the {object}?", {"subject": word, "object": "cup"})
        (row,) = vlm.positions(query, "subject")
        assert vlm.tokens(query)[row + 1] in ("▁left", "Ġleft"), "the token after the word is the next word"


def test_a_word_that_the_tokenizer_drops_has_no_place():
    model, processor = tiny_llava(kind="bytes")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    with pytest.raises(ValueError, match="no token holds character .* or another spelling"):
        VLM(model, processor).positions(Query(None, "Is the {subject} left?", {"subject": "cupz"}), "subject")


@pytest.mark.parametrize("offloaded", ["model.language_model.embed_tokens", "model.language_model.norm", "lm_head"])
def test_a_model_that_is_partly_on_disk_is_asked_as_any_other(saved, vlm, tmp_path, offloaded):
    parts = [f"model.language_model.{part}" for part in ("embed_tokens", "layers", "norm", "rotary_emb")]
    parts += ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    where = {part: "disk" if part == offloaded else "cpu" for part in parts}
    loaded = VLM.load(saved, device_map=where, offload_folder=str(tmp_path))
    assert loaded.device == torch.device("cpu")
    mine, theirs = (v.run(MIXED, [2], "last") for v in (loaded, vlm))
    assert torch.allclose(mine.logits, theirs.logits, atol=1e-5)
    assert torch.allclose(mine.residual(2), theirs.residual(2), atol=1e-5)
    assert loaded.weight_hash == VLM.load(saved, device="cpu").weight_hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_says_the_likeliest_token_in_any_precision(dtype):
    vlm, (query, *_) = VLM(*tiny_llava(dtype=dtype), "tiny"), [ask()]
    likeliest = int(vlm.run(query).logits.argmax())
    assert vlm.generate(query, 1) == vlm.tokenizer.decode([likeliest], skip_special_tokens=True).strip()
