"""retrieve.py against sentence-transformers, transformers and numpy; then what it refuses."""
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, random_texts, tiny_encoder, write_json
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import retrieve
from files import InputError, run_main, sha256
from retrieve import BGE_QUERY_INSTRUCTION, Encoder, Index, encode_in_parallel, main, manifest_sha256, plan_batches


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


@pytest.fixture(autouse=True)
def one_thread():
    """Small work on shared cores is faster with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Encoder.from_dir(tiny_encoder(tmp_path_factory.mktemp("encoder") / "bge-tiny-en")[0])


@pytest.fixture(scope="module")
def records():
    texts = random_texts(30, seed=5)
    return [{"instruction": f"{text} {i}", "response": "## Thought …"} for i, text in enumerate(texts)]


@pytest.fixture
def saved(tiny, records, tmp_path):
    Index.build(tiny, records).save(tmp_path / "index")
    return tmp_path / "index"


def reseal(directory, **changes):
    """Edits the manifest and makes all hashes right again, as somebody who knows the format could."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = {name: sha256(directory / name) for name in manifest["files"]}
    manifest |= changes
    manifest["sha256"] = manifest_sha256(manifest)
    write_json(directory / "manifest.json", manifest)


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


# ----- what is no encoder --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, change, message", [
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


def test_other_modules_are_refused(tmp_path):
    directory, _ = tiny_encoder(tmp_path / "encoder")
    modules = json.loads((directory / "modules.json").read_text())
    first, pooling = modules[:2]
    for wrong in ([*modules, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}], [first], [],
                  [first, pooling | {"path": "../1_Pooling"}], [first | {"path": "0_Transformer"}, pooling]):
        write_json(directory / "modules.json", wrong)
        with pytest.raises(InputError, match="modules"):
            Encoder.from_dir(directory)


def test_damaged_weights_and_files_are_refused(tmp_path):
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
    with pytest.raises(InputError, match="not a readable safetensors file"):
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


# ----- the index -----------------------------------------------------------------------------------------------------

def test_search_is_brute_force(tiny, records):
    index = Index.build(tiny, records)
    queries = tiny.encode(random_texts(9, seed=8), is_query=True)
    scores, ids = index.search(queries, 5)
    exact = queries @ index.vectors.T
    assert scores.shape == ids.shape == (9, 5) and scores.dtype == np.float32 and ids.dtype == np.int64
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, ids, 1), scores, atol=1e-6)
    found, own = index.search(index.vectors, 1)
    assert (own[:, 0] == np.arange(30)).all() and np.allclose(found, 1, atol=1e-5)
    assert index.search(queries, 1000)[1].shape == (9, 30)  # what there is
    for vectors, k in ((queries, 0), (queries[0], 1), (queries[:, :7], 1)):
        with pytest.raises(InputError, match="search: vectors"):
            index.search(vectors, k)


def test_other_factories_are_deterministic_and_wrong_ones_refused(tiny, records):
    first, second = (Index.build(tiny, records, factory="IVF4,Flat") for _ in range(2))
    queries = tiny.encode(random_texts(9, seed=8))
    assert all((a == b).all() for a, b in zip(first.search(queries, 5), second.search(queries, 5)))
    for factory in ("nonsense", "", "IVF900,Flat", "LSH"):
        with pytest.raises(InputError, match="--factory") as error:
            Index.build(tiny, records, factory=factory)
        assert "\n" not in str(error.value)


def test_an_index_comes_back_as_it_was_saved(tiny, records, saved, tmp_path):
    index = Index.load(saved, tiny)
    assert index.records == records and index.encoder_dir == str(tiny.directory)
    assert (index.vectors == tiny.encode([record["instruction"] for record in records])).all()
    index.save(tmp_path / "again")
    assert sorted(path.name for path in saved.iterdir()) == ["manifest.json", "records.jsonl", "vectors.safetensors"]
    assert all(path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in saved.iterdir())


@pytest.mark.parametrize("file", ["manifest.json", "records.jsonl", "vectors.safetensors"])
def test_every_flipped_bit_and_a_missing_file_are_noticed(saved, file):
    path = saved / file
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 300)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError) as error:
            Index.load(saved)
        assert file in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(content[:-1] if file != "manifest.json" else content[:-3])
    with pytest.raises(InputError):
        Index.load(saved)
    path.unlink()
    with pytest.raises((InputError, FileNotFoundError)):
        Index.load(saved)


def test_wrong_contents_under_right_hashes_are_noticed(saved):
    reseal(saved, count=29)
    with pytest.raises(InputError, match="expected float32"):
        Index.load(saved)
    reseal(saved, count=30)
    lines = (saved / "records.jsonl").read_text().splitlines(keepends=True)
    for wrong, message in ((lines[:-1], "29 records"), ([*lines[:-1], "[1]\n"], "records.jsonl:30")):
        (saved / "records.jsonl").write_text("".join(wrong))
        reseal(saved)
        with pytest.raises(InputError, match=message):
            Index.load(saved)
    (saved / "records.jsonl").write_text("".join(lines))
    vectors = np.ones((30, 48), dtype=np.float32) / np.float32(48 ** 0.5)
    for wrong in (np.full_like(vectors, np.nan), vectors * 2, vectors.astype(np.float64), vectors[:, :7].copy()):
        save_file({"vectors": wrong}, saved / "vectors.safetensors")
        reseal(saved)
        with pytest.raises(InputError, match="vectors"):
            Index.load(saved)
    save_file({"other": vectors}, saved / "vectors.safetensors")
    reseal(saved)
    with pytest.raises(InputError, match="not readable"):
        Index.load(saved)


def test_another_encoder_is_noticed(saved, tmp_path):
    other = Encoder.from_dir(tiny_encoder(tmp_path / "bge-other-en", seed=9)[0])
    with pytest.raises(InputError, match="model_sha256"):
        Index.load(saved, other)
    mean = Encoder.from_dir(tiny_encoder(tmp_path / "bge-mean-en", "mean")[0])
    with pytest.raises(InputError, match="pooling is 'mean'; the index was built with 'cls'"):
        Index.load(saved, mean)


@pytest.mark.parametrize("at", ["save_file", "sha256"])
def test_a_save_that_fails_leaves_the_old_index(tiny, records, saved, monkeypatch, at):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*args):
        raise OSError("disk full")
    index = Index.build(tiny, records[:3])
    monkeypatch.setattr(retrieve, at, fail)
    with pytest.raises(OSError, match="disk full"):
        index.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["index"]


def test_saving_never_replaces_something_else(tiny, records, tmp_path):
    (tmp_path / "home").mkdir()
    Index.build(tiny, records).save(tmp_path / "home")  # an empty folder is as good as none
    (tmp_path / "home" / "thesis.tex").write_text("…")
    for path in (tmp_path / "home", tmp_path / "home" / "thesis.tex"):
        with pytest.raises(InputError, match="is no index"):
            Index.build(tiny, records).save(path)
    assert (tmp_path / "home" / "thesis.tex").exists()


# ----- command line --------------------------------------------------------------------------------------------------

def run(capsys, *argv):
    """(exit status, stdout, stderr) of `python retrieve.py argv`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: main([str(arg) for arg in argv]))
    return (ended.value.code, *capsys.readouterr())


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_build_then_search(tiny, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [
        {"instruction": "which drug for asthma", "response": "…"},
        {"prompt": [{"role": "user", "content": "pain in the chest"}],
         "chosen": [{"role": "assistant", "content": "…"}]}])
    assert run(capsys, "build", "--data", data, "--encoder", tiny.directory, "--out", tmp_path / "index")[0] == 0
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert manifest["sources"] == [{"path": str(data), "sha256": sha256(data), "rows": 2}]
    assert manifest["encoder"]["model_sha256"] == sha256(tiny.directory / "model.safetensors")
    status, out, err = run(capsys, "search", "--index", tmp_path / "index", "--k", 9, "pain in the chest", "--json")
    results = json.loads(out)["results"]
    assert status == 0 and err == "" and len(results) == 2 and results[0]["score"] >= results[1]["score"]
    assert results[0]["record"] in [json.loads(line) for line in data.read_text().splitlines()]
    status, out, err = run(capsys, "search", "--index", tmp_path / "index", "asthma")
    assert status == 0 and err == "" and len(out.splitlines()) == 2 and "which drug for asthma" in out


def test_bad_rows_stop_or_are_counted(tiny, tmp_path, capsys):
    good = {"instruction": "pain", "response": "…"}
    build = ["build", "--encoder", tiny.directory, "--out", tmp_path / "index", "--data"]
    bad = ['{"instruction": ""}', '{"response": "x"}', '{"instruction": 3}', '{"instruction": ["a"]}', "{", "[]",
           '{"instruction": "\\ud800", "response": "x"}', '{"instruction": "a", "response": "\\udfff"}']
    for row in bad:
        status, out, err = run(capsys, *build, jsonl(tmp_path / "data.jsonl", [good, row]))
        assert status == 2 and out == "" and "data.jsonl:2: " in err and err.count("\n") == 1
    status, out, err = run(capsys, *build, jsonl(tmp_path / "data.jsonl", [good, *bad]), "--on-bad-row", "skip")
    assert status == 0 and "left out 8 bad rows" in err and "1 records" in out
    for rows in ([], bad):
        status, out, err = run(capsys, *build, jsonl(tmp_path / "data.jsonl", rows), "--on-bad-row", "skip")
        assert status == 2 and "no records" in err
    assert run(capsys, *build, jsonl(tmp_path / "data.jsonl", [good]), "--field", "question")[0] == 2


def test_wrong_input_is_one_line_and_status_2(tiny, saved, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [{"instruction": "pain", "response": "…"}])
    other = tiny_encoder(tmp_path / "other", seed=9)[0]
    gone = tmp_path / "gone"
    for argv in (["build", "--data", gone], ["build", "--data", tmp_path], ["build", "--data", data, "--encoder", gone],
                 ["build", "--data", data, "--encoder", saved],
                 ["build", "--data", data, "--encoder", tiny.directory, "--out", tiny.directory],
                 ["build", "--data", data, "--encoder", tiny.directory, "--out", gone, "--factory", "nonsense"],
                 ["search", "--index", gone, "pain"], ["search", "--index", tiny.directory, "pain"],
                 ["search", "--index", saved, "  "], ["search", "--index", saved, "\udcff"],
                 ["search", "--index", saved, "pain", "--encoder", other],
                 ["search", "--index", saved, "pain", "--encoder", gone], ["search", "pain", "--k", 0], [],
                 ["build", "--data", data, "--batch-tokens", "x"]):
        status, out, err = run(capsys, *argv)
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, argv
        assert not gone.exists()


def test_two_ranks_build_the_index_of_one(tiny, records, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", records[:-1])  # an odd number: the shares differ in length
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    processes = [subprocess.Popen(
        [sys.executable, ROOT / "retrieve.py", "build", "--data", data, "--out", tmp_path / "two", "--encoder",
         tiny.directory], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        stdout=subprocess.DEVNULL) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert run(capsys, "build", "--data", data, "--out", tmp_path / "one", "--encoder", tiny.directory)[0] == 0
    one, two = Index.load(tmp_path / "one"), Index.load(tmp_path / "two")
    assert one.records == two.records == records[:-1]
    np.testing.assert_allclose(one.vectors, two.vectors, atol=1e-6)
    assert all(one.manifest[key] == two.manifest[key] for key in ("encoder", "count", "sources", "factory"))


def test_one_rank_alone_just_encodes(tiny, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (encode_in_parallel(tiny, ["pain"]) == tiny.encode(["pain"])).all()
