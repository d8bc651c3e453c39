"""The Python client: asks a router and survives what may happen on the way.

``Client`` for asyncio and ``SyncClient`` for everybody else. Both retry what the router says to retry, resume a stream
that broke, and go on at another router when one dies; the answer has each token and each character once. Owns the
client's side of that and none of the server's. docs/clients.md is its guide.
"""

from starmesh.client.client import Client
from starmesh.client.errors import ClientError
from starmesh.client.options import Message, Options
from starmesh.client.pieces import Answer, FinishReason, Piece, Usage
from starmesh.client.retrying import RetryPolicy
from starmesh.client.stream import AnswerStream
from starmesh.client.sync import SyncClient, SyncStream

__all__ = [
    "Answer",
    "AnswerStream",
    "Client",
    "ClientError",
    "FinishReason",
    "Message",
    "Options",
    "Piece",
    "RetryPolicy",
    "SyncClient",
    "SyncStream",
    "Usage",
]
