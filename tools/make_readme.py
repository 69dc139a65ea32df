"""README.md from nbs/index.ipynb, without Quarto.

`python tools/make_readme.py` runs the cells of the home page, so that its tables and counts are those of results/, and
writes README.md; tests/test_repository.py compares."""
import ast
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]


def option(source, name):
    "The value of a `#| name: value` line of a cell, or None; a bare `#| name` counts as true."
    found = re.search(rf"^#\|\s*{name}\b(?::[ \t]*(\S+))?", source, re.M)
    return found and (found[1] or "true")


def relocate(text, nbs):
    "Links relative to the notebooks, made relative to the root. `results/`, a link in the notebooks' folder, stays."
    def link(match):
        path = match[2].partition("#")[0]
        local = path and not re.match(r"\w+:|/|results/", path) and (nbs/path).exists()
        return f"{match[1]}{'nbs/' if local and not path.startswith('../') else ''}{match[2].removeprefix('../')})"
    return re.sub(r"(\]\()([^)\s]+)\)", link, text)


def plain(text):
    "Markdown without what only the site reads: fenced parts, attributes of a link."
    return re.sub(r"^:::.*\n?", "", re.sub(r"(?<=\))\{[^}\n]*\}", "", text), flags=re.M)


def shown(output):
    "An output as Markdown: Markdown as it is, text in a block, pictures not at all."
    data = output.get("data", {})
    if "text/markdown" in data: return data["text/markdown"]
    text = output.get("text") or data.get("text/plain") or ""
    return f"```\n{text.rstrip()}\n```" if text and "image/png" not in data and output.get("name") != "stderr" else ""


def joined(outputs):
    "The outputs, with what was printed in several pieces in one."
    result = []
    for output in outputs:
        if result and output.output_type == result[-1].output_type == "stream" and output.name == result[-1].name:
            output = nbformat.from_dict({**output, "text": result.pop().text + output.text})
        result.append(output)
    return result


def refreshed(nb):
    "The home page with the Markdown that its cells give now. They read results and need no torch."
    names = {}
    for cell in (cell for cell in nb.cells if cell.cell_type == "code"):
        *body, last = ast.parse(cell.source).body
        exec(compile(ast.Module(body, []), "index.ipynb", "exec"), names)
        shown = eval(compile(ast.Expression(last.value), "index.ipynb", "eval"), names)
        data = {"text/markdown": shown.data, "text/plain": "<IPython.core.display.Markdown object>"}
        cell.outputs = [nbformat.v4.new_output("execute_result", data)]
    return nb


def render(path=ROOT/"nbs"/"index.ipynb"):
    "The text of README.md."
    parts = ["<!-- Generated from nbs/index.ipynb by `make prepare`: edit the notebook. -->"]
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "raw" or option(cell.source, "hide") or option(cell.source, "include") == "false": continue
        if cell.cell_type == "markdown": parts.append(plain(cell.source)); continue
        code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        if code and option(cell.source, "echo") != "false": parts.append(f"```python\n{code}\n```")
        parts += [text for text in map(shown, joined(cell.outputs)) if text]
    return relocate("\n\n".join(p.strip() for p in parts), Path(path).parent) + "\n"


if __name__ == "__main__":
    home = ROOT/"nbs"/"index.ipynb"
    nbformat.write(refreshed(nbformat.read(home, 4)), home)
    (ROOT/"README.md").write_text(render(), encoding="utf-8")
    print("README.md written")
