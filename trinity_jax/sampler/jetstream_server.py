"""JetStream's gRPC server over our engine; `python -m trinity_jax.sampler.jetstream` starts it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler import jetstream
from trinity_jax.sampler.cache import aligned, buckets
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.jetstream import Sampling, check_max_prompt, engine_class
from trinity_jax.sampler.jetstream_compat import install
from trinity_jax.sampler.programs import Programs, shards_of


def load_engine(
  model: str | Path,
  *,
  slots: int = 16,
  max_prompt: int = 1024,
  max_response: int = 1024,
  prefill_chunk: int = 512,
  sampling: Sampling | None = None,
  dtype: str = "float32",
  cache_dtype: str | None = None,
  data: int = 1,
  tensor: int = 1,
) -> Any:
  """An engine for a Hugging Face folder, compiled and with its weights as version 0.

  Args:
    max_prompt: longest prompt, one of PREFILL_LENGTHS; max_response: most new tokens.
    prefill_chunk: tokens of a prompt that run at once.
    data, tensor: devices that slots and heads are split over; the first ones there are.

  Raises:
    UserError: anything that cannot be, first of all a missing google-jetstream.
  """
  make = engine_class()
  check_max_prompt(max_prompt)
  tokenizer = Tokenizer.load(model)
  config = hf.load_config(model)
  if max_prompt + max_response > config.max_position_embeddings:
    raise UserError(
      f"max_prompt + max_response = {max_prompt + max_response}: the model has positions for "
      f"{config.max_position_embeddings}; ask for fewer tokens of either"
    )
  if data * tensor > len(jax.devices()):
    raise UserError(f"data x tensor = {data * tensor}: there are {len(jax.devices())} devices")
  mesh = sharding.make_mesh(data, 1, tensor, jax.devices()[: data * tensor])
  if slots < 1 or slots % shards_of(mesh):
    raise UserError(f"slots = {slots}: expected a multiple of data = {shards_of(mesh)}")
  layout = sharding.param_shardings(config, mesh)
  launch = LaunchOrder(mesh)
  spec = EngineSpec(
    config,
    slots,
    aligned(buckets(max_prompt + max_response, smallest=64)),
    max_response,
    jnp.dtype(dtype),
    jnp.dtype(cache_dtype) if cache_dtype else None,
  )
  lengths = buckets(min(max_prompt, prefill_chunk))
  programs = Programs(spec, mesh, layout, launch, prompt_lengths=lengths, prompt_counts=(1,))
  params, _ = hf.load(model, config, dtype=jnp.dtype(dtype), shardings=layout)
  programs.warmup(params)
  engine = make(programs, launch, tokenizer, max_prompt=max_prompt, sampling=sampling or Sampling())
  engine.set_params(0, params)
  return engine


def start_server(engine: Any, port: int = 0, host: str = "127.0.0.1") -> tuple[Any, int]:
  """Starts JetStream's gRPC server in this process: (server, port); server.stop() ends it.

  Args:
    port: 0 for one that is free.

  Raises:
    UserError: the address cannot be bound.
  """
  js = install()
  port = _free_port(host, port)

  class Config(js.config_lib.ServerConfig):
    interleaved_slices = ("cpu=1",)  # one engine; which devices it has is its own business
    interleaved_engine_create_fns = (lambda _: engine,)

  js.server_lib._HOST = host
  server = js.server_lib.run(port=port, config=Config, devices=[None], jax_padding=False)
  return server, port


def _free_port(host: str, port: int) -> int:
  """`port`, or a free one for 0; gRPC would share a taken port without a word."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  with socket.socket(family) as s:
    try:
      s.bind((host.strip("[]"), port))
    except OSError as e:
      raise UserError(f"--host={host} --port={port} cannot be bound: {e.strerror}") from e
    return s.getsockname()[1]


def _flags() -> flags.FlagValues:
  values = flags.FlagValues()
  text = functools.partial(flags.DEFINE_string, flag_values=values)
  number = functools.partial(flags.DEFINE_integer, flag_values=values)
  real = functools.partial(flags.DEFINE_float, flag_values=values)
  text("model", None, "Hugging Face folder.")
  text("host", "127.0.0.1", "Address to bind; 0.0.0.0 lets everybody in.")
  number("port", 9000, "0 takes a free one.")
  number("slots", 16, "Sequences at a time.")
  number("max_prompt", 1024, "Longest prompt: a power of two.")
  number("max_response", 1024, "Most tokens of an answer.")
  number("prefill_chunk", 512, "Prompt tokens that run at once.")
  real("temperature", 0.0, "0 is greedy.")
  real("top_p", 1.0, "Nucleus.")
  real("min_p", 0.0, "Least share of the top probability.")
  number("top_k", 0, "0 is all.")
  number("seed", 0, "Of the sampling.")
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Weights.", flag_values=values)
  caches = ["", "float32", "bfloat16", "int8"]
  flags.DEFINE_enum("cache_dtype", "", caches, "Cache; empty: --dtype.", flag_values=values)
  number("data", 1, "Devices that slots are split over.")
  number("tensor", 1, "Devices that heads are split over.")
  flags.DEFINE_bool("help", False, "Prints this.", short_name="h", flag_values=values)
  return values


def _interrupt(*_: Any) -> None:
  raise KeyboardInterrupt


def main(argv: list[str]) -> int:
  values = _flags()
  try:
    rest = values(argv)[1:]
    if values["help"].value:
      print(f"{jetstream.__doc__}\n{values.main_module_help() or values.get_help()}")
      return 0
    if rest or not values["model"].value:
      raise UserError(f"unexpected {rest}" if rest else "--model=FOLDER is missing")
    given: dict[str, Any] = {name: values[name].value for name in values}
    sampling = Sampling(**{f.name: given[f.name] for f in dataclasses.fields(Sampling)})
    sizes = ("slots", "max_prompt", "max_response", "prefill_chunk", "data", "tensor", "dtype")
    own = {name: given[name] for name in (*sizes, "cache_dtype")}
    engine = load_engine(given["model"], sampling=sampling, **own)
    server, port = start_server(engine, given["port"], given["host"])
  except (UserError, flags.Error) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  signal.signal(signal.SIGTERM, _interrupt)
  print(f"serving {given['model']} on {given['host']}:{port}", flush=True)
  with contextlib.suppress(KeyboardInterrupt):
    server.wait_for_termination()
  return 0
