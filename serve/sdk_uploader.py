"""The SDK's helper for work behind the model, without its wait and without its silence.

The SDK's looks once a second whether it may end, so every call that uses it takes a second; and
what its last batch raises is only logged, so labels are lost without a word. Runs over images do
not use it; the SDK's runs over videos and its speed test do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from serve.sdk import sly  # noqa: F401  (the SDK's modules are imported after this door)

# isort: split
from supervisely.nn.inference import inference as sdk_inference
from supervisely.nn.inference.uploader import Uploader

_END = object()


class PromptUploader(Uploader):  # type: ignore[misc]
    """Ends as soon as its work is done, and raises what the work raised."""

    def __init__(self, upload_f: Callable[[list[Any]], None], **options: Any) -> None:  # noqa: ANN401
        def upload(items: Sequence[Any]) -> None:
            wanted = [item for item in items if item is not _END]
            if wanted:
                upload_f(wanted)

        super().__init__(upload, **options)

    def stop(self) -> None:
        """Ends once everything that was put is done; wakes the thread that waits for more."""
        super().stop()
        self._q.put(_END)

    def notify(self, items: Sequence[Any]) -> None:
        """Tells of what was done, and of nothing else."""
        super().notify([item for item in items if item is not _END])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        is_handled = bool(super().__exit__(kind, error, trace))
        if kind is None and self.has_exception() and not is_handled:
            raise self.exception
        return is_handled


def use_prompt_uploader() -> None:
    """Puts it in the place of the SDK's in the SDK's own runs."""
    sdk_inference.Uploader = PromptUploader
