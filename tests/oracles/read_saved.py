"""Load directories that aidx saved with transformers, and record what they compute.

    python tests/oracles/read_saved.py --out saved.npz DIRECTORY...

Each directory holds a checkpoint and `prompt.json`, a list of ids.  A missing, unexpected or
mismatched tensor is an error.  Needs torch, transformers and numpy, not aidx.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers

torch.set_num_threads(1)  # the models are tiny


@torch.no_grad()
def logits_of(directory):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if problems := {kind: found for kind, found in info.items() if found}:
        raise SystemExit(f"{directory}: {problems}")
    ids = torch.tensor([json.loads((directory / "prompt.json").read_text())])
    return model.eval()(ids, use_cache=False).logits[0].numpy()


def texts_of(directory):
    """What the saved tokenizer makes of a text and of a chat, as JSON."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "naïve café 🙂 <tool> a</tool> <|eot|>"
    messages = [{"role": "user", "content": "hi"}]
    ids, chat = tokenizer.encode(text), tokenizer.apply_chat_template(messages, tokenize=False)
    eos = model_eos(directory)
    return json.dumps({"text": text, "ids": ids, "messages": messages, "chat": chat, "eos": eos})


def model_eos(directory):
    return transformers.GenerationConfig.from_pretrained(directory).eos_token_id


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("directories", type=pathlib.Path, nargs="+")
    args = parser.parse_args()
    arrays = {}
    for directory in args.directories:
        arrays[f"{directory.name}/logits"] = logits_of(directory)
        if (directory / "tokenizer.json").is_file():
            arrays[f"{directory.name}/texts"] = np.array(texts_of(directory))
    np.savez(args.out, **arrays)


if __name__ == "__main__":
    main()
