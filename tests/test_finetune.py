"""Fine-tuning: the loss is its formula in every family, a group is the same in one piece or in several.

A killed run that goes on, and one shared by two processes, is the uninterrupted one."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from spatialid import finetune as ft
from spatialid.benchmarks import Benchmark, write_benchmark
from spatialid.scenes import GridScenes, grid_pairs
from spatialid.extraction import SpatialIDs, stored_ids
from spatialid.finetune import (PAPER, Groups, Pictures, Settings, SpatialIDLoss, finetune, group_loss, question,
                                sampled, teach, unfreeze)
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.stats import number_table
from tiny import tiny, tiny_llava

SMALL = replace(PAPER, steps=4, every=2, lr=1e-3, last_k=1, layer=2, held=2, instruction="")


def random_ids(width=32, layers=4, m=4, seed=0):
    table = np.random.default_rng(seed).normal(size=(1, 2, layers, m, m, width)).astype(np.float32)
    return SpatialIDs(table, np.ones((1, 2, m, m)), ["all"], [74, 224], list(range(1, layers + 1)), [("a", "b")], "")


def scenes(n_pairs=6, **kwargs):
    return GridScenes(grid_pairs(n_pairs), (224,), **{"px": 16, "background": "black", **kwargs})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A folder of training pictures, a benchmark and a file of IDs."
    root = tmp_path_factory.mktemp("finetune")
    drawn = scenes()
    picked = [drawn[i] for k in range(6) for i in range(240 * k, 240 * k + 30)]
    ft.write_pictures(root / "train", picked)
    random_ids().save(root / "ids.safetensors")
    bench = write_benchmark(root / "bench", 12, px=32)
    return dict(pictures=root / "train", benchmark=bench, ids=root / "ids.safetensors")


@pytest.fixture
def llava(): return VLM(*tiny_llava(dtype=torch.float64), "tiny")


def group(vlm, kind="left_right", word="object", start=0, micro=None, source=None):
    source = source or scenes()
    one = [source[i] for i in range(start, start + 15)]
    n = micro or 15
    parts = [one[k:k + n] for k in range(0, 15, n)]
    return [teach(vlm, [question(s, kind, word) for s in part], [s.b_cell for s in part], word) for part in parts]


# --- the loss

def test_the_loss_is_its_formula():
    ids, g = random_ids(), np.random.default_rng(1)
    rows, places = g.normal(size=(6, 32)), np.array([(0, 0), (1, 0), (3, 3), (1.5, 2), (2.25, .5), (0, 3)])
    grid = ids.table[0, 1, 1].astype(np.float64) # layer 2, size 224
    def bilinear(x, y):
        x0, y0 = min(int(x), 2), min(int(y), 2)
        return sum((1 - abs(x - u)) * (1 - abs(y - v)) * grid[v, u] for u in (x0, x0 + 1) for v in (y0, y0 + 1))
    centred = rows - rows.mean(0)
    cosines = [c @ (t := bilinear(*p)) / np.linalg.norm(c) / np.linalg.norm(t) for c, p in zip(centred, places)]
    loss = SpatialIDLoss(ids, 2)
    assert abs(float(loss(torch.tensor(rows), places)) - (1 - np.mean(cosines))) < 1e-12
    longer = torch.tensor(rows) * 5 + 3
    assert torch.allclose(loss(longer, places), loss(torch.tensor(rows), places)), "neither word nor length matters"
    assert loss(torch.tensor(rows).bfloat16(), places).dtype == torch.float32
    with pytest.raises(ValueError, match="no layer 9: they have 1, 2, 3, 4"): SpatialIDLoss(ids, 9)


def test_wrong_places_are_all_wrong_and_the_same_ids():
    ids = random_ids()
    def cells(seed): return SpatialIDLoss(ids, 1, permuted=seed).grid.flatten(0, 1)
    true, grids = cells(None), [cells(seed) for seed in range(5)]
    for grid in grids:
        assert not (grid == true).all(1).any() and torch.equal(grid.sum(1).sort().values, true.sum(1).sort().values)
    assert not torch.equal(grids[0], grids[1]) and torch.equal(grids[2], cells(2))


# --- groups

def test_a_question_has_the_answer_of_its_picture():
    for i in range(0, 240, 7):
        s = scenes()[i]
        for word in ("object", "subject"):
            for kind, axis, low, high in (("left_right", 0, "left", "right"), ("above_below", 1, "above", "below")):
                q = question(s, kind, word)
                assert ft.has_answer(s, kind) == (q.truth is not None)
                assert q.words[word] == s.b
                here, there = (s.b_cell, s.a_cell) if word == "subject" else (s.a_cell, s.b_cell)
                assert q.truth == (None if here[axis] == there[axis] else low if here[axis] < there[axis] else high)


def test_samplers():
    p = Pictures.of(scenes())
    series = lambda items: {(s.a, s.a_cell, s.b) for s, _ in items}
    for i in range(4):
        items = sampled(p, "balanced", i, 0)
        assert {k for _, k in items} == {("left_right", "above_below")[i % 2]}
        assert len({s.b_cell for s, _ in items}) == 15 and len(series(items)) == 1
    first, second = sampled(p, "released", 0, 0), sampled(p, "released", 1, 0)
    both = {(s.b_cell, k) for s, k in first + second}
    assert (len(first), len(second), len(both)) == (15, 9, 24) and len(series(first + second)) == 1
    assert len({k for _, k in first}) == 2
    mixed = sampled(p, "shuffled", 0, 0)
    assert len(mixed) == 15 and len(series(mixed)) > 8 and all(question(s, k).truth for s, k in mixed)


def test_samplers_depend_on_seed_and_number_alone():
    p = Pictures.of(scenes())
    key = lambda items: [(s.index, k) for s, k in items]
    for sampler in ft.SAMPLERS:
        one = key(sampled(p, sampler, 2, 3))
        assert one == key(sampled(p, sampler, 2, 3)) and one != key(sampled(p, sampler, 2, 4))
    with pytest.raises(ValueError, match="balanced, released, shuffled"): sampled(p, "other", 0, 0)


def test_the_commoner_answer_of_a_group():
    p = Pictures.of(scenes())
    items = [(p.scenes[i], "left_right") for i in next(one for one in p.series if p.scenes[one[0]].a_cell[0] == 1)]
    assert ft.commoner_share(items) == 8 / 12, "two columns of four on the right, one on the left"
    corner = next(one for one in p.series if p.scenes[one[0]].a_cell == (0, 0))
    assert ft.commoner_share([(p.scenes[i], kind) for i in corner for kind in ("left_right", "above_below")]) == 1


def test_pictures_in_a_folder_are_what_was_drawn(folders):
    drawn, stored = scenes(), ft.read_pictures(folders["pictures"])
    by_name = {(s.a, s.a_cell, s.b, s.b_cell): s for s in stored}
    assert len(by_name) == len(stored) == 180
    for i in (0, 29, 240, 1229):
        s = drawn[i]
        assert by_name[s.a, s.a_cell, s.b, s.b_cell].image().tobytes() == s.image().tobytes()
    p = Pictures.of(folders["pictures"])
    assert len(p.series) == 12 and {len(s) for s in p.series} == {15}
    train, held = p.split()
    pairs = lambda p: {frozenset((p.scenes[s[0]].a, p.scenes[s[0]].b)) for s in p.series}
    assert not pairs(train) & pairs(held) and len(train.series) + len(held.series) == 12 and held.series
    generated = Pictures.of(drawn)
    by_sight = [list(s) for s in Pictures(drawn).series]
    assert [list(s) for s in generated.series] == by_sight, "a grid is cut into series without looking at it"


def test_wrong_folders(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match="no folder"): ft.read_pictures(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no .png"): ft.read_pictures(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "dog_1_cat.png")
    with pytest.raises(ValueError, match="cannot read the file name 'dog_1_cat.png'.*dog_0-1_cake_3-2.png"):
        ft.read_pictures(tmp_path)
    (tmp_path / "dog_1_cat.png").rename(tmp_path / "dog_0-1_cat_2-2.png")
    with pytest.raises(ValueError, match="no object is shown in two places"): Pictures.of(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "dog_0-1_cat_5-2.png")
    with pytest.raises(ValueError, match="one pair of objects only .cat and dog."): Pictures.of(tmp_path).split()
    vlm = VLM(*tiny_llava(), "tiny")
    with pytest.raises(ValueError, match="'dog_0-1_cat_5-2.png' names a cell outside the 4 × 4"):
        finetune(vlm, tmp_path, folders["benchmark"], random_ids(), None, SMALL)


# --- what a model is taught, in every family

def alone(vlm, query, word, layer):
    "Cross-entropy of the answer and the row of the word, one question without padding, the answer appended by hand."
    batch = vlm.encode([query])
    answer = torch.tensor([ft.answer_ids(vlm, query)])
    batch["input_ids"], n = torch.cat([batch["input_ids"], answer], 1), answer.shape[1]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in batch: batch[key] = torch.cat([batch[key], torch.zeros_like(answer)], 1)
    if "cross_attention_mask" in batch:
        mask = batch["cross_attention_mask"]
        batch["cross_attention_mask"] = torch.cat([mask] + [mask[:, -1:]] * n, 1)
    if vlm.family.mrope:
        rest = {k: v for k, v in batch.items() if k != "position_ids"}
        batch["position_ids"] = vlm.model.model.get_rope_index(**rest)[0]
    def cast(v): return v.to(vlm.model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v
    batch = {k: cast(v) for k, v in batch.items()}
    with torch.no_grad(): logits = vlm.model(**batch, use_cache=False).logits[0, -n - 1:-1]
    log_probs = logits.log_softmax(-1)[torch.arange(n), answer[0]]
    return float(-log_probs.sum()), vlm.run(query, layer, word).residual(layer)[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_ingredients_in_every_family(family):
    vlm = VLM(*tiny(family, dtype=torch.float64), "tiny")
    # other objects, so prompts of other lengths; the last has no answer
    picked, layer = [scenes()[i] for i in (0, 3, 250, 2)], 2
    for word in ("object", "subject"):
        queries = [question(s, ("left_right", "above_below")[k % 2], word) for k, s in enumerate(picked)]
        truths = [q.truth for q in queries]
        batch = teach(vlm, queries, [s.b_cell for s in picked], word)
        taught = [bool((labels != -100).any()) for labels in batch["labels"]]
        assert taught == [t is not None for t in truths] and None in truths
        with torch.no_grad(): ce, rows = ft.answer_loss(vlm, batch, layer)
        wanted = [alone(vlm, replace(q, truth=q.truth or q.answers[0]), word, layer) for q in queries]
        assert torch.allclose(rows, torch.stack([r for _, r in wanted]), atol=1e-9)
        assert abs(ce.item() - sum(c for (c, _), t in zip(wanted, truths) if t)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_weights_learn(family):
    vlm = VLM(*tiny(family), "tiny")
    blocks, learns = ft.vision_blocks(vlm), unfreeze(vlm, 1)
    group_loss(vlm, SpatialIDLoss(random_ids(), 2), group(vlm), backward=1.)
    last = list(blocks)[-1]
    assert learns and all(k.startswith(f"{last}.mlp.") for k in learns) and any(k.endswith(".weight") for k in learns)
    for name, p in vlm.model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (name in learns), name
    n = len(blocks)
    with pytest.raises(ValueError, match=f"uses {n} vision blocks: give 1 to {n}"): unfreeze(vlm, n + 1)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_blocks_of_the_language_model_learn_and_nothing_else(family):
    vlm = VLM(*(tiny_llava() if family == "llava" else tiny(family)), "tiny")
    learns = unfreeze(vlm, 1, "language")
    group_loss(vlm, SpatialIDLoss(random_ids(), 2), group(vlm), backward=1.)
    assert learns and all(re.search(r"language_model\.layers\.\d", name) for name in learns)
    assert {int(re.search(r"layers\.(\d+)", name)[1]) for name in learns} == set(range(vlm.n_layers))
    for name, p in vlm.model.named_parameters(): assert p.requires_grad == (name in learns), name
    with pytest.raises(ValueError, match="no part 'audio' that learns: there are vision, language"):
        unfreeze(vlm, 1, "audio")


def test_a_model_without_vision_blocks_says_what_was_tried():
    vlm = VLM(*tiny_llava(), "blind")
    for block in vlm.model.model.vision_tower.encoder.layers: block.feed = block._modules.pop("mlp")
    with pytest.raises(ValueError, match="blind has no vision blocks.*tried: model.vision_tower.encoder.layers"):
        unfreeze(vlm, 1)


def test_the_answer_is_the_assistants_turn():
    vlm = VLM.load("llava-tiny-early")
    q = question(scenes(px=80)[0], "left_right")
    assert vlm.tokenizer.decode(ft.answer_ids(vlm, q)) == f" {q.truth}</s>"


# --- gradients

def grads(vlm, loss, groups, share):
    vlm.model.zero_grad()
    said = [group_loss(vlm, loss, g, share) for g in groups]
    return np.mean(said, 0), {k: p.grad.clone() for k, p in vlm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["left_right", "above_below"])
def test_a_group_in_pieces_is_the_group(llava, kind):
    unfreeze(llava, 1)
    loss = SpatialIDLoss(random_ids(), 2, weight=3.)
    whole, wanted = grads(llava, loss, [group(llava, kind)], 1.)
    ce, rows = ft.answer_loss(llava, (batch := group(llava, kind)[0]), 2) # the plain way
    llava.model.zero_grad()
    (ce / (batch["labels"] != -100).sum() + 3 * loss(rows, batch["places"])).backward()
    plain = {k: p.grad for k, p in llava.model.named_parameters()}
    for k, g in wanted.items(): assert torch.allclose(g, plain[k], atol=1e-12)
    for micro in (1, 4, 7):
        pieces, found = grads(llava, loss, [group(llava, kind, micro=micro)], 1.)
        assert np.allclose(pieces, whole, atol=1e-10)
        assert all((found[k] - g).abs().max() < 1e-6 * g.abs().max() for k, g in wanted.items())
    apart = sum(loss(rows[k:k + 5], batch["places"][k:k + 5]).item() for k in (0, 5, 10)) / 3
    assert abs(apart - whole[1]) > 1e-3, "centring each piece by itself is another loss"


def test_groups_are_averaged(llava):
    unfreeze(llava, 1)
    loss, groups = SpatialIDLoss(random_ids(), 2), [group(llava, start=15 * k) for k in range(3)]
    each = [grads(llava, loss, [g], 1.) for g in groups]
    said, found = grads(llava, loss, groups, 1 / 3)
    assert np.allclose(said, np.mean([s for s, _ in each], 0))
    for k, g in found.items():
        mean = sum(e[k] for _, e in each) / 3
        assert (g - mean).abs().max() < 1e-6 * g.abs().max() # the norms of Llama are float32


def test_the_rate():
    s = Settings(steps=100, lr=1., warmup=.03)
    rates = [s.rate(i) for i in range(100)]
    assert rates[:4] == [1 / 3, 2 / 3, 1., 1.] and abs(rates[-1] - 1 / 97) < 1e-12
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


@pytest.mark.slow
def test_the_trainer_does_the_same(tmp_path):
    s = replace(SMALL, steps=3, groups=2, every=3, seed=1)
    ours, theirs = (VLM(*tiny_llava(), "tiny") for _ in range(2))
    pictures, ids = Pictures.of(scenes()), random_ids()
    finetune(ours, pictures, write_benchmark(tmp_path / "b", 2, px=32), ids, None, s, progress=False)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=3,
                             max_grad_norm=s.clip, remove_unused_columns=False, report_to=[], use_cpu=True,
                             save_strategy="no", disable_tqdm=True)
    optimizer = torch.optim.AdamW(unfreeze(theirs, s.last_k).values(), lr=s.lr, weight_decay=s.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: s.rate(i) / s.lr)
    class InOrder(ft.SpatialIDTrainer):
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(self.train_dataset)
    first = dict(theirs.model.named_parameters())
    before = {k: p.detach().clone() for k, p in first.items()}
    groups = Groups(theirs, pictures.split()[0], s)
    trainer = InOrder(theirs, SpatialIDLoss(ids, s.layer), args, train_dataset=groups, optimizers=(optimizer, rate))
    out = trainer.train()
    wanted = dict(ours.model.named_parameters())
    for k, p in theirs.model.named_parameters():
        assert torch.allclose(p, wanted[k], atol=1e-5), k
    assert any(not torch.equal(p, before[k]) for k, p in first.items()) and out.training_loss > 0
    loss, found = trainer.compute_loss(theirs.model, Groups(theirs, pictures, s)[0][0], return_outputs=True)
    assert found["rows"].shape == (15, 32) and loss.requires_grad


# --- the entry point

@pytest.mark.slow
def test_the_loss_teaches_places(folders):
    def run(weight):
        vlm, s = VLM(*tiny_llava(seed=3), "tiny"), replace(SMALL, steps=60, every=30, lr=1e-2, weight=weight)
        return finetune(vlm, folders["pictures"], folders["benchmark"], random_ids(), None, s, progress=False)
    learnt, control = run(20.), run(0.)
    for key in ("id_loss", "lm_loss"): assert learnt[0][key] == control[0][key], "the same pictures and weights"
    end = learnt[-1]["training"][1]
    assert end < learnt[0]["id_loss"] - .03 and end < control[-1]["training"][1] - .03
    assert set(learnt[0]["accuracy"]) == {"left_right", "above_below", "all"} and len(learnt[0]["right"]) == 12


def stored(folder, family="qwen2_vl"):
    model, processor = tiny(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


ARGS = ["--last-k", "1", "--layer", "2", "--steps", "4", "--every", "2", "--held", "2", "--lr", "1e-3"]


@pytest.mark.slow
def test_qwen_through_the_command_line(tmp_path, folders, capsys):
    model = stored(tmp_path / "qwen")
    data = [str(folders["pictures"]), str(folders["benchmark"]), "--ids", str(folders["ids"])]
    args = [str(model), *data, "--out", str(tmp_path / "out"), *ARGS]
    assert ft.main(args) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in said[-3:]] == ["0", "2", "4"]
    log = json.loads((tmp_path / "out/log.json").read_text())
    again = VLM.load(str(tmp_path / "out/model"))
    assert again.run(Benchmark(folders["benchmark"])[0].query()).logits.isfinite().all()
    old, new = dict(VLM.load(str(model)).model.named_parameters()), dict(again.model.named_parameters())
    assert {k for k in old if not torch.equal(old[k], new[k])} == set(unfreeze(again, 1))
    assert ft.main(args) == 0
    assert json.loads((tmp_path / "out/log.json").read_text()) == log, "a finished run is not repeated"
    assert ft.main([*args, "--weight", "2"]) == 1 and "other settings, pictures or weights" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path, folders, capsys):
    model, out = str(stored(tmp_path / "qwen")), ["--out", str(tmp_path / "out")]
    pictures, bench = str(folders["pictures"]), str(folders["benchmark"])
    random_ids(width=48).save(tmp_path / "wide.safetensors")
    ids = ["--ids", str(folders["ids"]), *out, *ARGS]
    bad = [([str(tmp_path / "no"), bench, *ids], "no folder"),
           ([pictures, bench, *ids, "--layer", "9"], "has 4 blocks, so --layer 9"),
           ([pictures, bench, *ids, "--ids", str(tmp_path / "wide.safetensors")], "are 48 wide, but qwen is 32 wide"),
           ([pictures, bench, *ids, "--ids", str(tmp_path / "none")], "extract first"),
           ([pictures, str(tmp_path), *ids], "holds no COCO-spatial"),
           ([pictures, bench, *ids, "--last-k", "7"], "uses 2 vision blocks")]
    for args, words in bad:
        assert ft.main([model, *args]) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert words in said[-1] and said[-1].startswith("spatialid.finetune: "), said
        assert "Traceback" not in "".join(said), said


@pytest.mark.slow
def test_bfloat16_keeps_what_learns_in_float32(folders):
    def run(vlm, s):
        return finetune(vlm, folders["pictures"], folders["benchmark"], random_ids(), None, s, progress=False)
    vlm = VLM(*tiny_llava(dtype=torch.bfloat16), "tiny")
    log = run(vlm, replace(SMALL, precision="bf16"))
    assert all(p.dtype == torch.float32 for p in unfreeze(vlm, 1).values())
    assert vlm.model.lm_head.weight.dtype == torch.bfloat16
    wide = run(VLM(*tiny_llava(), "tiny"), SMALL)
    assert abs(log[0]["lm_loss"] - wide[0]["lm_loss"]) < .1 and abs(log[0]["id_loss"] - wide[0]["id_loss"]) < .05


# --- killed, shared

RUN = """
import sys, torch; torch.set_num_threads(1); sys.path.insert(0, {here!r})
from dataclasses import replace
from test_finetune import SMALL, random_ids
from tiny import tiny_llava
from spatialid.finetune import finetune
from spatialid.hooks import VLM
settings = replace(SMALL, steps=8, every=2, groups=2, lr=1e-2)
finetune(VLM(*tiny_llava(), "tiny"), {pictures!r}, {benchmark!r}, random_ids(), {out!r}, settings, progress=False)
"""


def start(out, folders, launcher=(), **env):
    given = {name: str(folders[name]) for name in ("pictures", "benchmark")}
    script, quiet = Path(out).with_suffix(".py"), subprocess.DEVNULL
    script.write_text(RUN.format(here=str(Path(__file__).parent), out=str(out), **given))
    command = [*(launcher or [sys.executable]), str(script)]
    return subprocess.Popen(command, env=os.environ | env, stdout=quiet, stderr=quiet)


def state(out): return json.loads((out / "log.json").read_text()), load_file(out / "checkpoint.safetensors")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_identically_and_two_processes_are_one(tmp_path, folders):
    whole, cut, two = tmp_path / "whole", tmp_path / "cut", tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    p, first = start(cut, folders), start(whole, folders)
    shared = start(two, folders, torchrun, ACCELERATE_USE_CPU="true")
    step = -1
    while step < 2 and p.poll() is None:
        time.sleep(.01)
        if (cut / "log.json").is_file(): step = json.loads((cut / "log.json").read_text())[-1]["step"]
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert 2 <= state(cut)[0][-1]["step"] < 8, "killed too late to test anything"
    assert first.wait(200) == 0 and start(cut, folders).wait(200) == 0
    (a_log, a), (b_log, b) = state(whole), state(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(k.startswith("exp_avg.") for k in a)
    assert [e["right"] for e in a_log] == [e["right"] for e in b_log] and a_log[-1]["lm_loss"] == b_log[-1]["lm_loss"]
    assert shared.wait(300) == 0
    two_log, c = state(two)
    for one, other in zip(a_log, two_log):
        assert one["step"] == other["step"] and one["right"] == other["right"]
        assert all(abs(one[k] - other[k]) < 1e-5 for k in ("lm_loss", "id_loss"))
        assert one["training"] is None or np.allclose(one["training"], other["training"], atol=1e-5)
    assert all(torch.allclose(a[k], c[k], atol=1e-5) for k in a)


# --- arms and statistics

def test_a_frozen_tower_is_computed_once_and_nothing_changes(folders, monkeypatch):
    "The slow way is the oracle: no features kept. Batches and features are shared by runs on the same pictures."
    s, drawn = replace(SMALL, learns="language"), scenes()
    def run(pictures, settings=s):
        vlm = VLM(*tiny_llava(dtype=torch.float64), "tiny")
        return finetune(vlm, pictures, folders["benchmark"], random_ids(), None, settings, progress=False)
    slow = run(Pictures.of(drawn))
    shared = Pictures.of(drawn, keep=True)
    first, made = run(shared), len(shared.kept["vision"])
    assert made > 0 and shared.split()[0] is shared.split()[0]
    again = run(shared)
    assert len(shared.kept["vision"]) == made, "the second run computes no features"
    for one in (first, again):
        assert [e["right"] for e in one] == [e["right"] for e in slow]
        assert all(abs(a[k] - b[k]) < 1e-12 for a, b in zip(one, slow) for k in ("lm_loss", "id_loss"))
    assert "get_image_features" not in vars(VLM(*tiny_llava(), "tiny").model.model)
    tower = Pictures.of(drawn, keep=True)
    run(tower, SMALL)
    assert "vision" not in tower.kept, "a tower that learns is computed every time"


@pytest.mark.slow
def test_arms_start_from_the_same_weights_and_a_second_call_goes_on(tmp_path, folders, monkeypatch):
    model = stored(tmp_path / "llava", "llava")
    s = replace(SMALL, steps=2, every=2, lr=1e-2)
    arms = {"no loss": replace(s, weight=0.), "spatial loss": s, "again": s}
    world = dict(pairs=grid_pairs(6), sizes=(224,), px=16, background="black")
    given = world, folders["benchmark"], folders["ids"], tmp_path / "runs"
    logs = ft.run_seed(str(model), arms, 5, *given)
    assert logs["spatial loss"] == logs["again"] and logs["no loss"][0] == logs["spatial loss"][0] | {"training": None}
    assert logs["no loss"][-1]["id_loss"] != logs["spatial loss"][-1]["id_loss"]
    weights = tmp_path / "runs/spatial-loss/5/checkpoint.safetensors"
    written = weights.stat().st_mtime_ns
    pools, pool = [], ft.ProcessPoolExecutor
    monkeypatch.setattr(ft, "ProcessPoolExecutor", lambda *a: pools.append(a) or pool(*a))
    assert ft.run_seeds([5], str(model), arms, *given, processes=2) == [logs]
    assert weights.stat().st_mtime_ns == written, "a finished run is read, not repeated"
    assert [ft.end_with_parent in a for a in pools] == [True], "killed, it leaves no process behind"
    found = ft.gathered([logs, logs], [5, 6])["spatial loss"]
    assert found["seeds"] == [5, 6] and found["steps"] == [0, 2]
    assert np.shape(found["all"]) == (2, 2) and len(found["right"][0]) == 12
    assert abs(ft.bits(found)[0].mean() - found["all"][0][-1]) < 1e-12


def test_held_out_pairs(folders):
    rows = Benchmark(folders["benchmark"])
    names = sorted({n for r in rows for n in (r.subject, r.object)})
    free = ft.unused_pairs(rows, names)
    used = {(r.subject, r.object) for r in rows}
    assert free and all((a, b) not in used and (b, a) not in used for a, b in free)
    assert len(free) == len(names) * (len(names) - 1) - 2 * len({frozenset(p) for p in used})
    drawn = ft.training_pairs([folders["benchmark"]] * 2, names, 5, seed=1)
    assert len(drawn) == 5 and set(drawn) <= set(free) and drawn == sorted(drawn)
    assert ft.training_pairs([folders["benchmark"]], names, 5, seed=2) != drawn
    assert set(ft.training_pairs([folders["benchmark"]], names, 10**6, seed=1)) == set(free)


def test_statistics():
    g = np.random.default_rng(0)
    one = ft.over_seeds([1., 2., 3.])
    assert one["value"] == 2 and abs(one["high"] - 2 - 4.302652729911275 / 3**.5) < 1e-9 and one["n"] == 3
    with pytest.raises(ValueError, match="at least two"): ft.over_seeds([1.])
    assert ft.sign_flips([1, 1, 1, 1]) == 2 / 16 and ft.sign_flips([1, -1, 1, -1]) == 1.
    covered, S, R = 0, 6, 60
    for i in range(200): # effects of seeds and of rows around a mean of .1
        d = .1 + .1 * g.normal(size=(S, 1)) + .5 * g.normal(size=(1, R)) + .3 * g.normal(size=(S, R))
        found = ft.crossed(d, n=300)
        covered += found["low"] <= .1 <= found["high"]
    assert .88 <= covered / 200 <= 1, covered
    a, b = ({"right": r} for r in (["1110", "1111"], ["1100", "1101"]))
    d = ft.compared(a, b)
    assert d["both"]["value"] == d["seeds"]["value"] == d["rows"]["value"] == .25
    assert ft.compared(a, b, np.array([True, True, False, False]))["both"]["value"] == 0


# --- what the notebook does with it

def arm(final, steps=(0, 5, 10), **tables):
    "An arm of two seeds and four questions, as `gathered`: the digits at the end, and tables (seed, measurement)."
    rising = [[.5, .75, 1.], [.5, .5, .75]]
    measured = {key: rising for key in ft.MEASURED} | tables
    return {"seeds": [3, 4], "steps": list(steps), "right": final, **measured}


KINDS = ["left_right", "left_right", "above_below", "above_below"]


def logs():
    falling = [[.9, .5, .3], [.9, .6, .5]]
    return {"no loss": arm(["1100", "1100"]), "spatial loss": arm(["1110", "1101"], id_loss=falling),
            "permuted places": arm(["0000", "1111"])}


def test_differences_of_arms():
    found = ft.differences_of(logs(), KINDS)
    assert list(found) == ["loss – no loss", "loss – permuted places", "permuted places – no loss"], "that there are"
    one = found["loss – no loss"]
    assert {part: d["both"]["value"] for part, d in one.items()} == {"all": .25, "left_right": 0, "above_below": .5}
    rows = ft.difference_rows(found)
    assert rows["loss – no loss, above_below"]["over seeds"].startswith("+50.0 [")
    text = number_table(rows, corner="points").splitlines()
    assert len(text) == 2 + 9 and text[0].startswith("| points | both | says |")


def test_words_for_intervals():
    assert ft.points(dict(value=.0123, low=-.004, high=.1)) == "+1.2 [-0.4, +10.0]"
    ends = [(.1, .2), (-.2, -.1), (-.1, .1)]
    assert [ft.direction(dict(low=a, high=b)) for a, b in ends] == ["more", "less", "not told from chance"]


def test_differences_of_the_sweep():
    swept = {"w = 3": {"seeds": [4], "right": ["1111"]}}
    with pytest.raises(ValueError, match="at least two"): ft.swept_differences(logs(), swept, KINDS, "w = 1")
    swept = {"w = 3": {"seeds": [4, 3], "right": ["1111", "1100"]}}
    found = ft.swept_differences(logs(), swept, KINDS, "w = 1")
    assert {name: one["all"]["both"]["value"] for name, one in found.items()} == {"w = 1": .25, "w = 3": .25}
    assert ft.swept_differences(logs(), None, KINDS, "w = 1") == {}
    fig = Figure()
    ft.plot_sweep(fig, found, "tiny")
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["w = 1", "w = 3"]
    assert "2 seeds" in fig.get_suptitle() and fig.axes[2].get_title() == "above/below"


def test_readings_of_the_claims():
    a, b = arm([], all=[[.5, .9, 1.], [.5, .5, .6]]), arm([], all=[[.5, .6, .9], [.5, .6, .7]])
    assert ft.first_reached(a, .9).tolist() == [.5, 1.] and ft.first_reached(b, .9).tolist() == [1., 1.]
    assert ft.speed_gain(a, b, "tiny")["value"] == .25
    able = arm([], all=[[.95, 1, 1], [.9, 1, 1]])
    assert ft.speed_gain(a, able, "tiny") == {"value": None, "low": None, "high": None, "n": 2,
                                              "not_judged": "tiny answers 92.5% right before any training"}
    falls = ft.id_loss_falls(logs())
    assert abs(falls["spatial loss"]["value"] - .5) < 1e-12 and falls["no loss"]["value"] < 0
    never = arm([], all=[[.5, .5, .5], [.5, .6, .6]])
    assert ft.speed_gain(never, never, "tiny")["not_judged"] == "no run reaches 90%"


def test_a_plateau_is_the_last_third_of_the_steps():
    falls = dict(steps=(0, 4, 8, 12), all=[[.25, 0, .75, .5], [.25, 1, .75, .5]])
    without = arm(["1100", "1100"], **falls)
    assert ft.last_third(without) == slice(2, None) and ft.last_third(arm([], steps=(0, 5, 10))) == slice(2, None)
    of = ft.gains(without)
    values = {name: one["value"] for name, one in of.items()}
    assert values == {"start": .25, "end": .5, "gain": .25, "last third": -.25}
    # without the loss: .5 at the end, .625 over the last third of the steps; with it .75
    assert abs(ft.plateau_gain(logs()["spatial loss"], without)["value"] - .125) < 1e-12
    rising = arm(["1100", "1100"], steps=(0, 4, 8, 12), all=[[.25, 0, .48, .5], [.25, 1, .5, .5]])
    late = ft.plateau_gain(logs()["spatial loss"], rising)
    assert late["value"] is None and late["n"] == 2 and late["not_judged"] == (
        "without the loss accuracy still gains 1.0 points over the last third of the steps: no plateau yet")
    idle = arm(["1100", "1100"], all=[[.5, .75, .5], [.5, .75, .5]])
    assert ft.plateau_gain(logs()["spatial loss"], idle)["not_judged"] == (
        "without the loss accuracy changes by +0.0 points from first to last: there is no plateau that it rose to")
    row = ft.set_up_row({"arms": logs(), "differences": ft.differences_of(logs(), KINDS)})
    assert list(row) == ["start", "no loss, end", "it gains", "in the last third", "loss – no loss",
                         "loss – permuted places", "seeds", "questions"]
    assert row["start"] == "0.500" and row["seeds"] == "2" and row["loss – no loss"].startswith("+25.0 [")


def test_tables_of_the_arms():
    found = ft.mean_rows(logs())
    assert len(found) == 3 * 5
    assert found["no loss: accuracy"] == {"step 0": "0.500", "step 5": "0.625", "step 10": "0.875"}
    ends = ft.end_rows(logs())
    assert ends["spatial loss"]["ID loss"].startswith("0.400 [") and ends["no loss"]["accuracy"].startswith("0.875 [")
    assert ft.run_label("tiny", logs(), "full run", 6) == "tiny, full run: 2 seeds, 10 steps, 4 questions, ℓ = 6"


def test_figures():
    fig = Figure()
    ft.plot_a10(fig, logs(), "tiny")
    assert [ax.get_ylabel()[:7] for ax in fig.axes] == ["LM loss", "ID loss", "accurac", "accurac"]
    lines = [bars.lines[0] for bars in fig.axes[1].containers]
    assert np.allclose(lines[1].get_ydata(), [.9, .55, .4]) and len(lines) == 3
    queries = [question(scenes()[i], "left_right") for i in range(15)]
    group_fig = Figure()
    ft.plot_group(group_fig, queries)
    titles = [ax.get_title() for ax in group_fig.axes]
    assert titles == [q.truth or "–" for q in queries] + [""] and "–" in titles


def test_arms_of_search_sweep_and_short_run():
    base = replace(SMALL, steps=100, every=25, layer=2)
    rates = ft.rate_arms(base)
    assert [s.lr for s in rates.values()] == list(ft.RATES)
    assert {(s.weight, s.steps) for s in rates.values()} == {(0, 100)}
    def log(*shares): return [{"step": 50 * k, "accuracy": {"all": share}} for k, share in enumerate(shares)]
    ends, by_step = ft.searched({"lr 0.001": log(.5, .7, .8), "lr 0.01": log(.5, .9, .7)})
    assert ends == {"0.001": .8, "0.01": .7} and by_step == {"0": .5, "50": .7, "100": .8}
    swept = ft.swept_arms(base, [1, 2, 3, 4])
    assert list(swept) == ["w = 0.3", "w = 3", "w = 10", "ℓ = 1", "ℓ = 4"]
    assert swept["w = 3"].weight == 3 and swept["ℓ = 4"].layer == 4 and swept["ℓ = 4"].weight == base.weight
    arms = {name: replace(base, **change) for name, change in ft.ARMS.items()}
    short = ft.short_arms(arms)
    assert list(short) == ["no loss", "spatial loss", "permuted places"] and short["permuted places"].permuted
    assert {(s.steps, s.every, s.held) for s in short.values()} == {(8, 8, 2)}


def test_losses_before_training(llava):
    batches, ids = [group(llava)[0], group(llava, start=15)[0]], random_ids()
    found = ft.id_losses(llava, ids, batches)
    assert list(found) == ids.layers
    wanted = [group_loss(llava, SpatialIDLoss(ids, 3, permuted=0), [batch])[1] for batch in batches]
    assert abs(found[3]["permuted places"] - np.mean(wanted)) < 1e-9
    assert found[3]["permuted places"] != found[3]["true places"]
    rows = ft.word_rows(llava, batches[0], [1, 3, 4])
    for layer, of in rows.items(): assert torch.equal(of, ft.answer_loss(llava, batches[0], layer)[1]), layer
    assert ft.rounded({"a": .12345}) == {"a": "0.123"}


def test_word_and_ids_belong_together(monkeypatch):
    "The loss of the finished model on its own IDs is small where the noun read is the noun of the IDs."
    monkeypatch.setenv("SPATIALID_RESULTS", str(Path(__file__).parents[1]))
    finished, pictures = VLM.load("qwen2vl-tiny"), Pictures.of(scenes(px=80, background="noise"))
    by_slot = {slot: stored_ids(finished, "qwen2vl-tiny", slot) for slot in ("first", "second")}
    found = ft.slot_losses(finished, by_slot, pictures, replace(SMALL, layer=6), n=1)
    assert list(found) == ["subject, left_right", "subject, above_below", "object, left_right", "object, above_below"]
    for kind in ("left_right", "above_below"):
        row = found[f"subject, {kind}"]
        assert row["IDs of the first noun"] < .25 and row["IDs of the second noun"] > .4, row
    read = found["object, left_right"]
    assert read["IDs of the second noun"] < read["IDs of the first noun"] - .2, read


def test_the_start_is_the_early_checkpoint_where_there_is_one():
    assert ft.start_of("qwen2vl-tiny") == "qwen2vl-tiny-early" and ft.start_of("mllama-tiny") == "mllama-tiny"
    assert ft.SLOT_OF == {"subject": "first", "object": "second"}


def test_exchanged_parts():
    early, finished = VLM.load("llava-tiny-early"), VLM.load("llava-tiny")
    queries = [question(scenes(px=80)[i], kind) for i in range(8) for kind in ("left_right", "above_below")]
    queries = [q for q in queries if q.truth]
    assert {q.kind for q in queries} == {"left_right", "above_below"}
    found = ft.parts_exchanged(early, finished, queries)
    names = ("llava-tiny-early", "llava-tiny")
    assert list(found) == [f"{a} on {b}" for a in names for b in names]
    for vlm in (early, finished):
        beliefs = vlm.run(queries).beliefs
        for kind, share in found[f"{vlm.name} on {vlm.name}"].items():
            assert share == np.mean([b == q.truth for b, q in zip(beliefs, queries) if q.kind == kind])


def test_a_stored_full_run_is_of_these_weights(tmp_path, monkeypatch, llava):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    assert ft.stored_full_run(llava, "tiny") is None
    def store(quick, weight_hash):
        origin = {"params": {"quick": quick}, "weight_hash": weight_hash}
        (tmp_path / "results/tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / "results/tiny/07_finetune.json").write_text(json.dumps({"provenance": origin, "found": 1}))
        return ft.stored_full_run(llava, "tiny")
    assert store(False, llava.weight_hash)["found"] == 1
    assert store(True, llava.weight_hash) is None and store(False, "other") is None


def test_a_benchmark_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
    folder = ft.scene_benchmark("main", 4, 0, 32)
    assert len(Benchmark(folder)) == 4 and folder.is_relative_to(tmp_path)
    monkeypatch.setattr(ft, "write_benchmark", None)
    assert ft.scene_benchmark("main", 4, 0, 32) == folder


def test_a_log_as_text():
    entry = {"step": 20, "lm_loss": .5, "id_loss": .25, "accuracy": {"left_right": .75, "all": 1.}}
    assert ft.log_text([entry]) == "step     20  LM loss 0.500  ID loss 0.250  left_right 0.750  all 1.000"
