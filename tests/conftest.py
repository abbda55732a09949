"""Decides once how Triton kernels run in this test session: compiled on a GPU, or in Triton's interpreter without one.

The variable must be set before any module with ``@triton.jit`` is imported, hence at the top of this file.
"""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the models of the tests are tiny: threads that wait for each other cost more than they bring

settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples on every machine
settings.load_profile("repeatable")
