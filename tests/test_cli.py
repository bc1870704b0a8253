"""The command line's contract: exit codes, one line on stderr, JSON alone on stdout, no torch where none is needed."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from airtune import cli
from airtune.cli.arguments import split_overrides
from airtune.cli.progress import Display
from airtune.errors import InputError, MissingPackageError
from tiny_experiment import head_of, lines_of, write_experiment


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """Return the one line of stderr."""
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.strip()


Airtune = Callable[..., Done]


@pytest.fixture
def airtune(capfd: pytest.CaptureFixture[str]) -> Airtune:
    """Return a function that runs a command in this process."""

    def run(*argv: str | Path) -> Done:
        capfd.readouterr()
        code = cli.main([str(argument) for argument in argv])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def process(*argv: str | Path) -> list[str]:
    """Return the command line of a new process."""
    code = "import sys; from airtune.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *(str(argument) for argument in argv)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["run", str(file), "--out", str(folder)]) == 0
    return folder


# ------------------------------------------------------------------------------------------------------- what it writes


def test_run_writes_the_folder_of_the_contract(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"run.json", "rounds.jsonl", "timings.jsonl", "checkpoint", "adapter", "report.html"}
    assert head_of(finished)["status"] == "done"
    assert head_of(finished)["command"].startswith("airtune run ")


def test_stdout_holds_json_alone(file: Path, finished: Path, tmp_path: Path, airtune: Airtune) -> None:
    commands: dict[str, Sequence[str | Path]] = {
        "run": ("run", file, "--json", "--out", tmp_path / "run"),
        "resume": ("run", "--resume", tmp_path / "run", "--stop.rounds", "3", "--json"),
        "compare": ("compare", file, "--methods", "fedit,legend", "--json", "--out", tmp_path / "compare"),
        "plan": ("plan", file, "--json"),
        "plans": (
            "plan",
            file,
            "--json",
            "--methods",
            "fedit,legend",
            "--sweep",
            "wireless.uplink-bandwidth=1MHz,2MHz",
        ),
        "evaluate": ("evaluate", finished, "--json"),
        "methods": ("methods", "--json"),
        "fetch": ("fetch", "--list", "--json"),
    }
    for name, argv in commands.items():
        done = airtune(*argv)
        assert done.code == 0, (name, done.err)
        found = json.loads(done.out)
        assert found, name
        if name == "plans":
            assert [plan["method"] for plan in found] == ["fedit", "legend"] * 2
            assert [plan["sweep"][0]["value"] for plan in found] == ["1MHz", "1MHz", "2MHz", "2MHz"]


def test_without_json_run_and_compare_leave_stdout_empty(file: Path, tmp_path: Path, airtune: Airtune) -> None:
    done = airtune("run", file, "--out", tmp_path / "run")
    assert (done.code, done.out) == (0, "")
    assert "round 2/2" in done.err
    assert "accuracy" in done.err
    done = airtune("compare", file, "--methods", "fedit,slow", "--seeds", "0,1", "--out", tmp_path / "compare")
    assert (done.code, done.out) == (0, "")
    assert "Target" in done.err


def test_compare_writes_the_files_of_the_contract(file: Path, tmp_path: Path, airtune: Airtune) -> None:
    out = tmp_path / "out"
    tune = "training.learning_rate=1e-3,1e-2"
    done = airtune("compare", file, "--methods", "legend,fedit", "--target", "0.99", "--tune", tune, "--out", out)
    assert done.code == 0, "a missed target is no failure"
    found = json.loads((out / "compare.json").read_text())
    assert (found["schema"], found["metric"], found["direction"]) == (1, "accuracy", "max")
    assert (found["target"], found["target_source"]) == (0.99, "given")
    assert set(found["tuned"]) == {"legend", "fedit"}
    assert all(values["training.learning_rate"] in (1e-3, 1e-2) for values in found["tuned"].values())
    for run, method in zip(found["runs"], ("legend", "fedit"), strict=True):
        assert (run["method"], run["seed"], run["status"]) == (method, 0, "done")
        assert {"time_to_target_s", "uplink_bits_to_target", "downlink_bits_to_target", "energy_j_to_target"} <= set(
            run
        )
        assert (out / run["run_dir"] / "run.json").is_file()
    assert (out / "compare.csv").read_text().count("\n") == 3
    assert "<html" in (out / "report.html").read_text()[:400]


def test_compare_takes_the_files_method_and_variants_by_default(file: Path, tmp_path: Path, airtune: Airtune) -> None:
    assert airtune("compare", file, "--out", tmp_path / "out", "--stop.rounds", "1").code == 0
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir()) == ["fedit-0", "slow-0"]


def test_plan_writes_a_page(file: Path, tmp_path: Path, airtune: Airtune) -> None:
    done = airtune("plan", file, "--out", tmp_path / "out")
    assert done.code == 0
    assert "fedit" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "plan.html"}


def test_evaluate_measures_again(finished: Path, tmp_path: Path, airtune: Airtune) -> None:
    found = json.loads(airtune("evaluate", finished, "--json").out)
    assert found["accuracy"] == head_of(finished)["final"]["accuracy"]
    assert found["loss"] == pytest.approx(head_of(finished)["final"]["loss"])
    assert set(found["clients"]) == {"clients", "mean", "worst_10_percent"}
    assert found["clients"]["worst_10_percent"] <= found["clients"]["mean"] <= 1
    (tmp_path / "rows.jsonl").write_text('{"text": "a good film", "label": "positive"}\n')
    other = json.loads(airtune("evaluate", finished, "--data", tmp_path / "rows.jsonl", "--json").out)
    assert other["rows"] == 1
    done = airtune("evaluate", finished, "--data", tmp_path / "absent.csv")
    assert done.code == 2
    assert "--data" in done.line


def test_report_is_made_again_from_the_stored_files(finished: Path, tmp_path: Path, airtune: Airtune) -> None:
    assert airtune("report", finished, "--out", tmp_path).code == 0
    assert (tmp_path / "report.html").is_file()


def test_names_and_citations(airtune: Airtune) -> None:
    assert {"fedit", "hetlora", "legend"} <= {info["name"] for info in json.loads(airtune("methods", "--json").out)}
    assert airtune("cite", "legend").out.startswith("@")
    assert "minilm" in airtune("fetch", "--list").out
    assert airtune("--version").code == 0
    assert "compare" in airtune("--help").out


# -------------------------------------------------------------------------------------------------------- exit code 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ("COMMAND",)),
        (("rnu",), ("COMMAND", "'rnu' (did you mean 'run'?)", "compare")),
        (("run",), ("EXPERIMENT.toml", "--resume")),
        (("run", "absent.toml"), ("absent.toml", "no such file")),
        (("run", "FILE", "--methd", "fedit"), ("--methd", "--method")),
        (("run", "FILE", "extra"), ("extra",)),
        (("run", "FILE", "--method", "legned"), ("method", "'legend'")),
        (("run", "FILE", "--method.cohort-siz", "3"), ("method.cohort_siz", "'cohort_size'")),
        (("run", "FILE", "--method.cohort-size"), ("--method.cohort-size", "no value")),
        (("run", "FILE", "--method.cohort-size", "99", "--out", "OUT"), ("method.cohort_size", "99", "6")),
        (("run", "FILE", "--model.name", "bert-nope", "--out", "OUT"), ("model.name", "minilm")),
        (("run", "FILE", "--model.rank", "33", "--out", "OUT"), ("model.rank", "32")),
        (("run", "FILE", "--model.target-modules", "nothing", "--out", "OUT"), ("model.target_modules", "query")),
        (("run", "FILE", "--data.name", "roten-tomatoes", "--out", "OUT"), ("data.name", "'rotten-tomatoes'")),
        (("run", "FILE", "--data.partition", "random"), ("data.partition", "dirichlet")),
        (("run", "FILE", "--fleet.devices", '{"nokia-3310": 2}'), ("fleet.devices", "jetson-tx2")),
        (("run", "FILE", "--wireless.uplink-bandwidth", "0"), ("wireless.uplink_bandwidth", "positive")),
        (("run", "FILE", "--wireless.uplink-bandwidth=-5 MHz"), ("wireless.uplink_bandwidth", "positive")),
        (("run", "FILE", "--seed", "-1"), ("seed", "-1")),
        (("run", "FILE", "--out", "/proc/airtune"), ("--out", "/proc/airtune")),
        (("run", "FILE", "--out", "HERE"), ("--out", "not empty")),
        (("run", "--resume", "HERE"), ("not a run folder",)),
        (("run", "FILE", "--resume", "HERE"), ("--resume", "experiment")),
        (("run", "--resume", "HERE", "--training.learning-rate", "1"), ("--training.learning_rate", "--stop.FIELD")),
        (("run", "--resume", "HERE", "--method", "fedit"), ("--method",)),
        (("compare", "FILE", "--methods", "fedit,legned"), ("method", "'legend'")),
        (("compare", "FILE", "--seeds", "0,x"), ("--seeds", "0,x")),
        (("compare", "FILE", "--target", "high"), ("--target", "high")),
        (("compare", "FILE", "--tune", "rate=1,2"), ("--tune", "rate=1,2")),
        (("compare", "FILE", "--tune", "training.rate=1,2"), ("training.rate", "valid")),
        (("plan", "FILE", "--sweep", "wireless.uplink_bandwidth=1 MB"), ("wireless.uplink_bandwidth", "MHz")),
        (("plan", "FILE", "--method", "fedit", "--methods", "legend"), ("--methods",)),
        (("evaluate", "HERE"), ("not a run folder",)),
        (("evaluate", "HERE", "--data.name", "x"), ("--data.name",)),
        (("fetch",), ("NAME", "--list")),
        (("fetch", "minilmm"), ("minilmm", "'minilm'")),
        (("cite", "legned"), ("'legend'",)),
        (("report", "HERE/absent"), ("absent",)),
        (("cite", "FedITT"), ("did you mean 'fedit'",)),
        (("run", "FILE", "--training.learning-rate", "fast"), ("training.learning_rate", "valid: ")),
        (("run", "FILE", "--fleet.devices", "{ nokia-3310 = 2 }"), ("fleet.devices: unknown name 'nokia-3310'",)),
        (("report", "HERE", "--out", "/proc/airtune"), ("--out", "/proc/airtune")),
        (("run", "FILE", "--fleet.memory-share", "1e-9", "--out", "OUT"), ("GB",)),
        (("run", "FILE", "--variant.slow.cohort-size", "1"), ("variant.slow", "does not run")),
        (("plan", "FILE", "--variant.slow.cohort-size", "1"), ("variant.slow", "does not run")),
        (("run", "FILE", "--variant.nosuch.rank", "1"), ("variant", "'nosuch'", "slow")),
        (("compare", "FILE", "--methods", "fed-sb,fed_sb", "--out", "OUT"), ("--methods", "twice")),
        (("compare", "FILE", "--stop.rounds", "0", "--out", "OUT"), ("stop.rounds", "0")),
        (("compare", "FILE", "--seeds", "0,-1", "--out", "OUT"), ("seed", "-1")),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(
    file: Path, tmp_path: Path, airtune: Airtune, argv: Sequence[str], words: Sequence[str]
) -> None:
    places = {"FILE": str(file), "OUT": str(tmp_path / "out"), "HERE": str(file.parent)}
    done = airtune(*[places.get(item, item.replace("HERE", places["HERE"])) for item in argv])
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.line.startswith("airtune: ")
    assert all(word in done.line for word in words), done.line
    assert not (tmp_path / "out").exists()


SECTIONS = ("model", "data", "fleet", "wireless", "training", "stop", "evaluation", "method")
SLIPS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SECTIONS), SLIPS)
def test_any_key_that_is_not_there_is_exit_code_2_and_one_line(
    file: Path, airtune: Airtune, section: str, key: str
) -> None:
    done = airtune("plan", file, f"--{section}.x{key}z", "1")
    assert done.code == 2
    assert done.line.startswith(f"airtune: {section}.x{key}z: unknown key")
    assert "valid: " in done.line


def test_overrides_are_taken_apart() -> None:
    plain, overrides = split_overrides(["run", "--a.b-c", "-3", "x.toml", "--d.e=f=g", "--seed", "1"])
    assert plain == ["run", "x.toml", "--seed", "1"]
    assert overrides == {"a.b_c": "-3", "d.e": "f=g"}
    for argv in (["--a.b"], ["--a.b", "--out", "x"]):
        with pytest.raises(InputError, match=r"--a\.b: has no value"):
            split_overrides(argv)


# -------------------------------------------------------------------------------------------- exit codes 1, 3 and 130


def test_a_bug_is_exit_code_1_with_a_traceback(airtune: Airtune, monkeypatch: pytest.MonkeyPatch) -> None:
    from airtune.cli import catalogue

    def broken(_: object) -> int:
        raise RuntimeError("oops")

    monkeypatch.setattr(catalogue, "methods", broken)
    done = airtune("methods")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "oops" in done.err


def test_a_diverged_model_is_exit_code_3_and_keeps_the_artefacts(
    file: Path, tmp_path: Path, airtune: Airtune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airtune.experiment import build

    monkeypatch.setattr(build, "evaluate", lambda *_, **__: {"accuracy": 0.5, "loss": float("nan")})
    done = airtune("run", file, "--out", tmp_path / "run")
    assert done.code == 3
    assert "diverged" in done.err.splitlines()[-1]
    assert head_of(tmp_path / "run")["status"] == "failed"
    done = airtune("compare", file, "--methods", "fedit,legend", "--out", tmp_path / "compare")
    assert done.code == 3
    assert {path.name for path in (tmp_path / "compare" / "runs").iterdir()} == {"fedit-0", "legend-0"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_exit_code_130_and_says_how_to_go_on(file: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "a run"
    argv = process("run", file, "--out", out, "--stop.rounds", "2000")
    heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # a shell's background job ignores Ctrl-C
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    rounds = out / "rounds.jsonl"
    for _ in range(3000):
        if rounds.is_file() and rounds.read_bytes().count(b"\n") > 2:
            break
        time.sleep(0.05)
    running.send_signal(number)
    _, err = running.communicate(timeout=150)
    assert running.returncode == 130
    assert err.splitlines()[-1] == f"airtune: interrupted; to go on: airtune run --resume '{out}'"
    assert "Traceback" not in err
    head = head_of(out)
    assert head["status"] == "interrupted"
    last = lines_of(out)[-1]["round"]
    assert cli.main(["run", "--resume", str(out), "--stop.rounds", str(last + 1)]) == 0
    assert [line["round"] for line in lines_of(out)] == list(range(last + 2))


def test_an_interrupted_comparison_goes_on_and_is_that_of_no_interruption(
    file: Path, tmp_path: Path, airtune: Airtune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airtune.experiment import build

    honest = build.evaluate

    calls: list[int] = []

    def evaluate(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # two rounds and round 0 of the first run, then round 1 of the second
            raise KeyboardInterrupt
        return honest(*given, **named)

    monkeypatch.setattr(build, "evaluate", evaluate)
    out = tmp_path / "out"
    argv = ("compare", file, "--methods", "fedit,slow", "--seeds", "0,1", "--target", "0.4")
    done = airtune(*argv, "--out", out)
    assert done.code == 130
    assert done.err.splitlines()[-1] == f"airtune: interrupted; to go on: airtune compare --resume {out}"
    kept = (out / "runs" / "fedit-0" / "run.json").stat().st_mtime_ns
    assert airtune("compare", file, "--resume", out).line.startswith("airtune: --resume: takes no experiment")
    assert airtune("compare", "--resume", out, "--seeds", "0").line.startswith("airtune: --resume: takes no --seeds")
    assert airtune("compare", "--resume", out / "runs").line.startswith("airtune: --resume:")
    assert airtune("compare", "--resume", out).code == 0
    assert (out / "runs" / "fedit-0" / "run.json").stat().st_mtime_ns == kept, "a finished run is not touched"
    assert airtune(*argv, "--out", tmp_path / "whole").code == 0
    for run in (out / "runs").iterdir():
        assert (run / "rounds.jsonl").read_bytes() == (tmp_path / "whole/runs" / run.name / "rounds.jsonl").read_bytes()
    found, whole = (json.loads((folder / "compare.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert found == whole


def test_without_plotly_a_run_is_done_all_the_same(
    file: Path, tmp_path: Path, airtune: Airtune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airtune.report import html

    def absent() -> str:
        raise MissingPackageError("report: plotly is not installed; valid: pip install 'airtune[plots]'")

    monkeypatch.setattr(html, "plotly_script", absent)
    done = airtune("run", file, "--out", tmp_path / "run")
    assert done.code == 0
    assert "no page: report: plotly is not installed" in done.err
    assert head_of(tmp_path / "run")["status"] == "done"
    assert airtune("report", tmp_path / "run").code == 2


def test_a_disk_that_is_full_at_the_page_is_exit_code_3_and_keeps_the_run(
    file: Path, tmp_path: Path, airtune: Airtune, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.replace

    def full(source: str, target: Path) -> None:
        if Path(target).name == "report.html":
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(source, target)

    monkeypatch.setattr(os, "replace", full)
    done = airtune("run", file, "--out", tmp_path / "run")
    assert done.code == 3
    assert "report.html: the disk is full" in done.err.splitlines()[-1]
    assert head_of(tmp_path / "run")["status"] == "done"
    assert not [path for path in (tmp_path / "run").iterdir() if "report.html" in path.name]


@pytest.mark.parametrize(("rounds", "total", "done"), [(9, 9, 3), (None, 20.0, 4.5)])
def test_the_bar_of_a_resumed_run_counts_rounds_or_fleet_seconds(rounds: int | None, total: float, done: float) -> None:
    stop = SimpleNamespace(rounds=rounds, fleet_seconds=20.0)
    made: Any = SimpleNamespace(label="fedit", seed=0, stop=stop)
    bench: Any = SimpleNamespace(experiment=made, metric="accuracy", clients=[[1]])
    lines = [{"uplink_bits": 8, "time_s": 1.5 * number} for number in range(4)]
    store: Any = SimpleNamespace(folder="run", rounds=lambda: lines)
    display = Display(Console(force_terminal=True, file=io.StringIO()))
    display.started(bench, store, 3)
    assert display.bar is not None
    task = display.bar.tasks[0]
    display.close()
    assert (task.total, task.completed) == (total, done)


# ------------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    "argv",
    [
        ("--help",),
        ("run", "--help"),
        ("plan", "FILE"),
        ("plan", "FILE", "--methods", "fedit,hetlora,legend", "--json"),
        ("methods",),
        ("cite", "legend"),
        ("report", "RUN"),
        ("fetch", "--list"),
        ("device", "--help"),
        ("deploy", "--help"),
        ("run", "FILE", "--training.learning-rat", "1"),
    ],
)
def test_what_trains_nothing_imports_no_torch(file: Path, finished: Path, argv: Sequence[str]) -> None:
    places = {"FILE": str(file), "RUN": str(finished)}
    code = (
        "import sys; from airtune.cli import main; code = main(sys.argv[1:]);"
        "names = ('torch', 'transformers', 'peft', 'datasets', 'flwr_datasets');"
        "heavy = [name for name in names if name in sys.modules];"
        "print('HEAVY', heavy, file=sys.stderr); sys.exit(code)"
    )
    argv = [places.get(item, item) for item in argv]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if argv[-1] == "1" else 0), done.stderr
    assert done.stderr.splitlines()[-1] == "HEAVY []"
