"""run.py: an exported model's card, files and prompts, as transformers and llama.cpp read them, and expected memory.

Its flags, its plan and its resumed runs are tested as a user meets them, in test_sft.py and test_dpo.py.
"""
import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CONFIG, ROOT, TEXTS, say, tiny_llama2, tiny_sentencepiece, tiny_vocabulary
from ranks import ALONE
from safetensors.torch import load_file

import model as M
import run
import train
from chat import LLAMA3_SYSTEM, render_chat
from files import InputError
from generate import generate
from parallel import World
from tokenizer import Tokenizer
from weights import checkpoint_names, parameter_count, stop_ids_of

# ----- the exported model --------------------------------------------------------------------------------------------


def test_results_of_a_run_whose_first_step_was_skipped(tmp_path):
    """NaN is written as text, and an empty file has no results."""
    path = tmp_path / "metrics.jsonl"
    rows = {"step": 0, "val_loss": "inf"}, {"step": 1, "loss": "nan"}, {"step": 2, "loss": 1.0, "val_loss": 2}
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run.results_of(tmp_path, ("loss",)) == {"steps": 2, "training loss": "nan → 1.0000",
                                                   "held-out loss": "inf → 2.0000"}
    path.write_text("")
    assert run.results_of(tmp_path, ("loss",)) == {}


def test_a_model_made_from_llama_says_so():
    card = run.model_card("FineMedLM-o1-sft-1", M.LlamaConfig(), source="models/Llama-3.1-8B", recipe={"lr": 3e-5},
                          files=[{"file": "a.jsonl", "rows": 3, "sha256": "0" * 64}], results={"steps": 3})
    assert "# Llama-FineMedLM-o1-sft-1" in card and "**Built with Llama**" in card and "license: llama3.1" in card


@pytest.mark.parametrize("llama", [False, True])
def test_an_export_has_the_masters_and_ends_its_turns(base, tmp_path, monkeypatch, llama):
    """The export has the masters' numbers, both stop ids (the base model's and the end of turn), no dropout in its
    tokenizer, and Llama's notice if the model is a Llama."""
    source = tmp_path / "source"
    source.mkdir()
    for path in base.iterdir():
        if path.name not in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
            (source / path.name).symlink_to(path)
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["model"]["dropout"] = 0.1
    (source / "tokenizer.json").write_text(json.dumps(raw))
    (source / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    (source / "generation_config.json").unlink(missing_ok=True)
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}')
    monkeypatch.setattr(run, "is_llama3", lambda config: llama)
    training = train.load_training(source, ALONE)
    for master in training.masters.values():
        master.mul_(1.001)
    run.export_model(training, tmp_path / "model", source=source, dtype=torch.float32, card="a card")
    exported, names = load_file(tmp_path / "model/model.safetensors"), checkpoint_names(training.model.config)
    for name, master in training.masters.items():
        assert torch.equal(torch.cat([exported[one] for one in names[name]]), master)
    tokenizer = Tokenizer.from_dir(source)
    assert stop_ids_of(tmp_path / "model") == {0, tokenizer.end_of_turn()}
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["temperature"] == 0.5
    served = json.loads((tmp_path / "model/tokenizer.json").read_text())
    assert served["model"].pop("dropout", None) is None and raw["model"].pop("dropout") and served == raw
    assert (tmp_path / "model/added_tokens.json").read_text() == '{"<|im_end|>": 2}'
    assert "<|im_start|>" in (tmp_path / "model/chat_template.jinja").read_text()
    assert (tmp_path / "model/README.md").read_text() == "a card"
    assert (tmp_path / "model/NOTICE").exists() is llama


def test_a_head_of_its_own_outlives_training(declared_tied, tmp_path):
    """transformers gives the same logits from the folder that is declared tied and from its export."""
    training = train.load_training(declared_tied, ALONE)
    run.export_model(training, tmp_path / "model", source=declared_tied, dtype=torch.float32, card="")
    one, other = (transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(9)[None])
                  for folder in (declared_tied, tmp_path / "model"))
    assert torch.equal(one.logits, other.logits)

# ----- the model of a plan -------------------------------------------------------------------------------------------


def test_a_plan_counts_a_head_of_its_own(declared_tied):
    """49,152 rows of 32 for the embedding, as many for the head, and two layers of 18,496."""
    args = SimpleNamespace(model=declared_tied, dry_run=True, inspect=None)
    assert parameter_count(run.config_of(args)) == 2 * 49152 * 32 + 2 * (2 * 32 + (64 + 32 + 32 + 64) * 32
                                                                         + 3 * 96 * 32) + 32


def test_a_plan_needs_no_weights(base, tmp_path):
    (tmp_path / "config.json").symlink_to(base / "config.json")
    for dry_run in (True, False):
        args = SimpleNamespace(model=tmp_path, dry_run=dry_run, inspect=None)
        with nullcontext() if dry_run else pytest.raises(InputError, match="no such file; expected model"):
            assert run.config_of(args) == M.LlamaConfig.from_json(base / "config.json")

# ----- the prompt that is served -------------------------------------------------------------------------------------


TALKS = [say("What is fever?"), say("two\n\nlines 12.5 mg"), say("Hi", "Hello.", "Dose?", "75–325 mg.\n\n1. Ask"),
         say("急性心梗?", "胸痛 🙂", "And now?", system="Be brief."), say("So?", "Yes.", system=" spaced "),
         say("Is 5 mg ok?", system="")]
# Llama 3.1's own, with the date of the day where the clock can be asked
CLOCK = """{{- bos_token }}
{%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
# Llama 2's own, as transformers wrote it into many folders
INST = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% elif false == true and not '<<SYS>>' in messages[0]['content'] %}{% set loop_messages = messages %}"
    "{% set system_message = 'You are a helpful, respectful and honest assistant.' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
CHATML = ("{% for message in messages %}BLOCK{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# with a default system text that holds quotation marks and a letter beyond ASCII
LADY = CHATML.replace("BLOCK", "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
                      "You\\'re Zoë, \"a\" helper.<|im_end|>\n' }}{% endif %}")
# name: (how its vocabulary is made, other files of the folder that is trained, the default system text)
BASES = {
    "ChatML, with another default": (lambda folder: tiny_vocabulary(folder, "chatml"), {
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|endoftext|>",
            "chat_template": [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": LADY}]},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>"}}}, "You're Zoë, \"a\" helper."),
    "ChatML, of a base model": (lambda folder: tiny_vocabulary(folder, "chatml"), {
        "tokenizer_config.json": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "generation_config.json": {"eos_token_id": 0, "temperature": 0.6}}, None),
    "Llama 3.1": (lambda folder: tiny_vocabulary(folder, "llama3"), {
        "chat_template.jinja": CLOCK, "tokenizer_config.json": {
            "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": "{{ messages }}"}},
        LLAMA3_SYSTEM),
    "Llama 3": (lambda folder: tiny_vocabulary(folder, "llama3"), {
        "tokenizer_config.json": {"bos_token": "<|begin_of_text|>", "chat_template": "{{ bos_token }}"
                                  "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
                                  "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"}},
        None),
    "Llama 2": (tiny_sentencepiece, {}, None),
    "Llama 2, as tokenizer.json": (tiny_llama2, {"tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "chat_template": INST}}, None),
}


@pytest.fixture(scope="session", params=BASES)
def served(request, tmp_path_factory):
    """(name, the tokenizer by which a tiny random model was trained, the folder to which it was exported in fp32)."""
    folder, (write_vocabulary, files, _) = tmp_path_factory.mktemp("served"), BASES[request.param]
    tokenizer = Tokenizer.from_dir(write_vocabulary(folder / "source"))
    config = replace(CONFIG, vocab_size=tokenizer.size, hidden_size=32, tie_word_embeddings=True)
    model = M.Llama(config).init_weights(3)
    with torch.no_grad():  # far from the first weights, so that logits lie apart
        for parameter in model.parameters():
            parameter.mul_(4)
    M.save_model(model, folder / "model")
    for path in (folder / "model").iterdir():
        path.rename(folder / "source" / path.name)
    for path, value in files.items():
        (folder / "source" / path).write_text(value if isinstance(value, str) else json.dumps(value))
    trained = Tokenizer.from_dir(folder / "source")
    export(folder / "source", folder / "exported")
    return request.param, trained, folder / "exported"


def export(source, out):
    training = train.load_training(source, ALONE, dtype=torch.float32)
    run.export_model(training, out, source=source, dtype=torch.float32, card="a card")


def test_transformers_gives_the_prompt_that_was_trained(served):
    """By apply_chat_template, by the text that it renders, and by our own reader, as the next stage reads it."""
    name, trained, folder = served
    if name == "Llama 2":
        pytest.importorskip("google.protobuf")  # by which transformers reads a tokenizer.model
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_dir(folder)
    assert trained.default_system == ours.default_system == BASES[name][2] and trained.template == ours.template
    for talk in TALKS:
        for ask in (True, False) if talk[-1]["role"] == "user" else (False,):
            ids, _ = render_chat(trained, talk, add_generation_prompt=ask)
            text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
            assert theirs.apply_chat_template(talk, add_generation_prompt=ask).input_ids == ids, text
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert render_chat(ours, talk, add_generation_prompt=ask)[0] == ids
    assert isinstance(theirs.chat_template, str)  # no other by name
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == theirs.chat_template


def test_transformers_stops_where_the_trained_turn_ends(served):
    """Its generate, its tokenizer's eos_token and its config do, also where the base model's eos_token is another."""
    name, trained, folder = served
    end, model = trained.end_of_turn(), transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = render_chat(trained, TALKS[0], add_generation_prompt=True)[0]

    def always_end(ids, scores):
        return torch.full_like(scores, -1e4).index_fill_(1, torch.tensor([end]), 0)
    answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4, logits_processor=[always_end])
    assert answer[0, len(prompt):].tolist() == [end]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == trained.decode([end])
    if name != "Llama 2":
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == end
    ids = transformers.AutoConfig.from_pretrained(folder).eos_token_id
    assert set(ids if isinstance(ids, list) else [ids]) == stop_ids_of(folder) >= {end}
    if name == "ChatML, of a base model":
        assert stop_ids_of(folder) == {0, end} and model.generation_config.temperature == 0.6


def write_gguf(folder, path):
    """Converts an exported folder to a GGUF file in F32, as llama.cpp's converter does.

    Names of tensors, special tokens, merges and the chat template are found by the converter's own library. Rows of q
    and k are put in llama.cpp's order: of each head, row i of the lower half and row i of the upper one in turn.
    """
    import gguf
    config, writer = M.LlamaConfig.from_json(folder / "config.json"), gguf.GGUFWriter(path, "llama")
    for key, value in {
            "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
            "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
            "key_length": config.head_dim, "value_length": config.head_dim, "rope_dimension_count": config.head_dim,
            "rope_freq_base": config.rope_theta, "layer_norm_rms_eps": config.rms_norm_eps,
            "file_type": gguf.LlamaFileType.ALL_F32, "vocab_size": config.vocab_size}.items():
        getattr(writer, f"add_{key}")(value)
    raw = json.loads((folder / "tokenizer.json").read_text()) if (folder / "tokenizer.json").is_file() else None
    if raw:
        control = {token["id"] for token in raw["added_tokens"]}
        tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe" if "<|eot_id|>" in tokens else "smollm")
        types = [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    else:
        tokens, scores, types = zip(*gguf.vocab.SentencePieceVocab(folder).all_tokens())
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=bool(raw), n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in load_file(folder / "model.safetensors").items():
        for part, heads in ("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads):
            if part in name:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_llama_cpp(trained, folder, path, talks):
    """llama.cpp on the converted folder: the prompts that were trained, and 32 greedy tokens after each as ours."""
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    write_gguf(folder, path)
    theirs = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False,
                             type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    bos, eos = theirs.token_bos(), theirs.token_eos()
    assert eos == trained.end_of_turn()
    template = Jinja2ChatFormatter(theirs.metadata["tokenizer.chat_template"], bos_token=trained.decode([bos]),
                                   eos_token=trained.decode([eos]))
    ours = M.load_model(folder, dtype=torch.float32)
    for talk in talks:
        prompt = theirs.tokenize(template(messages=talk).prompt.encode(), add_bos=False, special=True)
        assert prompt == render_chat(trained, talk, add_generation_prompt=True)[0]
        answer = list(islice(theirs.generate(prompt, temp=0.0, top_k=1), 32))
        assert answer == list(generate(ours, prompt, max_new_tokens=32, temperature=0)) and len(set(answer)) > 4
        theirs.reset()


def test_llama_cpp_gives_the_prompt_and_the_answer_that_were_trained(served, tmp_path):
    """llama.cpp rounds otherwise than we do, but a random model's logits lie far enough apart for equal answers."""
    name, trained, folder = served
    if "json" in name:
        pytest.skip("the same pieces as Llama 2, whose converter reads tokenizer.model")
    check_llama_cpp(trained, folder, tmp_path / "model.gguf", [talk for talk in TALKS if talk[-1]["role"] == "user"])


@pytest.mark.heavy
def test_llama_cpp_answers_as_the_real_model_does(smollm2, tmp_path):
    export(smollm2, tmp_path / "exported")
    talks = [say(text) for text in TEXTS[:3]] + [say("Name a bone.", system="Answer in one word.")]
    check_llama_cpp(Tokenizer.from_dir(smollm2), tmp_path / "exported", tmp_path / "model.gguf", talks)

# ----- memory --------------------------------------------------------------------------------------------------------


def test_memory_of_eight_billion_parameters_over_eight_gpus():
    """18 bytes a parameter over 8 shards: 18.07 GB; embedding, head and two layers gathered, with their gradients."""
    world = World(0, 8, torch.device("cuda"), shards=8)
    parts = run.expected_memory(M.LlamaConfig(), world, dtype=torch.bfloat16, tokens=8192,
                                activation_checkpointing=True)
    state, activations, logits, gathered = parts.values()
    assert state == pytest.approx(18 * 8.03e9 / 8, rel=1e-3) and logits == 12 * 2**26 + 2 * 2**27
    assert gathered == pytest.approx(4 * (2 * 128256 * 4096 + 2 * 218.1e6), rel=1e-3)
    assert activations == pytest.approx(8192 * 2 * (32 * 4096 + 4 * 4096 + 2 * 14336 + 4 * 5120), rel=1e-6)


def test_replicas_need_a_buffer_of_four_bytes_a_sharded_parameter():
    """FSDP2 adds the gradients of two replicas up in fp32: 8.03e9 / 8 of them on each of 16 GPUs."""
    cut, replicated = (sum(run.expected_memory(
        M.LlamaConfig(), World(0, ranks, torch.device("cuda"), shards=8), dtype=torch.bfloat16, tokens=8192,
        activation_checkpointing=True).values()) for ranks in (8, 16))
    assert replicated - cut == 4 * 8_030_261_248 / 8


def test_the_table_of_what_a_gpu_needs():
    """Worked out from Llama-3.1-8B's published sizes: 32 layers, width 4,096, feed-forward 14,336, 32 and 8 heads of
    128 channels, 128,256 words; 8,192 tokens a micro-batch.

    Numbers a token that a layer keeps in 2 bytes: four of the width (the block's input, both norms' outputs, the sum
    after attention), gate and up, and queries and keys two times each, before and after they are rotated and copied:
    4 · 4,096 + 2 · 14,336 + 4 · (4,096 + 1,024) = 65,536. Of the head: a block of 2^26 logits in three fp32 tensors,
    and 2^27 kept in bf16. Gathered over ranks: embedding, head, last norm and two layers, in bf16, with gradients.
    """
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    embedding = 128256 * 4096
    state = 18 * (32 * layer + 2 * embedding + 4096)  # weights 2, masters 4, moments 8, gradients 4
    head, token = 12 * 2**26 + 2 * 2**27, 2 * 65_536
    kept, recomputed = 8192 * 32 * token, 8192 * (32 * 2 * 4096 + token)
    gathered = 2 * 2 * (2 * embedding + 4096 + 2 * layer)
    replicas = 4 / 18 * state  # FSDP2 adds the gradients of replicas up in fp32
    cases = [(1, 1), (8, 8), (16, 8), (16, 16)]
    expected = [[(state + (ranks > shards) * replicas) / shards + (shards > 1) * gathered + head + activations
                 for activations in (kept, recomputed)] for ranks, shards in cases]
    for own, (ranks, shards) in zip(expected, cases):
        world = World(0, ranks, torch.device("cuda"), shards=shards)
        parts = [run.expected_memory(M.LlamaConfig(), world, dtype=torch.bfloat16, tokens=8192,
                                     activation_checkpointing=recompute).values() for recompute in (False, True)]
        assert [*map(sum, parts)] == pytest.approx(own, rel=1e-12)
    expected = [[f"{size / 1e9:.0f} GB" for size in sizes] for sizes in expected]
    assert expected[0] == ["180 GB", "149 GB"]
    lines = (ROOT / "bench/README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines if line.count("|") == 4]
    assert [cells for cells in rows if all(cell.endswith(" GB") for cell in cells)] == expected


@pytest.mark.parametrize("dtype, bytes_each", [(torch.bfloat16, 18), (torch.float32, 16)])
def test_the_state_that_is_expected_is_that_of_the_tensors(tiny_folder, dtype, bytes_each):
    training = train.load_training(tiny_folder, ALONE, dtype=dtype)
    state, *_ = run.expected_memory(training.model.config, training.world, dtype=dtype, tokens=1,
                                    activation_checkpointing=False).values()
    moments = [training.optimizer.state[master][kind] for master in training.masters.values()
               for kind in ("exp_avg", "exp_avg_sq")]
    tensors = [*training.model.parameters(), *training.masters.values(), *moments, *training.grads.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == state == bytes_each * parameter_count(training.model.config)


def test_the_activations_that_are_expected_are_those_that_autograd_keeps(monkeypatch):
    """Of 512 tokens through three layers in bf16 on a CPU, to the byte.

    The formula leaves out two small things: attention's probabilities are kept in blocks of 128 queries with as many
    keys as the last of them sees, 320 a token in the mean, not 256; and both norms keep an fp32 number a token.
    """
    monkeypatch.setattr(M, "has_fast_bf16", lambda device: True)
    config = replace(CONFIG, num_hidden_layers=3, hidden_size=128, intermediate_size=320)
    model = M.Llama(config).init_weights().bfloat16()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found, expected = [], []
    for recompute in (False, True):
        kept, alive = {}, []

        def pack(tensor, kept=kept, alive=alive):
            alive.append(tensor)  # an address must not be used twice
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        h, rotary = torch.randn(1, 512, 128).bfloat16().requires_grad_(), M.rotary_table(config, torch.arange(512))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for layer in model.layers:
                layer.checkpointing = recompute
                h = layer(h, rotary, M.causal_attention, None)
        angles = {x.untyped_storage().data_ptr() for x in rotary}
        found.append(sum(size for place, size in kept.items() if place not in weights | angles))
        expected.append(run.expected_memory(config, ALONE, dtype=torch.bfloat16, tokens=512,
                                            activation_checkpointing=recompute))
    whole, again = ([*parts.values()][1] for parts in expected)
    assert found[0] == whole + 3 * 512 * (2 * 4 * (320 - 256) + 2 * 4)
    assert found[1] == again - whole / 3 == 3 * 512 * 128 * 2  # of the layers' inputs; one layer is computed at a time
