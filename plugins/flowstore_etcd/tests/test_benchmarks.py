"""The benchmarks that measure etcd succeed, and every variant does its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import etcd_cluster
import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(etcd_cluster.BINARY is None, reason=etcd_cluster.MISSING)
def test_the_costs_of_a_step_are_measured() -> None:
    smallest = ("--rounds", "1", "--seconds", "0.01", "--scale", "0.05", "--callers", "4")
    command = [sys.executable, "-m", "benchmarks.scaling", "--databases", "etcd", *smallest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    for measure in (
        "(steps per second)",
        "processor time of the client",
        "processor time of the server",
        "written to the log",
        "syncs of the log",
        "added to the database",
        "left in the database by compaction",
    ):
        _, _, figures = done.stdout.partition(measure)
        variants = [line.strip() for line in figures.splitlines()[2:4]]
        assert variants[0].startswith("etcd, one member"), measure
        assert variants[1].startswith("etcd, 3 members"), measure
