"""A teacher that is a model of a folder, run here: teachers.py opens it for "local:DIR".

    a batch of calls -> generate.generate_batch -> calls.dialogue, which ends a call or asks further, in the next batch

It has the functions of teachers.Server: `session`, `begin`, `finished`, `end`, `close`. Its replies are those of
generate.generate: a call's seed decides them, not the batch that it is in.
"""
from collections import Counter

from calls import Reply, dialogue, failed
from chat import check_vocabulary, render_chat
from files import InputError, require_dir
from generate import generate_batch, room
from model import load_model
from parallel import pick_device
from tokenizer import Tokenizer
from weights import DTYPES, stop_ids_of, weights_sha256


class Local:
    """A model in a folder, run here by generate.generate_batch; `begin` and `finished` as in Server."""

    def __init__(self, directory, store, model, *, batch_size, device, dtype):
        directory = require_dir(directory, "a model")
        self.store, self.window, self.counts = store, batch_size, Counter()
        self.tokenizer = Tokenizer.from_dir(directory)
        self.stop_ids = stop_ids_of(directory) | {self.tokenizer.end_of_turn()}
        # a run trains the model of a folder anew, and its texts with it
        self.model = model or f"local:{directory.resolve().name}@{weights_sha256(directory)[:12]}"
        self.llama = load_model(directory, pick_device(device), DTYPES[dtype])
        check_vocabulary(self.tokenizer, self.llama.config.vocab_size, directory)

    def session(self):
        return {}  # {key: (the dialogue of a call, what it asks next, an answer to that which is known already)}

    def begin(self, session, key, call, stored):
        talk = dialogue(key, call, self.counts)
        session[key] = talk, next(talk), stored

    def finished(self, session, wait):
        """With `wait`, which says that a batch is full or that no call follows: asks all of a session in one batch, and
        stores the replies of those dialogues that this ends. The others are asked with the next batch."""
        if not wait:
            return []
        replies, known = [], {key: answer for key, (_, _, answer) in session.items() if answer}
        known |= self.answers({key: request for key, (_, request, _) in session.items() if key not in known})
        for key, answer in known.items():
            talk, _, _ = session.pop(key)
            try:
                session[key] = talk, talk.send(answer), None
            except StopIteration as end:
                replies.append(end.value)
        self.store.put(*replies)
        return replies

    def answers(self, asked):
        """{key: (messages, parameters)} -> {key: Reply}, those with the same settings in one batch."""
        groups, replies = {}, {}
        for key, (messages, parameters) in asked.items():
            try:
                ids, _ = render_chat(self.tokenizer, messages, add_generation_prompt=True)
                groups.setdefault(settings_of(parameters), []).append((key, ids, room(self.llama, ids)))
            except InputError as error:
                replies[key] = failed(key, str(error))
        for settings, prompts in groups.items():
            self.counts["requests"] += len(prompts)
            texts = generate_batch(self.llama, [ids for _, ids, _ in prompts], stop_ids=self.stop_ids, **dict(settings))
            for (key, ids, most), new in zip(prompts, texts):
                ended, full = new[-1] in self.stop_ids, len(new) == most
                text = self.tokenizer.decode([i for i in new[:len(new) - ended] if i not in self.tokenizer.silent])
                replies[key] = Reply(key, text, finish_reason="stop" if ended else "length",
                                     usage={"prompt_tokens": len(ids), "completion_tokens": len(new)},
                                     failure=None if ended or not full else "the model's context is full")
        return replies

    def end(self, session):
        session.clear()

    def close(self):
        pass


def settings_of(parameters):
    """The API's parameters as those of generate_batch, sorted pairs. InputError for others."""
    names = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    names |= {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1024, "seed": 0}
    for name, value in parameters.items():
        if name not in names or not isinstance(value, (int, float)) or value < (names[name] == "max_new_tokens"):
            raise InputError(f"found the parameter {name} = {value!r}; expected numbers for {', '.join(names)}")
        settings[names[name]] = value
    return tuple(sorted(settings.items()))
