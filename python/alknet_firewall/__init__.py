"""A firewall for text that goes into large language models.

>>> from alknet_firewall import Firewall
>>> alarm = Firewall().screen("Please find the minutes of Monday's meeting attached.")
>>> alarm.level.name
'CLEAR'
"""

from ._core import __version__
from .alarm import Alarm, AlarmLevel, Signal, Span, Thresholds
from .config import FirewallConfig
from .errors import (
    AlknetFirewallError,
    CodebookError,
    ConfigError,
    HubError,
    InferenceError,
    InputError,
    ModelLoadError,
)
from .firewall import Firewall, Stream
from .models import DetectorModel, OnnxModel, TorchModel

__all__ = [
    "Alarm",
    "AlarmLevel",
    "AlknetFirewallError",
    "CodebookError",
    "ConfigError",
    "DetectorModel",
    "Firewall",
    "FirewallConfig",
    "HubError",
    "InferenceError",
    "InputError",
    "ModelLoadError",
    "OnnxModel",
    "Signal",
    "Span",
    "Stream",
    "Thresholds",
    "TorchModel",
    "__version__",
]
