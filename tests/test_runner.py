"""The command `spatialid` on small notebooks: what it says and resumes.

Messages, resume after an interruption, folders that cannot be written, claims."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import zmq

from spatialid import cli, runner, store



def fails(capsys, code, *args):
    "Run the command, check its exit code, return its message."
    assert cli.main(list(args)) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def claim(name="x", **rule):
    "An entry of claims.json; its rule is that the number x of notebook 01 is above 0, unless something else is given."
    rule = {"notebook": "01_a", "key": "claims.x", "op": ">", "threshold": 0, **rule}
    return dict(id=name, source="§1", claim="c", sentence="", paper="1", brief="1", note="", measure="", unit="things",
                precondition="", headline=False, rule=rule, history=[])


def write_claims(lab, *entries): (lab.root/"nbs"/"claims.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("args, names", [
    (("run", "9"), "01_a, 02_b"),
    (("run", "nine"), "01_a, 02_b, 03_c"),
    (("run", "01", "--model", "lava-tiny"), "a folder with a config.json or a Hub id such as llava-hf/"),
    (("run", "01", "-p", "m=3"), "it has n and --model"),
    (("run", "01", "-p", "n"), "-p name=value"),
    (("run", "02", "--model", "toy"), "those that do are 01_a, 03_c"),
    (("reproduce", "--models", "toy,lava-tiny"), "lava-tiny"),
    (("run", "01", "--model", "nbs"), "the folder 'nbs' has no config.json"),
    (("run", "03", "-p", "n_scenes=-5"), "give a whole number of at least 1"),
    (("run", "03", "-p", "n_rows=2.5"), "give a whole number of at least 1"),
    (("run", "03", "-p", "n_rows=0"), "give a whole number of at least 1"),
    (("run", "03", "-p", "benchmark=nowhere"), "`spatialid benchmark FOLDER`"),
    (("run", "03", "-p", "quick=maybe"), "give True or False"),
    (("run", "04", "--model", "llava-tiny"),
     "04_d is about videos, and llava-tiny takes pictures only; its experiments are 03_c"),
    (("run", "03", "--model", "toy"), "run `spatialid run 03 --model"),
])
def test_wrong_argument_names_the_valid_ones(lab, capsys, args, names):
    lab.notebook("01_a")
    lab.notebook("02_b", parameters="n = 3")
    parameters = 'model = "llava-tiny"\nn_scenes = 3\nn_rows = None\nbenchmark = None\nquick = False'
    lab.notebook("03_c", needs=["03_extraction"], parameters=parameters)
    lab.notebook("04_d", parameters='model = "onevision-tiny"')
    message = fails(capsys, 2, *args)
    assert names in message and message.strip().count("\n") == 0


def test_number_shared_by_two_notebooks(lab, capsys):
    lab.notebook("00_a")
    lab.notebook("00_b")
    assert "00_a and 00_b" in fails(capsys, 2, "run", "0")


def test_outside_a_checkout(lab, capsys):
    assert "no notebooks in" in fails(capsys, 1, "run", "01")


@pytest.mark.slow
def test_run_injects_parameters_and_drops_eval_false(lab, capsys):
    lab.notebook("01_a", "#| eval: false\nraise SystemExit(3)",
                 'from spatialid.store import save_results\nsave_results(model, "01_a", {"n": n, "sizes": sizes}, {})',
                 parameters='model = "x"\nn = 3\nsizes = (1, 2)')
    assert cli.main(["run", "01", "--model", "toy", "-p", "n=7", "-p", "sizes=(74, 124)"]) == 0
    assert json.loads((lab.root/"results/toy/01_a.json").read_text()) == {"n": 7, "sizes": [74, 124]}
    assert (lab.runs/"01_a.ipynb").is_file()
    assert "01_a 100%" in capsys.readouterr().err


BEGINNER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from spatialid.processes import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.slow
def test_a_process_ends_with_the_one_that_began_it(tmp_path):
    (tmp_path/"beginner.py").write_text(BEGINNER)
    with subprocess.Popen([sys.executable, str(tmp_path/"beginner.py")], stdout=subprocess.PIPE, text=True) as beginner:
        child = psutil.Process(int(beginner.stdout.readline()))
        assert child.is_running()
        beginner.kill()
    for _ in range(200):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE: return
        time.sleep(.1)
    child.kill()
    raise AssertionError("it goes on alone")


@pytest.mark.slow
def test_failing_notebook_gives_cell_and_cause(lab, capsys):
    lab.notebook("01_a", "1 + 1", "# far above\n" * 9 + "# the fraction\nx = 1/(n - 3)\n# below")
    message = fails(capsys, 1, "run", "1").split("\r")[-1]
    for part in ("01_a failed in cell 3 of 3", "x = 1/(n - 3)", "ZeroDivisionError: division by zero"):
        assert part in message
    assert "below" not in message and message.count("far above") == 1
    assert len(message.strip().splitlines()) <= 7
    lab.notebook("02_b", "1 +")
    assert "1 +" in (message := fails(capsys, 1, "run", "2")) and "SyntaxError" in message


def test_a_benchmark_is_found_from_where_one_is(lab, capsys):
    lab.notebook("01_a", "from pathlib import Path", "Path(benchmark, 'seen').write_text('here')",
                 parameters='model = "toy"\nbenchmark = None')
    (lab.root/"data").mkdir()
    assert cli.main(["run", "1", "-p", "benchmark=data"]) == 0 and (lab.root/"data"/"seen").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("depth, transport", [(1, "ipc"), (120, "tcp")])
def test_a_kernel_is_spoken_to_through_files_where_their_names_are_short(lab, monkeypatch, tmp_path, depth, transport):
    "Two kernels that begin together cannot take each other's port."
    if not zmq.has("ipc"): pytest.skip("this system has no such files")
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))/("t"*depth)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    lab.notebook("01_a", """
        from ipykernel.kernelapp import IPKernelApp
        from spatialid.store import save_results
        save_results("toy", "01_a", {"transport": IPKernelApp.instance().transport}, {})""")
    assert cli.main(["run", "1"]) == 0
    assert json.loads((lab.root/"results/toy/01_a.json").read_text()) == {"transport": transport}
    assert not [*temporary.rglob("kernel*")]
    shutil.rmtree(temporary.parent)


@pytest.mark.slow
def test_dead_kernel(lab, capsys):
    lab.notebook("01_a", "import os; os._exit(9)")
    assert "the kernel died" in fails(capsys, 1, "run", "1")


@pytest.mark.slow
def test_reproduce_continues_after_ctrl_c(lab):
    lab.notebook("01_a", 'open("a.log", "a").write("ran\\n")')
    lab.notebook("02_b", "import time, pathlib\npathlib.Path('started').touch()\n"
                         "if not pathlib.Path('go').exists(): time.sleep(120)")
    lab.notebook("12_bench", "1/0")
    first = lab.start("reproduce", "--full", "--models", lab.toy)
    deadline = time.time() + 300
    while not (lab.root/"nbs"/"started").exists() and time.time() < deadline and first.poll() is None: time.sleep(.1)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 130 and "Traceback" not in err and "leaked" not in err
    assert "Interrupted in 02_b · toy. Finished: 01_a · toy. The same command continues from here." in err

    (lab.root/"nbs"/"go").touch()
    second = lab.start("reproduce", "--full", "--models", lab.toy)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "01_a · toy: already done" in out and "02_b · toy: done in" in out and "0 holds" in out
    assert (lab.root/"nbs"/"a.log").read_text() == "ran\n"


MEET = """import pathlib, time
pathlib.Path('{me}').touch()
until = time.time() + 100
while not pathlib.Path('{other}').exists(): time.sleep(.1); assert time.time() < until, 'alone'
from spatialid.store import save_results
save_results(model, '{me}', {{}}, {{}})"""


@pytest.mark.slow
def test_small_models_run_side_by_side(lab, capfd, monkeypatch):
    """Two notebooks that wait for each other end, and each record names the files that its notebook wrote.

    What needs the IDs of notebook 03 comes after it; their bars do not mix."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    parameters = {"parameters": 'model = "llava-tiny"'}
    lab.notebook("01_a", MEET.format(me="01_a", other="03_extraction"), **parameters)
    lab.notebook("02_b", "assert open('03_extraction.done').read() == 'yes'", needs=["03_extraction"], **parameters)
    lab.notebook("03_extraction", MEET.format(me="03_extraction", other="01_a"),
                 "time.sleep(1); open('03_extraction.done', 'w').write('yes')", **parameters)
    code = runner.reproduce(["llava-tiny"], full=True)
    err = capfd.readouterr().err
    assert code == 0 and " cells [" not in err, err
    runs = lab.root/"results"/"llava-tiny"/".runs"
    records = {path.stem: list(json.loads(path.read_text())["files"]) for path in runs.glob("*.json")}
    assert records == {"01_a": ["01_a.json"], "02_b": [], "03_extraction": ["03_extraction.json"]}
    assert runner.reproduce(["llava-tiny"], full=True) == 0 and capfd.readouterr().out.count("already done") == 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_whatever_ends_reproduce_ends_the_kernels_too(lab, how):
    for name in ("01_a", "02_b"):
        code = f"import os, time; open('{name}.pid', 'w').write(str(os.getpid()))\ntime.sleep(120)"
        lab.notebook(name, code, parameters='model = "llava-tiny"')
    run = lab.start("reproduce", "--full", "--models", "llava-tiny")
    deadline, started = time.time() + 300, lambda: [p for p in (lab.root/"nbs").glob("*.pid") if p.read_text()]
    while len(started()) < min(2, os.cpu_count()) and time.time() < deadline and run.poll() is None: time.sleep(.1)
    run.send_signal(how)
    _, err = run.communicate(timeout=60)
    assert "Traceback" not in err, err
    if how != signal.SIGKILL:
        assert run.returncode == 130 and "Interrupted in 01_a · llava-tiny" in err and "leaked" not in err, err
    kernels = [Path("/proc")/p.read_text() for p in started()]
    while any(k.exists() for k in kernels) and time.time() < deadline: time.sleep(.1)
    assert kernels and not any(k.exists() for k in kernels)


@pytest.mark.slow
def test_a_killed_worker_is_one_sentence(lab, capsys):
    lab.notebook("01_a", "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)")
    err = fails(capsys, 1, "reproduce", "--full", "--models", lab.toy)
    assert "01_a · toy was killed" in err and "the same command continues" in err


@pytest.mark.slow
def test_done_depends_on_code_weights_and_files(lab):
    lab.notebook("01_a", 'from spatialid.store import save_results\nsave_results(model, "01_a", {"n": n}, {})')
    path = runner.find_notebook("1")
    assert not runner.is_done(path, lab.toy)
    assert runner.reproduce([lab.toy], full=True) == 0 and runner.is_done(path, lab.toy)
    result = lab.root/"results/toy/01_a.json"
    kept = result.read_text()
    result.unlink()
    assert not runner.is_done(path, lab.toy)
    result.write_text(kept.replace("3", "9"))
    assert not runner.is_done(path, lab.toy), "written by a run with other parameters"
    result.write_text(kept)
    (lab.root/"toy"/"config.json").write_text('{"changed": 1}')
    runner.weight_digest.cache_clear()
    assert not runner.is_done(path, lab.toy)
    (lab.root/"toy"/"config.json").write_text("{}")
    runner.weight_digest.cache_clear()
    assert runner.is_done(path, lab.toy)
    lab.notebook("01_a", 'from spatialid.store import save_results\nsave_results(model, "01_a", {"n": n + 1}, {})')
    assert not runner.is_done(path, lab.toy)


@pytest.mark.slow
def test_failure_does_not_stop_the_others(lab, capsys):
    lab.notebook("01_a", "1/0")
    lab.notebook("02_b", "1")
    assert runner.reproduce([lab.toy], full=True) == 1
    out, err = capsys.readouterr()
    assert "02_b · toy: done" in out and "Failed: 01_a · toy" in err


@pytest.mark.parametrize("args", [("run", "1"), ("reproduce", "--full", "--models", "toy")])
def test_results_folder_that_cannot_be_written(lab, capsys, args):
    "A file stands where the folder should be: the same for every user, root included."
    lab.notebook("01_a", "open('ran', 'w')")
    (lab.root/"results").write_text("")
    message = fails(capsys, 1, *args)
    assert "cannot write" in message and "SPATIALID_RESULTS" in message and len(message.strip().splitlines()) == 1
    assert not (lab.root/"nbs"/"ran").exists()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_read_only_or_full_disk(tmp_path, monkeypatch, error):
    target = store.write_json(tmp_path/"a.json", {"old": 1})
    def refuse(*_): raise error
    monkeypatch.setattr(os, "replace", refuse)
    message = f"cannot write .*a.json: {error.strerror}. Make the folder writable"
    with pytest.raises(OSError, match=message): store.write_json(target, {"new": 2})
    assert json.loads(target.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_claims_json_and_rules(lab, capsys):
    rule = {"notebook": "03_x", "key": "claims.k", "op": ">="}
    lower, absent = claim("b", **rule, threshold=.6), claim("c", **{**rule, "key": "claims.other"}, threshold=.5)
    write_claims(lab, claim("a", **rule, threshold=.5), lower, absent, {**claim("d"), "rule": None})
    number, of_toy = {"value": .6, "low": .55, "high": .7, "n": 20}, {"model": "toy", "protocol": "paper"}
    store.save_results("toy", "03_x", {"claims": {"k": number}}, {**of_toy, "organism": True})
    assert cli.main(["claims", "--model", "toy", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["verdict"] for r in rows] == ["holds", "undecided", "not yet run", "not yet run"]
    measured = {"value": .6, "low": .55, "high": .7, "n": 20}
    assert rows[0] == {"id": "a", "source": "§1", "paper": "1", **measured, **of_toy, "verdict": "holds", "why": None}
    assert rows[3]["value"] is None and rows[3]["model"] is None
    assert cli.main(["claims", "--model", "toy", "--markdown"]) == 0
    assert "| 0.60 [0.55, 0.70], n = 20 things | toy | ✓ holds |" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "reproduce", "claims", "models"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop: cli.main([command, "--help"])
    assert stop.value.code == 0 and f"example: spatialid {command}" in " ".join(capsys.readouterr().out.split())


def test_one_claim_is_asked_for_by_its_id(lab, capsys):
    write_claims(lab, claim("one"), claim("two", threshold=5))
    number = {"value": 3, "low": 2, "high": 4, "n": 20}
    store.save_results("toy", "01_a", {"claims": {"x": number}}, {"model": "toy", "protocol": "paper"})
    assert cli.main(["claims", "two", "--model", "toy"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("two: c\n") and "fails on toy" in told and "claims.x > 5" in told
    assert cli.main(["claims", "three", "--model", "toy"]) == 2
    assert "no claim 'three'; there are one, two" in capsys.readouterr().err


def test_models(capsys):
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "llava-hf/llava-1.5-7b-hf" in out and all(name in out for name in runner.bundled())


def test_a_claim_about_many_models_is_read_where_they_are_compared(lab, capsys):
    write_claims(lab, claim("all", notebook="13_models", model="models"))
    number = {"value": 1, "low": .5, "high": 2, "n": 12}
    store.save_results("models", "13_models", {"claims": {"x": number}}, {"protocol": "paper"})
    row, = runner.claims("toy")
    assert (row["verdict"], row["model"], row["n"]) == ("holds", "models", 12)


def test_what_a_model_cannot_give_is_read_from_the_model_that_the_rule_names(lab):
    write_claims(lab, claim(model="other"))
    def write(name, number, **params):
        origin = {"protocol": "paper", "model": name, "params": params}
        store.save_results(name, "01_a", {"claims": {"x": number}}, origin)
    number = lambda v: {"value": v, "low": v - .1, "high": v + .1, "n": 2}
    write("toy", {"value": None, "low": None, "high": None, "n": 0, "not_judged": "it has no table"})
    row, = runner.claims("toy")
    assert (row["verdict"], row["why"]) == ("not judged", "it has no table")
    lab.notebook("01_a", "pass")
    assert "1 not judged, 0 not yet run" in runner.claims_text([row])
    assert "Not judged on this model: x (it has no table)." in runner.model_page("toy")
    write("other", number(1))
    row, = runner.claims("toy")
    assert (row["verdict"], row["model"], row["value"]) == ("holds", "other", 1)
    write("toy", number(-1))
    row, = runner.claims("toy")
    assert (row["verdict"], row["model"]) == ("fails", "toy")
    write("toy", number(-1), quick=True)
    assert runner.claims("toy")[0]["model"] == "other"
    write("toy-13b", number(-1))
    write_claims(lab, claim(model="other", named="toy-13B"))
    write("toy", number(-1))
    assert [runner.claims(m)[0]["model"] for m in ("toy", "x/toy-13b")] == ["other", "toy-13b"]


def test_a_figure_stands_on_the_page_under_its_heading(lab):
    path = lab.root/"nbs"/"01_a.ipynb"
    lab.notebook("01_a", 'from spatialid.store import save_figure\nsave_figure(fig, model, "one")')
    nb = nbformat.read(path, 4)
    texts = "# Title\n\n## Where it is\n\nText.", "No heading."
    nb.cells[0:0] = [nbformat.v4.new_markdown_cell(text) for text in texts]
    nbformat.write(nb, path)
    assert runner.figures_of(path) == {"one": "Where it is"}
    (lab.root/"results/toy").mkdir(parents=True)
    (lab.root/"results/toy/one.png").write_bytes(b"")
    assert "![Where it is (one)](../results/toy/one.png)" in runner.model_page("toy")


@pytest.mark.slow
def test_a_quick_run_leaves_what_a_full_one_wrote(lab, capsys):
    numbers = "{'claims': {'x': dict(value=1, low=0.9, high=1.1, n=1)}}"
    save = f"save_results(model, '01_a', {numbers}, {{'params': {{'quick': quick}}}})"
    lab.notebook("01_a", f"from spatialid.store import save_results\n{save}", parameters='model = "toy"\nquick = False')
    rule = {"notebook": "01_a", "key": "claims.x", "op": ">", "threshold": 0}
    write_claims(lab, {**claim(), "rule": rule})
    folder = lab.root/"results"/"toy"
    assert cli.main(["run", "01", "--model", lab.toy, "-p", "quick=True"]) == 0 and not (folder/"01_a.json").exists()
    assert store.read_results(folder/"quick"/"01_a.json")["provenance"]["params"]["quick"] is True
    assert runner.claims("toy")[0]["why"] == "only a quick run so far"
    assert cli.main(["run", "01", "--model", lab.toy]) == 0 and runner.claims("toy")[0]["verdict"] == "holds"
    before = (folder/"01_a.json").read_bytes()
    assert cli.main(["run", "01", "--model", lab.toy, "-p", "quick=True"]) == 0
    assert (folder/"01_a.json").read_bytes() == before


SAVES = """
from spatialid.store import load_results, save_results
before = load_results(model, "03_extraction")["n"] if n == 2 else None
save_results(model, name, {"n": n, "before": before}, {"params": {"quick": quick}})
"""


@pytest.mark.slow
def test_a_model_in_short(lab, capsys):
    """The notebooks that have a short form, with quick=True, into a folder of their own.

    A short run reads what short runs wrote; the same command again does nothing."""
    for name, n in (("02_mirror_swap", 1), ("03_extraction", 3), ("04_steering", 2)):
        lab.notebook(name, SAVES, parameters=f'model = "toy"\nname = "{name}"\nn = {n}\nquick = False')
    lab.notebook("07_finetune", "raise SystemExit(3)", parameters='model = "toy"\nquick = True', in_short=False)
    lab.notebook("10_organisms", "raise SystemExit(3)", parameters='model = "toy"')
    full = lab.root/"results"/"toy"/"03_extraction.json"
    full.parent.mkdir(parents=True)
    full.write_text('{"n": "of a full run"}')
    assert cli.main(["reproduce", "--models", "toy"]) == 0
    quick = full.parent/"quick"
    assert sorted(path.stem for path in quick.glob("*.json")) == ["02_mirror_swap", "03_extraction", "04_steering"]
    found = store.read_results(quick/"04_steering.json")
    assert found == {"provenance": {"params": {"quick": True}}, "n": 2, "before": 3}
    assert "of a full run" in full.read_text()
    out = capsys.readouterr().out
    assert "03_extraction · toy (short): done" in out and f"numbers and figures are in {quick}" in out
    assert cli.main(["reproduce", "--models", "toy"]) == 0
    assert capsys.readouterr().out.count("already done") == 3


@pytest.mark.slow
def test_full_is_the_size_of_the_stored_results(lab):
    """With the numbers that they were made with, and nothing else of what they were made with.

    The second time nothing runs; -p wins over both."""
    save = ('from spatialid.store import save_results\nparams = dict(n=n, px=px, sizes=sizes, quick=quick)\n'
            'save_results(model, "01_a", {"got": [n, px, sizes]}, {"params": params})')
    lab.notebook("01_a", save,
                 parameters='model = "toy"\nn = 3\npx = None\nsizes = [1]\nquick = True')
    path, stored = runner.find_notebook("1"), lab.root/"results"/"toy"/"01_a.json"
    assert runner.sizes(path, lab.toy) == {"quick": False} and runner.sizes(path, lab.toy, True) == {"quick": True}
    made = {"n": 7, "px": 80, "sizes": [1, 2], "quick": False, "gone": 5}
    store.save_results(lab.toy, "01_a", {}, {"params": {**made, "benchmark": "a/folder/of/somebody"}})
    assert runner.sizes(path, lab.toy) == {"n": 7, "px": 80, "sizes": [1, 2], "quick": False}
    def got(*args): return cli.main([*args]) or store.read_results(stored)["got"]
    assert got("reproduce", "--full", "--models", lab.toy) == [7, 80, [1, 2]] and runner.is_done(path, lab.toy)
    assert got("run", "1", "--model", lab.toy, "--full", "-p", "n=4") == [4, 80, [1, 2]]
    assert cli.main(["run", "1", "--model", lab.toy]) == 0
    assert store.read_results(stored.parent/"quick"/"01_a.json")["got"] == [3, None, [1]], "short is the default"


def test_claims_of_a_run_in_short(lab, capsys):
    write_claims(lab, claim())
    def write(value, quick):
        numbers = {"claims": {"x": {"value": value, "low": value - .1, "high": value + .1, "n": 2}}}
        store.in_short(quick)
        store.save_results("toy", "01_a", numbers, {"model": "toy", "params": {"quick": quick}})
        store.in_short(False)
    write(-1, True)
    assert runner.claims("toy")[0]["why"] == "only a quick run so far"
    write(1, False)
    assert [runner.claims("toy", quick)[0]["verdict"] for quick in (False, True)] == ["holds", "fails"]
    assert cli.main(["claims", "--model", "toy", "--quick"]) == 0 and "fails" in capsys.readouterr().out


def test_a_run_in_short_takes_ids_of_one(lab, capsys):
    lab.notebook("03_c", parameters='model = "toy"\nquick = True')
    lab.notebook("04_d", needs=["03_extraction"], parameters='model = "toy"\nquick = True')
    ids = lab.root/"results"/"toy"/"quick"/"spatial_ids.safetensors"
    ids.parent.mkdir(parents=True)
    ids.write_bytes(b"")
    path = runner.find_notebook("04")
    assert cli._checked_model(path, lab.toy, True) == lab.toy
    assert "--full` first" in fails(capsys, 2, "run", "04", "--full", "--model", "toy")


def test_what_reproduce_runs_unless_told():
    parse = lambda *args: cli._wanted(cli._parser().parse_args(["reproduce", *args]))
    assert parse() == ("llava-smol", "onevision-tiny") and parse("--models", "a,b") == ["a", "b"]
    assert next(iter(parse("--models", "all"))) == "llava-smol", "the flagship is named first"


def test_models_take_turns(lab, monkeypatch):
    """One notebook for every model before the next notebook, so that no model's longest one is left for the end.

    Of several sizes of model each takes turns with those of its size."""
    for name in ("01_a", "02_b"): lab.notebook(name, parameters='model = "llava-tiny"')
    (lab.root/"other").mkdir()
    (lab.root/"other"/"config.json").write_text("{}")
    runs = []
    def note(jobs, pool, report):
        runs.append(([(path.stem, Path(model).name) for path, model, _ in jobs], pool.workers))
    monkeypatch.setattr(runner, "_run_all", note)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    runner.reproduce(["llava-tiny", lab.toy, "gemma3-tiny", str(lab.root/"other")], full=True)
    turns = lambda *models: [(name, m) for name in ("01_a", "02_b") for m in models]
    assert runs == [(turns("llava-tiny", "gemma3-tiny"), 2), (turns("toy", "other"), 1)]


@pytest.mark.slow
def test_the_claims_of_several_models_are_one_table(lab, capsys):
    """A column for each model with what was measured on itself; one model of pictures keeps the long form.

    A number of the model that a rule names counts there alone."""
    lab.notebook("01_a", "print(model)")
    write_claims(lab, claim("own", key="claims.k"), claim("named", key="claims.l", model="other"))
    (lab.root/"other").mkdir()
    (lab.root/"other"/"config.json").write_text("{}")
    number = lambda low: {"value": low + 1, "low": low, "high": low + 2, "n": 20}
    for name, found in (("toy", {"k": number(-1)}), ("other", {"k": number(1), "l": number(1)})):
        store.save_results(name, "01_a", {"claims": found}, {"model": name, "organism": True, "protocol": "paper"})
    assert cli.main(["reproduce", "--full", "--models", f"{lab.toy},{lab.root/'other'}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["own", "?", "✓", "·"] in lines and ["named", "·", "✓", "·"] in lines, lines
    assert "1 toy: 0 hold, 0 fail, 1 undecided".split() in lines
    assert "2 other: 2 hold, 0 fail, 0 undecided".split() in lines
    assert cli.main(["reproduce", "--full", "--models", lab.toy]) == 0
    counts = "1 holds, 0 fails, 1 undecided, 0 not judged, 0 not yet run (measured on toy: 1, other: 1)"
    assert counts in capsys.readouterr().out


@pytest.mark.slow
def test_several_models_are_compared_at_the_end(lab, capsys):
    lab.notebook("01_a", "print(model)")
    lab.notebook("13_models", f"open(r'{lab.root}/compared', 'w').write('yes')", parameters="seed = 0")
    (lab.root/"other").mkdir()
    (lab.root/"other"/"config.json").write_text("{}")
    assert cli.main(["reproduce", "--full", "--models", lab.toy]) == 0 and not (lab.root/"compared").exists()
    assert cli.main(["reproduce", "--full", "--models", f"{lab.toy},{lab.root/'other'}"]) == 0
    assert (lab.root/"compared").exists()
    assert "13_models: done" in capsys.readouterr().out


# --- folders of results

def save_as(model, number):
    "What a notebook saves for a model."
    return store.save_results(str(model), "01_a", {"x": number}, {}).parent.name


def test_models_of_one_name_have_folders_of_their_own(tmp_path):
    "The second gets a hash of its path; the first and the committed results keep theirs."
    runs = [tmp_path/run/"checkpoint-100" for run in ("a", "b")]
    for folder in runs:
        folder.mkdir(parents=True)
        (folder/"config.json").write_text("{}")
    first, second = (save_as(folder, k) for k, folder in enumerate(runs))
    assert first == "checkpoint-100" and second.startswith("checkpoint-100-") and len(second) == len(first) + 7
    assert [store.load_results(str(folder), "01_a")["x"] for folder in runs] == [0, 1]
    assert save_as(f"{runs[0]}/", 2) == first and save_as(runs[1], 3) == second, "also when saved again"
    assert save_as("some/model", 4) == "model" and save_as("other/model", 5).startswith("model-")


def test_a_folder_named_as_a_bundled_model_is_another_model(tmp_path, monkeypatch):
    "Also as a relative path, and as a Hub id; the bundled folder itself is the bundled model."
    (tmp_path/"llava-tiny").mkdir()
    (tmp_path/"llava-tiny"/"config.json").write_text("{}")
    monkeypatch.chdir(tmp_path.parent)
    names = {save_as(m, 1) for m in (tmp_path/"llava-tiny", f"{tmp_path.name}/llava-tiny", "me/llava-tiny")}
    assert len(names) == 2 and all(name.startswith("llava-tiny-") for name in names)
    assert save_as(store.bundled()["llava-tiny"], 2) == save_as("llava-tiny", 3) == "llava-tiny"


def test_a_folder_without_a_model_is_a_name(tmp_path, monkeypatch):
    "Results over all models are called `models`, and so is a folder beside the notebooks."
    (tmp_path/"models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert save_as("models", 1) == "models" and not [*tmp_path.rglob("source.txt")]


def test_a_bundled_name_is_the_bundled_model_wherever_one_is(tmp_path, monkeypatch):
    "As `VLM.load` reads it, also beside a folder of that name."
    (tmp_path/"llava-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert store.results_dir("llava-tiny").name == "llava-tiny" != store.results_dir("./llava-tiny/..//llava-tiny").name


def test_a_folder_is_marked_before_anything_is_written(tmp_path, monkeypatch):
    "Figures, IDs and records go to it as well; in a quick run the mark is not hidden among the quick results."
    monkeypatch.setenv("SPATIALID_QUICK", "1")
    runs = [tmp_path/run/"ckpt" for run in ("a", "b")]
    for folder in runs: folder.mkdir(parents=True)
    first, second = (store.own_results_dir(str(folder)) for folder in runs)
    assert first.name == "ckpt" and second.name.startswith("ckpt-")
    assert [store.results_dir(folder) for folder in reversed(runs)] == [second, first]
    assert [(f/"source.txt").read_text() for f in (first, second)] == [str(r.resolve()) for r in runs]
    for folder in runs: store.save_results(folder, "01_a", {"x": str(folder)}, {})
    assert [store.load_results(folder, "01_a")["x"] for folder in runs] == list(map(str, runs))


def test_results_from_before_there_were_marks_are_told_by_their_provenance(tmp_path):
    def write(name): store.write_json(tmp_path/"results"/name/"provenance"/"03_x.json", {"model": "some/model"})
    write("model")
    assert save_as("some/model", 2) == "model" and save_as("other/model", 3).startswith("model-")
    write("mine")
    assert save_as("mine", 4) == "mine", "a name of one's own is no model"


def test_results_can_be_named_once(tmp_path):
    run, other = tmp_path/"runs"/"ckpt", tmp_path/"else"/"ckpt"
    for folder in (run, other): folder.mkdir(parents=True)
    assert store.own_results_dir(run, "mine").name == save_as(run, 1) == "mine"
    assert store.results_dir(run).name == "mine"
    assert store.own_results_dir(run, "mine").name == "mine" and store.load_results("mine", "01_a")["x"] == 1
    refused = {(other, "mine"): "has the results of .*ckpt: give another name", (run, "yours"): "go on without a name",
               (other, "llava-tiny"): "has the results of llava-tiny", ("llava-tiny", "mine"): "is a name already",
               (other, "../x"): "cannot name a folder"}
    for model_and_name, words in refused.items():
        with pytest.raises(ValueError, match=words): store.own_results_dir(*model_and_name)
    (tmp_path/"results"/"notes").mkdir()
    (tmp_path/"results"/"notes"/"a.txt").write_text("")
    with pytest.raises(ValueError, match="has the results of an unknown model"): store.own_results_dir(other, "notes")


@pytest.mark.slow
def test_a_benchmark_that_cannot_serve_is_refused_before_the_run(lab, capsys):
    "A benchmark of left/right alone would stop 04 after most of its work, one without boxes 06 inside a cell."
    from spatialid.benchmarks import write_benchmark
    folder = write_benchmark(lab.root/"b", 12)
    rows = json.loads((folder/"coco_qa_two_obj.json").read_text())
    both = ["left_right", "above_below"]
    needs = {"02_mirror_swap": (both[:1], False), "04_steering": (both, False), "06_diagnosis": (both, True)}
    for name, (kinds, boxes) in needs.items():
        lab.notebook(name, parameters=f'model = {lab.toy!r}\nbenchmark = None',
                     benchmark={"kinds": kinds, "boxes": boxes})
    left_right = [row for row in rows if " of " in row[1].removeprefix("A photo of")]
    (folder/"coco_qa_two_obj.json").write_text(json.dumps(left_right))
    (folder/"instances_val2017.json").rename(folder/"away.json")
    give = lambda number: ("run", number, "-p", f"benchmark={folder}")
    message = fails(capsys, 2, *give("04"))
    assert "04_steering cannot take benchmark=" in message and "none about" not in message
    assert "asks no question about above/below" in message
    (folder/"coco_qa_two_obj.json").write_text(json.dumps(rows))
    assert "holds no instances_val2017.json" in fails(capsys, 2, *give("06"))
    assert cli.main(list(give("02"))) == cli.main(list(give("04"))) == 0, "which need no boxes"


def test_name_is_an_option_of_run(lab, capsys):
    save = 'from spatialid.store import save_results\nsave_results(model, "01_a", {"n": n}, {})'
    lab.notebook("01_a", save)
    assert cli.main(["run", "01", "--model", lab.toy, "--name", "mine"]) == 0
    assert json.loads((lab.root/"results"/"mine"/"01_a.json").read_text())["n"] == 3 and not lab.runs.exists()
    assert "--name other: the results of" in fails(capsys, 2, "run", "01", "--model", lab.toy, "--name", "other")
    assert "give --model too" in fails(capsys, 2, "run", "01", "--name", "other")


@pytest.mark.slow
def test_two_models_of_one_name_are_reproduced_beside_each_other(lab, capsys):
    "Each has its record, and the claims at the end are read in its own folder."
    write_claims(lab, claim(threshold=.5))
    lab.notebook("01_a", """from spatialid.store import save_results
v = 1. if "/b/" in model else 0.
save_results(model, "01_a", {"claims": {"x": dict(value=v, low=v - .1, high=v + .1, n=9)}}, {"model": model})""")
    runs = [lab.root/run/"ckpt" for run in ("a", "b")]
    for folder in runs:
        folder.mkdir(parents=True)
        (folder/"config.json").write_text("{}")
    assert cli.main(["reproduce", "--full", "--models", ",".join(map(str, runs))]) == 0
    out = capsys.readouterr().out
    first, second = (store.results_dir(str(folder)).name for folder in runs)
    assert first == "ckpt" and f" {first}: 0 hold, 1 fail" in out and f" {second}: 1 hold, 0 fail" in out
    assert all(runner.is_done(runner.find_notebook("01"), str(folder)) for folder in runs)


@pytest.mark.parametrize("module", ["spatialid", "spatialid.cli"])
def test_the_package_is_the_command(module):
    done = subprocess.run([sys.executable, "-m", module, "run", "99"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("spatialid: no notebook '99'")
