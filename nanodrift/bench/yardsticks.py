"""Two small kernels that are measured against, that the engine does not use. Needs triton: import it when it runs.

``bulk_read`` reads memory through TMA as fast as so many SMs can: the ceiling for decode kernels. Each
tile goes from memory into the ring in shared memory and is used once, as the left operand of a 16-wide product, the
cheapest use there is. ``silu_mul_kernel`` is the elementwise pass that a library's gate-up product needs behind it.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

SHAPES = ((64, 128, 4, 6, 2), (128, 128, 4, 6, 1), (128, 64, 4, 6, 2))  # rows, columns, warps, stages, programs an SM


@triton.jit
def bulk_read_kernel(desc, out_ptr, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles_across = num_columns // COLUMNS
    ones = tl.full([COLUMNS, 16], 1.0, desc.dtype)
    acc = tl.zeros([ROWS, 16], tl.float32)
    for tile in tl.range(tl.program_id(0), num_rows // ROWS * tiles_across, tl.num_programs(0)):
        data = desc.load([tile // tiles_across * ROWS, tile % tiles_across * COLUMNS])  # [ROWS, COLUMNS]
        acc = tl.dot(data, ones, acc)
    offsets = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + tl.program_id(0) * ROWS * 16 + offsets, acc)


def bulk_read(data: torch.Tensor, num_sms: int, shape) -> torch.Tensor:
    rows, columns, num_warps, num_stages, programs_per_sm = shape
    grid = num_sms * programs_per_sm
    out = torch.empty(grid, rows, 16, dtype=torch.float32, device=data.device)
    desc = TensorDescriptor.from_tensor(data, [rows, columns])
    bulk_read_kernel[(grid,)](
        desc, out, *data.shape, ROWS=rows, COLUMNS=columns, num_warps=num_warps, num_stages=num_stages
    )
    return out


@triton.jit
def silu_mul_kernel(both_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both_ptr + row * 2 * width + columns, mask=columns < width).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * width + width + columns, mask=columns < width).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + columns, value.to(out_ptr.dtype.element_ty), mask=columns < width)
