"Training: packed questions are single ones, a resumed run is the uninterrupted run, a card says what the weights do."
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from spatialid import organisms
from spatialid.cards import accuracy, card_text
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.registry import bundled
from spatialid.organisms import (BUILDERS, CELLS, RECIPES, Recipe, Stage, Steps, build, bundle, chat_template, covered,
                                 early_entry, forward, fresh_blocks, held_out_stage, kinds_of, language_recipes,
                                 learning_rate, log_table, make_tokenizer, merges, named_questions, packed_mask, padded,
                                 place_word, plot_accuracy, plot_learning, shown_kinds, stage_ends, train, training_log,
                                 training_record, training_texts, zoo)
from spatialid.scenes import OBJECTS, FreeScenes
from spatialid.stats import rng
from tiny import one_token_red

TINY = Recipe(vision_width=32, width=32, vision_blocks=1, blocks=2, heads=2, intermediate=48,
              stages=(Stage("recognise", 4, 4, 1e-3),
                      Stage("place", 4, 4, 1e-3, places=1, relations=2, others=2, hues=1)))
MERGED = dict(patch=5, merge=2)
VIDEO = dict(frames=8, stages=(Stage("recognise", 4, 4, 1e-3, still=True),
                               Stage("when", 4, 4, 1e-3, places=1, relations=2, others=3, times=2)))


def tiny_recipe(family):
    "The tiny recipe of a family."
    special = {}
    if family in ("qwen2_vl", "qwen2_5_vl", "internvl"): special |= MERGED
    if family in ("llava_onevision", "qwen2_5_vl"): special |= VIDEO
    if family == "mllama": special |= dict(vision_blocks=2) # one of the two is global
    return replace(TINY, family=family, px=40, **special)


FAMILY = {family: tiny_recipe(family) for family in BUILDERS}


def test_names_are_split_and_answers_are_not():
    tok = make_tokenizer()
    pieces = [len(tok(f" {n}", add_special_tokens=False).input_ids) for n in OBJECTS]
    assert np.mean([p > 1 for p in pieces]) > .9 and 2 <= np.mean(pieces) <= 3
    assert make_tokenizer().get_vocab() == tok.get_vocab()
    for text in ("Is the umbrella near or far from the cup?", "Größe ☂\n x"):
        assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text


def test_a_tokenizer_knows_the_texts_it_will_meet():
    plain, video, cells = ({*training_texts(**of)} for of in ({}, dict(video=True), dict(cells=True)))
    assert video - plain >= {"When does the  appear?", " before", " early"}
    assert cells - plain == {f" {word}" for row in CELLS for word in row}
    assert {" left", " center", "Where is the ?"} <= plain
    assert (merges(True, True), merges(False, True), merges(False, False)) == (235, 230, 210)
    both = chat_template("[picture]", "[video]")
    assert "[picture]" in both and "[video]" in both and "<video>" not in chat_template("[picture]")


def test_relations_that_count_most_come_first_and_the_others_in_a_random_order():
    pictures, videos = RECIPES["llava-tiny"], RECIPES["onevision-tiny"]
    stage = Stage("any", 1, 1, 0., relations=3, others=6)
    drawn = [kinds_of(pictures, stage, rng(i)) for i in range(20)]
    assert all(kinds[:3] == ["left_right", "above_below", "left_right"] for kinds in drawn)
    assert all(len({*kinds[3:]}) == 6 and not {"left_right", "above_below"} & {*kinds[3:]} for kinds in drawn)
    assert len({tuple(kinds) for kinds in drawn}) > 15
    assert kinds_of(videos, replace(stage, others=3), rng(0))[:3] == ["before_after"] * 3
    assert kinds_of(videos, replace(stage, others=0, still=True), rng(0)) == ["left_right"] * 3


def test_dense_questions_are_about_the_things_in_view():
    scene = FreeScenes(9, seed=2, things=(3, 3))[4]
    first, _, last = scene.things
    stage = Stage("any", 1, 1, 0., names=2, places=1, hues=1)
    names, dense = named_questions(scene, scene.things, stage)
    assert [question for _, question, *_ in names] == [f" {o.name}" for o in scene.things[:2]]
    assert [(kind, answer) for kind, _, answer, _ in dense] == [("place", place_word(last)), ("hue", first.colour)]
    at = SimpleNamespace(x=.3, y=.99)
    assert place_word(at) == "bottom left" and place_word(at, cells=True) == CELLS[3][1]


def test_a_patch_is_of_what_covers_it():
    star, cup = OBJECTS.index("star") + 1, OBJECTS.index("cup") + 1
    shown = covered(dict(star=(0, 0, 20, 16), cup=(10, 0, 10, 10)), n=4, px=40)
    assert shown.tolist() == [[star, cup, 0, 0], [star, star, 0, 0], [0] * 4, [0] * 4]
    assert covered(dict(star=(0, 0, 10, 4)), n=4, px=40)[0, 0] == -100, "neither an object nor background"


def test_sequences_of_several_lengths_are_one_batch():
    batch = padded([([5, 6], [0, 1], [0, 1], [-100, 6]), ([7] * 9, [0] * 9, [*range(9)], [-100] * 9)], pad=3)
    assert {tuple(columns.shape) for columns in batch.values()} == {(2, 16)}
    assert batch["input_ids"][0, 2:].unique() == 3 and batch["number"][0, 2:].unique() == -1
    assert batch["labels"][0, :3].tolist() == [-100, 6, -100] and batch["position_ids"][1, 8] == 8


def test_the_rate_warms_up_and_ends_at_a_fiftieth():
    stage = Stage("any", 1000, 1, 2e-3, stop=500)
    assert learning_rate(stage, 0) == pytest.approx(2e-5) and learning_rate(stage, 49) == pytest.approx(1e-3)
    assert learning_rate(stage, 500) == pytest.approx(2e-3 * .51) and learning_rate(stage, 1000) == pytest.approx(4e-5)


def test_what_is_measured_is_of_the_kind_that_is_trained():
    of = lambda stage: (stage.hues, stage.times, stage.others, stage.still)
    moving, still = Stage("any", 1, 1, 0.), Stage("any", 1, 1, 0., still=True)
    assert of(held_out_stage(moving, video=False)) == (2, 0, 6, False)
    assert of(held_out_stage(moving, video=True)) == (0, 2, 6, False)
    assert of(held_out_stage(still, video=True)) == (0, 0, 0, True)


LOG = [dict(stage="a", step=1000, seconds=60, recognised=.5), dict(stage="a", step=2000, seconds=120, recognised=.6),
       dict(stage="b", step=100, seconds=180, recognised=.75, left_right=.9)]


def test_a_log_is_shown_as_a_table_and_a_figure():
    assert stage_ends(LOG) == LOG[1:]
    assert "time" not in shown_kinds(LOG) and "time" in shown_kinds([dict(before_after=1)])
    rows = log_table(LOG[1:], ("recognised", "left_right")).splitlines()
    assert rows[0] == "| stage | step | recognised | left / right |"
    assert rows[2:] == ["| a | 2,000 | 0.600 |  |", "| b | 100 | 0.750 | 0.900 |"]
    ax = Figure().subplots()
    plot_learning(ax, LOG)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["objects recognised"].get_xdata()) == [1, 2, 3]
    assert list(lines["left / right"].get_ydata()) == [.9]


def test_shares_are_drawn_with_their_intervals():
    ax = Figure().subplots()
    side = dict(value=.5, low=.4, high=.6, n=20)
    plot_accuracy(ax, {"left_right": dict(value=.9, low=.8, high=.95, n=30), "side": side})
    assert [bar.get_width() for bar in ax.patches] == [.9, .5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["left / right (n = 30)", "side (n = 20)"]
    ends = ax.collections[0].get_segments()[0]
    assert ends[:, 0].tolist() == pytest.approx([.8, .95])


def test_recipes_are_listed_with_their_size_and_stages():
    row = zoo({"mini": TINY}).splitlines()[2]
    assert row.startswith("| mini | LlavaForConditionalGeneration | ") and row.endswith(" | 2 | 32 | 64 |")
    recipe = SimpleNamespace(family="llava", trained="lora", rank=16, tiles=8, stages=TINY.stages)
    frozen = SimpleNamespace(**{**vars(recipe), "trained": "frozen"})
    rows = language_recipes({"one": recipe, "other": frozen}).splitlines()
    assert rows[2:] == ["| one | llava | lora | 16 | 64 | recognise: 4 × 4, place: 4 × 4 |",
                        "| other | llava | frozen | - | 64 | recognise: 4 × 4, place: 4 × 4 |"]


def test_a_model_from_elsewhere_has_no_record(tmp_path):
    assert training_record(None) == training_record(tmp_path) == ([], {})
    (tmp_path / "training.json").write_text(json.dumps(dict(log=LOG, recipe=dict(px=80), torch="2")))
    assert training_record(tmp_path) == (LOG, dict(px=80))


def stored(family, folder):
    "An untrained organism of a family, as the experiments load it: from its files."
    model, processor = build(FAMILY[family])
    fresh_blocks(model, 0)
    model.config.organism = True
    model.save_pretrained(folder); processor.save_pretrained(folder)
    return VLM.load(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDERS)
def test_a_packed_question_is_the_single_question(family, tmp_path):
    vlm, recipe = stored(family, tmp_path), FAMILY[family]
    stage = recipe.stages[1]
    steps = Steps(vlm.processor, recipe, stage)
    batch, scene, other = steps[1], steps.item(stage.batch), steps.item(0)
    look = lambda v: v.frames() if recipe.frames else v.image()
    with torch.no_grad(): states = forward(vlm.model, batch)[1]
    questions = steps.questions(scene, rng(steps.scenes.seed, "questions", stage.batch))
    asked = [a for a in batch["asked"] if a[0] == 0]
    assert len(questions) == len(asked) >= 4
    for (b, kind, row, right, wrong), (k, text, answer, _) in zip(asked, questions):
        single, elsewhere = vlm.run([Query(look(scene), text, {}), Query(look(other), text, {})]).logits
        packed = vlm.model.lm_head(states[b, row])
        assert kind == k and torch.allclose(single, packed.float(), atol=2e-5), (single - packed).abs().max()
        assert (single - elsewhere).abs().max() > 2e-3, "the picture does not matter, so nothing was tested"
        assert right == vlm.tokenizer(f" {answer}", add_special_tokens=False).input_ids[0]


@pytest.mark.parametrize("family", BUILDERS)
def test_image_tokens_are_in_reading_order(family):
    recipe = FAMILY[family]
    model, processor = build(recipe)
    n, pictures = recipe.tiles ** 2, one_token_red(recipe)
    pixels = Steps(processor, recipe, recipe.stages[0]).picture([[p] for p in pictures])
    with torch.no_grad(): tokens = forward(model.eval(), dict(picture=pixels, labels=torch.tensor([-100])))[0]
    assert tokens.shape == (n + 1, n, recipe.width)
    assert (tokens[:n] - tokens[n]).norm(dim=-1).argmax(-1).tolist() == list(range(n))


@pytest.mark.parametrize("family", BUILDERS)
def test_fresh_blocks_attend_to_what_looks_alike(family):
    model, _ = build(FAMILY[family])
    before = {k: p.clone() for k, p in model.named_parameters()}
    fresh_blocks(model, 1)
    for k, p in model.named_parameters():
        if k.endswith("_gate"): assert p == 1 # of cross-attention: open
        elif p.ndim == 1 or "language_model.layers" not in k: # norms and biases begin as the class has them
            assert torch.equal(p, before[k]), k
        else: assert not torch.equal(p, before[k]), k
    for block in model.model.language_model.layers:
        attention = block.cross_attn if hasattr(block, "cross_attn") else block.self_attn
        q, k = (m.weight.view(-1, attention.head_dim, 32) for m in (attention.q_proj, attention.k_proj))
        assert torch.equal(q, k.repeat_interleave(len(q) // len(k), 0))


@pytest.mark.slow
def test_the_zoo_fits_the_package():
    for name, recipe in RECIPES.items():
        model, processor = build(recipe)
        assert recipe.tiles == (6 if name == "qwen25vl-tiny" else 8), name
        limit = 21e6 if name == "llava-small" else 8e6
        assert sum(p.numel() for p in model.parameters()) * 2 <= limit, name
        assert processor.tokenizer.get_vocab().keys() >= {"Ġleft", "Ġbehind", "Ġyellow"}


def test_the_mask_separates_questions():
    m = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    assert m.tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                          [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]]


def test_labels_cover_the_answers_only():
    model, processor = build(TINY)
    batch = Steps(processor, TINY, TINY.stages[1])[0]
    tok = processor.tokenizer
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        text = tok.decode(labels[labels != -100])
        assert text.endswith("</s>") and "Is" not in text and (labels != -100).sum() < 20
    assert {kind for _, kind, *_ in batch["asked"]} >= {"hue", "place", "left_right"}
    assert set(batch["patches"].unique().tolist()) <= {-100, *range(len(OBJECTS) + 1)} and (batch["patches"] > 0).any()


RUN = """
import sys, time; sys.path.insert(0, {here!r})
from dataclasses import replace
import torch; torch.set_num_threads(1)
from test_organisms import TINY
from spatialid import organisms
held_out_stage = organisms.held_out_stage
organisms.held_out_stage = lambda *given: replace(held_out_stage(*given), batch=4)
organisms.train("llava-tiny", {out!r}, TINY, every=2)
"""


def _start(out):
    code = RUN.format(here=str(Path(__file__).parent), out=str(out))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def without_seconds(entries): return [{k: v for k, v in e.items() if k != "seconds"} for e in entries]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "The folder of a run from beginning to end, made once for all places where another is killed."
    out = tmp_path_factory.mktemp("uninterrupted") / "whole"
    assert _start(out).wait(200) == 0
    return out


@pytest.mark.parametrize("after", [(0, 2), (1, 2)])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(tmp_path, after, uninterrupted):
    whole, cut = uninterrupted, tmp_path / "cut"
    p, stage = _start(cut), TINY.stages[after[0]].name
    for _ in range(4000):
        log = (cut / "log.jsonl").read_text() if (cut / "log.jsonl").exists() else ""
        if any((e["stage"], e["step"]) == (stage, after[1]) for e in map(json.loads, log.splitlines())): break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert _start(cut).wait(200) == 0
    a, b = (load_file(f / "checkpoint.safetensors") for f in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and any(k.startswith("exp_avg.") for k in a)
    assert without_seconds(training_log(whole)) == without_seconds(training_log(cut))


@pytest.mark.parametrize("action", ["card", "train"])
def test_the_command_says_what_there_is(action, capsys):
    with pytest.raises(SystemExit) as e: organisms.main([action, "lava"])
    assert e.value.code == 2 and "llava-tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_bundle_round_trip_and_foreign_checkpoints(tmp_path):
    torch.set_num_threads(1)
    trained = train("llava-tiny", tmp_path / "run", TINY, every=4)
    folder = bundle("mini", TINY, tmp_path / "run", training_log(tmp_path / "run")[-1], tmp_path)
    vlm = VLM.load(str(folder))
    assert vlm.organism and vlm.n_layers == 2
    stored = dict(vlm.model.named_parameters())
    for k, p in trained.named_parameters(): assert torch.allclose(stored[k].float(), p.cpu(), atol=1e-3, rtol=1e-3), k
    a = accuracy(vlm, n=20)
    assert set(a) == set(organisms.KINDS) and all(0 <= v["low"] <= v["value"] <= v["high"] <= 1 for v in a.values())
    other = replace(TINY, blocks=3)
    with pytest.raises(ValueError, match="another recipe"): train("llava-tiny", tmp_path / "run", other)
    with pytest.raises(FileNotFoundError, match="train the organism first"): training_log(tmp_path / "none")
    with pytest.raises(ValueError, match="measure more often"): early_entry(training_log(tmp_path / "run"))
    assert early_entry([{"left_right": .71}, {"left_right": .78}, {"left_right": .9}])["left_right"] == .78


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, folder in bundled().items() if not (folder / "base.json").is_file()])
def test_the_card_is_about_the_bundled_weights(name):
    folder = Path(organisms.__file__).parent / "organisms" / name
    card = json.loads((Path(__file__).parents[1] / "results" / name / "card.json").read_text())
    vlm = VLM.load(name)
    assert card["weight_hash"] == vlm.weight_hash and card["held_out"]["scenes"] == 2000 and card["bytes"] <= 8e6
    assert (folder / "README.md").read_text() == card_text(card)
    stored = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.float16 for t in stored.values())
    r = card["recipe"]
    now = accuracy(vlm, n=150, px=r["px"], flat=r.get("flat", False), frames=r.get("frames", 0))
    for kind, a in card["accuracy"].items(): # the same scenes come first, so a small sample may differ by chance alone
        assert now[kind]["low"] - .08 <= a["value"] <= now[kind]["high"] + .08, kind
    if name == "llava-tiny":
        assert min(card["accuracy"][k]["value"] for k in ("left_right", "above_below")) >= .95
        assert card["accuracy"]["colour"]["value"] >= .8
    kind, goal = ("before_after", .9) if r.get("frames") else ("left_right", .85)
    reached = card["accuracy"][kind]["value"]
    if name.endswith("-early"): assert .68 <= reached <= .85
    else: assert (reached >= goal) != ("fell short" in card_text(card)) and reached >= .75
