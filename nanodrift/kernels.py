"""Makes the top-level folder ``kernels/`` importable as ``nanodrift.kernels``.

``kernels`` is also the name of a published package that transformers imports, so our folder has no ``__init__.py`` and
nobody ever imports it under its bare name. A module with a ``__path__`` is a package to Python: this file points it at
``nanodrift/kernels/`` (a wheel) or ``../kernels/`` (a checkout), whichever holds the kernels.

Triton exists on Linux only. Where it is missing a stand-in takes its place whose ``jit`` returns the function
unchanged, so that every torch reference still imports and the CPU engine runs; calling a kernel there is an error.
"""

import importlib.util
import sys
import types
from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if (p / "rmsnorm.py").exists()][:1]


class _StandIn(types.ModuleType):
    """A module any attribute of which can be named, called and subscripted at import time."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self.__name__} was called, but triton is not installed on this machine: use device 'cpu'")


def _jit(function=None, **_options):
    return function if function is not None else _jit


if importlib.util.find_spec("triton") is None and "triton" not in sys.modules:
    for _name in ("triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor"):
        sys.modules[_name] = _StandIn(_name)
        _parent, _, _child = _name.rpartition(".")
        if _parent:
            setattr(sys.modules[_parent], _child, sys.modules[_name])
    sys.modules["triton"].jit = _jit
