"""README.md from nbs/index.ipynb, without Quarto.

`python tools/make_readme.py` writes it, tests/test_repository.py compares."""
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


def render(path=ROOT/"nbs"/"index.ipynb"):
    "The text of README.md."
    parts = ["<!-- Generated from nbs/index.ipynb by `make prepare`: edit the notebook. -->"]
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "raw" or option(cell.source, "hide") or option(cell.source, "include") == "false": continue
        if cell.cell_type == "markdown": parts.append(cell.source); continue
        code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        if code and option(cell.source, "echo") != "false": parts.append(f"```python\n{code}\n```")
        parts += [text for text in map(shown, joined(cell.outputs)) if text]
    return relocate("\n\n".join(p.strip() for p in parts), Path(path).parent) + "\n"


if __name__ == "__main__":
    (ROOT/"README.md").write_text(render(), encoding="utf-8")
    print("README.md written")
