"""Models of one pool, made of SmolLM2: two with other weights, one of them with another template; and another
architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tests.engines.vllm.models import KINDS, with_tokenizer

LAYER = "model.layers.3."


def prepare(base: Path, folder: Path) -> dict[str, Path]:
    """Directories by name."""
    found = {"base": base}
    for name, factor in (("tuned", 1.1), ("other-template", 0.9)):
        found[name] = Path(shutil.copytree(base, folder / name))
        for file in found[name].glob("*.safetensors"):
            changed = {
                key: tensor * factor if key.startswith(LAYER) and "proj" in key else tensor
                for key, tensor in load_file(file).items()
            }
            save_file(changed, file, metadata={"format": "pt"})
    _set_template(found["other-template"])
    found["windows"] = with_tokenizer(KINDS["sliding-window"](folder / "windows"))
    return found


def _set_template(directory: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }} says: {{ m['content'] }}\n{% endfor %}assistant says:"
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def toml(
    models: dict[str, Path],
    snapshots: dict[str, Path],
    args: list[str],
    own: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> str:
    """A pool's file; ``own``: settings of some of its models."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    for name, path in models.items():
        lines += [f"[models.{name}]", f"path = {json.dumps(str(path))}", f"args = {json.dumps(args)}"]
        if name in snapshots:
            lines.append(f"snapshot = {json.dumps(str(snapshots[name]))}")
        lines += [f"{key} = {json.dumps(value)}" for key, value in (own or {}).get(name, {}).items()]
    return "\n".join(lines) + "\n"
