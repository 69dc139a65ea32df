"Shared by all tests: one thread, no network, results in a temporary folder unless a test says otherwise."
import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  MPLBACKEND="Agg")

import pytest


@pytest.fixture(autouse=True)
def _results_elsewhere(tmp_path, monkeypatch):
    "Nothing a test writes reaches the committed results."
    monkeypatch.setenv("SPATIALID_RESULTS", str(tmp_path))
