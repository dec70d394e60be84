"""A plan in a file, so that a prepared model is served at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privtuner.ckks import Evaluator, Parameters
from privtuner.sealed.plan import Plan
from privtuner.sealed.public import Keys, Refresh
from privtuner.sealed.schedule import Schedule

__all__ = ["read_plan", "write_plan"]


def write_plan(path: Path, plan: Plan, model: bytes) -> None:
    """Write a plan with a digest of it and of its model.

    Args:
        path: the file.
        plan: of a sealed model.
        model: what stands for its weights and domains, `privtuner.sealed.model.model_digest`.
    """
    content = _plan_to_dict(plan)
    path.write_text(json.dumps({"digest": _digest(content, model), "plan": content}) + "\n", encoding="utf-8")


def read_plan(path: Path, model: bytes, parameters: Parameters) -> Plan | None:
    """Read what `write_plan` wrote.

    Args:
        path: the file.
        model: as there; the plan of another model is none of this one's.
        parameters: of the encryption.

    Returns:
        None where there is no such file, or another model's, or one that is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        content = data["plan"]
        if data["digest"] != _digest(content, model):
            return None
        return _plan_of_dict(content, parameters)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(content: Any, model: bytes) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(b"privtuner plan" + model + text.encode()).hexdigest()


def _plan_to_dict(plan: Plan) -> dict[str, Any]:
    pooled = plan.pooled
    return {
        "parameters": plan.parameters.to_bytes().hex(),
        "forward": _schedule_to_dict(plan.forward),
        "backward": None if plan.backward is None else _schedule_to_dict(plan.backward),
        "kept": dict(plan.kept),
        "pooled": [pooled.shape[1], pooled.bound, pooled.level, float(pooled.noise.max())],
        "keys": list(plan.keys),
        "key_bytes": plan.key_bytes,
        "traffic": plan.traffic,
    }


def _plan_of_dict(content: Mapping[str, Any], parameters: Parameters) -> Plan | None:
    if content["parameters"] != parameters.to_bytes().hex():
        return None
    features, bound, level, noise = content["pooled"]
    ev, back = Evaluator(parameters), content["backward"]
    rotations, conjugation, packing = content["keys"]
    return Plan(
        parameters,
        _schedule_of_dict(content["forward"]),
        None if back is None else _schedule_of_dict(back),
        content["kept"],
        ev.planned(ev.slots, features, bound=bound, level=level, noise=noise),
        Keys(tuple(rotations), conjugation, packing),
        content["key_bytes"],
        tuple((down, up) for down, up in content["traffic"]),
    )


def _schedule_to_dict(schedule: Schedule) -> dict[str, Any]:
    work = [[kind, limbs, amount] for (kind, limbs), amount in schedule.work.items()]
    return {**vars(schedule), "work": work}


def _schedule_of_dict(content: Mapping[str, Any]) -> Schedule:
    fields = dict(content)
    fields["table"] = tuple(tuple(row) for row in content["table"])
    fields["refreshes"] = tuple(Refresh(*row) for row in content["refreshes"])
    fields["work"] = {(kind, limbs): amount for kind, limbs, amount in content["work"]}
    fields["elements"] = tuple(content["elements"])
    return Schedule(**fields)
