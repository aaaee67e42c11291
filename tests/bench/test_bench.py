"""The benchmarks' core: who runs when, what counts, what is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from bench.__main__ import BENCHMARKS, main
from bench.measure import Comparison, Timing, compare
from bench.report import Machine, Report, this_machine

from bench import deploy, serve
from openmae.errors import RunError

ROOT = Path(__file__).parents[2]


class Clock:
    """Seconds that pass only where a contestant says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contestant(self, name: str, *seconds: float) -> Callable[[], None]:
        """Each call takes the next of ``seconds``; the last of them is repeated."""
        left = list(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_contestants_take_turns() -> None:
    clock = Clock()
    contestants = {name: clock.contestant(name, 1.0) for name in "AB"}
    compare(contestants, items=1, turns=3, warm_up=2, turn_seconds=0, clock=clock)
    assert "".join(clock.called) == "AABB" + "AABB" * 3, "warm-up, then turns of an untimed and a timed call"


def test_a_turn_has_as_many_calls_as_fill_its_time() -> None:
    clock = Clock()
    contestants = {"slow": clock.contestant("slow", 1.0), "fast": clock.contestant("fast", 0.25)}
    found = compare(contestants, items=1, turns=1, warm_up=1, turn_seconds=1.0, clock=clock)
    assert clock.called.count("slow") == 1 + 1 + 1
    assert clock.called.count("fast") == 1 + 1 + 4
    assert found.timings["fast"].seconds == (0.25,), "the time of one call, not of the turn"


def test_warm_up_and_the_first_call_of_a_turn_do_not_count() -> None:
    clock = Clock()
    call = clock.contestant("A", 50.0, 9.0, 70.0, 2.0, 80.0, 3.0)  # two to warm up, then (untimed, timed) twice
    found = compare({"A": call}, items=4, turns=2, warm_up=2, turn_seconds=0, clock=clock)
    assert found.timings["A"].seconds == (2.0, 3.0)


def test_rates_and_ratios_are_of_medians() -> None:
    timings = {"A": Timing((1.0, 4.0, 2.0), items=8), "B": Timing((0.5, 0.4, 9.0), items=8)}
    found = Comparison(timings, "A", threads=1, load=0.1)
    assert (timings["A"].rate, timings["A"].slowest, timings["A"].fastest) == (4.0, 2.0, 8.0)
    assert found.ratio("A") == 1.0
    assert found.ratio("B") == 4.0
    assert found.ratio("A", "B") == 0.25
    assert found.to_dict()["contestants"]["B"]["ratio"] == 4.0


def test_the_first_is_the_reference_and_the_threads_are_stated() -> None:
    clock = Clock()
    contestants = {"A": clock.contestant("A", 2.0), "B": clock.contestant("B", 1.0)}
    found = compare(contestants, items=1, turns=1, turn_seconds=0, clock=clock)
    assert (found.reference, found.ratio("B")) == ("A", 2.0)
    assert found.threads == torch.get_num_threads()


def test_a_report_is_json_and_a_markdown_table(tmp_path: Path) -> None:
    report = Report("Speed", ("model", "images/s"), [("a", "1.0"), ("longer", "12.5")], {"rate": 12.5}, ["By hand."])
    text = report.write(tmp_path / "made", "speed")
    values = json.loads((tmp_path / "made" / "speed.json").read_text())
    assert values["results"] == {"rate": 12.5}
    assert values["quick"] is False
    assert values["machine"]["cpu"] == this_machine().cpu
    assert values["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (tmp_path / "made" / "speed.md").read_text() == text
    lines = text.splitlines()
    assert lines[:6] == [
        "## Speed",
        "",
        "| model  | images/s |",
        "| ------ | -------- |",
        "| a      | 1.0      |",
        "| longer | 12.5     |",
    ]
    assert "- By hand." in lines
    assert f"{this_machine().cores} cores" in lines[-1]


def test_a_quick_run_replaces_no_measurement(tmp_path: Path) -> None:
    report = Report("Speed", ("model",), [("a",)], {})
    report.write(tmp_path, "speed")
    text = report.write(tmp_path, "speed", quick=True)
    assert "not how fast anything is" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "speed-quick.json",
        "speed-quick.md",
        "speed.json",
        "speed.md",
    ]


@pytest.mark.parametrize(("flags", "known"), [(("avx2",), False), (("avx2", "avx512_vnni"), True), (None, None)])
def test_int8_instructions_are_told_from_the_flags(flags: tuple[str, ...] | None, known: bool | None) -> None:
    assert Machine("a processor", 2, flags, "Linux", "3.11", {}).int8 is known


def comparison(fp32: float, int8: float) -> Comparison:
    """Return a comparison of ONNX Runtime's images/s with torch, which has 1.0."""
    rates = {deploy.TORCH: 1.0, deploy.FP32: fp32, deploy.INT8: int8}
    return Comparison({name: Timing((1 / rate,), 1) for name, rate in rates.items()}, deploy.TORCH, 1, None)


@pytest.mark.parametrize("vnni", [True, False, None])
def test_targets_are_judged(vnni: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {True: ("avx_vnni",), False: ("avx2",), None: None}[vnni]
    monkeypatch.setattr(deploy, "this_machine", lambda: Machine("a processor", 2, flags, "Linux", "3.11", {}))
    found = comparison(fp32=1.2, int8=1.7)
    vit = deploy.verdict("vit_base_patch16", deploy.FP32, found)
    convnext = deploy.verdict("convnextv2_tiny", deploy.FP32, found)
    int8 = deploy.verdict("hiera_tiny_224", deploy.INT8, found)
    assert vit is not None
    assert vit["met"], "1.2x torch, at least 1.1x wanted"
    assert convnext is not None
    assert not convnext["met"], "1.2x torch, at least 1.5x wanted"
    assert deploy.verdict("hiera_tiny_224", deploy.FP32, found) is None
    if vnni:
        assert int8 is not None
        assert int8["ratio"] == pytest.approx(1.7 / 1.2), "int8 is measured by fp32, not by torch"
        assert not int8["met"]
    else:
        assert int8 is None, "no target where the processor has no instructions for int8, or does not say"


@contextmanager
def answering(status: int) -> Iterator[ThreadingHTTPServer]:
    """A server that answers each request with ``status``, and counts requests and connections."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def do_POST(self) -> None:
            server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"said")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.connections, server.bodies = 0, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_clients_keep_their_connection_and_their_warm_up_does_not_count() -> None:
    with answering(200) as server:
        found = serve.ask(server.server_address[1], b"picture", clients=3, requests=4)
    assert len(found.milliseconds) == 3 * 4
    assert len(server.bodies) == 3 * (4 + serve._WARM_UP)
    assert set(server.bodies) == {b"picture"}
    assert server.connections == 3
    assert found.rate == pytest.approx(12 / found.wall)
    assert 0 < found.percentile(50) <= found.percentile(99) <= 1000 * found.wall


def test_an_answer_without_predictions_is_an_error() -> None:
    with answering(503) as server, pytest.raises(RunError, match="mae serve answered 503: said"):
        serve.ask(server.server_address[1], b"picture", clients=2, requests=1)


def test_a_server_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"mae serve did not start: (?s:.)*missing\.onnx"),
        serve.serving(tmp_path / "missing.onnx"),
    ):
        pytest.fail("there was no model to serve")


def test_the_uploaded_picture_is_a_photograph() -> None:
    assert serve.photograph()[:2] == b"\xff\xd8"
    assert 20_000 < len(serve.photograph()) < 150_000, "neither flat nor noise"


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])


@pytest.mark.slow(reason="exports two models, half a minute")
def test_deploy_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "deploy", "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results/bench/deploy-quick.json").read_text()
    races = json.loads(text)["results"]
    assert [(race["arch"], race["batch"]) for race in races] == [
        (arch, batch) for arch in deploy.QUICK_ARCHES for batch in deploy.BATCHES
    ]
    for race in races:
        rates = {name: found["per_second"] for name, found in race["contestants"].items()}
        assert list(rates) == [deploy.TORCH, deploy.FP32, deploy.INT8]
        assert all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in rates.values())
    assert "| convnextv2_atto" in done.stdout
    for place in (str(tmp_path), str(ROOT), sys.prefix):
        assert place not in text + done.stdout, "a path of this machine was written"
