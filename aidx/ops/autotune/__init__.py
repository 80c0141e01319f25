"""Which configuration is fastest on this device: timed, kept, merged, pinned, shipped."""

from .choice import Choice as Choice
from .choice import NotTuned as NotTuned
from .choice import choose as choose
from .choice import recording as recording
from .settings import Settings as Settings
from .settings import mode as mode
from .settings import settings as settings
from .store import fingerprint as fingerprint
from .table import Entry as Entry
from .table import Measurement as Measurement
from .table import Tuning as Tuning
from .tunable import Tunable as Tunable
from .tunable import register as register
from .tunable import sizes as sizes
from .tunable import tunables as tunables
from .tunable import unregister as unregister
