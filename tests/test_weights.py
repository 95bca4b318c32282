"""weights.py: every folder that transformers reads, and one line for every folder that is damaged."""
import json

import pytest
import torch
from conftest import CONFIGS, tiny_pair
from safetensors.torch import load_file, save_file

import weights
from files import InputError
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
    ({"hidden_size": 32}, "do not fit"), ({"num_hidden_layers": 4}, "missing model.layers.3"),
    ({"num_hidden_layers": 2}, "not expected model.layers.2"), ({"vocab_size": 301}, "[300, 64], expected [301, 64]")])
def test_a_config_that_does_not_fit_is_refused_by_name(changes, found, tmp_path):
    tiny_pair("tied", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert found in str(error.value) and "\n" not in str(error.value)


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
