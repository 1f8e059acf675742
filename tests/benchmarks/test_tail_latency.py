"""How long the slowest wait: ratios of skipping to every row, and servers that are asked as users ask them."""

from benchmarks.results import Result
from benchmarks.tables.tail_latency import EVERY_ROW, SKIPPING, note, rows


def measured() -> Result:
    settings = dict(shape="57M", dtype="float32", requests=100, rounds=3, load=0.8, prompt=1200, answer=200)
    result = Result("tail_latency", "", settings)
    for way, times in ((SKIPPING, 1), (EVERY_ROW, 2)):
        for wait, seconds in (("first token", 1.5), ("between tokens", 0.02)):
            for number, percentile in enumerate((50, 95, 99)):
                result.add(f"{wait}, p{percentile}", "s", times * seconds * (1 + number), chunk=512, way=way)
        result.add("requests", "1/s", 0.5, chunk=512, way=way)
        result.add("answers", "1/s", [100 / times, 0, 1000], chunk=512, way=way)
    return result


def test_a_percentile_of_skipping_is_compared_with_every_row():
    header, (skipping, every) = rows(measured())
    assert skipping[:5] == ["512", SKIPPING, "0.50", "1,500 ms (0.50x)", "3,000 ms (0.50x)"]
    assert every[:5] == ["512", EVERY_ROW, "0.50", "3,000 ms", "6,000 ms"] and every[-1] == "50.0"
    assert skipping[6] == "20 ms (0.50x)" and len(header) == len(skipping) == len(every)
    assert "3 interleaved rounds of 100 requests" in note(measured())


def test_the_table_on_a_tiny_shape(starts_vllm, both_cores, nightly, monkeypatch):
    from benchmarks import tail_latency

    small = dict(SHAPE="yoco-u-kjv", PROMPT=40, ANSWER=8, SATURATING=4, REQUESTS=6, ROUNDS=2, WARM_UP=2, CHUNKS=(64,))
    for name, value in small.items():
        monkeypatch.setattr(tail_latency, name, value)
    monkeypatch.setattr(tail_latency, "SETTINGS", f"{tail_latency.SETTINGS} --enforce-eager".replace("1G", "64M"))
    result = tail_latency.measure()
    for way in (SKIPPING, EVERY_ROW):
        assert len(result.runs("answers", way=way)) == 2
        low, high = (result.median(f"first token, p{percentile}", way=way) for percentile in (50, 99))
        assert 0 < low <= high
