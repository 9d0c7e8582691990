"""--mode=serve: the newest policy of a run behind OpenAI's API, until somebody ends it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity_jax.config import Config, resolve
from trinity_jax.explorer.workflow import SamplingParams
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.preemption import Preemption

if TYPE_CHECKING:
  from trinity_jax.server.collect import Collector

TOKEN = "TRINITY_JAX_TOKEN"  # environment variable: a secret has no place in a config


def serve(config: Any, workdir: str | Path, *, report: Callable[[str], None] = print) -> None:
  """Serves until SIGTERM or an interrupt.

  Args:
    config: ConfigDict or Config; its `server` and `sampler` say how.
    workdir: of a run: its newest model in Hugging Face form is served, else the one that the run
      would start from. With server.record the weights of the run that --mode=train trains there,
      see `traffic`.
    report: called with the address and, unless the environment sets it, the token.

  Raises:
    UserError: a model, address, certificate or limit that cannot be.
    RunFailed: the server did not start.
  """
  from trinity_jax.latest import exploring_stage, newest_model, sampling
  from trinity_jax.run import stage_directory

  config = config if isinstance(config, Config) else resolve(config)
  stage, workdir = exploring_stage(config), Path(workdir).absolute()
  preemption, ended = Preemption(), threading.Event()
  if stage.server.record:
    from trinity_jax.traffic import serve_and_record

    serve_and_record(stage, stage_directory(config, workdir, stage), preemption, report)
    return
  model_path = newest_model(config, workdir)
  with (
    preemption.on_signals(),
    preemption.telling(ended.set),
    sampling(stage, model_path) as engine,
  ):
    server = make_server(stage, engine, Tokenizer.load(model_path), os.environ.get(TOKEN))
    gc.collect()  # what is there when it starts is kept, garbage too
    server.start()
    try:
      announce(server, model_path, report)
      ended.wait()
    except KeyboardInterrupt:
      pass
    finally:
      server.close()


def announce(server: Any, model_path: Path, report: Callable[[str], None]) -> None:
  """Says where a server is and, unless the environment sets it, its token."""
  report(f"model: {model_path}\nserving OpenAI's API at {server.url}/v1")
  if TOKEN not in os.environ:
    report(f"token: {server.token}  (set {TOKEN} to choose it)")


class OnDemand:
  """A server for the runs of an explorer, which begins with the first one that asks for it."""

  def __init__(self, config: Config, engine: Any, tokenizer: Tokenizer):
    self._make = lambda: make_server(config, engine, tokenizer)
    self._server: Any = None

  def session(self, model: Any) -> Any:
    """Begins a run's session; see server.serve.Server.session.

    Raises:
      UserError: an address or file of config.server that cannot be had.
      RunFailed: the server did not start.
    """
    if self._server is None:
      server = self._make()
      gc.collect()  # what is there when it starts is kept, garbage too
      self._server = server.start()
    return self._server.session(model)

  def close(self) -> None:
    if self._server is not None:
      self._server.close()


def make_server(
  config: Config,
  engine: Any,
  tokenizer: Tokenizer,
  token: str | None = None,
  collector: Collector | None = None,
):
  """The server that `config.server` describes, not started.

  Args:
    collector: takes the sessions that its clients begin; None: they begin none.
  """
  from trinity_jax.server.serve import serve as make

  s, c = config.sampler, config.server
  recorded: dict[str, Any] = {}
  if collector is not None:
    recorded = {
      "new_session": collector.begin,
      "on_commit": collector.commit,
      "on_reward": collector.reward,
      "most_logs": config.explorer.max_logs,
      "max_sessions": c.max_sessions,
      "session_timeout": c.session_timeout,
    }
  return make(
    engine,
    tokenizer,
    max_prompt=s.max_prompt_length,
    max_response=s.max_response_length,
    params=SamplingParams(s.temperature, s.max_response_length, s.top_p, s.top_k),
    host=c.host,
    port=c.port,
    token=token,
    model=c.model,
    max_body=c.max_body,
    rate=c.rate,
    deadline=c.deadline,
    certificate=c.certificate or None,
    private_key=c.private_key or None,
    **recorded,
  )
