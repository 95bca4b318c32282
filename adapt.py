"""The steps of test-time training, and the way back.

    for each example, nearest first:
        g = gradient of the mean cross-entropy on the supervised part of the trace
        w = stochastic_round(w - lr * g / (|g| + eps))        a fresh Adam's first step: m = g, v = g^2
    then put back the original w, bit for bit

Source: FineMedLM-o1 (arXiv 2501.09213, section on test-time training). Without stochastic rounding 3 % of such a step
would be left (rounding.py). With `check` the steps are undone at the fourth example unless they help (take_steps); with
`unless` none is taken where that gives a reason, such as a model that is sure of its own answer.

Memory: 2 bytes a parameter on the device (the bf16 weights), the gradient of the layer at hand (each is used and freed
as soon as it is complete; that of a tied embedding and head once both ends have added to it), the activations of one
trace, and 2 bytes a parameter for the snapshot, in host memory, or on a GPU with room for two copies. The optimizer
"adam" keeps two fp32 moments across the examples: 8 bytes a parameter more. An 8B model and a trace of 2,048 tokens
peak at 18.4 GB (bench/gpu.py): a 24 GB card will do.

    with adapted(model, [training_example(tokenizer, messages)]) as report:
        answer(model)
"""
import contextlib
import sys
import threading
import time
import weakref
from dataclasses import dataclass

import torch
from tqdm import tqdm

from rounding import slices, stochastic_rounder
from snapshot import Snapshot, place_for_snapshot, put_back, remove_hooks

# ----- the update ----------------------------------------------------------------------------------------------------


def make_update(optimizer, lr, generator, eps=1e-8, betas=(0.9, 0.999)):
    """A function `update(weight, grad)` that takes one step in place, in fp32; returns whether all of it is finite.

    "signsgd"   w - lr g / (|g| + eps)                 the first step of a fresh Adam; needs no state
    "adam"      w - lr m' / (sqrt(v') + eps)           arXiv 1412.6980; moments kept from call to call for each weight,
                                                       no decay. Its first step is signsgd's
    "sgd"       w - lr g
    bf16 weights are written back by stochastic rounding, fp32 weights as they are.
    """
    moments = {}  # weight: [step, first moment, second moment]
    round_ = stochastic_rounder(generator, generator.device)

    def update(weight, grad):
        tensors = [weight, grad.contiguous()]
        if optimizer == "adam":
            if weight not in moments:
                moments[weight] = [0, *(torch.zeros_like(weight, dtype=torch.float32) for _ in betas)]
            state = moments[weight]
            state[0] += 1
            tensors += state[1:]
        finite = torch.ones((), dtype=torch.bool, device=weight.device)
        for w, g, *moment in zip(*map(slices, tensors)):
            exact, g = w.float(), g.float()  # of fp32 `exact` is w itself
            if optimizer == "signsgd":
                exact.addcdiv_(g, g.abs().add_(eps), value=-lr)
            elif optimizer == "sgd":
                exact.sub_(g, alpha=lr)
            else:
                t, (m, v) = state[0], moment
                m.lerp_(g, 1 - betas[0])
                v.lerp_(g * g, 1 - betas[1])
                exact.addcdiv_(m, (v / (1 - betas[1] ** t)).sqrt_().add_(eps), value=-lr / (1 - betas[0] ** t))
            finite &= exact.sum().isfinite()
            if w.dtype == torch.bfloat16:
                round_(w, exact)
        return finite
    return update


class NotFinite(Exception):
    """A loss, gradient or step of the adaptation is NaN or infinite."""


class NoHelp(Exception):
    """Steps on neighbours did not lower the loss on the next ones."""


CHECKED, FALL = 3, 0.02  # neighbours; nats a token. Rounding alone moves the mean by 0.01


def example_loss(model, example):
    """Mean cross-entropy of (ids, labels) over its supervised tokens, an fp32 scalar; labels as training_example's."""
    spare = -len(example[0]) % 8  # see data.collate
    ids, labels = (torch.tensor([[*row, *[empty] * spare]], device=model.norm.weight.device)
                   for row, empty in zip(example, (0, -100)))
    return -model(ids, labels=labels).sum() / (labels != -100).sum()


def take_steps(model, examples, update, steps, hooks=None, check=False):
    """`steps` updates on each example in turn; a gradient is used and dropped as soon as it is complete.

    Returns the loss on the first example before any step. NotFinite when a loss, gradient or step is not finite.
    `hooks`: a list for the hooks on gradients, so that a caller can remove those that an interrupt left behind.
    `check`: the examples after the first are questions, too, until they are trained on. NoHelp when the loss on the
    next CHECKED, each just before its own steps, has not fallen by FALL on average. Fewer examples are not checked.
    """
    hooks = [] if hooks is None else hooks
    change, alone = 0.0, examples[1:1 + CHECKED] if check and len(examples) > CHECKED else []
    with torch.no_grad():
        alone = [example_loss(model, example).item() for example in alone]
    if any(value - value != 0 for value in alone):
        raise NotFinite(f"the losses on the next neighbours are {alone}")
    first_loss, all_finite = None, torch.ones((), dtype=torch.bool, device=model.norm.weight.device)

    @torch.no_grad()
    def on_gradient(weight):
        nonlocal all_finite
        if hooks and weight.grad is not None:  # no hooks: an interrupt came between this one and its place in the list
            grad, weight.grad = weight.grad, None
            all_finite &= update(weight, grad)
    bar = tqdm(total=len(examples) * steps, desc="adapting", unit="step", delay=2, leave=False, disable=None,
               file=sys.stderr)
    head, buffer = model.head.weight, None
    if head is model.embed.weight and head.device.type == "cpu":
        buffer = torch.zeros_like(head)  # one gradient of this size, not three
    try:
        model.embed_grad = model.head_grad = buffer
        for weight in model.parameters():
            hooks.append(weight.register_post_accumulate_grad_hook(on_gradient))
        for i, example in enumerate(examples):
            for step in range(steps):
                with torch.enable_grad():
                    loss = example_loss(model, example)
                    value = loss.item()
                    if value - value != 0:
                        raise NotFinite(f"the loss on the neighbour is {value}")
                    if step == 0 < i <= len(alone):
                        change += (value - alone[i - 1]) / len(alone)
                        if i == len(alone) and not change <= -FALL:
                            raise NoHelp(f"the loss on the next {i} neighbours changed by {change:+.3f} nats a token, "
                                         f"expected {-FALL} or less")
                    loss.backward()
                if buffer is not None:
                    with torch.no_grad():
                        all_finite &= update(head, buffer)
                        buffer.zero_()
                first_loss = value if first_loss is None else first_loss
                if not all_finite:
                    raise NotFinite("a gradient or step on the neighbour is not finite")
                bar.update()
    finally:
        remove_hooks(hooks)
        model.embed_grad = model.head_grad = None
        bar.close()
    return first_loss

# ----- adapt, and put back -------------------------------------------------------------------------------------------

LOCKS = weakref.WeakKeyDictionary()  # model: the lock that keeps two questions apart


@dataclass
class Report:
    """The outcome of `adapted`: whether a step was applied and, if not, why; the loss on the nearest example before and
    after; seconds."""
    applied: bool = False
    left_alone: bool = False  # no step was tried, because `unless` gave a reason
    reason: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    adapt_s: float = 0.0
    restore_s: float = 0.0
    restored: bool = False


@contextlib.contextmanager
def adapted(model, examples, *, steps=1, lr=1e-5, optimizer="signsgd", seed=0, activation_checkpointing=None,
            snapshot_device=None, loss_after=True, check=False, unless=None):
    """Context manager: inside it the model has taken its steps on `examples`, after it the model is as it was before.

    examples: [(ids, labels), …] as `data.training_example` makes them, nearest first. Yields a Report. Whatever leaves
    the block, an exception or a signal turned into one: every parameter and buffer is restored bit for bit (compared by
    digest), as are train/eval mode, requires_grad and the random state; gradients are gone. A model that could not be
    restored refuses to run again. One question at a time: another thread waits. Without examples, or when a loss,
    gradient or step is not finite, or with `check` where steps do not help the next examples (see take_steps), the
    block runs with the weights as they were and the report says why.
    `loss_after`: False saves the forward pass that measures the gain, and with it the check that this loss is finite.
    `unless`: called first, with the weights as they are; where it returns a reason, no step is taken, for that reason.
    The activations of a model of more than a billion parameters are computed again in backward, unless told otherwise.
    `snapshot_device` is where the original weights wait: by default as `place_for_snapshot` says.
    """
    report, recompute = Report(), activation_checkpointing
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recompute is None:
        recompute = parameters > 1e9
    with LOCKS.setdefault(model, threading.RLock()):
        if model.unusable:
            raise RuntimeError(model.unusable)
        start = time.perf_counter()
        examples = [example for example in examples if any(label != -100 for label in example[1])]
        reason = unless() if unless else None
        report.left_alone = reason is not None
        if report.left_alone or not examples:
            report.reason, report.restored = reason or "no neighbour to learn from", True
            report.adapt_s = time.perf_counter() - start
            yield report
            return
        snapshot = Snapshot(model, snapshot_device or place_for_snapshot(
            model, bytes_beside=8 * parameters if optimizer == "adam" else 0))
        try:
            try:
                generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
                model.requires_grad_(True)
                for layer in model.layers:
                    layer.checkpointing = recompute
                try:
                    report.loss_before = take_steps(
                        model, examples, snapshot.before(make_update(optimizer, lr, generator)), steps,
                        snapshot.hooks, check)  # moments end with it
                    if loss_after:
                        with torch.no_grad():
                            report.loss_after = example_loss(model, examples[0]).item()
                        if report.loss_after - report.loss_after != 0:
                            raise NotFinite(f"the loss on the neighbour after the step is {report.loss_after}")
                    report.applied = True
                except (NotFinite, NoHelp) as error:
                    report.reason = str(error)
                    snapshot.restore()
                snapshot.keep_all()  # what the block itself changes is put back as well
                report.adapt_s = time.perf_counter() - start
                yield report
            finally:
                start = time.perf_counter()
                put_back(snapshot, report)
                report.restore_s = time.perf_counter() - start
        finally:  # a signal may strike in the first instruction of the `finally` above
            put_back(snapshot, report)
