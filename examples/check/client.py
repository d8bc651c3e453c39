"""A built example client: runs it, and reads what it says."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from typing import Final, Self

RUN_TIMEOUT_S: Final = 120.0
_SUMMARY = re.compile(
    r"^\[(?P<reason>[A-Z]+): (?P<prompt_tokens>\d+) prompt tokens, (?P<output_tokens>\d+) output tokens, "
    r"(?P<recoveries>\d+) recoveries, (?P<migrations>\d+) migrations, (?P<resumes>\d+) resumes\]$",
    re.MULTILINE,
)


class Unexpected(Exception):
    """A client did something else than it must. The message shows what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The line about an answer that has ended."""

    reason: str
    prompt_tokens: int
    output_tokens: int
    recoveries: int
    migrations: int
    resumes: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A client's run."""

    code: int
    text: str
    said: str

    def expect(self, condition: bool, what: str) -> None:
        """Raises Unexpected, with all that it said, unless ``condition`` holds."""
        if not condition:
            raise Unexpected(f"expected {what}; it ended with {self.code} and said {self.said.strip()!r}")

    def expect_answer(self, reason: str) -> Summary:
        """The summary of an answer that ended for ``reason`` and whose text is whole: emulated instances answer with
        the positions of the tokens, of which the one that ends the text shows none. Raises Unexpected."""
        found = _SUMMARY.search(self.said)
        self.expect(self.code == 0 and found is not None, "a summary of the answer")
        assert found is not None
        values = found.groupdict()
        self.expect(values.pop("reason") == reason, f"an answer that ends with {reason}")
        summary = Summary(reason=reason, **{name: int(value) for name, value in values.items()})
        shown = summary.output_tokens - (reason == "STOP")
        whole = [str(summary.prompt_tokens + position) for position in range(shown)]
        self.expect(
            self.text.split() == whole, f"{shown} tokens from {summary.prompt_tokens} on, not {self.text[-80:]!r}"
        )
        return summary

    def expect_error(self, code: str, next_step: str) -> None:
        """Raises Unexpected unless it failed with the status ``code`` and said ``next_step``, or more, to do."""
        self.expect(self.code == 1 and f"\nerror: {code}: " in self.said, code)
        self.expect(f"\nnext: {next_step}" in self.said, f"the next step to be {next_step!r}")


class Client:
    """The program of one language."""

    def __init__(self, language: str, command: tuple[str, ...]) -> None:
        self.language = language
        self._command = command

    async def run(self, *arguments: str) -> Ended:
        """Run to the end. Raises Unexpected when it does not end."""
        async with Run(self._command, arguments) as run:
            return await run.end()

    def start(self, *arguments: str) -> Run:
        """A run to be looked at before its end: an async context manager."""
        return Run(self._command, arguments)


class Run:
    """A running client; killed where it has not ended on the way out."""

    def __init__(self, command: tuple[str, ...], arguments: tuple[str, ...]) -> None:
        self._command = (*command, *arguments)
        self._text = b""
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        # A key or a proxy of this machine's user must not decide what is seen.
        passed = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        passed.pop("STARMESH_API_KEY", None)
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=passed,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()

    async def more_tokens(self, count: int) -> None:
        """Return when it has printed that many more. Raises Unexpected when it ends before, TimeoutError."""
        assert self._process.stdout is not None
        wanted = len(self._text.split()) + count
        async with asyncio.timeout(RUN_TIMEOUT_S):
            while len(self._text.split()) < wanted:
                piece = await self._process.stdout.read(4096)
                if not piece:
                    (await self.end()).expect(False, f"{count} more tokens")
                self._text += piece

    async def end(self) -> Ended:
        """All that it printed and said, once it has ended. Raises Unexpected when it does not."""
        try:
            async with asyncio.timeout(RUN_TIMEOUT_S):
                rest, said = await self._process.communicate()
        except TimeoutError:
            raise Unexpected(f"it did not end within {RUN_TIMEOUT_S:g} s") from None
        assert self._process.returncode is not None
        return Ended(
            self._process.returncode, (self._text + rest).decode(errors="replace"), said.decode(errors="replace")
        )
