"""Spatial and temporal IDs in vision-language models: activation patching, extraction, steering.

Everything is imported on first use, so that `import spatialid` costs nothing and needs no torch."""
__version__ = "0.2.0"

_HOME = {
    "Query": "query",
    "VLM": "hooks", "Run": "hooks",
    "sweep": "sweeps", "Sweep": "sweeps",
    "Estimate": "stats",
    "SpatialIDs": "extraction", "extract": "extraction", "stored_ids": "extraction", "subsample": "extraction",
    "FreeScenes": "scenes", "GridScenes": "scenes", "RingScenes": "scenes", "grid_pairs": "scenes",
    "Videos": "videos", "GridVideos": "videos",
    "Benchmark": "benchmarks", "MVBench": "benchmarks", "Questions": "benchmarks", "placed": "benchmarks",
    "left_right": "questions", "mirrored": "questions",
    "diagnose": "diagnosis",
    "judge": "claims", "report": "claims",
}
__all__ = [*_HOME]


def __getattr__(name):
    "What the library offers, from the module it lives in."
    if name not in _HOME:
        raise AttributeError(f"module 'spatialid' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"spatialid.{_HOME[name]}"), name)
    return value


def __dir__():
    return [*globals(), *__all__]
