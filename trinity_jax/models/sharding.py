"""Logical axes to mesh axes, as data.

The mesh has axes data (rows split, weights replicated), fsdp (rows and weights split), context (the
places in a row split, weights replicated) and tensor (heads, mlp width and vocabulary split).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trinity_jax.errors import UserError
from trinity_jax.models.params import ParamSpec, abstract
from trinity_jax.models.presets import ModelConfig

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axis, several mesh axes, or None (replicated).
Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "norm": None,
  # Rows and the places in them, in training; slots, in sampling, where a row is never split. Either
  # as they lie beside weights that are split over fsdp (replicas), or split over fsdp themselves.
  "batch": ("data", "fsdp"),
  "replicas": "data",
  "sequence": "context",
  "slots": ("data", "context", "fsdp"),
  "slot_replicas": ("data", "context"),
  "whole": None,
}


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
  *,
  context: int = 1,
) -> Mesh:
  """A mesh (data, fsdp, context, tensor) over all `devices`; one size may be -1, "the rest".

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
  text = ", ".join(f"{k}={v}" for k, v in sizes.items())
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f"mesh {text}: sizes must be positive, and at most one may be -1 (the rest)")
  known = math.prod(size for size in sizes.values() if size != -1)
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  elif known != len(devices):
    raise UserError(
      f"mesh {text} does not fit {len(devices)} device(s): the fixed sizes multiply to {known};"
      f" choose sizes that {'divide' if free else 'multiply to'} {len(devices)}"
    )
  shape, types = tuple(sizes.values()), (AxisType.Auto,) * 4
  try:
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # sizes that are no products of whole axes of a TPU's torus
    split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(split, MESH_AXES, axis_types=types)


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
  """Maps one logical axis (or None) per dimension to a PartitionSpec.

  Raises:
    UserError: an axis without a rule, or two dimensions on one mesh axis.
  """
  missing = [axis for axis in axes if axis is not None and axis not in rules]
  if missing:
    raise UserError(f"logical axes {tuple(axes)}: no sharding rule for {missing}; rules: {rules}")
  spec = PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))
  used = [name for entry in spec for name in _names(entry)]
  twice = sorted({name for name in used if used.count(name) > 1})
  if twice:
    raise UserError(f"logical axes {tuple(axes)} map to {spec}: mesh axis {twice} is used twice")
  return spec


def param_shardings(config: ModelConfig, mesh: Mesh, rules: Rules = RULES) -> dict[str, Any]:
  """Returns the pytree of NamedSharding for the parameters of `config` on `mesh`.

  Raises:
    UserError: a rule is missing or collides, or a dimension (or the number of heads) does not
      divide.
  """
  _check_heads(config, mesh, rules)

  def leaf(path, spec: ParamSpec) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    try:
      partition = partition_spec(spec.axes, rules)
    except UserError as error:
      raise UserError(f"parameter {name}: {error}") from None
    for size, axis, entry in zip(spec.shape, spec.axes, partition):
      _check_divides(f"parameter {name} {spec.shape}: {axis} = {size}", size, entry, mesh)
    return NamedSharding(mesh, partition)

  return jax.tree_util.tree_map_with_path(leaf, abstract(config))


def _check_heads(config: ModelConfig, mesh: Mesh, rules: Rules) -> None:
  """A head must not be cut in two: A is inside the sharded dimension H * A."""
  for axis, count in (("heads", config.num_heads), ("kv_heads", config.num_kv_heads)):
    _check_divides(f"model: num_{axis} = {count}", count, rules.get(axis), mesh)


def _check_divides(what: str, size: int, entry: Any, mesh: Mesh) -> None:
  unknown = [name for name in _names(entry) if name not in mesh.shape]
  if unknown:
    raise UserError(f"{what}: mesh axis {unknown} does not exist; mesh axes: {tuple(mesh.shape)}")
  parts = math.prod(mesh.shape[name] for name in _names(entry))
  if size % parts:
    raise UserError(f"{what} does not divide over mesh axis {entry} of size {parts}")


def _names(entry: Any) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = RULES) -> jax.Array:
  """Pins the layout of an intermediate value inside `with jax.set_mesh(mesh)`; else returns x.

  It is a hint for the compiler and never changes a value. Left to the compiler: a dimension whose
  axis is None, one that does not divide, one whose mesh axes the mesh lacks.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x

  def entry(size: int, axis: str | None, names: Any) -> Any:
    if axis is None:
      return PartitionSpec.UNCONSTRAINED
    if names is None:
      return None
    names = tuple(name for name in _names(names) if name in mesh.shape)
    parts = math.prod(mesh.shape[name] for name in names)
    return names if names and size % parts == 0 else PartitionSpec.UNCONSTRAINED

  wanted = partition_spec(axes, rules)
  spec = PartitionSpec(*map(entry, x.shape, axes, wanted))
  return jax.lax.with_sharding_constraint(x, spec)


def gather_after(weights: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  """(weights, x) as they are; on a mesh that splits weights, none is gathered before x is computed.

  Left to itself the compiler gathers, of a chain of layers, as many as fit the device, not knowing
  what else is there: in Llama-3.1-70B's decode step on v5e:16x16 15 GB, where 1.5 do as well.
  """
  if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
    return weights, x
  return jax.lax.optimization_barrier((weights, x))


def fold(x: jax.Array) -> jax.Array:
  """x [B, T, ...] -> [B * T, ...] in one order for all x of a shape; `unfold` is the inverse.

  Row after row; but where the mesh in context splits rows and places, device after device, so that
  nothing travels.
  """
  specs = _folding(x.shape)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  return _on_devices(flat, *specs)(x) if specs else flat(x)


def unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """[B * T, ...] of `fold` -> [B, T, ...]."""
  specs = _folding(shape)
  if not specs:
    return x.reshape(*shape, *x.shape[1:])
  mesh, apart, together = specs
  part = NamedSharding(mesh, apart).shard_shape(shape[:2])
  return _on_devices(lambda x: x.reshape(*part, *x.shape[1:]), mesh, together, apart)(x)


def _folding(shape: tuple[int, ...]) -> tuple[Any, PartitionSpec, PartitionSpec] | None:
  """(mesh in context, spec of [B, T], spec of [B * T]) where it splits the places of these rows."""
  mesh = jax.sharding.get_abstract_mesh()
  size = lambda names: math.prod(mesh.shape.get(name, 1) for name in names)
  rows, places = _names(RULES["batch"]), _names(RULES["sequence"])
  if mesh.empty or size(places) == 1 or shape[0] % size(rows) or shape[1] % size(places):
    return None
  rows = tuple(name for name in rows if name in mesh.shape)
  return mesh, PartitionSpec(rows, places), PartitionSpec((*rows, *places))


def _on_devices(f: Any, mesh: Any, given: PartitionSpec, made: PartitionSpec) -> Any:
  """f on each device's own part of an array."""
  names = {name for entry in (*given, *made) for name in _names(entry)}
  return jax.shard_map(
    f, mesh=mesh, in_specs=given, out_specs=made, axis_names=names, check_vma=False
  )
