"""Pieces of answers as messages."""

from services.router.answer import Piece
from services.router.flight import Flight
from starmesh.rpc import convert
from starmesh.v1 import inference_pb2


def piece_pb(flight: Flight, piece: Piece) -> inference_pb2.GenerateResponse:
    """``piece`` of ``flight``'s answer; the last one carries the usage."""
    message = inference_pb2.GenerateResponse(
        request_id=flight.request_id, offset=piece.offset, token_ids=piece.token_ids, text=piece.text
    )
    if piece.finish_reason is not None:
        message.finish_reason = convert.finish_reason_pb(piece.finish_reason)
        message.usage.CopyFrom(
            inference_pb2.Usage(
                prompt_tokens=flight.prompt_tokens,
                output_tokens=piece.offset + len(piece.token_ids),
                cached_tokens=flight.cached_tokens,
                recoveries=flight.recoveries,
            )
        )
    return message
