"""The paper's figures as transcribed agree with each other where the paper says the same thing twice."""

from __future__ import annotations

import statistics

import pytest

from iwm.evaluation import paper_results


def test_gains_in_brackets_are_those_that_were_printed() -> None:
    gains = {(row.method, row.epochs): row.gain for row in paper_results.TABLE_S1 if row.gain is not None}
    assert gains == {
        ("MAE", 300): 0.3,
        ("MAE", 600): 0.2,
        ("MAE", 1600): 0.1,
        (paper_results.IJEPA, 300): 0.9,
        (paper_results.IWM_INV, 300): 0.8,
        ("IWM-Equi 12×384", 300): 1.4,
        (paper_results.IWM_EQUI, 300): 1.8,
    }
    assert [(row.method, row.epochs) for row in paper_results.TABLE_4] == [
        ("MAE", 300),
        ("MAE", 1600),
        (paper_results.IJEPA, 300),
        (paper_results.IWM_INV, 300),
        (paper_results.IWM_EQUI, 300),
    ]


def test_peaks_are_the_best_of_the_other_tables() -> None:
    """But for I-JEPA with any protocol, where the paper prints the value of end-to-end finetuning."""
    probes = {(row.method, row.epochs): [row.linear, row.attentive] for row in paper_results.TABLE_8}
    tuned = {(row.method, row.epochs): row for row in paper_results.TABLE_S1}
    for peak in paper_results.TABLE_5:
        row = tuned[peak.method, peak.epochs]
        frozen = [*probes.get((peak.method, peak.epochs), []), row.random, row.pretrained]
        assert peak.frozen == max(value for value in frozen if value is not None)
        opened = [row.encoder, row.end_to_end] if peak.method != paper_results.IJEPA else [row.end_to_end]
        assert peak.any_protocol == max(value for value in (*opened, peak.frozen) if value is not None)


def test_differences_and_averages_are_those_of_the_rows() -> None:
    tasks = {name: row for name, row in paper_results.TABLE_7.items() if name != "Average"}
    for row in paper_results.TABLE_7.values():
        assert row.difference == pytest.approx(row.multi - row.single)
    average = paper_results.TABLE_7["Average"]
    assert average.single == pytest.approx(statistics.mean(row.single for row in tasks.values()), abs=0.051)
    assert average.multi == pytest.approx(statistics.mean(row.multi for row in tasks.values()), abs=0.051)
    best = [top1 for top1, _ in paper_results.TABLE_3.values()]
    for (top1, gap), before in zip(list(paper_results.TABLE_3.values())[1:], best, strict=False):
        assert top1 - before == pytest.approx(gap)


def test_tables_of_the_same_settings_agree() -> None:
    s3 = [paper_results.TABLE_S3[task] for task in ((False, False, False), (False, True, False), (True, True, False))]
    assert s3 == [top1 for top1, _ in paper_results.TABLE_3.values()][:3]
    imagenet = {row.method: row.attentive for row in paper_results.TABLE_8 if row.epochs == 300}
    assert all(row["ImageNet"] == imagenet[method] for method, row in paper_results.TABLE_S5.items())
