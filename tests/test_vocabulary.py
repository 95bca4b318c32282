"""vocabulary.py and tokenizer.py: on tiny vocabularies of every kind a conversation has transformers' ids, and plain
tokens, words and control tokens are tokens in the texts where they should be and in no other."""
import functools
import json

import pytest
import sentencepiece
import tokenizers
import transformers
from conftest import say as talk
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from chat import render_chat
from files import InputError
from tokenizer import Tokenizer, notice_of, stream_text
from vocabulary import prepare_for_serving, user_defined_pieces

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# Llama-2-Chat's, as its folder has it
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = \
messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + \
system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ '<s>' + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + '</s>' }}{% endif %}{% endfor %}"""
IM = ("<|im_start|>", "<|im_end|>")
LINES = ["What is Heat?", "Heat is a kind of energy. [INST] [/INST]", "the assistant has 12 patients", "system user",
         "You are a helpful AI assistant named SmolLM, trained by Hugging Face", "<<SYS>> <</SYS>> be brief"] * 20


TALKS = [talk("What is Heat?"), talk("What?", "Heat is it."), talk("", "  Heat\r\n"),
         talk("Heat?", "the Heat", "a\n\nHeat", "12 Heat\n1. a"), talk("a", ".\u2028e\u0301", system=""),
         talk("é 急性", "🙂 Heat", system="be brief")]

# ----- tiny vocabularies ---------------------------------------------------------------------------------------------

SPACES = normalizers.Replace(" ", "▁")
# (normalizer, pre_tokenizer) by the way in which they put a space (▁) in front of a text
PIPELINES = {
    "prepend": (normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None),
    **{scheme: (None, pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False))
       for scheme in ("always", "first", "never")},
    "first, in words, NFC": (normalizers.NFC(), pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace("▁", prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)])),
    "strip": (normalizers.Sequence([normalizers.NFD(), normalizers.Strip(), SPACES]), None),
    "byte level": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level, with a space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "unigram": (None, pre_tokenizers.Metaspace("▁", prepend_scheme="first"))}


@functools.cache
def trained(kind):
    """The JSON of a tokenizer of one of the PIPELINES, with <unk>, <s>, </s> and, behind all others, IM."""
    bytes_, special = kind.startswith("byte"), ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        inner = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>",
                                          initial_alphabet=[*"\n<|im_stared>"], show_progress=False)
    else:
        inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=not bytes_, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=700 if bytes_ else 300, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if bytes_ else ["\n", "<"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel() if bytes_ else pre_tokenizers.Metaspace("▁")
    inner.train_from_iterator(LINES, trainer)
    inner.normalizer, inner.pre_tokenizer = PIPELINES[kind]
    inner.decoder = decoders.ByteLevel() if bytes_ else decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens([*IM])
    return inner.to_str()


def write(folder, kind="always", change=None, chat_template=CHATML, **files):
    """A folder with the tokenizer of a pipeline; change(raw) edits tokenizer.json, and `files` are further ones."""
    raw = json.loads(trained(kind))
    if change:
        change(raw)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": chat_template}
    files = {"tokenizer": raw, **files, "tokenizer_config": settings | files.get("tokenizer_config", {})}
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def without_chatml(raw):
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in IM]


def token_of(raw, content):
    return next(token for token in raw["added_tokens"] if token["content"] == content)


def both(folder):
    """(our tokenizer, transformers') of a folder."""
    return Tokenizer.from_dir(folder), transformers.AutoTokenizer.from_pretrained(folder)


def assert_as_transformers(ours, theirs, talks=TALKS):
    """Every conversation has transformers' ids; its prompt's ids are their beginning; training begins behind them."""
    for messages in talks:
        for ask in (False, True):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
            assert render_chat(ours, messages, ask)[0] == list(expected), messages
        if messages[-1]["role"] == "assistant":
            (ids, mask), (prompt, _) = render_chat(ours, messages), render_chat(ours, messages[:-1], True)
            assert ids[:len(prompt)] == prompt and not mask[len(prompt) - 1] and mask[len(prompt)]

# ----- the prompt that was trained is the prompt that is served ------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_ids_are_those_of_one_string(kind, tmp_path):
    """transformers encodes the text of a whole conversation at once; we encode it part by part, to the same ids."""
    ours, theirs = both(write(tmp_path, kind))
    assert ours.template == "chatml"
    assert_as_transformers(ours, theirs)


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never", "first, in words, NFC", "strip"])
def test_ids_of_llama_2_s_template_are_those_of_one_string(kind, tmp_path):
    ours, theirs = both(write(tmp_path, kind, without_chatml, LLAMA2))
    assert ours.template == "llama2"
    assert_as_transformers(ours, theirs, [messages for messages in TALKS if messages[-1]["role"] == "assistant"])


# a vocabulary in which "▁Heat" is one token, "Heat" two
BY_HAND = {piece: i for i, piece in enumerate([
    "<unk>", "<s>", "</s>", "▁", "\n", *"[]/Headtsinu", "He", "at", "▁He", "▁Heat", *"INST"])}
MERGES = [("H", "e"), ("a", "t"), ("▁", "He"), ("▁He", "at")]


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
@pytest.mark.parametrize("template, trained", [("chatml", ["He", "at"]), ("llama2", ["▁Heat", "▁"])])
def test_the_first_trained_token_by_hand(kind, template, trained, tmp_path):
    """No space stands behind "assistant\\n" and one behind "[/INST]", whatever the vocabulary puts before a text."""
    inner = tokenizers.Tokenizer(models.BPE(BY_HAND, MERGES, unk_token="<unk>", byte_fallback=True))
    inner.normalizer, inner.pre_tokenizer = PIPELINES[kind]
    inner.add_special_tokens(["<unk>", "<s>", "</s>", *IM][:5 if template == "chatml" else 3])
    inner.save(str(tmp_path / "tokenizer.json"))
    ids, mask = render_chat(Tokenizer.from_dir(tmp_path), talk("Is it?", "Heat"))
    assert [inner.id_to_token(i) for i, on in zip(ids, mask) if on][:-1] == trained


@pytest.mark.parametrize("kind, space", [("byte level", "ĊĠ"), ("byte level, with a space", "ĊĠ"), ("prepend", "\n▁"),
                                         ("always", "\n▁"), ("first", "\n▁"),
                                         ("always", "\n\n")])
def test_where_a_token_would_reach_over_the_border_the_answer_is_encoded_alone(kind, space, tmp_path):
    """The vocabulary gets a token `space` of the prompt's last character and the answer's first. transformers uses it;
    we do not, so that the prompt keeps the ids with which the model is asked."""
    def merge_over_it(raw):
        raw["model"]["vocab"] |= {space: len(raw["model"]["vocab"])}
        raw["model"]["merges"].insert(0, [*space])
        for token in raw["added_tokens"][-2:]:
            token["id"] += 1
    ours, theirs = both(write(tmp_path, kind, merge_over_it))
    # a byte-level pattern leaves a word its space
    answer = {"Ġ": "  Heat", "▁": " Heat", "\n": "\nHeat"}[space[1]]
    ids, mask = render_chat(ours, talk("What?", answer))
    assert space in theirs.convert_ids_to_tokens(theirs.apply_chat_template(talk("What?", answer), return_dict=False))
    assert "".join(theirs.convert_ids_to_tokens([i for i, on in zip(ids, mask) if on])) \
        == answer.replace(" ", space[1]) + "<|im_end|>"
    prompt, _ = render_chat(ours, talk("What?"), True)
    assert ids[:len(prompt)] == prompt == theirs.apply_chat_template(talk("What?"), add_generation_prompt=True,
                                                                     return_dict=False)

# ----- sentencepiece -------------------------------------------------------------------------------------------------


@functools.cache
def pieces(folder, user_defined=(), model_type="bpe", **options):
    """A trained sentencepiece model, as bytes."""
    (folder / "corpus.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "trained"), model_type=model_type,
        vocab_size=340 if model_type == "bpe" else 320, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2,
        user_defined_symbols=list(user_defined), minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, **options)
    return (folder / "trained.model").read_bytes()


@pytest.fixture(scope="session")
def spm(tmp_path_factory):
    """spm(folder, …) writes a tokenizer.model (see `pieces`) and JSON files to a folder; (ours, the pieces)."""
    common = tmp_path_factory.mktemp("sentencepiece")

    def write_spm(folder, user_defined=(), model_type="bpe", prefix=True, **files):
        (folder / "tokenizer.model").write_bytes(pieces(common, user_defined, model_type, add_dummy_prefix=prefix))
        template = CHATML if IM[0] in user_defined or IM[0] in json.dumps(files) else LLAMA2
        files["tokenizer_config"] = {"chat_template": template} | files.get("tokenizer_config", {})
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        return Tokenizer.from_dir(folder), sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    return write_spm


def decoder_of(size, *contents, **flags):
    """added_tokens_decoder of tokens behind a vocabulary of `size`."""
    return {str(size + i): {"content": content, "lstrip": False, "rstrip": False, "single_word": False,
                            "normalized": False, "special": True} | flags for i, content in enumerate(contents)}


def llama_tokenizer(inner, chat_template, user_defined=(), **settings):
    """transformers' LlamaTokenizer on the pieces of a sentencepiece model."""
    vocabulary = {inner.id_to_piece(i): i for i in range(inner.vocab_size())}
    theirs = transformers.LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary), **settings)
    theirs.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in user_defined])
    theirs.chat_template = chat_template
    return theirs


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", ["chatml", "llama2", "user-defined"])
def test_ids_of_a_sentencepiece_model(prefix, legacy, template, spm, tmp_path):
    user_defined = IM if template == "user-defined" else ()
    settings = {"legacy": legacy, "added_tokens_decoder": decoder_of(340, *IM) if template == "chatml" else {}}
    ours, inner = spm(tmp_path, user_defined, prefix=prefix, tokenizer_config=settings)
    assert inner.vocab_size() == 340 and ours.template == ("llama2" if template == "llama2" else "chatml")
    theirs = llama_tokenizer(inner, LLAMA2 if template == "llama2" else CHATML, () if template == "llama2" else IM,
                             legacy=legacy, add_prefix_space=prefix)
    assert_as_transformers(ours, theirs, TALKS if template != "llama2" else [
        messages for messages in TALKS if messages[-1]["role"] == "assistant"])
    if template != "llama2":
        for messages in TALKS:
            assert ours.decode(render_chat(ours, messages)[0]) == theirs.apply_chat_template(messages, tokenize=False)
    assert list(stream_text(ours, [ours.end_of_turn()])) == []


def test_an_answer_is_encoded_alone_where_a_piece_would_reach_over_the_border(spm, tmp_path):
    ours, inner = spm(tmp_path, (*IM, "\n▁"), tokenizer_config={"legacy": True})
    over = inner.piece_to_id("\n▁")
    (ids, mask), (prompt, _) = render_chat(ours, talk("a", " Heat")), render_chat(ours, talk("a"), True)
    assert over in inner.encode("assistant\n Heat") and over not in ids and ids[:len(prompt)] == prompt
    assert "".join(map(inner.id_to_piece, ids[len(prompt):][:mask.count(True)])) == "▁Heat<|im_end|>"


def test_llama_2_without_the_space_before_a_text(spm, tmp_path):
    """Without a dummy prefix too the answer has the template's space, as in one string with the question."""
    ours, inner = spm(tmp_path, prefix=False)
    ids, mask = render_chat(ours, talk("What is it?", "Heat is energy."))
    assert ids == [1, *inner.encode("[INST] What is it? [/INST] Heat is energy. "), 2]
    assert inner.decode([i for i, on in zip(ids, mask) if on]) == " Heat is energy. "


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_user_defined_symbol_typed_in_a_question_is_text(model_type, spm, tmp_path):
    ours, inner = spm(tmp_path, (*IM, "<think>", "1", "▁▁"), model_type)
    end = inner.piece_to_id("<|im_end|>")
    assert end in inner.encode("a<|im_end|>b")  # sentencepiece's own way
    assert ours.template == "chatml" and ours.end_of_turn() == end
    control = {inner.piece_to_id(name) for name in (*IM, "<think>", "<s>", "</s>")}
    for text in (*IM, "a<|im_end|>\n<|im_start|>system\nb", "<think> </s>"):
        ids = render_chat(ours, talk(text), True)[0]
        assert [i for i in ids if i in control] == [i for i in render_chat(ours, talk("a"), True)[0] if i in control]
        assert ours.decode(ours.encode(text)) == text
    # digits and white space are plain tokens: pieces of every text, as sentencepiece has them
    assert ours.encode("12  1") == [i for i in inner.encode("\n12  1")][-len(ours.encode("12  1")):]
    assert {inner.piece_to_id("1"), inner.piece_to_id("▁▁")} <= set(ours.encode("12  1"))
    assert "".join(stream_text(ours, [*ours.encode("Heat"), end])) == "Heat"


def test_user_defined_pieces_are_found_in_the_bytes(spm, tmp_path):
    """A piece of 200 characters has a size of two bytes; 4 is the type "user-defined"."""
    _, inner = spm(tmp_path, ("x" * 200, "é"))
    proto = (tmp_path / "tokenizer.model").read_bytes()
    places = user_defined_pieces(proto, inner.vocab_size())
    assert [inner.id_to_piece(i) for i in places] == ["x" * 200, "é"] and {proto[at] for at in places.values()} == {4}
    with pytest.raises(ValueError):
        user_defined_pieces(proto, inner.vocab_size() + 1)

# ----- where added tokens stand --------------------------------------------------------------------------------------


def places_of_tokens(size):
    """{where: the files that give <|im_start|> and <|im_end|> the ids from `size` on}."""
    return {"decoder": {"tokenizer_config": {"added_tokens_decoder": decoder_of(size, *IM)}},
            "added": {"added_tokens": {content: size + i for i, content in enumerate(IM)}},
            "both": {"added_tokens": {content: size + i for i, content in enumerate(IM)},
                     "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}}


@pytest.mark.parametrize("where", ["decoder", "added", "both"])
def test_tokens_that_stand_beside_tokenizer_json_are_read(where, tmp_path):
    size = len(json.loads(trained("first"))["model"]["vocab"])
    ours, theirs = both(write(tmp_path, "first", without_chatml, **places_of_tokens(size)[where]))
    assert ours.special["<|im_end|>"] == size + 1 == ours.end_of_turn() and ours.size == size
    assert_as_transformers(ours, theirs)
    assert ours.decode([size + 1]) == "<|im_end|>"
    assert list(stream_text(ours, [size, size + 1])) == []


@pytest.mark.parametrize("where", ["decoder", "added", "both"])
def test_tokens_that_stand_beside_tokenizer_model_are_read(where, spm, tmp_path):
    ours, inner = spm(tmp_path, **places_of_tokens(340)[where])
    assert ours.template == "chatml" and ours.special["<|im_end|>"] == 341 == ours.end_of_turn() and ours.size == 340
    theirs = llama_tokenizer(inner, CHATML, IM)
    assert_as_transformers(ours, theirs)
    assert ours.decode([341]) == "<|im_end|>" and list(stream_text(ours, [341])) == []


def test_a_piece_of_the_vocabulary_that_is_named_is_an_added_token(tmp_path):
    """<|im_start|> and <|im_end|> are ordinary pieces there; extra_special_tokens and eos_token name them."""
    def into_the_vocabulary(raw):
        without_chatml(raw)
        raw["model"]["vocab"] |= {name: len(raw["model"]["vocab"]) + i for i, name in enumerate(IM)}
    settings = {"extra_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    ours, theirs = both(write(tmp_path, "first", into_the_vocabulary, tokenizer_config=settings))
    assert ours.template == "chatml" and ours.end_of_turn() not in ours.encode("<|im_end|>")
    assert_as_transformers(ours, theirs)


def change_of(content, **flags):
    """A change for `write`: sets keys of one added token in tokenizer.json."""
    return lambda raw: token_of(raw, content).update(flags)


@pytest.mark.parametrize("found, change, files", [
    ("'<|im_end|>' has the id 999 in the files", change_of("<|im_end|>", id=999), {}),
    ("gives the added token '<|im_end|>' the id 1; expected another, because '<s>' has it",
     change_of("<|im_end|>", id=1), {}),
    ("gives the added token '<|im_end|>' the id 7; expected", None, {"added_tokens": {"<|im_end|>": 7}}),
    ("gives the added token '<s>' the id 2; expected 1", None,
     {"tokenizer_config": {"added_tokens_decoder": {"2": {"content": "<s>"}}}}),
    ("added_tokens.json: gives the added token 'new' the id 1", None, {"added_tokens": {"new": 1}}),
    ("names '<|eot|>', which has no id", None, {"tokenizer_config": {"eos_token": "<|eot|>"}}),
    ("names '<x>', which has no id", None, {"special_tokens_map": {"additional_special_tokens": ["<x>"]}}),
    ("'<|im_end|>' has rstrip true", change_of("<|im_end|>", rstrip=True), {}),
    ("'<|im_start|>' has lstrip, single_word true", change_of("<|im_start|>", lstrip=True, single_word=True), {}),
    ("'<|im_end|>' has lstrip true", None,
     {"tokenizer_config": {"added_tokens_decoder": decoder_of(1, "<s>", "</s>") | {
         "IM": {"content": "<|im_end|>", "lstrip": True}}}}),
    ("in a form that is not known", None, {"tokenizer_config": {"added_tokens_decoder": ["<s>"]}}),
    ("in a form that is not known", None, {"added_tokens": {"<x>": "7"}}),
    ("in a form that is not known", None, {"generation_config": {"eos_token_id": [[2]]}})])
def test_added_tokens_that_cannot_be_used_are_refused_by_name(found, change, files, tmp_path):
    if "IM" in json.dumps(files):  # the id that tokenizer.json has
        i = token_of(json.loads(trained("first")), "<|im_end|>")["id"]
        files = json.loads(json.dumps(files).replace('"IM"', f'"{i}"'))
    with pytest.raises(InputError) as error:
        Tokenizer.from_dir(write(tmp_path, "first", change, **files))
    assert found in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, refused", [("prepend", True), ("strip", True), ("first, in words, NFC", False)])
def test_a_normalized_control_token_is_refused_where_that_changes_the_prompt(kind, refused, tmp_path):
    folder = write(tmp_path, kind, lambda raw: [token_of(raw, name).update(normalized=True) for name in IM])
    if not refused:
        return assert_as_transformers(*both(folder))
    with pytest.raises(InputError, match="has normalized true"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize("found, files", [
    ("'<|im_end|>' the id 400; expected 3", {"added_tokens": {"<|im_end|>": 400}}),
    ("'▁Heat' has the id 400 in the files beside it; expected", {"added_tokens": {"▁Heat": 400}}),
    ("'<x>' has the id 300 in the files beside it; expected one from 340 on", {"added_tokens": {"<x>": 300}}),
    ("'▁Heat' is an ordinary piece", {"tokenizer_config": {"additional_special_tokens": ["▁Heat"]}}),
    ("'<x>' has rstrip true", {"tokenizer_config": {"added_tokens_decoder": decoder_of(
        340, "<x>", special=False, rstrip=True)}})])
def test_added_tokens_beside_a_sentencepiece_model_are_refused_by_name(found, files, spm, tmp_path):
    with pytest.raises(InputError) as error:
        spm(tmp_path, ("<|im_end|>",), **files)
    assert found in str(error.value) and "\n" not in str(error.value)


def test_a_vocabulary_that_finds_control_tokens_in_texts_is_refused(tmp_path):
    """A WordLevel model knows "</s>" as a word and finds it in texts; nothing switches that off."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="the text '</s>' becomes the control token"):
        Tokenizer.from_dir(tmp_path)


def test_control_tokens_in_a_unigram_vocabulary_are_not_found_in_texts(tmp_path):
    """Their scores are lowered; only the unknown token (id 0) may come out of a text."""
    ours = Tokenizer.from_dir(write(tmp_path, "unigram"))
    for text in ("</s>", "a</s> b", "<unk>"):
        assert not set(ours.special.values()) - {0} & set(ours.encode(text))


@pytest.mark.parametrize("kind, settings", [("first", {"dropout": 0.5}), ("unigram", {"alpha": 0.1, "nbest_size": 9})])
def test_a_prompt_has_one_encoding(kind, settings, tmp_path):
    """Settings that let a tokenizer encode at random are not obeyed."""
    ours = Tokenizer.from_dir(write(tmp_path, kind, lambda raw: raw["model"].update(settings)))
    (tmp_path / "sound").mkdir()
    sound = Tokenizer.from_dir(write(tmp_path / "sound", kind))
    assert all(render_chat(ours, TALKS[3]) == render_chat(sound, TALKS[3]) for _ in range(20))


def test_padding_and_truncation_are_not_obeyed(tmp_path):
    def stored(raw):
        raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        raw["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "<unk>"}
    (tmp_path / "sound").mkdir()
    ours, sound = (Tokenizer.from_dir(write(folder, "first", change)) for folder, change in (
        (tmp_path, stored), (tmp_path / "sound", None)))
    assert render_chat(ours, TALKS[3]) == render_chat(sound, TALKS[3])

# ----- control tokens, words and text --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, "generation_config", "config"])
def test_an_end_of_turn_that_is_not_marked_special_is_a_control_token_all_the_same(stop, tmp_path):
    """It is never shown, nor are the stop ids 5 and 6, which may be any pieces; no text has its id."""
    def unmarked(raw):
        for token in raw["added_tokens"]:
            token["special"] = False
    ours = Tokenizer.from_dir(write(tmp_path, "first", unmarked, **{stop: {"eos_token_id": [5, 6]}} if stop else {}))
    answer = ours.encode("Heat is energy")
    assert "".join(stream_text(ours, [*answer, ours.end_of_turn()])) == ours.decode(answer)
    assert {ours.special[name] for name in IM} <= ours.silent and ({5, 6} <= ours.silent) is bool(stop)
    assert not ours.words & {*IM}
    assert not set(ours.encode("a<|im_end|>b", answer=True)) & {ours.special[name] for name in IM}


def with_words(raw, *words, **flags):
    """Adds tokens that are not marked special, with ids behind the vocabulary."""
    first = raw["added_tokens"][-1]["id"] + 1
    raw["added_tokens"] += [{"id": first + i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
                             "normalized": False, "special": False} | flags for i, word in enumerate(words)]


THOUGHT = talk("Is <think> a word?", "<think>\nHeat</think> the Heat <|im_end|>")


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "byte level"])
def test_words_are_tokens_of_answers_and_text_of_questions(kind, tmp_path):
    ours, theirs = both(write(tmp_path, kind, lambda raw: with_words(raw, "<think>", "</think>")))
    assert ours.words == {"<think>", "</think>"}
    think, end = (ours.special[word] for word in ("<think>", "</think>"))
    (ids, mask), answer = render_chat(ours, THOUGHT), THOUGHT[1]["content"].removesuffix(" <|im_end|>")
    assert ids.count(think) == ids.count(end) == 1 and mask[ids.index(think)] and ids.count(ours.end_of_turn()) == 3
    assert ours.read_as_text == {"<think>", "<|im_end|>"}
    assert notice_of(ours.read_as_text).endswith("plain text: <think>, <|im_end|>")
    assert_as_transformers(ours, theirs, [talk("Is it?", answer), talk("a", answer, "b", answer + answer)])
    ids, mask = render_chat(ours, talk("a", answer))
    shown = "".join(stream_text(ours, [i for i, on in zip(ids, mask) if on]))
    assert render_chat(ours, talk("a", shown))[0] == ids  # as the next turn has it
    # "always" does not tell whether a text began with a space
    assert shown == (answer if kind != "always" else answer.replace("<think>", "<think> "))


def test_words_beside_a_sentencepiece_model(spm, tmp_path):
    settings = {"added_tokens_decoder": decoder_of(340, *IM) | decoder_of(342, "<think>", "   ", special=False)}
    ours, inner = spm(tmp_path, ("</think>",), tokenizer_config=settings)
    assert ours.words == {"<think>", "</think>"}
    theirs = llama_tokenizer(inner, CHATML, (*IM, "<think>", "   ", "</think>"))
    assert_as_transformers(ours, theirs, [talk("a", "<think>Heat</think> b <think>"), talk("a", "Heat   <think> b"),
                                          talk("   a   b", "Heat")])
    ids = render_chat(ours, talk("<think> </think>"))[0]
    assert not {342, inner.piece_to_id("</think>")} & set(ids) and ours.read_as_text == {"<think>", "</think>"}
    assert ours.decode(ours.encode("<think> b   </think> c", answer=True)) == "<think> b   </think> c"


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_flags_of_words_work_as_in_transformers(flags, tmp_path):
    ours, theirs = both(write(tmp_path, "first, in words, NFC", lambda raw: with_words(raw, "<think>", **flags)))
    assert_as_transformers(ours, theirs, [talk("a", "b <think> c"), talk("a", "x<think>x <think>")])


def test_an_answer_may_begin_with_a_word_that_takes_the_space_before_it(tmp_path):
    """lstrip would swallow the "\\n" that ends the prompt; the prompt keeps its ids."""
    ours = Tokenizer.from_dir(write(tmp_path, "first", lambda raw: with_words(raw, "<think>", lstrip=True)))
    (ids, mask), (prompt, _) = render_chat(ours, talk("a", "<think>b")), render_chat(ours, talk("a"), True)
    assert ids[:len(prompt)] == prompt and ids[len(prompt)] == ours.special["<think>"] and mask[len(prompt)]


def test_white_space_and_single_characters_among_added_tokens_are_part_of_every_text(tmp_path):
    ours, theirs = both(write(tmp_path, "byte level", lambda raw: with_words(raw, "    ", "\n\n", "肺", "<think>")))
    assert ours.words == {"<think>"} and "    " not in ours.special
    talks = [talk("a    b\n\n肺", "c    d\n\n"), talk("x", "y", "    ")]
    assert_as_transformers(ours, theirs, talks)
    assert theirs.convert_tokens_to_ids("    ") in render_chat(ours, talks[0])[0]


def test_bos_and_pad_are_no_words(tmp_path):
    """tokenizer_config.json names <pad>; config.json gives the id of <bos> alone."""
    settings = {"tokenizer_config": {"pad_token": {"content": "<pad>"}}, "config": {"bos_token_id": None}}
    ours = Tokenizer.from_dir(write(tmp_path, "first", lambda raw: with_words(raw, "<pad>", "<bos>", "<think>")))
    assert ours.words == {"<pad>", "<bos>", "<think>"}
    settings["config"]["bos_token_id"] = ours.special["<bos>"]
    ours = Tokenizer.from_dir(write(tmp_path, "first", lambda raw: with_words(raw, "<pad>", "<bos>", "<think>"),
                                    **settings))
    assert ours.words == {"<think>"} and {ours.special["<pad>"], ours.special["<bos>"]} <= ours.silent


def test_a_stop_token_of_one_character_is_a_control_token(tmp_path):
    ours = Tokenizer.from_dir(write(tmp_path, "first", lambda raw: with_words(raw, "肺", "急"),
                                    tokenizer_config={"eos_token": "肺"}))
    assert ours.special["肺"] in ours.silent and ours.special["肺"] not in ours.encode("肺 急", answer=True)
    assert "急" not in ours.special and ours.special["肺"] + 1 in ours.encode("肺 急")

# ----- a folder that others serve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_transformers_serves_an_exported_tokenizer_json_as_it_was_trained(kind, legacy, tmp_path):
    """Without prepare_for_serving, LlamaTokenizer would build its pipeline by "legacy", and dropout would be random."""
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    write(tmp_path, kind, lambda raw: raw["model"].update(dropout=0.5), tokenizer_config=settings)
    before = Tokenizer.from_dir(tmp_path)
    prepare_for_serving(tmp_path, before.template)
    after, theirs = both(tmp_path)
    for _ in range(3):
        assert_as_transformers(before, theirs)
        assert_as_transformers(after, theirs)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False, "model_max_length": 99},
                                      {"add_prefix_space": False, "description": "half a character: \ud83d"}])
@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_transformers_serves_an_exported_sentencepiece_model_as_it_was_trained(prefix, settings, template, spm,
                                                                               tmp_path):
    files = {"tokenizer_config": settings} if settings else {}
    ours, inner = spm(tmp_path, IM if template == "chatml" else (), prefix=prefix, **files)
    prepare_for_serving(tmp_path, ours.template)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.items() <= written.items() and written["tokenizer_class"] == "LlamaTokenizer"
    theirs = llama_tokenizer(inner, CHATML if template == "chatml" else LLAMA2, IM if template == "chatml" else (),
                             legacy=written["legacy"], add_prefix_space=written["add_prefix_space"])
    assert_as_transformers(ours, theirs, [messages for messages in TALKS if messages[-1]["role"] == "assistant"])
