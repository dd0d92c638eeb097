"""The figures: bpb recomputed from loss and counts, coverage, seeds, significance, submission.json against the logs."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from bytejepa.bits import VALIDATION_BYTES, VALIDATION_DOCUMENTS, bits_from_nats
from bytejepa.review.claims import bpb_in, claim_finding, claimed_bpb, tolerance_of, unscored_claim_findings
from bytejepa.review.findings import Evidence, Finding, Status, Weight
from bytejepa.review.log_parser import ScoreLine, TrainingLog
from bytejepa.review.submission import Submission

WITH_DOCUMENT_MARKS = 260
"""The vocabulary of the challenge's byte shards: bytes, and a mark before each document, which is a symbol of no bytes."""
TOKENS_OF_VOCABULARY = {
    1024: 62_021_846, 8192: 40_540_803, WITH_DOCUMENT_MARKS: VALIDATION_BYTES + VALIDATION_DOCUMENTS, 256: VALIDATION_BYTES,
}  # fmt: skip
"""Symbols of the whole validation split, by vocabulary (landscape, section 2)."""
COVERAGE_TOLERANCE = 0.002
"""Tails cut to a multiple of the context are under 0.0001; the known wrong denominators are 4 % off and more."""
OTHER_SPLIT_TOLERANCE = 0.01
"""How far one tokenizer's symbols per byte may differ between two samples of the same web text."""
FEWEST_SYMBOLS = 1e-3
"""A byte has more of them in any vocabulary; a loss without its bpb, or the reverse, has no ratio."""
LARGEST_PART = 0.9
"""Fewer tokens than this share of the split's are a part of it, whose bytes only the author can count."""
PART_TOLERANCE = 0.05
"""How far the symbols per byte of such a part may differ from those of the whole split."""
RECORD_MARGIN_NATS = 0.005
RECORD_P = 0.01
_BASELINE = re.compile(
    r"(?:previous|prior|current|merged|baseline|SOTA|record|leader)[^\n|]{0,60}?\b(?:val_)?bpb\b[^\d\n]{0,12}(\d\.\d{3,})",
    re.IGNORECASE,
)


def _ratio(score: ScoreLine) -> float:
    """Return symbols per byte as a score line implies it."""
    return score.bpb / bits_from_nats(score.loss_nats) if score.loss_nats else math.nan


def vocabulary_of(submission: Submission) -> int | None:
    """Return the size of the vocabulary, from the logs, the run command, or the data's name."""
    for log in submission.logs:
        if isinstance(size := log.settings.get("vocab_size"), int):
            return size
    if re.fullmatch(r"\d{1,9}", stated := submission.settings.get("VOCAB_SIZE", "")):
        return int(stated)
    source = submission.script.read_text(encoding="utf-8", errors="replace") if submission.script else ""
    match = re.search(r"VOCAB_SIZE[\"'],\s*[\"']?(\d{1,9})\b", source) or re.search(
        r"fineweb10B_(?:sp|byte)(\d{1,9})", source + submission.readme
    )
    return int(match[1]) if match else None


def claims_fineweb(submission: Submission) -> bool:
    """Return whether the scores are meant to be of FineWeb: as submission.json's `dataset` says, or as any text does."""
    stated = submission.claims.get("dataset")
    if isinstance(stated, str) and stated:
        return "fineweb" in stated.lower()
    script = submission.script.read_text(encoding="utf-8", errors="replace") if submission.script else ""
    return "fineweb" in (submission.readme + " ".join(map(str, submission.claims.values())) + script).lower()


def score_findings(submission: Submission) -> list[Finding]:
    """Judge the figures of the logs and of submission.json against each other and against the validation split."""
    finals = [(log, log.final) for log in submission.logs]
    reported = [(log, final) for log, final in finals if final is not None]
    if not reported:
        return unscored_claim_findings(submission)
    return [
        _recomputed(submission, reported),
        _coverage(submission, reported),
        claim_finding(submission, reported),
        _configurations(submission),
        _seeds(reported),
        _significance(submission, reported),
    ]


def _recomputed(submission: Submission, reported: list[tuple[TrainingLog, ScoreLine]]) -> Finding:
    check = "scores.bpb_from_loss"
    vocabulary = vocabulary_of(submission)
    is_fineweb = claims_fineweb(submission)
    published = TOKENS_OF_VOCABULARY.get(vocabulary or -1) if is_fineweb else None
    evidence, worst, symbols = [], 0.0, published
    lines = [(log, score) for log in submission.logs for score in log.scores]
    ratios = [_ratio(score) for _, score in lines if score.bpb > 0.05]
    middle = statistics.median(ratios) if ratios else math.nan
    expected = middle
    for log, score in lines:
        # a tokenizer of the same size may cut the same bytes into another number of tokens: the log's own count decides
        symbols = log.counts.get("tokens") or published
        is_published = not symbols or not published or abs(symbols / published - 1) <= COVERAGE_TOLERANCE
        num_bytes = VALIDATION_BYTES
        if not is_fineweb:  # other text, of which there are no counts but the log's
            symbols, num_bytes = _logged_counts(log, vocabulary)
            if symbols and not score.is_final:  # of a part, as scored while training: its documents may be longer
                continue
        expected = symbols / num_bytes if symbols else middle
        rounding = 10.0**-score.digits / max(score.bpb, 1e-9) + 1e-4 / max(score.loss_nats, 1e-9)
        off = abs(_ratio(score) / expected - 1)
        if off > COVERAGE_TOLERANCE + rounding and not is_published and published:
            usual = published / VALIDATION_BYTES
            if (symbols or 0) < LARGEST_PART * published and abs(_ratio(score) / usual - 1) <= PART_TOLERANCE:
                return _part_of_split(log, symbols or 0, published)
            if abs(_ratio(score) / usual - 1) <= OTHER_SPLIT_TOLERANCE:
                return _other_split(log, symbols or 0, published)
        if symbols and is_fineweb and not published and COVERAGE_TOLERANCE + rounding < off <= OTHER_SPLIT_TOLERANCE:
            return _own_tokenizer(log, symbols, _ratio(score))
        if off > COVERAGE_TOLERANCE + rounding:
            worst = max(worst, off)
            evidence.append(
                Evidence(
                    file=log.file,
                    line=score.line,
                    text=f"{score.text}  (symbols per byte {_ratio(score):.5f}, expected {expected:.5f})",
                )
            )
    figures: dict[str, Any] = {"symbols_per_byte": round(_ratio(reported[-1][1]), 6), "vocabulary": vocabulary}
    if evidence:
        summary = f"val_bpb does not follow from val_loss and the counts: {worst:.2%} off"
        return Finding(check=check, status=Status.FAIL, summary=summary, evidence=tuple(evidence[:6]), figures=figures)
    if not symbols:
        # of a vocabulary of bytes with marks between documents, which may be short where the text is not FineWeb
        most = 2 if vocabulary == WITH_DOCUMENT_MARKS else 1.0005
        if middle and (middle > most or middle <= 0):
            summary = f"{middle:.4f} symbols per byte is more than bytes have"
            return Finding(check=check, status=Status.FAIL, summary=summary, figures=figures)
        summary = (
            f"loss and bpb agree on {middle:.4f} symbols per byte; the counts of this vocabulary are not known here"
        )
        return Finding(check=check, status=Status.UNKNOWN, weight=Weight.NOTE, summary=summary, figures=figures)
    log, final = reported[-1]
    evidence = [
        Evidence(
            file=log.file,
            line=final.line,
            text=f"{bits_from_nats(final.loss_nats) * expected:.6f} recomputed, {final.bpb} logged",
        )
    ]
    return Finding(
        check=check,
        status=Status.PASS,
        summary="val_bpb follows from val_loss and the counts",
        evidence=tuple(evidence),
        figures=figures,
    )


def _logged_counts(log: TrainingLog, vocabulary: int | None) -> tuple[int | None, int]:
    """Return (symbols, bytes) of the scored text as the log counts them; None for symbols where it does not."""
    num_bytes, documents = log.counts.get("bytes", 0), log.counts.get("documents")
    symbols = log.counts.get("tokens")
    if symbols is None and vocabulary == WITH_DOCUMENT_MARKS and documents:
        symbols = num_bytes + documents - 1  # the first document's mark is given
    return (symbols, num_bytes) if symbols and num_bytes else (None, 0)


def _other_split(log: TrainingLog, tokens: int, published: int) -> Finding:
    counts = f"{tokens:,} validation tokens, the published split has {published:,}"
    return _not_recomputed(log, "the log is of another export of the data: its bytes are not known here", counts)


def _own_tokenizer(log: TrainingLog, tokens: int, ratio: float) -> Finding:
    """Return the note on a tokenizer whose counts were never published: its bytes are the author's own count."""
    counts = (
        f"{tokens:,} validation tokens at {ratio:.5f} a byte are {tokens / ratio:,.0f} bytes, "
        f"the published split has {VALIDATION_BYTES:,}"
    )
    return _not_recomputed(log, "the tokenizer and its count of bytes are the author's own", counts)


def _part_of_split(log: TrainingLog, tokens: int, published: int) -> Finding:
    counts = f"{tokens:,} validation tokens, the split has {published:,}"
    return _not_recomputed(log, "a part of the validation split is scored: its bytes are not known here", counts)


def _not_recomputed(log: TrainingLog, why: str, counts: str) -> Finding:
    """Return the note on a val_bpb that cannot be held against the loss, with the counts that the log states."""
    return Finding(
        check="scores.bpb_from_loss",
        status=Status.UNKNOWN,
        weight=Weight.NOTE,
        summary=f"{why}, and val_bpb cannot be recomputed",
        evidence=(Evidence(file=log.file, text=counts),),
    )


def _coverage(submission: Submission, reported: list[tuple[TrainingLog, ScoreLine]]) -> Finding:
    check = "scores.coverage"
    if not claims_fineweb(submission):
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            weight=Weight.NOTE,
            summary="FineWeb is not claimed: no score of the challenge, and coverage is not judged",
        )
    evidence = []
    tolerances = {
        "bytes in the logged tokens": (
            COVERAGE_TOLERANCE if vocabulary_of(submission) in TOKENS_OF_VOCABULARY else OTHER_SPLIT_TOLERANCE
        )
    }
    for log, final in reported:
        tokens = log.counts.get("tokens")
        counts = [("bytes", log.counts.get("bytes"), VALIDATION_BYTES)]
        counts.append(("documents", log.counts.get("documents"), VALIDATION_DOCUMENTS))
        if tokens and FEWEST_SYMBOLS < _ratio(final) < math.inf:  # whatever the tokenizer: tokens over tokens per byte
            counts.append(("bytes in the logged tokens", round(tokens / _ratio(final)), VALIDATION_BYTES))
        for name, count, expected in counts:
            if count is not None and count < (1 - tolerances.get(name, COVERAGE_TOLERANCE)) * expected:
                evidence.append(Evidence(file=log.file, text=f"{count:,} {name}, the split has {expected:,}"))
    if evidence:
        split = f"{VALIDATION_BYTES:,} bytes in {VALIDATION_DOCUMENTS:,} documents"
        return Finding(
            check=check,
            status=Status.FAIL,
            summary=f"the score does not cover the validation split of {split}",
            evidence=tuple(evidence),
        )
    known = {name for log, _ in reported for name in log.counts}
    if not known:
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            weight=Weight.NOTE,
            summary="no log says how much of the validation split was scored",
        )
    return Finding(
        check=check,
        status=Status.PASS,
        summary=f"the logged {', '.join(sorted(known))} are those of the whole validation split",
    )


def _configurations(submission: Submission) -> Finding:
    check = "scores.same_configuration"
    first, *others = submission.logs
    differences = []
    for log in others:
        for key in sorted(first.settings.keys() & log.settings.keys()):
            if first.settings[key] != log.settings[key]:
                differences.append(
                    Evidence(file=log.file, text=f"{key} is {log.settings[key]}, in {first.file} {first.settings[key]}")
                )
        if first.parameters and log.parameters and first.parameters != log.parameters:
            differences.append(
                Evidence(file=log.file, text=f"{log.parameters:,} parameters, in {first.file} {first.parameters:,}")
            )
        if first.planned_steps and log.planned_steps and first.planned_steps != log.planned_steps:
            differences.append(
                Evidence(
                    file=log.file, text=f"{log.planned_steps} planned steps, in {first.file} {first.planned_steps}"
                )
            )
    if differences:
        return Finding(
            check=check,
            status=Status.FAIL,
            summary="the seeds ran with different configurations",
            evidence=tuple(differences[:8]),
        )
    if others and not any(log.settings for log in submission.logs):
        return Finding(
            check=check, status=Status.UNKNOWN, weight=Weight.NOTE, summary="the logs state no settings to compare"
        )
    return Finding(
        check=check, status=Status.PASS, summary=f"the settings that {len(submission.logs)} logs state are the same"
    )


def _seeds(reported: list[tuple[TrainingLog, ScoreLine]]) -> Finding:
    check = "scores.seeds"
    bpbs = [final.bpb for _, final in reported]
    seeds = [log.seed for log, _ in reported]
    deviation = statistics.stdev(bpbs) if len(bpbs) > 1 else None
    figures = {"bpb": bpbs, "seeds": seeds, "mean_bpb": statistics.fmean(bpbs), "deviation_bpb": deviation}
    known = [seed for seed in seeds if seed is not None]
    spread = f", mean {statistics.fmean(bpbs):.5f}, deviation {deviation:.5f}" if deviation is not None else ""
    summary = f"{len(bpbs)} seed{'s' * (len(bpbs) > 1)}{spread}"
    if len(known) != len(set(known)):
        return Finding(
            check=check,
            status=Status.FAIL,
            weight=Weight.NOTE,
            summary=f"two logs are of the same seed: {known}",
            figures=figures,
        )
    if len(bpbs) < 3:
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            weight=Weight.NOTE,
            summary=f"{summary}; a claim needs 3",
            figures=figures,
        )
    return Finding(check=check, status=Status.PASS, summary=summary, figures=figures)


def baseline_of(submission: Submission) -> float | None:
    """Return the bpb that the submission says it improves on, None if it names none."""
    for key in ("baseline_bpb", "previous_record_bpb", "sota_bpb", "prior_sota_bpb", "record_bpb", "previous_sota_bpb"):
        if (value := bpb_in(submission.claims, key)) is not None:
            return value
    claimed = claimed_bpb(submission)
    for match in _BASELINE.finditer(submission.readme):
        if claimed is None or abs(float(match[1]) - claimed) > tolerance_of(
            claimed
        ):  # "Record: val_bpb ..." is its own
            return float(match[1])
    return None


def _significance(submission: Submission, reported: list[tuple[TrainingLog, ScoreLine]]) -> Finding:
    """Judge the rule for records: better by 0.005 nats a symbol at p < 0.01, one-sided t-test over the seeds."""
    check = "scores.significance"
    baseline = baseline_of(submission)
    bpbs = [final.bpb for _, final in reported]
    if baseline is None or len(bpbs) < 2:
        return Finding(
            check=check,
            status=Status.UNKNOWN,
            weight=Weight.NOTE,
            summary="no baseline is named, or too few seeds to test a claim against it",
        )
    from scipy import stats

    margin = bits_from_nats(RECORD_MARGIN_NATS) * _ratio(reported[-1][1])
    target = baseline - margin
    p = (
        float(stats.ttest_1samp(bpbs, target, alternative="less").pvalue)
        if statistics.stdev(bpbs) > 0
        else float(statistics.fmean(bpbs) >= target)
    )
    figures = {"baseline_bpb": baseline, "margin_bpb": margin, "p": p}
    better = p < RECORD_P
    summary = f"{'better' if better else 'not shown to be better'} than {baseline} by {margin:.4f} bpb (p = {p:.2g})"
    return Finding(
        check=check,
        status=Status.PASS if better else Status.UNKNOWN,
        weight=Weight.NOTE,
        summary=summary,
        figures=figures,
    )
