"""The zarr.json of the group and of each array: made, sealed by digests, and read.

The attributes of the group hold a digest of themselves, and one of the zarr.json of each array. The zarr.json of
``commits`` has a copy of the group's attributes, so that each of the two can be restored from the other, and every
other zarr.json follows from the attributes.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from distill.config.generate import is_web
from distill.errors import DistillError, StoreError, first_line
from distill.store.codecs import CODECS, create_array
from distill.store.fingerprint import summarize
from distill.store.location import fsync, local_root, on_web
from distill.store.requests import contents, keys_below
from distill.store.schema import FORMAT, VERSION, array_specs

Document = dict[str, Any]


def array_documents(attributes: Mapping[str, Any], over_rows: Collection[str], codec: str) -> dict[str, Document]:
    """The zarr.json of each array of a store with these attributes, by the array's name, as zarr makes them.

    over_rows: as in `array_specs`
    """
    memory = MemoryStore()
    group = zarr.create_group(memory)
    specs = array_specs(attributes, over_rows)
    for spec in specs:
        create_array(group, spec, attributes, codec)
    found = contents(memory, [f"{spec.name}/zarr.json" for spec in specs])
    return {spec.name: json.loads(content or b"") for spec, content in zip(specs, found, strict=True)}


def group_document(attributes: Mapping[str, Any]) -> Document:
    """The zarr.json of the group."""
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def digest(content: Mapping[str, Any], without: Iterable[str]) -> str:
    """A hash of a JSON object, less some of its keys."""
    return summarize({key: value for key, value in content.items() if key not in {*without}})


def array_digest(document: Document) -> str:
    """What the attributes say about an array's zarr.json: a hash of it, without its attributes."""
    return digest(document, ["attributes"])


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, with the digest of themselves; `complete`, which changes, is no part of it."""
    return {**attributes, "digest": digest(attributes, ["complete", "digest"])}


def encode(document: Document) -> bytes:
    """A zarr.json as bytes."""
    return json.dumps(document, indent=2).encode()


def put(location: Any, key: str, document: Document) -> None:
    """Write a zarr.json, and make sure that it is on disk."""
    sync(location.set(key, default_buffer_prototype().buffer.from_bytes(encode(document))))
    if (root := local_root(location)) is not None:
        fsync(root / key, (root / key).parent, root)


def parsed(content: bytes | None) -> Document:
    """A JSON object. Raises ValueError where it is none."""
    found = json.loads(content or b"")
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found a {type(found).__name__}")
    return found


def problem_of_group(content: bytes | None) -> str:
    """What is wrong with the group's zarr.json; empty: nothing."""
    if problem := _unreadable(content):
        return problem
    document = parsed(content)
    if not is_sealed(document.get("attributes")):
        return "does not match its digest"
    return "" if document == group_document(document["attributes"]) else "is not what distill writes"


def _unreadable(content: bytes | None) -> str:
    """Why this is no JSON object; empty: it is one."""
    try:
        parsed(content)
    except ValueError:
        return "is missing" if content is None else "is no JSON object"
    return ""


def is_sealed(attributes: Any) -> bool:
    """Whether these are attributes that match their digest."""
    return (
        isinstance(attributes, dict)
        and isinstance(attributes.get("complete"), bool)
        and attributes.get("digest") == sealed(attributes)["digest"]
    )


def problem_of_array(name: str, content: bytes | None, attributes: Mapping[str, Any]) -> str:
    """What is wrong with an array's zarr.json; empty: nothing."""
    if problem := _unreadable(content):
        return problem
    document = parsed(content)
    if array_digest(document) != attributes["arrays"][name]:
        return "does not match its digest"
    if strange := {*_codecs({**document, "attributes": {}})} - {*CODECS}:
        return f"names codecs that no store has: {', '.join(sorted(map(str, strange)))}"
    return ""


def _codecs(content: Any) -> Iterable[Any]:
    """The names of all codecs in an array's zarr.json, those inside others too."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key.endswith("codecs"):
                yield from (codec.get("name") if isinstance(codec, dict) else codec for codec in value)
            yield from _codecs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _codecs(value)


def read_metadata(
    path: str, location: Any, content: bytes | None, commits: bytes | None
) -> tuple[dict[str, Any], dict[str, Document]]:
    """The attributes of the store at `path`, and the zarr.json of each array; no arrays where the plan is unfinished.

    content, commits: the zarr.json of the group, and of ``commits``, as `marks` finds them

    Raises StoreError for another group, another version, or what does not match its digest.
    """
    try:
        refuse_strangers(path, content, commits)
        if problem := problem_of_group(content):
            raise damage(path, f"zarr.json {problem}")
        attributes = parsed(content)["attributes"]
        if commits is None:
            if not was_interrupted(location, attributes):
                raise damage(path, "commits/zarr.json is missing")
            return attributes, {}
        names = list(attributes["arrays"])
        others = [name for name in names if name != "commits"]
        read = contents(location, [f"{name}/zarr.json" for name in others])
        found = dict(zip([*others, "commits"], [*read, commits], strict=True))
        for name in names:
            if problem := problem_of_array(name, found[name], attributes):
                raise damage(path, f"{name}/zarr.json {problem}")
        copy = parsed(found["commits"])["attributes"]
        if {**copy, "complete": attributes["complete"]} != attributes:
            raise damage(path, "zarr.json and commits/zarr.json are of two stores")
        return attributes, {name: parsed(found[name]) for name in names}
    except DistillError:
        raise
    except Exception as error:  # zarr's, the file system's, or an object store client's own
        raise StoreError(f"store.path: cannot open {path}: {first_line(error)}") from error


def was_interrupted(location: Any, attributes: Mapping[str, Any]) -> bool:
    """Whether a store without commits/zarr.json is one whose plan was interrupted. Otherwise that was lost."""
    if on_web(location) is not None:  # nothing is listed
        return not attributes["complete"]
    begun = any(keys_below(location, f"{name}/c") for name in ("commits", "checksums"))
    return not attributes["complete"] and not begun


def refuse_strangers(path: str, content: bytes | None, commits: bytes | None) -> None:
    """Raise StoreError for another group, another version, and what was made before there were digests.

    content, commits: the zarr.json of the group, and of ``commits``
    """
    attributes, copy = attributes_of(content), attributes_of(commits)
    found = attributes if isinstance(attributes, dict) else {}
    if found.get("format") != FORMAT and commits is None and content is not None:
        raise StoreError(
            f"store.path: expected a {FORMAT} at {path}, found another Zarr group (format {found.get('format')!r})"
        )
    if found.get("format") == FORMAT and found.get("version") != VERSION:
        raise StoreError(f"store.path: expected format version {VERSION} at {path}, found {found.get('version')!r}")
    if found.get("format") == FORMAT and "digest" not in found and not is_sealed(copy):
        raise StoreError(
            f"store.path: expected digests and checksums in {path}, found none: an older distill made it; make it again"
        )


def attributes_of(content: bytes | None) -> Any:
    """The attributes in a zarr.json, whatever they are; None where there are none."""
    try:
        return parsed(content).get("attributes")
    except ValueError:
        return None


class DamageError(StoreError):
    """The error for a damaged store. what: is damaged, in short; the message also says what to do.

    It is made of a message alone too: torch does so with what a reader raised.
    """

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what


def damage(path: str, what: str) -> DamageError:
    """The error for the store at `path`, in which `what` is damaged."""
    where = " where it can be written" if is_web(path, {}) else ""
    to_do = f"python -m distill.verify {path} names all damage, and --repair takes it back{where}"
    return DamageError(f"{path}: damaged: {what}; {to_do}", what)
