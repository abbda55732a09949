"""Green contexts on a real GPU: the SMs a kernel ran on, read from the hardware (%smid).

Never by ``torch.cuda.synchronize``: where several processes share the GPU it sometimes returns before work on a green
context's stream is done (seen in 9 of 26,000 tries, in the last blocks of a grid; never behind an event).
"""

import os
import random

import pytest
import torch
import triton
import triton.language as tl

import nanodrift.gpu  # noqa: F401 (sets what CUDA reads when it starts)
from nanodrift import LLM, SamplingParams
from nanodrift.config import SLO
from nanodrift.decision import Policy
from nanodrift.partition import split_device
from nanodrift.plan import Lane

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


def sms_of(out, stream):
    """The SMs that were written into ``out`` by what runs on a stream."""
    stream.synchronize()
    return set(out.tolist())


def fresh():
    out = torch.full((2048,), -1, dtype=torch.int32, device="cuda")
    torch.cuda.current_stream().synchronize()
    return out


def test_halves_are_disjoint_and_complete(split):
    assert len(split.streams) >= 3
    for one in split.streams:
        halves = []
        for stream, count in (
            (one.decode_stream, one.partition.decode_sms),
            (one.prefill_stream, one.partition.prefill_sms),
        ):
            out = fresh()
            with torch.cuda.stream(stream):
                run(out)
            halves.append(sms_of(out, stream))
            assert len(halves[-1]) == count
        assert not halves[0] & halves[1]
        assert one.partition.decode_sms + one.partition.prefill_sms == split.num_sms


def captured(stream, *outs):
    """A graph that runs the kernel for each of these, after a first run for nothing."""
    with torch.cuda.stream(stream):
        for out in outs:
            run(out)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for out in outs:
            run(out)
    return graph


def test_a_graph_keeps_the_sms_it_was_captured_on(split):
    one = split.streams[1]
    out = fresh()
    graph = captured(one.decode_stream, out)
    at_home = sms_of(out, one.decode_stream)
    for stream in (one.decode_stream, one.prefill_stream, torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            out.fill_(-1)
            graph.replay()
        assert sms_of(out, stream) == at_home
    assert len(at_home) == one.partition.decode_sms


def test_one_graph_forks_over_both_halves_and_joins(split):
    one = split.streams[1]
    outs = [fresh() for _ in range(3)]
    whole = torch.cuda.Stream()
    captured(whole, outs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=whole):
        run(outs[0])
        for stream, out in ((one.decode_stream, outs[1]), (one.prefill_stream, outs[2])):
            stream.wait_stream(whole)
            with torch.cuda.stream(stream):
                run(out)
            whole.wait_stream(stream)
    with torch.cuda.stream(whole):
        for out in outs:
            out.fill_(-1)
        graph.replay()
    everywhere, decode, prefill = (sms_of(out, whole) for out in outs)
    assert len(everywhere) == split.num_sms
    assert len(decode) == one.partition.decode_sms
    assert len(prefill) == one.partition.prefill_sms
    assert not decode & prefill


def test_events_order_work_across_halves(split):
    one = split.streams[2]
    flag, seen = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    big = torch.zeros(1 << 28, device="cuda")
    torch.cuda.current_stream().synchronize()
    with torch.cuda.stream(one.prefill_stream):
        for _ in range(20):
            big.add_(1.0)
        flag.fill_(1.0)
        event = torch.cuda.Event()
        event.record()
    one.decode_stream.wait_event(event)
    with torch.cuda.stream(one.decode_stream):
        seen.copy_(flag)
    one.decode_stream.synchronize()
    assert seen.item() == 1.0


def test_work_queued_on_one_half_does_not_delay_a_graph_on_the_other(split):
    """Needs more hardware queues than CUDA makes by default: the halves have ten streams together."""
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    long, short = fresh(), fresh()
    for one in split.streams:
        graph = captured(one.decode_stream, short)
        with torch.cuda.stream(one.prefill_stream):
            for _ in range(300):
                smid_kernel[(1024,)](long, 20_000, BLOCK=128)
            end_of_queue = torch.cuda.Event()
            end_of_queue.record()
        with torch.cuda.stream(one.decode_stream):
            graph.replay()
            end_of_graph = torch.cuda.Event()
            end_of_graph.record()
        while not end_of_graph.query():
            pass
        assert not end_of_queue.query()
        end_of_queue.synchronize()


def test_an_event_behind_a_replay_is_behind_its_kernels(split):
    """Whatever stream replays it: the engine believes such events. Read back on a stream of its own, without a sync."""
    one = split.streams[1]
    out, answer = fresh(), torch.empty(2048, dtype=torch.int32, pin_memory=True)
    graph, reader = captured(one.decode_stream, out), torch.cuda.Stream()
    for stream in (one.decode_stream, one.prefill_stream, torch.cuda.Stream()):
        for _ in range(200):
            with torch.cuda.stream(stream):
                out.fill_(-1)
                graph.replay()
                event = torch.cuda.Event()
                event.record()
            while not event.query():
                pass
            with torch.cuda.stream(reader):
                answer.copy_(out, non_blocking=True)
            reader.synchronize()
            assert answer.min().item() >= 0


def test_plain_streams_where_green_contexts_are_not_wanted(split):
    plain = split_device(torch.device("cuda", 0), green_contexts=False)
    assert plain.partitions == split.partitions
    assert plain.reason == "plain streams were asked for"
    assert all(one.decode_stream.priority < one.prefill_stream.priority for one in plain.streams)


# ---- a serving run -------------------------------------------------------------------------------------------------


@triton.jit
def mark_kernel(seen_ptr, num_spins):
    """Marks the SM that each program runs on."""
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r,r", [tl.full([1], 0, tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )
    x = tl.full([1], 1.0, tl.float32)
    for _ in range(num_spins):
        x = x * 1.0001 + 0.5
    tl.store(seen_ptr + sm, tl.full([1], 1, tl.int32), mask=x > 0)


class Tour(Policy):
    """Every partition in turn, side by side and fused, whatever it means for anybody's TBT."""

    def __init__(self, dispatcher):
        self.dispatcher, self.num_asked = dispatcher, 0

    def choose(self, load, current=None):
        if load.decode.batch == 0 or load.prompt_tokens == 0:
            return self.dispatcher.choose(load, current)
        self.num_asked += 1
        partition = self.dispatcher.splits[self.num_asked // 16 % len(self.dispatcher.splits)]
        if self.num_asked // 4 % 2 and not load.open_tokens:
            return self.dispatcher.fused_at(load, partition, 512)
        return self.dispatcher.split_at(load, partition)


def test_no_kernel_of_a_serving_run_leaves_its_half(monkeypatch):
    """Behind every kernel that the engine launches or captures, on its stream, another marks the SMs it is given."""
    seen = torch.zeros(64, 256, dtype=torch.int32, device="cuda")  # a row a stream
    rows, run_kernel = {}, triton.runtime.jit.JITFunction.run

    def run_and_mark(self, *args, **options):
        found = run_kernel(self, *args, **options)
        if self is not mark_kernel and not options.get("warmup"):
            stream = torch.cuda.current_stream().cuda_stream
            mark_kernel[(512,)](seen[rows.setdefault(stream, len(rows))], 100)
        return found

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run_and_mark)
    llm = LLM("llama-3-8b", load_format="dummy", max_model_len=4096, num_kv_blocks=1000)
    engine, executor, draw = llm.engine, llm.engine.executor, random.Random(6)
    for last in executor._last.values():
        last.event.synchronize()
    seen.zero_()  # what start-up did does not count
    torch.cuda.current_stream().synchronize()
    engine.scheduler.policy = Tour(engine.scheduler.policy)
    now_s = executor.clock.now()
    for i in range(150):
        prompt = [draw.randrange(engine.vocab_size) for _ in range(draw.choice((40, 200, 1000, 3000)))]
        params = SamplingParams(temperature=float(i % 2), seed=i, max_tokens=20 + i % 40, ignore_eos=True)
        slo = SLO(tbt_ms=draw.choice((20.0, 40.0, 80.0)))
        engine.add(engine.new_request(prompt, params, slo=slo, arrival_s=now_s + 0.03 * i))
    while engine.has_work:
        engine.step()
    marked = {stream: set(seen[row].nonzero().flatten().tolist()) for stream, row in rows.items()}
    marked = {stream: sms for stream, sms in marked.items() if sms}
    print(engine.stats()["residency"])
    num_used = 0
    for one in executor.split.streams:
        halves = [marked.pop(stream.cuda_stream, set()) for stream in (one.prefill_stream, one.decode_stream)]  # SMs
        assert not halves[0] & halves[1]
        for lane, sms in zip(Lane, halves, strict=True):
            assert len(sms) in (0, one.partition.sms_of(lane)), "all of its SMs and no other"
        num_used += all(halves)
    print(
        f"{num_used} partitions in use; {len(marked)} streams beside them: {[len(sms) for sms in marked.values()]} SMs"
    )
    assert num_used >= 3
    assert len(marked) == 1, "one stream for the whole chip, and nothing outside the lanes"
    llm.close()
