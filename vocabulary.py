"""Tokenizer files of a model folder: the tokens they add to a vocabulary, and which texts may become them.

    tokenizer.json            added_tokens                        tokenizer.model      control and user-defined pieces
    tokenizer_config.json     added_tokens_decoder, eos_token, …  added_tokens.json    {content: id}
    special_tokens_map.json   eos_token, …                        generation_config.json, config.json   eos_token_id, …

An added token is one of three kinds. White space and single characters mark nothing: any text becomes them. Words,
such as <think>, are read in an assistant's answer, and in other texts they are plain text. The others are control
tokens, which no text becomes: those marked special, the chat template's, stop ids, BOS, EOS and PAD.

Source: transformers' loading of the same files, which the tests compare with. tokenizer.py uses this.
"""
import json
from dataclasses import dataclass

import sentencepiece

from files import InputError, one_line, read_json

TEMPLATE_TOKENS = {  # the control tokens of each chat template; the last of them ends the assistant's turn
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": ("<s>", "</s>")}
FLAGS = {"special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
SAMPLING = ("dropout", "alpha", "nbest_size")  # with one of these in tokenizer.json a text has many encodings

# ----- added tokens --------------------------------------------------------------------------------------------------


@dataclass
class AddedTokens:
    """The tokens that a folder's files add to its vocabulary; sets are of their contents."""
    tokens: list  # [{"id", "content" and FLAGS}, …] by id
    template: str | None  # the chat template whose control tokens are there
    plain: set  # any text becomes them
    words: set  # an answer becomes them
    special: dict  # {content: id} of all but the plain ones
    silent: set  # ids that are no text of an answer: the control tokens' and the stop ids

    def ids_in_text(self):
        """The ids that a text may become: those of plain tokens and words."""
        return [token["id"] for token in self.tokens if token["content"] in self.plain | self.words]


def read_added_tokens(directory, own, find, from_sentencepiece):
    """The AddedTokens of a folder; `own` are those of its vocabulary's file, find(content) gives a word's id there.

    As in transformers, the added_tokens_decoder of tokenizer_config.json goes before `own`, and words of the vocabulary
    that are named as eos_token, additional_special_tokens, … are added tokens. InputError for a token with two ids or
    none, and for a control token that would change the text beside it.
    """
    config = read_if_there(directory / "tokenizer_config.json")
    named = read_if_there(directory / "special_tokens_map.json") | config
    tokens, contents = {}, {}

    def add(file, token):
        i, content = token["id"], token["content"]
        if type(i) is not int:
            raise TypeError(f"{content!r} has the id {i!r}")
        known = tokens.setdefault(content, token)
        if known["id"] != i or contents.setdefault(i, content) != content:
            raise InputError(f"{directory / file}: gives the added token {content!r} the id {i}; expected "
                             + (f"{known['id']}, its id elsewhere" if known["id"] != i else
                                f"another, because {contents[i]!r} has it"))
        tokens[content] = FLAGS | known | token
    try:
        for token in own:
            add("tokenizer.json", token)
        for i, token in (config.get("added_tokens_decoder") or {}).items():
            add("tokenizer_config.json", token | {"id": int(i)})
        roles = contents_of(named, "bos_token", "pad_token")
        needed = contents_of(named, "eos_token", "additional_special_tokens", "extra_special_tokens")
        for content, i in read_if_there(directory / "added_tokens.json").items():
            add("added_tokens.json", tokens.get(content, {"content": content}) | {"id": i})
        for content in needed + roles:
            i = tokens[content]["id"] if content in tokens else find(content)
            if i is not None and not is_plain(content):
                add("tokenizer_config.json", {"id": i, "content": content, "special": True})
            elif i is None and content in needed:
                raise InputError(f"{directory}: tokenizer_config.json or special_tokens_map.json names {content!r}, "
                                 "which has no id; expected it in the vocabulary or among the added tokens")
        settings = [read_if_there(directory / name) for name in ("generation_config.json", "config.json")]
        stops, *others = (ids_of(settings, key) for key in ("eos_token_id", "bos_token_id", "pad_token_id"))
        ids = stops.union(*others)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{directory}: tokenizer.json or a file beside it has tokens in a form that is not known "
                         f"({type(error).__name__}: {one_line(error)}); expected transformers'") from None
    template = next((name for name, control in TEMPLATE_TOKENS.items()
                     if tokens.keys() >= {*control} and (name != "llama2" or from_sentencepiece)), None)
    of_template = TEMPLATE_TOKENS.get(template, ())
    for content in of_template:
        wrong = [flag for flag in ("lstrip", "rstrip", "single_word") if tokens[content][flag]]
        if wrong:
            raise InputError(f"{directory}: the control token {content!r} has {', '.join(wrong)} true; expected false, "
                             "so that the text beside it stays as it is")
    control = {content for content, token in tokens.items()
               if token["special"] or token["id"] in ids or content in of_template or content in needed + roles}
    plain = {content for content in tokens.keys() - control if is_plain(content)}
    return AddedTokens(
        tokens=sorted(tokens.values(), key=lambda token: token["id"]), template=template, plain=plain,
        words=tokens.keys() - control - plain,
        special={content: token["id"] for content, token in tokens.items() if content not in plain},
        silent=stops | {tokens[content]["id"] for content in control})


def read_if_there(path):
    return read_json(path) if path.is_file() else {}


def contents_of(named, *keys):
    """The contents that stand under `keys`: of a token, a list of tokens or a dict of them; a token may be a dict."""
    found = []
    for value in filter(None, map(named.get, keys)):
        one = isinstance(value, str) or "content" in value
        several = [value] if one else value.values() if isinstance(value, dict) else value
        found += [token["content"] if isinstance(token, dict) else token for token in several]
    return found


def ids_of(settings, key):
    """The ids under `key` in the first of the dicts `settings` that has some; a set."""
    given = next((one[key] for one in settings if one.get(key) is not None), [])
    return set(given if isinstance(given, list) else [given])


def is_plain(content):
    return len(content) == 1 or not content.replace("▁", " ").strip()

# ----- the two kinds of files ----------------------------------------------------------------------------------------


def unprefixed(part, everywhere):
    """A normalizer or pre_tokenizer of tokenizer.json as it works behind other text: Metaspace's "first" puts a space
    at the start of a string alone. With `everywhere` no part puts a space before a text."""
    if not isinstance(part, dict):
        return part
    part = {key: [unprefixed(one, everywhere) for one in value] if key in ("normalizers", "pretokenizers") else value
            for key, value in part.items()}
    if part.get("type") == "Metaspace" and (everywhere or part.get("prepend_scheme") == "first"):
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    if part.get("type") == "Prepend" and everywhere:
        return {"type": "Sequence", "normalizers": []}
    return part | {"add_prefix_space": False} if everywhere and "add_prefix_space" in part else part


def user_defined_pieces(proto, count):
    """{id: place of its type} of the user-defined pieces in the bytes of a sentencepiece model of `count` pieces.

    A protobuf message, which begins with the pieces: 0x0A, size, and then 0x0A, size, text, 0x15, score in four bytes;
    unless the piece is an ordinary one, 0x18, type (3: control, 4: user-defined). ValueError for other bytes.
    """
    places, start = {}, 0
    for i in range(count):
        if proto[start] != 0x0A:
            raise ValueError(f"piece {i} does not begin with 0x0A")
        size, shift, start = proto[start + 1] & 127, 0, start + 2
        while proto[start - 1] > 127:  # sizes come seven bits at a time, the lowest first
            shift += 7
            size |= (proto[start] & 127) << shift
            start += 1
        start += size
        if proto[start - 7] == 0x15 and proto[start - 2:start] == b"\x18\x04":
            places[i] = start - 1
    return places


def check_added_token(path, token, added, inner):
    """InputError unless the library's tokenizer `inner` of a tokenizer.json keeps the token as the files have it."""
    i, content = token["id"], token["content"]
    if inner.token_to_id(content) != i:
        raise InputError(f"{path}: the added token {content!r} has the id {i} in the files; expected "
                         f"{inner.token_to_id(content)}, which the tokenizers library gives it")
    unknown, *found = (inner.encode(text, add_special_tokens=False).ids
                       for text in ("\U0010fffd", content, f"x{content} x"))
    if content in added.special.keys() - added.words and i not in unknown and any(i in ids for ids in found):
        raise InputError(f"{path}: the text {content!r} becomes the control token of that name, because the model's "
                         "vocabulary has it as a word; expected a model whose texts become no control token")
    if added.template in ("llama3", "chatml") and content in TEMPLATE_TOKENS[added.template] and token["normalized"] \
            and inner.normalizer:  # Llama 2's are ids by its own code, which looks for them in no text
        normal = inner.normalizer.normalize_str
        if normal(f"{content} x {content}") != content + normal(" x ") + content:
            raise InputError(f"{path}: the control token {content!r} has normalized true, and the normalizer changes "
                             "it or the text beside it; expected false")


def check_added_piece(path, token, added, inner, known):
    """As check_added_token for a sentencepiece model; `known` is its own id for the token's content, or None."""
    i, content, size = token["id"], token["content"], inner.vocab_size()
    if (known is None and i < size) or known not in (None, i):
        raise InputError(f"{path}: the added token {content!r} has the id {i} in the files beside it; expected "
                         f"{known if known is not None else f'one from {size} on, behind the vocabulary'}")
    if known is not None and content in added.special and not (inner.is_control(i) or inner.is_unknown(i)):
        raise InputError(f"{path}: the added token {content!r} is an ordinary piece, which texts become; expected a "
                         "control piece or a user-defined one")
    wrong = [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]
    if wrong and (content in added.words or content in added.plain):
        raise InputError(f"{path}: the added token {content!r} has {', '.join(wrong)} true; expected false, or "
                         "tokenizer.json")

# ----- a folder that others serve ------------------------------------------------------------------------------------


def settle(folder, template):
    """Edits the tokenizer files of an exported folder so that programs that serve it encode as Tokenizer does.

    Nothing is drawn at random. transformers reads tokenizer.json as it stands, where for a "LlamaTokenizer" or a
    "GPT2Tokenizer" it builds another pipeline; for a sentencepiece model alone it is told where that puts its space.
    """
    def write(path, value):
        path.write_text(json.dumps(value, indent=2))  # in ASCII: a setting may hold half a character
    path, config = folder / "tokenizer.json", read_if_there(folder / "tokenizer_config.json")
    if path.is_file():
        raw = read_json(path)
        if any(raw["model"].get(setting) is not None for setting in SAMPLING):
            model = {key: value for key, value in raw["model"].items() if key not in SAMPLING}
            write(path, raw | {"model": model})
        write(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    else:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        spaced = inner.encode("a", out_type=str)[0].startswith("▁")
        write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"} | config | {
            "legacy": is_legacy(config, template),
            "add_prefix_space": spaced and config.get("add_prefix_space") is not False})


def is_legacy(config, template):
    """Whether a sentencepiece model's space stands behind every control token: as transformers' "legacy" says, or else
    for Llama 2, whose own code puts it there."""
    return template == "llama2" if config.get("legacy") is None else config["legacy"]
