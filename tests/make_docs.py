"`make docs`: nbdev's processing into _proc/, the structural check, and, where Quarto is installed, the site in _docs/."
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"tests"))
from check_site import check  # noqa: E402


def main():
    os.chdir(ROOT)
    refresh_quarto_yml()
    proc_nbs(symlinks=True, n_workers=0)  # what nbdev-proc-nbs does, without its attempt to install Quarto with sudo; follows nbs/results
    problems = check(ROOT) + [f"_proc/{p.name} was not made" for p in sorted(Path("nbs").glob("*.ipynb")) if not (ROOT/"_proc"/p.name).is_file()]
    if problems: sys.exit("\n".join(problems))
    print("site: OK, pages processed into _proc/")
    if shutil.which("quarto"): subprocess.run(["nbdev-docs", "--symlinks"], check=True); print("site rendered: _docs/index.html")
    else: print("Quarto is not installed, so nothing was rendered: `pip install quarto-cli` on a machine with a network, then `make docs`")


if __name__ == "__main__": main()
