"""The page of the claims: a matrix, claims × models, each cell leading to the section where it was measured.

`make docs` puts it in the place of MARKER in nbs/claims.md; what each claim says and how it is judged unfolds below."""
import re
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path

from fastcore.nbio import read_nb

from check_site import slug
from spatialid.claims import VERDICTS, counted_verdicts, own_claims, register
from spatialid.registry import bundled
from spatialid.stats import as_text

MARKER = "<!-- matrix -->"
SUMMARY = "what-was-found"
OVER_ALL = "models"  # the results of claims about all models at once


def compared():
    "The models with a column: those whose training is finished and on which a claim was judged, then all together."
    return [*(name for name in bundled() if not name.endswith("-early") and own_claims(name)), OVER_ALL]


@cache
def sections(path):
    "[(heading, its identifier)] of a notebook, 'Figure 6C and D' read as 'Figure 6C, 6D'."
    text = "\n".join(cell.source for cell in read_nb(path).cells if cell.cell_type == "markdown")
    found = re.findall(r"^#{2,}\s+(.+?)\s*$", text, re.M)
    return [(re.sub(r"(\d+)([A-Z]) and ([A-Z])\b", r"\1\2, \1\3", heading), slug(heading)) for heading in found]


def section_of(entry, folder):
    "The identifier of the section on a claim in its notebook: that of its figure or table, else the summary's."
    found = sections(Path(folder)/f"{entry['rule']['notebook']}.ipynb")
    for kind, label in re.findall(r"(Fig|Table|Eq)s?\.? (\w+)", entry["source"]):
        for heading, anchor in found:
            if re.search(rf"{kind}\w*\.? [^:]*\b{label}\b", heading): return anchor
    return SUMMARY


def cell(row, name, entry, folder):
    "A cell of the matrix: the mark of the verdict of a model, a link; what was found is its name."
    if row is None: return '<td><span class="unjudged" aria-label="not judged">·</span></td>'
    said = escape(f"{name}, {entry['id']}: {row['verdict']}, {as_text(row)}", quote=True)
    target = f"{entry['rule']['notebook']}.html#{section_of(entry, folder)}"
    mark = VERDICTS[row["verdict"]]
    return f'<td><a class="{row["verdict"]}" href="{target}" title="{said}" aria-label="{said}">{mark}</a></td>'


def title_of(path):
    "The title of a notebook."
    return read_nb(path).cells[0].source.splitlines()[0].lstrip("# ")


def body(own, entries, folder):
    "The rows of the matrix, under the titles of the notebooks that measure them."
    rows = []
    for notebook, group in groupby(entries, lambda entry: entry["rule"]["notebook"]):
        title = escape(title_of(Path(folder)/f"{notebook}.ipynb"))
        rows.append(f'<tr class="part"><th scope="rowgroup" colspan="{len(own) + 1}">{title}</th></tr>')
        for entry in group:
            head = f'<th scope="row"><a href="#claim-{entry["id"]}">{escape(entry["claim"])}</a></th>'
            cells = "".join(cell(rows_of.get(entry["id"]), name, entry, folder) for name, rows_of in own.items())
            rows.append(f"<tr>{head}{cells}</tr>")
    return "\n".join(rows)


def details(entry, own):
    "All about a claim, folded."
    found = [f"<li>{escape(name)}: {VERDICTS[rows[entry['id']]['verdict']]} {rows[entry['id']]['verdict']}, "
             f"{escape(as_text(rows[entry['id']]))}</li>" for name, rows in own.items() if entry["id"] in rows]
    condition = f" Judged if {entry['precondition']}." if entry["precondition"] else ""
    changes = [f"<li>{change['date']}: {escape(change['why'])}</li>" for change in entry["history"]]
    history = f"<p>Changes of the rule:</p><ul>{''.join(changes)}</ul>" if changes else ""
    return (f'<details class="claim"><summary><code>{entry["id"]}</code> {escape(entry["claim"])}</summary>\n'
            f'<p id="claim-{entry["id"]}">{escape(entry["sentence"] or entry["claim"])} ({escape(entry["source"])}). '
            f'In the paper: {escape(entry["paper"])}.</p>\n<p>Measured: {escape(entry["measure"])}.{escape(condition)} '
            f'Resampled: {escape(entry["unit"])}.</p>\n<ul>{"".join(found) or "<li>on no model yet</li>"}</ul>\n'
            f"{history}</details>")


def heads(own):
    "The head of the matrix: the names of the models, each leading to its page."
    def linked(name): return f"{'13_models' if name == OVER_ALL else f'models/{name}'}.html"
    def shown(name): return "all together" if name == OVER_ALL else name
    return "".join(f'<th scope="col"><a href="{linked(name)}">{escape(shown(name))}</a></th>' for name in own)


def raw(html):
    "HTML in a page of Markdown."
    return f"```{{=html}}\n{html}\n```"


def matrix(folder):
    "The matrix and the details as Markdown with HTML in it; `folder` is that of the notebooks."
    own = {name: own_claims(name) for name in compared()}
    entries = sorted((entry for entry in register().values() if entry["rule"]), key=lambda e: e["rule"]["notebook"])
    counts = "\n".join(f"- `{name}`: {counted_verdicts(rows.values())}" for name, rows in own.items())
    table = (f'<div class="scroll" tabindex="0"><table class="matrix" data-quarto-disable-processing="true">'
             f'<caption class="visually-hidden">Verdicts on each claim, by model</caption><thead><tr><td></td>'
             f"{heads(own)}</tr></thead><tbody>\n{body(own, entries, folder)}\n</tbody></table></div>")
    folded = "\n".join(details(entry, own) for entry in entries)
    parts = [raw(table), "## How many", counts, "## Each claim: what it says, how it is judged", raw(folded)]
    return "\n\n".join(parts)
