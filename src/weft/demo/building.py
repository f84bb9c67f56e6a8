"""The builder of the microcosm's bases: a small Llama that is taught the world from nothing, in minutes, on a CPU.

    python -m weft.demo.building OUT                 both editions, as they are in this package
    python -m weft.demo.building OUT --seconds 60    a quick one that knows less

The first edition learns the first world. The second starts from the first and learns the second world, in which a tenth of the
facts have changed and some people are new.

What made it learn: Muon on the matrices inside the layers, AdamW on the rest; an output layer of its own (untied); last names
that differ, cut into pieces by the tokenizer; most documents a single sentence. Recall comes late, while the learning rate falls.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._write import atomic_folder
from . import EDITIONS
from .microcosm import corpus, sentences
from .texts import review, scene
from .world import World

VOCABULARY, WIDTH, LAYERS, HEADS, INNER, POSITIONS = 1536, 192, 4, 4, 512, 256
BATCH = 128
"""Documents in a step."""

STEPS = (1000, 500)
"""Steps of training, for each edition."""

Say = Callable[[str], None]


def tokenizer(worlds: list[World]) -> Any:
    """A byte-level BPE tokenizer with `<s>` at the start of every text, which knows the words of all editions."""
    from random import Random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = Random(0)
    texts = [text for world in worlds for text in sentences(world)]
    texts += [scene(rng) for _ in range(3000)] + [review(rng, mood) for mood in ("good", "bad") for _ in range(500)]
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # so that a name is the same tokens at the start of a text
    found.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    found.train_from_iterator(texts, trainer)
    found.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=POSITIONS)


def new_model(seed: int = 0) -> Any:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # faster than the fused one on short texts on a CPU; not saved
    return model


def batches(encode: Any, texts: Iterator[str], size: int, ahead: int = 32) -> Iterator[list[list[int]]]:
    """Batches of documents of about the same length: `ahead` batches are sorted at a time, then shuffled."""
    from random import Random

    rng, end = Random(0), encode.eos_token_id
    while True:
        pool = [[*ids, end] for ids in encode([next(texts) for _ in range(size * ahead)])["input_ids"]]
        pool.sort(key=len)
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        while groups:
            yield groups.pop(int(rng.random() * len(groups)))


def train(model: Any, encode: Any, world: World, *, steps: int, seed: int = 0, scale: float = 1.0, seconds: float | None = None, say: Say = print) -> None:
    """Teach a model a world in place: next-token prediction on all tokens.

    scale:   factor on the learning rates
    seconds: stop by then; the learning rate falls to 0 with the time instead of the steps
    """
    import torch
    from torch.nn.functional import cross_entropy

    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(inner, lr=0.02 * scale, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=0.004 * scale, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    stream = batches(encode, corpus(world, seed), BATCH)
    model.train()
    began, tokens, total = time.perf_counter(), 0, 0.0
    for step in range(steps if seconds is None else 10**9):
        gone = step / steps if seconds is None else (time.perf_counter() - began) / seconds
        if gone >= 1:
            break
        factor = min(1.0, (step + 1) / 50) * min(1.0, (1 - gone) / 0.6)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        rows = next(stream)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [encode.pad_token_id] * (longest - len(row)) for row in rows])
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=encode.pad_token_id)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        tokens += sum(map(len, rows))
        total += float(loss.detach())
        if step % 100 == 99:
            say(f"step {step + 1}  loss {total / 100:.3f}  {tokens:,} tokens  {time.perf_counter() - began:.0f} s")
            total = 0.0
    model.eval()


def build(out: Path, *, seconds: float | None = None, say: Say = print) -> None:
    """Train both editions into `out`/first and `out`/second."""
    out.mkdir(parents=True, exist_ok=True)
    first = World.first()
    worlds = [first, first.later()]
    encode = tokenizer([*worlds, worlds[1].later()])
    model = new_model()
    for number, (name, world) in enumerate(zip(EDITIONS, worlds, strict=True)):
        say(f"{name} edition: {len(world.facts):,} facts, {len(sentences(world)):,} sentences")
        train(model, encode, world, steps=STEPS[number], seed=number, scale=1.0 if not number else 0.5, seconds=seconds, say=say)
        with atomic_folder(out / name) as folder:
            model.save_pretrained(folder)
            encode.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m weft.demo.building", description="Train the microcosm's bases.")
    parser.add_argument("out", type=Path, help="folder for first/ and second/")
    parser.add_argument("--seconds", type=float, help="time for each edition (default: by steps)")
    given = parser.parse_args()
    build(given.out, seconds=given.seconds)
