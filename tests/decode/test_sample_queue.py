"""What waits for the predictor: never more than its bound, the newest ones, ends after their samples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.decode.sample_queue import End, Sample, SampleQueue
from starmesh.types import FinishReason

pytestmark = pytest.mark.fast


def sample(request_id: str, output_tokens: int) -> Sample:
    return Sample(request_id=request_id, prompt_tokens=5, output_tokens=output_tokens, hidden_state=b"")


def end(request_id: str, output_tokens: int = 0) -> End:
    return End(request_id, output_tokens, FinishReason.STOP)


def test_the_oldest_goes_for_one_more() -> None:
    queue = SampleQueue(3)
    for one in (sample("a", 0), sample("b", 0), sample("a", 20), sample("b", 0)):
        queue.add(one)
    assert queue.dropped_samples == 0, "the same position twice is one sample"
    queue.add(sample("c", 0))
    assert queue.take(10) == ([sample("a", 20), sample("b", 0), sample("c", 0)], [])
    assert queue.dropped_samples == 1


def test_an_end_waits_for_its_sample() -> None:
    queue = SampleQueue(10)
    for name in "abc":
        queue.add(sample(name, 0))
    queue.end(end("z"))
    queue.end(end("b"))
    queue.end(end("a"))
    assert queue.take(1) == ([sample("a", 0)], [end("z")])
    assert queue.take(1) == ([sample("b", 0)], [end("b")])
    assert queue.take(1) == ([sample("c", 0)], [end("a")])
    assert len(queue) == 0


names = st.sampled_from("abcdef")
steps = st.lists(
    st.one_of(st.tuples(st.just("add"), names), st.tuples(st.just("end"), names), st.tuples(st.just("take"), names)),
    max_size=80,
)


@given(steps, st.integers(1, 5), st.integers(1, 4))
def test_whatever_comes_in_whatever_order(steps: list[tuple[str, str]], bound: int, limit: int) -> None:
    queue = SampleQueue(bound)
    waiting: list[tuple[str, int]] = []
    sent: dict[str, int] = {}
    ended: list[str] = []
    ends_sent: list[str] = []
    taken = 0
    for position, (what, name) in enumerate(steps):
        if what == "add" and name not in ended:
            queue.add(sample(name, position))
            waiting = [*waiting, (name, position)][-bound:]
        elif what == "end" and name not in ended:
            queue.end(end(name))
            ended.append(name)
        elif what == "take":
            samples, ends = queue.take(limit)
            assert len(samples) <= limit and len(ends) <= limit
            assert samples or ends or not len(queue), "each call gets on"
            taken += len(samples)
            positions = [one.output_tokens for one in samples]
            assert positions == sorted(positions), "the oldest first"
            assert [(one.request_id, one.output_tokens) for one in samples] == waiting[: len(samples)]
            waiting = waiting[len(samples) :]
            for one in samples:
                assert one.output_tokens > sent.get(one.request_id, -1)
                assert one.request_id not in ends_sent, "no sample after its end"
                sent[one.request_id] = one.output_tokens
            ends_sent += [one.request_id for one in ends]
        assert len(queue) <= 2 * bound
    while len(queue):
        samples, ends = queue.take(limit)
        assert not {one.request_id for one in samples} & set(ends_sent)
        ends_sent += [one.request_id for one in ends]
    assert ends_sent == [name for name in ended if name in ends_sent], "in their order"
    assert len(ended) - len(ends_sent) == queue.dropped_ends
