"""Text to tokens: tokenizers, the chat templates, and the loss mask.

A conversation becomes ids and a mask that marks what is trained: the assistant's words and its end-of-turn token,
nothing else. Three rules, each of which others broke:
  1. Control tokens come from the template alone; `<|eot_id|>` typed in a question is ordinary text.
  2. Segments are tokenised apart and their ids joined, so the border between prompt and answer is exact.
  3. The mask goes by position, never by `id == pad`, because pad and end-of-turn are often the same id.
"""
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
from messages import check_messages
from rows import note_bad_row, random_number

# ----- tokenizer -----------------------------------------------------------------------------------------------------


class Tokenizer:
    """A vocabulary with its chat template: "llama3", "chatml", "llama2", or None where it is none of these.

    `default_system` is the text that the template of the model's folder says unasked: with ChatML the system text of a
    conversation without one, with Llama 3.1 the dates before every system text. None: it says nothing, and a
    conversation without a system message has no system block.
    """

    def __init__(self, encode, decode, special, silent, template, size, default_system=None):
        self._encode, self._decode = encode, decode
        self.special = special  # {added token: id}: none of them comes out of text
        self.silent = silent  # the ids of those that are no part of an answer's text
        self.template = template
        self.size = size  # one more than the largest id that text gives
        self.default_system = default_system

    @classmethod
    def from_dir(cls, directory):
        """Reads tokenizer.json (Hugging Face tokenizers) or tokenizer.model (sentencepiece) in `directory`, and what
        its chat template says. InputError where that is none of ours, or says what cannot be told from its source."""
        directory = require_dir(directory, "a model (with tokenizer.json or tokenizer.model)")
        if (directory / "tokenizer.json").is_file():
            tokenizer = cls.from_tokenizer_json(directory / "tokenizer.json")
        elif (directory / "tokenizer.model").is_file():
            tokenizer = cls.from_sentencepiece(directory / "tokenizer.model")
        else:
            raise InputError(f"{directory}: no tokenizer; expected tokenizer.json or tokenizer.model")
        follow_template(tokenizer, *template_in(directory))
        return tokenizer

    @classmethod
    def from_tokenizer_json(cls, path):
        raw = read_json(path)
        added = raw.get("added_tokens") or []
        try:
            silent = {token["id"] for token in added if token["special"]}
            for token in added:  # also those not marked special would otherwise be found in a user's text
                token["special"] = True
            inner = tokenizers.Tokenizer.from_str(json.dumps(raw))
            inner.no_padding()
            inner.no_truncation()
            inner.encode_special_tokens = True  # not kept by saving: set at every load
            special = {token["content"]: token["id"] for token in added}
            inner.encode("0 a\n")  # a pattern that the engine cannot run fails here, not in the middle of a run
        except BaseException as error:  # the Rust side panics with a BaseException
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise InputError(f"{path}: not a tokenizer that can be used ({one_line(error)})") from None

        def encode(text):
            return inner.encode(text, add_special_tokens=False).ids

        def decode(ids):
            return inner.decode(ids, skip_special_tokens=False)
        if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"} <= set(special):
            template = "llama3"
        elif {"<|im_start|>", "<|im_end|>"} <= set(special):
            template = "chatml"
        elif raw.get("model", {}).get("byte_fallback") and {"<s>", "</s>"} <= set(special):
            template = "llama2"  # a sentencepiece vocabulary converted to tokenizer.json
        else:
            template = None
        size = 1 + max(inner.get_vocab(with_added_tokens=False).values(), default=-1)
        return cls(encode, decode, special, silent, template, size)

    @classmethod
    def from_sentencepiece(cls, path):
        try:
            inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not a sentencepiece model ({one_line(error)})") from None
        special = {inner.id_to_piece(i): i for i in range(inner.vocab_size()) if inner.is_control(i)}
        template = "llama2" if {"<s>", "</s>"} <= set(special) else None

        def decode(ids):  # piece by piece, because sentencepiece drops control tokens
            text, run = "", []
            for i in ids:
                if i >= inner.vocab_size():
                    continue  # one of the rows with which a model fills up its vocabulary
                if inner.is_control(i):
                    text, run = text + inner.decode(run) + inner.id_to_piece(i), []
                else:
                    run.append(i)
            return text + inner.decode(run)
        return cls(inner.encode, decode, special, set(special.values()), template, inner.vocab_size())

    def encode(self, text):
        """text -> list of ids. Never a control id, whatever the text; no BOS: that is the template's."""
        check_unicode(text)
        return self._encode(text)

    def decode(self, ids):
        """ids -> text, control tokens written out; bytes that are no UTF-8 become U+FFFD."""
        return self._decode(list(ids))

    def end_of_turn(self):
        """The id of the token with which the assistant ends its turn. InputError without a known template."""
        if self.template is None:
            raise InputError(NO_TEMPLATE)
        return self.special[{"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "llama2": "</s>"}[self.template]]


def check_unicode(text):
    """InputError where a text holds half a character, as JSON's "\\ud800" does: tokenizers and UTF-8 refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[max(0, error.start - 20):error.end]
        raise InputError(f"half a character at the end of {broken!r}; expected Unicode text") from None


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


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """messages [{"role": "system" | "user" | "assistant", "content": str}, …] -> (ids, loss_mask), two equal lists.

    loss_mask is True on the assistant's content and its end-of-turn token, unless the message has "train": False. The
    ids are those of the official template of the vocabulary (Llama 3.1, ChatML, Llama 2), with the tokenizer's
    `default_system`. With `add_generation_prompt` the ids end where the assistant is to begin. InputError for a
    vocabulary without a known template and for malformed messages.
    """
    system, turns = check_messages(messages)
    ids, mask = [], []

    def control(*names, trained=False):
        ids.extend(tokenizer.special[name] for name in names)
        mask.extend([trained] * len(names))

    def text(string, trained=False):
        new = tokenizer.encode(string)
        ids.extend(new)
        mask.extend([trained] * len(new))

    if tokenizer.template == "llama3":
        def header(role):
            control("<|start_header_id|>")
            text(role)
            control("<|end_header_id|>")
            text("\n\n")
        control("<|begin_of_text|>")
        if system is not None or tokenizer.default_system is not None:
            turns = [("system", (tokenizer.default_system or "") + (system or "").strip(), False), *turns]
        for role, content, trained in turns:
            header(role)
            text(content if role == "system" else content.strip(), trained=trained)
            control("<|eot_id|>", trained=trained)
        if add_generation_prompt:
            header("assistant")
    elif tokenizer.template == "chatml":
        system = tokenizer.default_system if system is None else system
        for role, content, trained in [("system", system, False), *turns] if system is not None else turns:
            control("<|im_start|>")
            if role == "assistant":
                text("assistant\n")
                text(content, trained=trained)
            else:
                text(f"{role}\n{content}")
            control("<|im_end|>", trained=trained)
            text("\n")
        if add_generation_prompt:
            control("<|im_start|>")
            text("assistant\n")
    elif tokenizer.template == "llama2":  # every exchange is a sequence of its own, with its own BOS and EOS
        for i, (role, content, trained) in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                raise InputError(f"message {i + 1} is from {role!r}; Llama 2's template expects user and assistant "
                                 "in turn")
            if role == "user":
                opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if i == 0 and system is not None else ""
                control("<s>")
                text(f"[INST] {(opening + content).strip()} [/INST]")
            else:
                text(content.strip() + " ", trained=trained)
                control("</s>", trained=trained)
    else:
        raise InputError(NO_TEMPLATE)
    return ids, mask


def check_vocabulary(tokenizer, vocab_size, directory):
    """InputError where text or the chat template gives an id for which a model of `vocab_size` rows has none.

    Other added tokens may lie beyond the rows, as a padding token often does: nothing here gives their ids.
    """
    talk = [{"role": role, "content": role} for role in ("user", "assistant")]
    largest = max([tokenizer.size - 1, *(render_chat(tokenizer, talk)[0] if tokenizer.template else ())])
    if largest >= vocab_size:
        raise InputError(f"{directory}: its tokenizer gives ids up to {largest}; expected all below vocab_size, "
                         f"{vocab_size} in config.json")


# render_chat once more, in Jinja, for programs that read a chat template from a model's folder; tests compare the two.
# BLOCK: the system block of a conversation without a system message; DEFAULT: the text before every system message.
CHAT_TEMPLATES = {
    "llama3": (
        "<|begin_of_text|>BLOCK{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{% if message['role'] == 'system' %}{{ 'DEFAULT' }}{% endif %}{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"),
    "chatml": (
        "BLOCK{% for message in messages %}"
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
# by which a template's source is known, and how a system block begins and ends there
MARKS = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", "llama2": "[INST]"}
SYSTEM_BLOCK = {"llama3": ("<|start_header_id|>system<|end_header_id|>\\n\\n", "<|eot_id|>"),
                "chatml": ("<|im_start|>system\\n", "<|im_end|>"), "llama2": ("<<SYS>>\\n", "\\n<</SYS>>")}


def chat_template(tokenizer):
    """The Jinja source with which other programs render conversations as render_chat does.

    They tokenise the text as one string; so Llama 2's has the space that its tokenizer puts before an answer. Control
    tokens are written out, because bos_token and eos_token are whatever the settings of a folder say.
    """
    name, default, block = tokenizer.template, tokenizer.default_system, ""
    quoted = (default or "").replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    if default is not None:
        text = quoted.join(SYSTEM_BLOCK[name]) + ("\\n" if name == "chatml" else "")
        block = "{% if messages[0]['role'] != 'system' %}{{ '" + text + "' }}{% endif %}"
    return CHAT_TEMPLATES[name].replace("DEFAULT", quoted).replace("BLOCK", block)


def template_in(directory):
    """(file, Jinja source) of the chat template in a model's folder, the one that transformers takes: before that of
    tokenizer_config.json chat_template.jinja, of a list the one named "default". (None, None): the folder has none."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    path = directory / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"),
                     found)
    if found is None:
        return None, None
    if not isinstance(found, str):
        raise InputError(f"{path}: chat_template is of type {type(found).__name__}; expected Jinja text, or a list of "
                         'named ones with a "default"')
    return path, found


def follow_template(tokenizer, path, source):
    """Sets template and default_system of a tokenizer as the chat template of its folder has them; see template_in.

    Nothing here runs Jinja: its source is searched, and refused where it may say something that ours does not.
    """
    if source is None:  # a base model learns the official prompt, of which Llama 3.1's has dates
        tokenizer.default_system = LLAMA3_SYSTEM if tokenizer.template == "llama3" else None
    if source is None or tokenizer.template is None:
        return

    def refuse(what):
        raise InputError(f"{path}: the chat template {what}; expected Llama 3's, ChatML or Llama 2's, with one default "
                         "system text or none. A folder without chat template is taken for a base model's")
    more = {"chatml": {"<|im_start|>", "<|im_end|>"}, "llama2": {"<s>", "</s>"}}  # that a vocabulary may also serve
    possible = [tokenizer.template, *(name for name in more if more[name] <= set(tokenizer.special))]
    name = next((name for name in possible if MARKS[name] in source), None)
    if name is None:
        refuse(f"has no {MARKS[tokenizer.template]}")
    if name == "chatml" and re.search("bos_token|strftime_now", source):
        refuse("writes bos_token or the day's date, which our ChatML does not")
    texts = default_systems(source, *SYSTEM_BLOCK[name])
    if name == "llama3" and LLAMA3_SYSTEM.partition("\n")[0] in source:
        texts = {LLAMA3_SYSTEM}
    elif texts is None or len(texts) > 1:
        refuse("has a default system text that depends on more than the conversation")
    elif texts and name != "chatml":
        refuse(f"has the default system text {min(texts)[:40]!r}, which ours does not")
    tokenizer.template, tokenizer.default_system = name, next(iter(texts), None)


def default_systems(source, begin, end):
    """The texts that the source of a chat template says by itself in a system block from `begin` to `end`: a set, None
    where that cannot be told. They stand between the two, or in a message, or a variable is set to them."""
    # transformers once wrote its switched-off default for Llama 2 into folders: a branch that is never taken
    source = re.sub(r"\{%-? elif false == true .*?(?=\{%-? (?:else|endif))", "", source, flags=re.DOTALL)
    begin, end = (re.escape(one).replace(r"\\n", r"(?:\\n|\n)") for one in (begin, end))
    text = r"((?:(?!\1)[^\\]|\\.)"  # of a string that ends with the quotation mark that is group 1
    texts = [found for pattern in (rf"(['\"]){begin}{text}*?){end}", rf"set\s+\w*system\w*\s*=\s*(['\"]){text}+)\1",
                                   rf"['\"]system['\"]\s*,\s*['\"]content['\"]\s*:\s*(['\"]){text}*)\1")
             for _, found in re.findall(pattern, source)]
    try:
        texts = [found.encode("ascii", "backslashreplace").decode("unicode-escape") for found in texts]  # Jinja's way
    except UnicodeDecodeError:
        return None
    texts += re.findall(rf"(?:^|[%}}]}})\s*{begin}([^{{}}]*?){end}", source)  # outside of Jinja's brackets
    # otherwise an expression must follow: the text of the conversation's own system message
    if not texts and re.search(begin + r"(?!['\"]\s*(?:[+~]|-?\}\}\s*\{\{)|\s*\{\{)", source):
        return None
    return set(texts)


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
