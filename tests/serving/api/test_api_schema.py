"""Whatever the schema allows and whatever it does not: never a 5xx."""

import os

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from adapterhub_lite.serving.api.server import ApiServer

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "10"))


def test_no_request_brings_the_server_down(shared_server: ApiServer) -> None:
    schema = schemathesis.openapi.from_url(f"{shared_server.url}/openapi.json")
    seen = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def hold(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=[not_a_server_error], timeout=60)

            try:
                hold()
            except Unsatisfiable:
                continue  # an operation without parameters has nothing to get wrong
            seen += 1
    assert seen >= 11
