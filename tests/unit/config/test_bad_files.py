"""One file per mistake: its `# expect:` lines are all that is reported, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core.config import load, loads
from core.errors import ConfigError

DATA = Path(__file__).parents[2] / "data" / "config"
FILES = sorted(DATA.glob("bad_*.yaml"))


def without_line(problem: str) -> str:
    return re.sub(r" \(line \d+\)$", "", problem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_mistake_is_reported_with_its_path_value_and_fix(path: Path) -> None:
    expected = re.findall(r"^# expect: (.*)$", path.read_text(), re.MULTILINE)
    with pytest.raises(ConfigError) as caught:
        load(path, env={})
    assert sorted(map(without_line, caught.value.problems)) == sorted(expected)
    assert expected
    assert "hunter2" not in str(caught.value)


def test_there_is_a_file_per_mistake() -> None:
    assert len(FILES) >= 50


def test_all_mistakes_of_all_kinds_come_together_in_file_order() -> None:
    # Given a type error, an unknown key, a unit, a reference, a number and a missing variable
    text = """
gateway: {workers: many, acces_log: true}
redis: {url: "${NOT_SET}"}
upstreams:
  api: {urls: [http://127.0.0.1:9000]}
routes:
  - {match: {path: /a/*}, upstream: nope, strip_prefix: 7}
  - {match: {path: /a/b}, upstream: api}
plans:
  free:
    price: {base: cheap, currency: usd}
    limits:
      day: {window: 1 fortnight, limit: 5, meter: credits}
      slow: {rate: 1_000_003/d}
  none: {}
"""
    # When it is loaded
    with pytest.raises(ConfigError) as caught:
        loads(text, "my.yaml", env={})
    # Then every one is there, also those of one limit and of sections with other errors
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "gateway.workers",
        "gateway.acces_log",
        "redis.url",
        "routes[0].strip_prefix",
        "routes[0].upstream",
        "routes[1].match",
        "plans.free.price.base",
        "plans.free.limits.day.window",
        "plans.free.limits.day.meter",
        "plans.free.limits.slow.rate",
        "plans.none.limits",
    ]
    assert str(caught.value).startswith("my.yaml: 11 problems\n")
    assert caught.value.problems[0].endswith("(line 2)")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "must be a mapping of sections"),
        ("log: {level: info\n", "line 2, column 1: not YAML"),
        ("log: *nowhere\n", "not YAML: "),
        ("log: &x {level: *x}\n", "an anchor contains itself"),
        ("log: {level: !!python/name:os.system x}\n", "log.level: tag "),
    ],
)
def test_what_is_no_yaml_or_no_config_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(text, env={})
    assert problem in caught.value.problems[0]


def test_an_anchor_that_expands_without_end_is_refused() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="is an anchor used too often"):
        loads("\n".join(rows), env={})


def test_an_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"log: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 text, at byte 5"):
        load(tmp_path / "latin.yaml")
