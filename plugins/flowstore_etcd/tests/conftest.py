"""Clusters for the tests: one member, and three."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[2])])

import etcd_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[etcd_cluster.Cluster]:
    if etcd_cluster.BINARY is None:
        pytest.skip(etcd_cluster.MISSING)
    with etcd_cluster.running_cluster() as running:
        yield running


@pytest.fixture(scope="session")
def three() -> Iterator[etcd_cluster.Cluster]:
    if etcd_cluster.BINARY is None:
        pytest.skip(etcd_cluster.MISSING)
    with etcd_cluster.running_cluster(3) as running:
        yield running
