"""A plan as one versioned JSON object, and back. Unknown keys are errors with their path."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loadmaster.errors import UsageError
from loadmaster.plan.types import (
    Alternative,
    AnySettings,
    DevicePlan,
    DoesNotFit,
    DraftModel,
    EngineSettings,
    Plan,
    Prediction,
    TransformersSettings,
    Workload,
)
from loadmaster.schema import SchemaError, from_json, to_json

SCHEMA_VERSION = 1


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON object of a plan; `plan_from_json` gives the plan back."""
    return {
        "schema_version": SCHEMA_VERSION,
        "fits": True,
        "model": {
            "name": plan.model_name,
            "architecture": plan.architecture,
            "quantization": plan.quantization,
            "file_bytes": plan.file_bytes,
            "n_layer": plan.n_layer,
            "files": list(plan.model_files),
            "stamp": plan.model_stamp,
        },
        "machine": plan.machine_name,
        "workload": to_json(plan.workload),
        "devices": [_device_to_json(device) for device in plan.devices],
        "engine": to_json(plan.engine),
        "predicted": to_json(plan.predicted),
        "alternatives": [to_json(alternative) for alternative in plan.alternatives],
        "hints": list(plan.notes),
        **({} if plan.draft is None else {"draft": to_json(plan.draft)}),
    }


def does_not_fit_to_json(refusal: DoesNotFit) -> dict[str, Any]:
    """The JSON object of a refusal: the shortfall per device and the nearest plans that fit."""
    return {
        "schema_version": SCHEMA_VERSION,
        "fits": False,
        "model": {"name": refusal.model_name},
        "workload": to_json(refusal.workload),
        "devices": [_device_to_json(device) for device in refusal.devices],
        "engine": to_json(refusal.engine),
        "shortfall_bytes": {item.device: item.bytes for item in refusal.shortfalls},
        "reason": refusal.reason,
        "alternatives": [to_json(alternative) for alternative in refusal.nearest],
    }


def plan_from_json(value: object) -> Plan:
    """A plan from its JSON object.

    Raises:
        UsageError: another version, a plan that does not fit, an unknown or missing key, a wrong
            type, or totals that are not the sums of their items.
    """
    try:
        return _plan(value)
    except SchemaError as error:
        raise UsageError(
            f"this is not a plan: {error}", hint="write one with `loadmaster plan MODEL --json`"
        ) from error


_KEYS = {
    "schema_version", "fits", "model", "machine", "workload", "devices", "engine", "predicted",
    "alternatives", "hints",
}  # fmt: skip
_MODEL_KEYS = {"name", "architecture", "quantization", "file_bytes", "n_layer", "files", "stamp"}


def _plan(value: object) -> Plan:
    document = _object(value, "plan", None)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaError(f"schema_version is {version!r}, not {SCHEMA_VERSION}")
    if document.get("fits") is not True:
        raise SchemaError("fits is not true: a plan that does not fit cannot be run")
    document = _object(value, "plan", _KEYS | {"draft"} if "draft" in document else _KEYS)
    model = _object(document["model"], "model", _MODEL_KEYS)
    draft = document.get("draft")
    return Plan(
        model_name=from_json(str, model["name"]),
        architecture=from_json(str, model["architecture"]),
        quantization=from_json(str, model["quantization"]),
        model_files=from_json(tuple[str, ...], model["files"]),
        model_stamp=from_json(str, model["stamp"]),
        file_bytes=from_json(int, model["file_bytes"]),  # type: ignore[arg-type]
        n_layer=from_json(int, model["n_layer"]),
        machine_name=from_json(str, document["machine"]),
        workload=from_json(Workload, document["workload"]),
        engine=_engine(document["engine"]),
        devices=_devices(document["devices"]),
        predicted=from_json(Prediction, document["predicted"]),
        notes=from_json(tuple[str, ...], document["hints"]),
        alternatives=from_json(tuple[Alternative, ...], document["alternatives"]),
        draft=None if draft is None else from_json(DraftModel, draft),
    )


def _engine(value: object) -> AnySettings:
    """Of either engine: a device map is transformers' alone."""
    if isinstance(value, dict) and "device_map" in value:
        return from_json(TransformersSettings, value)
    return from_json(EngineSettings, value)


def _object(value: object, place: str, keys: set[str] | None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(f"{place}: {type(value).__name__}, not an object")
    if keys is not None:
        if unknown := value.keys() - keys:
            raise SchemaError(f"{place}.{min(unknown)}: unknown key")
        if missing := keys - value.keys():
            raise SchemaError(f"{place}.{min(missing)}: missing")
    return value


def _device_to_json(device: DevicePlan) -> dict[str, Any]:
    value = to_json(replace(device, items=()))
    assert isinstance(value, dict)
    value["planned_bytes"] = device.planned_bytes
    items = [to_json(item) for item in device.items]
    value["items"] = [{k: v for k, v in _pairs(item) if k != "device"} for item in items]
    return value


def _pairs(value: object) -> list[tuple[str, object]]:
    assert isinstance(value, dict)
    return list(value.items())


def _devices(value: object) -> tuple[DevicePlan, ...]:
    if not isinstance(value, list):
        raise SchemaError(f"devices: {type(value).__name__}, not a list")
    return tuple(_device(item, f"devices[{index}]") for index, item in enumerate(value))


def _device(value: object, place: str) -> DevicePlan:
    fields = dict(_object(value, place, None))
    planned = fields.pop("planned_bytes", None)
    items = fields.get("items")
    if isinstance(items, list):
        fields["items"] = [
            {**_object(item, f"{place}.items", None), "device": fields.get("id")} for item in items
        ]
    device = from_json(DevicePlan, fields)
    if planned != device.planned_bytes:
        raise SchemaError(
            f"{place}.planned_bytes is {planned}, items sum to {device.planned_bytes}"
        )
    return device
