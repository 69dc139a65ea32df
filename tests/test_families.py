"The parity matrix of `tools/families.py`, family by family, and the file that shows it."
import json
from pathlib import Path

import pytest
import torch
from transformers import MllamaConfig

from families import rows
from spatialid.families import FAMILIES

SHOWN = json.loads((Path(__file__).parents[1] / "results" / "families.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_parity(family):
    found, key = rows([family]), lambda row: (row["medium"], row["check"], row["ok"], row["limit"])
    assert not [row for row in found if not row["ok"]]
    assert sorted(map(key, found)) == sorted(key(row) for row in SHOWN["rows"] if row["family"] == family)


def test_every_family_is_shown_and_nothing_else():
    assert {row["family"] for row in SHOWN["rows"]} == {*FAMILIES} and {"torch", "transformers"} <= {*SHOWN["versions"]}
    swept = {row["family"] for row in SHOWN["rows"] if row["check"] == "fast sweep"}
    assert swept == {key for key, family in FAMILIES.items() if family.fast}


PROMPT = torch.tensor([False, True, True, False, True, False])  # which tokens are the picture's
CONFIG = MllamaConfig(text_config=dict(num_hidden_layers=4, cross_attention_layers=[1, 3]),
                      vision_config=dict(image_size=16, patch_size=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_picture_and_text_tile_what_can_depend_on_the_picture(family):
    family = FAMILIES[family]
    image, text = family.image_rows(PROMPT, CONFIG), family.text_rows(PROMPT)
    behind = list(range(6, 6 + family.cross_rows(CONFIG)))
    first = 0 if family.cross else 1
    assert sorted(image + text) == [*range(first, 6), *behind]
    assert image == (behind if family.cross else [1, 2, 4])
    assert bool(behind) == bool(family.cross_blocks(CONFIG)) == family.cross


def test_the_first_tile_of_mllama_is_behind_its_class_token():
    mllama = FAMILIES["mllama"]
    assert mllama.cross_blocks(CONFIG) == (1, 3) and mllama.cross_rows(CONFIG) == 4 * (1 + 16)
    assert mllama.image_rows(PROMPT, CONFIG)[mllama.first_tile(CONFIG)] == list(range(7, 23))
    assert [mllama.is_cut({"aspect_ratio_ids": torch.tensor([[i]])}) for i in (1, 2)] == [False, True]
    several = [FAMILIES["llava"].is_cut({"pixel_values": torch.zeros(1, n, 3, 4, 4)}) for n in (1, 2)]
    assert several == [False, True] and not FAMILIES["llava"].is_cut({"pixel_values": torch.zeros(1, 3, 4, 4)})


def test_hooks_of_one_pass_hand_the_picture_on():
    "Blocks are all given the states of the start; what one hook writes, the next one gives."
    tokens, states = torch.zeros(2, 3, 4), torch.ones(4, 5, 4)  # two pictures of two tiles
    stream = FAMILIES["mllama"].stream(True)
    for step in range(2):
        rows = stream.read((tokens,), {"cross_attention_states": states})
        assert rows.shape == (2, 3 + 10, 4) and (rows[:, 3:] == 1 + step).all()
        (h, rest), kwargs = stream.write(rows + 1, (tokens, "rest"), {"cross_attention_states": states, "more": 0})
        assert (h == 1).all() and h.shape == tokens.shape and (rest, kwargs["more"]) == ("rest", 0)
        given = kwargs["cross_attention_states"]
        assert given.shape == states.shape and (given == 2 + step).all()
        assert (states == 1).all(), "those of the model are as before"
    _, kwargs = stream.write(rows, (tokens,), {})
    assert kwargs == {}, "the final norm takes no states"


def test_without_a_picture_there_are_only_tokens():
    for family, picture in ((FAMILIES["llava"], True), (FAMILIES["mllama"], False)):
        stream, h = family.stream(picture), torch.zeros(1, 2, 3)
        assert not stream.everywhere and stream.read((h,), {}) is h
        assert stream.write(h + 1, (h, 5), {"a": 1})[0][1] == 5
