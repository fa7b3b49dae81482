"""What stays on this machine after a cluster is gone: images of ours, and build caches.

Images go with `down --purge`. Caches stay unless asked: compiling Kubernetes takes 12 minutes of
CPU, the base images 4 minutes. They lie in one folder, and what stays is said.
"""

import shutil

from hack import engines
from hack.host import CACHE
from hack.progress import say, step

FOLDERS = ("images", "kernels", "kind", "local-cluster", "programs")
PREFIX = "localhost/prism-"
# Made once from pinned inputs, named by their digest: caches, not products.
KEPT = tuple(f"{PREFIX}{kind}:" for kind in ("base", "builder", "packages"))


def ours(images: list[str]) -> list[str]:
    """Of these images, the products that this tool built."""
    return sorted(i for i in images if i.startswith(PREFIX) and not i.startswith(KEPT))


def remove_images() -> None:
    """Removes our products from this machine's engine, and the layout that clusters load from."""
    shutil.rmtree(engines.CACHE / "layout", ignore_errors=True)
    try:
        engine = engines.choose(install=False)
    except engines.NoEngine:
        return
    images = ours(engine.images())
    if images:
        with step(f"remove {len(images)} images from {engine.name}"):
            engine.remove(images)


def remove_or_name_caches(remove: bool) -> None:
    """Removes our folders from the cache folder, or says which stay in it.

    Ours by name: PRISM_CACHE may be a folder that others use too.
    """
    found = [CACHE / name for name in FOLDERS if (CACHE / name).exists()]
    if not found:
        return
    names = ", ".join(path.name for path in found)
    if not remove:
        say(f"kept: build caches in {CACHE} ({names}); `down --purge --caches` removes them")
        return
    with step(f"remove {names} in {CACHE}"):
        for path in found:
            # Overlay's own mounts would keep a folder busy; a store that nobody uses has none.
            shutil.rmtree(path)
        shutil.rmtree(engines.RUN, ignore_errors=True)
    if not any(CACHE.iterdir()):
        CACHE.rmdir()
