"""`make preview`: the pages of `make docs` as plain HTML in _site/, to look at where Quarto is not installed.

Markdown, outputs and captions go through pandoc, as Quarto's do, with the navigation of _quarto.yml around them.
Themes, search, lightboxes and tabs are Quarto's own: they are missing here."""
import base64
import html
import os
import re
import shutil
import sys
from pathlib import Path

import pypandoc
import yaml
from fastcore.nbio import read_nb

from check_site import targets

ROOT = Path(__file__).parents[1]
MATH = ["--mathml", "--toc", "--toc-depth=3", "--standalone", "--wrap=none"]
HIDDEN = ("include: false", "echo: false")
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title$</title><link rel="stylesheet" href="$root$preview.css"><link rel="stylesheet" href="$root$styles.css">
</head><body><nav class="site">$nav$</nav><main><h1>$title$</h1>
$if(description)$<p class="lead">$description$</p>$endif$
$if(toc)$<details class="toc"><summary>On this page</summary>$toc$</details>$endif$
$body$
</main></body></html>
"""
STYLE = """body { font: 17px/1.55 system-ui, sans-serif; margin: 0; display: flex; color: #222; }
nav.site { width: 14rem; padding: 1rem; font-size: 14px; flex: none; background: #f6f6f6; }
nav.site a { display: block; color: #235; text-decoration: none; padding: 2px 0; }
main { max-width: 52rem; padding: 1rem 2rem; min-width: 0; flex: 1; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: 14px; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid #ddd; padding: 3px 8px; text-align: left; }
math[display=block] { overflow-x: auto; }
@media (max-width: 700px) { body { flex-direction: column-reverse; } nav.site { width: auto; } main { padding: 1rem; } }
"""


def options(source):
    "The `#|` options at the head of a cell, {name: text}."
    lines = re.findall(r"^#\|\s*([\w-]+):\s*(.*)$", source, re.M)
    return {name: value.strip().strip("\"'") for name, value in lines}


def figure(png, name, site, given):
    "Saves a picture of an output; its Markdown, with caption and alternative text."
    path = site/"figures"/f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(png))
    alt = html.escape(given.get("fig-alt", ""), quote=True)
    return f'![{given.get("fig-cap", "")}](ROOT/figures/{name}.png){{fig-alt="{alt}"}}'


def output_text(output, name, site, given):
    "One output of a cell as Markdown."
    data = output.get("data", {})
    def text(kind): return "".join(data[kind])
    if "image/png" in data: return figure(text("image/png"), name, site, given)
    if "text/markdown" in data: return text("text/markdown")
    if "text/html" in data: return f"```{{=html}}\n{text('text/html')}\n```"
    plain = text("text/plain") if "text/plain" in data else "".join(output.get("text", ""))
    return f"::: cell-output\n```\n{plain.rstrip()}\n```\n:::" if plain.strip() else ""


def as_markdown(nb, stem, site):
    "A processed notebook as Markdown: its front matter, its text, its code folded, its outputs."
    parts = []
    for i, cell in enumerate(nb.cells):
        source = "".join(cell.source)
        given = options(source)
        if cell.cell_type != "code":
            parts.append(source)
            continue
        if given.get("include") == "false": continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code and given.get("echo") != "false":
            parts.append(f"<details><summary>code</summary>\n\n```python\n{code}\n```\n\n</details>")
        outputs = cell.get("outputs", [])
        parts += [output_text(output, f"{stem}-{i}-{j}", site, given) for j, output in enumerate(outputs)]
    return "\n\n".join(parts)


def navigation(config, root):
    "Links to the pages of the sidebar, in its order."
    links = []
    for page in targets(config["website"]["sidebar"]["contents"]):
        path = Path(page)
        name = path.parent.name if path.stem == "index" and path.parent.name else path.stem
        links.append(f'<a href="{root}{path.with_suffix(".html")}">{name.replace("_", " ")}</a>')
    return "\n".join(links)


def render(page, pages, site, config):
    "One page as HTML in the site. Returns its path."
    relative = page.relative_to(pages)
    root, out = "../" * (len(relative.parts) - 1), site/relative.with_suffix(".html")
    text = page.read_text(encoding="utf-8") if page.suffix == ".md" else as_markdown(read_nb(page), page.stem, site)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = text.replace("](ROOT/", f"]({root}")
    extra = [*MATH, f"--template={site/'template.html'}", "-V", f"nav={navigation(config, root)}", "-V", f"root={root}"]
    if not re.match(r"---\n", text): extra += ["-M", f"title={page.stem}"]
    made = pypandoc.convert_text(text, "html5", "markdown-implicit_figures+implicit_figures", extra_args=extra)
    local = r'href="(?!\w+:)([^"#]+)\.(?:ipynb|md)(#[^"]*)?"'
    out.write_text(re.sub(local, r'href="\1.html\2"', made), encoding="utf-8")
    return out


def copy_resources(pages, pattern, site):
    "Copies the files that a page loads; those of results/ are there by the link."
    for path in pages.glob(pattern) if not pattern.startswith("results/") else ():
        to = site/path.relative_to(pages)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)


def main():
    "Renders every page of _proc/ into _site/."
    pages, site = ROOT/"_proc", ROOT/"_site"
    if not pages.is_dir(): sys.exit("no pages in _proc/: run `make docs` first")
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir()
    (site/"template.html").write_text(TEMPLATE, encoding="utf-8")
    (site/"preview.css").write_text(STYLE, encoding="utf-8")
    for name in ("styles.css", "favicon.svg"): shutil.copy(ROOT/"nbs"/name, site)
    os.symlink(ROOT/"results", site/"results")
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    for pattern in config["project"].get("resources", ()): copy_resources(pages, pattern, site)
    found = sorted({*pages.rglob("*.ipynb"), *pages.rglob("*.md")})
    for page in found: render(page, pages, site, config)
    print(f"{len(found)} pages: {site/'index.html'}")


if __name__ == "__main__": main()
