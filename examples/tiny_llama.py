"""Make a small LLaMA with grouped-query attention: a model to try NetLathe on without a download.

    python examples/tiny_llama.py out/tiny-llama

It trains a byte-level model (4 layers, 128 wide, 4 query heads over 2 key/value heads) on the text of
Python's own license and module documentation for about a minute, and saves it as a Hugging Face
directory with its tokenizer. The same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 128  # tokens a training window
BATCH = 16


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that no vocabulary has to be learnt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make(folder: Path, *, steps: int = 150, seed: int = 0) -> None:
    """Train and save the model.

    Raises:
        FileExistsError: ``folder`` exists; nothing is overwritten.
    """
    if folder.exists():
        raise FileExistsError(folder)
    tokenizer = byte_tokenizer()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer.encode(text).ids)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    windows = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - CONTEXT, (BATCH, 1), generator=windows)
        batch = ids[starts + torch.arange(CONTEXT)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True)  # now: a run that is stopped in training leaves nothing
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/tiny-llama"))
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        print(f"{arguments.folder} exists already: nothing to do")
        return
    make(arguments.folder, steps=arguments.steps)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
