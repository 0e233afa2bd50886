from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from core.configs import configs, faults_of
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import MissingMandatoryValue, OmegaConf

from swa_core import EMA, ConfigError, LearningRate, LRSchedule, Schedule, SWAConfig

FORMS = 'Say "160ep" (epochs), "160step" (updates) or a share such as "75%".'
RULE_FORMS = 'expected "uniform" or a table such as { name = "ema", decay = 0.999 }'
MISSING = {
    "total_steps": "is a share of the training, so total_steps is needed (updates in all: epochs * "
    "steps_per_epoch).",
    "steps_per_epoch": "is counted in epochs, so steps_per_epoch is needed (updates per epoch: "
    "len(loader) // accumulation).",
}


# Messages


def test_the_example_of_the_design():
    with pytest.raises(ConfigError) as caught:
        SWAConfig.from_dict({"start": 160, "evry": "1ep"}, source="swa.toml")
    assert str(caught.value) == (
        "2 faults in swa.toml\n"
        '  swa.start: 160 has no unit. Say "160ep" (epochs), "160step" (updates) or a share such '
        'as "75%".\n'
        '  swa.evry: unknown key. Did you mean "every"?'
    )


def test_every_fault_is_reported_at_once_in_the_order_of_the_table():
    found = faults_of(
        SWAConfig.from_dict,
        {
            "nonfinite": "drop",
            "lr": {
                "shape": "square",
                "valu": 3,
                "value": "0.05",
                "anneal": "5",
                "low": 0.1,
            },
            "strt": "75%",
            "rule": {"decay": "0.9", "name": "ema", "eta": 3},
            "stop": "200%",
            "every": "0ep",
            "start": None,
        },
    )
    assert found == [
        ("swa.nonfinite", 'expected "skip" or "keep", got \'drop\'.'),
        ("swa.lr.shape", 'expected "cosine" or "linear", got \'square\'.'),
        ("swa.lr.valu", 'unknown key. Did you mean "value"?'),
        ("swa.lr.value", "expected a number > 0, got '0.05'."),
        (
            "swa.lr.anneal",
            '"5" has no unit. Say "5ep" (epochs), "5step" (updates) or a share such as "75%".',
        ),
        ("swa.lr.low", "is for cyclical rates: say cycle too, or leave it out."),
        ("swa.strt", 'unknown key. Did you mean "start"?'),
        ("swa.rule.decay", "expected a number, got '0.9'."),
        ("swa.rule.eta", "unknown key. Known are name, decay, half_life."),
        ("swa.stop", "'200%' is more than the whole training. Say \"100%\" or less."),
        ("swa.every", '\'0ep\' must be more than 0, for example "1ep" or "1step".'),
        ("swa.start", f"expected a time, got None. {FORMS}"),
    ]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"every": "0%"}, [("every", "'0%' must be more than 0")]),
        ({"every": "0step"}, [("every", "'0step' must be more than 0")]),
        ({"every": 0}, [("every", '0 has no unit. Say "0ep"')]),
        ({"every": None}, [("every", "expected a time, got None")]),
        ({"start": True}, [("start", "expected a time, got True")]),
        ({"xyz": 1}, [("xyz", "unknown key. Known are start, every, stop, rule, lr, nonfinite.")]),
        ({3: 1}, [("3", "unknown key. Known are")]),
        ({"Start": "1ep"}, [("Start", 'unknown key. Did you mean "start"?')]),
        ({"rule": 5}, [("rule", f"{RULE_FORMS}, got 5.")]),
        ({"rule": None}, [("rule", f"{RULE_FORMS}, got None.")]),
        ({"rule": ["ema"]}, [("rule", f"{RULE_FORMS}, got ['ema'].")]),
        ({"rule": {"decay": 0.9}}, [("rule", f"{RULE_FORMS}, got {{'decay': 0.9}}.")]),
        ({"rule": {"name": 3}}, [("rule", f"{RULE_FORMS}, got {{'name': 3}}.")]),
        ({"rule": EMA}, [("rule", RULE_FORMS)]),
        ({"rule": "emma"}, [("rule", 'unknown rule "emma". Did you mean "ema"?')]),
        ({"rule": "swa"}, [("rule", 'unknown rule "swa". Known are uniform, ema, polynomial.')]),
        ({"rule": "ema"}, [("rule", "say either decay or half_life, and not both.")]),
        (
            {"rule": {"name": "ema", "decay": 1}},
            [("rule", 'decay must lie between 0 and 1, got 1.0 (1 would be the rule "uniform").')],
        ),
        (
            {"rule": {"name": "ema", "decay": math.nan}},
            [("rule", "decay must lie between 0 and 1, got nan")],
        ),
        (
            {"rule": {"name": "polynomial", "eta": None, "etha": 3}},
            [
                ("rule.eta", "expected a number, got None."),
                ("rule.etha", 'unknown key. Did you mean "eta"?'),
            ],
        ),
        (
            {"rule": {"name": "polynomial", "eta": True}},
            [("rule.eta", "expected a number, got True.")],
        ),
        ({"lr": 0.05}, [("lr", "expected a table such as { value = 0.05 }, got 0.05.")]),
        ({"lr": "0.05"}, [("lr", "expected a table such as { value = 0.05 }, got '0.05'.")]),
        ({"lr": {}}, [("lr.value", "is missing: the rate to reach, a number > 0.")]),
        ({"lr": {"value": None}}, [("lr.value", "expected a number > 0, got None.")]),
        ({"lr": {"value": 0}}, [("lr.value", "expected a number > 0, got 0.")]),
        ({"lr": {"value": -1}}, [("lr.value", "expected a number > 0, got -1.")]),
        ({"lr": {"value": math.nan}}, [("lr.value", "expected a number > 0, got nan.")]),
        ({"lr": {"value": math.inf}}, [("lr.value", "expected a number > 0, got inf.")]),
        ({"lr": {"value": True}}, [("lr.value", "expected a number > 0, got True.")]),
        (
            {"lr": {"value": 1, "shape": None}},
            [("lr.shape", 'expected "cosine" or "linear", got None.')],
        ),
        (
            {"lr": {"value": 1, "shape": ["cosine"]}},
            [("lr.shape", 'expected "cosine" or "linear", got [\'cosine\'].')],
        ),
        ({"lr": {"value": 1, "cycle": "2ep"}}, [("lr.low", "is missing: the rate at the end of")]),
        (
            {"lr": {"value": 1, "cycle": "2ep", "low": None}},
            [("lr.low", "is missing: the rate at the end of")],
        ),
        ({"lr": {"value": 1, "low": 0.5}}, [("lr.low", "is for cyclical rates")]),
        (
            {"lr": {"value": 1, "cycle": "0ep", "low": 2}},
            [
                ("lr.cycle", "'0ep' must be more than 0"),
                ("lr.low", "must not lie above value (1)."),
            ],
        ),
        (
            {"lr": {"value": 1, "cycle": "1ep", "low": 0}},
            [("lr.low", "expected a number > 0, got 0.")],
        ),
        (
            {"lr": {"value": 1, "cycle": "1ep", "low": 1, "anneal": "1ep"}},
            [("lr.cycle", "say either anneal or cycle, and not both.")],
        ),
        ({"lr": {"value": 1, "anneal": 5}}, [("lr.anneal", "5 has no unit")]),
        ({"nonfinite": None}, [("nonfinite", 'expected "skip" or "keep", got None.')]),
        ({"nonfinite": np.ones(2)}, [("nonfinite", 'expected "skip" or "keep", got array')]),
    ],
)
def test_faults(table, expected):
    found = faults_of(SWAConfig.from_dict, table)
    assert [path for path, _ in found] == [f"swa.{path}" for path, _ in expected]
    for (_, message), (_, beginning) in zip(found, expected, strict=True):
        assert message.startswith(beginning)


@pytest.mark.parametrize("table", [None, 5, "start = 75%", ["start"], [("start", "75%")]])
def test_what_is_no_table_is_refused(table):
    assert faults_of(SWAConfig.from_dict, table) == [("swa", f"expected a table, got {table!r}.")]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"start": 160, "every": "0ep"}, ["swa.start", "swa.every"]),
        ({"rule": 0.9, "lr": 0.05, "nonfinite": "no"}, ["swa.rule", "swa.lr", "swa.nonfinite"]),
        ({"lr": LearningRate(value=-1, low=0.1)}, ["swa.lr.value", "swa.lr.low"]),
        ({"lr": LearningRate(value=1, shape=None)}, ["swa.lr.shape"]),
        ({"stop": 5}, ["swa.stop"]),
    ],
)
def test_the_constructor_reports_every_fault_too(fields, expected):
    assert [path for path, _ in faults_of(SWAConfig, **fields)] == expected
    config = SWAConfig()
    assert [path for path, _ in faults_of(dataclasses.replace, config, **fields)] == expected


def test_the_constructor_takes_objects_and_says_so():
    assert faults_of(SWAConfig, rule="uniform", lr={"value": 1}) == [
        (
            "swa.rule",
            "expected Uniform(), EMA(...) or Polynomial(...), got 'uniform'. SWAConfig.from_dict "
            "reads such.",
        ),
        (
            "swa.lr",
            "expected LearningRate(...) or None, got {'value': 1}. SWAConfig.from_dict reads such.",
        ),
    ]


def test_a_rule_of_ones_own_is_refused():
    class Mine(EMA):
        pass

    assert [path for path, _ in faults_of(SWAConfig, rule=Mine(0.5))] == ["swa.rule"]


@pytest.mark.parametrize("bad", [None, 5, ["75%"], b"swa.toml"])
def test_of_takes_a_configuration_a_mapping_or_a_path(bad):
    with pytest.raises(TypeError, match="expected a SWAConfig, a mapping or the path of a file"):
        SWAConfig.of(bad)
    config = SWAConfig(start="50%")
    assert SWAConfig.of(config) is config
    assert SWAConfig.of({"start": "50%"}) == config


def test_is_a_frozen_value():
    config = SWAConfig(rule=EMA(0.9), lr=LearningRate(value=0.05))
    assert hash(config) == hash(SWAConfig(rule=EMA(0.9), lr=LearningRate(value=0.05)))
    assert eval(repr(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.start = "50%"


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.sampled_from(["start", "every", "stop", "rule", "lr", "nonfinite"])
inner_keys = st.sampled_from(
    ["name", "decay", "half_life", "eta", "value", "anneal", "cycle", "low"]
)
words = st.sampled_from(["75%", "1ep", "ema", "polynomial", "uniform", "cosine", "skip", 0.5, 1])
junk = st.recursive(
    plain | words, lambda inner: st.lists(inner) | st.dictionaries(inner_keys | st.text(), inner)
)


@given(st.dictionaries(keys | st.text(), junk))
def test_anything_is_a_configuration_or_a_config_error(table):
    try:
        config = SWAConfig.from_dict(table)
    except ConfigError:
        return
    assert SWAConfig.from_dict(config.to_dict()) == config


# Round trips


@given(configs)
def test_a_dictionary_keeps_a_configuration(config):
    written = config.to_dict()
    assert SWAConfig.from_dict(written) == config
    assert SWAConfig.from_dict(written).to_dict() == written
    assert SWAConfig.from_dict(OmegaConf.create(written)) == config


@given(configs)
def test_copies_and_pickles(config):
    for clone in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert clone == config
        assert clone.to_dict() == config.to_dict()


@given(configs)
def test_fields_may_be_objects_in_a_mapping(config):
    assert SWAConfig.from_dict(vars(config)) == config


def test_to_dict_is_plain_and_leaves_out_what_says_nothing():
    assert SWAConfig().to_dict() == {
        "start": "75%", "every": "1ep", "rule": "uniform", "nonfinite": "skip"
    }  # fmt: skip
    config = SWAConfig(
        stop="90%",
        rule=EMA(half_life=np.float32(8)),
        lr=LearningRate(value=np.float64(0.05), cycle="2ep", low=np.float32(0.5**6)),
    )
    assert config.to_dict() == {
        "start": "75%",
        "every": "1ep",
        "stop": "90%",
        "rule": {"name": "ema", "half_life": 8.0},
        "nonfinite": "skip",
        "lr": {"value": 0.05, "shape": "cosine", "cycle": "2ep", "low": 0.015625},
    }
    assert list(config.to_dict())[-1] == "lr"
    assert {type(value) for value in config.to_dict()["lr"].values()} == {float, str}


def test_null_says_nothing_where_none_is_the_default():
    table = {
        "stop": None,
        "rule": {"name": "ema", "decay": 0.9, "half_life": None},
        "lr": {"value": 0.05, "anneal": None, "cycle": None, "low": None},
    }
    assert SWAConfig.from_dict(table) == SWAConfig(rule=EMA(0.9), lr=LearningRate(value=0.05))
    assert SWAConfig.from_dict({"lr": None}) == SWAConfig()


# OmegaConf


def test_omegaconf_is_read_with_its_interpolations_and_struct_flag():
    config = OmegaConf.create(
        {
            "rate": 0.05,
            "swa": {
                "start": "50%",
                "rule": {"name": "ema", "decay": 0.9},
                "lr": {"value": "${rate}", "cycle": None},
            },
        }
    )
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    read = SWAConfig.from_dict(config.swa)
    assert read == SWAConfig(start="50%", rule=EMA(0.9), lr=LearningRate(value=0.05))
    assert {type(value) for value in read.to_dict().values()} == {str, dict}
    for table, path in (
        ({"rule": {"decay": 0.9}}, "swa.rule"),
        ({"lr": {"value": 1, "cycle": "1ep"}}, "swa.lr.low"),
        ({"evry": 1}, "swa.evry"),
        ({"start": 160}, "swa.start"),
    ):
        wrong = OmegaConf.create(table)
        OmegaConf.set_struct(wrong, True)
        assert [path for path, _ in faults_of(SWAConfig.from_dict, wrong)] == [path]


def test_a_mandatory_value_of_omegaconf_is_not_replaced_by_the_default():
    with pytest.raises(MissingMandatoryValue, match="start"):
        SWAConfig.from_dict(OmegaConf.create({"start": "???"}))


# The schedule


@pytest.mark.parametrize(
    ("fields", "lengths", "expected"),
    [
        ({}, {"steps_per_epoch": 10, "total_steps": 40}, Schedule(30, 10)),
        ({}, {"steps_per_epoch": 10, "total_steps": 42}, Schedule(40, 10)),
        ({"start": "7%", "every": "1step"}, {"total_steps": 100}, Schedule(7, 1)),
        ({"start": "7%", "every": "1%"}, {"total_steps": 150}, Schedule(11, 2)),
        ({"start": "160ep"}, {"steps_per_epoch": 391}, Schedule(62560, 391)),
        ({"start": "1.5ep", "every": "0.5ep"}, {"steps_per_epoch": 3}, Schedule(5, 2)),
        ({"start": "10step", "every": "4step", "stop": "18step"}, {}, Schedule(10, 4, 18)),
        ({"start": "0ep", "every": "4step"}, {"steps_per_epoch": 9}, Schedule(4, 4)),
        ({"start": "0%"}, {"steps_per_epoch": 5, "total_steps": 50}, Schedule(5, 5)),
        (
            {"start": "50%", "stop": "91%"},
            {"steps_per_epoch": 10, "total_steps": 100},
            Schedule(50, 10, 100),
        ),
        ({"start": "40step", "every": "9step"}, {"total_steps": 40}, Schedule(40, 9)),
        ({"start": "40step", "stop": "40step"}, {"steps_per_epoch": 7}, Schedule(40, 7, 40)),
    ],
)
def test_schedules(fields, lengths, expected):
    schedule = SWAConfig(**fields).schedule(**lengths)
    assert schedule == expected
    assert all(type(number) in (int, type(None)) for number in schedule)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, lambda length: np.array(length)])
def test_lengths_may_be_integers_of_any_kind(kind):
    config = SWAConfig(start="50%", lr=LearningRate(value=0.05, anneal="0.5ep"))
    lengths = {"steps_per_epoch": kind(10), "total_steps": kind(100)}
    assert config.schedule(**lengths) == (50, 10, None)
    numbers = (*config.schedule(**lengths), *config.lr_schedule(**lengths))
    assert not any(isinstance(number, (np.generic, np.ndarray)) for number in numbers)


@pytest.mark.parametrize("bad", [0, -1, True, False, 10.0, np.float32(10), np.True_, "10", [10]])
@pytest.mark.parametrize("ask", [SWAConfig.schedule, SWAConfig.lr_schedule])
def test_other_lengths_are_refused(ask, bad):
    config = SWAConfig(start="1ep", every="1ep")
    assert faults_of(ask, config, steps_per_epoch=bad, total_steps=bad) == [
        (name, f"expected a whole number of updates >= 1, got {bad!r}.")
        for name in ("steps_per_epoch", "total_steps")
    ]


def test_missing_lengths_are_named_all_at_once():
    config = SWAConfig(
        start="75%", every="1ep", stop="9ep", lr=LearningRate(value=0.05, anneal="2ep")
    )
    missing = [
        ("swa.start", f"75% {MISSING['total_steps']}"),
        ("swa.every", f"1ep {MISSING['steps_per_epoch']}"),
        ("swa.stop", f"9ep {MISSING['steps_per_epoch']}"),
    ]
    assert faults_of(config.schedule) == missing
    assert faults_of(config.lr_schedule) == [
        *missing,
        ("swa.lr.anneal", f"2ep {MISSING['steps_per_epoch']}"),
    ]
    with pytest.raises(ConfigError, match=r"^3 faults in the schedule\n  swa\.start: 75%"):
        config.schedule()


def test_each_missing_length_by_itself():
    config = SWAConfig()
    assert faults_of(config.schedule, steps_per_epoch=10) == [
        ("swa.start", f"75% {MISSING['total_steps']}")
    ]
    assert faults_of(config.schedule, total_steps=10) == [
        (
            "swa.start",
            "75% is rounded up to a whole epoch, because swa.every is counted in epochs, so "
            "steps_per_epoch is needed (updates per epoch: len(loader) // accumulation).",
        ),
        ("swa.every", f"1ep {MISSING['steps_per_epoch']}"),
    ]
    assert SWAConfig(start="5step", every="1step").schedule() == (5, 1, None)


def test_a_start_after_the_end_is_refused():
    lengths = {"steps_per_epoch": 10, "total_steps": 100}
    assert faults_of(SWAConfig(start="11ep").schedule, **lengths) == [
        (
            "swa.start",
            "the training ends at update 100, before the first snapshot at 110 (start 11ep, every "
            "1ep). Start sooner.",
        )
    ]
    assert SWAConfig(start="10ep").schedule(**lengths).total(100) == 1
    # A start of 0 means every, so that is what must not lie after the end.
    assert faults_of(SWAConfig(start="0ep", every="11ep").schedule, **lengths) == [
        (
            "swa.start",
            "the training ends at update 100, before the first snapshot at 110 (start 0ep, every "
            "11ep). Start sooner.",
        )
    ]
    # Rounded up to a whole epoch, 75 % of a training of half an epoch is after it.
    assert len(faults_of(SWAConfig().schedule, steps_per_epoch=10, total_steps=5)) == 1


def test_a_stop_before_the_start_is_refused():
    config = SWAConfig(start="50step", every="1step", stop="49step")
    assert faults_of(config.schedule) == [
        (
            "swa.stop",
            "49step is update 49, before the first snapshot at 50 (start 50step, every 1step). "
            "Stop later or start sooner.",
        )
    ]
    assert len(faults_of(config.schedule, total_steps=40)) == 2
    assert dataclasses.replace(config, stop="50step").schedule().total() == 1


@given(configs, st.integers(1, 1000), st.integers(1, 10**5))
def test_a_schedule_holds_a_snapshot_or_is_refused(config, steps_per_epoch, total_steps):
    try:
        schedule = config.schedule(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    except ConfigError:
        return
    assert schedule.total(total_steps) >= 1
    assert schedule.is_snapshot(schedule.first)


# The learning rate


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        (None, None),
        (LearningRate(value=0.05), LRSchedule(20, 0.05)),
        (LearningRate(value=0.05, anneal="0ep"), LRSchedule(20, 0.05)),
        (LearningRate(value=0.05, anneal="2.5ep"), LRSchedule(20, 0.05, 25)),
        (
            LearningRate(value=0.05, anneal="33%", shape="linear"),
            LRSchedule(20, 0.05, 34, "linear"),
        ),
        (
            LearningRate(value=0.05, cycle="5step", low=0.01),
            LRSchedule(20, 0.05, 0, "cosine", 5, 0.01),
        ),
        (LearningRate(value=np.float32(0.5)), LRSchedule(20, 0.5)),
    ],
)
def test_lr_schedules(lr, expected):
    config = SWAConfig(start="2ep", lr=lr)
    resolved = config.lr_schedule(steps_per_epoch=10, total_steps=101)
    assert resolved == expected
    assert resolved is None or type(resolved.value) is float


def test_every_must_be_a_multiple_of_cycle():
    config = SWAConfig(
        start="10step", every="4step", lr=LearningRate(value=0.05, cycle="3step", low=0.01)
    )
    assert config.schedule() == (10, 4, None)
    assert faults_of(config.lr_schedule) == [
        (
            "swa.lr.cycle",
            "3step is 3 updates, and swa.every (4) is no multiple of it, so snapshots would miss "
            "the low end of the cycles. Make swa.every a whole number of cycles.",
        )
    ]
    for cycle in ("1step", "2step", "4step"):
        lr = dataclasses.replace(config.lr, cycle=cycle)
        assert dataclasses.replace(config, lr=lr).lr_schedule().cycle == int(cycle[0])
    lr = dataclasses.replace(config.lr, cycle="8step")
    assert len(faults_of(dataclasses.replace(config, lr=lr).lr_schedule)) == 1


def test_the_learning_rate_counts_from_the_first_snapshot():
    config = SWAConfig(start="0ep", every="1ep", lr=LearningRate(value=0.05))
    assert config.lr_schedule(steps_per_epoch=7).start == 7
