"""The conformance suite, as an author runs it: all of it on one member, and what members may break on three.

FLOWSTORE_TEST_PROFILE=standard runs all of it, in the profile standard, on both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import etcd_cluster
import pytest

SECONDS = 3600
PROFILE = os.environ.get("FLOWSTORE_TEST_PROFILE", "quick")
CLAUSES = ("CON-2", "CON-3", "CLM-1", "QUE-1", "QUE-3", "WAT-1")
"""Faults, races and hints."""


def conform(url: str, *arguments: str) -> None:
    flowstore = Path(sys.executable).with_name("flowstore")
    command = [flowstore, "conformance", url, "--profile", PROFILE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.timeout(SECONDS)
def test_a_single_member_conforms(cluster: etcd_cluster.Cluster) -> None:
    conform(cluster.url("suite"))


@pytest.mark.timeout(SECONDS)
def test_a_cluster_of_three_conforms(three: etcd_cluster.Cluster) -> None:
    chosen = CLAUSES if PROFILE == "quick" else ()
    conform(three.url("suite"), *(part for clause in chosen for part in ("--clause", clause)))
