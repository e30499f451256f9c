"""The sites themselves: what is ordered to befall a way does, in that direction, and ends when it is ordered to."""

import socket
import time
from collections.abc import Iterator

import pytest
from network.rough import Rough
from network.sites import Sites, why_not

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)
