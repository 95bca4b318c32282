"""Bit for bit: a copy of every weight that is about to change, the way back, and the proof that nothing is left.

    snapshot = Snapshot(model)               a digest of all weights; nothing is copied yet
    snapshot.before(update)(weight, grad)    copies the weight, once, then updates it
    put_back(snapshot, report)               every copy goes back; the digest must be that of the start

A weight is copied just before its first step, in backward, into memory that the activations have left by then.
Subtracting the step instead would not do: it leaves 0.4 % of bf16 weights off by a bit. This file knows models as named
tensors with a few switches (checkpointing, gradient buffers, unusable), and no question and no optimizer.
"""
import contextlib
import functools
import hashlib

import torch
import torch.nn.functional as F

from files import one_line

# ----- the fingerprint -----------------------------------------------------------------------------------------------


def digest(model):
    """A fingerprint, 64 hex digits, of the name, dtype, shape and bytes of every parameter and buffer (tied ones once).

    The bytes enter by a multilinear hash: of 32-bit words x and fixed random odd numbers r, each piece gives sum(x r)
    mod 2^64. One word that differs always changes it, several go unnoticed with a chance of at most 2^-32. SHA-256 then
    takes in names and sums only: of all bytes it would take a CPU twice as long, and a GPU's would have to be moved.
    Digests compare on one kind of device, because r is drawn there.
    """
    names, sums = [], []
    for name, tensor in state_of(model):
        names.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        if len(flat) % 4 or flat.storage_offset() % 4:
            flat = F.pad(flat, (0, -len(flat) % 4))
        r = odd_numbers(tensor.device)
        sums += [(words * r[:len(words)]).sum() for words in flat.view(torch.int32).split(len(r))]
    sums = torch.stack([one.to(sums[0].device) for one in sums]).tolist()
    return hashlib.sha256(repr((names, sums)).encode()).hexdigest()


@functools.lru_cache
def odd_numbers(device):
    """The random numbers of `digest`, int64, as many as a piece has words."""
    r = torch.empty(1 << 19 if device.type == "cpu" else 1 << 22, dtype=torch.int64, device=device)
    return r.random_(-2**63, None, generator=torch.Generator(device).manual_seed(0)).bitwise_or_(1)


def state_of(model):
    """[(name, tensor)] of all parameters and buffers; tied weights appear once."""
    return [*model.named_parameters(), *model.named_buffers()]

# ----- the copy ------------------------------------------------------------------------------------------------------


class Snapshot:
    """All that adaptation may change about a model: weights, buffers, gradients, modes, random state, hooks."""

    def __init__(self, model, device="cpu"):
        self.model, self.device = model, device
        self.names = {tensor: name for name, tensor in state_of(model)}  # tied ones once
        self.copies = {}  # {name: tensor on `device`}
        for buffer in model.buffers():  # a forward pass may change them
            self.keep(buffer)
        self.requires_grad = {name: weight.requires_grad for name, weight in model.named_parameters()}
        self.modes = {module: (module.training, getattr(module, "checkpointing", None)) for module in model.modules()}
        self.rng = torch.get_rng_state()
        self.cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.digest = digest(model)
        self.buffers = getattr(model, "embed_grad", None), getattr(model, "head_grad", None)
        self.hooks = []  # those on gradients, which an interrupt may leave behind

    def keep(self, tensor):
        """Copies a parameter or buffer, once."""
        name = self.names[tensor]
        if name not in self.copies:
            self.copies[name] = copied(tensor.detach(), self.device)

    def keep_all(self):
        """Copies every parameter that has no copy yet."""
        for tensor in self.names:
            self.keep(tensor)

    def before(self, update):
        """`update` that copies the weight first."""
        def copy_and_update(weight, grad):
            self.keep(weight)
            return update(weight, grad)
        return copy_and_update

    def restore(self):
        """Puts everything back, in place; may be called again when it was interrupted. RuntimeError if it cannot."""
        remove_hooks(self.hooks)
        with torch.no_grad():
            for name, tensor in state_of(self.model):
                if name in self.copies:
                    tensor.copy_(self.copies[name], non_blocking=True)  # the digest below waits for it
        for name, weight in self.model.named_parameters():
            weight.grad = None
            weight.requires_grad_(self.requires_grad[name])
        self.model.embed_grad, self.model.head_grad = self.buffers
        for module, (training, checkpointing) in self.modes.items():
            module.training = training
            if checkpointing is not None:
                module.checkpointing = checkpointing
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state_all(self.cuda_rng)
        if digest(self.model) != self.digest:
            raise RuntimeError("the weights could not be restored after test-time training; load the model anew")


def remove_hooks(hooks):
    """Removes hooks from their weights, and from the list."""
    for hook in hooks:
        hook.remove()
    hooks.clear()


def copied(tensor, device):
    """A copy on `device`; a GPU's in host memory is pinned if possible, for 55 GB/s where other memory gives 2 to 16.

    torch keeps pinned memory for the next question, in blocks of powers of two: 18.3 GB for Llama-3.1-8B's 16.1.
    """
    if tensor.is_cuda and torch.device(device).type == "cpu":
        with contextlib.suppress(RuntimeError):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, copy=True)


def place_for_snapshot(model, bytes_beside=0):
    """The model's device, if two copies of the weights and `bytes_beside` fit there; else the host."""
    tensors = [tensor for _, tensor in state_of(model)]
    device = tensors[0].device
    if device.type == "cuda":
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if torch.cuda.mem_get_info(device)[0] + unused > 2 * size + bytes_beside:
            return device
    return torch.device("cpu")

# ----- the way back --------------------------------------------------------------------------------------------------


def put_back(snapshot, report):
    """Restores once, to the end: an interrupt on the way is held until it is done and raised then.

    Sets report.restored. A model that cannot be restored is marked `unusable` and refuses to run again.
    """
    interrupt = None
    while not report.restored:
        try:
            snapshot.restore()
            report.restored, snapshot.model.unusable = True, None
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
        except BaseException as error:
            snapshot.model.unusable = f"this model could not be restored after test-time training ({one_line(error)})"
            raise
    if interrupt:
        raise interrupt
