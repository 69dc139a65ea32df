"A plan says from a config what a run takes, and a trial runs everything small: both hold what they say."
import json
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from transformers import LlavaConfig

from spatialid import bench, cli, plan, runner, sweeps, trial
from spatialid.families import FAMILIES
from spatialid.hooks import VLM
from spatialid.plan import Passes, Question, blueprint
from spatialid.registry import HUB
from tiny import tiny

LLAVA_7B = Question(tokens=609, tail=29, patches=576)


def saved(folder, family="llava", **shape):
    "A folder with a tiny model of a family."
    model, processor = tiny(family, seed=1, **shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def llava_7b(folder):
    "The Blueprint of LLaVA-1.5-7B, whose sizes are the defaults of its config."
    folder.mkdir(exist_ok=True)
    LlavaConfig(dtype="bfloat16").save_pretrained(folder)
    return blueprint(str(folder/"config.json"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bench_has_questions_for_every_family(family):
    vlm = VLM(*tiny(family), family)
    work = bench.mirror_work(vlm, 2)
    T = len(vlm.tokens(work.base[0]))
    assert len({vlm.encode([query])["input_ids"].shape for query in work.base}) == 1, "of one length"
    assert all(0 < bench.recomputed(work, name) <= T for name in work.edits)
    assert bench.recomputed(work, "image") == T or not vlm.family.cross
    assert bench.forward_equivalents(work)["ours"] < bench.forward_equivalents(work)["full_forward"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blueprint_is_the_model_without_its_weights(family, tmp_path):
    folder = saved(tmp_path/family, family)
    drawn, vlm = blueprint(folder), VLM(*tiny(family))
    assert drawn.parameters == sum(p.numel() for p in vlm.model.parameters())
    assert drawn.bytes == 4 * drawn.parameters and drawn.blocks == 4
    assert {p.device.type for p in drawn.model.parameters()} == {"meta"}
    question = plan.question_of(drawn)
    assert 0 < question.tail <= question.tokens and question.patches > 0 and question.counted


def test_what_is_known_of_llava_7b(tmp_path):
    "Weights of 14.2 GB, a peak of 15.5 to 16.2 GB while it sweeps, 576 tokens of a picture, 86,400 of them in 33 min."
    drawn = llava_7b(tmp_path/"7b")
    assert drawn.parameters == pytest.approx(7.06e9, rel=.01) and drawn.bytes == pytest.approx(14.2e9, rel=.01)
    question = plan.question_of(drawn)
    assert question == Question(576 + plan.TAIL, plan.TAIL, 576, counted=False)
    swept = drawn.bytes + plan.sweep_bytes(drawn, LLAVA_7B, on_gpu=True)
    assert 15.3e9 < swept < 16.4e9
    seconds = {"extract": [480 / 43], "plain": [480 / 57]}
    numbers = {"machine": {"gpu": "NVIDIA H200"}, "extraction": {"model": drawn.name, "time": {"seconds": seconds,
                                                                                            "images": 480}}}
    pace = plan.speed(drawn, LLAVA_7B, numbers)
    assert not pace.scaled and pace.measured_on == "NVIDIA H200"
    assert 86_400 * pace.seconds / 60 == pytest.approx(33, .02)


def test_the_papers_models_without_the_hub():
    "LLaVA is the default of its family; what is not is named, not made up."
    table = plan.paper_table().splitlines()
    assert "14.1 GB" in next(line for line in table if "llava-1.5-7b" in line)
    assert len(table) == len(HUB) + 2 and any("on the Hub alone" in line for line in table)


@pytest.mark.parametrize("family", ["llava", "mllama", "gemma3", "qwen3_vl"])
def test_a_sweep_keeps_as_much_as_it_is_planned_to(family):
    "As many questions at once as the sweep itself takes."
    vlm = VLM(*tiny(family))
    queries = bench.queries(vlm, 2)
    drawn = plan.Blueprint("tiny", vlm.model.config, torch.float32)
    question = Question(len(vlm.tokens(queries[0])), 20, 16)
    for memory in (2e6, 8e6, 3e7):
        planned = max(1, min(64, int(memory / 2 / plan.kept_bytes(drawn, question, 2))))
        assert planned == sweeps._queries_at_once(vlm, queries, 2, memory)


def test_the_papers_pictures():
    "90 pairs, 4 sizes, all 16 cells of the reference: 86,400."
    of = dict(n_pairs=90, n_prompt_pairs=90, sizes=[74, 124, 174, 224], references=16, quick=False)
    main = plan.pictures_of_extraction(plan.SimpleNamespace(**of))
    assert main == 86_400 + len(plan.PROMPTS) * 90 * 16 * 15


SETUP = """in_short(quick)
if quick:
    n_small, sizes = min(n_small, 5 if vlm.n_layers > 12 else 7), sizes[-1:]
vlm = VLM.load(model)
many = n_small * 2 if n_small else None
n_other = dict(a=n_small)
found = sweep(vlm)
"""


def test_sizes_are_those_that_the_setup_cell_leaves(tmp_path):
    cells = [nbformat.v4.new_code_cell('model = "m"\nn_small = 100\nsizes = [1, 2]\nn_other = 0\nquick = True',
                                       metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(SETUP)]
    path = tmp_path/"04_steering.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    deep, flat, full = (plan.sizes_of(path, n, quick) for n, quick in ((32, True), (8, True), (8, False)))
    assert [of["n_small"] for of in (deep, flat, full)] == [5, 7, 100] and deep["sizes"] == [2]
    assert full["sizes"] == [1, 2] and deep["n_other"] == {"a": 5}


def test_a_short_run_takes_less_and_a_deep_model_more():
    for stem in plan.DESIGNS:
        path = runner.find_notebook(stem)
        short, full = (plan.designed(path, 30, quick) for quick in (True, False))
        assert short.equivalents(LLAVA_7B) <= full.equivalents(LLAVA_7B), stem
        assert plan.designed(path, 8, False).resumed <= full.resumed, stem
    assert plan.designed(runner.find_notebook("10"), 8, True) is None


def test_rows_are_worth_what_is_behind_the_picture():
    assert Passes(10, 100).equivalents(Question(200, 20, 100)) == 20
    assert Passes(10, 100) * Passes(2, .5) == Passes(20, 50)


def test_a_model_that_was_not_timed_is_scaled(tmp_path):
    tiny_llava = blueprint("llava-tiny")
    question = plan.question_of(tiny_llava)
    timing = {"seconds": {"extract": [4.8, 4.8]}, "images": 480}
    numbers = {"machine": {"gpu": None, "cpu": "x", "cores": 2, "threads": 2},
               "extraction": {"model": "llava-tiny", "time": timing}}
    assert plan.speed(tiny_llava, question, numbers) == plan.Speed(.01, "x, 2 cores, 2 threads", "llava-tiny", False)
    large = plan.speed(llava_7b(tmp_path/"7b"), LLAVA_7B, numbers)
    assert large.scaled and large.model == "llava-tiny" and large.seconds > 1000 * .01
    assert plan.speed(tiny_llava, question, {}) is None and "no results/bench.json" in plan.pace_text(None)
    assert "scaled from llava-tiny" in plan.pace_text(large) and "as timed" not in plan.pace_text(large)


def test_the_command_plans_from_a_config_alone(tmp_path, capsys):
    llava_7b(tmp_path/"7b")
    assert cli.main(["plan", "--config", str(tmp_path/"7b"/"config.json")]) == 0
    out = capsys.readouterr().out
    assert "7,0" in out and "14.1 GB in bfloat16" in out.replace("14.13", "14.1") and "estimated from the config" in out
    assert "03_extraction" in out and "no results/bench.json" in out
    assert cli.main(["plan", "--config", "nowhere.json"]) == 2 and "no file nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", HUB[0].alias])
def test_without_a_network_a_hub_id_is_one_sentence(name, capsys):
    assert cli.main(["plan", "--model", name]) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err and "--config FILE" in err and "no config of" in err


# --- the trial

def test_fewer_blocks_where_not_all_fit(tmp_path):
    for family in FAMILIES:
        model, _ = tiny(family, blocks=8)
        whole = trial.bytes_of(model.config, torch.float32)
        assert trial.blocks_that_fit(model.config, torch.float32, whole) == 8
        fit = trial.blocks_that_fit(model.config, torch.float32, whole - 1)
        fewer = trial.with_blocks(model.config, fit)
        assert fit == 7 and trial.bytes_of(fewer, torch.float32) < whole, family
    with pytest.raises(runner.UsageError, match="not even 4 blocks fit"):
        trial.blocks_that_fit(model.config, torch.float32, 10)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "smolvlm"])
def test_a_copy_has_random_weights_and_loads(family, tmp_path):
    folder = saved(tmp_path/"real", family)
    assert trial.copy_of(folder, tmp_path/"copy") == 4
    vlm, real = VLM.load(str(tmp_path/"copy")), VLM.load(folder)
    assert vlm.weight_hash != real.weight_hash and vlm.n_layers == 4
    assert vlm.run(bench.queries(vlm, 1)).logits.isfinite().all()


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    "Notebooks that pass, fail, take too long and need another, under names that a trial knows."
    folder = tmp_path/"nbs"
    folder.mkdir()
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(folder))
    save = "from spatialid.store import save_results\nsave_results(model, '02_mirror_swap', {}, {})"
    cells = {"02_mirror_swap": save,
             "03_extraction": "raise ValueError('no such part')", "04_steering": "1", "09_theory": "while True: pass"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for stem, code in cells.items():
        parameters = nbformat.v4.new_code_cell('model = "llava-tiny"\nn_scenes = 3\nquick = True',
                                               metadata={"tags": ["parameters"]})
        about = {"kernelspec": kernel, "spatialid": {"needs": ["03_extraction"]} if stem == "04_steering" else {}}
        both = [parameters, nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=both, metadata=about), folder/f"{stem}.ipynb")
    return folder


@pytest.mark.slow
def test_a_trial_says_how_each_notebook_ended(notebooks, tmp_path):
    "Within its time, and nothing is left in the results."
    began, results = time.time(), tmp_path/"elsewhere"
    results.mkdir()
    ended = {of.notebook: of for of in trial.try_notebooks("llava-tiny", results, 90)}
    assert {name: of.state for name, of in ended.items()} == {
        "02_mirror_swap": "passed", "03_extraction": "failed", "04_steering": "left out", "09_theory": "stopped"}
    assert ended["03_extraction"].why == "ValueError: no such part"
    assert ended["04_steering"].why == "needs 03_extraction"
    assert "longer than its share" in ended["09_theory"].why and time.time() - began < 120
    assert (results/"results"/"llava-tiny"/"quick"/"02_mirror_swap.json").is_file()
    assert not (tmp_path/"results").exists()
    assert "| 03_extraction | failed |" in trial.outcomes_table([*ended.values()])


@pytest.mark.slow
def test_a_trial_that_is_left_ends_what_it_has_begun(notebooks, tmp_path, monkeypatch):
    "Two at a time; whoever stops reading, by Ctrl-C too, leaves no process behind."
    monkeypatch.setattr(trial, "notebooks_at_once", lambda weights: 2)
    monkeypatch.setattr(trial, "LEAST", {stem: trial.LEAST[stem] for stem in ("02_mirror_swap", "09_theory")})
    outcomes = trial.try_notebooks("llava-tiny", tmp_path, 600)
    assert next(outcomes).notebook == "02_mirror_swap"
    ours = [child for child in psutil.Process().children(True) if "09_theory" in child.cmdline()]
    assert len(ours) == 1 and (kernels := ours[0].children(True))
    outcomes.close()
    gone, alive = psutil.wait_procs([*ours, *kernels], timeout=5)
    assert not alive and len(gone) > 1


@pytest.mark.parametrize("weights, free, cores, n", [(2e6, 20e9, 2, 2), (14e9, 80e9, 16, 2), (14e9, 16e9, 16, 1),
                                                      (2e6, 80e9, 16, 3), (2e6, 1e9, None, 1)])
def test_as_many_notebooks_side_by_side_as_there_is_room_for(monkeypatch, weights, free, cores, n):
    monkeypatch.setattr(trial, "room", lambda: ("RAM", free, False))
    monkeypatch.setattr(trial.os, "cpu_count", lambda: cores)
    assert trial.notebooks_at_once(weights) == n


def test_a_cause_is_one_line():
    text = "spatialid: 03_x failed in cell 2 of 9:\n    f(1)\n  ValueError: no such part\n  The run up to there: x"
    assert trial._cause(text) == "ValueError: no such part" and trial._cause("") == "no message"
    assert trial._cause("spatialid: 04 needs the IDs") == "04 needs the IDs"
    thread = "Exception in thread Heartbeat:\n  bind\nzmq.error.ZMQError: Address already in use\n"
    assert trial._cause(thread + text) == "ValueError: no such part"


def test_a_notebook_gets_only_the_sizes_that_it_has():
    for stem in trial.LEAST:
        path = runner.find_notebook(stem)
        given = trial.least_of(path, 80)
        assert given.keys() <= runner.parameters_of(path).keys()
        runner.parse_parameters([f"{name}={value!r}" for name, value in given.items()], path)


def test_every_question_of_every_cell_is_counted(tmp_path, monkeypatch):
    """Of a sweep, two clean runs of each question; and each cell at layer ℓ of N as the (N - ℓ) / N that it is resumed.

    A smaller model beside it does not count."""
    shell = SimpleNamespace(events=SimpleNamespace(register=lambda event, call: kept.append(call)))
    kept = []
    for name in ("__init__", "resume"): monkeypatch.setattr(VLM, name, getattr(VLM, name)) # as they were, afterwards
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    trial.count_passes(tmp_path/"counts.json")
    vlm, toy = VLM(*tiny("llava")), VLM(*tiny("llava", blocks=2))
    work = bench.mirror_work(vlm, 3)
    toy.run(work.base)
    sweeps.sweep(vlm, work.base, work.source, {"objects": "objects", "last": "last"})
    kept[0](None)
    counts = json.loads((tmp_path/"counts.json").read_text())
    assert counts == {"whole": 6, "resumed": 2 * 3 * (.75 + .5 + .25), "blocks": 4}


def test_a_plan_is_scaled_to_the_model_about_as_deep(monkeypatch):
    path = runner.find_notebook("02")
    runs = [dict(model="a", blocks=8, quick=True), dict(model="b", blocks=30, quick=True)]
    for run, factor in zip(runs, (2, 3)):
        alone = plan.designed(path, run["blocks"], True, True)
        run |= {"whole": factor * alone.whole, "resumed": factor * alone.resumed}
    monkeypatch.setattr(plan, "counted_runs", lambda: {"02_mirror_swap": runs})
    for blocks, factor in ((6, 2), (12, 2), (28, 3), (40, 3)):
        alone = plan.designed(path, blocks, False)
        assert plan.passes(path, blocks, False).whole == pytest.approx(factor * alone.whole)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["02_mirror_swap", "03_extraction"])
def test_passes_are_those_that_a_notebook_makes(stem, tmp_path, monkeypatch):
    "Counted in a short run of a tiny model: to within a fifth. `tools/forwards.py` counts all of them again."
    stored = Path(__file__).parents[1]/"results"/"forwards.json"
    counted = json.loads(stored.read_text()) if stored.is_file() else {}
    if stem not in counted: pytest.skip(f"tools/forwards.py has not counted {stem}")
    monkeypatch.setattr(plan, "counted_runs", lambda: counted)
    outcome = trial.run_counted(stem, "llava-tiny", tmp_path, 600, quick=True)
    assert outcome.state == "passed", outcome.why
    planned = plan.passes(runner.find_notebook(stem), outcome.counts["blocks"], True, True)
    for kind in ("whole", "resumed"):
        counted = outcome.counts[kind]
        assert getattr(planned, kind) == pytest.approx(counted, rel=.2), (kind, planned, outcome.counts)
