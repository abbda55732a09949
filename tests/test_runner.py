"""What the executors share: padding to graph shapes, chunks that pass each other, graphs in place of launches."""

from array import array

import pytest
import torch
from tiny_models import config_json

from nanodrift.batch import PassShape, Rows
from nanodrift.config import ModelConfig
from nanodrift.graphs import decode_shapes, fused_shapes, prefill_shapes
from nanodrift.model import KVPool, Model
from nanodrift.ops import LaneResources
from nanodrift.plan import (
    PREFILL_TOKENS,
    DecodeWork,
    FusedWork,
    NewBlocks,
    PrefillSlice,
    PrefillWork,
    RowParams,
    padded_tokens,
)
from nanodrift.runner import Runner
from nanodrift.weights import dummy_weights

CPU = torch.device("cpu")
NUM_ROWS, BLOCKS_PER_ROW, LAYERS = 6, 5, 3
GREEDY = RowParams(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_dict(config_json("llama"), "config.json")
    return Model(config, dummy_weights(config, CPU, torch.float32), max_model_len=320)


class Machine:
    """A prefill and a decode runner over one pool, as an executor has them; row r owns five blocks."""

    def __init__(self, model, has_shapes=False):
        rows = Rows(NUM_ROWS, 320, CPU, model.config.vocab_size)
        self.kv = KVPool(model.config, NUM_ROWS * BLOCKS_PER_ROW, torch.float32, CPU)
        self.kv.k.fill_(7.0)  # what nobody may write
        self.prefill_runner, self.decode_runner = (
            Runner(model, self.kv, rows, LaneResources(), n) for n in (300 + NUM_ROWS, NUM_ROWS)
        )
        if has_shapes:
            self.prefill_runner.shapes = prefill_shapes(300) + fused_shapes(300, NUM_ROWS)
            self.decode_runner.shapes = decode_shapes(NUM_ROWS)

    def upload(self, ints: array, out=None):
        out = torch.empty(len(ints), dtype=torch.int32) if out is None else out[: len(ints)]
        return out.copy_(torch.frombuffer(ints, dtype=torch.int32)) if ints else out

    @torch.inference_mode()
    def run(self, work):
        if isinstance(work, DecodeWork):
            return self.decode_runner.decode(work, self.upload).tolist()
        run = self.prefill_runner.fused if isinstance(work, FusedWork) else self.prefill_runner.prefill
        tokens = run(work, self.upload)
        return None if tokens is None else tokens.tolist()


def prompt(row, length):
    return tuple((i * 7 + row * 31) % 300 for i in range(length))


def chunk(batch_id, lengths, first=0, last=LAYERS):
    """Whole prompts, by row."""
    slices = tuple(PrefillSlice(f"r{row}", row, 0, prompt(row, n), GREEDY) for row, n in lengths.items())
    blocks = [tuple(range(1 + row * BLOCKS_PER_ROW, 1 + (row + 1) * BLOCKS_PER_ROW)) for row in lengths]
    new = tuple(NewBlocks(row, 0, ids) for row, ids in zip(lengths, blocks, strict=True)) if first == 0 else ()
    return PrefillWork(batch_id, slices, first, last, last == LAYERS, new)


def step(lengths):
    """A decode step for rows that have this many tokens in the cache."""
    return DecodeWork(tuple(f"r{row}" for row in lengths), tuple(lengths), tuple(lengths.values()))


def test_padding_shows_neither_in_the_tokens_nor_in_the_cache(model):
    plain, padded = Machine(model), Machine(model, has_shapes=True)
    works = [
        chunk(1, {0: 70, 1: 5}),
        step({0: 70, 1: 5}),
        step({0: 71, 1: 6}),  # the rows stay: nothing is uploaded
        FusedWork(chunk(2, {2: 40, 3: 33}), step({1: 7, 0: 72})),
        step({0: 73, 1: 8, 2: 40, 3: 33}),
        FusedWork(chunk(3, {4: 129}), step({3: 34})),
        step({4: 129, 3: 35}),
    ]
    for work in works:
        assert padded.run(work) == plain.run(work)
    torch.testing.assert_close(padded.kv.k[:, 1:], plain.kv.k[:, 1:])
    assert (padded.kv.k[:, 1 + 5 * BLOCKS_PER_ROW :] == 7.0).all()


@pytest.mark.parametrize("has_shapes", [False, True])
@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_a_chunk_that_another_passes_goes_on_as_if_nothing_had_happened(model, layer, has_shapes):
    serial = Machine(model)
    alone = [serial.run(chunk(row, {row: n})) for row, n in ((0, 150), (1, 20), (2, 64))]
    machine = Machine(model, has_shapes)
    assert machine.run(chunk(1, {0: 150}, 0, layer)) is None
    assert machine.run(chunk(2, {1: 20}, 0, 1)) is None
    assert machine.run(chunk(2, {1: 20}, 1)) == alone[1]
    assert machine.run(FusedWork(chunk(3, {2: 64}), step({1: 20})))[0] == alone[2][0]
    assert machine.run(chunk(1, {0: 150}, layer)) == alone[0]


def test_two_open_chunks_may_take_turns(model):
    serial, machine = Machine(model), Machine(model)
    alone = [serial.run(chunk(row, {row: n})) for row, n in ((0, 150), (1, 200))]
    for layer in range(LAYERS):
        tokens = [machine.run(chunk(row, {row: n}, layer, layer + 1)) for row, n in ((0, 150), (1, 200))]
    assert tokens == alone


def test_a_third_open_chunk_costs_the_oldest_which_is_noticed(model):
    machine = Machine(model)
    for batch_id, row in ((1, 0), (2, 1), (3, 2)):
        machine.run(chunk(batch_id, {row: 30}, 0, 1))
    assert machine.run(chunk(2, {1: 30}, 1)) is not None
    with pytest.raises(RuntimeError, match="chunk 1 is not open"):
        machine.run(chunk(1, {0: 30}, 1))


def test_what_was_captured_is_replayed(model):
    machine, plain, replayed = Machine(model, has_shapes=True), Machine(model), []
    runner = machine.prefill_runner

    class Recorded:
        def __init__(self, key, run):
            self.key, self.run = key, run

        def replay(self):
            replayed.append(self.key)
            self.run()

    layer_shape, fused_shape = PassShape(128, 8, 0, 8), PassShape(128, 9, NUM_ROWS, 8 + NUM_ROWS)
    for layer in range(LAYERS):
        key, batch = (None, layer_shape, layer), runner.batch_of(layer_shape)
        runner.graphs[key] = Recorded(key, lambda layer=layer, batch=batch: runner.run_layer(batch, layer))
    key = (None, fused_shape)
    runner.graphs[key] = Recorded(key, lambda: runner.compute(runner.batch_of(fused_shape)))
    works = [chunk(1, {0: 70, 1: 50}, 0, 2), chunk(1, {0: 70, 1: 50}, 2), FusedWork(chunk(2, {2: 9}), step({0: 70}))]
    assert [machine.run(work) for work in works] == [plain.run(work) for work in works]
    assert replayed == [*((None, layer_shape, layer) for layer in range(LAYERS)), (None, fused_shape)]


def test_work_is_padded_a_little_or_not_at_all(model):
    runner = Machine(model).prefill_runner
    runner.shapes = tuple(sorted(prefill_shapes(2048) + fused_shapes(2048, 256), key=lambda shape: shape.num_tokens))
    assert runner._shape_for(PassShape(1, 1, 0, 1)).num_tokens == 64
    assert runner._shape_for(PassShape(500, 3, 0, 0)).num_tokens == 512
    assert runner._shape_for(PassShape(217, 4, 17, 20)) == PassShape(256, 9, 64, 72)
    assert runner._shape_for(PassShape(512, 4, 100, 103)) == PassShape(512, 9, 128, 136)
    for needed in (PassShape(2049, 1, 0, 1), PassShape(600, 9, 0, 9), PassShape(1200, 2, 16, 17)):
        assert runner._shape_for(needed) == needed


def test_what_is_priced_is_what_is_run(model):
    """The cost model knows sizes, the runner shapes: for every number of tokens they pad to the same."""
    runner = Machine(model).prefill_runner
    runner.shapes = tuple(sorted(prefill_shapes(2048) + fused_shapes(2048, 256), key=lambda shape: shape.num_tokens))
    for n in range(1, 2050):
        assert runner._shape_for(PassShape(n, 1, 0, 1)).num_tokens == padded_tokens(n)
        assert runner._shape_for(PassShape(n + 16, 2, 16, 17)).num_tokens == padded_tokens(n + 16, is_fused=True)
    assert padded_tokens(0) == padded_tokens(0, is_fused=True) == 0
    assert {padded_tokens(n) for n in range(1, 2049)} == set(PREFILL_TOKENS), "no chunk is launched layer by layer"
