"""Text to ids and back: a tokenizer that reads the same files as transformers and gives the same ids.

Two rules:
  1. Control tokens come from the chat template alone; `<|eot_id|>` typed in a question is ordinary text.
  2. A conversation has the ids that it has as one string, but no token reaches from the prompt into the answer: a model
     that is asked sees exactly the prompt that was trained.
"""
import contextlib
import functools
import json
import re

import sentencepiece
import tokenizers

from chat import NO_TEMPLATE, follow_template, template_in
from files import InputError, one_line, read_json, read_json_if_there, require_dir
from vocabulary import (
    SAMPLING,
    TEMPLATE_TOKENS,
    check_added_piece,
    check_added_token,
    is_legacy,
    read_added_tokens,
    unprefixed,
    user_defined_pieces,
)


class Tokenizer:
    """A vocabulary with its chat template: "llama3", "chatml", "llama2", or None where it is none of these.

    `default_system` is the text that the folder's template writes by itself: with ChatML the system message of a
    conversation that has none, with Llama 3.1 the dates before every system message. With None such a conversation has
    no system block. vocabulary.py tells plain, word and control tokens apart.
    """

    def __init__(self, encode, decode, special, silent, template, size, words=frozenset()):
        self._encode, self._decode = encode, decode
        self.special = special  # {control token or word: id}; a user's text has none of these ids
        self.words = words  # the words among them; an answer may have their ids
        self.silent = silent  # ids that are not shown as text of an answer
        self.template = template
        self.size = size  # one more than the largest id that a text can have
        self.default_system = None
        self.read_as_text = set()  # control tokens and words that stood in texts and were read as plain text
        self._heads = {}  # {`after`: its ids}, see encode
        self._names = {answer: re.compile("|".join(map(re.escape, names)) or "(?!)")  # (?!) is found nowhere
                       for answer, names in ((False, special.keys()), (True, special.keys() - words))}

    @classmethod
    def from_dir(cls, directory):
        """Reads tokenizer.json (Hugging Face tokenizers) or tokenizer.model (sentencepiece), and the chat template
        of `directory`. InputError for files that cannot be read or followed."""
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

        def engine(words, bare):
            """The library's tokenizer that finds plain tokens in a text, with `words` words too; with `bare` it puts no
            space in front of the text."""
            found = added.plain | (added.words if words else set())
            inner = tokenizers.Tokenizer.from_str(json.dumps(raw | {
                "added_tokens": [token | {"special": token["content"] not in found} for token in added.tokens],
                **{part: unprefixed(raw.get(part), everywhere=bare) for part in ("normalizer", "pre_tokenizer")}}))
            inner.no_padding()
            inner.no_truncation()
            inner.encode_special_tokens = True  # control tokens typed in a text are text; the file does not keep this
            return inner
        with as_input_error(path):
            model = raw["model"]
            scores = model["vocab"] if isinstance(model["vocab"], list) else []  # Unigram's: [[piece, score], …]
            vocabulary = {piece: i for i, (piece, _) in enumerate(scores)} if scores else model["vocab"]
            added = read_added_tokens(path.parent, raw.get("added_tokens") or [], vocabulary.get,
                                      model.get("byte_fallback"))
            for setting in SAMPLING:
                model.pop(setting, None)
            for i in added.special.values():
                if i < len(scores):
                    scores[i][1] = -1e6  # at the file's 0, the best score of all, a text would become the token
            prefixed = any(unprefixed(raw.get(part), everywhere=True) != raw.get(part)
                           for part in ("normalizer", "pre_tokenizer"))
            engines = {(words, bare): engine(words, bare) for words in {False, bool(added.words)}
                       for bare in {False, prefixed}}
            inner = engines[False, False]
            inner.encode("0 a\n")  # a pattern that the engine cannot run fails here, not in the middle of a run
            for token in added.tokens:
                check_added_token(path, token, added, inner)

        def encode(text, words=False, bare=False):
            return engines[words, bare and prefixed].encode(text, add_special_tokens=False).ids

        # whether a space is put in front of every text, also in front of one that begins with a space
        spaced = encode(" a") != encode("a") != encode("a", bare=True)
        written = {i: content for content, i in added.special.items()} if spaced else {}

        def decode(ids):
            return decode_runs(ids, written, functools.partial(inner.decode, skip_special_tokens=False))
        ids = [*inner.get_vocab(with_added_tokens=False).values(), *added.ids_in_text()]
        return cls(encode, decode, added.special, added.silent, added.template, 1 + max(ids, default=-1), added.words)

    @classmethod
    def from_sentencepiece(cls, path):
        try:
            proto = bytearray(path.read_bytes())
            inner = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
            size = inner.vocab_size()
            user_defined = user_defined_pieces(proto, size)
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise InputError(f"{path}: not a sentencepiece model ({one_line(error)})") from None

        def find(content):  # its id among the pieces, which may write a space as ▁; else None
            ids = (inner.piece_to_id(content), inner.piece_to_id(content.replace(" ", "▁")))
            return next((i for i in ids if inner.id_to_piece(i).replace("▁", " ") == content.replace("▁", " ")), None)
        added = read_added_tokens(path.parent, [
            {"id": i, "content": inner.id_to_piece(i), "special": inner.is_control(i)}
            for i in range(size) if inner.is_control(i) or i in user_defined], find, True)
        for i in user_defined.keys() & set(added.special.values()):
            proto[user_defined[i]] = 3  # the type of a control piece: texts do not become it
        inner = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
        # in protobuf the last value of a field counts: normalizer_spec (3), in it add_dummy_prefix (3), is false
        unspaced = sentencepiece.SentencePieceProcessor(model_proto=bytes(proto) + b"\x1a\x02\x18\x00")
        for token in added.tokens:
            check_added_piece(path, token, added, inner, find(token["content"]))
        config = read_json_if_there(path.parent / "tokenizer_config.json")
        spaced = is_legacy(config, added.template) and config.get("add_prefix_space") is not False
        behind = inner if spaced else unspaced  # encodes a text behind a control token
        ids_of = {token["content"]: token["id"] for token in added.tokens}
        apart = {content for content in added.plain if ids_of[content] >= size}  # not known to sentencepiece
        found = {False: apart, True: apart | added.words}  # by `words`: the tokens at which a text is split
        longest_first = {words: sorted(names, key=len, reverse=True) for words, names in found.items()}
        split = {words: re.compile("(" + "|".join(map(re.escape, names)) + ")").split if names else lambda text: [text]
                 for words, names in longest_first.items()}

        def encode(text, words=False, bare=False):
            ids = []
            for part in split[words](text):
                if part in found[words]:
                    ids.append(ids_of[part])
                else:
                    ids += (unspaced if bare and not ids else behind).encode(part)
            return ids
        written = {i: content for content, i in ids_of.items() if content in added.special or i >= size}

        def decode(ids):  # sentencepiece alone would drop control tokens
            known = [i for i in ids if i < size or i in written]  # a model may have more rows than there are tokens
            return decode_runs(known, written, inner.decode, behind.decode)
        return cls(encode, decode, added.special, added.silent, added.template,
                   max([size, *(i + 1 for i in added.ids_in_text())]), added.words)

    def encode(self, text, after="", answer=False):
        r"""text -> list of ids, as in one string with the text `after` (if empty, a control token) before it.

            encode("Yes.", after="assistant\n")      the ids of "assistant\nYes." without those of "assistant\n"
            encode("<think>Hm.", answer=True)       begins with the id of the word <think>; in a question it is text

        No text has the id of a control token. Where a token would reach over the border between `after` and the text,
        the text is encoded alone, without the space that some vocabularies put in front. BOS is left to the template.
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
        if ids[:len(head)] == head:
            return ids[len(head):]
        return self._encode(text, bare=True, **words)  # a token reaches over the border

    def decode(self, ids):
        """ids -> text, control tokens written out; bytes that are not UTF-8 become U+FFFD."""
        return self._decode(list(ids))

    def end_of_turn(self):
        """The id of the token with which the assistant ends its turn. InputError without a known template."""
        if self.template is None:
            raise InputError(NO_TEMPLATE)
        return self.special[TEMPLATE_TOKENS[self.template][-1]]


@contextlib.contextmanager
def as_input_error(path):
    """Reports every error of the tokenizers library as InputError; a panic of its Rust code is a BaseException."""
    try:
        yield
    except (InputError, OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{path}: not a tokenizer that can be used ({one_line(error)})") from None


def decode_runs(ids, written, decode, decode_behind=None):
    """The text of ids: tokens of `written` {id: text} as they are written there, the runs between them decoded.

    Each run is decoded by itself, because `decode` leaves out the space that the vocabulary puts in front of a text;
    `decode_behind` decodes the runs behind the first written token (default: `decode` as well).
    """
    text, run = "", []
    for i in ids:
        if i in written:
            text, run, decode = text + decode(run) + written[i], [], decode_behind or decode
        else:
            run.append(i)
    return text + decode(run)


def check_unicode(text):
    """InputError for a text with half a character, such as JSON's "\\ud800": tokenizers and UTF-8 refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[max(0, error.start - 20):error.end]
        raise InputError(f"half a character at the end of {broken!r}; expected Unicode text") from None


def notice_of(names):
    """A line for the user: the added tokens that stood in texts and were read as plain text; printed once a run."""
    return f"added tokens in texts that are read as plain text: {', '.join(sorted(names))}"


def stream_text(tokenizer, ids):
    """Yields the text of an iterable of ids piece by piece, never half a character.

    Decodes a short window again with each id (the text of a token can depend on the one before it) and holds text
    back while it ends in U+FFFD, that is, in the middle of a UTF-8 sequence. `silent` ids are left out.
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
