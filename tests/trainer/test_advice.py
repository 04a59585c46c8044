"""A run whose embedding or head cannot train by its rate says so while it is young, with the rate that would."""

from dataclasses import replace

import pytest

from polargrad_dist.optim import OptimizerConfig, adamw_rule, muon_rule, polarsgdm_rule, relative_rule
from polargrad_dist.trainer.advice import slow_roles
from polargrad_dist.trainer.config import LoggingConfig
from tests.trainer.toy import rules, settings, trainer

STATS = {"hidden": {"nuclear_norm": 0.07}, "embed": {"nuclear_norm": 2.0}, "head": {"nuclear_norm": 4.0}}


def test_a_rate_far_below_half_over_the_nuclear_norm_is_told_with_the_one_to_try():
    (shared,) = slow_roles(OptimizerConfig(embed=polarsgdm_rule(0.001)), STATS, 50)
    assert shared.startswith("optimizer.embed.lr is 0.001, with which embed and head hardly train")
    assert (
        "times the nuclear norm 4 it is 0.004, expected about 0.5: try 0.12, or scale nuclear_relative"
        in shared
    )
    own = OptimizerConfig(embed=polarsgdm_rule(0.001), head=polarsgdm_rule(0.2))
    (alone,) = slow_roles(own, STATS, 50)
    assert alone.startswith("optimizer.embed.lr is 0.001, with which embed hardly train")
    assert "try 0.25, or " in alone


@pytest.mark.parametrize(("step", "told"), [(39, 0), (40, 1), (100, 1), (101, 0)])
def test_it_is_told_only_between_the_steps_that_the_rule_of_thumb_is_about(step, told):
    assert len(slow_roles(OptimizerConfig(embed=polarsgdm_rule(0.001)), STATS, step)) == told


def test_rates_that_are_near_and_rules_of_another_scale_are_left_alone():
    for embed in (polarsgdm_rule(0.03), adamw_rule(1e-6), muon_rule(1e-6), relative_rule(1e-6)):
        assert slow_roles(OptimizerConfig(embed=embed), STATS, 50) == []


def test_a_run_says_it_once_in_its_log(tmp_path):
    config = settings(
        tmp_path, steps=44, logging=LoggingConfig(every=10, stats_every=2, progress="off"), global_batch=3
    )
    trainer(config, optimizer=replace(rules(), embed=polarsgdm_rule(1e-6))).fit()
    logged = (tmp_path / "log.txt").read_text()
    assert logged.count("WARNING optimizer.embed.lr is 1e-06, with which embed and head hardly train") == 1
