"""`make docs`: pages in _proc/, the structural check, and, where Quarto is installed, the site in _docs/.

Quarto does not run cells (`execute: enabled: false` in _quarto.yml). nbdev does, for the signatures that it shows: the
exported cells, and every cell with an import in it, whatever else that cell does. Here such a cell gives its imports
and keeps the output it was saved with."""
import ast
import base64
import datetime
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from io import BytesIO
from pathlib import Path
from unittest import mock

import nbdev.processors
import nbdev.serve
import yaml
from fastcore.nbio import NbCell, read_nb, write_nb
from nbdev.config import nbpath2html
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto import refresh_quarto_yml
from PIL import Image

import spatialid
from check_site import check
from make_metadata import settings

ROOT = Path(__file__).parents[1]
STORY = re.compile(r"(0[2-9]|13)_\w+")  # experiments; of the other notebooks the functions are the subject
FUNCTIONS = "## The functions of this page"
SUMMARY = "## What was found"
DOTS = 90  # of a figure, for each inch of its width on a page
LONG = 15  # lines of printed output that a story shows unfolded
EXPORTED = {"export", "exports", "exporti", "exec_doc"}


def imports(source):
    "The imports at the top level of a cell, as source; the same source when Python cannot parse it (magics)."
    try: body = ast.parse(source).body
    except SyntaxError: return source
    return "\n".join(ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom)))


class RunForSignatures(exec_show_docs):
    "Runs exported cells, and the imports alone of all others. Raises Exception with the cell when one fails."
    def __call__(self, cell):
        if cell.cell_type != "code" or "show_doc(" in cell.source or EXPORTED & cell.directives_.keys():
            return super().__call__(cell)
        stand_in = NbCell(cell.idx_, dict(cell, source=imports(cell.source), outputs=[]))
        stand_in.directives_ = cell.directives_
        super().__call__(stand_in)


class Pages(FilterDefaults):
    "nbdev's processing of a page, with `RunForSignatures`."
    def base_procs(self):
        "The processors, in their order."
        return [RunForSignatures if proc is exec_show_docs else proc for proc in super().base_procs()]


def link_outside(text, folder, ini):
    """The Markdown `text` of a page in `folder` (below nbs/) its links to files outside nbs/ leading to the repository.

    Without an address of the repository in `ini`, the words of such a link are left."""
    def link(match):
        path = os.path.normpath(os.path.join("nbs", folder, match[2].partition("#")[0]))
        if re.match(r"\w+:|#", match[2]) or path.startswith("nbs"): return match[0]
        return f"[{match[1]}]({ini['git_url']}/blob/{ini['branch']}/{path})" if ini["git_url"] else match[1]
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


@cache
def notebook_of(page):
    "The notebook of a page by its name in nbdev, which leaves out the number; the same name where there is none."
    nbs = ROOT/"nbs"
    found = [path.relative_to(nbs) for pattern in ("*.ipynb", "lib/*.ipynb") for path in nbs.glob(pattern)]
    return {nbpath2html(path).as_posix(): path.as_posix() for path in found}.get(page, page)


def anchored(notebook, anchor):
    "The anchor of a method, or that of its class if it is written and described inside of it."
    of_class, _, method = anchor.partition(".")
    path = ROOT/"nbs"/notebook
    alone = not method or not path.is_file() or f'"def {method}(' in path.read_text(encoding="utf-8")
    return anchor if alone else of_class


def link_inside(text, page, ini):
    """The links that nbdev makes, for a page below nbs/: to notebooks, so that they lead somewhere wherever the site
    stands; and none to the source where there is no address of the repository. A word that is also the name of a
    function on another page, and not one that `import spatialid` offers, is a word."""
    if not ini["git_url"]: text = re.sub(r"\[source\]\(/blob/[^)]*\)(?:\{[^}]*\})?\s*", "", text)
    site = re.escape(ini["doc_url"].rstrip("/"))
    def link(match):
        notebook = notebook_of(match[2])
        offered = match[1].strip("`").partition(".")[0] in spatialid.__all__
        if notebook != page and not offered: return match[1]
        there = os.path.relpath(notebook, os.path.dirname(page))
        return f"[{match[1]}]({there}{anchored(notebook, match[3])})"
    return re.sub(rf"\[([^\]]*)\]\({site}/((?:\w+/)?\w+\.html)(#[^)]*|)\)", link, text)


def relink(text, page, ini):
    "Both, in the order in which the links to the source are still known as such."
    return link_outside(link_inside(text, page, ini), os.path.dirname(page), ini)


def one_name(nb):
    "A page is called as its notebook is: nbdev would leave out the number."
    cell = nb.cells[0]
    if cell.cell_type == "raw": cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.M)


def texts_of(nb):
    "[(a mapping, its key)] of every Markdown text of a page: cells and outputs."
    cells = [(cell, "source") for cell in nb.cells if cell.cell_type == "markdown"]
    outputs = [output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", ())]
    return cells + [(data, "text/markdown") for data in outputs if "text/markdown" in data]


def functions_last(nb):
    "Puts the descriptions of exported functions at the end of a page: who reads a story wants none in between."
    def describes(cell): return cell.cell_type == "code" and "show_doc(" in cell.source
    story, described = ([cell for cell in nb.cells if describes(cell) == last] for last in (False, True))
    if not described or any(cell.source == FUNCTIONS for cell in story): return
    heading = NbCell(len(story), {"cell_type": "markdown", "metadata": {}, "source": FUNCTIONS})
    nb.cells = [*story, heading, *described]


def box_summary(nb):
    "Marks the section that an experiment opens with: the style sheet draws a box around it."
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(rf"\A{SUMMARY}$", SUMMARY + " {.summary}", cell.source, flags=re.M)


def printed(output):
    "What an output prints, where it is nothing but text; else nothing."
    if output.output_type == "stream": return "".join(output.text)
    data = output.get("data", {})
    return "".join(data["text/plain"]) if data.keys() == {"text/plain"} else ""


def fold_outputs(nb):
    "Folds printed output of more than LONG lines."
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            lines = printed(output).rstrip().splitlines()
            if len(lines) <= LONG: continue
            block = "\n".join(["```", *lines, "```"])
            text = f"<details><summary>output, {len(lines)} lines</summary>\n\n{block}\n\n</details>"
            output.clear()
            output.update(output_type="display_data", metadata={}, data={"text/markdown": text})


def caption_of(source, heading):
    "(caption or nothing, alternative text) of the picture that a cell shows: of nbs/figures.json, else of its section."
    from spatialid.runner import figure_text
    saved = re.findall(r"save_figure\([^\n]*", source)
    known = figure_text(re.findall(r'"(\w+)"', saved[-1])[-1]) if saved else {"alt": ""}
    return (known["caption"], known["alt"]) if known["alt"] else ("", f"Figure of the section '{heading.strip()}'")


def caption_pictures(nb):
    "Gives every picture of a page its caption and alternative text, where its cell has none."
    heading = ""
    for cell in nb.cells:
        if cell.cell_type == "markdown": heading = [heading, *re.findall(r"^#+ +([^{\n]+)", cell.source, re.M)][-1]
        shows = any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
        if not shows or re.search(r"^#\| *fig-alt:", cell.source, re.M): continue
        texts = zip(("fig-cap", "fig-alt"), caption_of(cell.source, heading))
        lines = [f"#| {name}: {json.dumps(text, ensure_ascii=False)}\n" for name, text in texts if text]
        cell.source = "".join(lines) + cell.source


def shown_size(png):
    "(width, height) at which a page shows a PNG, a path or file, of more dots than DOTS; None for any other."
    with Image.open(png) as picture:
        share = DOTS / picture.info.get("dpi", [DOTS])[0]
        return tuple(round(side * share) for side in picture.size) if share < .95 else None


def size_outputs(nb):
    "Says of every picture in an output at what size it is shown."
    for output in (output for cell in nb.cells for output in cell.get("outputs", ())):
        png = output.get("data", {}).get("image/png")
        size = png and shown_size(BytesIO(base64.b64decode("".join(png))))
        if size: output["metadata"] = {"image/png": dict(zip(("width", "height"), size))}


def size_links(text, folder):
    "The Markdown `text` of a page in `folder` with the width of every picture that it names, where there is none yet."
    def sized(match):
        path = folder/match[1]
        size = shown_size(path) if path.is_file() else None
        return f"{match[0]}{{width={size[0]}}}" if size else match[0]
    return re.sub(r"!\[[^\]]*\]\(([^)\s]+\.png)\)(?!\{)", sized, text)


def finish_pages(root):
    """Of the processed pages: links, captions, sizes of pictures; in those of experiments the summary in a box, long
    outputs folded, functions at the end. And the claims on their page. What is finished already stays: nbdev makes what
    changed."""
    pages, ini = root/"_proc", settings(root)
    for page in sorted(pages.rglob("*.ipynb")):
        nb, folder = read_nb(page), page.parent.relative_to(pages)
        for where, key in texts_of(nb):
            text = relink("".join(where[key]), page.relative_to(pages).as_posix(), ini)
            where[key] = size_links(text, root/"nbs"/folder)
        one_name(nb)
        caption_pictures(nb)
        size_outputs(nb)
        if STORY.fullmatch(page.stem):
            for finish in (box_summary, fold_outputs, functions_last): finish(nb)
        write_nb(nb, page)
    for page in sorted((pages/"models").glob("*.md")):
        page.write_text(size_links(page.read_text(encoding="utf-8"), root/"nbs"/"models"), encoding="utf-8")
    import claims_page
    text = (root/"nbs"/"claims.md").read_text(encoding="utf-8")
    (pages/"claims.md").write_text(text.replace(claims_page.MARKER, claims_page.matrix(root/"nbs")), encoding="utf-8")


def last_change(root):
    "The date of the last commit, as in 2026-01-31; today's outside a repository."
    asked = subprocess.run(["git", "log", "-1", "--format=%cs"], cwd=root, capture_output=True, text=True)
    return asked.stdout.strip() or datetime.date.today().isoformat()


def site_yml(ini, date):
    "What nbs/site.yml says: the footer with version and date, and where there is one, links to the repository."
    links = [{"text": "Changelog", "href": "changelog.md"}, {"text": "How to cite", "href": "index.ipynb#citing"}]
    website = {"page-footer": {"left": f"{ini['lib_name']} {ini['version']}, {date}, {ini['license']}", "right": links}}
    if ini["git_url"]:
        website["repo-subdir"] = ini["nbs_path"]
        website["repo-actions"] = ["source", "issue"]
        website["navbar"] = {"right": [{"icon": "github", "href": ini["git_url"], "aria-label": "Repository"}]}
    return "# From settings.ini, by `make docs`.\n" + yaml.safe_dump({"website": website}, sort_keys=False)


def write_site_yml(root):
    "Writes nbs/site.yml of a checkout."
    path = Path(root)/"nbs"/"site.yml"
    path.write_text(site_yml(settings(root), last_change(root)), encoding="utf-8")


def write_model_pages(root):
    "Writes the page of each bundled model into nbs/models/, and removes those of others. Returns their paths."
    from spatialid.registry import bundled
    from spatialid.runner import model_page
    folder = Path(root)/"nbs"/"models"
    folder.mkdir(exist_ok=True)
    pages = {folder/f"{name}.md": model_page(name) for name in bundled()}
    for path in {*folder.glob("*.md")} - pages.keys(): path.unlink()
    for path, text in pages.items(): path.write_text(text, encoding="utf-8")
    return sorted(pages)


def process(root):
    """Makes the pages of a checkout in its _proc/. Returns problems, as sentences.

    As `nbdev-proc-nbs`, but without its attempt to install Quarto with sudo."""
    root = Path(root).absolute()
    os.chdir(root)
    write_model_pages(root)
    refresh_quarto_yml()
    write_site_yml(root)
    once = cache(nbdev.processors.get_config) # else the configuration is read again for every cell
    with (mock.patch.object(nbdev.serve, "FilterDefaults", Pages),
          mock.patch.object(nbdev.processors, "get_config", once)):
        nbdev.serve.proc_nbs(symlinks=True, n_workers=0)  # follows nbs/results
    finish_pages(root)
    pages = [p.relative_to("nbs") for pattern in ("*.ipynb", "lib/*.ipynb") for p in sorted(Path("nbs").glob(pattern))]
    missing = [page for page in pages if not Path("_proc", page).is_file()]
    return check(root) + [f"_proc/{page} was not made: remove _proc and run `make docs` again" for page in missing]


def main():
    "Pages, check and, with Quarto, the site. Exits with the problems when there are any."
    problems = process(ROOT)
    gc.freeze() # what the cells of all notebooks left is not looked through again at the end: half a minute
    if problems: sys.exit("\n".join(problems))
    print("site: OK, pages processed into _proc/")
    if shutil.which("quarto"):
        subprocess.run(["nbdev-docs", "--symlinks"], check=True)
        print("site rendered: _docs/index.html")
    else:
        print("Quarto is not installed, so nothing was rendered: `pip install quarto-cli` where there is a network, "
              "then `make docs`")


if __name__ == "__main__": main()
