"""A search over local documents: BM25 with an inverted index.

Score of document d for a query: sum over its distinct words w of idf(w) * f (k1 + 1) /
(f + k1 (1 - b + b |d| / mean |d|)), f the word's count in d, idf(w) = ln(1 + (N - n + 0.5) /
(n + 0.5)), n the documents with w (Robertson and Zaragoza, "The Probabilistic Relevance Framework",
2009; idf as in Lucene, never negative).
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trinity_jax import plugins
from trinity_jax.errors import UserError

_WORD = re.compile(r"\w+")
_MOST_WORDS = 64  # of a query


class Hit(NamedTuple):
  """A document's place in the corpus, and its score."""

  document: int
  score: float


class Index:
  """Documents {"text", and perhaps "title"}, ready to be searched.

  Args:
    documents: the corpus.
    k1: how soon further occurrences of a word stop to count.
    b: how much long documents are discounted, 0 to 1.
  """

  def __init__(self, documents: Sequence[Mapping[str, str]], *, k1: float = 1.2, b: float = 0.75):
    if not documents:
      raise UserError("retrieval: the corpus has no documents")
    self.documents = list(documents)
    counts = [collections.Counter(words(f"{d.get('title', '')} {d['text']}")) for d in documents]
    lengths = np.array([c.total() for c in counts], np.float64)
    shorter = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
    found: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for i, count in enumerate(counts):
      for word, times in count.items():
        found[word].append((i, times))
    self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for word, places in found.items():
      where, times = (np.array(x) for x in zip(*places))
      idf = math.log(1 + (len(counts) - len(where) + 0.5) / (len(where) + 0.5))
      self._weights[word] = where, idf * times * (k1 + 1) / (times + shorter[where])

  def search(self, query: str, count: int = 3) -> list[Hit]:
    """The best documents that share a word with the query; ties go to the earlier one."""
    scores = np.zeros(len(self.documents))
    for word in dict.fromkeys(words(query)[:_MOST_WORDS]):
      if word in self._weights:
        where, weight = self._weights[word]
        scores[where] += weight
    best = np.argsort(-scores, kind="stable")[:count]
    return [Hit(int(i), float(scores[i])) for i in best if scores[i] > 0]

  def show(self, hit: Hit) -> str:
    """A hit as text."""
    document = self.documents[hit.document]
    return f"{document['title']}: {document['text']}" if "title" in document else document["text"]


def words(text: str) -> list[str]:
  """Words in lower case."""
  return _WORD.findall(text.lower())


@functools.lru_cache(maxsize=4)
def load(path: str) -> Index:
  """Reads a corpus: JSONL, a "text" and perhaps a "title" a row, or 'module:function' that returns
  such rows.

  Raises:
    UserError: names file, line and field.
  """
  from trinity_jax.tasks.formats import Row, read_rows

  if ":" in path and not Path(path).exists():
    made = plugins.load(path, "corpus")()
    rows = [Row(f"{path} row {i}", dict(row)) for i, row in enumerate(made)]
  else:
    rows = read_rows(path)
  for row in rows:
    for key in ("text", "title"):
      if not isinstance(row.data.get(key, "" if key == "title" else None), str):
        raise UserError(f"{row.where}: {key} = {row.data.get(key)!r}: a document needs text")
  return Index([row.data for row in rows])
