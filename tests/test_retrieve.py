"""retrieve.py: search beside numpy and sentence-transformers, damaged and foreign indices, and the command."""
import json
import os
import socket
import subprocess
import sys

import faiss
import numpy as np
import pytest
from conftest import ROOT, held_elsewhere, random_texts, tiny_encoder, write_json
from safetensors.numpy import save_file

import retrieve
from encoder import Encoder
from files import InputError, run_main, sha256
from retrieve import Index, encode_in_parallel, main, manifest_sha256

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_search_looks_into_as_many_cells_as_the_root_of_all(tiny, records):
    index = Index.build(tiny, records, factory="IVF4,Flat")
    assert faiss.extract_index_ivf(index.faiss).nprobe == 2


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


def test_a_dot_model_is_searched_by_its_dot_product(records, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    directory, _ = tiny_encoder(tmp_path / "encoder", "mean")
    write_json(directory / "modules.json", json.loads((directory / "modules.json").read_text())[:2])
    write_json(directory / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})
    Index.build(Encoder.from_dir(directory), records).save(tmp_path / "index")
    index, theirs = Index.load(tmp_path / "index"), st.SentenceTransformer(str(directory), device="cpu")
    texts, queries = [record["instruction"] for record in records], random_texts(40, seed=8)
    expected = theirs.similarity(theirs.encode_query(queries), theirs.encode_document(texts)).numpy()
    scores, ids = index.search(index.load_encoder().encode(queries, is_query=True), 30)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), scores, rtol=1e-4)
    assert (ids[:, 0] == expected.argmax(1)).all()
    assert (ids[:, 0] != (expected / np.linalg.norm(theirs.encode(texts), axis=1)).argmax(1)).sum() > 5  # the cosine's
    save_file({"vectors": np.full_like(index.vectors, np.nan)}, tmp_path / "index" / "vectors.safetensors")
    reseal(tmp_path / "index")
    with pytest.raises(InputError, match="vectors not finite"):
        Index.load(tmp_path / "index")


def test_of_records_with_one_question_and_conversation_the_first_is_kept(tiny, tmp_path, capsys):
    rows = [{"instruction": "pain", "response": "a", "id": 1}, {"instruction": "pain", "response": "a", "id": 1},
            {"instruction": "pain", "response": "b"}, {"id": 2, "response": "a", "instruction": "pain"},
            {"instruction": "fever", "response": "a"}, {"prompt": "pain", "chosen": "a", "rejected": "c"},
            {"instruction": "chest"}, {"instruction": "chest"}, {"instruction": "chest", "id": 3}]
    index = Index.build(tiny, rows)
    assert index.records == [rows[0], rows[2], rows[4], rows[6], rows[8]] and index.manifest["repeats"] == 4
    status, out, err = run(capsys, "build", "--data", jsonl(tmp_path / "a.jsonl", rows[:4]),
                           jsonl(tmp_path / "b.jsonl", rows[4:]), "--encoder", tiny.directory, "--out", tmp_path / "i")
    assert status == 0 and "5 records" in out and "left out 4 records that repeat" in err
    loaded = Index.load(tmp_path / "i", tiny)
    assert loaded.records == index.records
    assert len({json.dumps(loaded.records[i]) for i in loaded.search(tiny.encode(["pain"]), 4)[1][0]}) == 4


def test_of_one_conversation_trained_in_two_ways_both_records_are_kept(tiny):
    talk = [{"role": "user", "content": "pain"}, {"role": "assistant", "content": "Where?"},
            {"role": "user", "content": "chest"}, {"role": "assistant", "content": "Call."}]
    rows = [{"messages": talk}, {"messages": [talk[0], talk[1] | {"weight": 0}, *talk[2:]]}, {"messages": talk}]
    assert Index.build(tiny, rows).records == rows[:2]


def test_an_index_that_states_no_prompts_loads_if_the_encoder_has_none(saved, tiny):
    manifest = json.loads((saved / "manifest.json").read_text())
    old = {"directory", "name", "model_sha256", "tokenizer_sha256", "config_sha256", "pooling", "max_tokens",
           "query_instruction"}
    stated = {key: value for key, value in manifest["encoder"].items() if key in old}
    reseal(saved, encoder=stated)
    assert Index.load(saved).load_encoder().query_instruction == stated["query_instruction"] != ""
    settings = tiny.directory / "config_sentence_transformers.json"
    for change, message in (({"prompts": {"query": "which "}}, "query_instruction is 'which '; the index was built"),
                            ({"similarity_fn_name": "dot"}, "similarity is 'dot'; the index was built with 'cosine'"),
                            ({"prompts": {"query": stated["query_instruction"], "passage": "a "}}, "document_prompt")):
        try:
            write_json(settings, change)
            with pytest.raises(InputError, match=f"{message}.*build it again"):
                Index.load(saved).load_encoder()
        finally:
            settings.unlink()


@pytest.mark.parametrize("at", ["write_safetensors", "sha256"])
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


def test_build_warns_of_records_without_an_answer(tiny, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [{"instruction": "pain?"}, {"instruction": "fever?", "response": "Yes."}])
    status, _, err = run(capsys, "build", "--data", data, "--encoder", tiny.directory, "--out", tmp_path / "index")
    assert status == 0 and "warning: 1 records have no answer to learn from; ttt.py will pass over them" in err


def test_two_builds_do_not_write_one_index(tmp_path, capsys):
    with held_elsewhere(tmp_path / "index") as other:
        status, _, err = run(capsys, "build", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "index")
    assert status == 2 and f"index: process {other.pid} on " in err


def test_searches_use_the_instruction_the_index_was_built_with(tiny, tmp_path, capsys):
    data = jsonl(tmp_path / "data.jsonl", [{"instruction": text, "response": "…"} for text in random_texts(20, seed=3)])
    query = "which drug for asthma"
    for instruction in ("", "patient has chest "):
        assert run(capsys, "build", "--data", data, "--encoder", tiny.directory, "--out", tmp_path / "index",
                   "--query-instruction", instruction)[0] == 0
        manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
        assert manifest["encoder"]["query_instruction"] == instruction
        status, out, err = run(capsys, "search", "--index", tmp_path / "index", query, "--json", "--k", 1)
        found = json.loads(out)["results"][0]
        expected = (tiny.encode([instruction + query]) @ Index.load(tmp_path / "index").vectors.T)[0]
        assert (status, err) == (0, "") and found["id"] == expected.argmax()
        assert found["score"] == pytest.approx(expected.max(), abs=1e-5)
    status, out, err = run(capsys, "build", "--data", data, "--encoder", tiny.directory, "--out", tmp_path / "index",
                           "--query-instruction", "\udcff")
    assert status == 2 and "half a character" in err and err.count("\n") == 1


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


def vectors_of_length_1(n, seed=0):
    vectors = np.random.default_rng(seed).normal(0.4, 1, size=(n, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bare_index(vectors):
    return retrieve.Index(vectors.astype(np.float32), [{}] * len(vectors), {
        "factory": "Flat", "encoder": {"directory": "e"}})


def test_how_alike_an_index_s_questions_are():
    """Brute force; with equal vectors the nearest other may come before the record itself. Of more records than
    `sample` as many are drawn, and each finds its nearest among all."""
    vectors = vectors_of_length_1(41)
    vectors[7] = vectors[30]
    index, scores = bare_index(vectors), vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    expected = np.median(scores[np.tril_indices(41, -1)]), np.quantile(scores.max(1), 0.25)
    assert index.thresholds() == pytest.approx(expected, abs=1e-4)
    drawn = np.random.default_rng(0).permutation(41)[:14]
    far, near = index.thresholds(sample=14)
    assert near == pytest.approx(np.quantile(scores[drawn].max(1), 0.25), abs=1e-4)
    assert far == pytest.approx(np.median(scores[np.ix_(drawn, drawn)][np.tril_indices(14, -1)]), abs=1e-4)
    assert np.isnan(bare_index(vectors[:1]).thresholds()).all()
    assert bare_index(np.array([[3., 0], [-2, 0]])).thresholds() == (-6, -6)  # a dot product's, below −1


@pytest.mark.parametrize("found, scores, expected", [
    ([[0, 1], [1, -1], [2, -1]], [[1, 0.5], [1, -3e38], [1, -3e38]], 0.5),  # two records are alone in their cells
    ([[0, -1], [1, -1], [2, -1]], [[1, -3e38]] * 3, np.nan), ([[1, 2], [2, 0], [0, 1]], [[1.0000001] * 2] * 3, 1.0)])
def test_the_threshold_counts_only_what_was_found_and_is_rounded_as_scores_are(found, scores, expected, monkeypatch):
    index = bare_index(np.eye(3, dtype=np.float32))
    monkeypatch.setattr(index, "search", lambda vectors, k: (np.array(scores, np.float32), np.array(found)))
    assert index.thresholds()[1] == pytest.approx(expected, abs=0, nan_ok=True)
