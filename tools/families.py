"""The parity matrix: what must be true of every family, checked on a tiny random model with its real processor.

`python tools/families.py` writes `results/families.json`, which the site and `spatialid models` show."""
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.query import Query
from spatialid.store import results_root, write_json
from spatialid.sweeps import in_float64, sweep

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from tiny import tiny  # noqa: E402

LR = "Is the {subject} to the left or right of the {object}?"
GROUPS = {name: name for name in ("image", "text", "subject", "objects", "answers", "last", "all")}
GROUPS |= {"neighbours": lambda query: (-3, -7), "object and image": ("object", "image")}
LIMITS = {"no-op hooks": 0, "capture": 0, "patch with itself": 0, "patch everything": 1e-5, "batch = singles": 1e-9,
          "load from a folder": 1e-5, "fast sweep": 1e-9}


def ask(seed, video, template=LR, **words):
    "A query about noise: one picture, or four frames."
    noise = [np.random.default_rng((seed, i)).integers(0, 255, (20, 20, 3), dtype=np.uint8) for i in range(4)]
    frames, words = [Image.fromarray(pixels) for pixels in noise], {"subject": "cup", "object": "star", **words}
    return Query(frames if video else frames[0], template, words, ("left", "right"), "left")


def gap(a, b): return (a - b).abs().max().item()


def captured(vlm, query, layers):
    "The largest difference between captured rows and what a hook sees the next block, or the final norm, receive."
    text, seen = vlm.model.get_submodule(FAMILIES[vlm.model.config.model_type].text), {}
    def see(l): return lambda module, args: seen.setdefault(l, args[0])
    hooks = [module.register_forward_pre_hook(see(l)) for l, module in zip(layers, [*list(text.layers)[1:], text.norm])]
    with torch.no_grad(): vlm.model(**vlm.encode([query]))
    for hook in hooks: hook.remove()
    run = vlm.run(query, layers)
    return max(gap(run.residual(l), seen[l]) for l in layers)


def everything(vlm, base, other, layers, group):
    """The largest difference from the other run when all of it is patched in at a layer.

    All: tokens and, in Mllama, cross-attention states. Qwen3-VL adds the picture again after its first blocks,
    so what they add is patched in as well."""
    again = len(getattr(vlm.model.config.vision_config, "deepstack_visual_indexes", ()))
    gaps = []
    for l in layers:
        with vlm.patch({k: (group, other) for k in range(l, max(l, again) + 1)}):
            gaps.append(gap(vlm.run(base).logits, other.logits))
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


def unchanged(vlm, query, layers, group):
    "The largest difference that a patch function makes which gives the rows back as they are."
    with vlm.patch({l: (group, lambda rows: rows) for l in layers}): hooked = vlm.run(query, layers).logits
    return gap(hooked, vlm.run(query).logits)


def itself(vlm, query, run, layers, groups):
    "The largest difference that patching a run's own rows makes, over the groups."
    gaps = []
    for group in groups:
        with vlm.patch({l: (group, run) for l in layers}): gaps.append(gap(vlm.run(query).logits, run.logits))
    return max(gaps)


def batched(vlm, queries, layers):
    "The largest difference between queries of unequal length in a batch and alone: logits and rows of the objects."
    batch, gaps = vlm.run(queries, layers, "objects"), []
    for i, query in enumerate(queries):
        single = vlm.run(query, layers, "objects")
        gaps += [gap(batch.logits[i], single.logits[0])]
        gaps += [gap(batch.residual(l)[i], single.residual(l)[0]) for l in layers]
    return max(gaps)


def checks(family, video):
    "{check: largest difference} of one family for one medium."
    vlm, exact = VLM(*tiny(family), family), in_float64(VLM(*tiny(family), family))
    layers, base, source = range(1, vlm.n_layers + 1), ask(0, video), ask(1, video)
    whole = ("image", "all") if vlm.family.cross else "all"
    groups = (whole, "image", "text", "objects")
    own, other = (vlm.run(q, layers, groups) for q in (base, source))
    assert gap(own.logits, other.logits) > .1  # the picture matters
    longer, other_longer = (ask(seed, video, subject="umbrella", object="hot dog") for seed in (2, 4))
    mixed = [base, longer, ask(3, video, "Is the {subject} left of the {object}, or right?")]
    if not vlm.family.cross: mixed.append(Query(None, "Is a {subject} a {object}?", base.words, base.answers))
    found = {"no-op hooks": unchanged(vlm, base, layers, whole), "capture": captured(vlm, base, layers),
             "patch with itself": itself(vlm, base, own, layers, groups),
             "patch everything": everything(vlm, base, other, layers, whole),
             "batch = singles": batched(exact, mixed, layers), "load from a folder": reloaded(vlm, base)}
    if vlm.family.fast:
        found["fast sweep"] = swept(exact, [base, longer], [source, other_longer])
    return found


def rows(families=FAMILIES):
    "[{family, check, medium, ok, value, limit}], one for each family, medium and check."
    found = []
    for family in families:
        for medium in ("image", "video") if FAMILIES[family].frames else ("image",):
            for check, value in checks(family, medium == "video").items():
                limit = LIMITS[check]
                row = dict(family=family, check=check, medium=medium, ok=value <= limit, value=value, limit=limit)
                found.append(row)
    return found


def main():
    "Checks all families, writes the matrix and names what failed."
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found, path = rows(), results_root() / "results" / "families.json"
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    write_json(path, {"rows": found, "versions": versions})
    bad = [row for row in found if not row["ok"]]
    print(f"{len(found)} checks of {len(FAMILIES)} families, {len(bad)} failed: {path}")
    for row in bad: print("{family} ({medium}), {check}: {value:.2g} > {limit}".format(**row))


if __name__ == "__main__": main()
