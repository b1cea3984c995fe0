"""Fetches and checks the jars of the local Kafka broker: `python -m deploy.kafka_jars`, which `make setup` runs."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

SPECIFICATION = Path(__file__).parent / "kafka"


class JarsMissingError(RuntimeError):
    """The broker's jars are absent or differ from the lock; `make setup` fetches them."""


def jars_folder() -> Path:
    """The folder where the jars lie: `FRESHRANK_KAFKA_JARS`, else `share/freshrank/kafka` of this environment."""
    override = os.environ.get("FRESHRANK_KAFKA_JARS")
    return Path(override) if override else Path(sys.prefix) / "share" / "freshrank" / "kafka"


def locked_jars(lock: Path = SPECIFICATION / "jgo.lock.toml") -> dict[str, str]:
    """File name and sha256 (hexadecimal) of each jar that the lock names."""
    entries = tomllib.loads(lock.read_text(encoding="utf-8"))["dependencies"]
    return {f"{entry['artifactId']}-{entry['version']}.jar": entry["sha256"] for entry in entries}


def kafka_version() -> str:
    """Version of the broker that the lock names."""
    return next(name for name in locked_jars() if name.startswith("kafka_2")).removesuffix(".jar").rpartition("-")[2]


def check_jars(folder: Path, *, specification: Path = SPECIFICATION, bytes_too: bool = False) -> None:
    """Compare a folder with the specification's lock: every jar is there and, with `bytes_too`, has the locked sha256.

    Raises:
        JarsMissingError: naming the first jars that are missing or differ.
    """
    locked = locked_jars(specification / "jgo.lock.toml")
    missing = [name for name in locked if not (folder / name).is_file()]
    if missing:
        raise JarsMissingError(
            f"{len(missing)} of {len(locked)} Kafka jars are missing in {folder} (first: {missing[0]}): run `make setup`"
        )
    for name, expected in locked.items() if bytes_too else ():
        actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if actual != expected:
            raise JarsMissingError(
                f"{folder / name}: sha256 {actual}, the lock says {expected}: delete it, there and in Maven's cache, and fetch again"
            )


def fetch_jars(folder: Path, *, specification: Path = SPECIFICATION) -> None:
    """Fetch the jars through Maven coordinates with jgo's own resolver (neither Java nor Maven needed) and check each against the lock.

    The folder appears whole or not at all, so that a fetch that was cut off is simply done again.

    Raises:
        JarsMissingError: the fetch failed, or a jar is not the locked one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="kafka-fetch-") as name:
        work = Path(name)
        shutil.copy(specification / "jgo.toml", work)
        jgo = Path(sys.executable).parent / "jgo"
        done = subprocess.run([jgo, "--resolver", "python", "--links", "copy", "--timeout", "60", "sync"], cwd=work, check=False)
        if done.returncode:
            raise JarsMissingError(
                f"jgo ended with {done.returncode} while it fetched Kafka's jars: is Maven Central reachable? Run `make setup` again"
            )
        flat = work / "flat"
        flat.mkdir()
        for jar in sorted((work / ".jgo").rglob("*.jar")):
            shutil.move(jar, flat / jar.name)
        check_jars(flat, specification=specification, bytes_too=True)
        unlocked = {jar.name for jar in flat.iterdir()} - locked_jars(specification / "jgo.lock.toml").keys()
        if unlocked:
            raise JarsMissingError(f"jgo fetched jars that the lock does not name: {', '.join(sorted(unlocked))}")
        shutil.rmtree(folder, ignore_errors=True)
        flat.rename(folder)


def main() -> int:
    """Fetch unless the jars are there and whole."""
    folder = jars_folder()
    try:
        check_jars(folder, bytes_too=True)
    except JarsMissingError:
        try:
            fetch_jars(folder)
        except JarsMissingError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"Kafka's {len(locked_jars())} jars are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
