"""The conformance suite on one member and on a cluster of three, as an author runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import etcd_cluster
import pytest

SECONDS = 1800


def conform(url: str, *arguments: str) -> None:
    command = [Path(sys.executable).with_name("flowstore"), "conformance", url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@pytest.mark.timeout(SECONDS)
def test_a_single_member_conforms(cluster: etcd_cluster.Cluster) -> None:
    conform(cluster.url("suite"), "--profile", "quick")


@pytest.mark.timeout(SECONDS)
def test_a_cluster_of_three_conforms(three: etcd_cluster.Cluster) -> None:
    conform(three.url("suite"), "--profile", "quick")
