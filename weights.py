"""Hugging Face model folders, in and out: config.json, safetensors shards and their index, names and shapes.

    folder/config.json                      sizes: `read_config` checks them, model.LlamaConfig holds them
    folder/model.safetensors                the weights, or model-00001-of-00004.safetensors … and their index
    folder/tokenizer.json, …                copied from the model that a run started from

This file knows tensors by name and never the class Llama. Two of our matrices are stacks of Hugging Face's: qkv is
q, k, v one below the other, gate_up is gate and up. Nothing is ever unpickled, and nothing is read whole that can be
read in pieces: loading an 8B model takes the memory of its weights and 8 MB.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import InputError, one_line, read_json, read_json_if_there, require_dir, sha256, written_aside
from rounding import copy_weights_

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by their names on the command line
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # others are codes that need a table or a scale

# ----- config.json ---------------------------------------------------------------------------------------------------

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_SCALING}
# settings that other programs obey in a config of the Llama architecture, and for which this code has no part
ABSENT = ("attention_bias", "mlp_bias", "rope_interleaved", "quantization_config", "compression_config",
          "attention_chunk_size", "per_layer_config", "transformers_weights")
NEUTRAL = {"partial_rotary_factor": 1, "logit_scale": 1, "is_causal": True}  # each with the value that changes nothing


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
    for key in ABSENT:
        check(not raw.get(key), key, "none: this model has no such part")
    for key, neutral in NEUTRAL.items():
        check(raw.get(key) in (None, neutral), key, json.dumps(neutral))
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
    longest, window, layers = values["max_position_embeddings"], raw.get("sliding_window"), raw.get("layer_types") or []
    check(not window or raw.get("use_sliding_window") is False or (type(window) is int and window >= longest),
          "sliding_window", "none: a position sees all before it")
    check(isinstance(layers, list) and all(one == "full_attention" for one in layers), "layer_types",
          '"full_attention" in every layer')
    return values | rotation_of(raw, longest, check)


def rotation_of(raw, longest, check):
    """rope_theta and rope_scaling as transformers finds them in a config.json of `longest` positions.

    Where a config.json states a thing twice: rope_scaling goes before rope_parameters (transformers 5's name for it), a
    rope_theta in there before one at top level, and an original_max_position_embeddings at top level before one inside.
    """
    def is_number(value):
        return type(value) in (int, float) and value > 0
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(name) or {}
    check(isinstance(given, dict), name, "a JSON object")
    kind = given.get("rope_type", given.get("type", "default"))
    check(kind in ("default", "llama3"), name, 'rope_type "default" or "llama3": no other rope_scaling runs here')
    unknown = {key for key, value in given.items() if value is not None} - ROPE_KEYS
    check(not unknown, name, f"no {listed(unknown)}")
    check(given.get("partial_rotary_factor") in (None, 1), name, "a partial_rotary_factor of 1")
    theta = given.get("rope_theta", raw.get("rope_theta", 10000.0))
    check(is_number(theta), name if "rope_theta" in given else "rope_theta", "a rope_theta above 0")
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    scaling = {"original_max_position_embeddings": longest} | {key: given[key] for key in ROPE_SCALING if key in given}
    if raw.get("original_max_position_embeddings") is not None:
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    check(len(scaling) == 4 and all(map(is_number, scaling.values())), name,
          f"a rope_scaling of the numbers {', '.join(ROPE_SCALING)}")
    check(scaling["low_freq_factor"] < scaling["high_freq_factor"], name, "a low_freq_factor below high_freq_factor")
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def config_json(config):
    """The config.json that transformers and vLLM read, as a dict; `config` is a LlamaConfig."""
    values = asdict(config)
    scaling = values.pop("rope_scaling")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, **values, "rope_scaling": scaling and {**scaling, "rope_type": "llama3"}}


def stop_ids_of(directory):
    """The set of ids that end a text, from generation_config.json or else config.json; empty if neither gives one."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        ids = read_json_if_there(path).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(one, int) for one in ids):
                raise InputError(f"{path}: eos_token_id is {json.dumps(ids)}; expected a number or a list of numbers")
            return set(ids)
    return set()


def print_notices(directory, config):
    """One line on stderr for each contradiction in a model's folder; `config` takes transformers' side of it."""
    directory = Path(directory)
    raw, notices = read_json(directory / "config.json"), []
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    taken = {"rope_theta": config.rope_theta, **(asdict(config.rope_scaling) if config.rope_scaling else {})}
    if (directory / WHOLE).is_file() and (directory / INDEX).is_file():
        notices.append(f"found {WHOLE} and {INDEX}; reads the former")
    if raw.get("tie_word_embeddings") and not config.tie_word_embeddings:
        notices.append("found tie_word_embeddings true and an lm_head.weight other than the embedding; keeps both")
    if raw.get("rope_parameters") and raw["rope_parameters"] != given:
        notices.append("found a rope_scaling and other rope_parameters; takes the former")
    for key in ("rope_theta", "original_max_position_embeddings"):
        if key in taken and None not in (raw.get(key), given.get(key)) and raw[key] != given[key]:
            notices.append(f"found {key} {raw[key]} at top level and {given[key]} inside; takes {taken[key]:g}")
    for notice in notices:
        print(f"notice: {directory}: {notice}, as transformers does", file=sys.stderr)

# ----- names and shapes ----------------------------------------------------------------------------------------------


def checkpoint_names(config, files=()):
    """{our parameter: the Hugging Face tensors that are its rows, one below the other}.

        "layers.0.attention.qkv.weight": ["model.layers.0.self_attn.q_proj.weight", … k_proj …, … v_proj …]

    A tied matrix is called after the embedding, or after the head if `files` (of `checkpoint_files`) have that alone.
    """
    alone = config.tie_word_embeddings and HEAD in files and EMBEDDING not in files
    names = {"embed.weight": [HEAD if alone else EMBEDDING]}
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
        names["head.weight"] = [HEAD]
    return names


def checkpoint_shapes(config, files=()):
    """{Hugging Face tensor: its shape} of a model of this config, in the order of `checkpoint_names`."""
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shape_of = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width),
                "o_proj": (width, queries), "gate_proj": (inner, width), "up_proj": (inner, width),
                "down_proj": (width, inner), "embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width)}
    # every other tensor is the weight of a norm
    return {name: shape_of.get(name.split(".")[-2], (width,))
            for stacked in checkpoint_names(config, files).values() for name in stacked}


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
    """{tensor name: the safetensors file that holds it} of a folder with one file or with shards and their index.

    One whole file goes before shards, as in transformers: an index beside it is left over from an earlier save.
    """
    directory = require_dir(directory, "a model (config.json and safetensors files)")
    adapter, whole, index = (directory / name for name in ("adapter_config.json", WHOLE, INDEX))
    if adapter.is_file():
        raise InputError(f"{adapter}: found an adapter beside the weights; expected it merged into them")
    if whole.is_file():
        with open_safetensors(whole) as file:
            return dict.fromkeys(file.keys(), whole)
    if not index.is_file():
        raise InputError(f"{whole}: no such file; expected {WHOLE} or {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: no weight_map; expected tensor names mapped to file names")
    paths = {name: directory / file for name, file in weight_map.items()}
    shards = sorted(set(paths.values()))
    for path in shards:
        if "\0" in str(path) or path.parent.resolve() != directory.resolve() or path.name in ("", ".", ".."):
            raise InputError(f"{index}: names the file {str(path)!r}; expected files of its own folder only")
        if not path.is_file():
            raise InputError(f"{path}: no such file; {index.name} expects it")
    for path in shards:
        with open_safetensors(path) as file:
            held = set(file.keys())
        absent = {name for name, holder in paths.items() if holder == path} - held
        if absent:
            raise InputError(f"{path}: {listed(absent)} missing; {index.name} expects them there")
        twice = {name for name in held if paths.setdefault(name, path) != path}  # a tensor need not be in the index
        if twice:
            raise InputError(f"{path}: found {listed(twice)}, of which another file has one; expected it in one file")
    return paths


def weights_sha256(directory):
    """One SHA-256, in hex digits, of config.json and all files of weights in a model's folder."""
    paths = sorted({Path(directory) / "config.json", *checkpoint_files(directory).values()})
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def stored_dtypes(directory):
    """The dtypes of a model folder's tensors, by safetensors' names: {"BF16"}, {"F32"}, …"""
    found = set()
    for path in set(checkpoint_files(directory).values()):
        with open_safetensors(path) as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
    return found


def listed(names, most=5):
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def has_own_head(files, config):
    """Whether the files hold an lm_head.weight that differs from the embedding; compared piece by piece."""
    if not {EMBEDDING, HEAD} <= set(files):
        return False
    for name in (EMBEDDING, HEAD):
        with open_safetensors(files[name]) as file:
            if file.get_slice(name).get_shape() != [config.vocab_size, config.hidden_size]:
                return True  # check_checkpoint names the tensor
    pieces = (read_rows(files, [name], 0, config.vocab_size) for name in (EMBEDDING, HEAD))
    return not all(torch.equal(one.double(), other.double()) for (_, one), (_, other) in zip(*pieces))


def check_checkpoint(files, config):
    """Compares every name and shape with what the config asks for; InputError lists what is missing or extra."""
    expected = checkpoint_shapes(config, files)
    folder = next(iter(files.values())).parent if files else "checkpoint"
    extra = {name for name in set(files) - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        extra.discard(HEAD)  # some tools store a tied matrix under both names; see has_own_head
    faults = [f"{what} {listed(names)}" for what, names in
              (("missing", set(expected) - set(files)), ("not expected", extra)) if names]
    for path in sorted(set(files.values())):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open file is no dict)
                if name in expected and files.get(name) == path:
                    stored = file.get_slice(name)
                    if tuple(stored.get_shape()) != expected[name]:
                        faults.append(f"{name} is {stored.get_shape()}, expected {list(expected[name])}")
                    if stored.get_dtype() not in STORED_DTYPES:
                        faults.append(f"{name} is stored as {stored.get_dtype()}, expected a floating-point type")
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


def write_safetensors(tensors, path, metadata=None):
    """save_file; an OSError, with the system's number, if the disk is full."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


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
            write_safetensors(tensors, aside / file_name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file_name)
        if shards[1:]:
            total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        for name in COPIED_FILES if source else ():
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, aside / name)
        raw = {"torch_dtype": str(dtype).removeprefix("torch.")} | config_json(config)
        if source:
            given = read_json(Path(source) / "config.json")
            raw = {key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in given} | raw
        (aside / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
        if add_files:
            add_files(aside)
