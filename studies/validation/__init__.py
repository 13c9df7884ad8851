"""Comparing the simulator with recorded peaks of real PyTorch code, and with peaks measured on GPUs."""

from studies.validation.cases import oracle_case as oracle_case
from studies.validation.cases import read_cases as read_cases
from studies.validation.compare import PHASES as PHASES
from studies.validation.compare import Row as Row
from studies.validation.compare import Summary as Summary
from studies.validation.compare import Validation as Validation
from studies.validation.compare import check_bound as check_bound
from studies.validation.compare import role_difference as role_difference
from studies.validation.compare import validate_oracle as validate_oracle
from studies.validation.measured import validate_measured as validate_measured
