"""Attention: every kernel of this machine against an explicit softmax in float64, masks, XSA, choice of kernel."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bytejepa.config import replace
from bytejepa.errors import ConfigError
from bytejepa.model import attention, blocked_attention
from bytejepa.model.attention import attention_mask, causal_attention, choose_backend, masked_attention
from bytejepa.model.transformer import ByteLM
from small_models import random_ids, small_config, small_model

CPU = torch.device("cpu")


def queries_keys_values(length: int = 13, heads: int = 4, groups: int = 2, E: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, n, E, generator=random) for n in (heads, groups, groups)]


def explicit(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention in float64; `visible` (1 or B, T, T)."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for head in range(q.size(2)):
        group = head // (q.size(2) // k.size(2))
        scores = q[:, :, head] @ k[:, :, group].mT / q.size(-1) ** 0.5
        out[:, :, head] = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, :, group]
    return out


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention_is_softmax_over_what_came_before(backend: str, groups: int) -> None:
    q, k, v = queries_keys_values(groups=groups)
    visible = torch.ones(13, 13).tril().bool()[None]
    ours = causal_attention(q, k, v, backend=backend)
    torch.testing.assert_close(ours.double(), explicit(q, k, v, visible), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["flash", "math"])
@pytest.mark.parametrize("window", [1, 4, None])
def test_masked_attention_sees_windows_and_documents_only(backend: str, window: int | None) -> None:
    q, k, v = queries_keys_values()
    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 13])
    mask = attention_mask(13, window, documents, CPU)
    visible = torch.tensor(
        [
            [[s <= t and (window is None or t - s < window) and d[s] == d[t] for s in range(13)] for t in range(13)]
            for d in documents.tolist()
        ]
    )
    assert torch.equal(mask[:, 0], visible)
    expected = explicit(q, k, v, visible)
    torch.testing.assert_close(
        causal_attention(q, k, v, backend=backend, mask=mask).double(), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        masked_attention(q[:, -3:], k, v, mask[:, :, -3:]).double(), expected[:, -3:], rtol=0, atol=1e-5
    )


def test_no_mask_where_causality_is_the_only_bound() -> None:
    assert attention_mask(13, None, None, CPU) is None
    assert attention_mask(13, 13, None, CPU) is None
    assert attention_mask(13, 12, None, CPU) is not None


def test_a_window_counts_the_position_itself() -> None:
    mask = attention_mask(6, 2, None, CPU)
    assert mask[0, 0].sum(1).tolist() == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("backend", ["blocked", "flash", "math"])
@pytest.mark.parametrize("length", [1, 13, 64, 65, 130])
def test_values_and_gradients_of_every_kernel_are_the_explicit_ones(backend: str, length: int) -> None:
    parts = [x.requires_grad_() for x in queries_keys_values(length, E=16)]
    exact = [x.detach().double().requires_grad_() for x in parts]
    weight = torch.randn(2, length, 4, 16, generator=torch.Generator().manual_seed(1))
    ours = causal_attention(*parts, backend=backend)
    theirs = explicit(*exact, torch.ones(length, length).tril().bool()[None])
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for mine, oracle in zip(parts, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), oracle.grad, rtol=0, atol=1e-5)


def masks_of(kind: str, length: int) -> tuple[Tensor | None, Tensor]:
    """The first keys of two sequences, and the same as an explicit mask (rows, T, T)."""
    random = torch.Generator().manual_seed(2)
    documents = (torch.rand(2, length, generator=random) < 0.1).cumsum(1)
    window = {"window": 20, "both": 9}.get(kind)
    ids = documents if kind in ("documents", "both") else None
    mask = attention_mask(length, window, ids, CPU)
    mask = torch.ones(length, length).tril().bool()[None] if mask is None else mask[:, 0]
    return blocked_attention.first_keys(length, window, ids, CPU), mask


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "both"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 16), (13, 4, 1, 48), (64, 4, 2, 64), (131, 2, 1, 80), (200, 4, 2, 16)])
def test_blocks_see_what_windows_and_documents_leave(kind: str, shape: tuple[int, int, int, int]) -> None:
    length, H, G, E = shape
    random = torch.Generator().manual_seed(3)
    # as slices of one product, as the model has them
    product = torch.randn(2, length, H + 2 * G, E, generator=random)
    parts = [x.requires_grad_() for x in product.split((H, G, G), dim=2)]
    exact = [x.detach().double().requires_grad_() for x in parts]
    first, mask = masks_of(kind, length)
    assert (first is None) == (kind == "causal" or (kind == "window" and length <= 20))
    weight = torch.randn(2, length, H, E, generator=random)
    found, expected = causal_attention(*parts, backend="blocked", mask=first), explicit(*exact, mask)
    gradients = torch.autograd.grad((found * weight).sum(), parts)
    for ours, theirs in zip(
        (found, *gradients), (expected, *torch.autograd.grad((expected * weight).sum(), exact)), strict=True
    ):
        assert (ours.double() - theirs).norm() < 2e-6 * theirs.norm() + 5e-6


@pytest.mark.parametrize("place", [5, 18, 33])
def test_blocks_see_nothing_at_all_of_what_is_hidden(place: int) -> None:
    """However large it is: a probability of 1e-38 is none that is zero."""
    q, k, v = queries_keys_values(40, E=16)
    first = torch.where(torch.arange(40) > place, place + 1, 0).int()[None]  # a document begins after it
    changed = v.clone()
    changed[:, place] = 3e38
    outputs = [causal_attention(q, k, values, backend="blocked", mask=first) for values in (v, changed)]
    for unmoved in (slice(None, place), slice(place + 1, None)):
        assert torch.equal(outputs[0][:, unmoved], outputs[1][:, unmoved])


def test_kernels_that_do_not_take_a_head_leave_the_mask_to_the_library() -> None:
    first, mask = masks_of("both", 40)
    for q, k, v in (queries_keys_values(40), [x.double() for x in queries_keys_values(40, E=16)]):
        assert not blocked_attention.takes(q)
        found = causal_attention(q, k, v, backend="blocked", mask=first)
        torch.testing.assert_close(
            found.double(), explicit(q.double(), k.double(), v.double(), mask), rtol=0, atol=1e-5
        )


def test_threads_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    results, taken = [], []
    work_in_threads = blocked_attention._in_threads
    monkeypatch.setattr(blocked_attention, "FLOP_OF_A_THREAD", 1)
    monkeypatch.setattr(blocked_attention, "_in_threads", lambda *told: taken.append(told[2]) or work_in_threads(*told))
    before = torch.get_num_threads()
    try:
        for threads, openmp in ((1, True), (3, True), (3, False)):
            torch.set_num_threads(threads)
            if not openmp:
                monkeypatch.setattr(blocked_attention, "_openmp", lambda: None)
            q, k, v = (x.requires_grad_() for x in queries_keys_values(130, E=16))
            output = causal_attention(q, k, v, backend="blocked")
            results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert taken == [1, 1, 3, 3, 3, 3]
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, results[0], strict=True))


@pytest.mark.parametrize("length", [1100, 4200])
def test_blocks_of_long_sequences_are_smaller_and_see_the_same(length: int) -> None:
    random = torch.Generator().manual_seed(4)
    parts = [torch.randn(1, length, n, 16, generator=random, requires_grad=True) for n in (2, 1, 1)]
    weight = torch.randn(1, length, 2, 16, generator=random)
    results = []
    for backend in ("blocked", "math"):
        output = causal_attention(*parts, backend=backend)
        results.append((output, *torch.autograd.grad((output * weight).sum(), parts)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_heads_need_not_lie_side_by_side() -> None:
    parts = queries_keys_values(70, E=16)
    expected = causal_attention(*parts, backend="blocked")
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in parts]
    output = causal_attention(*apart, backend="blocked")
    assert torch.equal(output, expected)
    together = [x.requires_grad_() for x in parts]
    exact = torch.autograd.grad(
        causal_attention(*together, backend="blocked").sum(), together
    )  # its gradient is expanded
    for ours, theirs in zip(torch.autograd.grad(output.sum(), apart), exact, strict=True):
        assert torch.equal(ours, theirs)


def test_another_default_type_is_not_that_of_the_kernels_memory() -> None:
    q, k, v = queries_keys_values(130, E=16)
    expected = causal_attention(q, k, v, backend="blocked")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = causal_attention(q, k, v, backend="blocked")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_what_the_kernels_would_read_past_is_refused() -> None:
    q, k, v = queries_keys_values(40, E=16)
    first = torch.zeros(1, 40, dtype=torch.int32)
    wrong = (
        (q[:, :, :3], k, v, None), (q, k[:, :9], v[:, :9], None), (q, k, v[..., :8], None), (q, k.double(), v, None),
        (q, k, v, first.bool()), (q, k, v, first[:, :9]), (q, k, v, first.expand(3, -1)),
    )  # fmt: skip
    for given in wrong:
        with pytest.raises(ValueError, match="attention in blocks takes float32"):
            blocked_attention.causal_attention(*given)


def test_openmp_is_found_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    monkeypatch.setattr(blocked_attention, "Path", lambda _: maps)
    begin = "7f00-7f01 r-xp 00000000 fe:00 1234                       "
    for lines in ("", f"{begin}/a b/libgomp.so.1 (deleted)\n", f"{begin}/a/libgomp.so.1\n{begin}/b/libgomp.so.1\n"):
        maps.write_text(lines)
        assert blocked_attention._openmp.__wrapped__() is None
    loaded = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("libgomp.so.1")]
    maps.write_text("\n".join(loaded))
    assert (blocked_attention._openmp.__wrapped__() is None) == (not loaded)


def test_numbers_that_are_none_stay_so() -> None:
    """A run that has diverged must not look as if it had not."""
    for place in range(3):
        parts = queries_keys_values(70, E=16)
        parts[place][0, 5, 0, 3] = torch.nan
        assert causal_attention(*parts, backend="blocked")[0].isnan().any()


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_tells_a_compiler_the_truth(masked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys_values(70, E=16))
    first = masks_of("documents", 70)[0] if masked else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(blocked_attention._attention_in_blocks, (q, k, v, first), test_utils=checks)


def test_what_is_said_of_the_kernels_is_so() -> None:
    from bytejepa.kernels import tiled_attention, tiled_products

    assert tiled_attention.ROWS == blocked_attention.BLOCK
    assert tiled_products.LANES == blocked_attention.HEAD_WIDTHS


@pytest.mark.parametrize("backend", ["blocked", "flash", "math"])
@pytest.mark.parametrize("place", [1, 63, 64, 65, 129])
def test_no_kernel_sees_a_later_key_while_training(backend: str, place: int) -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys_values(130, E=16))
    outputs = []
    for change in (0.0, 1.0):
        moved_k, moved_v = k.clone(), v.clone()
        moved_k[:, place] += change
        moved_v[:, place] += change
        outputs.append(causal_attention(q, moved_k, moved_v, backend=backend).detach())
    moved = (outputs[0] - outputs[1]).abs().amax((0, 2, 3)) > 1e-6
    assert not moved[:place].any()
    assert moved[place:].all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.requires_grad_() for x in queries_keys_values(70, E=16))
    for backend in ("blocked", "flash", "math"):
        assert torch.isfinite(causal_attention(300 * q, 300 * k, v, backend=backend)).all(), backend


def test_xsa_drops_what_lies_along_the_own_value_and_nothing_else() -> None:
    y, _, v = queries_keys_values()
    block = attention.Attention(32, 4, 2, query_gain=1.5, drop_own_value=True)
    with torch.no_grad():
        block.output.weight.copy_(torch.eye(32))
        left = block.merge(y, v, torch.zeros(2, 13, 32), torch.ones(32)).view_as(y)
    own = v.repeat_interleave(2, dim=2) / v.norm(dim=-1).repeat_interleave(2, dim=2)[..., None]
    assert (left * own).sum(-1).abs().max().item() < 1e-5
    dropped = y - left
    torch.testing.assert_close(dropped, (y * own).sum(-1, keepdim=True) * own, rtol=0, atol=1e-5)


def test_xsa_is_in_the_last_blocks_only() -> None:
    model = ByteLM(small_config(model={"num_layers": 4, "xsa_last_layers": 3}))
    assert [block.attention.drop_own_value for block in model.blocks] == [False, True, True, True]


def test_the_query_gain_starts_where_it_is_set() -> None:
    model = ByteLM(small_config(model={"query_gain": 0.7}))
    gains = [block.attention.query_gain for block in model.blocks]
    assert all(torch.equal(gain, torch.full((4,), 0.7)) for gain in gains)


def test_auto_is_a_kernel_of_this_machine() -> None:
    assert choose_backend("auto", "cpu") == "blocked"
    assert choose_backend("auto", "cpu", windows=True) == "blocked"
    assert choose_backend("auto", "cpu", head_width=24) == "flash"
    assert choose_backend("math", "cpu", documents=True) == "math"


@pytest.mark.parametrize("kernel", ["flash3", "flash4", "cudnn", "flex", "efficient"])
def test_an_impossible_kernel_is_refused_with_the_reason_and_what_is_possible(kernel: str) -> None:
    with pytest.raises(
        ConfigError, match=f"training.attention {kernel} is impossible on cpu: .*possible: blocked, flash, math"
    ):
        choose_backend(kernel, "cpu")


@pytest.mark.parametrize(("capability", "possible"), [((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_flash_attention_3_is_for_hopper_alone(
    capability: tuple[int, int], possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
    why = attention._find_backends("cuda")["flash3"]
    assert why == (None if possible else f"needs compute capability 9.x, this GPU has {capability[0]}.{capability[1]}")


@pytest.fixture
def flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, with its meaning of windows."""

    def flash_attn_func(q, k, v, causal, window_size=(-1, -1)):
        assert causal
        assert window_size[1] <= 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        mask = attention_mask(q.size(1), window, None, CPU)
        return causal_attention(q, k, v, backend="math", mask=mask)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setitem(attention._available, "cpu", attention.available_backends("cpu") | {"flash3": None})


def test_a_model_gives_hopper_kernels_the_window_of_each_layer(flash_attention_3: None) -> None:
    model, ids = small_model(model={"attention_windows": (3, 0, 40)}), random_ids(2, 33)
    expected = model.logits(ids)
    model.attention_backend = "flash3"
    assert model.attention_kernels(33, CPU, compiled=False) == ["flash3"]
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-4, atol=1e-4)


def test_hopper_kernels_get_windows_as_the_keys_before_a_query(flash_attention_3: None) -> None:
    q, k, v = queries_keys_values()
    for window in (1, 4, None):
        visible = torch.ones(13, 13).tril().bool() & ~torch.ones(13, 13).tril(-(window or 13)).bool()
        ours = causal_attention(q, k, v, backend="flash3", mask=window)
        torch.testing.assert_close(ours.double(), explicit(q, k, v, visible[None]), rtol=0, atol=1e-5)


def test_hopper_kernels_are_chosen_for_windows_but_not_for_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict.fromkeys(attention.available_backends("cpu"))  # a machine that has everything
    monkeypatch.setitem(attention._available, "cuda", found)
    half = {"dtype": torch.bfloat16, "compiled": True}
    assert choose_backend("auto", "cuda", windows=True, **half) == "flash3"
    assert choose_backend("auto", "cuda", windows=True, documents=True, **half) == "flex"
    monkeypatch.setitem(
        attention._available, "cuda", found | dict.fromkeys(("flash3", "flash4", "blocked"), "not installed")
    )
    assert choose_backend("auto", "cuda", windows=True, **half) == "flex"
    assert choose_backend("auto", "cuda", **half) == "cudnn"


def test_a_gpu_computes_float32_and_uncompiled_masks_by_the_kernel_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._available, "cuda", dict.fromkeys(attention.available_backends("cpu")))
    assert choose_backend("auto", "cuda", dtype=torch.float32) == "blocked"
    monkeypatch.setitem(
        attention._available, "cuda", dict.fromkeys(attention.available_backends("cpu")) | {"blocked": "for CPUs"}
    )
    assert choose_backend("auto", "cuda", dtype=torch.float32) == "efficient"
    assert choose_backend("auto", "cuda", documents=True, dtype=torch.float32, compiled=True) == "flex"
    assert choose_backend("auto", "cuda", documents=True, dtype=torch.bfloat16) == "efficient"
    with pytest.raises(
        ConfigError, match=r"cudnn is impossible on cuda: it computes in half precision only, .*float32"
    ):
        choose_backend("cudnn", "cuda", dtype=torch.float32)


@pytest.mark.parametrize(
    ("head_width", "dtype", "masked", "kernel"),
    [
        (64, torch.bfloat16, False, "flash3"),
        (160, torch.bfloat16, False, "flash3"),
        (264, torch.bfloat16, False, "efficient"),
        (20, torch.bfloat16, False, "flash"),  # PyTorch pads for it
        (20, torch.bfloat16, True, "flex"),
        (12, torch.bfloat16, True, "math"),
        (12, torch.float32, True, "efficient"),
        (10, torch.float32, True, "math"),
    ],
)
def test_a_gpus_kernel_is_one_that_takes_heads_of_that_width(
    head_width: int, dtype: torch.dtype, masked: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu = dict.fromkeys(attention.available_backends("cpu")) | {"blocked": "for CPUs"}
    monkeypatch.setitem(attention._available, "cuda", on_a_gpu)
    how = {"documents": masked, "dtype": dtype, "compiled": True, "head_width": head_width}
    assert choose_backend("auto", "cuda", **how) == kernel
    assert choose_backend(kernel, "cuda", **how) == kernel


def test_a_kernel_that_takes_no_such_heads_is_refused_with_their_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._available, "cuda", dict.fromkeys(attention.available_backends("cpu")))
    half = {"dtype": torch.bfloat16}
    for kernel, head_width, why in (
        ("flash3", 20, "no multiple of 8"), ("flash4", 136, "more than 128"), ("cudnn", 160, "more than 128"),
        ("flash", 264, "more than 256"), ("flex", 8, "less than 16"), ("efficient", 12, "no multiple of 8"),
    ):  # fmt: skip
        with pytest.raises(
            ConfigError, match=f"{kernel} is impossible on cuda: its heads are {head_width} wide, {why}"
        ):
            choose_backend(kernel, "cuda", head_width=head_width, **half)


def test_a_kernel_without_masks_is_refused_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._available, "cuda", dict.fromkeys(attention.available_backends("cpu")))
    with pytest.raises(ConfigError, match=r"cudnn is impossible on cuda: it cannot mask .*possible: "):
        choose_backend("cudnn", "cuda", windows=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("kernel", ["math", "flash", "blocked"])
def test_a_kernel_changes_no_loss_beyond_rounding(kernel: str) -> None:
    model, ids = small_model(model={"num_heads": 2, "num_kv_heads": 1}), random_ids(2, 131)
    other = ByteLM(replace(model.config, training={"attention": kernel}))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        scored = model.losses(ids[:, :-1], ids[:, 1:]).ce.item()
    assert other.losses(ids[:, :-1], ids[:, 1:]).ce.item() == pytest.approx(scored, rel=1e-6)


def test_queries_keys_and_values_are_the_same_by_the_way_that_gpus_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model(model={"num_heads": 2, "num_kv_heads": 1}), random_ids(2, 32)
    model.compute_dtype = torch.bfloat16
    expected = model.logits(ids)
    taken = []
    monkeypatch.setattr("bytejepa.model.fused_heads.is_half_on_gpu", lambda x: taken.append(x.dtype) or True)
    torch.testing.assert_close(model.logits(ids), expected, rtol=0.05, atol=0.05)
    assert set(taken) == {torch.bfloat16}
