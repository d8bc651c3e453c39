"""Predictors that are functions of their samples, to test what carries them, and samples for them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from services.predictor.registry import PredictorFiles
from starmesh.prediction.batch import Floats, Predictor, SampleBatch
from starmesh.types import HiddenLayout
from starmesh.v1 import predictor_pb2, sequence_pb2

LAYOUT = HiddenLayout("rev-1", (2, 4), 3)
WAIT_S = 20.0


@dataclass
class Echo:
    """Says the first number of the hidden state, and twice that; remembers the sizes of its batches. Each forward waits
    for a permit unless ``gate`` is None."""

    layout: HiddenLayout | None = LAYOUT
    add: float = 0.0
    gate: threading.Semaphore | None = None
    batches: list[int] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    kind: str = "echo"
    parameters: int = 1

    def predict(self, batch: SampleBatch) -> Floats:
        self.batches.append(len(batch))
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=WAIT_S)
        assert batch.hidden_states.shape[1:] == (2, 3)
        median = batch.hidden_states[:, 0, 0].astype(np.float32) + np.float32(self.add)
        return np.stack([median, 2 * median], axis=1)


class Failing(Echo):
    """Cannot predict."""

    def predict(self, batch: SampleBatch) -> Floats:
        raise ValueError("the weights are upside down")


@dataclass
class Files:
    """Files of one line: ``echo REVISION ADD``, or of a version that is ``given``. What ships is by model revision."""

    given: dict[str, Predictor] = field(default_factory=dict)
    shipped: dict[str, Path] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)

    def files(self) -> PredictorFiles:
        return PredictorFiles(self.load, self.shipped.get, lambda: list(self.shipped.values()))

    def load(self, path: Path) -> Predictor:
        if path.stem in self.given:
            return self.given[path.stem]
        words = path.read_text().split()
        if len(words) != 3 or words[0] != "echo":
            raise ValueError(f"{path} is no predictor; train it again")
        self.loaded.append(path.stem)
        return Echo(HiddenLayout(words[1], LAYOUT.layers, LAYOUT.width), add=float(words[2]))


def write_file(directory: Path, name: str, *, revision: str = "rev-1", add: float = 0.0) -> Path:
    path = directory / f"{name}.safetensors"
    path.write_text(f"echo {revision} {add}")
    return path


def layout_pb(layout: HiddenLayout = LAYOUT) -> predictor_pb2.HiddenLayout:
    return predictor_pb2.HiddenLayout(model_revision=layout.model_revision, layers=layout.layers, width=layout.width)


def state(value: float, layout: HiddenLayout = LAYOUT) -> bytes:
    """A hidden state that begins with ``value``."""
    numbers = np.zeros((len(layout.layers), layout.width), dtype="<f2")
    numbers[0, 0] = value
    return numbers.tobytes()


def sample(
    name: str, output_tokens: int = 0, value: float = 0.0, layout: HiddenLayout = LAYOUT
) -> predictor_pb2.PredictionSample:
    return predictor_pb2.PredictionSample(
        request_id=name, prompt_tokens=5, output_tokens=output_tokens, hidden_state=state(value, layout)
    )


def end(
    name: str, output_tokens: int, reason: sequence_pb2.FinishReason.ValueType = sequence_pb2.FINISH_REASON_STOP
) -> predictor_pb2.SequenceEnd:
    return predictor_pb2.SequenceEnd(request_id=name, output_tokens=output_tokens, finish_reason=reason)


def request(
    samples: Iterable[predictor_pb2.PredictionSample] = (),
    ends: Sequence[predictor_pb2.SequenceEnd] = (),
    layout: HiddenLayout = LAYOUT,
) -> predictor_pb2.PredictRequest:
    return predictor_pb2.PredictRequest(instance_id="d0", layout=layout_pb(layout), samples=samples, ends=ends)
