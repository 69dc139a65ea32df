"What a visitor of the site meets: figures that say what they show, claims as a matrix, links that lead somewhere."
import base64
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from PIL import Image

import claims_page
import make_docs
import make_metadata
import make_readme
import preview
from spatialid.claims import own_claims
from spatialid.registry import FLAGSHIP
from spatialid.runner import figure_text, figures_of, model_page, notebooks
from spatialid.store import DPI

ROOT = Path(__file__).parents[1]
NBS = ROOT/"nbs"
FIGURES = json.loads((NBS/"figures.json").read_text(encoding="utf-8"))
PICTURE = {"image/png": "", "text/plain": "<F>"}


@pytest.fixture
def stored(monkeypatch): monkeypatch.setenv("SPATIALID_RESULTS", str(ROOT))


def code(source, **data):
    "A cell with an output."
    shown = nbformat.v4.new_output("display_data", {kind.replace("_", "/"): text for kind, text in data.items()})
    return nbformat.v4.new_code_cell(source, outputs=[shown] if data else [])


def page(*cells): return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(cell) if isinstance(cell, str)
                                                         else cell for cell in cells])


def pictured(source):
    return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("display_data", PICTURE)])


# --- figures

def test_every_figure_that_a_notebook_saves_says_what_it_shows():
    saved = {name for path in notebooks().values() for name in figures_of(path)}
    assert not saved - FIGURES.keys(), "give each an entry in nbs/figures.json"
    sources = "".join(cell.source for path in notebooks().values() for cell in nbformat.read(path, 4).cells)
    assert not [name for name in FIGURES if f'"{name}"' not in sources], "no notebook saves these"
    for text in FIGURES.values():
        assert len(text["alt"]) > 40 and text["caption"][-1] in ".?" and '"' not in text["alt"] + text["caption"]


def test_pictures_get_the_text_of_their_figure_or_of_their_section():
    given = '#| fig-alt: "own"\nplot()'
    nb = page("# A\n\n## Where {.x}", pictured('save_figure(plot(f("x")), model, "fig4a")'), pictured("show()"),
              pictured(given))
    make_docs.caption_pictures(nb)
    first, second, third = (cell.source for cell in nb.cells[1:])
    options = yaml.safe_load("\n".join(line[3:] for line in first.splitlines() if line.startswith("#| ")))
    assert options == {"fig-cap": FIGURES["fig4a"]["caption"], "fig-alt": FIGURES["fig4a"]["alt"]}
    assert second == "#| fig-alt: \"Figure of the section 'Where'\"\nshow()" and third == given


def test_pictures_of_twice_the_dots_are_shown_at_half_their_width(tmp_path):
    "As a saved figure is; where a picture has no more dots than the page, nothing is said."
    for name, dots in (("sharp", 180), ("plain", 90)):
        Image.new("P", (40, 20)).save(tmp_path/f"{name}.png", dpi=(dots, dots))
    def shown(name): return base64.b64encode((tmp_path/f"{name}.png").read_bytes()).decode()
    nb = page(code("f()", image_png=shown("sharp")), code("g()", image_png=shown("plain")))
    make_docs.size_outputs(nb)
    sharp, plain = (cell.outputs[0].metadata for cell in nb.cells)
    assert sharp == {"image/png": {"width": 20, "height": 10}} and not plain
    once = make_docs.size_links("![a b](sharp.png) ![c](plain.png) ![d](gone.png)", tmp_path)
    assert once == "![a b](sharp.png){width=20} ![c](plain.png) ![d](gone.png)"
    assert make_docs.size_links(once, tmp_path) == once
    assert DPI == 2 * make_docs.DOTS


def test_the_page_of_a_model_begins_with_its_figures_and_is_not_searched(stored):
    text = model_page(FLAGSHIP)
    assert yaml.safe_load(text.split("---")[1])["search"] is False
    figure, claims, card = (text.index(part) for part in ("fig4a.png", "## Claims", "## The model"))
    assert figure < claims < card and figure_text("fig4a")["alt"] in text
    assert text.index("fig4a.png") < text.index("00_prompt.png"), "the experiments before the tools"


# --- pages

def test_a_page_is_finished_once():
    "A second run of `make docs`, in which nbdev leaves the page as it is, changes nothing."
    def finished(nb):
        for finish in (make_docs.caption_pictures, make_docs.box_summary, make_docs.fold_outputs,
                       make_docs.functions_last): finish(nb)
        return [(cell.source, str(cell.get("outputs"))) for cell in nb.cells]
    long = code("print(1)", text_plain="\n".join("x" * 20))
    nb = page("# A", "## What was found\n\nText.", long, code("show_doc(f)"), pictured("plot()"), "## The claim")
    once = finished(nb)
    assert finished(nb) == once and once[1][0] == "## What was found {.summary}\n\nText."
    assert "<summary>output, 20 lines</summary>" in once[2][1] and once[-1][0] == "show_doc(f)"


ADDRESS = "https://github.com/someone/spatialid"
SOURCE = '[source](/blob/main/a.py#L3){target="_blank"}\n\n### f'


@pytest.mark.parametrize("page, text, git, doc, made", [
    ("lib/a.ipynb", "[`VLM`](/hooks.html#vlm)", "", "", "[`VLM`](../00_hooks.ipynb#vlm)"),
    ("00_hooks.ipynb", "[`vlm.patch`](/hooks.html#vlm.patch)", "", "", "[`vlm.patch`](00_hooks.ipynb#vlm)"),
    ("00_hooks.ipynb", "[`vlm.load`](/hooks.html#vlm.load)", "", "", "[`vlm.load`](00_hooks.ipynb#vlm.load)"),
    ("02_mirror_swap.ipynb", "[`sweep`](https://a.io/s/sweeps.html#sweep)", "", "https://a.io/s",
     "[`sweep`](00_sweeps.ipynb#sweep)"),
    ("lib/a.ipynb", "[`total`](/bench.html#total)", "", "", "`total`"),
    ("lib/a.ipynb", SOURCE, "", "", "### f"),
    ("lib/a.ipynb", f"[source]({ADDRESS}/blob/main/a.py#L3)", ADDRESS, "", None),
    ("a.ipynb", "[x](https://b.org/hooks.html)", "", "https://a.io", None),
])
def test_links_of_nbdev_lead_somewhere(page, text, git, doc, made):
    "A word that only happens to be the name of a function elsewhere is none."
    ini = {"git_url": git, "doc_url": doc, "branch": "main"}
    assert make_docs.link_inside(text, page, ini) == make_docs.relink(text, page, ini) == (made or text)


def test_a_page_is_called_as_its_notebook_is():
    nb = page("# A")
    nb.cells.insert(0, nbformat.v4.new_raw_cell("---\noutput-file: mirror_swap.html\ntitle: A\n---\n"))
    make_docs.one_name(nb)
    assert nb.cells[0].source == "---\ntitle: A\n---\n"


def test_the_footer_has_version_and_date_and_the_repository_where_there_is_one():
    ini = {**make_metadata.settings(), "git_url": ""}
    bare, published = (yaml.safe_load(make_docs.site_yml({**ini, "git_url": url}, "2026-01-31"))["website"]
                       for url in ("", ADDRESS))
    assert f"{ini['version']}, 2026-01-31" in bare["page-footer"]["left"] and "navbar" not in bare
    assert published["navbar"]["right"][0]["href"] == ADDRESS and published["repo-subdir"] == "nbs"


def test_the_preview_finds_links_that_lead_nowhere(tmp_path):
    (tmp_path/"b.html").write_text('<h2 id="here">')
    links = ("b.html", "b.html#here", "b.html#gone", "none.png", "#top", "https://a.org", "/b.html")
    (tmp_path/"a.html").write_text("".join(f'<a href="{link}">' for link in links))
    assert [*preview.broken(tmp_path/"a.html")] == ["b.html#gone", "none.png", "#top", "/b.html"]


# --- claims

def test_the_matrix_has_every_verdict_and_leads_to_sections_that_exist(stored):
    text, names = claims_page.matrix(NBS), claims_page.compared()
    verdicts = {name: [row["verdict"] for row in own_claims(name).values()] for name in names}
    for said in ("holds", "fails", "undecided"):
        wanted = sum(found.count(said) for found in verdicts.values())
        assert text.count(f'<td><a class="{said}"') == wanted > 0
    assert text.count("<tr><th scope=\"row\">") == text.count('<details class="claim">')
    for stem, anchor in set(re.findall(r'href="(\d\d_\w+)\.html#([^"]+)"', text)):
        assert anchor in [found for _, found in claims_page.sections(NBS/f"{stem}.ipynb")]
    ids = re.findall(r'href="#(claim-[^"]+)"', text)
    assert ids and ids == [anchor for anchor in re.findall(r'<p id="(claim-[^"]+)"', text)]


@pytest.mark.parametrize("notebook, source, anchor", [
    ("03_extraction", "§D.1, Fig A18", "how-many-pairs-are-enough-figure-a18"),
    ("04_steering", "§3, Fig 6D", "figure-6c-and-d-near-far-in-between"), ("04_steering", "ours", "what-was-found"),
])
def test_the_section_of_a_claim_is_that_of_its_figure(notebook, source, anchor):
    assert claims_page.section_of({"rule": {"notebook": notebook}, "source": source}, NBS) == anchor


# --- home

def test_the_home_page_has_the_verdicts_of_the_results(stored):
    home = nbformat.read(NBS/"index.ipynb", 4)
    assert make_readme.refreshed(nbformat.read(NBS/"index.ipynb", 4)) == home, "run `make prepare`"
    assert len((ROOT/"README.md").read_text().splitlines()) <= 160


def test_readme_has_nothing_that_only_the_site_reads():
    assert make_readme.plain("::: {.start}\n[a](b.md){.btn} [c](d)\n:::\n") == "[a](b.md) [c](d)\n"
    assert ":::" not in (ROOT/"README.md").read_text()


# --- looks, workflows

def luminance(colour):
    "Of a colour such as #1f3a5f, by WCAG 2."
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= .04045 else ((part + .055) / 1.055)**2.4 for part in parts]
    return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2]


def contrast(*colours):
    low, high = sorted(map(luminance, colours))
    return (high + .05) / (low + .05)


def test_text_has_a_contrast_of_four_and_a_half():
    assert round(contrast("#000000", "#ffffff")) == 21
    css = (NBS/"styles.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r"\{([^}]*)\}", css)[:2])
    for names, ground in ((light, "#ffffff"), (dark, "#15181c")):
        assert contrast(names["faint"], ground) > 4.5 and contrast(names["faint"], names["box"]) > 4.5
        assert all(contrast(names[said], names[f"on-{said}"]) > 4.5 for said in ("holds", "fails", "undecided"))
    bar = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["navbar"]
    assert contrast(bar["background"], bar["foreground"]) > 4.5
    for name, ground in (("light", "#ffffff"), ("dark", "#15181c")):
        inks = re.findall(r"\$(?:body|link|code)-color: (#\w{6})", (NBS/f"{name}.scss").read_text())
        assert len(inks) == 3 and all(contrast(ink, ground) > 4.5 for ink in inks)


def test_workflows_parse_and_pin_their_actions():
    found = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT/".github"/"workflows").glob("*.yml")}
    steps = {name: [step for job in flow["jobs"].values() for step in job["steps"]] for name, flow in found.items()}
    used = [step["uses"] for each in steps.values() for step in each if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@v\d+", action) for action in used)
    runs = {name: [step["run"] for step in each if "run" in step] for name, each in steps.items()}
    assert runs["test.yml"] == ["make test"] and "make docs" in runs["site.yml"]
    assert all("permissions" in flow for flow in found.values())
