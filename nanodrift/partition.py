"""Divides a GPU's SMs between the two lanes with CUDA green contexts, and says what it got.

Both halves of a partition come from one split call, so they are disjoint: the decode half is what was asked for, the
prefill half is the remainder. A stream of a half runs everything on that half's SMs, and so does a graph captured on
it, wherever it is replayed. Everything is made once, at start-up (about 1 ms and 5 MiB a half), and kept: streams die
with their context.

SMs are all that is divided. Memory bandwidth, caches and power stay shared; see cost.py.

Where green contexts are missing (old driver) or not wanted, ``split_device`` says so and makes the same partitions of
plain streams, decode with the higher priority: kernels still start no more programs than their half has SMs, but which
SMs those land on is left to the hardware. That is also the baseline that green contexts have to beat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nanodrift.plan import DECODE_SMS, Partition


@dataclass(frozen=True)
class PartitionStreams:
    """One division of the device and the streams that live in it."""

    partition: Partition
    prefill_stream: torch.cuda.Stream
    decode_stream: torch.cuda.Stream


@dataclass
class DeviceSplit:
    """What was made of a device. ``reason`` says why these are no green contexts, where they are none."""

    num_sms: int
    granularity_sms: int = 0
    streams: list[PartitionStreams] = field(default_factory=list)
    reason: str = ""
    handles: list = field(default_factory=list)  # green contexts: a stream dies with its own

    @property
    def partitions(self) -> tuple[Partition, ...]:
        return tuple(one.partition for one in self.streams)


def split_device(
    device: torch.device, decode_sms: tuple[int, ...] = DECODE_SMS, green_contexts: bool = True
) -> DeviceSplit:
    """Makes one partition for each decode SM count, given for a device of 132 SMs and scaled to this one."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    split = DeviceSplit(num_sms)
    if not decode_sms:
        split.reason = "no partitions were asked for"
        return split
    split.granularity_sms = 8 if torch.cuda.get_device_capability(device)[0] >= 9 else 2
    split.reason = _make_green(split, device, decode_sms) if green_contexts else "plain streams were asked for"
    if split.reason:
        prefill_stream, decode_stream = torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)
        split.streams = [
            PartitionStreams(Partition(num_sms - count, count), prefill_stream, decode_stream)
            for count in _counts(split, decode_sms)
        ]
    return split


def _make_green(split: DeviceSplit, device: torch.device, decode_sms: tuple[int, ...]) -> str:
    """Fills the split with halves in green contexts. Returns why that cannot be, where it cannot."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        return f"cuda-python is not installed ({error})"
    if not hasattr(driver, "cuGreenCtxCreate"):
        return "this version of cuda-python has no green contexts"
    torch.zeros(1, device=device)  # the primary context must exist
    try:
        handle = _check(driver, driver.cuDeviceGet(device.index or 0))
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        whole = _check(driver, driver.cuDeviceGetDevResource(handle, kind))
        # the step in which SMs can be split off, where this driver says it
        split.granularity_sms = getattr(whole.sm, "smCoscheduledAlignment", 0) or split.granularity_sms
        for count in _counts(split, decode_sms):
            split.streams.append(_make(driver, handle, whole, count, split.handles))
    except RuntimeError as error:
        return f"the driver refuses green contexts ({error})"
    return ""


def _counts(split: DeviceSplit, decode_sms: tuple[int, ...]) -> list[int]:
    """What was asked for on 132 SMs, on this device and in the steps that it grants."""
    step = split.granularity_sms
    wanted = {max(step, round(n * split.num_sms / 132 / step) * step) for n in decode_sms}
    return sorted(n for n in wanted if n < split.num_sms)


def _make(driver, device_handle, whole, decode_sms: int, handles: list) -> PartitionStreams:
    groups, _, remainder = _check(driver, driver.cuDevSmResourceSplitByCount(1, whole, 0, decode_sms))
    decode_stream, granted = _stream(driver, device_handle, groups[0], handles)
    prefill_stream, rest = _stream(driver, device_handle, remainder, handles)
    if granted != decode_sms or granted + rest != whole.sm.smCount:
        raise RuntimeError(f"asked for {decode_sms} of {whole.sm.smCount} SMs, granted {granted} and {rest}")
    return PartitionStreams(Partition(prefill_sms=rest, decode_sms=granted), prefill_stream, decode_stream)


def _stream(driver, device_handle, resource, handles: list) -> tuple[torch.cuda.Stream, int]:
    """A stream on the SMs of ``resource``, and how many the new context really has."""
    descriptor = _check(driver, driver.cuDevResourceGenerateDesc([resource], 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _check(driver, driver.cuGreenCtxCreate(descriptor, device_handle, flags))
    handles.append(context)
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    granted = _check(driver, driver.cuGreenCtxGetDevResource(context, kind)).sm.smCount
    stream = _check(driver, driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
    return torch.cuda.ExternalStream(int(stream)), granted


def _check(driver, result):
    """Unwraps (error, value...) of a driver call."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(getattr(error, "name", str(error)))
    return values[0] if len(values) == 1 else values
