"""Tables are joined by what they are of; ratios are those of the rounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speed.joining import BEST, REFERENCES, Ratio, best_peer, entries, join
from speed.parts import CHECKPOINTS, FRAMEWORKS, GROWING, QUICK, parts
from timing import Table


def table(kind, of, rounds, base=None, *, absent=(), columns=(), unmeasured=()):
    """Figures as the benchmarks write them."""
    out = Table(kind, rounds, base, absent=dict(absent), about={"kind": kind, "of": of})
    out.unmeasured |= dict(unmeasured)
    for heading, values in dict(columns).items():
        out.column(heading, values, "{}")
    return out.figures()


KEEP, SKIP = 'swa_torch, nonfinite="keep"', 'swa_torch, nonfinite="skip"'
SNAPSHOT = table(
    "snapshot",
    "resnet50, float32",
    {
        "C loop": [1.0, 1.0, 2.0],
        KEEP: [1.0, 2.0, 4.0],
        SKIP: [3.0, 3.0, 6.0],
        "AveragedModel": [8.0, 8.0, 8.0],
        "torch-ema": [2.0, 4.0, 4.0],
        "narrow": [1.0, 1.0, 1.0],
    },
    "C loop",
    absent={"timm ModelEmaV3": "NOT INSTALLED: timm"},
    columns={
        "average": {"narrow": "bfloat16", "torch-ema": "float32"},
        "holds": {KEEP: 1.0, "torch-ema": 1.25},
        "+ peak": {KEEP: 0.0},
    },
    unmeasured={SKIP: "memory: needs Linux"},
)
TRAINING = table(
    "training",
    "Adam, 8.4 M",
    {
        "plain training": [10.0, 10.0, 10.0],
        "swa_torch, never due": [10.0, 10.0, 10.0],
        "swa_torch, every 10th": [11.0, 11.0, 11.0],
        KEEP: [12.0, 12.0, 12.0],
        "torch-ema": [15.0, 15.0, 15.0],
    },
    "plain training",
)
SGD = table("training", "SGD, 8.4 M", {"plain training": [1.0] * 3, KEEP: [9.0] * 3})
SKIPPED = table(
    "skipped",
    "resnet50",
    {"the bare optimizer's step": [1.0] * 3, "swa_torch": [2.0] * 3, "torch-ema": [3.0] * 3},
    "the bare optimizer's step",
    columns={"us more": {"the bare optimizer's step": 0.0, "swa_torch": 0.5, "torch-ema": 8.0}},
)
TABLES = [
    table("snapshot", "resnet50, bfloat16", {KEEP: [1.0] * 3, "C loop": [1.0] * 3}, "C loop"),
    SGD,
    SNAPSHOT,
    TRAINING,
    SKIPPED,
]


@pytest.fixture
def rows():
    return {row.who: row for row in join("torch", TABLES)}


def test_a_row_has_what_every_table_says_of_it(rows):
    keep = rows[KEEP]
    assert keep.training == (1.2, 1.2, 1.2)
    assert keep.snapshot == (1.0, 2.0, 2.0)
    assert keep.best == (0.5, 0.5, 1.0)  # to torch-ema, round by round
    assert (keep.held, keep.peak, keep.skipped) == (1.0, 0.0, 0.5)
    assert keep.missing == []
    ema = rows["torch-ema"]
    assert ema.is_best
    assert ema.best is None
    assert (ema.held, ema.peak, ema.skipped) == (1.25, None, 8.0)
    assert ema.training.median == 1.5


def test_what_was_not_measured_is_none_and_has_its_reason(rows):
    assert rows[SKIP].training is None
    assert rows[SKIP].held is None
    assert rows[SKIP].missing == ["memory: needs Linux"]
    assert rows["timm ModelEmaV3"].missing == ["NOT INSTALLED: timm"]
    assert rows["timm ModelEmaV3"].snapshot is None


def test_who_averages_nothing_or_seldom_has_no_row_and_ours_stand_first(rows):
    assert list(rows) == [KEEP, SKIP, "AveragedModel", "torch-ema", "narrow", "timm ModelEmaV3"]


def test_a_narrow_average_is_not_the_best_peer_however_fast():
    assert best_peer(SNAPSHOT, KEEP) == "torch-ema"


def test_peers_are_those_that_average_as_often():
    rounds = {"where, every 10th": [1.0] * 3, "by hand": [2.0] * 3}
    rounds |= {"swa_optax.swa, every 10th, keep": [3.0] * 3, "without averaging": [0.5] * 3}
    found = table("training", "SGD", rounds, "without averaging")
    assert best_peer(found, "swa_optax.swa, every 10th, keep") == "where, every 10th"
    assert best_peer(found, "swa_optax.swa, every update, keep") == "by hand"
    assert best_peer(found, "swa_optax.swa, never due, keep") is None


def test_without_a_loop_in_c_nothing_is_said_to_be_its_ratio():
    without = table(
        "snapshot", "resnet50, float32", {KEEP: [2.0] * 3, "torch-ema": [1.0] * 3},
        absent={"C loop": "no C compiler"},
    )  # fmt: skip
    rows = {row.who: row for row in join("torch", [without])}
    assert rows[KEEP].snapshot is None
    assert rows[KEEP].best.median == 2.0
    assert rows["C loop"].missing == ["no C compiler"]


def test_every_ratio_is_an_entry():
    found = {entry.key: entry.ratio for entry in entries("torch", TABLES)}
    about = f"torch | snapshot | resnet50, float32 | {KEEP}"
    assert found[f"{about} | C loop"] == (1.0, 2.0, 2.0)
    assert found[f"{about} | {BEST}"] == (0.5, 0.5, 1.0)
    assert len(found) == len(entries("torch", TABLES))  # no key twice
    never = "torch | training | Adam, 8.4 M | swa_torch, never due"
    assert f"{never} | plain training" in found
    assert f"{never} | {BEST}" not in found


def test_names_of_one_contender_in_different_tables_are_one_row():
    snapshot = table("snapshot", "200 tensors, float32", {"swa_optax.swa, keep": [1.0] * 3})
    training = table(
        "training",
        "Adam, 8.4 M",
        {"without averaging": [1.0] * 3, "swa_optax.swa, every update, keep": [2.0] * 3},
        "without averaging",
        columns={"holds": {"swa_optax.swa, every update, keep": 1.0}},
    )
    (row,) = join("optax", [snapshot, training])
    assert (row.who, row.training.median, row.held) == ("swa_optax.swa, keep", 2.0, 1.0)


ROUNDS = st.lists(st.integers(1, 64), min_size=3, max_size=3)


@given(ROUNDS, ROUNDS, st.sampled_from([0.25, 2.0, 8.0]))
def test_ratios_do_not_depend_on_the_speed_of_the_machine(ours, theirs, speed):
    def ratios(factor):
        rounds = {"C loop": theirs, KEEP: ours, "torch-ema": theirs}
        rounds = {who: [factor * value for value in values] for who, values in rounds.items()}
        found = entries("torch", [table("snapshot", "x", rounds, "C loop")])
        return [(entry.key, entry.ratio) for entry in found]

    assert ratios(1.0) == ratios(speed)


@given(ROUNDS, ROUNDS)
def test_quartiles_are_in_order(ours, theirs):
    rounds = {"C loop": theirs, KEEP: ours, "torch-ema": theirs}
    for entry in entries("torch", [table("snapshot", "x", rounds, "C loop")]):
        assert entry.ratio.low <= entry.ratio.median <= entry.ratio.high


def test_every_part_can_be_joined():
    everything = parts([*FRAMEWORKS, CHECKPOINTS], list(FRAMEWORKS), quick=False)
    assert {part.name for part in everything} == REFERENCES.keys()
    assert len({part.title for part in everything}) == len(everything)
    assert set(QUICK) | set(GROWING) <= set(FRAMEWORKS)


def test_memory_of_checkpoints_is_in_copies_of_one():
    rounds = {"cat of the same files": [1.0] * 2, "swa average": [4.0] * 2, "load all": [8.0] * 2}
    found = table("checkpoints", "float32", rounds, "cat of the same files",
                  columns={"beyond": {"swa average": 50.0}})  # fmt: skip
    row, other = join("checkpoints", [{**found, "MB": 500.0}])
    assert (row.who, row.snapshot.median, row.best.median, row.peak) == ("swa average", 4, 0.5, 0.1)
    assert other.is_best
    assert Ratio(1, 2, 3).text() == "2.00 (1.00-3.00)"


def test_the_last_table_of_what_is_asked_for_is_taken():
    def of(what, seconds):
        rounds = {"cat of the same files": [1.0] * 2, "swa average": [seconds] * 2}
        return {**table("checkpoints", what, rounds, "cat of the same files"), "MB": 1.0}

    tables = [of("float32, ours alone", 2.0), of("float32", 3.0), of("bfloat16", 4.0)]
    (row,) = join("checkpoints", tables)
    assert row.snapshot.median == 3.0
