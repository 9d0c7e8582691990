"""What a workflow returned, and the experiences of its run.

A workflow returns a reward for the run (a number, a dict of components or None), a list of rewards,
one for each token log in the order in which they began, or the experiences themselves, from
`model.experiences`, with whatever it has added to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trinity_jax.experience import Experience, ExperienceId
from trinity_jax.explorer.dialogue import Dialogue
from trinity_jax.explorer.rewards import Score

Reward = float | Mapping[str, float] | Score | None
Returned = Reward | Sequence[Reward] | Sequence[Experience]
Outcome = Score | list[Score] | list[Experience] | None  # None: still to be graded


def read_outcome(returned: Returned, id: ExperienceId, logs: int) -> Outcome:
  """Checks what a workflow returned.

  Args:
    logs: token logs of the run.

  Raises:
    ValueError: it is none of the things above, or not as many rewards as logs.
  """
  if isinstance(returned, (list, tuple)) and any(isinstance(e, Experience) for e in returned):
    return _checked(returned, id)
  return read_scores(returned, logs)


def read_scores(rewards: Any, logs: int) -> Score | list[Score] | None:
  """A run's reward, or a list of one for each of its token logs.

  Raises:
    ValueError: see `read_outcome`.
  """
  if isinstance(rewards, Score) or not isinstance(rewards, (list, tuple)):
    return read_reward(rewards)
  scores = [_of_log(reward) for reward in rewards]
  if len(scores) != logs:
    raise ValueError(
      f"the workflow returned {len(scores)} rewards, but its run has {logs} token logs; return one "
      "for each (model.logs), or one number for the run"
    )
  return scores


def _of_log(reward: Any) -> Score:
  score = read_reward(reward)
  if score is None:
    raise ValueError(
      "the workflow returned a list that holds None; expected a reward for each token log"
    )
  return score


def _checked(returned: Sequence[Any], id: ExperienceId) -> list[Experience]:
  experiences = [e for e in returned if isinstance(e, Experience)]
  if len(experiences) < len(returned):
    raise ValueError("the workflow returned a list of experiences that holds something else too")
  ids = [e.id for e in experiences]
  strange = [i for i in ids if i[:3] != id[:3]]
  if strange or len(set(ids)) != len(ids):
    raise ValueError(
      f"the workflow of run {id} returned experiences {', '.join(map(str, ids))}; expected some of "
      "model.experiences(), each once"
    )
  for e in experiences:
    if e.reward is None or not math.isfinite(e.reward):
      raise ValueError(
        f"the workflow returned experience {e.id} with reward {e.reward}; expected a finite number"
      )
  return sorted(experiences, key=lambda e: e.id)


def read_reward(reward: Any) -> Score | None:
  """Checks the reward of a run: a number, a dict of components (summed) or None.

  Raises:
    ValueError: anything else, or a number that is not finite.
  """
  if reward is None or (isinstance(reward, Score) and math.isfinite(reward.total)):
    return reward
  if isinstance(reward, Score):
    raise ValueError(f"the workflow returned {reward}; expected a finite number")
  returned: Mapping[str, Any] = reward if isinstance(reward, Mapping) else {"reward": reward}
  parts: dict[str, float] = {}
  for name, value in returned.items():
    try:
      parts[name] = float(value)
    except (TypeError, ValueError):
      parts[name] = math.nan
    if not math.isfinite(parts[name]):
      raise ValueError(
        f"the workflow returned {name} = {value!r}; expected a finite number, a dict of them, or "
        "None to have the response graded"
      )
  return Score(math.fsum(parts.values()), parts)


def experiences_of(
  logs: Sequence[Dialogue],
  kept: Sequence[Dialogue],
  id: ExperienceId,
  score: Score | Sequence[Score],
  temperature: float,
  info: dict[str, Any],
) -> list[Experience]:
  """Token logs as experiences whose ids differ in `step`.

  Args:
    logs: of the run, in the order in which they began.
    kept: those to return.
    score: of the run: each experience gets it and what was given for turns of any log, so that all
      have the run's return. Or one a log: each gets its own and that of its own turns.

  Returns:
    One per kept log. Each one's token_rewards add up to its reward: its turns' at their ends, the
    rest on the last token. Of several, info["step_reward"] says what that log alone was given;
    the run's score is given to the last.
  """
  run = score if isinstance(score, Score) else None
  turns = [math.fsum(t.reward or 0.0 for t in log.turns) for log in logs]
  out: list[Experience] = []
  for i, log in enumerate(logs):
    if log not in kept:
      continue
    own = run if run is not None else score[i]
    assert isinstance(own, Score)
    elsewhere = math.fsum(turns) - turns[i] if run is not None else 0.0
    more = {}
    if len(logs) > 1:
      last = run is None or i + 1 == len(logs)
      more["step_reward"] = turns[i] + (own.total if last else 0.0)
    total = own.total + elsewhere if elsewhere else own.total
    out.append(
      log.experience(
        id._replace(step=id.step + len(out)), Score(total, own.components), temperature,
        {**info, **more},
      )
    )  # fmt: skip
  return out
