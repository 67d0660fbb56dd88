"""What is made of measurements: targets, chart, the line of a soak, the choice of scenarios."""

from argparse import Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import chart, report
from benchmarks.compare import DEFAULT, MAIN, QUICK, Scenario, chosen, parse
from benchmarks.peers import Peer
from benchmarks.soak import line


def _run(total_us: float, rps: float = 1000) -> dict[str, float]:
    zero = dict.fromkeys(
        ("p50_us", "p90_us", "p99_us", "p999_us", "core", "errors", "rss_mib"), 0.0
    )
    return zero | {
        "rps": rps,
        "total_us": total_us,
        "gateway_us": total_us * 0.75,
        "redis_us": total_us * 0.25,
    }


@pytest.fixture
def result() -> report.Result:
    peers = [Peer("tallygate", "Tallygate", 1, []), Peer("traefik", "Traefik <3>", 2, [])]
    runs = {
        MAIN: {
            "tallygate": [_run(40, 1800), _run(80, 900), _run(42, 1800)],
            "traefik": [_run(100, 1000), _run(200, 500), _run(100, 1000)],
        },
        Scenario(rejected=True): {"tallygate": [_run(20), _run(20), _run(20)]},
    }
    return report.collect(Namespace(rounds=3, redis=None), peers, runs)


def test_targets_compare_what_was_measured_in_the_same_round(result: report.Result):
    found = {each["target"]: each for each in report.targets(result)}

    cpu = found["CPU of gateway + Redis / Traefik's"]
    assert cpu["measured"] == pytest.approx(0.4)  # in every round, slow as the second one was
    assert cpu["met"]
    assert found["requests/s on one core / Traefik's"]["measured"] == pytest.approx(1.8)
    assert found["CPU of an admitted / of a rejected one"]["measured"] == pytest.approx(2.1)
    assert not any("nginx" in name for name in found)  # was not measured


def test_a_missed_target_says_so(result: report.Result):
    result["latency"] = {"added_p99_ms": 2.5}

    found = {each["target"]: each for each in report.targets(result)}

    assert not found["added p99 at half of saturation, ms"]["met"]


def test_the_chart_is_well_formed_and_as_long_as_the_figures(result: report.Result):
    root = ElementTree.fromstring(chart.draw(result))  # escapes "<3>" or this fails

    bars = [
        each for each in root.iter() if each.tag.endswith("rect") and each.get("height") == "15"
    ]
    own = [float(str(bar.get("width"))) for bar in bars if bar.get("fill") == "#2563eb"]
    other = [float(str(bar.get("width"))) for bar in bars if bar.get("fill") == "#24a1c1"]
    assert own[0] / other[0] == pytest.approx(
        0.42, abs=0.01
    )  # medians of the gateway's CPU: 42, 100
    assert "Traefik <3>" in "".join(root.itertext())


def test_a_steady_process_does_not_grow():
    samples = [(float(second), 70 + (second % 7) / 10) for second in range(600)]

    assert not line(samples)["grows"]


def test_a_leak_of_a_few_mib_in_ten_minutes_is_growth():
    samples = [(float(second), 70 + (second % 7) / 10 + second * 3 / 600) for second in range(600)]

    found = line(samples)

    assert found["grows"]
    assert found["mib_per_10_min"] == pytest.approx(3, abs=0.2)


def test_without_a_choice_scenarios_differ_from_the_main_one_in_one_thing():
    assert chosen(parse([])) == DEFAULT
    assert chosen(parse(["--quick"])) == QUICK


def test_a_choice_combines():
    found = chosen(
        parse(["--connections", "1,64", "--traffic", "admitted,rejected", "--sizes", "1,64"])
    )

    assert len(found) == 6  # a refusal has no size
    assert {each.appendfsync for each in found} == {"always"}


def test_unknown_peers_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["--peers", "tallygate,apache"])

    assert "apache" in capsys.readouterr().err


def test_a_page_gets_the_tables_between_its_marks(result: report.Result, tmp_path: Path):
    result |= {"client": "wrk", "python": "CPython", "load": 0.0, "targets": report.targets(result)}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")

    report.replace(page, report.markdown(result))
    report.replace(page, report.markdown(result))  # again is no different

    text = page.read_text()
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "old" not in text
    assert text.count("| 64 conn, 1 KiB | Tallygate | 1,800 |") == 1


def test_a_page_without_marks_is_left_alone(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("no marks")

    with pytest.raises(ValueError, match="has no"):
        report.replace(page, "text")

    assert page.read_text() == "no marks"
