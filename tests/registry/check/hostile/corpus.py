"""Every hostile case."""

from tests.registry.check.hostile.configurations import CONFIG_CASES
from tests.registry.check.hostile.files import FILE_CASES
from tests.registry.check.hostile.manifests import PULL_CASES
from tests.registry.check.hostile.weights import WEIGHT_CASES

CASES = [*CONFIG_CASES, *WEIGHT_CASES, *FILE_CASES, *PULL_CASES]
