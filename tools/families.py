"""The parity matrix: what must be true of every family, checked on a tiny random model with its real processor. `python tools/families.py` writes
`results/families.json`, which the site and `spatialid models` show."""
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from spatialid.hooks import FAMILIES, Query, VLM
from spatialid.results import results_root, write_json
from spatialid.sweeps import in_float64, sweep

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from tiny import tiny  # noqa: E402

LR = "Is the {subject} to the left or right of the {object}?"
GROUPS = {"image": "image", "text": "text", "subject": "subject", "objects": "objects", "answers": "answers", "last": "last", "all": "all",
          "neighbours": lambda query: (-3, -7), "object and image": ("object", "image")}
LIMITS = {"no-op hooks": 0, "capture": 0, "patch with itself": 0, "patch everything": 1e-5, "batch = singles": 1e-9, "load from a folder": 1e-5,
          "fast sweep": 1e-9}


def ask(seed, video, template=LR, **words):
    "A query about noise: one picture, or four frames."
    frames = [Image.fromarray(np.random.default_rng((seed, i)).integers(0, 255, (20, 20, 3), dtype=np.uint8)) for i in range(4)]
    return Query(frames if video else frames[0], template, {"subject": "cup", "object": "star", **words}, ("left", "right"), "left")


def gap(a, b): return (a - b).abs().max().item()


def captured(vlm, query, layers):
    "The largest difference between captured rows and what a hook of our own sees the next block, or the final norm, receive."
    text, seen = vlm.model.get_submodule(FAMILIES[vlm.model.config.model_type].text), {}
    def see(l): return lambda module, args: seen.setdefault(l, args[0])
    hooks = [module.register_forward_pre_hook(see(l)) for l, module in zip(layers, [*list(text.layers)[1:], text.norm])]
    with torch.no_grad(): vlm.model(**vlm.encode([query]))
    for hook in hooks: hook.remove()
    run = vlm.run(query, layers)
    return max(gap(run.residual(l), seen[l]) for l in layers)


def everything(vlm, base, other, layers, group):
    """The largest difference from the other run when all of it is patched in at a layer: tokens and, in Mllama, cross-attention states. Qwen3-VL
    adds the picture again after its first blocks, so what they add is patched in as well."""
    again = len(getattr(vlm.model.config.vision_config, "deepstack_visual_indexes", ()))
    gaps = []
    for l in layers:
        with vlm.patch({k: (group, other) for k in range(l, max(l, again) + 1)}): gaps.append(gap(vlm.run(base).logits, other.logits))
    return max(gaps)


def reloaded(vlm, query):
    "The difference that saving a model to a folder and loading it makes."
    with tempfile.TemporaryDirectory() as folder:
        for part in (vlm.model, vlm.processor): part.save_pretrained(folder)
        return gap(VLM.load(folder, device="cpu").run(query).logits, vlm.run(query).logits)


def swept(vlm, base, source):
    "The largest difference of a logit between the fast sweep and one whole forward pass per cell."
    fast, plain = (sweep(vlm, base, source, GROUPS, plain=plain, logits=True) for plain in (False, True))
    assert (fast.path, plain.path) == ("fast", "plain")
    return max(gap(torch.as_tensor(fast.logits[name]), torch.as_tensor(plain.logits[name])) for name in GROUPS)


def checks(family, video):
    "{check: largest difference} of one family for one medium."
    vlm = VLM(*tiny(family), family)
    layers, base, source = range(1, vlm.n_layers + 1), ask(0, video), ask(1, video)
    whole = ("image", "all") if vlm.family.cross else "all"
    own, other = (vlm.run(q, layers, (whole, "image", "text", "objects")) for q in (base, source))
    assert gap(own.logits, other.logits) > .1  # the picture matters
    found = {}
    with vlm.patch({l: (whole, lambda rows: rows) for l in layers}): found["no-op hooks"] = gap(vlm.run(base, layers).logits, vlm.run(base).logits)
    found["capture"] = captured(vlm, base, layers)
    def again(group):
        with vlm.patch({l: (group, own) for l in layers}): return gap(vlm.run(base).logits, own.logits)
    found["patch with itself"] = max(map(again, (whole, "image", "text", "objects")))
    found["patch everything"] = everything(vlm, base, other, layers, whole)
    mixed = [base, ask(2, video, subject="umbrella", object="hot dog"), ask(3, video, "Is the {subject} left of the {object}, or right?")]
    if not vlm.family.cross: mixed.append(Query(None, "Is a {subject} a {object}?", base.words, base.answers))
    exact = in_float64(VLM(*tiny(family), family))
    batch, singles = exact.run(mixed, layers, "objects"), [exact.run(q, layers, "objects") for q in mixed]
    found["batch = singles"] = max(max(gap(batch.logits[i], one.logits[0]), *(gap(batch.residual(l)[i], one.residual(l)[0]) for l in layers))
                                   for i, one in enumerate(singles))
    found["load from a folder"] = reloaded(vlm, base)
    if vlm.family.fast:
        found["fast sweep"] = swept(exact, [base, mixed[1]], [source, ask(4, video, subject="umbrella", object="hot dog")])
    return found


def rows(families=FAMILIES):
    "[{family, check, medium, ok, value, limit}], one for each family, medium and check."
    return [dict(family=family, check=check, medium=("image", "video")[video], ok=value <= LIMITS[check], value=value, limit=LIMITS[check])
            for family in families for video in ((False, True) if FAMILIES[family].frames else (False,)) for check, value in checks(family, video).items()]


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found = rows()
    path = results_root() / "results" / "families.json"
    write_json(path, {"rows": found, "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")}})
    bad = [f"{row['family']} ({row['medium']}), {row['check']}: {row['value']:.2g} > {row['limit']}" for row in found if not row["ok"]]
    print(f"{len(found)} checks of {len(FAMILIES)} families, {len(bad)} failed: {path}", *bad, sep="\n")
