"""SAM the slow and plain way, tensor by tensor: what the fast step is held against."""

import torch
import torch.nn.functional as F


def naive_sam_gradient(model, images, labels, rho):
    """The gradient at w + rho g / ||g||, by deep copies and Python loops; the model is left as it was."""
    params = list(model.parameters())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    generator = torch.get_rng_state()

    g = torch.autograd.grad(F.cross_entropy(model(images), labels), params)
    norm = sum((x * x).sum() for x in g).sqrt()
    w = [p.detach().clone() for p in params]
    after_one_pass = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for p, x in zip(params, g, strict=True):
            p += rho * x / norm
    torch.set_rng_state(generator)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    g2 = torch.autograd.grad(F.cross_entropy(model(images), labels), params)
    with torch.no_grad():
        for p, x in zip(params, w, strict=True):
            p.copy_(x)
    for name, b in model.named_buffers():
        b.copy_(after_one_pass[name])
    return g2
