"""The descriptor: what ping and doctor say, and what the package imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import etcd_cluster
import flowstore_etcd
from flowstore_etcd.etcd_pb2 import StatusResponse
from flowstore_etcd.maintenance import check_members

PACKAGE = Path(flowstore_etcd.__file__).parent
ALLOWED = {"flowstore_core", "flowstore_documents", "flowstore_etcd", "google", "grpc"}
FLOWSTORE = Path(sys.executable).with_name("flowstore")


def test_the_package_imports_core_the_toolkit_and_its_driver_only() -> None:
    found = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level
                found.add(str(node.module).partition(".")[0])
    assert found - sys.stdlib_module_names - {"__future__"} == ALLOWED


def test_the_driver_is_imported_only_when_a_store_is_opened() -> None:
    code = "import flowstore_etcd.plugin, sys; sys.exit('grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def status(**fields: object) -> StatusResponse:
    return StatusResponse(**{"version": "3.5.1", "leader": 7, **fields})  # type: ignore[arg-type]


def test_doctor_finds_what_stops_a_cluster() -> None:
    found = {
        finding.code: finding.severity.value
        for finding in check_members(
            {
                "a:1": "connection refused",
                "b:1": status(leader=0, errors=["memberID:7 alarm:NOSPACE "]),
                "c:1": status(version="3.4.23", errors=["memberID:7 alarm:CORRUPT "]),
                "d:1": status(db_size=90, db_size_quota=100),
                "e:1": status(db_size=2**31 - 1),
            }
        )
    }
    assert found == {
        "member-unreachable": "warning",
        "no-leader": "error",
        "no-space": "error",
        "corrupt": "error",
        "old-etcd": "note",
        "nearly-full": "note",
    }
    assert [finding.code for finding in check_members({"a:1": status(), "b:1": status()})] == []
    (known,) = check_members({"d:1": status(db_size=90, db_size_quota=100), "e:1": status()})
    assert (known.code, known.severity.value) == ("nearly-full", "warning")


def test_no_two_members_get_the_same_port() -> None:
    # By chance, two of 1,000 random ports would be equal.
    ports = [etcd_cluster.free_port() for _ in range(1_000)]
    assert len(set(ports)) == len(ports)


def test_ping_shows_the_members(cluster: etcd_cluster.Cluster) -> None:
    dead = f"127.0.0.1:{etcd_cluster.free_port()}"
    url = f"etcd://{cluster.members[0].address},{dead}/ping"
    done = subprocess.run(
        [FLOWSTORE, "--url", url, "ping", "--json"], capture_output=True, text=True, check=True, timeout=120
    )
    facts = json.loads(done.stdout)
    assert facts["details"]["members"].startswith(f"{cluster.members[0].address} etcd ")
    assert facts["details"]["members"].endswith(f"{dead} does not answer")
    assert "MiB in use" in facts["details"]["database"]
    doctor = subprocess.run(
        [FLOWSTORE, "doctor", url, "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    assert doctor.returncode == 1
    assert "member-unreachable" in [finding["code"] for finding in json.loads(doctor.stdout)["findings"]]
