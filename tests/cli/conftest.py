"""The tiny model of the mesh tests serves the command line's tests too."""

from tests.mesh.conftest import model_dir, tiny_model_dir

__all__ = ["model_dir", "tiny_model_dir"]
