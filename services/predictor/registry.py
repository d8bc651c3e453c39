"""The versions of the predictor that are here, and the one that answers.

Owns the choice at the start, the change later and the recalibration that goes with a version. Owns no forward
(``batcher``) and no file format (``starmesh.prediction.predictor_file``). Files are listed and loaded in threads.

A version is a name: that of the file which ``--predictor`` names without its suffix, of a file in ``--predictor-dir``,
of the one that ships for the samples' model, or ``conditional_median``, which learns here and takes any samples. Of two
files of the same name the first in this order is meant.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import grpc

from services.predictor.intake import check_fits
from starmesh.prediction.batch import Predictor
from starmesh.prediction.conditional_median import ConditionalMedian
from starmesh.prediction.recalibration import Recalibration
from starmesh.rpc.status import StatusError, bad_field
from starmesh.types import HiddenLayout

log = logging.getLogger(__name__)

BUILT_IN: Final = "conditional_median"
MAX_VERSIONS: Final = 256
MAX_NAME_LENGTH: Final = 128
_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A predictor that answers, or did until the calls in progress have ended. ``recalibration`` is None where none is
    wanted; it and the predictor belong to the forward thread."""

    name: str
    predictor: Predictor
    recalibration: Recalibration | None


@dataclass(frozen=True, slots=True)
class PredictorFiles:
    """How files become predictors: ``load`` raises ValueError, saying what to do, for one that is none; ``shipped``
    tells the file that ships for a model revision, ``all_shipped`` those that ship for any."""

    load: Callable[[Path], Predictor]
    shipped: Callable[[str], Path | None]
    all_shipped: Callable[[], Sequence[Path]]


class Registry:
    """Begins with ``conditional_median``, until ``start`` or the first samples bring a better one."""

    def __init__(
        self,
        files: PredictorFiles,
        *,
        directory: Path | None,
        named: str,
        recalibrate: bool,
        median: ConditionalMedian,
        others: Mapping[str, Predictor] = MappingProxyType({}),
    ) -> None:
        """``named`` is a version or a file to start with, empty for the choice by model. ``others`` are predictors
        that need no file, by name."""
        self.median = median
        self._files = files
        self._directory = directory
        self._named = named
        self._recalibrate = recalibrate
        self._others = others
        self._own_file = Path(named) if named.endswith(_SUFFIX) or "/" in named else None
        self._layout: HiddenLayout | None = None
        self._changing = asyncio.Lock()
        self._chosen = False
        self._choosing: asyncio.Task[None] | None = None
        self.active = self._version(BUILT_IN, median)

    async def start(self) -> None:
        """Load the version that was named, if one was. Raises ValueError saying what is wrong with it."""
        if not self._named:
            return
        name = self._own_file.stem if self._own_file is not None else self._named
        shipped: dict[str, Path | None] = {path.stem: path for path in await asyncio.to_thread(self._files.all_shipped)}
        known = shipped | await asyncio.to_thread(self._known)
        if name not in known:
            raise ValueError(f"there is no predictor {name!r}: use a file or one of {', '.join(known)}")
        self.active = self._version(name, await self._load(name, known[name]))
        self._chosen = True

    async def settle(self, layout: HiddenLayout) -> Version:
        """The version that answers samples of ``layout``. The first samples choose it, unless one was named. Raises
        StatusError when theirs is not the kind that it takes."""
        # Also of samples that are refused: an operator promotes what fits those that come in.
        self._layout = layout
        if not self._chosen:
            # Goes on when this call's deadline is shorter than the load.
            if self._choosing is None:
                self._choosing = asyncio.create_task(self._choose(layout), name="choose predictor")
            await asyncio.shield(self._choosing)
        version = self.active
        check_fits(layout, version.predictor.layout, version.name)
        return version

    async def promote(self, name: str) -> Version:
        """Have another version answer from now on. Raises StatusError when it cannot; then all stays as it is."""
        async with self._changing:
            known = await asyncio.to_thread(self._known)
            if name not in known:
                raise bad_field(
                    "version", f"is not here; it can be one of {', '.join(known)}", code=grpc.StatusCode.NOT_FOUND
                )
            try:
                predictor = await self._load(name, known[name])
            except ValueError as error:
                raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
            # Samples that came in meanwhile tell of the model too.
            if self._layout is not None:
                check_fits(self._layout, predictor.layout, name)
            self.active = self._version(name, predictor)
            self._chosen = True
        log.info("%s answers from now on; start with --predictor %s to keep it", name, name)
        return self.active

    async def versions(self) -> list[str]:
        """What can be promoted, in order."""
        return list(await asyncio.to_thread(self._known))

    async def _choose(self, layout: HiddenLayout) -> None:
        """What ships for the model, if it fits; else what is there already."""
        async with self._changing:
            path = await asyncio.to_thread(self._shipped)
            if path is not None and not self._chosen:
                try:
                    predictor = await self._load(path.stem, path)
                    check_fits(layout, predictor.layout, path.stem)
                    self.active = self._version(path.stem, predictor)
                except (ValueError, StatusError) as error:
                    log.warning("the predictor that ships for this model is of no use here: %s", error)
            self._chosen = True
        log.info("%s answers for model revision %s", self.active.name, layout.model_revision)

    async def _load(self, name: str, path: Path | None) -> Predictor:
        if path is None:
            return self._others.get(name, self.median)
        try:
            return await asyncio.to_thread(self._files.load, path)
        except ValueError:
            raise
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        except Exception as error:
            # Whatever a file does to its reader: the choice of a version is made once and must come to an end.
            log.exception("%s cannot be loaded", path)
            raise ValueError(f"{path} cannot be loaded ({type(error).__name__}: {error}); train it again") from None

    def _known(self) -> dict[str, Path | None]:
        """Versions by name, the built-in first. Blocking."""
        found: dict[str, Path | None] = dict.fromkeys(self._others)
        if self._directory is not None:
            for path in sorted(self._directory.glob(f"*{_SUFFIX}"))[:MAX_VERSIONS]:
                found[path.stem] = path
        if self._own_file is not None:
            found[self._own_file.stem] = self._own_file
        shipped = self._shipped()
        if shipped is not None:
            found.setdefault(shipped.stem, shipped)
        return {BUILT_IN: None, **dict(sorted((name, path) for name, path in found.items() if name != BUILT_IN))}

    def _shipped(self) -> Path | None:
        """The file that ships for the model that samples come from. Blocking."""
        if self._layout is None:
            return None
        try:
            return self._files.shipped(self._layout.model_revision)
        except (OSError, ValueError) as error:
            log.error("what ships with starmesh cannot be read: %s", error)
            return None

    def _version(self, name: str, predictor: Predictor) -> Version:
        return Version(name, predictor, Recalibration() if self._recalibrate else None)
