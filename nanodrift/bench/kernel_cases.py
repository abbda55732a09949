"""What ``bench.py kernels`` measures: every operator at a model's shapes, beside the library that does the same.

A case knows its bytes and FLOPs (each input read once, each output written once), how to launch ours and the library's
on one of several sets of inputs, and what is right. Inputs are random; sets rotate so that weights and caches come from
memory, not from L2. Knows nothing about clocks, streams or tables: kernels.py has those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, bias, sdpa_kernel

from nanodrift.kernels import attn_decode, attn_prefill, gemm, gemm_skinny, rmsnorm, rope, sample, swiglu

L2_BYTES = 64 << 20
PREFILL_SMS = (132, 116, 100, 96, 84, 68)
DECODE_SMS = (132, 96, 64, 48, 32, 16)


@dataclass(frozen=True)
class Dims:
    """What the shapes of a model's kernels follow from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    has_qk_norm: bool = False

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


MODELS = {
    "llama-3-8b": Dims(4096, 14336, 32, 8, 128, 128256),
    "qwen3-8b": Dims(4096, 12288, 32, 8, 128, 151936, has_qk_norm=True),
}


@dataclass
class Case:
    """One operator at one shape. ``ours(i, num_sms)`` and the libraries' ``call(i)`` use the i-th set of inputs."""

    op: str
    name: str
    sms: tuple[int, ...]
    num_bytes: float
    num_flops: float
    num_sets: int
    ours: Callable[[int, int], torch.Tensor]
    libraries: dict[str, Callable[[int], torch.Tensor]]
    exact: Callable[[], torch.Tensor]  # of set 0, fp32; NaN where it does not say
    is_headline: bool = False  # measured again over 1.5 s, with clocks and watts
    is_sum: bool = False  # the sets are parts of one piece of work: its time is that of all of them
    options: dict = field(default_factory=dict)  # tiles and splits to use instead of what the rules choose


def num_sets(num_bytes: float) -> int:
    """Enough sets of inputs to be three times the L2 together."""
    return max(1, min(64, round(3 * L2_BYTES / num_bytes + 0.5)))


class Maker:
    """Random inputs on a device, and the cases made of them."""

    def __init__(self, dims: Dims, device: torch.device, dtype: torch.dtype = torch.bfloat16):
        self.dims, self.device, self.dtype = dims, device, dtype

    def rand(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).mul_(scale)

    def ints(self, values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(shape, float("nan"), device=self.device, dtype=dtype or self.dtype)

    # --- products ---

    def product(self, name: str, M: int, is_headline: bool = False) -> Case:
        """qkv, o, down or head at M tokens. Few tokens: fp32 partials, as decode has them (read again by what follows).

        Options: tile (a SkinnyTile or a Tile), splits; consumer=True adds what comes next: partials have a price.
        """
        d = self.dims
        N, K = {
            "qkv": (d.qkv, d.hidden), "o": (d.hidden, d.heads * d.head_dim), "down": (d.hidden, d.intermediate),
            "head": (d.vocab, d.hidden),
        }[name]  # fmt: skip
        n = num_sets(2 * N * K)
        weights = [self.rand(N, K, scale=K**-0.5) for _ in range(n)]
        x, out, theirs = self.rand(M, K), self.poisoned(M, N), self.poisoned(M, N)
        is_few = M <= gemm_skinny.MAX_SKINNY_TOKENS
        partials = self.poisoned((8 if name != "head" else 1) * M * N, dtype=torch.float32)
        residual, norm_weight, normed = self.rand(M, N), self.rand(N), self.poisoned(M, N)
        options: dict = {}

        def ours(i: int, num_sms: int) -> torch.Tensor:
            tile, splits, consumer = (options.get(key) for key in ("tile", "splits", "consumer"))
            if isinstance(tile, gemm.Tile) or (tile is None and not is_few):
                result = partials[: M * N].view(M, N) if name == "head" else out
                gemm.gemm(
                    x, weights[i], residual=residual if consumer else None, out=residual if consumer else result,
                    num_sms=num_sms, tile=tile,
                )  # fmt: skip
                return rmsnorm.rmsnorm(residual, norm_weight, 1e-5, out=normed, num_sms=num_sms) if consumer else result
            S = splits or (1 if name == "head" else gemm_skinny.num_splits(M, N, K, num_sms))
            result = partials[: S * M * N].view(S, M, N)
            gemm_skinny.gemm_skinny(x, weights[i], out=result, num_sms=num_sms, num_splits=S, tile=tile)
            if consumer:
                rmsnorm.add_rmsnorm(result, residual, norm_weight, 1e-5, out=normed, num_sms=num_sms)
            return result

        return Case(
            "gemm_skinny" if is_few else "gemm", f"{name} M={M}", DECODE_SMS if is_few else PREFILL_SMS,
            2 * (M * K + N * K + M * N), 2 * M * N * K, n, ours,
            {"cublas": lambda i: torch.mm(x, weights[i].T, out=theirs)},
            lambda: x.float() @ weights[0].float().T, is_headline, options=options,
        )  # fmt: skip

    def swiglu(self, M: int, is_headline: bool = False) -> Case:
        """Gate and up with their activation; the library: one product, then one elementwise kernel."""
        width, K = self.dims.intermediate, self.dims.hidden
        n = num_sets(4 * width * K)
        weights = [self.rand(2 * width, K, scale=K**-0.5) for _ in range(n)]
        x, out = self.rand(M, K), self.poisoned(M, width)
        both, theirs = self.poisoned(M, 2 * width), self.poisoned(M, width)
        options: dict = {}

        def library(i: int) -> torch.Tensor:
            torch.mm(x, weights[i].T, out=both)
            return silu_mul(both, theirs)

        return Case(
            "swiglu", f"M={M}", DECODE_SMS if M <= 128 else PREFILL_SMS, 2 * (M * K + 2 * width * K + M * width),
            4 * M * width * K, n,
            lambda i, sms: swiglu.gemm_swiglu(x, weights[i], out=out, num_sms=sms, tile=options.get("tile")),
            {"cublas + silu": library}, lambda: swiglu.gemm_swiglu_reference(x.float(), weights[0].float()),
            is_headline, options=options,
        )  # fmt: skip

    def decode_products(self, M: int, layers_kept: int = 8, total_layers: int = 32) -> Case:
        """All products of a decode step, the weights of ``layers_kept`` layers used in turn. A set is a part of it."""
        d = self.dims
        shapes = {"qkv": (d.qkv, d.hidden), "o": (d.hidden, d.heads * d.head_dim), "down": (d.hidden, d.intermediate)}
        layers = [
            {name: self.rand(N, K, scale=K**-0.5) for name, (N, K) in shapes.items()}
            | {"gate_up": self.rand(2 * d.intermediate, d.hidden, scale=d.hidden**-0.5)}
            for _ in range(layers_kept)
        ]
        head = self.rand(d.vocab, d.hidden, scale=d.hidden**-0.5)
        x, gated = self.rand(M, d.hidden), self.rand(M, d.intermediate)
        inputs = {"qkv": x, "o": x, "down": gated}
        partials = self.poisoned(8 * M * max(d.qkv, d.hidden), dtype=torch.float32)
        theirs = {name: self.poisoned(M, N) for name, (N, _) in shapes.items()}
        both, out, their_logits = (self.poisoned(M, n) for n in (2 * d.intermediate, d.intermediate, d.vocab))
        logits = self.poisoned(1, M, d.vocab, dtype=torch.float32)
        num_parts = total_layers // layers_kept

        def ours(i: int, num_sms: int) -> torch.Tensor:
            for layer in layers:
                for name, (N, K) in shapes.items():
                    S = gemm_skinny.num_splits(M, N, K, num_sms)
                    out_s = partials[: S * M * N].view(S, M, N)
                    gemm_skinny.gemm_skinny(inputs[name], layer[name], out=out_s, num_sms=num_sms, num_splits=S)
                swiglu.gemm_swiglu(x, layer["gate_up"], out=out, num_sms=num_sms)
            if i == 0:
                gemm_skinny.gemm_skinny(x, head, out=logits, num_sms=num_sms, num_splits=1)
            return logits

        def library(i: int) -> torch.Tensor:
            for layer in layers:
                for name in shapes:
                    torch.mm(inputs[name], layer[name].T, out=theirs[name])
                torch.mm(x, layer["gate_up"].T, out=both)
                silu_mul(both, out)
            if i == 0:
                torch.mm(x, head.T, out=their_logits)
            return their_logits

        weights = total_layers * sum(w.numel() for w in layers[0].values()) + head.numel()
        return Case(
            "decode_products", f"M={M}", DECODE_SMS, 2.0 * weights, 2.0 * weights * M, num_parts, ours,
            {"cublas + silu": library}, lambda: x.float() @ head.float().T, M != 16, is_sum=True,
        )  # fmt: skip

    # --- attention ---

    def cache(self, contexts: list[int], copies: int = 1):
        """K and V over shuffled blocks, and ``copies`` tables over different ones."""
        d = self.dims
        counts = [-(-c // 64) for c in contexts]
        total = copies * sum(counts)
        k, v = (self.rand(total, d.kv_heads, 64, d.head_dim) for _ in range(2))
        order, tables = torch.randperm(total), []
        for copy in range(copies):
            table, at = torch.zeros(len(contexts), max(counts), dtype=torch.int32), copy * sum(counts)
            for r, count in enumerate(counts):
                table[r, :count], at = order[at : at + count], at + count
            tables.append(table.to(self.device))
        return k, v, tables

    def gathered(self, cache: torch.Tensor, table: torch.Tensor, context: int) -> torch.Tensor:
        """[R, K, context, D] of equally long requests, contiguous, as a library wants it."""
        blocks = table[:, : -(-context // 64)].long()
        return cache[blocks].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous()

    def prefill(self, num_requests: int, new: int, cached: int = 0, is_headline: bool = False) -> Case:
        d = self.dims
        context, scale = cached + new, d.head_dim**-0.5
        k, v, (table,) = self.cache([context] * num_requests)
        q = self.rand(num_requests * new, d.heads, d.head_dim)
        out = torch.full_like(q, float("nan"))
        rows = self.ints(range(num_requests))
        starts = self.ints([new * r for r in range(num_requests + 1)])
        lens, counter = self.ints([context] * num_requests), self.ints([0])
        scratch = torch.zeros(attn_prefill.prefill_scratch_shape(d.head_dim), device=self.device)
        dense_k, dense_v = (self.gathered(x, table, context) for x in (k, v))
        dense_q = q.view(num_requests, new, d.heads, d.head_dim).transpose(1, 2).contiguous()
        options = {"scale": scale, "enable_gqa": True}
        options |= {"attn_mask": bias.causal_lower_right(new, context)} if cached else {"is_causal": True}

        def library(backend):
            def call(_i: int) -> torch.Tensor:
                with sdpa_kernel(backend):
                    result = F.scaled_dot_product_attention(dense_q, dense_k, dense_v, **options)
                return result.transpose(1, 2).reshape(q.shape) if _i < 0 else result

            return call

        def exact() -> torch.Tensor:
            """The last 128 queries of the first and the last request; the rest is NaN, which comparison leaves out."""
            result = torch.full(q.shape, float("nan"), device=self.device)
            last = min(new, 128)
            mask = torch.arange(context, device=self.device) <= torch.arange(context - last, context,
                                                                             device=self.device)[:, None]  # fmt: skip
            for r in {0, num_requests - 1}:
                part = F.scaled_dot_product_attention(
                    dense_q[r : r + 1, :, new - last :].float(), dense_k[r : r + 1].float(),
                    dense_v[r : r + 1].float(), attn_mask=mask, enable_gqa=True, scale=scale,
                )  # fmt: skip
                result[(r + 1) * new - last : (r + 1) * new] = part[0].transpose(0, 1)
            return result

        pairs = num_requests * (new * cached + new * (new + 1) / 2)
        name = f"{num_requests} x {new}" + (f" over {cached}" if cached else "")
        libraries = {"cudnn": library(SDPBackend.CUDNN_ATTENTION), "flash": library(SDPBackend.FLASH_ATTENTION)}
        return Case(
            "attn_prefill", name, PREFILL_SMS, 2.0 * (2 * q.numel() + 2 * dense_k.numel()),
            4 * d.heads * d.head_dim * pairs, 1,
            lambda i, sms: attn_prefill.attn_prefill(
                q, k, v, table, rows, starts, lens, max_query_len=new, scale=scale, out=out, counter=counter,
                scratch=scratch, num_sms=sms,
            ),
            libraries, exact, is_headline,
        )  # fmt: skip

    def decode(self, contexts: list[int], name: str, is_headline: bool = False) -> Case:
        d = self.dims
        scale, B = d.head_dim**-0.5, len(contexts)
        size = 4.0 * sum(contexts) * d.kv_heads * d.head_dim
        n = num_sets(size)
        k, v, tables = self.cache(contexts, n)
        q = self.rand(B, d.heads, d.head_dim)
        out, rows, lens = torch.full_like(q, float("nan")), self.ints(range(B)), self.ints(contexts)
        shape = attn_decode.decode_scratch_shape(d.heads, d.kv_heads, d.head_dim, max(DECODE_SMS))
        scratch = torch.zeros(shape, dtype=torch.float32, device=self.device)
        libraries = {}
        if len(set(contexts)) == 1:
            dense = [tuple(self.gathered(x, t, contexts[0]) for x in (k, v)) for t in tables]

            def library(backend):
                def call(i: int) -> torch.Tensor:
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(
                            q.unsqueeze(2), *dense[i], scale=scale, enable_gqa=True
                        ).view(q.shape)

                return call

            libraries = {"cudnn": library(SDPBackend.CUDNN_ATTENTION), "flash": library(SDPBackend.FLASH_ATTENTION)}
        return Case(
            "attn_decode", name, DECODE_SMS, size + 4.0 * q.numel(), 4 * d.heads * d.head_dim * sum(contexts), n,
            lambda i, sms: attn_decode.attn_decode(
                q, k, v, tables[i], rows, lens, scale=scale, out=out, scratch=scratch, num_sms=sms
            ),
            libraries,
            lambda: torch.cat([  # one by one: the reference pads to the longest
                attn_decode.attn_decode_reference(
                    q[b : b + 1].float(), k, v, tables[0], rows[b : b + 1], lens[b : b + 1], scale=scale
                )
                for b in range(B)
            ]),
            is_headline,
        )  # fmt: skip

    # --- what moves bytes only ---

    def norm(self, T: int, splits: int = 0) -> Case:
        """RMSNorm; with ``splits``: the sum of so many partials added to the residual stream first."""
        C = self.dims.hidden
        size = 4 * T * C + (splits * 4 + 4) * T * C * bool(splits)
        n = num_sets(size) if T > 256 else 1  # a decode step's partials are in L2: what the product has just written
        xs, weight, out = [self.rand(T, C) for _ in range(n)], self.rand(C), self.poisoned(T, C)
        sms = PREFILL_SMS if T > 256 else DECODE_SMS
        if not splits:
            return Case(
                "rmsnorm", f"T={T}", sms, size, 4 * T * C, n,
                lambda i, num_sms: rmsnorm.rmsnorm(xs[i], weight, 1e-5, out=out, num_sms=num_sms),
                {"torch": lambda i: F.rms_norm(xs[i], (C,), weight, 1e-5)},
                lambda: rmsnorm.rmsnorm_reference(xs[0].float(), weight.float(), 1e-5),
            )  # fmt: skip
        partials = [torch.randn(splits, T, C, device=self.device) for _ in range(n)]
        first = xs[0].clone()

        def library(i: int) -> torch.Tensor:
            xs[i].add_(partials[i].sum(0))
            return F.rms_norm(xs[i], (C,), weight, 1e-5)

        def exact() -> torch.Tensor:
            xs[0].copy_(first)  # both add in place: start from the same
            return rmsnorm.rmsnorm_reference((first + partials[0].sum(0)).to(self.dtype).float(), weight.float(), 1e-5)

        return Case(
            "add_rmsnorm", f"T={T} S={splits}", sms, size, 6 * T * C, n,
            lambda i, num_sms: rmsnorm.add_rmsnorm(partials[i], xs[i], weight, 1e-5, out=out, num_sms=num_sms),
            {"torch": library}, exact,
        )  # fmt: skip

    def rope(self, T: int, splits: int = 1) -> Case:
        d = self.dims
        width = splits * (4 if splits > 1 else 2) * d.qkv + 2 * d.qkv
        n = num_sets(T * width) if T > 256 else 1
        qkv = [self.rand(splits, T, d.qkv).to(torch.float32 if splits > 1 else self.dtype) for _ in range(n)]
        cos_sin, positions = torch.rand(T, d.head_dim, device=self.device), self.ints(range(T))
        rows, table = self.ints([0] * T), self.ints([list(range(-(-T // 64)))])
        k, v = (self.rand(-(-T // 64), d.kv_heads, 64, d.head_dim) for _ in range(2))
        norms = (self.rand(d.head_dim), self.rand(d.head_dim)) if d.has_qk_norm else (None, None)
        out = self.poisoned(T, d.heads, d.head_dim)
        options = {
            "num_heads": d.heads,
            "num_kv_heads": d.kv_heads,
            "q_norm": norms[0],
            "k_norm": norms[1],
            "eps": 1e-6,
        }

        def exact() -> torch.Tensor:
            return rope.rope_kv_write_reference(
                qkv[0].float(), cos_sin, positions, rows, table, k.float(), v.float(),
                **(options | {name: w.float() for name, w in options.items() if isinstance(w, torch.Tensor)}),
            )  # fmt: skip

        return Case(
            "rope_kv_write", f"T={T} S={splits}", PREFILL_SMS if T > 256 else DECODE_SMS, T * width, 4 * T * d.qkv, n,
            lambda i, sms: rope.rope_kv_write(
                qkv[i], cos_sin, positions, rows, table, k, v, out=out, num_sms=sms, **options
            ),
            {}, exact,
        )  # fmt: skip

    def sample(self, B: int) -> Case:
        V = self.dims.vocab
        n = num_sets(4 * B * V)
        logits = [torch.randn(B, V, device=self.device) for _ in range(n)]
        rows, positions = self.ints(range(B)), self.ints([7] * B)
        warmth, seeds = torch.zeros(B, device=self.device), torch.arange(B, device=self.device)
        tokens, nexts, out = (self.ints([0] * B) for _ in range(3))
        return Case(
            "sample", f"greedy B={B}", DECODE_SMS, 4 * B * V, B * V, n,
            lambda i, sms: sample.sample(
                logits[i], rows, positions, warmth, seeds, tokens, nexts, out=out, num_sms=sms
            ),
            {"torch.argmax": lambda i: logits[i].argmax(-1)}, lambda: logits[0].argmax(-1).float(),
        )  # fmt: skip


def silu_mul(both: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up as one elementwise pass: what a library's product needs behind it. both [M, 2I] -> out [M, I]."""
    from nanodrift.bench.yardsticks import silu_mul_kernel

    M, width = out.shape
    if both.is_cuda:
        silu_mul_kernel[(M, -(-width // 2048))](both, out, width, BLOCK=2048)
        return out
    gate, up = both.chunk(2, dim=-1)
    return out.copy_(F.silu(gate) * up)


def cases(maker: Maker) -> list[tuple[str, Callable[[], Case]]]:
    """(operator, function that makes the case): inputs exist only while their case is measured."""
    few, many = (1, 16, 64, 128), (256, 512, 1024, 2048, 8192)
    contexts = {"1 x 1024": [1024], "1 x 8192": [8192], "16 x 1024": [1024] * 16, "64 x 1024": [1024] * 64,
                "16 x 8192": [8192] * 16, "one of 131072 among 127 of 512": [131072] + [512] * 127}  # fmt: skip
    listed = [("decode_products", lambda M=M: maker.decode_products(M)) for M in few]
    listed += [
        ("gemm_skinny", lambda M=M, name=name: maker.product(name, M))
        for name in ("qkv", "o", "down", "head") for M in few
    ]  # fmt: skip
    listed += [
        ("gemm", lambda M=M, name=name: maker.product(name, M, (name, M) == ("down", 2048)))
        for name in ("qkv", "o", "down") for M in many
    ]  # fmt: skip
    listed += [("swiglu", lambda M=M: maker.swiglu(M, M in (512, 2048))) for M in (*few, *many)]
    listed += [
        ("attn_prefill", lambda a=a: maker.prefill(*a))
        for a in ((8, 512), (1, 2048), (1, 8192, 0, True), (1, 32768, 0, True), (1, 512, 32768))
    ]
    listed += [("attn_decode", lambda n=n, c=c: maker.decode(c, n, n == "16 x 8192")) for n, c in contexts.items()]
    listed += [("rmsnorm", lambda T=T: maker.norm(T)) for T in (64, 8192)]
    listed += [("add_rmsnorm", lambda a=a: maker.norm(*a)) for a in ((1, 4), (64, 2), (8192, 1))]
    listed += [("rope_kv_write", lambda a=a: maker.rope(*a)) for a in ((1, 4), (64, 2), (8192, 1))]
    listed += [("sample", lambda B=B: maker.sample(B)) for B in (1, 64)]
    return listed
