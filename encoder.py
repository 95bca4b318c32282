"""Texts in, vectors out: a BERT encoder by hand, and every kind of folder that one is kept in.

    x [M, D] = norm(word + position + type)          the tokens of a batch of texts end to end, without padding
    for each layer:   x = norm(x + attention(x));   x = norm(x + down(gelu(up(x))))
    vector of a text = x at [CLS] (bge) or its mean over the text (MiniLM)
    cosine models: scaled to length 1;   dot models: not scaled, unless modules.json says so

    config.json, *.safetensors              the BERT            tokenizer.json, tokenizer_config.json   tokens, case
    modules.json, 1_Pooling/config.json     pooling, scaling    sentence_bert_config.json               length, case
    config_sentence_transformers.json       prompts, similarity, dimensions

Every setting that changes a vector is followed as in sentence-transformers, or refused by name. A folder without
modules.json is a plain BERT: the vector is the mean over its tokens.
BERT: arXiv 1810.04805. Sentence vectors: arXiv 1908.10084. bge: arXiv 2309.07597.

    encoder = Encoder.from_dir("models/bge-large-en-v1.5")
    vectors = encoder.encode(["What causes urinary tract infections in children?"], is_query=True)

Shapes: N texts, M tokens of a batch, D width, H heads, C channels of a head.
"""
import contextlib
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from torch import nn
from tqdm import tqdm

from files import InputError, read_json, read_json_if_there, read_text, require_dir, sha256
from parallel import pick_device
from tokenizer import as_input_error, check_unicode
from weights import checkpoint_files, open_safetensors

BGE_QUERY_INSTRUCTION = "Represent this sentence for searching relevant passages: "  # the model cards of bge-*-en-v1.5


# ----- the BERT encoder ----------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2}  # where config.json has none


def read_bert_config(path):
    """The sizes in a Hugging Face config.json, as a dict. InputError for anything but the BERT that is built here."""
    raw = read_json(path)
    for key, expected in {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
                          "is_decoder": False, "quantization_config": None, "auto_map": None}.items():
        if raw.get(key, None if key == "model_type" else expected) != expected:
            raise InputError(f"{path}: {key} is {raw.get(key)!r}; expected {expected!r}, as in bge-*-en-v1.5, MiniLM")
    config = {"layer_norm_eps": raw.get("layer_norm_eps", 1e-12), "name": str(raw.get("_name_or_path")),
              "tokenizer_class": raw.get("tokenizer_class")}
    for key, default in SIZES.items():
        config[key] = raw.get(key, default)
        if type(config[key]) is not int or not 0 < config[key] < 2**31:
            raise InputError(f"{path}: {key} is {config[key]!r}; expected a positive whole number below 2**31")
    if not isinstance(config["layer_norm_eps"], float) or config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(f"{path}: layer_norm_eps {config['layer_norm_eps']!r}, hidden_size {config['hidden_size']}; "
                         f"expected a decimal number and a multiple of num_attention_heads")
    return config


def by_length(rows, groups):
    """Cuts rows [M, …] into one view [count, length, …] per group: `count` texts of equal `length`, side by side."""
    parts = rows.split([count * length for count, length in groups])
    return [part.view(count, length, -1) for part, (count, length) in zip(parts, groups)]


def self_attention(qkv, groups, n_heads):
    """Every token attends to every token of its own text. qkv [M, 3D] -> [M, D].

    Texts of equal length are one batch of the attention, so nothing is padded and nothing masked.
    """
    attended = []
    for part in by_length(qkv, groups):
        q, k, v = part.unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # each [count, H, length, C]
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(attended)


def affine(x, layer, gelu=False, plus=None):
    """layer(x) for x [M, in], then the exact GELU (with erf) or the sum with `plus` [M, out].

    On a CPU in fp32 it calls oneDNN by name, which does both in one pass; torch itself gives fp32 products to MKL,
    which is slower on AMD processors (110 against 250 GFLOP/s a core).
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        product = torch.ops.mkldnn._linear_pointwise
        if plus is not None:
            return product.binary(x, plus, layer.weight, layer.bias, "add")
        return product(x, layer.weight, layer.bias, "gelu" if gelu else "none", [], "none")
    y = layer(x)
    return F.gelu(y) if gelu else y if plus is None else y.add_(plus)


class Layer(nn.Module):
    """One BERT layer: each half adds to its input and is normalised afterwards (post-norm)."""

    def __init__(self, config):
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.n_heads = config["num_attention_heads"]
        self.qkv = nn.Linear(width, 3 * width)  # one large product is faster than three
        self.out = nn.Linear(width, width)
        self.out_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.down_norm = nn.LayerNorm(width, eps)

    def forward(self, x, groups):  # x [M, D]
        x = self.out_norm(affine(self_attention(affine(x, self.qkv), groups, self.n_heads), self.out, plus=x))
        return self.down_norm(affine(affine(x, self.up, gelu=True), self.down, plus=x))


class Bert(nn.Module):
    """The whole encoder, as far as sentence vectors need it: no pooler, no heads, no dropout."""

    def __init__(self, config):
        super().__init__()
        width = config["hidden_size"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    @torch.inference_mode()
    def forward(self, texts, pooling):
        """texts: arrays of token ids, equal lengths side by side -> [len(texts), D] float32, not scaled."""
        groups = [(len(list(same)), length) for length, same in groupby(map(len, texts))]
        ids = torch.from_numpy(np.concatenate(texts)).to(self.word.weight.device)
        positions = torch.cat([torch.arange(len(text)) for text in texts]).to(ids.device)
        x = self.norm(self.word(ids) + self.position(positions) + self.token_type.weight[0])
        for layer in self.layers:
            x = layer(x, groups)
        pooled = [part[:, 0] if pooling == "cls" else part.mean(1) for part in by_length(x.float(), groups)]
        return torch.cat(pooled)


TENSORS = {  # our names -> Hugging Face's; those of a layer get the prefix encoder.layer.N.
    "word": ["embeddings.word_embeddings"], "position": ["embeddings.position_embeddings"],
    "token_type": ["embeddings.token_type_embeddings"], "norm": ["embeddings.LayerNorm"],
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "out": ["attention.output.dense"], "out_norm": ["attention.output.LayerNorm"],
    "up": ["intermediate.dense"], "down": ["output.dense"], "down_norm": ["output.LayerNorm"]}
# the buffers hold 0 1 2 … and 0 0 0 …; pooler and cls predict masked words and next sentences
NOT_USED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.", "cls.")


def current_name(name):
    """A tensor's name as BertModel writes it today; older files have bert.…, LayerNorm.gamma and LayerNorm.beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def load_bert(config, directory):
    """The encoder with the weights of a folder's safetensors file or shards, as float32.

    InputError for a damaged file, and for tensors that are missing, unknown, stored twice, of another shape or of whole
    numbers: it names the first five.
    """
    with torch.device("meta"):
        model = Bert(config)
    sources, expected = {}, {}
    for name, parameter in model.named_parameters():
        *layer, part, kind = name.split(".")
        prefix = f"encoder.layer.{layer[1]}." if layer else ""
        sources[name] = [f"{prefix}{source}.{kind}" for source in TENSORS[part]]
        rows = parameter.shape[0] // len(sources[name])
        expected |= {source: [rows, *parameter.shape[1:]] for source in sources[name]}
    files = checkpoint_files(directory)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(open_safetensors(path)) for path in sorted(set(files.values()))}
        stored, found = {}, {}
        for name, path in files.items():
            current, tensor = current_name(name), opened[path].get_slice(name)
            if not current.startswith(NOT_USED):
                if current in found:
                    found[current] = "twice there"
                elif tensor.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    found[current] = tensor.get_shape()
                else:
                    found[current] = f"of {tensor.get_dtype()}"
                stored[current] = opened[path], name
        wrong = [f"{name} is {found.get(name, 'missing')} (expected {expected.get(name, 'no such tensor')})"
                 for name in {**expected, **found} if found.get(name) != expected.get(name)]
        if wrong:
            raise InputError(f"{directory}: {len(wrong)} tensors do not fit its config.json: {'; '.join(wrong[:5])}")

        def read(source):
            file, name = stored[source]
            return file.get_tensor(name).float()
        weights = {name: torch.cat([read(source) for source in parts])
                   for name, parts in sources.items()}  # cat copies out of the mapped file
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


# ----- an encoder's folder -------------------------------------------------------------------------------------------

def read_modules(directory):
    """(folder of the BERT, "cls" or "mean", whether vectors are scaled to length 1), from modules.json.

    InputError for any module but Transformer, Pooling and Normalize, and for a custom class with one of these names.
    A folder without modules.json is a plain BERT; InputError if it has other files of sentence-transformers, because
    then modules.json was lost.
    """
    path = directory / "modules.json"
    if not path.exists():
        for pattern in ("config_sentence_transformers.json", "sentence_*_config.json", "*_Pooling"):
            for left in directory.glob(pattern):
                raise InputError(f"{path}: no such file, though {left.name} is there; expected both or neither")
        return directory, "mean", False
    modules = [module if isinstance(module, dict) else {} for module in read_json(path, expect=list)]
    kinds, folders = [str(module.get("type")) for module in modules], [module.get("path") for module in modules]
    ours = [kind.rpartition(".")[2] for kind in kinds if kind.startswith("sentence_transformers.")]
    if len(ours) < len(kinds) or ours not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(f"{path}: found the modules {', '.join(kinds) or 'none'}; expected those of "
                         "sentence_transformers: Transformer, Pooling and perhaps Normalize, in this order")
    if not all(isinstance(name, str) and name != ".." and Path(name).name == name for name in folders) \
            or not folders[1]:
        raise InputError(f"{path}: found the folders {folders} of modules; expected names of folders beside it")
    root = require_dir(directory / folders[0], "the Transformer that modules.json names")
    scaling = {}
    if folders[2:] and folders[2]:
        scaling = read_json_if_there(directory / folders[2] / "config.json")
    for key, value in scaling.items():
        if value not in (None, "sentence_embedding"):
            raise InputError(f"{directory / folders[2]}/config.json: {key} is {value!r}; expected 'sentence_embedding'")
    return root, read_pooling(directory / folders[1] / "config.json"), bool(folders[2:])


def read_pooling(path):
    """"cls" or "mean", from a Pooling's config.json in its old or new form; InputError for other kinds."""
    raw = read_json(path)
    switched_on = [key.removeprefix("pooling_mode_") for key, on in raw.items()
                   if key.startswith("pooling_mode_") and on]  # the old form: {"pooling_mode_cls_token": true, …}
    modes = raw.get("pooling_mode") or switched_on or "mean"
    modes = modes if isinstance(modes, list) else [modes]
    names = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
    if len(modes) != 1 or str(modes[0]) not in names or raw.get("include_prompt", True) is not True:
        raise InputError(f"{path}: pools by {modes}, include_prompt {raw.get('include_prompt', True)}; "
                         "expected either CLS or mean, over all tokens")
    return names[modes[0]]


PLAIN_TEXT = {  # stands in sentence_bert_config.json of every model of texts
    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}}


def read_text_settings(root, tokenizer_config, positions):
    """(most tokens of a text, whether sentence-transformers lowers its case), from the folder of a BERT.

    The length is max_seq_length in sentence_bert_config.json, or else (since version 6, and in a plain BERT)
    model_max_length in tokenizer_config.json; at most the model's `positions`.
    """
    path = root / "sentence_bert_config.json"
    if not path.exists():  # models of other names have sentence_roberta_config.json, …
        path = min(root.glob("sentence_*_config.json"), default=path)
    settings = read_json_if_there(path)
    length, lower_case = settings.pop("max_seq_length", None), settings.pop("do_lower_case", None)
    settings.pop("unpad_inputs", None)  # changes the speed, no vector
    for key, value in settings.items():
        if value not in (None, {}, PLAIN_TEXT.get(key)):
            raise InputError(f"{path}: {key} is {value!r}; expected {PLAIN_TEXT.get(key, 'no such setting')!r}")
    key = "max_seq_length"
    if length is None:
        path, key = root / "tokenizer_config.json", "model_max_length"
        length = tokenizer_config.get(key, tokenizer_config.get("max_len"))
    if length is None:
        length = positions
    if type(length) not in (int, float) or length != int(length) or length < 3:  # "no limit" may be written 1e30
        raise InputError(f"{path}: {key} is {length!r}; expected a whole number from 3")
    return min(int(length), positions), bool(lower_case)


def read_prompts(path):
    """(text in front of queries, text in front of indexed texts), from config_sentence_transformers.json.

    The prompts are called "query" and "document" ("passage", "corpus"), or else default_prompt_name names one for both.
    The first is None if the file has no prompts at all.
    """
    raw = read_json_if_there(path)
    prompts, default = raw.get("prompts") or {}, raw.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, (str, type(None))) for text in prompts.values()):
        raise InputError(f"{path}: prompts is {prompts!r}; expected names with a text each")
    if default is not None and (not isinstance(default, str) or default not in prompts):
        raise InputError(f"{path}: default_prompt_name is {default!r}; expected one of the prompts {[*prompts]}")

    def prompt(*names):
        return prompts.get(next((name for name in names if name in prompts), default)) or ""
    return prompt("query") if prompts else None, prompt("document", "passage", "corpus")


def read_similarity(path):
    """("cosine" or "dot", how many numbers of a vector are used, None: all), from config_sentence_transformers.json."""
    raw = read_json_if_there(path)
    similarity, dimension = raw.get("similarity_fn_name") or "cosine", raw.get("truncate_dim")
    if raw.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise InputError(f"{path}: model_type is {raw['model_type']!r}; expected 'SentenceTransformer'")
    if similarity not in ("cosine", "dot"):
        raise InputError(f"{path}: similarity_fn_name is {similarity!r}; expected 'cosine' or 'dot'")
    if dimension is not None and (type(dimension) is not int or dimension < 1):
        raise InputError(f"{path}: truncate_dim is {dimension!r}; expected a whole number from 1, or null")
    return similarity, dimension


def is_english_bge(directory, name):
    """Whether a folder is a bge-*-en model by one of its names.

    These are its own, that of the folder it links to, that of the repository in a Hugging Face cache
    (models--BAAI--bge-large-en-v1.5/snapshots/…), and the `name` in its config.json.
    """
    paths = (directory.absolute(), directory.resolve())
    names = [name, *(path.parents[1].name if path.parent.name == "snapshots" else path.name for path in paths)]
    return any("bge-" in name.lower() and "-en" in name.lower() for name in names)


def bert_normalizer(raw, path):
    """BertNormalizer's settings in `raw` (tokenizer_config.json); None where the normalizer of tokenizer.json counts.

    BertTokenizer, which is also the class of a BERT that names none, builds its normalizer from tokenizer_config.json;
    other classes run the one of tokenizer.json.
    """
    kind = str(raw.get("tokenizer_class") or "BertTokenizer").removesuffix("Fast")
    if raw.get("auto_map"):
        raise InputError(f"{path}: auto_map is {raw['auto_map']!r}; expected no code of its own")
    if kind in ("PreTrainedTokenizer", "TokenizersBackend"):
        return None
    if kind != "BertTokenizer":
        raise InputError(f"{path}: tokenizer_class is {kind!r}; expected BertTokenizer, PreTrainedTokenizerFast, none")
    settings = {"lowercase": raw.get("do_lower_case", True), "strip_accents": raw.get("strip_accents"),
                "handle_chinese_chars": raw.get("tokenize_chinese_chars", True)}
    for key, value in settings.items():
        if type(value) is not bool and (key, value) != ("strip_accents", None):
            raise InputError(f"{path}: {key} is to be {value!r}; expected true or false")
    return settings


def read_tokenizer(path, raw, vocab_size, lower_case):
    """(tokenizer, [id before a text, id after it], the side that is cut, settings of its normalizer or None).

    raw: tokenizer_config.json; the normalizer is None if it is the one in tokenizer.json. The tokenizer neither pads
    nor truncates, whatever its file says, and control tokens typed in a text stay text.
    """
    config_path = path.with_name("tokenizer_config.json")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the tokenizer as one file, which transformers' AutoTokenizer "
                         "saves from a vocab.txt")
    with as_input_error(path):
        tokenizer = Tokenizer.from_str(read_text(path))
    side = raw.get("truncation_side") or (tokenizer.truncation or {}).get("direction", "right")
    if side not in ("left", "right"):
        raise InputError(f"{config_path}: truncation_side is {side!r}; expected 'left' or 'right'")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    instead = bert_normalizer(raw, config_path)
    if instead:
        normalizer = normalizers.BertNormalizer(**instead)
        if tokenizer.normalizer is not None and tokenizer.normalizer.__getstate__() == normalizer.__getstate__():
            instead = None
        tokenizer.normalizer = normalizer
    if lower_case:
        rest = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
    control = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary, frame = tokenizer.get_vocab(), tokenizer.encode("").ids  # frame: [CLS], [SEP]
    ids = {*vocabulary.values()} - control | {*frame}  # no text has the id of [MASK], so it may lie past vocab_size
    if len(frame) != 2 or max(ids) >= vocab_size:
        raise InputError(f"{path}: {len(vocabulary)} tokens, {len(frame)} around a text; expected one before it and "
                         f"one after it ([CLS], [SEP]), ids below vocab_size {vocab_size}")
    return tokenizer, frame, side, instead


# ----- texts in, vectors out -----------------------------------------------------------------------------------------

class Encoder:
    """A sentence-transformers folder of a BERT model, or a plain BERT: `Encoder.from_dir(directory).encode(texts)`."""

    @classmethod
    def from_dir(cls, directory, device="cpu", dtype=torch.float32, query_instruction=None, batch_tokens=None):
        """Reads the files listed at the top of this module. InputError for anything but a BERT with CLS or mean pooling
        whose vectors are compared by cosine or dot.

        query_instruction: text in front of queries, never of indexed texts; None: the folder's, or if it gives none
        BGE_QUERY_INSTRUCTION for a bge-*-en and "" for others.
        batch_tokens: tokens of a batch; None: 1,024 on a CPU, so that a batch stays in its cache, 16,384 on a GPU.
        """
        self, directory = cls(), require_dir(directory, "an encoder")
        root, self.pooling, scaled = read_modules(directory)
        if (root / "adapter_config.json").exists():  # checked first, because an adapter's folder may lack config.json
            raise InputError(f"{root}/adapter_config.json: an adapter to a model; expected the two merged, without it")
        if not any(root.glob("*.safetensors")) and (pickled := sorted(root.glob("*.bin"))):
            raise InputError(f"{pickled[0]}: weights in a pickle, which could run code; expected model.safetensors")
        config = read_bert_config(root / "config.json")
        tokenizer_config = {"tokenizer_class": config["tokenizer_class"],
                            **read_json_if_there(root / "tokenizer_config.json")}
        own_settings = directory / "config_sentence_transformers.json"
        self.max_tokens, self.lower_case = read_text_settings(root, tokenizer_config, config["max_position_embeddings"])
        self.similarity, self.truncate_dim = read_similarity(own_settings)
        self.normalize = scaled or self.similarity == "cosine"
        said, self.document_prompt = read_prompts(own_settings)
        if said is None:
            said = BGE_QUERY_INSTRUCTION if is_english_bge(directory, config["name"]) else ""
        self.query_instruction = said if query_instruction is None else query_instruction
        check_unicode(self.query_instruction + self.document_prompt)
        if device in ("auto", "cpu", "cuda"):
            device = pick_device(device)
        self.directory, self.root, self.device = directory, root, torch.device(device)
        self.batch_tokens = batch_tokens or (1024 if self.device.type == "cpu" else 16384)
        self.tokenizer, self.frame, self.truncation_side, self.normalizer = read_tokenizer(
            root / "tokenizer.json", tokenizer_config, config["vocab_size"], self.lower_case)
        self.model = load_bert(config, root).to(self.device, dtype)
        self.dimension = min(config["hidden_size"], self.truncate_dim or config["hidden_size"])
        return self

    @cached_property
    def identity(self):
        """Everything that decides the vectors, as a dict: stored with an index, and compared when the index is used."""
        weights = [sha256(path) for path in sorted(set(checkpoint_files(self.root).values()))]
        return {"model_sha256": weights[0] if len(weights) == 1 else
                hashlib.sha256("".join(weights).encode()).hexdigest(),
                "tokenizer_sha256": sha256(self.root / "tokenizer.json"),
                "config_sha256": sha256(self.root / "config.json"),
                "pooling": self.pooling, "max_tokens": self.max_tokens, "query_instruction": self.query_instruction,
                "document_prompt": self.document_prompt, "similarity": self.similarity, "normalize": self.normalize,
                "truncate_dim": self.truncate_dim, "truncation_side": self.truncation_side,
                "lower_case": self.lower_case, "normalizer": self.normalizer}

    def token_ids(self, texts):
        """One int64 array [CLS] … [SEP] per text, at most max_tokens long. "[SEP]" typed in a text is plain text."""
        for text in texts:
            check_unicode(text)
        (start, end), room = self.frame, self.max_tokens - 2
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        cut = slice(-room, None) if self.truncation_side == "left" else slice(room)
        return [np.array([start, *encoding.ids[cut], end]) for encoding in encodings]

    def vectors_of(self, texts):
        """Arrays of token ids, equal lengths side by side -> [len(texts), dimension] float32 on the model's device."""
        pooled = self.model(texts, self.pooling)
        if self.similarity == "dot" and self.normalize:  # by its Normalize module, which stands before the cut
            pooled = F.normalize(pooled, dim=1)
        pooled = pooled[:, :self.dimension]
        return F.normalize(pooled, dim=1) if self.similarity == "cosine" else pooled

    def encode(self, texts, is_query=False, progress=False):
        """list of str -> float32 [N, dimension]; a cosine model's rows have length 1.

        A text's vector does not depend on the other texts (to 1e-6). InputError for a text that is not Unicode, and for
        weights that give NaN.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        prefix = self.query_instruction if is_query else self.document_prompt
        with tqdm(total=len(texts), unit="text", delay=2, disable=not (progress and sys.stderr.isatty())) as bar:
            for first in range(0, len(texts), 8192):  # so that the ids of a large corpus need not all be in memory
                ids = self.token_ids([prefix + text for text in texts[first:first + 8192]])

                def encode_batch(rows, ids=ids, first=first):
                    batch = self.vectors_of([ids[row] for row in rows])
                    vectors[np.add(rows, first)] = batch.cpu().numpy()
                    return len(rows)
                batches = plan_batches([len(row) for row in ids], self.batch_tokens)
                on_device = on_all_threads if self.device.type == "cpu" else map
                for done in on_device(encode_batch, batches):
                    bar.update(done)
        if not np.isfinite(vectors).all():
            raise InputError(f"{self.directory}: its vectors are not finite; expected sound weights")
        return vectors


def plan_batches(lengths, batch_tokens):
    """Lists of row numbers, longest rows first, each list of at most `batch_tokens` tokens (or one longer row)."""
    batches, used = [], batch_tokens
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if used + lengths[row] > batch_tokens:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += lengths[row]
    return batches


def on_all_threads(work, items):
    """Yields work(item) for every item in order, several at once, each on its share of torch's threads.

    Threads that share a batch wait for each other after every operation; threads with a batch each do not (on two
    cores: 1.3 times as many texts a second).
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # new threads start with the last setting
