"""The file of API keys: what is written is read, and nothing else is taken for a key."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.rpc.key_file import MAX_LIMIT, ApiKey, KeyFileError, Scope, digest_of, new_secret, read_keys, write_keys

pytestmark = pytest.mark.fast

DIGEST = digest_of("sm-something")
GOOD: dict[str, Any] = {"key_id": "alice", "sha256": DIGEST, "scopes": ["generate"]}

api_keys = st.builds(
    ApiKey,
    key_id=st.text("aZ0._-", max_size=63).map("k{}".format),
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
    scopes=st.frozensets(st.sampled_from(Scope), min_size=1),
    requests_per_s=st.none() | st.floats(0.001, MAX_LIMIT),
    max_requests=st.none() | st.integers(1, MAX_LIMIT),
    expires=st.none()
    | st.datetimes(
        datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC) | st.just(timezone(timedelta(hours=5)))
    ),
)


@settings(max_examples=30)
@given(st.lists(api_keys, max_size=5, unique_by=(lambda key: key.key_id, lambda key: key.sha256)))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, keys: list[ApiKey]) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys"
    write_keys(path, tuple(keys))
    assert read_keys(path) == tuple(keys)


def test_a_new_secret_is_long_and_its_own() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith("sm-") and len(secret) == 3 + 43 for secret in secrets)


def test_the_file_is_not_for_everyone(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys", ())
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o640
    (tmp_path / "keys").chmod(0o644)
    write_keys(tmp_path / "keys", ())
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o644, "what its owner has set is kept"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"key_id": "a", "key_id": "a"}', "twice"),
        (json.dumps({}), "key_id"),
        (json.dumps(GOOD | {"key_id": ""}), "key_id"),
        (json.dumps(GOOD | {"key_id": "two words"}), "key_id"),
        (json.dumps(GOOD | {"key_id": "a\n"}), "key_id"),
        (json.dumps(GOOD | {"key_id": "x" * 65}), "key_id"),
        (json.dumps(GOOD | {"key_id": 7}), "key_id"),
        (json.dumps(GOOD | {"sha256": "sm-secret"}), "sha256"),
        (json.dumps(GOOD | {"sha256": DIGEST.upper()}), "sha256"),
        (json.dumps(GOOD | {"scopes": []}), "scopes"),
        (json.dumps(GOOD | {"scopes": "generate"}), "scopes"),
        (json.dumps(GOOD | {"scopes": ["everything"]}), "scopes"),
        (json.dumps(GOOD | {"scopes": [["generate"]]}), "scopes"),
        (json.dumps(GOOD | {"requests_per_s": 0}), "requests_per_s"),
        (json.dumps(GOOD | {"requests_per_s": 1e-13}), "requests_per_s"),
        (json.dumps(GOOD | {"requests_per_s": True}), "requests_per_s"),
        (json.dumps(GOOD | {"requests_per_s": "5"}), "requests_per_s"),
        (json.dumps(GOOD | {"requests_per_s": 10**400}), "requests_per_s"),
        (json.dumps(GOOD | {"requests_per_s": float("nan")}), "NaN"),
        ('{"key_id": "a", "requests_per_s": 1e999}', "key"),
        (json.dumps(GOOD | {"max_requests": 0}), "max_requests"),
        (json.dumps(GOOD | {"max_requests": 1.5}), "max_requests"),
        (json.dumps(GOOD | {"max_requests": 10**9}), "max_requests"),
        (json.dumps(GOOD | {"expires": "soon"}), "expires"),
        (json.dumps(GOOD | {"expires": 5}), "expires"),
        (json.dumps(GOOD | {"expires": "2030-01-01T00:00:00"}), "time zone"),
        (json.dumps(GOOD | {"secret": "sm-secret"}), "unknown"),
    ],
)
def test_a_line_that_is_no_key_is_refused(tmp_path: Path, line: str, said: str) -> None:
    """With file, line and field, and without what is in it: a secret may have been pasted there."""
    path = tmp_path / "keys"
    path.write_text(f"# comment\n\n{line}\n")
    with pytest.raises(KeyFileError, match=said) as caught:
        read_keys(path)
    assert f"{path}, line 3" in str(caught.value)
    assert "sm-secret" not in str(caught.value)


def test_a_key_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for other in (GOOD | {"sha256": digest_of("another")}, GOOD | {"key_id": "bob"}):
        path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(other)}\n")
        with pytest.raises(KeyFileError, match="twice"):
            read_keys(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"#" * (2 << 20)])
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=str(path)):
        read_keys(path)


def test_a_file_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="starmesh keys create"):
        read_keys(tmp_path / "keys")
