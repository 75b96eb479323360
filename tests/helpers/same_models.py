"""Everything of a model that surgery could touch, and two models held against one another on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BOUND = 1e-11
CALLS: list[str] = []
KEPT: list[object] = []  # nodes live as long as somebody holds them


def note(name):
    return lambda *args, **kwargs: CALLS.append(name)


def state(model: nn.Module):
    """Everything of a model that a conversion could touch."""
    found = []
    for name, module in model.named_modules():
        hooks = {k: [id(h) for h in v.values()] for k, v in vars(module).items() if "hooks" in k and v is not None}
        owned = {n: id(t) for own in (module._parameters, module._buffers) for n, t in own.items()}
        found.append((name, id(module), module.training, owned, hooks, sorted(vars(module))))
    weights = [(n, p.requires_grad, p._version, p.sum().item()) for n, p in model.named_parameters()]
    return found, weights, [(n, b.double().sum().item()) for n, b in model.named_buffers()], torch.get_rng_state().sum()


def outcome(model: nn.Module, *inputs: Tensor, train: bool):
    """Output, gradients of the inputs, and which hooks ran; None where the model does not run."""
    CALLS.clear()
    model.train(train)
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(1)
    try:
        y = model(*given)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    except (RuntimeError, ValueError):
        return None
    return y.detach(), [x.grad for x in given], sorted(CALLS)


def require_same(old: nn.Module, new: nn.Module, *inputs: Tensor) -> bool:
    for train in (False, True):
        wanted = outcome(old, *inputs, train=train)
        if wanted is None:
            return False
        found = outcome(new, *inputs, train=train)
        assert found is not None, "the converted model does not run where the original does"
        assert found[0].shape == wanted[0].shape
        scale = wanted[0].abs().max().clamp(min=1e-30)
        assert (found[0] - wanted[0]).abs().max() <= BOUND * scale
        for mine, theirs in zip(found[1], wanted[1], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine - theirs).abs().max() <= BOUND * theirs.abs().max().clamp(min=1e-30)
    return True


def size(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def encoder(**arguments):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2)


def decoder():
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
