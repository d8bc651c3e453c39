"""API keys at run time: who is let in, how often, how many at a time, and what a change of the file does. Time is the
test's."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.rpc.api_keys import Admission, ApiKeys, Scope
from starmesh.rpc.key_file import ApiKey, digest_of, new_secret, write_keys
from starmesh.rpc.status import StatusError

pytestmark = pytest.mark.fast

# Not drawn: parametrised tests must have the same names in every process that collects them.
SECRET = "sm-" + "A" * 43
OTHER_SECRET = "sm-" + "B" * 42 + "A"
SENT = f"Bearer {SECRET}"
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


class Clock:
    """Seconds since 1970, as the test says."""

    def __init__(self) -> None:
        self.now_s = NOON.timestamp()

    def __call__(self) -> float:
        return self.now_s


def key_of(
    secret: str = SECRET,
    key_id: str = "alice",
    *,
    scopes: frozenset[Scope] = frozenset({Scope.GENERATE}),
    requests_per_s: float | None = None,
    max_requests: int | None = None,
    expires: datetime | None = None,
) -> ApiKey:
    return ApiKey(
        key_id=key_id,
        sha256=digest_of(secret),
        scopes=scopes,
        requests_per_s=requests_per_s,
        max_requests=max_requests,
        expires=expires,
    )


def refusal(ask: Callable[[], object]) -> StatusError:
    with pytest.raises(StatusError) as caught:
        ask()
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.fixture
def clock() -> Clock:
    return Clock()


def keys_of(*keys: ApiKey, clock: Clock) -> ApiKeys:
    return ApiKeys(Path("keys"), keys, now_s=clock)


@pytest.mark.parametrize("sent", [SENT, f"bearer {SECRET}", f" BEARER   {SECRET} "])
def test_a_known_key_is_let_in(clock: Clock, sent: str) -> None:
    keys = keys_of(key_of(), clock=clock)
    assert keys.check(sent, scope=Scope.GENERATE) == "alice"
    with keys.admit(sent, scope=Scope.GENERATE) as admission:
        assert admission.key_id == "alice"


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        SECRET,
        f"Basic {SECRET}",
        f"Bearer {SECRET[:-1]}",
        f"Bearer {SECRET}x",
        f"Bearer {SECRET} {SECRET}",
        f"Bearer {OTHER_SECRET}",
        "Bearer sm-",
        "Bearer sm-é",
        "Bearer sm-\udc80",
        "Bearer sm-" + "x" * 10_000,
    ],
)
def test_nobody_else_is(clock: Clock, sent: str | None) -> None:
    keys = keys_of(key_of(), clock=clock)
    assert refusal(lambda: keys.check(sent, scope=None)).code is grpc.StatusCode.UNAUTHENTICATED
    assert refusal(lambda: keys.admit(sent, scope=Scope.GENERATE)).code is grpc.StatusCode.UNAUTHENTICATED


@settings(max_examples=50)
@given(st.text(max_size=300))
def test_no_text_gets_in_or_breaks_the_check(text: str) -> None:
    keys = keys_of(key_of(), clock=Clock())
    for sent in (text, f"Bearer {text}", f"Bearer sm-{text}"):
        assert refusal(lambda sent=sent: keys.check(sent, scope=None)).code is grpc.StatusCode.UNAUTHENTICATED


def test_a_key_is_for_its_scopes(clock: Clock) -> None:
    keys = keys_of(key_of(scopes=frozenset({Scope.OPERATE})), clock=clock)
    keys.check(SENT, scope=Scope.OPERATE)
    keys.check(SENT, scope=None)
    error = refusal(lambda: keys.admit(SENT, scope=Scope.GENERATE))
    assert error.code is grpc.StatusCode.PERMISSION_DENIED
    assert "generate" in error.message


def test_a_key_expires(clock: Clock) -> None:
    keys = keys_of(key_of(expires=NOON), clock=clock)
    clock.now_s -= 1
    keys.check(SENT, scope=Scope.GENERATE)
    clock.now_s += 1
    assert refusal(lambda: keys.check(SENT, scope=Scope.GENERATE)).code is grpc.StatusCode.UNAUTHENTICATED


def test_so_many_requests_run_at_a_time(clock: Clock) -> None:
    keys = keys_of(key_of(max_requests=2), clock=clock)
    first, second = (keys.admit(SENT, scope=Scope.GENERATE) for _ in range(2))
    error = refusal(lambda: keys.admit(SENT, scope=Scope.GENERATE))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_delay_s is not None and error.retry_delay_s > 0
    keys.check(SENT, scope=Scope.GENERATE)  # counts nothing
    first.close()
    first.close()  # no second place for closing twice
    third = keys.admit(SENT, scope=Scope.GENERATE)
    refusal(lambda: keys.admit(SENT, scope=Scope.GENERATE))
    second.close()
    third.close()


def test_a_refused_request_takes_no_place(clock: Clock) -> None:
    keys = keys_of(key_of(max_requests=1, requests_per_s=1), clock=clock)
    keys.admit(SENT, scope=Scope.GENERATE).close()
    refusal(lambda: keys.admit(SENT, scope=Scope.GENERATE))
    clock.now_s += 1
    keys.admit(SENT, scope=Scope.GENERATE).close()


def test_one_key_does_not_count_against_another(clock: Clock) -> None:
    other = new_secret()
    keys = keys_of(key_of(max_requests=1), key_of(other, "bob", max_requests=1), clock=clock)
    keys.admit(SENT, scope=Scope.GENERATE)
    keys.admit(f"Bearer {other}", scope=Scope.GENERATE)
    refusal(lambda: keys.admit(SENT, scope=Scope.GENERATE))


@settings(max_examples=50)
@given(
    rate=st.floats(0.01, 1000),
    pauses=st.lists(st.floats(0, 5) | st.floats(-5, 0), min_size=1, max_size=200),
)
def test_the_rate_holds_over_any_time(rate: float, pauses: list[float]) -> None:
    """A second's worth at once, at most, and the rate from then on; a clock that is set back buys nothing."""
    clock = Clock()
    keys = keys_of(key_of(requests_per_s=rate), clock=clock)
    admitted, forward_s = 0, 0.0
    for pause in pauses:
        clock.now_s += pause
        forward_s += max(0.0, pause)
        try:
            keys.admit(SENT, scope=Scope.GENERATE).close()
            admitted += 1
        except StatusError as error:
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert admitted <= max(1.0, rate) + rate * forward_s + 1e-3


@settings(max_examples=30)
@given(rate=st.floats(0.01, 50))
def test_who_waits_as_told_is_let_in(rate: float) -> None:
    clock = Clock()
    keys = keys_of(key_of(requests_per_s=rate), clock=clock)
    error = None
    for _ in range(52):
        try:
            keys.admit(SENT, scope=Scope.GENERATE).close()
        except StatusError as refused:
            error = refused
            break
    assert error is not None and error.retry_delay_s is not None
    clock.now_s += error.retry_delay_s + 1e-5  # whole microseconds travel
    keys.admit(SENT, scope=Scope.GENERATE).close()


def rewrite(path: Path, *keys: ApiKey) -> None:
    """Write keys; with a time of change that differs however fast the test is."""
    write_keys(path, keys)
    touched = rewrite.touched = getattr(rewrite, "touched", 1_000_000_000) + 10  # type: ignore[attr-defined]
    os.utime(path, (touched, touched))


class Following:
    """Keys of a file that the test changes."""

    def __init__(self, path: Path, *keys: ApiKey) -> None:
        self.path = path
        rewrite(path, *keys)
        self.keys = ApiKeys.load(path, now_s=Clock())

    def change(self, *keys: ApiKey) -> None:
        rewrite(self.path, *keys)
        self.keys.refresh()

    def admit(self) -> Admission:
        return self.keys.admit(SENT, scope=Scope.GENERATE)


def test_a_changed_file_is_followed(tmp_path: Path) -> None:
    other = new_secret()
    following = Following(tmp_path / "keys", key_of())
    following.change(key_of(other, "bob"))
    assert refusal(following.admit).code is grpc.StatusCode.UNAUTHENTICATED
    assert following.keys.check(f"Bearer {other}", scope=Scope.GENERATE) == "bob"
    following.change()
    assert len(following.keys) == 0
    following.change(key_of())
    following.admit()


def test_what_runs_under_a_key_still_counts_when_its_limits_change(tmp_path: Path) -> None:
    following = Following(tmp_path / "keys", key_of(max_requests=3))
    running = [following.admit() for _ in range(3)]
    following.change(key_of(max_requests=2))
    refusal(following.admit)
    running.pop().close()
    refusal(following.admit)
    running.pop().close()
    following.admit()


def test_a_new_secret_of_the_same_name_replaces_the_old(tmp_path: Path) -> None:
    """With what runs under it: that is how a key is rotated."""
    following = Following(tmp_path / "keys", key_of(max_requests=1))
    running, other = following.admit(), new_secret()
    following.change(key_of(other, max_requests=1))
    assert refusal(following.admit).code is grpc.StatusCode.UNAUTHENTICATED
    refusal(lambda: following.keys.admit(f"Bearer {other}", scope=Scope.GENERATE))
    running.close()
    following.keys.admit(f"Bearer {other}", scope=Scope.GENERATE)


@pytest.mark.parametrize("content", [b"", b"{", b"# comment\n{}", b"\xff", None])
def test_a_broken_file_changes_nothing(tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    following = Following(tmp_path / "keys", key_of())
    if content is None:
        following.path.unlink()
    else:
        following.path.write_bytes(content)
    for _ in range(3):
        following.keys.refresh()
    following.admit()
    assert len(caplog.records) == 1
    assert str(following.path) in caplog.records[0].getMessage()
    following.change()
    refusal(following.admit)


def test_a_turned_link_is_followed(tmp_path: Path) -> None:
    """As Kubernetes changes a secret."""
    for name, keys in (("old", (key_of(),)), ("new", ())):
        (tmp_path / name).mkdir()
        rewrite(tmp_path / name / "keys", *keys)
    (tmp_path / "data").symlink_to("old")
    (tmp_path / "keys").symlink_to("data/keys")
    keys = ApiKeys.load(tmp_path / "keys", now_s=Clock())
    (tmp_path / "turned").symlink_to("new")
    (tmp_path / "turned").rename(tmp_path / "data")
    keys.refresh()
    assert len(keys) == 0
