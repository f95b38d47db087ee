"""Fixtures of the tests of the SAM engine."""

import pytest

from samtune.models.training import train_mode
from tests.conftest import SmallNet


@pytest.fixture
def plain_net(small_net: SmallNet) -> SmallNet:
    """Without dropout and with frozen statistics: its output for a sample does not depend on the others."""
    small_net.drop.p = 0.0
    train_mode(small_net, freeze_bn=True)
    return small_net
