"""Green contexts on a real GPU: the SMs a kernel ran on, read from the hardware (%smid)."""

import pytest
import torch
import triton
import triton.language as tl

from nanodrift.partition import split_device

pytestmark = pytest.mark.gpu


@triton.jit
def smid_kernel(out_ptr, num_spins, BLOCK: tl.constexpr):
    """Each program stores the SM it runs on, after spinning long enough that all SMs of its half get some."""
    pid = tl.program_id(0)
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r,r", [tl.full([1], 0, tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )
    x = tl.zeros([BLOCK], tl.float32) + pid
    for _ in range(num_spins):
        x = x * 1.0001 + 0.5
    tl.store(out_ptr + pid + tl.arange(0, 1), sm + (tl.sum(x) < -1).to(tl.int32))


@pytest.fixture(scope="module")
def split():
    split = split_device(torch.device("cuda", 0))
    assert split.reason == ""
    print([f"{p.decode_sms}/{p.prefill_sms}" for p in split.partitions], "granularity", split.granularity_sms)
    return split


def run(out):
    smid_kernel[(2048,)](out, 200, BLOCK=128)


def sms_of(out):
    torch.cuda.synchronize()
    return set(out.tolist())


def fresh():
    return torch.full((2048,), -1, dtype=torch.int32, device="cuda")


def test_halves_are_disjoint_and_complete(split):
    assert len(split.streams) >= 3
    for one in split.streams:
        halves = []
        for stream, count in (
            (one.decode_stream, one.partition.decode_sms),
            (one.prefill_stream, one.partition.prefill_sms),
        ):
            out = fresh()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                run(out)
            halves.append(sms_of(out))
            assert len(halves[-1]) == count
        assert not halves[0] & halves[1]
        assert one.partition.decode_sms + one.partition.prefill_sms == split.num_sms


def test_a_graph_keeps_the_sms_it_was_captured_on(split):
    one = split.streams[1]
    out = fresh()
    torch.cuda.synchronize()
    with torch.cuda.stream(one.decode_stream):
        run(out)
    at_home = sms_of(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=one.decode_stream):
        run(out)
    for stream in (one.decode_stream, one.prefill_stream, torch.cuda.default_stream()):
        out.fill_(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        assert sms_of(out) == at_home


def test_one_graph_forks_over_both_halves_and_joins(split):
    one = split.streams[1]
    outs = [fresh() for _ in range(3)]
    whole = torch.cuda.Stream()
    with torch.cuda.stream(whole):
        run(outs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=whole):
        run(outs[0])
        for stream, out in ((one.decode_stream, outs[1]), (one.prefill_stream, outs[2])):
            stream.wait_stream(whole)
            with torch.cuda.stream(stream):
                run(out)
            whole.wait_stream(stream)
    for out in outs:
        out.fill_(-1)
    graph.replay()
    everywhere, decode, prefill = (sms_of(out) for out in outs)
    assert len(everywhere) == split.num_sms
    assert len(decode) == one.partition.decode_sms
    assert len(prefill) == one.partition.prefill_sms
    assert not decode & prefill


def test_events_order_work_across_halves(split):
    one = split.streams[2]
    flag, seen = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    big = torch.zeros(1 << 28, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(one.prefill_stream):
        for _ in range(20):
            big.add_(1.0)
        flag.fill_(1.0)
        event = torch.cuda.Event()
        event.record()
    one.decode_stream.wait_event(event)
    with torch.cuda.stream(one.decode_stream):
        seen.copy_(flag)
    torch.cuda.synchronize()
    assert seen.item() == 1.0
