"""What Quarto would refuse or accept in silence, checked without Quarto. `python tools/check_site.py [root]` prints the problems, exit code 1 if any.

Quarto 1.7 refuses unknown website keys, wrong types and broken YAML, but says nothing of a sidebar entry without a page, a missing metadata
file, an unknown top-level key, a missing image or a broken link; and it loads scripts from the web for pages with HTML outputs."""
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml

from make_metadata import settings

KEYS = {
    "": {"project", "website", "format", "execute", "metadata-files", "format-links", "filters", "bibliography", "lang", "author", "date", "toc"},
    "project": {"type", "output-dir", "render", "resources", "execute-dir", "pre-render", "post-render", "preview"},
    "website": {"title", "site-url", "site-path", "description", "favicon", "image", "repo-url", "repo-branch", "repo-subdir", "repo-actions", "navbar", "sidebar",
                "search", "page-footer", "page-navigation", "back-to-top-navigation", "bread-crumbs", "reader-mode", "open-graph", "twitter-card", "draft-mode", "announcement"},
    "website.navbar": {"title", "logo", "logo-alt", "background", "foreground", "search", "pinned", "collapse", "left", "right", "tools", "toggle-position"},
    "website.sidebar": {"id", "title", "subtitle", "logo", "style", "background", "foreground", "search", "collapse-level", "contents", "header", "footer", "tools", "pinned", "alignment", "border"},
    "format.html": {"theme", "css", "toc", "toc-depth", "toc-location", "toc-title", "html-math-method", "code-copy", "code-overflow", "code-fold", "code-line-numbers", "highlight-style",
                    "number-sections", "anchor-sections", "smooth-scroll", "link-external-newwindow", "page-layout", "grid", "fig-cap-location", "keep-md", "embed-resources", "mainfont"},
}
TYPES = {"project": dict, "website": dict, "format": dict, "website.title": str, "website.navbar": dict, "format.html": dict, "metadata-files": list}
WEB = re.compile(r"^(https?:|mailto:)", re.I)


def load_yaml(path, problems):
    "The mapping in a YAML file; an empty one, and a problem, if it cannot be read."
    try: found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        problems.append(f"{path.name}: {'missing' if isinstance(e, OSError) else 'broken YAML: ' + str(e).splitlines()[0]}")
        return {}
    if not isinstance(found, dict): problems.append(f"{path.name}: not a mapping"); return {}
    return found


def merge(low, high):
    "Two nested mappings; where both have a value, `high` wins."
    both = low.keys() & high.keys()
    return {**low, **high, **{k: merge(low[k], high[k]) for k in both if isinstance(low[k], dict) and isinstance(high[k], dict)}}


def at(config, dotted):
    "The value at a dotted key, or None."
    for key in filter(None, dotted.split(".")): config = config.get(key) if isinstance(config, dict) else None
    return config


def targets(entry):
    "Every page that a navbar or sidebar entry refers to."
    if isinstance(entry, str): yield entry
    elif isinstance(entry, list): yield from (t for e in entry for t in targets(e))
    elif isinstance(entry, dict):
        for key in ("href", "file"):
            if entry.get(key): yield entry[key]
        for key in ("contents", "menu", "left", "right"): yield from targets(entry.get(key) or [])


def check_config(nbs, problems):
    "The merged site configuration: keys, types, navigation, style."
    config = load_yaml(nbs/"_quarto.yml", problems)
    for name in config.get("metadata-files") or []: config = merge(load_yaml(nbs/name, problems), config)
    for where, known in KEYS.items():
        found = at(config, where)
        if isinstance(found, dict): problems += [f"_quarto.yml: unknown key {f'{where}.{k}'.strip('.')}" for k in found.keys() - known]
    problems += [f"_quarto.yml: {k} must be a {t.__name__}" for k, t in TYPES.items() if at(config, k) is not None and not isinstance(at(config, k), t)]
    if at(config, "project.type") != "website": problems.append("_quarto.yml: project.type is not website")
    for key in ("project.output-dir", "website.title"):
        if not at(config, key): problems.append(f"_quarto.yml: {key} is missing")
    pages = {t for bar in ("website.sidebar", "website.navbar") for t in targets(at(config, bar) or []) if not WEB.match(t)}
    problems += [f"_quarto.yml: link target {t} missing" for t in sorted(pages) if not (nbs/t).is_file()]
    listed = set(targets(at(config, "website.sidebar") or []))
    of_site = [p.relative_to(nbs).as_posix() for p in [*sorted(nbs.glob("*.ipynb")), *sorted(nbs.glob("lib/*.ipynb")), *sorted(nbs.glob("models/*.md"))]]
    problems += [f"_quarto.yml: {p} is not in the sidebar" for p in of_site if p not in listed]
    css = at(config, "format.html.css") or []
    files = [*([css] if isinstance(css, str) else css), at(config, "website.favicon"), at(config, "website.image")]
    problems += [f"_quarto.yml: {f} missing" for f in files if f and not (nbs/f).is_file()]
    if at(config, "format.html.html-math-method") not in ("mathml", "plain", "gladtex"): problems.append("_quarto.yml: format.html.html-math-method would load mathematics from the web; use mathml")
    if at(config, "format.html.theme") != "default": problems.append("_quarto.yml: format.html.theme must be default: the other themes load a font from the web")


def slug(heading):
    "Pandoc's identifier of a heading."
    text = re.sub(r"[^\w\s.-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def check_text(text, folder, anchors, name, problems, attachments=()):
    "Images and links of one Markdown text, relative to `folder`."
    text = re.sub(r"^```.*?^```|^~~~.*?^~~~|`[^`\n]+`", "", text, flags=re.S | re.M)
    inline = re.findall(r"(!?)\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^)\s>]+)", text)
    tags = [("!" if t.lower() == "img" else "", u) for t, u in re.findall(r"<(img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)", text, re.I)]
    nested = [("!", u) for u in re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", text)]
    references = [("", u) for u in re.findall(r"^\[[^\]^]+\]:\s*<?(\S+?)>?\s*$", text, re.M)]
    for bang, url in dict.fromkeys(inline + tags + nested + references):
        kind, (path, _, anchor) = ("image" if bang else "link"), url.partition("#")
        if WEB.match(url):
            if bang: problems.append(f"{name}: image {url} would be loaded from the web")
        elif url.startswith("attachment:"):
            if url.removeprefix("attachment:") not in attachments: problems.append(f"{name}: image {url} missing")
        elif not path:
            if anchor not in anchors: problems.append(f"{name}: no section #{anchor}")
        elif path.startswith(("/", "file:")): problems.append(f"{name}: {kind} {url} is absolute")
        elif not (folder/unquote(path)).exists(): problems.append(f"{name}: {kind} {url} missing")


def headings(texts):
    "The section identifiers of some Markdown texts."
    bare = [re.sub(r"^```.*?^```", "", t, flags=re.S | re.M) for t in texts]
    return {slug(re.sub(r"\{.*\}$", "", h)) for t in bare for h in re.findall(r"^#+\s+(.+?)\s*$", t, re.M)} | {i for t in bare for i in re.findall(r"\{#([\w-]+)", t)}


def check_notebook(path, problems):
    "One page: valid, titled, links and images present, nothing in its outputs that needs the web."
    try: nb = nbformat.read(path, 4); nbformat.validate(nb)
    except Exception as e: problems.append(f"{path.name}: not a valid notebook: {str(e).splitlines()[0]}"); return
    first = nb.cells[0] if nb.cells else None
    if first is not None and first.cell_type == "raw":
        matter = first.source.strip().removeprefix("---").removesuffix("---")
        try: titled = isinstance(yaml.safe_load(matter), dict) and "title" in yaml.safe_load(matter)
        except yaml.YAMLError as e: problems.append(f"{path.name}: broken YAML in the front matter: {str(e).splitlines()[0]}"); return
    else: titled = first is not None and first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S", first.source)
    if not titled: problems.append(f"{path.name}: the first cell must be '# Title' and '> one line'")
    anchors = headings(c.source for c in nb.cells if c.cell_type == "markdown")
    for i, cell in enumerate(nb.cells, 1):
        where = f"{path.name} cell {i}"
        if cell.cell_type == "markdown": check_text(cell.source, path.parent, anchors, where, problems, cell.get("attachments", {}))
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                if kind in ("text/html", "application/javascript", "application/vnd.jupyter.widget-view+json"):
                    problems.append(f"{where}: its {kind} output would load scripts from the web; show text, Markdown or an image")
                if kind == "text/markdown": check_text(data, path.parent, anchors, where, problems)


def wrong_addresses(text, root, ini):
    "What is wrong with the links of `text` to the repository and the site of `ini`, and to one of that name elsewhere; as sentences."
    code, site = (ini[key].rstrip("/") for key in ("git_url", "doc_url"))
    for url in dict.fromkeys(re.findall(rf"https?://[\w.]*git[\w./-]*/{ini['lib_name']}\b[\w./#?%-]*", text)):
        file = re.match(rf"{re.escape(code)}/(?:blob|tree|raw)/[^/]+/([^#?]+)", url)
        page = re.match(rf"{re.escape(site)}/([^#?]+)\.html", url)
        if not any(start and url.startswith(start) for start in (code, site)): yield f"{url} is not an address of settings.ini"
        elif file and not (root/unquote(file[1])).exists(): yield f"{url}: no {unquote(file[1])} in the repository"
        elif page and not any((root/"nbs"/page[1]).with_suffix(kind).exists() for kind in (".ipynb", ".md")): yield f"{url}: no such page"


def check_repository(root, problems):
    "Addresses of the repository and the site, as in settings.ini, and files of tests/ and tools/ that anything names."
    ini, folders = settings(root), ("nbs", "spatialid", "tools", ".ci")
    files = [p for folder in folders for p in sorted((root/folder).rglob("*")) if p.suffix in (".py", ".ipynb", ".md", "")]
    for path in filter(Path.is_file, [*sorted(root.iterdir()), *files]):
        text, name = path.read_text(encoding="utf-8", errors="ignore"), path.relative_to(root)
        for named in dict.fromkeys(re.findall(r"(?<![\w/.])(?:tests|tools)/\w+\.py\b", text)):
            if not (root/named).is_file(): problems.append(f"{name}: {named} missing")
        if name.name != "settings.ini": problems += [f"{name}: {wrong}" for wrong in wrong_addresses(text, root, ini)]


def check(root):
    "All problems of the site of a checkout, as sentences."
    root, problems = Path(root), []
    nbs = root/"nbs"
    if not (root/"_quarto.yml").is_file() or not (nbs/"_quarto.yml").exists() or not (root/"_quarto.yml").samefile(nbs/"_quarto.yml"):
        problems.append("nbs/_quarto.yml must be a link to _quarto.yml")
    check_config(nbs, problems)
    check_repository(root, problems)
    if not (nbs/"index.ipynb").is_file(): problems.append("the home page nbs/index.ipynb is missing")
    for path in (*sorted(nbs.glob("*.ipynb")), *sorted(nbs.glob("lib/*.ipynb"))): check_notebook(path, problems)
    for path in (root/"README.md", root/"CONTRIBUTING.md", *sorted(nbs.glob("models/*.md"))):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text: problems.append(f"{path.name} is missing")
        check_text(text, path.parent, headings([text]), path.name, problems)
    return problems


if __name__ == "__main__":
    found = check(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])
    print("\n".join(found) or "site: OK")
    sys.exit(bool(found))
