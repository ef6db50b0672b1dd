"""Fixtures that the checks share, and the numbers that .ci/run sums up."""

import json
import logging
from pathlib import Path

import pytest
import requests
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "dist" / "fargate"


@pytest.fixture(scope="session")
def moto():
    """The address of moto, a server that stands in for AWS, on loopback."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(moto):
    """An empty account."""
    requests.post(f"{moto}/moto-api/reset", timeout=60).raise_for_status()
    return moto


@pytest.fixture(scope="session")
def driver():
    """The compiled driver."""
    assert DRIVER.exists(), "dist/fargate is missing: npm run build makes it"
    return str(DRIVER)


class Counts:
    """Counts tests, as fixtures/reporter.ts does for npm test."""

    def __init__(self):
        self.results = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report):
        # Set-up and tear-down of a test are reported by themselves.
        if report.when == "call" or report.outcome != "passed":
            self.results[report.outcome] += 1

    def pytest_sessionfinish(self):
        results = ROOT / "dist" / "infrastructure-results.json"
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps(self.results))


def pytest_configure(config):
    config.pluginmanager.register(Counts())
