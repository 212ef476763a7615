"""A plan as text for people."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightx2v.platform import DeviceInfo
from lightx2v.units import human_bytes


def plan_hash(content: dict[str, Any]) -> str:
    """Twelve hex digits of a plan's `to_json`, that two runs share when all that decides their result is the same."""
    for part in content["components"].values():
        for layer in part["layers"]:
            del layer["reason"]  # it has measured times in it
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _component(name: str, part: Mapping[str, Any]) -> list[str]:
    lines = [f"{name:<10} {part['checkpoint']}  ({human_bytes(part['weight_bytes'])} on the device)"]
    counts = Counter((layer["mm_type"], layer["library"], layer["reason"]) for layer in part["layers"])
    for (mm_type, library, reason), count in counts.most_common():
        lines.append(f"{'':<10}   {count:>4} linears  {mm_type}  on {library}: {reason}")
    if part["quantized_at_load"]:
        lines.append(f"{'':<10}   float weights are quantized as they load")
    lines += [f"{'':<10}   the rule '{match}' matched no layer" for match in part["rules_without_match"]]
    return lines


def _attention(policy: Mapping[str, Any]) -> list[str]:
    """A line for each backend and where it computes."""
    lines = []
    for name, reason in policy["why"].items():
        where = [row for row in policy["where"] if row["backend"] == name]
        spans = dict.fromkeys(f"{row['part']} of blocks {row['layers']} in steps {row['steps']}" for row in where)
        places = f" for {', '.join(spans)}" if len(policy["why"]) > 1 else ""
        lines.append(f"{'attention':<10} {name}{places}: {reason}")
    return lines + [f"{'':<10} {unused}" for unused in policy["unused_rules"]]


def _features(features: Mapping[str, Any]) -> str:
    found = [f"cache {features['cache']}"] if features.get("cache") else []
    found += [f"LoRA {lora['name']} x {lora['strength']:g}" for lora in features.get("lora") or ()]
    if moved := features.get("offload"):
        found.append(f"offload: {moved['reason']} ({human_bytes(moved['host_bytes'])} on the host)")
    if vae := features.get("vae"):
        settings = (name if value is True else f"{name} {value}" for name, value in vae.items())
        found.append(f"vae: {' and '.join(settings)}")
    return ", ".join(found + [name for name, value in features.items() if value is True]) or "none"


def render(plan: Mapping[str, Any], device: DeviceInfo) -> str:
    """Lines of at most about 120 columns; `plan` is what `Plan.to_json` gives."""
    request, memory = plan["request"], dict(plan["memory"])
    embedded = request.get("embedded_guidance")
    scale = request["true_guidance"] if embedded else request["guidance"]
    guidance = f"guidance {scale:g}" if request["cfg"] else "no guidance (one pass a step)"
    if embedded:
        guidance = f"embedded guidance {request['guidance']:g}, {guidance.replace('no guidance', 'no other')}"
    shift = "shift by size" if request["shift"] is None else f"shift {request['shift']:g}"
    solver = f"{request['solver']}, {request['steps']} steps, {shift}"
    length = "an image" if request["frames"] == 1 else f"{request['frames']} frames at {request['fps']} fps"
    lines = [
        f"{'model':<10} {plan['model_cls']} {plan['task']}, {plan['layout']} layout, {plan['model_path']}",
        f"{'device':<10} {device.torch_name} ({device.name}), {plan['dtype']}, {human_bytes(device.free_memory)} free",
        f"{'result':<10} {request['width']}x{request['height']}, {length}",
        f"{'sampling':<10} {solver}, {guidance}, seed {request['seed']}",
        *_attention(plan["attention"]),
    ]
    for name, part in plan["components"].items():
        lines += _component(name, part)
    lines.append(f"{'features':<10} {_features(plan['features'])}")
    peak = memory.pop("peak")
    stages = ", ".join(f"{stage} {human_bytes(size)}" for stage, size in memory.items())
    lines.append(f"{'memory':<10} about {human_bytes(peak)} at the peak ({stages})")
    return "\n".join(lines)
