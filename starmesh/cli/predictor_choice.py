"""Which predictor will answer in a cluster that this machine starts, and the hidden states that it needs.

The predictor service makes the same choice when the first samples come; it is made here too, before anything starts,
because prefill and decode instances must be told the layers to keep, and the user what to expect. Owns no predictor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from starmesh.cli.collection import hidden_sizes
from starmesh.cli.local_options import ONLINE_PREDICTOR, Predicting
from starmesh.cli.run import CliError
from starmesh.model_files import model_name, model_revision
from starmesh.prediction.kinds import layers_of_kinds
from starmesh.prediction.predictor_file import (
    SUFFIX,
    PredictorFileError,
    predictor_version,
    read_description,
    shipped_predictor,
    shipped_predictors,
)


@dataclass(frozen=True, slots=True)
class PredictorChoice:
    """``hidden_layers`` is the engines' flag; empty where their default has all that it looks at. ``description``
    tells people who predicts."""

    hidden_layers: str
    description: str

    @property
    def engine_flags(self) -> tuple[str, ...]:
        """What prefill and decode instances are told of it."""
        return ("--hidden-layers", self.hidden_layers) if self.hidden_layers else ()


def choose_predictor(predicting: Predicting, model_directory: Path | None) -> PredictorChoice:
    """The choice for a model; None is an emulated one, whose predictors need no file. Raises CliError for a predictor
    that is not there, can't be read, or is another model's."""
    if not predicting.on:
        return PredictorChoice("", "nobody predicts remaining tokens: requests are placed and moved by what they hold")
    if model_directory is None:
        return PredictorChoice("", f"remaining tokens are predicted by {predicting.predictor or ONLINE_PREDICTOR}")
    revision = model_revision(model_directory)
    try:
        if not predicting.predictor:
            path = shipped_predictor(revision)
            origin = ", which ships for this model"
        else:
            path = _named(predicting)
            origin = ""
        if path is None:
            learns = f"remaining tokens are predicted by {ONLINE_PREDICTOR}, from requests that have ended"
            return PredictorChoice("", f"{learns}; `starmesh predictor` makes a better one for a model")
        layout = read_description(path)
    except PredictorFileError as error:
        raise CliError(str(error)) from None
    if layout.model_revision != revision:
        raise CliError(
            f"{path} is a predictor of another model than {model_name(model_directory)} (its revision is "
            f"{layout.model_revision}, not {revision}); make one with `starmesh predictor collect` and `train`"
        )
    return PredictorChoice(
        _flag(layout.layers, model_directory), f"remaining tokens are predicted by {predictor_version(path)}{origin}"
    )


def _flag(layers: tuple[int, ...], model_directory: Path) -> str:
    if not layers:
        return ""
    default = layers_of_kinds(hidden_sizes(model_directory)[0])
    # Beside the default ones, so that others may be promoted.
    return "" if set(layers) <= set(default) else ",".join(map(str, sorted({*default, *layers})))


def _named(predicting: Predicting) -> Path | None:
    """The file that is meant; None for the predictor that needs none. Of equal names that in the directory wins."""
    name = predicting.predictor
    if name.endswith(SUFFIX) or "/" in name:
        return Path(name)
    known = {predictor_version(path): path for path in shipped_predictors()}
    if predicting.directory is not None:
        known |= {predictor_version(path): path for path in predicting.directory.glob(f"*{SUFFIX}")}
    if name in known:
        return known[name]
    if name == ONLINE_PREDICTOR:
        return None
    raise CliError(
        f"there is no predictor {name!r}: give a file, or one of {', '.join([*sorted(known), ONLINE_PREDICTOR])}"
    )
