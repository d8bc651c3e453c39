"""What a request may ask for, and the message that says so. Pure but for the seed and the id that it draws.

Owns no check: the router names the field that is wrong.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TypedDict

from starmesh.rpc import convert
from starmesh.v1 import inference_pb2, sequence_pb2

MAX_REQUEST_ID_CHARS = 128


class Options(TypedDict, total=False):
    """Of one request; what is left out is the router's choice, as inference.proto says it."""

    request_id: str
    """1 to 128 of ``A-Z a-z 0-9 . _ : -``; drawn when left out."""
    model: str
    max_output_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: Sequence[str]
    """The answer ends before any of these."""
    seed: int
    """Of the sampling; drawn by the client when left out, so that another router draws the same tokens."""
    ignore_eos: bool
    priority: int
    coalesce_window_s: float
    """Lets the router gather tokens for so long into one piece: less work on both sides."""
    timeout_s: float
    """Bounds the whole answer with all retries. (default: the client's)"""


Message = Mapping[str, str]
"""One message of a conversation: its ``role``, which is ``system``, ``user`` or ``assistant``, and its ``content``."""
Prompt = str | Sequence[int]
"""A text that is continued as it is, or its tokens."""


def new_request(
    prompt: Prompt | None, messages: Sequence[Message] | None, options: Options, *, resume_window_s: float
) -> inference_pb2.GenerateRequest:
    """The request for a prompt or for a conversation."""
    request = inference_pb2.GenerateRequest(
        request_id=options.get("request_id") or new_request_id(),
        model=options.get("model", ""),
        priority=options.get("priority", 0),
        sampling=sequence_pb2.SamplingParams(
            max_output_tokens=options.get("max_output_tokens"),
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            repetition_penalty=options.get("repetition_penalty"),
            stop_strings=options.get("stop", ()),
            seed=options.get("seed", secrets.randbits(63)),
            ignore_eos=options.get("ignore_eos", False),
        ),
    )
    if options.get("coalesce_window_s"):
        request.coalesce_window.CopyFrom(convert.duration_pb(options["coalesce_window_s"]))
    if resume_window_s:
        request.resume_window.CopyFrom(convert.duration_pb(resume_window_s))
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt is not None:
        request.token_ids.token_ids.extend(prompt)
    for message in messages or ():
        request.chat.messages.add(role=message.get("role", ""), content=message.get("content", ""))
    return request


def new_request_id(former: str = "") -> str:
    """A new id, for people to be seen to come from ``former``: that may still be in use at a router out of reach."""
    if not former:
        return secrets.token_hex(12)
    suffix = "." + secrets.token_hex(4)
    return former[: MAX_REQUEST_ID_CHARS - len(suffix)] + suffix
