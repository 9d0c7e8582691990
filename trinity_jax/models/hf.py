"""Hugging Face checkpoints: `config.json`, one or several safetensors files, tokenizer files.

Leaves are read and written one at a time, so no host holds the model twice. Names and shapes come
from `params.abstract`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trinity_jax.errors import UserError
from trinity_jax.models import params as params_lib
from trinity_jax.models import tokenizer as tokenizer_lib
from trinity_jax.models.params import Params, ParamSpec
from trinity_jax.models.presets import ModelConfig
from trinity_jax.placement import host_parts, take_part

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_LISTED = 20  # names in an error message before "and n more"
_TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
  "generation_config.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # a folder of named ones, such as tool_use.jinja


def load_config(path: str | Path) -> ModelConfig:
  """Reads the `config.json` of an HF folder. Raises UserError when it is missing or unsupported."""
  file = Path(path) / "config.json"
  if not file.is_file():
    raise UserError(f"{file}: no such file; expected an HF model folder")
  try:
    return ModelConfig.from_hf(_read_json(file))
  except UserError as error:
    raise UserError(str(error).replace("config.json", str(file), 1)) from error


def load(
  path: str | Path,
  config: ModelConfig | None = None,
  *,
  dtype: Any = jnp.float32,
  shardings: Any = None,
) -> tuple[Params, ModelConfig]:
  """Reads parameters in `dtype`, each shard only where it is needed.

  Args:
    path: folder with `config.json` and `model.safetensors`, or shards and their index.
    config: expected model; None = that of `config.json`.
    shardings: pytree of NamedSharding that mirrors the parameters; None = the default device.

  Raises:
    UserError: lists every missing, unexpected or mis-shaped tensor; names a truncated file.
  """
  path = Path(path)
  config = load_config(path) if config is None else config
  specs = params_lib.abstract(config)
  with _Files(path) as files:
    _check(files, config, specs)
    flat, treedef = jax.tree.flatten(specs)
    targets = [None] * len(flat) if shardings is None else treedef.flatten_up_to(shardings)
    leaves = [_load_leaf(files, spec, dtype, target) for spec, target in zip(flat, targets)]
  return treedef.unflatten(leaves), config


class _Files:
  """The open safetensors files of one folder; tensor name -> file."""

  def __init__(self, path: Path):
    self.path = path
    self._open: dict[str, Any] = {}
    self.where: dict[str, str] = {}

  def __enter__(self) -> _Files:
    import safetensors

    index = self.path / _INDEX
    if index.is_file():
      self.where = dict(_read_json(index).get("weight_map", {}))
    elif (self.path / _SINGLE).is_file():
      self.where = {}
    else:
      raise UserError(f"{self.path}: neither {_SINGLE} nor {_INDEX}; only safetensors are read")
    try:
      for name in sorted(set(self.where.values())) or [_SINGLE]:
        file = self.path / name
        if not file.is_file():
          raise UserError(f"{file}: no such file, but {_INDEX} names it")
        try:
          handle = safetensors.safe_open(str(file), framework="numpy")
        except safetensors.SafetensorError as error:
          raise UserError(f"{file}: truncated or not safetensors ({error})") from error
        self._open[name] = handle.__enter__()
      self._index()
    except UserError:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_) -> None:
    for handle in self._open.values():
      handle.__exit__(None, None, None)
    self._open.clear()

  def _index(self) -> None:
    """Makes `where` say what the files really hold."""
    found = {tensor: name for name, handle in self._open.items() for tensor in handle.keys()}
    lost = [tensor for tensor, name in self.where.items() if found.get(tensor) != name]
    if lost:
      raise UserError(f"{self.path / _INDEX}: not in the file it names: {_listed(lost)}")
    self.where = found

  def slice(self, tensor: str) -> Any:
    """A lazy view: get_shape(), get_dtype() and [index] -> np.ndarray."""
    return self._open[self.where[tensor]].get_slice(tensor)


def _tensors(specs: Params) -> Iterator[tuple[str, ParamSpec]]:
  """Yields (HF tensor name, its leaf's spec) for every tensor of a checkpoint."""
  for spec in jax.tree.leaves(specs):
    for layer in range(spec.shape[0] if spec.stacked else 1):
      yield spec.hf_name.format(layer=layer), spec


def _check(files: _Files, config: ModelConfig, specs: Params) -> None:
  want = dict(_tensors(specs))
  have = {name for name in files.where if not name.endswith("rotary_emb.inv_freq")}
  if config.tie_word_embeddings:
    have.discard("lm_head.weight")  # some writers store the tied matrix twice
  problems = []
  if missing := [name for name in want if name not in have]:
    problems.append(f"{len(missing)} missing: {_listed(missing)}")
  if unexpected := sorted(have - set(want)):
    problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
  shapes = []
  for name in want:
    if name in have and tuple(files.slice(name).get_shape()) != want[name].hf_shape:
      shape = tuple(files.slice(name).get_shape())
      shapes.append(f"{name} is {shape}, expected {want[name].hf_shape}")
  if shapes:
    problems.append(f"{len(shapes)} of another shape: {_listed(shapes)}")
  kinds = {name: files.slice(name).get_dtype() for name in want if name in have}
  if odd := [f"{name} {kind}" for name, kind in kinds.items() if kind not in _DTYPES]:
    problems.append(f"{len(odd)} of a dtype other than {'/'.join(_DTYPES)}: {_listed(odd)}")
  if problems:
    raise UserError(f"{files.path}: tensors do not fit the model config: {'; '.join(problems)}")
  if config.tie_word_embeddings and "lm_head.weight" in files.where:
    _check_tied(files)


def _check_tied(files: _Files) -> None:
  head, embed = files.slice("lm_head.weight"), files.slice("model.embed_tokens.weight")
  same = head.get_shape() == embed.get_shape() and np.array_equal(head[:], embed[:])
  if not same:
    raise UserError(
      f"{files.path}: tie_word_embeddings is true but lm_head.weight differs from the embedding;"
      " set it to false in config.json"
    )


def _listed(names: list[str]) -> str:
  rest = len(names) - _LISTED
  return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _read_json(file: Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{file}: not valid JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}")
  return value


def _load_leaf(files: _Files, spec: ParamSpec, dtype: Any, sharding: Any) -> jax.Array:
  def read(index: tuple[slice, ...] | None) -> np.ndarray:
    index = (slice(None),) * len(spec.shape) if index is None else index
    if not spec.stacked:
      return _read_tensor(files, spec, spec.hf_name, index, dtype)
    layers = range(spec.shape[0])[index[0]]
    out = np.empty((len(layers), *_extent(spec.shape[1:], index[1:])), dtype)
    for row, layer in enumerate(layers):
      out[row] = _read_tensor(files, spec, spec.hf_name.format(layer=layer), index[1:], dtype)
    return out

  if sharding is None:
    return jnp.asarray(read(None))
  return jax.make_array_from_callback(spec.shape, sharding, read)


def _extent(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
  return tuple(len(range(size)[part]) for size, part in zip(shape, index))


def _read_tensor(files: _Files, spec: ParamSpec, name: str, index, dtype: Any) -> np.ndarray:
  """Reads part of one HF tensor; `index` is in our orientation."""
  index = index[::-1] if spec.transposed else index
  value = files.slice(name)[tuple(slice(part.start or 0, part.stop) for part in index)]
  return np.ascontiguousarray(value.T if spec.transposed else value).astype(dtype, copy=False)


def save(
  path: str | Path,
  params: Params,
  config: ModelConfig,
  tokenizer_dir: str | Path | None = None,
  *,
  max_shard_bytes: int = 5 * 10**9,
  launch: Callable[..., Any] | None = None,
) -> Path:
  """Writes an HF folder that `transformers` loads; replaces what was at `path` only when complete.

  Of several processes all call it, and the first one writes.

  Args:
    tokenizer_dir: HF folder whose tokenizer and generation config are copied.
    max_shard_bytes: a larger model is split over several files with an index.
    launch: of the mesh that holds the params, where other threads use it too.

  Raises:
    UserError: the parameters do not fit the config, or the folder cannot be written.
  """
  path = Path(path)
  params_lib.check(params, config)
  if jax.process_index():
    take_part(params, launch)
    return path
  temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_tensors(temporary, params, config, max_shard_bytes, launch)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    from importlib.metadata import version

    hf_config = {**config.to_hf(), "dtype": dtype, "transformers_version": version("transformers")}
    _write_json(temporary / "config.json", hf_config)
    if tokenizer_dir is not None:
      for name in _TOKENIZER_FILES:
        if (Path(tokenizer_dir) / name).is_file():
          shutil.copyfile(Path(tokenizer_dir) / name, temporary / name)
      for template in (Path(tokenizer_dir) / _TEMPLATES).glob("*.jinja"):
        (temporary / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, temporary / _TEMPLATES / template.name)
    _replace(temporary, path)
  except OSError as error:
    shutil.rmtree(temporary, ignore_errors=True)
    raise UserError(f"{path}: cannot be written: {error}") from error
  return path


def _replace(temporary: Path, path: Path) -> None:
  """Puts `temporary` in the place of `path`; the old folder goes last."""
  if not path.exists():
    temporary.rename(path)
    return
  old = path.with_name(f"{path.name}.old-{os.getpid()}")
  path.rename(old)
  temporary.rename(path)
  shutil.rmtree(old)


def _write_tensors(
  folder: Path, params: Params, config: ModelConfig, max_shard_bytes: int, launch
) -> None:
  """Writes shard after shard, leaf after leaf, then gives the files their final names."""
  shards: list[list[str]] = []
  pending: dict[str, np.ndarray] = {}
  total = size = 0

  def flush() -> None:
    nonlocal pending, size
    from safetensors.numpy import save_file

    save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
    shards.append(list(pending))
    pending, size = {}, 0

  for name, value in to_tensors(params, config, launch):
    if pending and size + value.nbytes > max_shard_bytes:
      flush()
    pending[name] = value
    size += value.nbytes
    total += value.nbytes
  flush()
  if len(shards) == 1:
    (folder / "part-0").rename(folder / _SINGLE)
    return
  weight_map = {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"part-{i}").rename(folder / file)
    weight_map.update(dict.fromkeys(names, file))
  _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def to_tensors(
  params: Params, config: ModelConfig, launch: Callable[..., Any] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (HF tensor name, host array in HF orientation) of parameters, or of their gradients."""
  specs, treedef = jax.tree.flatten(params_lib.abstract(config))
  for spec, leaf in zip(specs, treedef.flatten_up_to(params)):
    parts = host_parts(leaf, launch)
    values = (value for part in parts for value in part) if spec.stacked else parts
    for layer, value in enumerate(values):
      value = value.T if spec.transposed else value
      yield spec.hf_name.format(layer=layer), np.ascontiguousarray(value)


def _write_json(file: Path, value: dict[str, Any]) -> None:
  file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tiny_config(
  *,
  vocab_size: int = 320,
  hidden: int = 128,
  layers: int = 2,
  heads: int = 4,
  kv_heads: int = 2,
  head_dim: int = 32,
  intermediate: int = 384,
  max_positions: int = 1024,
  tie: bool = True,
) -> ModelConfig:
  """The Qwen3 config of a small model with the byte-level tokenizer.

  Raises:
    UserError: a size that is no positive int, query heads that kv heads do not divide, or a
      `vocab_size` that is not a multiple of 64 or too small for the tokenizer.
  """
  sizes = dict(
    hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
    intermediate=intermediate, max_positions=max_positions, vocab_size=vocab_size,
  )  # fmt: skip
  for name, size in sizes.items():
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise UserError(f"{name} = {size!r}, expected a positive int")
  if heads % kv_heads:
    raise UserError(f"heads = {heads}, expected a multiple of kv_heads = {kv_heads}")
  if vocab_size % 64 or vocab_size < tokenizer_lib.BYTE_VOCAB:
    least = 64 * math.ceil(tokenizer_lib.BYTE_VOCAB / 64)
    raise UserError(f"vocab_size = {vocab_size}, expected a multiple of 64 from {least} on")
  pad, end, begin = (tokenizer_lib.SPECIALS.index(name) for name in tokenizer_lib.SPECIALS[:3])
  return ModelConfig(
    family="qwen3", vocab_size=vocab_size, hidden_size=hidden, num_layers=layers, num_heads=heads,
    num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=intermediate, qk_norm=True,
    tie_word_embeddings=tie, max_position_embeddings=max_positions, bos_token_id=begin,
    eos_token_ids=(end,), pad_token_id=pad,
  )  # fmt: skip


def write_tiny_checkpoint(
  path: str | Path,
  *,
  seed: int = 0,
  dtype: Any = jnp.float32,
  words: Sequence[str] = (),
  **sizes: Any,
) -> Path:
  """Writes a complete HF folder: a random Qwen3 model and a byte-level tokenizer with a template.

  Args:
    words: texts that the tokenizer has a token for each.
    sizes: of `tiny_config`.

  Raises:
    UserError: sizes or words that cannot be.
  """
  config = tiny_config(**sizes)
  path = Path(path)
  initialise: Callable[[jax.Array], Params] = jax.jit(
    lambda key: params_lib.init(key, config, dtype)
  )
  save(path, initialise(jax.random.key(seed)), config)
  tokenizer_lib.write_byte_tokenizer(
    path, vocab_size=config.vocab_size, max_length=config.max_position_embeddings, words=words
  )
  ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
  _write_json(path / "generation_config.json", {**ids, "pad_token_id": config.pad_token_id})
  return path
