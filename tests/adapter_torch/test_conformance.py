"""The conformance kit on the PyTorch adapter."""

from drivers.torch_driver import TorchDriver

from swa_core.testing import parametrize_with_checks


@parametrize_with_checks([TorchDriver])
def test_conformance(check):
    check()
