"Theory: regressions are their formulas, the planted model is exactly Eq. 6-8, parts add up, encodings are those of the modules of every family."
import numpy as np
import pytest
import torch
from PIL import Image

from spatialid import theory as th
from spatialid.scenes import GridScene, GridScenes, grid_pairs
from spatialid.extraction import extract, subsample
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.organisms import Recipe, build
from spatialid.edits import add
from spatialid.sweeps import in_float64, sweep
from tiny import tiny, tiny_llava

XY = np.stack(np.meshgrid(np.arange(4) - 1.5, np.arange(4) - 1.5), -1)
CELLS = [(x, y) for y in range(4) for x in range(4)]


def random(*size, seed=0): return np.random.default_rng(seed).normal(size=size)


# --- regression

def plain_map(x, y, rank, kind):
    "W of a rank, by the textbook: Eq. 17, or the full fit cut to its first right singular vectors."
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    if kind == "pcr": return vt[:rank].T @ np.diag(1 / s[:rank]) @ u[:, :rank].T @ y
    w = np.linalg.pinv(x) @ y
    v = np.linalg.svd(x @ w, full_matrices=False)[2][:rank].T
    return w @ v @ v.T


def plain_r2(x, y, rank, kind, centre):
    mean_x, mean_y = (x.mean(0), y.mean(0)) if centre else (0, 0)
    left = (y - mean_y) - (x - mean_x) @ plain_map(x - mean_x, y - mean_y, rank, kind)
    return 1 - (left**2).sum() / ((y - y.mean(0))**2).sum()


def plain_left_out(x, y, rank, kind, centre):
    lost = total = 0
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        mean_x, mean_y = (x[rest].mean(0), y[rest].mean(0)) if centre else (0, 0)
        guess = (x[i] - mean_x) @ plain_map(x[rest] - mean_x, y[rest] - mean_y, rank, kind) + mean_y
        lost, total = lost + ((y[i] - guess)**2).sum(), total + ((y[i] - y[rest].mean(0))**2).sum()
    return max(1 - lost / total, -1)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("kind", ["pcr", "rrr"])
@pytest.mark.parametrize("columns", [6, 40]) # fewer than cells, and more
def test_regressions_are_their_formulas(kind, centre, columns):
    x = random(16, columns) + 1
    y = x[:, :5] @ random(5, 9, seed=1) + random(16, 9, seed=2)
    inside, outside = (fit(y @ y.T, x, (1, 2, 4), kind, centre) for fit in (th.low_rank, th.left_out))
    for r in (1, 2, 4):
        assert abs(inside[r] - plain_r2(x, y, r, kind, centre)) < 1e-9
        assert abs(outside[r] - plain_left_out(x, y, r, kind, centre)) < 1e-7


def test_regressions_take_stacks_and_refuse_other_kinds():
    x, y = random(16, 6), random(3, 16, 9, seed=1)
    gram = y @ y.swapaxes(1, 2)
    for fit in (th.low_rank, th.left_out):
        for kind in ("pcr", "rrr"): assert np.allclose(fit(gram, x, (2,), kind)[2], [fit(one, x, (2,), kind)[2] for one in gram])
        with pytest.raises(ValueError, match="pcr and rrr"): fit(gram, x, kind="ridge")


def test_wide_encodings_make_reduced_rank_regression_empty():
    y = random(16, 9)
    assert abs(th.low_rank(y @ y.T, random(16, 40, seed=1), (3,), "rrr")[3] - th.low_rank(y @ y.T, random(16, 40, seed=2), (3,), "rrr")[3]) < 1e-9


def test_a_constant_moves_the_jump_to_rank_3():
    xy = XY.reshape(16, 2) * [1, 0.99]
    x = np.hstack([xy, np.full((16, 1), 20.0)])
    printed, centred = (th.low_rank(xy @ xy.T, x, (1, 2, 3), centre=centre) for centre in (False, True))
    assert printed[1] < 1e-9 and 0.4 < printed[2] < 0.6 and printed[3] > 1 - 1e-9 and centred[2] > 1 - 1e-9


def test_null_and_intervals():
    x = XY.reshape(16, 2)
    units = x @ random(2, 8) + 0.1 * random(6, 16, 8, seed=1)
    found = th.explained(units, x, np.ones(6), n_draws=200, n_null=200, ranks=(1, 2))
    assert found[2]["low"] <= found[2]["value"] <= found[2]["high"] and found[2]["n"] == 6 and found[2]["p"] < 0.01
    assert found[2]["null_mean"] < 0.3 < 0.9 < found[2]["value"]
    random_ids = th.explained(random(6, 16, 8, seed=3), x, np.ones(6), th.left_out, n_draws=50, n_null=200, ranks=(2,))[2]
    assert random_ids["p"] > 0.01


# --- pooling and encodings

def test_pooling_is_the_mean_of_a_cell():
    a = random(8, 12, 3)
    assert np.allclose(th.pooled(a)[4 * 1 + 2], a[2:4, 6:9].mean((0, 1)))
    assert np.allclose(th.pooled(random(4, 4, 2)), random(4, 4, 2).reshape(16, 2))
    fine = np.repeat(np.repeat(a[:6, :6], 4, 0), 4, 1) # a patch in two cells counts by its area
    assert np.allclose(th.pooled(a[:6, :6]), th.pooled(fine))


def test_rotary_index_is_eq_19():
    x = th.rotary_index(16, 8)
    assert x.shape == (16, 8) and np.allclose(x[3], [f(3 * 10000 ** (-2 * i / 8)) for i in range(4) for f in (np.cos, np.sin)])


SIDES = {"llava": {"learned, vision tower": 4}, "qwen2_vl": {"rotary, vision tower": 6, "rotary, language model": 3}, "qwen2_5_vl": {"rotary, vision tower": 6, "rotary, language model": 3},
         "qwen3_vl": {"learned, vision tower": 6, "rotary, vision tower": 6, "rotary, language model": 3}, "video_llama_3": {"rotary, vision tower": 6}}


@pytest.mark.parametrize("family", FAMILIES)
def test_encodings_of_every_family(family):
    vlm = VLM(*tiny(family), "tiny")
    state = {k: v.clone() for k, v in vlm.model.state_dict().items()}
    found = th.encodings(vlm, 24)
    wanted = SIDES.get(family, {"learned, vision tower": 4})
    assert {name: one.shape[:2] for name, one in found.items()} == {name: (n, n) for name, n in wanted.items()}
    assert all(np.isfinite(one).all() for one in found.values()) and all(torch.equal(v, state[k]) for k, v in vlm.model.state_dict().items())
    for name, one in found.items():
        if not name.startswith("rotary"): continue
        across, down = np.abs(np.diff(one, axis=1)).max((0, 1)), np.abs(np.diff(one, axis=0)).max((0, 1))
        assert across.max() > 1e-4 and down.max() > 1e-4 and not (across > 1e-9)[down > 1e-9].any() # each feature turns with row or column
        assert np.allclose(one[:, :1] * (down > 1e-9), one * (down > 1e-9)) and np.allclose(one[:1] * (across > 1e-9), one * (across > 1e-9))
    if family in ("llava", "gemma3", "internvl"):
        table = next(v for k, v in vlm.model.state_dict().items() if "position_embedding" in k).reshape(-1, one.shape[-1])
        assert np.array_equal(one.reshape(16, -1), table[-16:].double().numpy())


def test_gated_table_is_what_the_module_adds():
    vlm = VLM(*tiny("mllama"), "tiny")
    module = vlm.model.model.vision_model.gated_positional_embedding
    gate = float(torch.tanh(module.gate.detach()))
    tile = module.tile_embedding.weight[1].view(module.max_num_tiles, 17, -1)[0]
    wanted = ((1 - gate) * module.embedding + gate * tile).detach()[1:]
    assert abs(gate) > 0.01 and np.allclose(th.encodings(vlm, 16)["learned, vision tower"].reshape(16, -1), wanted.numpy(), atol=1e-6)


def test_no_known_encoding_names_what_was_tried():
    vlm = VLM(*tiny("llava"), "tiny")
    embeddings = vlm.model.model.vision_tower.embeddings
    embeddings.places = embeddings.position_embedding
    del embeddings.position_embedding
    with pytest.raises(ValueError, match="position_embedding, position_embeddings, pos_embed.*LEARNED"): th.encodings(vlm, 16)


def test_a_table_is_square():
    assert th.square(torch.zeros(1, 10, 2), "a").shape == (3, 3, 2) and th.square(torch.zeros(9, 2), "a").shape == (3, 3, 2)
    with pytest.raises(ValueError, match="7 rows"): th.square(torch.zeros(8, 2), "a")


def test_linear_share_of_an_encoding():
    line = th.linear_encoding(np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1) @ random(2, 20), n_draws=100)
    noise = th.linear_encoding(random(6, 6, 20), n_draws=100)
    assert line["all"]["value"] > 1 - 1e-9 and line["three"]["p"] < 0.05 and line["all"]["n"] == 20
    assert noise["all"]["value"] < 0.2 and noise["all"]["p"] > 0.01 and noise["all"]["low"] <= noise["all"]["value"] <= noise["all"]["high"]


# --- the planted model

@pytest.fixture(scope="module")
def planted():
    radial = (XY**2).sum(-1, keepdims=True)
    one = th.plant(np.concatenate([XY, radial - radial.mean()], -1), n_things=3)
    tiles = th.TileScenes(one.names)
    scenes = [s for s in tiles if s.a_cell in ((0, 0), (2, 1), (3, 3))]
    return one, tiles, extract(one.vlm, tiles, th.PLANTED, progress=False), scenes


def every_cell(tiles): return [GridScene(a, b, at, cell, 224, 0, tiles) for a, b in tiles.pairs for at in ((0, 0), (2, 1)) for cell in CELLS]


def test_extraction_finds_what_was_planted(planted):
    one, tiles, ids, _ = planted
    assert np.abs(ids.at(1) - one.ids * 224 / 225).max() < 1e-10 * np.abs(one.ids).max() # 15 of 16 cells in each mean
    assert np.abs(extract(one.vlm, every_cell(tiles), th.PLANTED, progress=False).at(1) - one.ids).max() < 1e-10


def test_extraction_finds_it_in_float32_too(planted):
    one, tiles, _, _ = planted
    single = VLM(th.plant(one.psi, n_things=3).vlm.model.float(), one.vlm.processor, "single")
    for norm in [m for m in single.model.modules() if type(m).__name__.endswith("RMSNorm")]: del norm.forward # the class's own, in float32
    assert np.abs(extract(single, every_cell(tiles), th.PLANTED, progress=False).at(1) - one.ids).max() < 1e-5


def test_r2_is_1_at_the_planted_rank_and_not_below(planted):
    one, _, ids, _ = planted
    y, x = ids.at(1).reshape(16, -1), th.pooled(th.encodings(one.vlm, 32)["learned, vision tower"])
    for kind in ("pcr", "rrr"):
        for fit in (th.low_rank, th.left_out):
            found = fit(y @ y.T, x, (2, 3), kind)
            assert found[3] > 1 - 1e-8 and found[2] < 0.9, (kind, fit.__name__)


def test_steering_changes_the_answer_by_eq_8(planted):
    one, tiles, ids, _ = planted
    scene = next(s for s in tiles if s.b_cell == (1, 2))
    query, own = scene.query(th.PLANTED), one.ids[2, 1]
    pushes = {f"{a} {x} {y}": a * (ids.at(1)[y, x] - ids.at(1)[2, 1]) for a in (1, -3) for x, y in CELLS} | {f"full {x} {y}": one.ids[y, x] - own for x, y in CELLS}
    s = sweep(one.vlm, [query], edits={name: ("subject", add(push)) for name, push in pushes.items()})
    difference = lambda v: float((v[..., 0] - v[..., 1]).squeeze())
    for name, push in pushes.items(): assert abs(difference(s.log_probs[name]) - difference(s.base_log_probs) - push @ one.read) < 1e-9
    there = one.vlm.run([GridScene(scene.a, scene.b, scene.a_cell, cell, 224, 0, tiles).query(th.PLANTED) for cell in CELLS]).logit_diff
    for (x, y), real in zip(CELLS, there): assert abs(difference(s.log_probs[f"full {x} {y}"]) - float(real)) < 1e-9
    assert np.ptp(there.numpy()) > 1 and one.vlm.run(GridScene(scene.a, scene.b, (3, 3), (0, 0), 224, 0, tiles).query(th.PLANTED)).beliefs == ["left"]


def test_weights_predict_the_planted_ids(planted):
    one, tiles, ids, scenes = planted
    parts = th.decompose(one.vlm, scenes, ids.at(1), th.PLANTED)
    centred = lambda v: v - v.mean(0)
    for predicted in (th.from_weights(one.vlm, parts)[0], th.composed(one.vlm, parts, one.names[0])[0]): assert np.abs(centred(predicted) - one.ids.reshape(16, -1)).max() < 1e-10
    assert parts.error < 1e-12 and np.abs(parts.attention - 1).max() < 1e-12 and not parts.mlps.at(1).any()
    assert all(np.abs(table.at(1)).max() < 1e-10 for name, table in parts.taken.items() if name != "own patches")
    found = th.compared(th.from_weights(one.vlm, parts)[0] * 224 / 225, ids.units(1)[0], ids.weights, 100)
    assert found["cosine"]["value"] > 1 - 1e-9 and found["share"]["value"] > 1 - 1e-9 and found["share"]["p"] < 0.05


def test_the_planted_constant_is_in_the_table_and_not_in_the_ids():
    one = th.plant(XY * [1, 0.99], constant=9.0, n_things=2)
    ids, x = extract(one.vlm, th.TileScenes(one.names), th.PLANTED, progress=False), th.pooled(th.encodings(one.vlm, 32)["learned, vision tower"])
    assert np.abs(ids.at(1) - one.ids * 224 / 225).max() < 1e-10
    y = ids.at(1).reshape(16, -1)
    printed, centred = (th.low_rank(y @ y.T, x, (2, 3), centre=centre) for centre in (False, True))
    assert printed[2] < 0.9 and printed[3] > 1 - 1e-9 and centred[2] > 1 - 1e-9


def test_planting_refuses_what_is_no_grid():
    with pytest.raises(ValueError, match=r"\(m, m, r\)"): th.plant(np.zeros((4, 3, 2)))
    with pytest.raises(ValueError, match="224"): th.Tiles(["cup"]).sprite("cup", 5)


# --- parts of a trained or random model

BARE = ("{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")


def organism_of(family, kwargs):
    torch.manual_seed(0)
    model, processor = build(Recipe(family, px=32, width=32, vision_width=32, vision_blocks=2 if family == "mllama" else 1, blocks=3, intermediate=48, **kwargs))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1: p.mul_(5)
            if "cross_attn" in name and name.endswith("gate"): p.fill_(1) # 0 hides the picture
    return in_float64(VLM(model, processor, "random"))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "gemma3", "mllama"])
def test_parts_add_up_to_the_ids(family):
    merge = dict(patch=4, merge=1) if family in ("llava", "mllama") else dict(patch=4, merge=2)
    vlm = organism_of(family, merge)
    scenes = subsample(GridScenes(grid_pairs(2), sizes=(224,), px=32), 2)
    template = "Is the {subject} to the left or right of the {object}?"
    ids = extract(vlm, scenes, template, progress=False)
    parts = th.decompose(vlm, scenes, ids.at(2), template)
    total = sum(one.table for one in parts.taken.values()) + parts.mlps.table
    for l in (1, 2, 3): assert np.abs(total[:, :, :l].sum(2) - ids.table[:, :, l - 1]).max() < 1e-6 * np.abs(ids.table).max() # eager attention has its softmax in float32
    H = parts.attention.shape[1]
    by_hand = np.einsum("oyxd,yxd->o", sum(one.table for one in parts.taken.values())[:, 0, :2].sum(1), ids.at(2))
    shares = parts.shares.table[:, 0, :2 * H].sum(1).reshape(2, 16, 16)
    assert np.allclose(np.einsum("occ->o", shares), by_hand) and parts.error < 1e-6
    looks = ~np.array([vlm.family.cross and hasattr(block, "self_attn") for block in vlm.blocks]) # at patches
    if vlm.family.cross: # nothing of the text is carried through such a block, and its gate is the scale behind
        scales = next(iter(parts.means.values()))[0].scales
        assert not scales["before"][0, looks].any() and np.allclose(np.divide(*scales["behind"][:, looks]), np.tanh(1))
    assert ((parts.attention > 0).all(1) == looks).all() and (parts.attention < 1).all() and th.composed(vlm, parts, ids.objects[0]).shape == (3, 16, 32)


def test_a_picture_of_one_tile_in_a_model_of_several():
    vlm, template = in_float64(VLM(*tiny("mllama"), "tiny")), "Is the {subject} to the left or right of the {object}?"
    scenes = subsample(GridScenes(grid_pairs(2), sizes=(224,), px=16), 2)
    query = scenes[0].query(template)
    assert vlm.encode([query])["pixel_values"].shape[2] == 2 and th.grid_of(vlm, query) == 4
    T = vlm.encode([query])["input_ids"].shape[1]
    assert th.patch_rows(vlm, query) == [*range(T + 1, T + 17)] and vlm.cross_rows == 34
    ids = extract(vlm, scenes, template, progress=False)
    parts = th.decompose(vlm, scenes, ids.at(2), template)
    total = sum(one.table for one in parts.taken.values()) + parts.mlps.table
    for l in range(1, vlm.n_layers + 1): assert np.abs(total[:, :, :l].sum(2) - ids.table[:, :, l - 1]).max() < 1e-6 * np.abs(ids.table).max()
    with pytest.raises(ValueError, match="no larger than a tile of 16 px"): th.grid_of(vlm, Query(Image.new("RGB", (32, 16)), "a"))


def test_a_head_is_its_part_of_the_output():
    vlm = organism_of("llava", dict(patch=4))
    block, g = vlm.blocks[0], torch.Generator().manual_seed(0)
    weights, value = torch.rand(2, 4, 9, generator=g, dtype=torch.float64), torch.randn(2, 9, 32, generator=g, dtype=torch.float64)
    mixed = torch.cat([torch.einsum("bt,btd->bd", weights[:, h], value[..., 8 * h:8 * h + 8]) for h in range(4)], -1)
    with torch.no_grad(): assert torch.allclose(th.by_head(block, weights, value).sum(1), block.self_attn.o_proj(mixed))


def test_heads_that_share_a_key_head_read_its_values():
    "Four heads, two key heads: heads 0 and 1 read the first, 2 and 3 the second, and their sum is what attention writes."
    vlm = organism_of("internvl", dict(patch=4, merge=2))
    reads, g = vlm.blocks[0].self_attn, torch.Generator().manual_seed(0)
    size, weights = reads.head_dim, torch.rand(2, 4, 9, generator=g, dtype=torch.float64)
    value = torch.randn(2, 9, 2 * size, generator=g, dtype=torch.float64)
    found = th.by_head(vlm.blocks[0], weights, value)
    for h in range(4):
        group, own = value[..., h // 2 * size:(h // 2 + 1) * size], reads.o_proj.weight[:, h * size:(h + 1) * size]
        assert torch.allclose(found[:, h], torch.einsum("bt,bts,ds->bd", weights[:, h], group, own.detach()))


def grouped(one, n_things=2):
    "The planted model with one key head for its two heads, and its M: both heads read the values of the first."
    block, config = one.vlm.blocks[0], one.vlm.model.config
    config.text_config.num_key_value_heads = 1
    model = type(one.vlm.model)(config).double().requires_grad_(False)
    state = one.vlm.model.state_dict()
    for name in [k for k in state if k.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight")) and "vision" not in k]:
        state[name] = state[name][:32]
    model.load_state_dict(state)
    values, outputs = block.self_attn.v_proj.weight.numpy(), block.self_attn.o_proj.weight.numpy()
    whole = outputs[:, :32] @ values[:32] + outputs[:, 32:] @ values[32:]
    P = np.linalg.lstsq(whole, one.M, rcond=None)[0]
    M = (outputs[:, :32] + outputs[:, 32:]) @ values[:32] @ P
    return in_float64(VLM(model, one.vlm.processor, "grouped", organism=True)), M


def test_weights_predict_the_ids_of_a_model_with_grouped_heads():
    "Eq. 7 without a fit is exact where two heads share a key head."
    one = th.plant(XY * [1, 0.99], n_things=2)
    vlm, M = grouped(one)
    scenes = every_cell(th.TileScenes(one.names))
    ids = extract(vlm, scenes, th.PLANTED, progress=False)
    wanted = (one.psi - one.psi.mean((0, 1))).reshape(16, 2) @ M.T
    assert vlm.blocks[0].self_attn.v_proj.weight.shape[0] == 32 and np.abs(ids.at(1).reshape(16, -1) - wanted).max() < 1e-9
    parts = th.decompose(vlm, scenes, ids.at(1), th.PLANTED)
    for predicted in (th.from_weights(vlm, parts)[0], th.composed(vlm, parts, one.names[0])[0]):
        assert np.abs(predicted - predicted.mean(0) - wanted).max() < 1e-9
    assert parts.error < 1e-12 and np.abs(parts.taken["own patches"].at(1).reshape(16, -1) - wanted).max() < 1e-9
    assert not np.allclose(wanted, one.ids.reshape(16, -1)) # other IDs than those of the model with two key heads


def test_a_prompt_needs_no_token_before_the_picture():
    "Parts add up whether or not the prompt begins with <s>, and the patches are found behind what stands before them."
    template, found = "Is the {subject} to the left or right of the {object}?", {}
    scenes = subsample(GridScenes(grid_pairs(2), sizes=(224,), px=16), 2)
    for bos in (False, True):
        vlm = in_float64(VLM(*tiny_llava(kind="bytes", bos=bos, chat=None if bos else BARE), "tiny"))
        found[bos] = th.patch_rows(vlm, scenes[0].query(template))[0]
        ids = extract(vlm, scenes, template, progress=False)
        parts = th.decompose(vlm, scenes, ids.at(2), template)
        total = sum(one.table for one in parts.taken.values()) + parts.mlps.table
        assert np.abs(total[:, :, :2].sum(2) - ids.table[:, :, 1]).max() < 1e-6 * np.abs(ids.table).max()
    assert found[False] == 0 < found[True]


def test_composition_is_linear_attention_over_blocks():
    "Where attention is the same in every picture and nothing but ψ moves, composed Eq. 7 is the model: norms are a fixed scale and MLPs are 0."
    one = th.plant(XY, n_things=2)
    scenes = every_cell(th.TileScenes(one.names))
    parts = th.decompose(one.vlm, scenes, one.ids, th.PLANTED)
    block = one.vlm.blocks[0]
    twice = type("Two", (), {"blocks": [block, block]})
    means = parts.means[one.names[0]][0]
    means.attention, means.scales = np.concatenate([means.attention] * 2), {norm: np.concatenate([v, v], 1) for norm, v in means.scales.items()}
    last = means.attention.shape[2] - 1
    means.attention[1, :, last] = 0
    means.attention[1, :, last, last] = means.n # in block 2 the word reads itself
    parts.basis = parts.basis * 2
    found, ids = th.composed(twice, parts, one.names[0]), one.ids.reshape(16, -1)
    W = sum(block.self_attn.o_proj.weight[:, 32 * h:32 * h + 32] @ block.self_attn.v_proj.weight[32 * h:32 * h + 32] for h in range(2)).numpy()
    scale = np.divide(*means.scales["before"][:, 1, last])
    first, second = (v - v.mean(0) for v in found)
    assert np.allclose(first, ids) and np.allclose(second, ids + (ids * scale) @ W.T)


def test_families_whose_blocks_write_otherwise_are_refused():
    template, scenes = "Is the {subject} to the left or right of the {object}?", subsample(GridScenes(grid_pairs(2), sizes=(224,), px=16), 2)
    gated = VLM(*tiny("llava"), "tiny")
    gated.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="another norm or a gate"): th.decompose(gated, scenes, np.zeros((4, 4, 32)), template)
    with pytest.raises(ValueError, match="no square grid of one picture"): th.decompose(VLM(*tiny("llava_onevision"), "tiny"), scenes, np.zeros((4, 4, 32)), template)


def test_nothing_remains_after_watching():
    vlm = organism_of("llava", dict(patch=4))
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules())
    before, name = hooks(), vlm.blocks[0].self_attn.config._attn_implementation
    with pytest.raises(RuntimeError):
        with th.written(vlm, [3]): raise RuntimeError
    th.encodings(vlm, 32)
    assert hooks() == before and vlm.blocks[0].self_attn.config._attn_implementation == name


def test_patches_of_a_cell():
    cells = th.in_cell(8, 4)
    assert cells.shape == (16, 64) and (cells.sum(1) == 4).all() and cells[5].nonzero()[0].tolist() == [18, 19, 26, 27]
    assert th.in_cell(6, 4).sum() == 36
    assert th.grid_of(VLM(*tiny("llava"), "tiny"), Query(Image.new("RGB", (16, 16)), "a")) == 4


# --- the read-out

def test_a_linear_read_out_is_found_and_noise_is_not():
    vectors, w = random(40, 16, 6), random(6, seed=1)
    train = np.arange(40) % 2 == 0
    predicted, found = th.read_out(vectors, vectors @ w + 3, np.eye(6), train, intercept=True)
    assert np.allclose(found, w) and th.r_squared(np.stack([vectors @ w + 3, predicted], 1)) > 1 - 1e-9
    noise = random(40, 16, seed=2)
    predicted, _ = th.read_out(vectors, noise, np.eye(6), train)
    assert abs(th.r_squared(np.stack([noise, predicted], 1)[~train])) < 0.2
    inside = th.read_out(vectors, vectors @ w, np.eye(6)[:2], train)[1]
    assert not inside[2:].any()


# --- the toy

def test_questions_shape_the_toy():
    from spatialid.extraction import grid_statistics
    r2 = {asked: float(grid_statistics((lambda v: v @ v.T)(th.toy(asked, 0, steps=200)))["r2"]) for asked in ("relations", "cells")}
    assert r2["relations"] > 0.9 and r2["cells"] < 0.4
    assert np.array_equal(th.toy("both", 1, steps=3), th.toy("both", 1, steps=3)) and not np.array_equal(th.toy("both", 1, steps=3), th.toy("both", 2, steps=3))


@pytest.mark.slow
def test_why_linear_trains_both_kinds_from_one_first_stage(tmp_path, monkeypatch):
    "Tiny recipes: the first stage is trained once for a seed, the other arms go on from it, and a second call finds everything done."
    import json
    from dataclasses import replace
    from functools import partial
    from spatialid.organisms import CELLS, Recipe, Stage, Steps, build
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    parts = dict(vision_width=32, width=32, vision_blocks=1, blocks=2, heads=2, intermediate=48, cells=True)
    small = {arm: Recipe(**parts, stages=(Stage("recognise", 2, 4, 1e-3), *(replace(s, steps=2, batch=4) for s in r.stages[1:]))) for arm, r in th.WHY.items()}
    assert len({repr(replace(r, stages=r.stages[:1])) for r in th.WHY.values()}) == 1
    monkeypatch.setattr(th, "line_of", partial(th.line_of, pairs=6))
    made = json.loads(th.why(tmp_path / "runs", 1, small).read_text())
    assert [r["arm"] for r in made["runs"]] == list(th.WHY) and all(set(r["ids"]) == {th.WHERE, th.LEFT_RIGHT} and 0 <= r["ids"][th.WHERE]["r2"]["value"] <= 1 for r in made["runs"])
    logs = [[json.loads(line)["stage"] for line in (tmp_path / "runs" / "seed 0" / name / "log.jsonl").read_text().splitlines()] for name in ("first", *th.WHY)]
    asked = ["recognise", "point", "relate", "more"]
    assert logs == [["recognise"], asked, asked, ["recognise"]]
    again = json.loads(th.why(tmp_path / "runs", 1, small).read_text())
    assert [r["ids"] for r in again["runs"]] == [r["ids"] for r in made["runs"]]
    th.why(tmp_path / "elsewhere", 1, small)
    assert not (tmp_path / "elsewhere").exists() # what is recorded is not trained again
    arm, r = next((arm, r) for arm, r in small.items() if len(r.stages) > 1)
    changed = {arm: replace(r, stages=(*r.stages[:1], *(replace(s, steps=1) for s in r.stages[1:])))}
    monkeypatch.setattr(th, "line_of", lambda *_, **__: {}) # measured above; here it is about what is trained
    th.why(tmp_path / "elsewhere", 1, changed)
    assert (tmp_path / "elsewhere").exists()
    # what the arms are asked
    _, processor = build(next(iter(small.values())))
    steps = {arm: Steps(processor, r, r.stages[1]) for arm, r in small.items() if len(r.stages) > 1}
    words = {arm: {q[2] for i in range(300) for q in s.questions(s.item(i), np.random.default_rng(i))} for arm, s in steps.items()}
    assert words["sixteen unrelated words"] == {w for row in CELLS for w in row} and "top left" in words["people's words, relations"]
    assert all(len(processor.tokenizer(f" {w}", add_special_tokens=False).input_ids) == 1 for row in CELLS for w in row)
