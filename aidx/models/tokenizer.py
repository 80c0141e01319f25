"""Text to token ids and back, and chat templates, from a Hugging Face directory.

The ids come from tokenizer.json through the `tokenizers` library; tokenizer_config.json,
special_tokens_map.json and chat_template.jinja say which tokens are special and how a
conversation is written.
"""

import datetime
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from .checkpoint import read_json, write_json

CONVERTIBLE = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer:
    """Encode, decode and chat; immutable after construction.

    Args:
      backend: a `tokenizers.Tokenizer`.
      config: what tokenizer_config.json says.
      chat_templates: Jinja sources by name, `default` being the usual one.

    >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "world": 1}))
    >>> backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = Tokenizer(backend)
    >>> tokenizer.encode("hello world"), tokenizer.decode([1, 0])
    ([0, 1], 'world hello')
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        self.config = dict(config or {})
        self.chat_templates = dict(chat_templates or {})
        self.special_tokens = {
            name: _content(self.config[name]) for name in SPECIAL_TOKENS if self.config.get(name)
        }
        self._backend = backend
        # Truncation and padding are what a training script left in the file, not the model's.
        backend.no_truncation()
        backend.no_padding()
        _add_missing_tokens(backend, self.config, self.special_tokens)

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint directory; None where there is none at all.

        Raises:
          ValueError: the only tokenizer is of another format (the message says how to convert it),
            or a file is broken.
        """
        directory = pathlib.Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            if others := [name for name in CONVERTIBLE if (directory / name).is_file()]:
                raise ValueError(
                    f"{directory} has no tokenizer.json, only {', '.join(others)}; convert it with "
                    "transformers: AutoTokenizer.from_pretrained(directory)"
                    ".save_pretrained(directory)"
                )
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (directory / name).is_file():
                said = read_json(directory / name)
                config |= {k: v for k, v in said.items() if v is not None}
        return cls(backend, config, _read_chat_templates(directory, config))

    def save(self, directory: str | pathlib.Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates."""
        directory = pathlib.Path(directory)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {k: v for k, v in self.config.items() if k != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        write_json(directory / "tokenizer_config.json", config)
        for name, source in self.chat_templates.items():
            if name == "default":
                file = directory / "chat_template.jinja"
            else:
                file = directory / "additional_chat_templates" / f"{name}.jinja"
                file.parent.mkdir(exist_ok=True)
            file.write_text(source, encoding="utf-8")

    # --- text and ids ---

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the tokens that the model expects around it.

        A text that already begins with the BOS token does not get a second one.
        """
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids, byte for byte: no clean-up of spaces.

        Ids beyond the vocabulary (a padded embedding has some) decode to nothing.
        """
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it, None beyond the vocabulary."""
        return self._backend.id_to_token(token_id)

    def __len__(self) -> int:
        """The largest id of vocabulary and added tokens, plus one."""
        return self._len

    @functools.cached_property
    def _len(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a sequence."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a sequence, as the tokenizer says; the model may know more."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id for padding, None where there is none."""
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    # --- chat ---

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the one text that the model was trained on.

        Args:
          messages: `{"role": ..., "content": ...}` in order.
          tools: JSON schemas that the template may list.
          add_generation_prompt: end with the header of the assistant's turn.
          chat_template: a Jinja source, or the name of one of the checkpoint's; None takes
            `tool_use` if there are tools and such a template, else `default`.
          **variables: what the template reads besides (`enable_thinking`, `documents`, ...).

        Raises:
          ValueError: there is no template, or the template refuses the conversation.

        >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
        >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        >>> Tokenizer(backend, {}, {"default": source}).render_chat(
        ...     [{"role": "user", "content": "hi"}])
        '<user>hi'
        """
        source = self._chat_source(chat_template, bool(tools))
        known = self.special_tokens | {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        if clash := set(variables) & set(known):
            raise ValueError(f"chat variables {sorted(clash)} are set by the tokenizer")
        try:
            return _compile_template(source).render(known | variables)
        except (jinja2.TemplateError, TypeError, LookupError) as error:
            raise ValueError(f"the chat template refused the conversation: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of `render_chat(messages, **options)`: the template writes BOS, nobody else."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def _chat_source(self, chosen: str | None, has_tools: bool) -> str:
        if chosen is not None:
            return self.chat_templates.get(chosen, chosen)
        if has_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" not in self.chat_templates:
            raise ValueError(
                "the tokenizer has no default chat template"
                + (f", only {sorted(self.chat_templates)}" if self.chat_templates else "")
                + "; pass chat_template="
            )
        return self.chat_templates["default"]


def _content(token: str | Mapping[str, Any]) -> str:
    """A special token is a string, or an object that holds one."""
    return token if isinstance(token, str) else token["content"]


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Tokens that only tokenizer_config.json names: older checkpoints keep some there."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = sorted((int(i), said) for i, said in config.get("added_tokens_decoder", {}).items())
    for token_id, said in listed:
        token = tokenizers.AddedToken(said["content"], **{f: said[f] for f in flags if f in said})
        if backend.token_to_id(said["content"]) is None:
            backend.add_tokens([token])
        if backend.token_to_id(said["content"]) != token_id:
            raise ValueError(
                f"added token {said['content']!r} should have id {token_id}, but tokenizer.json "
                f"gives it {backend.token_to_id(said['content'])}"
            )
    for name in ("bos_token", "eos_token"):  # an absent pad or unk token does no harm
        if name in special and backend.token_to_id(special[name]) is None:
            raise ValueError(f"{name} {special[name]!r} is not in the vocabulary")
    # A token that the config calls special is skipped in decoding, whatever tokenizer.json says.
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    more = more.values() if isinstance(more, Mapping) else more
    named = {*special.values(), *(_content(token) for token in more)}
    marked = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    unmarked = sorted(t for t in named - marked if backend.token_to_id(t) is not None)
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in unmarked])


def _read_chat_templates(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; the files go before what tokenizer_config.json carries."""
    templates: dict[str, str] = {}
    said = config.get("chat_template")
    if isinstance(said, str):
        templates["default"] = said
    elif said:
        templates |= {entry["name"]: entry["template"] for entry in said}
    if (directory / "chat_template.json").is_file():
        templates["default"] = read_json(directory / "chat_template.json")["chat_template"]
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return templates


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training masks; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser):
        """Jinja's hook: what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=32)
def _compile_template(source: str) -> jinja2.Template:
    # A checkpoint's template is somebody else's code: sandboxed, and without access to mutation.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
