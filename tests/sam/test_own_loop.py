"""SAM in loops of other people: dictionaries as batches, closures, outputs with a loss."""

from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from samtune import SAM
from tests.conftest import SmallNet
from tests.support.small_models import cross_entropy_of, gradient


def by_keys(net, content):
    return F.cross_entropy(net(content["x"]), content["y"])


def with_extras(net, content, labels):
    assert (content["name"], content["mask"]) == ("train", None)
    return F.cross_entropy(net(content["x"]) * content["scale"], labels)


# How a batch of images x and labels y is given, and its loss. The gradient is always the same.
Pair = namedtuple("Pair", ["x", "y"])

FORMS = {
    "a named tuple": (lambda x, y: (Pair(x, y),), lambda net, b: F.cross_entropy(net(b.x), b.y)),
    "a dictionary": (lambda x, y: ({"x": x, "y": y},), by_keys),
    "a mapping of another kind": (lambda x, y: (UserDict({"x": x, "y": y}),), by_keys),
    "a dictionary in a list": (lambda x, y: ([{"x": x}, y],), lambda net, b: F.cross_entropy(net(b[0]["x"]), b[1])),
    "a dictionary and a tensor, with extras": (
        lambda x, y: ({"x": x, "name": "train", "scale": torch.tensor(1.0), "mask": None}, y),
        with_extras,
    ),
}


@pytest.mark.parametrize("options", [{}, {"m": 3}, {"micro_batch": 3}, {"ascent_fraction": 0.5}, {"rho": 0.0, "m": 3}])
@pytest.mark.parametrize("name", FORMS)
def test_a_batch_of_any_form_gives_the_gradient_of_its_tensors(name, options, plain_net, batch):
    form, loss = FORMS[name]
    expected = gradient(plain_net, cross_entropy_of(plain_net), *batch, **options)
    assert torch.equal(gradient(plain_net, lambda *b: loss(plain_net, *b), *form(*batch), **options), expected)


class Output(OrderedDict):
    """As of a model of transformers: a dictionary with attributes."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: SimpleNamespace(loss=loss, logits=None),
        lambda loss: Output(loss=loss, logits=None),
        lambda loss: {"loss": loss},
        lambda loss: loss[None],
    ],
)
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_an_output_with_a_loss_is_a_loss(wrap, rho, plain_net, batch):
    expected = gradient(plain_net, cross_entropy_of(plain_net), *batch, rho=rho)
    assert torch.equal(gradient(plain_net, lambda *b: wrap(cross_entropy_of(plain_net)(*b)), *batch, rho=rho), expected)


@pytest.mark.parametrize("options", [{}, {"rho": 0.0}, {"ascent_steps": 2}])
def test_a_closure_knows_its_batch(options, plain_net, batch):
    expected = gradient(plain_net, cross_entropy_of(plain_net), *batch, **options)
    assert torch.equal(gradient(plain_net, lambda: cross_entropy_of(plain_net)(*batch), **options), expected)


@pytest.mark.parametrize("options", [{"m": 4}, {"micro_batch": 4}, {"ascent_fraction": 0.5}])
def test_a_closure_cannot_be_divided_and_the_error_says_what_to_do(options, plain_net, batch):
    sam = SAM(plain_net, **options)
    with pytest.raises(ValueError, match=r"divide the batch.*sam\.backward\(loss, images, labels\)"):
        sam.backward(lambda: cross_entropy_of(plain_net)(*batch))


@pytest.mark.parametrize(
    ("loss", "batch", "error", "message"),
    [
        (lambda b: None, (torch.ones(2),), TypeError, "the loss is None: .* given the labels"),
        (lambda b: SimpleNamespace(loss=None), (torch.ones(2),), TypeError, "the loss is None"),
        (lambda b: 1.5, (torch.ones(2),), TypeError, "the loss is a float"),
        (lambda b: (b.sum(), 1), (torch.ones(2),), TypeError, "the loss is a tuple: return a scalar tensor"),
        (lambda b: b, (torch.ones(2),), ValueError, r"the loss has the shape \(2,\): return its mean"),
        (lambda *b: 0, (torch.ones(2), torch.ones(3)), ValueError, "2 and 3 samples"),
        (lambda *b: 0, ({"x": torch.ones(2), "y": torch.ones(3)},), ValueError, "2 and 3 samples"),
        (lambda b: b.sum(), (torch.ones(2),), ValueError, "the loss has no gradient: it is detached"),
        (lambda b: 0, (torch.ones(0),), ValueError, "the batch is empty"),
        (lambda b: 0, ({"x": "text"},), ValueError, "holds no tensor"),
    ],
)
def test_an_invalid_loss_or_batch_raises_an_error_that_names_it(loss, batch, error, message):
    sam = SAM(SmallNet())
    before = [w.clone() for w in sam.model.parameters()]
    with pytest.raises(error, match=message):
        sam.backward(loss, *batch)
    assert all(torch.equal(a, b) for a, b in zip(before, sam.model.parameters(), strict=True))


@pytest.mark.parametrize("rho", [0.05, 0.0])
def test_a_loss_that_calls_backward_itself_raises_an_error(rho, plain_net, batch):
    def loss(x, y):
        value = cross_entropy_of(plain_net)(x, y)
        value.backward()
        return value

    with pytest.raises(ValueError, match="the loss calls backward itself: return it"):
        SAM(plain_net, rho=rho).backward(loss, *batch)


@pytest.mark.parametrize("options", [{"m": 2}, {"micro_batch": 2}, {"ascent_fraction": 0.5}])
def test_samples_in_a_list_cannot_be_divided(options, plain_net, batch):
    x, y = batch
    for content in ((x, y.tolist()), ({"x": x, "names": [str(label) for label in y.tolist()]},)):
        with pytest.raises(ValueError, match=f"it holds a list of {len(x)} (int|str): give a tensor"):
            SAM(plain_net, **options).backward(lambda *b: 0, *content)
