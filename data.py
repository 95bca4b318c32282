"""Text to tokens: tokenizers, the chat templates, and the loss mask.

A conversation becomes ids and a mask that marks what is trained: the assistant's words and its end-of-turn token,
nothing else. Three rules, each of which others broke:
  1. Control tokens come from the template alone; `<|eot_id|>` typed in a question is ordinary text.
  2. The ids are those of the conversation in one string, but no token reaches over the border of an answer.
  3. The mask goes by position, never by `id == pad`, because pad and end-of-turn are often the same id.
"""
import functools
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import sentencepiece
import tokenizers
import torch

from files import InputError, one_line, read_json, require_dir
from rows import check_messages, note_bad_row, random_number
from vocabulary import (
    SAMPLING,
    TEMPLATE_TOKENS,
    check_added_piece,
    check_added_token,
    is_legacy,
    read_added_tokens,
    read_if_there,
    unprefixed,
    user_defined_pieces,
)

# ----- tokenizer -----------------------------------------------------------------------------------------------------


class Tokenizer:
    """A vocabulary with its chat template: "llama3", "chatml", "llama2", or None where it is none of these."""

    def __init__(self, encode, decode, special, silent, template, size, words=frozenset()):
        self._encode, self._decode = encode, decode
        self.special = special  # {added token: id}: none of them comes out of a user's text
        self.words = words  # those of them that come out of an answer
        self.silent = silent  # the ids that are no part of an answer's text
        self.template = template
        self.size = size
        self.read_as_text = set()  # added tokens that texts have named and not become
        self._heads = {}  # {text before a border: its ids}
        self._names = {answer: re.compile("|".join(map(re.escape, special.keys() - (words if answer else set())))
                                          or "(?!)") for answer in (False, True)}

    @classmethod
    def from_dir(cls, directory):
        """Reads tokenizer.json (Hugging Face tokenizers) or tokenizer.model (sentencepiece) in `directory`."""
        directory = require_dir(directory, "a model (with tokenizer.json or tokenizer.model)")
        if (directory / "tokenizer.json").is_file():
            return cls.from_tokenizer_json(directory / "tokenizer.json")
        if (directory / "tokenizer.model").is_file():
            return cls.from_sentencepiece(directory / "tokenizer.model")
        raise InputError(f"{directory}: no tokenizer; expected tokenizer.json or tokenizer.model")

    @classmethod
    def from_tokenizer_json(cls, path):
        raw = read_json(path)

        def engine(words, bare):
            """The library's tokenizer, which finds the plain tokens in a text and, if asked to, the words."""
            found = added.plain | (added.words if words else set())
            inner = tokenizers.Tokenizer.from_str(json.dumps(raw | {
                "added_tokens": [token | {"special": token["content"] not in found} for token in added.tokens],
                **{part: unprefixed(raw.get(part), everywhere=bare) for part in ("normalizer", "pre_tokenizer")}}))
            inner.no_padding()
            inner.no_truncation()
            inner.encode_special_tokens = True  # not kept by saving: set at every load
            return inner
        try:
            model = raw["model"]
            scores = model["vocab"] if isinstance(model["vocab"], list) else []  # Unigram's: [[piece, score], …]
            vocabulary = {piece: i for i, (piece, _) in enumerate(scores)} if scores else model["vocab"]
            added = read_added_tokens(path.parent, raw.get("added_tokens") or [], vocabulary.get,
                                      model.get("byte_fallback"))
            for setting in SAMPLING:
                model.pop(setting, None)
            for i in added.special.values():
                if i < len(scores):
                    scores[i][1] = -1e6  # with the 0 that stands there a text would become the token
            prefixed = any(unprefixed(raw.get(part), everywhere=True) != raw.get(part)
                           for part in ("normalizer", "pre_tokenizer"))
            engines = {(words, bare): engine(words, bare) for words in {False, bool(added.words)}
                       for bare in {False, prefixed}}
            inner = engines[False, False]
            inner.encode("0 a\n")  # a pattern that the engine cannot run fails here, not in the middle of a run
            for token in added.tokens:
                check_added_token(path, token, added, inner)
        except InputError:
            raise
        except BaseException as error:  # the Rust side panics with a BaseException
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise InputError(f"{path}: not a tokenizer that can be used ({one_line(error)})") from None

        def encode(text, words=False, bare=False):
            return engines[words, bare and prefixed].encode(text, add_special_tokens=False).ids

        spaced = encode(" a") != encode("a") != encode("a", bare=True)  # before every text, one that has a space too
        written = {i: content for content, i in added.special.items()} if spaced else {}

        def decode(ids):
            return decode_runs(ids, written, functools.partial(inner.decode, skip_special_tokens=False))
        return cls(encode, decode, added.special, added.silent, added.template, inner.get_vocab_size(), added.words)

    @classmethod
    def from_sentencepiece(cls, path):
        try:
            proto = bytearray(path.read_bytes())
            inner = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
            size = inner.vocab_size()
            user_defined = user_defined_pieces(proto, size)
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise InputError(f"{path}: not a sentencepiece model ({one_line(error)})") from None

        def find(content):
            ids = (inner.piece_to_id(content), inner.piece_to_id(content.replace(" ", "▁")))
            return next((i for i in ids if inner.id_to_piece(i).replace("▁", " ") == content.replace("▁", " ")), None)
        added = read_added_tokens(path.parent, [
            {"id": i, "content": inner.id_to_piece(i), "special": inner.is_control(i)}
            for i in range(size) if inner.is_control(i) or i in user_defined], find, True)
        for i in user_defined.keys() & set(added.special.values()):
            proto[user_defined[i]] = 3  # a control piece, which no text becomes
        inner = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
        # a field that comes again replaces the first: normalizer_spec (3), in it add_dummy_prefix (3), false
        unspaced = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto) + b"\x1a\x02\x18\x00")
        for token in added.tokens:
            check_added_piece(path, token, added, inner, find(token["content"]))
        config = read_if_there(path.parent / "tokenizer_config.json")
        spaced = is_legacy(config, added.template) and config.get("add_prefix_space") is not False
        behind = inner if spaced else unspaced  # behind a control token
        ids_of = {token["content"]: token["id"] for token in added.tokens}
        apart = {content for content in added.plain if ids_of[content] >= size}  # sentencepiece does not know them
        found = {False: apart, True: apart | added.words}
        split = {words: re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")").split
                 if names else lambda text: [text] for words, names in found.items()}

        def encode(text, words=False, bare=False):
            ids = []
            for part in split[words](text):
                if part in found[words]:
                    ids.append(ids_of[part])
                else:
                    ids += (unspaced if bare and not ids else behind).encode(part)
            return ids
        written = {i: content for content, i in ids_of.items() if content in added.special or i >= size}

        def decode(ids):  # sentencepiece by itself drops control tokens
            return decode_runs(ids, written, inner.decode, behind.decode)
        return cls(encode, decode, added.special, added.silent, added.template, max([size, *(i + 1 for i in written)]),
                   added.words)

    def encode(self, text, after="", answer=False):
        """text -> list of ids: those that it has in one string with the text `after` before it, or a control token.

        Never a control id, whatever the text; in an assistant's `answer` the added `words` are tokens. Where a token
        would reach over the border between `after` and the text, the text is encoded alone, without the space that some
        vocabularies put before a text. No BOS: that is the template's.
        """
        check_unicode(text)
        if self._names[answer].search(text):
            self.read_as_text.update(self._names[answer].findall(text))
        words = {"words": True} if answer and self.words else {}
        if not after:
            return self._encode(text, **words)
        if after not in self._heads:
            self._heads[after] = self._encode(after)
        head, ids = self._heads[after], self._encode(after + text, **words)
        return ids[len(head):] if ids[:len(head)] == head else self._encode(text, bare=True, **words)

    def decode(self, ids):
        """ids -> text, control tokens written out; bytes that are no UTF-8 become U+FFFD."""
        return self._decode(list(ids))

    def end_of_turn(self):
        """The id of the token with which the assistant ends its turn. InputError without a known template."""
        if self.template is None:
            raise InputError(NO_TEMPLATE)
        return self.special[TEMPLATE_TOKENS[self.template][-1]]


def decode_runs(ids, written, decode, decode_behind=None):
    """The text of ids, in which the tokens `written` {id: text} stand between runs of others; each run is decoded by
    itself, without the space that the vocabulary put before its text."""
    text, run = "", []
    for i in ids:
        if i in written:
            text, run, decode = text + decode(run) + written[i], [], decode_behind or decode
        else:
            run.append(i)
    return text + decode(run)


def check_unicode(text):
    """InputError where a text holds half a character, as JSON's "\\ud800" does: tokenizers and UTF-8 refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[max(0, error.start - 20):error.end]
        raise InputError(f"half a character at the end of {broken!r}; expected Unicode text") from None


def notice_of(names):
    """The line that says once a run which added tokens stand in texts without being read as such."""
    return f"added tokens in texts that are read as plain text: {', '.join(sorted(names))}"


def stream_text(tokenizer, ids):
    """Yields the text of an iterable of ids piece by piece, never half a character.

    Decodes a short window again with each id (the text of a token can depend on the one before it) and holds text
    back while it ends in U+FFFD, that is, in the middle of a UTF-8 sequence. Control tokens are left out.
    """
    window, shown = [], ""  # ids since the last clean cut, and the part of their text that was yielded
    for i in ids:
        if i in tokenizer.silent:
            continue
        window.append(i)
        text = tokenizer.decode(window)
        if text.endswith("\ufffd") and len(window) < 16:  # no character is longer; a model may also mean U+FFFD
            continue
        if text[len(shown):]:
            yield text[len(shown):]
        window = window[-4:]
        shown = tokenizer.decode(window)
        while window and shown.startswith("\ufffd"):  # do not begin inside a character
            window = window[1:]
            shown = tokenizer.decode(window)
    text = tokenizer.decode(window)
    if text[len(shown):]:
        yield text[len(shown):]

# ----- chat templates ------------------------------------------------------------------------------------------------

# The official templates put these first. Llama 3.1's has a fixed date: a template that reads the clock would train and
# answer on other prompts every day.
LLAMA3_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
NO_TEMPLATE = ("the tokenizer has no known chat template; expected <|start_header_id|> (Llama 3) or <|im_start|> "
               "(ChatML) among its control tokens, or a sentencepiece vocabulary (Llama 2)")
CHATML_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """messages [{"role": "system" | "user" | "assistant", "content": str}, …] -> (ids, loss_mask), two equal lists.

    loss_mask is True on the assistant's content and its end-of-turn token. The ids are those of the official template
    of the vocabulary (Llama 3.1, SmolLM2's ChatML, Llama 2). With `add_generation_prompt` the ids end where the
    assistant is to begin. InputError for a vocabulary without a known template and for malformed messages.
    """
    system, turns = check_messages(messages)
    ids, mask = [], []

    def control(*names, trained=False):
        ids.extend(tokenizer.special[name] for name in names)
        mask.extend([trained] * len(names))

    def text(string, after="", trained=False):
        new = tokenizer.encode(string, after, answer=trained)
        ids.extend(new)
        mask.extend([trained] * len(new))

    def turn(role, opening, content):  # the template's `opening` and the content are one text; an answer has a border
        if role == "assistant":
            text(opening)
            text(content, after=opening, trained=True)
        else:
            text(opening + content)

    if tokenizer.template == "llama3":
        def header(role):
            control("<|start_header_id|>")
            text(role)
            control("<|end_header_id|>")
        control("<|begin_of_text|>")
        turns = [("system", LLAMA3_SYSTEM + (system or "").strip()), *turns]
        for role, content in turns:
            header(role)
            turn(role, "\n\n", content if role == "system" else content.strip())
            control("<|eot_id|>", trained=role == "assistant")
        if add_generation_prompt:
            header("assistant")
            text("\n\n")
    elif tokenizer.template == "chatml":
        for role, content in [("system", CHATML_SYSTEM if system is None else system), *turns]:
            control("<|im_start|>")
            turn(role, f"{role}\n", content)
            control("<|im_end|>", trained=role == "assistant")
            text("\n")
        if add_generation_prompt:
            control("<|im_start|>")
            text("assistant\n")
    elif tokenizer.template == "llama2":  # every exchange is a sequence of its own, with its own BOS and EOS
        for i, (role, content) in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                raise InputError(f"message {i + 1} is from {role!r}; Llama 2's template expects user and assistant "
                                 "in turn")
            if role == "user":
                opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if i == 0 and system is not None else ""
                control("<s>")
                text(f"[INST] {(opening + content).strip()} [/INST]")
            else:
                text(f" {content.strip()} ", after="[/INST]", trained=True)
                control("</s>", trained=True)
    else:
        raise InputError(NO_TEMPLATE)
    return ids, mask


# render_chat once more, in Jinja, for programs that read the template from a model's folder; tests compare the two.
CHAT_TEMPLATES = {
    "llama3": (
        "<|begin_of_text|>{% set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n" + LLAMA3_SYSTEM.replace("\n", "\\n")
        + "' + system + '<|eot_id|>' }}"
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim"
        " + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\n" + CHATML_SYSTEM + "<|im_end|>\\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    "llama2": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% if system is not none and loop.index0 == 1 %}"
        "{{ '<s>[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content']) | trim + ' [/INST]' }}"
        "{% else %}{{ '<s>[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' </s>' }}{% endif %}"
        "{% endfor %}"),
}


# ----- training rows -------------------------------------------------------------------------------------------------


def training_example(tokenizer, messages, max_length=None):
    """messages -> (ids, labels), two lists of one length; label t is the token wanted after position t, or -100.

    The last token of the conversation is only ever a label. With `max_length` the end of the answer is cut, never the
    prompt; nothing may be left to train, which the caller sees as labels that are all -100.
    """
    ids, mask = render_chat(tokenizer, messages)
    labels = [i if trained else -100 for i, trained in zip(ids[1:], mask[1:])]
    return ids[:-1][:max_length], labels[:max_length]


def render_rows(tokenizer, rows, max_length, *, on_bad_row="stop"):
    """[(where, messages)] -> ([(where, ids, labels)], report); ids and labels are int32 arrays, see training_example.

    An answer that does not fit loses its end ("truncated"), a row with nothing left to train is dropped ("dropped").
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
    """[(where, pair_of's)] -> ([(where, prompt, chosen, rejected)], report); prompt and answers: int32 arrays of ids.

    An answer is what the assistant's turn adds to the prompt, end-of-turn token and all; every token of it is trained.
    Prompt and answer together have at most `max_length` inputs (the answer's last token is none): the end of an answer
    is cut ("truncated"), never the prompt. Pairs without room for an answer ("dropped"), with an "empty" answer or with
    two "equal" ones are left out; "faults" says where those are.
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


def rows_of_pair(prompt, chosen, rejected):
    """The two rows [(ids, labels), (ids, labels)] that a pair is, each with its own prompt; as training_example's."""
    untrained = np.full(len(prompt) - 1, -100, dtype=np.int32)
    return [(np.concatenate([prompt, answer[:-1]]), np.concatenate([untrained, answer]))
            for answer in (chosen, rejected)]


def show_example(tokenizer, ids, labels, colour=True):
    """The text of one rendered row, what is trained in green (or between ⟦ and ⟧); `labels` as training_example's."""
    begin, end = ("\x1b[30;42m", "\x1b[0m") if colour else ("⟦", "⟧")
    last = [int(labels[-1])] if labels[-1] != -100 else []  # the final token is only ever a label
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

    Epoch e goes through permutation(seed, e) of the rows, `batch_size` a step (its last step may have fewer), so the
    rows of a step depend neither on the number of ranks nor on the budget, and `consumed` rows say where to go on: a
    resume with another world size sees every row exactly once all the same.
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

    Rows are sorted by length and cut into consecutive parts, so that a part holds rows of similar length and rank r's
    i-th part (number i · world + r) costs about what the other ranks' do. The number of parts is a multiple of
    `world`; a part may be empty, and a row longer than the budget is a part of its own. The largest come first: the
    memory they took then serves the others.
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

    Packed, the rows lie one behind the other in a single row [1, sum of lengths]: `documents` are their lengths, for
    attention within each (fast.attend_apart), and `positions` [T] begin at 0 in each. Otherwise the rows lie one below
    the other, padded at their end, which causal attention never reads (documents and positions None). By default
    packed unless padding adds less than 2 %, because everything outside attention costs by the token. B · T is rounded
    up to a multiple of 8 (packed, the last document grows by that), because with other numbers of rows matrix products
    lose up to a fifth of their speed. `tokens` counts the tokens of the rows. No examples make a micro-batch of
    untrained tokens: a rank without rows takes part in every collective.
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


def rounded_up(n, multiple):
    return n + -n % multiple


def collate_pairs(pairs, shared=True):
    """[(where, prompt, chosen, rejected)] -> one packed micro-batch [1, T], a dict as collate's.

    The model predicts an answer from the prompt's last token on, so that token opens both answers:

        prompt[:-1] | prompt[-1], chosen[:-1] | prompt[-1], rejected[:-1]       the prompt once (shared)
        prompt[:-1]   prompt[-1], chosen[:-1] | prompt[:-1]   prompt[-1], rejected[:-1]                (not shared)

    The positions of both answers go on from the prompt's, their labels are their own ids, and they must not see each
    other: `documents` is [(length of a prefix, [lengths of its continuations])]. `parts` are the lengths, one after the
    other, in which the chosen and rejected answers lie, and of the filling of T up to a multiple of 8; "lengths" [N, 2]
    int64 are those of the answers alone. No pairs make a micro-batch of untrained tokens. Sharing saves the prompt's
    share of the tokens and loses nothing where that is small (prompts of 146 tokens: 1.00 s a pair against 1.15).
    """
    rows, positions, documents, parts, lengths = [], [], [], [], []
    for _, prompt, *answers in pairs:
        prefix = len(prompt) - 1
        whole = rows_of_pair(prompt, *answers)
        skipped = prefix if shared else 0
        rows += [whole[0], tuple(part[skipped:] for part in whole[1])]
        parts += [len(ids) for ids, _ in rows[-2:]]
        positions += [torch.arange(len(whole[0][0])), torch.arange(skipped, len(whole[1][0]))]
        documents += [(prefix, [len(answer) for answer in answers])] if shared else [(0, [n]) for n in parts[-2:]]
        lengths.append([len(answer) for answer in answers])
    tokens = sum(parts)
    spare = rounded_up(max(1, tokens), 8) - tokens  # a document of its own, in no part
    rows.append((np.zeros(spare, np.int32), np.full(spare, -100, np.int32)))
    ids, labels = (torch.from_numpy(np.concatenate(part)).long()[None] for part in zip(*rows))
    return {"ids": ids, "labels": labels, "positions": torch.cat([*positions, torch.arange(spare)]),
            "documents": documents + [(0, [spare])] * (spare > 0), "parts": [*parts, spare], "tokens": tokens,
            "lengths": torch.tensor(lengths, dtype=torch.long).view(-1, 2)}
