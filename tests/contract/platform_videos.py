"""Videos in the double of the platform: their files, single frames, objects and figures.

Figures are kept and given back as the platform does: each belongs to an object, and lies in a
frame. The rest of the double's rules (names, classes, tags) hold here too.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import av
from platform_state import (
    MOMENT,
    TEAM_ID,
    WORKSPACE_ID,
    Json,
    PlatformState,
    Project,
    Refused,
    check_tag,
)
from starlette.responses import Response

from serve.sdk import sly

DONE = {"success": True}
BOUNDARY = "frame-of-many"
# What lists of classes and tags say of each beside its name.
_DESCRIBED = {
    "description": "",
    "shape": "rectangle",
    "settings": {},
    "color": "#000000",
    "createdAt": MOMENT,
    "updatedAt": MOMENT,
}


@dataclass
class StoredVideo:
    id: int
    name: str
    dataset_id: int
    content: bytes
    size_wh: tuple[int, int]
    frames_count: int
    duration_s: float
    objects: list[Json] = field(default_factory=list)
    figures: list[Json] = field(default_factory=list)

    @property
    def hash(self) -> str:
        return base64.b64encode(hashlib.sha256(self.content).digest()).decode()

    def to_json(self, project_id: int) -> Json:
        width, height = self.size_wh
        about = {"width": width, "height": height, "framesCount": self.frames_count}
        about |= {"duration": self.duration_s, "size": str(len(self.content)), "mime": "video/mp4"}
        return {
            "id": self.id,
            "name": self.name,
            "hash": self.hash,
            "link": None,
            "teamId": TEAM_ID,
            "workspaceId": WORKSPACE_ID,
            "projectId": project_id,
            "datasetId": self.dataset_id,
            "pathOriginal": f"/videos/{self.id}",
            "framesToTimecodes": [],
            "framesCount": self.frames_count,
            "frameWidth": width,
            "frameHeight": height,
            "createdAt": MOMENT,
            "updatedAt": MOMENT,
            "tags": [],
            "fileMeta": about,
            "meta": {"videoStreamIndex": 0},
            "customData": {},
            "processingPath": "1/1",
        }


@dataclass
class VideoRows:
    """The videos of one platform, and what its annotation tool was told."""

    videos: dict[int, StoredVideo] = field(default_factory=dict)
    told: list[Json] = field(default_factory=list)
    is_stopped_in_tool: bool = False


def rows_of(state: PlatformState) -> VideoRows:
    """The videos of a state: made with the first one."""
    rows = state.__dict__.setdefault("video_rows", VideoRows())
    assert isinstance(rows, VideoRows)
    return rows


def add_video_project(state: PlatformState, name: str = "clips") -> tuple[Project, int]:
    """A project for videos with one dataset."""
    project = state.add_project(name)
    project.type = "videos"
    state.set_meta(project, {"classes": [], "tags": [], "projectType": "videos"})
    return project, state.add_dataset(project.id, "ds0").id


def add_video(
    state: PlatformState, dataset_id: int, name: str, content: bytes, frames_count: int = 0
) -> StoredVideo:
    """A video as the platform would know it; ``frames_count`` where it is to be wrong about it."""
    size_wh, count, seconds = (640, 480), 0, 1.0
    try:
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            size_wh = (stream.width, stream.height)
            seconds = float((container.duration or av.time_base) / av.time_base)
            count = sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, IndexError):
        count = count or 1
    video = StoredVideo(
        state.new_id(), name, dataset_id, content, size_wh, frames_count or count, seconds
    )
    rows_of(state).videos[video.id] = video
    return video


def video_at(state: PlatformState, key: Any) -> StoredVideo:
    videos = rows_of(state).videos
    if key not in videos:
        raise Refused(f"Video {key} is not found.", status=404)
    return videos[key]


def project_of(state: PlatformState, video: StoredVideo) -> Project:
    return state.project(state.dataset(video.dataset_id).project_id)


def annotation_of(state: PlatformState, video: StoredVideo) -> Json:
    frames: dict[int, list[Json]] = {}
    for figure in video.figures:
        frames.setdefault(figure["meta"]["frame"], []).append(
            {key: value for key, value in figure.items() if key != "meta"}
        )
    width, height = video.size_wh
    return {
        "videoId": video.id,
        "videoName": video.name,
        "datasetId": video.dataset_id,
        "createdAt": MOMENT,
        "updatedAt": MOMENT,
        "description": "",
        "tags": [],
        "size": {"width": width, "height": height},
        "framesCount": video.frames_count,
        "objects": video.objects,
        "frames": [{"index": index, "figures": frames[index]} for index in sorted(frames)],
    }


# Methods


def video_info(state: PlatformState, payload: Json) -> Json:
    video = video_at(state, payload["id"])
    return video.to_json(project_of(state, video).id)


def videos_list(state: PlatformState, payload: Json) -> Json:
    rows = [
        video.to_json(project_of(state, video).id)
        for video in rows_of(state).videos.values()
        if payload.get("datasetId") in (None, video.dataset_id)
    ]
    for rule in payload.get("filter", []):
        wanted = rule["value"] if rule.get("operator") == "in" else [rule["value"]]
        rows = [row for row in rows if row.get(rule["field"]) in wanted]
    return _page(rows)


def frame_content(video: StoredVideo, index: int) -> bytes:
    """One frame as a PNG."""
    with av.open(io.BytesIO(video.content)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == index:
                file = io.BytesIO()
                frame.to_image().save(file, "PNG")
                return file.getvalue()
    raise Refused(f"Video {video.id} has no frame {index}.", status=404)


def frames_download(state: PlatformState, payload: Json) -> Response:
    """Frames by their index, as parts of one body."""
    video = video_at(state, payload["videoId"])
    lines = []
    for index in payload["frames"]:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{index}"\r\n\r\n'
        lines.append(head.encode() + frame_content(video, index) + b"\r\n")
    body = b"".join(lines) + f"--{BOUNDARY}--\r\n".encode()
    return Response(body, media_type=f"multipart/form-data; boundary={BOUNDARY}")


def objects_add(state: PlatformState, payload: Json) -> list[Json]:
    added = []
    for item in payload["annotationObjects"]:
        video = video_at(state, item["entityId"])
        meta = project_of(state, video).meta
        known = {one["id"]: one["title"] for one in meta["classes"]}
        if item["classId"] not in known:
            raise Refused(f"Class {item['classId']} is not in the project.", status=404)
        row = {"id": state.new_id(), "classId": item["classId"], "tags": []}
        row |= {"classTitle": known[item["classId"]], "entityId": video.id}
        video.objects.append({**row, "createdAt": MOMENT, "updatedAt": MOMENT, "datasetId": 0})
        added.append(row)
    return added


def object_at(state: PlatformState, key: Any) -> tuple[StoredVideo, Json]:
    for video in rows_of(state).videos.values():
        for one in video.objects:
            if one["id"] == key:
                return video, one
    raise Refused(f"Object {key} is not found.", status=404)


def objects_tag(state: PlatformState, payload: Json) -> list[Json]:
    metas = {one["id"]: one for one in state.project(payload["projectId"]).meta["tags"]}
    added = []
    for item in payload["tags"]:
        _, owner = object_at(state, item["objectId"])
        meta = metas.get(item["tagId"])
        if meta is None:
            raise Refused(f"Tag {item['tagId']} is not in the project.", status=404)
        check_tag(item.get("value"), meta, "objectsOnly")
        tag = {"id": state.new_id(), "tagId": meta["id"], "name": meta["name"]}
        owner["tags"].append({**tag, "value": item.get("value"), "createdAt": MOMENT})
        added.append(tag)
    return added


def objects_remove(state: PlatformState, payload: Any) -> Json:
    found = [object_at(state, key) for key in payload]
    for video, one in found:
        video.objects.remove(one)
        video.figures[:] = [row for row in video.figures if row["objectId"] != one["id"]]
    return DONE


def figures_add(state: PlatformState, payload: Json) -> list[Json]:
    """All of them or, where one does not fit, none."""
    video = video_at(state, payload["entityId"])
    width, height = video.size_wh
    known = {one["id"] for one in video.objects}
    for item in payload["figures"]:
        if item["objectId"] not in known:
            raise Refused(f"Object {item['objectId']} is not one of video {video.id}.", status=404)
        if not 0 <= item["meta"]["frame"] < video.frames_count:
            raise Refused(f"Video {video.id} has no frame {item['meta']['frame']}.")
        shape = sly.Rectangle.from_json(item["geometry"])
        if not (0 <= shape.left <= shape.right <= width and 0 <= shape.top <= height):
            raise Refused(f"A figure lies outside of the frame of {video.size_wh}.")
    kept = ("objectId", "geometryType", "geometry", "meta", "trackId", "nnCreated", "nnUpdated")
    added = [
        {"id": state.new_id(), **{key: item[key] for key in kept if key in item}}
        for item in payload["figures"]
    ]
    video.figures += added
    return [{"id": one["id"]} for one in added]


def figures_remove(state: PlatformState, payload: Json) -> Json:
    """Those of videos here, and all others where images are kept."""
    wanted = set(payload["figureIds"])
    for video in rows_of(state).videos.values():
        found = {one["id"] for one in video.figures} & wanted
        video.figures[:] = [one for one in video.figures if one["id"] not in found]
        wanted -= found
    if wanted:
        state.remove_figures(sorted(wanted))
    return DONE


def classes_list(state: PlatformState, payload: Json) -> Json:
    return _page(
        [
            {**_DESCRIBED, "projectId": payload["projectId"], "id": one["id"], "name": one["title"]}
            for one in state.project(payload["projectId"]).meta["classes"]
        ]
    )


def tags_list(state: PlatformState, payload: Json) -> Json:
    return _page(
        [
            {**_DESCRIBED, "projectId": payload["projectId"], "id": one["id"], "name": one["name"]}
            for one in state.project(payload["projectId"]).meta["tags"]
        ]
    )


def tool_told(state: PlatformState, payload: Json) -> Json:
    rows = rows_of(state)
    rows.told.append(payload)
    return {"stopped": rows.is_stopped_in_tool}


def _page(rows: list[Json]) -> Json:
    """One page with everything."""
    return {"total": len(rows), "perPage": 500, "pagesCount": 1, "entities": rows, "after": None}


METHODS: dict[str, Callable[[PlatformState, Any], Any]] = {
    "videos.info": video_info,
    "videos.list": videos_list,
    "videos.download": lambda state, asked: Response(video_at(state, asked["id"]).content),
    "videos.bulk.download-frame": frames_download,
    "videos.annotations.bulk.info": lambda state, asked: [
        annotation_of(state, video_at(state, key)) for key in asked["videoIds"]
    ],
    "annotation-objects.bulk.add": objects_add,
    "annotation-objects.tags.bulk.add": objects_tag,
    "annotation-objects.bulk.remove": objects_remove,
    "figures.bulk.add": figures_add,
    "figures.bulk.remove": figures_remove,
    "advanced.object_classes.list": classes_list,
    "tags.list": tags_list,
    "videos.notify-annotation-tool": tool_told,
}
