"""Reports: the page, the numbers beside it, and that what is dead is called so."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bytejepa.artifact.export import export
from bytejepa.artifact.load import load
from bytejepa.config import RunConfig, replace
from bytejepa.data.loader import IdStream
from bytejepa.presets import PRESETS, pr832, preset
from bytejepa.report import ReportResult, report
from bytejepa.report.configuration import settings_against_preset, train_words
from bytejepa.report.drawing import draw_plots
from bytejepa.report.loss_plots import loss_plots
from bytejepa.report.measure import flow_of_weights, measure
from bytejepa.report.model_plots import gradient_plot
from bytejepa.training.runlog import RunFolder
from bytejepa.training.runs import train
from report.studies import study_of

SCORED = 4000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")


@pytest.fixture(scope="module")
def second_run(tmp_path_factory: pytest.TempPathFactory, embedded_shards: Path, minimal_config: RunConfig) -> Path:
    """The minimal run with another seed."""
    run = tmp_path_factory.mktemp("second") / "second"
    train(replace(minimal_config, training={"seed": 7}), embedded_shards, run)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, minimal_run: Path, second_run: Path) -> ReportResult:
    """A report of two seeds."""
    out = tmp_path_factory.mktemp("report") / "two.html"
    return report([minimal_run, second_run], out, score_bytes=SCORED)


def read_csv(made: ReportResult, name: str) -> list[dict[str, str]]:
    path = made.page.with_name(f"{made.page.stem}_files") / f"{name}.csv"
    return list(csv.DictReader(path.read_text().splitlines()))


class Outline(HTMLParser):
    """Ids, links and texts of a page; tags have to close in order."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.links += [named["href"] or ""] if "href" in named else []
        assert not {"src", "srcset", "onload", "onclick"} & set(named)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_needs_no_network(made: ReportResult) -> None:
    text = made.page.read_text()
    page = Outline(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (made.page.parent / link).is_file(), link
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", text)
    referred = set(re.findall(r"url\(#([^)]+)\)", text))
    assert referred <= set(page.ids)
    whole = " ".join(page.texts)
    assert "2 runs, seeds 1337, 7" in whole
    for plot in ("learning_curves", "loss_by_position", "loss_by_byte_class", "weights",
                 "gradient_flow", "size_budget", "latents", "throughput"):  # fmt: skip
        assert plot in page.ids, plot
        assert {f"{plot}.png", f"{plot}.csv"} <= {path.name for path in made.files}
    assert "No loss by document length" in whole  # the first document is longer than what was priced
    for path in made.files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_scores_are_those_of_export(made: ReportResult, minimal_run: Path, tmp_path: Path) -> None:
    exported = export(minimal_run, tmp_path / "m.bjm", score_bytes=SCORED)
    measured = next(iter(made.measured.values()))[0]
    assert measured.step == 6
    for stage, score in exported.scores.items():
        assert measured.scores[stage].bpb == pytest.approx(score.bpb, rel=1e-12)
    assert (measured.weights_bytes, measured.code_bytes) == (exported.weights_bytes, exported.code_bytes)
    mean = np.mean([m.scores["artifact"].bpb for m in next(iter(made.measured.values()))])
    assert f">{mean:.4f}</dd>" in made.page.read_text()


def test_learning_curves_are_the_log(made: ReportResult, minimal_run: Path, second_run: Path) -> None:
    rows = read_csv(made, "learning_curves")
    for run, seed in ((minimal_run, 1337), (second_run, 7)):
        for key in ("train_bpb", "val_bpb", "val_bpb_average"):
            logged = [(line["step"], line[key]) for line in RunFolder(run).read_metrics() if key in line]
            told = [(int(r["step"]), float(r["value"])) for r in rows if r["curve"] == key and int(r["seed"]) == seed]
            assert told == logged
    rates = [float(row["bytes_per_s"]) for row in read_csv(made, "throughput") if row["seed"] == "7"]
    starts = [float(line) for line in (second_run / "clock.log").read_text().split()]
    assert rates == pytest.approx(256 / np.diff(starts))


def test_losses_are_those_of_a_plain_forward_pass(
    made: ReportResult, minimal_run: Path, second_run: Path, embedded_shards: Path, tmp_path: Path
) -> None:
    """Bits by position and by class, mean of both seeds, computed again from the logits."""
    ids = IdStream.open(embedded_shards, "val").read(0, SCORED)
    whole = (SCORED - 1) // 64
    bits = []
    for run in (minimal_run, second_run):
        export(run, tmp_path / f"{run.name}.bjm", score=False)
        model = load(tmp_path / f"{run.name}.bjm")
        block = torch.from_numpy(ids[: whole * 64 + 1].astype(np.int64))
        with torch.no_grad():
            logits = model.logits(block[:-1].view(whole, 64))
        nats = F.cross_entropy(logits.flatten(0, 1).double(), block[1:], reduction="none")
        bits.append((nats / np.log(2)).numpy().reshape(whole, 64))
    mean = np.mean(bits, axis=0)
    positions = read_csv(made, "loss_by_position")
    assert int(positions[-1]["last_position"]) == 63
    for row in positions:
        expected = mean[:, int(row["first_position"]) : int(row["last_position"]) + 1].mean()
        assert float(row["bits_per_target"]) == pytest.approx(expected, rel=1e-5)
        assert float(row["low"]) < expected < float(row["high"])
    classes = {row["byte_class"]: row for row in read_csv(made, "loss_by_byte_class")}
    assert sum(int(row["count"]) for row in classes.values()) == SCORED - 1
    assert sum(float(row["share_of_bits"]) for row in classes.values()) == pytest.approx(1)
    spaces = ids[1:] == ord(" ") + 4
    assert int(classes["space"]["count"]) == spaces.sum()
    in_windows = spaces[: whole * 64].reshape(whole, 64)
    # the last, shorter window is priced too, so that the class's mean is near that of the whole windows, not equal
    assert float(classes["space"]["bits_per_target"]) == pytest.approx(mean[in_windows].mean(), rel=0.02)


def test_documents_are_in_the_csv_with_their_price(made: ReportResult) -> None:
    measured = next(iter(made.measured.values()))[0]
    ids = measured.priced.ids.copy()
    ids[1000] = ids[3000] = 1  # three documents, the last cut off
    priced = dataclasses.replace(measured.priced, ids=ids)
    plot = loss_plots({"m": [dataclasses.replace(measured, priced=priced)]})[2]
    rows = [row for row in plot.table.rows if row[1] == "document"]
    assert [row[2] for row in rows] == [999, 1999]
    assert [row[5] for row in rows] == pytest.approx([priced.bits[:999].mean(), priced.bits[1000:2999].mean()])
    assert "one of 2 documents" in plot.caption


def test_quantisation_error_and_sizes_are_those_of_the_artifact(
    made: ReportResult, minimal_run: Path, tmp_path: Path
) -> None:
    export(minimal_run, tmp_path / "m.bjm", score=False)
    stored, average = load(tmp_path / "m.bjm").state_dict(), load(minimal_run).state_dict()
    rows = {row["tensor"]: row for row in read_csv(made, "weights")}
    name = "token_embedding.weight"
    error = (stored[name] - average[name]).square().mean().sqrt() / average[name].square().mean().sqrt()
    assert error > 0
    assert float(rows[name]["relative_error"]) == pytest.approx(float(error), rel=1e-5)
    parts = {row["part"]: int(row["num_bytes"]) for row in read_csv(made, "size_budget")}
    assert sum(parts.values()) - parts["code"] == (tmp_path / "m.bjm").stat().st_size
    assert all(size > 0 for size in parts.values())


def test_a_dead_module_is_marked(
    made: ReportResult, tmp_path: Path, embedded_shards: Path, minimal_config: RunConfig
) -> None:
    """The reference's bigram table and its projection start at zero together and never learn."""
    small = {
        section: dataclasses.asdict(getattr(minimal_config, section)) for section in ("model", "training", "schedule")
    }
    small["model"] |= {"bigram_projection_init": "zero", "output_projection_init": "zero"}
    jepa = {"latent_dim": 16, "hidden_dim": 16, "sigreg_directions": 8, "sigreg_group_sequences": 2}
    config = replace(pr832(), **small, jepa=jepa)
    config = replace(
        config, data={"sequence_bytes": 64, "batch_bytes": 512}, evaluation={"window_bytes": 64, "stride_bytes": 16}
    )
    train(config, embedded_shards, tmp_path / "reference")
    plot = gradient_plot(measure(tmp_path / "reference", score_bytes=1000), name="gradients", about="")
    flows = {row[0]: row[3] for row in plot.table.rows}
    assert [module for module, flow in flows.items() if flow != "alive"] == ["bigram"]
    assert flows["bigram"] == "dead"
    assert "Dead: bigram." in plot.caption
    for svg in next(draw_plots([plot])).svgs.values():
        red = re.findall(r"<text[^>]*var\(--dead\)[^>]*>([^<]*)</text>", svg)
        assert sorted(red) == ["bigram", "✕ dead: no gradient, never moved"]
    assert "No module is dead." in made.page.read_text()
    assert "✕" not in made.page.read_text()


def test_weights_that_only_decay_have_not_moved() -> None:
    start, none = torch.randn(8, 8), torch.zeros(8, 8)
    assert flow_of_weights(none, 0.7 * start, start) == "dead"
    assert flow_of_weights(none, none, none) == "dead"
    assert flow_of_weights(none, start + 0.01 * torch.randn(8, 8), start) == "no gradient"
    assert flow_of_weights(torch.full((8, 8), 1e-30), start, start) == "alive"


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_that_repeats_a_run_gives_its_configuration(name: str) -> None:
    from bytejepa.cli.parsing import parse
    from bytejepa.cli.train import Train

    changed = replace(
        preset(name),
        model={"attention_windows": (512,), "skip_connections": False, "smear": name != "tiny"},
        data={"sequence_growth": ((0.25, 512), (0.5, 1024))},
        schedule={"steps": 77, "max_wallclock_s": None},
        training={"seed": 5, "swa_start": 0.5, "ema_decay": None},
        artifact={"codecs": ("brotli",), "scales": "per_row"},
    )
    for config in (preset(name), changed):
        assert parse(Train, "train", train_words(config)).config == config
    assert settings_against_preset(preset(name))[0] == name


def test_a_study_shows_its_differences(tmp_path: Path, minimal_run: Path, second_run: Path) -> None:
    runs = {"base": [minimal_run, second_run], "other": [second_run, minimal_run]}
    folder = study_of(tmp_path / "study", runs, {"base": [2.0, 2.1], "other": [1.98, 2.06]})
    made = report([folder], tmp_path / "s.html", which="none")
    page = Outline(made.page.read_text())
    assert page.open == []
    whole = " ".join(page.texts)
    assert "Which <seed> is better?" in whole
    assert "One & only note." in whole
    assert "-0.0300" in whole
    assert "-0.0500 to -0.0100" in whole
    assert "means of what the log has of the last tenth of the run, its last line at least" in whole
    rows = read_csv(made, "ablation")
    assert [(row["variant"], row["verdict"]) for row in rows] == [("base", ""), ("other", "better")]
    marks = re.findall(r"<text[^>]*var\(--series-2\)[^>]*>([^<]*)<", made.page.read_text())
    assert "-0.0300 better" in [mark.replace("−", "-") for mark in marks]
    assert {"learning_compared", "learning_curves", "learning_curves_2", "ablation"} <= set(page.ids)


def test_what_is_shorter_than_a_window_has_no_position_plot(minimal_run: Path, tmp_path: Path) -> None:
    made = report([minimal_run], tmp_path / "short.html", score_bytes=30)
    page = Outline(made.page.read_text())
    assert "loss_by_position" not in page.ids
    assert "loss_by_byte_class" in page.ids
    assert "No loss by position: 29 targets are less than a window." in " ".join(page.texts)


def test_a_folder_whose_name_is_not_utf8(minimal_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(minimal_run, tmp_path / "r\udcff")
    made = report([run], tmp_path / "page.html", which="none")
    assert b"r\xff" in made.page.read_bytes()


def test_bad_input_gets_one_line(
    refuses: Callable[..., str], tmp_path: Path, minimal_run: Path, made: ReportResult
) -> None:
    out = tmp_path / "r.html"
    assert "is no folder" in refuses(4, "report", tmp_path / "nowhere", "-o", out)
    assert "is not a run folder" in refuses(4, "report", tmp_path, "-o", out)
    (tmp_path / "killed" / "runs").mkdir(parents=True)
    (tmp_path / "killed" / "plan.json").touch()
    assert "no run of the study has finished yet" in refuses(4, "report", tmp_path / "killed", "-o", out)
    assert "--force" in refuses(2, "report", minimal_run, "-o", made.page)
    assert ".html" in refuses(2, "report", minimal_run, "-o", tmp_path / "r.pdf")
    assert "make its folder first" in refuses(3, "report", minimal_run, "-o", tmp_path / "none" / "r.html")
    moved = tmp_path / "moved"
    shutil.copytree(minimal_run, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps({**manifest, "data": {"path": str(tmp_path / "gone")}}))
    assert "--data" in refuses(3, "report", moved, "-o", out)
    (moved / "metrics.jsonl").write_text("{\n")
    assert "damaged" in refuses(4, "report", moved, "-o", out)
    (moved / "metrics.jsonl").write_text("")
    assert "nothing yet" in refuses(4, "report", moved, "-o", out)
    assert list(tmp_path.glob("*r*.html*")) == []


def test_the_command_replaces_a_page_only_when_told(
    command: Callable[..., object], tmp_path: Path, minimal_run: Path
) -> None:
    out = tmp_path / "r.html"
    folder = tmp_path / "r_files"
    folder.mkdir()
    (folder / "weights_12.png").write_bytes(b"")
    outcome = command("report", minimal_run, "-o", out, "--measure", "none", "--force", "--json")
    record = json.loads(outcome.out)  # type: ignore[attr-defined]
    assert record["page"] == str(out)
    assert sorted(map(str, folder.iterdir())) == sorted(record["files"])
    assert "Nothing was measured beyond the log." in out.read_text()


@pytest.mark.parametrize("foreign", ["thesis.tex", "figures", "holiday.png", "measurements.csv"])
def test_a_folder_that_no_report_left_is_not_replaced(
    refuses: Callable[..., str], tmp_path: Path, minimal_run: Path, foreign: str
) -> None:
    kept = tmp_path / "r_files" / foreign
    kept.parent.mkdir()
    if "." in foreign:
        kept.write_text("mine")
    else:
        kept.mkdir()
    said = refuses(2, "report", minimal_run, "-o", tmp_path / "r.html", "--force")
    assert f"r_files is not of a report: it holds {foreign} (give the page another name)" in said
    assert kept.exists()


def test_a_page_that_appears_meanwhile_is_kept(
    refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minimal_run: Path
) -> None:
    module = importlib.import_module("bytejepa.report.report")  # the package's attribute is the function
    out, render = tmp_path / "r.html", module.render_page

    def somebody_else_writes(*arguments: object, **options: Any) -> str:
        out.write_text("theirs")
        return render(*arguments, **options)

    monkeypatch.setattr(module, "render_page", somebody_else_writes)
    assert "r.html exists" in refuses(2, "report", minimal_run, "-o", out, "--measure", "none")
    assert out.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


PROBE = """<script>
addEventListener("load", () => {
  const seen = (name) => [...document.querySelectorAll("svg." + name)].filter((e) => e.getBoundingClientRect().height > 40).length;
  const root = document.documentElement;
  parent.postMessage(JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, width: innerWidth, wide: seen("wide"), narrow: seen("narrow"),
    outside: [...document.querySelectorAll("svg text")].filter((e) => {
      const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
      return s.width && (t.left < s.left - 2 || t.right > s.right + 2 || t.top < s.top - 2 || t.bottom > s.bottom + 2);
    }).map((e) => e.textContent),
  }), "*");
});
</script></body>"""
FRAME = """<!doctype html><script>onmessage = (event) => { document.documentElement.dataset.probe = event.data; };</script>
<iframe src="probed.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe>"""
"""A window is never narrower than 500 pixels, a frame in it can be."""


@pytest.mark.integration
@needs_chromium
@pytest.mark.parametrize(("width", "shown"), [(1300, "wide"), (400, "narrow")])
def test_a_browser_shows_every_plot_within_the_screen(
    made: ReportResult, tmp_path: Path, width: int, shown: str
) -> None:
    assert CHROMIUM is not None
    page = made.page.read_text().replace(
        "style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    (tmp_path / "probed.html").write_text(page.replace("</body>", PROBE))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--enable-logging=stderr",
    ]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=5000"]
    run = subprocess.run(
        [CHROMIUM, *options, (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "CONSOLE" not in run.stderr, run.stderr
    found = re.search(r'data-probe="([^"]*)"', run.stdout)
    assert found is not None
    probe = json.loads(found[1].replace("&quot;", '"'))
    assert probe["width"] == width
    assert probe["overflow"] <= 0
    assert probe["outside"] == []
    counts = {"wide": probe["wide"], "narrow": probe["narrow"]}
    assert counts.pop(shown) == len(made.files) // 2
    assert list(counts.values()) == [0]
