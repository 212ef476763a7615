"""A plan as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightx2v.platform import DeviceInfo
from lightx2v.units import human_bytes


def _component(name: str, part: Mapping[str, Any]) -> list[str]:
    lines = [f"{name:<10} {part['checkpoint']}  ({human_bytes(part['weight_bytes'])} on the device)"]
    counts = Counter((layer["mm_type"], layer["library"], layer["reason"]) for layer in part["layers"])
    for (mm_type, library, reason), count in counts.most_common():
        lines.append(f"{'':<10}   {count:>4} linears  {mm_type}  on {library}: {reason}")
    if part["quantized_at_load"]:
        lines.append(f"{'':<10}   float weights are quantized as they load")
    lines += [f"{'':<10}   the rule '{match}' matched no layer" for match in part["rules_without_match"]]
    return lines


def render(plan: Mapping[str, Any], device: DeviceInfo) -> str:
    """Lines of at most about 120 columns; `plan` is what `Plan.to_json` gives."""
    request, memory = plan["request"], dict(plan["memory"])
    guidance = f"guidance {request['guidance']:g}" if request["cfg"] else "no guidance (one pass a step)"
    solver = f"{request['solver']}, {request['steps']} steps, shift {request['shift']:g}"
    lines = [
        f"{'model':<10} {plan['model_cls']} {plan['task']}, {plan['layout']} layout, {plan['model_path']}",
        f"{'device':<10} {device.torch_name} ({device.name}), {plan['dtype']}, {human_bytes(device.free_memory)} free",
        f"{'video':<10} {request['width']}x{request['height']}, {request['frames']} frames at {request['fps']} fps",
        f"{'sampling':<10} {solver}, {guidance}, seed {request['seed']}",
        f"{'attention':<10} {plan['attention']['backend']}: {plan['attention']['reason']}",
    ]
    for name, part in plan["components"].items():
        lines += _component(name, part)
    on = [name for name, value in plan["features"].items() if value]
    lines.append(f"{'features':<10} {', '.join(on) or 'none'}")
    peak = memory.pop("peak")
    stages = ", ".join(f"{stage} {human_bytes(size)}" for stage, size in memory.items())
    lines.append(f"{'memory':<10} about {human_bytes(peak)} at the peak ({stages})")
    return "\n".join(lines)
