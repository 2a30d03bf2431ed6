"""Parameter files that say only what differs: overlays on other files, and mappings that begin as others do.

    base: [../../params.yaml, ../overlays/paper.yaml]   files that this one changes, relative to it, in their order
    generate: {samples: 50000}                          a change; all else is as in the files before
    generate_auto: {base: generate, seed: 1}            a section that begins as another one
    report: {base: null, title: Mine}                   a mapping that begins empty
    prepare_data: null                                  a section that is none

Mappings merge, and lists and values replace. A record with another `name` is another choice, and replaces as a whole, as
does a mapping that says where it begins. A file that comes twice in a chain counts once, where it comes first: two
overlays may share what they are based on.

A file that compares runs says what each changes (`runs: {first: {}, second: {pretrain: {export: teacher}}}`). The changes
of a run are laid over all files like one more, so that what is based on something that it changes follows. Every run is
trained once per seed of `seeds`, which is added to the seeds of its sections.
"""

import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ruamel.yaml import YAML

from vtp.artefact import whole_file
from vtp.config import Config, ConfigError, Keys, did_you_mean, number_name, read_yaml
from vtp.texts import listed, shown

C = TypeVar("C", bound=Config)
BASE = "base"
RUNS, SEEDS, POINTS = "runs", "seeds", "points"  # keys of a file that compares runs, beside its sections
PICTURES = "pictures"  # where those of a user lie, which dvc.yaml reads
END = "end"  # the point at which a run ends


class Origin(NamedTuple):
    """Where a value was set last."""

    file: Path
    keys: Keys

    def then(self, key: str | int) -> "Origin":
        """Of what stands in it under a key."""
        return Origin(self.file, (*self.keys, key))

    def __str__(self) -> str:
        return f"{self.file}:{_dotted(self.keys)}"


class Layer(NamedTuple):
    """Values, and where they stand."""

    origin: Origin
    values: Mapping[str, Any]


class Parameters(NamedTuple):
    """What a parameter file comes to."""

    path: Path
    values: dict[str, Any]  # by section
    origins: dict[Keys, Origin]
    layers: tuple[Layer, ...]  # of the files of the chain, the file itself last
    runs: dict[str, tuple[Layer, ...]]  # the changes of every run, by its name

    @property
    def files(self) -> list[Path]:
        """The whole chain, the file itself last."""
        return [layer.origin.file for layer in self.layers]

    @property
    def bases(self) -> set[str]:
        """Sections in which mappings begin, anywhere in the chain."""
        of_runs = (layer for layers in self.runs.values() for layer in layers)
        return {base.split(".")[0] for layer in (*self.layers, *of_runs) for base in _bases(layer.values)}

    def parse(self, section: str, config: type[C]) -> C:
        """A section as a record. Raises ConfigError that names the file of the chain in which a wrong key stands."""
        if section not in self.values:
            known = ", ".join(map(str, self.values))
            raise ConfigError(
                f"{self.path}: no section {section!r}{did_you_mean(section, self.values)}; it has {known}"
            )
        return config.parse(self.values[section], where=lambda keys: self._place((section, *keys)))

    def of_run(self, name: str) -> "Parameters":
        """With the changes of a run. Raises ConfigError for a section that there is not."""
        for layer in self.runs[name]:
            for section in layer.values:
                if section not in self.values:
                    hint = did_you_mean(section, self.values)
                    raise ConfigError(f"{layer.origin.then(section)}: no such section{hint}")
        return _resolve(self.path, (*self.layers, *self.runs[name]))

    def _place(self, keys: Keys) -> str:
        """Where a value stands; one that is not there, where it would."""
        for end in range(len(keys), 0, -1):
            if (origin := self.origins.get(keys[:end])) is not None:
                return str(Origin(origin.file, (*origin.keys, *keys[end:])))
        return str(Origin(self.path, keys))


def read_parameters(path: Path) -> Parameters:
    """Read a file and what it is based on. Raises ConfigError for a base that is missing, or based on itself."""
    layers: dict[Path, Layer] = {}
    _collect(path, (), layers)
    runs: dict[str, tuple[Layer, ...]] = {}
    for layer in layers.values():
        for name, changes in _runs(layer).items():
            runs[name] = (*runs.get(name, ()), changes)
    plain = [layer._replace(values={k: v for k, v in layer.values.items() if k != RUNS}) for layer in layers.values()]
    return _resolve(path, tuple(plain))._replace(runs=runs)


def milestone_name(milestone: float | str) -> str:
    """What a milestone of a training is called, as a folder and as a point: its training FLOPs, its share, or `end`."""
    if isinstance(milestone, str):
        return milestone
    return number_name(milestone) if milestone < 1 else number_name(milestone, digits=3, style="e")


def milestone_flops(milestone: float, whole: float) -> float:
    """Training FLOPs at a milestone of a run of `whole` FLOPs: a milestone below 1 is a share of the run."""
    return milestone * whole if milestone < 1 else milestone


def split_address(address: str) -> tuple[Path, str]:
    """`params.yaml:pretrain` -> (Path("params.yaml"), "pretrain"). Raises ConfigError."""
    path, _, section = address.rpartition(":")
    if not path or not section:
        raise ConfigError(f"{address!r}: expected FILE:SECTION, such as params.yaml:pretrain")
    return Path(path), section


def load(address: str, config: type[C]) -> C:
    """The section at `FILE:SECTION` as a record. Raises ConfigError."""
    path, section = split_address(address)
    return read_parameters(path).parse(section, config)


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Plain YAML 1.2, equal bytes for equal values, in the form that `dvc exp run -S` leaves as it is."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        YAML(pure=True).dump(dict(values), file)


def _resolve(path: Path, layers: tuple[Layer, ...]) -> Parameters:
    """What layers come to, one over the other."""
    parameters = Parameters(path, {}, {}, layers, {})
    for layer in layers:
        _merge(parameters.values, layer.values, layer.origin, (), parameters.origins)
    _begin(parameters, (), ())
    for section in [name for name, value in parameters.values.items() if value is None]:
        del parameters.values[section]
    return parameters


def _runs(layer: Layer) -> dict[str, Layer]:
    """What a file says of every run. Raises ConfigError for what cannot be changes of sections by the name of a run."""
    place, runs = layer.origin.then(RUNS), layer.values.get(RUNS, {})
    if not isinstance(runs, Mapping):
        raise ConfigError(f"{place}: expected changes by the name of a run, such as {{joint: {{}}}}; found {runs!r}")
    for name, changes in runs.items():
        if not isinstance(name, str):
            raise ConfigError(f"{place}.{name}: the name of a run is text; put it into quotes")
        if name == BASE:
            raise ConfigError(f"{place}.{name}: `base` says where a mapping begins; choose another name for the run")
        if not isinstance(changes, Mapping):
            raise ConfigError(f"{place}.{name}: expected changes of sections, or {{}} for none; found {changes!r}")
    return {name: Layer(place.then(name), changes) for name, changes in runs.items()}


def _bases(values: Any) -> Iterator[str]:  # noqa: ANN401 - YAML's
    """Every `base` in a mapping and below."""
    if isinstance(values, Mapping):
        if isinstance(base := values.get(BASE), str):
            yield base
        for value in values.values():
            yield from _bases(value)


def _collect(path: Path, above: tuple[Path, ...], layers: dict[Path, Layer]) -> None:
    """The files that `path` is based on, then itself, each once."""
    real = Path(os.path.realpath(path))  # of a link to itself too, which reading finds
    if real in above:
        chain = " -> ".join(file.name for file in (*above[above.index(real) :], real))
        raise ConfigError(f"{path}: based on itself: {chain}")
    if real in layers:
        return
    values = read_yaml(path)
    bases = values.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base is {bases!r}; expected a file or a list of files, such as ../../params.yaml")
    missing = []
    for file in (path.parent / base for base in bases):
        if not file.is_file():
            near = [other.name for other in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
            missing.append(f"{file}{did_you_mean(file.name, near)}")
    if missing:
        raise ConfigError(f"{path}: base names what is no file: {listed(missing)}")
    for base in bases:
        _collect(path.parent / base, (*above, real), layers)
    layers[real] = Layer(Origin(path, ()), values)


def _merge(
    old: dict[Any, Any], new: Mapping[Any, Any], source: Origin, place: Keys, origins: dict[Keys, Origin]
) -> None:
    """Lay `new`, which stands at `source`, over what is at `place`."""
    for key, value in new.items():
        here, before = (*place, key), old.get(key)
        origins[here] = source.then(key)
        if isinstance(before, dict):
            if isinstance(value, Mapping) and not _replaces(before, value):
                _merge(before, value, source.then(key), here, origins)
                continue
            for gone in [known for known in origins if known[: len(here)] == here and known != here]:
                del origins[gone]
        old[key] = _plain(value, source.then(key), here, origins)


def _replaces(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> bool:
    """Whether a mapping is no change of the one before, but another in its place."""
    name = new.get("name")
    if BASE in old and "name" not in old:  # it is not known yet; what it begins as is compared when it begins
        return BASE in new
    return BASE in new or (isinstance(name, str) and name != old.get("name"))


def _plain(value: Any, source: Origin, place: Keys, origins: dict[Keys, Origin]) -> Any:  # noqa: ANN401 - YAML's
    """A copy without the mark of an empty beginning; every key of it stands at `source`."""
    if not isinstance(value, Mapping):
        return deepcopy(value)
    copy: dict[Any, Any] = {}
    for key, item in value.items():
        if key != BASE or item is not None:
            origins[(*place, key)] = source.then(key)
            copy[key] = _plain(item, source.then(key), (*place, key), origins)
    return copy


def _begin(parameters: Parameters, place: Keys, above: tuple[Keys, ...]) -> None:
    """Let every mapping at `place` and below that names a `base` begin as that one, which is done first."""
    node = _at(parameters.values, place)
    if not isinstance(node, dict):
        return
    if BASE in node:
        _begin_as(parameters, place, node, above)
        node = _at(parameters.values, place)
    for key in list(node):
        _begin(parameters, (*place, key), above)


def _begin_as(parameters: Parameters, place: Keys, node: dict[Any, Any], above: tuple[Keys, ...]) -> None:
    base, origins = node[BASE], parameters.origins
    where = origins[(*place, BASE)]
    target = tuple(base.split(".")) if isinstance(base, str) else ()
    for end in range(1, len(target)):  # what the target stands in may itself begin as another
        outer = _at(parameters.values, target[:end])
        if isinstance(outer, dict) and BASE in outer and target[:end] not in (*above, place):
            _begin_as(parameters, target[:end], outer, (*above, place))
    if not isinstance(_at(parameters.values, target), dict) or not target:
        hint = did_you_mean(base, [name for name in parameters.values if name != _dotted(place)])
        raise ConfigError(f"{where}: no mapping {base!r} to begin as{hint}")
    if target in (*above, place) or place[: len(target)] == target:
        chain = " -> ".join(map(_dotted, (*above, place, target)))
        raise ConfigError(f"{where}: based on itself: {chain}")
    _begin(parameters, target, (*above, place))
    own = {
        known: origin for known, origin in origins.items() if known[: len(place)] == place and len(known) > len(place)
    }
    inherited = {
        (*place, *known[len(target) :]): origin
        for known, origin in origins.items()
        if known[: len(target)] == target and len(known) > len(target)
    }
    begun = deepcopy(_at(parameters.values, target))
    changes = {key: value for key, value in node.items() if key != BASE}
    _merge(begun, changes, where, place, inherited)
    origins.update(inherited)
    origins.update(own)
    parent = _at(parameters.values, place[:-1])
    parent[place[-1]] = begun


def _at(values: Any, place: Keys) -> Any:  # noqa: ANN401 - YAML's
    """What stands at a place; None where nothing does."""
    for key in place:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _dotted(keys: Keys) -> str:
    return ".".join(shown(str(key)) for key in keys)
