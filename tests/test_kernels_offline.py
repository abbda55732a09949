"""Compiles every shipped kernel for real GPU architectures on a machine without one, and reads what came out.

The product's own wrappers are called on CPU tensors while a stand-in driver claims to be the GPU asked for: each launch
compiles exactly what it would compile there (same tiles, same specialisation) and stops before running. Read from the
result: registers, stack (where spilled registers go), shared memory, and whether the instructions that a kernel was
written for are in its PTX. Knows nothing about right answers; the interpreter and GPU tests look at those.

conftest turns the interpreter on in the test process, so compilation happens in a subprocess: this file run as a script

    python tests/test_kernels_offline.py --arch 90 [--all] [--table]

prints JSON, or a table with --table. A new kernel goes into ``launches`` below; a test fails until it does.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes one program may use, by architecture
NUM_SMS = {80: 108, 89: 58, 90: 132, 100: 148}

TUNED_FOR = 90  # tiles are chosen for this one: no spills there. Elsewhere kernels must compile and fit.

# Bytes of stack for values written at the start and read between loops, never within one. None with Triton 3.6.
COLD_STACK = {"attn_prefill in parts": 128}

# What a kernel's sm_90 PTX must contain: the tensor cores' warpgroup instruction, the bulk tensor copy.
WGMMA, TMA = "wgmma.mma_async", "cp.async.bulk.tensor"
OVERLAP = ("griddepcontrol.wait", "griddepcontrol.launch_dependents")  # of cases whose name says pdl, and of no others
MUST_CONTAIN = {
    "_gemm_kernel": (WGMMA, TMA),
    "_skinny_kernel": (WGMMA, TMA),
    "_swiglu_kernel": (WGMMA, TMA),
    "_swiglu_skinny_kernel": (WGMMA, TMA),
    "_attn_prefill_kernel": (WGMMA,),
}


def shipped_tiles(module) -> list:
    """Every tile in the module's own tables: whatever a tuple of tiles holds, each once."""
    tables = [table for table in vars(module).values() if isinstance(table, tuple)]
    return list(dict.fromkeys(tile for table in tables for tile in table if hasattr(tile, "block_m")))


def launches(num_sms: int, every: bool):
    """(name, function that launches a kernel) for Llama-8B shapes; with ``every``, all shipped configurations."""
    import torch

    from nanodrift.kernels import attn_decode, attn_prefill, gemm, gemm_skinny, penalties, rmsnorm, rope, sample, swiglu
    from nanodrift.kernels import filter as filters

    bf16, int32 = torch.bfloat16, torch.int32

    def half(*shape):
        return torch.empty(shape, dtype=bf16)

    def wide(*shape):
        return torch.empty(shape, dtype=torch.float32)

    def ints(*shape):
        return torch.zeros(shape, dtype=int32)

    def norm_case(num_tokens, width, num_partials=None, partial=wide, pdl=False):
        rows, weight, options = half(num_tokens, width), half(width), {"num_sms": num_sms, "pdl": pdl}
        if num_partials is None:
            return lambda: rmsnorm.rmsnorm(rows, weight, 1e-5, **options)
        return lambda: rmsnorm.add_rmsnorm(partial(num_partials, num_tokens, width), rows, weight, 1e-5, **options)

    def rope_case(partials, heads, kv_heads, head_dim, norm=False, pdl=False):
        cache = half(8, kv_heads, 64, head_dim)
        weight = half(head_dim) if norm else None
        return lambda: rope.rope_kv_write(
            partials((heads + 2 * kv_heads) * head_dim), wide(128, head_dim), ints(4), ints(4), ints(4, 32), cache,
            cache, num_heads=heads, num_kv_heads=kv_heads, q_norm=weight, k_norm=weight, num_sms=num_sms, pdl=pdl,
        )  # fmt: skip

    def attention_case(which, heads, kv_heads, head_dim, pdl=False):
        cache, scale = half(8, kv_heads, 64, head_dim), 0.1
        if which == "decode":
            return lambda: attn_decode.attn_decode(
                half(4, heads, head_dim), cache, cache, ints(4, 32), ints(4), ints(4), scale=scale, num_sms=num_sms,
                pdl=pdl,
            )  # fmt: skip
        scratch = wide(*attn_prefill.prefill_scratch_shape(head_dim)) if which == "prefill in parts" else None
        return lambda: attn_prefill.attn_prefill(
            half(512, heads, head_dim), cache, cache, ints(4, 32), ints(1), ints(2), ints(1),
            max_query_len=512, scale=scale, scratch=scratch, num_sms=num_sms,
        )  # fmt: skip

    rows, table = ints(4), wide(4)
    logits = wide(4, 128256)

    def sample_case():
        sample.sample(logits, rows, rows, table, torch.zeros(4, dtype=torch.int64), rows, rows, num_sms=num_sms)

    def filter_case():
        filters.filter_logits(logits, rows, rows, table, rows, table, table, num_sms=num_sms)

    def ban_case():
        filters.ban_tokens(logits, rows, rows, ints(4, 16), rows)

    def penalize_case():
        penalties.penalize(logits, rows, wide(4, 3), torch.zeros((4, 128256), dtype=torch.int16))

    def decode_cases(pdl):
        """As a decode step launches them; without ``pdl``, as everything else does."""
        products = (("skinny", gemm_skinny.gemm_skinny, 6144), ("swiglu", swiglu.gemm_swiglu, 28672))
        return [
            ("pdl " * pdl + name, case)
            for name, case in (
                ("rmsnorm C=4096", norm_case(4, 4096, pdl=pdl)),
                ("add_rmsnorm C=4096 S=4", norm_case(4, 4096, 4, pdl=pdl)),
                ("rope S=4 H=32", rope_case(lambda width: wide(4, 4, width), 32, 8, 128, pdl=pdl)),
                ("attn_decode H=32 K=8", attention_case("decode", 32, 8, 128, pdl)),
                *(
                    (
                        f"gemm_{name} M=16",
                        functools.partial(run, half(16, 4096), half(N, 4096), num_sms=num_sms, pdl=pdl),
                    )
                    for name, run, N in products
                ),
            )
        ]

    cases = [
        *decode_cases(pdl=True),
        ("gemm M=2048", lambda: gemm.gemm(half(2048, 4096), half(6144, 4096), num_sms=num_sms)),
        ("gemm_swiglu M=2048", lambda: swiglu.gemm_swiglu(half(2048, 4096), half(28672, 4096), num_sms=num_sms)),
        ("attn_prefill H=32 K=8", attention_case("prefill", 32, 8, 128)),
        ("attn_prefill in parts H=32 K=8", attention_case("prefill in parts", 32, 8, 128)),
        ("sample V=128256", sample_case),
        ("filter_logits V=128256", filter_case),
        ("ban_tokens", ban_case),
        ("penalize V=128256", penalize_case),
    ]
    if not every:
        return cases
    cases += decode_cases(pdl=False)
    for width in (2048, 3584, 5120, 8192):  # Llama-3.2-1B, Qwen2.5-7B, Qwen3-14B, the widest
        cases.append((f"rmsnorm C={width}", norm_case(4, width)))
        cases.append((f"add_rmsnorm C={width} S=1 bf16", norm_case(4, width, 1, half)))
        cases.append((f"add_rmsnorm C={width} S=8", norm_case(4, width, 8)))
    for heads, kv_heads, head_dim in ((32, 8, 64), (28, 4, 128), (16, 8, 128), (64, 8, 128)):
        shape = f"H={heads} K={kv_heads} D={head_dim}"
        cases.append((f"rope bf16 {shape}", rope_case(lambda width: half(1, 4, width), heads, kv_heads, head_dim)))
        cases.append(
            (f"rope S=8 norm {shape}", rope_case(lambda width: wide(8, 4, width), heads, kv_heads, head_dim, True))
        )
        cases.append((f"attn_prefill {shape}", attention_case("prefill", heads, kv_heads, head_dim)))
        cases.append((f"attn_prefill in parts {shape}", attention_case("prefill in parts", heads, kv_heads, head_dim)))
        cases.append((f"attn_decode {shape}", attention_case("decode", heads, kv_heads, head_dim)))

    def gemm_case(tile, residual=False, bias=False, out_dtype=bf16):
        num_tokens = max(2 * tile.block_m, 256)
        out = torch.empty((num_tokens, 4096), dtype=out_dtype)
        return lambda: gemm.gemm(
            half(num_tokens, 4096), half(4096, 4096), residual=out if residual else None,
            bias=half(4096) if bias else None, out=out, num_sms=num_sms, tile=tile,
        )  # fmt: skip

    for tile in shipped_tiles(gemm):
        cases.append((f"gemm {tile[:6]}", gemm_case(tile)))
        cases.append((f"gemm residual {tile[:6]}", gemm_case(tile, residual=True)))
        cases.append((f"gemm bias {tile[:6]}", gemm_case(tile, bias=True)))
        cases.append((f"gemm fp32 {tile[:6]}", gemm_case(tile, out_dtype=torch.float32)))
    for tile in shipped_tiles(gemm_skinny):
        for bias in (None, half(6144)):
            cases.append((f"gemm_skinny {'' if bias is None else 'bias '}{tile[:6]}", functools.partial(
                gemm_skinny.gemm_skinny, half(tile.block_m, 4096), half(6144, 4096), bias=bias, num_sms=num_sms,
                num_splits=2, tile=tile,
            )))  # fmt: skip
    for tile in shipped_tiles(swiglu):
        cases.append((f"gemm_swiglu {tile[:6]}", functools.partial(
            swiglu.gemm_swiglu, half(tile.block_m, 4096), half(28672, 4096), num_sms=num_sms, tile=tile,
        )))  # fmt: skip
    return cases


# -------------------------------------------------------------------------------------------- in the subprocess


class OfflineDriver:
    """Just enough of Triton's driver for a launch to find out what to compile for."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def resources(cubin: bytes, tools: Path) -> dict:
    """Registers and stack bytes per thread, as the assembler recorded them in the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [tools / "cuobjdump", "--dump-sass", file.name]
        machine_code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = next(line for line in text.splitlines() if "REG:" in line)
    fields = dict(field.split(":", 1) for field in usage.split())
    figures = {
        "registers": int(fields["REG"]),
        "stack_bytes": int(fields["STACK"]),
        "local_bytes": int(fields["LOCAL"]),
    }
    return figures | {"hot_spills": hot_spills(machine_code) if figures["stack_bytes"] else 0}


def hot_spills(machine_code: str) -> int:
    """Loads and stores of spilled registers within innermost loops."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", machine_code)
    code = [(int(address, 16), text) for address, text in found]
    targets = ((address, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for address, text in code)
    loops = [(int(target[1], 16), address) for address, target in targets if target and int(target[1], 16) < address]
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    spills = [address for address, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(first <= address <= last for address in spills for first, last in innermost)


def compile_all(arch: int, every: bool) -> dict:
    """-> {"triton": version, "kernels": all kernels there are, "compiled": one record per launch}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(OfflineDriver(GPUTarget("cuda", arch, 32)))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    compiled = []
    for case, launch in launches(NUM_SMS[arch], every):
        if case.startswith("pdl") and arch < 90:
            continue  # no instruction for it there, and gpu.py does not ask
        launched.clear()
        record = {"case": case, "kernel": "?"}
        try:
            launch()
        except Exception as error:
            compiled.append({**record, "error": f"{type(error).__name__}: {error}"[:400]})
        for kernel in launched:
            found = [name for name in (WGMMA, TMA, *OVERLAP) if name in kernel.asm["ptx"]]
            record = {"case": case, "kernel": kernel.metadata.name, "shared_bytes": kernel.metadata.shared}
            compiled.append({**record, "found": found, **resources(kernel.asm["cubin"], tools)})
    modules = [module for name, module in sys.modules.items() if name.startswith("nanodrift.kernels.")]
    names = {name for module in modules for name, f in vars(module).items() if isinstance(f, JITFunction)}
    return {
        "triton": triton.__version__,
        "kernels": sorted(name for name in names if name.endswith("_kernel")),
        "compiled": compiled,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--all", action="store_true", help="all shipped configurations, not one per kernel")
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    arguments = parser.parse_args()
    result = compile_all(arguments.arch, arguments.all)
    if not arguments.table:
        print(json.dumps(result))
        return
    print(f"triton {result['triton']}, sm_{arguments.arch}")
    for record in result["compiled"]:
        figures = " ".join(f"{key}={value}" for key, value in record.items() if key not in ("case", "kernel"))
        print(f"{record['case']:<40} {record['kernel']:<24} {figures}")


# -------------------------------------------------------------------------------------------- the tests


def compile_in_subprocess(arch: int, cache: Path, *, every: bool = False, triton_path: Path | None = None) -> dict:
    paths = [str(ROOT)] if triton_path is None else [str(triton_path), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--arch", str(arch), *(["--all"] if every else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def complaints(result: dict, arch: int) -> list[str]:
    """What is wrong with the compiled kernels, one line each."""
    wrong = []
    for record in result["compiled"]:
        name = f"{record['case']} ({record['kernel']})"
        if "error" in record:
            wrong.append(f"{name}: {record['error']}")
            continue
        allowed = max((size for case, size in COLD_STACK.items() if record["case"].startswith(case)), default=0)
        is_spilling = record["stack_bytes"] > allowed or record["local_bytes"] or record.get("hot_spills")
        if arch == TUNED_FOR and is_spilling:
            wrong.append(f"{name}: spills, {record['stack_bytes']} bytes of stack, {record['local_bytes']} local")
        if record["shared_bytes"] > SHARED_LIMIT[arch]:
            wrong.append(f"{name}: {record['shared_bytes']} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
        if arch == TUNED_FOR:
            missing = [text for text in MUST_CONTAIN.get(record["kernel"], ()) if text not in record["found"]]
            wrong.extend(f"{name}: no {text}" for text in missing)
            is_pdl = record["case"].startswith("pdl")
            wrong.extend(f"{name}: {text}: {not is_pdl}" for text in OVERLAP if (text in record["found"]) != is_pdl)
    seen = {record["kernel"] for record in result["compiled"]}
    wrong.extend(f"{kernel}: not in launches()" for kernel in result["kernels"] if kernel not in seen)
    return wrong


def test_every_kernel_compiles_for_hopper(tmp_path):
    result = compile_in_subprocess(90, tmp_path)
    assert len(result["compiled"]) >= len(result["kernels"]) >= 10
    assert not complaints(result, 90)


def test_the_reader_of_binaries_sees_spills_and_missing_instructions():
    good = {"case": "a", "kernel": "_gemm_kernel", "shared_bytes": 1, "found": [WGMMA, TMA], "registers": 32}
    good |= {"stack_bytes": 0, "local_bytes": 0}
    result = {"triton": "0", "kernels": ["_gemm_kernel", "_new_kernel"], "compiled": [good]}
    assert complaints(result, 90) == ["_new_kernel: not in launches()"]
    bad = [good | {"case": "pdl"}, good | {"found": [WGMMA, TMA, *OVERLAP]}]
    bad += [good | {"stack_bytes": 8}, good | {"shared_bytes": 232_449}, good | {"found": [TMA]}]
    cold = good | {"case": "attn_prefill in parts", "stack_bytes": 48}
    bad += [cold | {"hot_spills": 1}, cold | {"stack_bytes": 200}]
    result = {"triton": "0", "kernels": ["_gemm_kernel"], "compiled": [*bad, cold]}
    assert len(complaints(result, 90)) == 9


def test_the_reader_of_machine_code_tells_inner_loops_from_the_rest():
    lines = ["STL [R1], R2", "LDL R2, [R1]", "HGMMA R4", "LDL R3, [R1]", "@P0 BRA 0x20", "LDL R2, [R1]", "BRA 0x10"]
    code = "\n".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x00000008ff007387 */" for i, line in enumerate(lines))
    assert hot_spills(code) == 1
    assert hot_spills(code.replace("@P0 BRA 0x20", "@P0 BRA 0x60")) == 3  # now the outer loop is the innermost


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_every_configuration_compiles(tmp_path, arch):
    assert not complaints(compile_in_subprocess(arch, tmp_path, every=True), arch)


@pytest.mark.slow
def test_every_configuration_compiles_with_the_oldest_triton(tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), "triton==3.6.0"]
    subprocess.run(pip, check=True)
    result = compile_in_subprocess(90, tmp_path / "cache", every=True, triton_path=target)
    assert result["triton"] == "3.6.0"
    assert not complaints(result, 90)


if __name__ == "__main__":
    main()
