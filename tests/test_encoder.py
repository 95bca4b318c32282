"""encoder.py: vectors beside sentence-transformers' and transformers', folders of every kind, and refused folders."""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
import torch
from conftest import random_texts, tiny_encoder, write_json
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from encoder import BGE_QUERY_INSTRUCTION, Encoder, plan_batches
from files import InputError


def reference(model, directory, batch, pooling, max_tokens):
    """transformers' BertModel on a padded and masked batch -> float32 [N, D], rows of length 1."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch([text.lower() for text in batch])
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mask = mask[:, :, None].float()
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


pytestmark = pytest.mark.usefixtures("one_thread")


# ----- vectors -------------------------------------------------------------------------------------------------------

def test_minilm_gives_the_vectors_of_sentence_transformers(minilm):
    st = pytest.importorskip("sentence_transformers")
    theirs, ours = st.SentenceTransformer(str(minilm), device="cpu"), Encoder.from_dir(minilm)
    odd = ["", " ", "a", ".", "\t\n", "肺炎的症状是什么?", "🫁 emoji 👩‍⚕️ 😷", "Zoë naïve façade İstanbul ΣΊΣΥΦΟΣ",
           "ما هو الربو؟", "x" * 300, "e\u0301 \u200b\u00a0 control\x07 \ufffd", "C₂₁H₃₀O₅ µg/mL ≥ 37.5 °C",
           "pain " * 700, "胸痛" * 400, *(f"case {i}: " + "the patient has a fever. " * i for i in range(1, 100, 9))]
    batch = odd + random_texts(200 - len(odd), longest=16)
    assert ours.max_tokens == theirs.max_seq_length == 256 and len(batch) == 200
    expected = theirs.encode(batch, normalize_embeddings=True, show_progress_bar=False)
    found = ours.encode(batch)
    assert found.dtype == np.float32 and found.shape == (200, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(1).min() >= 0.99999


@pytest.mark.parametrize("pooling, prefix", [("cls", ""), ("mean", "bert."), ("mean", "")])
def test_a_random_bert_gives_the_vectors_of_transformers(tmp_path, pooling, prefix):
    directory, model = tiny_encoder(tmp_path / "encoder", pooling, prefix, seed=3, lower_case=False)
    batch = ["", "FEVER", *random_texts(40, seed=1)]
    found = Encoder.from_dir(directory, batch_tokens=100).encode(batch)
    np.testing.assert_allclose(found, reference(model, directory, batch, pooling, 40), atol=1e-5)


def test_the_new_pooling_file_reads_the_same(tmp_path):
    """{"pooling_mode": "mean"} in the place of one true or false for each mode."""
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean")
    before = Encoder.from_dir(directory).encode(["asthma drug"])
    write_json(directory / "1_Pooling" / "config.json", {"embedding_dimension": 48, "pooling_mode": "mean"})
    assert (Encoder.from_dir(directory).encode(["asthma drug"]) == before).all()


def test_with_and_without_onednn_the_vectors_are_the_same(tiny, monkeypatch):
    batch = random_texts(30, seed=6)
    found = tiny.encode(batch)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    np.testing.assert_allclose(tiny.encode(batch), found, atol=1e-6)


@pytest.mark.parametrize("limit, expected", [(12, 12), (500, 64), (None, 64)])
def test_texts_are_cut_to_what_the_model_allows(tmp_path, limit, expected):
    encoder = Encoder.from_dir(tiny_encoder(tmp_path / "encoder", max_seq_length=limit)[0])
    ids = encoder.token_ids(["pain " * 100])[0]
    assert len(ids) == expected and ids[0] == 2 and ids[-1] == 3


def test_a_text_does_not_see_its_neighbours(tiny):
    batch = random_texts(25, seed=2)
    together = tiny.encode(batch)
    np.testing.assert_allclose(np.concatenate([tiny.encode([text]) for text in batch]), together, atol=1e-6)
    np.testing.assert_allclose(tiny.encode(batch[::-1])[::-1], together, atol=1e-6)
    assert tiny.encode([]).shape == (0, 48)


def test_every_row_is_in_one_batch_and_no_batch_is_too_large():
    lengths = np.random.default_rng(0).integers(2, 60, 200).tolist()
    batches = plan_batches([*lengths, 500], 128)
    assert sorted(row for batch in batches for row in batch) == list(range(201)) and batches[0] == [200]
    assert all(sum(lengths[row] for row in batch) <= 128 for batch in batches[1:])


def test_more_texts_than_are_tokenised_at_once(tiny):
    vectors = tiny.encode(["pain"] * 8192 + ["fever"])
    assert (vectors[:-1] == vectors[0]).all() and (vectors[-1] == tiny.encode(["fever"])[0]).all()


def test_threads_share_the_work_and_are_left_as_they_were(tiny):
    batch = random_texts(200, seed=4)
    alone = tiny.encode(batch)
    torch.set_num_threads(2)
    np.testing.assert_allclose(tiny.encode(batch), alone, atol=1e-6)
    with ThreadPoolExecutor(1) as pool:  # a new thread takes over the last setting, whoever made it
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 2
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_instruction_stands_in_front_of_queries_only(tiny, tmp_path):
    assert tiny.query_instruction == BGE_QUERY_INSTRUCTION  # the folder is called bge-tiny-en
    question = ["which drug for asthma"]
    assert (tiny.encode(question, is_query=True) == tiny.encode([BGE_QUERY_INSTRUCTION + question[0]])).all()
    assert not np.allclose(tiny.encode(question, is_query=True), tiny.encode(question), atol=1e-3)
    other = Encoder.from_dir(tiny_encoder(tmp_path / "minilm")[0])
    assert other.query_instruction == "" and (other.encode(question, is_query=True) == other.encode(question)).all()
    custom = Encoder.from_dir(tmp_path / "minilm", query_instruction="pain ")
    assert (custom.encode(question, is_query=True) == other.encode(["pain " + question[0]])).all()


def test_control_tokens_typed_in_a_text_are_text(tiny):
    ids = tiny.token_ids(["pain [SEP] [CLS] fever[PAD]"])[0]
    assert ids[0] == 2 and ids[-1] == 3 and not {0, 2, 3} & set(ids[1:-1].tolist())


def test_half_a_character_is_refused(tiny):
    with pytest.raises(InputError, match="half a character"):
        tiny.encode(["pain", "\ud800 fever"])


# ----- folders as people have them -----------------------------------------------------------------------------------

BATCH = ["", "FEVER after Surgery", "Zoë has pain, 肺炎", "pain in the chest " * 30, *random_texts(12, seed=7)]


def edit(path, **changes):
    """Changes keys of a JSON file, which need not exist."""
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | changes)


def compare(directory, queries=None, documents=None):
    """Checks that our vectors of BATCH are sentence-transformers', as queries and as documents; returns our encoder.

    Theirs come from encode_query and encode_document, or from the methods given as `queries` and `documents`.
    """
    st = pytest.importorskip("sentence_transformers")
    theirs, ours = st.SentenceTransformer(str(directory), device="cpu"), Encoder.from_dir(directory)
    scaled = {"normalize_embeddings": theirs.similarity_fn_name == "cosine", "show_progress_bar": False}
    for is_query, encode in ((True, queries or st.SentenceTransformer.encode_query),
                             (False, documents or st.SentenceTransformer.encode_document)):
        np.testing.assert_allclose(ours.encode(BATCH, is_query), encode(theirs, BATCH, **scaled), atol=1e-5)
    return ours


def rename_tensors(directory, rename, **more):
    path = directory / "model.safetensors"
    save_torch({rename(name): tensor for name, tensor in load_file(path).items()} | more, path)


def keep_bert_alone(directory):
    """A folder as transformers writes it: nothing of sentence-transformers."""
    for name in ("modules.json", "sentence_bert_config.json"):
        (directory / name).unlink()
    shutil.rmtree(directory / "1_Pooling")


def without_normalize(directory):
    path = directory / "modules.json"
    write_json(path, json.loads(path.read_text())[:2])


@pytest.mark.parametrize("lengths, expected", [
    ((None, 20), 20), ((30, 20), 30), ((None, 10**30), 64), ((None, None), 64), ((None, 1e30), 64)])
def test_the_length_is_the_one_of_sentence_transformers(tmp_path, lengths, expected):
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean")
    edit(directory / "sentence_bert_config.json", max_seq_length=lengths[0])
    edit(directory / "tokenizer_config.json", model_max_length=lengths[1])
    assert compare(directory).max_tokens == expected


def test_a_folder_saved_by_sentence_transformers_6(tmp_path):
    st = pytest.importorskip("sentence_transformers", minversion="6")
    first, _ = tiny_encoder(tmp_path / "first", "mean", max_seq_length=12)
    edit(first / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    st.SentenceTransformer(str(first), device="cpu").save_pretrained(str(tmp_path / "bge-tiny-en"))
    assert "max_seq_length" not in (tmp_path / "bge-tiny-en" / "sentence_bert_config.json").read_text()
    ours = compare(tmp_path / "bge-tiny-en")
    assert ours.max_tokens == 12 and ours.query_instruction == ""  # it says "query": ""
    np.testing.assert_allclose(ours.encode(BATCH), Encoder.from_dir(first).encode(BATCH), atol=1e-6)


def test_the_end_of_a_text_is_kept_where_the_tokenizer_says_so(tmp_path):
    """By truncation_side in tokenizer_config.json, or by the direction in tokenizer.json."""
    directory, _ = tiny_encoder(tmp_path / "config", max_seq_length=12)
    edit(directory / "tokenizer_config.json", truncation_side="left")
    assert compare(directory).truncation_side == "left"
    directory, _ = tiny_encoder(tmp_path / "file", max_seq_length=12)
    edit(directory / "tokenizer.json", truncation={"direction": "Left", "max_length": 9, "strategy": "LongestFirst",
                                                   "stride": 0})
    assert compare(directory).truncation_side == "left"


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"do_lower_case": False, "strip_accents": True},
                                      {"tokenize_chinese_chars": False}])
def test_bert_tokenizer_decides_on_case_accents_and_chinese(tmp_path, settings):
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean", lower_case=False)
    edit(directory / "sentence_bert_config.json", do_lower_case=False)
    edit(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer", **settings)
    compare(directory)
    (directory / "tokenizer_config.json").unlink()  # BertTokenizer is also the class of a BERT that names none
    assert Encoder.from_dir(directory).normalizer["lowercase"]


def test_prompts_stand_in_front_of_queries_and_of_indexed_texts(tmp_path):
    """By name for each, empty, one default for both, and "passage" in the place of "document"."""
    directory, _ = tiny_encoder(tmp_path / "bge-tiny-en", "mean")
    settings = directory / "config_sentence_transformers.json"
    write_json(settings, {"prompts": {"query": "which drug ", "document": "pain "}, "default_prompt_name": "document"})
    ours = compare(directory)
    assert (ours.query_instruction, ours.document_prompt) == ("which drug ", "pain ")
    write_json(settings, {"prompts": {"query": "", "document": ""}, "default_prompt_name": None})
    assert compare(directory).query_instruction == ""
    write_json(settings, {"prompts": {"case": "fever "}, "default_prompt_name": "case"})
    encode = pytest.importorskip("sentence_transformers").SentenceTransformer.encode
    assert compare(directory, encode, encode).document_prompt == "fever "
    write_json(settings, {"prompts": {"query": "which ", "passage": "give "}})
    compare(directory, documents=lambda model, *args, **kwargs: model.encode(*args, prompt_name="passage", **kwargs))


def test_a_bge_whose_folder_names_no_prompts_is_known_by_all_its_names(tmp_path):
    real, _ = tiny_encoder(tmp_path / "models--BAAI--bge-tiny-en" / "snapshots" / "0123abcd")
    named, _ = tiny_encoder(tmp_path / "bge-other-en")
    other, _ = tiny_encoder(tmp_path / "minilm")
    (tmp_path / "encoder").symlink_to(named)
    (tmp_path / "bge-link-en-v1.5").symlink_to(other)
    for directory in (real, named, tmp_path / "encoder", tmp_path / "bge-link-en-v1.5"):
        assert Encoder.from_dir(directory).query_instruction == BGE_QUERY_INSTRUCTION, directory
    (tmp_path / "bge-en").mkdir()
    shutil.copytree(other, tmp_path / "bge-en" / "minilm")  # the name of a folder above says nothing
    for directory in (other, tmp_path / "bge-en" / "minilm"):
        assert Encoder.from_dir(directory).query_instruction == ""
    write_json(named / "config_sentence_transformers.json", {"__version__": {}})  # as the published ones
    assert Encoder.from_dir(named).query_instruction == BGE_QUERY_INSTRUCTION
    write_json(named / "config_sentence_transformers.json", {"prompts": {"document": "pain "}})
    assert Encoder.from_dir(named).query_instruction == ""


@pytest.mark.parametrize("similarity, scaled, dimension", [
    ("dot", False, None), ("dot", True, None), ("dot", True, 20), ("dot", False, 20), ("cosine", True, 20),
    (None, False, 100)])
def test_vectors_are_as_long_and_as_wide_as_the_folder_says(tmp_path, similarity, scaled, dimension):
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean")
    write_json(directory / "config_sentence_transformers.json",
               {"similarity_fn_name": similarity, "truncate_dim": dimension})
    if not scaled:
        without_normalize(directory)
    assert compare(directory).dimension == min(48, dimension or 48)


def test_the_vector_of_a_plain_bert_is_the_mean_of_its_tokens(tmp_path):
    directory, _ = tiny_encoder(tmp_path / "encoder", "cls", prefix="bert.")
    keep_bert_alone(directory)
    edit(directory / "tokenizer_config.json", model_max_length=30)
    ours = compare(directory)
    assert (ours.pooling, ours.max_tokens, ours.query_instruction) == ("mean", 30, "")


def test_weights_with_names_of_older_files_load(tmp_path):
    """Prefix bert., LayerNorm.gamma and beta, stored positions, and heads that are not used."""
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean")
    before = Encoder.from_dir(directory).encode(BATCH)
    edit(directory / "config.json", type_vocab_size=2)  # and without it the same
    config = json.loads((directory / "config.json").read_text())
    del config["type_vocab_size"]
    write_json(directory / "config.json", config)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(name):
        for new, former in old.items():
            name = name.replace(new, former)
        return f"bert.{name}"
    rename_tensors(directory, rename, **{
        "cls.predictions.bias": torch.ones(48), "cls.seq_relationship.weight": torch.ones(2, 48),
        "bert.embeddings.position_ids": torch.arange(64)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 64).long()})
    assert (compare(directory).encode(BATCH) == before).all()


def test_shards_and_half_precision_load(tmp_path):
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean")
    path = directory / "model.safetensors"
    weights = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_torch({name: tensor.float() for name, tensor in weights.items()}, path)
    before = Encoder.from_dir(directory)
    path.unlink()
    shards = {f"model-0000{i}-of-00002.safetensors": dict(list(weights.items())[i - 1::2]) for i in (1, 2)}
    for name, shard in shards.items():
        save_torch(shard, directory / name)
    write_json(directory / "model.safetensors.index.json",
               {"weight_map": {tensor: name for name, shard in shards.items() for tensor in shard}})
    after = Encoder.from_dir(directory)
    assert (after.encode(BATCH) == before.encode(BATCH)).all()
    identity = after.identity
    save_torch(shard | {"pooler.dense.bias": torch.zeros(48)}, directory / name)
    assert Encoder.from_dir(directory).identity["model_sha256"] != identity["model_sha256"]


def test_a_transformer_in_a_folder_of_its_own(tmp_path):
    directory, _ = tiny_encoder(tmp_path / "encoder", max_seq_length=20)
    (directory / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "sentence_bert_config.json", "tokenizer.json",
                 "tokenizer_config.json"):
        (directory / name).rename(directory / "0_Transformer" / name)
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(directory / "modules.json", modules)
    ours = compare(directory)
    assert ours.max_tokens == 20 and len(ours.identity["config_sha256"]) == 64


# ----- refused folders -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, change, message", [
    ("config.json", {"intermediate_size": 10**30}, "intermediate_size is 10000"),
    ("config.json", {"model_type": "roberta"}, "model_type is 'roberta'"),
    ("config.json", {"model_type": None}, "model_type is None"),
    ("config.json", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    ("config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("config.json", {"num_attention_heads": 5}, "num_attention_heads"),
    ("config.json", {"hidden_size": "48"}, "hidden_size is '48'"),
    ("config.json", {"vocab_size": 3}, "ids below vocab_size 3"),
    ("config.json", {"num_hidden_layers": 3}, "16 tensors do not fit"),
    ("config.json", {"intermediate_size": 79}, r"expected \[79, 48\]"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by"),
    ("1_Pooling/config.json", {"pooling_mode_cls_token": False, "pooling_mode": "lasttoken"}, "lasttoken"),
    ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt False"),
    ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'")])
def test_other_models_are_refused(tmp_path, file, change, message):
    path = tiny_encoder(tmp_path / "encoder")[0] / file
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(InputError, match=message) as error:
        Encoder.from_dir(tmp_path / "encoder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file, change, message", [
    ("config.json", {"auto_map": {"AutoModel": "jina.Bert"}}, "auto_map"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "similarity_fn_name is 'euclidean'"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}, "similarity_fn_name is 'manhattan'"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn_name is 'maxsim'"),
    ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
    ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim is 0"),
    ("config_sentence_transformers.json", {"prompts": {"query": 3}}, "prompts is"),
    ("config_sentence_transformers.json", {"prompts": ["query: "]}, "prompts is"),
    ("config_sentence_transformers.json", {"default_prompt_name": "s2p"}, "default_prompt_name is 's2p'"),
    ("config_sentence_transformers.json", {"default_prompt_name": ["s2p"]}, "default_prompt_name is ..s2p."),
    ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}, "half a character"),
    ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length is 2"),
    ("sentence_bert_config.json", {"max_seq_length": True}, "max_seq_length is True"),
    ("sentence_bert_config.json", {"query_length": 32}, "query_length is 32"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
    ("sentence_bert_config.json", {"model_args": {"dtype": "float16"}}, "model_args"),
    ("tokenizer_config.json", {"model_max_length": "512"}, "model_max_length is '512'"),
    ("tokenizer_config.json", {"truncation_side": "middle"}, "truncation_side is 'middle'"),
    ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class is 'BertJapanese"),
    ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": "yes"}, "'yes'"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
    ("tokenizer.json", {"post_processor": None}, "0 around a text"),
    ("1_Pooling/config.json", {"pooling_mode": "max"}, "pools by"),
    ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pools by"),
    ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "weightedmean"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
    ("adapter_config.json", {}, "an adapter")])
def test_settings_that_cannot_be_followed_are_refused_by_name(tmp_path, file, change, message):
    directory, _ = tiny_encoder(tmp_path / "encoder")
    edit(directory / "sentence_bert_config.json", max_seq_length=None)
    edit(directory / file, **change)
    with pytest.raises(InputError, match=message) as error:
        Encoder.from_dir(directory)
    assert "\n" not in str(error.value)


def test_a_pickle_and_doubtful_tensors_are_refused(tmp_path):
    """Two tensors of one name, old and new; whole numbers as weights; a tensor that no BERT has."""
    directory, _ = tiny_encoder(tmp_path / "encoder")
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = "embeddings.LayerNorm.weight"
    for more, message in (({"embeddings.LayerNorm.gamma": weights[name].clone()}, f"{name} is twice there"),
                          ({f"bert.{name}": weights[name].clone()}, f"{name} is twice there"),
                          ({name: torch.ones(48, dtype=torch.int8)}, f"{name} is of I8"),
                          ({"classifier.weight": torch.ones(2, 48)}, "classifier.weight is .* no such tensor")):
        save_torch(weights | more, path)
        with pytest.raises(InputError, match=message):
            Encoder.from_dir(directory)
    path.rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: weights in a pickle"):
        Encoder.from_dir(directory)


def test_other_modules_are_refused(tmp_path):
    directory, _ = tiny_encoder(tmp_path / "encoder")
    modules = json.loads((directory / "modules.json").read_text())
    first, pooling = modules[:2]
    for wrong in ([*modules, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}], [first], [],
                  [first, pooling | {"path": "../1_Pooling"}], [first | {"path": "0_Transformer"}, pooling],
                  [first | {"path": ".."}, pooling], [first, pooling | {"path": ""}], [pooling, first],
                  [first | {"type": "custom_st.Transformer"}, pooling], [*modules, modules[2]], [first, 3]):
        write_json(directory / "modules.json", wrong)
        with pytest.raises(InputError, match="modules"):
            Encoder.from_dir(directory)


def test_damaged_weights_and_files_are_refused(tmp_path):
    """No tensor, one too many, one missing, one transposed, NaN, a file cut short; then every file broken or gone."""
    directory, _ = tiny_encoder(tmp_path / "encoder")
    path = directory / "model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    name = "encoder.layer.0.output.dense.weight"
    for wrong, message in (({}, "37 tensors do not fit"), ({**weights, "head.weight": torch.ones(2)}, "head.weight"),
                           ({key: value for key, value in weights.items() if key != name}, f"{name} is missing"),
                           ({**weights, name: weights[name].T.contiguous()}, r"is \[80, 48\] .expected \[48, 80\]")):
        save_torch(wrong, path)
        with pytest.raises(InputError, match=message):
            Encoder.from_dir(directory)
    save_torch({**weights, name: weights[name] * float("nan")}, path)
    with pytest.raises(InputError, match="not finite"):
        Encoder.from_dir(directory).encode(["pain"])
    path.write_bytes(whole[:-50])
    with pytest.raises(InputError, match="damaged safetensors file"):
        Encoder.from_dir(directory)
    for file in ("config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "model.safetensors"):
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(b"{")
        with pytest.raises(InputError):
            Encoder.from_dir(directory)
        (directory / file).unlink()
        with pytest.raises((InputError, OSError)):
            Encoder.from_dir(directory)
        (directory / file).write_bytes(content)


