"Questions about one picture in one pass: their answers and what their words hold are those of asking singly."
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from spatialid import packing
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.packing import run_shared
from spatialid.query import Query
from spatialid.questions import LEFT_RIGHT
from spatialid.sweeps import in_float64
from tiny import tiny

TEMPLATES = (LEFT_RIGHT, "Is the {subject} above or below the {object}?", "{object}: the hot dog, the {subject}",
             "{subject} {object}")


def media(family, video, g):
    "Three pictures or videos; of families that take any size, one is larger."
    sizes = [(16, 16), (16, 16), (16, 32) if family in ("qwen2_vl", "mllama") and not video else (16, 16)]
    draw = lambda size: Image.fromarray(g.integers(0, 255, (*size, 3), dtype=np.uint8))
    return [[draw(size) for _ in range(4)] if video else draw(size) for size in sizes]


def questions(family, video=False):
    "All questions about each of three pictures, in any order."
    g = np.random.default_rng(0)
    words = [dict(subject=a, object=b) for a, b in (("cup", "star"), ("hot dog", "cup"))]
    queries = [Query(m, t, w, ("left", "right")) for m in media(family, video, g) for t in TEMPLATES for w in words]
    return [queries[i] for i in g.permutation(len(queries))]


def check_captured(vlm, queries, alone):
    "What the words hold in a packed pass, in the order of the queries, is what they hold when asked singly."
    found = packing.capture_shared(vlm, queries, [1, 3, vlm.n_layers], ("object", "subject"))
    assert found.shape == (len(queries), 2, 3, vlm.width) and found.dtype == np.float64
    for k, layer in enumerate((1, 3, vlm.n_layers)):
        assert np.abs(found[:, :, k] - alone.residual(layer).numpy()).max() < 1e-10


def check_shared(family, queries, monkeypatch):
    vlm = in_float64(VLM(*tiny(family, blocks=4), family))
    plain = vlm.run(queries)
    rows = vlm.run(queries, layers=[1, 3, vlm.n_layers], at=("object", "subject"))
    def plain_path(*args, **kwargs): pytest.fail("the plain path was taken")
    if packing.takes_masks(vlm): monkeypatch.setattr(VLM, "run", plain_path)
    for batch_size in (1, 3):
        shared = run_shared(vlm, queries, batch_size)
        torch.testing.assert_close(shared.logits, plain.logits, atol=1e-10, rtol=0)
    assert shared.beliefs == plain.beliefs and torch.equal(shared.answer_ids, plain.answer_ids)
    check_captured(vlm, queries, rows)
    assert len(plain.logits.unique(dim=0)) == len(queries), "pictures or questions do not matter, so nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_a_picture_can_be_run_together(family, monkeypatch):
    check_shared(family, questions(family), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_questions_about_a_video_too(family, monkeypatch):
    check_shared(family, questions(family, video=True), monkeypatch)


def test_only_gemma_and_sliding_windows_take_the_plain_path():
    vlms = {family: VLM(*tiny(family), family) for family in FAMILIES}
    assert [family for family, vlm in vlms.items() if not packing.takes_masks(vlm)] == ["gemma3"]
    vlms["llava_onevision"].model.config.get_text_config().layer_types = ["sliding_attention"] * 4
    assert not packing.takes_masks(vlms["llava_onevision"])


def test_patches_texts_alone_and_nothing_are_as_in_run():
    vlm, queries = VLM(*tiny("llava")), questions("llava")[:6]
    with vlm.patch({2: ("subject", torch.ones(vlm.width))}):
        assert torch.equal(run_shared(vlm, queries).logits, vlm.run(queries).logits)
    texts = [replace(query, image=None) for query in queries]
    assert torch.equal(run_shared(vlm, texts).logits, vlm.run(texts).logits)
    with pytest.raises(ValueError, match="no queries"): run_shared(vlm, [])


def test_a_hook_that_a_failing_run_leaves_is_none():
    vlm, queries = VLM(*tiny("llava")), questions("llava")[:2]
    batch, rows = packing.packed_batch(vlm, queries, [[0], [1]])
    with pytest.raises(IndexError): packing.last_logits(vlm, batch, rows + 1000)
    assert not vlm.model.get_output_embeddings()._forward_pre_hooks
