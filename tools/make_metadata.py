"""What pyproject.toml and CITATION.cff repeat of settings.ini.

`python tools/make_metadata.py` writes it, tests/test_repository.py compares. nbdev takes the links of the site from
`[project.urls]`. An address that is empty in settings.ini is left out everywhere."""
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def settings(root=ROOT):
    "The section of settings.ini. Raises FileNotFoundError without the file."
    ini = configparser.ConfigParser(delimiters=["="])
    with open(Path(root)/"settings.ini", encoding="utf-8") as file: ini.read_file(file)
    return ini["DEFAULT"]


def pyproject(text, ini):
    "The text of pyproject.toml with the addresses of `ini` in `[project.urls]`, which stands before `[tool.nbdev]`."
    rest = re.sub(r"^\[project\.urls\].*?(?=^\[)", "", text, flags=re.S | re.M)
    urls = {"Repository": ini["git_url"], "Documentation": ini["doc_url"]}
    lines = [f'{name} = "{url}"' for name, url in urls.items() if url]
    section = "\n".join(["[project.urls]  # from settings.ini, by `make prepare`", *lines, "", ""]) if lines else ""
    return rest.replace("[tool.nbdev]", section + "[tool.nbdev]", 1)


def citation(text, ini):
    "The text of CITATION.cff with the version and the addresses of `ini`, after the line of the licence."
    rest = re.sub(r"^(?:version|repository-code|url):.*\n", "", text, flags=re.M)
    lines = [f"version: {ini['version']}"]
    if ini["git_url"]: lines.append(f'repository-code: "{ini["git_url"]}"')
    if ini["doc_url"]: lines.append(f'url: "{ini["doc_url"]}"')
    return re.sub(r"^(license:.*\n)", lambda found: found[1] + "\n".join(lines) + "\n", rest, count=1, flags=re.M)


def made(root=ROOT):
    "{path: text} of the files that repeat settings.ini."
    ini, root = settings(root), Path(root)
    repeats = {"pyproject.toml": pyproject, "CITATION.cff": citation}
    return {root/name: repeat((root/name).read_text(encoding="utf-8"), ini) for name, repeat in repeats.items()}


if __name__ == "__main__":
    for path, text in made().items(): path.write_text(text, encoding="utf-8")
    print("pyproject.toml and CITATION.cff agree with settings.ini")
