"""How many passes through the blocks the short run of every notebook makes, which scales the plans of `spatialid plan`.

`python tools/forwards.py` runs them on small models and writes `results/forwards.json`; with names of notebooks it
counts those again."""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from spatialid.plan import DESIGNS, counted_runs
from spatialid.store import results_root, write_json
from spatialid.trial import run_counted

MODELS = {"08_temporal": "onevision-tiny"}  # elsewhere llava-tiny


def count(stem, folder, seconds=900):
    "The passes of the short run of one notebook. SystemExit where it fails."
    model = MODELS.get(stem, "llava-tiny")
    outcome = run_counted(stem, model, folder, seconds, quick=True)
    if outcome.state != "passed": sys.exit(f"{stem}: {outcome.state}, {outcome.why}")
    print(f"{stem}: {outcome.counts} in {outcome.seconds:.0f} s", flush=True)
    return {"model": model, "quick": True, **outcome.counts}


def main(stems):
    "Count, and write each as it comes."
    with TemporaryDirectory() as folder:
        for stem in sorted(DESIGNS, key=lambda stem: stem != "03_extraction"):  # whose IDs others take
            if stem not in stems and stem != "03_extraction": continue
            found = count(stem, Path(folder))
            write_json(results_root()/"results"/"forwards.json", {**counted_runs(), stem: found})


if __name__ == "__main__": main(sys.argv[1:] or [*DESIGNS])
