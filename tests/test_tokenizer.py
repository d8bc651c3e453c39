"""The way from tokens to text is exact however it is cut up; the way to tokens is that of transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from starmesh.tokenizer import ChatTemplateError, IncrementalDetokenizer, ModelTokenizer, StopMatcher
from starmesh.tokenizer.chat_template import ChatTemplate

pytestmark = pytest.mark.fast


def byte_level_tokenizer() -> ModelTokenizer:
    """All 256 bytes, some merged tokens that split characters, an added word and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = []
    halves = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("😀é the")[0][0]
    for left, right in itertools.pairwise(halves):
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("日本語 word", special=False)])
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return ModelTokenizer(backend)


def byte_fallback_tokenizer() -> ModelTokenizer:
    """As Llama 2's: words with a mark for the space, single bytes for all that is not a word."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "b", "▁the", "é", "�", "▁▁", "end"]
    backend = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return ModelTokenizer(backend)


TOKENIZERS = {"byte_level": byte_level_tokenizer(), "byte_fallback": byte_fallback_tokenizer()}


@st.composite
def grouped_tokens(draw: st.DrawFn) -> tuple[ModelTokenizer, list[list[int]]]:
    tokenizer = draw(st.sampled_from(list(TOKENIZERS.values())))
    any_id = st.integers(0, tokenizer.vocabulary_tokens + 2)  # models pad their vocabularies
    text_ids = st.text(max_size=6).map(lambda text: tokenizer.backend.encode(text).ids)
    runs = draw(st.lists(st.one_of(st.lists(any_id, max_size=6), text_ids), max_size=8))
    token_ids = [token_id for run in runs for token_id in run]
    cuts = sorted(draw(st.lists(st.integers(0, len(token_ids)), max_size=6)))
    return tokenizer, [token_ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(token_ids)], strict=True)]


def flat(groups: list[list[int]]) -> list[int]:
    return [token_id for group in groups for token_id in group]


def pieces(detokenizer: IncrementalDetokenizer, groups: list[list[int]]) -> list[str]:
    return [*(detokenizer.feed(group) for group in groups), detokenizer.finish()]


@given(grouped_tokens())
def test_the_pieces_make_the_text_of_all_tokens(case: tuple[ModelTokenizer, list[list[int]]]) -> None:
    tokenizer, groups = case
    assert "".join(pieces(IncrementalDetokenizer(tokenizer), groups)) == tokenizer.decode(flat(groups))


@given(grouped_tokens(), st.lists(st.text("abé th😀�", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_cuts_the_text_however_the_tokens_are_grouped(
    case: tuple[ModelTokenizer, list[list[int]]], stops: list[str]
) -> None:
    tokenizer, groups = case
    text = tokenizer.decode(flat(groups))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        expected = min(
            (text[: ends[0]].removesuffix(stop) for stop in stops if text[: ends[0]].endswith(stop)), key=len
        )
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    assert "".join(pieces(detokenizer, groups)) == expected
    assert detokenizer.stopped == bool(ends)


@given(grouped_tokens(), st.lists(st.text("abé th😀", min_size=1, max_size=4), min_size=1, max_size=3))
def test_engine_and_router_agree_on_the_token_that_stops(
    case: tuple[ModelTokenizer, list[list[int]]], stops: list[str]
) -> None:
    tokenizer, groups = case
    matcher = StopMatcher(tokenizer, stops)
    stopped_after = next((n for n, token in enumerate(flat(groups), 1) if matcher.feed(token)), None)
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    fed = 0
    for group in groups:
        detokenizer.feed(group)
        fed += len(group)
        assert detokenizer.stopped == (stopped_after is not None and stopped_after <= fed)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_is_never_split(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode("a😀b")
    detokenizer = IncrementalDetokenizer(tokenizer)
    got = [detokenizer.feed([token_id]) for token_id in token_ids]
    assert "".join([*got, detokenizer.finish()]) == "a😀b"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in got)
    assert len(token_ids) > 3


def test_an_incomplete_character_is_flushed_as_a_replacement() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    first_byte = tokenizer.backend.token_to_id("ð")
    assert detokenizer.feed([first_byte]) == ""
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["abc"])
    got = [detokenizer.feed(tokenizer.encode(part)) for part in ("x", "a", "b", "d", "ab")]
    assert got == ["x", "", "", "abd", ""]
    assert detokenizer.finish() == "ab"
    assert not detokenizer.stopped


def test_nothing_comes_after_a_stop_string() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["ab"])
    assert detokenizer.feed(tokenizer.encode("xabab")) == "x"
    assert detokenizer.feed(tokenizer.encode("y")) == ""
    assert detokenizer.finish() == ""


def write_model(directory: Path, **files: object) -> Path:
    TOKENIZERS["byte_level"].backend.save(str(directory / "tokenizer.json"))
    for name, content in {"config": {"vocab_size": 512, "eos_token_id": 3}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_a_model_directory_says_what_ends_a_sequence(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(write_model(tmp_path))
    assert tokenizer.eos_token_ids == (3,)
    assert tokenizer.vocabulary_tokens == 512
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="send text instead"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_the_generation_config_takes_precedence(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 300, "max_position_embeddings": 64}, "eos_token_id": 3}
    tokenizer = ModelTokenizer.load(write_model(tmp_path, config=config, generation_config={"eos_token_id": [5, 6]}))
    assert tokenizer.eos_token_ids == (5, 6)
    assert tokenizer.vocabulary_tokens == 300
    assert tokenizer.context_tokens == 64


SOURCE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}T{% endif %}>"


@pytest.mark.parametrize("place", ["jinja", "json", "config", "named"])
def test_a_chat_template_is_found_where_models_keep_it(tmp_path: Path, place: str) -> None:
    config: dict[str, object] = {"bos_token": {"content": "<s>"}}
    match place:
        case "jinja":
            (tmp_path / "chat_template.jinja").write_text(SOURCE)
        case "json":
            (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": SOURCE}))
        case "config":
            config["chat_template"] = SOURCE
        case "named":
            config["chat_template"] = [{"name": "default", "template": SOURCE}, {"name": "tool_use", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<s>[user]hi>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].content.nothing.there }}",
    ],
)
def test_a_template_that_refuses_or_breaks_out_is_an_error_for_the_client(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="refuses the conversation"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


def test_generation_marks_and_loop_controls_render() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "<é>"}] * 2) == '"<é>"'
