"""The languages of the examples: what each needs on the machine, how its client is built, how it is started.

Everything is built in a copy of the sources, so that the repository stays as it was.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
BUILD_TIMEOUT_S: Final = 500.0
_SAID_LINES = 15
# What npm calls a network, or a registry at its other end, that fails.
_NO_REGISTRY: Final = re.compile(
    r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ENETUNREACH|EHOSTUNREACH|ETIMEDOUT|ETIMEOUT|E50[0-4]|E429)\b"
)


class NotBuilt(Exception):
    """A client does not build; the message has the end of what the tools said."""


class Unreachable(NotBuilt):
    """The registry of a client's packages does not answer; the message has what the tools said of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """One example. ``build`` is given its directory in the copy and returns the command that runs the client."""

    name: str
    tools: tuple[str, ...]
    build: Callable[[Path], Awaitable[tuple[str, ...]]]
    packages: tuple[str, ...] = ()
    """What pkg-config must know."""
    files: tuple[Path, ...] = ()
    """What must be there."""

    def missing(self) -> list[str]:
        """What of its toolchain is not on this machine."""
        absent = [tool for tool in self.tools if shutil.which(tool) is None]
        if self.packages and not absent:
            absent += [name for name in self.packages if subprocess.call(["pkg-config", "--exists", name])]
        return absent + [str(path) for path in self.files if not path.exists()]

    @property
    def install(self) -> str:
        """The command that installs its toolchain."""
        return f"examples/install-toolchains {self.name}"


async def _build_node(directory: Path) -> tuple[str, ...]:
    try:
        await _run("npm", "ci", "--prefer-offline", "--no-audit", "--no-fund", cwd=directory)
    except NotBuilt as error:
        if _NO_REGISTRY.search(str(error)):
            raise Unreachable(str(error)) from None
        raise
    return ("node", str(directory / "client.js"))


async def _build_go(directory: Path) -> tuple[str, ...]:
    await _run("./build-debian.sh", str(directory / "client"), cwd=directory)
    return (str(directory / "client"),)


async def _build_cpp(directory: Path) -> tuple[str, ...]:
    await _run("cmake", "-S", ".", "-B", "build", cwd=directory)
    await _run("cmake", "--build", "build", "--parallel", "2", cwd=directory)
    return (str(directory / "build" / "client"),)


async def _build_python(directory: Path) -> tuple[str, ...]:
    protos = ("starmesh/v1/inference.proto", "starmesh/v1/sequence.proto")
    command = (sys.executable, "-m", "grpc_tools.protoc", "-I", "../../protos", "--python_out=.")
    await _run(*command, "--grpc_python_out=.", *protos, cwd=directory)
    return (sys.executable, str(directory / "client.py"))


LANGUAGES: Final = {
    language.name: language
    for language in (
        Language(name="node", tools=("node", "npm"), build=_build_node),
        Language(
            name="go",
            tools=("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"),
            files=(Path("/usr/share/gocode/src/google.golang.org/grpc"),),
            build=_build_go,
        ),
        Language(
            name="cpp",
            tools=("c++", "cmake", "pkg-config", "protoc", "grpc_cpp_plugin"),
            packages=("grpc++", "protobuf"),
            build=_build_cpp,
        ),
        Language(name="python", tools=(), build=_build_python),
    )
}


def copy_sources(to: Path) -> Path:
    """Copy the examples and the protos; returns the directory of the languages' directories.

    Raises FileExistsError when there is something already.
    """
    shutil.copytree(REPOSITORY / "protos", to / "protos")
    leave = shutil.ignore_patterns("node_modules", "starmesh", "build", "check", "__pycache__")
    return Path(shutil.copytree(REPOSITORY / "examples", to / "examples", ignore=leave))


async def _run(*command: str, cwd: Path) -> None:
    """Run a build tool. Raises NotBuilt when it fails or takes too long."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(BUILD_TIMEOUT_S):
            said, _ = await process.communicate()
    except TimeoutError:
        raise NotBuilt(f"{' '.join(command)} did not end within {BUILD_TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        end = "\n".join(said.decode(errors="replace").splitlines()[-_SAID_LINES:])
        raise NotBuilt(f"{' '.join(command)} failed:\n{end}")
