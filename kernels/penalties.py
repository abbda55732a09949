"""Penalties on tokens that a request has used: repetition, presence and frequency, in place.

    x' = x / r  if x > 0 else  x * r      for tokens of the prompt or the output,  r = repetition penalty
    x" = x' - frequency * n - presence * (n > 0)      n = times the token stands in the output

in vLLM's order. What a request has used lies in a table of its own: ``counts`` [num_rows, V] int16 holds n (modulo
2^15) and, in the sign bit, whether the token stands in the prompt. The device keeps it, so that a step needs nothing
from the host.

Cost: reads 6 B V bytes, writes 4 B V. Map: one program per row and tile of the vocabulary.

Per-request parameters live in tables indexed by ``rows``; row -1 is padding.
Tests: ``pytest tests/test_kernels_small.py -k penal``.
"""

import torch
import triton
import triton.language as tl

IN_PROMPT = -(2**15)  # the sign bit of a count


def penalize_reference(
    logits: torch.Tensor, rows: torch.Tensor, settings: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """What ``penalize`` does, in plain torch (same arguments)."""
    active = torch.nonzero(rows >= 0).flatten()
    row = rows[active].long()
    x, seen = logits[active], counts[row]  # [n, V]
    repetition, presence, frequency = settings[row, :, None].unbind(1)  # [n, 1] each
    x = torch.where(seen != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    count = (seen & 0x7FFF).float()
    logits[active] = x - frequency * count - presence * (count > 0)
    return logits


@triton.jit
def _penalize_kernel(logits_ptr, rows_ptr, settings_ptr, counts_ptr, V: tl.constexpr, BLOCK_V: tl.constexpr):
    # map program -> row, tile
    b = tl.program_id(0)
    row = tl.load(rows_ptr + b).to(tl.int64)
    if row < 0:
        return
    tokens = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    # load
    repetition = tl.load(settings_ptr + row * 3)
    presence = tl.load(settings_ptr + row * 3 + 1)
    frequency = tl.load(settings_ptr + row * 3 + 2)
    if (repetition == 1.0) & (presence == 0.0) & (frequency == 0.0):
        return
    x = tl.load(logits_ptr + b * V + tokens, mask=tokens < V, other=0.0)
    seen = tl.load(counts_ptr + row * V + tokens, mask=tokens < V, other=0).to(tl.int32)
    # compute
    x = tl.where(seen != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    count = seen & 0x7FFF
    x = x - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
    # store
    tl.store(logits_ptr + b * V + tokens, x, mask=tokens < V)


def penalize(
    logits: torch.Tensor, rows: torch.Tensor, settings: torch.Tensor, counts: torch.Tensor, *, num_sms: int = 0
) -> torch.Tensor:
    """Apply each row's penalties to its logits, in place.

    logits [B, V] fp32 contiguous, rows [B] int32, settings [num_rows, 3] fp32: repetition, presence, frequency (off: 1,
    0, 0), counts [num_rows, V] int16 as above. ``num_sms`` is accepted so that all operators are called alike.
    """
    batch, vocab_size = logits.shape
    assert logits.is_contiguous() and settings.is_contiguous() and counts.is_contiguous()
    grid = (batch, triton.cdiv(vocab_size, 4096))
    if batch > 0:
        _penalize_kernel[grid](logits, rows, settings, counts, V=vocab_size, BLOCK_V=4096)
    return logits
