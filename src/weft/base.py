"""A base: a pretrained checkpoint, known by the fingerprint of its bytes.

    base = Base.open("path/to/model")               # or a Hub id: "org/name", "org/name@revision"
    base.fingerprint, base.names, base.tensor("model.norm.weight").read()
    model = base.model([delta])                     # the nn.Module, with room for what the delta adds

Opening reads headers only. Importing this module imports neither numpy nor torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import canon
from ._write import write_bytes
from .errors import FormatError, InputError, MismatchError, UsageError, WeftError, near
from .stored import FLOATS, Stored, Tensor, digest, hold, numpy_dtype, read_container, strict_json

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NO_PICKLES = "weft reads safetensors only, because loading a pickle runs code"
_PICKLE_HINT = "convert it once with transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_YOUNG = 2_000_000_000
"""Nanoseconds after a file's last change in which a further change may leave its time stamp as it is."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def merge_patch(value: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386): objects are merged, null removes a key, anything else replaces. Nothing is changed in place."""
    if not isinstance(patch, Mapping):
        return patch
    out = dict(value) if isinstance(value, Mapping) else {}
    for key, change in patch.items():
        if change is None:
            out.pop(key, None)
        else:
            out[key] = merge_patch(out.get(key), change)
    return out


class Base:
    """A checkpoint on disk. Make one with `Base.open`, or with `Base.of` from a live module alone.

    source:       what it was opened by
    path:         its folder, or its single .safetensors file; None for `Base.of`
    files:        the safetensors files, shards in order
    tensors:      every tensor by name, read from the headers
    config:       config.json, {} if there is none
    metadata:     the metadata of the safetensors files, the first file's word first
    quantisation: the config's quantization_config, None if it has none
    """

    def __init__(
        self, source: str, path: Path | None, files: tuple[Path, ...], tensors: Mapping[str, Tensor], config: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        self.source, self.path, self.files, self.tensors, self.config, self.metadata = source, path, files, tensors, config, metadata
        quantisation = config.get("quantization_config")
        self.quantisation: dict[str, Any] | None = dict(quantisation) if isinstance(quantisation, dict) else None
        self._sha256: dict[str, str] = {}
        self._recalled = False

    @classmethod
    def open(cls, path_or_hub_id: str | Path, revision: str | None = None) -> Base:
        """Open a folder (model.safetensors, or its index and shards), a .safetensors file, or a model of the Hub.

        A Hub id is looked up in the local cache first, then fetched. `id@revision` names a branch, tag or commit.
        Raises InputError if there is nothing to open, FormatError if a file or the index is damaged.
        """
        path = Path(path_or_hub_id).expanduser()
        if path.exists():
            if revision is not None:
                raise UsageError(f"a revision ({revision}) belongs to a Hub id, but {path} is a local path")
        else:
            path = _from_hub(str(path_or_hub_id), revision)
        files, index = _find_weights(path)
        tensors, metadata = _read_shards(files, index, path)
        folder = path if path.is_dir() else path.parent
        return cls(str(path_or_hub_id), path, files, tensors, _read_config(folder / "config.json"), metadata)

    @staticmethod
    def of(module: nn.Module) -> LiveBase:
        """A base known only as a live module: no fingerprint, but each tensor can be read and hashed by its checkpoint name."""
        return LiveBase(module)

    def __repr__(self) -> str:
        return f"<Base {self.source}: {len(self.tensors)} tensors>"

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.tensors)

    def tensor(self, name: str) -> Tensor:
        """One tensor; MismatchError if the base has none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise MismatchError(f"the base {self.source} has no tensor {name!r}{near(name, self.tensors, 'it has')}") from None

    def layout(self, deltas: Iterable[Any] = ()) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype code and shape of every tensor, after the entries of `deltas` have added, replaced, copied and removed some."""
        out = self._own_layout()
        for delta in deltas:
            for name, entry in _changes(delta):
                if entry.kind == "remove":
                    out.pop(name, None)
                else:
                    out[name] = (entry.dtype, tuple(entry.shape))
        return out

    def _own_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    # --- identity

    @property
    def fingerprint(self) -> str | None:
        """The identity of the checkpoint: sha256 (hex) over the canonical JSON list of [name, dtype, shape, sha256 of the
        bytes], sorted by name. Independent of sharding, file names and metadata. None for `Base.of`."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        self.hash_all()
        rows = [[name, self.tensors[name].dtype, list(self.tensors[name].shape), self._sha256[name]] for name in self.names]
        try:
            return hashlib.sha256(canon.dumps(rows)).hexdigest()
        except ValueError as error:
            raise FormatError(f"{self.source}: a tensor's name is not valid text ({error})") from None

    def sha256(self, name: str) -> str:
        """Hex sha256 of one tensor's bytes: known already, found in the cache, or computed for this tensor alone."""
        tensor = self.tensor(name)
        if name not in self._sha256:
            self._recall()
        if name not in self._sha256:
            self._sha256[name] = digest(tensor)
        return self._sha256[name]

    def hash_all(self, progress: Progress | None = None) -> None:
        """Hash every tensor that is not known yet, in threads, and remember the results for the next time.

        The results are kept for each file in the cache folder (WEFT_CACHE, else XDG_CACHE_HOME/weft, else ~/.cache/weft)
        for as long as its path, inode, size and time of change stay the same. A cache that is damaged or cannot be
        written is no error.
        """
        from concurrent.futures import ThreadPoolExecutor, as_completed

        self._recall()
        todo = sorted((name for name in self.tensors if name not in self._sha256), key=lambda name: -self.tensors[name].nbytes)
        if not todo:
            return
        before = {file: _stamp(file) for file in self.files}
        done, total = 0, sum(self.tensors[name].nbytes for name in todo)
        with ThreadPoolExecutor(min(len(todo), os.cpu_count() or 1)) as pool:
            running = {pool.submit(digest, self.tensors[name]): name for name in todo}
            try:
                for future in as_completed(running):
                    name = running[future]
                    self._sha256[name] = future.result()
                    done += self.tensors[name].nbytes
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for file in self.files:
            if _stamp(file) != before[file]:
                self._sha256.clear()
                raise InputError(f"{file} changed while it was being read", hint="run it again once nothing writes to it")
            _remember(before[file], {name: self._sha256[name] for name in self._in_file[file]})

    @cached_property
    def _in_file(self) -> dict[Path, list[str]]:
        """The names of the tensors of each file."""
        found: dict[Path, list[str]] = {file: [] for file in self.files}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, Stored):
                found[tensor.path].append(name)
        return found

    def _recall(self) -> None:
        """Take over what the cache knows about the files, once."""
        if not self._recalled:
            self._recalled = True
            for file in self.files:
                self._sha256.update(_recalled(_stamp(file), self._in_file[file]))

    # --- the live model

    def model(
        self,
        deltas: Sequence[Any] = (),
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        auto_class: str | type[Any] | None = None,
    ) -> nn.Module:
        """The model as a transformers module in eval mode, with the structure that `deltas` declare but not their ops.

        deltas:     each one's config patch is applied, and what it adds, replaces, copies or removes is there: added and
                    replaced tensors as zeros, copies as the base tensor that they name
        dtype:      "float32", "bfloat16", ... or a torch dtype; default: the one most of the checkpoint's bytes have
        device:     where to load it; default: the CPU
        auto_class: a transformers class or its name; default: the first of the config's `architectures` that transformers
                    knows, else AutoModel

        On the CPU and in the checkpoint's dtype the parameters are private maps of the files, as transformers makes them:
        writing to them does not change the files, but nobody may write into the files in place while the model lives.
        Code from the checkpoint's folder never runs. MismatchError if the model needs a tensor that neither the base nor
        the deltas have, if a delta adds one that the model lacks, or if shapes differ; UsageError for a device that is not there.
        """
        if device is not None:
            _require_device(device)
        config = self.config
        for delta in deltas:
            config = merge_patch(config, delta.config)
        with _quiet(), _opened(self.files) as slices:
            import torch

            settings = _config_object(config, self.source)
            kind = _model_class(auto_class, config, settings)
            state, added = self._state(deltas, slices)
            wanted = dtype if dtype is not None else self._main_dtype()
            try:
                model, info = kind.from_pretrained(
                    None,
                    config=settings,
                    state_dict=state,
                    dtype=getattr(torch, wanted) if isinstance(wanted, str) else wanted,
                    device_map=None if device is None else {"": device},
                    ignore_mismatched_sizes=True,  # reported below, all at once
                    output_loading_info=True,
                )
            except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError) as error:
                raise InputError(f"transformers cannot build {_name(kind)} from {self.source}: {error}") from error
            self._check(kind, info, added)
            self._finish(model)
        return model  # type: ignore[no-any-return]

    def _state(self, deltas: Sequence[Any], slices: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """What transformers is to load by name (slices of the files, zeros), and the names that deltas brought."""
        import torch

        state, added = dict(slices), set()
        for delta in deltas:
            for name, change in _changes(delta):
                if change.kind == "remove":
                    state.pop(name, None)
                    continue
                if change.kind == "copy":
                    self.tensor(change.source)
                    state[name] = slices[change.source][...].clone()  # two slices of one mapped tensor would share its memory
                else:
                    state[name] = torch.zeros(tuple(change.shape), dtype=getattr(torch, str(numpy_dtype(change.dtype))))
                added.add(name)
        return state, added & set(state)

    def _main_dtype(self) -> str:
        """The floating-point dtype that most bytes have; float32 if there is none."""
        count: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in FLOATS:
                count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.nbytes
        return str(numpy_dtype(max(sorted(count), key=count.__getitem__, default="F32")))

    def _check(self, kind: Any, info: dict[str, Any], added: set[str]) -> None:
        """MismatchError unless every tensor of the model was loaded and every added one was used."""
        if missing := sorted(info["missing_keys"]):
            raise MismatchError(
                f"{_name(kind)} needs {len(missing)} tensors that neither the base {self.source} nor the deltas have: {_some(missing)}",
                hint="pass the delta that adds them, or an auto_class that does without them",
            )
        if unused := sorted(added & set(info["unexpected_keys"])):
            raise MismatchError(f"{_name(kind)} has no place for {len(unused)} tensors that the deltas add: {_some(unused)}")
        if wrong := sorted(info["mismatched_keys"]):
            listed = [f"{name} is {list(found)}, the model's {list(want)}" for name, found, want in wrong]
            raise MismatchError(f"{len(wrong)} tensors of {self.source} do not fit {_name(kind)}: {_some(listed)}")

    def _finish(self, model: Any) -> None:
        """What from_pretrained does for a folder and not for a state dict: the name and the generation settings."""
        model.config.name_or_path = str(self.path)
        if self._folder is not None and (self._folder / "generation_config.json").is_file() and model.can_generate():
            from transformers import GenerationConfig

            model.generation_config = GenerationConfig.from_pretrained(str(self._folder), local_files_only=True)
        model.eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; InputError if its folder has none."""
        if self._folder is None:
            raise InputError("a base known only as a live module has no tokenizer", hint="open its checkpoint: Base.open(PATH)")
        with _quiet():
            from transformers import AutoTokenizer

            try:
                return AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True)
            except Exception as error:  # each tokenizer family fails in its own way on files that are absent or odd
                raise InputError(f"{self._folder} has no tokenizer that transformers can read: {error}") from error

    @property
    def _folder(self) -> Path | None:
        return self.path if self.path is None or self.path.is_dir() else self.path.parent


class LiveBase(Base):
    """A base known only as a live module. Its tensors have the names that the model's own checkpoint would give them."""

    def __init__(self, module: nn.Module) -> None:
        from .names import NameMap, saved_layout

        self.module = module
        self._saved = saved_layout(module)
        self._map = NameMap(self._saved, module)
        config: Any = getattr(module, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        super().__init__(f"(a live {type(module).__name__})", None, (), _Live(self), settings, {})

    @property
    def fingerprint(self) -> None:
        return None

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is in the module now, under its checkpoint name or any name transformers would load it by."""
        from .names import live_tensor

        places = self._map.live(name)
        if not places:
            raise MismatchError(f"tensor {name!r} has no place in {self.source}: {self._map.why(name)}")
        if len(places) == 1 and places[0].part is None:
            value = live_tensor(self.module, places[0].name).detach()
            return hold(places[0].at.get(value) if places[0].at else value)
        whole = live_tensor(self.module, places[0].name).detach().new_empty(self._saved[name][1])
        for place in places:
            value = live_tensor(self.module, place.name).detach()
            (place.part.get(whole) if place.part else whole).copy_(place.at.get(value) if place.at else value)
        return hold(whole)

    def sha256(self, name: str) -> str:
        """Hex sha256 of one tensor's bytes as they are now."""
        return digest(self.tensor(name))

    def hash_all(self, progress: Progress | None = None) -> None:
        """Nothing: a live tensor may change at any time, so no hash of it is kept."""

    def model(
        self,
        deltas: Sequence[Any] = (),
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        auto_class: str | type[Any] | None = None,
    ) -> nn.Module:
        raise UsageError("a base known only as a live module cannot build another", hint="use the module, or open its checkpoint: Base.open(PATH)")

    def _own_layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return dict(self._saved)


class _Live(Mapping[str, Tensor]):
    """The tensors of a LiveBase, fetched when they are asked for."""

    def __init__(self, base: LiveBase) -> None:
        self._base = base

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._base._saved:
            raise KeyError(name)
        return self._base.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base._saved)

    def __len__(self) -> int:
        return len(self._base._saved)


def _changes(delta: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a delta that change the list of tensors: name and Change."""
    for name, entry in delta.entries.items():
        if entry.change is not None and not name.startswith("@"):
            yield name, entry.change


def _require_device(device: str | torch.device) -> None:
    """UsageError unless torch knows the device and this machine has it."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        found = torch.accelerator.current_accelerator(check_available=True)
        said = str(error).split("\n")[0]
        raise UsageError(f"the device {str(device)!r} cannot be used: {said}", hint=f"this machine has cpu{f' and {found}' if found else ''}") from None


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


# --- finding and reading the files


def _from_hub(name: str, revision: str | None) -> Path:
    """The local folder of a Hub model, from the cache if it is there, else fetched."""
    if name.endswith((".safetensors", *PICKLES)) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise InputError(f"there is no file or folder {name}")
    repo, _, tag = name.partition("@")
    if tag and revision is not None and tag != revision:
        raise UsageError(f"{name} names one revision and revision={revision!r} another")
    wanted = tag or revision
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            cached = Path(snapshot_download(repo, revision=wanted, local_files_only=True))
            if any(cached.glob("*.safetensors")):
                return cached
        except LocalEntryNotFoundError:
            pass
        return Path(snapshot_download(repo, revision=wanted, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # everything huggingface_hub and its HTTP client raise for names, access and network
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} is neither a local path nor a Hub model that can be had: {reason[:300]}",
            hint="give the path of a folder with config.json and model.safetensors, or log in and check the id and the network",
        ) from error


def _find_weights(path: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The safetensors files of a checkpoint in order, and the index's map from tensors to file names, if it has one."""
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise InputError(f"{path} is a pickle; {_NO_PICKLES}", hint=_PICKLE_HINT)
        if path.name.endswith(".index.json"):
            raise InputError(f"{path} is an index; expected the folder it is in", hint=f"use {path.parent}")
        return (path,), None
    if (path / WEIGHTS).is_file():
        return (path / WEIGHTS,), None
    if (path / INDEX).is_file():
        index = _read_index(path / INDEX)
        return tuple(path / name for name in sorted(set(index.values()))), index
    here = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    if "adapter_config.json" in here:
        raise InputError(f"{path} holds a PEFT adapter, not a model", hint=f"weft import {path} --base BASE -o delta.safetensors")
    if pickles := [name for name in here if name.endswith(PICKLES)]:
        raise InputError(f"{path} holds its weights as a pickle ({_some(pickles)}); {_NO_PICKLES}", hint=_PICKLE_HINT)
    others = [name for name in here if name.endswith(".safetensors")]
    found = f"it has {_some(others)}" if others else "it has no .safetensors file"
    raise InputError(f"{path}: expected {WEIGHTS} or {INDEX}; {found}", hint=f"use {path / others[0]}" if len(others) == 1 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    value = strict_json(data, str(path))
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor name to the name of a file in the same folder."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: expected a weight_map from tensor names to files")
    good: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in good:
            continue
        if isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file and "\\" not in file and "\0" not in file:
            good.add(file)
        else:
            raise FormatError(f"{path}: tensor {name!r} must be in a .safetensors file of the same folder, got {str(file)[:80]!r}")
    return weight_map


def _read_shards(files: tuple[Path, ...], index: dict[str, str] | None, where: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the files, held against the index in both directions, and their metadata."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{where}: the shard {file.name} is missing, though {INDEX if index else 'the name'} says it is there")
        found, notes = read_container(file)
        metadata = notes | metadata
        for name, tensor in found.items():
            if name in tensors:
                raise FormatError(f"{where}: tensor {name!r} stands in two shards, {index[name] if index else ''} and {file.name}")
            if index is not None and index.get(name) != file.name:
                said = f"says it is in {index[name]}" if name in index else "does not list it"
                raise FormatError(f"{file}: tensor {name!r} is here, but {INDEX} {said}")
            tensors[name] = tensor
    if absent := sorted(set(index or ()) - set(tensors)):
        raise FormatError(f"{where}: {INDEX} lists {len(absent)} tensors that their shards do not have: {_some(absent)}")
    return tensors, metadata


# --- hashes and their cache


_Stamp = tuple[str, int, int, int]


def _stamp(file: Path) -> _Stamp:
    """What says that a file is still the same: real path, inode, size, time of change in ns."""
    try:
        real = os.path.realpath(file)
        status = os.stat(real)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    return real, status.st_ino, status.st_size, status.st_mtime_ns


def _cache_file(stamp: _Stamp) -> Path:
    """Where the hashes of a file are kept: one small JSON file for each, so that processes do not wait for each other."""
    own, shared = os.environ.get("WEFT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared) / "weft" if shared else Path("~/.cache/weft").expanduser()
    return folder / "hashes" / (hashlib.sha256(os.fsencode(stamp[0])).hexdigest()[:32] + ".json")


def _recalled(stamp: _Stamp, names: Sequence[str]) -> dict[str, str]:
    """The hashes of a file's tensors as the cache has them; {} unless it knows exactly this state of the file."""
    try:
        file = _cache_file(stamp)
        value = strict_json(file.read_bytes(), str(file))
    except (OSError, RuntimeError, FormatError):
        return {}
    if not isinstance(value, dict) or value.get("file") != list(stamp):
        return {}
    hashes = value.get("sha256")
    if not isinstance(hashes, dict) or set(hashes) != set(names):
        return {}
    good = all(isinstance(h, str) and len(h) == 64 and set(h) <= set("0123456789abcdef") for h in hashes.values())
    return hashes if good else {}


def _remember(stamp: _Stamp, hashes: dict[str, str]) -> None:
    """Keep the hashes of a file, if they can be kept and the file is old enough for its time stamp to mean something."""
    if time.time_ns() - stamp[3] < _YOUNG:
        return
    try:
        file = _cache_file(stamp)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, json.dumps({"file": list(stamp), "sha256": hashes}).encode())
    except (OSError, RuntimeError, WeftError):  # no home, read-only, full: the next run hashes again
        pass


# --- transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers prints no warnings, tables or progress bars."""
    import warnings

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _opened(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Every tensor of the files as a slice that is read when it is used."""
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        yield slices


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))


def _model_class(auto_class: str | type[Any] | None, config: Mapping[str, Any], settings: Any) -> Any:
    """The transformers class that builds the model: what was asked for, else the architecture's, else AutoModel's."""
    import transformers

    def known(name: Any) -> Any:
        kind = getattr(transformers, name, None) if isinstance(name, str) and not name.startswith("_") else None
        return kind if isinstance(kind, type) and hasattr(kind, "from_pretrained") else None

    listed = config.get("architectures")
    architectures = [kind for kind in map(known, listed if isinstance(listed, list) else []) if kind]
    if auto_class is None and architectures:
        return architectures[0]
    asked = transformers.AutoModel if auto_class is None else known(auto_class) if isinstance(auto_class, str) else auto_class
    if asked is None:
        raise UsageError(f"transformers has no class {auto_class!r}", hint="AutoModelForSequenceClassification, for example")
    mapping = getattr(asked, "_model_mapping", None)
    if mapping is None:
        return asked
    # An auto class wants a folder to look for code in; the class it would choose does not.
    if type(settings) not in mapping:
        raise UsageError(f"{_name(asked)} has no model for {settings.model_type!r}")
    kinds = mapping[type(settings)]
    choices = list(kinds) if isinstance(kinds, tuple | list) else [kinds]
    return next((kind for kind in architectures if kind in choices), choices[0])


def _config_object(config: Mapping[str, Any], source: str) -> Any:
    """A config.json's content as a transformers config."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        problem = f"the model type {kind!r} is unknown to this transformers" if kind else "its config.json is absent or has no model_type"
        raise InputError(f"{source}: cannot build the model: {problem}", hint="give the folder that holds config.json, or update transformers")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:  # a config class may refuse a value in any way
        raise InputError(f"{source}: transformers refuses the config: {error}") from error
