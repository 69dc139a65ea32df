"""How many passes through the blocks the short run of every notebook makes, which scales the plans of `spatialid plan`.

`python tools/forwards.py` runs them on a small model, a deep one and one of videos, and writes
`results/forwards.json`; with names of models it counts those again."""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from spatialid.plan import DESIGNS, counted_runs
from spatialid.runner import experiments
from spatialid.store import results_root, write_json
from spatialid.trial import run_counted

MODELS = "llava-tiny", "llava-smol", "onevision-tiny"


def count(stem, model, folder, seconds=1800):
    "The passes of the short run of one notebook. SystemExit where it fails."
    outcome = run_counted(stem, model, folder, seconds, quick=True)
    if outcome.state != "passed": sys.exit(f"{stem}, {model}: {outcome.state}, {outcome.why}")
    print(f"{stem}, {model}: {outcome.counts} in {outcome.seconds:.0f} s", flush=True)
    return {"model": model, "quick": True, **{name: round(number, 2) for name, number in outcome.counts.items()}}


def keep(stem, found):
    "Write what was counted, in place of an older count of the same notebook and model."
    runs = counted_runs()
    others = [run for run in runs.get(stem, []) if run["model"] != found["model"]]
    write_json(results_root()/"results"/"forwards.json", {**runs, stem: [*others, found]})


def main(models):
    "Count, and write each as it comes."
    for model in models:
        stems = {path.stem for path in experiments(model)} & DESIGNS.keys()
        with TemporaryDirectory() as folder:
            for stem in sorted(stems, key=lambda stem: (stem != "03_extraction", stem)):  # its IDs are for the others
                keep(stem, count(stem, model, Path(folder)))


if __name__ == "__main__": main(sys.argv[1:] or MODELS)
