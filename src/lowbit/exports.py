"""What `lowbit` exports. `import lowbit` is instant: the first name that is asked for imports this file, and torch."""

from lowbit import amp as amp
from lowbit import hardware as hardware
from lowbit import optim as optim
from lowbit import plot as plot
from lowbit import schedules as schedules
from lowbit.advice import Advice, advise
from lowbit.conversion.convert import convert_, restore_
from lowbit.conversion.freeze import freeze_, thaw_
from lowbit.conversion.report import Report
from lowbit.conversion.state import load_state_dict, state_dict
from lowbit.errors import RunError, UsageError
from lowbit.evidence import metrics as metrics
from lowbit.evidence.ledger import Ledger
from lowbit.evidence.meter import Meter
from lowbit.evidence.plan import plan
from lowbit.evidence.probe import Probe, probe
from lowbit.evidence.proof import Proof
from lowbit.evidence.verify import VerificationError, tripwire, verify
from lowbit.methods.names import recipes
from lowbit.methods.recipe import Recipe
from lowbit.numerics import formats as formats
from lowbit.precision.controller import PrecisionController
from lowbit.precision.range_test import RangeTestResult, range_test
from lowbit.report.cost import Cost

__all__ = [
    "Advice",
    "Cost",
    "Ledger",
    "Meter",
    "PrecisionController",
    "Probe",
    "Proof",
    "RangeTestResult",
    "Recipe",
    "Report",
    "RunError",
    "UsageError",
    "VerificationError",
    "advise",
    "convert_",
    "freeze_",
    "load_state_dict",
    "plan",
    "probe",
    "range_test",
    "recipes",
    "restore_",
    "state_dict",
    "thaw_",
    "tripwire",
    "verify",
]
