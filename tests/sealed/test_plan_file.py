"""A plan in a file: the same again, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from encoders import small
from privtuner.ckks import Parameters
from privtuner.sealed import SealedModel
from privtuner.sealed import model as models
from privtuner.sealed.model import model_digest
from privtuner.sealed.plan import holds
from privtuner.sealed.plan_file import read_plan, write_plan


@pytest.fixture
def saved(tmp_path):
    case = small()
    path, digest = tmp_path / "plan.json", model_digest(case.weights, case.domains)
    write_plan(path, case.model.plan, digest)
    return case, path, digest


def test_a_model_of_a_plan_that_was_read_is_the_same_and_plans_nothing(saved, monkeypatch):
    case, path, digest = saved
    plan = read_plan(path, digest, case.model.parameters)
    monkeypatch.setattr(models, "make_plan", None)
    again = SealedModel(case.weights, case.domains, case.model.parameters, plan=plan)
    assert again.public.to_bytes() == case.model.public.to_bytes()
    ours, theirs = (replace(p, pooled=None) for p in (again.plan, case.model.plan))
    assert ours == theirs
    assert str(again.plan) == str(case.model.plan)


def test_no_plan_is_read_that_is_another_models_or_damaged(saved, tmp_path):
    case, path, digest = saved
    parameters = case.model.parameters
    assert read_plan(path, bytes(32), parameters) is None
    assert read_plan(path, digest, Parameters.INSECURE(11, ring_dimension=1024)) is None
    assert read_plan(tmp_path / "none", digest, parameters) is None
    text = path.read_text()
    for wrong in ("", "{}", "[" * 100_000, text[:-9], text.replace('"key_bytes": ', '"key_bytes": 1')):
        path.write_text(wrong)
        assert read_plan(path, digest, parameters) is None


def test_a_plan_that_the_circuits_do_not_follow_is_made_again(saved):
    case = saved[0]
    plan, model = case.model.plan, case.model
    assert holds(plan, model.encoder, model.parameters)
    point, level = next(iter(plan.forward.levels.items()))
    for levels in ({**plan.forward.levels, point: level - 1}, {}):
        other = replace(plan, forward=replace(plan.forward, levels=levels))
        assert not holds(other, model.encoder, model.parameters)
        again = SealedModel(case.weights, case.domains, model.parameters, plan=other)
        assert again.public.id == model.public.id
    assert not holds(replace(plan, backward=None), model.encoder, model.parameters)
