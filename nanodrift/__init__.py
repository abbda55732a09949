"""nanodrift: a compact LLM serving engine that keeps its latency promises under load.

The public names below are imported when they are first used, so that ``import nanodrift.scheduler`` and its like need
neither torch nor a device.
"""

__version__ = "0.1.0"
__all__ = ["LLM", "SLO", "EngineConfig", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "nanodrift.llm",
    "RequestOutput": "nanodrift.llm",
    "SamplingParams": "nanodrift.request",
    "EngineConfig": "nanodrift.config",
    "SLO": "nanodrift.config",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'nanodrift' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
