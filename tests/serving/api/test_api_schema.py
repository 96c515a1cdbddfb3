"""Whatever the schema allows and whatever it does not: never a 5xx, and what comes back is as the schema says."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

from adapterhub_lite.serving.api_server import ApiServer

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "8"))


@pytest.fixture(scope="session")
def api_schema(shared_server: ApiServer) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{shared_server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_brings_the_server_down(case: schemathesis.Case) -> None:
    if case.operation.path in ("/v1/completions", "/v1/chat/completions") and isinstance(case.body, dict):
        case.body["max_tokens"] = 2
    case.call_and_validate(checks=[not_a_server_error], timeout=60)
