"""The engine under JetStream's own orchestrator and gRPC server, beside our scheduler."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from trinity_jax.errors import UserError
from trinity_jax.launch_order import LaunchOrder
from trinity_jax.models import hf, sharding
from trinity_jax.models.tokenizer import Tokenizer
from trinity_jax.sampler import jetstream, jetstream_compat
from trinity_jax.sampler import jetstream_server as server_lib
from trinity_jax.sampler.engine import EngineSpec
from trinity_jax.sampler.jetstream import Sampling, prompt_key
from trinity_jax.sampler.programs import Programs
from trinity_jax.sampler.request import Request
from trinity_jax.sampler.scheduler import Sampler

WAIT = 60  # seconds before something that hangs fails a test
MAX_PROMPT, MAX_RESPONSE, SLOTS = 32, 48, 4
STOPS = (1, 20, 40, 60)  # several, so that some answers stop early
SAMPLED = Sampling(temperature=0.9, top_p=0.95, top_k=100, seed=7)
SIZES = f"slots={SLOTS}, max_prompt={MAX_PROMPT}, max_response={MAX_RESPONSE}, prefill_chunk=16"

# A server that a test can talk to: prints its port, then obeys stdin.
SERVER = f"""
import sys
from trinity_jax.models import hf
from trinity_jax.monitor.compiles import CompileCounter
from trinity_jax.sampler.jetstream import Sampling
from trinity_jax.sampler.jetstream_server import load_engine, start_server
model, other = sys.argv[1:]
engine = load_engine(model, sampling={SAMPLED!r}, {SIZES})
params = hf.load(other)[0]
sys.setswitchinterval(1e-5)  # threads meet in every way they can
counter = CompileCounter().start()
counter.mark_warm()
server, port = start_server(engine)
print(port, flush=True)
for line in sys.stdin:
  if line == "swap\\n":
    engine.set_params(1, params)
  print(engine.version, counter.since_warmup, counter.late, flush=True)
server.stop()
print("stopped", flush=True)
"""


@pytest.fixture(scope="session")
def js():
  try:
    return jetstream_compat.install()
  except UserError as e:
    if os.environ.get("CI"):
      raise
    pytest.skip(str(e))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
  """Two checkpoints of one shape; far from uniform, so that greedy choices are clear."""
  out = []
  for seed in (0, 1):
    base, path = (tmp_path_factory.mktemp("model") / name for name in ("base", "noisy"))
    hf.write_tiny_checkpoint(
      base, seed=seed, hidden=32, intermediate=64, head_dim=16, max_positions=128
    )
    params, config = hf.load(base)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [np.asarray(x) + rng.normal(0, 0.3, x.shape).astype("f4") for x in leaves]
    hf.save(path, tree.unflatten(noisy), config, tokenizer_dir=base)
    file = path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": STOPS}))
    out.append(path)
  return out


def spawn(*args):
  return subprocess.Popen(
    [sys.executable, *map(str, args)], text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )  # fmt: skip


def port_of(process) -> int:
  line = process.stdout.readline()
  assert line, process.stderr.read()
  return int(line.rpartition(":")[2])


@pytest.fixture(scope="module")
def servers(js, models):
  """Started before anything else compiles: (greedy, the user's command), (sampled, SERVER)."""
  flags = [f"--{s}" for s in SIZES.split(", ")]
  run = ["-m", "trinity_jax.sampler.jetstream", "--model", models[0], "--port", 0, *flags]
  out = [spawn(*run), spawn("-c", SERVER, *models)]
  try:
    yield out
  finally:
    for process in out:
      process.kill()
      process.communicate()


@pytest.fixture(scope="module")
def sampler(servers, models):
  """ask(prompts, sampling, weights=0) -> our scheduler's completions, and the tokenizer."""
  del servers  # they compile meanwhile
  params, config = hf.load(models[0])
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  layout = sharding.param_shardings(config, mesh)
  spec = EngineSpec(config, 3, (40, MAX_PROMPT + MAX_RESPONSE), MAX_RESPONSE)
  programs = Programs(
    spec, mesh, layout, LaunchOrder(mesh), prompt_counts=(2,), prompt_lengths=(MAX_PROMPT,)
  )
  programs.warmup(params)
  weights = [params, hf.load(models[1])[0]]

  def ask(prompts, sampling, limit=MAX_RESPONSE, weight=0):
    """prompts: (tokens, repeat)."""
    fields = {k: getattr(sampling, k) for k in ("temperature", "top_p", "min_p", "top_k")}
    own = Sampler(programs, steps_per_dispatch=5, refill_fraction=0.3, deterministic=False)
    own.start()
    own.set_params(0, jax.device_put(weights[weight], layout))
    try:
      with own.participant():
        futures = []
        for i, (tokens, repeat) in enumerate(prompts):
          key = prompt_key(sampling.seed, tokens, repeat)
          ids = np.array(tokens, np.int32)
          own.enter()
          futures.append(own.submit(Request(ids, key, (i,), limit, STOPS, **fields)))
        return [f.result(WAIT).tokens.tolist() for f in futures]
    finally:
      own.close()

  return ask


@contextlib.contextmanager
def client(port):
  import grpc
  from jetstream.core.proto import jetstream_pb2 as pb
  from jetstream.core.proto import jetstream_pb2_grpc as pb_grpc

  with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    stub = pb_grpc.OrchestratorStub(channel)

    def start(ids=None, *, text=None, max_tokens=MAX_RESPONSE, session="x"):
      content = {}
      if ids is not None:
        content["token_content"] = pb.DecodeRequest.TokenContent(token_ids=ids)
      if text is not None:
        content["text_content"] = pb.DecodeRequest.TextContent(text=text)
      request = pb.DecodeRequest(session_cache=session, max_tokens=max_tokens, **content)
      return stub.Decode(request, timeout=WAIT)

    def ask(*args, **kwargs):
      """(token ids, text) of a whole answer."""
      samples = [r.stream_content.samples[0] for r in start(*args, **kwargs)]
      return [i for s in samples for i in s.token_ids], "".join(s.text for s in samples)

    def refused(*args, **kwargs) -> str:
      with pytest.raises(grpc.RpcError) as e:
        ask(*args, **kwargs)
      assert e.value.code() is grpc.StatusCode.INVALID_ARGUMENT
      return e.value.details()

    yield SimpleNamespace(
      start=start, ask=ask, refused=refused,
      healthy=lambda: stub.HealthCheck(pb.HealthCheckRequest(), timeout=WAIT).is_live,
    )  # fmt: skip


@pytest.fixture(scope="module")
def greedy(servers, sampler):
  with client(port_of(servers[0])) as c:
    yield c


@pytest.fixture(scope="module")
def sampled(servers, sampler):
  with client(port_of(servers[1])) as c:
    yield c


def prompts(count, seed=0):
  """Prompts of 1 to MAX_PROMPT tokens."""
  rng = np.random.default_rng(seed)
  lengths = np.linspace(1, MAX_PROMPT, count).astype(int)
  return [rng.integers(0, 320, n).tolist() for n in lengths]


def at_once(ask, asks):
  with ThreadPoolExecutor(len(asks)) as pool:
    return list(pool.map(lambda a: ask(a[0], max_tokens=a[1])[0], asks))


def streamed(tokens, limit=MAX_RESPONSE):
  """What JetStream hands on of a sequence: up to the stop token, which it drops."""
  cut = tokens[:limit]
  return cut[:-1] if cut[-1] in STOPS else cut


def test_greedy_tokens_are_those_of_the_scheduler(greedy, sampler):
  """16 requests over 4 slots, other slot counts, chunks and dispatches than the scheduler has."""
  asked = prompts(16)
  limits = [1, 2, *range(20, 30), *[MAX_RESPONSE] * 4]
  want = sampler([(p, 0) for p in asked], Sampling())
  got = at_once(greedy.ask, list(zip(asked, limits)))
  assert got == [streamed(w, n) for w, n in zip(want, limits)]
  assert len({tuple(g) for g in got}) > 12 and any(len(g) == MAX_RESPONSE for g in got)


def test_sampled_tokens_are_those_of_the_scheduler(sampled, sampler):
  """Also of a prompt that is asked three times at once: three samples, in whatever order."""
  asked = prompts(15, seed=1)
  same = asked[7]
  want = sampler([*((p, 0) for p in asked), (same, 1), (same, 2)], SAMPLED)
  got = at_once(sampled.ask, [(p, MAX_RESPONSE) for p in [*asked, same, same]])
  want = [streamed(w) for w in want]
  repeats = (7, 15, 16)
  rest = [i for i in range(17) if i not in repeats]
  assert [got[i] for i in rest] == [want[i] for i in rest]
  assert sorted(got[i] for i in repeats) == sorted(want[i] for i in repeats)
  assert len({tuple(want[i]) for i in repeats}) == 3
  stopped = [len(g) < MAX_RESPONSE for g in got]
  assert any(stopped) and not all(stopped)


def test_text(greedy, sampler, models):
  """Text is tokenised and detokenised by the server; BOS goes in front unless asked otherwise."""
  tokenizer = Tokenizer.load(models[0])
  ids = tokenizer.encode("3 + 4 = ")
  for session, prompt in (("", [tokenizer.bos_id, *ids]), ("x", ids)):
    want = streamed(*sampler([(prompt, 0)], Sampling()))
    assert greedy.ask(text="3 + 4 = ", session=session) == (want, tokenizer.decode(want))
    assert greedy.ask(prompt)[0] == want
  assert greedy.ask(ids, session="")[0] == greedy.ask([tokenizer.bos_id, *ids])[0]


def test_what_cannot_be_served_is_refused_and_the_server_lives(greedy):
  fits = [5] * MAX_PROMPT
  assert "prompt of 33 tokens: expected 1 to 32" in greedy.refused([5] * 33)
  assert "prompt of 33" in greedy.refused(fits, session="")  # with BOS
  assert "prompt of 40" in greedy.refused(text="a" * 40)
  assert "prompt of 0 tokens" in greedy.refused([])
  assert "token ids 5 to 320: expected 0 to 319" in greedy.refused([5, 320])
  assert "token ids -1" in greedy.refused([-1])
  for n in (0, -1, MAX_RESPONSE + 1):
    assert f"max_tokens = {n}: expected 1 to 48" in greedy.refused([5], max_tokens=n)
  assert "no content" in greedy.refused()
  assert greedy.ask(fits) and greedy.healthy()


def test_a_server_that_runs_out_of_requests_again_and_again(sampled):
  """JetStream as it is ends within a few hundred of these."""
  for i in range(500):
    assert len(sampled.ask([i % 300 + 5, 9, 10], max_tokens=1 + i % 3)[0]) <= 3
  assert sampled.healthy()


def test_clients_that_go_away(greedy):
  """A cancelled call leaves its slot to others in the end."""
  want = greedy.ask([9, 8, 7])[0]
  for _ in range(2 * SLOTS):
    call = greedy.start([9, 8, 7])
    next(call)
    call.cancel()
  assert at_once(greedy.ask, [([9, 8, 7], MAX_RESPONSE)] * SLOTS) == [want] * SLOTS


def test_live_swap_and_no_compilation(servers, sampled, sampler):
  """New weights while requests run; nothing compiles once the server listens."""

  def tell(command):
    servers[1].stdin.write(command + "\n")
    servers[1].stdin.flush()
    return servers[1].stdout.readline().strip()

  assert tell("state") == "0 0 []"
  before, after = prompts(2, seed=2), prompts(6, seed=3)
  with ThreadPoolExecutor(4) as pool:
    under_way = [pool.submit(sampled.ask, p) for p in before * 2]
    assert tell("swap") == "1 0 []"
    assert all(f.result(WAIT)[0] for f in under_way)
  got = at_once(sampled.ask, [(p, MAX_RESPONSE) for p in after])
  assert got == [streamed(w) for w in sampler([(p, 0) for p in after], SAMPLED, weight=1)]
  assert got != [streamed(w) for w in sampler([(p, 0) for p in after], SAMPLED)]
  assert tell("state") == "1 0 []"


def test_servers_end_when_told(servers, greedy, sampled):
  """SIGTERM ends the command, stop() a server of one's own. Last: the others need them."""
  servers[0].send_signal(signal.SIGTERM)
  out, err = servers[1].communicate(timeout=WAIT)  # closes stdin
  assert out.endswith("stopped\n") and servers[1].returncode == 0, err
  assert servers[0].wait(WAIT) == 0, servers[0].stderr.read()


# --- the engine by itself ------------------------------------------------------------------------


def test_mesh_and_prefixes(js, models, sampler):
  """Slots and heads split over four devices; a prefix that continues another."""
  engine = server_lib.load_engine(
    models[0], sampling=SAMPLED, slots=4, max_prompt=MAX_PROMPT, max_response=MAX_RESPONSE,
    prefill_chunk=16, data=2, tensor=2,
  )  # fmt: skip
  assert isinstance(engine, js.engine_api.Engine)
  assert engine.max_concurrent_decodes == 4 and engine.mesh.size == 4
  params, state = engine.load_params(), engine.init_decode_state()
  asked = {3: prompts(4)[3], 0: prompts(4)[2], 1: prompts(4)[1]}
  steps = 12
  got = {slot: [] for slot in range(4)}
  for step in range(steps):
    if step % 2 == 0 and step // 2 < len(asked):  # one after the other
      slot = list(asked)[step // 2]
      first, rest = np.array(asked[slot][:9], np.int32), np.array(asked[slot][9:] + [0] * 9)
      prefix = engine.prefill(params=params, padded_tokens=first, true_length=len(first))
      prefix = engine.prefill(
        params=params, existing_prefix=prefix, padded_tokens=rest, true_length=len(rest) - 9
      )
      state = engine.insert(prefix, state, slot)
    state, result = engine.generate(params, state)
    data = result.convert_to_numpy()
    for slot in range(4):
      found = data.get_result_at_slot(slot)
      if found.valid.item():
        got[slot].append(found.tokens.item())
        assert found.lengths.item() == len(got[slot])
  want = sampler([(p, 0) for p in asked.values()], SAMPLED)
  assert got[2] == []
  for i, slot in enumerate(asked):
    assert got[slot] == want[i][: steps - 2 * i]
  with pytest.raises(UserError, match="prompt of 40 tokens: at most 32"):
    engine.prefill(params=params, padded_tokens=np.zeros(32, np.int32), true_length=40)
  with pytest.raises(ValueError, match="version -1 offered to an engine that has 0"):
    engine.set_params(-1, None)


def test_what_cannot_be_built(js, models, capsys):
  load = server_lib.load_engine
  with pytest.raises(UserError, match=r"max_prompt = 48: JetStream pads .*; use 64"):
    load(models[0], max_prompt=48)
  with pytest.raises(UserError, match="= 160: the model has positions for 128"):
    load(models[0], max_prompt=64, max_response=96)
  with pytest.raises(UserError, match="slots = 3: expected a multiple of data = 2"):
    load(models[0], max_prompt=32, max_response=8, slots=3, data=2)
  with pytest.raises(UserError, match="data x tensor = 99: there are 8 devices"):
    load(models[0], max_prompt=32, max_response=8, data=99)
  for name, value in (("temperature", -1), ("top_p", 0), ("min_p", 2), ("top_k", -1)):
    with pytest.raises(UserError, match=f"{name} = {value}: expected"):
      Sampling(**{name: value})
  for args, message in (
    ([], "--model=FOLDER is missing"),
    (["--model=/nowhere"], "/nowhere"),
    (["--model=x", "--prot=1"], "prot"),
    (["--model=x", "left"], "left"),
    ([f"--model={models[0]}", "--max_prompt=48"], "use 64"),
  ):
    assert server_lib.main(["jetstream", *args]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_a_port_that_is_taken(js):
  import socket

  with socket.create_server(("127.0.0.1", 0)) as s:
    port = s.getsockname()[1]
    with pytest.raises(UserError, match=f"--port={port} cannot be bound: Address already in use"):
      server_lib.start_server(None, port)


def test_characters_of_several_tokens(js, models):
  """Parts of a character wait for one another, as the orchestrator's buffer has it."""
  text = "né 你好"
  tokenizer = jetstream.TextTokenizer(Tokenizer.load(models[0]))
  ids = Tokenizer.load(models[0]).encode(text)
  pieces = [tokenizer.decode([i]) for i in ids]
  assert len(ids) == len(text.encode()) and pieces[0] == "n" and pieces[3] == " "
  waiting = [js.token_utils.is_byte_token(p) for p in pieces]
  assert waiting == [c > 127 for c in text.encode()]
  assert js.token_utils.is_byte_token(tokenizer.decode([319]))  # no text: nothing ends with it
  assert js.token_utils.text_tokens_to_str(pieces) == text
  # JetStream's own tokenizers go on as they did.
  assert js.token_utils.is_byte_token("<0xE5>") and not js.token_utils.is_byte_token("a")
  assert js.token_utils.text_tokens_to_str(["a", "<0xC3>", "<0xA9>"]) == "aé"


# --- the shim ------------------------------------------------------------------------------------


def test_install_leaves_no_traces():
  """Neither stand-ins nor a changed root logger; in a fresh process, where it is the first."""
  code = (
    "import logging, sys, importlib.util as u\n"
    "root = logging.getLogger(); before = (root.level, list(root.handlers))\n"
    "missing = [n for n in ('seqio', 'tiktoken', 'shortuuid') if u.find_spec(n) is None]\n"
    "from trinity_jax.sampler import jetstream_compat as c\n"
    "assert 'jetstream' not in sys.modules\n"
    "js = c.install(); assert c.install() is js\n"
    "js.orchestrator.logging.info('quiet')\n"
    "assert (root.level, list(root.handlers)) == before\n"
    "assert not any(u.find_spec(n) or n in sys.modules for n in missing)\n"
    "print('tensorflow' in sys.modules)"
  )
  process = spawn("-c", code)
  out, err = process.communicate(timeout=WAIT)
  assert (out, err, process.returncode) == ("False\n", "", 0)


def test_not_installed(monkeypatch, tmp_path):
  """Says how to install it; also when the other project of that name is there instead."""
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  for name in [m for m in sys.modules if m.partition(".")[0] == "jetstream"]:
    monkeypatch.delitem(sys.modules, name)
  fresh = jetstream_compat.install.__wrapped__
  monkeypatch.setattr(sys, "path_importer_cache", {})
  with pytest.raises(UserError, match="not installed; pip install .*--no-deps google-jetstream=="):
    fresh()
  (tmp_path / "jetstream").mkdir()
  (tmp_path / "jetstream" / "__init__.py").write_text("raise SystemExit('never imported')")
  monkeypatch.setattr(sys, "path_importer_cache", {})
  with pytest.raises(UserError, match="another project named jetstream.*pip uninstall jetstream"):
    fresh()
  assert logging.getLogger().level != logging.DEBUG
