"""weights.py: every folder that transformers reads, and one line for every folder that is damaged."""
import errno
import json
import resource
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import CONFIGS, LLAMA3, tiny_pair
from safetensors.torch import load_file, save_file

import weights
from files import InputError, one_line
from model import LlamaConfig, load_model, save_model

# ----- config.json ---------------------------------------------------------------------------------------------------


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("changes, found", [
    ({"model_type": "qwen2"}, '"qwen2"'), ({"hidden_act": "gelu"}, '"gelu"'),
    ({"attention_bias": True}, "attention_bias"), ({"num_key_value_heads": 3}, "divisor"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"hidden_size": "64"}, "hidden_size"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"logit_scale": 0.1}, "logit_scale"),
    ({"is_causal": False}, "is_causal is false"), ({"sliding_window": 64}, "sliding_window is 64"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"attention_chunk_size": 64}, "attention_chunk_size"), ({"transformers_weights": "other.safetensors"}, "other"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "expected no full_attention"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor of 1"),
    ({"rope_parameters": {"rope_theta": None}}, "rope_theta above 0"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "the numbers factor, low_freq_factor"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor below high_freq_factor"),
    ({"hidden_size": 32}, "do not fit"), ({"num_hidden_layers": 4}, "missing model.layers.3"),
    ({"num_hidden_layers": 2}, "not expected model.layers.2"), ({"vocab_size": 301}, "[300, 64], expected [301, 64]")])
def test_a_config_that_does_not_fit_is_refused_by_name(changes, found, tmp_path):
    tiny_pair("tied", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert found in str(error.value) and "\n" not in str(error.value)


LLAMA3_OF_64 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64}


def same_logits(folder, start=0):
    """Our model of a folder, after its logits at positions from `start` on were compared with transformers'."""
    theirs, ours = transformers.LlamaForCausalLM.from_pretrained(folder), load_model(folder, dtype=torch.float32)
    ids, positions = torch.arange(40)[None], torch.arange(start, start + 40)
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions[None]).logits
        assert (ours(ids, positions=positions) - expected).abs().max() <= 1e-5
    return ours


@pytest.mark.parametrize("changes, notices", [
    ({"rope_scaling": LLAMA3_OF_64, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
     ["a rope_scaling and other rope_parameters"]),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 300.0}, "rope_parameters": LLAMA3_OF_64},
     ["a rope_scaling and other rope_parameters"]),
    ({"rope_scaling": {}, "rope_parameters": LLAMA3_OF_64}, []),
    ({"rope_scaling": None, "rope_parameters": LLAMA3_OF_64}, []),
    ({"rope_parameters": None, "rope_theta": 300}, []),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 500000.0},
     ["rope_theta 500000.0 at top level and 300.0 inside; takes 300"]),
    ({"rope_parameters": {**LLAMA3_OF_64, "type": "yarn"}, "original_max_position_embeddings": 512},
     ["original_max_position_embeddings 512 at top level and 64 inside; takes 512"]),
    ({"rope_parameters": {key: value for key, value in LLAMA3_OF_64.items() if key[:8] != "original"},
      "max_position_embeddings": 256}, [])],
    ids=lambda changes: ", ".join(changes) if isinstance(changes, dict) else "")
def test_a_rotation_stated_twice_is_read_as_transformers_reads_it(changes, notices, tmp_path, capsys):
    tiny_pair("tied", tmp_path)
    edit_config(tmp_path, **changes)
    capsys.readouterr()
    same_logits(tmp_path, start=1_000)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice: ")]
    assert len(lines) == len(notices) and all(notice in line for notice, line in zip(notices, lines))


def test_settings_that_change_nothing_are_taken(tmp_path):
    tiny_pair("tied", tmp_path)
    expected = LlamaConfig.from_json(tmp_path / "config.json")
    for changes in ({"sliding_window": 64, "use_sliding_window": False}, {"sliding_window": 2048},
                    {"sliding_window": None, "use_sliding_window": None, "layer_types": ["full_attention"] * 3},
                    {"partial_rotary_factor": 1.0, "logit_scale": 1.0, "is_causal": True, "pretraining_tp": 2}):
        edit_config(tmp_path, **changes)
        assert LlamaConfig.from_json(tmp_path / "config.json") == expected


def test_stop_ids_come_from_generation_config_then_config(tmp_path):
    assert weights.stop_ids_of(tmp_path) == set()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert weights.stop_ids_of(tmp_path) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert weights.stop_ids_of(tmp_path) == {128001, 128008, 128009}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="eos_token_id"):
        weights.stop_ids_of(tmp_path)

# ----- names and shapes ----------------------------------------------------------------------------------------------


def test_parameter_count_of_llama_3_1_8b():
    assert weights.parameter_count(LlamaConfig()) == 8_030_261_248


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name, tmp_path):
    theirs, ours = tiny_pair(name, tmp_path)
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    if ours.config.tie_word_embeddings:  # transformers names the one tensor twice
        expected.pop("lm_head.weight")
    assert weights.checkpoint_shapes(ours.config) == expected
    assert weights.parameter_count(ours.config) == theirs.num_parameters()
    rows = {name: sum(expected[one][0] for one in stacked)
            for name, stacked in weights.checkpoint_names(ours.config).items()}
    assert rows == {name: len(parameter) for name, parameter in ours.named_parameters()}

# ----- reading -------------------------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    _, ours = tiny_pair("tied", tmp_path / "good")
    save_model(ours, tmp_path / "shards", max_shard_bytes=60_000)
    index = tmp_path / "shards/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    def refused(match, folder=tmp_path / "shards"):
        with pytest.raises(InputError, match=match) as error:
            load_model(folder)
        assert "\n" not in str(error.value)
    for outside in ("../good/model.safetensors", "/etc/passwd", "sub/../../good/model.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": outside}}))
        refused("files of its own folder only")
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": "model-00099.safetensors"}}))
    refused("model-00099.safetensors: no such file")
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_tail.weight": weight_map["model.norm.weight"]}}))
    refused("lm_tail.weight missing")
    index.write_text('{"weight_map": {"a": "b", "a": "c"}}')
    refused("stands twice")
    index.write_text("[" * 100_000)
    refused("nested too deeply|not valid JSON")
    path = tmp_path / "good/model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 8, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("damaged safetensors", tmp_path / "good")
    save_file({"model.norm.weight": torch.ones(64)}, path)
    refused("missing", tmp_path / "good")
    path.unlink()
    refused("expected model.safetensors", tmp_path / "good")
    refused("does not exist", tmp_path / "nowhere")


def test_tied_checkpoint_with_the_head_stored_again_is_accepted(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path, dtype=torch.float32).head.weight, ours.embed.weight)


def edit_tensors(folder, **changes):
    """Changes tensors of model.safetensors, by name with __ for the dots; None takes one out."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return tensors


def test_a_model_declared_tied_keeps_a_head_of_its_own(tmp_path, capsys):
    """As transformers takes it, and through an export; the head differs from the embedding in its last number alone."""
    theirs, _ = tiny_pair("tied", tmp_path / "model")
    head = theirs.lm_head.weight.detach().clone()
    head[-1, -1] += 1
    edit_tensors(tmp_path / "model", lm_head__weight=head)
    ours = same_logits(tmp_path / "model")
    assert "keeps both" in capsys.readouterr().err
    assert torch.equal(ours.head.weight, head) and not torch.equal(ours.embed.weight, head)
    save_model(ours, tmp_path / "export")
    assert torch.equal(same_logits(tmp_path / "export").head.weight, head)


def test_heads_are_compared_to_the_last_piece(tmp_path):
    """5 rows of 2^20 numbers, of which two make a piece."""
    config = replace(LlamaConfig(), vocab_size=5, hidden_size=1 << 20)
    head = torch.zeros(5, 1 << 20, dtype=torch.float8_e4m3fn)
    for differs in (False, True):
        head[-1, -1] = differs
        save_file({weights.EMBEDDING: torch.zeros(5, 1 << 20, dtype=torch.bfloat16), weights.HEAD: head},
                  tmp_path / "model.safetensors")
        assert weights.has_own_head(weights.checkpoint_files(tmp_path), config) is differs


def test_a_tied_matrix_may_be_stored_under_the_head_s_name_alone(tmp_path):
    theirs, _ = tiny_pair("tied", tmp_path)
    edit_tensors(tmp_path, lm_head__weight=theirs.lm_head.weight.detach(), model__embed_tokens__weight=None)
    assert same_logits(tmp_path).config.tie_word_embeddings


def test_one_whole_file_goes_before_shards(tmp_path, capsys):
    """Shards of a model, and beside them another model in one file; then the shards go, and the index is damaged."""
    _, old = tiny_pair("tied", tmp_path / "old")
    tiny_pair("tied", tmp_path / "new", seed=1)
    save_model(old, tmp_path / "shards", max_shard_bytes=60_000)
    for path in (tmp_path / "shards").iterdir():
        path.rename(tmp_path / "new" / path.name)
    capsys.readouterr()
    assert not torch.equal(same_logits(tmp_path / "new").embed.weight, old.embed.weight)
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice: ")] == [
        f"notice: {tmp_path}/new: found model.safetensors and model.safetensors.index.json; reads the former, as "
        "transformers does"]
    for path in (tmp_path / "new").glob("model-*.safetensors"):
        path.unlink()
    (tmp_path / "new/model.safetensors.index.json").write_text('{"weight_map": ')
    same_logits(tmp_path / "new")


def test_a_tensor_that_the_index_does_not_name_is_read_and_one_in_two_shards_refused(tmp_path):
    theirs, ours = tiny_pair("tied", tmp_path / "whole")
    save_model(ours, tmp_path / "shards", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    shard = tmp_path / "shards" / index["weight_map"]["model.norm.weight"]
    head = theirs.lm_head.weight.detach() * 2
    save_file(load_file(shard) | {"lm_head.weight": head}, shard, metadata={"format": "pt"})
    assert torch.equal(same_logits(tmp_path / "shards").head.weight, head)
    save_file(load_file(shard) | {"model.embed_tokens.weight": head}, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"found model\.embed_tokens\.weight, of which another file has one"):
        load_model(tmp_path / "shards")


def test_whole_numbers_and_adapters_are_no_weights(tmp_path):
    tiny_pair("tied", tmp_path)
    before = edit_tensors(tmp_path, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(InputError, match=r"model\.norm\.weight is stored as I8"):
        load_model(tmp_path)
    edit_tensors(tmp_path, **{name.replace(".", "__"): tensor.to(torch.float64) for name, tensor in before.items()})
    load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="found an adapter beside"):
        load_model(tmp_path)


def test_rows_are_read_across_the_tensors_that_are_stacked(tmp_path):
    """10 + 3 + 5 rows of 2^20 numbers, of which two make a piece; rows 7 to 13 begin and end inside a tensor."""
    tensors = {name: torch.arange(start, start + rows, dtype=torch.uint8)[:, None].repeat(1, 1 << 20)
               for name, rows, start in (("a", 10, 0), ("b", 3, 10), ("c", 5, 13))}
    save_file(tensors, tmp_path / "model.safetensors")
    files = weights.checkpoint_files(tmp_path)
    pieces = list(weights.read_rows(files, ["a", "b", "c"], 7, 14))
    assert [(offset, rows[:, 5].tolist()) for offset, rows in pieces] \
        == [(0, [7, 8]), (2, [9]), (3, [10, 11]), (5, [12]), (6, [13])]
    assert all(piece.eq(piece[:, :1]).all() for _, piece in pieces)

# ----- writing -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_of_the_system_and_names_the_folder(tmp_path):
    """A limit on the size of a file stands for the disk: what safetensors raises is no OSError."""
    _, ours = tiny_pair("tied", tmp_path / "good")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save_model(ours, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG and one_line(error.value) == f"{tmp_path}/out: File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_saving_is_atomic(tmp_path, monkeypatch):
    _, ours = tiny_pair("tied", tmp_path / "good")
    save_model(ours, tmp_path / "out", source=tmp_path / "good")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(ours, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "out"]
