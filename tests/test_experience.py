"""Experience: what is written is what is read, and nothing damaged gets through."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from trinity_jax.errors import UserError
from trinity_jax.experience import Batch, Experience, ExperienceId, Source, StopReason

FAST = settings(deadline=None, max_examples=80)
_JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
  | st.floats(allow_nan=False),
  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
  max_leaves=6,
)  # fmt: skip


@st.composite
def experiences(draw):
  n = draw(st.integers(0, 12))
  floats = st.lists(st.floats(width=32), min_size=n, max_size=n)
  ints = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=n, max_size=n)
  scalars = st.floats(width=32)
  extras = st.dictionaries(st.text("abc.", min_size=1, max_size=4), scalars | floats, max_size=2)
  return Experience(
    tokens=draw(ints),
    action_mask=draw(st.lists(st.booleans(), min_size=n, max_size=n)),
    logprobs=draw(floats),
    versions=draw(ints),
    id=ExperienceId(*draw(st.tuples(*[st.integers(0, 10**6)] * 4))),
    reward=draw(st.none() | st.floats(allow_nan=False)),
    token_rewards=draw(st.none() | floats),
    advantages=draw(st.none() | floats),
    source=draw(st.sampled_from(Source)),
    stop_reason=draw(st.sampled_from(StopReason)),
    temperature=draw(st.floats(0, 2)),
    messages=draw(st.lists(st.dictionaries(st.text(max_size=4), _JSON, max_size=2), max_size=2)),
    metrics=draw(st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3)),
    info=draw(st.dictionaries(st.text(max_size=5), _JSON, max_size=3)),
    extras={k: np.asarray(v, np.float32) for k, v in draw(extras).items()},
  )


def assert_equal(a: Experience, b: Experience):
  for f in dataclasses.fields(Experience):
    x, y = getattr(a, f.name), getattr(b, f.name)
    if f.name == "extras":
      assert x.keys() == y.keys()
      for k in x:
        assert x[k].dtype == y[k].dtype and x[k].shape == y[k].shape
        np.testing.assert_array_equal(x[k], y[k])
    elif isinstance(x, np.ndarray):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y, err_msg=f.name)
    else:
      assert x == y and type(x) is type(y), f.name


@given(experiences())
@FAST
def test_round_trip(e):
  assert_equal(Experience.from_bytes(e.to_bytes()), e)


def example(**changes) -> Experience:
  values = dict(
    tokens=[5, 6, 7, 8], action_mask=[0, 0, 1, 1], logprobs=[0, 0, -0.5, -0.25],
    versions=[-1, -1, 3, 4], id=ExperienceId(1, 2, 3, 0), reward=0.5,
  )  # fmt: skip
  return Experience(**(values | changes))


def test_strided_arrays_and_numpy_numbers():
  """safetensors writes the memory behind a view; what we write are its elements."""
  wide = np.arange(8, dtype=np.int32)
  e = example(
    tokens=wide[::2],
    versions=wide[::-2],
    reward=np.float32(0.5),
    metrics={"x": np.float32(2)},
    extras={"t": np.arange(6.0).reshape(2, 3).T},
  )
  read = Experience.from_bytes(e.to_bytes())
  assert read.tokens.tolist() == [0, 2, 4, 6] and read.versions.tolist() == [7, 5, 3, 1]
  assert read.extras["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
  assert read.reward == 0.5 and read.metrics == {"x": 2.0}


def test_failed_run():
  e = Experience.failed(ExperienceId(1, 0, 2, 0), StopReason.ERROR, {"error": "boom"})
  assert e.num_actions == 0 and e.reward is None and e.stop_reason.failed
  assert_equal(Experience.from_bytes(e.to_bytes()), e)
  assert e.id.group == (1, 0) and str(e.id) == "1/0/2/0"


@given(st.data())
@FAST
def test_damaged_bytes(data):
  """Cut, flipped or overwritten: refused as damaged, or (a changed value) an Experience."""
  raw = bytearray(example(extras={"w": np.ones(4, np.float32)}).to_bytes())
  kind = data.draw(st.sampled_from(["cut", "flip", "overwrite"]))
  if kind == "cut":
    raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
  else:
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = raw[at] ^ (1 << data.draw(st.integers(0, 7))) if kind == "flip" else 0
  try:
    e = Experience.from_bytes(bytes(raw))
  except UserError as error:
    assert "is damaged" in str(error)
  else:
    assert kind != "cut" and isinstance(e, Experience) and len(e.tokens) == 4


def _with_header(header, **arrays):
  good = example()
  arrays = {"tokens": good.tokens, "action_mask": good.action_mask, "logprobs": good.logprobs,
            "versions": good.versions, **arrays}  # fmt: skip
  arrays = {k: v for k, v in arrays.items() if v is not None}
  text = header if isinstance(header, str) else json.dumps(header)
  return save(arrays, metadata={"experience": text})


GOOD = {"id": [1, 2, 3, 0], "reward": 1.0, "source": 0, "stop_reason": 1}


def test_the_header_used_below_is_good():
  assert Experience.from_bytes(_with_header(GOOD)).id == (1, 2, 3, 0)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\x00" * 64,
    b"\xff" * 64,
    save({"tokens": np.zeros(2, np.int32)}),  # no record of ours
    _with_header("not json"),
    _with_header([1, 2]),
    _with_header({}),
    _with_header({**GOOD, "id": [1, 2]}),
    _with_header({**GOOD, "id": None}),
    _with_header({**GOOD, "stop_reason": 99}),
    _with_header({**GOOD, "source": "expert"}),
    _with_header({**GOOD, "unheard_of": 1}),
    _with_header(GOOD, logprobs=None),
    _with_header(GOOD, versions=np.zeros(3, np.int32)),
    _with_header(GOOD, tokens=np.zeros(4, np.float32)),
    _with_header(GOOD, action_mask=np.zeros(4, np.int32)),
  ],
)
def test_damaged_records(data):
  with pytest.raises(UserError, match="damaged"):
    Experience.from_bytes(data)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"logprobs": [0, 0]}, r"1/2/3/0: logprobs has shape \(2,\), expected \(4,\)"),
    ({"action_mask": np.zeros((4, 1))}, r"action_mask has shape \(4, 1\)"),
    ({"tokens": np.zeros((4, 2))}, r"tokens has shape \(4, 2\)"),
    ({"token_rewards": [1.0]}, r"token_rewards has shape \(1,\)"),
    ({"advantages": [1.0] * 5}, r"advantages has shape \(5,\)"),
    ({"versions": None}, r"versions is None, expected an array"),
  ],
)
def test_wrong_shapes(changes, message):
  with pytest.raises(UserError, match=message):
    example(**changes)


def test_batch_names_its_token_fields():
  names = {f.name for f in dataclasses.fields(Batch)}
  assert set(Batch.TOKEN_FIELDS) < names
