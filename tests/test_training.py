"""Training: what stops it, what leaves no trace, and that each option of the recipe takes effect."""

import json
import shutil
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bytejepa.bits import bits_from_nats
from bytejepa.config import RunConfig, replace
from bytejepa.errors import CheckpointError, ConfigError, DataError
from bytejepa.model.initialization import initialize
from bytejepa.model.transformer import ByteLM
from bytejepa.training import checkpoint
from bytejepa.training.clock import Clock
from bytejepa.training.distributed import Ranks
from bytejepa.training.gradient_step import GradientStep
from bytejepa.training.runlog import METRICS, RunFolder
from bytejepa.training.runs import resume, train
from bytejepa.training.trainer import Trainer
from small_models import same_tensors


def weights(run, part="model"):
    folder = RunFolder(run).checkpoints_path
    return checkpoint.read(folder, checkpoint.steps_on_disk(folder)[0]).part(part)


def quiet(config: RunConfig, **sections) -> RunConfig:
    sections["training"] = {"validate_every_steps": None, "validation_bytes": 200, **sections.get("training", {})}
    return replace(config, **sections)


def test_it_learns(minimal_config, embedded_shards, tmp_path) -> None:
    config = quiet(minimal_config, schedule={"steps": 40}, training={"log_every_steps": 1})
    result = train(config, embedded_shards, tmp_path / "run")
    losses = [line["train_bpb"] for line in RunFolder(tmp_path / "run").read_metrics() if "train_bpb" in line]
    assert losses[0] == pytest.approx(8.0, abs=0.1)
    assert sum(losses[-5:]) / 5 < 5.5
    assert result.steps == 40
    assert result.num_bytes == 40 * config.data.batch_bytes


def test_the_log_declares_every_key_and_the_folder_says_where_it_ran(minimal_run) -> None:
    folder = RunFolder(minimal_run)
    assert folder.read_metrics()
    for line in folder.read_metrics():
        assert set(line) <= set(METRICS)
        if "train_bpb" in line:
            assert line["train_bpb"] == pytest.approx(bits_from_nats(line["train_loss_nats"]))
    manifest = json.loads(folder.manifest_path.read_text())
    assert {"fingerprint", "versions", "platform", "data", "attention", "git_commit"} <= set(manifest)


@pytest.mark.parametrize(("asked", "kernel"), [("auto", "blocked"), ("flash", "flash")])
def test_the_manifest_names_the_kernel_that_attention_takes(
    asked, kernel, minimal_config, embedded_shards, tmp_path
) -> None:
    config = quiet(
        minimal_config, model={"document_masking": True}, schedule={"steps": 1}, training={"attention": asked}
    )
    train(config, embedded_shards, tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_manifest()["attention"] == kernel


def test_the_manifest_says_where_a_run_went_on(minimal_config, embedded_shards, tmp_path) -> None:
    train(quiet(minimal_config), embedded_shards, tmp_path / "run")
    resume(tmp_path / "run")
    (again,) = RunFolder(tmp_path / "run").read_manifest()["resumed"]
    assert again["after_step"] == 6
    assert (again["device"], again["world_size"], again["attention"]) == ("cpu", 1, "blocked")


def test_a_kernel_that_cannot_be_is_refused_before_there_is_a_run(minimal_config, embedded_shards, tmp_path) -> None:
    config = quiet(minimal_config, training={"attention": "cudnn"})
    with pytest.raises(ConfigError, match=r"attention cudnn is impossible on cpu: needs a CUDA device"):
        train(config, embedded_shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"steps": 5, "max_bytes": 10**9}, 5),
        ({"steps": None, "max_bytes": 3 * 256}, 3),
        ({"steps": 100, "max_bytes": 700}, 3),
    ],
)
def test_it_stops_at_whichever_bound_comes_first(schedule, steps, minimal_config, embedded_shards, tmp_path) -> None:
    result = train(quiet(minimal_config, schedule=schedule), embedded_shards, tmp_path / "run")
    assert result.steps == steps


def test_a_wallclock_cap_ends_the_run_with_the_learning_rate_near_zero(
    minimal_config, embedded_shards, tmp_path
) -> None:
    config = quiet(minimal_config, schedule={"steps": None, "max_wallclock_s": 1.0}, training={"log_every_steps": 1})
    result = train(config, embedded_shards, tmp_path / "run")
    last = [line for line in RunFolder(tmp_path / "run").read_metrics() if "learning_rate_scale" in line][-1]
    assert 1.0 <= result.elapsed_s < 3.0
    assert last["learning_rate_scale"] == pytest.approx((1 - last["progress"]) / config.schedule.warmdown_fraction)
    assert last["learning_rate_scale"] < 0.3


def test_warmup_steps_leave_no_trace(minimal_config, embedded_shards, tmp_path) -> None:
    for name, steps in (("cold", 0), ("warm", 3)):
        train(quiet(minimal_config, training={"warmup_steps": steps}), embedded_shards, tmp_path / name)
    for part in ("model", "average", "optimizer"):
        assert same_tensors(weights(tmp_path / "cold", part), weights(tmp_path / "warm", part))
    cold, warm = (RunFolder(tmp_path / name).read_metrics() for name in ("cold", "warm"))
    assert [line.get("train_loss_nats") for line in cold] == [line.get("train_loss_nats") for line in warm]


def test_every_kind_of_step_is_warmed_up_and_no_other(minimal_config, embedded_shards) -> None:
    config = quiet(
        minimal_config,
        data={"sequence_growth": ((0.0, 16), (0.001, 32), (0.5, 64))},
        jepa={"lambda_zero_until": 0.25, "lambda_ramp_until": 0.75, "lambda_after": "zero"},
        training={"qat_start": 0.9995, "warmup_steps": 1},
    )
    trainer = Trainer(config, embedded_shards, Ranks(), validate=False)
    lengths = {0: 16, 1: 32, 2: 64}
    kinds = [(lengths[kind.stage], kind.latent_losses, kind.quantized) for kind in trainer.step_kinds()]
    later = [(32, False, False), (32, True, False), (64, True, False), (64, False, False), (64, False, True)]
    assert kinds == [(16, False, False), *later]
    taken: list[tuple[int, bool, bool]] = []
    step = trainer.gradient_step

    def noted(inputs: torch.Tensor, targets: torch.Tensor, **how: object) -> object:
        taken.append((inputs.size(1), bool(how["latent_losses"]), bool(how["quantized"])))
        return step(inputs, targets, **how)

    trainer.gradient_step = noted
    trainer.warm_up()
    assert config.training.warmup_steps < len(kinds)
    assert taken == kinds
    trainer.close()


def test_seeds_differ_and_repeat(minimal_config, embedded_shards, tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(quiet(minimal_config, training={"seed": seed}), embedded_shards, tmp_path / name)
    assert same_tensors(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same_tensors(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_micro_batches_give_the_gradient_of_the_whole(minimal_config) -> None:
    config = replace(minimal_config, jepa={"sigreg_group_sequences": 1})
    ids = torch.randint(4, 260, (4, 65), generator=torch.Generator().manual_seed(0))
    gradients = []
    for micro in (None, 64, 128):
        chosen = replace(config, data={"micro_batch_bytes": micro})
        model = initialize(ByteLM(chosen), 3)
        losses = GradientStep(model, chosen, compile=False)(ids[:, :-1], ids[:, 1:], jepa_lambda=0.1)
        gradients.append([losses.ce, losses.sigreg, *(p.grad for p in model.parameters())])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rows", [20, 40])
def test_no_share_of_a_batch_divides_the_samples_of_sigreg(minimal_config, rows: int) -> None:
    """20 rows, a rank's half of 40, are no multiple of a micro-batch of 8 and one of a micro-batch of 5."""
    config = replace(minimal_config, jepa={"sigreg_group_sequences": 4}, data={"batch_bytes": 40 * 64})
    ids = torch.randint(4, 260, (rows, 65), generator=torch.Generator().manual_seed(0))
    found = []
    for micro in (None, 8 * 64):
        chosen = replace(config, data={"micro_batch_bytes": micro})
        step = GradientStep(initialize(ByteLM(chosen), 3), chosen, compile=False)
        found.append(step(ids[:, :-1], ids[:, 1:], jepa_lambda=0.1).sigreg)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_micro_batch_is_never_larger_than_asked_for(minimal_config) -> None:
    config = replace(minimal_config, jepa={"enabled": False, "sigreg_group_sequences": 4})
    chosen = replace(config, data={"micro_batch_bytes": 2 * 64})
    assert GradientStep(ByteLM(chosen), chosen, compile=False)._rows_of_part(8, 2) == 2


def test_sequences_grow_during_the_run(minimal_config, embedded_shards, tmp_path) -> None:
    config = quiet(
        minimal_config, data={"sequence_bytes": 32, "sequence_growth": ((0.5, 64),)}, training={"log_every_steps": 1}
    )
    train(config, embedded_shards, tmp_path / "run")
    lines = [line for line in RunFolder(tmp_path / "run").read_metrics() if "sequence_bytes" in line]
    assert [line["sequence_bytes"] for line in lines] == [32, 32, 32, 64, 64, 64]


def test_a_loss_that_is_not_finite_stops_and_names_step_and_checkpoint(
    minimal_config, embedded_shards, tmp_path
) -> None:
    config = quiet(
        minimal_config,
        optimizer={"scalar_lr": 1e38, "embedding_lr": 1e38, "gradient_clip": None},
        training={"checkpoint_every_s": 0.0},
    )
    with pytest.raises(CheckpointError, match=r"step \d+: the loss is .* training stopped, .*checkpoint"):
        train(config, embedded_shards, tmp_path / "run")
    for step in checkpoint.steps_on_disk(RunFolder(tmp_path / "run").checkpoints_path):
        saved = checkpoint.read(RunFolder(tmp_path / "run").checkpoints_path, step)
        assert saved.position.step == step


def test_an_existing_run_is_refused_and_replaced_only_by_force(minimal_config, embedded_shards, tmp_path) -> None:
    config = quiet(minimal_config, schedule={"steps": 2})
    train(config, embedded_shards, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"holds a run already .*--resume .*--force"):
        train(config, embedded_shards, tmp_path / "run")
    train(config, embedded_shards, tmp_path / "run", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_refused_even_by_force(minimal_config, embedded_shards, tmp_path, force) -> None:
    """Above all a folder of shards: a run has a manifest.json too."""
    (tmp_path / "manifest.json").write_text("precious")
    config = quiet(minimal_config, schedule={"steps": 2})
    with pytest.raises(CheckpointError, match=r"is not empty and holds no run: manifest.json \(name an empty or a new"):
        train(config, embedded_shards, tmp_path, force=force)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir() if path.name != ".lock"] == [
        ("manifest.json", "precious")
    ]


def test_only_a_validation_split_that_is_missing_altogether_is_done_without(
    minimal_config, embedded_shards, tmp_path
) -> None:
    """And only where none is asked for on the way: of a damaged one the run's last score would silently be none."""
    data = shutil.copytree(embedded_shards, tmp_path / "data")
    (shard,) = data.glob("fineweb_val_*.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    config = quiet(minimal_config, schedule={"steps": 2}, training={"validate_every_steps": None})
    with pytest.raises(DataError, match="fineweb_val"):
        train(config, data, tmp_path / "run")
    shard.unlink()
    with pytest.raises(DataError, match=r"fineweb_val.* is missing"):
        train(config, data, tmp_path / "run")
    (data / "manifest.json").unlink()
    assert train(config, data, tmp_path / "run").val_bpb_average is None
    with pytest.raises(DataError, match="no shard of the val split"):
        train(replace(config, training={"validate_every_steps": 1}), data, tmp_path / "other")


def test_bfloat16_on_a_cpu_is_refused(minimal_config, embedded_shards, tmp_path) -> None:
    config = replace(minimal_config, training={"precision": "bfloat16", "device": "cpu"})
    with pytest.raises(ConfigError, match="bfloat16 needs a CUDA device"):
        train(config, embedded_shards, tmp_path / "run")


class Bfloat16Watch(TorchDispatchMode):
    """Notes every operation that takes or gives bfloat16, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.num_operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            self.found.add(str(function))
        return result


@pytest.mark.parametrize("keeps_embeddings_in_bfloat16", [False, True])
def test_a_cpu_computes_nothing_in_bfloat16(
    keeps_embeddings_in_bfloat16: bool, minimal_config, embedded_shards, tmp_path
) -> None:
    """Not even with the reference's settings: CPUs without units for it take many times as long."""
    settings = {"bfloat16_embeddings": keeps_embeddings_in_bfloat16, "device": "cpu", "validate_every_steps": 3}
    with Bfloat16Watch() as watch:
        train(quiet(minimal_config, training=settings), embedded_shards, tmp_path / "run")
    assert watch.num_operations > 1000
    assert watch.found == set()


def test_checkpoints_keep_the_newest_few(minimal_config, embedded_shards, tmp_path) -> None:
    config = quiet(minimal_config, training={"checkpoint_every_s": 0.0, "keep_checkpoints": 2})
    train(config, embedded_shards, tmp_path / "run")
    assert checkpoint.steps_on_disk(RunFolder(tmp_path / "run").checkpoints_path) == [6, 5]


def test_the_clock_replays_its_log_and_drops_a_line_that_was_cut_off(tmp_path) -> None:
    log = tmp_path / "clock.log"
    log.write_text("0.0\n1.5\n2.2")
    clock = Clock(log)
    assert [clock.read(0), clock.read(1)] == [0.0, 1.5]
    time.sleep(0.02)  # the first step after the replay is as long as any other
    live = clock.read(2)
    assert 1.52 <= live < 2.0
    clock.pause()
    clock.close()
    assert log.read_text().splitlines()[:2] == ["0.0", "1.5"]
    assert Clock(log).read(2) == live


TECHNIQUES = {
    "model": {
        "document_masking": True, "smear_gate": "input", "skip_gates": True, "parallel_last_layers": 1,
        "attention_gate_dims": 12, "value_embedding_last_layers": 1, "recurrent_layers": (1, 2), "ngram_orders": (3, 5),
        "ngram_rows": 64, "num_layers": 4, "chunk_blocks": (1, 2), "chunk_stride_bytes": 3,
    },
    "jepa": {"context": "causal", "horizons": 2, "next_bytes_weight": 0.1},
    "optimizer": {
        "muon_row_normalization": True, "newton_schulz_coefficients": "polar_express", "muon_beta2": 0.95,
        "muon_cautious_weight_decay": True,
    },
}  # fmt: skip


@pytest.mark.compiled
def test_the_step_is_compiled_once_a_kind_and_never_left_uncompiled(minimal_config, monkeypatch) -> None:
    """Five lengths with and without latent losses are more than the eight graphs that the compiler allows by itself."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_by(call, backend=count, **options))
    step = GradientStep(initialize(ByteLM(minimal_config), 0), minimal_config, compile=True)
    for jepa_lambda in (0.1, 0.0, 0.05, 0.0):
        for length in (8, 16, 32, 64, 128):
            ids = torch.randint(4, 260, (256 // length, length + 1))
            step(ids[:, :-1], ids[:, 1:], jepa_lambda=jepa_lambda)
    assert len(graphs) == 10


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_weight_of_a_latent_module_that_is_switched_off_does_not_stop_compiled_training(minimal_config) -> None:
    config = replace(minimal_config, jepa={"enabled": False, "next_bytes_weight": 0.1})
    step = GradientStep(initialize(ByteLM(config), 0), config, compile=True)
    ids = torch.randint(4, 260, (2, 17))
    step(ids[:, :-1], ids[:, 1:], jepa_lambda=0.0)
    assert all(parameter.grad is not None for parameter in step.loss.parameters())


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, TECHNIQUES], ids=["default", "every technique"])
def test_compiled_training_takes_the_same_steps(options, minimal_config, embedded_shards, tmp_path) -> None:
    for mode in ("off", "on"):
        config = replace(minimal_config, **options)
        train(quiet(config, training={"compile": mode, "log_every_steps": 1}), embedded_shards, tmp_path / mode)
    eager, compiled = (
        [line["train_loss_nats"] for line in RunFolder(tmp_path / mode).read_metrics() if "train_loss_nats" in line]
        for mode in ("off", "on")
    )
    assert compiled == pytest.approx(eager, abs=1e-3)
