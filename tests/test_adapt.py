"""adapt.py: one step by hand, what steps do to the loss, and how `adapted` ends (test_snapshot.py: the way back)."""
import json
import re
import threading
import time
import weakref

import pytest
import torch
from conftest import ROOT, bits, same, tiny, tiny_examples

import adapt
import model as M
from data import training_example
from generate import generate
from rows import messages_of
from tokenizer import Tokenizer

# ----- the update ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer, expected", [
    # w - lr g / (|g| + 1e-8):  3 - 0.5 · 2 / 2;  -1 + 0.5 · 1 / 2, because this gradient is as small as eps
    ("signsgd", [2.5, -0.75]), ("adam", [2.5, -0.75]), ("sgd", [2.0, -1.0])])
def test_one_update_of_two_weights_worked_out_by_hand(optimizer, expected, dtype):
    """Numbers that bf16 holds exactly, so that stochastic rounding has nothing to decide."""
    weight, grad = torch.tensor([3.0, -1.0]).to(dtype), torch.tensor([2.0, -1e-8])
    finite = adapt.make_update(optimizer, 0.5, torch.Generator().manual_seed(0))(weight, grad)
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)
    assert finite


def test_the_second_step_of_adam_worked_out_by_hand():
    # g = 4, then 0:   m = 0.1 · 4, then 0.36;                     v = 0.001 · 16, then 0.015984
    #                  m' = 0.36 / (1 - 0.81) = 1.8947368;         v' = 0.015984 / (1 - 0.998001) = 7.9959980
    # steps:           lr · 4 / sqrt(16) = lr;                     lr · 1.8947368 / 2.8277196 = 0.6700582 lr
    weight, update = torch.tensor([1.0]), adapt.make_update("adam", 0.1, torch.Generator().manual_seed(0))
    update(weight, torch.tensor([4.0]))
    assert weight.item() == pytest.approx(0.9, abs=1e-6)
    update(weight, torch.tensor([0.0]))
    assert weight.item() == pytest.approx(0.9 - 0.06700582, abs=1e-6)
    update(other := torch.tensor([1.0]), torch.tensor([-4.0]))  # another weight has moments of its own
    assert other.item() == pytest.approx(1.1, abs=1e-6)


LN2, LN3 = 0.6931472, 1.0986123
# The gradients of the test below, worked out there.
GRADIENTS = {"embed.weight": [[0.2528511, -0.2528511], [0, 0], [0, 0]], "norm.weight": [0.5493061, -0.4620981],
             "head.weight": [[1 / 2, 1 / 2], [-2 / 3, -2 / 3], [1 / 6, 1 / 6]]}


@pytest.mark.parametrize("optimizer", ["signsgd", "adam", "sgd"])
def test_one_step_of_test_time_training_worked_out_by_hand(optimizer):
    """A Llama of 14 weights: 3 words, width 2, no layer; logits = head(rms_norm(embed(id)) · norm).

    Word 0 is (2, 2), of root mean square 2, so n = (1, 1), and with norm = (1, 1) the logits are the sums of the head's
    rows: ln 3, ln 2, 0. So p = (3, 2, 1) / 6. Label 1 follows word 0 twice; the third position is not trained. The loss
    is the mean of ln 3 and ln 3, and with d the gradient:

        d logits = p - onehot(1)            = (1/2, -2/3, 1/6)
        d head   = d logits · n, row by row = (1/2, 1/2), (-2/3, -2/3), (1/6, 1/6)
        g        = head.T d logits          = (1/2 ln 3, -2/3 ln 2)         = (0.5493061, -0.4620981)
        d norm   = g · n                    = g
        d word 0 = (g - n mean(g · n)) / 2  = (0.5493061 - 0.0436040, -0.4620981 - 0.0436040) / 2
                                            = (0.2528511, -0.2528511)
    """
    config = M.LlamaConfig(vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1,
                           num_key_value_heads=1, head_dim=2, rms_norm_eps=0.0, rope_scaling=None)
    start = {"embed.weight": torch.tensor([[2.0, 2.0], [3.0, -5.0], [0.5, 4.0]]), "norm.weight": torch.ones(2),
             "head.weight": torch.tensor([[LN3, 0.0], [0.0, LN2], [0.0, 0.0]])}
    model, lr = M.Llama(config), 0.01
    model.load_state_dict(start)
    with adapt.adapted(model, [([0, 0, 2], [1, 1, -100])], lr=lr, optimizer=optimizer) as report:
        assert report.applied and report.loss_before == pytest.approx(LN3, abs=1e-6)
        assert report.loss_after < report.loss_before
        for name, weight in model.named_parameters():
            gradient = torch.tensor(GRADIENTS[name])
            step = gradient if optimizer == "sgd" else gradient.sign()  # g / (|g| + 1e-8)
            torch.testing.assert_close(weight.data, start[name] - lr * step, rtol=0, atol=2e-7, msg=name)
    assert all(torch.equal(weight, start[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["signsgd", "adam", "sgd"])
def test_fp32_steps_equal_torch_optimizers(optimizer, tied):
    """Two steps on each of two examples, against torch.optim on an independently computed loss."""
    ours, theirs = tiny(torch.float32, tied=tied), tiny(torch.float32, tied=tied)
    if optimizer == "sgd":
        reference = torch.optim.SGD(theirs.parameters(), lr=1e-4)
    for ids, labels in tiny_examples():
        for _ in range(2):
            if optimizer == "signsgd" or (optimizer == "adam" and "reference" not in locals()):
                reference = torch.optim.Adam(theirs.parameters(), lr=1e-4)  # signsgd is a fresh Adam every time
            logits = theirs(torch.tensor([ids]))[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), ignore_index=-100)
            reference.zero_grad()
            loss.backward()
            reference.step()
    update = adapt.make_update(optimizer, 1e-4, torch.Generator().manual_seed(0))
    adapt.take_steps(ours, tiny_examples(), update, steps=2)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        # to a hundredth of a step; but a gradient that is itself rounding noise has a step of either sign
        assert ((a - b).abs() <= 1e-6).float().mean() > 0.995, optimizer


def test_bf16_steps_have_the_fp32_step_as_their_mean():
    exact, rounded = tiny(torch.float32), tiny(torch.bfloat16)
    exact.load_state_dict({name: weight.float() for name, weight in rounded.state_dict().items()})
    start = [parameter.detach().double().clone() for parameter in exact.parameters()]
    adapt.take_steps(exact, tiny_examples(1), adapt.make_update("signsgd", 1e-5, torch.Generator()), 1)
    adapt.take_steps(rounded, tiny_examples(1), adapt.make_update("signsgd", 1e-5, torch.Generator().manual_seed(0)), 1)
    moved_exact = torch.cat([(p.double() - s).flatten() for p, s in zip(exact.parameters(), start)])
    moved = torch.cat([(p.double() - s).flatten() for p, s in zip(rounded.parameters(), start)])
    direction = moved_exact.sign()
    assert abs((moved * direction).mean() / (moved_exact * direction).mean() - 1) < 0.15
    nearest = torch.cat([(s + m.view_as(s)).bfloat16().double().sub(s).flatten() for s, m in
                         zip(start, moved_exact.split([s.numel() for s in start]))])
    assert (nearest * direction).mean() < 0.2 * (moved * direction).mean()


def test_gradients_are_gone_before_the_next_is_complete():
    """While the last gradient is used no other exists: the memory of adaptation is one gradient, not all."""
    model, alive = tiny(), []

    def update(weight, grad):
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return True
    adapt.take_steps(model, tiny_examples(1), update, 1)
    assert alive == [0] * len(list(model.parameters()))
    assert not any(vars(parameter) for parameter in model.parameters())  # and nothing hangs on a weight


def test_the_step_survives_in_the_real_model_and_rounding_to_nearest_would_lose_it(smollm2, monkeypatch):
    """The paper's rate 1e-5, one step, a trace of demo/data cut to 300 tokens; the loss is computed with the weights
    that generate. fp32 weights give the fall that is possible; bf16 as shipped must keep ≥ 90 % of it."""
    tokenizer = Tokenizer.from_dir(smollm2)
    row = json.loads((ROOT / "demo/data/traces.jsonl").read_text().splitlines()[0])
    example = training_example(tokenizer, messages_of(row), 300)

    def fall(dtype):
        with adapt.adapted(M.load_model(smollm2, dtype=dtype), [example], lr=1e-5) as report:
            assert report.applied
            return report.loss_before - report.loss_after
    exact, shipped = fall(torch.float32), fall(torch.bfloat16)

    def to_nearest(*args):
        return lambda rounded, exact: rounded.copy_(exact)
    monkeypatch.setattr(adapt, "stochastic_rounder", to_nearest)
    nearest = fall(torch.bfloat16)
    assert exact > 0.1 and shipped >= 0.9 * exact and nearest < 0.2 * exact, (exact, shipped, nearest)

# ----- adapted -------------------------------------------------------------------------------------------------------


def test_what_the_steps_needed_is_gone_while_answering(monkeypatch):
    model, updates, make_update = tiny(), [], adapt.make_update

    def watched(*args):
        update = make_update(*args)
        updates.append(weakref.ref(update))
        return update
    monkeypatch.setattr(adapt, "make_update", watched)
    with adapt.adapted(model, tiny_examples(), optimizer="adam") as report:
        assert report.applied and updates[0]() is None  # and its moments, 8 bytes a parameter, with it


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_buffers_of_a_training_run_are_neither_read_nor_written(tied):
    model, plain = tiny(torch.float32, tied=tied), tiny(torch.float32, tied=tied)
    model.embed_grad, model.head_grad = buffers = [torch.ones_like(model.head.weight) for _ in range(2)]
    with adapt.adapted(model, tiny_examples(1)), adapt.adapted(plain, tiny_examples(1)):
        assert same(model, bits(plain))
    assert all(torch.equal(buffer, torch.ones_like(buffer)) for buffer in buffers)
    assert model.embed_grad is buffers[0] and model.head_grad is buffers[1]


def test_the_loss_afterwards_need_not_be_measured(monkeypatch):
    model, losses, example_loss = tiny(), [], adapt.example_loss
    monkeypatch.setattr(adapt, "example_loss", lambda *args: losses.append(1) or example_loss(*args))
    before = bits(model)
    with adapt.adapted(model, tiny_examples(1)) as measured:
        after = bits(model)
    with adapt.adapted(model, tiny_examples(1), loss_after=False) as report:
        assert report.applied and report.loss_after is None and same(model, after)
    assert len(losses) == 3 and report.restored and same(model, before)
    assert report.loss_before == measured.loss_before > measured.loss_after


def test_two_questions_at_once_are_kept_apart():
    model, examples = tiny(), tiny_examples(4)
    before, alone, together = bits(model), {}, {}

    def ask(i, answers):
        with adapt.adapted(model, [examples[i]], lr=1e-2):
            answers[i] = list(generate(model, [1, 2, 3], max_new_tokens=20, temperature=0))
    for i in range(4):
        ask(i, alone)
    threads = [threading.Thread(target=ask, args=(i, together)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len({tuple(answer) for answer in alone.values()}) > 1 and same(model, before)


@pytest.mark.parametrize("examples, reason", [
    ([], "no neighbour"), ([([1, 2], [-100, -100])], "no neighbour")])
def test_without_a_neighbour_the_answer_is_the_models_own(examples, reason):
    model = tiny()
    with adapt.adapted(model, examples) as report:
        assert not report.applied and reason in report.reason
    assert report.restored


@pytest.mark.parametrize("what, settings", [
    ("loss", {}), ("loss afterwards", {}), ("gradient", {}), ("gradient", {"optimizer": "adam"}),
    ("gradient", {"optimizer": "sgd"}), ("gradient", {"dtype": torch.float32})], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_gives_the_models_own_answer_and_the_reason(what, settings, value, monkeypatch):
    settings = dict(settings)
    model = tiny(settings.pop("dtype", torch.bfloat16))
    before, calls, example_loss = bits(model), [], adapt.example_loss
    if what == "gradient":
        def poison(grad):
            grad = grad.clone()
            grad.view(-1)[3] = value
            return grad
        model.layers[1].mlp.down.weight.register_hook(poison)

    def faulty(*args):
        calls.append(1)
        return example_loss(*args) + (value if len(calls) == {"loss": 1, "loss afterwards": 2}.get(what) else 0)
    monkeypatch.setattr(adapt, "example_loss", faulty)
    with adapt.adapted(model, tiny_examples(1), **settings) as report:
        assert not report.applied and what.split()[0] in report.reason and same(model, before)
        model.norm.weight.data.zero_()
    assert report.restored and same(model, before)


# ----- the check -----------------------------------------------------------------------------------------------------

def test_steps_that_help_the_next_neighbours_are_kept_as_without_a_check():
    """Four times the same example: each step lowers the loss on the next."""
    model, adapted = tiny(), []
    for check in (False, True):
        with adapt.adapted(model, tiny_examples(1) * 4, lr=1e-3, check=check) as report:
            assert report.applied and report.loss_after < report.loss_before - 0.02
            adapted.append(bits(model))
    assert all(map(torch.equal, *adapted))


@pytest.mark.parametrize("examples, applied", [(4, False), (3, True)])
def test_steps_that_do_not_help_are_undone_before_the_answer(examples, applied):
    """A rate of 1e-9 changes next to nothing; three neighbours or fewer are not checked."""
    model = tiny()
    before = bits(model)
    with adapt.adapted(model, tiny_examples(examples), lr=1e-9, check=True) as report:
        assert report.applied == applied and (applied or same(model, before))
        assert (report.reason is None) == applied
        model.norm.weight.data.zero_()
    assert report.restored and same(model, before)
    if not applied:
        assert re.fullmatch(r"the loss on the next 3 neighbours changed by [+-]0\.00\d nats a token, "
                            r"expected -0\.02 or less", report.reason)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("second, third, fourth, taken", [
    (0.95, 2.00, 2.99, 4), (1.00, 1.95, 3.00, 3), (0.97, 2.00, 2.96, 4), (0.97, 2.00, 2.98, 3),
    (1.00, float("nan"), 2.00, 2)])
def test_the_check_by_hand(steps, second, third, fourth, taken, monkeypatch):
    """The losses alone are 1, 2 and 3: their mean change must be -0.02. An example's loss before its first step counts.
    """
    losses, seen = iter([1.0, 2.0, 3.0]), []
    first = {0: 5.0, 1: second, 2: third, 3: fourth, 4: 9.0}

    def scripted(model, example):
        if not torch.is_grad_enabled():
            return torch.tensor(next(losses))
        seen.append(example)
        later = 0.5 * (seen.count(example) > 1)
        return model.norm.weight.sum() * 0 + first[example] - later
    monkeypatch.setattr(adapt, "example_loss", scripted)
    updates, model = [], tiny()

    def update(weight, grad):
        return updates.append(weight is model.norm.weight) or True
    try:
        adapt.take_steps(model, list(range(5)), update, steps, check=True)
        assert taken == 4 and sum(updates) == 5 * steps
    except adapt.NoHelp:
        assert taken == 3 and sum(updates) == 3 * steps
    except adapt.NotFinite:
        assert taken == 2 and sum(updates) == 2 * steps


@pytest.mark.parametrize("reason", ["it is sure", None])
def test_with_a_reason_no_step_is_tried_and_it_is_asked_for_with_the_own_weights(reason):
    model, asked = tiny(), []
    before = bits(model)

    def unless():
        asked.append(same(model, before))
        return reason
    with adapt.adapted(model, tiny_examples(1), lr=1e-3, unless=unless) as report:
        assert report.left_alone == (not report.applied) == same(model, before) == (reason is not None)
        assert report.reason == reason
    assert report.restored and same(model, before) and asked == [True]
    with adapt.adapted(model, [], unless=unless) as report:
        assert report.reason == (reason or "no neighbour to learn from") and report.left_alone == (reason is not None)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_question_to_the_model_that_fails_leaves_it_free_and_as_it_was(error):
    """It is asked while no other thread may adapt the model, and the time that it takes is told."""
    model, free = tiny(), []
    before = bits(model)

    def elsewhere():
        def take():
            free.append(adapt.LOCKS[model].acquire(blocking=False))
            if free[-1]:
                adapt.LOCKS[model].release()
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()

    def fails():
        elsewhere()
        raise error
    with pytest.raises(error), adapt.adapted(model, tiny_examples(1), lr=1e-3, unless=fails):
        pass
    elsewhere()
    assert free == [False, True] and same(model, before)
    with adapt.adapted(model, tiny_examples(1), lr=1e-3, unless=lambda: time.sleep(0.02) or "it is sure") as report:
        assert report.adapt_s >= 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_alone_that_is_not_finite_is_named_before_any_step(value, monkeypatch):
    monkeypatch.setattr(adapt, "example_loss", lambda model, example: torch.tensor(value if example == 2 else 1.0))
    with pytest.raises(adapt.NotFinite, match=rf"the losses on the next neighbours are \[1.0, {value}, 1.0\]"):
        adapt.take_steps(tiny(), [0, 1, 2, 3], None, 1, check=True)
