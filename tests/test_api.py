"What `import spatialid` offers, and what it costs."
import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import spatialid

HEAVY = ("torch", "transformers", "matplotlib", "scipy", "nbformat", "PIL")


def loaded_by(code):
    "The heavy packages that a fresh interpreter has loaded after `code`, and its CPU seconds."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    after_code = f"{code}; import sys; print(*(n for n in {HEAVY} if n in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", after_code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stderr.split(), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_import_is_light():
    "A tenth of a second is asked for; what costs more is not loaded."
    heavy, _ = loaded_by("import spatialid")
    assert heavy == []
    seconds = "import time; t = time.process_time(); import spatialid; assert time.process_time() - t < .1"
    loaded_by(seconds)


def test_help_comes_at_once():
    "Half a second is asked for."
    code = "from spatialid.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\npass"
    heavy, seconds = loaded_by(code)
    assert heavy == []
    assert min([seconds, *(loaded_by(code)[1] for _ in range(2))]) < .5


def test_every_name_is_found_where_it_lives():
    for name in spatialid.__all__:
        value = getattr(spatialid, name)
        assert value.__module__.startswith("spatialid.") and value.__name__ == name and name in dir(spatialid)
    assert spatialid.VLM.steer, "steering comes with VLM, without another import"


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(AttributeError, match="no attribute 'vlm'; it has Query, VLM"): spatialid.vlm
    with pytest.raises(ImportError): exec("from spatialid import nothing")


def test_a_notebook_depends_on_what_it_imports_from_the_package():
    "What `reproduce` looks at to tell whether a notebook is done."
    from spatialid.runner import _modules
    modules = _modules("from spatialid import SpatialIDs, scenes as d")
    assert modules.keys() >= {"extraction.py", "scenes.py", "query.py"}
    assert "hooks.py" not in _modules("from spatialid import judge")


LAYERS = (
    {"query", "pictures", "registry", "stats", "processes", "cluster"},
    {"store", "adapters", "families", "questions", "hub"},
    {"hooks", "claims", "replay", "groups", "plots"},
    {"sweeps", "edits", "scenes", "packing"},
    {"videos", "wordings", "extraction", "ceiling"},
    {"benchmarks"},
    {"organisms", "language", "trainer", "cards"},  # how models are made: one level, they call each other
    {"mirror_swap", "steering", "depth", "diagnosis", "finetune", "temporal", "theory"},
    {"models", "bench", "runner", "pad", "validate"},
    {"plan"},
    {"trial"},
    {"cli"},
)
# modules that import from their own level
BESIDE = ({"organisms", "language", "trainer", "cards"}, {"query", "pictures"})


def imported_by(path):
    "The modules of the library that a module imports, also inside functions."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = [node.module for node in imports if node.level]
    absolute = [node.module for node in imports if not node.level]
    return {*names, *(name.removeprefix("spatialid.") for name in absolute if name.startswith("spatialid."))}


def test_modules_import_downwards_only():
    "An experiment imports nothing from another one, nor from what runs experiments: what two need lies below both."
    level = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    paths = {path.stem: path for path in Path(spatialid.__file__).parent.glob("[a-z]*.py")}
    assert paths.keys() == level.keys(), "every module has its place in LAYERS"
    for module, path in paths.items():
        for other in imported_by(path) - {module}:
            beside = any({module, other} <= group for group in BESIDE)
            assert level[other] < level[module] or beside, f"{module} imports {other}"


def one_screen():
    "The code of the README that shows the whole interface."
    readme = (Path(__file__).parents[1]/"README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    return next(block for block in blocks if "SpatialIDs, extract, sweep, edits" in block)


@pytest.mark.slow
def test_the_interface_works_as_the_readme_prints_it(capsys):
    "Word for word, on a small model and with fewer questions and pictures: layer 18 of 30 is layer 5 of 8."
    code = one_screen()
    shorter = {'"llava-smol"': '"llava-tiny"', "n=200": "n=6", "grid_pairs(20)": "grid_pairs(2), sizes=(74,), px=80",
               "18": "5"}
    for long, short in shorter.items():
        assert long in code
        code = code.replace(long, short)
    lines = code.splitlines()
    names = {}
    exec("\n".join(lines[:-1]), names)
    estimate = names["swept"].shift("objects").ratio[5]
    assert isinstance(estimate, spatialid.Estimate) and estimate.n == 6
    with pytest.raises(KeyError, match="layer 18 was not swept: there are 1, 2"):
        names["swept"].shift("objects").ratio[18]
    assert estimate.low <= estimate.value <= estimate.high
    assert re.fullmatch(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\], n 6", repr(estimate))
    assert capsys.readouterr().out.strip().split()[0] in ("left", "right")
    vlm, base, vector = (names[name] for name in ("vlm", "base", "vector"))
    steered = eval(lines[-1], names).log_probs["ID"]
    with vlm.steer(base, {"subject": vector}, layer=5, scale=1): alone = vlm.run(base).log_probs
    assert (steered[4] - alone).abs().max() < 1e-4, "what a sweep writes at a layer is what steer adds there"
    score = names["ids"].grid_score(5)
    assert 0 <= score["value"] <= 1
