r"""Conversations to training rows and batches.

    ids      <|im_start|>  user  …  assistant  \n  So  .
    labels       -100      -100  …    -100     So  .   <|im_end|>

Label t is the token wanted after position t, or -100 where nothing is trained. A step's rows are divided into
micro-batches of about equal numbers of tokens, packed end to end where padding would cost.
"""
import itertools
import math
from collections import Counter

import numpy as np
import torch

from chat import render_chat
from files import InputError
from rows import note_bad_row, random_number

# ----- training rows -------------------------------------------------------------------------------------------------


def training_example(tokenizer, messages, max_length=None):
    """messages -> (ids, labels), two lists of one length; label t is the token wanted after position t, or -100.

    The last token of the conversation is a label and no input. Rows longer than `max_length` lose their end. If that
    leaves nothing to train, all labels are -100.
    """
    ids, mask = render_chat(tokenizer, messages)
    labels = [i if trained else -100 for i, trained in zip(ids[1:], mask[1:])]
    return ids[:-1][:max_length], labels[:max_length]


def render_rows(tokenizer, rows, max_length, *, on_bad_row="stop"):
    """[(where, messages)] -> ([(where, ids, labels)], report); ids and labels are int32 arrays, see training_example.

    The report counts rows that lost their end ("truncated") and rows left out with nothing to train ("dropped").
    """
    examples, counts, faults = [], Counter(truncated=0, dropped=0), []
    for where, messages in rows:
        try:
            ids, labels = training_example(tokenizer, messages)
        except InputError as error:
            note_bad_row(InputError(f"{where}: {error}"), on_bad_row, counts, faults)
            continue
        counts["truncated"] += len(ids) > max_length
        labels = np.array(labels[:max_length], dtype=np.int32)
        if (labels != -100).any():
            examples.append((where, np.array(ids[:max_length], dtype=np.int32), labels))
        else:
            counts["dropped"] += 1
    return examples, {**counts, "faults": faults}


def render_pairs(tokenizer, rows, max_length, *, on_bad_row="stop"):
    """[(where, rows.pair_of(row))] -> ([(where, prompt, chosen, rejected)], report); the three are int32 arrays of ids.

    An answer is what the assistant's turn adds to the prompt, with its end-of-turn token; every token of it is trained.
    Prompt and answer together have at most `max_length` inputs (the answer's last token is only a label): the end of an
    answer is cut ("truncated"), never the prompt. Pairs without room for an answer ("dropped"), with an "empty" answer
    or with two "equal" ones are left out; "faults" names the first of them.
    """
    pairs, counts, faults = [], Counter(truncated=0, dropped=0, empty=0, equal=0), []
    for where, (messages, *answers) in rows:
        def leave_out(what, why, where=where):
            counts[what] += 1
            faults.append(f"{where}: {why}")
        if not all(answer.strip() for answer in answers):
            leave_out("empty", "an answer is empty")
            continue
        try:
            prompt, _ = render_chat(tokenizer, messages, add_generation_prompt=True)
            answers = [answer_ids(tokenizer, messages, answer, len(prompt)) for answer in answers]
        except InputError as error:
            note_bad_row(InputError(f"{where}: {error}"), on_bad_row, counts, faults)
            continue
        room = max_length - len(prompt) + 1
        if room < 1:
            leave_out("dropped", f"a prompt of {len(prompt)} tokens leaves no room for an answer")
            continue
        cut = [answer[:room] for answer in answers]
        if cut[0] == cut[1]:
            leave_out("equal", "the answers are equal" + (" within the length" if answers[0] != answers[1] else ""))
            continue
        counts["truncated"] += sum(len(answer) > room for answer in answers)
        pairs.append((where, *(np.array(ids, dtype=np.int32) for ids in (prompt, *cut))))
    return pairs, {**counts, "faults": faults[:5]}


def answer_ids(tokenizer, messages, answer, start):
    """The trained ids that the assistant's `answer` adds after the `start` ids of its prompt."""
    ids, mask = render_chat(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    return ids[start:max(i for i, trained in enumerate(mask) if trained) + 1]


def rows_of_answers(prompt, *answers):
    """The training rows [(ids, labels), …] of several answers to one prompt; only the answers have labels."""
    untrained = np.full(len(prompt) - 1, -100, dtype=np.int32)
    return [(np.concatenate([prompt, answer[:-1]]), np.concatenate([untrained, answer])) for answer in answers]


def show_example(tokenizer, ids, labels, colour=True):
    """The text of one training row, its trained tokens in green (or between ⟦ and ⟧)."""
    begin, end = ("\x1b[30;42m", "\x1b[0m") if colour else ("⟦", "⟧")
    last = [int(labels[-1])] if labels[-1] != -100 else []  # the final token is a label and no input
    tokens = [int(i) for i in ids] + last
    trained = [False, *(label != -100 for label in labels)][:len(tokens)]
    text, start = "", 0
    for t in range(1, len(tokens) + 1):
        if t == len(tokens) or trained[t] != trained[start]:
            piece = tokenizer.decode(tokens[start:t])
            text += begin + piece + end if trained[start] else piece
            start = t
    return text

# ----- batches -------------------------------------------------------------------------------------------------------


def steps_of_epochs(lengths, *, batch_size, budget, seed, rank=0, world=1, consumed=0):
    """Yields (row numbers of one optimizer step, [row numbers of each of this rank's micro-batches]), without end.

    Epoch e goes through a permutation of the rows that depends on `seed` and e alone, `batch_size` rows a step (fewer
    in its last step). A step's rows depend neither on the number of ranks nor on the budget, and a run goes on after
    `consumed` rows: after a resume on another number of ranks every row is still seen once an epoch.
    """
    n = len(lengths)
    while True:
        epoch, done = divmod(consumed, n)
        order = sorted(range(n), key=lambda row: random_number(seed, epoch, row))
        for start in range(done, n, batch_size):
            rows = order[start:start + batch_size]
            bins = split_step([lengths[row] for row in rows], budget, world)
            yield rows, [[rows[i] for i in micro_batch] for micro_batch in bins[rank::world]]
        consumed = (epoch + 1) * n


def split_step(lengths, budget, world=1):
    """Divides rows into micro-batches of about equal numbers of tokens, at most `budget`: lists of indices.

    Rows are sorted by length and cut into consecutive parts, so that the rows of a part have similar lengths and the
    i-th parts of all ranks (numbers i · world + rank) cost about the same. The number of parts is a multiple of
    `world`. A part may be empty, and a row longer than the budget is a part of its own. The largest parts come first,
    so that the others reuse their memory.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total = sum(lengths)
    count = world * max(1, math.ceil(total / (budget * world)))
    while True:
        bins, before = [[] for _ in range(count)], 0
        for i in order:  # a row belongs to the part in which its middle falls
            bins[int((before + lengths[i] / 2) * count / total)].append(i)
            before += lengths[i]
        sizes = [sum(lengths[i] for i in bin_) for bin_ in bins]
        if all(len(bin_) <= 1 or size <= budget for bin_, size in zip(bins, sizes)):
            turns = [range(start, start + world) for start in range(0, count, world)]  # one part for each rank
            turns.sort(key=lambda turn: -max(sizes[j] for j in turn))
            return [bins[j] for turn in turns for j in turn]
        count += world


def collate(examples, packed=None):
    """[(where, ids, labels)] -> one micro-batch: a dict of ids and labels [B, T] int64, positions and documents.

        packed        [a a a a b b · ·]      documents [4, 4], positions [0 1 2 3 0 1 2 3]
        not packed    [a a a a]
                      [b b · ·]              documents and positions None

    Packed rows attend within their own document (fast.attend_apart). Padding stands at the end of a row, where causal
    attention never reads it. By default rows are packed unless padding adds less than 2 %, because everything outside
    attention costs by the token. B · T is rounded up to a multiple of 8, because matrix products are slower otherwise;
    packed, the last document grows by that. `tokens` counts the tokens of the rows. Without examples the micro-batch
    holds untrained tokens, because a rank without rows must take part in every collective.
    """
    lengths = [len(ids) for _, ids, _ in examples] or [1]
    width, longest = rounded_up(sum(lengths), 8), rounded_up(max(lengths), 8 // math.gcd(8, len(lengths)))
    if packed is None:
        packed = len(lengths) * longest > 1.02 * width
    shape = (1, width) if packed else (len(lengths), longest)
    ids, labels = (torch.full(shape, empty, dtype=torch.long) for empty in (0, -100))
    starts = itertools.accumulate(lengths[:-1], initial=0)
    for i, (start, n, (_, *row)) in enumerate(zip(starts, lengths, examples)):
        for batch, array in zip((ids, labels), row):
            (batch[0, start:start + n] if packed else batch[i, :n]).copy_(torch.from_numpy(array))
    documents = [*lengths[:-1], lengths[-1] + shape[1] - sum(lengths)] if packed else None
    positions = torch.cat([torch.arange(n) for n in documents]) if packed else None
    return {"ids": ids, "labels": labels, "positions": positions, "documents": documents,
            "tokens": sum(len(ids) for _, ids, _ in examples)}


def on_device(batch, device):
    """A micro-batch with its tensors on `device`."""
    return {key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items()}


def rounded_up(n, multiple):
    """The smallest multiple of `multiple` that is at least n."""
    return n + -n % multiple


def collate_answers(rows, shared=True):
    """[(where, prompt, answer, …)], ids int32 -> one packed micro-batch [1, T], a dict as collate's; a row may have any
    number of answers.

    The prompt's last token predicts the first of an answer, so every answer begins with a copy of it:

        prompt[:-1] | prompt[-1], one[:-1] | prompt[-1], other[:-1]       the prompt once (shared)
        prompt[:-1]   prompt[-1], one[:-1] | prompt[:-1]   prompt[-1], other[:-1]                (not shared)

    The positions of every answer go on from the prompt's, its labels are its own ids, and no answer sees another:
    `documents` is [(length of a prefix, [lengths of its continuations])], see fast.attend_documents. `parts` divides T:
    a piece up to the end of each of the `answers`, in order, and at last the filling up to a multiple of 8. Without
    rows the micro-batch holds untrained tokens. Sharing saves the other prompts (two of 146 tokens: 1.00 s, not 1.15).
    """
    packed, positions, documents, parts = [], [], [], []
    for _, prompt, *answers in rows:
        prefix = len(prompt) - 1
        starts = [0] + [prefix if shared else 0] * (len(answers) - 1)  # of each row, behind what is packed already
        pieces = [(ids[start:], labels[start:])
                  for start, (ids, labels) in zip(starts, rows_of_answers(prompt, *answers))]
        packed += pieces
        parts += [len(ids) for ids, _ in pieces]
        positions += [torch.arange(start, prefix + len(answer)) for start, answer in zip(starts, answers)]
        documents += [(prefix, [*map(len, answers)])] if shared else [(0, [len(ids)]) for ids, _ in pieces]
    tokens = sum(parts)
    spare = rounded_up(max(1, tokens), 8) - tokens  # untrained, a document of its own
    packed.append((np.zeros(spare, np.int32), np.full(spare, -100, np.int32)))
    ids, labels = (torch.from_numpy(np.concatenate(part)).long()[None] for part in zip(*packed))
    return {"ids": ids, "labels": labels, "positions": torch.cat([*positions, torch.arange(spare)]),
            "documents": documents + [(0, [spare])] * (spare > 0), "parts": [*parts, spare], "answers": len(parts),
            "tokens": tokens}


def collate_pairs(pairs, shared=True):
    """[(where, prompt, chosen, rejected)] -> the micro-batch of collate_answers, with the answers' `lengths` [N, 2]."""
    lengths = torch.tensor([[*map(len, answers)] for _, _, *answers in pairs], dtype=torch.long).view(-1, 2)
    return collate_answers(pairs, shared) | {"lengths": lengths}
