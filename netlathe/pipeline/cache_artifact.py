"""Artifacts in a cache: the files that a backend has written and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from netlathe.pipeline.cache import Cache, Material
from netlathe.pipeline.cache_file import Reader, Writer
from netlathe.pipeline.interfaces import Artifact
from netlathe.pipeline.pass_ import Feeds

_CHUNK = 16 << 20


class RecalledArtifact(Artifact):
    """What was built before. Its files come from the cache; to run in memory it is built anew."""

    def __init__(self, reader: Reader, build: Callable[[], Artifact]) -> None:
        self._reader = reader
        self._build = build
        self._built: Artifact | None = None

    def run(self, feeds: Feeds) -> dict[str, Any]:
        """Run once; the first time builds."""
        if self._built is None:
            self._built = self._build()
        return self._built.run(feeds)

    def report(self) -> dict[str, Any]:
        """What was found when it was built and saved."""
        report: dict[str, Any] = self._reader.description["report"]
        return report

    def save(self, folder: Path) -> list[Path]:
        """Write the files as they were written then."""
        files = []
        for name, blob in self._reader.description["files"].items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            data = self._reader.bytes(blob)
            with file.open("xb") as stream:
                for start in range(0, len(data), _CHUNK):
                    stream.write(data[start : start + _CHUNK])
            files.append(file)
        self._reader.give_back()
        return files


def recall(
    cache: Cache, material: Material, build: Callable[[], Artifact]
) -> RecalledArtifact | None:
    """The artifact made from ``material``; None where it has to be built."""
    reader = cache.read("artifact", material)
    return None if reader is None else RecalledArtifact(reader, build)


def keep(
    cache: Cache, material: Material, artifact: Artifact, files: list[Path], folder: Path
) -> None:
    """Keep the files that ``artifact`` has written into ``folder``, and its report."""

    def write(writer: Writer) -> Mapping[str, Any]:
        blobs = {
            file.relative_to(folder).as_posix(): writer.add(_pieces(file), file.stat().st_size)
            for file in files
        }
        return {"files": blobs, "report": artifact.report()}

    cache.write("artifact", material, write)


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            yield piece
