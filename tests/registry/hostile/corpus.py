"""Every hostile case."""

from tests.registry.hostile.configurations import CONFIG_CASES
from tests.registry.hostile.files import FILE_CASES
from tests.registry.hostile.manifests import PULL_CASES
from tests.registry.hostile.weights import WEIGHT_CASES

CASES = [*CONFIG_CASES, *WEIGHT_CASES, *FILE_CASES, *PULL_CASES]
