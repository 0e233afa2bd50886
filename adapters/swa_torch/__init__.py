"""swa-core for PyTorch: an optimizer that averages what it trains.

>>> import torch
>>> from swa_torch import SWA
>>> model = torch.nn.Linear(2, 1)
>>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
>>> optimizer = SWA(sgd, {"start": "3step", "every": "1step"})
>>> for _ in range(4):
...     loss = model(torch.ones(5, 2)).square().mean()
...     optimizer.zero_grad()
...     _ = loss.backward()
...     optimizer.step()
>>> optimizer.n_averaged
2
>>> with optimizer.averaged():
...     prediction = model(torch.ones(1, 2))
"""

from swa_torch.batch_norm import update_bn
from swa_torch.optimizer import SWA
from swa_torch.plots import loss_line, loss_plane, loss_rays

__all__ = ["SWA", "loss_line", "loss_plane", "loss_rays", "update_bn"]
