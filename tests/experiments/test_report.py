"""The page says what the results say: on results whose answers are known."""

import copy

import pytest
from experiments import report

EFFECTS = {"last": 0.0, "swa": -1.0, "swa + update_bn": 2.0, "ema": 0.5, "ema + update_bn": 1.0}
# Noise of the seeds, which pairs cancel.
NOISE = [0.3, -0.2, 0.1, 0.4, -0.5, 0.0]


def arm(looks, noise, names, snapshots=None):
    score = {
        name: {"accuracy": 90 + noise + EFFECTS[name], "nll": 0.5 - EFFECTS[name] / 10, "ece": 2.0}
        for name in names
    }
    curve = {str(look): {"last": 10.0} for look in looks}
    scores = {str(look): score for look in looks}
    return {"scores": scores, "curve": curve, "snapshots": snapshots or {}, "seconds": 1.0}


@pytest.fixture
def results():
    seeds = {}
    for seed, noise in enumerate(NOISE):
        seeds[str(seed)] = {
            "annealed": arm([8], noise, ["last", "ema", "ema + update_bn"]),
            "annealed 1.25": arm([10], noise, ["last"]),
            "constant": arm([8, 10], noise, list(EFFECTS), {"swa": [12, 14, 16, 18, 20]}),
            "cyclical": arm([8], noise, ["last", "swa", "swa + update_bn"], {"swa": [12, 14, 16]}),
        }
    experiment = {
        "name": "mine", "dataset": "digits", "network": "vgg-small", "train_images": 200,
        "test_images": 200, "epochs": 8, "batch_size": 100, "rate": 0.1, "swa_rate": 0.05,
        "cycle_high": 0.05, "cycle_low": 0.01, "momentum": 0.9, "weight_decay": 0.0,
        "ema_decay": 0.9, "swa": {"start": "75%", "every": "1ep"},
    }  # fmt: skip
    return {
        "command": "python benchmarks/experiment.py mine",
        "machine": {"cpu": "a", "cores": 2, "python": "3", "versions": {"numpy": "2"}},
        "experiment": experiment,
        "seeds": list(range(len(NOISE))),
        "frameworks": {"torch": seeds, "jax": copy.deepcopy(seeds)},
    }


def row(table, title):
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {title} |"))
    return line


def test_a_sure_difference_is_bold_with_its_interval(results):
    line = row(report.differences(results, "accuracy"), "SWA against its own last weights")
    # 2 for every seed; of 64 sign patterns two are as far from 0.
    assert line.count("**+2.000 [+2.000, +2.000], p = 0.031**") == 2


def test_a_difference_within_noise_is_not_bold(results):
    for seed, sign in zip(results["seeds"], [1, -1, 1, -1, 1, -1], strict=True):
        seeds = results["frameworks"]["torch"]
        seeds[str(seed)]["annealed"]["scores"]["8"]["last"]["accuracy"] = 92 + NOISE[seed] + sign
    line = row(report.differences(results, "accuracy"), "SWA against annealed SGD, equal budget")
    torch, jax = line.split("|")[2:4]
    assert "**" not in torch
    assert "**" in jax


def test_means_and_deviations(results):
    line = row(report.scores(results, "jax"), "SWA, constant + update_bn")
    assert "92.02 ± 0.33 | 0.3000 ± 0.0000 | 2.00 ± 0.00" in line


def test_frameworks_that_agree_are_said_to(results):
    text = report.agreement(results)
    assert "the same in every framework and seed" in text
    assert (
        "SWA against its own last weights: of the same sign in all; the intervals overlap" in text
    )
    assert "SWA cyclical against constant: within noise in every one" in text


def test_other_snapshots_are_said(results):
    results["frameworks"]["jax"]["3"]["constant"]["snapshots"]["swa"] = [13, 14, 16, 18, 20]
    assert "**they differ**" in report.agreement(results)


def test_snapshots_that_differ_by_seed_alone_are_said(results):
    for seeds in results["frameworks"].values():
        seeds["3"]["constant"]["snapshots"]["swa"] = [13, 14, 16, 18, 20]
    assert "**they differ**" in report.agreement(results)


def test_opposite_effects_are_said(results):
    for seed in results["frameworks"]["jax"].values():
        seed["constant"]["scores"]["8"]["last"]["nll"] = 0.1
    text = report.agreement(results)
    line = next(line for line in text.splitlines() if "its own last weights" in line)
    assert "of different signs" in line
    assert "do not overlap" in line


def test_the_page_and_its_picture_are_written(results, tmp_path):
    text = report.write(results, tmp_path)
    assert (tmp_path / "averaging-mine.md").read_text() == text
    assert (tmp_path / "averaging-mine.png").stat().st_size > 5000
    assert "0.0312 with 6 seeds" in text
