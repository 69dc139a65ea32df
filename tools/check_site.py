"""What Quarto would refuse or accept in silence, checked without Quarto.

`python tools/check_site.py [root]` prints the problems; exit code 1 if there are any. Quarto 1.7 refuses unknown
website keys, wrong types and broken YAML, but says nothing of a sidebar entry without a page, a missing metadata file,
an unknown top-level key, a missing image or a broken link; and it loads scripts from the web for pages with HTML
outputs."""
import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import nbformat
import yaml

from make_metadata import settings

KEYS = {where: set(keys.split()) for where, keys in {
    "": "project website format execute metadata-files format-links filters bibliography lang author date toc",
    "project": "type output-dir render resources execute-dir pre-render post-render preview",
    "website": "title site-url site-path description favicon image repo-url repo-branch repo-subdir repo-actions "
               "navbar sidebar search page-footer page-navigation back-to-top-navigation bread-crumbs reader-mode "
               "open-graph twitter-card draft-mode announcement",
    "website.navbar": "title logo logo-alt background foreground search pinned collapse left right tools "
                      "toggle-position",
    "website.sidebar": "id title subtitle logo style background foreground search collapse-level contents header "
                       "footer tools pinned alignment border",
    "format.html": "theme css toc toc-depth toc-location toc-title html-math-method code-copy code-overflow code-fold "
                   "code-summary code-line-numbers highlight-style number-sections anchor-sections smooth-scroll "
                   "link-external-newwindow page-layout grid fig-cap-location keep-md embed-resources mainfont "
                   "lightbox include-before-body respect-user-color-scheme",
}.items()}
TYPES = {"project": dict, "website": dict, "format": dict, "website.title": str, "website.navbar": dict,
         "format.html": dict, "metadata-files": list}
PAGES = ("*.ipynb", "*.md", "lib/*.ipynb", "models/*.md", "pad/*.md")
WEB = re.compile(r"^(https?:|mailto:)", re.I)


def load_yaml(path, problems):
    "The mapping in a YAML file; an empty one, and a problem, if it cannot be read."
    try: found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        problems.append(f"{path.name}: missing")
        return {}
    except yaml.YAMLError as e:
        problems.append(f"{path.name}: broken YAML: {str(e).splitlines()[0]}")
        return {}
    if not isinstance(found, dict): problems.append(f"{path.name}: not a mapping"); return {}
    return found


def merge(low, high):
    "Two nested mappings; where both have a value, `high` wins."
    nested = [k for k in low.keys() & high.keys() if isinstance(low[k], dict) and isinstance(high[k], dict)]
    return {**low, **high, **{k: merge(low[k], high[k]) for k in nested}}


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
        for key in ("contents", "menu", "left", "center", "right"): yield from targets(entry.get(key) or [])


def check_keys(config, problems):
    "Keys that Quarto does not know, and values of another type than it expects."
    for where, known in KEYS.items():
        found = at(config, where)
        unknown = found.keys() - known if isinstance(found, dict) else ()
        problems += ["_quarto.yml: unknown key " + f"{where}.{key}".strip(".") for key in unknown]
    for key, kind in TYPES.items():
        if not isinstance(at(config, key), (kind, type(None))):
            problems.append(f"_quarto.yml: {key} must be a {kind.__name__}")


def check_navigation(config, nbs, problems):
    "Every entry of the navigation has its page, and every page its entry in the sidebar."
    bars = ("website.sidebar", "website.navbar", "website.page-footer")
    sidebar, *others = (set(filter(re.compile(r"\S+$").match, targets(at(config, bar) or []))) for bar in bars)
    missing = sorted(t for t in sidebar.union(*others) if not WEB.match(t) and not (nbs/t.partition("#")[0]).is_file())
    problems += [f"_quarto.yml: link target {t} missing" for t in missing]
    pages = [p for pattern in PAGES for p in sorted(nbs.glob(pattern))]
    names = [p.relative_to(nbs).as_posix() for p in pages]
    problems += [f"_quarto.yml: {name} is not in the sidebar" for name in names if name not in sidebar]


def flat(value):
    "The strings in a value of the configuration: itself, or those of a list or mapping."
    if isinstance(value, str): return [value]
    values = value.values() if isinstance(value, dict) else value or ()
    return [text for part in values for text in flat(part)]


def check_style(config, nbs, problems):
    "Files of the style are there, and nothing of it comes from the web."
    named = ("format.html.css", "format.html.include-before-body", "filters", "website.favicon", "website.image")
    themes = [theme for theme in flat(at(config, "format.html.theme")) if theme != "default"]
    files = [file for key in named for file in flat(at(config, key))] + [t for t in themes if t.endswith(".scss")]
    problems += [f"_quarto.yml: {f} missing" for f in files if f and not (nbs/f).is_file()]
    if at(config, "format.html.html-math-method") not in ("mathml", "plain", "gladtex"):
        problems.append("_quarto.yml: format.html.html-math-method would load mathematics from the web; use mathml")
    if not flat(at(config, "format.html.theme")) or not all(theme.endswith(".scss") for theme in themes):
        problems.append("_quarto.yml: format.html.theme must be default: the other themes load a font from the web")


def check_config(nbs, problems):
    "The merged site configuration: keys, types, navigation, style."
    config = load_yaml(nbs/"_quarto.yml", problems)
    for name in config.get("metadata-files") or []: config = merge(load_yaml(nbs/name, problems), config)
    check_keys(config, problems)
    if at(config, "project.type") != "website": problems.append("_quarto.yml: project.type is not website")
    for key in ("project.output-dir", "website.title"):
        if not at(config, key): problems.append(f"_quarto.yml: {key} is missing")
    check_navigation(config, nbs, problems)
    check_style(config, nbs, problems)


def slug(heading):
    "Pandoc's identifier of a heading."
    text = re.sub(r"[^\w\s.-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def links(text):
    "(whether it is an image, address) of each link in Markdown `text`, outside code."
    text = re.sub(r"^```.*?^```|^~~~.*?^~~~|`[^`\n]+`", "", text, flags=re.S | re.M)
    inline = re.findall(r"(!?)\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\(\s*<?([^)\s>]+)", text)
    tags = re.findall(r"<(img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)", text, re.I)
    nested = re.findall(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)", text)
    references = re.findall(r"^\[[^\]^]+\]:\s*<?(\S+?)>?\s*$", text, re.M)
    found = [(bang == "!", url) for bang, url in inline] + [(tag.lower() == "img", url) for tag, url in tags]
    return dict.fromkeys(found + [(True, url) for url in nested] + [(False, url) for url in references])


def wrong_target(path, anchor, folder):
    "What is wrong with a link to a file or to a section of a page, relative to `folder`; else nothing."
    if path.startswith(("/", "file:")): return "is absolute"
    target = folder/unquote(path)
    if not target.exists(): return "missing"
    page = target.suffix in (".ipynb", ".md")
    return "has no such section" if anchor and page and anchor not in anchors_of(target) else ""


def check_text(text, folder, anchors, name, problems, attachments=()):
    "Images and links of one Markdown text, relative to `folder`."
    for image, url in links(text):
        kind, (path, _, anchor) = ("image" if image else "link"), url.partition("#")
        if WEB.match(url):
            if image: problems.append(f"{name}: image {url} would be loaded from the web")
        elif url.startswith("attachment:"):
            if url.removeprefix("attachment:") not in attachments: problems.append(f"{name}: image {url} missing")
        elif not path:
            if anchor not in anchors: problems.append(f"{name}: no section #{anchor}")
        elif wrong := wrong_target(path, anchor, folder): problems.append(f"{name}: {kind} {url} {wrong}")


def headings(texts):
    "The section identifiers of some Markdown texts."
    bare = "\n\n".join(re.sub(r"^```.*?^```", "", t, flags=re.S | re.M) for t in texts)
    titles = re.findall(r"^#+\s+(.+?)\s*$", bare, re.M)
    return {slug(re.sub(r"\{.*\}$", "", title)) for title in titles} | {*re.findall(r"\{#([\w-]+)", bare)}


@cache
def anchors_of(path):
    "The section identifiers of a page."
    if path.suffix == ".md": return headings([path.read_text(encoding="utf-8")])
    return headings(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


def title_problem(cell):
    "What is wrong with the first cell of a page, or None: it needs '# Title' and '> one line', or front matter."
    wanted = "the first cell must be '# Title' and '> one line'"
    if cell is None: return wanted
    if cell.cell_type != "raw": return None if re.match(r"# \S.*\n+> \S", cell.source) else wanted
    try: matter = yaml.safe_load(cell.source.strip().removeprefix("---").removesuffix("---"))
    except yaml.YAMLError as e: return f"broken YAML in the front matter: {str(e).splitlines()[0]}"
    return None if isinstance(matter, dict) and "title" in matter else wanted


def check_output(output, folder, anchors, where, problems):
    "One output of a cell: nothing that needs the web, and links of its Markdown."
    for kind, data in output.get("data", {}).items():
        if kind in ("text/html", "application/javascript", "application/vnd.jupyter.widget-view+json"):
            remedy = "show text, Markdown or an image"
            problems.append(f"{where}: its {kind} output would load scripts from the web; {remedy}")
        if kind == "text/markdown": check_text(data, folder, anchors, where, problems)


def check_notebook(path, problems):
    "One page: valid, titled, links and images present, nothing in its outputs that needs the web."
    try:
        nb = nbformat.read(path, 4)
        nbformat.validate(nb)
    except Exception as e:
        problems.append(f"{path.name}: not a valid notebook: {str(e).splitlines()[0]}")
        return
    if wrong := title_problem(nb.cells[0] if nb.cells else None): problems.append(f"{path.name}: {wrong}")
    anchors = headings(c.source for c in nb.cells if c.cell_type == "markdown")
    for i, cell in enumerate(nb.cells, 1):
        where, attached = f"{path.name} cell {i}", cell.get("attachments", {})
        if cell.cell_type == "markdown": check_text(cell.source, path.parent, anchors, where, problems, attached)
        for output in cell.get("outputs", []): check_output(output, path.parent, anchors, where, problems)


def wrong_addresses(text, root, ini):
    """What is wrong with the links of `text` to the repository and the site of `ini`, as sentences.

    Links to a repository or a site of the same name elsewhere are wrong."""
    code, site = (ini[key].rstrip("/") for key in ("git_url", "doc_url"))
    for url in dict.fromkeys(re.findall(rf"https?://[\w.]*git[\w./-]*/{ini['lib_name']}\b[\w./#?%-]*", text)):
        file = re.match(rf"{re.escape(code)}/(?:blob|tree|raw)/[^/]+/([^#?]+)", url)
        page = re.match(rf"{re.escape(site)}/([^#?]+)\.html", url)
        ours = any(start and url.startswith(start) for start in (code, site))
        if not ours: yield f"{url} is not an address of settings.ini"
        elif file and not (root/unquote(file[1])).exists(): yield f"{url}: no {unquote(file[1])} in the repository"
        elif page and not any((root/"nbs"/f"{page[1]}{kind}").exists() for kind in (".ipynb", ".md")):
            yield f"{url}: no such page"


def check_repository(root, problems):
    "Addresses of the repository and the site, as in settings.ini, and files of tests/ and tools/ that anything names."
    ini, folders = settings(root), ("nbs", "spatialid", "tools", ".ci")
    inside = [p for folder in folders for p in sorted((root/folder).rglob("*"))]
    files = [*root.iterdir(), *(p for p in inside if p.suffix in (".py", ".ipynb", ".md", ""))]
    for path in filter(Path.is_file, files):
        text, name = path.read_text(encoding="utf-8", errors="ignore"), path.relative_to(root)
        for named in dict.fromkeys(re.findall(r"(?<![\w/.])(?:tests|tools)/\w+\.py\b", text)):
            if not (root/named).is_file(): problems.append(f"{name}: {named} missing")
        if path.name != "settings.ini": problems += [f"{name}: {wrong}" for wrong in wrong_addresses(text, root, ini)]


def check(root):
    "All problems of the site of a checkout, as sentences."
    root, problems = Path(root), []
    nbs = root/"nbs"
    config, link = root/"_quarto.yml", nbs/"_quarto.yml"
    if not (config.is_file() and link.exists() and config.samefile(link)):
        problems.append("nbs/_quarto.yml must be a link to _quarto.yml")
    check_config(nbs, problems)
    check_repository(root, problems)
    if not (nbs/"index.ipynb").is_file(): problems.append("the home page nbs/index.ipynb is missing")
    for path in (*sorted(nbs.glob("*.ipynb")), *sorted(nbs.glob("lib/*.ipynb"))): check_notebook(path, problems)
    markdown = [p for pattern in PAGES if pattern.endswith(".md") for p in sorted(nbs.glob(pattern))]
    for path in (root/"README.md", root/"CONTRIBUTING.md", *markdown):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text: problems.append(f"{path.name} is missing")
        check_text(text, path.parent, headings([text]), path.name, problems)
    return problems


if __name__ == "__main__":
    found = check(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])
    print("\n".join(found) or "site: OK")
    sys.exit(bool(found))
