"""Small models in integer form, and inputs of every kind."""

import functools
import lzma
import random
import zlib
from pathlib import Path
from typing import Any

from bytejepa.artifact.container import read_container
from bytejepa.artifact.load import configuration_of
from bytejepa.codec import coder, container
from bytejepa.codec.integer_model import IntegerModel, integer_model
from bytejepa.codec.lanes import LaneCoder

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_MODEL = GOLDEN / "codec.bjm"

GREETINGS = (
    "All human beings are born free", "Alle Menschen sind frei", "Tous les êtres humains naissent libres",
    "Todos los seres humanos nacen libres", "Tutti gli esseri umani nascono liberi", "Todos os seres humanos",
    "Alle mennesker er født frie", "Alla människor är födda fria", "Kaikki ihmiset syntyvät vapaina",
    "Wszyscy ludzie rodzą się wolni", "Všichni lidé rodí se svobodní", "Minden emberi lény szabadon születik",
    "Toate ființele umane se nasc libere", "Бүх хүн тэгш эрхтэй", "Все люди рождаются свободными",
    "Всі люди народжуються вільними", "Всички хора се раждат свободни", "Сва људска бића рађају се слободна",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι", "Bütün insanlar hür doğar", "Hamma odamlar erkin", "Барлық адамдар тең",
    "יולדו בני האדם חופשיים", "يولد جميع الناس أحرارا", "تمام افراد بشر آزاد", "تمام انسان آزاد", "सभी मनुष्यों को",
    "সমস্ত মানুষ স্বাধীনভাবে", "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ", "પ્રતિષ્ઠા અને અધિકારોની", "மனிதப் பிறிவியினர்", "ప్రతిపత్తిస్వత్వముల", "ಎಲ್ಲಾ ಮಾನವರೂ",
    "മനുഷ്യരെല്ലാവരും", "มนุษย์ทั้งหลายเกิดมามีอิสระ", "ມະນຸດທຸກຄົນ", "លមនុស្សទាំងអស់", "人人生而自由", "すべての人間は", "모든 인간은",
    "Tất cả mọi người sinh ra", "Semua orang dilahirkan merdeka",
)  # fmt: skip
"""The beginning of one sentence in more than 40 languages."""


EVERY_CODE: dict[str, Any] = {"small_tensor_elements": 0}
"""Matrices as codes even in small models: kept as float16, the codec would have to quantise them itself."""
STRUCTURES: dict[str, dict[str, Any]] = {
    "default": {},
    "no latents": {"jepa": {"enabled": False}},
    "no injection": {"model": {"chunk_stride_bytes": 7}, "jepa": {"inject": False, "context": "causal"}},
    "heads for training alone": {"model": {"multi_token_heads": 2}, "jepa": {"horizons": 3}},
    "plain": {
        "model": {"smear": False, "bigram_rows": None, "residual_mix": False, "skip_connections": False,
                  "depth_scaled_norm": False, "xsa_last_layers": 0}
    },
    "odd widths": {"model": {"num_layers": 5, "model_dim": 40, "num_heads": 5, "num_kv_heads": 1, "mlp_ratio": 1.125},
                   "jepa": {"latent_dim": 11, "hidden_dim": 7}},
    "one layer": {"model": {"num_layers": 1}},
    "one layer with skip gates": {"model": {"num_layers": 1, "skip_gates": True}},
    "all dimensions rotate": {"model": {"rotary_dims": None}},
    "other constants": {
        "model": {"rotary_base": 500.0, "logit_softcap": 12.0, "xsa_last_layers": 3, "bigram_rows": 61, "num_kv_heads": 4}
    },
    "kept as float16": {
        "artifact": {"small_tensor_elements": 5000},
        "model": {"ngram_orders": (3, 5), "ngram_rows": 61, "ngram_dim": 4, "attention_gate_dims": 7,
                  "value_embedding_last_layers": 2},
    },
    "documents": {"model": {"document_masking": True}},
    "runs": {"model": {"ngram_orders": (3, 5), "ngram_rows": 61, "ngram_dim": 4}},
    "runs without pairs": {"model": {"bigram_rows": None, "ngram_orders": (4,), "ngram_rows": 2, "ngram_dim": 3}},
    "exact pairs": {"model": {"bigram_table": "exact", "bigram_rows": 65_537, "bigram_dim": 2}},
    "a smear that reads its input": {"model": {"smear_gate": "input"}},
    "windows": {"model": {"attention_windows": (5, 0, 16)}},
    "skip gates": {"model": {"skip_gates": True, "num_layers": 4}},
    "parallel": {"model": {"parallel_last_layers": 2}},
    "recurrent": {"model": {"recurrent_layers": (0, 1)}},
    "recurrent in the middle": {"model": {"num_layers": 5, "recurrent_layers": (2, 3), "skip_gates": True}},
    "gated heads": {"model": {"attention_gate_dims": 7}},
    "value embeddings": {"model": {"value_embedding_last_layers": 2, "parallel_last_layers": 1}},
    "chunk blocks": {"model": {"chunk_blocks": (1, 2), "chunk_stride_bytes": 3, "num_layers": 4}},
    "first blocks in chunks": {
        "model": {"chunk_blocks": (0, 1), "skip_connections": False, "attention_windows": (9,), "chunk_stride_bytes": 4}
    },
    "recurrent chunk blocks": {"model": {"recurrent_layers": (0, 1), "chunk_blocks": (0, 1), "chunk_stride_bytes": 2}},
    "latents of residuals": {"jepa": {"context": "causal"}},
    "everything": {
        "model": {"num_layers": 6, "ngram_orders": (3, 4), "ngram_rows": 31, "ngram_dim": 4, "smear_gate": "input",
                  "document_masking": True, "attention_windows": (0, 12, 1, 9, 16, 0), "skip_gates": True,
                  "parallel_last_layers": 3, "recurrent_layers": (2, 3), "attention_gate_dims": 5,
                  "value_embedding_last_layers": 4, "chunk_blocks": (1, 4), "chunk_stride_bytes": 2,
                  "xsa_last_layers": 4},
        "jepa": {"context": "causal", "chunk_bytes": 8},
    },
}  # fmt: skip


@functools.cache
def golden_model() -> IntegerModel:
    """The model whose numbers tests/golden pins."""
    artifact = read_container(GOLDEN_MODEL)
    return integer_model(artifact.stored, configuration_of(artifact.configuration, str(GOLDEN_MODEL)))


@functools.cache
def cpu_coder(window: int = 64, hop: int = 32) -> LaneCoder:
    from bytejepa.codec.cpu import CpuCoder

    return CpuCoder(golden_model(), window, hop)


def inputs() -> dict[str, bytes]:
    """One input of every kind, a few hundred bytes each."""
    noise = random.Random(0).randbytes(700)
    text = "\n".join(GREETINGS).encode()
    return {
        "empty": b"",
        "one byte": b"\xff",
        "two bytes": b"ab",
        "all bytes": bytes(range(256)),
        "zeros": bytes(500),
        "periodic": b"abcab" * 120,
        "noise": noise,
        "languages": text,
        "xz of text": lzma.compress(text),
        "zlib of noise": zlib.compress(noise),
    }


def coded_blocks(lane_coder: LaneCoder, data: bytes, block_bytes: int) -> list[container.Block]:
    """The model's blocks of `data`."""
    contents = [data[begin : begin + block_bytes] for begin in range(0, len(data), block_bytes)]
    return [
        container.make_block(content, coder.encode(*lane_coder.block_intervals(content)), is_zstd=False)
        for content in contents
    ]


def file_of(data: bytes, blocks: list[container.Block], block_bytes: int, lane_coder: LaneCoder | None = None) -> bytes:
    """A file of `blocks` with the checksums that these, and `data` as a whole, have."""
    lane_coder = lane_coder or cpu_coder()
    window, hop, model = lane_coder.window, lane_coder.hop, golden_model().sha256
    return container.blocks_file(data, blocks, block_bytes=block_bytes, window=window, hop=hop, model=model)


def coded_file(data: bytes, block_bytes: int = 400, lane_coder: LaneCoder | None = None) -> bytes:
    """A file whose every block is the golden model's, also where zstd would have been smaller, as for most short inputs."""
    return file_of(data, coded_blocks(lane_coder or cpu_coder(), data, block_bytes), block_bytes, lane_coder)
