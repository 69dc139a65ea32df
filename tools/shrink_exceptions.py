"""The files that do not pass ruff yet are listed in pyproject.toml, and that list only shrinks.

`python tools/shrink_exceptions.py` takes out what passes by now; it adds nothing: a new file has to pass.
tests/test_repository.py says when there is something to take out."""
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"(?<=^\[tool\.ruff\.lint\.per-file-ignores\]\n).*?(?=^\[|\Z)", re.S | re.M)


def failing(root=ROOT):
    "{file: rules that it breaks}, without the exceptions. Raises CalledProcessError when ruff cannot run."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--exit-zero", "--output-format", "json"]
    said = subprocess.run([*command, "--config", "lint.per-file-ignores={}"], cwd=root, check=True, capture_output=True)
    found = {}
    for problem in json.loads(said.stdout):
        path = Path(problem["filename"]).relative_to(Path(root).resolve()).as_posix()
        found.setdefault(path, set()).add(problem["code"])
    return found


def listed(text):
    "{file: rules} of the exceptions in the text of pyproject.toml."
    return tomllib.loads(text)["tool"]["ruff"]["lint"].get("per-file-ignores", {})


def shrunk(text, found):
    "The text of pyproject.toml with only those exceptions that are still in `found`, sorted."
    kept = {path: sorted(set(rules) & found.get(path, set())) for path, rules in sorted(listed(text).items())}
    lines = [f"{json.dumps(path)} = {json.dumps(rules)}\n" for path, rules in kept.items() if rules]
    return SECTION.sub("".join(lines), text, count=1)


if __name__ == "__main__":
    path = ROOT/"pyproject.toml"
    before = path.read_text(encoding="utf-8")
    path.write_text(after := shrunk(before, failing()), encoding="utf-8")
    print(f"ruff: {len(listed(after))} files with exceptions in pyproject.toml, {len(listed(before))} before")
