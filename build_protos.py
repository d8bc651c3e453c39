"""Hatchling build hook: generates starmesh/v1 from protos/ (messages, services, type stubs).

Also runnable by hand after editing a .proto: ``python build_protos.py``.
"""

import os
import sysconfig
from importlib.resources import files
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def generate() -> None:
    """Run protoc over every proto; raises RuntimeError when it fails."""
    from grpc_tools import protoc

    # protoc finds the mypy plug-ins on PATH; without an activated environment they are beside python.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    protos = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    outputs = [f"--{kind}_out={ROOT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    include = [f"-I{ROOT / 'protos'}", f"-I{files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *include, *outputs, *protos]) != 0:
        raise RuntimeError("protoc failed; its message is above")


class ProtoBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        generate()


if __name__ == "__main__":
    generate()
