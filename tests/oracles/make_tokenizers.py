"""What transformers makes of texts and conversations: the golden values of tests/models.

    python tests/oracles/make_tokenizers.py --out tests/oracles

Needs transformers and tokenizers, not aidx.  Trains a tiny byte-level BPE tokenizer on its own
text, saves it as a checkpoint would be saved, and records ids, texts and rendered chats.
"""

import argparse
import json
import pathlib

import tokenizers
import transformers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  leading and trailing  ",
    "naïve café — 数学は楽しい 🙂🚀",
    "line one\nline two\r\n\ttab",
    "a <|eot|> inside, <tool> and </tool> too",
    "don't can't won't . , ! ?",
    "",
]
TEMPLATES = {
    "default": """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|head|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant\\n\\n' }}
{%- endif %}
""",
    "tool_use": """{{- bos_token }}
{%- if tools %}
    {{- 'tools:' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\\n' + tools[0] | tojson(indent=2) }}
{%- endif %}
{% for message in messages %}
    {% if loop.index0 > 3 %}{% break %}{% endif %}
{{ message.role }}: {{ message.content }}
{% endfor %}
""",
    "generation": """{% for message in messages %}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

{% else %}
[{{ message.content }}]{% if enable_thinking is defined and not enable_thinking %} quiet{% endif %}

{% endif %}
{% endfor %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}
{{ ns.n }} messages
""",
}
CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": 'What is 2 + 2? <b>&"quotes"</b>'},
    {"role": "assistant", "content": "4 🙂"},
    {"role": "user", "content": "Thanks\n"},
    {"role": "assistant", "content": "Bye"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "a < b & 'ü'", "n": 1}}
CHATS = [
    {"chat_template": "default", "add_generation_prompt": True},
    {"chat_template": "default", "add_generation_prompt": False},
    {"chat_template": "tool_use", "tools": [TOOL, TOOL], "add_generation_prompt": True},
    {"chat_template": "generation", "add_generation_prompt": False},
    {"chat_template": "generation", "add_generation_prompt": False, "enable_thinking": False},
]


def build(directory):
    """A checkpoint's tokenizer files: byte-level BPE, BOS by template, one token only in config."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|bos|>", "<|eos|>", "<|head|>", "<|eot|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3 + [__doc__], trainer)
    backend.add_tokens(["<tool>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    backend.enable_truncation(4)
    backend.save(str(directory / "tokenizer.json"))
    late = {"content": "</tool>", "special": False, "lstrip": False, "rstrip": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eot|>", "lstrip": False},
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(backend.get_vocab_size()): late | {"normalized": True, "single_word": False}
        },
        "chat_template": [{"name": k, "template": v} for k, v in TEMPLATES.items()],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def record(directory):
    """Ids, decoded texts and rendered chats of the tokenizer in a directory."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    texts = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        bare = tokenizer.encode(text, add_special_tokens=False)
        kept = tokenizer.decode(ids)
        skipped = tokenizer.decode(ids, skip_special_tokens=True)
        texts.append({"text": text, "ids": ids, "bare": bare, "kept": kept, "skipped": skipped})
    chats = []
    for options in CHATS:
        rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False, **options)
        chats.append({"options": options, "rendered": rendered, "ids": ids})
    return {"texts": texts, "messages": CHAT, "chats": chats}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    directory = args.out / "tokenizer"
    directory.mkdir(parents=True, exist_ok=True)
    build(directory)
    golden = json.dumps(record(directory), ensure_ascii=False, indent=1)
    (args.out / "tokenizer.json").write_text(golden + "\n", encoding="utf-8")
    print(len(TEXTS), "texts,", len(CHATS), "chats")


if __name__ == "__main__":
    main()
