"""The bytes of the platform's images, many in a request; one that cannot be had is a Failure.

They stay bytes: whoever opens them applies the EXIF rotation and refuses damaged files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from requests.exceptions import ConnectionError as ConnectionFailed
from requests.exceptions import Timeout

from florence2.engine.ask import AnyImage
from florence2.records import Failure
from serve.platform.failures import failure_of
from serve.sdk import sly


def download_images(api: sly.Api, infos: Sequence[sly.ImageInfo]) -> list[AnyImage]:
    """The bytes of every image, or its Failure, in order.

    A request that fails is sent again image by image, so that one bad image costs only itself;
    not so one that found no connection, which the SDK has tried for minutes by then.
    """
    ids_of: dict[int, list[int]] = defaultdict(list)
    for info in infos:
        if info.id not in ids_of[info.dataset_id]:
            ids_of[info.dataset_id].append(info.id)
    got: dict[int, AnyImage] = {}
    for dataset_id, ids in ids_of.items():
        got.update(_download_dataset(api, dataset_id, ids))
    return [got[info.id] for info in infos]


def _download_dataset(api: sly.Api, dataset_id: int, ids: list[int]) -> dict[int, AnyImage]:
    try:
        return dict(zip(ids, api.image.download_bytes(dataset_id, ids), strict=True))
    except Exception as error:  # noqa: BLE001  (the SDK and its transport raise what they like)
        if len(ids) == 1 or isinstance(error, ConnectionFailed | Timeout):
            sly.logger.warning(f"Images {ids} cannot be downloaded: {error!r}")
            return {one: failed_download(one, error) for one in ids}
        sly.logger.warning(
            f"{len(ids)} images of dataset {dataset_id} are downloaded one by one, because their "
            f"common download failed: {error!r}"
        )
    return {
        image_id: image
        for one in ids
        for image_id, image in _download_dataset(api, dataset_id, [one]).items()
    }


def failed_download(image_id: int, error: Exception) -> Failure:
    """The failure of an image whose bytes did not come."""
    return failure_of(error, f"Image {image_id} cannot be downloaded", "download_failed")
