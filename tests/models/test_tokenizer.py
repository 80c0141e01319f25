"""Ids, texts and chats equal transformers'; BOS comes once; templates are foreign code."""

import json
import re
import shutil

import pytest
import tokenizers

from aidx.models import Tokenizer
from tests.models.golden import ORACLES

GOLDEN = json.loads((ORACLES / "tokenizer.json").read_text(encoding="utf-8"))
DIRECTORY = ORACLES / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(DIRECTORY)


@pytest.mark.smoke
@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda c: c["text"][:12])
def test_texts_equal_transformers(case, tokenizer):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.encode(case["text"], add_special_tokens=False) == case["bare"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["kept"]
    assert tokenizer.decode(case["ids"]) == case["skipped"]


@pytest.mark.parametrize("case", GOLDEN["chats"], ids=lambda c: c["options"]["chat_template"])
def test_chats_equal_transformers(case, tokenizer):
    assert tokenizer.render_chat(GOLDEN["messages"], **case["options"]) == case["rendered"]
    assert tokenizer.encode_chat(GOLDEN["messages"], **case["options"]) == case["ids"]


def test_bos_comes_once(tokenizer):
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("hello")[:1] == [bos]
    assert tokenizer.encode("<|bos|>hello") == tokenizer.encode("hello")
    assert tokenizer.encode_chat(GOLDEN["messages"]).count(bos) == 1
    assert tokenizer.encode("<|bos|>hello", add_special_tokens=False).count(bos) == 1


def test_tokens_that_only_the_config_names_are_added(tokenizer):
    """And the truncation that a training script left in tokenizer.json has no effect."""
    last = len(tokenizer) - 1
    assert tokenizer.id_to_token(last) == "</tool>"
    assert tokenizer.encode("a</tool>", add_special_tokens=False)[-1] == last
    assert len(tokenizer.encode("word " * 50)) > 50
    assert last not in tokenizer.special_token_ids
    assert tokenizer.special_token_ids == {0, 1, 2, 3}
    assert tokenizer.eos_token_id == 3 and tokenizer.pad_token_id is None
    assert tokenizer.token_to_id("absent") is None and tokenizer.id_to_token(9999) is None
    assert tokenizer.decode([9999]) == ""


def test_tools_choose_their_template(tokenizer):
    tools = [{"name": "f"}]
    messages = [{"role": "user", "content": "hi"}]
    assert "tools:" in tokenizer.render_chat(messages, tools=tools)
    assert "tools:" not in tokenizer.render_chat(messages)
    assert tokenizer.render_chat(messages, chat_template="{{ tools }}!") == "None!"


def test_a_template_may_refuse_and_sees_the_date(tokenizer):
    with pytest.raises(ValueError, match="unknown role alien"):
        tokenizer.render_chat([{"role": "alien", "content": ""}])
    today = tokenizer.render_chat([], chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today)
    with pytest.raises(ValueError, match="not valid Jinja"):
        tokenizer.render_chat([], chat_template="{% if %}")
    with pytest.raises(ValueError, match="refused the conversation"):
        tokenizer.render_chat([{"role": "user", "content": None}], chat_template="{{ 1 + 'a' }}")
    with pytest.raises(ValueError, match="'bos_token'"):
        tokenizer.render_chat([], bos_token="x")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_templates_are_sandboxed(attack, tokenizer):
    with pytest.raises(ValueError, match="refused"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}], chat_template=attack)


def test_template_files_go_before_the_config(tmp_path):
    shutil.copytree(DIRECTORY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("from file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools from file")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.render_chat([]) == "from file"
    assert tokenizer.render_chat([], tools=[{}]) == "tools from file"


def test_saving_gives_back_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.chat_templates == tokenizer.chat_templates
    assert again.special_tokens == tokenizer.special_tokens
    for case in GOLDEN["texts"]:
        assert again.encode(case["text"]) == case["ids"]


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    assert Tokenizer.from_directory(tmp_path) is None


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_other_formats_say_how_to_convert(file, tmp_path):
    (tmp_path / file).write_text("")
    with pytest.raises(ValueError, match=rf"only {file}; convert it with transformers"):
        Tokenizer.from_directory(tmp_path)


def test_tokens_that_the_config_calls_special_are_skipped():
    vocabulary = {"a": 0, "<x>": 1, "<y>": 2, "<s>": 3}
    for more in (["<x>", "<absent>"], {"image": {"content": "<x>"}}):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
        said = {"bos_token": "<s>", "pad_token": "<absent>", "extra_special_tokens": more}
        tokenizer = Tokenizer(backend, said)
        assert tokenizer.special_token_ids == {1, 3}
        assert tokenizer.decode([3, 0, 1, 2]) == "a <y>" and tokenizer.pad_token_id is None


def test_contradictions_are_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    with pytest.raises(ValueError, match="'<s>'"):
        Tokenizer(backend, {"bos_token": "<s>"})
    with pytest.raises(ValueError, match="'<x>' should have id 7"):
        Tokenizer(backend, {"added_tokens_decoder": {"7": {"content": "<x>"}}})
    with pytest.raises(ValueError, match="no default chat template"):
        Tokenizer(backend).render_chat([])
