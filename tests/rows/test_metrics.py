"""Counters of one process are seen by another, under vLLM's names, and add up over ranks and engines."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_yocou.rows import metrics as row_metrics

WRITE = """
import sys
from types import SimpleNamespace
from vllm_yocou.rows.metrics import RowCounters
config = SimpleNamespace(
    instance_id=sys.argv[1],
    model_config=SimpleNamespace(served_model_name="tiny"),
    parallel_config=SimpleNamespace(data_parallel_index=int(sys.argv[2])),
)
counters = RowCounters(config)
counters.count(100, 1)
counters.count(7, 7)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_the_server_shows_what_workers_count(temporary, monkeypatch):
    for instance, rank in (("17_dp0", "0"), ("17_dp1", "1")):
        subprocess.run([sys.executable, "-c", WRITE, instance, rank], check=True)
    registry = CollectorRegistry()
    monkeypatch.setattr(row_metrics, "REGISTRY", registry)
    monkeypatch.setattr(row_metrics, "collector", row_metrics.RowCollector())
    row_metrics.expose(SimpleNamespace(instance_id="17"))
    row_metrics.expose(SimpleNamespace(instance_id="18"))  # an engine that has counted nothing yet
    page = generate_latest(registry).decode()
    for rank in "01":
        labels = f'{{engine="{rank}",model_name="tiny"}}'
        assert f"vllm:yocou_self_decoder_rows_total{labels} 107.0" in page
        assert f"vllm:yocou_cross_decoder_rows_total{labels} 8.0" in page
        assert f"vllm:yocou_skipped_rows_total{labels} 99.0" in page


def test_vllms_own_directory_is_used_where_it_has_one(temporary, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(temporary))
    monkeypatch.setattr(row_metrics, "collector", row_metrics.RowCollector())
    row_metrics.expose(SimpleNamespace(instance_id="19"))
    assert row_metrics.collector.directories == []  # vLLM collects that directory itself
    subprocess.run([sys.executable, "-c", WRITE, "19", "0"], check=True)
    (file,) = temporary.glob("counter_*.db")
    assert file.name.startswith("counter_yocou-19-")


PARTS = dict(
    model_config=SimpleNamespace(served_model_name="tiny"), parallel_config=SimpleNamespace(data_parallel_index=0)
)


def test_engines_of_one_process_do_not_share_a_file(temporary):
    for instance, rows in (("20", 200), ("20_dp1", 7)):
        row_metrics.RowCounters(SimpleNamespace(instance_id=instance, **PARTS)).count(rows, 0)
    collector = row_metrics.RowCollector()
    collector.directories.append(row_metrics.directory(SimpleNamespace(instance_id="20")))
    counted = {sample.name: sample.value for metric in collector.collect() for sample in metric.samples}
    assert counted["vllm:yocou_skipped_rows_total"] == 207


def test_a_directory_that_cannot_be_written_stops_nothing(temporary, monkeypatch, lines):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(temporary / "nobody" / "made" / "this"))
    row_metrics.RowCounters(SimpleNamespace(instance_id="21", **PARTS)).count(1, 1)
    (line,) = lines
    assert "row counters are not on /metrics" in line
