"""`make docs`: pages in _proc/, the structural check, and, where Quarto is installed, the site in _docs/.

Quarto does not run cells (`execute: enabled: false` in _quarto.yml). nbdev does, for the signatures that it shows: the
exported cells, and every cell with an import in it, whatever else that cell does. Here such a cell gives its imports
and keeps the output it was saved with."""
import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import nbdev.processors
import nbdev.serve
from fastcore.nbio import NbCell, read_nb, write_nb
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto import refresh_quarto_yml

from check_site import check
from make_metadata import settings

ROOT = Path(__file__).parents[1]
STORY = re.compile(r"(0[2-9]|13)_\w+")  # experiments; of the other notebooks the functions are the subject
FUNCTIONS = "## The functions of this page"
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


def functions_last(nb):
    "Puts the descriptions of exported functions at the end of a page: who reads a story wants none in between."
    def describes(cell): return cell.cell_type == "code" and "show_doc(" in cell.source
    story, described = ([cell for cell in nb.cells if describes(cell) == last] for last in (False, True))
    if not described: return
    heading = NbCell(len(story), {"cell_type": "markdown", "metadata": {}, "source": FUNCTIONS})
    nb.cells = [*story, heading, *described]


def finish_pages(root):
    "Of the processed pages: links that lead outside the site, and in those of experiments functions at the end."
    pages, ini = root/"_proc", settings(root)
    for page in sorted(pages.rglob("*.ipynb")):
        nb, folder = read_nb(page), page.parent.relative_to(pages)
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = link_outside(cell.source, folder, ini)
        if STORY.fullmatch(page.stem): functions_last(nb)
        write_nb(nb, page)


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
    if problems: sys.exit("\n".join(problems))
    print("site: OK, pages processed into _proc/")
    if shutil.which("quarto"):
        subprocess.run(["nbdev-docs", "--symlinks"], check=True)
        print("site rendered: _docs/index.html")
    else:
        print("Quarto is not installed, so nothing was rendered: `pip install quarto-cli` where there is a network, "
              "then `make docs`")


if __name__ == "__main__": main()
