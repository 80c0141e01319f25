"""The command line: what it prints, what it refuses, and its exit codes."""

import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tokenizers

from aidx.cli import demo, main, options
from aidx.models import LlamaConfig, Model, Tokenizer, init_params, save_model

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"
ENGINE = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--num-blocks", "33"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A one-layer random model over bytes."""
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(ALPHABET)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    config = LlamaConfig(len(vocab), 16, 32, 1, 2, 1, 8, max_position_embeddings=128, tied=True)
    model = Model(
        config,
        init_params(config, jax.random.key(0), std=0.3),
        tokenizer=Tokenizer(backend, {"eos_token": "<|endoftext|>"}, {"default": TEMPLATE}),
        generation_config={"do_sample": True, "temperature": 0.5},
        eos_token_ids=(0,),
    )
    return save_model(model, tmp_path_factory.mktemp("checkpoint"))


def generate(checkpoint, *arguments):
    return main(["generate", "--model", str(checkpoint), *ENGINE, "--max-tokens", "6", *arguments])


def test_generate_json_says_everything_and_the_seed_repeats_it(checkpoint, capsys):
    assert generate(checkpoint, "--json", "-n", "2", "--seed", "3", "ab", "abc") == 0
    first = capsys.readouterr().out
    lines = [json.loads(line) for line in first.splitlines()]
    assert [(x["prompt"], x["sample"]) for x in lines] == [
        ("ab", 0), ("ab", 1), ("abc", 0), ("abc", 1)]  # fmt: skip
    assert all(1 <= len(x["token_ids"]) <= 6 and x["seed"] == 3 for x in lines)
    assert lines[0]["token_ids"] != lines[1]["token_ids"]
    assert generate(checkpoint, "--json", "-n", "2", "--seed", "3", "ab", "abc") == 0
    assert capsys.readouterr().out == first


def test_a_single_prompt_streams_the_same_text(checkpoint, capsys, monkeypatch):
    greedy = ("--temperature", "0")
    assert generate(checkpoint, *greedy, "--json", "ab") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert generate(checkpoint, *greedy, "--echo", "ab") == 0
    assert capsys.readouterr().out == f"ab{text}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("ab"))
    assert generate(checkpoint, *greedy, "--echo") == 0
    assert capsys.readouterr().out == f"ab{text}\n"
    assert generate(checkpoint, *greedy, "--echo", "ab", "ab") == 0
    assert capsys.readouterr().out == f"--- prompt 1\nab{text}\n--- prompt 2\nab{text}\n"


def test_chat_remembers_and_forgets(checkpoint, capsys, monkeypatch):
    said = io.StringIO("hi\n\nhi\n/reset\nhi\n" + "x" * 60 + "\n/exit\nnever read\n")
    monkeypatch.setattr("sys.stdin", said)
    arguments = ["--model", str(checkpoint), *ENGINE, "--max-tokens", "6", "--temperature", "0"]
    assert main(["chat", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "forgotten" not in err
    assert said.read() == "never read\n"
    assert out.count("\n") >= 4
    # The turn after /reset is the first turn again.
    turns = out.split("\n")
    assert turns[2] == turns[0]


def test_fit_drops_the_oldest_turns_but_not_the_system_message():
    class Words:
        config = type("config", (), {"max_model_len": 10})
        engine = property(lambda self: self)
        tokenizer = property(lambda self: self)
        encode_chat = staticmethod(lambda ms: [w for m in ms for w in m["content"].split()])

    from aidx.cli.chat import fit

    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a b c"},
        {"role": "assistant", "content": "d e f"},
        {"role": "user", "content": "g h"},
    ]
    assert fit(Words(), messages, 1, 4) == (["be", "brief", "g", "h"], [messages[0], messages[3]])
    assert fit(Words(), messages[:2], 1, 4)[1] == messages[:2]
    with pytest.raises(ValueError, match="11 tokens"):
        fit(Words(), [{"role": "user", "content": "x " * 11}], 0, 4)


def test_bench_counts_every_token(checkpoint, capsys):
    arguments = ["--model", str(checkpoint), *ENGINE, "--num-prompts", "3", "--concurrency", "1",
                 "2", "--input-len", "4", "8", "--output-len", "5", "--json"]  # fmt: skip
    assert main(["bench", *arguments]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["concurrency"], r["output_tokens"]) for r in rows] == [(1, 15), (2, 15)]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(15 / row["seconds"])
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p95_ms"] < 1e3 * row["seconds"]


def test_demo_without_a_terminal(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(demo, "embedded_path", lambda: checkpoint)
    monkeypatch.setattr(demo, "PROMPTS", ("0123456789abcdef+", "b"))
    monkeypatch.setattr(demo, "MAX_NUM_BATCHED_TOKENS", 16)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["demo", "--max-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert "prompt 2" in out and "tokens/s" in out and "decode xla" in out
    table = {line.split("│")[1].strip(): line.split("│")[2:4] for line in out.splitlines()
             if line.startswith("│")}  # fmt: skip
    assert [int(x) for x in table["prompt tokens"]] == [18, 34]
    assert [int(x) for x in table["generated tokens"]] == [16, 16]
    # The second round finds the first block of the first prompt, and nothing of the second.
    assert (
        table["of them cached"][0].strip() == "0%" and table["of them cached"][1].strip() == "47%"
    )


def test_panels_show_the_last_lines_of_every_prompt():
    from rich.console import Console

    console = Console(width=60, height=12, file=io.StringIO(), force_terminal=True)
    console.print(demo.panels(["first\ntwo\nthree\nfour", "single", "odd"], [None] * 3, console))
    shown = console.file.getvalue()
    assert "four" in shown and "first" not in shown and "single" in shown and "odd" in shown


@pytest.mark.smoke
def test_info_names_what_is_taken_and_why_not(capsys):
    assert main(["info", "--json", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["jax"] == jax.__version__
    assert len(found["devices"]) == len(jax.local_devices())
    for case in {line["case"] for line in found["ops"]}:
        lines = [line for line in found["ops"] if line["case"] == case]
        assert sum(line["chosen"] for line in lines) == 1
        assert all(line["reason"] for line in lines[: [x["chosen"] for x in lines].index(True)])
    assert main(["info"]) == 0
    assert "implementations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: aidx"),
        (["nonsense"], 2, "invalid choice"),
        (["generate", "--max-tokens", "0", "x"], 2, "0 is not at least 1"),
        (["bench", "--num-blocks", "2", "--gpu-memory-utilization", "0.5"], 2, "not allowed"),
        (["generate", "--model", "no/such/place", "x"], 1, "no/such/place is neither"),
        (["generate", ""], 1, "a prompt is empty"),
        (["bench", "--num-prompts", "2", "--concurrency", "4"], 1, "less than --concurrency 4"),
        (["bench", "--input-len", "9", "3"], 1, "give N, or LOW HIGH"),
        (["bench", "--seed", "-1"], 1, "--seed -1 must be at least 0"),
        (["demo", "--max-tokens", "961"], 1, "--max-tokens 961 is more than 960"),
        (["generate", "--model", "no/such/place", "--top-p", "0", "x"], 1, "top_p must be in"),
        (["chat", "--model", "no/such/place", "--top-k", "-7"], 1, "top_k must be a number"),
        (["info", "--heads", "3", "--kv-heads", "2"], 1, "multiple of --kv-heads 2"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_a_code(arguments, code, message, capsys):
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    if code == 1:
        assert err.startswith("aidx: error: ") and err.count("\n") == 1


def test_mistakes_that_only_the_checkpoint_shows(checkpoint, capsys):
    for arguments, message in [
        (["--temperature", "-1", "ab"], "temperature must be"),
        (["--max-model-len", "4000000", "ab"], "max_model_len"),
        (["-n", "2", "--temperature", "0", "ab"], "n=2"),
        (["x" * 200], "200"),
    ]:
        assert generate(checkpoint, *arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith("aidx: error: ") and err.count("\n") == 1 and message in err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("AIDX_DEBUG", "1")
    with pytest.raises(ValueError, match="multiple"):
        main(["info", "--heads", "3", "--kv-heads", "2"])


@pytest.mark.parametrize("command", ["demo", "generate", "chat", "bench", "info"])
def test_help_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"examples:\n  aidx {command}" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from aidx.cli import main; sys.exit(main(['info', '--json']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1 and "Traceback" not in err and "Exception ignored" not in err


def test_models_by_name(tmp_path, monkeypatch):
    assert options.resolve_model("some/where") == "some/where"
    monkeypatch.setattr(options.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="train_embedded"):
        options.resolve_model("embedded")
