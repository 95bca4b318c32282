"""Hugging Face model folders, in and out: config.json, safetensors shards and their index, names and shapes.

    folder/config.json                      sizes: `read_config` checks them, model.LlamaConfig holds them
    folder/model.safetensors                the weights, or model-00001-of-00004.safetensors … and their index
    folder/tokenizer.json, …                copied from the model that a run started from

This file knows tensors by name and never the class Llama. Two of our matrices are stacks of Hugging Face's: qkv is
q, k, v one below the other, gate_up is gate and up. Nothing is ever unpickled, and nothing is read whole that can be
read in pieces: loading an 8B model takes the memory of its weights and 8 MB.
"""
import contextlib
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import InputError, one_line, read_json, require_dir, written_aside
from rounding import copy_weights_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by their names on the command line

# ----- config.json ---------------------------------------------------------------------------------------------------

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path):
    """A Hugging Face config.json -> {field of LlamaConfig: value}, with rope_scaling a dict of ROPE_SCALING or None.

    InputError for another architecture, and for a setting that this code cannot run.
    """
    raw = read_json(path)

    def check(right, key, expected):
        if not right:
            raise InputError(f"{path}: {key} is {json.dumps(raw.get(key))}; expected {expected}")
    check(raw.get("model_type") == "llama", "model_type", '"llama": only Llama-architecture models run here')
    check(raw.get("hidden_act", "silu") == "silu", "hidden_act", '"silu"')
    for key in ("attention_bias", "mlp_bias", "rope_interleaved", "quantization_config"):
        check(not raw.get(key), key, "none: this model has no such part")
    heads = raw.get("num_attention_heads")
    kv_heads = raw.get("num_key_value_heads") or heads  # absent before Llama 2 70B
    defaults = {"num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
                "tie_word_embeddings": False}  # what transformers takes for a key that is absent
    values = defaults | {key: raw[key] for key in SIZES if raw.get(key) is not None}
    for key in SIZES[:-2]:
        if key != "head_dim" or key in values:
            check(type(values.get(key)) is int and values[key] > 0, key, "a whole number above 0")
    check(type(values["rms_norm_eps"]) in (int, float), "rms_norm_eps", "a number")
    check(type(values["tie_word_embeddings"]) is bool, "tie_word_embeddings", "true or false")
    check(heads % values["num_key_value_heads"] == 0, "num_key_value_heads", f"a divisor of {heads} heads")
    values.setdefault("head_dim", values["hidden_size"] // heads)
    check(values["head_dim"] % 2 == 0, "head_dim", "an even number")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 writes rope_parameters
    check(isinstance(rope, dict), "rope_scaling", "a JSON object")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    check(isinstance(theta, (int, float)) and theta > 0, "rope_theta", "a number above 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    check(kind in ("default", "llama3"), "rope_scaling", 'rope_type "default" or "llama3"')
    scaling = {key: rope.get(key) for key in ROPE_SCALING} if kind == "llama3" else None
    check(not scaling or all(isinstance(value, (int, float)) and value > 0 for value in scaling.values()),
          "rope_scaling", f"the numbers {', '.join(ROPE_SCALING)}")
    return values | {"rope_theta": float(theta), "rope_scaling": scaling}


def config_json(config):
    """The config.json that transformers and vLLM read, as a dict; `config` is a LlamaConfig."""
    values = asdict(config)
    scaling = values.pop("rope_scaling")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, **values, "rope_scaling": scaling and {**scaling, "rope_type": "llama3"}}


def stop_ids_of(directory):
    """The end-of-text ids of generation_config.json, or of config.json where that has none; a set, empty if neither."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(one, int) for one in ids):
                raise InputError(f"{path}: eos_token_id is {json.dumps(ids)}; expected a number or a list of numbers")
            return set(ids)
    return set()

# ----- names and shapes ----------------------------------------------------------------------------------------------


def checkpoint_names(config):
    """{our parameter: the Hugging Face tensors that are its rows, one below the other}."""
    names = {"embed.weight": ["model.embed_tokens.weight"]}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names |= {
            f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.qkv.weight": [f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"],
            f"{ours}.attention.out.weight": [f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.mlp_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.gate_up.weight": [f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"],
            f"{ours}.mlp.down.weight": [f"{theirs}.mlp.down_proj.weight"]}
    names["norm.weight"] = ["model.norm.weight"]
    if not config.tie_word_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    return names


def checkpoint_shapes(config):
    """{Hugging Face tensor: its shape} of a model of this config, in the order of `checkpoint_names`."""
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shape_of = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width),
                "o_proj": (width, queries), "gate_proj": (inner, width), "up_proj": (inner, width),
                "down_proj": (width, inner), "embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    # every other tensor is the weight of a norm
    return {name: shape_of.get(name.split(".")[-2], (width,))
            for stacked in checkpoint_names(config).values() for name in stacked}


def parameter_count(config):
    """How many parameters a model of this config has; a tied head counts once."""
    return sum(math.prod(shape) for shape in checkpoint_shapes(config).values())

# ----- reading -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_safetensors(path):
    """safe_open that reports a damaged file, by name, as InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: damaged safetensors file ({one_line(error)})") from None


def checkpoint_files(directory):
    """{tensor name: the safetensors file that holds it} of a folder with one file or with shards and their index."""
    directory = require_dir(directory, "a model (config.json and safetensors files)")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: no weight_map; expected tensor names mapped to file names")
        paths = {name: directory / file for name, file in weight_map.items()}
        for path in set(paths.values()):
            if "\0" in str(path) or path.parent.resolve() != directory.resolve() or path.name in ("", ".", ".."):
                raise InputError(f"{index}: names the file {str(path)!r}; expected files of its own folder only")
            if not path.is_file():
                raise InputError(f"{path}: no such file; {index.name} expects it")
        for path in set(paths.values()):
            with open_safetensors(path) as file:
                absent = {name for name, holder in paths.items() if holder == path} - set(file.keys())
            if absent:
                raise InputError(f"{path}: {listed(absent)} missing; {index.name} expects them there")
        return paths
    path = directory / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected model.safetensors or model.safetensors.index.json")
    with open_safetensors(path) as file:
        return dict.fromkeys(file.keys(), path)


def listed(names, most=5):
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_checkpoint(files, config):
    """Compares every name and shape with what the config asks for; InputError lists what is missing or extra."""
    expected = checkpoint_shapes(config)
    folder = next(iter(files.values())).parent if files else "checkpoint"
    extra = {name for name in set(files) - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        extra.discard("lm_head.weight")  # the same tensor stored twice, as some tools do
    faults = [f"{what} {listed(names)}" for what, names in
              (("missing", set(expected) - set(files)), ("not expected", extra)) if names]
    for path in sorted(set(files.values())):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open file is no dict)
                if name in expected and files.get(name) == path:
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != expected[name]:
                        faults.append(f"{name} is {list(shape)}, expected {list(expected[name])}")
    if faults:
        raise InputError(f"{folder}: the tensors do not fit config.json: {'; '.join(faults[:5])}")


def read_rows(files, names, start, stop):
    """Rows start … stop of the Hugging Face tensors `names` set one below the other, piece by piece: (offset, tensor).

    The file is memory-mapped anew for each piece of at most 8 MB, so no more than that is resident beside the model.
    """
    begin = 0
    for name in names:
        with open_safetensors(files[name]) as file:
            shape = file.get_slice(name).get_shape()
        step = max(1, (1 << 21) // math.prod(shape[1:]))
        first, last = max(start - begin, 0), min(stop - begin, shape[0])
        for row in range(first, last, step):
            with open_safetensors(files[name]) as file:
                piece = file.get_slice(name)[row:min(row + step, last)]
            yield begin + row - start, piece
        begin += shape[0]

# ----- writing -------------------------------------------------------------------------------------------------------

COPIED_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                "added_tokens.json", "generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt",
                "USE_POLICY.md")


def write_checkpoint(directory, config, parameter, *, source=None, dtype=torch.bfloat16, seed=0,
                     max_shard_bytes=5_000_000_000, add_files=None):
    """Writes config.json, safetensors shards and their index, aside and renamed; tied weights are stored once.

    `parameter(name)` gives our parameter of that name, whole; it is asked for one at a time. fp32 becomes bf16 by
    stochastic rounding from `seed`. Tokenizer and generation settings are copied from the folder `source`;
    `add_files(folder)` may add more (a model card) before the folder gets its name.
    """
    names, shapes = checkpoint_names(config), checkpoint_shapes(config)
    shards, size = [[]], 0  # lists of our parameter names
    for name, stacked in names.items():
        n_bytes = sum(math.prod(shapes[one]) for one in stacked) * dtype.itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    with written_aside(directory) as aside:
        aside.mkdir()
        weight_map, generator = {}, torch.Generator("cpu").manual_seed(seed)
        for number, shard in enumerate(shards, 1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else "model.safetensors"
            tensors = {}
            for name in shard:
                exact = parameter(name).detach().cpu()
                stored = torch.empty(exact.shape, dtype=dtype)
                copy_weights_(stored, exact, generator)
                tensors |= dict(zip(names[name], stored.split([shapes[one][0] for one in names[name]])))
            save_file(tensors, aside / file_name, metadata={"format": "pt"})
            (aside / file_name).chmod(0o644)  # safetensors makes a file that only its owner may read
            weight_map |= dict.fromkeys(tensors, file_name)
        if shards[1:]:
            total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name in COPIED_FILES if source else ():
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, aside / name)
        raw = {"torch_dtype": str(dtype).removeprefix("torch.")} | config_json(config)
        if source:
            given = read_json(Path(source) / "config.json")
            raw = {key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in given} | raw
        (aside / "config.json").write_text(json.dumps(raw, indent=2))
        if add_files:
            add_files(aside)
