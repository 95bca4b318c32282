"""The reward model: one number a conversation, by which synth.py keeps the better of two answers.

    reward(conversation) = score · norm(h_T)        h_T: the last layer at the conversation's last token T

A Llama whose head has one row instead of a vocabulary's (Bradley-Terry on pairs; InstructGPT, arXiv 2203.02155, section
3.5), stored as transformers' LlamaForSequenceClassification: model.* and score.weight [1, D]. model.Llama runs it.
Conversations are packed end to end, those of a batch about equally long; none sees another.

    model, tokenizer = load_reward("models/reward")
    better, worse = rewards(model, tokenizer, [[*question, answer], [*question, other]])
"""
import functools
import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from chat import check_vocabulary, render_chat
from data import collate, split_step
from fast import attend_apart
from files import InputError, read_json, require_dir
from model import Llama, LlamaConfig, fill
from tokenizer import Tokenizer
from weights import check_checkpoint, checkpoint_files, checkpoint_names, open_safetensors, print_notices

SCORE = "score.weight"


def load_reward(directory, device="cpu", dtype=torch.bfloat16, seed=0):
    """(model, tokenizer) of the classifier in `directory`: a Llama that gives logits [B, T, 1].

    Weights more exact than bf16 become bf16 by stochastic rounding, repeatable from `seed`. InputError for a causal
    model, for one of several labels, and for tensors that do not fit config.json.
    """
    directory = require_dir(directory, "a reward model (config.json and safetensors files)")
    path = directory / "config.json"
    config, raw, files = LlamaConfig.from_json(path), read_json(path), checkpoint_files(directory)
    if SCORE not in files:
        raise InputError(f"{directory}: found {', '.join(raw.get('architectures') or ['a model'])} without {SCORE}; "
                         "expected LlamaForSequenceClassification, a reward model")
    check_one_label(path, raw, config, files)
    body = {name: file for name, file in files.items() if name != SCORE}
    print_notices(directory, config)
    check_checkpoint(body, replace(config, tie_word_embeddings=True))  # a head of the vocabulary may be there or not
    config = replace(config, tie_word_embeddings=False)  # so that the head of one row stays apart
    tokenizer = Tokenizer.from_dir(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    with torch.device("meta"):
        model = Llama(config)
        model.head = nn.Linear(config.hidden_size, 1, bias=False)
        model = model.to(dtype)
    return fill(model, files, checkpoint_names(config) | {"head.weight": [SCORE]}, device, seed), tokenizer


def check_one_label(path, raw, config, files):
    """InputError unless config.json and score.weight are those of one label; a config without a number leaves it to
    the weight."""
    names = raw.get("id2label")
    labels = raw.get("num_labels", len(names) if names and isinstance(names, dict) else 1)
    if labels != 1:
        raise InputError(f"{path}: num_labels is {labels}; expected 1, the reward")
    with open_safetensors(files[SCORE]) as file:
        shape = file.get_slice(SCORE).get_shape()
    if shape != [1, config.hidden_size]:
        raise InputError(f"{files[SCORE]}: {SCORE} is {shape}; expected {[1, config.hidden_size]}")


def rewards(model, tokenizer, conversations, *, batch_tokens=4096):
    """One float for each conversation, a list of messages that ends with the assistant's; in their order.

    A conversation is rendered with its end-of-turn token by the tokenizer's template. A batch has at most
    `batch_tokens` tokens, or one longer conversation. InputError names the conversation, from 1, that has no such form
    or does not fit the model's context.
    """
    limit, examples = model.config.max_position_embeddings, []
    for number, messages in enumerate(conversations, 1):
        try:
            ids, _ = render_chat(tokenizer, messages)
        except InputError as error:
            raise InputError(f"conversation {number}: {error}") from None
        if messages[-1]["role"] != "assistant":
            raise InputError(f"conversation {number}: the last message is the user's; expected the assistant's")
        if len(ids) > limit:
            raise InputError(f"conversation {number} has {len(ids):,} tokens; expected at most {limit:,}, the model's "
                             "context")
        ids = np.array(ids, dtype=np.int32)
        examples.append(("", ids, np.full_like(ids, -100)))
    found = torch.zeros(len(examples))
    lengths = [len(ids) for _, ids, _ in examples]
    for rows in filter(None, split_step(lengths, batch_tokens) if examples else ()):
        batch = collate([examples[row] for row in rows], packed=True)
        attend = functools.partial(attend_apart, batch["documents"])
        device = model.norm.weight.device
        with torch.no_grad():
            logits = model(batch["ids"].to(device), positions=batch["positions"].to(device), attend=attend)[0, :, 0]
        last = [end - 1 for end in itertools.accumulate(lengths[row] for row in rows)]
        found[rows] = logits[last].float().cpu()
    return found.tolist()
