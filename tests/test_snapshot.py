"""snapshot.py: nothing of an adaptation remains, not a bit, and a model of which that is not so refuses to run."""
import os
import signal
import time
from collections import Counter

import psutil
import pytest
import torch
from conftest import bits, same, tiny, tiny_examples

import adapt
import snapshot
from generate import generate
from snapshot import Snapshot, digest, put_back, state_of

# ----- the fingerprint -----------------------------------------------------------------------------------------------


def test_the_digest_sees_every_bit_of_every_tensor_and_what_they_are_called():
    model = tiny(torch.bfloat16)
    model.register_buffer("odd", torch.arange(7, dtype=torch.uint8))  # no whole number of words
    model.register_buffer("unaligned", torch.arange(9, dtype=torch.bfloat16)[1:])
    model.register_buffer("scalar", torch.tensor(True))
    digests, places = {digest(model)}, torch.Generator().manual_seed(0)
    for n, (_, tensor) in enumerate(state_of(model), 1):
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        at = int(torch.randint(len(raw), (1,), generator=places))
        raw[at] ^= 1 << n % 8 if tensor.dtype != torch.bool else 1
        digests.add(digest(model))
        assert len(digests) == n + 1
        raw[at] ^= 1 << n % 8 if tensor.dtype != torch.bool else 1
        assert digest(model) in digests
    for pair in ((0, 2), (3, -1)):  # two weights of one tensor that change places
        flat = model.embed.weight.data.view(-1)
        flat[list(pair)] = flat[list(pair[::-1])]
        digests.add(digest(model))
    model.register_buffer("renamed", model._buffers.pop("odd"))
    digests.add(digest(model))
    for same_bytes in (model.scalar.view(torch.uint8), model.scalar[None]):  # another dtype, another shape
        model.scalar = same_bytes
        digests.add(digest(model))
    assert len(digests) == n + 6

# ----- the copy ------------------------------------------------------------------------------------------------------


def test_tied_weights_are_copied_once():
    taken = Snapshot(tiny())
    taken.keep_all()
    assert "embed.weight" in taken.copies and "head.weight" not in taken.copies


def test_a_weight_is_copied_once_and_before_it_changes():
    model, seen = tiny(), []
    weight, taken = model.norm.weight, Snapshot(model)
    start = weight.detach().clone()

    def update(weight, grad):
        seen.append(taken.copies["norm.weight"].clone())
        weight.data.add_(grad)
        return "finite"
    for _ in range(2):
        assert taken.before(update)(weight, torch.ones_like(weight)) == "finite"
    assert list(taken.copies) == ["norm.weight"] and not torch.equal(weight, start)
    assert len(seen) == 2 and all(torch.equal(copy, start) for copy in seen)


def test_adapting_copies_each_weight_when_it_is_about_to_change(monkeypatch):
    model, copies, copied, make_update = tiny(tied=False), [], snapshot.copied, adapt.make_update
    monkeypatch.setattr(snapshot, "copied", lambda *args: copies.append(copied(*args)) or copies[-1])

    def counting(*args):
        update, weights = make_update(*args), []

        def counted(weight, grad):
            weights.append(weight)
            assert len(copies) == min(len(weights), len(before))  # the second example needs none
            return update(weight, grad)
        return counted
    monkeypatch.setattr(adapt, "make_update", counting)
    before = bits(model)
    with adapt.adapted(model, tiny_examples(2)):
        assert len(copies) == len(before)
    assert same(model, before)

# ----- the way back --------------------------------------------------------------------------------------------------


def test_everything_is_put_back():
    """Weights that were kept, buffers, gradients, train/eval mode, requires_grad, checkpointing, random state, hooks.
    """
    model, report = tiny(), adapt.Report()
    model.register_buffer("counter", torch.arange(3))
    model.layers[0].train()
    model.layers[0].checkpointing = True
    model.norm.weight.requires_grad_(False)
    model.embed_grad = buffer = torch.zeros(())
    before, fingerprint, rng, fired = bits(model), digest(model), torch.get_rng_state(), []
    modes = [module.training for module in model.modules()]
    taken = Snapshot(model)
    taken.hooks.append(model.embed.weight.register_post_accumulate_grad_hook(fired.append))
    taken.keep_all()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
        parameter.grad = torch.ones_like(parameter)
    model.counter += 7
    model.train()
    model.requires_grad_(True)
    model.embed_grad, model.head_grad = None, torch.ones(())
    model.layers[0].checkpointing, model.layers[1].checkpointing = False, True
    torch.rand(7)
    assert not same(model, before) and digest(model) != fingerprint
    put_back(taken, report)
    assert report.restored and same(model, before) and digest(model) == fingerprint and model.unusable is None
    assert model.counter.tolist() == [0, 1, 2] and torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert [layer.checkpointing for layer in model.layers] == [True, False, False]
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["norm.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.embed_grad is buffer and model.head_grad is None
    model.embed_grad = None
    model(torch.tensor([[1, 2]])).float().sum().backward()
    assert not fired and taken.hooks == []


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupt_during_the_restore_waits_until_it_is_done(times, monkeypatch):
    model = tiny()
    before, restore, struck = bits(model), Snapshot.restore, []

    def interrupted(self):
        if len(struck) < times:
            struck.append(1)
            next(iter(self.model.parameters())).data.zero_()  # half-way
            raise KeyboardInterrupt
        restore(self)
    monkeypatch.setattr(Snapshot, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), adapt.adapted(model, tiny_examples(1)) as report:
        pass
    assert report.restored and same(model, before)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_between_two_copies_is_held_until_all_are_back(kind, monkeypatch):
    model, report, struck, state = tiny(), adapt.Report(), [], state_of
    before, taken = bits(model), Snapshot(model)
    taken.keep_all()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)

    def interrupted(model):
        for i, named in enumerate(state(model)):
            if i == 5 and not struck:
                struck.append(bits(model))
                raise kind("struck")
            yield named
    monkeypatch.setattr(snapshot, "state_of", interrupted)
    with pytest.raises(kind, match="struck"):
        put_back(taken, report)
    assert report.restored and same(model, before) and model.unusable is None
    halfway = [torch.equal(one, other) for one, other in zip(struck[0], before)]
    assert halfway == [True] * 5 + [False] * (len(before) - 5)


def test_a_model_that_could_not_be_restored_refuses_to_run(monkeypatch):
    model = tiny()
    with pytest.raises(RuntimeError, match="could not be restored"), adapt.adapted(model, tiny_examples(1)):
        monkeypatch.setattr(snapshot, "state_of", lambda model: list(model.named_parameters())[:-1])  # one is forgotten
    monkeypatch.undo()
    for use in (lambda: model(torch.tensor([[1]])), lambda: next(generate(model, [1])),
                lambda: adapt.adapted(model, tiny_examples(1)).__enter__()):
        with pytest.raises(RuntimeError, match="could not be restored"):
            use()


def test_a_weight_that_changed_without_a_copy_is_noticed():
    model, report = tiny(), adapt.Report()
    taken = Snapshot(model)
    model.norm.weight.data[3] += 1
    with pytest.raises(RuntimeError, match="could not be restored"):
        put_back(taken, report)
    assert not report.restored and "could not be restored" in model.unusable

# ----- adapted, and put back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam", "lr": 1e-2, "steps": 3},
                                      {"optimizer": "sgd", "lr": 1.0}, {"activation_checkpointing": False},
                                      {"dtype": torch.float32}, {"snapshot_device": torch.device("cpu")}])
def test_everything_is_as_it_was(settings):
    def count(model, ids):  # a buffer that a forward pass changes, as batch norm's
        model.counter += 1
    settings = dict(settings)
    model = tiny(settings.pop("dtype", torch.bfloat16))
    model.register_buffer("counter", torch.arange(3))
    model.register_forward_pre_hook(count)
    model.train()
    model.layers[1].eval()
    model.layers[0].attention.qkv.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before, rng, fingerprint = bits(model), torch.get_rng_state(), digest(model)
    with adapt.adapted(model, tiny_examples(), **settings) as report:
        assert report.applied and not same(model, before) and not report.restored
        assert model.head.weight is model.embed.weight
        torch.rand(7)
        model.eval()
        model.counter += 1
        assert model.counter[0] > 2  # the passes of the steps, and this
        model.requires_grad_(False)
    assert report.restored and same(model, before) and digest(model) == fingerprint
    assert model.counter.tolist() == [0, 1, 2] and torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.checkpointing for layer in model.layers)


def test_200_cycles_change_nothing_and_leak_nothing():
    model, examples, outcomes = tiny(), tiny_examples(4), Counter()
    before, fingerprint, process = bits(model), digest(model), psutil.Process()
    for cycle in range(200):
        with adapt.adapted(model, examples, seed=cycle, optimizer=("signsgd", "adam")[cycle % 2],
                           check=cycle % 4 > 1) as report:
            list(generate(model, [1, 2, 3], max_new_tokens=3))
        outcomes[report.applied] += 1
        assert digest(model) == fingerprint
        if cycle == 20:  # allocators and thread pools have warmed up
            resident = process.memory_info().rss
    assert same(model, before) and process.memory_info().rss - resident <= 5 << 20
    assert outcomes == {True: 100, False: 100}  # at this rate the check undoes the steps


@pytest.mark.parametrize("call", range(1, 9))
def test_restored_whatever_strikes_while_the_steps_are_checked(call, monkeypatch):
    """The losses of three examples alone, of four before their steps, and one after them: the examples are the same."""
    model, calls, example_loss = tiny(), [], adapt.example_loss
    before = bits(model)

    def striking(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return example_loss(*args)
    monkeypatch.setattr(adapt, "example_loss", striking)
    with pytest.raises(KeyboardInterrupt), adapt.adapted(model, tiny_examples(1) * 4, lr=1e-3, check=True):
        pass
    assert len(calls) == call and same(model, before) and model.unusable is None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


class Sudden(BaseException):
    pass


KINDS = {"ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit,
         "MemoryError": MemoryError, "BaseException": Sudden, "SIGTERM": SystemExit}
POINTS = ["hooks half set", "before the first forward", "first gradient", "middle copy", "middle gradient",
          "last copy", "last gradient", "hooks to be removed", "loss afterwards", "start of the block",
          "while generating", "end of the block"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", POINTS)
def test_restored_whatever_happens_wherever(kind, point, monkeypatch):
    model, left = tiny(), []
    before = bits(model)

    def strike():
        left.append(point)
        if kind == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the handler runs at the next instruction
        raise KINDS[kind]("struck")
    updates = len(list(model.parameters()))
    strike_at = {"first gradient": 1, "middle gradient": updates // 2, "last gradient": updates}.get(point)
    make_update, example_loss, losses = adapt.make_update, adapt.example_loss, []

    def striking_update(*args):
        update, count = make_update(*args), []

        def counted(weight, grad):
            finite = update(weight, grad)
            count.append(weight)
            if len(count) == strike_at:
                strike()
            return finite
        return counted

    def striking_loss(*args):
        losses.append(1)
        if len(losses) == {"before the first forward": 1, "loss afterwards": 2}.get(point):
            strike()
        return example_loss(*args)
    copied, copies = snapshot.copied, []

    def striking_copy(*args):
        copies.append(1)
        if len(copies) == {"middle copy": updates // 2, "last copy": updates}.get(point):
            strike()
        return copied(*args)
    monkeypatch.setattr(snapshot, "copied", striking_copy)
    monkeypatch.setattr(adapt, "make_update", striking_update)
    monkeypatch.setattr(adapt, "example_loss", striking_loss)
    set_hook, remove, hooks = torch.Tensor.register_post_accumulate_grad_hook, adapt.remove_hooks, []

    def striking_set_hook(weight, hook):
        hooks.append(set_hook(weight, hook))
        if point == "hooks half set" and len(hooks) == updates // 2:
            strike()  # this hook has no place in anyone's list
        return hooks[-1]

    def striking_remove(hooks):
        if point == "hooks to be removed" and not left:
            strike()
        remove(hooks)
    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", striking_set_hook)
    for module in (adapt, snapshot):
        monkeypatch.setattr(module, "remove_hooks", striking_remove)

    def terminated(signum, frame):
        raise SystemExit("struck")
    old_handler = signal.signal(signal.SIGTERM, terminated)
    try:
        with pytest.raises(KINDS[kind], match="struck"), adapt.adapted(model, tiny_examples(1)) as report:
            if point == "start of the block":
                strike()
            for _ in generate(model, [1, 2], max_new_tokens=4):
                if point == "while generating":
                    strike()
            if point == "end of the block":
                strike()
    finally:
        signal.signal(signal.SIGTERM, old_handler)
    assert left == [point] and same(model, before) and model.unusable is None
    assert all(parameter.grad is None and not vars(parameter) for parameter in model.parameters())
    assert model.embed_grad is None and model.head_grad is None
    hooks_left = sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())
    assert hooks_left == (point == "hooks half set")
    monkeypatch.undo()
    untouched = tiny()
    with adapt.adapted(model, tiny_examples(1)) as report, adapt.adapted(untouched, tiny_examples(1)):  # it still works
        assert report.applied and same(model, bits(untouched))  # and the hook that is left does nothing
