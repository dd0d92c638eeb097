"""What `bench` reports beside the speed: peak memory on a CPU too, every part's time, and both ways side by side."""

import math
import mmap
import multiprocessing
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bytejepa.benchmark import bench, generation, speed
from bytejepa.benchmark.against_plain import _plain_in_its_own_process, plain_config
from bytejepa.benchmark.generation import bench_generate
from bytejepa.benchmark.memory import peak_bytes, restart_peak
from bytejepa.cli import bench as verb
from bytejepa.config import RunConfig, replace
from bytejepa.errors import BytejepaError, ConfigError
from bytejepa.inference.chunks import ChunkInjector
from bytejepa.inference.engine import Engine
from bytejepa.inference.state import EngineState, JepaState
from bytejepa.model.attention import causal_attention
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM, Losses

CPU = torch.device("cpu")


def called_24_times(call: Callable[[], object], *_: Any, **__: Any) -> generation.Cost:
    """Stand in for `generation.cost_of`, with a number of calls that is known."""
    for _ in range(24):
        call()
    return generation.Cost(wall_s=1.0, cpu_s=1.0)


def _touched_pages(num_bytes: int) -> mmap.mmap:
    """Memory that goes back to the system when it is closed, whatever the allocator keeps (`training/allocator.py`)."""
    block = mmap.mmap(-1, num_bytes)
    for page in range(0, num_bytes, mmap.PAGESIZE):
        block[page] = 1
    return block


def test_the_peak_is_that_of_what_ran_since_it_was_restarted() -> None:
    block = _touched_pages(100_000_000)
    before = peak_bytes(CPU)
    assert before >= 100_000_000
    block.close()
    restart_peak(CPU)
    left = peak_bytes(CPU)
    assert left <= before - 90_000_000
    assert abs(left - psutil.Process().memory_info().rss) < 20_000_000
    _touched_pages(100_000_000).close()
    assert peak_bytes(CPU) >= left + 90_000_000


@pytest.mark.integration
def test_training_reports_speed_memory_and_parts_beside_the_plain_way(
    minimal_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench.bench_train(minimal_config, CPU, against_plain=True, parts=True, compile=False, steps=1)
    ours, plain = report["speeds"]
    for way in (ours, plain):
        assert way["last_loss_nats"] == pytest.approx(math.log(260), abs=0.5)
        assert way["peak_memory_bytes"] > 50_000_000
        assert 0 < way["utilization"] < 1
    parts = {"data", "forward", "backward", "optimizer", "average", "jepa losses", "attention"}
    assert ours["parts_ms"].keys() == parts
    verb._print(report)
    shown = capsys.readouterr().out
    assert shown.count(" GB") == 2
    assert all(part in shown for part in parts)


def test_attention_is_timed_by_the_models_own_kernel_and_masks(
    minimal_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, bool]] = []

    def noticed(q: Tensor, k: Tensor, v: Tensor, *, backend: str, mask: Tensor | None) -> Tensor:
        seen.append((backend, q.size(1), mask is not None))
        return causal_attention(q, k, v, backend=backend, mask=mask)

    monkeypatch.setattr(speed, "causal_attention", noticed)
    layers = minimal_config.model.num_layers
    windows = (8,) + (0,) * (layers - 1)
    config = replace(minimal_config, model={"attention_windows": windows}, data={"sequence_growth": None})
    step = speed.TrainingStep(config, CPU, compile=False)
    assert speed.attention_ms(step, steps=1) > 0
    step.loader.close()
    T = config.data.sequence_bytes
    assert set(seen) == {("blocked", T, True), ("blocked", T, False)}


def test_what_the_jepa_losses_cost_is_not_hidden_by_a_machine_that_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, taken = 0.0, 0

    def step(*, jepa_lambda: float) -> None:
        nonlocal now_s, taken
        taken += 1
        now_s += 0.2 + 0.004 * (jepa_lambda > 0) + 0.01 * taken  # every step 10 ms slower than the one before

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now_s)
    assert speed.jepa_losses_ms(step, CPU, pairs=12) == pytest.approx(4.0)


def test_every_matrix_that_a_byte_is_multiplied_with_is_counted(minimal_config: RunConfig) -> None:
    def counted(config: RunConfig) -> tuple[float, float]:
        model = initialize(ByteLM(config), 0)
        ids = torch.randint(4, 260, (1, 1024))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.losses(ids, ids)
        products = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
        return (products["aten.mm"] + products["aten.addmm"]) / 2 / ids.numel(), speed.matmul_parameters(config)

    base = replace(minimal_config, training={"attention": "math"})
    before, formula = counted(base)
    for options in (
        {"model": {"multi_token_heads": 2}},
        {"model": {"attention_gate_dims": 12}},
        {"model": {"ngram_orders": (3, 5), "ngram_rows": 64}},
        {"model": {"recurrent_layers": (0, 1)}},
        {"jepa": {"context": "causal"}},
        {"jepa": {"next_bytes_weight": 0.1}},
    ):
        more, by_formula = counted(replace(base, **options))
        assert more > before
        assert by_formula - formula == pytest.approx(more - before, rel=0.01), options
    fewer, by_formula = counted(replace(base, jepa={"inject": False}))
    assert fewer < before
    assert by_formula - formula == pytest.approx(fewer - before, rel=0.01)


def test_a_step_without_latent_losses_is_timed_without_them(
    minimal_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    losses = ByteLM.losses

    def noticed(model: ByteLM, inputs: Tensor, targets: Tensor, *, jepa: bool) -> Losses:
        asked.append(jepa)
        return losses(model, inputs, targets, jepa=jepa)

    monkeypatch.setattr(ByteLM, "losses", noticed)
    config = replace(minimal_config, jepa={"losses": False}, data={"sequence_growth": None})
    step = speed.TrainingStep(config, CPU, compile=False)
    step()
    assert "jepa losses" not in speed.measure_parts(step, steps=1)
    step.loader.close()
    assert asked
    assert not any(asked)


@pytest.mark.parametrize("name", ["eval", "prepare", "load"])
def test_the_other_measurements_report_what_they_are_asked_for(name: str, minimal_config: RunConfig) -> None:
    report: dict[str, Any]
    if name == "eval":
        report = bench.bench_eval(minimal_config, CPU, num_bytes=512, compile=False)
        ways = report["ways"]
        assert ways["sliding"]["bpb"] == pytest.approx(ways["sliding, nothing pruned"]["bpb"], abs=1e-6)
        assert all(way["peak_memory_bytes"] > 50_000_000 for way in ways.values())
        assert report["windows_over_one_pass"] == 29 / 8  # the first window prices 64 targets, the others 16
    elif name == "prepare":
        report = bench.bench_prepare(num_megabytes=1, workers=1)
        assert 1_000_000 <= report["source_bytes"] < 1_200_000  # the last document is whole
        assert 900_000 < report["text_bytes"] < report["source_bytes"]
        assert report["peak_memory_bytes"] > 50_000_000
    else:
        report = bench.bench_load(minimal_config, CPU, steps=2)
        assert 0 < report["make_ms"] < 1000
    assert report["threads"] == torch.get_num_threads()


@pytest.mark.integration
def test_the_memory_of_prepare_is_that_of_its_workers_too() -> None:
    alone, together = (bench.bench_prepare(num_megabytes=3, workers=workers) for workers in (1, 2))
    assert together["workers"] == 2
    assert together["peak_memory_bytes"] > alone["peak_memory_bytes"] + 30_000_000  # two interpreters with numpy


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("model", "depth_scaled_norm", False),
        ("model", "attention_gate_dims", 4),
        ("jepa", "inject", False),
        ("jepa", "losses", False),
        ("jepa", "sigreg_knots", 5),
        ("optimizer", "muon_row_normalization", True),
        ("optimizer", "muon_beta2", 0.95),
        ("optimizer", "muon_cautious_weight_decay", True),
        ("optimizer", "newton_schulz_coefficients", "polar_express"),
        ("optimizer", "newton_schulz_steps", 3),
    ],
)
def test_a_model_or_optimizer_that_is_not_the_plain_one_is_not_timed_against_it(
    section: str, setting: str, value: object, minimal_config: RunConfig
) -> None:
    plain_config(minimal_config)
    with pytest.raises(ConfigError, match=rf"arithmetic only, not {section}\.{setting}"):
        plain_config(replace(minimal_config, **{section: {setting: value}}))


@pytest.mark.integration
def test_a_plain_process_that_is_killed_is_an_error_and_no_broken_pipe(minimal_config: RunConfig) -> None:
    """The command line takes a broken pipe for the end of who reads it, and ends well."""
    with _plain_in_its_own_process(minimal_config) as step:
        step()
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(BytejepaError, match=r"plain baseline ended \(exit code -9\)"):
            step()


def test_stepping_is_timed_with_its_share_of_what_runs_once_a_chunk(
    minimal_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[range] = []
    run_pass, end_chunk = Engine._pass, ChunkInjector._end_chunk
    ended: list[int] = []

    def noticed(engine: Engine, places: range, state: EngineState, x: Tensor, *others: Any) -> Tensor:
        if x.size(1) == 1:
            ran.append(places)
        return run_pass(engine, places, state, x, *others)

    def noticed_end(injector: ChunkInjector, state: JepaState, last: Tensor) -> None:
        ended.append(last.size(0))
        end_chunk(injector, state, last)

    monkeypatch.setattr(Engine, "_pass", noticed)
    monkeypatch.setattr(ChunkInjector, "_end_chunk", noticed_end)
    monkeypatch.setattr(generation, "cost_of", called_24_times)
    options = {"num_layers": 4, "chunk_blocks": (1, 2), "chunk_stride_bytes": 3, "xsa_last_layers": 0}
    config = replace(minimal_config, model=options)
    bench_generate(config, CPU, lanes=(1,), contexts=(32,), runs=1, at_least_s=0.0)
    assert ran.count(config.model.chunk_places) == 24 / 3
    assert len(ended) == 24 / config.jepa.chunk_bytes


@pytest.mark.parametrize("context", [60, 64])
def test_stepping_in_a_full_window_is_timed_without_moving_it_at_every_byte(
    context: int, minimal_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions: list[int] = []
    step = Engine.step

    def noticed(engine: Engine, state: EngineState, ids: Tensor) -> Tensor:
        positions.append(state.position)
        assert engine.window == 64
        return step(engine, state, ids)

    monkeypatch.setattr(Engine, "step", noticed)
    monkeypatch.setattr(generation, "cost_of", called_24_times)
    bench_generate(minimal_config, CPU, lanes=(1,), contexts=(context,), runs=1, at_least_s=0.0)
    assert set(positions) == set(range(64 - minimal_config.jepa.chunk_bytes, 64))


def test_more_context_than_the_engine_has_is_refused(minimal_config: RunConfig) -> None:
    def timed(context: int) -> dict[str, Any]:
        return bench_generate(minimal_config, CPU, lanes=(1,), contexts=(context,), runs=1, at_least_s=0.0)

    assert timed(64)["generate"][0]["context"] == 64
    with pytest.raises(ConfigError, match="window of 64 ids, got 65"):
        timed(65)
