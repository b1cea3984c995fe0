"""Erased users taken out of generations that are there (`features.tables`)."""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from features.erasures import Erased, erased_before_ms
from features.tables import USER, describe, open_generation, read_meta, seal, sync_path


def drop_users(root: str | Path, space: str, generation: str, erased: Erased) -> int:
    """Takes erased users out of a generation that may know their past; returns how many rows went.

    The generation keeps its name, for rankings were logged with it and other users' rows are what they were: replay goes on. No lookup
    changes either, since `TableSet.find_user` does not look such a user up. Who has it mapped keeps the old files until they open it again;
    who opens it just while the folders are exchanged gets TableError once.

    Raises:
        TableError: there is no such generation, or it is not what its meta.json says.
    """
    held = open_generation(root, space, generation)
    gone = erased_before_ms(erased, held.ids(USER)) >= held.created_ms
    if not gone.any():
        return 0
    folder = open_generation(root, space, generation, verify=True).folder
    meta = read_meta(folder)
    fresh, aside = (Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent)) for prefix in (".writing-", ".dropping-"))
    try:
        files = dict(meta.files)
        for name in meta.files:
            member, _, column = name.removesuffix(".npy").rpartition(".")
            if member != USER:
                shutil.copy2(folder / name, fresh / name)
                continue
            values = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            np.save(fresh / name, values[~gone] if column == "ids" else values[np.concatenate(([True], ~gone))])
            files[name] = describe(fresh / name)
        left = {**meta.rows, USER: meta.rows[USER] - int(gone.sum())}
        dropped = meta.users_dropped + int(gone.sum())
        seal(fresh, meta.model_copy(update={"rows": left, "files": files, "users_dropped": dropped, "files_written": meta.checksums}))
        folder.rename(aside / folder.name)
        fresh.rename(folder)
        sync_path(folder.parent)
        return int(gone.sum())
    finally:
        if not folder.exists():
            (aside / folder.name).rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def recover_drops(root: str | Path, space: str) -> None:
    """Puts back what a process had aside that was killed in `drop_users`; none may be under way."""
    for aside in (Path(root) / space).glob(".dropping-*"):
        for folder in aside.iterdir():
            if not (target := Path(root) / space / folder.name).exists():
                folder.rename(target)
        shutil.rmtree(aside)
