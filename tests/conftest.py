"Shared by all tests: one thread, no network, results in a temporary folder unless a test says otherwise."
import os
import signal
import subprocess
import sys

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  MPLBACKEND="Agg")

import nbformat
import pytest


@pytest.fixture(autouse=True)
def _results_elsewhere(tmp_path, monkeypatch):
    "Nothing a test writes reaches the committed results."
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))


COMMAND = "import sys; from spatialid.cli import main; sys.exit(main())"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A folder with notebooks, results and a stand-in for a model; `lab.notebook(name, *code)` adds a notebook."
    monkeypatch.setenv("SPATIALID_NOTEBOOKS", str(tmp_path/"nbs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"nbs").mkdir()
    (tmp_path/"toy").mkdir()
    (tmp_path/"toy"/"config.json").write_text("{}")
    (tmp_path/"nbs"/"claims.json").write_text("[]")

    class Lab:
        root, toy, runs = tmp_path, str(tmp_path/"toy"), tmp_path/"results"/"toy"/".runs"

        @staticmethod
        def notebook(name, *code, parameters='model = "toy"\nn = 3', **declared):
            first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
            cells = [first, *map(nbformat.v4.new_code_cell, code)]
            kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
            metadata = {"kernelspec": kernel, "spatialid": declared}
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path/"nbs"/f"{name}.ipynb")

        @staticmethod
        def start(*args):
            def heed_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background shell would have it ignored
            return subprocess.Popen([sys.executable, "-c", COMMAND, *args], stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, text=True, env=os.environ.copy(), cwd=tmp_path,
                                    preexec_fn=heed_ctrl_c)
    return Lab
