"""The password of the ledger's user in a file, read again for each connection: one that is replaced needs no restart.

Owns the file's form. Connections that stand are the server's matter: it keeps or cuts them.
"""

from __future__ import annotations

from pathlib import Path

from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError

from starmesh.ledger import LedgerError


class PasswordFile(CredentialProvider):
    """What redis-py asks when it connects."""

    def __init__(self, path: Path, *, user: str | None) -> None:
        """``user`` is None for the server's default one. Raises LedgerError when the file holds no password now."""
        self._path = path
        self._user = user
        read_password(path)

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """The user, unless it is the default one, and the password. Raises redis-py's ConnectionError when the file
        holds none: after any other, redis-py would keep the connection, open and not authenticated."""
        try:
            password = read_password(self._path)
        except LedgerError as error:
            raise RedisConnectionError(str(error)) from None
        return (password,) if self._user is None else (self._user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """As ``get_credentials``, and on the event loop like it, a line of text for each connection: redis-py would
        keep such a connection also when it is cancelled while it waits for a thread."""
        return self.get_credentials()


def read_password(path: Path) -> str:
    """The file's text without white space around it. Raises LedgerError when there is none."""
    try:
        password = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise LedgerError(f"the ledger's password file {path} cannot be read") from None
    if not password:
        raise LedgerError(f"the ledger's password file {path} is empty")
    return password
