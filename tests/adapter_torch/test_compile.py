"""torch.compile: the same graphs as without averaging, and none compiled anew at an update.

The backends here need no C++ compiler; what dynamo traces and guards does not depend on them.
"""

import pytest
import torch
from adapter_torch.training import averaging, batches, network, on_disk, same, sgd, train, values
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from swa_core import LearningRate, SWAConfig
from swa_torch import SWA

# What torch's compiler does to torch: imports what is deprecated, looks at gradients of anything.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

CONFIG = SWAConfig(start="4step", every="2step")
WITH_RATE = SWAConfig(start="4step", every="2step", lr=LearningRate(value=0.01, anneal="3step"))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def sgd_with_rate_in_a_tensor(model):
    return torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05), momentum=0.9)


class Scaled(torch.optim.SGD):
    """A step of its own around that of its base class."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(0.5)
        return super().step(closure)


def scaled(model):
    return Scaled(model.parameters(), lr=0.05)


def training_step(model, optimizer, what, backend):
    """A function of one batch, of which ``what`` is compiled."""

    def whole(x, y):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    if what == "whole":
        return torch.compile(whole, backend=backend)
    update = torch.compile(optimizer.step, backend=backend) if what == "update" else optimizer.step

    def around(x, y):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        update()
        return loss

    return around


def run(make, what, config):
    """Trains; returns the weights, what was compiled, and the optimizer."""
    torch._dynamo.reset()
    counters.clear()
    model = network()
    optimizer = make(model) if config is None else SWA(make(model), config)
    counter = CompileCounter()
    step = training_step(model, optimizer, what, counter)
    for number, (x, y) in enumerate(batches(11)):
        # Torch itself compiles an update anew once its state is there.
        with torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile"):
            step(x, y)
    compiled = (counter.frame_count, counter.op_count, sum(counters["graph_break"].values()))
    return values(model.parameters()), compiled, optimizer


@pytest.mark.parametrize("what", ["whole", "update"])
@pytest.mark.parametrize("make", [sgd, adam, scaled, sgd_with_rate_in_a_tensor])
def test_a_compiled_update_is_compiled_as_it_would_be_alone(make, what):
    if make is scaled:
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # so that its own step has hooks
    alone, (graphs, operators, breaks), _ = run(make, what, None)
    config = WITH_RATE if make is sgd_with_rate_in_a_tensor else CONFIG
    weights, compiled, optimizer = run(make, what, config)
    assert compiled[:2] == (graphs, operators)
    assert compiled[2] <= breaks
    assert (optimizer.updates, optimizer.n_averaged, optimizer.n_skipped) == (11, 4, 0)
    if config is CONFIG:
        assert same(alone, weights)
    if make in (sgd, scaled):  # the others compute otherwise where they are compiled
        _, _, eager = run(make, "nothing", config)
        assert same(eager.averaged_parameters, optimizer.averaged_parameters)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_computes_with_the_average_and_is_not_compiled_for_it(backend):
    model, optimizer = averaging(CONFIG)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(8, 4)
    train(compiled, optimizer, 1)
    evaluate(compiled, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        train(compiled, optimizer, 6)
        with optimizer.averaged():
            inside = evaluate(compiled, x)
        outside = evaluate(compiled, x)
    reference = network()
    reference.load_state_dict(model.state_dict())
    assert torch.equal(outside, evaluate(reference, x))
    with torch.no_grad():
        for p, a in zip(reference.parameters(), optimizer.averaged_parameters, strict=True):
            p.copy_(a)
    assert torch.equal(inside, evaluate(reference, x))
    assert not torch.equal(inside, outside)
    optimizer.finalize(compiled, bn_data=[x for x, _ in batches(2, seed=5)])
    assert same(model.parameters(), reference.parameters())
    assert not torch.equal(evaluate(compiled, x), inside)  # other statistics


def evaluate(model, x):
    model.eval()
    with torch.no_grad():
        result = model(x)
    model.train()
    return result


def addresses(model, optimizer):
    return [p.data_ptr() for p in [*model.parameters(), *model.buffers()]] + [
        group["lr"].data_ptr() for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_change_where_they_stand(dtype):
    # A captured graph reads and writes the addresses that it was captured with.
    model = network().to(dtype)
    optimizer = SWA(sgd_with_rate_in_a_tensor(model), WITH_RATE)
    where = addresses(model, optimizer)

    def update(number):
        for x, _ in batches(number):
            optimizer.zero_grad()
            model(x.to(dtype)).square().mean().backward()
            optimizer.step()

    update(7)
    bn_data = [x.to(dtype) for x, _ in batches(2, seed=5)]
    with optimizer.averaged(model, bn_data=bn_data):
        assert addresses(model, optimizer) == where
        state = on_disk(optimizer.state_dict())
    assert addresses(model, optimizer) == where
    optimizer.finalize(model, bn_data=bn_data)
    assert addresses(model, optimizer) == where
    optimizer.load_state_dict(state)
    # The rate in a group is replaced by loading, in every optimizer of torch.
    assert addresses(model, optimizer)[:-1] == where[:-1]
    update(2)
    assert addresses(model, optimizer)[:-1] == where[:-1]
