"""The OpenAPI 3.1 document of the server, given to bearers of a token only."""

from __future__ import annotations

from typing import Any

from trinity_jax.server.protocol import MOST_CHOICES, MOST_STOPS

_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_NAME = {"name": "name", "in": "path", "required": True, "schema": _TEXT}


def document(max_response: int, vocab_size: int) -> dict[str, Any]:
  """Describes every endpoint.

  Args:
    max_response: most tokens of a choice.
  """
  tokens = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}}
  sampling = _sampling(max_response)
  chat = {
    "messages": {"type": "array", "minItems": 1, "items": _ref("Message")},
    "tools": {"type": "array", "items": _ref("Tool")},
    "tool_choice": {"enum": ["auto", "none"]},
    "parallel_tool_calls": {"type": "boolean"},
    "logprobs": {"type": "boolean"},
    **sampling,
  }
  completion = {
    "prompt": {"oneOf": [{"type": "string", "minLength": 1}, {**tokens, "minItems": 1}]},
    "logprobs": {"const": 0},
    **sampling,
  }
  session = {"session": {"type": "string", "description": "where the token names none"}}
  reward = {"reward": {"type": "number", "minimum": -1e30, "maximum": 1e30}}
  return {
    "openapi": "3.1.0",
    "info": {"title": "trinity_jax", "version": "1"},
    "security": [{"token": []}],
    "paths": {
      "/health": {"get": {**_answers(plain=True), "security": []}},
      "/metrics": {"get": _answers(plain=True)},
      "/v1/models": {"get": _answers()},
      "/v1/models/{name}": {"get": {"parameters": [_NAME], **_answers()}},
      "/v1/chat/completions": {"post": _post(chat, ["messages"])},
      "/v1/completions": {"post": _post(completion, ["prompt"])},
      "/feedback": {"post": _post({**session, **reward}, ["reward"])},
      "/commit": {"post": _post({**session, **reward}, [])},
    },
    "components": {
      "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
      "schemas": _schemas(),
    },
  }


def _sampling(max_response: int) -> dict[str, Any]:
  return {
    "model": {**_TEXT, "description": "any; there is one policy"},
    "n": {"type": "integer", "minimum": 1, "maximum": MOST_CHOICES},
    "stream": {"type": "boolean"},
    "stream_options": {
      "type": "object",
      "properties": {"include_usage": {"type": "boolean"}},
      "additionalProperties": False,
    },
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": max_response},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": max_response},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "stop": {
      "oneOf": [
        {"type": "string", "minLength": 1, "maxLength": 256},
        {
          "type": "array",
          "maxItems": MOST_STOPS,
          "items": {"type": "string", "minLength": 1, "maxLength": 256},
        },
      ]
    },
    "return_token_ids": {"type": "boolean"},
  }


def _schemas() -> dict[str, Any]:
  function = {
    "type": "object",
    "required": ["name"],
    "properties": {
      "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"},
      "description": _TEXT,
      "parameters": _OBJECT,
    },
  }
  call = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {
      "id": {"type": "string", "maxLength": 64},
      "type": {"const": "function"},
      "function": {
        "type": "object",
        "required": ["name", "arguments"],
        "properties": {"name": {"type": "string", "maxLength": 64}, "arguments": _TEXT},
      },
    },
  }
  part = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
  }
  message = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
      "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
      "content": {"oneOf": [_TEXT, {"type": "array", "items": part}]},
      "name": {"type": "string", "maxLength": 64},
      "tool_call_id": {"type": "string", "maxLength": 64},
      "reasoning_content": _TEXT,
      "tool_calls": {"type": "array", "items": call},
    },
  }
  error = {
    "type": "object",
    "required": ["error"],
    "properties": {
      "error": {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
          "message": _TEXT,
          "type": _TEXT,
          "param": {"type": ["string", "null"]},
          "code": {"type": ["string", "null"]},
        },
      }
    },
  }
  tool = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": function},
  }
  return {"Message": message, "Tool": tool, "Error": error}


def _ref(name: str) -> dict[str, str]:
  return {"$ref": f"#/components/schemas/{name}"}


def _post(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
  schema = {
    "type": "object", "required": required, "properties": properties,
    "additionalProperties": False,
  }  # fmt: skip
  body = {"required": True, "content": {"application/json": {"schema": schema}}}
  return {"requestBody": body, **_answers()}


def _answers(plain: bool = False) -> dict[str, Any]:
  error = {"description": "why not", "content": {"application/json": {"schema": _ref("Error")}}}
  fine: dict[str, Any] = {"description": "the answer"}
  if not plain:
    kinds = ("application/json", "text/event-stream")
    fine["content"] = {kind: {"schema": {}} for kind in kinds}
  return {"responses": {"200": fine, "default": error}}
