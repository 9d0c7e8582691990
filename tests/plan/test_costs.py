"""Costs of compiled programs: loops times trips, collectives by kind, traffic of main memory."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trinity_jax.errors import UserError
from trinity_jax.models import params as params_lib
from trinity_jax.models import sharding, transformer
from trinity_jax.models.presets import ModelConfig
from trinity_jax.plan import costs, hlo, products

LAYERS, T = 4, 16
MODEL = ModelConfig("qwen3", 512, 64, LAYERS, 4, 2, 16, 128, qk_norm=True)


def loss(params, tokens, unroll):
  positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
  hidden = transformer.forward(
    params, MODEL, tokens, positions, jnp.ones_like(tokens), remat="full", unroll=unroll
  )
  return jnp.sum(transformer.logits(params, MODEL, hidden) ** 2)


@functools.cache
def compiled(unroll: int):
  """The gradient of `loss` on 2 x 2 fake devices, 8 rows."""
  mesh = sharding.make_mesh(1, 2, 2, jax.devices()[:4])
  layout = sharding.param_shardings(MODEL, mesh)
  params = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), params_lib.abstract(MODEL)
  )
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
  grad = jax.jit(
    jax.grad(functools.partial(loss, unroll=unroll)),
    in_shardings=(layout, rows), out_shardings=layout,
  )  # fmt: skip
  with jax.set_mesh(mesh):
    return grad.lower(params, jax.ShapeDtypeStruct((8, T), jnp.int32)).compile()


def test_unrolled_and_scanned_agree():
  scanned, unrolled = (costs.cost(compiled(n).as_text()) for n in (1, LAYERS))
  assert scanned.flops == pytest.approx(unrolled.flops, rel=0.02)
  one, other = scanned.sent(), unrolled.sent()
  assert one and sum(one.values()) == pytest.approx(sum(other.values()), rel=0.02)
  # What XLA itself says of the scanned program counts a layer once.
  assert compiled(1).cost_analysis()["flops"] < 0.6 * scanned.flops


def test_flops_are_those_of_the_products():
  """Forward, recomputed, and twice as much backward; the head is not recomputed."""
  found = costs.cost(compiled(1).as_text())
  tokens = 8 * T / 4  # four devices
  layer = MODEL.hidden_size * MODEL.head_dim * 2 * (4 + 2) + 3 * 64 * 128
  attention = 2 * 4 * T * 16  # scores and mixing per token and layer, all of the row
  low = 2 * tokens * (3 * LAYERS * (layer + attention) + 3 * 64 * 512)
  high = 2 * tokens * (4 * LAYERS * (layer + 2 * attention) + 3 * 64 * 512)
  assert low < found.flops < high
  assert not found.unknown


def test_no_table_travels():
  """Embeddings and their gradients: the table stays where it lies; hidden states travel."""
  table = MODEL.vocab_size * MODEL.hidden_size // 2  # of a device of the tensor axis
  found = costs.cost(compiled(1).as_text())
  looked_up = [c for c in found.collectives if "embed" in c.op_name and "transpose" in c.op_name]
  assert looked_up and max(c.largest for c in looked_up) < table
  # The head's weight is gathered: nothing else is as large.
  large = [c for c in found.collectives if c.largest >= table and "logits" not in c.op_name]
  assert not large


def test_loops_whose_bound_is_traced():
  def f(x, n):
    inner = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)
    traced = lambda x: jax.lax.fori_loop(0, n, lambda _, x: inner(x), x)
    return jax.lax.fori_loop(0, n + 1, lambda _, x: traced(x) @ x, x)

  text = jax.jit(f).lower(jnp.zeros((16, 16)), 2).compile().as_text()
  product = 2 * 16**3
  for dynamic, count in (((), 4), ((5,), 5 * 4), ((5, 2), 5 * 7)):
    assert costs.cost(text, dynamic).flops == count * product


TEXT = """HloModule step, is_scheduled=true

%start (p.0: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p.0), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (p.1: bf16[4,8], p.2: bf16[16,8], p.3: f32[32,8]) -> (f32[32,8], bf16[16,8]) {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %p.2 = bf16[16,8]{1,0} parameter(1)
  %p.3 = f32[32,8]{1,0} parameter(2)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}
  %add.1 = f32[32,8]{1,0} add(%p.3, %p.3)
  ROOT %tuple.1 = (f32[32,8]{1,0}, bf16[16,8]{1,0}) tuple(%add.1, %p.2)
}

%all-reduce-scatter.1 (p.4: f32[32,8]) -> f32[8,8] {
  %p.4 = f32[32,8]{1,0} parameter(0)
  %all-reduce.1 = f32[32,8]{1,0} all-reduce(%p.4), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %cut = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,8}
}

ENTRY %main (a: bf16[4,8], b: f32[32,8], c: f32[64,8,8]) -> f32[8,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[32,8]{1,0} parameter(1)
  %c = f32[64,8,8]{2,1,0} parameter(2)
  %fusion.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %g.1 = bf16[16,8]{1,0} get-tuple-element(%fusion.1), index=1
  %fusion.2 = (f32[32,8]{1,0}, bf16[16,8]{1,0}) fusion(%a, %g.1, %b), kind=kLoop, calls=%middle
  %g.2 = f32[32,8]{1,0} get-tuple-element(%fusion.2), index=0
  %linear_logprob_forward.7 = f32[32,1]{1,0:T(8,128)S(1)} custom-call(%g.2, %g.2, %b), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
    "name": "x"
  }}
  %other_kernel.2 = f32[32,8]{1,0} custom-call(%b), custom_call_target="tpu_custom_call"
  %permute = (f32[32,8]{1,0}, f32[32,8]{1,0}, u32[]) collective-permute-start(%g.2), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %moved = f32[32,8]{1,0} collective-permute-done(%permute)
  ROOT %fusion.3 = f32[8,8]{1,0:S(1)} fusion(%moved), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_the_words_of_a_tpu():
  found = costs.cost(TEXT)
  kinds = {(c.kind, c.overlaps): (c.sent, c.largest, c.devices) for c in found.collectives}
  assert kinds == {
    ("all-gather", True): (3 / 4 * 16 * 8 * 2, 128, 4),  # once, though two fusions name it
    ("collective-permute", True): (32 * 8 * 4, 256, 2),
    ("reduce-scatter", False): (3 / 4 * 32 * 8 * 4, 64, 4),
  }
  assert len(found.collectives) == 3
  assert found.unknown == {"other_kernel"}
  # fusion.2 reads and writes 32 x 8 and hands the gathered array on; the kernel reads three such
  # and writes to fast memory; the other kernel reads and writes.
  assert found.bytes == 32 * 8 * 4 * (2 + 3 + 2)


@pytest.mark.parametrize(
  ("attributes", "group"),
  [
    ("replica_groups={{0,8},{1,9}}", (0, 8)),
    ("replica_groups=[8,2]<=[2,8]T(1,0)", (0, 8)),
    ("replica_groups=[2,8]<=[16]", tuple(range(8))),
    ("replica_groups=[4,4]<=[2,2,2,2]T(0,2,1,3)", (0, 1, 4, 5)),
    ("replica_groups=mesh['data'=2,'fsdp'=8] {'data'}", (0, 8)),
    ("replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp':(2)4}", (0, 1, 2, 3)),
    ("replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp':(1)2}", (0, 4)),
    ("channel_id=5, source_target_pairs={{0,1},{1,9},{9,0}}", (9, 0)),
    ("source_target_pairs={{3,4}}", (3, 4)),
    ("channel_id=1", (0,)),
  ],
)
def test_who_exchanges(attributes, group):
  assert costs._group(types.SimpleNamespace(attributes=attributes)) == group


def test_windows_and_updates_move_their_own_size():
  def f(table, x):
    row = lambda i: jax.lax.dynamic_index_in_dim(table, 2 * i, 0, keepdims=False)
    return jax.lax.fori_loop(0, 50, lambda i, t: t.at[i].set(row(i) * x), table)

  text = jax.jit(f).lower(jnp.zeros((1000, 64)), jnp.ones(64)).compile().as_text()
  table = 1000 * 64 * 4  # copied once or twice, not in each of 50 trips
  assert 2 * table <= costs.cost(text).bytes < 5 * table


@pytest.mark.parametrize("holes", [1, 2])
def test_places_that_meet_an_input(holes):
  cases = ((5, 6, 3, 1, 1, 1), (7, 9, 4, 2, 2, 1), (6, 8, 3, 0, 1, 2))
  for out, n, k, low, stride, spread in cases:
    expected = sum(
      0 <= (p := o * stride + j * spread - low) <= (n - 1) * holes and p % holes == 0
      for o in range(out) for j in range(k)
    )  # fmt: skip
    assert products._overlap(out, n, k, low, stride, spread, holes) == expected


def test_work_of_another_thread():
  """As libtpu writes what it gives to SparseCores: a call of a computation that starts another."""
  text = """
%less (x: f32[], y: f32[]) -> pred[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %first = pred[] compare(%x, %y), direction=LT
}

%rows (p.0: f32[8,4], p.1: s32[3]) -> f32[3,4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = s32[3]{0} parameter(1)
  ROOT %gather = f32[3,4]{1,0} gather(%p.0, %p.1), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,4}
}, execution_thread="sparsecore"

%inner (q.0: f32[8,4], q.1: s32[3]) -> f32[12,4] {
  %q.0 = f32[8,4]{1,0} parameter(0)
  %q.1 = s32[3]{0} parameter(1)
  %part = f32[3,4]{1,0} fusion(%q.0, %q.1), kind=kCustom, calls=%rows
  ROOT %all-gather = f32[12,4]{1,0} all-gather(%part), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%started (r.0: f32[8,4], r.1: s32[3]) -> f32[12,4] {
  %r.0 = f32[8,4]{1,0} parameter(0)
  %r.1 = s32[3]{0} parameter(1)
  ROOT %call = f32[12,4]{1,0} call(%r.0, %r.1), to_apply=%inner
}, execution_thread="sparsecore"

%body (b.0: f32[8,4], b.1: s32[3]) -> f32[12,4] {
  %b.0 = f32[8,4]{1,0} parameter(0)
  %b.1 = s32[3]{0} parameter(1)
  %begun = ((f32[8,4], s32[3]), f32[12,4], u32[]) async-start(%b.0, %b.1), async_execution_thread="sparsecore", calls=%started
  ROOT %ended = f32[12,4]{1,0} async-done(%begun)
}, execution_thread="sparsecore"

%outer (c.0: f32[8,4], c.1: s32[3]) -> f32[12,4] {
  %c.0 = f32[8,4]{1,0} parameter(0)
  %c.1 = s32[3]{0} parameter(1)
  ROOT %custom-call = f32[12,4]{1,0} custom-call(%c.0, %c.1), custom_call_target="TODO", called_computations={%body}, backend_config={}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8,4], b: s32[3]) -> f32[12,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = s32[3]{0} parameter(1)
  %top = f32[8,4]{1,0} custom-call(%a), custom_call_target="TopK", called_computations={%less}
  %start = ((), (), (s32[9]{0:S(4)})) async-start(), async_execution_thread="sparsecore", calls=%outer
  %more = ((f32[8,4], s32[3]), f32[12,4], s32[]) async-update(%start, %a, %b)
  ROOT %done = f32[12,4]{1,0} async-done(%more)
}
"""  # noqa: E501
  found = costs.cost(text)
  # TopK reads and writes 8 x 4; the gather three rows, their numbers and the rows again.
  assert found.bytes == 4 * (2 * 8 * 4 + 3 * 4 + 3 + 3 * 4) and not found.unknown
  (one,) = found.collectives
  assert (one.kind, one.sent, one.overlaps) == ("all-gather", 3 / 4 * 12 * 4 * 4, True)


def test_gathered_by_a_sum():
  """Over many devices XLA puts each one's part into zeros and adds these up."""
  text = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%put (p: f32[2,4], i: s32[]) -> f32[8,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[8,4]{1,0} broadcast(%zero), dimensions={}
  ROOT %own = f32[8,4]{1,0} dynamic-update-slice(%zeros, %p, %i, %i)
}

ENTRY %main (a: f32[2,4], i: s32[]) -> f32[8,4] {
  %a = f32[2,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %placed = f32[8,4]{1,0} fusion(%a, %i), kind=kLoop, calls=%put
  %gathered = f32[8,4]{1,0} all-reduce(%placed), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %summed = f32[8,4]{1,0} all-reduce(%gathered), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
  kinds = [(c.kind, c.sent, c.largest) for c in costs.cost(text).collectives]
  price = 2 * 3 / 4 * 8 * 4 * 4  # an all-reduce's, for both
  assert kinds == [("all-gather", price, 32), ("all-reduce", price, 32)]


@pytest.mark.parametrize(("step", "trips"), [(1, 6), (2, 3), (4, 2)])
def test_joined_iterations(step, trips):
  text = f"""
%body (b: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %b = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[4,4]{{1,0}} get-tuple-element(%b), index=1
  %by = s32[] constant({step})
  %next = s32[] add(%i, %by)
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %out = (s32[], f32[4,4]{{1,0}}) tuple(%next, %y)
}}

%condition (c: (s32[], f32[4,4])) -> pred[] {{
  %c = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}}

ENTRY %main (a: f32[4,4]) -> (s32[], f32[4,4]) {{
  %a = f32[4,4]{{1,0}} parameter(0)
  %first = s32[] constant(1)
  %begin = (s32[], f32[4,4]{{1,0}}) tuple(%first, %a)
  ROOT %loop = (s32[], f32[4,4]{{1,0}}) while(%begin), condition=%condition, body=%body
}}
"""
  assert costs.cost(text).flops == trips * 2 * 4**3


def test_what_is_no_program():
  with pytest.raises(UserError, match="has no ENTRY"):
    hlo.parse("nothing")


def test_shapes():
  (a, b, c) = hlo.shapes_of("(f32[2,3]{1,0:T(8,128)S(1)}, s4[7]{0}, f8e4m3fn[5])")
  assert (a.bytes, a.space) == (24, 1) and (b.bytes, b.space) == (4, 0) and c.bytes == 5


def test_splash_counts_what_is_not_in_the_future():
  """Of one row a device, whose axis is not there; of the last of the devices that share a row."""
  mask, ids = hlo.Shape("s8", (1, 8, 8)), hlo.Shape("s32", (64, 128))
  flops = lambda q, k: products._splash(2)([mask, hlo.Shape("bf16", q), hlo.Shape("bf16", k), ids])
  whole = flops((3, 4, 64, 16), (3, 2, 64, 16))
  assert whole == 2 * 2 * 3 * 4 * 16 * (64 * 64 / 2)
  assert flops((4, 64, 16), (2, 64, 16)) == whole / 3
  parts = [2 * 2 * 4 * 16 * sum(range(16 * i, 16 * i + 16)) for i in range(4)]
  assert flops((4, 16, 16), (2, 64, 16)) == pytest.approx(max(parts), rel=0.01)
  assert sum(parts) == pytest.approx(whole / 3, rel=0.02)
