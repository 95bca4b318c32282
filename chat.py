r"""Chat templates: a conversation to ids, and to the mask that marks what is trained.

    Llama 3.1   <|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>
    ChatML      <|im_start|>user\nWhy?<|im_end|>\n
    Llama 2     <s>[INST] Why? [/INST] Because. </s>

The assistant's words and its end-of-turn token are trained, nothing else. The mask goes by position, never by
`id == pad`, because pad and end-of-turn are often the same id. The templates are code. A model folder's own template,
in Jinja, is searched for a default system text, run on four conversations, and refused where its prompt is not ours.
"""
import re
from types import SimpleNamespace

from files import InputError, one_line, read_json_if_there, read_text
from messages import check_messages

# The official templates put these first. Llama 3.1's has a fixed date: a template that reads the clock would train and
# answer on other prompts every day.
LLAMA3_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
NO_TEMPLATE = ("the tokenizer has no known chat template; expected <|start_header_id|> (Llama 3) or <|im_start|> "
               "(ChatML) among its control tokens, or a sentencepiece vocabulary (Llama 2)")


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """messages [{"role": "system" | "user" | "assistant", "content": str}, …] -> (ids, loss_mask), two equal lists.

    loss_mask is True on the assistant's content and its end-of-turn token, unless the message has "train": False. The
    ids are those of the official template of the vocabulary (Llama 3.1, ChatML, Llama 2), with the tokenizer's
    `default_system`. With `add_generation_prompt` the ids end where the assistant is to begin. InputError for a
    vocabulary without a known template and for malformed messages.
    """
    system, turns = check_messages(messages)
    ids, mask = [], []

    def control(*names, trained=False):
        ids.extend(tokenizer.special[name] for name in names)
        mask.extend([trained] * len(names))

    def text(string, after="", answer=False, trained=False):  # `after`: see Tokenizer.encode
        new = tokenizer.encode(string, after, answer=answer)
        ids.extend(new)
        mask.extend([trained] * len(new))

    def turn(role, opening, content, trained):
        if role == "assistant":  # in two parts, so that no token is half opening, half answer
            text(opening)
            text(content, after=opening, answer=True, trained=trained)
        else:
            text(opening + content)

    if tokenizer.template == "llama3":
        def header(role):
            control("<|start_header_id|>")
            text(role)
            control("<|end_header_id|>")
        control("<|begin_of_text|>")
        if system is not None or tokenizer.default_system is not None:
            turns = [("system", (tokenizer.default_system or "") + (system or "").strip(), False), *turns]
        for role, content, trained in turns:
            header(role)
            turn(role, "\n\n", content if role == "system" else content.strip(), trained)
            control("<|eot_id|>", trained=trained)
        if add_generation_prompt:
            header("assistant")
            text("\n\n")
    elif tokenizer.template == "chatml":
        system = tokenizer.default_system if system is None else system
        if system is not None:
            turns = [("system", system, False), *turns]
        for role, content, trained in turns:
            control("<|im_start|>")
            turn(role, f"{role}\n", content, trained)
            control("<|im_end|>", trained=trained)
            text("\n")
        if add_generation_prompt:
            control("<|im_start|>")
            text("assistant\n")
    elif tokenizer.template == "llama2":  # every question with its answer stands between a BOS and an EOS of its own
        for i, (role, content, trained) in enumerate(turns):
            if role != ("user", "assistant")[i % 2]:
                raise InputError(f"message {i + 1} is from {role!r}; Llama 2's template expects user and assistant "
                                 "in turn")
            if role == "user":
                opening = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if i == 0 and system is not None else ""
                control("<s>")
                text(f"[INST] {(opening + content).strip()} [/INST]")
            else:
                text(f" {content.strip()} ", after="[/INST]", answer=True, trained=trained)
                control("</s>", trained=trained)
    else:
        raise InputError(NO_TEMPLATE)
    return ids, mask


def check_vocabulary(tokenizer, vocab_size, directory):
    """InputError if a text or the chat template can give an id that is no row of a model with `vocab_size` rows.

    Other added tokens may lie beyond the rows, as a padding token often does: no text has their ids.
    """
    talk = [{"role": role, "content": role} for role in ("user", "assistant")]
    largest = max([tokenizer.size - 1, *(render_chat(tokenizer, talk)[0] if tokenizer.template else ())])
    if largest >= vocab_size:
        raise InputError(f"{directory}: its tokenizer gives ids up to {largest}; expected all below vocab_size, "
                         f"{vocab_size} in config.json")


# render_chat in Jinja, for programs that read the chat template in a model's folder; tests compare the two.
# BLOCK stands for the system block of a conversation without a system message, DEFAULT for the text before every
# system message.
CHAT_TEMPLATES = {
    "llama3": (
        "<|begin_of_text|>BLOCK{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{% if message['role'] == 'system' %}{{ 'DEFAULT' }}{% endif %}{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"),
    "chatml": (
        "BLOCK{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"),
    "llama2": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% if system is not none and loop.index0 == 1 %}"
        "{{ '<s>[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content']) | trim + ' [/INST]' }}"
        "{% else %}{{ '<s>[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' </s>' }}{% endif %}"
        "{% endfor %}"),
}
# MARKS: the text by which a template's source is recognised. SYSTEM_BLOCK: how a system message begins and ends in it.
MARKS = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", "llama2": "[INST]"}
SYSTEM_BLOCK = {"llama3": ("<|start_header_id|>system<|end_header_id|>\\n\\n", "<|eot_id|>"),
                "chatml": ("<|im_start|>system\\n", "<|im_end|>"), "llama2": ("<<SYS>>\\n", "\\n<</SYS>>")}


def chat_template(tokenizer):
    """The Jinja source with which other programs render conversations as render_chat does.

    They tokenise the whole text as one string, so Llama 2's source writes the space that its tokenizer puts before an
    answer. Control tokens are written out, because a folder's settings may give bos_token and eos_token other values.
    """
    name, default, block = tokenizer.template, tokenizer.default_system, ""
    quoted = (default or "").replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    if default is not None:
        text = quoted.join(SYSTEM_BLOCK[name]) + ("\\n" if name == "chatml" else "")
        block = "{% if messages[0]['role'] != 'system' %}{{ '" + text + "' }}{% endif %}"
    return CHAT_TEMPLATES[name].replace("DEFAULT", quoted).replace("BLOCK", block)


def template_in(directory):
    """(file, Jinja source) of the chat template in a model's folder; (None, None) if the folder has none.

    As in transformers, chat_template.jinja goes before the chat_template of tokenizer_config.json, and of a list of
    named templates the one named "default" is taken.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path, read_text(path)
    path = directory / "tokenizer_config.json"
    found = read_json_if_there(path).get("chat_template")
    if isinstance(found, list):
        default = [one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = default[0] if default else found
    if found is None:
        return None, None
    if not isinstance(found, str):
        raise InputError(f"{path}: chat_template is of type {type(found).__name__}; expected Jinja text, or a list of "
                         'named ones with a "default"')
    return path, found


def follow_template(tokenizer, path, source):
    """Sets a tokenizer's template and default_system by the chat template of its folder; path, source: template_in's.

        a source with <|im_start|> and "Be brief."        template "chatml", default_system "Be brief."
        no source, a vocabulary with <|im_start|>         template "chatml", default_system None

    The source is searched for both; then it is run on a few conversations in Jinja's sandbox. InputError where it may
    write, or does write, another prompt than render_chat.
    """
    if source is None:  # a base model learns the official prompt; Llama 3.1's has dates
        tokenizer.default_system = LLAMA3_SYSTEM if tokenizer.template == "llama3" else None
    if source is None or tokenizer.template is None:
        return

    def refuse(what):
        raise InputError(f"{path}: the chat template {what}; expected Llama 3's, ChatML or Llama 2's, with one default "
                         "system text or none. A folder without chat template is taken for a base model's")
    # a vocabulary may have the control tokens of a second template, and its folder may use that one
    others = {"chatml": {"<|im_start|>", "<|im_end|>"}, "llama2": {"<s>", "</s>"}}
    possible = [tokenizer.template, *(name for name in others if others[name] <= tokenizer.special.keys())]
    name = next((name for name in possible if MARKS[name] in source), None)
    if name is None:
        refuse(f"has no {MARKS[tokenizer.template]}")
    if name == "chatml" and re.search("bos_token|strftime_now", source):
        refuse("writes bos_token or the day's date, which our ChatML does not")
    texts = default_systems(source, *SYSTEM_BLOCK[name])  # None: it cannot be told
    if name == "llama3" and LLAMA3_SYSTEM.partition("\n")[0] in source:
        texts = {LLAMA3_SYSTEM}
    elif texts is None or len(texts) > 1:
        refuse("has a default system text that depends on more than the conversation")
    elif texts and name != "chatml":
        refuse(f"has the default system text {min(texts)[:40]!r}, which ours does not")
    tokenizer.template, tokenizer.default_system = name, next(iter(texts), None)
    found = other_prompt(tokenizer, path.parent, source)
    if found:
        refuse(found)


# texts without white space at their ends, which some templates keep and others take away
PROBES = [[{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)] for roles in (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))]


def other_prompt(tokenizer, directory, source):
    """What is wrong with a chat template that asks for an answer in another way than render_chat; None for one that
    agrees on all PROBES. A conversation that it refuses itself, as some do with a system message, counts as agreed."""
    from jinja2 import TemplateError  # torch brings it
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    def day(form):  # ours has one date for every day
        return "26 Jul 2024"
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.globals |= {"raise_exception": refuse, "strftime_now": day}
    for tag, instead in (("generation", "if true"), ("endgeneration", "endif")):  # transformers' mark of an answer
        source = re.sub(rf"(\{{%[-+]?\s*){tag}(\s*[-+]?%\}})", rf"\1{instead}\2", source)
    names = {"llama3": ("<|begin_of_text|>", "<|eot_id|>"), "chatml": ("", "<|im_end|>"), "llama2": ("<s>", "</s>")}
    names = dict(zip(("bos_token", "eos_token"), names[tokenizer.template]))
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        given = read_json_if_there(directory / file)
        for key in names.keys() & given.keys():
            token = given[key].get("content") if isinstance(given[key], dict) else given[key]
            names[key] = token if isinstance(token, str) else names[key]
    # render_chat's text, with tokens that are their own ids: a vocabulary need not give every text back
    text = SimpleNamespace(template=tokenizer.template, default_system=tokenizer.default_system,
                           special={name: name for name in tokenizer.special}, encode=lambda text, *_, **__: [text])
    asks, agreed = (True,) if "add_generation_prompt" in source else (True, False), 0  # old ones always ask, or never
    try:
        template = jinja.from_string(source)
    except (TemplateError, RecursionError) as error:
        return f"is not Jinja ({one_line(error)})"
    for messages in PROBES:
        expected, *other = ("".join(render_chat(text, messages, ask)[0]) for ask in asks)
        try:
            given = template.render(messages=messages, add_generation_prompt=True, **names)
        except TemplateError:
            continue
        except Exception as error:  # whatever a template may do in Python
            return f"cannot be run ({type(error).__name__}: {one_line(error)})"
        if given not in (expected, *other):
            at = next((i for i, (one, other) in enumerate(zip(given, expected)) if one != other),
                      min(len(given), len(expected)))
            return f"has {given[at:at + 40]!r} where ours has {expected[at:at + 40]!r}, behind {given[:at][-40:]!r}"
        agreed += 1
    return None if agreed else "refuses every conversation"


def default_systems(source, begin, end):
    r"""The default system texts in the source of a chat template: a set, or None where the source does not tell.

        '<|im_start|>system\nBe brief.<|im_end|>'         between `begin` and `end`, in a string or outside of Jinja
        {% set system_message = 'Be brief.' %}            in a variable
        {'role': 'system', 'content': 'Be brief.'}        in a message
    """
    # transformers once wrote its switched-off default for Llama 2 into folders: a branch that is never taken
    source = re.sub(r"\{%-? elif false == true .*?(?=\{%-? (?:else|endif))", "", source, flags=re.DOTALL)
    begin, end = (re.escape(one).replace(r"\\n", r"(?:\\n|\n)") for one in (begin, end))
    char = r"(?:(?!\1)[^\\]|\\.)"  # one character, maybe escaped, of a string whose quotation mark is group 1
    patterns = (rf"(['\"]){begin}({char}*?){end}",
                rf"set\s+\w*system\w*\s*=\s*(['\"])({char}+)\1",
                rf"['\"]system['\"]\s*,\s*['\"]content['\"]\s*:\s*(['\"])({char}*)\1")
    texts = [found for pattern in patterns for _, found in re.findall(pattern, source)]
    try:
        texts = [found.encode("ascii", "backslashreplace").decode("unicode-escape") for found in texts]  # Jinja's way
    except UnicodeDecodeError:
        return None
    texts += re.findall(rf"(?:^|[%}}]}})\s*{begin}([^{{}}]*?){end}", source)  # outside of Jinja's brackets
    # without a default text, only an expression may follow `begin`: the system message of the conversation
    if not texts and re.search(begin + r"(?!['\"]\s*(?:[+~]|-?\}\}\s*\{\{)|\s*\{\{)", source):
        return None
    return set(texts)
