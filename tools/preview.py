"""`make preview`: the pages of `make docs` as plain HTML in _site/, to look at where Quarto is not installed.

Markdown, outputs and captions go through pandoc and the filter of the site, as Quarto's do, with the navigation and
the footer of its configuration around them, light or dark as the reader's system says. Pictures are links to
themselves in the place of Quarto's lightbox; its search and its themes are missing. Prints links that lead nowhere and
exits with 1 if there are any."""
import base64
import html
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pypandoc
import yaml
from fastcore.nbio import read_nb

from check_site import WEB, load_yaml, merge, targets

ROOT = Path(__file__).parents[1]
PANDOC = ["--mathml", "--toc", "--toc-depth=3", "--standalone", "--section-divs", "--wrap=none"]
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title$</title><link rel="icon" href="$root$favicon.svg">
<link rel="stylesheet" href="$root$preview.css"><link rel="stylesheet" href="$root$styles.css">
</head><body><script>
if (matchMedia("(prefers-color-scheme: dark)").matches) document.body.className = "quarto-dark";
</script>$skip$<header><nav class="bar" aria-label="main">$bar$</nav></header>
<div class="page"><nav class="side" aria-label="all pages">$side$</nav>
<main id="quarto-document-content"><h1>$title$</h1>
$if(description)$<p class="lead">$description$</p>$endif$
$if(toc)$<details class="toc"><summary>On this page</summary>$toc$</details>$endif$
$body$
<nav class="turn" aria-label="previous and next">$turn$</nav></main></div><footer>$footer$</footer>
</body></html>
"""
STYLE = """body { font: 17px/1.55 system-ui, sans-serif; margin: 0; color: #20242a; background: #fff; --ground: #fff; }
a { color: #0b57b0; } code { color: #8a2b0a; } pre code { color: inherit; }
body.quarto-dark { color: #e3e6ea; background: #15181c; --ground: #15181c; }
.quarto-dark a { color: #86b7ff; } .quarto-dark code { color: #ffb38a; } .quarto-dark pre code { color: inherit; }
nav.bar { background: #1f3a5f; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: .7rem 1rem; }
nav.bar a { color: #fff; text-decoration: none; } nav.bar details { color: #fff; position: relative; }
nav.bar details div { position: absolute; background: #1f3a5f; padding: .5rem 1rem; z-index: 9; width: 14rem; }
nav.bar details a { display: block; padding: .2rem 0; }
.page { display: flex; }
nav.side { width: 15rem; padding: 1rem; font-size: 14px; flex: none; box-sizing: border-box; }
nav.side a { display: block; text-decoration: none; padding: 3px 0; }
nav.side p { margin: .8rem 0 .2rem; font-weight: 600; }
main { max-width: 56rem; padding: 1rem 2rem; min-width: 0; flex: 1; overflow-wrap: break-word; }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; font-size: 14px; }
.quarto-dark pre { background: #1f242a; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid var(--line, #ccc); padding: 3px 8px; text-align: left; }
.img-fluid { max-width: 100%; height: auto; } figure { margin: 1rem 0; } .lead { font-size: 1.15em; }
.visually-hidden { position: absolute; clip-path: inset(50%); }
nav.turn { display: flex; justify-content: space-between; margin-top: 3rem; }
footer { border-top: 1px solid #ccc; padding: 1rem; font-size: 14px; display: flex; justify-content: space-between; }
footer a { margin-left: 1rem; }
@media (max-width: 900px) {
  nav.side { display: none; } main { padding: 1rem; } nav.bar details div { position: static; width: auto; }
}
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
    size = f" width={given['width']}" if "width" in given else ""
    return f'![{given.get("fig-cap", "")}](ROOT/figures/{name}.png){{fig-alt="{alt}"{size}}}'


def output_text(output, name, site, given):
    "One output of a cell as Markdown."
    data = output.get("data", {})
    def text(kind): return "".join(data[kind])
    size = output.get("metadata", {}).get("image/png", {})
    if "image/png" in data: return figure(text("image/png"), name, site, {**given, **size})
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


@cache
def title_of(page):
    "The title of a page: of its front matter, else its first heading, else the name of its file."
    if not page.is_file(): return page.stem.replace("_", " ")
    text = page.read_text(encoding="utf-8") if page.suffix == ".md" else "".join(read_nb(page).cells[0].source)
    matter = re.match(r"---\n(.*?)\n---", text, re.S)
    if matter: return str(yaml.safe_load(matter[1])["title"])
    heading = re.search(r"^# +(.+)$", text, re.M)
    return heading[1].strip() if heading else page.stem


def link(target, root, text):
    "A link to a page of the site, or elsewhere."
    address = target if WEB.match(target) else root + re.sub(r"\.(ipynb|md)(?=#|$)", ".html", target)
    return f'<a href="{address}">{html.escape(text)}</a>'


def sidebar(contents, pages, root):
    "The sections of the sidebar with links to their pages."
    lines = []
    for entry in contents:
        if isinstance(entry, dict):
            inside = [link(target, root, title_of(pages/target)) for target in targets(entry["contents"])]
            lines += [f"<p>{entry['section']}</p>", *inside]
        else: lines.append(link(entry, root, title_of(pages/entry)))
    return "\n".join(lines)


def named(entry, pages, root):
    "A link of the navigation, under its own text, else the title of its page."
    if isinstance(entry, str): return link(entry, root, title_of(pages/entry))
    return link(entry["href"], root, entry.get("text") or entry.get("aria-label") or title_of(pages/entry["href"]))


def navbar(bar, name, pages, root):
    "The name of the site, the links of the bar at the top, and its menus."
    lines = [f'<a href="{root}index.html"><b>{html.escape(name)}</b></a>']
    for entry in [*bar.get("left", ()), *bar.get("right", ())]:
        menu = isinstance(entry, dict) and entry.get("menu")
        inside = "".join(named(one, pages, root) for one in menu or ())
        shown = f"<details><summary>{entry['text']}</summary><div>{inside}</div></details>" if menu else ""
        lines.append(shown or named(entry, pages, root))
    return "\n".join(lines)


def turn(config, pages, target, root):
    "Links to the pages before and after one, in the order of the sidebar."
    order = [*targets(config["website"]["sidebar"]["contents"])]
    if target not in order: return ""
    at = order.index(target)
    beside = {"←": order[at - 1] if at else None, "→": order[at + 1] if at + 1 < len(order) else None}
    return " ".join(link(page, root, f"{arrow} {title_of(pages/page)}") for arrow, page in beside.items() if page)


def around(config, pages, target, root):
    "What stands around the page `target`: {part of the template: HTML}."
    website = config["website"]
    footer = website.get("page-footer", {})
    right = "".join(named(one, pages, root) for one in footer.get("right", ()))
    skip = (pages/"skip.html").read_text() if (pages/"skip.html").is_file() else ""
    return {"root": root, "skip": skip, "bar": navbar(website.get("navbar", {}), website.get("title", ""), pages, root),
            "side": sidebar(website["sidebar"]["contents"], pages, root), "turn": turn(config, pages, target, root),
            "footer": f"<span>{footer.get('left', '')}</span><span>{right}</span>"}


def render(page, pages, site, config):
    "One page as HTML in the site. Returns its path."
    relative = page.relative_to(pages)
    root, out = "../" * (len(relative.parts) - 1), site/relative.with_suffix(".html")
    text = page.read_text(encoding="utf-8") if page.suffix == ".md" else as_markdown(read_nb(page), page.stem, site)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = text.replace("](ROOT/", f"]({root}").replace("{fig-alt=", "{alt=")
    extra = [*PANDOC, f"--template={site/'template.html'}"]
    for name, value in around(config, pages, relative.as_posix(), root).items(): extra += ["-V", f"{name}={value}"]
    if (pages/"pages.lua").is_file(): extra.append(f"--lua-filter={pages/'pages.lua'}")
    if not re.match(r"---\n", text):
        extra += ["-M", f"title={title_of(page)}"]
        text = re.sub(r"^# .+\n", "", text, count=1, flags=re.M) if page.suffix == ".md" else text
    made = pypandoc.convert_text(text, "html5", "markdown-implicit_figures+implicit_figures", extra_args=extra)
    local = r'href="(?!\w+:)([^"#]+)\.(?:ipynb|md)(#[^"]*)?"'
    made = re.sub(local, r'href="\1.html\2"', made)
    picture = r'<img ([^>]*?\bsrc="([^"]+)"[^>]*)>'
    out.write_text(re.sub(picture, r'<a href="\2"><img class="img-fluid" \1></a>', made), encoding="utf-8")
    return out


def copy_resources(pages, pattern, site):
    "Copies the files that a page loads; those of results/ are there by the link."
    for path in pages.glob(pattern) if not pattern.startswith("results/") else ():
        to = site/path.relative_to(pages)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)


@cache
def anchors(page):
    "The identifiers in a rendered page."
    return {*re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8"))}


def broken(page):
    "The links and pictures of a rendered page that lead nowhere."
    found = dict.fromkeys(re.findall(r'\b(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")))
    for address in (html.unescape(each) for each in found if not WEB.match(each) and not each.startswith("data:")):
        path, _, anchor = address.partition("#")
        to = page if not path else page.parent/unquote(path)
        if not to.exists(): yield address
        elif anchor and to.suffix == ".html" and unquote(anchor) not in anchors(to): yield address


def configuration(pages):
    "The configuration of the site, its metadata files merged in."
    config = load_yaml(pages/"_quarto.yml", [])
    for name in config.get("metadata-files") or []: config = merge(load_yaml(pages/name, []), config)
    return config


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
    config = configuration(pages)
    for pattern in config["project"].get("resources", ()): copy_resources(pages, pattern, site)
    found = sorted({*pages.rglob("*.ipynb"), *pages.rglob("*.md")})
    made = [render(page, pages, site, config) for page in found]
    (site/"template.html").unlink()
    print(f"{len(found)} pages: {site/'index.html'}")
    wrong = [f"{page.relative_to(site)}: {address} leads nowhere" for page in made for address in broken(page)]
    if wrong: sys.exit("\n".join(wrong))


if __name__ == "__main__": main()
