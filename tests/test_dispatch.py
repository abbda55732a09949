"""The dispatcher on the H200 prior: what it promises holds by its own model, and more room never makes it worse."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodrift.config import ModelConfig
from nanodrift.cost import Cell, CostModel, DecodeLoad, Guard, PrefillLoad, h200_prior
from nanodrift.dispatch import HYSTERESIS, LONE_PIECE_S, MIN_PREFILL_SHARE, Decision, Dispatcher, Load, Mode
from nanodrift.plan import FUSED_TOKENS, Lane, Partition, padded_tokens

ROOT = Path(__file__).resolve().parents[1]
COST = CostModel(ModelConfig.from_folder(ROOT / "nanodrift" / "configs" / "llama-3-8b"), h200_prior())
WHOLE = Partition(132, 132, is_shared=True)
PARTITIONS = (WHOLE, *(Partition(132 - n, n) for n in (16, 32, 48, 64, 80)))


def dispatcher(modes=tuple(Mode), guard=None):
    return Dispatcher(COST, guard or Guard(), PARTITIONS, max_prefill_tokens=2048, modes=modes)


def load(batch=40, context=1024, tbt_ms=10.0, prompt=8192, start=0):
    return Load(DecodeLoad(batch, batch * context), tbt_ms / 1e3, prompt, start)


LOADS = st.builds(
    load,
    batch=st.integers(1, 256),
    context=st.sampled_from([128, 1024, 8192, 32768]),
    tbt_ms=st.floats(1, 200),
    prompt=st.integers(1, 30_000),
    start=st.sampled_from([0, 2048, 30_000]),
)


@given(LOADS)
@settings(derandomize=True, deadline=None)
def test_every_option_keeps_the_tbt(one):
    for option in dispatcher().options(one):
        assert option.step_s <= one.tbt_s * (1 + 1e-9)
        assert option.prompt_tokens_per_s > 0
        assert 1 <= option.layers <= COST.num_layers
        assert 1 <= option.token_chunk <= min(one.prompt_tokens, 2048)


@given(LOADS, st.floats(1.0, 4.0))
@settings(derandomize=True, deadline=None)
def test_a_looser_tbt_never_lowers_prefill_throughput(one, factor):
    looser = Load(one.decode, one.tbt_s * factor, one.prompt_tokens, one.prompt_start)
    tight, loose = dispatcher().choose(one), dispatcher().choose(looser)
    if not tight.is_unmeetable:
        assert not loose.is_unmeetable
        assert loose.prompt_tokens_per_s >= tight.prompt_tokens_per_s * (1 - 1e-9)


@given(LOADS)
@settings(derandomize=True, deadline=None)
def test_more_modes_never_lower_prefill_throughput(one):
    everything = dispatcher().choose(one)
    for mode in Mode:
        alone = dispatcher([mode]).choose(one)
        if not alone.is_unmeetable:
            assert everything.prompt_tokens_per_s >= alone.prompt_tokens_per_s * (1 - 1e-9)


@given(st.integers(1, 128), st.sampled_from([1024, 8192, 32768]), st.floats(1, 100))
@settings(derandomize=True, deadline=None)
def test_who_joins_leaves_decode_steps_that_keep_the_tbt(batch, context, tbt_ms):
    """And the minimum share of it to prefill; but who could not keep it alone either is not kept waiting."""
    one, tbt_s = dispatcher(), tbt_ms / 1e3
    joined, newest = DecodeLoad(batch, batch * context), DecodeLoad(1, context)
    step_s, lone_s = (one.choose(Load(decode, tbt_s)).step_s for decode in (joined, newest))
    most_s = tbt_s * (1 - MIN_PREFILL_SHARE)
    assert one.may_join(joined, newest, tbt_s) == (step_s <= most_s or lone_s > most_s)
    assert one.may_join(newest, newest, tbt_s), "somebody always may"


def test_split_takes_the_smallest_half_that_keeps_the_promise():
    chosen = {tbt: dispatcher([Mode.SPLIT]).choose(load(tbt_ms=tbt)) for tbt in (8.5, 10, 13, 25, 60)}
    sms = [decision.partition.decode_sms for decision in chosen.values() if not decision.is_unmeetable]
    assert sms == sorted(sms, reverse=True), "a looser promise needs no more SMs"
    assert len(set(sms)) >= 3
    for tbt, decision in chosen.items():
        smaller = [p for p in PARTITIONS[1:] if p.decode_sms < decision.partition.decode_sms]
        for partition in [] if decision.is_unmeetable else smaller:
            cell = Cell.of(PrefillLoad(2048), DecodeLoad(40, 40 * 1024), partition.decode_sms)
            guarded_s = COST.decode_s(DecodeLoad(40, 40 * 1024), partition.decode_sms)
            assert guarded_s * Guard().factor(Lane.DECODE, cell).worst > tbt / 1e3


def test_a_step_that_was_slow_once_moves_the_split():
    guard = Guard()
    one = load(tbt_ms=13)
    before = dispatcher([Mode.SPLIT], guard).choose(one)
    cell = Cell.of(PrefillLoad.of_chunk(2048, 0), one.decode, before.partition.decode_sms)
    solo_s = COST.decode_s(one.decode, before.partition.decode_sms)
    guard.observe(Lane.DECODE, cell, solo_s, 2 * one.tbt_s)
    assert dispatcher([Mode.SPLIT], guard).choose(one).partition.decode_sms > before.partition.decode_sms


@given(LOADS)
@settings(derandomize=True, deadline=None)
def test_every_fused_step_has_a_graph(one):
    """Operator by operator it would keep the host for as long as the device, and nobody would be looked after."""
    for option in dispatcher([Mode.FUSED]).options(one):
        assert padded_tokens(option.token_chunk + one.decode.batch, is_fused=True) in FUSED_TOKENS


def test_a_fused_chunk_grows_with_the_tbt():
    chunks = [dispatcher([Mode.FUSED]).choose(load(tbt_ms=tbt)).token_chunk for tbt in (8, 10, 20, 50, 100)]
    assert chunks == sorted(chunks)
    assert chunks[0] < chunks[-1] == 2048 - 40, "with the 40 rows that decode it fills a graph"


def test_exclusive_takes_the_fewest_turns_that_the_tbt_allows():
    decision = dispatcher([Mode.EXCLUSIVE]).choose(load(tbt_ms=20))
    worst = Guard().alone_worst  # the promise is judged by the worst that is known of both
    decode_s = COST.decode_s(DecodeLoad(40, 40 * 1024), 132) * worst
    layer_s = COST.prefill_s(PrefillLoad.of_chunk(2048, 0), 132) / 32
    turns = -(-32 // decision.layers)
    gaps_s = [decode_s + layers * layer_s * worst for layers in (decision.layers, -(-32 // (turns - 1)))]
    assert gaps_s[0] <= 0.020 < gaps_s[1]
    assert decision.step_s == pytest.approx(gaps_s[0])
    steps_s = (turns + 1) * decode_s  # one before the first piece
    assert decision.prompt_tokens_per_s == pytest.approx(2048 / (32 * layer_s + steps_s))


def test_exclusive_pieces_shrink_when_steps_were_slower_than_predicted():
    guard = Guard()
    before = dispatcher([Mode.EXCLUSIVE], guard).choose(load(tbt_ms=20))
    guard.observe(Lane.PREFILL, Cell.of(PrefillLoad.of_chunk(2048, 0), DecodeLoad(), 132), 1.0, 1.5)
    after = dispatcher([Mode.EXCLUSIVE], guard).choose(load(tbt_ms=20))
    assert after.layers < before.layers and after.step_s <= 0.020


def test_an_idle_lane_leaves_the_chip_to_the_other():
    only_prompts = dispatcher().choose(Load(DecodeLoad(), 0.05, 4096))
    assert (only_prompts.partition, only_prompts.token_chunk) == (WHOLE, 2048)
    piece_s = COST.prefill_s(PrefillLoad.of_chunk(2048, 0), 132) * only_prompts.layers / 32
    assert LONE_PIECE_S <= piece_s < 2 * LONE_PIECE_S, "a decode that begins must not wait for a whole prompt"
    only_tokens = dispatcher().choose(load(prompt=0))
    assert only_tokens.partition == WHOLE
    assert only_tokens.step_s == COST.decode_s(DecodeLoad(40, 40 * 1024), 132) * Guard().alone_worst


def test_what_cannot_be_met_is_said_and_prefill_keeps_its_share():
    one = load(tbt_ms=2.0)  # the weights alone take longer
    decision = dispatcher([Mode.FUSED, Mode.EXCLUSIVE]).choose(one)
    assert decision.is_unmeetable
    assert decision.partition == WHOLE
    decode_s = COST.decode_s(one.decode, 132) * Guard().alone_worst
    share = 1 - decode_s / decision.step_s
    one_layer = COST.prefill_s(PrefillLoad.of_chunk(2048, 0), 132) / 32 * Guard().alone_worst
    assert 0 < share <= max(MIN_PREFILL_SHARE, one_layer / (decode_s + one_layer)) + 1e-9


def test_what_cannot_be_met_is_split_where_steps_take_no_longer_on_a_half():
    """Long contexts: 64 SMs read them nearly as fast as all, and prefill has the others meanwhile."""
    one, guard = load(tbt_ms=2.0), Guard(prior_mean=1.0, prior_worst=1.0)
    forced = dispatcher([Mode.EXCLUSIVE], guard).choose(one)
    decision = dispatcher(guard=guard).choose(one)
    assert decision.mode is Mode.SPLIT and decision.is_unmeetable
    assert decision.step_s <= forced.step_s
    assert decision.prompt_tokens_per_s > 2 * forced.prompt_tokens_per_s
    slowed = Guard(prior_mean=1.5, prior_worst=2.0)
    assert dispatcher(guard=slowed).choose(one).mode is Mode.EXCLUSIVE


@pytest.mark.parametrize("modes", [tuple(Mode), (Mode.FUSED,), (Mode.SPLIT, Mode.FUSED)])
def test_a_chunk_begun_by_layers_goes_on_by_layers(modes):
    one = load(tbt_ms=20)
    assert dispatcher([Mode.FUSED]).choose(one).mode is Mode.FUSED
    opened = dispatcher(modes).choose(replace(one, open_tokens=512))
    assert opened.mode is not Mode.FUSED
    assert not opened.is_unmeetable
    assert opened.step_s <= one.tbt_s


def test_a_choice_stays_until_another_is_clearly_better():
    one = load(tbt_ms=20)
    options = sorted(dispatcher().options(one), key=lambda option: option.prompt_tokens_per_s)
    best, other = options[-1], options[0]
    assert dispatcher().choose(one) == best
    near = best.prompt_tokens_per_s < (1 + HYSTERESIS) * other.prompt_tokens_per_s
    assert dispatcher().choose(one, other) == (other if near else best)
    gone = Decision(Mode.SPLIT, Partition(1, 131), 64, 1, 1.0, 1e9)
    assert dispatcher().choose(one, gone) == best, "a partition that is no option any more is left at once"


@pytest.mark.parametrize("prompt_s, decode_s, layers", [(0.032, 0.004, 4), (0.032, 0.0041, 5), (0.004, 0.05, 32)])
def test_layers_of_a_piece_cover_a_decode_step(prompt_s, decode_s, layers):
    assert dispatcher()._layers(decode_s, prompt_s) == layers
