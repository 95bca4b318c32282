r"""The tokens that the files of a model folder add to its vocabulary, and in which texts they are tokens.

    plain      "    ", "\n\n", "肺"             in every text: white space and single characters
    words      <think>, </think>             in an assistant's answer; elsewhere they are split up like any text
    control    <|im_end|>, </s>, <pad>       in no text: marked special, the chat template's, stop ids, BOS, EOS, PAD

They stand in these files:

    tokenizer.json            added_tokens                        tokenizer.model      control and user-defined pieces
    tokenizer_config.json     added_tokens_decoder, eos_token, …  added_tokens.json    {content: id}
    special_tokens_map.json   eos_token, …                        generation_config.json, config.json   eos_token_id, …

Source: transformers' loading of the same files, which the tests compare with. tokenizer.py uses this.
"""
import json
from dataclasses import dataclass

import sentencepiece

from files import InputError, one_line, read_json, read_json_if_there

TEMPLATE_TOKENS = {  # the control tokens of each chat template; the last of them ends the assistant's turn
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": ("<s>", "</s>")}
FLAGS = {"special": False, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
SAMPLING = ("dropout", "alpha", "nbest_size")  # with one of these tokenizer.json encodes a text at random

# ----- added tokens --------------------------------------------------------------------------------------------------


@dataclass
class AddedTokens:
    """The tokens that a folder's files add to its vocabulary. A token's content is its text, such as "<|im_end|>"."""
    tokens: list  # [{"id", "content" and FLAGS}, …] by id
    template: str | None  # the chat template whose control tokens are there
    plain: set  # contents of the plain ones
    words: set  # contents of the words
    special: dict  # {content: id} of words and control tokens
    silent: set  # ids that are not shown as text of an answer: control tokens and stop ids

    def ids_in_text(self):
        """The ids that a text may have: those of plain tokens and words."""
        return [token["id"] for token in self.tokens if token["content"] in self.plain | self.words]


def read_added_tokens(directory, listed, find, from_sentencepiece):
    """The AddedTokens of a folder.

    listed: those of tokenizer.json or tokenizer.model; find(content) -> its id in that file's vocabulary, or None;
    from_sentencepiece: whether the vocabulary came from sentencepiece, as Llama 2's did. As in transformers, the
    added_tokens_decoder of tokenizer_config.json goes before `listed`, and a piece of the vocabulary that is named as
    eos_token, additional_special_tokens, … is an added token. InputError for a token with two ids or none, and for a
    control token that would change the text beside it.
    """
    config = read_json_if_there(directory / "tokenizer_config.json")
    named = read_json_if_there(directory / "special_tokens_map.json") | config
    tokens, contents = {}, {}  # by content, and the content by id

    def add(file, token):  # a token read later keeps the flags it does not state
        i, content = token["id"], token["content"]
        if type(i) is not int:
            raise TypeError(f"{content!r} has the id {i!r}")
        known = tokens.setdefault(content, token)
        wrong = f"{directory / file}: gives the added token {content!r} the id {i}; expected"
        if known["id"] != i:
            raise InputError(f"{wrong} {known['id']}, its id elsewhere")
        if contents.setdefault(i, content) != content:
            raise InputError(f"{wrong} another, because {contents[i]!r} has it")
        tokens[content] = FLAGS | known | token
    try:
        for token in listed:
            add("tokenizer.json", token)
        for i, token in (config.get("added_tokens_decoder") or {}).items():
            add("tokenizer_config.json", token | {"id": int(i)})
        needed = contents_of(named, "eos_token", "additional_special_tokens", "extra_special_tokens")
        named_control = needed + contents_of(named, "bos_token", "pad_token")
        for content, i in read_json_if_there(directory / "added_tokens.json").items():
            add("added_tokens.json", tokens.get(content, {"content": content}) | {"id": i})
        for content in named_control:
            i = tokens[content]["id"] if content in tokens else find(content)
            if i is not None and not is_plain(content):
                add("tokenizer_config.json", {"id": i, "content": content, "special": True})
            elif i is None and content in needed:
                raise InputError(f"{directory}: tokenizer_config.json or special_tokens_map.json names {content!r}, "
                                 "which has no id; expected it in the vocabulary or among the added tokens")
        settings = [read_json_if_there(directory / name) for name in ("generation_config.json", "config.json")]
        stops, *others = (ids_of(settings, key) for key in ("eos_token_id", "bos_token_id", "pad_token_id"))
        ids = stops.union(*others)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):  # a ValueError too
            raise
        raise InputError(f"{directory}: tokenizer.json or a file beside it has tokens in a form that is not known "
                         f"({type(error).__name__}: {one_line(error)}); expected transformers'") from None
    # many vocabularies have <s> and </s>, but only Llama 2's sentencepiece goes with its template
    template = next((name for name, control in TEMPLATE_TOKENS.items()
                     if tokens.keys() >= {*control} and (name != "llama2" or from_sentencepiece)), None)
    of_template = TEMPLATE_TOKENS.get(template, ())
    for content in of_template:
        wrong = [flag for flag in ("lstrip", "rstrip", "single_word") if tokens[content][flag]]
        if wrong:
            raise InputError(f"{directory}: the control token {content!r} has {', '.join(wrong)} true; expected false, "
                             "so that the text beside it stays as it is")
    control = {content for content, token in tokens.items()
               if token["special"] or token["id"] in ids or content in of_template or content in named_control}
    plain = {content for content in tokens.keys() - control if is_plain(content)}
    return AddedTokens(
        tokens=sorted(tokens.values(), key=lambda token: token["id"]), template=template, plain=plain,
        words=tokens.keys() - control - plain,
        special={content: token["id"] for content, token in tokens.items() if content not in plain},
        silent=stops | {tokens[content]["id"] for content in control})


def contents_of(named, *keys):
    """The contents under `keys` of a settings file, which has there a token, a list or a dict of them:

        "eos_token": "</s>"        "eos_token": {"content": "</s>", …}        "extra_special_tokens": ["<a>", "<b>"]
    """
    found = []
    for value in filter(None, map(named.get, keys)):
        one = isinstance(value, str) or "content" in value
        several = [value] if one else value.values() if isinstance(value, dict) else value
        found += [token["content"] if isinstance(token, dict) else token for token in several]
    return found


def ids_of(settings, key):
    """The set of ids under `key`, a number or a list, in the first of the dicts `settings` that has it."""
    given = next((one[key] for one in settings if one.get(key) is not None), [])
    return set(given if isinstance(given, list) else [given])


def is_plain(content):
    """Whether a token is a single character or white space; sentencepiece writes a space as ▁."""
    return len(content) == 1 or not content.replace("▁", " ").strip()

# ----- the two kinds of files ----------------------------------------------------------------------------------------


def unprefixed(part, everywhere):
    """A normalizer or pre_tokenizer of tokenizer.json, changed so that it puts no space in front of a text.

    Without `everywhere` only Metaspace's scheme "first" is changed: its space stands at the start of a whole
    conversation, and the texts that are encoded here stand behind a control token.
    """
    if not isinstance(part, dict):
        return part
    for key in {"normalizers", "pretokenizers"} & part.keys():  # a Sequence of parts
        part = part | {key: [unprefixed(one, everywhere) for one in part[key]]}
    if part.get("type") == "Metaspace" and (everywhere or part.get("prepend_scheme") == "first"):
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    if part.get("type") == "Prepend" and everywhere:
        return {"type": "Sequence", "normalizers": []}
    if everywhere and "add_prefix_space" in part:
        return part | {"add_prefix_space": False}
    return part


def user_defined_pieces(proto, count):
    """{id: index of the byte that holds its type} of the user-defined pieces in a sentencepiece model (bytes).

    The model is a protobuf message that begins with its `count` pieces, one after the other:

        0x0A size | 0x0A size text | 0x15 score (4 bytes) | 0x18 type (3: control, 4: user-defined; none: ordinary)

    ValueError for other bytes.
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
    """InputError unless the library's tokenizer `inner` gives the added token the id in the files, finds no control
    token in a text, and leaves the text beside one as it is."""
    i, content = token["id"], token["content"]
    if inner.token_to_id(content) != i:
        raise InputError(f"{path}: the added token {content!r} has the id {i} in the files; expected "
                         f"{inner.token_to_id(content)}, which the tokenizers library gives it")
    # the token of unknown characters may come out of any text
    unknown, *found = (inner.encode(text, add_special_tokens=False).ids
                       for text in ("\U0010fffd", content, f"x{content} x"))
    if content in added.special.keys() - added.words and i not in unknown and any(i in ids for ids in found):
        raise InputError(f"{path}: the text {content!r} becomes the control token of that name, because the model's "
                         "vocabulary has it as a word; expected a model whose texts become no control token")
    if added.template in ("llama3", "chatml") and content in TEMPLATE_TOKENS[added.template] and token["normalized"] \
            and inner.normalizer:  # Llama 2's own code puts their ids in and finds them in no text
        normal = inner.normalizer.normalize_str
        if normal(f"{content} x {content}") != content + normal(" x ") + content:
            raise InputError(f"{path}: the control token {content!r} has normalized true, and the normalizer changes "
                             "it or the text beside it; expected false")


def check_added_piece(path, token, added, inner, known):
    """check_added_token for a sentencepiece model; `known` is the id it has for the token's content, or None."""
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


def prepare_for_serving(folder, template):
    """Edits the tokenizer files of an exported folder so that programs that serve it encode as Tokenizer does.

    Encoding at random is switched off. With tokenizer.json the tokenizer_class becomes PreTrainedTokenizerFast, which
    runs the file as it is; for LlamaTokenizer or GPT2Tokenizer transformers would build another pipeline. With
    tokenizer.model alone, "legacy" and "add_prefix_space" state where it puts a space.
    """
    def write(path, value):
        path.write_text(json.dumps(value, indent=2), encoding="utf-8")  # \ud83d, half a character, stays an escape
    path, config = folder / "tokenizer.json", read_json_if_there(folder / "tokenizer_config.json")
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
    """Whether a sentencepiece model puts its space behind every control token: "legacy" in transformers' settings, or,
    where they do not say, whether the template is Llama 2's, whose own code does."""
    return template == "llama2" if config.get("legacy") is None else config["legacy"]
