"""Reports and the live pages in a real Chromium: drawn, quiet, filtered, printed, in both colours, on a phone, with hostile words."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs as made
from browser import Browser, chromium
from trebuchet.launcher import cli, record
from trebuchet.launcher.job import JobState
from trebuchet.launcher.report import collect, compare, page
from trebuchet.launcher.run_folder import RunFolder
from trebuchet.launcher.ui import Runs, Server

HOSTILE = "</script><script>window.owned = 1</script> <img src=x onerror='window.owned=2'> & \"q\" {{ 7*7 }} \u2028"
RATES = (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3, 3e-3)
CHARTS = {"loss", "speed", "rate", "gradient", "timeline", "compared", "evaluations", "phases", "memory", "lengths"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven trials of different rates and seeds."""
    root = tmp_path_factory.mktemp("sweep")
    for i, rate in enumerate(RATES):
        made.write(root / f"trial-{i}", made.planned(rate, seed=i % 3))
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium here, and it cannot be installed")
    opened = Browser(program)
    yield opened
    opened.close()


DRAWN = (
    "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg.main-svg .trace, svg.main-svg .point'))"
    ".map(p => p.id.slice(5))"
)


def contrast(browser: Browser, one: str, other: str) -> float:
    """WCAG 2 contrast of two of the page's colours."""
    code = (
        f"[{one!r}, {other!r}].map(n => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim())"
    )
    parts = [[int(hexed[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hexed in browser.script(code)]
    light = [
        sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), p, strict=True)
        )
        for p in parts
    ]
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_draws_every_chart_and_says_nothing(
    browser: Browser, folder: Path, tmp_path: Path, dark: bool
) -> None:
    output = tmp_path / "report.html"
    assert cli.main(["report", str(folder / "trial-3"), "--output", str(output)]) == 0
    browser.open(output.as_uri(), dark=dark)
    assert set(browser.script(DRAWN)) == CHARTS and browser.complaints() == []
    assert browser.script("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert [url for url in browser.asked() if not url.startswith(("file:", "data:", "blob:"))] == []
    labels = browser.script("[...document.querySelectorAll('.plot')].map(p => p.getAttribute('aria-label'))")
    assert len(labels) == 10 and all(len(label) > 30 for label in labels)
    assert browser.script(
        "[...document.querySelectorAll('figure.chart')].every(f => f.querySelector('details table tbody tr td'))"
    )
    for name in ("ink", "soft", "first", "good", "bad"):  # text: 4.5 to 1 at least
        assert contrast(browser, name, "card") >= 4.5, name
    for name in ("second", "third", "fourth", "fifth", "muted"):  # graphics: 3 to 1 at least
        assert contrast(browser, name, "card") >= 3, name


@pytest.mark.slow
def test_filters_the_colour_switch_and_printing(browser: Browser, folder: Path, tmp_path: Path) -> None:
    output = page.write(collect.find([str(folder / "trial-3")]), tmp_path / "r.html")
    browser.open(output.as_uri())
    shown = "[...document.querySelectorAll('[data-row=sample]')].filter(r => !r.hidden).length"
    assert browser.script(shown) == 3
    type_in = (
        "(() => {{ const i = document.querySelector('[data-filter={}]'); i.value = '{}';"
        " i.dispatchEvent(new Event('input', {{bubbles: true}})) }})()"
    )
    browser.script(type_in.format("sample", "beta"))
    assert (
        browser.script(shown) == 1
        and browser.script("document.querySelector('[data-count=sample]').textContent") == "1 of 3"
    )
    browser.script("document.getElementById('theme').click()")
    assert browser.script("document.documentElement.dataset.theme") == "dark"
    printed = browser.pdf()
    assert printed.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page[^s]", printed)) <= 12
    browser.open(output.as_uri(), width=390, height=800)
    assert browser.script("document.documentElement.scrollWidth") <= 390 and browser.complaints() == []


@pytest.mark.slow
def test_runs_side_by_side(browser: Browser, folder: Path, tmp_path: Path) -> None:
    output = page.write(collect.find([str(folder)]), tmp_path / "all.html")
    browser.open(output.as_uri())
    assert set(browser.script(DRAWN)) == {"curves", "parallel", "importance"} and browser.complaints() == []
    lines = "document.querySelectorAll('#plot-{} .scatterlayer .trace').length"
    assert browser.script(lines.format("curves")) == browser.script(lines.format("parallel")) == 7
    browser.script("document.querySelector('[data-trace=\"trial-0\"]').click()")
    assert browser.script(lines.format("curves")) == 6
    head = "document.querySelectorAll('.sortable th')[3]"
    browser.script(
        f"{head}.focus() || {head}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true}}))"
    )
    order = browser.script("[...document.querySelectorAll('[data-row=run] th')].map(t => t.textContent)")
    assert order[0] == "trial-2" and order[-1] == "trial-6"


@pytest.mark.slow
def test_the_trials_of_a_sweep_on_parallel_axes(browser: Browser, tmp_path: Path) -> None:
    """By the keys of the space. The losses stand at |log10(rate) + 4|, so their ranks over the rates are 5.5 3 1 2 4 5.5 7."""
    sweep = made.write_sweep(tmp_path / "sweep", RATES)
    assert cli.main(["report", str(sweep)]) == 0
    browser.open((sweep / "report.html").as_uri())
    drawn = {"results", "key-0", "key-1", "parallel", "importance", "curves"}
    assert set(browser.script(DRAWN)) == drawn and browser.complaints() == []
    lines = browser.script("document.querySelector('#plot-parallel').data.map(t => [t.name, t.line.width])")
    assert len(lines) == len(RATES) and [name for name, width in lines if width == 3] == ["002"]  # 1e-4
    bars = browser.script("document.querySelector('#plot-importance').data.map(t => t.y.map((y, i) => [y, t.x[i]]))[0]")
    assert dict(bars)["optimization.learning_rate"] == pytest.approx(12.5 / (28 * 27.5) ** 0.5)


@pytest.mark.slow
def test_what_users_wrote_stays_text(browser: Browser, tmp_path: Path) -> None:
    folder = made.write(tmp_path / "a <b>bold<b> name & 'q'", made.planned(1e-4), prompt=HOSTILE)
    browser.open(page.write([collect.read(folder)], tmp_path / "h.html").as_uri())
    assert browser.script("window.owned === undefined") and browser.complaints() == []
    assert browser.script("document.querySelector('h1').textContent") == folder.root.name
    assert browser.script("document.querySelector('.prompt pre').textContent").startswith(HOSTILE[:60])
    browser.open(page.write([collect.read(folder)] * 2, tmp_path / "h2.html").as_uri())
    assert browser.script("document.querySelector('#plot-curves .legendtext').textContent") == folder.root.name


def test_a_run_that_never_began_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.root.mkdir()
    record.create(
        folder, run="new", command=["x"], seed=0, model={"name": "m", "revision": None, "params": 1}, data=None
    )
    text = page.render([collect.read(folder)])
    assert "No step has been made yet" in text and "PENDING" in text


def test_rank_correlation_by_hand() -> None:
    assert compare.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert compare.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert compare.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )  # ranks 0 1.5 1.5 3 and 0 2 1 3
    assert compare.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_cost_is_hours_times_gpus_times_price(folder: Path) -> None:
    run = collect.read(RunFolder(folder / "trial-0"))
    assert run.seconds == 4 * 3600 and run.gpu_hours == 4.0  # 8:00 to 10:30 and 11:00 to 12:30, one GPU
    run.plan["cluster"]["groups"][0]["price_per_gpu_hour"] = 0.5
    assert run.cost == 2.0
    peak = run.plan["cluster"]["groups"][0]["peak_tflops"]["bf16"] * 1e12
    assert run.mfu(1000.0) == pytest.approx(1000 * 6 * run.record["model"]["params"] / peak)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made.write(tmp_path / "runs" / "first", made.planned(1e-4))
    opened = Server(tmp_path / "runs")
    thread = threading.Thread(target=opened.serve_forever, daemon=True)
    thread.start()
    yield opened
    opened.shutdown()
    opened.server_close()
    thread.join()


def ask(server: Server, path: str, *, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for key, value in headers.items():
        connection.putheader(key.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.text = answer.read().decode()  # type: ignore[attr-defined]
    return answer


def test_without_token_from_elsewhere_or_outside_the_folder_nothing_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("secret")
    assert server.server_address[0] == "127.0.0.1"
    good = f"trebuchet-{server.port}={server.token}"
    for path in ("/", "/run/first", "/body", "/?token=", "/?token=wrong", f"/?token={server.token}x"):
        assert ask(server, path).status == 401, path
    assert ask(server, "/", Cookie=good, Host="evil.example").status == 403
    assert ask(server, "/", Cookie=good).status == 200
    for path in (
        "/run/../",
        "/run/..%2F",
        "/run/%2e%2e",
        "/run/..",
        "/run//etc/passwd",
        "/run/first/../../run.json",
        "/first/run.json",
        "/run/",
    ):
        found = ask(server, path, Cookie=good)
        assert found.status == 404 and "secret" not in found.text, path  # type: ignore[attr-defined]
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, "/", method=method, Cookie=good).status == 501
    entered = ask(server, f"/run/first?token={server.token}")
    assert entered.status == 303 and entered.headers["Location"] == "/run/first"
    assert "HttpOnly" in entered.headers["Set-Cookie"] and "SameSite=Strict" in entered.headers["Set-Cookie"]


@pytest.mark.slow
def test_a_page_follows_a_run_that_trains(server: Server, browser: Browser) -> None:
    folder = made.write(server.runs.root / "now", made.planned(2e-4), steps=20, state=JobState.RUNNING)
    browser.open(server.address)
    browser.follow("document.querySelector('a[href=\"/run/now\"]').click()")
    ready = "new Promise(done => {{ const look = () => ({}) ? done(true) : setTimeout(look, 50); look(); }})"
    browser.script(
        ready.format(
            "document.querySelector('h1') && document.querySelector('h1').textContent === 'now' && document.body.dataset.connected"
        )
    )
    browser.script("document.querySelector('#training details summary').click()")
    line = {"step": 21, "loss": 0.123, "lr": 1e-4, "grad_norm": 1, "tokens_per_s": 9000, "peak_memory_bytes": 2**30}
    with folder.metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    record.update(folder, step=21)
    assert browser.script(
        ready.format(
            "document.querySelector('#loss, #plot-loss').getAttribute('aria-label').includes('0.123 at step 21')"
        )
    )
    assert set(browser.script(DRAWN)) >= {"loss", "speed"} and browser.complaints() == []
    assert browser.script("document.querySelectorAll('details[open]').length") == 1  # as the reader left it
    # The list, ordered by the reader: newest is first, and by name it is last.
    browser.open(server.address)
    browser.script("document.querySelector('.sortable th').click()")
    browser.script(ready.format("document.body.dataset.connected"))
    record.update(folder, step=22)
    cells = "[...document.querySelectorAll('[data-row=run]')].map(r => [r.children[0].textContent, r.children[2].textContent])"
    assert browser.script(ready.format(f"({cells}).flat().some(text => text.startsWith('22'))"))
    assert [name for name, _ in browser.script(cells)] == ["first", "now"]


def test_trials_of_a_sweep_are_runs_too(server: Server) -> None:
    made.write(server.runs.root / "tried" / "trials" / "003", made.planned(3e-4))
    cookie = f"trebuchet-{server.port}={server.token}"
    listed = ask(server, "/", Cookie=cookie).text  # type: ignore[attr-defined]
    assert 'href="/run/tried/003">tried/003</a>' in listed and 'href="/run/first">' in listed
    shown = ask(server, "/run/tried/003", Cookie=cookie)
    assert shown.status == 200 and "/run/tried%2F003/body" in shown.text  # type: ignore[attr-defined]
    assert ask(server, "/run/tried%2F003/body", Cookie=cookie).status == 200
    assert ask(server, "/run/tried/004", Cookie=cookie).status == 404
    for folder, name in (("tried", "tried/003"), ("first", "first")):  # `trebuchet ui` of one sweep or run
        assert list(Runs(server.runs.root / folder).all()) == [name]


def test_two_hundred_runs_are_read_once_and_then_only_where_they_change(tmp_path: Path) -> None:
    first = made.write(tmp_path / "run-000", made.planned(1e-4), steps=20)
    for i in range(1, 200):
        folder = RunFolder(shutil.copytree(first.root, tmp_path / f"run-{i:03}"))
        record.update(folder, run=folder.root.name)
    server = Server(tmp_path)
    try:
        assert len(server.runs.all()) == 200 and server.runs.reads == 200
        assert len(server.runs.all()) == 200 and server.runs.reads == 200
        record.update(RunFolder(tmp_path / "run-007"), step=21)
        runs = server.runs.all()
        assert server.runs.reads == 201
        assert page.index(runs, 20).count('data-row="run"') == 200
    finally:
        server.server_close()
