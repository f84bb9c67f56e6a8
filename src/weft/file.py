"""The delta file: a safetensors file with one metadata key, `weft`. Specified in docs/format.md.

`read` trusts nothing: the container, the manifest, every reference, every shape, every hash and the id are checked
before a tensor is handed out. `write` streams tensors through one temporary file and is reproducible to the byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from . import canon
from ._write import atomic_file, require_space
from .delta import FORMAT, Delta, Entry, _hash
from .errors import FormatError, InputError
from .ops.spec import Json, _fields, _text, sizes
from .stored import ITEMSIZE, Stored, Tensor, read_container, strict_json

KEY = "weft"
_PENDING = "0" * 64
_FIELDS = {"format", "base", "over", "parents", "recipe", "config", "tied", "entries", "tensors", "id", "notes", "notes_sha256"}


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Large items first, so that every tensor is aligned; then by name."""
    return sorted(tensors, key=lambda key: (-ITEMSIZE[tensors[key].dtype], key))


def container_header(layout: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a safetensors file that holds `layout` in `order`, padded to 8 bytes."""
    header: dict[str, Json] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key in order:
        tensor = layout[key]
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    text = canon.dumps(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sha256(value: Json) -> str:
    return hashlib.sha256(canon.dumps(value)).hexdigest()


def require_name(path: Path) -> None:
    """InputError for a name that `write` would refuse: to ask before the work that leads there."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a delta is one .safetensors file", hint=f"name it {path.with_suffix('.safetensors')}")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")


def write(path: str | Path, delta: Delta) -> str:
    """Write a delta atomically; return its id. Tensors are streamed and hashed on the way, never all in memory.

    The same delta gives the same bytes, whatever the number of threads or the order in which it was built. WeftError if the disk is too
    small, before a tensor is read.
    """
    path = Path(path)
    require_name(path)
    delta.validate()
    stored = {key: tensor.storage for key, tensor in delta.tensors.items()}
    order = _order(stored)
    try:
        parts = {name: canon.encoded(value) for name, value in delta.manifest(hashes=False).items()}  # put into words once, used four times
        notes = canon.encoded(dict(delta.notes))
        listed = {key: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": _PENDING} for key, tensor in stored.items()}

        def head(id: str) -> bytes:
            full = {**parts, "tensors": listed, "id": id, "notes": notes, "notes_sha256": _sha256(notes)}
            return container_header(stored, order, {KEY: canon.dumps(full).decode()})

        draft = head(_PENDING)
    except ValueError as error:
        raise InputError(f"{path}: the manifest cannot be written as JSON: {error}") from None
    with atomic_file(path) as out:
        require_space(path, len(draft) + sum(tensor.nbytes for tensor in stored.values()))
        out.write(draft)
        for key in order:
            digest, count = hashlib.sha256(), 0
            for block in stored[key].blocks():
                digest.update(block)
                out.write(block)
                count += len(block)
            if count != stored[key].nbytes:
                raise InputError(f"{path}: tensor {key!r} gave {count:,} bytes, its shape needs {stored[key].nbytes:,}")
            listed[key]["sha256"] = digest.hexdigest()
        id = _sha256({**parts, "tensors": listed})
        out.seek(0)
        out.write(head(id))
    return id


def read(path: str | Path, *, values: bool = True) -> Delta:
    """Read a delta file and check all of it; FormatError names file, tensor, expected and got.

    `values=False` leaves out the check of numbers that index others (it needs numpy): enough to look at a file whose
    ops will not be applied.
    """
    path = Path(path)
    if path.is_dir():
        kinds = {"adapter_config.json": f"weft import {path} --base BASE -o OUT.safetensors", "config.json": f"weft diff BASE {path} -o OUT.safetensors"}
        hint = next((f"{command} makes a delta of it" for name, command in kinds.items() if (path / name).is_file()), "")
        raise InputError(f"{path} is a folder; a delta is one .safetensors file", hint=hint)
    tensors, metadata = read_container(path)
    if set(metadata) != {KEY}:
        raise FormatError(
            f"{path}: not a weft delta (metadata keys {sorted(metadata) or 'none'}, expected only {KEY!r})",
            hint="`weft import` reads PEFT adapters, `weft diff` makes a delta of a checkpoint",
        )
    text = metadata[KEY]
    manifest = strict_json(text, f"{path}: manifest", integer=canon.integer)
    try:
        delta, id = _parse(path, manifest, tensors)
        parts = {name: canon.encoded(value) for name, value in manifest.items()}
        canonical = canon.encoded(parts)
    except FormatError as error:
        message = error.message if error.message.startswith(str(path)) else f"{path}: {error.message}"
        raise FormatError(message, hint=error.hint) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: manifest: {error}") from None
    if canonical != text:
        raise FormatError(f"{path}: the manifest is not canonical JSON (RFC 8785)")
    got = _sha256({name: part for name, part in parts.items() if name not in ("id", "notes", "notes_sha256")})
    if got != id:
        raise FormatError(f"{path}: the manifest says id {id[:12]}, its content is {got[:12]} (it was changed after it was written)")
    for key, tensor in tensors.items():
        want = manifest["tensors"][key]["sha256"]
        if tensor.sha256 != want:
            raise FormatError(f"{path}: tensor {key!r} is damaged (expected sha256 {want[:12]}, got {tensor.sha256[:12]})", hint="copy the file again")
    delta.__dict__["_id"] = id  # just computed from all that `Delta.id` would read again
    if values:
        try:
            delta.validate_values()
        except FormatError as error:
            raise FormatError(f"{path}: {error.message}") from None
    return delta


def _parse(path: Path, manifest: Json, tensors: dict[str, Stored]) -> tuple[Delta, str]:
    m = _fields(manifest, "manifest", _FIELDS, {"codes"})
    if m["format"] != FORMAT or type(m["format"]) is not int:
        raise FormatError(f"format {str(m['format'])[:20]} is not known to this version (it reads {FORMAT})", hint="pip install -U weft")
    listed = m["tensors"]
    if not isinstance(listed, dict) or set(listed) != set(tensors):
        odd = sorted(set(listed) ^ set(tensors))[0] if isinstance(listed, dict) else "tensors"
        raise FormatError(f"the manifest and the file disagree about tensor {odd!r}")
    known: dict[str, Tensor] = {}
    for key, info in listed.items():
        _fields(info, f"tensor {key!r}", {"dtype", "shape", "sha256"}, set())
        if info["dtype"] != tensors[key].dtype or info["shape"] != list(tensors[key].shape):
            raise FormatError(f"tensor {key!r}: the manifest says {info['dtype']} {info['shape']}, the file {tensors[key].dtype} {list(tensors[key].shape)}")
        _hash(info["sha256"], f"tensor {key!r}")
        known[key] = tensors[key]
    if "codes" in m:
        known |= _coded(path, m["codes"], tensors)
    base = _fields(m["base"], "base", {"fingerprint"}, {"quantisation"})
    if not isinstance(base.get("quantisation", {}), dict):
        raise FormatError("base: quantisation must be an object")
    for name in ("recipe", "config", "notes", "entries"):
        if not isinstance(m[name], dict):
            raise FormatError(f"{name} must be an object")
    delta = Delta(
        None if base["fingerprint"] is None else _hash(base["fingerprint"], "base"),
        {target: Entry.parse(entry, target) for target, entry in m["entries"].items()},
        known,
        _ids(m["over"], "over"),
        _ids(m["parents"], "parents"),
        m["recipe"],
        m["config"],
        _groups(m["tied"]),
        base.get("quantisation"),
        m["notes"],
        path,
    )
    delta.validate()
    if _sha256(m["notes"]) != _hash(m["notes_sha256"], "notes_sha256"):
        raise FormatError("the notes were changed after they were written")
    return delta, _hash(m["id"], "id")


def _coded(path: Path, codes: Json, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are stored coded."""
    from .codes import Coded

    if not isinstance(codes, dict) or not codes:
        raise FormatError("codes must be an object that is not empty; without coded tensors it is left out")
    found: dict[str, Tensor] = {}
    for key, info in codes.items():
        where = f"tensor {key!r}"
        info = _fields(info, f"{where}, codes", {"code", "cfg", "dtype", "shape"}, set())
        if key not in tensors:
            raise FormatError(f"{where} has a code, but is not there")
        if not isinstance(info["cfg"], dict) or not isinstance(info["dtype"], str):
            raise FormatError(f"{where}, codes: cfg must be an object, dtype a dtype code")
        found[key] = Coded(info["dtype"], sizes(info["shape"], where), _text(info["code"], where), info["cfg"], tensors[key], f"{path}: {where}")
    return found


def _ids(value: Json, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise FormatError(f"{where} must be a list of ids")
    return tuple(_hash(v, where) for v in value)


def _groups(value: Json) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(g, list) and all(isinstance(n, str) for n in g) for g in value):
        raise FormatError("tied must be a list of lists of names")
    return tuple(tuple(g) for g in value)
