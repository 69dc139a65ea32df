"A model that does not fit: what is asked of it, partly or wholly offloaded, is what it answers in memory."
import ast
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import accelerate
import pytest
import torch
from transformers import BitsAndBytesConfig

from spatialid import edits
from spatialid.extraction import extract, extract_rings
from spatialid.families import FAMILIES
from spatialid.hooks import VLM, offloading
from spatialid.questions import left_right, mirrored
from spatialid.scenes import FreeScenes, GridScenes, RingScenes
from spatialid.sweeps import sweep
from tiny import tiny, tiny_llava

READ_AROUND = {"mllama", "gemma3", "llava_onevision", "idefics3"}  # weights of the vision tower, wherever they are


@pytest.fixture(scope="module")
def folders():
    "family -> the folder of a tiny model of it, in float64."
    with TemporaryDirectory() as folder:
        @cache
        def saved(family):
            for part in tiny(family, dtype=torch.float64): part.save_pretrained(Path(folder)/family)
            return Path(folder)/family
        yield saved


def load(folder, offload=None, **kwargs):
    return VLM.load(folder, dtype="float64", **(kwargs and {"offload_folder": str(offload), **kwargs}))


def asked(vlm):
    "{what: numbers} of all that is done with a model, and its words."
    base = left_right(FreeScenes(20, seed=1, px=32), n=3)
    source, every = [mirrored(q) for q in base], range(1, vlm.n_layers + 1)
    push = torch.randn(vlm.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, kept = vlm.run(source, [2], "objects"), vlm.run(base, every, "objects")
    found = {"logits": kept.logits, **{f"rows after {layer}": kept.residual(layer) for layer in every}}
    with vlm.patch({2: ("objects", clean)}): found["patch"] = vlm.run(base).logits
    with vlm.steer(base[0], {"subject": push}, layer=2):
        found["steer"], words = vlm.run(base[0]).logits, vlm.generate(base[0], 3)
    found["sweep"] = sweep(vlm, base, source, {"objects": "objects"}, logits=True).logits["objects"]
    swept = sweep(vlm, base, edits={"ID": ("subject", edits.steer_to(push))}, logits=True)
    return {**found, "edit": swept.logits["ID"], "words": words}


def extracted(vlm):
    "{design: IDs}, of the paper's pictures and of rings behind which the questions are packed."
    grid = GridScenes([("cup", "star")], sizes=(124,), px=32)
    ring = RingScenes(["cup", "star", "cat", "house"], 4, px=32)
    return {"paper": torch.from_numpy(extract(vlm, grid, progress=False).ids),
            **{slot: torch.from_numpy(ids.ids) for slot, ids in extract_rings(vlm, ring, most=8).items()}}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys() and mine.pop("words", None) == theirs.pop("words", None)
    assert not {what for what in mine if (mine[what] - theirs[what]).abs().max() > 1e-9}


def on_disk(vlm): return sum(p.device.type == "meta" for p in vlm.model.parameters())


@pytest.mark.parametrize("family", ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mllama", "gemma3"))])
def test_half_on_disk_is_the_same_model(family, folders, tmp_path):
    "As `device_map=\"auto\"` spreads it: what comes first in memory, the last blocks and the head on disk."
    whole = load(folders(family))
    half = sum(p.numel() * 8 for p in whole.model.parameters()) // 2
    split = load(folders(family), tmp_path, device_map="auto", max_memory={"cpu": half})
    assert {*split.model.hf_device_map.values()} == {"cpu", "disk"}
    assert 0 < on_disk(split) < len([*split.model.parameters()])
    assert_same(asked(split), asked(whole))
    assert split.weight_hash == whole.weight_hash


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_on_disk_is_read_whatever_the_family_does_with_its_tower(family, folders, tmp_path):
    "The embedding too. Where weights are read around their modules, all on disk is refused with this map."
    whole = load(folders(family))
    where = offloading(whole.model, whole.family.text)
    everything = dict.fromkeys(where, "disk")
    if family in READ_AROUND:
        with pytest.raises(ValueError, match="fails where they are offloaded: load") as error:
            load(folders(family), tmp_path/"all", device_map=everything)
        assert "\n" not in str(error.value)
        assert ast.literal_eval(re.search(r"device_map=(\{.*?\})", str(error.value))[1]) == where
    split = load(folders(family), tmp_path/"part", device_map=where)
    assert split.model.get_input_embeddings().weight.device.type == "meta"
    assert_same(asked(split), asked(whole))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_ids_of_a_model_on_disk(family, folders, tmp_path):
    whole = load(folders(family))
    split = load(folders(family), tmp_path, device_map=offloading(whole.model, whole.family.text))
    assert_same(extracted(split), extracted(whole))


def test_what_is_generated_is_refused_in_a_sentence_too(folders, tmp_path):
    "LLaVA-NeXT-Video reads one weight around its module while it generates, and none in a pass."
    split = load(folders("llava_next_video"), tmp_path, device_map={"": "disk"})
    query = left_right(FreeScenes(9, seed=1, px=32), n=1)[0]
    assert split.run(query).logits.isfinite().all()
    with pytest.raises(ValueError, match="fails where they are offloaded"): split.generate(query)


def offloaded(seed):
    "A tiny model whose weights are all elsewhere, as on a GPU that they do not fit on."
    model, processor = tiny_llava(seed=seed)
    return VLM(accelerate.cpu_offload(model, execution_device="cpu"), processor, "tiny")


def test_weights_that_are_offloaded_have_the_identity_of_those_in_memory():
    "Also without a folder: else two models, both offloaded, would be one, and one's IDs the other's."
    first, other = offloaded(0), offloaded(1)
    assert on_disk(first) == len([*first.model.parameters()])
    assert first.weight_hash == VLM(*tiny_llava()).weight_hash != other.weight_hash
    assert other.weight_hash == VLM(*tiny_llava(seed=1)).weight_hash


@pytest.mark.parametrize("how, warned", [
    (BitsAndBytesConfig(load_in_8bit=True), True),
    (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), False),
    (BitsAndBytesConfig(load_in_8bit=False), False), (None, False)])
def test_eight_bits_with_outliers_apart_are_warned_of(how, warned, recwarn):
    model, processor = tiny_llava()
    model.config.quantization_config = how
    VLM(model, processor, "tiny")
    said = [str(w.message) for w in recwarn if "tiny is in 8 bits" in str(w.message)]
    assert bool(said) == warned and all("llm_int8_threshold=0.0" in text for text in said)
