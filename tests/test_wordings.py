"Wordings: half of them name the reference first, some are never trained, and each asks for the same truth."
import re
from dataclasses import replace

import numpy as np
import pytest

from spatialid.scenes import FreeScenes, relation
from spatialid.videos import Videos
from spatialid.query import fill
from spatialid.wordings import (ANSWERS, HELD_OUT_WORDINGS, WORDINGS, article, caption, listed, object_first, reword,
                                sentence, template)

OPPOSITE = dict(left="right", above="below", front="behind", before="after")
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
EVERY = [(kind, wording) for table in (WORDINGS, HELD_OUT_WORDINGS) for kind in table for wording in table[kind]]


def both(wording): return {template(wording), template(wording, swap=True)}


def asked(kind, n):
    "The first n questions of a kind."
    scenes = FreeScenes(50 * n, seed=3)
    if kind == "before_after": scenes = Videos(scenes)
    g = np.random.default_rng(0)
    found = ((item, item.ask(kind, g)) for item in scenes)
    return [(item, q) for item, q in (next((f for f in found if f[1])) for _ in range(n))]


def test_there_are_a_dozen_and_half_name_the_reference_first():
    counts = dict(left_right=12, above_below=12, front_behind=10, near_far=10, before_after=10)
    assert {kind: len(wordings) for kind, wordings in WORDINGS.items()} == counts
    for wordings in WORDINGS.values(): assert sum(map(object_first, wordings)) * 2 == len(wordings)
    for kind, wordings in HELD_OUT_WORDINGS.items():
        assert 0 < sum(map(object_first, wordings)) < len(wordings), kind # of both orders


def test_what_is_held_out_is_never_trained():
    plain = lambda text: re.sub(r"\W+", " ", text.lower()).strip()
    trained = {plain(t) for wordings in WORDINGS.values() for w in wordings for t in both(w)}
    held_out = {plain(t) for wordings in HELD_OUT_WORDINGS.values() for w in wordings for t in both(w)}
    assert not trained & held_out and len(trained) > 80
    assert {"On which side of the {object} is the {subject}?", "The {subject} is on which side of the {object}",
            "Relative to the {object}, is the {subject} left or right"} <= {*HELD_OUT_WORDINGS["left_right"]}
    assert not any("which side" in t for t in trained)


def test_the_usual_wordings_are_among_the_trained():
    for kind in WORDINGS:
        usual = {q.template for _, q in asked(kind, 12)}
        assert usual <= {t for w in WORDINGS[kind] for t in both(w)}, kind


@pytest.mark.parametrize("kind, wording", EVERY)
def test_a_wording_marks_both_things_and_both_answers_or_none(kind, wording):
    assert wording.count("{subject}") == wording.count("{object}") == 1
    options = re.findall(r"\[(.+?)\]", wording)
    if not options: assert both(wording) == {wording}
    else:
        assert len(options) == 2 and all(answer in option.split() for answer, option in zip(ANSWERS[kind], options))
        one, two = template(wording), template(wording, swap=True)
        first, second = ANSWERS[kind]
        assert one.index(first) < one.index(second) and two.index(second) < two.index(first)
        assert "[" not in one + two and sorted(re.findall(r"[a-z]+", one)) == sorted(re.findall(r"[a-z]+", two))


@pytest.mark.parametrize("kind", WORDINGS)
def test_every_wording_asks_for_the_same_truth(kind):
    for item, query in asked(kind, 5):
        for wording in (*WORDINGS[kind], *HELD_OUT_WORDINGS[kind]):
            for swap in (False, True):
                q = reword(query, wording, swap)
                assert (q.truth, q.words, q.image, q.kind) == (query.truth, query.words, query.image, kind)
                assert q.answers == ANSWERS[kind][::-1 if swap else 1] and q.truth in q.answers
                for mark, spans in fill(q.template, tuple(q.words.items()))[1].items():
                    assert [q.text[a:b] for a, b in spans] == [q.words[mark]]
        if kind == "before_after": truth = lambda s, o: "before" if item.appears[s] < item.appears[o] else "after"
        else: truth = lambda s, o: relation(kind, *(next(t for t in item.things if t.name == n) for n in (s, o)))
        s, o = query.words["subject"], query.words["object"]
        assert truth(s, o) == query.truth # of the thing that is asked about, wherever its name stands
        assert truth(o, s) == OPPOSITE.get(query.truth, query.truth) # mirrored words: the opposite, but near is near


def test_a_mirrored_scene_has_the_opposite_truth():
    for scene, query in asked("left_right", 5):
        mirrored = replace(scene, things=tuple(replace(t, x=1 - t.x) for t in scene.things))
        pair = [next(t for t in mirrored.things if t.name == query.words[mark]) for mark in ("subject", "object")]
        assert relation("left_right", *pair) == OPPOSITE[query.truth]


def test_captions_are_true_sentences():
    g, firsts = np.random.default_rng(0), set()
    for scene in FreeScenes(60, seed=4):
        things = {t.name: t for t in scene.things}
        there, *told = caption(scene, g).split(". ")
        assert there.startswith("There is a") and all(f"{t.colour} {t.name}" in there for t in scene.things)
        assert there.count(" in the center") + there.count(" at the ") + there.count(" on the ") == len(things)
        for text in told:
            names = [n for n in re.findall(r"\w+", text) if n in things]
            assert len(names) == 2
            first = text.startswith(f"The {names[0]}")
            s, o = (things[n] for n in (names if first else names[::-1]))
            spatial = [kind for kind in ANSWERS if kind != "before_after"]
            assert text.rstrip(".") in {sentence(kind, s, o, not first).rstrip(".") for kind in spatial}
            firsts.add(first)
    assert firsts == {True, False}
    assert (article("orange cup"), article("red umbrella"), listed(["a"]), listed(["a", "b", "c"])) == (
        "an orange cup", "a red umbrella", "a", "a, b and c")
